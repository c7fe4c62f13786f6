# SPDX-License-Identifier: MIT
"""pika's BlockingConnection judges the broker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pika
import pytest
from pika import BasicProperties, exceptions
from pika.adapters.blocking_connection import BlockingChannel

from tests.broker.conformance.samples import (
    BODY_SIZES,
    FRAME_MAX,
    FRAME_OVERHEAD,
    ROUTES,
    body_of,
    death_of,
)
from tests.broker.conformance.servers import Server
from tests.waiting import wait_until

#: A value of each type that pika writes into a field table.
FIELDS = {
    "S": "häßlich",
    "S-empty": "",
    "x": b"\x00\xff",
    "t": True,
    "t-false": False,
    "I": -(2**31),
    "I-most": 2**31 - 1,
    "l": -(2**63),
    "l-most": 2**63 - 1,
    "D": Decimal("-3.14159"),
    "T": datetime(2038, 1, 19, 3, 14, 8, tzinfo=timezone.utc),
    "F": {"deep": {"deeper": [{"deepest": None}]}, "none": {}},
    "A": [1, "two", [3, [4]], {"five": 5}, None, []],
    "V": None,
}

#: Every property of a message but its expiration, which the broker acts upon.
PROPERTIES = {
    "content_type": "text/plain",
    "content_encoding": "utf-8",
    "headers": {"a": 1},
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
def connected(url: str, **options: Any) -> Iterator[pika.BlockingConnection]:
    """Connect for the duration of the block."""
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
def connection(url: str) -> Iterator[pika.BlockingConnection]:
    with connected(url) as connection:
        yield connection


@pytest.fixture
def channel(connection: pika.BlockingConnection) -> BlockingChannel:
    return connection.channel()


@pytest.fixture
def confirming(connection: pika.BlockingConnection) -> BlockingChannel:
    """A channel whose `basic_publish` waits for the confirm."""
    channel = connection.channel()
    channel.confirm_delivery()
    return channel


@contextlib.contextmanager
def channel_closed(channel: BlockingChannel, code: int, text: str) -> Iterator[None]:
    """Expect that the broker closes the channel, and the connection stays."""
    with pytest.raises(exceptions.ChannelClosedByBroker) as caught:
        yield
    assert code == caught.value.reply_code
    assert text in caught.value.reply_text
    assert channel.is_closed
    assert channel.connection.is_open


@contextlib.contextmanager
def connection_closed(code: int, text: str) -> Iterator[None]:
    """Expect that the broker closes the connection."""
    with pytest.raises(exceptions.ConnectionClosedByBroker) as caught:
        yield
    assert code == caught.value.reply_code
    assert text in caught.value.reply_text


def queue_of(channel: BlockingChannel, name: str = "", **arguments: Any) -> str:
    """Declare an exclusive queue with these x-arguments, and return its name."""
    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
    declared = channel.queue_declare(name, exclusive=True, arguments=arguments)
    queue: str = declared.method.queue
    return queue


def wait_ready(channel: BlockingChannel, queue: str, count: int) -> None:
    """Wait until as many messages are ready in the queue.

    RabbitMQ answers a declare before it has seen the publishes and acknowledgements before it.
    """
    declare = channel.queue_declare
    wait_until(lambda: count == declare(queue, passive=True).method.message_count)


def drained(channel: BlockingChannel, queue: str) -> list[bytes]:
    """Take and return the bodies of all messages that are ready."""
    bodies = []
    while (got := channel.basic_get(queue, auto_ack=True))[0] is not None:
        bodies.append(got[2])
    return bodies


def got(channel: BlockingChannel, queue: str) -> tuple[Any, BasicProperties, bytes]:
    """Wait for a message in the queue, and take it."""

    def get() -> tuple[Any, BasicProperties, bytes] | None:
        method, properties, body = channel.basic_get(queue, auto_ack=True)
        return None if method is None else (method, properties, body)

    message = wait_until(get)
    assert message is not None
    return message


def consumed(channel: BlockingChannel, queue: str, **options: Any) -> list[tuple[Any, Any, bytes]]:
    """Consume, and return the list to which the deliveries are added."""
    deliveries: list[tuple[Any, Any, bytes]] = []

    def deliver(_channel: object, method: Any, properties: Any, body: bytes) -> None:
        deliveries.append((method, properties, body))

    channel.basic_consume(queue, deliver, **options)
    return deliveries


def pump(channel: BlockingChannel, condition: Callable[[], object], timeout: float = 30.0) -> None:
    """Process events until the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "nothing more came"
        channel.connection.process_data_events(time_limit=0.05)


