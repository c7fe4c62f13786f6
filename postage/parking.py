# SPDX-License-Identifier: MIT
"""Parking: where a message goes that a component cannot handle, and what is told about it.

The original body goes to the error queue byte for byte, with its properties and headers.
What is added is in headers of its own.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from typing import Any

import pika

from postage.transport.publisher import encoded_size
from postage.transport.subscriber import Delivery

#: Bytes of the headers and properties of a parked message. A header frame that is larger
#: than the broker's frame_max (131,072 by default) would cost the connection.
HEADER_LIMIT = 100_000
#: Bytes that a text of ours is cut to, if the whole is too large: the traceback first.
TEXT_LIMITS = (("postage-traceback", 16_384), ("postage-error", 4_096), ("postage-traceback", 0))
#: Bytes of a short string of AMQP.
_SHORT_STRING = 255


def parked_properties(
    delivery: Delivery,
    reason: str,
    error: BaseException | None,
    fingerprint: Mapping[str, Any],
) -> pika.BasicProperties:
    """Return the properties that a message is parked with.

    Args:
        delivery: The message.
        reason: "undecodable", "malformed", "unhandled", "failed" and the like.
        error: What went wrong, if it was an exception.
        fingerprint: Of the component that gives up.
    """
    original = delivery.properties
    headers = dict(original.headers or {})
    # A message that is published again with the broker's record of its dead letterings
    # would be taken for one that goes in circles, and dropped in silence.
    headers.pop("x-death", None)
    headers |= {
        "postage-reason": reason,
        "postage-queue": delivery.queue.name,
        "postage-exchange": delivery.exchange,
        "postage-routing-key": delivery.routing_key,
        "postage-parked-at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "postage-parked-by": " ".join(f"{key}={value}" for key, value in fingerprint.items()),
    }
    if error is not None:
        headers["postage-exception"] = type(error).__name__
        headers["postage-error"] = _printable(error)
        headers["postage-traceback"] = "".join(traceback.format_exception(error))
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
    _shorten(properties, headers)
    return properties


def _printable(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as failure:  # a __str__ that fails must not keep the message from parking
        return f"({type(error).__name__} has no text: {type(failure).__name__})"


def _shorten(properties: pika.BasicProperties, headers: dict[str, Any]) -> None:
    """Cut our own texts until the headers fit."""
    for name, limit in TEXT_LIMITS:
        if encoded_size(properties) <= HEADER_LIMIT:
            return
        text = headers.get(name)
        if text is not None:
            # the end of a traceback says more than its beginning
            headers[name] = (
                text.encode("utf-8", "replace")[-limit:].decode("utf-8", "replace") if limit else ""
            )
