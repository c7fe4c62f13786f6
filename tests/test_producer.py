# SPDX-License-Identifier: MIT
"""What a producer sends, where, and what its callers hear about it."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pika
import pytest

from postage.errors import (
    BatchError,
    ChannelClosedError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    EncodingError,
    ExchangeMismatchError,
    NackedError,
    PostageError,
    PublishTimeoutError,
    UnroutableError,
)
from postage.messaging import (
    DefaultExchange,
    Encoder,
    Exchange,
    Fingerprint,
    GenericProducer,
    JsonEncoder,
    Message,
    MessageCommand,
    MessageStatus,
    RpcCommand,
)
from postage.transport import connection as connections
from tests.waiting import wait_until

FINGERPRINT = {
    "name": "tester",
    "type": "application",
    "pid": "4242",
    "host": "box",
    "user": "root",
    "vhost": "/",
}


class Letters(Exchange):
    name = "letters"


class Parcels(Exchange):
    name = "parcels"


class Sender(GenericProducer):
    eks = [(Letters, "post")]

    def build_message_status_online(self) -> Message:
        return MessageStatus("online")

    def build_message_invoice(self, number: int, *, paid: bool = False) -> Message:
        return MessageCommand("invoice", {"number": number, "paid": paid})


class Mailbox:
    """An exclusive queue, which pika reads."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        for exchange in (Letters, Parcels):
            channel.exchange_declare(exchange.name, durable=True)
        self.name: str = channel.queue_declare("", exclusive=True).method.queue
        self.bind("post")

    def bind(self, key: str, exchange: type[Exchange] = Letters) -> None:
        self.channel.queue_bind(self.name, exchange.name, key)

    def get(self) -> tuple[Any, Any, Any]:
        """Return method, properties and body of the next message, three times None without one."""
        method, properties, body = self.channel.basic_get(self.name, auto_ack=True)
        return method, properties, body and json.loads(body)

    def bodies(self) -> list[Any]:
        bodies = []
        while (body := self.get()[2]) is not None:
            bodies.append(body)
        return bodies

    def names(self) -> list[str]:
        """Return the names of the messages that are there."""
        return [body["name"] for body in self.bodies()]

    def parameters(self) -> list[Any]:
        return [body["content"]["parameters"] for body in self.bodies()]


@pytest.fixture
def mailbox(broker_url: str) -> Iterator[Mailbox]:
    with closing(pika.BlockingConnection(pika.URLParameters(broker_url))) as connection:
        yield Mailbox(connection.channel())