def settle(channel: BlockingChannel) -> None:
    """Wait until the broker has handled all that was sent, and its deliveries are here."""
    channel.basic_qos(prefetch_count=0)
    channel.connection.process_data_events(time_limit=0)


def test_the_broker_offers_what_pika_asks_for(connection: pika.BlockingConnection) -> None:
    """pika refuses confirms, and an application cancels, by these capabilities."""
    assert connection.publisher_confirms_supported
    assert connection.basic_nack_supported
    assert connection.consumer_cancel_notify_supported
    assert connection.exchange_exchange_bindings_supported


@pytest.mark.parametrize(("kind", "binding", "key", "other"), ROUTES)
def test_an_exchange_routes_as_its_type_says(
    channel: BlockingChannel, kind: str, binding: str, key: str, other: str | None
) -> None:
    """What matches arrives, with exchange and key, and the rest does not."""
    channel.exchange_declare("e", kind)
    queue = queue_of(channel)
    channel.queue_bind(queue, "e", binding, {"x-match": "all", "kind": binding})
    for each in (key, other or key):
        channel.basic_publish("e", each, each.encode(), BasicProperties(headers={"kind": each}))

    method, _properties, body = got(channel, queue)

    assert ("e", key, key.encode()) == (method.exchange, method.routing_key, body)
    assert (1 if other is None else 0) == method.message_count


@pytest.mark.parametrize("name", ["direct", "fanout", "topic", "headers", "match"])
def test_the_exchanges_of_the_standard_are_there(channel: BlockingChannel, name: str) -> None:
    """Those whose name begins with amq. need not be declared, and cannot be made."""
    kind = "headers" if name == "match" else name
    channel.exchange_declare(f"amq.{name}", passive=True)
    channel.exchange_declare(f"amq.{name}", kind, durable=True)
    with channel_closed(channel, 403, "ACCESS_REFUSED"):
        channel.exchange_declare(f"amq.{name}.mine", kind)


def test_the_default_exchange_routes_to_the_queue_of_that_name(channel: BlockingChannel) -> None:
    """It cannot be bound to."""
    queue = queue_of(channel)
    channel.basic_publish("", queue, b"hello")
    method, _properties, body = got(channel, queue)
    assert ("", queue, b"hello") == (method.exchange, method.routing_key, body)
    with channel_closed(channel, 403, "operation not permitted on the default exchange"):
        channel.queue_bind(queue, "", "key")


def test_the_broker_names_a_queue(channel: BlockingChannel) -> None:
    """Two nameless queues differ, and no name then stands for the last one."""
    first, second = queue_of(channel), queue_of(channel)
    assert first != second
    assert first.startswith("amq.gen-")
    channel.queue_bind("", "amq.direct")
    channel.basic_publish("amq.direct", second, b"hello")
    assert b"hello" == got(channel, "")[2]


def test_what_is_declared_again_must_be_the_same(connection: pika.BlockingConnection) -> None:
    """A difference closes the channel, and its text names the difference."""
    channel = connection.channel()
    channel.queue_declare("q", durable=True, arguments={"x-max-length": 5})
    channel.queue_declare("q", durable=True, arguments={"x-max-length": 5})
    with channel_closed(channel, 406, "inequivalent arg 'durable' for queue 'q'"):
        channel.queue_declare("q", arguments={"x-max-length": 5})

    channel = connection.channel()
    with channel_closed(channel, 406, "inequivalent arg 'x-max-length' for queue 'q'"):
        channel.queue_declare("q", durable=True, arguments={"x-max-length": 6})

    channel = connection.channel()
    channel.exchange_declare("e", "topic")
    channel.exchange_declare("e", "topic")
    with channel_closed(channel, 406, "inequivalent arg 'type' for exchange 'e'"):
        channel.exchange_declare("e", "fanout")


@pytest.mark.parametrize(
    ("refused", "text"),
    [
        (lambda channel: channel.queue_declare("no", passive=True), "no queue 'no'"),
        (lambda channel: channel.exchange_declare("no", passive=True), "no exchange 'no'"),
        (lambda channel: channel.queue_bind("no", "amq.topic", "key"), "no queue 'no'"),
        (lambda channel: channel.exchange_bind("amq.topic", "no", "key"), "no exchange 'no'"),
        (lambda channel: channel.basic_get("no"), "no queue 'no'"),
        (lambda channel: channel.basic_consume("no", print), "no queue 'no'"),
        (lambda channel: channel.queue_purge("no"), "no queue 'no'"),
    ],
    ids=["queue", "exchange", "bind", "exchange-bind", "get", "consume", "purge"],
)
def test_what_is_missing_is_not_found(
    channel: BlockingChannel, refused: Callable[[BlockingChannel], object], text: str
) -> None:
    """404 closes the channel, and the connection opens another one under its number."""
    with channel_closed(channel, 404, text):
        refused(channel)
    again = channel.connection.channel(channel.channel_number)
    assert queue_of(again)


