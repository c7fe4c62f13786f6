# SPDX-License-Identifier: MIT
"""py-amqp, the client below kombu and celery, judges the broker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any
from urllib.parse import unquote, urlsplit

import amqp
import pytest
from amqp import Message, exceptions, sasl

from tests.broker.conformance.samples import BODY_SIZES, FRAME_MAX, ROUTES, body_of, death_of
from tests.broker.conformance.servers import Server
from tests.waiting import wait_until

#: A value of each type that py-amqp writes into a field table. It writes 64 bits as L, which the
#: others write as l.
FIELDS = {
    "S": "häßlich",
    "S-bytes": b"\xff\x00",
    "t": True,
    "t-false": False,
    "I": -(2**31) + 1,
    "I-most": 2**31 - 1,
    "L": -(2**63),
    "L-most": 2**63 - 1,
    "d": -0.1,
    "D": Decimal("-3.14159"),
    "T": datetime(2038, 1, 19, 3, 14, 8),
    "F": {"deep": {"deeper": [{"deepest": None}]}, "none": {}},
    "A": [1, "two", [3.5, [4]], {"five": 5}, None, []],
    "V": None,
}

#: Every property of a message but its expiration, which the broker acts upon.
PROPERTIES = {
    "content_type": "text/plain",
    "content_encoding": "utf-8",
    "application_headers": {"a": 1},
    "delivery_mode": 2,
    "priority": 7,
    "correlation_id": "correlation",
    "reply_to": "reply",
    "message_id": "message",
    "timestamp": 2**40,
    "type": "kind",
    "user_id": "guest",
    "app_id": "app",
    "cluster_id": "cluster",
}


@contextlib.contextmanager
def connected(url: str, **options: Any) -> Iterator[amqp.Connection]:
    """Connect for the duration of the block."""
    parts = urlsplit(url)
    options = {
        "host": f"{parts.hostname}:{parts.port}",
        "userid": parts.username,
        "password": parts.password,
        "virtual_host": unquote(parts.path[1:]),
        "connect_timeout": 30,
        "read_timeout": 30,
        **options,
    }
    connection = amqp.Connection(**options)
    connection.connect()
    try:
        yield connection
    finally:
        if connection.connected:
            connection.close()
        connection.collect()


@pytest.fixture
def connection(url: str) -> Iterator[amqp.Connection]:
    with connected(url) as connection:
        yield connection


@pytest.fixture
def channel(connection: amqp.Connection) -> amqp.Channel:
    return connection.channel()


def queue_of(channel: amqp.Channel, name: str = "", **arguments: Any) -> str:
    """Declare an exclusive queue with these x-arguments, and return its name."""
    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
    declared = channel.queue_declare(name, exclusive=True, auto_delete=False, arguments=arguments)
    queue: str = declared.queue
    return queue


def got(channel: amqp.Channel, queue: str) -> Message:
    """Wait for a message in the queue, and take it."""
    return wait_until(lambda: channel.basic_get(queue, no_ack=True))


def consumed(channel: amqp.Channel, queue: str, **options: Any) -> list[Message]:
    """Consume, and return the list to which the deliveries are added."""
    messages: list[Message] = []
    channel.basic_consume(queue, callback=messages.append, **options)
    return messages


def drain(connection: amqp.Connection, condition: Callable[[], object]) -> None:
    """Take what the broker sends until the condition holds."""
    deadline = time.monotonic() + 30.0
    while not condition():
        connection.drain_events(timeout=deadline - time.monotonic())


@pytest.mark.parametrize("mechanism", [sasl.PLAIN, sasl.AMQPLAIN])
def test_a_client_may_log_in_by_either_mechanism(
    url: str, mechanism: Callable[[str, str], sasl.SASL]
) -> None:
    """PLAIN, and AMQPLAIN, which is a field table and py-amqp's first choice."""
    with connected(url, authentication=(mechanism("guest", "guest"),)) as connection:
        assert {"PLAIN", "AMQPLAIN"} <= {name.decode() for name in connection.mechanisms}
        assert queue_of(connection.channel())
    wrong = mechanism("guest", "wrong")
    with (
        pytest.raises(exceptions.AccessRefused) as caught,
        connected(url, authentication=(wrong,)),
    ):
        raise AssertionError("never")
    assert 403 == caught.value.code
    assert "Login was refused" in str(caught.value)


