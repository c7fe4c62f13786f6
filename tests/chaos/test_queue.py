# SPDX-License-Identifier: MIT
"""Queues that go away, are taken away, or may not be used any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

import pika
import pytest

from tests.chaos.load import COMPONENT, LOSS, Loads, Scale
from tests.rabbitmq_node import RabbitNode
from tests.transport.proxy import Proxy

#: Seconds for which RabbitMQ waits for an ack, and those that a late handler takes.
CONSUMER_TIMEOUT = 3
LATE = 3 * CONSUMER_TIMEOUT


def test_queues_that_are_deleted(loads: Loads, broker_url: str, scale: Scale) -> None:
    """A consumer makes its queue anew; meanwhile messages are reported as unroutable.

    What is in a queue goes with it, whatever was confirmed. So it is empty when it is deleted.
    """
    with (
        loads() as load,
        contextlib.closing(pika.BlockingConnection(pika.URLParameters(broker_url))) as connection,
    ):
        load.start()
        for _ in scale.rounds(2.0):
            load.wait_for_progress()
            with load.pause():
                load.wait_for(load.is_drained, "the queue is empty")
                connection.channel().queue_delete(COMPONENT)
        load.wait_for_progress()

        judgement = load.finish()

    assert set(judgement.errors) <= {"UnroutableError"}


@pytest.fixture
def consumer_timeout(rabbitmq_node: RabbitNode) -> Iterator[None]:
    """Have RabbitMQ wait some seconds for an ack, and look each second."""

    def set_limits(timeout_ms: int, interval_ms: int) -> None:
        # Each new channel reads them. The second is not among those of rabbitmq.conf.
        rabbitmq_node.ctl(
            "eval",
            f"application:set_env(rabbit, consumer_timeout, {timeout_ms}), "
            f"application:set_env(rabbit, channel_tick_interval, {interval_ms}).",
        )

    set_limits(1000 * CONSUMER_TIMEOUT, 1000)
    yield
    set_limits(1_800_000, 60_000)  # the defaults


@pytest.mark.chaos
@pytest.mark.rabbitmq
def test_acks_that_the_broker_does_not_wait_for(
    consumer_timeout: None, loads: Loads, scale: Scale
) -> None:
    """A handler that takes longer than the broker waits costs a channel, and no message."""
    with loads() as load:
        consumer = load.start_consumer("--late", str(LATE))
        load.start_producer("--mode", "batch")
        load.start_producer("--mode", "single", "--rate", "5", kinds="late")
        for _ in scale.rounds():
            with load.noticing("PRECONDITION_FAILED", [consumer]):
                pass
        load.wait_for_progress(1)

        judgement = load.finish()

    assert 0 < judgement.duplicates


@pytest.mark.rabbitmq
@pytest.mark.parametrize(
    "may_declare",
    [
        pytest.param(True, id="publish"),
        pytest.param(False, id="publish and declare", marks=pytest.mark.chaos),
    ],
)
def test_permissions_that_are_revoked_for_a_while(
    loads: Loads, rabbitmq_node: RabbitNode, broker_url: str, scale: Scale, may_declare: bool
) -> None:
    """Messages that may not be published have failed, and are not delivered."""
    vhost = unquote(urlsplit(broker_url).path[1:])
    configure = ".*" if may_declare else "^$"

    def permit(write: str, configure: str) -> None:
        rabbitmq_node.ctl("set_permissions", "-p", vhost, "guest", configure, write, ".*")

    with Proxy(broker_url) as proxy, loads() as load:
        load.start_consumer()
        for mode in ("single", "batch"):
            load.start_producer("--mode", mode, url=proxy.url)
        for _ in scale.rounds(2.0):
            load.wait_for_progress()
            proxy.hold_answers()
            # RabbitMQ remembers in each channel what it may do, so the channels must be new.
            permit(write="^$", configure=configure)
            proxy.cut()
            proxy.release_answers()
            load.wait_for_failures(3)
            permit(write=".*", configure=".*")
        load.wait_for_progress()

        judgement = load.finish()

    # Without the right to declare, it is the exchange that is refused.
    refusal = "PublishRefusedError" if may_declare else "ChannelClosedError"
    assert {refusal} == set(judgement.errors)


@pytest.mark.chaos
@pytest.mark.rabbitmq
def test_a_virtual_host_that_is_closed_for_a_while(
    loads: Loads, rabbitmq_node: RabbitNode, broker_url: str, scale: Scale
) -> None:
    """Programs that lost their permission to connect try until they have it again."""
    vhost = unquote(urlsplit(broker_url).path[1:])

    def count_refusals() -> int:
        return rabbitmq_node.log_tail(10_000).count(f"access to vhost '{vhost}' refused")

    def wait_for_refusals(total: int) -> None:
        load.wait_for(lambda: count_refusals() >= total, f"the broker refused {total} times")

    with loads() as load:
        load.start()
        for _ in scale.rounds(2.0):
            load.wait_for_progress()
            before = count_refusals()
            with load.noticing(LOSS):
                rabbitmq_node.ctl("clear_permissions", "-p", vhost, "guest")
                rabbitmq_node.close_connections("chaos", vhost)
            wait_for_refusals(before + len(load.programs))
            rabbitmq_node.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
        load.wait_for_progress()

        load.finish()