def test_deleting_or_unbinding_what_is_missing_succeeds(channel: BlockingChannel) -> None:
    """RabbitMQ takes both for done already."""
    assert 0 == channel.queue_delete("no").method.message_count
    channel.exchange_delete("no")
    queue = queue_of(channel)
    channel.queue_unbind(queue, "amq.direct", "never bound")
    channel.queue_unbind(queue, "no", "key")
    channel.queue_unbind("no", "amq.direct", "key")
    channel.exchange_unbind("no", "amq.direct", "key")
    channel.exchange_unbind("amq.direct", "no", "key")
    assert channel.is_open


def test_an_exclusive_queue_is_its_connections_own(url: str, channel: BlockingChannel) -> None:
    """Others get 405, and it goes with its connection."""
    with connected(url) as owner:
        queue_of(owner.channel(), "mine")
        with channel_closed(channel, 405, "exclusive access to locked queue 'mine'"):
            channel.queue_declare("mine", passive=True)
    channel = channel.connection.channel()
    with channel_closed(channel, 404, "no queue 'mine'"):
        channel.queue_declare("mine", passive=True)


def test_queues_and_exchanges_delete_themselves(connection: pika.BlockingConnection) -> None:
    """A queue goes after its last consumer, an exchange after its last binding."""
    channel = connection.channel()
    channel.exchange_declare("e", "fanout", auto_delete=True)
    channel.queue_declare("q", auto_delete=True)
    channel.queue_bind("q", "e")
    tags = [channel.basic_consume("q", print) for _ in range(2)]
    channel.basic_cancel(tags[0])
    channel.queue_declare("q", passive=True)
    channel.basic_cancel(tags[1])
    with channel_closed(channel, 404, "no queue 'q'"):
        channel.queue_declare("q", passive=True)
    channel = connection.channel()
    with channel_closed(channel, 404, "no exchange 'e'"):
        channel.exchange_declare("e", passive=True)


def test_exchanges_are_bound_to_exchanges(confirming: BlockingChannel) -> None:
    """A message reaches a queue once, by however many ways, until the exchanges are unbound."""
    queue = queue_of(confirming)
    for exchange in ("left", "right"):
        confirming.exchange_declare(exchange, "fanout")
        confirming.queue_bind(queue, exchange)
        confirming.exchange_bind(exchange, "amq.topic", "a.#")
    confirming.basic_publish("amq.topic", "a.b", b"hello", mandatory=True)
    assert [b"hello"] == drained(confirming, queue)
    for exchange in ("left", "right"):
        confirming.exchange_unbind(exchange, "amq.topic", "a.#")
    with pytest.raises(exceptions.UnroutableError):
        confirming.basic_publish("amq.topic", "a.b", b"hello", mandatory=True)


def test_an_alternate_exchange_takes_what_is_not_routed(confirming: BlockingChannel) -> None:
    """Such a message counts as routed."""
    confirming.exchange_declare("rest", "fanout")
    confirming.exchange_declare("e", "direct", arguments={"alternate-exchange": "rest"})
    queue = queue_of(confirming)
    confirming.queue_bind(queue, "rest")
    confirming.basic_publish("e", "nowhere", b"hello", mandatory=True)
    method, _properties, body = got(confirming, queue)
    assert ("e", "nowhere", b"hello") == (method.exchange, method.routing_key, body)


def test_an_internal_exchange_takes_no_publishes(confirming: BlockingChannel) -> None:
    """It serves other exchanges."""
    confirming.exchange_declare("inner", "fanout", internal=True)
    confirming.exchange_bind("inner", "amq.direct", "in")
    queue = queue_of(confirming)
    confirming.queue_bind(queue, "inner")
    confirming.basic_publish("amq.direct", "in", b"hello", mandatory=True)
    assert [b"hello"] == drained(confirming, queue)
    with channel_closed(confirming, 403, "cannot publish to internal exchange 'inner'"):
        confirming.basic_publish("inner", "in", b"hello")


