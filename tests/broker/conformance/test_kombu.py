# SPDX-License-Identifier: MIT
"""kombu, which celery is built on, judges the broker."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import pytest
from amqp.exceptions import AccessRefused, MessageNacked
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.common import collect_replies, send_reply
from kombu.mixins import ConsumerMixin
from kombu.pidbox import Mailbox
from kombu.pools import Connections

from tests.broker.conformance.samples import BODY_SIZES, body_of, death_of
from tests.broker.conformance.servers import Server
from tests.waiting import wait_until

#: How `ensure` tries again: at once at first, and without end.
RETRY = {"interval_start": 0, "interval_step": 0.1, "interval_max": 0.5}


@contextlib.contextmanager
def connected(url: str, **options: Any) -> Iterator[Connection]:
    """Connect for the duration of the block."""
    with Connection(url, **options) as connection:
        connection.connect()
        yield connection


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    with connected(url) as connection:
        yield connection


def drain(connection: Connection, condition: Callable[[], object]) -> None:
    """Take what the broker sends until the condition holds."""
    deadline = time.monotonic() + 30.0
    while not condition():
        connection.drain_events(timeout=deadline - time.monotonic())


def got(queue: Queue) -> kombu.Message:
    """Wait for a message in the queue, and take it."""
    return wait_until(lambda: queue.get(no_ack=True))


def test_a_simple_queue_puts_and_gets(connection: Connection) -> None:
    """In order, with what was put, and with its size."""
    with connection.SimpleQueue("simple") as queue:
        for number in range(3):
            queue.put({"number": number}, headers={"number": number})
        wait_until(lambda: queue.qsize() == 3)
        for number in range(3):
            message = queue.get(timeout=30)
            assert {"number": number} == message.payload
            assert number == message.headers["number"]
            message.ack()
        with pytest.raises(queue.Empty):
            queue.get(timeout=0.05)
        with pytest.raises(queue.Empty):
            queue.get_nowait()


def test_a_simple_queue_gives_back_what_was_not_acknowledged(url: str) -> None:
    """To the next connection, as redelivered, and can be cleared."""
    with connected(url) as connection, connection.SimpleQueue("simple") as queue:
        for number in range(3):
            queue.put(number)
        assert 0 == queue.get(timeout=30).payload
    with connected(url) as connection, connection.SimpleQueue("simple") as queue:
        wait_until(lambda: queue.qsize() == 3)
        message = queue.get_nowait()
        assert (0, True) == (message.payload, message.delivery_info["redelivered"])
        message.reject()
        assert 2 == queue.clear()


def test_a_simple_buffer_goes_with_its_connection(url: str) -> None:
    """Its queue is exclusive and deletes itself."""
    with connected(url) as connection, connection.SimpleBuffer("buffer") as buffer:
        buffer.put("hello")
        assert "hello" == buffer.get(timeout=30).payload
    with connected(url) as connection:
        queue = Queue("buffer")(connection.default_channel)
        with pytest.raises(connection.channel_errors, match="NOT_FOUND - no queue 'buffer'"):
            queue.queue_declare(passive=True)


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_a_consumer_gets_what_a_producer_sends(connection: Connection, serializer: str) -> None:
    """By each serializer, and compressed."""
    payload = {"a": [1, 2.5, None, "ä"]}
    queue = Queue("q", Exchange("e", type="topic"), routing_key="a.#")
    received: list[Any] = []
    with Consumer(connection, [queue], accept=[serializer]) as consumer:
        consumer.register_callback(lambda body, message: (received.append(body), message.ack()))
        producer = Producer(connection, queue.exchange, serializer=serializer)
        producer.publish(payload, routing_key="a.b")
        producer.publish(payload, routing_key="b.a")
        producer.publish(payload, routing_key="a", compression="zlib")
        drain(connection, lambda: len(received) == 2)
    assert [payload, payload] == received


def test_a_consumer_takes_from_several_queues(connection: Connection) -> None:
    """Within its prefetch, and until it is cancelled by queue."""
    queues = [Queue(name, Exchange("e", type="direct"), routing_key=name) for name in "abc"]
    received: list[kombu.Message] = []
    producer = Producer(connection, queues[0].exchange)
    with Consumer(
        connection, queues, on_message=received.append, prefetch_count=2, tag_prefix="tag-"
    ) as consumer:
        for number in range(12):
            producer.publish(str(number), routing_key="abc"[number % 3])
        drain(connection, lambda: len(received) == 6)
        for message in received:
            message.ack()
        drain(connection, lambda: len(received) == 12)
        by_queue: dict[str, list[str]] = {"a": [], "b": [], "c": []}
        for message in received:
            by_queue[message.delivery_info["routing_key"]].append(message.body)
        assert [["0", "3", "6", "9"], ["1", "4", "7", "10"], ["2", "5", "8", "11"]] == [
            *by_queue.values()
        ]
        consumer.cancel_by_queue("a")
        producer.publish("stays", routing_key="a")
        producer.publish("comes", routing_key="b")
        received[-1].ack(multiple=True)
        drain(connection, lambda: len(received) == 13)
    assert "comes" == received[-1].body
    assert "stays" == got(queues[0](connection.default_channel)).body


def test_flow_and_recovery_of_a_consumer(connection: Connection) -> None:
    """Messages that are rejected, requeued or recovered come again or do not."""
    queue = Queue("q")
    received: list[kombu.Message] = []
    producer = Producer(connection)
    with Consumer(connection, [queue], on_message=received.append) as consumer:
        for number in range(3):
            producer.publish(str(number), routing_key="q")
        drain(connection, lambda: len(received) == 3)
        received[0].reject()
        received[1].requeue()
        drain(connection, lambda: len(received) == 4)
        consumer.recover(requeue=True)
        drain(connection, lambda: len(received) == 6)
        for message in received[4:]:
            message.ack()
    assert ["0", "1", "2", "1", "1", "2"] == [message.body for message in received]
    assert [False] * 3 + [True] * 3 == [
        message.delivery_info["redelivered"] for message in received
    ]


def test_an_unroutable_message_comes_back(connection: Connection) -> None:
    """Once the producer's connection is drained."""
    returns: list[Any] = []
    producer = Producer(connection, on_return=lambda *arguments: returns.append(arguments))
    producer.publish("hello", routing_key="nowhere", mandatory=True)
    drain(connection, lambda: returns)
    ((error, exchange, routing_key, message),) = returns
    assert (312, "NO_ROUTE") == (error.reply_code, error.reply_text)
    assert ("", "nowhere", "hello") == (exchange, routing_key, message.body)


