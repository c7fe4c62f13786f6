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

from postage.broker import fields
from postage.broker.errors import FRAME_ERROR, NOT_IMPLEMENTED, SYNTAX_ERROR, Refusal

METHOD = spec.FRAME_METHOD
HEADER = spec.FRAME_HEADER
BODY = spec.FRAME_BODY
HEARTBEAT = spec.FRAME_HEARTBEAT

#: Type, channel and size before the payload.
_PREFIX = struct.Struct(">BHI")
#: Class, weight and size of the body before the properties.
_CONTENT = struct.Struct(">HHQ")
_METHOD_INDEX = struct.Struct(">I")
_DELIVER = struct.Struct(">QB")
#: What a frame costs beside its payload.
OVERHEAD = 8
_END = bytes([spec.FRAME_END])

HEARTBEAT_FRAME = pika_frame.Heartbeat().marshal()
#: What the broker speaks, also its answer to any other greeting.
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
#: Where the argument table of a method begins: after two octets, so many short strings and,
#: for most, an octet of bits. The table is the last argument of all of these.
_BEFORE_ARGUMENTS: dict[type[amqp_object.Method], tuple[int, int]] = {
    spec.Exchange.Declare: (2, 1),
    spec.Exchange.Bind: (3, 1),
    spec.Exchange.Unbind: (3, 1),
    spec.Queue.Declare: (1, 1),
    spec.Queue.Bind: (3, 1),
    spec.Queue.Unbind: (3, 0),
    spec.Basic.Consume: (2, 1),
}


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

    def peek(self) -> bytes:
        """Return what has come and was not taken."""
        return bytes(self._buffer)

    def frames(self) -> Generator[Frame, None, None]:
        """Yield the frames that are complete. It may be left between two frames.

        Raises:
            Refusal: A frame is too large or does not end where it says.
        """
        buffer = self._buffer
        start = 0
        try:
            while len(buffer) - start >= OVERHEAD - 1:
                type_, channel, size = _PREFIX.unpack_from(buffer, start)
                if size + OVERHEAD > self.max_size:
                    raise Refusal(
                        FRAME_ERROR,
                        f"type {type_}, {size} octets is larger than the negotiated frame_max "
                        f"of {self.max_size} octets",
                    )
                end = start + size + OVERHEAD
                if len(buffer) < end:
                    return
                if buffer[end - 1] != spec.FRAME_END:
                    raise Refusal(
                        FRAME_ERROR,
                        f"type {type_}, {size} octets does not end with the end of a frame",
                    )
                payload = bytes(buffer[start + OVERHEAD - 1 : end - 1])
                start = end
                yield Frame(type_, channel, payload)
        finally:
            del buffer[:start]


def decode_method(payload: bytes) -> amqp_object.Method:
    """Return the method of a method frame.

    Raises:
        Refusal: It is none that AMQP 0-9-1 or RabbitMQ knows, or its arguments are broken.
    """
    if len(payload) < _METHOD_INDEX.size:
        raise Refusal(SYNTAX_ERROR, "a method frame without a method")
    (index,) = _METHOD_INDEX.unpack_from(payload)
    kind = spec.methods.get(index)
    if kind is None:
        raise Refusal(NOT_IMPLEMENTED, f"unknown method {index >> 16}.{index & 0xFFFF}")
    try:
        method: amqp_object.Method = kind().decode(payload, _METHOD_INDEX.size)
    except Exception as error:  # pika's decoder fails in many ways on a hostile body
        raise Refusal(SYNTAX_ERROR, f"cannot read {kind.__qualname__}: {error!r}") from error
    return method


def decode_content_header(payload: bytes) -> tuple[int, int, bytes]:
    """Return class, size of the body and encoded properties of a content header.

    Raises:
        Refusal: It is too short.
    """
    if len(payload) < _CONTENT.size + 2:
        raise Refusal(SYNTAX_ERROR, "a content header is too short")
    class_id, _, size = _CONTENT.unpack_from(payload)
    return class_id, size, payload[_CONTENT.size :]


def arguments_of(kind: type[amqp_object.Method], payload: bytes) -> dict[str, bytes]:
    """Return the argument table of a method with its values still encoded.

    Their types matter to RabbitMQ, and pika's decoder does not keep them.

    Args:
        kind: the method, one that has arguments and was decoded from `payload`.

    Raises:
        Refusal: The table is broken.
    """
    strings, bits = _BEFORE_ARGUMENTS[kind]
    offset = _METHOD_INDEX.size + 2
    for _ in range(strings):
        offset += 1 + payload[offset]
    try:
        return fields.split(payload, offset + bits)[0]
    except fields.FieldError as error:
        raise Refusal(SYNTAX_ERROR, f"the arguments of {kind.NAME}: {error}") from error


def method(channel: int, value: amqp_object.Method) -> bytes:
    """Return the frame of a method."""
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