def test_an_unroutable_message_comes_back(
    confirming: BlockingChannel, channel: BlockingChannel
) -> None:
    """With confirms it comes before the confirm, and without confirms it comes alone."""
    properties = BasicProperties(message_id="1", headers={"a": [1, {}]})
    returns: list[Any] = []
    channel.add_on_return_callback(lambda *returned: returns.append(returned[1:]))

    with pytest.raises(exceptions.UnroutableError) as caught:
        confirming.basic_publish("amq.direct", "nowhere", b"hello", properties, mandatory=True)
    channel.basic_publish("amq.direct", "nowhere", b"hello", properties, mandatory=True)
    pump(channel, lambda: returns)

    (message,) = caught.value.messages
    for method, header, body in [(message.method, message.properties, message.body), *returns]:
        assert (312, "NO_ROUTE") == (method.reply_code, method.reply_text)
        assert ("amq.direct", "nowhere") == (method.exchange, method.routing_key)
        assert (properties, b"hello") == (header, body)
    confirming.basic_publish("amq.direct", "nowhere", b"dropped in silence")


def test_a_publish_to_a_missing_exchange_closes_the_channel(confirming: BlockingChannel) -> None:
    """404, and no confirm."""
    with channel_closed(confirming, 404, "no exchange 'no' in vhost"):
        confirming.basic_publish("no", "key", b"")


def test_a_full_queue_refuses_or_drops(confirming: BlockingChannel) -> None:
    """By x-overflow it answers with basic.nack, or loses its oldest message."""
    refusing = queue_of(confirming, x_max_length=2, x_overflow="reject-publish")
    dropping = queue_of(confirming, x_max_length=2)
    for body in (b"1", b"2"):
        confirming.basic_publish("", refusing, body)
    with pytest.raises(exceptions.NackError):
        confirming.basic_publish("", refusing, b"3")
    for body in (b"1", b"2", b"3"):
        confirming.basic_publish("", dropping, body)
    assert [b"1", b"2"] == drained(confirming, refusing)
    assert [b"2", b"3"] == drained(confirming, dropping)


def test_every_property_arrives(channel: BlockingChannel) -> None:
    """All but the expiration, which has its own test."""
    queue = queue_of(channel)
    channel.basic_publish("", queue, b"", BasicProperties(**PROPERTIES))
    assert {**PROPERTIES, "expiration": None} == vars(got(channel, queue)[1])


def test_every_type_of_field_arrives(channel: BlockingChannel) -> None:
    """Also after the broker had to write the header anew, since it added x-death."""
    parking = queue_of(channel)
    queue = queue_of(channel, x_dead_letter_exchange="", x_dead_letter_routing_key=parking)
    for each in range(2):
        channel.basic_publish("", queue, b"", BasicProperties(headers=FIELDS))
        method, properties, _body = channel.basic_get(queue, auto_ack=each == 0)
        assert FIELDS == properties.headers
    channel.basic_reject(method.delivery_tag, requeue=False)

    headers = got(channel, parking)[1].headers

    assert FIELDS == {name: value for name, value in headers.items() if name in FIELDS}
    assert all(isinstance(headers[name], type(value)) for name, value in FIELDS.items())


def test_arguments_of_every_type_are_compared(channel: BlockingChannel) -> None:
    """A queue may carry arguments that mean nothing, and is then still the same queue."""
    queue_of(channel, "q", **FIELDS)
    assert "q" == queue_of(channel, "q", **FIELDS)


@pytest.mark.parametrize("size", BODY_SIZES)
def test_a_body_of_any_size_arrives(confirming: BlockingChannel, size: int) -> None:
    """Through basic.get and through basic.deliver."""
    queue = queue_of(confirming)
    body = body_of(size)
    for _ in range(2):
        confirming.basic_publish("", queue, body)
    assert body == got(confirming, queue)[2]
    deliveries = consumed(confirming, queue)
    pump(confirming, lambda: deliveries)
    assert body == deliveries[0][2]


def test_a_client_may_ask_for_small_frames(url: str) -> None:
    """4096 bytes are the least, and no frame of the broker is larger."""
    with connected(url, frame_max=4096) as connection:
        channel = connection.channel()
        queue = queue_of(channel)
        for size in (4096 - FRAME_OVERHEAD, 4096, FRAME_MAX):
            channel.basic_publish("", queue, body_of(size))
            assert body_of(size) == got(channel, queue)[2]


