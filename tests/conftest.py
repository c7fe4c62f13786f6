# SPDX-License-Identifier: MIT
"""Fixtures that every test may use, and the check that a test leaves nothing behind.

A test that asks for `broker_url` or `node` runs twice: on the embedded broker, and on RabbitMQ if
it is installed. What carries the marker ``rabbitmq`` itself, or asks for `rabbitmq_node`, runs on
RabbitMQ alone; what carries ``embedded``, or asks for `embedded_node`, on the embedded broker
alone. The tests carry these markers afterwards, so that ``-m rabbitmq`` and ``-m "not rabbitmq"``
choose the brokers.

Two environment variables choose them, too:

``POSTAGE_TEST_URL``
    a broker that runs already; the tests then share the one virtual host that the URL names.
``POSTAGE_TEST_RABBITMQ=required``
    without RabbitMQ the tests that need it fail, instead of being left out.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pika
import psutil
import pytest

from tests.embedded_node import EmbeddedNode
from tests.letters import Mailbox, Sender
from tests.nodes import Node
from tests.rabbitmq_node import RabbitNode, find_scripts

#: Virtual hosts made at once. With rabbitmqctl a call takes 0.5 s and each host 0.03 s, but the
#: more exist, the slower all becomes: with 400 RabbitMQ needs 40 s to start.
VHOSTS_AT_ONCE = 20

#: The brokers on which a test runs, each with its marker. The last stands for POSTAGE_TEST_URL.
EMBEDDED = pytest.param("embedded", marks=pytest.mark.embedded)
RABBITMQ = pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)
GIVEN = pytest.param("given")

#: The marker of what asks for a fixture.
MARKERS = {"embedded_node": "embedded", "rabbitmq_installed": "rabbitmq"}

#: How many tests were left out since RabbitMQ is missing.
LEFT_OUT = pytest.StashKey[int]()

#: Seconds that threads, sockets and children of a test get to end.
LEFTOVER_DEADLINE_SECONDS = 5.0


def pytest_configure() -> None:
    # SIGTERM, too, leaves by way of the fixtures, which end the processes that they started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "broker_kind" not in metafunc.fixturenames:
        return
    if "POSTAGE_TEST_URL" in os.environ:
        brokers = [GIVEN]
    elif _is_only_for("rabbitmq", metafunc):
        brokers = [RABBITMQ]
    elif _is_only_for("embedded", metafunc):
        brokers = [EMBEDDED]
    else:
        brokers = [EMBEDDED, RABBITMQ]
    metafunc.parametrize("broker_kind", brokers, indirect=True, scope="session")


def pytest_itemcollected(item: pytest.Item) -> None:
    for fixture in getattr(item, "fixturenames", ()):
        if fixture in MARKERS:
            item.add_marker(MARKERS[fixture])


@pytest.hookimpl(trylast=True)  # after the options -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _may_use_rabbitmq():
        return
    left_out = [item for item in items if item.get_closest_marker("rabbitmq")]
    items[:] = [item for item in items if item not in set(left_out)]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    # One line, where skips would be one for each test.
    if number := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{number} tests on RabbitMQ were left out: rabbitmq-server is not installed"
        )


def _may_use_rabbitmq() -> bool:
    """Tell whether a test that needs RabbitMQ may begin, if only to say that it is missing."""
    is_chosen = "POSTAGE_TEST_URL" in os.environ
    is_required = os.environ.get("POSTAGE_TEST_RABBITMQ") == "required"
    return is_chosen or is_required or find_scripts() is not None


def _is_only_for(broker: str, metafunc: pytest.Metafunc) -> bool:
    asked = f"{broker}_node" in metafunc.fixturenames
    return asked or metafunc.definition.get_closest_marker(broker) is not None


@pytest.fixture(scope="session")
def nodes() -> list[Node]:
    """The nodes that live longer than a test."""
    return []


@pytest.fixture(scope="session")
def rabbitmq_installed() -> None:
    """Fail what needs RabbitMQ if it is missing; for tests that start a node of their own."""
    if find_scripts() is None:
        pytest.fail("rabbitmq-server is not installed")


@pytest.fixture(scope="session")
def rabbitmq_node(rabbitmq_installed: None, nodes: list[Node]) -> Iterator[RabbitNode]:
    """A private RabbitMQ node, which all tests share; it is started by the first that asks."""
    _refuse_a_given_broker()
    with RabbitNode() as node:
        nodes.append(node)
        yield node


@pytest.fixture(scope="session")
def embedded_node(nodes: list[Node]) -> Iterator[EmbeddedNode]:
    """An embedded broker in a process of its own, which all tests share."""
    _refuse_a_given_broker()
    with EmbeddedNode() as node:
        nodes.append(node)
        yield node


def _refuse_a_given_broker() -> None:
    if "POSTAGE_TEST_URL" in os.environ:
        pytest.skip("needs a private node, and POSTAGE_TEST_URL names a broker")


@pytest.fixture(scope="session")
def broker_kind(request: pytest.FixtureRequest) -> str:
    """The broker on which a test runs: "embedded", "rabbitmq" or "given"."""
    kind: str = request.param
    return kind


@pytest.fixture(scope="session")
def node(broker_kind: str, request: pytest.FixtureRequest) -> Node:
    """The private node on which a test runs, which it may stop, kill and ask."""
    if broker_kind == "given":
        _refuse_a_given_broker()
    node: Node = request.getfixturevalue(f"{broker_kind}_node")
    return node


@pytest.fixture(scope="session")
def embedded_urls(embedded_node: EmbeddedNode) -> Iterator[str]:
    """An endless supply of URLs of the embedded broker, one for each test."""
    return _urls_of_fresh_vhosts(embedded_node)


@pytest.fixture(scope="session")
def rabbitmq_urls(rabbitmq_node: RabbitNode) -> Iterator[str]:
    """An endless supply of URLs of RabbitMQ, one for each test."""
    return _urls_of_fresh_vhosts(rabbitmq_node)


@pytest.fixture(scope="session")
def given_urls() -> Iterator[str]:
    """The one URL that was given, again and again."""
    return itertools.repeat(os.environ["POSTAGE_TEST_URL"])


@pytest.fixture
def broker_url(
    broker_kind: str,
    request: pytest.FixtureRequest,
    nodes: list[Node],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The URL of an empty virtual host, which is also in POSTAGE_URL, for child processes too."""
    for node in nodes:
        node.ensure_running()
    url: str = next(request.getfixturevalue(f"{broker_kind}_urls"))
    monkeypatch.setenv("POSTAGE_URL", url)
    return url


