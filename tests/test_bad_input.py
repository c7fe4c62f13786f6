# SPDX-License-Identifier: MIT
"""What a component does with messages that nobody should have sent: it goes on, and loses none."""

from __future__ import annotations

import json
import logging
import random
import struct
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from postage.messaging import MessageHandler, MessageProcessor, RpcHandler
from postage.retry import RetryPolicy
from postage.transport.publisher import encoded_size
from tests.programs_for_tests.components import (
    Running,
    command,
    eqk_of,
    raw_channel,
    rest_of,
    take,
)
from tests.waiting import wait_until

GOOD = command("run")


def without(key: str) -> bytes:
    return json.dumps({name: value for name, value in GOOD.items() if name != key}).encode()


def with_(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


#: Bodies that no handler can get, and what is said of them.
UNREADABLE = {
    "empty": (b"", "not JSON"),
    "no UTF-8": (b'{"type": "\xff"}', "not UTF-8"),
    "no JSON": (b"run!", "not JSON"),
    "half of it": (json.dumps(GOOD).encode()[:40], "not JSON"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    "a list": (b"[1, 2]", "no object but list"),
    "a text": (b'"run"', "no object but str"),
    "null": (b"null", "no object but NoneType"),
    "nothing in it": (b"{}", "no 'category'"),
    "no category": (without("category"), "no 'category'"),
    "no type": (without("type"), "no 'type'"),
    "no name": (without("name"), "no 'name'"),
    "no content": (without("content"), "no 'content'"),
    "a number as category": (with_(category=1), "'category' of the body is int"),
    "a list as type": (with_(type=["command"]), "'type' of the body is list"),
    "an object as name": (with_(name={"run": 1}), "'name' of the body is dict"),
    "a text as content": (with_(content="run"), "'content' of the body is str"),
    "null as content": (with_(content=None), "'content' of the body is NoneType"),
    "a list as content": (with_(content=[]), "'content' of the body is list"),
    "an unknown category": (with_(category="gossip"), "category 'gossip' is unknown"),
    "100,000 brackets": (b"[" * 100_000, "nested too deeply"),
    "100,000 brackets in the content": (
        json.dumps(GOOD).encode().replace(b"{}", b"[" * 100_000 + b"]" * 100_000, 1),
        "nested too deeply",
    ),
    "an integer of 5,000 digits": (with_(content={"n": 0}).replace(b"0", b"7" * 5_000), ""),
    "8 MiB": (json.dumps(command("run", "x" * 8 * 1024 * 1024)).encode(), "larger than max_body"),
}


class Component(MessageProcessor):
    """A component that notes what it handled."""

    retry = RetryPolicy(attempts=1)  # what fails is parked at once

    def __init__(self, *queues: Any) -> None:
        self.log: list[Any] = []
        super().__init__({"name": "tested", "pid": 12}, eqk_of(*(queues or ("q",))))

    @MessageHandler("command", "last")
    def msg_last(self, content: Any) -> None:
        self.log.append("last")

    @MessageHandler("command", "run")
    def msg_run(self, content: Any) -> None:
        self.log.append(content)

    @RpcHandler("command", "run")
    def rpc_run(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func("ran")


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    """A channel of pika."""
    with raw_channel() as opened:
        yield opened


def send(channel: BlockingChannel, body: bytes, queue: str = "q", **properties: Any) -> None:
    """Publish any body, and wait until the broker has it."""
    channel.basic_publish("", queue, body, pika.BasicProperties(**properties))


def send_last(channel: BlockingChannel, processor: Any, queue: str = "q") -> None:
    """Find out that a component goes on."""
    before = processor.log.count("last")
    send(channel, json.dumps(command("last")).encode(), queue)
    wait_until(lambda: processor.log.count("last") > before)


def assert_readable(headers: dict[str, Any]) -> None:
    """Our own headers are texts and numbers, which a person can read."""
    own = {name: value for name, value in headers.items() if name.startswith("postage-")}

    assert {} == {name: value for name, value in own.items() if not isinstance(value, (str, int))}
    assert {
        "postage-reason",
        "postage-queue",
        "postage-exchange",
        "postage-routing-key",
        "postage-parked-at",
        "postage-parked-by",
        "postage-exception",
        "postage-error",
        "postage-traceback",
    } <= own.keys()


# ------------------------------------------------------------------- unreadable bodies


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_message_is_parked_byte_for_byte(name: str, channel: BlockingChannel) -> None:
    """In 1.2.1 it ended the component, came again, and ended the next one."""
    body, text = UNREADABLE[name]

    with Running(own := Component()):
        send(channel, body, message_id="bad", headers={"a": "b"}, content_type="text/odd")
        properties, parked = take(channel, "q.error")[0]
        send_last(channel, own)

    assert body == parked
    assert ("bad", "text/odd", 2) == (
        properties.message_id,
        properties.content_type,
        properties.delivery_mode,
    )
    assert_readable(properties.headers)
    assert ("b", "unreadable", "q", "DecodeError", "name=tested pid=12") == tuple(
        properties.headers[key]
        for key in (
            "a",
            "postage-reason",
            "postage-queue",
            "postage-exception",
            "postage-parked-by",
        )
    )
    assert text in properties.headers["postage-error"]
    assert [] == rest_of("q") + rest_of("q.error")


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_call_is_answered_with_an_error(name: str, channel: BlockingChannel) -> None:
    """Its caller need not wait for its timeout to learn what is wrong."""
    body, text = UNREADABLE[name]
    reply_to = channel.queue_declare("", exclusive=True).method.queue

    with Running(own := Component()):
        send(channel, body, reply_to=reply_to, correlation_id="1")
        properties, reply = take(channel, reply_to)[0]
        send_last(channel, own)

    assert "1" == properties.correlation_id
    assert "error" == json.loads(reply)["content"]["type"]
    assert text in json.loads(reply)["content"]["message"]
    assert [] == rest_of("q") + rest_of("q.error")


def test_a_larger_body_can_be_allowed(channel: BlockingChannel) -> None:
    """`max_body` None allows any."""

    class Own(Component):
        max_body = None

    with Running(own := Own()):
        send(channel, UNREADABLE["8 MiB"][0])
        wait_until(lambda: own.log)

    assert 8 * 1024 * 1024 == len(own.log[0]["parameters"])


def test_a_call_without_reply_to_is_parked_and_not_run(channel: BlockingChannel) -> None:
    """1.2.1 ran it, and then failed to answer."""
    with Running(own := Component()):
        send(channel, json.dumps(command("run", category="rpc")).encode())
        properties, _ = take(channel, "q.error")[0]
        send_last(channel, own)

    assert_readable(properties.headers)
    assert "unanswerable" == properties.headers["postage-reason"]


def test_of_any_mixture_of_messages_none_is_lost(channel: BlockingChannel) -> None:
    """Each of 400 is either handled or parked, whatever random bytes are in it."""
    chance = random.Random(1)
    good = json.dumps(GOOD).encode()
    bodies = []
    for number in range(400):
        body = bytearray(good if number % 2 else chance.randbytes(chance.randrange(100)))
        if number % 4 == 1:
            body[chance.randrange(len(body))] = chance.randrange(256)
        bodies.append(bytes(body))

    with Running(own := Component()):
        for body in bodies:
            send(channel, body)
        wait_until(lambda: len(own.log) + ready(channel, "q.error") == 400)
        send_last(channel, own)
        parked = [body for _, body in take(channel, "q.error", 400 - len(own.log) + 1)]

    assert [] == rest_of("q") + rest_of("q.error")
    for body in parked:
        bodies.remove(body)
    assert len(own.log) - 1 == len(bodies)


def ready(channel: BlockingChannel, queue: str) -> int:
    count = channel.queue_declare(queue, passive=True).method.message_count
    assert isinstance(count, int)
    return count


# ------------------------------------------------------------------- errors of handlers


class NoText(Exception):
    """An error that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


LONG = "x" * 1024 * 1024


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LookupError("plain"), "plain"),
        (LookupError(f"long: {LONG}"), "long: xxx"),
        (NoText(), "(NoText has no text: RuntimeError)"),
        (LookupError("lone \ud800 surrogate"), r"lone \ud800 surrogate"),
        (LookupError("null \0, snowman \N{SNOWMAN}"), "null \0, snowman \N{SNOWMAN}"),
    ],
    ids=["plain", "1 MB", "no text", "surrogates", "odd"],
)
def test_a_message_is_parked_whatever_its_handler_raises(
    error: Exception, text: str, channel: BlockingChannel
) -> None:
    """A header that pika cannot write, or a frame that is too large, ended the component."""

    class Own(Component):
        def msg_run(self, content: Any) -> None:
            raise error

    with Running(own := Own()):
        send(channel, json.dumps(GOOD).encode())
        properties, body = take(channel, "q.error")[0]
        send_last(channel, own)
        losses = own.consumer.conn_broker.losses

    assert GOOD == json.loads(body)
    assert_readable(properties.headers)
    assert ("failed", type(error).__name__) == (
        properties.headers["postage-reason"],
        properties.headers["postage-exception"],
    )
    assert text in properties.headers["postage-error"]
    assert "in msg_run" in properties.headers["postage-traceback"]
    assert 0 == losses
    assert [] == rest_of("q") + rest_of("q.error")


@pytest.mark.parametrize("error", [LookupError(LONG), NoText(), LookupError("\ud800")])
def test_a_call_is_answered_whatever_its_handler_raises(
    error: Exception, channel: BlockingChannel
) -> None:
    """A long text travels in the body, where there is room."""

    class Own(Component):
        def rpc_run(self, content: Any, reply_func: Callable[[Any], None]) -> None:
            raise error

    reply_to = channel.queue_declare("", exclusive=True).method.queue
    with Running(own := Own()):
        send(channel, json.dumps(command("run", category="rpc")).encode(), reply_to=reply_to)
        _, reply = take(channel, reply_to)[0]
        send_last(channel, own)

    content = json.loads(reply)["content"]
    assert ("exception", type(error).__name__) == (content["type"], content["value"])


# ------------------------------------------------------------------------- odd headers


@pytest.mark.parametrize("size", [99_000, 120_000, 130_990])
@pytest.mark.parametrize("failing", [True, False])
def test_a_message_whose_headers_fill_the_frame_is_parked(
    size: int, failing: bool, channel: BlockingChannel
) -> None:
    """With our own headers beside them they were too much, and cost the connection each time."""

    class Own(Component):
        def msg_run(self, content: Any) -> None:
            raise LookupError(LONG)

    headers = {"small": "s", "big": "", "other": "o" * 1000}
    headers["big"] = "b" * (size - encoded_size(pika.BasicProperties(headers=headers)))
    body = json.dumps(GOOD).encode() if failing else b"no JSON"

    with Running(own := Own()):
        send(channel, body, headers=headers)
        properties, parked = take(channel, "q.error")[0]
        send_last(channel, own)
        losses = own.consumer.conn_broker.losses

    assert body == parked
    assert_readable(properties.headers)
    kept = {name: properties.headers.get(name) for name in headers}
    left_out = properties.headers.get("postage-left-out", "").split()
    assert {**headers, **dict.fromkeys(left_out)} == kept
    assert (["big"] if size == 130_990 else []) == left_out
    assert 0 == losses


def test_headers_of_any_type_are_kept(channel: BlockingChannel) -> None:
    """Only those that begin with "postage-" are ours."""
    headers = {
        "bytes": b"\xff",
        "table": {"list": [1, "x", None, True]},
        "number": -(2**40),
        "decimal": Decimal("1.50"),
        "time": datetime(2024, 1, 1, tzinfo=timezone.utc),
        "postage-timeout": 5,
    }

    with Running(own := Component()):
        send(channel, b"no JSON", headers=headers)
        properties, _ = take(channel, "q.error")[0]
        send_last(channel, own)

    assert headers == {name: properties.headers[name] for name in headers}


class WithDouble(pika.BasicProperties):  # type: ignore[misc]
    """Properties in which the header value `MARK` is a double of 1e300, which pika cannot write."""

    def encode(self) -> list[bytes]:
        number, double = struct.pack(">cq", b"l", MARK), struct.pack(">cd", b"d", 1e300)
        return [piece.replace(number, double) for piece in super().encode()]


MARK = 0x123456789ABCDE


def test_a_header_that_pika_reads_and_cannot_write_becomes_a_text(
    channel: BlockingChannel,
) -> None:
    """pika makes a number of 300 digits of a double, and the component ended, again and again."""
    headers = {"double": MARK, "table": {"double": MARK}, "number": 1}

    with Running(own := Component()):
        channel.basic_publish("", "q", b"no JSON", WithDouble(headers=headers))
        properties, _ = take(channel, "q.error")[0]
        send_last(channel, own)

    assert (str(int(1e300)), 1) == (properties.headers["double"], properties.headers["number"])
    assert properties.headers["table"].startswith("{'double': 1000000000000000")


def test_a_routing_key_that_is_no_text_is_readable_in_the_error_queue(
    channel: BlockingChannel,
) -> None:
    """pika hands it out as bytes, which 1.2.1 cannot read in a header."""
    with Running(Component()):
        channel.queue_bind("q", "test-exchange", "later")
        channel.exchange_declare("odd", "fanout", auto_delete=True)
        channel.queue_bind("q", "odd")
        channel.basic_publish("odd", b"\xffkey", b"no JSON")  # type: ignore[arg-type]
        properties, _ = take(channel, "q.error")[0]

    assert_readable(properties.headers)
    assert r"\xffkey" == properties.headers["postage-routing-key"]


def test_a_message_that_was_parked_before_is_parked_with_the_new_reason(
    channel: BlockingChannel,
) -> None:
    """What an operator moves back into the queue may fail again."""
    with Running(Component()):
        send(channel, b"no JSON")
        properties, body = take(channel, "q.error")[0]
        properties.headers["postage-reason"] = "an old one"
        channel.basic_publish("", "q", body, properties)
        again, body = take(channel, "q.error")[0]

    assert b"no JSON" == body
    assert "unreadable" == again.headers["postage-reason"]


# ------------------------------------------------------------- trouble with the error queue


def test_a_message_is_not_lost_when_the_error_queue_was_deleted(channel: BlockingChannel) -> None:
    """It is given back, comes again, and finds an error queue that was declared anew."""
    with Running(own := Component()):
        send(channel, b"first")
        take(channel, "q.error")
        channel.queue_delete("q.error")
        send(channel, b"second")
        wait_until(lambda: own.consumer.subscriber.inbox or exists("q.error"))
        wait_until(lambda: exists("q.error"))
        _, parked = take(channel, "q.error")[0]
        send_last(channel, own)

    assert b"second" == parked
    assert [] == rest_of("q")


def exists(queue: str) -> bool:
    with raw_channel() as channel:
        try:
            channel.queue_declare(queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        return True


#: A queue whose error queue is declared only when it is needed.
PLAIN_QUEUE = {"name": "plain", "flags": {"durable": True}}


def test_a_message_is_not_lost_while_the_error_queue_cannot_be_declared(
    channel: BlockingChannel, caplog: pytest.LogCaptureFixture
) -> None:
    """It is given back until somebody has mended that, and others are handled meanwhile."""
    channel.queue_declare("plain.error", durable=True, arguments={"x-max-length": 5})

    def attempts(level: int) -> int:
        told = [each for each in caplog.records if "could not park" in each.getMessage()]
        return sum(each.levelno == level for each in told)

    caplog.set_level(logging.DEBUG, "postage.processor")
    with Running(own := Component(PLAIN_QUEUE)):
        send(channel, b"no JSON", "plain")
        wait_until(lambda: attempts(logging.DEBUG) >= 1)
        assert 1 == attempts(logging.ERROR)
        send_last(channel, own, "plain")
        channel.queue_delete("plain.error")
        # Not before: RabbitMQ answers 541 to a basic.get of a queue that it is about to make.
        wait_until(lambda: "parked a message from 'plain'" in caplog.text)
        _, parked = take(channel, "plain.error")[0]

    assert b"no JSON" == parked
    assert "POSTAGE_ON_MISMATCH" in caplog.text
    assert [] == rest_of("plain")


def test_an_error_queue_that_exists_otherwise_is_used_if_the_settings_say_so(
    channel: BlockingChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`POSTAGE_ON_MISMATCH=adopt` concerns this queue, too."""
    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adopt")
    channel.queue_declare("plain.error", durable=True, arguments={"x-max-length": 5})

    with Running(Component(PLAIN_QUEUE)):
        send(channel, b"no JSON", "plain")
        _, parked = take(channel, "plain.error")[0]

    assert b"no JSON" == parked