def test_a_consumer_gets_what_is_there_and_what_comes(channel: BlockingChannel) -> None:
    """In order, with its tag, and numbered from one."""
    queue = queue_of(channel)
    channel.basic_publish("", queue, b"1")
    deliveries = consumed(channel, queue, consumer_tag="tag")
    channel.basic_publish("", queue, b"2")
    pump(channel, lambda: len(deliveries) == 2)
    assert [("tag", 1, False, b"1"), ("tag", 2, False, b"2")] == [
        (method.consumer_tag, method.delivery_tag, method.redelivered, body)
        for method, _properties, body in deliveries
    ]


def test_prefetch_bounds_what_is_unacknowledged(channel: BlockingChannel) -> None:
    """An acknowledgement, also of several at once, makes room for as many."""
    queue = queue_of(channel)
    for number in range(10):
        channel.basic_publish("", queue, b"%d" % number)
    channel.basic_qos(prefetch_count=3)
    deliveries = consumed(channel, queue)
    pump(channel, lambda: len(deliveries) == 3)
    channel.basic_ack(1)
    pump(channel, lambda: len(deliveries) == 4)
    channel.basic_ack(4, multiple=True)
    pump(channel, lambda: len(deliveries) == 7)
    channel.basic_ack(0, multiple=True)
    pump(channel, lambda: len(deliveries) == 10)
    assert [b"%d" % number for number in range(10)] == [body for *_, body in deliveries]
    wait_ready(channel, queue, 0)


def test_a_global_prefetch_is_shared_by_the_consumers(channel: BlockingChannel) -> None:
    """Two consumers of one channel hold no more than the channel may."""
    queue = queue_of(channel)
    channel.basic_qos(prefetch_count=3, global_qos=True)
    deliveries = [consumed(channel, queue) for _ in range(2)]
    for _ in range(10):
        channel.basic_publish("", queue, b"")
    pump(channel, lambda: sum(map(len, deliveries)) == 3)
    wait_ready(channel, queue, 7)


def test_consumers_of_higher_priority_come_first(channel: BlockingChannel) -> None:
    """The others get what those cannot take."""
    queue = queue_of(channel)
    channel.basic_qos(prefetch_count=2)
    low = consumed(channel, queue)
    high = [consumed(channel, queue, arguments={"x-priority": 5}) for _ in range(2)]
    for _ in range(5):
        channel.basic_publish("", queue, b"")
    pump(channel, lambda: len(low) == 1)
    assert [2, 2] == [len(deliveries) for deliveries in high]


def test_an_exclusive_consumer_is_alone(channel: BlockingChannel) -> None:
    """Whoever comes second gets 403."""
    queue = queue_of(channel)
    consumed(channel, queue, exclusive=True)
    with channel_closed(second := channel.connection.channel(), 403, "in exclusive use"):
        consumed(second, queue)


def test_a_single_active_consumer_is_followed_by_the_next(channel: BlockingChannel) -> None:
    """All get the messages of one, until it is cancelled."""
    queue = queue_of(channel, x_single_active_consumer=True)
    first = consumed(channel, queue, consumer_tag="first", auto_ack=True)
    second = consumed(channel, queue, auto_ack=True)
    for _ in range(3):
        channel.basic_publish("", queue, b"")
    pump(channel, lambda: len(first) == 3)
    channel.basic_cancel("first")
    channel.basic_publish("", queue, b"")
    pump(channel, lambda: len(second) == 1)


@pytest.mark.parametrize("way", ["nack", "nack-multiple", "reject", "recover", "channel", "cut"])
def test_what_is_not_settled_comes_again(
    url: str, server: Server, channel: BlockingChannel, way: str
) -> None:
    """In its old place, with the flag that says so, whatever the reason."""
    channel.queue_declare("q")
    for body in (b"1", b"2", b"3"):
        channel.basic_publish("", "q", body)
    taker = channel.connection.channel()
    tags = [taker.basic_get("q")[0].delivery_tag for _ in range(2)]
    wait_ready(channel, "q", 1)

    if way == "nack":
        for tag in reversed(tags):
            taker.basic_nack(tag)
    elif way == "nack-multiple":
        taker.basic_nack(tags[-1], multiple=True)
    elif way == "reject":
        for tag in tags:
            taker.basic_reject(tag)
    elif way == "recover":
        taker.basic_recover(requeue=True)
    elif way == "channel":
        taker.close()
    else:
        server.cut(url)
        with pytest.raises(exceptions.AMQPConnectionError):
            pump(channel, lambda: False)

    with connected(url) as fresh:
        channel = fresh.channel()
        wait_ready(channel, "q", 3)
        messages = [got(channel, "q") for _ in range(3)]
    assert [(True, b"1"), (True, b"2"), (False, b"3")] == [
        (method.redelivered, body) for method, _properties, body in messages
    ]


