# SPDX-License-Identifier: MIT
"""How a stream is cut into frames, and what is made of hostile ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pika import amqp_object, spec

from postage.broker import erlang, frames
from postage.broker.errors import Refusal
from postage.broker.frames import Frame, FrameReader
from tests.broker.wire import HEARTBEAT, body, frame, header, method, short

#: Every method that a client sends, with arguments that are unlike each other.
METHODS: tuple[amqp_object.Method, ...] = (
    spec.Connection.StartOk({"product": "é"}, "PLAIN", "\0u\0p", "en_US"),
    spec.Connection.SecureOk("secret"),
    spec.Connection.TuneOk(1, 4096, 3),
    spec.Connection.Open("vhost"),
    spec.Connection.Close(200, "bye", 1, 2),
    spec.Connection.CloseOk(),
    spec.Channel.Open(),
    spec.Channel.Flow(True),
    spec.Channel.Close(200, "bye", 1, 2),
    spec.Channel.CloseOk(),
    spec.Exchange.Declare(0, "e", "topic", durable=True, arguments={"a": 1}),
    spec.Exchange.Delete(0, "e", if_unused=True),
    spec.Exchange.Bind(0, "to", "from", "key", arguments={"a": 1}),
    spec.Exchange.Unbind(0, "to", "from", "key", nowait=True, arguments={"a": 1}),
    spec.Queue.Declare(0, "q" * 255, exclusive=True, arguments={"a": 1}),
    spec.Queue.Bind(0, "q", "e", "key", arguments={"a": 1}),
    spec.Queue.Unbind(0, "q", "e", "key", arguments={"a": 1}),
    spec.Queue.Purge(0, "q", nowait=True),
    spec.Queue.Delete(0, "q", if_empty=True),
    spec.Basic.Qos(0, 7, True),
    spec.Basic.Consume(0, "q", "tag", exclusive=True, arguments={"x-priority": 1}),
    spec.Basic.Cancel("tag", True),
    spec.Basic.Publish(0, "e", "key", mandatory=True),
    spec.Basic.Get(0, "q", no_ack=True),
    spec.Basic.Ack(2**64 - 1, True),
    spec.Basic.Nack(1, False, True),
    spec.Basic.Reject(1, True),
    spec.Basic.Recover(True),
    spec.Basic.RecoverAsync(True),
    spec.Confirm.Select(True),
)
each_method = pytest.mark.parametrize("value", METHODS, ids=lambda value: str(value.NAME))

#: A stream with frames of all kinds, and what it is cut into.
STREAM = method(spec.Channel.Open(), 7) + header(3) + body(b"abc") + HEARTBEAT
FRAMES = [
    Frame(1, 7, b"\0\x14\0\x0a\0"),
    Frame(2, 1, b"\0\x3c\0\0" + b"\0" * 7 + b"\3\0\0"),
    Frame(3, 1, b"abc"),
    Frame(8, 0, b""),
]


def payload_of(value: amqp_object.Method) -> bytes:
    return method(value)[7:-1]


def refused(function: Callable[[], Any]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        function()
    return caught.value


def declare(name: bytes = b"q", table: bytes = b"") -> bytes:
    """Return the payload of queue.declare with a table that may be broken."""
    return b"\0\x32\0\x0a\0\0" + short(name) + b"\0" + struct.pack(">I", len(table)) + table


def nested(levels: int) -> bytes:
    """Return the content of a table that holds a table, and so on."""
    sizes = range(7 * (levels - 1), -1, -7)
    return b"".join(b"\1aF" + struct.pack(">I", size) for size in sizes)


# Frames in


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
@example([*range(len(STREAM))])
def test_frames_are_the_same_in_whatever_pieces_they_come(cuts: list[int]) -> None:
    """Whole, byte by byte, and in any other pieces."""
    reader = FrameReader(4096)
    found: list[Frame] = []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(STREAM)], strict=True):
        reader.feed(STREAM[start:end])
        found += reader.frames()
    assert FRAMES == found
    assert 0 == len(reader)


def test_what_follows_stays_for_the_next_time() -> None:
    """The beginning of a frame is kept until its end comes."""
    reader = FrameReader(4096)
    reader.feed(STREAM + STREAM[:11])
    assert FRAMES == list(reader.frames())
    assert 11 == len(reader)
    reader.feed(STREAM[11:])
    assert FRAMES == list(reader.frames())


def test_reading_can_stop_between_two_frames() -> None:
    """A client that is not heard for a while loses nothing."""
    reader = FrameReader(4096)
    reader.feed(STREAM)
    incoming = reader.frames()
    assert FRAMES[0] == next(incoming)
    incoming.close()
    assert FRAMES[1:] == list(reader.frames())


def test_the_greeting_is_taken_as_bytes() -> None:
    """It is no frame, and may come in pieces or with frames behind it."""
    reader = FrameReader(4096)
    reader.feed(b"AMQP\0\0")
    assert None is reader.take(8)
    reader.feed(b"\x09\x01" + STREAM)
    assert b"AMQP\0\0\x09\x01" == reader.take(8)
    assert FRAMES == list(reader.frames())


def test_a_frame_may_be_as_large_as_agreed() -> None:
    """One octet more is refused from its first seven octets, before the rest has come."""
    reader = FrameReader(4096 + frames.OVERHEAD)
    reader.feed(frame(3, 1, bytes(4096)))
    assert [Frame(3, 1, bytes(4096))] == list(reader.frames())
    reader.feed(frame(3, 1, bytes(4097))[:7])
    refusal = refused(lambda: list(reader.frames()))
    assert (501, True) == (refusal.code, refusal.closes_connection)
    assert "type 3, all octets = <<>>: {frame_too_large,4097,4088}" == refusal.text


def test_a_frame_ends_with_its_end() -> None:
    """Else the stream is out of step."""
    reader = FrameReader(4096)
    reader.feed(STREAM + frame(1, 0, b"abc", end=b"\xcd"))
    found: list[Frame] = []
    words = 'type 1, all octets = <<"abc">>: {invalid_frame_end_marker,205}'
    with pytest.raises(Refusal, match=words):
        for each in reader.frames():
            found.append(each)
    assert FRAMES == found


@pytest.mark.parametrize("step", [1, 5, 10_000])
def test_after_a_broken_frame_only_close_ok_is_heard(step: int) -> None:
    """All else is thrown away, so that nobody can fill the buffer."""
    reader = FrameReader(4096)
    reader.feed(frame(1, 0, b"abc", end=b"\xcd"))
    refused(lambda: list(reader.frames()))
    rest = STREAM * 100 + method(spec.Connection.CloseOk())
    found: list[Frame] = []
    for start in range(0, len(rest), step):
        reader.feed(rest[start : start + step])
        found += reader.frames()
        assert len(reader) < 12
    assert [Frame(1, 0, b"\0\x0a\0\x33")] == found


@given(st.binary(max_size=200))
def test_random_bytes_are_frames_or_are_refused(data: bytes) -> None:
    """Nothing else can happen, and no octet is made up."""
    reader = FrameReader(4096)
    reader.feed(data)
    found: list[bytes] = []
    try:
        for each in reader.frames():
            found.append(frame(*each))
    except Refusal as refusal:
        assert 501 == refusal.code
    assert data.startswith(b"".join(found))


# Methods in


@each_method
def test_a_method_is_read_as_pika_wrote_it(value: amqp_object.Method) -> None:
    """All arguments but tables, which stay encoded."""
    read = frames.decode_method(payload_of(value))
    assert type(value) is type(read)
    for name, written in vars(value).items():
        if name == "response":
            written = written.encode()
        if name != "arguments":
            assert written == getattr(read, name), name


@pytest.mark.parametrize("value", [each for each in METHODS if hasattr(each, "arguments")])
def test_the_table_of_a_method_stays_encoded(value: Any) -> None:
    """The types of its values matter."""
    ((name, number),) = value.arguments.items()
    table = frames.arguments_of(type(value), payload_of(value))
    assert {name: b"I" + struct.pack(">i", number)} == table


def test_every_method_that_a_client_may_send_is_there() -> None:
    """But for class access, which RabbitMQ keeps for clients of AMQP 0-8."""
    answers = ("Start", "Secure", "Tune", "Blocked", "Unblocked", "Return", "Deliver", "GetEmpty")
    kinds: list[type[Any]] = [*spec.methods.values()]
    theirs = {
        kind
        for kind in kinds
        if not kind.NAME.startswith(("Access.", "Tx."))
        and not (kind.NAME.endswith("Ok") and kind.NAME.split(".")[0] != "Connection")
        and not kind.NAME.endswith(answers)
    }
    theirs |= {spec.Channel.CloseOk}
    theirs -= {spec.Connection.OpenOk, spec.Connection.UpdateSecretOk}
    known = {type(value) for value in METHODS} | {spec.Connection.UpdateSecret}
    assert theirs == known


@each_method
def test_a_method_that_is_cut_off_is_refused(value: amqp_object.Method) -> None:
    """Wherever it is cut: pika itself takes a short string that ends too early."""
    payload = payload_of(value)
    for end in range(len(payload)):
        refusal = refused(partial(frames.decode_method, payload[:end]))
        assert 501 == refusal.code


@each_method
def test_a_method_with_something_behind_it_is_refused(value: amqp_object.Method) -> None:
    """RabbitMQ, too, takes no more than there has to be."""
    payload = payload_of(value) + b"\0"
    refusal = refused(lambda: frames.decode_method(payload))
    words = f"cannot decode {erlang.binary(payload[4:])}"
    assert (501, words) == (refusal.code, refusal.text)


@each_method
def test_no_short_string_is_anything_but_utf_8(value: amqp_object.Method) -> None:
    """Only basic.publish may have others, as with RabbitMQ."""
    texts = [name for name, text in vars(value).items() if isinstance(text, str)]
    for name in {*texts} - {"response", "ticket"}:
        before = getattr(value, name)
        setattr(value, name, b"\xff")
        payload = payload_of(value)
        setattr(value, name, before)
        if isinstance(value, spec.Basic.Publish):
            assert "\udcff" == getattr(frames.decode_method(payload), name)
        else:
            refusal = refused(partial(frames.decode_method, payload))
            assert (501, "Malformed UTF-8 in shortstr") == (refusal.code, refusal.text)


def test_the_methods_of_the_broker_itself_are_not_read() -> None:
    """They are refused by their kind, whatever their arguments are."""
    assert isinstance(frames.decode_method(b"\0\x3c\0\x3c" + b"\xff"), spec.Basic.Deliver)


def test_a_new_secret_is_read() -> None:
    """pika can write this method, and not make it without arguments."""
    value = spec.Connection.UpdateSecret("secret", "because")
    read: Any = frames.decode_method(payload_of(value))
    assert "because" == read.reason


@pytest.mark.parametrize("payload", [b"", b"\0\x3c\0"])
def test_a_method_frame_without_a_method_is_refused(payload: bytes) -> None:
    """Its first four octets say which it is."""
    assert 501 == refused(lambda: frames.decode_method(payload)).code


@pytest.mark.parametrize("payload", [b"\0\x63\0\x63", b"\0\x3c\0\xfa"])
def test_an_unknown_method_is_refused(payload: bytes) -> None:
    """RabbitMQ hangs up without a word."""
    refusal = refused(lambda: frames.decode_method(payload))
    assert (540, True) == (refusal.code, refusal.closes_connection)
    assert refusal.text.startswith("unknown method ")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (b"\1aQ", "the table of Queue.Declare: the field at 15 has the unknown type b'Q'"),
        (b"\1ad\x7f\xf8" + bytes(6), "the number at 15 is not finite"),
        (b"\1aF\0\0\0\1\0", "the field at 21 is cut off"),
    ],
)
def test_a_table_that_is_broken_inside_is_refused(table: bytes, words: str) -> None:
    """A client that is sent it later may fail. RabbitMQ hangs up without a word."""
    refusal = refused(lambda: frames.decode_method(declare(table=table)))
    assert 502 == refusal.code
    assert refusal.text.endswith(words)


def test_tables_may_be_nested_as_deeply_as_a_frame_allows() -> None:
    """pika's own decoder, and Python's stack, would not take it."""
    table = nested(18_000)
    assert len(table) < 131_000
    read: Any = frames.decode_method(declare(table=table))
    assert "q" == read.queue
    assert 1 == len(frames.arguments_of(spec.Queue.Declare, declare(table=table)))


def test_what_a_client_says_about_itself_may_be_anything() -> None:
    """Its first level and the capabilities in it are read, what is deeper stays encoded."""
    table = nested(18_000) + b"\1bT" + b"\xff" * 8 + b"\1cF\0\0\0\4\1dt\1"
    rest = short(b"PLAIN") + b"\0\0\0\1x" + short(b"en_US")
    payload = b"\0\x0a\0\x0b" + struct.pack(">I", len(table)) + table + rest
    read: Any = frames.decode_method(payload)
    said = read.client_properties
    assert (2**64 - 1, {"d": True}) == (said["b"], said["c"])
    assert isinstance(said["a"]["a"], bytes)


@given(st.sampled_from(METHODS), st.data())
def test_octets_that_are_wrong_give_a_method_or_a_refusal(
    value: amqp_object.Method, data: st.DataObject
) -> None:
    """Nothing else may come out, since anything else is taken for an error of the broker."""
    payload = bytearray(payload_of(value) + b"\0")
    for place in data.draw(st.lists(st.integers(4, len(payload) - 1), max_size=4)):
        payload[place] = data.draw(st.integers(0, 255))
    try:
        frames.decode_method(bytes(payload[: data.draw(st.integers(4, len(payload)))]))
    except Refusal as refusal:
        assert refusal.code in (501, 502)


@given(st.binary(max_size=60))
def test_random_octets_give_a_method_or_a_refusal(payload: bytes) -> None:
    """Whatever class and method they seem to name."""
    try:
        frames.decode_method(payload)
    except Refusal as refusal:
        assert refusal.code in (501, 502, 540)


# Other frames in


def test_a_frame_of_a_method_gives_the_method() -> None:
    """The others give None."""
    assert isinstance(frames.method_of(FRAMES[0]), spec.Channel.Open)
    assert [None, None, None] == [frames.method_of(each) for each in FRAMES[1:]]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (Frame(0, 1, b""), 501),
        (Frame(4, 1, b"abc"), 501),
        (Frame(255, 0, b""), 501),
        (Frame(8, 0, b"x"), 501),
        (Frame(8, 1, b""), 505),
    ],
)
def test_a_frame_of_no_known_kind_is_refused(wrong: Frame, code: int) -> None:
    """A heartbeat belongs to no channel and says nothing."""
    assert code == refused(lambda: frames.method_of(wrong)).code


def test_a_content_header_says_class_size_and_properties() -> None:
    """The properties stay encoded."""
    payload = header(2**64 - 1, b"\x80\0\1x", class_id=60)[7:-1]
    assert (60, 2**64 - 1, b"\x80\0\1x") == frames.decode_content_header(payload)


def test_a_content_header_that_is_cut_off_is_refused() -> None:
    """There are at least the flags of the properties."""
    payload = header(1)[7:-1]
    for end in range(len(payload)):
        refusal = refused(partial(frames.decode_content_header, payload[:end]))
        assert 501 == refusal.code


def test_a_content_header_has_no_weight() -> None:
    """AMQP 0-9-1, section 4.2.6.1: the weight is unused, and must be zero."""
    payload = b"\0\x3c\0\1" + bytes(10)
    assert 505 == refused(lambda: frames.decode_content_header(payload)).code


# Frames out


@each_method
def test_a_method_is_written_as_pika_writes_it(value: amqp_object.Method) -> None:
    """The codec is that of pika."""
    assert method(value, 5) == frames.method(5, value)


def test_names_that_are_no_utf_8_are_written_as_they_came() -> None:
    """They come from basic.publish, and leave in basic.return and basic.get-ok."""
    written = frames.method(1, spec.Basic.Return(312, "NO_ROUTE", "\udcff", "é"))
    assert method(spec.Basic.Return(312, "NO_ROUTE", b"\xff", "é"), 1) == written


@given(st.integers(0, 65535), st.integers(0, 2**64 - 1), st.booleans(), st.text(max_size=60))
def test_a_delivery_is_written_as_pika_writes_it(
    channel: int, tag: int, redelivered: bool, text: str
) -> None:
    """It is written by hand since that is five times as fast."""
    address = frames.short_string("e") + frames.short_string(text)
    written = frames.deliver(channel, frames.short_string("c"), tag, redelivered, address)
    assert method(spec.Basic.Deliver("c", tag, redelivered, "e", text), channel) == written


@pytest.mark.parametrize("size", [0, 1, 4087, 4088, 4089, 8176, 8177, 20_000])
def test_a_body_is_cut_into_frames_of_the_agreed_size(size: int) -> None:
    """And comes together again."""
    data = bytes(range(256)) * 80
    written = bytearray(b"".join(frames.content(3, b"\0\0", data[:size], 4096)))
    reader = FrameReader(4096)  # which takes none that is larger
    reader.feed(bytes(written))
    first, *pieces = reader.frames()
    assert (2, 3, (60, size, b"\0\0")) == (*first[:2], frames.decode_content_header(first[2]))
    assert data[:size] == b"".join(piece.payload for piece in pieces)
    assert {(3, 3)} >= {piece[:2] for piece in pieces}


def test_a_short_string_has_255_octets_at_most() -> None:
    """What is longer, such as a name in a header, is cut."""
    assert b"\0" == frames.short_string("")
    assert b"\xff" + b"x" * 255 == frames.short_string("x" * 300)
    assert b"\1\xff" == frames.short_string("\udcff")
