# SPDX-License-Identifier: MIT
"""Each fault, as a client of pika sees it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pytest
from pika import spec
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import (
    AMQPConnectionError,
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    IncompatibleProtocolError,
    NackError,
    StreamLostError,
)

from postage.broker import Broker, BrokerError
from tests.broker import wire
from tests.broker.wire import RawClient
from tests.waiting import wait_until

PERSISTENT = pika.BasicProperties(delivery_mode=2)


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A broker with two virtual hosts."""
    with Broker(vhosts=["/", "other"]) as broker:
        yield broker


@contextlib.contextmanager
def connected(url: str, **options: Any) -> Iterator[pika.BlockingConnection]:
    """Connect with pika, and let the connection end in whatever way."""
    parameters = pika.URLParameters(url)
    for name, value in options.items():
        setattr(parameters, name, value)
    connection = pika.BlockingConnection(parameters)
    try:
        yield connection
    finally:
        if connection.is_open:
            connection.close()


@pytest.fixture
def channel(broker: Broker) -> Iterator[BlockingChannel]:
    """A channel with confirms and a queue ``q``."""
    with connected(broker.url) as connection:
        channel = connection.channel()
        channel.queue_declare("q")
        channel.confirm_delivery()
        yield channel


def publish(channel: BlockingChannel, body: bytes = b"hello", queue: str = "q") -> None:
    """Publish, and wait for the confirm."""
    channel.basic_publish("", queue, body)


def get(channel: BlockingChannel, queue: str = "q") -> bytes | None:
    body: bytes | None = channel.basic_get(queue, auto_ack=True)[2]
    return body


def wait_for_events(channel: BlockingChannel, condition: Callable[[], object]) -> None:
    def look() -> object:
        channel.connection.process_data_events(0)
        return condition()

    wait_until(look)


# Connections


def test_dropped_connections_end_without_a_word(broker: Broker, channel: BlockingChannel) -> None:
    """What they held goes back, and a new connection is let in."""
    publish(channel)
    channel.basic_get("q")
    with connected(broker.url_of("other")) as other:
        assert 1 == broker.faults.drop("/")
        with pytest.raises(StreamLostError):
            channel.connection.process_data_events(time_limit=wire.PATIENCE)
        assert other.channel().is_open
        assert 1 == broker.faults.drop()
        with pytest.raises(StreamLostError):
            other.process_data_events(time_limit=wire.PATIENCE)
    assert 0 == broker.faults.drop()
    with connected(broker.url) as again:
        assert b"hello" == get(again.channel())


def test_connections_are_closed_with_a_code_and_a_text(
    broker: Broker, channel: BlockingChannel
) -> None:
    """320 if nothing is said."""
    with connected(broker.url_of("other")) as other:
        assert 1 == broker.faults.close_connections(vhost="other")
        with pytest.raises(ConnectionClosedByBroker) as caught:
            other.process_data_events(time_limit=wire.PATIENCE)
        assert (320, "CONNECTION_FORCED - closed by a fault") == caught.value.args
    assert 1 == broker.faults.close_connections(541, "on fire")
    with pytest.raises(ConnectionClosedByBroker) as caught:
        channel.connection.process_data_events(time_limit=wire.PATIENCE)
    assert (541, "INTERNAL_ERROR - on fire") == caught.value.args


def test_new_connections_are_refused(broker: Broker, channel: BlockingChannel) -> None:
    """They are closed at once, and those that are open go on."""
    with broker.faults.refuse():
        with pytest.raises((AMQPConnectionError, IncompatibleProtocolError)):
            pika.BlockingConnection(pika.URLParameters(broker.url))
        publish(channel)
        with RawClient(broker.port) as client:
            assert [] == client.rest()
    with connected(broker.url) as again:
        assert b"hello" == get(again.channel())


