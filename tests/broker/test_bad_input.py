# SPDX-License-Identifier: MIT
"""Whatever a client does over TCP, it harms itself alone, and nothing grows without bound.

The reply codes of the table are those of RabbitMQ 3.10.8, on which the tests run too. Where
RabbitMQ hangs up without a word, or fails itself with 541, the embedded broker says more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pika import spec

from postage.broker import Broker, fields
from postage.broker.channel import MAX_MESSAGE_SIZE
from postage.broker.connection import ROOM
from tests.broker import wire
from tests.broker.storm import Storm
from tests.broker.wire import RawClient, body, frame, header, login, method, opening, short, tune
from tests.nodes import Node
from tests.programs import Program
from tests.waiting import wait_until

PUBLISH = method(spec.Basic.Publish(routing_key="q"), 1)
GET = method(spec.Basic.Get(queue="none"), 1)
QOS = method(spec.Basic.Qos(), 1)
NO_TABLE = bytes(4)
#: The largest delivery tag that a frame can hold.
LAST = 2**64 - 1
MIB = 1 << 20


def raw(class_id: int, method_id: int, arguments: bytes = b"", channel: int = 1) -> bytes:
    return frame(1, channel, struct.pack(">HH", class_id, method_id) + arguments)


def table(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def nested(levels: int) -> bytes:
    return table(b"".join(b"\1aF" + struct.pack(">I", n) for n in range(7 * levels - 7, -1, -7)))


def declare(name: bytes, arguments: bytes = NO_TABLE, bits: int = 8) -> bytes:
    """Return queue.declare, of a queue that goes with its last consumer if it is made."""
    return raw(50, 10, b"\0\0" + short(name) + bytes([bits]) + arguments)


def consume(queue: bytes, tag: bytes) -> bytes:
    return raw(60, 20, b"\0\0" + short(queue) + short(tag) + b"\0" + NO_TABLE)


def published(properties: bytes) -> bytes:
    """Return a message with properties that may be broken."""
    return PUBLISH + header(0, properties)


#: What is sent on an open channel, and the kind and code of the close that follows; None if the
#: channel goes on.
TABLE: dict[str, tuple[bytes, tuple[str, int] | None]] = {
    "a frame of an unknown kind": (frame(9, 1, b"abc"), ("Connection", 501)),
    "a frame of kind 0": (frame(0, 0, b""), ("Connection", 501)),
    "a heartbeat on a channel": (frame(8, 1, b""), ("Connection", 505)),
    "a heartbeat with content": (frame(8, 0, b"x"), ("Connection", 501)),
    "a frame without an end": (frame(1, 1, QOS[7:-1], end=b"\xcd"), ("Connection", 501)),
    "a frame that is too large": (frame(3, 1, bytes(131_073)), ("Connection", 501)),
    "a frame of 4 GiB": (struct.pack(">BHI", 3, 1, 2**32 - 1), ("Connection", 501)),
    "a method of three octets": (frame(1, 1, b"\0\x32\0"), ("Connection", 501)),
    "a method that is cut off": (raw(50, 10, b"\0"), ("Connection", 501)),
    "a method that is too long": (declare(b"q", NO_TABLE + b"more"), ("Connection", 501)),
    "a table that is cut off": (declare(b"q", b"\0\0\0\x09"), ("Connection", 501)),
    "a name that is cut off": (raw(50, 10, b"\0\0\xffq"), ("Connection", 501)),
    "a table of 10,000 levels": (declare(b"deep", nested(10_000)), None),
    "the latest time there is": (declare(b"late", table(b"\1aT" + b"\xff" * 8)), None),
    "headers of 10,000 levels": (published(b"\x20\0" + nested(10_000)), None),
    "a header on channel 0": (header(0, channel=0), ("Connection", 505)),
    "a body on channel 0": (body(b"x", channel=0), ("Connection", 505)),
    "a method on channel 0": (method(spec.Basic.Get()), ("Connection", 504)),
    "open again": (method(spec.Channel.Open(), 1), ("Connection", 504)),
    "open of the connection again": (opening(), ("Connection", 504)),
    "login again": (login(), ("Connection", 504)),
    "close-ok without a close": (
        method(spec.Connection.CloseOk()),
        ("Connection", 504),
    ),
    "close-ok of a channel without a close": (
        method(spec.Channel.CloseOk(), 1),
        ("Connection", 503),
    ),
    "a method on a channel that is not open": (
        method(spec.Basic.Get(queue="q"), 2),
        ("Connection", 504),
    ),
    "a body on a channel that is not open": (body(b"x", channel=2), ("Connection", 505)),
    "close of a channel that is not open": (
        method(spec.Channel.Close(200, "", 0, 0), 2),
        ("Connection", 504),
    ),
    "a method of the connection on a channel": (frame(1, 1, opening()[7:-1]), ("Connection", 503)),
    "an answer of the broker": (method(spec.Channel.OpenOk(), 1), ("Connection", 503)),
    "channel 2048": (method(spec.Channel.Open(), 2048) + QOS, None),
    "a method in place of a header": (PUBLISH + QOS, ("Connection", 505)),
    "close in place of a header": (
        PUBLISH + method(spec.Channel.Close(200, "", 0, 0), 1),
        ("Connection", 505),
    ),
    "publish in place of a header": (PUBLISH + PUBLISH, ("Connection", 505)),
    "a body in place of a header": (PUBLISH + body(b"x"), ("Connection", 505)),
    "a header of another class": (PUBLISH + header(1, class_id=50), ("Connection", 505)),
    "a header with a weight": (
        PUBLISH + frame(2, 1, b"\0\x3c\0\7" + bytes(10)),
        ("Connection", 505),
    ),
    "a header of four octets": (PUBLISH + frame(2, 1, b"\0\x3c\0\0"), ("Connection", 501)),
    "a header in place of a body": (PUBLISH + header(1) + header(1), ("Connection", 505)),
    "a method in place of a body": (PUBLISH + header(1) + QOS, ("Connection", 505)),
    "a body after the body": (PUBLISH + header(1) + body(b"x") + body(b"x"), ("Connection", 505)),
    "a body after no body": (PUBLISH + header(0) + body(b""), ("Connection", 505)),
    "a body in many pieces": (PUBLISH + header(2) + body(b"") + body(b"x") * 2 + QOS, None),
    "a header without a method": (header(0), ("Connection", 505)),
    "publish at once": (
        method(spec.Basic.Publish(immediate=True), 1) + header(0),
        ("Connection", 540),
    ),
    "an expiration that is no number": (published(b"\1\0\3abc"), ("Channel", 406)),
    "an expiration of 255 digits": (published(b"\1\0" + short(b"9" * 255)), ("Channel", 406)),
    "an expiration that is no text": (published(b"\1\0\1\xff"), ("Channel", 406)),
    "an unknown delivery mode": (published(b"\x10\0\x09"), ("Channel", 406)),
    "the name of another user": (published(b"\0\x10\5other"), ("Channel", 406)),
    "a type of 255 octets that is no text": (published(b"\0\x20" + short(b"\xff" * 255)), None),
    "further keys that are no list": (
        published(b"\x20\0" + table(b"\2CCS\0\0\0\1q")),
        ("Channel", 406),
    ),
    "further keys that are no text": (
        published(b"\x20\0" + table(b"\2CCA\0\0\0\6S\0\0\0\1\xff")),
        None,
    ),
    "a further key of 300 octets": (
        published(b"\x20\0" + table(b"\2CCA" + table(b"S" + table(b"k" * 300)))),
        None,
    ),
    "direct replies without a consumer": (
        published(b"\2\0" + short(b"amq.rabbitmq.reply-to")),
        ("Channel", 406),
    ),
    "a routing key that is no text": (wire.message(b"\xff\xfe"), None),
    "an exchange that is none, and no text": (
        wire.message("q", exchange="nope").replace(b"nope", b"\xff" * 4),
        ("Channel", 404),
    ),
    "a name of 255 octets": (declare(b"n" * 255), None),
    "a name with a zero": (declare(b"a\0b"), None),
    "a name that is no text": (declare(b"\xff\xfe"), ("Connection", 501)),
    "a name of 255 octets that is no text": (declare(b"\xff" * 255), ("Connection", 501)),
    "a missing name of 255 octets": (declare(b"z" * 255, bits=1), ("Channel", 404)),
    "a reserved name": (declare(b"amq.mine"), ("Channel", 403)),
    "a tag of 255 octets": (declare(b"tags") + consume(b"tags", b"t" * 255), None),
    "a tag twice": (
        declare(b"tags", bits=4) + consume(b"tags", b"t") * 2,
        ("Connection", 530),
    ),
    "a tag that is no text": (consume(b"q", b"\xff" * 255), ("Connection", 501)),
    "cancel of a tag that is no text": (raw(60, 30, b"\1\xff\0"), ("Connection", 501)),
    "ack of what was not delivered": (method(spec.Basic.Ack(1), 1), ("Channel", 406)),
    "ack of the last tag there is": (method(spec.Basic.Ack(LAST), 1), ("Channel", 406)),
    "ack up to the last tag there is": (method(spec.Basic.Ack(LAST, True), 1), ("Channel", 406)),
    "nack of the last tag there is": (method(spec.Basic.Nack(LAST), 1), ("Channel", 406)),
    "reject of the last tag there is": (method(spec.Basic.Reject(LAST), 1), ("Channel", 406)),
    "ack of all of nothing": (method(spec.Basic.Ack(0, True), 1), None),
    "a prefetch in octets": (method(spec.Basic.Qos(5), 1), ("Connection", 540)),
    "recover without requeueing": (method(spec.Basic.Recover(False), 1), ("Connection", 540)),
    "flow that stops": (method(spec.Channel.Flow(False), 1), ("Connection", 540)),
    "two consumers of direct replies": (
        2 * method(spec.Basic.Consume(queue="amq.rabbitmq.reply-to", no_ack=True), 1),
        ("Channel", 406),
    ),
}
#: The same where RabbitMQ hangs up without a word, fails, or waits for more.
ONLY_HERE: dict[str, tuple[bytes, tuple[str, int] | None]] = {
    "an unknown class": (raw(99, 99), ("Connection", 540)),
    "an unknown method": (raw(60, 250), ("Connection", 540)),
    "an unknown type of field": (declare(b"q", table(b"\1aQ")), ("Connection", 502)),
    "not a number": (declare(b"q", table(b"\1ad\x7f\xf8" + bytes(6))), ("Connection", 502)),
    "a header of twelve octets": (
        PUBLISH + frame(2, 1, b"\0\x3c" + bytes(10)),
        ("Connection", 501),
    ),
    "all properties, and none": (published(b"\xff\xff"), ("Connection", 502)),
    "more flags, and none": (published(b"\0\1"), ("Connection", 502)),
    "properties that are too long": (published(b"\0\0more"), ("Connection", 502)),
    "headers that are cut off": (published(b"\x20\0\0\0\0\x09"), ("Connection", 502)),
    "broken headers": (published(b"\x20\0" + table(b"\1aQ")), ("Connection", 502)),
    "a body that is too long": (PUBLISH + header(1) + body(b"xx"), ("Connection", 505)),
    "an announced body of 2 GiB": (PUBLISH + header(2**31), ("Channel", 406)),
    "an announced body of 16 EiB": (PUBLISH + header(2**64 - 1), ("Channel", 406)),
    "a broker's delivery": (
        method(spec.Basic.Deliver("t", 1, False, "", ""), 1),
        ("Connection", 503),
    ),
}


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    """A broker for all tests that leave nothing in it."""
    with Broker() as broker:
        yield broker


@contextlib.contextmanager
def small_broker(**options: Any) -> Iterator[tuple[int, psutil.Process, Program]]:
    """Run a broker with small limits as a process of its own; give its port and the process."""
    program = ["-m", "tests.programs_for_tests.small_broker", json.dumps(options)]
    with Program(program) as process:
        wait_until(lambda: process.stdout or process.lines)
        yield int(process.stdout[0]), psutil.Process(process.pid), process
        process.terminate()
        assert process.wait() in (0, -signal.SIGKILL)  # a test may have killed it
        # Without files, asyncio tries to listen again a second later, also where it has ended.
        if "out of system resource" not in process.output:
            assert "Traceback" not in process.output


def rss_mib(process: psutil.Process) -> float:
    return process.memory_info().rss / MIB


def assert_serves(port: int, vhost: str = "/") -> None:
    """Another client declares, publishes and gets."""
    with RawClient.opened(port, vhost) as client:
        client.open_channel()
        client.ask(spec.Queue.Declare(queue="", exclusive=True), spec.Queue.DeclareOk)
        client.ask(spec.Confirm.Select(), spec.Confirm.SelectOk)
        client.send(method(spec.Queue.Declare(queue="served", exclusive=True), 1))
        client.expect(spec.Queue.DeclareOk)
        client.send(wire.message("served", b"hello"))
        client.expect(spec.Basic.Ack)
        client.ask(spec.Basic.Get(queue="served", no_ack=True), spec.Basic.GetOk)
        assert 5 == client.receive().body_size
        assert b"hello" == client.receive().fragment


def close_of(client: RawClient) -> Any:
    """Return the close that must come next, but for answers to what was right."""
    while (decoded := client.receive()) is not None:
        value = getattr(decoded, "method", None)
        if isinstance(value, (spec.Connection.Close, spec.Channel.Close)):
            return value
    raise AssertionError("the broker hung up without a word")


def send_and_see(port: int, data: bytes, outcome: tuple[str, int] | None, vhost: str = "/") -> None:
    """Send it on an open channel, and check what comes of it."""
    with RawClient.opened(port, vhost) as client:
        client.open_channel()
        client.send(data)
        if outcome is None:
            client.send(method(spec.Basic.Get(queue="none"), 1))
            outcome = ("Channel", 404)
        close = close_of(client)
        assert outcome == (close.NAME.split(".")[0], close.reply_code), close
        if isinstance(close, spec.Channel.Close):
            client.send(method(spec.Channel.CloseOk(), 1))
            client.open_channel()


# One thing that is wrong


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_refused_as_by_rabbitmq(name: str, node: Node, broker_url: str) -> None:
    """With the same code, for the connection or the channel alone; and others are served."""
    vhost = broker_url.rpartition("/")[2]
    send_and_see(node.port, *TABLE[name], vhost)
    assert_serves(node.port, vhost)


@pytest.mark.parametrize("name", ONLY_HERE)
def test_bad_input_on_which_rabbitmq_fails_is_refused_with_a_reason(
    name: str, broker: Broker
) -> None:
    """And others are served."""
    send_and_see(broker.port, *ONLY_HERE[name])
    assert_serves(broker.port)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_byte_by_byte_is_the_same(name: str, broker: Broker) -> None:
    """Each octet may be a packet of its own."""
    data, outcome = TABLE[name]
    if len(data) > 500:
        data = data[:500]
        outcome = None
    with RawClient.opened(broker.port) as client:
        client.open_channel()
        for byte in data:
            client.send(bytes([byte]))
        if outcome is not None:
            close = close_of(client)
            assert outcome[1] == close.reply_code
            if isinstance(close, spec.Connection.Close):
                client.send(method(spec.Connection.CloseOk()))
                assert [] == client.rest()
    assert_serves(broker.port)


@pytest.mark.parametrize(
    "data",
    [
        b"AMQP\x01\x01\x00\x0a",
        b"AMQP\x00\x01\x00\x00",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        method(spec.Channel.Open(), 1),
        bytes(100_000),
    ],
    ids=["AMQP 0-9", "AMQP 1.0", "HTTP", "TLS", "frame", "zeros"],
)
def test_another_protocol_is_answered_with_the_protocol_header(data: bytes, broker: Broker) -> None:
    """AMQP 0-9-1, section 4.2.2: and the socket is closed."""
    with socket.create_connection(("127.0.0.1", broker.port), timeout=wire.PATIENCE) as client:
        client.sendall(data)
        answer = b""
        # Where more came than was read, the operating system says so, and not "end".
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(100):
                answer += piece
    assert wire.HEADER.startswith(answer) if len(data) > 50_000 else wire.HEADER == answer
    assert_serves(broker.port)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (login("wrong"), 403),
        (login(user="nobody"), 403),
        (login("wrong", capabilities={}), None),
        (login(mechanism="EXTERNAL"), None),
        (login() + tune(frame_max=1), None),
        (login() + tune() + opening("nowhere"), 530),
        (method(spec.Channel.Open(), 1), 505),
        (frame(1, 0, bytes(5000)), 501),
    ],
)
def test_who_does_not_get_through_the_handshake_is_refused(
    data: bytes, code: int | None, broker: Broker
) -> None:
    """With a reply code, if the client can understand it."""
    with RawClient(broker.port) as client:
        client.send(wire.HEADER + data)
        codes = []
        while (decoded := client.receive()) is not None:
            if isinstance(decoded.method, spec.Connection.Close):
                codes.append(decoded.method.reply_code)
                client.send(method(spec.Connection.CloseOk()))
    assert ([] if code is None else [code]) == codes
    assert_serves(broker.port)


# Random input


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([b"", wire.HEADER, wire.HEADER + login() + tune() + opening()]),
    st.binary(max_size=300),
)
def test_random_bytes_harm_nobody_else(before: bytes, data: bytes) -> None:
    """At the beginning, in the handshake, and in an open connection."""
    with Broker() as broker:
        with RawClient(broker.port) as client:
            client.send(before + data)
            client.shut_down()
            client.rest()
        assert_serves(broker.port)


@contextlib.contextmanager
def errors_logged() -> Iterator[list[str]]:
    """Collect what the broker says of its own errors; `caplog` is not for hypothesis."""
    errors: list[str] = []
    handler: Any = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(handler.format(record))
    logger = logging.getLogger("postage.broker")
    logger.addHandler(handler)
    try:
        yield errors
    finally:
        logger.removeHandler(handler)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_a_storm_leaves_nothing_behind(seed: int) -> None:
    """Clients that do anything at random cause no error of the broker, and no message is left."""
    with errors_logged() as errors:
        storm = Storm(Random(seed))
        storm.rage(100)
        storm.calm_down()

    assert [] == errors
    # The memory that queues need is what alarms go by: if it is not counted back, they never end.
    assert 0 == storm.desk.node._memory
    assert {} == storm.desk.node.vhosts["/"]._callers


def test_a_client_may_be_gone_after_any_octet() -> None:
    """Nothing of it stays, wherever its last words end."""
    session = wire.HEADER + login() + tune() + opening() + method(spec.Channel.Open(), 1)
    session += method(spec.Queue.Declare(queue="own", exclusive=True), 1)
    session += wire.message("own", b"hello") + method(spec.Basic.Get(queue="own"), 1)

    def left(server: Any) -> int:
        node = server.node
        return len(server.peers) + len(node.connections) + len(node.vhosts["/"].queues)

    with Broker() as broker:
        for end in [*range(0, len(session), 5), len(session)]:
            with RawClient(broker.port) as client:
                client.send(session[:end])
                if end % 2:
                    client.reset_on_close()
        wait_until(lambda: broker._call(left) == 0)
        assert_serves(broker.port)


# Endings


def test_a_client_that_says_nothing_more_is_done(broker: Broker) -> None:
    """One that has closed its half of the connection is answered, and closed."""
    with RawClient.opened(broker.port) as client:
        client.open_channel()
        client.send(method(spec.Connection.Close(200, "bye", 0, 0)))
        client.shut_down()
        client.expect(spec.Connection.CloseOk)
        assert [] == client.rest()


@pytest.mark.parametrize(
    "data",
    [
        method(spec.Connection.Close(200, "bye", 0, 0)) * 2,
        method(spec.Connection.Close(0, "x" * 255, 65_535, 65_535)) + PUBLISH + b"\xff" * 100,
        PUBLISH + header(5) + body(b"he") + method(spec.Connection.Close(200, "bye", 0, 0)),
    ],
)
def test_after_close_nothing_counts(data: bytes, broker: Broker) -> None:
    """AMQP 0-9-1, section 2.2.4: close-ok is the last that is said."""
    with RawClient.opened(broker.port) as client:
        client.open_channel()
        client.send(data)
        client.expect(spec.Connection.CloseOk)
        assert [] == client.rest()
    assert_serves(broker.port)


def test_a_client_that_never_answers_close_holds_nothing(broker: Broker) -> None:
    """Its exclusive queue is gone at once."""
    with RawClient.opened(broker.port) as client:
        client.open_channel()
        client.ask(spec.Queue.Declare(queue="mine", exclusive=True), spec.Queue.DeclareOk)
        client.send(frame(9, 0, b""))
        client.expect(spec.Connection.Close)
        with RawClient.opened(broker.port) as other:
            other.open_channel()
            other.ask(spec.Queue.Declare(queue="mine", exclusive=True), spec.Queue.DeclareOk)


def test_a_client_whose_heart_stops_is_hung_up_on(broker: Broker) -> None:
    """After two intervals of one second without an octet."""
    with RawClient.opened(broker.port, heartbeat=1) as client:
        client.open_channel()
        client.ask(spec.Queue.Declare(queue="mine", exclusive=True), spec.Queue.DeclareOk)
        assert [] == client.rest()
    assert_serves(broker.port)


# Too much


@contextlib.contextmanager
def many_files(number: int) -> Iterator[int]:
    """Let this process open so many files, or as many as it may; give how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = number if hard == resource.RLIM_INFINITY else min(number, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    try:
        yield max(soft, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_that_says_nothing_is_sent_away() -> None:
    """Also if nothing else happens that wakes the broker."""
    with small_broker(handshake_seconds=0.2) as (port, _, program):
        for _ in range(2):
            with RawClient(port) as client:
                assert [] == client.rest()
        wait_until(lambda: program.output.count("waits for the protocol header for too long") == 2)


def test_ten_thousand_silent_clients_are_sent_away_in_time() -> None:
    """Meanwhile others are served, and the memory they take is given back to later ones."""
    with many_files(10_300) as files, small_broker(handshake_seconds=2) as (port, process, _):
        number = min(10_000, files - 300)
        silent: dict[int, socket.socket] = {}
        try:
            begun = rss_mib(process)
            _connect(silent, number, port)
            assert_serves(port)
            _await_ends(silent)
            first = rss_mib(process)
            assert_serves(port)
            _connect(silent, number // 20, port)
            _await_ends(silent)
            assert rss_mib(process) - first < 10
        finally:
            for client in silent.values():
                client.close()
        assert 10_000 == number, f"only {number} clients: the hard limit is {files} files"
        assert first - begun < 0.02 * number
        assert_serves(port)


def _connect(clients: dict[int, socket.socket], number: int, port: int) -> None:
    for _ in range(number):
        client = socket.create_connection(("127.0.0.1", port), timeout=wire.PATIENCE)
        clients[client.fileno()] = client


def _await_ends(clients: dict[int, socket.socket]) -> None:
    """Wait until the broker has closed all connections, and close them, too."""
    poll = select.poll()
    for descriptor in clients:
        poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + wire.PATIENCE
    while clients:
        assert time.monotonic() < deadline, f"{len(clients)} are still open"
        for descriptor, _ in poll.poll(1000):
            assert b"" == clients[descriptor].recv(100)
            poll.unregister(descriptor)
            clients.pop(descriptor).close()


def test_more_clients_than_the_broker_may_have_files_are_survived() -> None:
    """Those that are too many wait, and get their turn when others are gone."""
    with small_broker(open_files=60) as (port, _, program):
        clients = [RawClient(port) for _ in range(120)]
        for client in clients:
            client.send(wire.HEADER)
        clients[0].expect(spec.Connection.Start)
        program.wait_for_line("out of system resource")
        for client in clients[:90]:
            client.close()
        for client in clients[90:]:
            client.expect(spec.Connection.Start)
            client.close()
        assert_serves(port)


def test_slow_readers_cost_little_memory() -> None:
    """Forty clients take nothing of 20 MiB that wait for each of them."""
    with small_broker() as (port, process, _), contextlib.ExitStack() as stack:
        publisher = stack.enter_context(RawClient.opened(port))
        publisher.open_channel()
        publisher.ask(spec.Confirm.Select(), spec.Confirm.SelectOk)
        for number in range(40):
            publisher.ask(spec.Queue.Declare(queue=f"q{number}"), spec.Queue.DeclareOk)
            publisher.ask(
                spec.Queue.Bind(queue=f"q{number}", exchange="amq.fanout"), spec.Queue.BindOk
            )
        piece = method(spec.Basic.Publish(exchange="amq.fanout"), 1) + header(100_000)
        piece += body(bytes(100_000))
        for _ in range(200):
            publisher.send(piece)
        _await_confirms(publisher, 200)
        before = rss_mib(process)

        slow = [stack.enter_context(RawClient.opened(port)) for _ in range(40)]
        for number, client in enumerate(slow):
            client.open_channel()
            client.send(method(spec.Basic.Consume(queue=f"q{number}", no_ack=True), 1))
        assert_serves(port)
        # Each has one MiB in the broker, some of it twice, and what the kernel takes.
        assert rss_mib(process) - before < 40 * 4

        slow[7].expect(spec.Basic.ConsumeOk)
        for _ in range(200):
            slow[7].expect(spec.Basic.Deliver)
            assert 100_000 == slow[7].receive().body_size
            assert 100_000 == len(slow[7].receive().fragment)


def _await_confirms(client: RawClient, number: int) -> None:
    confirmed = 0
    while confirmed < number:
        ack = client.expect(spec.Basic.Ack)
        confirmed = ack.delivery_tag if ack.multiple else confirmed + 1


def test_who_publishes_for_ever_is_blocked() -> None:
    """The memory stays where the limit is, and all goes on when somebody consumes."""
    limit = 30 * MIB
    with small_broker(memory_limit=limit) as (port, process, _), RawClient.opened(port) as client:
        client.open_channel()
        client.ask(spec.Queue.Declare(queue="q"), spec.Queue.DeclareOk)
        before = rss_mib(process)
        piece = wire.message("q", bytes(1000)) * 100
        sent = _send_until_it_waits(client, piece)

        assert isinstance(client.receive().method, spec.Connection.Blocked)
        # What is in sockets and buffers comes on top of what is in the queue.
        assert limit / 1700 < sent * 100 < (limit + 20 * MIB) / 1000
        assert rss_mib(process) - before < 1.5 * limit / MIB
        assert_gets(port, "q", 0.3 * limit / 1700)
        assert isinstance(client.receive().method, spec.Connection.Unblocked)


def _send_until_it_waits(client: RawClient, piece: bytes) -> int:
    """Send it again and again until the broker takes no more, and return how often."""
    sent = 0
    client.set_timeout(1.0)
    with contextlib.suppress(TimeoutError):
        while True:
            client.send(piece)
            sent += 1
    client.set_timeout(wire.PATIENCE)
    return sent


def assert_gets(port: int, queue: str, number: float) -> None:
    """Get so many messages and more, which works while publishers are blocked."""
    with RawClient.opened(port) as consumer:
        consumer.open_channel()
        for _ in range(int(number)):
            consumer.ask(spec.Basic.Get(queue=queue, no_ack=True), spec.Basic.GetOk)
            consumer.receive()
            consumer.receive()


@pytest.mark.parametrize("announced", [2**31, MAX_MESSAGE_SIZE + 1])
def test_a_body_that_is_too_large_is_not_kept(announced: int) -> None:
    """Its channel is closed before it comes, and what comes all the same is thrown away."""
    with small_broker() as (port, process, _), RawClient.opened(port) as client:
        client.open_channel()
        before = rss_mib(process)
        client.send(PUBLISH + header(announced))
        for _ in range(1000):
            client.send(body(bytes(131_000)))
        assert 406 == close_of(client).reply_code
        assert rss_mib(process) - before < 10
        client.send(method(spec.Channel.CloseOk(), 1))
        client.open_channel()
        assert_serves(port)


def test_bodies_in_pieces_of_one_octet_take_their_size(broker: Broker) -> None:
    """And pieces of no octets take nothing."""
    with small_broker() as (port, process, _), RawClient.opened(port) as client:
        client.open_channel()
        before = rss_mib(process)
        client.send(PUBLISH + header(MAX_MESSAGE_SIZE))
        for _ in range(100):
            client.send(body(b"x") * 2000 + body(b"") * 1000)
        assert_serves(port)
        client.send(PUBLISH)
        assert 505 == close_of(client).reply_code
        assert rss_mib(process) - before < 10


def test_a_storm_of_acknowledgements_is_handled(broker: Broker) -> None:
    """Of each of many deliveries, up to each of them, and at last of one that is settled."""
    with RawClient.opened(broker.port) as client:
        client.open_channel()
        client.ask(spec.Queue.Declare(queue="acks", exclusive=True), spec.Queue.DeclareOk)
        client.send(wire.message("acks", b"x") * 20_000)
        client.ask(spec.Basic.Consume(queue="acks"), spec.Basic.ConsumeOk)
        for _ in range(20_000):
            client.expect(spec.Basic.Deliver)
            client.receive()
            client.receive()
        acks = [method(spec.Basic.Ack(tag, multiple=tag > 10_000), 1) for tag in range(1, 20_001)]
        client.send(b"".join(acks))
        assert 0 == client.ask(
            spec.Queue.Declare(queue="acks", passive=True), spec.Queue.DeclareOk
        ).message_count
        client.send(b"".join(acks))
        close = close_of(client)
        assert (406, "PRECONDITION_FAILED - unknown delivery tag 1") == (
            close.reply_code,
            close.reply_text,
        )
    assert_serves(broker.port)


def test_two_thousand_channels_and_consumers_go_with_their_connection(broker: Broker) -> None:
    """Each has a message that nobody has settled, and others get all of them."""
    with RawClient.opened(broker.port) as client:
        client.send(b"".join(method(spec.Channel.Open(), n) for n in range(1, 2001)))
        for _ in range(2000):
            client.expect(spec.Channel.OpenOk)
        client.ask(spec.Queue.Declare(queue="many", durable=True), spec.Queue.DeclareOk)
        one = spec.Basic.Qos(prefetch_count=1)
        consuming = spec.Basic.Consume(queue="many")
        for number in range(1, 2001):
            client.send(method(one, number) + method(consuming, number))
        client.send(wire.message("many", b"x") * 2000)
        kinds = [type(getattr(client.receive(), "method", None)) for _ in range(2000 * 5)]
        assert 2000 == kinds.count(spec.Basic.Deliver)
    with RawClient.opened(broker.port) as other:
        other.open_channel()
        wait_until(
            lambda: other.ask(
                spec.Queue.Declare(queue="many", durable=True), spec.Queue.DeclareOk
            ).message_count
            == 2000
        )
        deleted = other.ask(spec.Queue.Delete(queue="many"), spec.Queue.DeleteOk)
        assert 2000 == deleted.message_count


def test_a_circle_of_dead_letters_does_not_keep_the_broker_from_others() -> None:
    """A header that the client made up keeps RabbitMQ's rule from ending it."""
    with Broker() as broker, RawClient.opened(broker.port) as client:
        client.open_channel()
        for queue, other in (("q", "r"), ("r", "q")):
            arguments = {"x-message-ttl": 0, "x-dead-letter-exchange": ""}
            arguments["x-dead-letter-routing-key"] = other
            client.ask(spec.Queue.Declare(queue=queue, arguments=arguments), spec.Queue.DeclareOk)
        death = {"queue": fields.encode("s"), "reason": fields.encode("rejected")}
        headers = fields.join({"x-death": fields.array([fields.table(death)])})
        client.send(published(b"\x20\0" + headers))

        def is_going_round(server: Any) -> bool:
            return bool(server.node.has_more)

        wait_until(lambda: broker._call(is_going_round))
        assert_serves(broker.port)
        assert broker._call(is_going_round)
        for queue in ("q", "r"):
            client.ask(spec.Queue.Delete(queue=queue), spec.Queue.DeleteOk)
        wait_until(lambda: not broker._call(is_going_round))


def test_no_buffer_of_a_client_outgrows_its_room(broker: Broker) -> None:
    """One that sends and sends, and reads nothing, is not read from."""
    with RawClient.opened(broker.port) as client:
        client.open_channel()
        client.ask(spec.Queue.Declare(queue="echo", exclusive=True), spec.Queue.DeclareOk)
        client.send(wire.message("echo", bytes(100_000)))
        ask = method(spec.Basic.Get(queue="echo"), 1) + method(spec.Basic.Nack(0, True), 1)
        _send_until_it_waits(client, ask * 1000)

        def sizes(server: Any) -> list[tuple[int, int]]:
            return [
                (len(each._reader), each._outgoing_size + each._unwritten)
                for each in server.node.connections
            ]

        found: Any = broker._call(sizes)
        ((incoming, outgoing),) = found
        assert ROOM <= incoming < 2 * ROOM
        assert ROOM <= outgoing < 2 * ROOM
        assert_serves(broker.port)
        for _ in range(300):  # much more than buffers hold: all goes on
            client.expect(spec.Basic.GetOk)
            assert 100_000 == client.receive().body_size
            assert 100_000 == len(client.receive().fragment)