def test_to_settle_twice_closes_the_channel(channel: BlockingChannel) -> None:
    """406, as for a tag that never was."""
    queue = queue_of(channel)
    channel.basic_publish("", queue, b"")
    method = channel.basic_get(queue)[0]
    channel.basic_ack(method.delivery_tag)
    channel.basic_ack(method.delivery_tag)
    with channel_closed(channel, 406, "unknown delivery tag 1"):
        settle(channel)


def test_a_cancelled_consumer_gets_nothing_more(channel: BlockingChannel) -> None:
    """What it holds stays with it until the channel closes."""
    queue = queue_of(channel)
    channel.basic_qos(prefetch_count=1)
    deliveries = consumed(channel, queue, consumer_tag="tag")
    for _ in range(3):
        channel.basic_publish("", queue, b"")
    pump(channel, lambda: deliveries)
    assert [] == channel.basic_cancel("tag")
    settle(channel)
    assert 1 == len(deliveries)
    wait_ready(channel, queue, 2)
    declared = channel.queue_declare(queue, passive=True).method
    assert 0 == declared.consumer_count


def test_consumers_hear_that_their_queue_was_deleted(channel: BlockingChannel) -> None:
    """The broker sends basic.cancel with their tag."""
    cancelled: list[str] = []
    channel.add_on_cancel_callback(lambda frame: cancelled.append(frame.method.consumer_tag))
    channel.queue_declare("q")
    for tag in ("a", "b"):
        channel.basic_consume("q", print, consumer_tag=tag)
    other = channel.connection.channel()
    other.queue_delete("q")
    pump(channel, lambda: len(cancelled) == 2)
    assert ["a", "b"] == sorted(cancelled)
    assert channel.is_open


def test_the_consuming_generator_ends_in_good_order(channel: BlockingChannel) -> None:
    """pika's `consume` returns what it had fetched too many, and gives it back to the queue."""
    queue = queue_of(channel)
    for body in (b"1", b"2", b"3"):
        channel.basic_publish("", queue, body)
    method, _properties, body = next(channel.consume(queue, inactivity_timeout=30.0))
    channel.basic_ack(method.delivery_tag)
    channel.cancel()
    assert b"1" == body
    wait_ready(channel, queue, 2)
    assert [b"2", b"3"] == drained(channel, queue)


def test_counts_are_exact(channel: BlockingChannel) -> None:
    """Declare, get, purge and delete say how many messages there are."""
    channel.queue_declare("q")
    for _ in range(5):
        channel.basic_publish("", "q", b"")
    wait_ready(channel, "q", 5)
    held = channel.basic_get("q")[0]
    assert 4 == held.message_count
    assert 4 == channel.queue_purge("q").method.message_count
    assert (None, None, None) == channel.basic_get("q")
    channel.basic_nack(held.delivery_tag)
    wait_ready(channel, "q", 1)
    consumed(channel, "q")
    assert 1 == channel.queue_declare("q").method.consumer_count
    assert 0 == channel.queue_delete("q").method.message_count
    channel.queue_declare("q")
    channel.basic_publish("", "q", b"")
    assert 1 == channel.queue_delete("q").method.message_count


def test_what_is_in_use_is_not_deleted_if_so_asked(connection: pika.BlockingConnection) -> None:
    """if-unused and if-empty are 406."""
    channel = connection.channel()
    channel.queue_declare("q")
    channel.queue_bind("q", "amq.fanout")
    channel.exchange_declare("e", "fanout")
    channel.queue_bind("q", "e")
    channel.basic_publish("", "q", b"")
    with channel_closed(channel, 406, "queue 'q' in vhost"):
        channel.queue_delete("q", if_empty=True)
    channel = connection.channel()
    channel.basic_consume("q", print)
    with channel_closed(channel, 406, "queue 'q' in vhost"):
        channel.queue_delete("q", if_unused=True)
    channel = connection.channel()
    with channel_closed(channel, 406, "exchange 'e' in vhost"):
        channel.exchange_delete("e", if_unused=True)
    channel = connection.channel()
    assert 1 == channel.queue_delete("q").method.message_count
    channel.exchange_delete("e", if_unused=True)


def test_messages_of_higher_priority_come_first(channel: BlockingChannel) -> None:
    """Up to the highest that the queue has, and in order where they are the same."""
    queue = queue_of(channel, x_max_priority=5)
    for priority, body in [(None, b"a"), (1, b"b"), (9, b"c"), (5, b"d"), (0, b"e"), (1, b"f")]:
        channel.basic_publish("", queue, body, BasicProperties(priority=priority))
    assert [b"c", b"d", b"b", b"f", b"a", b"e"] == drained(channel, queue)