def test_publishes_are_confirmed(url: str) -> None:
    """And refused by a full queue, and by a missing exchange."""
    queue = Queue(
        "q", max_length=1, queue_arguments={"x-overflow": "reject-publish"}, durable=False
    )
    with connected(url, transport_options={"confirm_publish": True}) as connection:
        producer = Producer(connection)
        producer.publish("1", routing_key="q", declare=[queue], confirm_timeout=30)
        with pytest.raises(MessageNacked):
            producer.publish("2", routing_key="q", confirm_timeout=30)
        with pytest.raises(connection.channel_errors, match="no exchange 'no'"):
            producer.publish("3", exchange="no", routing_key="q", confirm_timeout=30)
        assert "1" == got(queue(connection.default_channel)).body


def test_a_queues_options_become_arguments(connection: Connection) -> None:
    """expires, message_ttl and max_length are seconds and numbers; a difference is 406."""
    options = {"expires": 600.0, "message_ttl": 300.0, "max_length": 7, "max_priority": 3}
    channel = connection.channel()
    Queue("q", **options)(channel).declare()
    Queue("q", **options)(channel).declare()
    for name, argument in [("expires", "x-expires"), ("message_ttl", "x-message-ttl")]:
        other = Queue("q", **{**options, name: 1.0})
        with pytest.raises(connection.channel_errors, match=f"inequivalent arg '{argument}'"):
            other(channel).declare()


def test_messages_have_priorities(connection: Connection) -> None:
    """kombu sends one with every message, zero if it is not given."""
    queue = Queue("q", max_priority=10)(connection.default_channel)
    queue.declare()
    producer = Producer(connection)
    for priority in (0, 5, 10, 5):
        producer.publish(str(priority), routing_key="q", priority=priority)
    assert ["10", "5", "5", "0"] == [got(queue).body for _ in range(4)]


def test_a_message_expires_and_is_a_dead_letter(connection: Connection) -> None:
    """kombu's expiration is in seconds."""
    parking = Queue("parking", Exchange("dead", type="fanout"))(connection.default_channel)
    parking.declare()
    queue = Queue("q", queue_arguments={"x-dead-letter-exchange": "dead"})
    producer = Producer(connection)
    producer.publish("hello", routing_key="q", declare=[queue], expiration=0.02)
    message = got(parking)
    assert "hello" == message.body
    assert {
        "count": 1,
        "exchange": "",
        "original-expiration": "20",
        "queue": "q",
        "reason": "expired",
        "routing-keys": ["q"],
    } == death_of(message.headers)


def test_bindings_are_made_and_removed(connection: Connection) -> None:
    """Several for one queue, and from exchange to exchange."""
    channel = connection.default_channel
    source = Exchange("source", type="topic")(channel)
    target = Exchange("target", type="fanout")(channel)
    for exchange in (source, target):
        exchange.declare()
    target.bind_to(source, routing_key="a.*")
    queue = Queue("q", bindings=[kombu.binding(target), kombu.binding(source, routing_key="b.*")])(
        channel
    )
    queue.declare()
    producer = Producer(connection, source)
    for key in ("a.1", "b.1", "c.1"):
        producer.publish(key, routing_key=key)
    assert ["a.1", "b.1"] == [got(queue).body for _ in range(2)]
    target.unbind_from(source, routing_key="a.*")
    queue.unbind_from(source, routing_key="b.*")
    for key in ("a.1", "b.1"):
        producer.publish(key, routing_key=key)
    assert None is queue.get()
    assert 0 == queue.purge()
    assert 0 == queue.delete()
    target.delete()
    source.delete()