@pytest.fixture
def producer(broker_url: str) -> Iterator[Sender]:
    with Sender(FINGERPRINT) as producer:
        yield producer


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections, and where nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    """A port that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def complaint_of(call: Callable[[], Any], error_class: type[Exception]) -> str:
    with pytest.raises(error_class) as caught:
        call()
    return str(caught.value)


# ------------------------------------------------------------------- magic names


@pytest.mark.parametrize("name", ["message_a_message_b", "message_message_", "message_rpc_x"])
def test_the_prefix_of_a_magic_name_is_taken_off_once(
    mailbox: Mailbox, producer: Sender, name: str
) -> None:
    """1.2.1 sent message_a_message_b as the command a_b."""
    getattr(producer, name)()

    assert [name.removeprefix("message_")] == mailbox.names()


def test_an_unknown_attribute_of_a_producer_is_an_error_that_names_it() -> None:
    """It was None in 1.2.1."""
    complaint = complaint_of(lambda: Sender().nonsense, AttributeError)

    assert "'Sender' object has no attribute 'nonsense'" in complaint


def test_hasattr_of_a_producer_tells_the_truth() -> None:
    """It was always true in 1.2.1."""
    producer = Sender()

    assert not hasattr(producer, "log")
    assert not hasattr(producer, "build_message_nothing")
    assert hasattr(producer, "message_anything")


@pytest.mark.parametrize(
    ("args", "kwds", "parameters"),
    [
        ((), {}, {}),
        (("T",), {}, "T"),
        ((None,), {}, None),
        (([],), {}, []),
        (("a", "b"), {}, ["a", "b"]),
        ((), {"k": 1}, {"k": 1}),
        ((), {"parameters": {"a": 5}}, {"a": 5}),
        ((), {"parameters": 1, "k": 2}, {"parameters": 1, "k": 2}),
        (("a",), {"k": 1}, {"args": ["a"], "kwds": {"k": 1}}),
        ((), {"self": 1, "build": 2, "args": 3}, {"self": 1, "build": 2, "args": 3}),
    ],
)
def test_a_magic_message_takes_as_many_arguments_as_you_want(
    mailbox: Mailbox, producer: Sender, args: Any, kwds: Any, parameters: Any
) -> None:
    """More than one was a TypeError in 1.2.1. No name of a keyword is taken."""
    producer.message_echo(*args, **kwds)
    with producer.batch() as batch:
        batch.message_echo(*args, **kwds)

    assert [parameters, parameters] == mailbox.parameters()


def test_the_body_has_the_seven_keys_of_the_wire_format(mailbox: Mailbox, producer: Sender) -> None:
    """What travels is what 1.2.1 sent."""
    producer.message_echo("T")

    expected = {
        "type": "command",
        "name": "echo",
        "category": "message",
        "version": "2",
        "fingerprint": FINGERPRINT,
        "content": {"parameters": "T"},
        "_reserved": {},
    }
    assert [expected] == mailbox.bodies()


def test_a_builder_makes_the_message(mailbox: Mailbox, producer: Sender) -> None:
    """A build_message_x method gets the arguments, without those that steer the sending."""
    mailbox.bind("other")

    producer.message_status_online()
    producer.message_invoice(17, paid=True, _key="other", _headers={"a": 1}, _timeout=5)

    status, invoice = mailbox.bodies()
    assert ("status", "online", {}) == (status["type"], status["name"], status["content"])
    assert {"parameters": {"number": 17, "paid": True}} == invoice["content"]


def test_a_builder_may_be_set_on_the_instance(mailbox: Mailbox, producer: Sender) -> None:
    """1.2.1 looked builders up on the instance, so a function there is used as it is."""
    producer.build_message_greeting = partial(MessageCommand, "hello")  # type: ignore[attr-defined]

    producer.message_greeting({"to": "you"})

    assert ["hello"] == mailbox.names()


def test_a_callable_given_with_the_call_builds_the_message(
    mailbox: Mailbox, producer: Sender
) -> None:
    """1.2.1 let the caller override the builder."""
    producer.message_invoice("online", _callable=MessageStatus)

    assert ["online"] == mailbox.names()


def test_message_sends_a_message_without_a_type(mailbox: Mailbox, producer: Sender) -> None:
    """The arguments become args and kwds of the content, if there are any."""
    producer.message(1, "a", k=2)
    producer.message(self=3)
    producer.message()

    contents = [{"args": [1, "a"], "kwds": {"k": 2}}, {"kwds": {"self": 3}}, {}]
    bodies = mailbox.bodies()
    assert contents == [body["content"] for body in bodies]
    assert {("none", "none", "message")} == {
        (body["type"], body["name"], body["category"]) for body in bodies
    }


def test_forward_sends_a_body_as_it_is(mailbox: Mailbox, producer: Sender) -> None:
    """No fingerprint is added, and further arguments are ignored, as in 1.2.1."""
    mailbox.bind("other")
    body = {"fingerprint": {"name": "origin"}, "anything": [1, None]}

    producer.forward(body)
    producer.forward(body, "ignored", ignored=True, _key="other", _message_id="17")

    assert body == mailbox.get()[2]
    method, properties, forwarded = mailbox.get()
    assert ("other", "17", body) == (method.routing_key, properties.message_id, forwarded)


def test_a_text_file_can_be_sent(mailbox: Mailbox, producer: Sender, tmp_path: Path) -> None:
    """It becomes its name and its lines, which keep their ends."""
    file = tmp_path / "notes.txt"
    file.write_text("Grüße\nlast line", encoding="utf-8")

    producer.message_file(GenericProducer.serialize_text_file(str(file)))

    assert [{"name": "notes.txt", "content": ["Grüße\n", "last line"]}] == mailbox.parameters()


# --------------------------------------------------------------------- keywords


def test_a_key_replaces_the_pairs_of_the_producer(mailbox: Mailbox, broker_url: str) -> None:
    """It goes to the first exchange, and to that alone."""

    class Both(GenericProducer):
        eks = [(Letters, "post"), (Parcels, "post")]

    mailbox.bind("other")
    mailbox.bind("post", Parcels)
    with Both() as producer:
        producer.message_all()
        producer.message_one(_key="other")

    assert ["all", "all", "one"] == mailbox.names()


def test_pairs_given_with_the_call_beat_a_key(mailbox: Mailbox, producer: Sender) -> None:
    """In 1.2.1 the key won, and the pairs leaked to the builder. Neither is in the content."""
    mailbox.bind("parcel", Parcels)
    pairs = [(Parcels, "parcel")]

    producer.message_echo(_key="post", _eks=pairs)
    producer.message(_key="post", _eks=pairs)
    producer.forward({"forwarded": True}, _key="post", _eks=pairs)

    deliveries = [mailbox.get() for _ in range(3)]
    assert [("parcels", "parcel")] * 3 == [
        (method.exchange, method.routing_key) for method, *_rest in deliveries
    ]
    assert {"parameters": {}} == deliveries[0][2]["content"]
    assert {} == deliveries[1][2]["content"]
    assert (None, None, None) == mailbox.get()


def test_the_exchange_of_a_pair_is_declared_before_its_first_use(producer: Sender) -> None:
    """In 1.2.1 a publish to one that did not exist closed the channel."""

    class Unheard(Exchange):
        name = "unheard-of"

    complaint = complaint_of(lambda: producer.message_x(_eks=[(Unheard, "k")]), UnroutableError)

    assert "exchange 'unheard-of' key 'k'" in complaint


def test_a_message_can_go_to_one_queue(mailbox: Mailbox, producer: Sender) -> None:
    """The default exchange leads to it by its name."""
    producer.message_direct(_queue=mailbox.name)

    method, _properties, body = mailbox.get()
    assert ("", mailbox.name, "direct") == (method.exchange, method.routing_key, body["name"])


@pytest.mark.parametrize(
    ("ttl", "expiration"), [(2, "2000"), (61.5, "61500"), (timedelta(minutes=1), "60000")]
)
def test_a_message_may_expire(producer: Sender, ttl: Any, expiration: str) -> None:
    """Its time to live becomes the property `expiration`, in milliseconds."""
    composed = producer._compose_forward({}, {"_ttl": ttl})
    assert expiration == composed.properties.expiration


def test_a_message_that_nobody_fetched_in_time_is_gone(mailbox: Mailbox, producer: Sender) -> None:
    """The broker drops it, or dead-letters it where the queue says so."""
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": mailbox.name}
    mailbox.channel.queue_declare("short-lived", exclusive=True, arguments=arguments)
    producer.message_echo("late", _queue="short-lived", _ttl=0.05)
    assert "late" == wait_until(mailbox.parameters)[0]
    assert 0 == mailbox.channel.queue_declare("short-lived", passive=True).method.message_count


def test_a_message_may_have_a_priority_and_a_correlation_id(
    mailbox: Mailbox, producer: Sender
) -> None:
    """However it is sent."""
    keywords: dict[str, Any] = {"_priority": 7, "_correlation_id": "ü" * 127}
    producer.message_echo(**keywords)
    producer.message(**keywords)
    producer.forward({}, **keywords)
    producer.message_echo(_priority=None, _correlation_id=None, _ttl=None)
    with producer.batch() as batch:
        batch.message_echo(**keywords)
    found = [mailbox.get()[1] for _ in range(5)]
    expected = (7, "ü" * 127)
    assert [expected] * 3 + [(None, None), expected] == [
        (each.priority, each.correlation_id) for each in found
    ]


def test_a_queue_with_priorities_delivers_the_highest_first(
    mailbox: Mailbox, producer: Sender
) -> None:
    """Those of other queues ignore them."""
    arguments = {"x-max-priority": 9}
    mailbox.name = mailbox.channel.queue_declare(
        "", exclusive=True, arguments=arguments
    ).method.queue
    for priority in (1, 9, 5):
        producer.message_echo(priority, _queue=mailbox.name, _priority=priority)
    assert [9, 5, 1] == mailbox.parameters()


def test_a_request_may_have_a_priority(mailbox: Mailbox, producer: Sender) -> None:
    """Its correlation id stays its own."""
    producer.rpc_queue_echo(_priority=7)
    properties = mailbox.get()[1]
    assert 7 == properties.priority
    assert properties.correlation_id


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"_ttl": 0}, "_ttl is 0: give at least 0.001 seconds"),
        ({"_ttl": 0.0004}, "_ttl is 0.0004: give at least 0.001 seconds"),
        ({"_ttl": 11 * 365 * 86400}, "at most ten years"),
        ({"_ttl": -1}, "_ttl is -1: give a number of seconds, 0 or more, or a timedelta"),
        ({"_ttl": float("nan")}, "_ttl is nan"),
        ({"_ttl": True}, "_ttl is True"),
        ({"_ttl": "60"}, "_ttl is '60'"),
        ({"_ttl": 1, "_delay": 1}, "give _ttl, or _delay or _at, but not both"),
        ({"_ttl": 1, "_at": datetime.now(timezone.utc)}, "give _ttl, or _delay or _at"),
        ({"_delay": 1, "_at": datetime.now(timezone.utc)}, "give _delay or _at, but not both"),
        ({"_delay": -0.1}, "_delay is -0.1: give a number of seconds"),
        ({"_delay": "soon"}, "_delay is 'soon'"),
        ({"_at": datetime(2999, 1, 1)}, "has no time zone"),
        ({"_priority": -1}, "_priority is -1: give an int from 0 to 255"),
        ({"_priority": 256}, "_priority is 256"),
        ({"_priority": True}, "_priority is True"),
        ({"_priority": 1.0}, "_priority is 1.0"),
        ({"_correlation_id": 7}, "_correlation_id is 7: give a string"),
        ({"_correlation_id": "ü" * 128}, "at most 255 bytes of UTF-8"),
        ({"_correlation_id": "\ud800"}, "at most 255 bytes of UTF-8"),
    ],
)
def test_a_keyword_that_makes_no_sense_is_refused(keywords: dict[str, Any], complaint: str) -> None:
    """Before there is a connection, and with what to do about it."""
    with Sender() as producer:
        for send in (producer.message_echo, producer.message, partial(producer.forward, {})):
            assert complaint in complaint_of(partial(send, **keywords), ConfigurationError)


@pytest.mark.parametrize("other", [{"_key": "k"}, {"_eks": [(Letters, "k")]}])
def test_a_queue_and_other_ways_to_address_contradict_each_other(other: dict[str, Any]) -> None:
    """One of them would be ignored."""
    with pytest.raises(TypeError, match="give _queue, or _key or _eks, but not both"):
        Sender().message_x(_queue="q", **other)


@pytest.mark.parametrize("keyword", ["_key", "_queue"])
@pytest.mark.parametrize("value", [None, 5, b"bytes"])
def test_a_key_that_is_no_string_is_refused(keyword: str, value: Any) -> None:
    """It is named, before a connection is made."""
    with pytest.raises(TypeError, match="is no string"):
        Sender().message_x(**{keyword: value})


@pytest.mark.parametrize(
    "pairs", [[], [Letters], [(Letters, 5)], [(Letters, "a", "b")], [("letters", "a")]]
)
def test_pairs_that_make_no_sense_are_refused(pairs: Any) -> None:
    """With the call, and in the class."""

    class Confused(GenericProducer):
        eks = pairs

    with pytest.raises(ConfigurationError, match=r"eks|no exchange"):
        Sender().message_x(_eks=pairs)
    with pytest.raises(ConfigurationError, match=r"eks|no exchange"):
        Confused()


def test_pairs_may_be_chosen_after_the_constructor(mailbox: Mailbox, broker_url: str) -> None:
    """1.2.1 looked at `eks` with each message, so a subclass could set it when it likes."""

    class Late(GenericProducer):
        def __init__(self, key: str) -> None:
            super().__init__()
            self.eks = [(Parcels, key)]

    mailbox.bind("parcel", Parcels)
    with Late("parcel") as producer:
        producer.message_late()

    assert ["late"] == mailbox.names()
    assert Parcels is producer.default_exchange


def misspelt(producer: Any) -> dict[str, Callable[[], Any]]:
    """Return calls with an underscore keyword that nothing knows."""
    return {
        "message_x": lambda: producer.message_x(_kye="k"),
        "message_invoice": lambda: producer.message_invoice(1, _kye="k"),
        "message": lambda: producer.message(_kye="k"),
        "forward": lambda: producer.forward({}, _kye="k"),
        "rpc_x": lambda: producer.rpc_x(_kye="k"),
    }


@pytest.mark.parametrize("name", misspelt(None))
def test_a_misspelt_keyword_is_refused(name: str) -> None:
    """In 1.2.1 it became part of the message, or was ignored."""
    with pytest.raises(TypeError, match="_kye"):
        misspelt(Sender())[name]()


@pytest.mark.parametrize("name", ["message_x", "message", "forward"])
def test_the_keywords_that_a_message_takes_are_named(name: str) -> None:
    """Those of RPC calls are not among them."""
    complaint = complaint_of(misspelt(Sender())[name], TypeError)

    assert f"{name}() got unexpected keyword(s) _kye; those that steer it are " in complaint
    assert "_at, _confirm, _correlation_id, _delay, _eks, _future, _headers, _key" in complaint
    assert "_max_retry" not in complaint


def test_the_keywords_that_a_call_takes_are_named() -> None:
    """Those of messages alone are not among them."""
    complaint = complaint_of(misspelt(Sender())["rpc_x"], TypeError)

    assert "rpc_x() got unexpected keyword(s) _kye; those that steer it are " in complaint
    assert "_max_retry" in complaint
    assert "_confirm" not in complaint


def test_a_message_takes_a_timeout(mailbox: Mailbox, producer: Sender) -> None:
    """It was a TypeError in 1.2.1."""
    producer.message_echo(_timeout=10)
    producer.message_echo(_timeout=None)

    assert ["echo", "echo"] == mailbox.names()


@pytest.mark.parametrize("timeout", [None, "10", -1, float("inf")])
def test_a_class_whose_timeouts_make_no_sense_is_refused(timeout: Any) -> None:
    """When it sends, with the name of the attribute."""

    class Confused(Sender):
        publish_timeout = timeout
        rpc_timeout = timeout

    with pytest.raises(ConfigurationError, match=r"publish_timeout is .*: give a number"):
        Confused().message_x()
    with pytest.raises(ConfigurationError, match=r"rpc_timeout is .*: give a number"):
        Confused().rpc_x()


@pytest.mark.parametrize("timeout", ["10", -1, float("nan"), True])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(timeout: Any) -> None:
    """It is named."""
    with pytest.raises(ConfigurationError, match=r"_timeout is .*: give a number of seconds"):
        Sender().message_x(_timeout=timeout)


# ------------------------------------------------------------ properties and headers


def test_properties_say_what_the_message_is(mailbox: Mailbox, producer: Sender) -> None:
    """It is persistent, and has a type, an id, a time and a sender."""
    before = int(time.time())
    producer.message_echo()
    producer.message_echo()

    (_, first, _), (_, second, _) = mailbox.get(), mailbox.get()
    assert ("application/json", 2, "tester") == (
        first.content_type,
        first.delivery_mode,
        first.app_id,
    )
    assert first.message_id and first.message_id != second.message_id
    assert before <= first.timestamp <= time.time()
    unset = (first.headers, first.expiration, first.reply_to, first.correlation_id)
    assert (None, None, None, None) == unset


def test_a_producer_without_a_name_sends_no_app_id(mailbox: Mailbox, broker_url: str) -> None:
    """There is nothing to say."""
    with Sender() as producer:
        producer.message_echo()

    assert mailbox.get()[1].app_id is None


def test_the_encoder_says_what_the_content_type_is(mailbox: Mailbox, broker_url: str) -> None:
    """One that says nothing sends none."""

    class Plain(JsonEncoder):
        content_type = ""

    class Shouting(JsonEncoder):
        content_type = "application/x-shout"

        @classmethod
        def encode(cls, data: Any) -> bytes:
            return json.dumps(data).upper().encode()

    class PlainSender(Sender):
        encoder_class = Plain

    class ShoutingSender(Sender):
        encoder_class = Shouting

    with PlainSender() as plain, ShoutingSender() as shouting:
        plain.message_echo()
        shouting.forward({"a": "b"})

    assert mailbox.get()[1].content_type is None
    _method, properties, body = mailbox.get()
    assert ("application/x-shout", {"A": "B"}) == (properties.content_type, body)


def test_a_transient_message_says_so(mailbox: Mailbox, broker_url: str) -> None:
    """The keyword wins over the attribute."""

    class Transient(Sender):
        persistent = False

    with Transient() as producer:
        producer.message_echo()
        producer.message_echo(_persistent=True)

    assert [1, 2] == [mailbox.get()[1].delivery_mode for _ in range(2)]


def test_headers_and_id_are_those_that_the_caller_gives(mailbox: Mailbox, producer: Sender) -> None:
    """The dict of the caller is not changed."""
    headers = {"tenant": "blue", "priority": -3, "urgent": True, "price": Decimal("1.5")}
    given = dict(headers)

    producer.message_echo(_headers=given, _message_id="order-17")

    properties = mailbox.get()[1]
    assert (headers, "order-17") == (properties.headers, properties.message_id)
    assert headers == given


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"_headers": {"ratio": 0.5}}, "header 'ratio' is the float 0.5"),
        ({"_headers": {"deep": [{"er": 0.5}]}}, r"header 'deep\.er' is the float 0.5"),
        ({"_headers": {"big": 2**63}}, "does not fit into 64 bits"),
        ({"_headers": {"thing": object()}}, "cannot be encoded"),
        ({"_headers": {1: "one"}}, "cannot be encoded"),
        ({"_headers": {"text": "x" * 200_000}}, "a frame holds 131072"),
        ({"_headers": {"k" * 300: 1}}, "cannot be encoded"),
        ({"_message_id": 17}, "cannot be encoded"),
        ({"_message_id": "x" * 256}, "cannot be encoded"),
        ({"_key": "ü" * 128}, "is longer than 255 bytes"),
    ],
)
def test_what_amqp_cannot_carry_is_refused_and_nothing_is_sent(
    mailbox: Mailbox, producer: Sender, keywords: dict[str, Any], complaint: str
) -> None:
    """On the wire it would cost the channel, or the connection."""
    with pytest.raises(EncodingError, match=complaint):
        producer.message_lost(**keywords)
    producer.message_good()

    assert ["good"] == mailbox.names()


@pytest.mark.parametrize("name", ["\ud800", "x" * 256, "x" * 40 + "\ud800"])
def test_a_component_whose_name_amqp_cannot_carry_is_told_so(
    mailbox: Mailbox, broker_url: str, name: str
) -> None:
    """It travels in the properties, too."""
    with Sender({"name": name}) as producer:
        with pytest.raises(EncodingError, match="cannot be encoded"):
            producer.message_lost()
        with pytest.raises((BatchError, EncodingError)), producer.batch() as batch:
            batch.message_lost()
    with Sender({"name": "good"}) as producer:
        producer.message_good()

    assert ["good"] == mailbox.names()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes", object()])
def test_what_json_cannot_carry_is_refused_and_nothing_is_sent(
    mailbox: Mailbox, producer: Sender, value: Any
) -> None:
    """1.2.1 wrote NaN, which is no JSON. The producer is as good as before."""
    for send in (producer.message_lost, producer.message, producer.rpc_lost):
        with pytest.raises(EncodingError, match="x"):
            send(x=value)
    with pytest.raises(EncodingError):
        producer.forward({"x": value})
    producer.message_good()

    assert ["good"] == mailbox.names()


# -------------------------------------------------------------------- fingerprint


def test_entries_of_a_fingerprint_replace_those_of_the_automatic_one(
    mailbox: Mailbox, broker_url: str
) -> None:
    """Further ones travel along."""
    with Sender({"name": "me", "shoe_size": 46}) as producer:
        producer.message_echo()

    expected = {**Fingerprint().as_dict(), "name": "me", "shoe_size": 46}
    assert expected == mailbox.get()[2]["fingerprint"]
    assert (str(os.getpid()), None) == (expected["pid"], expected["type"])


def test_producers_do_not_share_a_fingerprint() -> None:
    """The default argument of 1.2.1 was one dict for all."""
    given = {"name": "a"}
    first, second = Sender(given), Sender()
    first.fingerprint["name"] = "b"

    assert ({"name": "a"}, None) == (given, second.fingerprint["name"])


# --------------------------------------------------------------------- what comes back


def test_a_message_that_no_queue_is_bound_to_is_an_error_at_once(producer: Sender) -> None:
    """It vanished in 1.2.1."""
    before = time.monotonic()
    with pytest.raises(UnroutableError) as caught:
        producer.message_echo(_key="nobody")
    duration = time.monotonic() - before

    assert [("letters", "nobody")] == caught.value.failed
    assert [] == caught.value.delivered
    assert "no queue is bound to exchange 'letters' key 'nobody'" in str(caught.value)
    assert duration < 1.0


def test_one_error_lists_what_was_delivered_and_what_was_not(
    mailbox: Mailbox, producer: Sender
) -> None:
    """A message with several pairs may arrive at some of them."""
    pairs = [(Letters, "post"), (Letters, "nobody"), (Parcels, "nobody"), (Letters, "post")]

    with pytest.raises(UnroutableError) as caught:
        producer.message_echo(_eks=pairs)

    assert [("letters", "nobody"), ("parcels", "nobody")] == caught.value.failed
    assert [("letters", "post"), ("letters", "post")] == caught.value.delivered
    assert ["echo", "echo"] == mailbox.names()


def test_a_message_that_nobody_has_to_hear_is_no_error(mailbox: Mailbox, broker_url: str) -> None:
    """The class attribute `mandatory` says so, or the keyword, which wins."""

    class Chatty(Sender):
        mandatory = False

    with Chatty() as chatty, Sender() as strict:
        chatty.message_echo(_key="nobody")
        strict.message_echo(_key="nobody", _mandatory=False)
        with pytest.raises(UnroutableError):
            chatty.message_echo(_key="nobody", _mandatory=True)


def test_an_unconfirmed_message_is_sent(mailbox: Mailbox, broker_url: str) -> None:
    """The class attribute `confirm` says so, or the keyword."""

    class Hasty(Sender):
        confirm = False

    with Hasty() as hasty, Sender() as patient:
        hasty.message_first()
        patient.message_second(_confirm=False)

        names: list[str] = []
        wait_until(lambda: names.extend(mailbox.names()) or len(names) == 2)
    assert ["first", "second"] == names


def test_an_unconfirmed_message_that_comes_back_is_logged(
    producer: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sender has gone on, so there is nobody to raise an error to."""
    producer.message_echo(_key="nobody", _confirm=False)

    wait_until(lambda: "no queue is bound to exchange 'letters'" in caplog.text)


