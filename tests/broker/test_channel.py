# SPDX-License-Identifier: MIT
"""Confirms, consumers and settlements, as a client of the embedded broker sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import (
    ConnectionClosedByBroker,
    NackError,
    UnroutableError,
)

from postage.broker import Broker
from postage.broker.channel import coalesced
from tests.waiting import wait_until


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A broker that closes what is unsettled for a second."""
    with Broker(consumer_timeout=1.0) as broker:
        yield broker


@pytest.fixture
def channel(broker: Broker) -> Iterator[BlockingChannel]:
    """A channel to it."""
    with pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
        yield connection.channel()


def take(channel: BlockingChannel, queue: str, number: int, **options: Any) -> list[Any]:
    """Consume so many messages, and return what came without settling it."""
    found: list[Any] = []
    channel.basic_consume(queue, lambda *delivery: found.append(delivery[1:]), **options)
    wait_until(lambda: channel.connection.process_data_events(0) or len(found) >= number)
    return found


@given(st.sets(st.integers(1, 40)), st.sets(st.integers(1, 40)))
def test_each_publishing_is_acknowledged_once_and_none_too_early(
    acks: set[int], unconfirmed: set[int]
) -> None:
    """One acknowledgement of many covers nothing that still waits for the disk."""
    acks -= unconfirmed
    open_ones = {*acks, *unconfirmed}
    for number, multiple in coalesced(sorted(acks), unconfirmed):
        covered = {each for each in open_ones if each <= number} if multiple else {number}
        assert covered and not covered & unconfirmed
        open_ones -= covered
    assert unconfirmed == open_ones


def test_many_confirms_are_one_frame() -> None:
    """What a client must count is little."""
    assert [(1000, True)] == coalesced(list(range(1, 1001)), set())


def test_what_is_unsettled_for_too_long_costs_the_channel(
    channel: BlockingChannel, caplog: pytest.LogCaptureFixture
) -> None:
    """The message goes to somebody else, as with consumer_timeout of RabbitMQ."""
    channel.queue_declare("q")
    channel.basic_publish("", "q", b"hello")
    take(channel, "q", 1)
    wait_until(lambda: channel.connection.process_data_events(0.05) or channel.is_closed)
    assert (
        "(406): 'PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout "
        "value used: 1000 ms."
    ) in caplog.text
    other = channel.connection.channel()
    assert b"hello" == other.basic_get("q", auto_ack=True)[2]


def test_the_prefetch_of_a_channel_counts_for_all_its_consumers(channel: BlockingChannel) -> None:
    """What was got singly does not count."""
    for name in ("a", "b"):
        channel.queue_declare(name)
        for number in range(3):
            channel.basic_publish("", name, b"%d" % number)
    channel.basic_get("a")
    channel.basic_qos(prefetch_count=3, global_qos=True)
    found = take(channel, "a", 2) + take(channel, "b", 1)
    channel.connection.process_data_events(0.1)
    assert [b"1", b"2"] == [body for _, _, body in found if body][:2]
    assert 2 == channel.queue_declare("b", passive=True).method.message_count
    channel.basic_ack(found[0][0].delivery_tag)
    wait_until(lambda: channel.connection.process_data_events(0) or len(found) == 3)
    assert 1 == channel.queue_declare("b", passive=True).method.message_count


def test_strict_mode_refuses_what_rabbitmq_4_3_refuses() -> None:
    """The name of the feature is in the text, as people search for it."""
    with Broker(strict=True) as broker:
        parameters = pika.URLParameters(broker.url)
        with pytest.raises(ConnectionClosedByBroker) as caught:
            pika.BlockingConnection(parameters).channel().queue_declare("q")
        assert (541, True) == (
            caught.value.reply_code,
            "transient_nonexcl_queues" in caught.value.reply_text,
        )
        with pytest.raises(ConnectionClosedByBroker) as caught:
            pika.BlockingConnection(parameters).channel().basic_qos(0, 5, global_qos=True)
        assert "global_qos" in caught.value.reply_text
        with pika.BlockingConnection(parameters) as connection:
            channel = connection.channel()
            channel.queue_declare("durable", durable=True)
            channel.queue_declare("mine", exclusive=True)
            channel.basic_qos(prefetch_count=5)


def test_a_full_queue_nacks_and_a_missing_one_returns(channel: BlockingChannel) -> None:
    """A publisher hears of both before its confirm."""
    channel.confirm_delivery()
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
    channel.queue_declare("full", arguments=limits)
    channel.basic_publish("", "full", b"1", mandatory=True)
    with pytest.raises(NackError):
        channel.basic_publish("", "full", b"2", mandatory=True)
    with pytest.raises(UnroutableError):
        channel.basic_publish("", "missing", b"3", mandatory=True)


def test_what_a_channel_held_goes_before_what_came_later(channel: BlockingChannel) -> None:
    """A channel that closes gives back all of its deliveries at once."""
    channel.queue_declare("q")
    for number in range(4):
        channel.basic_publish("", "q", b"%d" % number)
    channel.basic_qos(prefetch_count=2)
    take(channel, "q", 2)
    other = channel.connection.channel()
    found: list[bytes] = []
    other.basic_consume("q", lambda *delivery: found.append(delivery[3]), auto_ack=True)
    wait_until(lambda: channel.connection.process_data_events(0) or len(found) == 2)
    channel.close()
    wait_until(lambda: other.connection.process_data_events(0) or len(found) == 4)
    assert [b"2", b"3", b"0", b"1"] == found
