# SPDX-License-Identifier: MIT
"""Field tables as bytes: section 4.2.5.5 of AMQP 0-9-1, with the types that RabbitMQ uses.

A field is one octet for the type and the encoded value. Tables are taken apart and put together
without decoding their values, so that what a client wrote reaches the next one exactly.
Nothing here recurses: a client may nest tables as deeply as a frame allows.

What a header or an argument means does not live here.
"""

from __future__ import annotations

import struct
from calendar import timegm
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from math import isfinite

#: The octets of a field with its type, where the type alone decides. ``l`` and ``L`` are the same
#: signed integer in RabbitMQ. ``U`` is the 16 bit integer of the specification: pika reads it,
#: RabbitMQ has ``s`` instead, and drops the connection of who sends it a ``U``.
_FIXED_SIZES = {
    ord(kind): 1 + size
    for kinds, size in (("V", 0), ("tbB", 1), ("sUu", 2), ("Iif", 4), ("D", 5), ("lLdT", 8))
    for kind in kinds
}

#: The types whose value begins with its length in four octets.
_LONG_TYPES = frozenset(b"SxAF")

#: How Python reads the numbers.
_NUMBERS = {
    ord(kind): struct.Struct(f">{code}")
    for kind, code in zip("bBsUuIilLfdT", "bBhhHiIqqfdQ", strict=True)
}

#: The types of which RabbitMQ takes finite numbers only: Erlang has no others.
_FLOATS = {ord("f"): struct.Struct(">xf"), ord("d"): struct.Struct(">xd")}

_NESTED_TYPES = frozenset(b"AF")

_LENGTH = struct.Struct(">I")
_DECIMAL = struct.Struct(">Bi")
_TYPE_AND_LENGTH = struct.Struct(">cI")
_LONG_FIELD = struct.Struct(">cq")
_DOUBLE_FIELD = struct.Struct(">cd")
_TIMESTAMP_FIELD = struct.Struct(">cQ")


class FieldError(ValueError):
    """Raised for bytes that are no field table, and for values that no field can hold."""


def split(data: bytes, offset: int = 0) -> tuple[dict[str, bytes], int]:
    """Take apart the table, with its length, that begins at an offset.

    Tables and arrays in it are checked too, since a client that is sent a broken one may fail.
    Of fields with the same name the first counts, as in RabbitMQ.

    Returns:
        The fields by name, in their order, and the offset at which the table ends.

    Raises:
        FieldError: if a type is unknown, if something ends after that which holds it, or if a
            number is not finite.
    """
    start = offset + _LENGTH.size
    if start > len(data):
        raise FieldError(f"the length of the table at {offset} is cut off")
    end = start + _LENGTH.unpack_from(data, offset)[0]
    if end > len(data):
        raise FieldError(f"the table at {offset} ends {end - len(data)} octets after the data")
    fields: dict[str, bytes] = {}
    nested = []
    offset = start
    while offset < end:
        value = offset + 1 + data[offset]
        stop = _end_of(data, value, end)
        name = data[offset + 1 : value].decode("utf-8", "surrogateescape")
        fields.setdefault(name, data[value:stop])
        if data[value] in _NESTED_TYPES:
            nested.append((value, stop))
        offset = stop
    _check_nested(data, nested)
    return fields, end


def join(fields: Mapping[str, bytes]) -> bytes:
    """Return fields as a table with its length.

    Raises:
        FieldError: if a name has more than 255 octets.
    """
    pieces = [b""]
    for name, field in fields.items():
        encoded = name.encode("utf-8", "surrogateescape")
        if len(encoded) > 255:
            raise FieldError(f"the name of a field has {len(encoded)} octets, 255 are allowed")
        pieces += bytes((len(encoded),)), encoded, field
    pieces[0] = _LENGTH.pack(sum(map(len, pieces)))
    return b"".join(pieces)


def items(array_field: bytes) -> list[bytes]:
    """Return the elements of an ``A`` field.

    Raises:
        FieldError: if it is none, or broken.
    """
    _require_whole(array_field, b"A")
    spans = list(_spans(array_field, 0, len(array_field)))
    _check_nested(array_field, spans)
    return [array_field[start:stop] for start, stop in spans]


def array(items: Iterable[bytes]) -> bytes:
    """Return fields as one ``A`` field."""
    return _long_field(b"A", b"".join(items))


def fields_of(table_field: bytes) -> dict[str, bytes]:
    """Return the fields of an ``F`` field.

    Raises:
        FieldError: if it is none, or broken.
    """
    _require_whole(table_field, b"F")
    return split(table_field, 1)[0]