@pytest.fixture
def mailbox(broker_url: str) -> Iterator[Mailbox]:
    """A queue for what `producer` sends."""
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(broker_url))) as connection:
        yield Mailbox(connection.channel())


@pytest.fixture
def producer(broker_url: str) -> Iterator[Sender]:
    """A producer, which is closed with the test."""
    with Sender() as producer:
        yield producer


@pytest.fixture(autouse=True)
def no_defect_of_the_broker(nodes: list[Node]) -> Iterator[None]:
    """Fail a test during which the embedded broker logs an error."""
    yield
    for node in nodes:
        if isinstance(node, EmbeddedNode) and (complaints := node.complaints()):
            pytest.fail(f"the embedded broker logged an error:\n{complaints}", pytrace=False)


@pytest.fixture(autouse=True)
def nothing_left_over(nodes: list[Node]) -> Iterator[None]:
    """Fail a test that leaves threads, sockets or child processes behind."""
    before = _resources(nodes)
    yield
    deadline = time.monotonic() + LEFTOVER_DEADLINE_SECONDS
    while leftover := _resources(nodes) - before:
        if time.monotonic() > deadline:
            pytest.fail("left over: " + "; ".join(map(_describe, leftover)), pytrace=False)
        gc.collect()
        time.sleep(0.01)


def _urls_of_fresh_vhosts(node: Node) -> Iterator[str]:
    used: list[str] = []
    for batch in itertools.count(1):
        fresh = [f"test-{batch}-{number}" for number in range(VHOSTS_AT_ONCE)]
        node.replace_vhosts(used, fresh)
        for vhost in fresh:
            yield node.url_of(vhost)
        used = fresh


def _resources(nodes: list[Node]) -> set[threading.Thread | psutil.Process | str]:
    """Return the threads, sockets and children of this process that belong to no node."""
    of_nodes = {pid for node in nodes for pid in node.pids}
    children = {child for child in psutil.Process().children() if child.pid not in of_nodes}
    return {*threading.enumerate(), *_sockets(), *children}


def _sockets() -> Iterator[str]:
    """Yield what Linux calls the open sockets: ``socket:[inode]``."""
    descriptors = Path("/proc/self/fd")
    for descriptor in descriptors.iterdir() if descriptors.exists() else ():
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(descriptor)
            if target.startswith("socket:"):
                yield target


def _describe(resource: threading.Thread | psutil.Process | str) -> str:
    if not isinstance(resource, str):
        return repr(resource)
    for connection in psutil.Process().net_connections("all"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{connection.fd}") == resource:
                return f"{resource} from {connection.laddr} to {connection.raddr}"
    return resource