def test_an_unknown_virtual_host_is_refused(url: str) -> None:
    """530, after the login."""
    with (
        pytest.raises(exceptions.NotAllowed, match="vhost no such not found"),
        connected(url, virtual_host="no such"),
    ):
        raise AssertionError("never")


@pytest.mark.parametrize(("kind", "binding", "key", "other"), ROUTES)
def test_an_exchange_routes_as_its_type_says(
    channel: amqp.Channel, kind: str, binding: str, key: str, other: str | None
) -> None:
    """What matches arrives, until it is unbound."""
    arguments = {"x-match": "all", "kind": binding}
    channel.exchange_declare("e", kind, auto_delete=False)
    queue = queue_of(channel)
    channel.queue_bind(queue, "e", binding, arguments=arguments)
    for each in (other or key, key):
        channel.basic_publish(Message(each, application_headers={"kind": each}), "e", each)
    expected = [key, key] if other is None else [key]
    assert expected == [got(channel, queue).body for _ in expected]
    channel.queue_unbind(queue, "e", binding, arguments=arguments)
    channel.basic_publish(Message(key, application_headers={"kind": key}), "e", key)
    assert None is channel.basic_get(queue)


def test_exchanges_are_bound_to_exchanges(channel: amqp.Channel) -> None:
    """And unbound again; py-amqp's exchanges delete themselves with their last binding."""
    channel.exchange_declare("e", "fanout")
    queue = queue_of(channel)
    channel.queue_bind(queue, "e")
    channel.exchange_bind("e", "amq.topic", "a.#")
    channel.basic_publish(Message("1"), "amq.topic", "a.b")
    assert "1" == got(channel, queue).body
    channel.exchange_unbind("e", "amq.topic", "a.#")
    channel.basic_publish(Message("2"), "amq.topic", "a.b")
    assert None is channel.basic_get(queue)
    channel.queue_unbind(queue, "e")
    with pytest.raises(exceptions.NotFound):
        channel.exchange_declare("e", "fanout", passive=True)


@pytest.mark.parametrize(
    ("refused", "error"),
    [
        (lambda channel: channel.queue_declare("no", passive=True), exceptions.NotFound),
        (lambda channel: channel.exchange_declare("no", "", passive=True), exceptions.NotFound),
        (lambda channel: channel.queue_declare("mine", passive=True), exceptions.ResourceLocked),
        (lambda channel: channel.queue_declare("q", durable=True), exceptions.PreconditionFailed),
        (lambda channel: channel.exchange_declare("amq.me", "topic"), exceptions.AccessRefused),
    ],
    ids=["queue", "exchange", "locked", "mismatch", "reserved"],
)
def test_a_refusal_is_an_error_and_the_channel_goes_on(
    url: str,
    connection: amqp.Connection,
    refused: Callable[[amqp.Channel], object],
    error: type[Exception],
) -> None:
    """py-amqp opens the channel again by itself, under the same number."""
    with connected(url) as owner:
        queue_of(owner.channel(), "mine")
        channel = connection.channel()
        channel.queue_declare("q", auto_delete=False)
        with pytest.raises(error):
            refused(channel)
        assert 1 == channel.channel_id
        assert queue_of(channel)


def test_publishes_are_confirmed(url: str) -> None:
    """One by one, as kombu does it with confirm_publish; a refusal is an error."""
    with connected(url, confirm_publish=True) as connection:
        channel = connection.channel()
        queue = queue_of(channel, x_max_length=1, x_overflow="reject-publish")
        channel.basic_publish(Message("1"), routing_key=queue)
        with pytest.raises(exceptions.MessageNacked):
            channel.basic_publish(Message("2"), routing_key=queue)
        assert "1" == got(channel, queue).body
        with pytest.raises(exceptions.NotFound):
            channel.basic_publish(Message("3"), "no", "key")


def test_confirms_are_events(channel: amqp.Channel) -> None:
    """Each publish is acknowledged once, alone or with those before it."""
    pending = set(range(1, 101))

    def confirm(tag: int, multiple: bool) -> None:
        pending.difference_update(range(1 if multiple else tag, tag + 1))

    channel.confirm_select()
    channel.events["basic_ack"].add(confirm)
    queue = queue_of(channel)
    for _ in range(100):
        channel.basic_publish(Message(""), routing_key=queue)
    drain(channel.connection, lambda: not pending)
    assert 100 == channel.queue_purge(queue)


