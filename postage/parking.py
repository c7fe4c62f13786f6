# SPDX-License-Identifier: MIT
"""Parking: where a message goes that a component cannot handle, and what is told about it.

The original body goes to the error queue byte for byte, with its properties and headers.
What is added is in headers of its own.
"""

from __future__ import annotations

import struct
import time
import traceback
from collections.abc import Collection, Mapping
from typing import Any

import pika

from postage.errors import printable
from postage.transport.publisher import encoded_size
from postage.transport.subscriber import Delivery

#: Bytes of the headers and properties of a parked message. A header frame that is larger
#: than the broker's frame_max (131,072 by default) would cost the connection.
HEADER_LIMIT = 100_000
#: Bytes that are left of a text of ours, if the whole is too large: the traceback is cut first.
#: Its end says more than its beginning.
CUTS = (
    ("postage-traceback", slice(-16_384, None)),
    ("postage-error", slice(4_096)),
    ("postage-traceback", slice(0)),
)
#: Characters of one frame of a traceback, or of the error's text at its end.
PIECE_LIMIT = 2_048
#: Bytes of headers and properties that the broker takes in any case. Where our short texts are
#: too much beside the original headers, the largest of those are left out, and named here.
FRAME_LIMIT = 131_000
LEFT_OUT = "postage-left-out"


def parked_properties(
    delivery: Delivery,
    reason: str,
    error: BaseException | None,
    fingerprint: Mapping[str, Any],
) -> pika.BasicProperties:
    """Return the properties that a message is parked with.

    Args:
        delivery: The message.
        reason: "unreadable", "unanswerable", "unhandled" or "failed".
        error: What went wrong, if it was an exception.
        fingerprint: Of the component that gives up.
    """
    original = delivery.properties
    headers = {name: _writable(value) for name, value in (original.headers or {}).items()}
    # A message that is published again with the broker's record of its dead letterings
    # would be taken for one that goes in circles, and dropped in silence.
    headers.pop("x-death", None)
    own = {
        "postage-reason": reason,
        "postage-queue": delivery.queue.name,
        "postage-exchange": delivery.exchange,
        "postage-routing-key": delivery.routing_key,
        "postage-parked-at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "postage-parked-by": " ".join(f"{key}={value}" for key, value in fingerprint.items()),
    }
    if error is not None:
        own["postage-exception"] = type(error).__name__
        own["postage-error"] = printable(error)
        pieces = traceback.format_exception(error)
        own["postage-traceback"] = "".join(piece[:PIECE_LIMIT] for piece in pieces)
    headers |= {name: _encodable(text) for name, text in own.items()}
    properties = pika.BasicProperties(
        content_type=original.content_type,
        content_encoding=original.content_encoding,
        headers=headers,
        delivery_mode=2,
        priority=original.priority,
        correlation_id=original.correlation_id,
        reply_to=original.reply_to,
        # no expiration: what is parked stays until somebody looks at it
        message_id=original.message_id,
        timestamp=original.timestamp,
        type=original.type,
        app_id=original.app_id,
    )
    _shorten(properties, headers, own.keys())
    return properties


def _encodable(text: Any) -> str:
    """Return a text as UTF-8 can carry it, which has no surrogates.

    pika leaves a name that is no UTF-8, such as a routing key, as bytes.
    """
    if isinstance(text, bytes):
        return text.decode("utf-8", "backslashreplace")
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def _writable(value: Any) -> Any:
    """Return the value of a header, or its text: pika makes an int of 300 digits of a double."""
    try:
        _size_of("", value)
    except struct.error:
        return str(value)
    return value


def _shorten(
    properties: pika.BasicProperties, headers: dict[str, Any], own: Collection[str]
) -> None:
    """Cut our own texts until the headers fit, and leave the largest of the others if need be."""
    for name, cut in CUTS if "postage-error" in own else ():
        if encoded_size(properties) <= HEADER_LIMIT:
            return
        headers[name] = headers[name].encode()[cut].decode("utf-8", "replace")
    others = sorted(headers.keys() - own, key=lambda name: _size_of(name, headers[name]))
    while others and encoded_size(properties) > FRAME_LIMIT:
        name = others.pop()
        del headers[name]
        headers[LEFT_OUT] = f"{headers.get(LEFT_OUT, '')} {_encodable(name)}".strip()


def _size_of(name: str, value: Any) -> int:
    return encoded_size(pika.BasicProperties(headers={name: value}))
