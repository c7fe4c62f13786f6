# SPDX-License-Identifier: MIT
"""The two brokers, each with a virtual host for the scenarios."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from postage.broker import Broker
from tests.broker.differential.transcripts import VHOST
from tests.rabbitmq_node import RabbitNode


@pytest.fixture(scope="session")
def rabbitmq_vhost(rabbitmq_node: RabbitNode) -> Iterator[str]:
    """The URL of a virtual host of RabbitMQ."""
    yield rabbitmq_node.add_vhost(VHOST)
    rabbitmq_node.delete_vhost(VHOST)


@pytest.fixture(scope="session")
def embedded_vhost() -> Iterator[str]:
    """The URL of a virtual host of the embedded broker."""
    with Broker() as broker:
        yield broker.add_vhost(VHOST)


@pytest.fixture(
    scope="session", params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)]
)
def vhost(request: pytest.FixtureRequest) -> str:
    """The URL of a virtual host of each of the brokers in turn."""
    url: str = request.getfixturevalue(f"{request.param}_vhost")
    return url
