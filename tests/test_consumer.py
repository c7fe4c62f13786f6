# SPDX-License-Identifier: MIT
"""What a consumer declares, consumes and settles."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pika
import pytest

from postage.errors import (
    ChannelClosedError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    DecodeError,
    EncodingError,
    ExchangeMismatchError,
    QueueMismatchError,
)
from postage.messaging import (
    Exchange,
    GenericConsumer,
    GenericProducer,
    JsonEncoder,
    Message,
    MessageResult,
    MessageResultError,
    Queue,
)
from postage.transport import connection as connections
from tests.nodes import Node
from tests.waiting import wait_until


class Letters(Exchange):
    name = "letters"


class Parcels(Exchange):
    name = "parcels"


class Sender(GenericProducer):
    eks = [(Letters, "post")]


LETTERS = Queue("letters", exclusive=True)

#: Names that these tests use for queues that outlive them.
DURABLE = ("kept", "named", "no-flags", "letters", f"private-{os.getpid()}", f"x{os.getpid()}0")
QUEUES = [name + ending for name in DURABLE for ending in ("", ".error")]


class Reader:
    """Reads what a consumer gets, and settles it.

    Attributes:
        read: The parameters of every message that came.
    """

    def __init__(self, consumer: GenericConsumer) -> None:
        self.consumer = consumer
        self.read: list[Any] = []

    def until(self, count: int, settle: Callable[[Any], None] | None = None) -> list[Any]:
        """Consume until so many messages were read, at most for 30 seconds, and return them."""

        def callback(_channel: Any, method: Any, _properties: Any, body: bytes) -> None:
            self.read.append(self.consumer.decode(body)["content"]["parameters"])
            (settle or self.consumer.ack)(method)
            if len(self.read) >= count:
                self.consumer.stop_consuming()

        watchdog = threading.Timer(30, self.consumer.stop_consuming)
        watchdog.start()
        try:
            self.consumer.start_consuming(callback)
        finally:
            watchdog.cancel()
            watchdog.join()
        return self.read


@pytest.fixture(autouse=True)
def no_queues_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    """Delete the durable queues of a test where the next one finds the same virtual host."""
    yield
    url = os.environ.get("POSTAGE_TEST_URL")
    if url is not None and "broker_url" in request.fixturenames:
        with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
            for name in QUEUES:
                connection.channel().queue_delete(name)


@pytest.fixture
def producer(broker_url: str) -> Iterator[Sender]:
    with Sender() as producer:
        yield producer


@pytest.fixture
def consumer(broker_url: str) -> Iterator[GenericConsumer]:
    with GenericConsumer([(Letters, [(LETTERS, "post")])]) as consumer:
        yield consumer


@pytest.fixture
def channel(broker_url: str) -> Iterator[Any]:
    """A channel of pika."""
    with closing(pika.BlockingConnection(pika.URLParameters(broker_url))) as connection:
        yield connection.channel()


@pytest.fixture
def closed_port() -> int:
    """A port that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def count_of(channel: Any, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).method.message_count)


# ----------------------------------------------------------------------- consuming


def test_a_consumer_calls_back_with_each_message(
    consumer: GenericConsumer, producer: Sender
) -> None:
    """With channel, delivery, properties and body, until it is told to stop."""
    calls: list[tuple[Any, ...]] = []

    def callback(*args: Any) -> None:
        calls.append(args)
        consumer.ack(args[1])
        if len(calls) == 2:
            consumer.stop_consuming()

    producer.message_echo("first", _message_id="1")
    producer.message_echo("second", _message_id="2")
    consumer.start_consuming(callback)

    (channel, method, properties, body), (*_rest, last) = calls
    assert consumer.channel is channel
    assert ("letters", "post", False) == (
        method.exchange,
        method.routing_key,
        method.redelivered,
    )
    assert "1" == properties.message_id
    assert "first" == consumer.decode(body)["content"]["parameters"]
    assert "second" == consumer.decode(last)["content"]["parameters"]