def test_a_broker_that_stalls_says_nothing_and_takes_nothing(
    broker: Broker, channel: BlockingChannel
) -> None:
    """What is sent meanwhile is handled afterwards, in its order."""
    answers: list[str] = []

    def use() -> None:
        for number in range(3):
            publish(channel, b"%d" % number)
            answers.append("confirmed")

    with RawClient(broker.port) as late:
        with broker.faults.stall():
            user = threading.Thread(target=use)
            user.start()
            late.send(wire.HEADER)
            late.set_timeout(0.3)
            with pytest.raises(TimeoutError):
                late.receive()
            assert [] == answers
        user.join()
        late.set_timeout(wire.PATIENCE)
        late.expect(spec.Connection.Start)
    assert ["confirmed"] * 3 == answers
    assert [b"0", b"1", b"2", None] == [get(channel) for _ in range(4)]


def test_clients_outlive_a_stall_that_is_longer_than_their_heartbeats(broker: Broker) -> None:
    """Unless they give up themselves: the broker does not blame them for what it has not read."""
    with RawClient.opened(broker.port, heartbeat=1) as client:
        client.open_channel()
        with broker.faults.stall():
            end = time.monotonic() + 2.5
            client.set_timeout(0.5)
            while time.monotonic() < end:
                with pytest.raises(TimeoutError):
                    client.receive()
                client.send(wire.HEARTBEAT)
        client.set_timeout(wire.PATIENCE)
        client.ask(spec.Basic.Qos(), spec.Basic.QosOk)


# Channels and consumers


def test_channels_are_closed_and_their_connection_stays(
    broker: Broker, channel: BlockingChannel
) -> None:
    """With the code of a refusal that never came."""
    second = channel.connection.channel()
    with connected(broker.url_of("other")) as other:
        untouched = other.channel()
        assert 2 == broker.faults.close_channels(404, "gone", vhost="/")
        assert untouched.is_open
    with pytest.raises(ChannelClosedByBroker) as caught:
        channel.queue_declare("q")
    assert (404, "NOT_FOUND - gone") == caught.value.args
    wait_for_events(channel, lambda: second.is_closed)
    assert channel.connection.channel().is_open


def test_closing_no_channel_is_no_error(broker: Broker) -> None:
    """It says that there was none."""
    assert 0 == broker.faults.close_channels()
    assert 0 == broker.faults.close_connections()


def test_consumers_are_cancelled_and_their_queue_stays(
    broker: Broker, channel: BlockingChannel
) -> None:
    """As when a node of RabbitMQ's with the queue goes down."""
    cancelled: list[Any] = []
    channel.add_on_cancel_callback(cancelled.append)
    tag = channel.basic_consume("q", lambda *_: None)
    assert 1 == broker.faults.cancel("q")

    wait_for_events(channel, lambda: cancelled)

    assert tag == cancelled[0].method.consumer_tag
    assert 0 == broker.faults.cancel("q")
    publish(channel)
    assert b"hello" == get(channel)
    tag = channel.basic_consume("q", lambda *_: None)
    assert 1 == broker.faults.cancel("q", vhost="/")


def test_consumers_of_no_queue_cannot_be_cancelled_nor_forgotten(broker: Broker) -> None:
    """It is an error of the test."""
    for end in (broker.faults.cancel, broker.faults.forget_consumers):
        with pytest.raises(BrokerError, match="there is no queue 'q' in virtual host '/'"):
            end("q")
        with pytest.raises(BrokerError, match="there is no virtual host 'x'"):
            end("q", vhost="x")


def test_consumers_are_forgotten_without_a_word(broker: Broker, channel: BlockingChannel) -> None:
    """What they held goes back, and what their client says of it later changes nothing."""
    heard: list[Any] = []
    tags: list[int] = []
    channel.add_on_cancel_callback(heard.append)
    channel.basic_qos(prefetch_count=4)
    channel.basic_consume("q", lambda *delivery: tags.append(delivery[1].delivery_tag))
    for number in range(5):
        publish(channel, b"%d" % number)
    wait_for_events(channel, lambda: len(tags) == 4)

    assert 1 == broker.faults.forget_consumers("q")

    answer: Any = channel.queue_declare("q", passive=True).method
    assert (0, 5) == (answer.consumer_count, answer.message_count)
    channel.basic_ack(tags[0])
    channel.basic_reject(tags[1], requeue=False)
    channel.basic_nack(tags[2], multiple=True)
    assert [b"0", b"1", b"2", b"3", b"4", None] == [get(channel) for _ in range(6)]
    assert [] == heard
    assert 4 == len(tags)
    assert 0 == broker.faults.forget_consumers("q")
    channel.basic_ack(tags[0])  # twice is an error, as for every delivery
    with pytest.raises(ChannelClosedByBroker, match="unknown delivery tag 1"):
        channel.queue_declare("q", passive=True)
    with connected(broker.url) as other:
        assert None is get(other.channel())


