# SPDX-License-Identifier: MIT
"""pika's SelectConnection judges the broker: requests are sent without waiting for answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pytest
from pika import BasicProperties, exceptions
from pika.channel import Channel
from pika.exchange_type import ExchangeType

from tests.broker.conformance.samples import BODY_SIZES, FRAME_MAX, body_of, death_of
from tests.broker.conformance.servers import Server

#: Seconds between two looks whether what is waited for has come.
LOOK_SECONDS = 0.002


class Client:
    """A SelectConnection whose loop runs while something is waited for.

    Args:
        url: where to connect.
        options: attributes of the parameters, such as ``heartbeat``.
    """

    def __init__(self, url: str, **options: Any) -> None:
        parameters = pika.URLParameters(url)
        for name, value in options.items():
            setattr(parameters, name, value)
        #: Why the connection ended, or why it was not made.
        self.reasons: list[BaseException] = []
        self.connection = pika.SelectConnection(
            parameters,
            on_open_error_callback=self._on_end,
            on_close_callback=self._on_end,
        )

    def until(self, condition: Callable[[], object], timeout: float = 30.0) -> None:
        """Run the loop until the condition holds."""
        deadline = time.monotonic() + timeout
        loop = self.connection.ioloop

        def look() -> None:
            if condition() or time.monotonic() > deadline:
                loop.stop()
            else:
                loop.call_later(LOOK_SECONDS, look)

        look_now = loop.call_later(0, look)
        loop.start()
        loop.remove_timeout(look_now)
        assert condition(), f"not within {timeout} s; the connection ended by {self.reasons}"

    def call(self, method: Callable[..., object], *arguments: Any, **options: Any) -> Any:
        """Call a method of a channel, and return the answer of the broker."""
        answers: list[Any] = []
        method(*arguments, callback=answers.append, **options)
        self.until(lambda: answers)
        return answers[0].method

    def open(self) -> Client:
        """Wait until the connection is open."""
        self.until(lambda: self.connection.is_open)
        return self

    def channel(self, number: int | None = None) -> Channel:
        """Open a channel."""
        channel = self.connection.channel(number)
        self.until(lambda: channel.is_open)
        return channel

    def queue(self, channel: Channel, name: str = "", **arguments: Any) -> str:
        """Declare an exclusive queue with these x-arguments, and return its name."""
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        declare_ok = self.call(channel.queue_declare, name, exclusive=True, arguments=arguments)
        queue: str = declare_ok.queue
        return queue

    def close(self) -> None:
        """Close the connection, if it is still open."""
        if self.connection.is_open:
            self.connection.close()
        self.until(lambda: self.connection.is_closed)
        self.connection.ioloop.close()

    def _on_end(self, _connection: object, reason: BaseException) -> None:
        self.reasons.append(reason)


@contextlib.contextmanager
def connecting(url: str, **options: Any) -> Iterator[Client]:
    """Begin to connect, and close at the end of the block."""
    client = Client(url, **options)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with connecting(url) as client:
        yield client.open()


@pytest.fixture
def channel(client: Client) -> Channel:
    return client.channel()


def consumed(channel: Channel, queue: str, **options: Any) -> list[tuple[Any, Any, bytes]]:
    """Consume, and return the list to which the deliveries are added."""
    deliveries: list[tuple[Any, Any, bytes]] = []
    channel.basic_consume(queue, lambda _channel, *delivery: deliveries.append(delivery), **options)
    return deliveries


def confirms(channel: Channel) -> list[tuple[str, int, bool]]:
    """Select confirms, and return the list to which they are added: name, tag, multiple."""
    answers: list[tuple[str, int, bool]] = []

    def confirm(frame: Any) -> None:
        answers.append((frame.method.NAME, frame.method.delivery_tag, frame.method.multiple))

    channel.confirm_delivery(confirm)
    return answers


def confirmed(answers: list[tuple[str, int, bool]]) -> dict[int, str]:
    """Return which tags were confirmed, and how."""
    result: dict[int, str] = {}
    for name, tag, multiple in answers:
        for each in range(1 if multiple else tag, tag + 1):
            result.setdefault(each, name)
    return result


def closings(channel: Channel) -> list[Any]:
    """Return the list to which the reason is added when the channel closes."""
    reasons: list[Any] = []
    channel.add_on_close_callback(lambda _channel, reason: reasons.append(reason))
    return reasons


def ignore(*_delivery: object) -> None:
    """Do nothing with a delivery or an answer."""


def test_the_broker_says_what_it_is_and_can(client: Client) -> None:
    """Applications decide by these what to use."""
    properties = client.connection.server_properties
    assert {"product", "version", "capabilities"} <= set(properties)
    wanted = {
        "publisher_confirms",
        "exchange_exchange_bindings",
        "basic.nack",
        "consumer_cancel_notify",
        "connection.blocked",
        "consumer_priorities",
        "authentication_failure_close",
        "per_consumer_qos",
        "direct_reply_to",
    }
    assert wanted == {name for name in wanted if properties["capabilities"].get(name)}


def test_limits_are_the_smaller_of_both(url: str) -> None:
    """RabbitMQ offers 2047 channels, frames of 128 KiB and a heartbeat of a minute."""
    with connecting(url) as client:
        parameters = client.open().connection.params
        assert (2047, FRAME_MAX) == (parameters.channel_max, parameters.frame_max)
        assert 60 == parameters.heartbeat
    with connecting(url, channel_max=5, frame_max=8192, heartbeat=30) as client:
        parameters = client.open().connection.params
        assert (5, 8192) == (parameters.channel_max, parameters.frame_max)
        assert 30 == parameters.heartbeat
        assert 5 == client.channel(5).channel_number


def test_requests_need_not_wait_for_answers(client: Client, channel: Channel) -> None:
    """Declaring, binding, publishing and consuming go out in one piece and take effect in order."""
    answers: list[str] = []

    def answered(frame: Any) -> None:
        answers.append(frame.method.NAME)

    channel.exchange_declare("e", ExchangeType.topic, callback=answered)
    channel.queue_declare("q", exclusive=True, callback=answered)
    channel.queue_bind("q", "e", "#", callback=answered)
    channel.exchange_bind("e", "amq.topic", "#", callback=answered)
    channel.basic_qos(prefetch_count=2, callback=answered)
    channel.confirm_delivery(answered, answered)
    channel.queue_purge("q", callback=answered)
    client.until(lambda: len(answers) == 7)
    deliveries = consumed(channel, "q")
    channel.basic_publish("amq.topic", "key", b"hello", mandatory=True)
    client.until(lambda: deliveries and len(answers) == 8)
    assert [
        "Exchange.DeclareOk",
        "Queue.DeclareOk",
        "Queue.BindOk",
        "Exchange.BindOk",
        "Basic.QosOk",
        "Confirm.SelectOk",
        "Queue.PurgeOk",
        "Basic.Ack",
    ] == answers
    assert b"hello" == deliveries[0][2]


def test_requests_may_go_without_answers(client: Client, channel: Channel) -> None:
    """A method with nowait has its effect, and the broker says nothing."""
    channel.exchange_declare("e", ExchangeType.fanout)
    channel.queue_declare("q", exclusive=True)
    channel.queue_bind("q", "e", "")
    channel.basic_publish("e", "", b"purged")
    channel.queue_purge("q")
    for _ in range(2):
        channel.basic_publish("e", "", b"kept")
    deliveries = consumed(channel, "q")
    client.until(lambda: len(deliveries) == 2)
    assert [b"kept", b"kept"] == [body for *_, body in deliveries]
    channel.queue_delete("q")
    channel.exchange_delete("e")
    reasons = closings(channel)
    channel.queue_declare("q", passive=True, callback=print)
    client.until(lambda: reasons)
    assert 404 == reasons[0].reply_code


def test_many_publishes_are_confirmed_once_each(client: Client, channel: Channel) -> None:
    """By acks of one or of several, in whatever order."""
    queue = client.queue(channel)
    answers = confirms(channel)
    for number in range(1000):
        properties = BasicProperties(delivery_mode=1 + number % 2)
        channel.basic_publish("", queue, b"%d" % number, properties)
    client.until(lambda: len(confirmed(answers)) == 1000)
    assert dict.fromkeys(range(1, 1001), "Basic.Ack") == confirmed(answers)
    assert 1000 == client.call(channel.queue_declare, queue, passive=True).message_count


def test_refused_publishes_are_told_from_accepted_ones(client: Client, channel: Channel) -> None:
    """basic.nack names those that a full queue refused."""
    queue = client.queue(channel, x_max_length=10, x_overflow="reject-publish")
    answers = confirms(channel)
    for _ in range(20):
        channel.basic_publish("", queue, b"")
    client.until(lambda: len(confirmed(answers)) == 20)
    names = [name for _tag, name in sorted(confirmed(answers).items())]
    assert ["Basic.Ack"] * 10 + ["Basic.Nack"] * 10 == names


def test_a_return_comes_before_its_confirm(client: Client, channel: Channel) -> None:
    """Since it carries no tag, that is how publishers find out which message it is."""
    queue = client.queue(channel)
    answers = confirms(channel)
    returns: list[tuple[bytes, set[int]]] = []
    channel.add_on_return_callback(
        lambda *returned: returns.append((returned[-1], {*confirmed(answers)}))
    )
    for number in range(1, 11):
        key = "nowhere" if number % 2 else queue
        channel.basic_publish("", key, b"%d" % number, mandatory=True)
    client.until(lambda: len(confirmed(answers)) == 10)
    assert [b"1", b"3", b"5", b"7", b"9"] == [body for body, _confirmed in returns]
    assert not any(int(body) in confirmed_before for body, confirmed_before in returns)


def test_consumers_of_many_channels_share_a_queue(client: Client) -> None:
    """In turns, where each can take more."""
    channels = [client.channel() for _ in range(4)]
    queue = client.queue(channels[0])
    received = []
    for channel in channels:
        client.call(channel.basic_qos, prefetch_count=5)
        received.append(consumed(channel, queue))
        client.call(channel.basic_qos, prefetch_count=0)
    for number in range(20):
        channels[0].basic_publish("", queue, b"%d" % number)
    client.until(lambda: sum(map(len, received)) == 20)
    for first, deliveries in enumerate(received):
        assert [b"%d" % (first + 4 * turn) for turn in range(5)] == [
            body for *_, body in deliveries
        ]


def test_gets_are_answered(client: Client, channel: Channel) -> None:
    """With a message and how many are left, or with nothing."""
    queue = client.queue(channel)
    answers: list[Any] = []
    channel.add_callback(lambda _frame: answers.append(None), [pika.spec.Basic.GetEmpty], False)

    def take(_channel: object, method: Any, _properties: object, body: bytes) -> None:
        answers.append((method.delivery_tag, method.redelivered, method.message_count, body))

    for body in (b"1", b"2"):
        channel.basic_publish("", queue, body)
    for count in range(1, 4):
        channel.basic_get(queue, take)
        client.until(lambda count=count: len(answers) == count)
    assert [(1, False, 1, b"1"), (2, False, 0, b"2"), None] == answers


def test_a_consumer_is_cancelled_while_messages_fly(client: Client, channel: Channel) -> None:
    """What was delivered and not acknowledged is there again when the channel is closed."""
    other = client.channel()
    queue = client.queue(other)
    for number in range(100):
        other.basic_publish("", queue, b"%d" % number)
    tag = channel.basic_consume(queue, ignore)
    client.call(channel.basic_cancel, tag)
    channel.close()
    client.until(lambda: channel.is_closed)
    deliveries = consumed(other, queue)
    client.until(lambda: len(deliveries) == 100)
    assert [b"%d" % number for number in range(100)] == [body for *_, body in deliveries]


def test_a_closed_channel_number_is_used_again(client: Client) -> None:
    """However often, and what was on its way to the closed one does no harm."""
    for _ in range(30):
        channel = client.channel(7)
        reasons = closings(channel)
        channel.queue_declare("no", passive=True, callback=ignore)
        for _ in range(5):
            channel.basic_publish("", "no", b"on its way")
        client.until(reasons.copy)
        assert 404 == reasons[0].reply_code
    assert client.queue(client.channel(7))


def test_a_connection_closes_with_all_its_channels(client: Client) -> None:
    """pika closes them first, one by one."""
    channels = [client.channel() for _ in range(20)]
    reasons = [closings(channel) for channel in channels]
    client.connection.close(299, "enough")
    client.until(lambda: client.connection.is_closed)
    assert [exceptions.ConnectionClosedByClient] == [type(reason) for reason in client.reasons]
    assert all(len(each) == 1 for each in reasons)


@pytest.mark.parametrize("size", BODY_SIZES)
def test_a_body_of_any_size_arrives(client: Client, channel: Channel, size: int) -> None:
    """Whole, between the small ones of another channel."""
    other = client.channel()
    queues = [client.queue(each) for each in (channel, other)]
    big, small = consumed(channel, queues[0]), consumed(other, queues[1])
    body = body_of(size)
    channel.basic_publish("", queues[0], body)
    for _ in range(10):
        other.basic_publish("", queues[1], b"small")
    client.until(lambda: big and len(small) == 10)
    assert [body] == [delivered for *_, delivered in big]


def test_bodies_of_many_channels_interleave(client: Client) -> None:
    """Fifty channels send and receive several frames each, and every body stays whole."""
    channels = [client.channel() for _ in range(50)]
    queues = [client.queue(channel) for channel in channels]
    received = [consumed(channel, queue) for channel, queue in zip(channels, queues, strict=True)]
    for number, channel in enumerate(channels):
        channel.basic_publish("", queues[number - 1], body_of(2 * FRAME_MAX + number))
    client.until(lambda: all(received))
    sizes = [len(deliveries[0][2]) for deliveries in received]
    assert [2 * FRAME_MAX + (number + 1) % 50 for number in range(50)] == sizes
    assert all(body_of(len(each[0][2])) == each[0][2] for each in received)


def test_a_message_that_expires_is_a_dead_letter(client: Client, channel: Channel) -> None:
    """It goes to consumers of the parking queue at once."""
    parking = client.queue(channel)
    queue = client.queue(channel, x_dead_letter_exchange="", x_dead_letter_routing_key=parking)
    deliveries = consumed(channel, parking)
    channel.basic_publish("", queue, b"hello", BasicProperties(expiration="20"))
    client.until(lambda: deliveries)
    _method, properties, body = deliveries[0]
    assert b"hello" == body
    assert "20" == death_of(properties.headers)["original-expiration"]


def test_a_reply_comes_directly(client: Client, channel: Channel) -> None:
    """To the channel that asked, though both consumer and request went out together."""
    service = client.channel()
    queue = client.queue(service)
    requests = consumed(service, queue, auto_ack=True)
    replies = consumed(channel, "amq.rabbitmq.reply-to", auto_ack=True)
    for number in range(20):
        properties = BasicProperties(reply_to="amq.rabbitmq.reply-to", correlation_id=str(number))
        channel.basic_publish("", queue, b"", properties)
    client.until(lambda: len(requests) == 20)
    for _method, properties, _body in requests:
        service.basic_publish("", properties.reply_to, properties.correlation_id.encode())
    client.until(lambda: len(replies) == 20)
    assert [b"%d" % number for number in range(20)] == [body for *_, body in replies]


def test_a_queue_that_goes_cancels_its_consumers(client: Client, channel: Channel) -> None:
    """Without pika's asking, and the channel stays open."""
    cancelled: list[str] = []
    channel.add_on_cancel_callback(lambda frame: cancelled.append(frame.method.consumer_tag))
    client.call(channel.queue_declare, "q")
    client.call(channel.basic_consume, "q", ignore, consumer_tag="tag")
    client.call(client.channel().queue_delete, "q")
    client.until(lambda: cancelled)
    assert ["tag"] == cancelled
    assert channel.is_open


@pytest.mark.parametrize("way", ["close", "cut"])
def test_the_end_of_a_connection_is_reported(url: str, server: Server, way: str) -> None:
    """With the code that the broker sent, or as a lost stream."""
    with connecting(url) as client:
        reasons = closings(client.open().channel())
        getattr(server, "close_connections" if way == "close" else "cut")(url)
        client.until(lambda: client.reasons)
        error = (
            exceptions.ConnectionClosedByBroker if way == "close" else exceptions.StreamLostError
        )
        assert [error] == [type(reason) for reason in client.reasons]
        assert [error] == [type(reason) for reason in reasons]
        if way == "close":
            closed: Any = client.reasons[0]
            assert 320 == closed.reply_code