@pytest.mark.parametrize(
    ("arguments", "expiration"),
    [({}, "30"), ({"x_message_ttl": 30}, None), ({"x_message_ttl": 600_000}, "30")],
    ids=["message", "queue", "the-shorter"],
)
def test_a_message_expires(
    channel: BlockingChannel, arguments: dict[str, int], expiration: str | None
) -> None:
    """By its own expiration or by that of its queue, into the dead-letter exchange."""
    parking = queue_of(channel)
    queue = queue_of(
        channel, x_dead_letter_exchange="", x_dead_letter_routing_key=parking, **arguments
    )
    channel.basic_publish("", queue, b"hello", BasicProperties(expiration=expiration))

    method, properties, body = got(channel, parking)

    assert ("", parking, b"hello") == (method.exchange, method.routing_key, body)
    assert None is properties.expiration
    expected = {
        "count": 1,
        "exchange": "",
        "queue": queue,
        "reason": "expired",
        "routing-keys": [queue],
    }
    if expiration:
        expected["original-expiration"] = expiration
    assert expected == death_of(properties.headers)
    wait_ready(channel, queue, 0)


def test_a_queue_expires(channel: BlockingChannel) -> None:
    """When nobody has used it for as long as it says."""
    channel.queue_declare("q", arguments={"x-expires": 50})

    def is_gone() -> bool:
        # A passive declare would count as use.
        attempt = channel.connection.channel()
        attempt.confirm_delivery()
        try:
            attempt.basic_publish("", "q", b"", mandatory=True)
        except exceptions.UnroutableError:
            return True
        finally:
            attempt.close()
        return False

    wait_until(is_gone)


@pytest.mark.parametrize("reason", ["rejected", "maxlen"])
def test_a_dead_letter_says_why_it_died(channel: BlockingChannel, reason: str) -> None:
    """x-death counts by queue and reason, and x-first-death-* stays."""
    channel.exchange_declare("dead", "topic")
    parking = queue_of(channel)
    channel.queue_bind(parking, "dead", "#")
    queue = queue_of(channel, x_dead_letter_exchange="dead", x_max_length=1)
    channel.queue_bind(queue, "amq.direct", "key")
    properties = BasicProperties()
    for count in (1, 2):
        channel.basic_publish("amq.direct", "key", b"1", properties)
        if reason == "rejected":
            channel.basic_reject(channel.basic_get(queue)[0].delivery_tag, requeue=False)
        else:
            channel.basic_publish("amq.direct", "key", b"2")

        method, properties, body = got(channel, parking)

        assert ("dead", "key", b"1") == (method.exchange, method.routing_key, body)
        assert {
            "count": count,
            "exchange": "amq.direct",
            "queue": queue,
            "reason": reason,
            "routing-keys": ["key"],
        } == death_of(properties.headers)
        assert (reason, queue, "amq.direct") == tuple(
            properties.headers[f"x-first-death-{name}"] for name in ("reason", "queue", "exchange")
        )
        channel.queue_purge(queue)


def test_a_quorum_queue_counts_deliveries(channel: BlockingChannel) -> None:
    """Up to its delivery limit, behind which the message is a dead letter."""
    parking = queue_of(channel)
    arguments = {
        "x-queue-type": "quorum",
        "x-delivery-limit": 2,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": parking,
    }
    channel.queue_declare("q", durable=True, arguments=arguments)
    channel.basic_publish("", "q", b"hello")

    def take() -> BasicProperties | None:
        method, properties, _body = channel.basic_get("q")
        if method is not None:
            channel.basic_nack(method.delivery_tag)
        return properties

    # RabbitMQ shows a count of zero to basic.get, and none to a consumer.
    assert {"x-delivery-count": 0} == wait_until(take).headers
    deliveries = consumed(channel, "q")
    for count in (1, 2):
        pump(channel, lambda: deliveries)
        method, properties, _body = deliveries.pop()
        assert {"x-delivery-count": count} == properties.headers
        channel.basic_nack(method.delivery_tag)

    headers = got(channel, parking)[1].headers

    assert "delivery_limit" == death_of(headers)["reason"]
    channel.queue_delete("q")