def test_a_forgotten_consumer_gives_nothing_back_twice(
    broker: Broker, channel: BlockingChannel
) -> None:
    """Neither with basic.recover nor when its channel closes."""
    consumer = channel.connection.channel()
    tags: list[int] = []
    for _ in range(2):
        consumer.basic_consume("q", lambda *delivery: tags.append(delivery[1].delivery_tag))
        publish(channel)
        wait_for_events(channel, lambda: tags)
        tags.clear()
        assert 1 == broker.faults.forget_consumers("q")
        consumer.basic_recover(requeue=True)
        assert b"hello" == get(channel)
        assert None is get(channel)
    consumer.basic_consume("q", lambda *delivery: tags.append(delivery[1].delivery_tag))
    publish(channel)
    wait_for_events(channel, lambda: tags)
    assert 1 == broker.faults.forget_consumers("q")
    consumer.close()
    assert b"hello" == get(channel)
    assert None is get(channel)


def test_the_tag_of_a_forgotten_consumer_can_be_cancelled_and_used_anew(
    broker: Broker, channel: BlockingChannel
) -> None:
    """As in RabbitMQ its channel knows it still, and refuses to give it to another before."""
    with RawClient.opened(broker.port) as client:
        client.open_channel()
        consume = spec.Basic.Consume(queue="q", consumer_tag="t", no_ack=True)
        client.ask(consume, spec.Basic.ConsumeOk)
        assert 1 == broker.faults.forget_consumers("q")
        client.ask(spec.Basic.Cancel("t"), spec.Basic.CancelOk)
        client.ask(consume, spec.Basic.ConsumeOk)
        publish(channel)
        client.expect(spec.Basic.Deliver)
        client.receive()  # the header
        client.receive()  # the body
        assert 1 == broker.faults.forget_consumers("q")
        closed = client.ask(consume, spec.Connection.Close)
        assert (530, "NOT_ALLOWED - attempt to reuse consumer tag 't'") == (
            closed.reply_code,
            closed.reply_text,
        )


def test_forgotten_deliveries_no_longer_count_for_the_prefetch_of_a_channel(
    broker: Broker, channel: BlockingChannel
) -> None:
    """Its consumers of other queues go on."""
    bodies: list[bytes] = []
    channel.queue_declare("other")
    channel.basic_qos(prefetch_count=1, global_qos=True)
    for queue in ("q", "other"):
        channel.basic_consume(queue, lambda *delivery: bodies.append(delivery[3]))
        publish(channel, queue.encode(), queue)
    wait_for_events(channel, lambda: bodies == [b"q"])
    assert 1 == broker.faults.forget_consumers("q")
    wait_for_events(channel, lambda: bodies == [b"q", b"other"])


# Publishing


def test_publishers_are_blocked_and_consumers_are_not(
    broker: Broker, channel: BlockingChannel
) -> None:
    """What is published meanwhile arrives when the alarm is over."""
    reasons: list[Any] = []
    channel.connection.add_on_connection_blocked_callback(lambda _, frame: reasons.append(frame))
    channel.connection.add_on_connection_unblocked_callback(lambda *_: reasons.append(None))
    publish(channel, b"before")
    with connected(broker.url) as other:
        consumer = other.channel()
        with broker.faults.block("too hot"):
            publisher = threading.Thread(target=publish, args=(channel, b"during"))
            publisher.start()
            wait_until(lambda: broker._call(_blocked) == 1)
            assert [b"before", None] == [get(consumer) for _ in range(2)]
        publisher.join()
        assert b"during" == get(consumer)
    channel.connection.process_data_events(0)
    assert "too hot" == reasons[0].method.reason
    assert None is reasons[1]


def _blocked(server: Any) -> int:
    return sum(connection.is_blocked for connection in server.node.connections)