def test_a_full_queue_refuses_a_message(mailbox: Mailbox, producer: Sender) -> None:
    """Its nack is an error."""
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
    full = mailbox.channel.queue_declare("", exclusive=True, arguments=limits).method.queue

    producer.message_echo(_queue=full)
    complaint = complaint_of(lambda: producer.message_echo(_queue=full), NackedError)

    assert f"key {full!r}: the broker refused it" in complaint


def test_an_exchange_of_another_type_is_an_error_that_names_it(
    mailbox: Mailbox, producer: Sender
) -> None:
    """The producer goes on with the others."""

    class Mistaken(Letters):
        exchange_type = "topic"

    complaint = complaint_of(
        lambda: producer.message_x(_eks=[(Mistaken, "k")]), ExchangeMismatchError
    )
    producer.message_good()

    assert "'letters'" in complaint
    assert ["good"] == mailbox.names()


def test_a_passive_exchange_that_does_not_exist_is_an_error(producer: Sender) -> None:
    """It is only looked for."""

    class Missing(Exchange):
        name = "missing"
        passive = True

    complaint = complaint_of(lambda: producer.message_x(_eks=[(Missing, "k")]), ChannelClosedError)

    assert "404" in complaint
    assert "'missing'" in complaint


def test_a_future_tells_what_became_of_a_message(mailbox: Mailbox, producer: Sender) -> None:
    """The call itself returns before that."""
    futures = [producer.message_number(number, _future=True) for number in range(100)]
    lost = producer.message_lost(_key="nobody", _future=True)
    forwarded = producer.forward({"content": {"parameters": "forwarded"}}, _future=True)
    generic = producer.message(_future=True)

    assert {None} == {future.result(10) for future in (*futures, forwarded, generic)}
    with pytest.raises(UnroutableError):
        lost.result(10)
    assert [*range(100), "forwarded"] == [
        body["content"].get("parameters") for body in mailbox.bodies()
    ][:-1]