def test_a_body_of_any_size_arrives(connection: Connection) -> None:
    """As bytes, without a serializer."""
    received: list[kombu.Message] = []
    kind = {"content_type": "application/data", "content_encoding": "binary"}
    producer = Producer(connection)
    with Consumer(connection, [Queue("q")], on_message=received.append, no_ack=True):
        for size in BODY_SIZES:
            body = body_of(size)
            producer.publish(body, routing_key="q", **kind)
            drain(connection, lambda: received)
            # py-amqp gives an empty body as a string.
            assert body == (received.pop().body or b"")


def test_a_request_is_replied_to(connection: Connection) -> None:
    """Through a queue of the caller's, by kombu's helpers."""
    channel = connection.channel()
    replies = Queue("replies", exclusive=True, durable=False, auto_delete=True)(channel)
    replies.declare()
    producer = Producer(connection)
    producer.publish(
        {"question": 1},
        routing_key="service",
        declare=[Queue("service")],
        reply_to=replies.name,
        correlation_id="7",
    )
    service = connection.channel()
    request = got(Queue("service")(service))
    send_reply(Exchange("")(service), request, {"answer": 2}, producer)
    assert [{"answer": 2}] == list(collect_replies(connection, channel, replies, timeout=30))


def test_a_mailbox_reaches_every_node(url: str) -> None:
    """As celery's remote control does: fanout out, and replies through a queue that expires."""
    mailbox = Mailbox("control", type="fanout", reply_queue_expires=60.0)
    leave = threading.Event()
    ready = threading.Barrier(3, timeout=30)

    def serve(name: str) -> None:
        with Connection(url) as connection:
            node = mailbox(connection).Node(
                name, name, connection.default_channel, {"who": lambda state: state}
            )
            with node.listen():
                ready.wait()
                while not leave.is_set():
                    with contextlib.suppress(TimeoutError):
                        connection.drain_events(timeout=0.02)

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    try:
        ready.wait()
        with connected(url) as connection:
            answers = mailbox(connection).multi_call("who", timeout=30, limit=2)
    finally:
        leave.set()
        for thread in threads:
            thread.join()
    assert [{"one": "one"}, {"two": "two"}] == sorted(answers, key=str)


@pytest.mark.parametrize("way", ["close_connections", "cut"])
def test_publishing_is_ensured_when_the_connection_is_lost(
    url: str, server: Server, way: str
) -> None:
    """kombu connects again and publishes again."""
    with connected(url) as connection:
        producer = Producer(connection, Exchange("e", type="fanout"))
        queue = Queue("q", producer.exchange)
        failures: list[BaseException] = []

        def publish(body: str) -> None:
            # Without a confirm, the first write to a lost connection may seem to succeed.
            producer.publish(body, declare=[queue])
            producer.channel.queue_declare("q", passive=True)

        ensured = connection.ensure(
            producer,
            publish,
            errback=lambda error, _interval: failures.append(error),
            max_retries=10,
            **RETRY,
        )
        ensured("before")
        getattr(server, way)(url)
        ensured("after")
        assert failures
        bound = queue(connection.default_channel)
        assert ["before", "after"] == [got(bound).body for _ in range(2)]


def test_a_consumer_mixin_consumes_again_after_a_loss(url: str, server: Server) -> None:
    """What it had not acknowledged comes again."""
    received: list[tuple[str, bool]] = []

    class Worker(ConsumerMixin):
        def __init__(self, connection: Connection) -> None:
            self.connection = connection

        def get_consumers(self, consumer_class: Any, _channel: object) -> list[Consumer]:
            return [consumer_class([Queue("q")], on_message=self.on_message)]

        def on_message(self, message: kombu.Message) -> None:
            received.append((message.body, message.delivery_info["redelivered"]))
            if len(received) == 1:
                server.cut(url)
            else:
                message.ack()
                self.should_stop = True

    with connected(url) as connection:
        Producer(connection).publish("hello", routing_key="q", declare=[Queue("q")])
    with Connection(url) as connection:
        Worker(connection).run()
    assert [("hello", False), ("hello", True)] == received


def test_connections_and_channels_are_pooled(url: str) -> None:
    """A connection that comes back to the pool is used again."""
    connections = Connections(limit=2)
    pool = connections[Connection(url)]
    try:
        with pool.acquire(block=True) as first, pool.acquire(block=True) as second:
            channels = [each.ChannelPool(5).acquire() for each in (first, second)]
            assert [1, 1] == [channel.channel_id for channel in channels]
            for each, channel in zip((first, second), channels, strict=True):
                with each.SimpleQueue("q") as queue:
                    queue.put("hello")
                channel.close()
        with pool.acquire(block=True) as again, again.SimpleQueue("q") as queue:
            assert again in (first, second)
            assert ["hello", "hello"] == [queue.get(timeout=30).payload for _ in range(2)]
    finally:
        pool.force_close_all()


def test_a_wrong_password_is_refused(url: str) -> None:
    """At once, and not tried again."""
    with (
        Connection(url.replace("guest:guest", "guest:wrong")) as connection,
        pytest.raises(AccessRefused, match="Login was refused"),
    ):
        connection.ensure_connection(max_retries=3, interval_start=0)