def test_a_block_within_a_block_ends_with_the_outer_one(
    broker: Broker, channel: BlockingChannel
) -> None:
    """A test may block twice without knowing."""
    with broker.faults.block("one"):
        with broker.faults.block("two"):
            pass
        publisher = threading.Thread(target=publish, args=(channel,))
        publisher.start()
        wait_until(lambda: broker._call(_blocked) == 1)
        assert publisher.is_alive()
    publisher.join()


def test_confirms_can_be_late(broker: Broker, channel: BlockingChannel) -> None:
    """The message is there before."""
    with connected(broker.url) as other, broker.faults.delay_confirms(0.5):
        begun = time.monotonic()
        publisher = threading.Thread(target=publish, args=(channel,))
        publisher.start()
        consumer = other.channel()
        wait_until(lambda: get(consumer))
        assert publisher.is_alive()
        publisher.join()
        assert time.monotonic() - begun >= 0.5
    publish(channel)


def test_late_confirms_are_not_lost_with_their_channel(
    broker: Broker, channel: BlockingChannel
) -> None:
    """They are sent before its end, and not again when it is their time."""
    with RawClient.opened(broker.port) as client:
        client.open_channel()
        client.ask(spec.Confirm.Select(), spec.Confirm.SelectOk)
        with broker.faults.delay_confirms(0.2):
            client.send(wire.message("q"))
            client.send(wire.message("none"))
            wait_until(lambda: get(channel) is not None)
        assert client.ask(spec.Channel.Close(200, "", 0, 0), spec.Basic.Ack).multiple
        client.expect(spec.Channel.CloseOk)
        client.open_channel()
        client.set_timeout(0.5)
        with pytest.raises(TimeoutError):
            client.receive()


def test_publishings_can_be_refused(broker: Broker, channel: BlockingChannel) -> None:
    """They are thrown away, and answered with basic.nack."""
    with broker.faults.nack():
        with pytest.raises(NackError):
            publish(channel)
        with connected(broker.url) as other:
            other.channel().basic_publish("", "q", b"without confirms")
    publish(channel, b"after")
    assert [b"after", None] == [get(channel) for _ in range(2)]


def test_faults_can_be_injected_from_any_thread_and_together(
    broker: Broker, channel: BlockingChannel
) -> None:
    """Each ends by itself."""
    errors: list[Exception] = []

    def harm() -> None:
        try:
            for _ in range(20):
                with broker.faults.block(), broker.faults.nack(), broker.faults.refuse():
                    broker.faults.drop("other")
        except Exception as error:
            errors.append(error)

    harmers = [threading.Thread(target=harm) for _ in range(4)]
    for each in harmers:
        each.start()
    for each in harmers:
        each.join()
    assert [] == errors
    publish(channel)
    with connected(broker.url) as another:
        assert b"hello" == get(another.channel())


def test_blocks_of_a_fault_may_end_in_any_order(broker: Broker, channel: BlockingChannel) -> None:
    """It lasts until the last of them."""
    first, second = broker.faults.nack(), broker.faults.nack()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(NackError):
        publish(channel)
    second.__exit__(None, None, None)
    publish(channel)


def test_the_longer_of_two_delays_ends_with_its_block(broker: Broker) -> None:
    """Then the other one counts again."""

    def delay(server: Any) -> Any:
        return server.node.confirm_delay

    with broker.faults.delay_confirms(1):
        with broker.faults.delay_confirms(2):
            assert 2 == broker._call(delay)
        assert 1 == broker._call(delay)
    assert 0 == broker._call(delay)


@pytest.mark.parametrize("name", ["stall", "refuse", "block", "nack"])
def test_a_fault_ends_with_its_broker(name: str) -> None:
    """Its block can be left when the broker is closed, or was started anew."""
    broker = Broker()
    with broker:
        with getattr(broker.faults, name)():
            broker.close()
        broker.start()
        with getattr(broker.faults, name)():
            broker.close()
            broker.start()
            with connected(broker.url) as connection:
                connection.channel().queue_declare("q")


def test_a_fault_ends_with_an_error_in_its_block(broker: Broker) -> None:
    """Such as that of an assertion."""
    with pytest.raises(ZeroDivisionError), broker.faults.refuse():
        raise ZeroDivisionError
    with connected(broker.url) as connection:
        assert connection.is_open