def table(fields: Mapping[str, bytes]) -> bytes:
    """Return fields as one ``F`` field.

    Raises:
        FieldError: if a name has more than 255 octets.
    """
    return b"F" + join(fields)


def encode(value: str | bytes | bool | int | float | datetime | None) -> bytes:
    """Return a Python value as a field, with the types that RabbitMQ gives to its own headers.

    Integers have 64 bits. Times are whole seconds; one without a time zone is taken as UTC.

    Raises:
        FieldError: if a number or a time does not fit.
        TypeError: if the value has another type.
    """
    try:
        match value:
            case None:
                return b"V"
            case bool():
                return b"t\x01" if value else b"t\x00"
            case int():
                return _LONG_FIELD.pack(b"l", value)
            case str():
                return _long_field(b"S", value.encode("utf-8", "surrogateescape"))
            case bytes():
                return _long_field(b"x", value)
            case float():
                if not isfinite(value):
                    raise FieldError(f"{value!r} does not fit into a field")
                return _DOUBLE_FIELD.pack(b"d", value)
            case datetime():
                return _TIMESTAMP_FIELD.pack(b"T", timegm(value.utctimetuple()))
    except struct.error as error:
        raise FieldError(f"{value!r} does not fit into a field") from error
    raise TypeError(f"{value!r} is no value that a field can hold")


def decode(field: bytes) -> object:
    """Return a field, which was checked by `split`, as a Python value.

    ``S`` gives a str, or bytes if it is not UTF-8, ``x`` gives bytes, and a time outside of
    Python's calendar gives its seconds. ``A`` and ``F`` stay what they are, bytes with their type:
    `items` and `fields_of` open them.

    Raises:
        FieldError: if the field is broken.
    """
    _require_whole(field, field[:1])
    kind = field[0]
    match chr(kind):
        case "V":
            return None
        case "t":
            return field[1] != 0
        case "S":
            try:
                return field[5:].decode()
            except UnicodeDecodeError:
                return field[5:]
        case "x":
            return field[5:]
        case "A" | "F":
            return field
        case "D":
            scale, digits = _DECIMAL.unpack_from(field, 1)
            return Decimal(digits).scaleb(-scale)
    (number,) = _NUMBERS[kind].unpack_from(field, 1)
    return _decode_time(number) if kind == ord("T") else number


def _end_of(data: bytes, start: int, end: int) -> int:
    """Return where the field at an offset ends, which must not be after `end`."""
    if start >= end:
        raise FieldError(f"the field at {start} is cut off")
    kind = data[start]
    size = _FIXED_SIZES.get(kind, 0)
    if not size:
        if kind not in _LONG_TYPES:
            raise FieldError(f"the field at {start} has the unknown type {bytes((kind,))!r}")
        if start + 5 > end:
            raise FieldError(f"the length of the field at {start} is cut off")
        size = 5 + _LENGTH.unpack_from(data, start + 1)[0]
    if start + size > end:
        raise FieldError(f"the field at {start} is cut off")
    if kind in _FLOATS and not isfinite(_FLOATS[kind].unpack_from(data, start)[0]):
        raise FieldError(f"the number at {start} is not finite")
    return start + size


def _spans(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where the values lie that the table or array field between two offsets holds."""
    has_names = data[start] == ord("F")
    offset = start + 5
    while offset < end:
        value = offset + 1 + data[offset] if has_names else offset
        offset = _end_of(data, value, end)
        yield value, offset


def _check_nested(data: bytes, spans: Iterable[tuple[int, int]]) -> None:
    """Check what is inside of those of the fields at some offsets that are tables and arrays.

    It copies nothing, else a table with thousands of levels would cost the square of its size.
    """
    unchecked = list(spans)
    while unchecked:
        start, end = unchecked.pop()
        if data[start] in _NESTED_TYPES:
            unchecked += _spans(data, start, end)


def _require_whole(field: bytes, kind: bytes) -> None:
    """Check that the bytes are one field of a type, whatever is inside."""
    if field[:1] != kind or _end_of(field, 0, len(field)) != len(field):
        raise FieldError(f"{field[:16]!r}... is no field of the type {kind!r}")


def _long_field(kind: bytes, value: bytes) -> bytes:
    return _TYPE_AND_LENGTH.pack(kind, len(value)) + value


def _decode_time(seconds: int) -> datetime | int:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc)
    except (OverflowError, ValueError, OSError):
        return seconds