def test_an_unroutable_message_comes_back(channel: amqp.Channel) -> None:
    """With its properties and its body, and the code 312."""
    returns: list[Any] = []
    channel.events["basic_return"].add(lambda *arguments: returns.append(arguments))
    channel.basic_publish(
        Message("hello", application_headers=FIELDS), "amq.direct", "nowhere", mandatory=True
    )
    drain(channel.connection, lambda: returns)
    ((error, exchange, routing_key, message),) = returns
    assert (312, "NO_ROUTE") == (error.reply_code, error.reply_text)
    assert ("amq.direct", "nowhere", "hello") == (exchange, routing_key, message.body)
    assert FIELDS == message.headers


def test_every_property_arrives(channel: amqp.Channel) -> None:
    """All but the expiration, which has its own test."""
    queue = queue_of(channel)
    channel.basic_publish(Message(b"\x00", **PROPERTIES), routing_key=queue)
    assert PROPERTIES == got(channel, queue).properties


def test_every_type_of_field_arrives(channel: amqp.Channel) -> None:
    """Also after the broker had to write the header anew, since it added x-death."""
    parking = queue_of(channel)
    queue = queue_of(channel, x_dead_letter_exchange="", x_dead_letter_routing_key=parking)
    for _ in range(2):
        channel.basic_publish(Message("", application_headers=FIELDS), routing_key=queue)
    assert FIELDS == got(channel, queue).headers
    channel.basic_reject(channel.basic_get(queue).delivery_tag, requeue=False)

    headers = got(channel, parking).headers

    assert FIELDS == {name: value for name, value in headers.items() if name in FIELDS}
    assert [type(FIELDS[name]) for name in FIELDS] == [type(headers[name]) for name in FIELDS]


def test_a_body_of_any_size_arrives(channel: amqp.Channel) -> None:
    """Through basic.deliver."""
    queue = queue_of(channel)
    messages = consumed(channel, queue, no_ack=True)
    for size in BODY_SIZES:
        body = body_of(size)
        channel.basic_publish(Message(body, content_encoding="binary"), routing_key=queue)
        drain(channel.connection, lambda: messages)
        # py-amqp gives an empty body as a string.
        assert body == (messages.pop().body or b"")


def test_deliveries_are_bounded_and_settled(channel: amqp.Channel) -> None:
    """prefetch, ack of several, reject with and without requeue."""
    queue = queue_of(channel)
    for number in range(6):
        channel.basic_publish(Message(str(number)), routing_key=queue)
    channel.basic_qos(0, 2, False)
    messages = consumed(channel, queue, consumer_tag="tag")
    drain(channel.connection, lambda: len(messages) == 2)
    channel.basic_ack(2, multiple=True)
    drain(channel.connection, lambda: len(messages) == 4)
    channel.basic_reject(3, requeue=False)
    channel.basic_reject(4, requeue=True)
    drain(channel.connection, lambda: len(messages) == 6)
    assert [("0", False), ("1", False), ("2", False), ("3", False), ("4", False), ("3", True)] == [
        (message.body, message.delivery_info["redelivered"])
        for message in sorted(messages, key=lambda message: message.delivery_tag)
    ]


def test_recover_gives_back_what_is_unacknowledged(channel: amqp.Channel) -> None:
    """In its old order, to any consumer."""
    queue = queue_of(channel)
    for number in range(3):
        channel.basic_publish(Message(str(number)), routing_key=queue)
    assert ["0", "1"] == [channel.basic_get(queue).body for _ in range(2)]
    channel.basic_recover(requeue=True)
    assert ["0", "1", "2"] == [got(channel, queue).body for _ in range(3)]


def immediate(channel: amqp.Channel) -> None:
    """Publish as RabbitMQ has not done it since 3.0."""
    channel.basic_publish(Message(""), routing_key="q", immediate=True)


def recover_here(channel: amqp.Channel) -> None:
    """Ask for unacknowledged messages to be sent again to the same consumers."""
    channel.basic_recover(requeue=False)


def use_a_tag_twice(channel: amqp.Channel) -> None:
    """Consume twice by the same tag, which other clients refuse themselves."""
    queue = queue_of(channel)
    for _ in range(2):
        consumed(channel, queue, consumer_tag="tag")


