# SPDX-License-Identifier: MIT
"""What pika's codec hides: the types of fields, and the exact bytes of properties.

A field table is read and written here with the type of every field (AMQP 0-9-1, section 4.2.5.5,
with RabbitMQ's errata), so that an integer of 32 bits is never taken for one of 64.
Methods are left to pika, all but the tables that they end with.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from pika import amqp_object

#: Fields of a fixed size: the letter and how `struct` calls it.
NUMBERS = {
    "b": ">b",
    "B": ">B",
    "s": ">h",
    "u": ">H",
    "I": ">i",
    "i": ">I",
    "l": ">q",
    "L": ">q",
    "f": ">f",
    "d": ">d",
    "T": ">Q",
}

#: The properties of a message in the order of their flags, of which the first is bit 15.
PROPERTIES = {
    "content_type": "shortstr",
    "content_encoding": "shortstr",
    "headers": "table",
    "delivery_mode": "octet",
    "priority": "octet",
    "correlation_id": "shortstr",
    "reply_to": "shortstr",
    "expiration": "shortstr",
    "message_id": "shortstr",
    "timestamp": "longlong",
    "type": "shortstr",
    "user_id": "shortstr",
    "app_id": "shortstr",
    "cluster_id": "shortstr",
}

#: Seconds by which a time that the broker wrote may differ from now.
CLOCK_SECONDS = 60


class Field(NamedTuple):
    """A field of a type that Python has no value for, such as an integer of 16 bits."""

    letter: str
    value: Any

    def __repr__(self) -> str:
        # A time that the broker took is another one in each run.
        if self.letter == "T" and abs(self.value - time.time()) < CLOCK_SECONDS:
            return "now"
        return f"{self.value}{self.letter}"


def encode_method(method: amqp_object.Method) -> bytes:
    """Return the payload of a method frame; its table of arguments may have `Field` values."""
    arguments = getattr(method, "arguments", None)
    if not arguments:
        return struct.pack(">I", method.INDEX) + b"".join(method.encode())
    # In every method that has arguments they are the end.
    with_arguments: Any = method
    with_arguments.arguments = None
    try:
        payload = struct.pack(">I", method.INDEX) + b"".join(method.encode())
    finally:
        with_arguments.arguments = arguments
    return payload[:-4] + encode_table(arguments)


def encode_properties(properties: Mapping[str, Any]) -> bytes:
    """Return the flags and the values of the properties of a message."""
    flags, values = 0, b""
    for bit, (name, kind) in enumerate(PROPERTIES.items()):
        if name in properties:
            flags |= 1 << (15 - bit)
            values += _encode_property(kind, properties[name])
    return struct.pack(">H", flags) + values


def encode_table(table: Mapping[str, Any]) -> bytes:
    """Return a field table with its length."""
    return _long(b"".join(_short(name.encode()) + encode_field(table[name]) for name in table))


def encode_field(value: Any) -> bytes:
    """Return the letter and the value of one field. An int is one of 32 bits, if it fits."""
    if isinstance(value, Field):
        return _encode_typed(value)
    if value is None:
        return b"V"
    if isinstance(value, bool):
        return struct.pack(">cB", b"t", value)
    if isinstance(value, int):
        is_long = not -(2**31) <= value < 2**31
        return struct.pack(">cq" if is_long else ">ci", b"l" if is_long else b"I", value)
    if isinstance(value, str):
        return b"S" + _long(value.encode())
    if isinstance(value, bytes):
        return b"x" + _long(value)
    if isinstance(value, dict):
        return b"F" + encode_table(value)
    return b"A" + _long(b"".join(map(encode_field, value)))


def decode_properties(data: bytes) -> dict[str, Any]:
    """Return the properties that a message has."""
    (flags,) = struct.unpack_from(">H", data)
    offset, properties = 2, {}
    for bit, (name, kind) in enumerate(PROPERTIES.items()):
        if flags & 1 << (15 - bit):
            properties[name], offset = _decode_property(kind, data, offset)
    return properties


def decode_table(data: bytes, offset: int) -> tuple[dict[str, Any], int]:
    """Return the table at the offset, and where it ends."""
    end = offset + 4 + struct.unpack_from(">I", data, offset)[0]
    offset += 4
    table = {}
    while offset < end:
        name, offset = _decode_property("shortstr", data, offset)
        table[name], offset = decode_field(data, offset)
    return table, end


def decode_field(data: bytes, offset: int) -> tuple[Any, int]:
    """Return the field at the offset, and where it ends."""
    letter, offset = chr(data[offset]), offset + 1
    if letter in NUMBERS:
        (number,) = struct.unpack_from(NUMBERS[letter], data, offset)
        return Field(letter, number), offset + struct.calcsize(NUMBERS[letter])
    if letter == "t":
        return bool(data[offset]), offset + 1
    if letter == "V":
        return None, offset
    if letter == "D":
        return Field(letter, struct.unpack_from(">Bi", data, offset)), offset + 5
    if letter == "F":
        return decode_table(data, offset)
    end = offset + 4 + struct.unpack_from(">I", data, offset)[0]
    if letter == "A":
        return _decode_array(data, offset + 4, end), end
    return (_text if letter == "S" else bytes)(data[offset + 4 : end]), end


def _decode_array(data: bytes, offset: int, end: int) -> list[Any]:
    items = []
    while offset < end:
        item, offset = decode_field(data, offset)
        items.append(item)
    return items


def _encode_typed(field: Field) -> bytes:
    letter = field.letter.encode()
    if field.letter == "D":
        return letter + struct.pack(">Bi", *field.value)
    if field.letter in NUMBERS:
        return letter + struct.pack(NUMBERS[field.letter], field.value)
    return letter + bytes(field.value)  # as it is: for what must not be understood


def _encode_property(kind: str, value: Any) -> bytes:
    if kind == "shortstr":
        return _short(value.encode())
    if kind == "table":
        return encode_table(value)
    return struct.pack(">B" if kind == "octet" else ">Q", value)


def _decode_property(kind: str, data: bytes, offset: int) -> tuple[Any, int]:
    if kind == "shortstr":
        end = offset + 1 + data[offset]
        return _text(data[offset + 1 : end]), end
    if kind == "table":
        return decode_table(data, offset)
    size = 1 if kind == "octet" else 8
    return int.from_bytes(data[offset : offset + size], "big"), offset + size


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _short(data: bytes) -> bytes:
    return struct.pack(">B", len(data)) + data


def _long(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data
