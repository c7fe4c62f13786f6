# SPDX-License-Identifier: MIT
"""Frames in and out (AMQP 0-9-1, sections 2.3 and 4.2.3). Methods are coded by pika.

A content header is taken apart only as far as the broker has to know it: what a message
carries leaves the broker byte for byte as it came.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import NamedTuple

from pika import amqp_object, spec
from pika import frame as pika_frame

from postage.broker import erlang, fields
from postage.broker.errors import (
    FRAME_ERROR,
    NOT_IMPLEMENTED,
    SYNTAX_ERROR,
    UNEXPECTED_FRAME,
    Refusal,
)

METHOD = spec.FRAME_METHOD
HEADER = spec.FRAME_HEADER
BODY = spec.FRAME_BODY
HEARTBEAT = spec.FRAME_HEARTBEAT

#: Type, channel and size before the payload.
_PREFIX = struct.Struct(">BHI")
#: Class, weight and size of the body before the properties.
_CONTENT = struct.Struct(">HHQ")
_METHOD_INDEX = _SIZE = struct.Struct(">I")
_DELIVER = struct.Struct(">QB")
#: What a frame costs beside its payload.
OVERHEAD = 8
_END = bytes([spec.FRAME_END])

HEARTBEAT_FRAME = pika_frame.Heartbeat().marshal()
#: What the broker speaks, also its answer to any other greeting.
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
#: What a client says at last. After a frame that is broken nothing else can be made out.
_CLOSE_OK = pika_frame.Method(0, spec.Connection.CloseOk()).marshal()
#: The arguments of the methods that clients send: numbers and octets of bits by their sizes,
#: short strings, long strings and tables. Basic.publish is read by itself.
_ARGUMENTS: dict[type[amqp_object.Method], str] = {
    spec.Connection.StartOk: "tsls",
    spec.Connection.SecureOk: "l",
    spec.Connection.TuneOk: "242",
    spec.Connection.Open: "ss1",
    spec.Connection.Close: "2s22",
    spec.Connection.CloseOk: "",
    spec.Connection.UpdateSecret: "ls",
    spec.Channel.Open: "s",
    spec.Channel.Flow: "1",
    spec.Channel.Close: "2s22",
    spec.Channel.CloseOk: "",
    spec.Exchange.Declare: "2ss1t",
    spec.Exchange.Delete: "2s1",
    spec.Exchange.Bind: "2sss1t",
    spec.Exchange.Unbind: "2sss1t",
    spec.Queue.Declare: "2s1t",
    spec.Queue.Bind: "2sss1t",
    spec.Queue.Unbind: "2ssst",
    spec.Queue.Purge: "2s1",
    spec.Queue.Delete: "2s1",
    spec.Basic.Qos: "421",
    spec.Basic.Consume: "2ss1t",
    spec.Basic.Cancel: "s1",
    spec.Basic.Get: "2s1",
    spec.Basic.Ack: "81",
    spec.Basic.Nack: "81",
    spec.Basic.Reject: "81",
    spec.Basic.Recover: "1",
    spec.Basic.RecoverAsync: "1",
    spec.Confirm.Select: "1",
}


#: A class of methods, such as `spec.Basic.Publish`.
Kind = type[amqp_object.Method]


class Frame(NamedTuple):
    """A frame as it came."""

    type: int
    channel: int
    payload: bytes


class FrameReader:
    """Cuts a stream of bytes into frames, whatever the pieces in which it comes.

    Attributes:
        max_size: bytes of the largest frame that is taken, its overhead included.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self._buffer = bytearray()
        self._is_lost = False

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes from the peer."""
        self._buffer += data

    def take(self, size: int) -> bytes | None:
        """Return the next bytes as they are, None if fewer have come."""
        if len(self._buffer) < size:
            return None
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def frames(self) -> Generator[Frame, None, None]:
        """Yield the frames that are complete. It may be left between two frames.

        After a broken one it is unknown where the next begins: then only connection.close-ok is
        looked for, and all else is thrown away.

        Raises:
            Refusal: A frame is too large or does not end where it says.
        """
        if self._is_lost:
            yield from self._close_ok()
            return
        buffer = self._buffer
        start = 0
        try:
            while len(buffer) - start >= OVERHEAD - 1:
                type_, channel, size = _PREFIX.unpack_from(buffer, start)
                if size + OVERHEAD > self.max_size:
                    limit = self.max_size - 2 * OVERHEAD
                    reason = f"{{frame_too_large,{size},{limit}}}"
                    raise self._lost(erlang.frame(type_, b"", reason))
                end = start + size + OVERHEAD
                if len(buffer) < end:
                    return
                if buffer[end - 1] != spec.FRAME_END:
                    reason = f"{{invalid_frame_end_marker,{buffer[end - 1]}}}"
                    broken = bytes(buffer[start + OVERHEAD - 1 : end - 1])
                    raise self._lost(erlang.frame(type_, broken, reason))
                payload = bytes(buffer[start + OVERHEAD - 1 : end - 1])
                start = end
                yield Frame(type_, channel, payload)
        finally:
            del buffer[:start]

    def _lost(self, text: str) -> Refusal:
        self._is_lost = True
        return Refusal(FRAME_ERROR, text)

    def _close_ok(self) -> Generator[Frame, None, None]:
        is_there = _CLOSE_OK in self._buffer
        del self._buffer[: 1 - len(_CLOSE_OK)]
        if is_there:
            yield Frame(METHOD, 0, _CLOSE_OK[OVERHEAD - 1 : -1])


def kind_of(frame: Frame) -> Kind | None:
    """Return the method of which a frame is a part, None if it is of none that is known."""
    if frame.type == BODY or (frame.type == HEADER and len(frame.payload) >= _CONTENT.size + 2):
        return spec.Basic.Publish
    if frame.type != METHOD or len(frame.payload) < _METHOD_INDEX.size:
        return None
    kind: Kind | None = spec.methods.get(_METHOD_INDEX.unpack_from(frame.payload)[0])
    return kind


def method_of(frame: Frame) -> amqp_object.Method | None:
    """Return the method of a frame, None if it is one of the other kinds.

    Raises:
        Refusal: It is of no kind that there is, a heartbeat of a channel, or broken.
    """
    if frame.type == METHOD:
        return decode_method(frame.payload)
    if frame.type not in (HEADER, BODY, HEARTBEAT) or (frame.type == HEARTBEAT and frame.payload):
        raise _unknown(frame.type, frame.payload)
    if frame.type == HEARTBEAT and frame.channel:
        raise Refusal(UNEXPECTED_FRAME, f"type {HEARTBEAT}, all octets = <<>>")
    return None


def decode_method(payload: bytes) -> amqp_object.Method:
    """Return the method of a method frame.

    Its arguments are complete if it is one that clients send. Of tables, only that of
    connection.start-ok is in it: `arguments_of` reads the others.

    Raises:
        Refusal: It is none that AMQP 0-9-1 or RabbitMQ knows, or its arguments are broken.
    """
    if len(payload) < _METHOD_INDEX.size:
        raise _unknown(METHOD, payload)
    (index,) = _METHOD_INDEX.unpack_from(payload)
    kind = spec.methods.get(index)
    if kind is None:
        raise Refusal(NOT_IMPLEMENTED, f"unknown method {index >> 16}.{index & 0xFFFF}")
    if kind is spec.Basic.Publish:
        return _decode_publish(payload)
    method: amqp_object.Method = object.__new__(kind)
    if kind not in _ARGUMENTS:
        return method
    start, end = _check(kind, payload)
    # pika's decoder calls itself for each level of a table, and clients may nest them deeply.
    without_table = payload[:start] + bytes(4) + payload[end:] if end else payload
    method.decode(without_table, _METHOD_INDEX.size)
    if isinstance(method, spec.Connection.StartOk):
        method.client_properties = _plain(fields.split(payload, start)[0])
    return method


def _decode_publish(payload: bytes) -> spec.Basic.Publish:
    # RabbitMQ checks all other short strings, but these two may be no UTF-8.
    try:
        routing_key = 7 + payload[6]
        bits = routing_key + 1 + payload[routing_key]
        if bits + 1 != len(payload):
            raise IndexError
    except IndexError:
        raise _malformed(payload) from None
    return spec.Basic.Publish(
        exchange=payload[7:routing_key].decode("utf-8", "surrogateescape"),
        routing_key=payload[routing_key + 1 : bits].decode("utf-8", "surrogateescape"),
        mandatory=bool(payload[bits] & 1),
        immediate=bool(payload[bits] & 2),
    )


def _check(kind: type[amqp_object.Method], payload: bytes) -> tuple[int, int]:
    """Return where the table of a method begins and ends, or zeros if it has none."""
    offset = _METHOD_INDEX.size
    table = (0, 0)
    try:
        for argument in _ARGUMENTS[kind]:
            if argument == "s":
                end = offset + 1 + payload[offset]
                payload[offset + 1 : end].decode()
                offset = end
            elif argument == "t":
                table = (offset, offset + 4 + _SIZE.unpack_from(payload, offset)[0])
                if table[1] > len(payload):
                    raise IndexError
                fields.split(payload, offset)
                offset = table[1]
            elif argument == "l":
                offset += 4 + _SIZE.unpack_from(payload, offset)[0]
            else:
                offset += int(argument)
    except (IndexError, struct.error):
        raise _malformed(payload) from None
    except UnicodeDecodeError:
        raise Refusal(FRAME_ERROR, "Malformed UTF-8 in shortstr") from None
    except fields.FieldError as error:
        raise Refusal(SYNTAX_ERROR, f"the table of {kind.NAME}: {error}") from error
    if offset != len(payload):
        raise _malformed(payload)
    return table


def _malformed(payload: bytes) -> Refusal:
    return Refusal(FRAME_ERROR, f"cannot decode {erlang.binary(payload[_METHOD_INDEX.size :])}")


def _unknown(type_: int, payload: bytes) -> Refusal:
    return Refusal(FRAME_ERROR, erlang.frame(type_, payload, "unknown_frame"))


def _plain(table: dict[str, bytes]) -> dict[str, object]:
    """Return a table as Python values, and the tables in it likewise, but no deeper ones."""
    return {
        name: {key: fields.decode(value) for key, value in fields.fields_of(field).items()}
        if field[:1] == b"F"
        else fields.decode(field)
        for name, field in table.items()
    }


def decode_content_header(payload: bytes) -> tuple[int, int, bytes]:
    """Return class, size of the body and encoded properties of a content header.

    Raises:
        Refusal: It is too short.
    """
    if len(payload) < _CONTENT.size + 2:
        raise _unknown(HEADER, payload)
    class_id, weight, size = _CONTENT.unpack_from(payload)
    if weight:
        raise Refusal(UNEXPECTED_FRAME, f"a content header has the weight {weight}, expected 0")
    return class_id, size, payload[_CONTENT.size :]


def arguments_of(kind: type[amqp_object.Method], payload: bytes) -> dict[str, bytes]:
    """Return the argument table of a method with its values still encoded.

    Their types matter to RabbitMQ, and pika's decoder does not keep them.

    Args:
        kind: the method, one that has arguments and was decoded from `payload`.
    """
    return fields.split(payload, _check(kind, payload)[0])[0]


def method(channel: int, value: amqp_object.Method) -> bytes:
    """Return the frame of a method."""
    try:
        return pika_frame.Method(channel, value).marshal()
    except UnicodeEncodeError:
        # An exchange or a routing key that is no UTF-8: pika lets bytes pass as they are.
        for name, text in vars(value).items():
            if isinstance(text, str):
                setattr(value, name, text.encode("utf-8", "surrogateescape"))
        return pika_frame.Method(channel, value).marshal()


def deliver(
    channel: int, consumer_tag: bytes, tag: int, redelivered: bool, address: bytes
) -> bytes:
    """Return the frame of basic.deliver, which pika would need five times as long for.

    Args:
        consumer_tag: the encoded short string.
        address: exchange and routing key, as encoded short strings.
    """
    payload = b"".join(
        (b"\x00\x3c\x00\x3c", consumer_tag, _DELIVER.pack(tag, redelivered), address)
    )
    return b"".join((_PREFIX.pack(METHOD, channel, len(payload)), payload, _END))


def content(channel: int, properties: bytes, body: bytes, max_size: int) -> list[bytes]:
    """Return the frames of a content header and its body.

    Args:
        properties: encoded, with their flags.
        max_size: the negotiated size of a frame in bytes.
    """
    header = _CONTENT.pack(spec.Basic.INDEX, 0, len(body)) + properties
    pieces = [_PREFIX.pack(HEADER, channel, len(header)), header, _END]
    room = max_size - OVERHEAD
    for start in range(0, len(body), room):
        part = body[start : start + room] if len(body) > room else body
        pieces += (_PREFIX.pack(BODY, channel, len(part)), part, _END)
    return pieces


def short_string(text: str) -> bytes:
    """Return a short string with its length, cut at 255 bytes."""
    data = text.encode("utf-8", "surrogateescape")[:255]
    return bytes([len(data)]) + data