@pytest.mark.parametrize(
    ("refused", "code", "text"),
    [
        (immediate, 540, "immediate=true"),
        (recover_here, 540, "requeue=false"),
        (use_a_tag_twice, 530, "attempt to reuse consumer tag 'tag'"),
    ],
)
def test_an_error_of_the_connection_ends_it(
    connection: amqp.Connection, refused: Callable[[amqp.Channel], None], code: int, text: str
) -> None:
    """With a code and a text."""
    with pytest.raises(exceptions.AMQPError) as caught:
        refused(connection.channel())
        drain(connection, lambda: False)
    assert code == caught.value.code
    assert text in caught.value.reply_text
    assert not connection.connected


def test_a_deleted_queue_cancels_its_consumers(channel: amqp.Channel) -> None:
    """py-amqp tells the consumer's own callback."""
    cancelled: list[str] = []
    channel.queue_declare("q", auto_delete=False)
    for number in range(3):
        channel.basic_publish(Message(str(number)), routing_key="q")
    consumed(channel, "q", consumer_tag="tag", on_cancel=cancelled.append)
    channel.connection.channel().queue_delete("q")
    drain(channel.connection, lambda: cancelled)
    assert ["tag"] == cancelled


def test_messages_expire_into_the_dead_letter_exchange(channel: amqp.Channel) -> None:
    """By the queue's time to live, which is shorter here than their own."""
    parking = queue_of(channel)
    queue = queue_of(
        channel,
        x_message_ttl=20,
        x_dead_letter_exchange="",
        x_dead_letter_routing_key=parking,
    )
    channel.basic_publish(Message("hello", expiration="100000"), routing_key=queue)
    message = got(channel, parking)
    assert "expiration" not in message.properties
    assert {
        "count": 1,
        "exchange": "",
        "original-expiration": "100000",
        "queue": queue,
        "reason": "expired",
        "routing-keys": [queue],
    } == death_of(message.headers)


def test_a_reply_comes_directly(connection: amqp.Connection) -> None:
    """Between two channels of one connection."""
    asking, answering = connection.channel(), connection.channel()
    queue = queue_of(answering)
    replies = consumed(asking, "amq.rabbitmq.reply-to", no_ack=True)
    asking.basic_publish(
        Message("ping", reply_to="amq.rabbitmq.reply-to", correlation_id="7"), routing_key=queue
    )
    request = got(answering, queue)
    answering.basic_publish(
        Message("pong", correlation_id=request.properties["correlation_id"]),
        routing_key=request.properties["reply_to"],
    )
    drain(connection, lambda: replies)
    assert ("pong", "7") == (replies[0].body, replies[0].properties["correlation_id"])


def test_fifty_channels_share_a_connection(connection: amqp.Connection) -> None:
    """Bodies of several frames stay whole."""
    channels = [connection.channel() for _ in range(50)]
    queues = [queue_of(channel) for channel in channels]
    received = [
        consumed(channel, queue, no_ack=True)
        for channel, queue in zip(channels, queues, strict=True)
    ]
    for number, channel in enumerate(channels):
        channel.basic_publish(Message(body_of(FRAME_MAX + number)), routing_key=queues[number - 1])
    drain(connection, lambda: all(received))
    for number, messages in enumerate(received):
        assert [body_of(FRAME_MAX + (number + 1) % 50)] == [message.body for message in messages]
    for channel in channels:
        channel.close()


def test_an_orderly_close_has_its_code(url: str, server: Server) -> None:
    """320 from an operator; the same comes to every channel."""
    with connected(url) as connection:
        connection.channel()
        server.close_connections(url)
        with pytest.raises(exceptions.ConnectionForced) as caught:
            drain(connection, lambda: False)
        assert 320 == caught.value.code


def test_transactions_are_committed_and_rolled_back(connection: amqp.Connection) -> None:
    """Publishes and acknowledgements take effect together, or not at all."""
    channel, other = connection.channel(), connection.channel()
    queue = queue_of(other)
    channel.tx_select()
    channel.basic_publish(Message("1"), routing_key=queue)
    assert None is other.basic_get(queue)
    channel.tx_commit()
    assert "1" == other.basic_get(queue, no_ack=True).body
    channel.basic_publish(Message("2"), routing_key=queue)
    channel.tx_rollback()
    channel.tx_commit()
    assert None is other.basic_get(queue)
