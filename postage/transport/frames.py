# SPDX-License-Identifier: MIT
"""Frames of AMQP that come and go in mass, decoded and encoded at once.

pika decodes one frame at a time: each becomes an object, is looked up among the callbacks and
is put together with its neighbours again. That is right for every frame there is, and takes
most of the time of a small message. Nearly all frames belong to three kinds, though: messages
that are delivered, messages that are published, and acknowledgements. The functions here know
these alone, as whole messages; where one of them says None, the frames are pika's to judge.

They are pure: bytes in, objects of pika out, and the reverse. What they decode equals what
pika would have made of the same bytes.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

from pika import data, frame, spec

#: AMQP 0-9-1, 2.3.5 and 4.2.3: the types of frames, and the octet that ends each of them.
_METHOD, _HEADER, _BODY, _END = spec.FRAME_METHOD, spec.FRAME_HEADER, spec.FRAME_BODY, 0xCE
#: Classes and methods, by the numbers that AMQP 0-9-1 gives them.
_BASIC, _DELIVER, _ACK = spec.Basic.INDEX, spec.Basic.Deliver.INDEX, spec.Basic.Ack.INDEX
_PUBLISH = spec.Basic.Publish.INDEX
#: Bytes of a frame before its payload: type, channel and size.
_HEAD_SIZE = 7

_head = struct.Struct(">BHI")
#: The start of a method frame: type, channel, size, and the class and method as one number.
_method_head = struct.Struct(">BHII")
#: What follows the consumer tag of a delivery: delivery tag, bits, length of the exchange.
_delivery = struct.Struct(">QBB")
#: The end of a frame and the start of a header frame: end, type, channel, size, class, weight,
#: body size, property flags.
_header_head = struct.Struct(">BBHIHHQH")
#: The end of a frame and the start of the next one.
_next_head = struct.Struct(">BBHI")
#: A whole frame of Basic.Ack: type, channel, size, method, delivery tag, bits, end.
_ack = struct.Struct(">BHIIQBB")
ACK_SIZE = _ack.size

#: A header frame up to the properties: type, channel, size, class, weight, body size.
_header = struct.Struct(">BHIHHQ")
#: The start of Basic.Publish: type, channel, size, method, a reserved number.
_publish = struct.Struct(">BHIIH")

_flags = struct.Struct(">H")
_octet = struct.Struct("B")
_int32 = struct.Struct(">i")
_int64 = struct.Struct(">q")
_uint32 = struct.Struct(">I")
_uint64 = struct.Struct(">Q")

#: The properties of a message in their order, from the highest bit of the flags down
#: (AMQP 0-9-1, 4.2.6.1), and how each is written.
_SHORT, _OCTET, _TIMESTAMP, _TABLE = range(4)
_PROPERTIES = (
    ("content_type", _SHORT),
    ("content_encoding", _SHORT),
    ("headers", _TABLE),
    ("delivery_mode", _OCTET),
    ("priority", _OCTET),
    ("correlation_id", _SHORT),
    ("reply_to", _SHORT),
    ("expiration", _SHORT),
    ("message_id", _SHORT),
    ("timestamp", _TIMESTAMP),
    ("type", _SHORT),
    ("user_id", _SHORT),
    ("app_id", _SHORT),
    ("cluster_id", _SHORT),
)
_WITHOUT: dict[str, Any] = dict.fromkeys(name for name, _kind in _PROPERTIES)
_FLAGS = {name: (1 << (15 - bit), kind) for bit, (name, kind) in enumerate(_PROPERTIES)}

#: Which properties follow, by the flags. Most producers have one or two of these.
_present: dict[int, tuple[tuple[str, int], ...]] = {}
#: How many combinations of flags are remembered.
_PRESENT_LIMIT = 1_000
#: How many pairs of exchange and key are kept encoded, for each channel and flag.
_PAIRS = 1_000

#: Each length of a short string, as it is written.
_LENGTHS = tuple(bytes((length,)) for length in range(256))


def end_of_frame(buffer: bytes, offset: int) -> int:
    """Return where the frame at an offset ends; at least, if its head is not whole."""
    if buffer[offset : offset + 4] == b"AMQP":  # a protocol header (AMQP 0-9-1, 4.2.2)
        return offset + 8
    if len(buffer) - offset < _HEAD_SIZE:
        return offset + _HEAD_SIZE
    size: int = _head.unpack_from(buffer, offset)[2]
    return offset + _HEAD_SIZE + size + 1


def decode_delivery(
    buffer: bytes, offset: int
) -> tuple[int, int, spec.Basic.Deliver, spec.BasicProperties, bytes] | None:
    """Decode a delivery whose body has one frame or none, and that is there as a whole.

    Returns:
        Where it ends, the channel's number, the method, the properties and the body. None if
        there is anything else.
    """
    try:
        kind, channel, size, method = _method_head.unpack_from(buffer, offset)
        if method != _DELIVER or kind != _METHOD:
            return None
        end = offset + _HEAD_SIZE + size
        start = offset + 12
        offset = start + buffer[offset + 11]
        tag = buffer[start:offset].decode()
        delivery_tag, bits, size = _delivery.unpack_from(buffer, offset)
        start = offset + 10
        offset = start + size
        exchange = buffer[start:offset].decode()
        start = offset + 1
        offset = start + buffer[offset]
        key = buffer[start:offset].decode()
        if offset != end:
            return None
        mark, kind, number, size, index, _weight, body_size, flags = _header_head.unpack_from(
            buffer, offset
        )
        if mark != _END or kind != _HEADER or number != channel or index != _BASIC:
            return None
        end = offset + 1 + _HEAD_SIZE + size
        values, offset = _decode_properties(buffer, offset + 22, flags)
        if offset != end:
            return None
        if body_size:
            mark, kind, number, size = _next_head.unpack_from(buffer, offset)
            if mark != _END or kind != _BODY or number != channel or size != body_size:
                return None
            start = offset + 1 + _HEAD_SIZE
            offset = start + size
            if buffer[offset] != _END:
                return None
            body = buffer[start:offset]
        elif buffer[offset] == _END:
            body = b""
        else:
            return None
    except Exception:  # not all there, or not as it should be: pika waits, or says what is wrong
        return None
    deliver = _new(spec.Basic.Deliver)
    deliver.__dict__ = {
        "consumer_tag": tag,
        "delivery_tag": delivery_tag,
        "redelivered": bits & 1 == 1,
        "exchange": exchange,
        "routing_key": key,
    }
    properties = _new(spec.BasicProperties)
    properties.__dict__ = values
    return offset + 1, channel, deliver, properties, body


_new: Any = object.__new__


def decode_ack(buffer: bytes, offset: int) -> frame.Method[spec.Basic.Ack] | None:
    """Decode the acknowledgement at an offset. It has `ACK_SIZE` bytes."""
    if len(buffer) - offset < ACK_SIZE:
        return None
    kind, channel, size, method, tag, bits, mark = _ack.unpack_from(buffer, offset)
    if method != _ACK or kind != _METHOD or size != ACK_SIZE - _HEAD_SIZE - 1 or mark != _END:
        return None
    return frame.Method(channel, spec.Basic.Ack(tag, bits & 1 == 1))


def _decode_properties(buffer: bytes, offset: int, flags: int) -> tuple[dict[str, Any], int]:
    present = _present.get(flags)
    if present is None:
        present = _present_by(flags)
    values = _WITHOUT.copy()
    for name, kind in present:
        if kind == _SHORT:
            start = offset + 1
            offset = start + buffer[offset]
            values[name] = buffer[start:offset].decode()
        elif kind == _OCTET:
            values[name] = buffer[offset]
            offset += 1
        elif kind == _TIMESTAMP:
            (values[name],) = _uint64.unpack_from(buffer, offset)
            offset += 8
        else:
            values[name], offset = _decode_table(buffer, offset)
    return values, offset


def _present_by(flags: int) -> tuple[tuple[str, int], ...]:
    if flags & 1:  # more flags follow: AMQP has no more properties
        raise ValueError("another word of flags")
    present = tuple(each for bit, each in enumerate(_PROPERTIES) if flags & (1 << (15 - bit)))
    if len(_present) < _PRESENT_LIMIT:
        _present[flags] = present
    return present


def _decode_table(buffer: bytes, offset: int) -> tuple[dict[str, Any], int]:
    """Decode a table of headers. The kinds that producers of postage write come first."""
    table: dict[str, Any] = {}
    (size,) = _uint32.unpack_from(buffer, offset)
    offset += 4
    limit = offset + size
    while offset < limit:
        start = offset + 1
        offset = start + buffer[offset]
        name = buffer[start:offset].decode()
        kind = buffer[offset]
        if kind == 0x53:  # S, a long string
            start = offset + 5
            (size,) = _uint32.unpack_from(buffer, offset + 1)
            offset = start + size
            table[name] = buffer[start:offset].decode()
        elif kind == 0x49:  # I, a signed number of 32 bits
            (table[name],) = _int32.unpack_from(buffer, offset + 1)
            offset += 5
        elif kind == 0x74:  # t, a boolean
            table[name] = buffer[offset + 1] != 0
            offset += 2
        else:
            table[name], offset = data.decode_value(buffer, offset)
    return table, offset


# ------------------------------------------------------------------------- encoding


def encode_ack(channel: int, delivery_tag: int, multiple: bool) -> bytes:
    """Return the frame of Basic.Ack."""
    size = ACK_SIZE - _HEAD_SIZE - 1
    return _ack.pack(_METHOD, channel, size, _ACK, delivery_tag, bool(multiple), _END)


def encode_message(
    channel: int,
    exchange: str,
    key: str,
    properties: bytes,
    body: bytes,
    mandatory: bool,
    limit: int,
) -> tuple[bytes, int]:
    """Return all the frames of a message to be published, and how many there are.

    Args:
        channel: The channel's number.
        exchange: The exchange's name.
        key: The routing key.
        properties: As `encode_properties()` returns them.
        body: Bytes.
        mandatory: Whether the broker returns it if it cannot be routed.
        limit: Bytes that a body frame may hold.

    Raises:
        Exception: Of any kind: pika may know better.
    """
    method = _encode_publish(channel, exchange, key, bool(mandatory))
    length = len(body)
    header = _header.pack(_HEADER, channel, len(properties) + 12, _BASIC, 0, length)
    pieces = [method, header, properties]
    for start in range(0, length, limit):
        part = body[start : start + limit] if length > limit else body
        pieces += (_next_head.pack(_END, _BODY, channel, len(part)), part)
    pieces.append(b"\xce")
    return b"".join(pieces), len(pieces) // 2


@functools.lru_cache(maxsize=_PAIRS)
def _encode_publish(channel: int, exchange: str, key: str, mandatory: bool) -> bytes:
    name, encoded = exchange.encode(), key.encode()
    payload = b"".join((_LENGTHS[len(name)], name, _LENGTHS[len(encoded)], encoded))
    head = _publish.pack(_METHOD, channel, len(payload) + 7, _PUBLISH, 0)
    return b"".join((head, payload, b"\1\xce" if mandatory else b"\0\xce"))


def encode_properties(properties: spec.BasicProperties | dict[str, Any] | None) -> bytes:
    """Return the flags and the properties of a message, as a header frame holds them.

    Args:
        properties: Of pika, or its keywords for them: in their order they need no object.

    Raises:
        Exception: Whatever pika raises: a value has no AMQP form, or a string is too long.
    """
    if properties is None:
        return b"\0\0"
    try:
        if type(properties) is dict:
            return _encode_properties(properties)
        if type(properties) is spec.BasicProperties:
            return _encode_properties(vars(properties))
    except Exception:  # pika may know better, or says what is wrong
        pass
    if isinstance(properties, dict):
        properties = spec.BasicProperties(**properties)
    return b"".join(properties.encode())


def encode_plain_properties(
    content_type: str | None,
    delivery_mode: int,
    message_id: str,
    timestamp: int,
    app_id: str | None,
) -> bytes:
    """Return what `encode_properties()` does, for most messages: only two values differ.

    Args:
        content_type, delivery_mode, message_id, timestamp, app_id: As in pika. The message id
            takes 255 bytes at most.

    Raises:
        Exception: Whatever pika raises: a value has no AMQP form, or a string is too long.
    """
    before, after = _around_plain(content_type, delivery_mode, app_id)
    encoded = message_id.encode()
    return b"".join((before, _LENGTHS[len(encoded)], encoded, _uint64.pack(timestamp), after))


@functools.lru_cache(maxsize=_PAIRS)
def _around_plain(
    content_type: str | None, delivery_mode: int, app_id: str | None
) -> tuple[bytes, bytes]:
    """Return what comes before the message id, and after the timestamp."""
    values = {
        "content_type": content_type,
        "delivery_mode": delivery_mode,
        "message_id": "",
        "timestamp": 0,
        "app_id": app_id,
    }
    whole = encode_properties(values)
    end = len(whole) - (0 if app_id is None else 1 + len(app_id.encode()))
    return whole[: end - 1 - _uint64.size], whole[end:]


def _encode_properties(values: dict[str, Any]) -> bytes:
    flags, before = 0, 1 << 16
    pieces = [b""]
    for name, value in values.items():
        if value is None:
            continue
        flag, kind = _FLAGS[name]
        if flag > before:
            raise ValueError("not in their order")
        before = flag
        flags |= flag
        if kind == _SHORT:
            encoded = value.encode()
            pieces += (_LENGTHS[len(encoded)], encoded)
        elif kind == _OCTET:
            pieces.append(_octet.pack(value))
        elif kind == _TIMESTAMP:
            pieces.append(_uint64.pack(value))
        else:
            table = _encode_table(value)
            pieces += (_uint32.pack(len(table)), table)
    pieces[0] = _flags.pack(flags)
    return b"".join(pieces)


def _encode_table(table: dict[str, Any]) -> bytes:
    pieces: list[bytes] = []
    for name, value in table.items():
        encoded = name.encode()
        pieces += (_LENGTHS[len(encoded)], encoded)
        kind = type(value)
        if kind is str:
            encoded = value.encode()
            pieces += (b"S", _uint32.pack(len(encoded)), encoded)
        elif kind is bool:
            pieces.append(b"t\1" if value else b"t\0")
        elif kind is int:
            is_small = -(2**31) <= value < 2**31
            pieces += (b"I", _int32.pack(value)) if is_small else (b"l", _int64.pack(value))
        else:
            data.encode_value(pieces, value)
    return b"".join(pieces)