@pytest.mark.parametrize("queue", ["named", LETTERS, Queue(exclusive=True)])
def test_what_is_sent_from_the_constructor_on_is_kept(
    producer: Sender, broker_url: str, queue: Any
) -> None:
    """Also before it consumes, and where the broker invents the name of the queue."""
    with GenericConsumer([(Letters, [(queue, "post")])]) as consumer:
        for number in range(5):
            producer.message_echo(number)

        assert [0, 1, 2, 3, 4] == Reader(consumer).until(5)


def test_consuming_can_be_stopped_and_started_again(
    consumer: GenericConsumer, producer: Sender
) -> None:
    """As often as you like."""
    reader = Reader(consumer)
    for number in range(3):
        producer.message_echo(number)
        reader.until(number + 1)

    assert [0, 1, 2] == reader.read


def test_another_thread_can_stop_a_consumer(consumer: GenericConsumer) -> None:
    """One that waits for a message that does not come."""
    thread = threading.Thread(target=consumer.start_consuming, args=(print,))
    thread.start()
    wait_until(lambda: consumer.subscriber.consuming)
    consumer.stop_consuming()
    thread.join(30)

    assert not thread.is_alive()


def test_an_acknowledged_message_does_not_come_again(
    producer: Sender, broker_url: str, channel: Any
) -> None:
    """One that is not acknowledged does, when its consumer is gone."""
    eqk = [(Letters, [("kept", "post")])]
    with GenericConsumer(eqk) as first:
        producer.message_echo("settled")
        producer.message_echo("kept")
        reader = Reader(first)
        reader.until(1)
        reader.until(2, settle=lambda method: None)
        assert ["settled", "kept"] == reader.read

    with GenericConsumer(eqk) as second:
        assert ["kept"] == Reader(second).until(1)
    assert 0 == count_of(channel, "kept")


def test_a_rejected_message_comes_again_or_goes(
    producer: Sender, broker_url: str, channel: Any
) -> None:
    """Requeued it is delivered again; else its queue gets rid of it, by way of dead letters."""
    with GenericConsumer([(Letters, [("kept", "post")])]) as consumer:
        producer.message_echo("again")
        reader = Reader(consumer)
        reader.until(1, settle=lambda method: consumer.reject(method, requeue=True))
        reader.until(2, settle=lambda method: consumer.reject(method, requeue=False))

    assert ["again", "again"] == reader.read
    wait_until(lambda: count_of(channel, "kept.error") == 1)
    assert 0 == count_of(channel, "kept")


def test_a_message_is_consumed_once_although_its_queue_has_two_keys(
    broker_url: str, channel: Any
) -> None:
    """1.2.1 consumed a queue once for each key."""
    queue = Queue("shared", auto_delete=True)
    eqk = [(Letters, [(queue, "post"), (queue, "other")]), (Parcels, [(queue, "post")])]
    with GenericConsumer(eqk) as consumer:
        consumer.start()
        wait_until(lambda: consumer.subscriber.consuming)

        assert 1 == channel.queue_declare("shared", passive=True).method.consumer_count
        assert [(queue, "post"), (queue, "other"), (queue, "post")] == consumer.qk_list


def test_the_broker_delivers_no_more_than_prefetch_ahead(producer: Sender, broker_url: str) -> None:
    """A class attribute."""

    class Cautious(GenericConsumer):
        prefetch = 3

    with Cautious([(Letters, [(LETTERS, "post")])]) as consumer:
        with producer.batch() as batch:
            for number in range(20):
                batch.message_echo(number)
        consumer.start()
        wait_until(lambda: len(consumer.subscriber.inbox) == 3)
        delivery = consumer.take()
        assert delivery is not None
        consumer.ack(delivery)
        consumer.subscriber.flush()
        wait_until(lambda: len(consumer.subscriber.inbox) == 3)

        assert consumer.subscriber.inbox[-1].delivery_tag == 4


def test_an_exception_of_the_callback_ends_consuming(
    consumer: GenericConsumer, producer: Sender
) -> None:
    """Its message is not settled."""

    def callback(*_args: Any) -> None:
        raise ZeroDivisionError

    producer.message_echo()
    with pytest.raises(ZeroDivisionError):
        consumer.start_consuming(callback)

    assert "1 unsettled" in repr(consumer)


