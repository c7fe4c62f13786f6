# SPDX-License-Identifier: MIT
"""How Erlang writes what RabbitMQ quotes in its refusals: people search for these texts."""

from __future__ import annotations

from postage.broker import fields

#: RabbitMQ's names for the types of a field table.
TYPE_NAMES = {
    b"t": "bool",
    b"b": "byte",
    b"B": "unsignedbyte",
    b"s": "short",
    b"U": "short",
    b"u": "unsignedshort",
    b"I": "signedint",
    b"i": "unsignedint",
    b"l": "long",
    b"L": "long",
    b"f": "float",
    b"d": "double",
    b"D": "decimal",
    b"S": "longstr",
    b"x": "binary",
    b"A": "array",
    b"T": "timestamp",
    b"F": "table",
    b"V": "void",
}
_ESCAPES = str.maketrans(
    {
        "\b": r"\b",
        "\t": r"\t",
        "\n": r"\n",
        "\v": r"\v",
        "\f": r"\f",
        "\r": r"\r",
        "\x1b": r"\e",
        '"': r"\"",
        "\\": r"\\",
    }
)
#: Bytes of a broken frame that are shown.
_SHOWN = 16


def binary(value: bytes) -> str:
    """Return bytes as Erlang writes a binary.

    >>> binary(b"what"), binary(b"\\x00\\x01")
    ('<<"what">>', '<<0,1>>')
    """
    # Erlang asks for printable Latin 1, and writes the bytes as they are.
    if not value or not all(byte in _ESCAPES or 32 <= byte < 127 or byte >= 160 for byte in value):
        return f"<<{','.join(map(str, value))}>>"
    return f'<<"{value.decode("utf-8", "surrogateescape").translate(_ESCAPES)}">>'


def field(value: bytes) -> str:
    """Return the value of an encoded field as Erlang writes it. Tables are not shown."""
    match value[:1]:
        case b"S" | b"x":
            return binary(value[5:])
        case b"A" | b"F":
            return "[]" if len(value) == 5 else "[...]"
        case b"D":
            return f"{{{value[1]},{int.from_bytes(value[2:], 'big')}}}"
        case b"T":
            return str(int.from_bytes(value[1:], "big"))
        case b"V":
            return "undefined"
        case _:
            return str(fields.decode(value)).lower()


def frame(type_: int, payload: bytes, reason: str) -> str:
    """Return the words for a frame that is wrong in itself."""
    which = "all" if len(payload) <= _SHOWN else f"first {_SHOWN}"
    return f"type {type_}, {which} octets = {binary(payload[:_SHOWN])}: {reason}"
