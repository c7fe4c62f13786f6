# SPDX-License-Identifier: MIT
"""A message, whose properties stay encoded (AMQP 0-9-1, section 4.2.6.1)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping

from postage.broker import fields
from postage.broker.arguments import MAX_MS
from postage.broker.erlang import TYPE_NAMES
from postage.broker.errors import PRECONDITION_FAILED, SYNTAX_ERROR, Refusal
from postage.broker.frames import short_string

#: The properties of class basic by their flag, in the order in which they are encoded.
_FLAGS = (
    (1 << 15, "content_type"),
    (1 << 14, "content_encoding"),
    (1 << 13, "headers"),
    (1 << 12, "delivery_mode"),
    (1 << 11, "priority"),
    (1 << 10, "correlation_id"),
    (1 << 9, "reply_to"),
    (1 << 8, "expiration"),
    (1 << 7, "message_id"),
    (1 << 6, "timestamp"),
    (1 << 5, "type"),
    (1 << 4, "user_id"),
    (1 << 3, "app_id"),
    (1 << 2, "cluster_id"),
)
#: Bytes of those that are no short strings; the headers say their own length.
_SIZES = {"delivery_mode": 1, "priority": 1, "timestamp": 8}
_UINT16 = struct.Struct(">H")
_UINT32 = struct.Struct(">I")

#: What Erlang reads as an integer.
_INTEGER = re.compile(r"[+-]?[0-9]+")
#: Bytes that a header field needs beside those on the wire, once it is taken apart.
_FIELD_BYTES = 110


def split_properties(encoded: bytes) -> dict[str, bytes]:
    """Return the properties by name, each still encoded.

    Raises:
        Refusal: They do not fit together.
    """
    found: dict[str, bytes] = {}
    (flags,) = _UINT16.unpack_from(encoded)
    offset = 2
    try:
        for flag, name in _FLAGS:
            if flags & flag:
                if name == "headers":
                    size = 4 + _UINT32.unpack_from(encoded, offset)[0]
                else:
                    size = _SIZES.get(name) or 1 + encoded[offset]
                found[name] = encoded[offset : offset + size]
                offset += size
    except (IndexError, struct.error):
        offset = len(encoded) + 1
    if offset != len(encoded) or flags & 0b11:
        raise Refusal(SYNTAX_ERROR, "the properties of a message are broken")
    return found


def join_properties(properties: Mapping[str, bytes]) -> bytes:
    """Return the encoded properties, with their flags."""
    flags = 0
    values = []
    for flag, name in _FLAGS:
        if name in properties:
            flags |= flag
            values.append(properties[name])
    return _UINT16.pack(flags) + b"".join(values)


def join_headers(headers: Mapping[str, bytes]) -> bytes:
    """Return the table of headers that were changed. RabbitMQ writes l then for each L."""
    return fields.join(
        {name: b"l" + each[1:] if each[:1] == b"L" else each for name, each in headers.items()}
    )


def _text(encoded: bytes | None) -> str | None:
    return encoded[1:].decode("utf-8", "surrogateescape") if encoded is not None else None


class Message:
    """A message on its way. Queues share it, so nothing about one queue is in it.

    Args:
        exchange: where it was published to.
        routing_key: with which key.
        encoded: the properties, encoded with their flags.
        body: the body.

    Raises:
        Refusal: The properties are broken, or RabbitMQ would not take them.
    """

    __slots__ = (
        "_address",
        "_headers",
        "body",
        "encoded",
        "exchange",
        "expiration",
        "is_persistent",
        "keys",
        "priority",
        "properties",
        "public_keys",
        "routing_key",
    )

    def __init__(self, exchange: str, routing_key: str, encoded: bytes, body: bytes) -> None:
        self.exchange = exchange
        self.routing_key = routing_key
        self.encoded = encoded
        self.body = body
        self._address: bytes | None = None
        self._headers: Mapping[str, bytes] | None = None
        self.properties = properties = split_properties(encoded)
        mode = properties.get("delivery_mode", b"\x01")
        if mode not in (b"\x01", b"\x02"):
            raise Refusal(
                PRECONDITION_FAILED, f"invalid message: {{delivery_mode_unknown,{mode[0]}}}"
            )
        self.is_persistent = mode == b"\x02"
        self.priority = properties["priority"][0] if "priority" in properties else 0
        #: Milliseconds that it may wait in a queue, None for any time.
        self.expiration: int | None = None
        #: The routing key and those of the header CC; then also those of the header BCC.
        self.public_keys: tuple[str, ...] = (routing_key,)
        self.keys: tuple[str, ...] = self.public_keys
        if "expiration" in properties:
            self.expiration = _expiration(_text(properties["expiration"]) or "")
        if "headers" in properties:
            self.public_keys = (routing_key, *_further_keys(self.headers, "CC"))
            self.keys = (*self.public_keys, *_further_keys(self.headers, "BCC"))
            if "BCC" in self.headers:
                without = {name: field for name, field in self.headers.items() if name != "BCC"}
                self._headers = without
                self.properties = {**properties, "headers": join_headers(without)}
                self.encoded = join_properties(self.properties)

    @property
    def headers(self) -> Mapping[str, bytes]:
        """The header fields, each encoded with its type.

        Raises:
            Refusal: They are broken.
        """
        if self._headers is None:
            table = self.properties.get("headers")
            try:
                self._headers = fields.split(table)[0] if table else {}
            except fields.FieldError as error:
                raise Refusal(SYNTAX_ERROR, f"the headers of a message: {error}") from error
        return self._headers

    @property
    def address(self) -> bytes:
        """Exchange and routing key as encoded short strings."""
        if self._address is None:
            self._address = short_string(self.exchange) + short_string(self.routing_key)
        return self._address

    @property
    def size(self) -> int:
        """Bytes that it needs: the properties are there as they came, and taken apart."""
        number = len(self._headers) if self._headers else 0
        return len(self.body) + 2 * len(self.encoded) + _FIELD_BYTES * number

    def text(self, name: str) -> str | None:
        """Return a property that is a short string, None if it is not there."""
        return _text(self.properties.get(name))

    def with_headers(self, added: Mapping[str, bytes]) -> bytes:
        """Return the encoded properties with more headers, or others of the same names."""
        headers = join_headers({**self.headers, **added})
        return join_properties({**self.properties, "headers": headers})


def _expiration(text: str) -> int:
    match = _INTEGER.match(text)
    reason = None
    if match is None:
        reason = "no_integer"
    elif match.end() < len(text):
        reason = f'{{leftover_string,"{text[match.end() :]}"}}'
    elif text.startswith("-"):
        reason = f"{{value_negative,{text}}}"
    # A short string has 255 digits at most, which Python reads quickly.
    elif int(text) > MAX_MS:
        reason = f"{{value_too_large,{text}}}"
    if reason is not None:
        raise Refusal(PRECONDITION_FAILED, f"invalid expiration '{text}': {reason}")
    return int(text)


def _further_keys(headers: Mapping[str, bytes], name: str) -> Iterator[str]:
    """Yield the keys of the header CC or BCC (RabbitMQ, sender-selected distribution)."""
    field = headers.get(name)
    if field is None:
        return
    if field[:1] != b"A":
        kind = TYPE_NAMES[field[:1]]
        raise Refusal(
            PRECONDITION_FAILED,
            f'invalid message: {{unacceptable_type_in_header,"{name}",{kind}}}',
        )
    for item in fields.items(field):
        if item[:1] == b"S":  # RabbitMQ leaves out what is no string
            yield item[5:].decode("utf-8", "surrogateescape")