def test_a_consumer_goes_on_after_its_connection_was_lost(
    node: Node, producer: Sender, broker_url: str
) -> None:
    """It declares, binds and consumes anew."""
    vhost = broker_url.rsplit("/", 1)[1]
    with GenericConsumer([(Letters, [(LETTERS, "post")])]) as consumer:
        reader = Reader(consumer)
        producer.message_echo("before")
        reader.until(1)
        consumer.start()
        node.close_connections("cut by a test", vhost)
        wait_until(lambda: consumer.conn_broker.losses == 1)
        wait_until(lambda: consumer.subscriber.consuming)
        producer.message_echo("after")
        reader.until(2)

    assert ["before", "after"] == reader.read


# ------------------------------------------------------------------------- topology


def test_queues_that_are_added_while_consuming_are_consumed(
    consumer: GenericConsumer, producer: Sender
) -> None:
    """In 1.2.1 only from the next start on."""
    read: list[Any] = []

    def callback(_channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        parameters = json.loads(body)["content"]["parameters"]
        read.append(parameters)
        consumer.ack(method)
        if parameters == "post":
            consumer.add_eqk([(Parcels, [(Queue("parcels", exclusive=True), "parcel")])])
            producer.message_echo("parcel", _eks=[(Parcels, "parcel")])
        elif parameters == "parcel":
            consumer.queue_bind(Letters, Queue("late", exclusive=True), "late")
            producer.message_echo("late", _key="late")
        elif parameters == "late":
            consumer.queue_bind(Letters, LETTERS, "another key")
            producer.message_echo("last", _key="another key")
        else:
            consumer.stop_consuming()

    producer.message_echo("post")
    consumer.start_consuming(callback)

    assert ["post", "parcel", "late", "last"] == read


def test_a_name_that_was_declared_already_means_that_queue(
    consumer: GenericConsumer, producer: Sender
) -> None:
    """In 1.2.1 a bare name redeclared it with other flags, which the broker refuses."""
    consumer.queue_bind(Letters, "letters", "by name")
    producer.message_echo("T", _key="by name")

    assert ["T"] == Reader(consumer).until(1)


def test_a_binding_can_be_taken_back(consumer: GenericConsumer, producer: Sender) -> None:
    """The queue stays, and what is in it."""
    consumer.queue_bind(Letters, LETTERS, "other")
    producer.message_echo("before", _key="other")
    consumer.queue_unbind(Letters, LETTERS, "other")
    consumer.queue_unbind(Letters, LETTERS, "never bound")

    producer.message_echo("lost", _key="other", _mandatory=False)
    producer.message_echo("post")
    assert ["before", "post"] == Reader(consumer).until(2)


def test_a_binding_that_was_taken_back_stays_so_on_the_next_connection(
    node: Node, producer: Sender, broker_url: str
) -> None:
    """Bound again, it is bound."""
    vhost = broker_url.rsplit("/", 1)[1]
    with GenericConsumer([(Letters, [("kept", "post"), ("kept", "a"), ("kept", "b")])]) as consumer:
        consumer.queue_unbind(Letters, "kept", "a")
        consumer.queue_unbind(Letters, "kept", "b")
        consumer.queue_bind(Letters, "kept", "b")
        consumer.start()
        wait_until(lambda: consumer.subscriber.consuming)
        node.close_connections("cut by a test", vhost)
        wait_until(lambda: consumer.conn_broker.losses == 1)
        wait_until(lambda: consumer.subscriber.consuming)
        producer.message_echo("a", _key="a", _mandatory=False)
        producer.message_echo("b", _key="b")
        producer.message_echo("post")

        assert ["b", "post"] == Reader(consumer).until(2)


def test_one_queue_can_be_stopped(consumer: GenericConsumer, producer: Sender) -> None:
    """The others go on, and one that is not consumed changes nothing."""
    other = Queue("other", exclusive=True)
    consumer.queue_bind(Letters, other, "other")
    consumer.start()
    wait_until(lambda: consumer.subscriber.consuming)
    consumer.stop_queue("never declared")
    consumer.stop_queue(other)
    consumer.stop_queue(other)
    producer.message_echo("waits", _key="other")
    producer.message_echo("post")

    assert ["post"] == Reader(consumer).until(1)


class Audit(Queue):
    name = "audit"
    exclusive = True


@pytest.mark.parametrize(
    "queue",
    [
        "named",
        {"name": "dict", "flags": {"auto_delete": True}},
        {"name": "no-flags"},
        Audit,
        Audit(),
        Queue("made", exclusive=True),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_a_queue_can_be_given_in_several_forms(
    producer: Sender, broker_url: str, queue: Any, flat: bool
) -> None:
    """And the list of pairs as that of the README of 1.2.1, which is flat."""
    pairs = [(queue, "post")]
    eqk: Any = (Letters, pairs, Parcels, pairs) if flat else [(Letters, pairs), (Parcels, pairs)]
    with GenericConsumer(eqk) as consumer:
        producer.message_echo("letter")
        producer.message_echo("parcel", _eks=[(Parcels, "post")])

        assert ["letter", "parcel"] == Reader(consumer).until(2)


def test_the_class_says_what_is_consumed_if_nobody_else_does(
    producer: Sender, broker_url: str
) -> None:
    """The argument of the constructor wins."""

    class Letterbox(GenericConsumer):
        eqk = [(Letters, [(LETTERS, "post")])]

    with Letterbox() as consumer:
        producer.message_echo("T")
        assert ["T"] == Reader(consumer).until(1)
        assert Letterbox.eqk == consumer.eqk
    with Letterbox([(Letters, [(LETTERS, "other")])]) as consumer:
        assert [(LETTERS, "other")] == consumer.qk_list
    with GenericConsumer() as consumer:
        assert ([], []) == (consumer.eqk, consumer.qk_list)


def test_flags_can_be_given_when_a_queue_is_bound(
    broker_url: str, producer: Sender, channel: Any
) -> None:
    """As in 1.2.1, they are used as they are."""
    with GenericConsumer() as consumer:
        consumer.queue_bind(Letters, "flagged", "post", durable=False, auto_delete=True)
        channel.queue_declare("flagged", durable=False, auto_delete=True)
        producer.message_echo("T")
        assert ["T"] == Reader(consumer).until(1)
        with pytest.raises(ConfigurationError, match="unknown flag"):
            consumer.queue_bind(Letters, "mistyped", "post", durabel=True)


@pytest.mark.parametrize(
    "eqk",
    [
        [Letters],
        [(Letters, "letters")],
        [("letters", [("q", "k")])],
        [(Letters, [("q", 5)])],
        [(Letters, [(5, "k")])],
        [(Letters, [("q", "k", "x")])],
        [(Letters, [({"name": "q", "flag": {}}, "k")])],
    ],
)
def test_a_list_that_makes_no_sense_is_refused(broker_url: str, eqk: Any) -> None:
    """Nothing is left over."""
    with pytest.raises(ConfigurationError):
        GenericConsumer(eqk)
    gc.collect()


def test_a_queue_with_other_arguments_is_an_error_that_says_so(
    broker_url: str, channel: Any
) -> None:
    """It names the queue, what differs, all that was asked for, and the ways out."""
    channel.queue_declare("letters", durable=True)

    with pytest.raises(QueueMismatchError) as caught:
        GenericConsumer([(Letters, [("letters", "post")])])

    complaint = str(caught.value)
    assert "declare queue 'letters'" in complaint
    assert "PRECONDITION_FAILED - inequivalent arg" in complaint
    assert "x-delivery-limit=50" in complaint
    assert "POSTAGE_ON_MISMATCH=adopt" in complaint
    gc.collect()


def test_a_queue_with_other_arguments_can_be_adopted(
    broker_url: str, channel: Any, producer: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exchange, too. Both are used as they are."""

    class Topic(Exchange):
        name = "letters"
        exchange_type = "topic"

    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adopt")
    channel.queue_declare("letters", durable=True)
    with GenericConsumer([(Letters, [("letters", "post")])]) as consumer:
        producer.message_echo("T", _eks=[(Topic, "post")])

        assert ["T"] == Reader(consumer).until(1)


def test_an_exchange_of_another_type_is_an_error_that_says_so(
    broker_url: str, channel: Any
) -> None:
    """It names the exchange."""

    class Mistaken(Exchange):
        name = "mistaken"

    channel.exchange_declare("mistaken", "topic", durable=True)

    with pytest.raises(ExchangeMismatchError, match="declare exchange 'mistaken'"):
        GenericConsumer([(Mistaken, [(LETTERS, "post")])])


def test_a_passive_queue_that_does_not_exist_is_an_error(broker_url: str) -> None:
    """It is only looked for."""
    with pytest.raises(ChannelClosedError, match=r"404 .*start who declares it first"):
        GenericConsumer([(Letters, [(Queue("missing", passive=True), "post")])])


def test_a_queue_named_after_the_process_is_warned_of(
    broker_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a name: every start would leave one behind. An exclusive one is fine."""
    monkeypatch.setattr("postage.consumer._warned", set())  # by the same test on another broker
    name = f"private-{os.getpid()}"
    with GenericConsumer([(Letters, [(f"x{os.getpid()}0", "post"), (name, "post")])]) as consumer:
        consumer.queue_bind(Letters, name, "other")
    with GenericConsumer([(Letters, [(Queue(f"{name}-own", exclusive=True), "post")])]):
        pass

    (warning,) = [each for each in caplog.messages if "named after the process id" in each]
    assert f"queue '{name}' is named after the process id and durable" in warning
    assert f"use Queue('{name}', exclusive=True)" in warning


# -------------------------------------------------------------------------- decoding


def test_a_body_that_cannot_be_read_is_a_decode_error(broker_url: str) -> None:
    """Whatever the encoder raises: one of 1.2.1 knows no DecodeError."""

    class Old(JsonEncoder):
        @classmethod
        def decode(cls, string: Any) -> Any:
            return json.loads(string)

    class OldConsumer(GenericConsumer):
        encoder_class = Old

    for consumer_class in (GenericConsumer, OldConsumer):
        with consumer_class() as consumer:
            assert {"a": 1} == consumer.decode(b'{"a": 1}')
            for body in (b"not JSON", b"\xff\xfe\xfd"):
                with pytest.raises(DecodeError) as caught:
                    consumer.decode(body)
                assert body == caught.value.data


# --------------------------------------------------------------------------- replying


@pytest.mark.parametrize(
    ("message", "content"),
    [
        (MessageResult(1, "m"), {"type": "success", "value": 1, "message": "m"}),
        (MessageResultError("e"), {"type": "error", "value": None, "message": "e"}),
        (5, {"type": "success", "value": 5, "message": ""}),
        (None, {"type": "success", "value": None, "message": ""}),
        (Message(1), {"args": [1]}),
    ],
)
def test_a_request_is_answered_where_it_says(
    broker_url: str, channel: Any, message: Any, content: Any
) -> None:
    """By a message of any class, or a value, which is a success."""
    queue = channel.queue_declare("", exclusive=True).method.queue
    header = pika.BasicProperties(reply_to=queue, correlation_id="17")

    with GenericConsumer() as consumer:
        consumer.rpc_reply(header, message)

    _method, properties, body = channel.basic_get(queue, auto_ack=True)
    assert content == json.loads(body)["content"]
    assert {} == json.loads(body)["fingerprint"]
    assert ("17", 1, "application/json") == (
        properties.correlation_id,
        properties.delivery_mode,
        properties.content_type,
    )


def test_an_answer_that_nobody_waits_for_is_no_error(broker_url: str) -> None:
    """The caller has gone."""
    with GenericConsumer() as consumer:
        consumer.rpc_reply(pika.BasicProperties(reply_to="gone"), 1)


def test_an_answer_needs_an_address_and_a_value_that_can_be_written(
    broker_url: str, channel: Any
) -> None:
    """A queue that happens to be called None is not an address."""
    channel.queue_declare("None", exclusive=True)
    with GenericConsumer() as consumer:
        with pytest.raises(ConfigurationError, match="there is no reply_to"):
            consumer.rpc_reply(pika.BasicProperties(), 1)
        with pytest.raises(EncodingError):
            consumer.rpc_reply(pika.BasicProperties(reply_to="q"), {1, 2})

    assert 0 == count_of(channel, "None")


# ------------------------------------------------------------- beginning and end


def test_without_a_broker_a_consumer_gives_up_after_its_timeout(
    closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It says whom it asked and what was wrong, and has warned once."""

    class Impatient(GenericConsumer):
        connect_timeout = 1.2

    before = time.monotonic()
    with pytest.raises(ConnectionFailedError) as caught:
        Impatient([(Letters, [("q", "k")])], {"host": f"127.0.0.1:{closed_port}"})
    duration = time.monotonic() - before
    gc.collect()

    assert f"127.0.0.1:{closed_port}" in str(caught.value)
    assert "start RabbitMQ" in str(caught.value)
    warnings = [each for each in caplog.messages if "trying again until it works" in each]
    assert 1 == len(warnings)
    assert 1.2 <= duration < 15.0


def test_a_consumer_waits_for_a_broker_that_is_starting(
    node: Node, broker_url: str
) -> None:
    """Its constructor returns when the queue is there."""
    node.stop()
    starter = threading.Thread(target=node.start)
    starter.start()
    try:
        with GenericConsumer([(Letters, [(LETTERS, "post")])]) as consumer, Sender() as producer:
            producer.message_echo("T")
            assert ["T"] == Reader(consumer).until(1)
    finally:
        starter.join()


def test_a_wrong_password_is_an_error_at_once(
    broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not show the password."""
    caplog.set_level(logging.DEBUG)
    before = time.monotonic()
    with pytest.raises(ConnectionFailedError, match="check user and password") as caught:
        GenericConsumer(
            [(Letters, [(LETTERS, "post")])], {**GenericConsumer.hup, "password": "hunter2"}
        )
    duration = time.monotonic() - before

    assert "hunter2" not in caplog.text + str(caught.value)
    assert duration < 15.0, "connect_timeout is 60 s"


def test_a_closed_consumer_refuses_everything(broker_url: str) -> None:
    """Closing twice is fine."""
    consumer = GenericConsumer([(Letters, [(LETTERS, "post")])])
    consumer.start()
    wait_until(lambda: consumer.subscriber.consuming)
    assert consumer.close()
    assert consumer.close()

    for use in (
        consumer.start,
        lambda: consumer.start_consuming(print),
        lambda: consumer.add_eqk([(Letters, [(LETTERS, "post")])]),
        lambda: consumer.queue_unbind(Letters, LETTERS, "post"),
        lambda: consumer.rpc_reply(pika.BasicProperties(reply_to="q"), 1),
    ):
        with pytest.raises(ClosedError):
            use()


def test_a_consumer_can_be_closed_after_all_connections_were(
    consumer: GenericConsumer, producer: Sender
) -> None:
    """As after a restart that failed: the error of that must not be hidden by another one."""
    producer.message_echo()
    Reader(consumer).until(1)
    assert connections.close_all()

    assert not consumer.close()


def test_closing_settles_what_was_decided(producer: Sender, broker_url: str, channel: Any) -> None:
    """The rest is delivered to others."""
    with producer.batch() as batch, GenericConsumer([(Letters, [("kept", "post")])]) as consumer:
        for number in range(10):
            batch.message_echo(number)
        Reader(consumer).until(7)

    wait_until(lambda: count_of(channel, "kept") == 3)
    assert [7, 8, 9] == [
        json.loads(channel.basic_get("kept", auto_ack=True)[2])["content"]["parameters"]
        for _ in range(3)
    ]


def test_a_consumer_that_is_dropped_open_warns_and_keeps_nothing(
    producer: Sender, broker_url: str, channel: Any
) -> None:
    """Its messages go to others, although its connection may be shared."""
    eqk = [(Letters, [("kept", "post")])]
    consumer = GenericConsumer(eqk)
    consumer.start()
    producer.message_echo("T")
    inbox = consumer.subscriber.inbox
    wait_until(lambda: inbox)

    with pytest.warns(ResourceWarning, match=r"GenericConsumer .* was dropped without close"):
        del consumer
        gc.collect()
    with GenericConsumer(eqk) as other:
        assert ["T"] == Reader(other).until(1)
    assert connections.close_all()