def test_copies_go_where_cc_and_bcc_say(channel: BlockingChannel) -> None:
    """And the receivers do not see BCC."""
    queues = [queue_of(channel) for _ in range(3)]
    headers = {"CC": [queues[1]], "BCC": [queues[2]], "other": 1}
    channel.basic_publish("", queues[0], b"", BasicProperties(headers=headers))
    for queue in queues:
        assert {"CC": [queues[1]], "other": 1} == got(channel, queue)[1].headers


def test_a_reply_comes_directly(url: str, channel: BlockingChannel) -> None:
    """Through amq.rabbitmq.reply-to, which stands for the caller's channel."""
    channel.queue_declare("service")
    replies = consumed(channel, "amq.rabbitmq.reply-to", auto_ack=True)
    properties = BasicProperties(reply_to="amq.rabbitmq.reply-to", correlation_id="7")
    channel.basic_publish("", "service", b"ping", properties)
    with connected(url) as server:
        answering = server.channel()
        answering.confirm_delivery()
        request = got(answering, "service")[1]
        assert request.reply_to.startswith("amq.rabbitmq.reply-to.")
        answering.queue_declare(request.reply_to, passive=True)
        answering.basic_publish("", request.reply_to, b"pong", BasicProperties(correlation_id="7"))
    pump(channel, lambda: replies)
    method, reply, body = replies[0]
    assert ("", "7", b"pong") == (method.exchange, reply.correlation_id, body)


def test_a_request_for_a_direct_reply_needs_a_consumer_for_it(channel: BlockingChannel) -> None:
    """406, as that consumer must not acknowledge, too."""
    properties = BasicProperties(reply_to="amq.rabbitmq.reply-to")
    channel.basic_publish("", "service", b"", properties)
    with channel_closed(channel, 406, "fast reply consumer does not exist"):
        settle(channel)
    channel = channel.connection.channel()
    with channel_closed(channel, 406, "reply consumer cannot acknowledge"):
        consumed(channel, "amq.rabbitmq.reply-to")


def test_fifty_channels_share_a_connection(connection: pika.BlockingConnection) -> None:
    """Bodies of several frames, sent and received on all of them at once, stay whole."""
    channels = [connection.channel() for _ in range(50)]
    assert 50 == len({channel.channel_number for channel in channels})
    queues = [queue_of(channel) for channel in channels]
    received = [consumed(channel, queue) for channel, queue in zip(channels, queues, strict=True)]
    bodies = [body_of(FRAME_MAX + number) for number in range(50)]
    for turn in range(3):
        for number, channel in enumerate(channels):
            channel.basic_publish("", queues[(number + turn) % 50], bodies[number])
    pump(channels[0], lambda: all(len(deliveries) == 3 for deliveries in received))
    for number, deliveries in enumerate(received):
        expected = [bodies[(number - turn) % 50] for turn in range(3)]
        assert sorted(expected) == sorted(body for *_, body in deliveries)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"credentials": pika.PlainCredentials("guest", "wrong")},
            exceptions.ProbableAuthenticationError,
            "ACCESS_REFUSED",
        ),
        (
            {"virtual_host": "no such"},
            exceptions.ProbableAccessDeniedError,
            "NOT_ALLOWED - vhost no such not found",
        ),
    ],
    ids=["password", "vhost"],
)
def test_a_connection_may_be_refused(
    url: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """By an orderly close, with 403 or 530."""
    with pytest.raises(error) as caught, connected(url, **options):
        raise AssertionError("never")
    assert text in str(caught.value)


def test_an_unknown_exchange_type_ends_the_connection(url: str) -> None:
    """503, and not an error of the channel."""
    with (
        connection_closed(503, "unknown exchange type 'postage-round'"),
        connected(url) as connection,
    ):
        connection.channel().exchange_declare("e", "postage-round")


def test_the_broker_closes_a_connection(url: str, server: Server) -> None:
    """320 says that an operator did."""
    with connected(url) as connection:
        channel = connection.channel()
        server.close_connections(url)
        with connection_closed(320, "CONNECTION_FORCED"):
            pump(channel, lambda: False)


def test_a_connection_that_breaks_is_noticed(url: str, server: Server) -> None:
    """And another one finds all but the exclusive queues."""
    with connected(url) as connection:
        channel = connection.channel()
        channel.queue_declare("shared")
        queue_of(channel, "own")
        server.cut(url)
        with pytest.raises(exceptions.AMQPConnectionError):
            pump(channel, lambda: False)
    with connected(url) as connection:
        channel = connection.channel()
        channel.queue_declare("shared", passive=True)
        wait_until(lambda: queue_of(channel, "own") == "own")
