# SPDX-License-Identifier: MIT
"""The short way through pika: it must not be told from the long one, whatever comes."""

from __future__ import annotations

import datetime
import decimal
import logging
import ssl
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pika
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pika import frame, spec
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils import io_services_utils
from pika.callback import CallbackManager
from pika.channel import Channel

from postage.transport import frames, wire
from postage.transport.wire import Wire
from tests.certificates import Certificates
from tests.rabbitmq_node import HOST
from tests.transport.test_tls import TlsNode, certificates
from tests.transport.test_tls import node as tls_node

__all__ = ["certificates", "tls_node"]  # fixtures

#: Seconds after which messages that have to come count as missing.
DEADLINE = 60.0
CHANNEL, OTHER_CHANNEL, NO_CHANNEL = 1, 2, 9
TAG, CANCELLED, NO_TAG = "postage-1-queue", "cancelled", "nobody's"


class Peer:
    """A connection without a socket, and what it does.

    Args:
        make: The class of the connection.
    """

    def __init__(self, make: Callable[..., pika.SelectConnection]) -> None:
        self.seen: list[Any] = []
        self.sent: list[bytes] = []
        self.loop = IOLoop()
        self.connection = make(
            pika.ConnectionParameters(heartbeat=0),
            custom_ioloop=self.loop,
            internal_connection_workflow=False,
        )
        self.connection._proto_connection_made(self)
        start = spec.Connection.Start(
            server_properties={"capabilities": {"basic.nack": True, "publisher_confirms": True}},
            mechanisms="PLAIN",
            locales="en_US",
        )
        self.answer(0, start, spec.Connection.Tune(2047, 131_072, 0), spec.Connection.OpenOk(""))
        self.channels = [self.open(number) for number in (CHANNEL, OTHER_CHANNEL)]

    def open(self, number: int) -> Channel:
        channel = self.connection.channel(number)
        self.answer(number, spec.Channel.OpenOk())
        channel.confirm_delivery(lambda got: self.note("confirm", number, got))
        self.answer(number, spec.Confirm.SelectOk())
        channel.add_on_return_callback(lambda *got: self.note("return", number, *got[1:]))
        channel.add_on_close_callback(lambda _channel, why: self.note("closed", number, repr(why)))
        for tag in (TAG, CANCELLED):
            channel.basic_consume(
                "queue", lambda *got: self.note("deliver", number, *got[1:]), consumer_tag=tag
            )
            self.answer(number, spec.Basic.ConsumeOk(tag))
        channel.basic_cancel(CANCELLED, callback=lambda _ok: None)
        return channel

    def note(self, *what: Any) -> None:
        self.seen.append((*what, self.connection.bytes_received, self.connection.frames_received))

    def answer(self, number: int, *methods: Any) -> None:
        for method in methods:
            self.connection._proto_data_received(frame.Method(number, method).marshal())

    def feed(self, pieces: Iterable[bytes]) -> list[Any]:
        """Receive pieces until one is an error, as pika's transport does. Returns all."""
        for piece in pieces:
            try:
                self.connection._proto_data_received(piece)
            except Exception as error:
                self.seen.append((type(error), str(error)))
                break
        self.note("end", self.connection.connection_state, list(self.sent))
        return self.seen

    def close(self) -> None:
        self.loop.close()

    # ------------------------------------------------ what pika's transport would be

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def abort(self) -> None:
        self.seen.append("abort")

    def get_write_buffer_size(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What pika says of bad frames, many times over, is not to be read."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def both(pieces: list[bytes]) -> tuple[list[Any], list[Any]]:
    """Return what pika's connection makes of some pieces, and what ours does."""
    results = []
    for make in (pika.SelectConnection, Wire):
        peer = Peer(make)
        try:
            results.append(peer.feed(pieces))
        finally:
            peer.close()
    return results[0], results[1]


def message(
    method: Any, properties: pika.BasicProperties, body: bytes, number: int = CHANNEL, size: int = 0
) -> bytes:
    """Return the frames of a message, its body in frames of a size, or in one."""
    parts = [frame.Method(number, method), frame.Header(number, len(body), properties)]
    for start in range(0, len(body), size or len(body) or 1):
        parts.append(frame.Body(number, body[start : start + (size or len(body))]))
    return b"".join(part.marshal() for part in parts)


def delivery(body: bytes = b"body", **properties: Any) -> bytes:
    """Return the frames of a delivery."""
    method = spec.Basic.Deliver(TAG, 1, False, "exchange", "key")
    return message(method, pika.BasicProperties(**properties), body)


texts = st.text(max_size=20)
shorts = st.one_of(texts, st.text(alphabet="é", min_size=100, max_size=127))
scalars = st.one_of(
    texts,
    st.booleans(),
    st.none(),
    st.binary(max_size=20),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**31), 2**31 - 1).map(pika.compat.long),
    st.decimals(-1000, 1000, places=2).map(decimal.Decimal.normalize),
    st.datetimes(datetime.datetime(1971, 1, 1), datetime.datetime(2100, 1, 1)).map(
        lambda when: when.replace(microsecond=0, tzinfo=datetime.timezone.utc)
    ),
)
tables = st.dictionaries(
    texts,
    st.recursive(
        scalars, lambda some: st.lists(some, max_size=3) | st.dictionaries(texts, some, max_size=3)
    ),
    max_size=4,
)
octets = st.integers(0, 255)
properties = st.builds(
    pika.BasicProperties,
    **{
        name: st.none()
        | {"headers": tables, "timestamp": st.integers(0, 2**64 - 1)}.get(
            name, octets if name in ("delivery_mode", "priority") else shorts
        )
        for name in vars(pika.BasicProperties())
    },
)
bodies = st.one_of(st.just(b""), st.binary(max_size=50), st.just(b"\xce" * 300))
numbers = st.sampled_from([CHANNEL, CHANNEL, CHANNEL, OTHER_CHANNEL, NO_CHANNEL, 0])
tags = st.integers(0, 2**64 - 1)
delivered = st.builds(
    spec.Basic.Deliver,
    st.sampled_from([TAG, TAG, TAG, CANCELLED, NO_TAG]),
    tags,
    st.booleans(),
    shorts,
    shorts,
)
messages = st.builds(
    message,
    st.one_of(
        delivered,
        delivered,
        st.builds(spec.Basic.Return, st.integers(0, 65535), texts, texts, texts),
        st.builds(spec.Basic.GetOk, tags, st.booleans(), texts, texts, st.integers(0, 9)),
    ),
    properties,
    bodies,
    numbers,
    st.sampled_from([0, 0, 0, 7]),
)
methods = st.builds(
    lambda number, method: frame.Method(number, method).marshal(),
    numbers,
    st.one_of(
        st.builds(spec.Basic.Ack, tags, st.booleans()),
        st.builds(spec.Basic.Ack, tags, st.booleans()),
        st.builds(spec.Basic.Nack, tags, st.booleans(), st.booleans()),
        st.builds(spec.Basic.Cancel, st.sampled_from([TAG, NO_TAG])),
        st.builds(spec.Basic.CancelOk, st.sampled_from([CANCELLED, NO_TAG])),
        st.builds(spec.Channel.Close, st.integers(0, 999), texts, st.just(0), st.just(0)),
        st.builds(spec.Channel.Flow, st.booleans()),
        st.builds(spec.Connection.Blocked, texts),
        delivered,  # and no content comes
    ),
)
others = st.one_of(
    st.just(frame.Heartbeat().marshal()),
    st.just(frame.ProtocolHeader().marshal()),
    st.builds(lambda number, body: frame.Body(number, body).marshal(), numbers, bodies),
    st.builds(
        lambda number, size, some: frame.Header(number, size, some).marshal(),
        numbers,
        st.integers(0, 60),
        properties,
    ),
)
good = st.lists(st.one_of(messages, messages, messages, methods), max_size=8).map(b"".join)
odd = st.lists(st.one_of(messages, messages, methods, others), max_size=8).map(b"".join)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return good frames with something wrong anywhere."""
    whole = bytearray(draw(odd))
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.integers(0, len(whole)))
        how = draw(st.integers(0, 2))
        if how == 0:
            whole[where : where + 1] = draw(st.binary(min_size=1, max_size=1))
        elif how == 1:
            whole[where:where] = draw(st.binary(max_size=8))
        else:
            del whole[where : where + draw(st.integers(1, 8))]
    return bytes(whole)


@st.composite
def pieces(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> list[bytes]:
    """Return bytes as a socket may give them."""
    left = draw(whole)
    cuts = sorted(draw(st.lists(st.integers(0, len(left)), max_size=6)))
    parts = [left[start:end] for start, end in zip([0, *cuts], [*cuts, len(left)], strict=True)]
    return [part for part in parts if part]  # a transport never gives nothing


def test_this_pika_is_built_as_the_short_way_expects() -> None:
    """Else a new version of pika would silently be slow: then `wire` is to be adapted."""
    assert wire.FITS
    peer = Peer(Wire)
    try:
        assert peer.connection.fits  # type: ignore[attr-defined]
    finally:
        peer.close()
    assert hasattr(io_services_utils._AsyncTransportBase, "_MAX_RECV_BYTES")
    assert hasattr(io_services_utils._AsyncTransportBase, "_MAX_CONSUME_BYTES")


@settings(deadline=None, max_examples=150)
@given(pieces(good))
def test_messages_and_confirms_arrive_as_pika_delivers_them(some: list[bytes]) -> None:
    """The same callbacks in the same order with equal arguments, and the same counters."""
    expected, got = both(some)
    assert expected == got
    assert [[type(each) for each in one] for one in expected] == [
        [type(each) for each in one] for one in got
    ]


@settings(deadline=None, max_examples=150)
@given(pieces(odd))
def test_frames_in_the_wrong_place_are_treated_as_by_pika(some: list[bytes]) -> None:
    """A content without a method, a header of nobody, a body too long."""
    expected, got = both(some)
    assert expected == got


@settings(deadline=None, max_examples=250)
@given(pieces(damaged()))
@example([delivery()[:-1] + b"\0"])
@example([delivery(headers={"a": 1}).replace(b"I\0\0\0\1", b"?\0\0\0\1")])
@example([delivery(app_id="name").replace(b"\x04name", b"\x04na\xffe")])
@example([delivery(app_id="name").replace(b"\x04name", b"\xffname")])
@example([struct.pack(">BHI", 1, CHANNEL, 0) + b"\xce"])
@example([b"AMQ", b"P", b"\0\0\x09", b"\1"])
def test_damaged_frames_are_errors_as_of_pika(some: list[bytes]) -> None:
    """And what came before them was delivered."""
    expected, got = both(some)
    assert expected == got


@settings(deadline=None, max_examples=150)
@given(st.lists(st.binary(min_size=1, max_size=60), max_size=5))
def test_noise_is_treated_as_by_pika(some: list[bytes]) -> None:
    """Waited for, or an error, as it is taken for the head of a frame."""
    expected, got = both(some)
    assert expected == got


def test_a_large_body_may_come_in_many_pieces() -> None:
    """In frames of the size that RabbitMQ makes, and read in parts of them."""
    body = bytes(range(256)) * 1200
    method = spec.Basic.Deliver(TAG, 1, False, "", "key")
    whole = message(method, pika.BasicProperties(), body, size=131_064) + delivery()
    expected, got = both([whole[at : at + 4096] for at in range(0, len(whole), 4096)])
    assert expected == got
    assert [body, b"body"] == [each[4] for each in got if each[0] == "deliver"]


@pytest.mark.parametrize("make", [pika.SelectConnection, Wire])
def test_what_a_callback_raises_loses_nothing_that_was_read_behind_it(
    make: Callable[..., pika.SelectConnection],
) -> None:
    """The transport sees it, in pika and here."""

    def refuse(*_args: Any) -> None:
        raise ValueError("refused")

    peer = Peer(make)
    try:
        consumers = peer.channels[0]._consumers
        consumers[TAG] = refuse
        with pytest.raises(ValueError, match="refused"):
            peer.connection._proto_data_received(delivery() + delivery(b"second"))
        consumers[TAG] = lambda *got: peer.seen.append(got[3])
        peer.connection._proto_data_received(delivery(b"third"))
        assert [b"second", b"third"] == peer.seen
    finally:
        peer.close()


def test_deliveries_and_confirms_do_not_pass_the_decoder_of_pika(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if they are read together, and whatever their headers are."""
    peer = Peer(Wire)
    monkeypatch.setattr(frame, "decode_frame", None)
    headers = {"a": "b", "c": 2**40, "d": True, "e": [None, {"f": decimal.Decimal(1)}]}
    ack = frame.Method(CHANNEL, spec.Basic.Ack(3, True)).marshal()
    try:
        peer.feed([delivery(headers=headers) + ack + delivery(b"", app_id="name") + ack])
        assert ["deliver", "confirm", "deliver", "confirm", "end"] == [
            each[0] for each in peer.seen
        ]
    finally:
        peer.close()


