# SPDX-License-Identifier: MIT
"""Consumers that the broker has lost without a word are noticed, and no others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from postage.broker import Broker
from postage.settings import Settings
from postage.topology import Queue, QueueSpec
from postage.transport.watchdog import Sight
from tests.rabbitmq_node import RabbitNode
from tests.transport.test_subscriber import BOX, CRATE, Peer, Reader

#: Seconds between two looks: short, so that there are many of them in a test.
INTERVAL = 0.1

QUORUM = Queue("quorum").spec()
IN_LINE = replace(
    Queue("line", type="classic", dead_letter=None).spec(),
    arguments={"x-queue-type": "classic", "x-single-active-consumer": True},
)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    with Broker() as broker:
        monkeypatch.setenv("POSTAGE_URL", broker.url)
        yield broker


@pytest.fixture
def peer(broker: Broker) -> Iterator[Peer]:
    with Peer(broker.url) as peer:
        yield peer


@pytest.fixture
def reader(broker: Broker) -> Iterator[Reader]:
    with Reader(Settings.from_environment(), watch_interval=INTERVAL) as reader:
        yield reader


@pytest.mark.parametrize("queue", [BOX, QUORUM], ids=["classic", "quorum"])
def test_a_consumer_that_the_broker_forgot_is_consumed_anew(
    broker: Broker, reader: Reader, peer: Peer, queue: QueueSpec, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the only one of its queue, so the broker counts none."""
    reader.bind(queue)
    reader.consume(queue)
    assert 1 == broker.faults.forget_consumers(queue.name)
    reader.wait_for(lambda: 1 == peer.consumers(queue.name))
    assert f"queue '{queue.name}': the broker has no consumer; declaring" in caplog.text
    peer.send_numbers(queue.name, 1)
    assert [b"1"] == reader.work(1)


def test_what_was_delivered_by_a_lost_consumer_is_not_settled_twice(
    broker: Broker, reader: Reader, peer: Peer
) -> None:
    """The broker has put it back, and delivers it again; the late ack does no harm."""
    reader.bind(BOX)
    reader.consume(BOX)
    peer.send_numbers("box", 1)
    [first] = reader.take()
    broker.faults.forget_consumers("box")
    reader.wait_for(lambda: 1 == peer.consumers("box"))
    [again] = reader.take()
    assert (b"1", True) == (again.body, again.redelivered)
    reader.ack(first, again)
    peer.send_numbers("box", 2)
    assert [b"2"] == reader.work(1)
    reader.subscriber.close(30.0)
    assert 0 == peer.count("box")


def test_the_other_consumers_of_a_component_go_on(
    broker: Broker, reader: Reader, peer: Peer
) -> None:
    """What they have in hand stays theirs."""
    reader.bind(BOX)
    reader.bind(CRATE)
    reader.consume(BOX, CRATE)
    peer.send_numbers("box", 1)
    [first] = reader.take()
    broker.faults.forget_consumers("crate")
    reader.wait_for(lambda: 1 == peer.consumers("crate"))
    assert reader.subscriber.is_current(first)


def test_a_consumer_that_starves_beside_another_one_is_consumed_anew(
    broker: Broker, reader: Reader, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker counts a consumer, of somebody who takes nothing more, and messages wait."""
    reader.bind(BOX)
    reader.consume(BOX)
    broker.faults.forget_consumers("box")
    peer.channel.basic_qos(prefetch_count=1)
    peer.channel.basic_consume("box", lambda *_: None)  # a busy one: it has its message in hand
    peer.send_numbers("box", 1, 2)
    reader.wait_for(lambda: "message(s) wait and none comes" in caplog.text)
    assert b"2" in reader.work(1)


def test_a_queue_that_was_deleted_without_a_word_is_made_anew(
    broker: Broker, reader: Reader, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """As after the loss of a node that could not tell."""
    reader.bind(BOX)
    reader.consume(BOX)
    broker.faults.forget_consumers("box")  # so nobody is told
    peer.channel.queue_delete("box")
    reader.wait_for(lambda: "declaring and consuming anew" in caplog.text)
    reader.wait_for(lambda: reader.subscriber.consuming)
    peer.send_numbers("box", 1)
    assert [b"1"] == reader.work(1)


def test_a_consumer_that_is_well_is_left_alone(
    reader: Reader, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it waits for messages, has them in hand, or waits in line behind another."""
    caplog.set_level(logging.DEBUG, "postage")
    peer.channel.queue_declare("line", durable=True, arguments=dict(IN_LINE.arguments))
    peer.channel.basic_consume("line", lambda *_: None)
    for queue in (BOX, CRATE, IN_LINE):
        reader.bind(queue)
    reader.consume(BOX, CRATE, IN_LINE)
    peer.send_numbers("box", *range(20))  # twice the prefetch
    peer.send_numbers("line", *range(3))
    tags = [each.tag for each in reader.subscriber._consumers.values()]
    looks: list[bool] = []
    script = reader.connection.probe

    def counting(*args: object) -> None:
        looks.append(True)
        script(*args)  # type: ignore[arg-type]  # passed on as they are

    reader.connection.probe = counting  # type: ignore[method-assign]  # to count
    reader.wait_for(lambda: len(looks) >= 5)
    reader.work(20)
    reader.wait_for(lambda: len(looks) >= 10)
    assert tags == [each.tag for each in reader.subscriber._consumers.values()]
    assert "declaring and consuming anew" not in caplog.text


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        (None, Sight("a", 1, 5, 1), False),
        (Sight("a", 1, 5, 1), Sight("a", 1, 5, 1), True),
        (Sight("a", 1, 5, 1), Sight("a", 2, 5, 1), False),
        (Sight("a", 1, 5, 1), Sight("b", 1, 5, 1), False),
        (Sight("a", 1, 0, 1), Sight("a", 1, 5, 1), False),
        (Sight("a", 1, 5, 1), Sight("a", 1, 0, 1), False),
    ],
)
def test_it_takes_two_looks_to_see_that_a_consumer_starves(
    earlier: Sight | None, later: Sight, expected: bool
) -> None:
    """Messages may be on their way at one of them."""
    assert expected is later.is_starved_since(earlier)


@pytest.mark.parametrize("queue", [BOX, QUORUM], ids=["classic", "quorum"])
def test_a_consumer_that_rabbitmq_forgot_is_consumed_anew(
    rabbitmq_node: RabbitNode, broker_url: str, queue: QueueSpec
) -> None:
    """What it had in hand comes again, to whoever consumes then."""
    settings = Settings.from_environment()
    with Reader(settings, watch_interval=INTERVAL) as reader, Peer(broker_url) as peer:
        reader.bind(queue)
        reader.consume(queue)
        rabbitmq_node.forget_consumers(queue.name, settings.vhost)
        reader.wait_for(lambda: 1 == peer.consumers(queue.name))
        peer.send_numbers(queue.name, 1)
        assert [b"1"] == reader.work(1)