# --------------------------------------------------------------------- connections


def test_a_wrong_password_is_an_error_at_once_that_does_not_show_it(
    broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither does the log, nor a traceback with the local variables of every frame."""
    caplog.set_level(logging.DEBUG)
    hup = {"user": "guest", "password": "hunter2"}
    before = time.monotonic()
    with Sender(hup={**Sender.hup, **hup}) as producer, pytest.raises(PostageError) as caught:
        del hup
        producer.message_echo()
    duration = time.monotonic() - before

    assert isinstance(caught.value, ConnectionFailedError)
    assert "check user and password" in str(caught.value)
    ours = [
        frame
        for frame in traceback.TracebackException.from_exception(
            caught.value, capture_locals=True
        ).stack
        if "/postage/" in frame.filename
    ]
    assert ours
    shown = [repr(frame.locals) for frame in ours]
    shown += traceback.format_exception(caught.value)
    shown += [caplog.text, repr(producer), repr(producer.hup)]
    assert "hunter2" not in "".join(shown)
    assert duration < 10.0


def test_an_unknown_virtual_host_is_an_error_at_once(broker_url: str) -> None:
    """It names the virtual host."""
    with Sender(vhost="no/such") as producer:
        complaint = complaint_of(producer.message_echo, ConnectionFailedError)

    assert "no%2Fsuch" in complaint


def test_without_a_broker_a_message_fails_at_its_deadline(closed_port: int) -> None:
    """The error says that nothing was sent, whom it asked, and what was wrong."""
    hup = {"host": f"127.0.0.1:{closed_port}", "user": "guest", "password": "guest"}
    before = time.monotonic()
    with Sender(hup=hup) as producer:
        complaint = complaint_of(lambda: producer.message_echo(_timeout=0.3), PublishTimeoutError)
    duration = time.monotonic() - before

    assert "certainly not sent" in complaint
    assert f"no connection to amqp://guest@127.0.0.1:{closed_port}/%2F in time" in complaint
    assert "start RabbitMQ" in complaint
    assert 0.3 <= duration < 10.0


def test_a_broker_that_does_not_answer_is_no_broker(silent_port: int) -> None:
    """The deadline of the message holds, not that of the connection."""
    hup = {"host": f"127.0.0.1:{silent_port}"}
    before = time.monotonic()
    with Sender(hup=hup) as producer:
        with pytest.raises(PublishTimeoutError, match="certainly not sent"):
            producer.message_echo(_timeout=0.3)
        producer.close(0.1)
    duration = time.monotonic() - before

    assert duration < 10.0


def test_a_producer_connects_when_it_first_sends(mailbox: Mailbox, broker_url: str) -> None:
    """Making one costs nothing, and needs no broker."""
    with Sender() as producer:
        assert "not connected yet" in repr(producer)
        assert connections._registry == {}
        producer.message_echo()
        assert "open" in repr(producer)
        assert connections.State.READY is producer.conn_broker.state


def test_producers_share_a_connection(mailbox: Mailbox, broker_url: str) -> None:
    """The end of one leaves it to the other."""
    with Sender() as first:
        with Sender() as second:
            first.message_first()
            second.message_second()
            assert first.conn_broker is second.conn_broker
            assert first.channel is not second.channel
        first.message_third()

    assert ["first", "second", "third"] == mailbox.names()


def test_a_closed_producer_refuses_to_send(producer: Sender) -> None:
    """Closing twice is fine."""
    producer.message_echo(_mandatory=False)
    producer.close()
    producer.close()

    for send in (producer.message_echo, producer.rpc_echo, producer.batch, producer.message):
        with pytest.raises(ClosedError, match="Sender is used after close"):
            send()
    assert "closed" in repr(producer)


def test_a_producer_that_never_sent_can_be_closed() -> None:
    """There is nothing to do."""
    producer = Sender()
    producer.close()

    with pytest.raises(ClosedError):
        producer.message_echo()


def test_a_producer_can_be_closed_after_all_connections_were(producer: Sender) -> None:
    """As after a restart that failed: the error of that must not be hidden by another one."""
    producer.message_echo(_mandatory=False)
    assert connections.close_all()
    producer.close()


def test_closing_waits_for_what_is_being_confirmed(mailbox: Mailbox, broker_url: str) -> None:
    """Nothing that was handed over before is lost."""
    with Sender() as producer:
        futures = [producer.message_echo(_future=True) for _ in range(500)]

    assert {None} == {future.result(0) for future in futures}
    assert 500 == len(mailbox.bodies())


def test_a_producer_that_is_dropped_open_warns(mailbox: Mailbox, broker_url: str) -> None:
    """It holds a channel and its share of a connection."""
    producer = Sender()
    producer.message_echo()

    with pytest.warns(ResourceWarning, match="Sender .* was dropped without close"):
        del producer
        gc.collect()
    assert connections.close_all()


def test_a_producer_that_never_sent_is_dropped_in_silence() -> None:
    """It holds nothing. A warning would fail this test."""
    producer = Sender()
    del producer
    gc.collect()


def test_a_constructor_that_fails_leaves_nothing_to_warn_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The half-made producer is dropped in silence."""
    monkeypatch.setenv("POSTAGE_URL", "http://nonsense")

    with pytest.raises(ConfigurationError):
        Sender()
    gc.collect()


def test_what_is_sent_is_logged(
    mailbox: Mailbox, producer: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    """At the level that POSTAGE_DEBUG_MODE shows, and with where it goes."""
    caplog.set_level(logging.DEBUG, "postage")
    producer.message_alone("T")
    producer.forward({"name": "forwarded"})
    with producer.batch() as batch:
        batch.message_together("T", _eks=[(Letters, "post"), (Parcels, "p")], _mandatory=False)
    producer.rpc_called("T", _key="nobody")

    sent = [each.split(" to ") for each in caplog.messages if each.startswith("> ")]
    for (text, where), name, pairs in zip(
        sent,
        ["alone", "forwarded", "together", "called"],
        ["('letters', 'post')"] * 2
        + ["('letters', 'post'), ('parcels', 'p')"]
        + ["('letters', 'nobody')"],
        strict=True,
    ):
        assert f'"name": "{name}"' in text
        assert f"[{pairs}]" == where


# ------------------------------------------------------------- names of 1.2.1 inside


def test_the_class_attributes_have_the_values_of_1_2_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without variables in the environment."""
    for name in [name for name in os.environ if name.startswith("POSTAGE_")]:
        monkeypatch.delenv(name)

    for producer in (GenericProducer, GenericProducer()):
        assert [(Exchange, "nokey")] == producer.eks
        assert JsonEncoder is producer.encoder_class
        assert "/" == producer.vhost
        assert {"host": "localhost", "user": "guest", "password": "guest"} == producer.hup
        assert (30, 4) == (producer.rpc_timeout, producer.max_retry)


def test_the_instance_attributes_are_those_of_1_2_1() -> None:
    """What the constructor is given replaces what the class says."""
    hup = {"host": "rabbit", "user": "u", "password": "p"}
    producer = Sender({"name": "n"}, hup, "v")

    assert (hup, "v", Letters) == (producer.hup, producer.vhost, producer.default_exchange)
    assert isinstance(producer.encoder, Encoder)
    assert ("n", "v") == (producer.fingerprint["name"], producer.fingerprint["vhost"])
    assert "/" == Sender(vhost="", hup=hup).vhost


def test_the_pairs_of_a_call_can_be_asked_for() -> None:
    """As upstream's tests do."""
    producer = Sender()

    assert [(Letters, "post")] == producer._get_eks({})
    assert [(Letters, "k")] == producer._get_eks({"_key": "k"})
    assert [(Parcels, "p")] == producer._get_eks({"_key": "k", "_eks": [(Parcels, "p")]})
    assert [(DefaultExchange, "q")] == producer._get_eks({"_queue": "q"})


def test_a_body_can_be_encoded_without_sending_it() -> None:
    """As upstream's tests do."""
    body = MessageCommand("echo", "T").body

    assert body == json.loads(Sender()._encode(body))


def test_the_properties_of_a_message_can_be_asked_for() -> None:
    """As upstream's tests do."""
    properties = Sender()._build_message_properties()

    assert ("application/json", 2) == (properties.content_type, properties.delivery_mode)


def test_the_low_level_senders_take_a_callable(mailbox: Mailbox, producer: Sender) -> None:
    """As upstream's tests do."""
    mailbox.bind("k")

    producer._message_send(3, "test", adict={"a": 1}, _key="k", _callable=Message)
    queue = producer._rpc_send("x", _key="k", _callable=RpcCommand, _queue_only=True)

    sent, request = mailbox.get(), mailbox.get()
    assert {"args": [3, "test"], "kwds": {"adict": {"a": 1}}} == sent[2]["content"]
    assert ("rpc", queue) == (request[2]["category"], request[1].reply_to)