def test_without_the_seams_everything_goes_the_way_of_pika(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pika that is built otherwise is slower, and no error."""
    monkeypatch.setattr(wire, "FITS", False)
    monkeypatch.setattr(frames, "decode_delivery", None)
    whole = delivery() * 3
    expected, got = both([whole[:50], whole[50:]])
    assert expected == got
    assert 3 == len([each for each in got if each[0] == "deliver"])


@pytest.mark.parametrize(
    "change",
    [
        (Channel, "__init__", lambda self, *_args: None),
        (spec.Basic.Deliver, "__init__", lambda self, *args: vars(self).update(args=args)),
        (CallbackManager, "add", lambda *_args: None),
        (spec.Basic.Publish, "encode", lambda _self: [b"new"]),
    ],
    ids=["a channel", "a method", "the callbacks", "the encoding"],
)
def test_a_pika_that_is_built_otherwise_is_noticed(
    monkeypatch: pytest.MonkeyPatch, change: tuple[Any, str, Any]
) -> None:
    """Whatever of its private parts has changed."""
    monkeypatch.setattr(*change)
    assert not wire._fits()


# ------------------------------------------------------------------------- publishing

anything = st.one_of(shorts, st.none(), st.integers(), st.binary(max_size=5), st.text(min_size=200))
bad_properties = st.builds(
    pika.BasicProperties,
    **{
        name: st.one_of(st.none(), anything, st.dictionaries(anything, anything, max_size=2))
        for name in vars(pika.BasicProperties())
    },
)
publishings = st.tuples(
    st.one_of(shorts, shorts, anything),
    st.one_of(shorts, shorts, anything),
    st.one_of(bodies, bodies, texts),
    st.one_of(st.none(), properties, properties, bad_properties),
    st.booleans(),
)


def written(
    make: Callable[..., pika.SelectConnection], writes: Iterable[Callable[[Peer], Any]]
) -> list[Any]:
    """Return what a connection sends, and what it raises meanwhile."""
    peer = Peer(make)
    try:
        errors = []
        for write in writes:
            try:
                write(peer)
            except Exception as error:
                errors.append((type(error), str(error)))
        connection = peer.connection
        return [b"".join(peer.sent), connection.bytes_sent, connection.frames_sent, errors]
    finally:
        peer.close()


def publishing(*what: Any) -> Callable[[Peer], None]:
    """Return a publishing, to be done on a peer."""
    return lambda peer: peer.channels[0].basic_publish(*what)


@settings(deadline=None, max_examples=100)
@given(
    content_type=st.none() | shorts,
    delivery_mode=octets,
    message_id=shorts,
    timestamp=st.integers(0, 2**64 - 1),
    app_id=st.none() | shorts,
)
def test_plain_properties_are_encoded_as_by_pika(**values: Any) -> None:
    """Also those that begin or end with nothing."""
    expected = b"".join(pika.BasicProperties(**values).encode())
    assert expected == frames.encode_plain_properties(**values)


@settings(deadline=None, max_examples=300)
@given(st.lists(publishings, max_size=5))
def test_what_is_published_has_the_bytes_that_pika_would_send(some: list[Any]) -> None:
    """Or the error that pika raises, and then nothing is sent."""
    writes = [publishing(*each) for each in some]
    expected, got = written(pika.SelectConnection, writes), written(Wire, writes)
    assert expected == got


@settings(deadline=None, max_examples=100)
@given(shorts, shorts, bodies, properties, st.booleans())
def test_properties_may_be_encoded_before(
    exchange: str, key: str, body: bytes, some: pika.BasicProperties, mandatory: bool
) -> None:
    """Once for a message that goes to many addresses."""
    encoded = frames.encode_properties(some)
    expected = written(pika.SelectConnection, [publishing(exchange, key, body, some, mandatory)])
    assert expected == written(Wire, [publishing(exchange, key, body, encoded, mandatory)])


@settings(deadline=None, max_examples=300)
@given(properties, st.booleans())
def test_properties_may_be_the_keywords_of_pika(
    some: pika.BasicProperties, in_order: bool
) -> None:
    """They are encoded alike, or with the same error, also if they are not in their order."""
    names = list(vars(some)) if in_order else sorted(vars(some), reverse=True)
    keywords = {name: getattr(some, name) for name in names}
    expected, got = (encoded_or_error(each) for each in (some, keywords))
    assert expected == got


def encoded_or_error(some: pika.BasicProperties | dict[str, Any]) -> object:
    """Return properties as they are written, or why they cannot be."""
    try:
        return frames.encode_properties(some)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("length", [131_063, 131_064, 131_065, 262_128, 262_129, 1_000_000])
def test_a_large_body_is_published_in_frames_of_the_agreed_size(length: int) -> None:
    """131,072 bytes, of which a frame itself takes 8."""
    writes = [publishing("", "key", bytes(length), None, True)]
    assert written(pika.SelectConnection, writes) == written(Wire, writes)


@settings(deadline=None, max_examples=50)
@given(st.one_of(tags, st.integers(), texts), st.one_of(st.booleans(), st.none(), st.integers()))
def test_an_acknowledgement_has_the_bytes_that_pika_would_send(tag: Any, multiple: Any) -> None:
    """Or is refused as by pika."""
    writes = [lambda peer: peer.channels[0].basic_ack(tag, multiple)]
    (*expected, errors), (*got, our_errors) = (
        written(make, writes) for make in (pika.SelectConnection, Wire)
    )
    assert expected == got
    assert [kind for kind, _text in errors] == [kind for kind, _text in our_errors]


def closed_by_broker(peer: Peer) -> None:
    peer.answer(CHANNEL, spec.Channel.Close(404, "NOT_FOUND", 0, 0))


@pytest.mark.parametrize(
    "close",
    [
        lambda peer: peer.channels[0].close(),
        closed_by_broker,
        lambda peer: peer.connection.close(),
        lambda peer: peer.connection._on_stream_terminated(ValueError("lost")),
    ],
    ids=["by us", "by the broker", "with the connection", "by a loss"],
)
def test_a_channel_that_is_not_open_refuses_as_in_pika(close: Callable[[Peer], None]) -> None:
    """While it closes, and when it is closed."""
    writes = [
        close,
        publishing("", "key", b"body", None, False),
        lambda peer: peer.channels[0].basic_ack(1),
    ]
    expected, got = written(pika.SelectConnection, writes), written(Wire, writes)
    assert expected == got
    assert 2 == len(got[-1])
    writes[1] = publishing("", "key", b"body", b"\0\0", False)
    assert got == written(Wire, writes)


def test_without_the_seams_messages_are_published_the_way_of_pika(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those with properties that were encoded before."""
    some = pika.BasicProperties(headers={"a": 1}, app_id="name")
    encoded = frames.encode_properties(some)
    monkeypatch.setattr(wire, "FITS", False)
    monkeypatch.setattr(frames, "encode_message", None)
    monkeypatch.setattr(frames, "encode_ack", None)
    publish = publishing("", "key", b"body", some, True)

    def ack(peer: Any) -> None:
        peer.channels[0].basic_ack(1, True)

    expected = written(pika.SelectConnection, [publish, publish, ack])
    assert expected == written(Wire, [publish, publishing("", "key", b"body", encoded, True), ack])


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=100),
            st.integers(1, 200_000).map(lambda length: b"x" * length),
            st.none(),
            st.integers(0, 100_000),
        ),
        max_size=30,
    )
)
def test_what_waits_is_sent_in_order_and_a_retry_never_shrinks(steps: list[Any]) -> None:
    """Whatever the socket takes of it: None is nothing, a number is so many bytes."""
    outgoing = wire.Outgoing()
    put, sent = b"", b""
    tried: bytes = b""
    for step in steps:
        if isinstance(step, bytes):
            outgoing.append(step)
            put += step
        elif outgoing:
            front = outgoing[0]
            assert front.startswith(tried)
            tried = front
            if step:  # as pika's transport does
                chunk = outgoing.popleft()
                assert front is chunk
                sent += chunk[:step]
                if step < len(chunk):
                    outgoing.appendleft(chunk[step:])
                tried = b""
    assert put == sent + b"".join(outgoing)


