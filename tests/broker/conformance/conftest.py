# SPDX-License-Identifier: MIT
"""Clients that we did not write judge the embedded broker.

Each test runs on RabbitMQ and on the embedded broker: what it states is true of the first, and must
be true of the second.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest

from postage.broker import Broker
from tests.broker.conformance.servers import Embedded, RabbitMQ, Server

# Their releases for Python 3.10 want different releases of their common codec, and it cannot write
# negative bytes.
collect_ignore = [] if sys.version_info >= (3, 11) else ["test_aio_pika.py", "test_amqpstorm.py"]

BROKERS = [
    pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
    pytest.param("embedded", marks=pytest.mark.embedded),
]

#: Seconds that a test gets. Some of these clients wait for ever for an answer that does not come.
DEADLINE_SECONDS = 60.0

#: Seconds until a client that waits for ever again, while it closes, is interrupted again.
AGAIN_SECONDS = 5.0


@pytest.fixture(scope="session", params=BROKERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each of the brokers."""
    if request.param == "rabbitmq":
        node = request.getfixturevalue("rabbitmq_node")
        yield RabbitMQ(node, request.getfixturevalue("rabbitmq_urls"))
    else:
        with Broker() as broker:
            yield Embedded(broker)


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    """The URL of an empty virtual host."""
    url = server.new_url()
    yield url
    server.discard(url)


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Interrupt a test that takes too long."""

    def interrupt(_signal_number: int, _frame: object) -> None:
        raise TimeoutError(f"the test takes more than {DEADLINE_SECONDS} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_SECONDS, AGAIN_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before)
