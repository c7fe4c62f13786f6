# SPDX-License-Identifier: MIT
"""amqpstorm judges the broker: it reads in a thread of its own, and writes frames of full size."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any
from urllib.parse import unquote, urlsplit

import amqpstorm
import pytest
from amqpstorm import AMQPChannelError, AMQPConnectionError, AMQPMessageError, Message
from amqpstorm.channel import Channel

from tests.broker.conformance.samples import (
    BODY_SIZES,
    FRAME_MAX,
    ROUTES,
    body_of,
    death_of,
)
from tests.broker.conformance.servers import Server
from tests.waiting import wait_until

#: A value of each type that amqpstorm's codec writes into a field table: it takes the smallest
#: integer that does. The float has single precision.
FIELDS = {
    "S": "häßlich",
    "t": True,
    "t-false": False,
    "b": -128,
    "s": -(2**15),
    "u": 2**16 - 1,
    "I": -(2**31),
    "i": 2**32 - 1,
    "l": -(2**63),
    "l-most": 2**63 - 1,
    "f": 0.15625,
    "D": Decimal("-3.14159"),
    "T": datetime(2038, 1, 19, 3, 14, 8, tzinfo=timezone.utc),
    "F": {"deep": {"deeper": [{"deepest": None}]}, "none": {}},
    "A": [1, "two", [3, [4]], {"five": 5}, None, []],
    "V": None,
}


@contextlib.contextmanager
def connected(url: str, **options: Any) -> Iterator[amqpstorm.Connection]:
    """Connect for the duration of the block."""
    parts = urlsplit(url)
    options = {"virtual_host": unquote(parts.path[1:]), "timeout": 30, **options}
    password = options.pop("password", parts.password)
    connection = amqpstorm.Connection(
        parts.hostname, parts.username, password, parts.port, **options
    )
    try:
        yield connection
    finally:
        connection.close()


@pytest.fixture
def connection(url: str) -> Iterator[amqpstorm.Connection]:
    with connected(url) as connection:
        yield connection


@pytest.fixture
def channel(connection: amqpstorm.Connection) -> Channel:
    return connection.channel(rpc_timeout=30)


@pytest.fixture
def confirming(connection: amqpstorm.Connection) -> Channel:
    """A channel whose publishes wait for the confirm."""
    channel = connection.channel(rpc_timeout=30)
    channel.confirm_deliveries()
    return channel


def queue_of(channel: Channel, name: str = "", **arguments: Any) -> str:
    """Declare an exclusive queue with these x-arguments, and return its name."""
    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
    queue: str = channel.queue.declare(name, exclusive=True, arguments=arguments)["queue"]
    return queue


def got(channel: Channel, queue: str) -> Message:
    """Wait for a message in the queue, and take it."""
    return wait_until(lambda: channel.basic.get(queue, no_ack=True))


def got_unsettled(channel: Channel, queue: str) -> Message:
    """Wait for a message in the queue, and take it without acknowledging it."""
    return wait_until(lambda: channel.basic.get(queue))


@contextlib.contextmanager
def refused(error: type[amqpstorm.AMQPError], code: int, text: str) -> Iterator[None]:
    """Expect an error of the broker."""
    with pytest.raises(error) as caught:
        yield
    assert code == caught.value.error_code
    assert text in str(caught.value)


def test_the_connection_is_negotiated(connection: amqpstorm.Connection) -> None:
    """amqpstorm shows what it agreed upon."""
    assert (2047, FRAME_MAX) == (connection.max_allowed_channels, connection.max_frame_size)
    assert {"publisher_confirms", "basic.nack"} <= set(connection.server_properties["capabilities"])
    assert connection.is_open and not connection.is_blocked


@pytest.mark.parametrize(("kind", "binding", "key", "other"), ROUTES)
def test_an_exchange_routes_as_its_type_says(
    confirming: Channel, kind: str, binding: str, key: str, other: str | None
) -> None:
    """What matches arrives, and what does not is an error, until it is unbound."""

    def publish(each: str) -> None:
        confirming.basic.publish("hello", each, "e", {"headers": {"kind": each}}, mandatory=True)

    arguments = {"x-match": "all", "kind": binding}
    confirming.exchange.declare("e", kind)
    queue = queue_of(confirming)
    confirming.queue.bind(queue, "e", binding, arguments)
    publish(key)
    message = got(confirming, queue)
    assert ("e", key) == (message.method["exchange"], message.method["routing_key"])
    if other is not None:
        with refused(AMQPMessageError, 312, "NO_ROUTE"):
            publish(other)
    confirming.queue.unbind(queue, "e", binding, arguments)
    with refused(AMQPMessageError, 312, "NO_ROUTE"):
        publish(key)


def test_exchanges_are_bound_to_exchanges(confirming: Channel) -> None:
    """And unbound, and deleted if nothing uses them."""
    confirming.exchange.declare("e", "fanout")
    confirming.exchange.bind("e", "amq.topic", "a.#")
    queue = queue_of(confirming)
    confirming.queue.bind(queue, "e")
    assert confirming.basic.publish("hello", "a.b", "amq.topic", mandatory=True)
    assert "hello" == got(confirming, queue).body
    confirming.exchange.unbind("e", "amq.topic", "a.#")
    with refused(AMQPMessageError, 312, "amq.topic"):
        confirming.basic.publish("hello", "a.b", "amq.topic", mandatory=True)
    with refused(AMQPChannelError, 406, "in use"):
        confirming.exchange.delete("e", if_unused=True)


@pytest.mark.parametrize(
    ("ask", "code", "text"),
    [
        (lambda channel: channel.queue.declare("no", passive=True), 404, "no queue 'no'"),
        (lambda channel: channel.exchange.declare("no", passive=True), 404, "no exchange 'no'"),
        (lambda channel: channel.basic.get("no"), 404, "no queue 'no'"),
        (lambda channel: channel.queue.declare("q", durable=True), 406, "inequivalent arg"),
        (lambda channel: channel.queue.declare("mine", passive=True), 405, "locked queue 'mine'"),
        (lambda channel: channel.queue.declare("amq.me"), 403, "reserved prefix"),
        (lambda channel: channel.queue.delete("q", if_empty=True), 406, "not empty"),
    ],
    ids=["queue", "exchange", "get", "mismatch", "locked", "reserved", "not-empty"],
)
def test_a_refusal_is_an_error_of_its_channel(
    url: str,
    connection: amqpstorm.Connection,
    ask: Callable[[Channel], object],
    code: int,
    text: str,
) -> None:
    """With the code and the text of the broker, and the channel can be opened again."""
    with connected(url) as owner:
        queue_of(owner.channel(), "mine")
        channel = connection.channel(rpc_timeout=30)
        channel.confirm_deliveries()
        channel.queue.declare("q")
        channel.basic.publish("hello", "q")
        with refused(AMQPChannelError, code, text):
            ask(channel)
        assert channel.is_closed and connection.is_open
        channel.open()
        assert {"queue": "q", "message_count": 1, "consumer_count": 0} == channel.queue.declare("q")


def test_publishes_are_confirmed(confirming: Channel) -> None:
    """A full queue makes the result false, and a missing exchange closes the channel."""
    queue = queue_of(confirming, x_max_length=1, x_overflow="reject-publish")
    assert True is confirming.basic.publish("1", queue)
    assert False is confirming.basic.publish("2", queue)
    with refused(AMQPChannelError, 404, "no exchange 'no'"):
        confirming.basic.publish("3", queue, "no")


def test_every_property_arrives(channel: Channel) -> None:
    """amqpstorm makes the message id, the time and the encoding if they are not given."""
    properties = {
        "app_id": "app",
        "content_encoding": "utf-8",
        "content_type": "text/plain",
        "correlation_id": "correlation",
        "delivery_mode": 2,
        "expiration": "600000",
        "headers": {"a": 1},
        "message_id": "message",
        "message_type": "kind",
        "priority": 7,
        "reply_to": "reply",
        "timestamp": datetime(2038, 1, 19, 3, 14, 8, tzinfo=timezone.utc),
        "user_id": "guest",
    }
    queue = queue_of(channel)
    Message.create(channel, "häßlich", dict(properties)).publish(queue)
    message = got(channel, queue)
    assert properties == {name: message.properties[name] for name in properties}
    assert "häßlich" == message.body


def test_every_type_of_field_arrives(channel: Channel) -> None:
    """Also after the broker had to write the header anew, since it added x-death."""
    parking = queue_of(channel)
    queue = queue_of(channel, x_dead_letter_exchange="", x_dead_letter_routing_key=parking)
    for _ in range(2):
        channel.basic.publish("", queue, properties={"headers": FIELDS})
    assert FIELDS == got(channel, queue).properties["headers"]
    channel.basic.get(queue).reject(requeue=False)

    headers = got(channel, parking).properties["headers"]

    assert FIELDS == {name: value for name, value in headers.items() if name in FIELDS}
    assert all(isinstance(headers[name], type(value)) for name, value in FIELDS.items())


def test_a_body_of_any_size_arrives(channel: Channel) -> None:
    """In frames whose payload alone fills frame_max, which RabbitMQ tolerates."""
    queue = queue_of(channel)
    for size in BODY_SIZES:
        body = body_of(size)
        for _ in range(2):
            channel.basic.publish(body, queue)
        message = wait_until(lambda: channel.basic.get(queue, no_ack=True, auto_decode=False))
        assert body == message.body
        tag = channel.basic.consume(queue=queue, no_ack=True)
        assert body == next(channel.build_inbound_messages(auto_decode=False)).body
        channel.basic.cancel(tag)


def test_deliveries_are_bounded_and_settled(channel: Channel) -> None:
    """prefetch, ack of several, nack and reject, with and without requeue."""
    queue = queue_of(channel)
    for number in range(6):
        channel.basic.publish(str(number), queue)
    channel.basic.qos(prefetch_count=2)
    channel.basic.consume(queue=queue, consumer_tag="tag")
    messages = channel.build_inbound_messages()
    first = [next(messages) for _ in range(2)]
    channel.basic.ack(first[1].delivery_tag, multiple=True)
    second = [next(messages) for _ in range(2)]
    second[0].nack(requeue=True)
    third = next(messages)
    second[1].reject(requeue=False)
    fourth = next(messages)
    seen = [(each.body, each.redelivered) for each in (*first, *second, third, fourth)]
    assert [
        ("0", False),
        ("1", False),
        ("2", False),
        ("3", False),
        ("2", True),
        ("4", False),
    ] == seen
    channel.basic.cancel("tag")
    channel.close()


def test_unsettled_messages_come_again(connection: amqpstorm.Connection, channel: Channel) -> None:
    """After recover, and after their channel is closed."""
    queue = queue_of(channel)
    taker = connection.channel()
    for number in range(3):
        channel.basic.publish(str(number), queue)
    assert ["0", "1"] == [got_unsettled(taker, queue).body for _ in range(2)]
    taker.basic.recover(requeue=True)
    assert [("0", True), ("1", True), ("2", False)] == [
        (message.body, message.redelivered)
        for message in [got_unsettled(taker, queue) for _ in range(3)]
    ]
    taker.close()
    assert ["0", "1", "2"] == [got(channel, queue).body for _ in range(3)]


def test_callbacks_consume_until_they_stop(channel: Channel) -> None:
    """start_consuming ends with the last consumer."""
    queues = [queue_of(channel) for _ in range(2)]
    received: list[str] = []

    def receive(message: Message) -> None:
        received.append(message.body)
        message.ack()
        if len(received) == 20:
            message.channel.stop_consuming()

    for number in range(20):
        channel.basic.publish(str(number), queues[number % 2])
    for queue in queues:
        channel.basic.consume(receive, queue)
    channel.start_consuming()
    assert sorted(map(str, range(20))) == sorted(received)
    assert [] == channel.consumer_tags


def test_a_deleted_queue_ends_its_consumers(
    connection: amqpstorm.Connection, channel: Channel
) -> None:
    """amqpstorm forgets their tags when basic.cancel comes."""
    channel.queue.declare("q")
    channel.basic.consume(print, "q")
    assert {"message_count": 0} == connection.channel().queue.delete("q")
    channel.start_consuming()
    assert [] == channel.consumer_tags
    assert channel.is_open


def test_counts_are_exact(confirming: Channel) -> None:
    """declare, get, purge and delete say how many messages there are."""
    confirming.queue.declare("q")
    for _ in range(5):
        confirming.basic.publish("", "q")
    assert 5 == confirming.queue.declare("q", passive=True)["message_count"]
    assert 4 == confirming.basic.get("q", no_ack=True).method["message_count"]
    assert {"message_count": 4} == confirming.queue.purge("q")
    assert None is confirming.basic.get("q")
    confirming.basic.publish("", "q")
    assert {"message_count": 1} == confirming.queue.delete("q")
    assert {"message_count": 0} == confirming.queue.delete("q")


def test_priorities_and_expiry(channel: Channel) -> None:
    """A message of higher priority comes first; one that expires is a dead letter."""
    parking = queue_of(channel)
    queue = queue_of(
        channel, x_max_priority=9, x_dead_letter_exchange="", x_dead_letter_routing_key=parking
    )
    for priority in (1, 9, 5):
        channel.basic.publish(str(priority), queue, properties={"priority": priority})
    assert ["9", "5", "1"] == [got(channel, queue).body for _ in range(3)]
    channel.basic.publish("late", queue, properties={"expiration": "20"})
    message = got(channel, parking)
    assert ("late", None) == (message.body, message.expiration)
    assert {
        "count": 1,
        "exchange": "",
        "original-expiration": "20",
        "queue": queue,
        "reason": "expired",
        "routing-keys": [queue],
    } == death_of(message.properties["headers"])


def test_a_reply_comes_directly(connection: amqpstorm.Connection, channel: Channel) -> None:
    """To the channel that asked."""
    service = connection.channel()
    queue = queue_of(service)
    channel.basic.consume(queue="amq.rabbitmq.reply-to", no_ack=True)
    Message.create(channel, "ping", {"reply_to": "amq.rabbitmq.reply-to"}).publish(queue)
    service.basic.publish("pong", got(service, queue).reply_to)
    assert "pong" == next(channel.build_inbound_messages()).body


def test_fifty_channels_in_fifty_threads_share_a_connection(
    connection: amqpstorm.Connection,
) -> None:
    """Bodies of several frames stay whole."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            channel = connection.channel(rpc_timeout=30)
            queue = queue_of(channel)
            body = body_of(FRAME_MAX + number)
            channel.basic.publish(body, queue)
            channel.basic.consume(queue=queue, no_ack=True)
            message = next(channel.build_inbound_messages(auto_decode=False))
            assert body == message.body
            channel.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == failures


def test_a_connection_may_be_refused(url: str) -> None:
    """With 403 or 530."""
    with refused(AMQPConnectionError, 403, "ACCESS_REFUSED"), connected(url, password="wrong"):
        raise AssertionError("never")
    with (
        refused(AMQPConnectionError, 530, "vhost no such not found"),
        connected(url, virtual_host="no such"),
    ):
        raise AssertionError("never")


def test_the_broker_closes_a_connection(url: str, server: Server) -> None:
    """With 320, and the connection can be opened again."""
    with connected(url) as connection:
        channel = connection.channel()
        server.close_connections(url)
        with refused(AMQPConnectionError, 320, "CONNECTION_FORCED"):
            wait_until(channel.check_for_errors)
        connection.open()
        assert queue_of(connection.channel())