def test_many_small_entries_are_sent_as_one() -> None:
    """And no more of them than `WRITE_SIZE`, or one that is larger."""
    outgoing = wire.Outgoing([b"x" * 100] * 1000)
    assert wire.WRITE_SIZE <= len(outgoing[0]) < wire.WRITE_SIZE + 100
    assert len(outgoing[0]) == len(outgoing.popleft())
    assert 100_000 - wire.WRITE_SIZE >= len(outgoing[0]) > 0


# ------------------------------------------------------------------------- on a broker


def exchanged(parameters: pika.connection.Parameters, bodies: list[bytes]) -> list[bytes]:
    """Publish messages in one go, consume them, and return them when all are confirmed."""
    got: list[bytes] = []
    confirmed: list[int] = []
    ended: list[Any] = []

    def look() -> None:
        if len(got) == len(bodies) and confirmed and confirmed[-1] == len(bodies):
            connection.close()

    def deliver(channel: Channel, method: Any, _properties: Any, body: bytes) -> None:
        got.append(body)
        channel.basic_ack(method.delivery_tag)
        look()

    def confirm(ok: Any) -> None:
        confirmed.append(ok.method.delivery_tag)
        look()

    def opened(channel: Channel) -> None:
        channel.confirm_delivery(confirm)
        channel.queue_declare("letters")
        channel.basic_consume("letters", deliver)
        for body in bodies:
            channel.basic_publish("", "letters", body, pika.BasicProperties(headers={"a": 1}))

    def closed(_connection: Any, reason: BaseException) -> None:
        ended.append(reason)
        loop.stop()

    loop = IOLoop()
    connection = Wire(
        parameters,
        custom_ioloop=loop,
        on_open_callback=lambda connection: connection.channel(on_open_callback=opened),
        on_open_error_callback=closed,
        on_close_callback=closed,
    )
    assert connection.fits is False  # until there is a transport
    connection._adapter_call_later(DEADLINE, lambda: connection._terminate_stream(TimeoutError()))
    loop.start()
    loop.close()
    assert connection.fits
    assert [pika.exceptions.ConnectionClosedByClient] == [type(each) for each in ended]
    return got


def bodies_of_all_sizes() -> list[bytes]:
    """More than a socket takes at once: small ones in mass, and some of many frames."""
    sizes = [*range(2000), 70_000, 131_064, 5, 131_065, 1_000_000, *range(300), 10_000_000, 1, 0]
    return [bytes([size % 251]) * size for size in sizes]


def test_messages_of_all_sizes_go_to_a_broker_and_back(broker_url: str) -> None:
    """Though the socket takes a part of them at a time."""
    bodies = bodies_of_all_sizes()
    assert bodies == exchanged(pika.URLParameters(broker_url), bodies)


@pytest.mark.rabbitmq
def test_messages_of_all_sizes_go_to_a_broker_and_back_over_tls(
    tls_node: TlsNode, certificates: Certificates
) -> None:
    """OpenSSL wants what it did not take again, with nothing missing."""
    bodies = bodies_of_all_sizes()
    parameters = pika.URLParameters(tls_node.tls_url())
    context = ssl.create_default_context(cafile=certificates.pem("ca"))
    parameters.ssl_options = pika.SSLOptions(context, server_hostname=HOST)
    assert bodies == exchanged(parameters, bodies)
