# SPDX-License-Identifier: MIT
"""Parking: where a message goes that a component cannot handle, and what is told about it.

The original body goes to the error queue byte for byte, with its properties and headers.
What is added is in headers of its own, and `Parked` reads it back. It understands RabbitMQ's
own record (``x-death``) as well: a message that was delivered too often, or rejected, comes
to the error queue without any component doing it.
"""

from __future__ import annotations

import copy
import hashlib
import os
import struct
import time
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import pika

from postage.errors import printable
from postage.headers import (
    ATTEMPT,
    BROKER_RECORD,
    FIRST_FAILURE,
    HANDLER,
    ORIGIN_EXCHANGE,
    ORIGIN_KEY,
)
from postage.settings import queue_type_from_environment
from postage.topology import UNLIMITED, QueueSpec
from postage.transport.publisher import encoded_size
from postage.transport.subscriber import Delivery

#: Where the code of postage is.
_PACKAGE = str(Path(__file__).parent) + os.sep
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
#: Characters of any other text of ours, such as a fingerprint.
TEXT_LIMIT = 1_024
#: Bytes of headers and properties that the broker takes in any case. Where our short texts are
#: too much beside the original headers, the largest of those are left out, and named here.
FRAME_LIMIT = 131_000
LEFT_OUT = "postage-left-out"

#: How many attempts there were. (While there are more to come, the header is `ATTEMPT`.)
ATTEMPTS = "postage-attempts"
#: What a message says only while it is parked, or on its way through a delay.
RECORD = frozenset(
    {
        "postage-reason",
        "postage-queue",
        "postage-exchange",
        "postage-routing-key",
        "postage-parked-at",
        "postage-parked-by",
        "postage-exception",
        "postage-error",
        "postage-traceback",
        ATTEMPT,
        ATTEMPTS,
        FIRST_FAILURE,
        ORIGIN_EXCHANGE,
        ORIGIN_KEY,
    }
)
#: Beginnings of the names of other headers that must not travel on: the broker's, and those of a
#: delay that is over.
TRANSIENT = (*BROKER_RECORD, "postage-bit-")
#: RabbitMQ routes by the keys in the header CC, too, whatever the exchange: what is published
#: straight to one queue would come to others as well.
CARBON_COPY, CARBON_COPY_KEPT = "CC", "postage-cc"

#: The queue in which components say which error queues there are, since AMQP cannot list queues.
LEDGER_NAME = "postage-error-queues"
#: Names that it holds, the newest ones. Whoever reads it drops what is there twice.
LEDGER_LENGTH = 10_000


def parked_properties(
    delivery: Delivery,
    reason: str,
    error: BaseException | None,
    fingerprint: Mapping[str, Any],
    *,
    attempts: int = 1,
    first_failure: str | None = None,
    handler: str | None = None,
) -> pika.BasicProperties:
    """Return the properties that a message is parked with.

    Args:
        delivery: The message.
        reason: "unreadable", "unanswerable", "unhandled" or "failed".
        error: What went wrong, if it was an exception.
        fingerprint: Of the component that gives up.
        attempts: How often it was tried.
        first_failure: When it failed first, as ISO 8601 in UTC. None: now.
        handler: The attribute of the one handler that failed, if there are several.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    exchange, routing_key = delivery.origin
    own = {
        "postage-reason": reason,
        "postage-queue": delivery.queue.name,
        "postage-exchange": exchange,
        "postage-routing-key": routing_key,
        "postage-parked-at": now,
        "postage-parked-by": " ".join(f"{key}={value}" for key, value in fingerprint.items()),
        ATTEMPTS: attempts,
        FIRST_FAILURE: first_failure or now,
    }
    if handler is not None:
        own[HANDLER] = handler
    if error is not None:
        own["postage-exception"] = type(error).__name__
        own["postage-error"] = printable(error)
        shown = _relevant(error.__traceback__)
        pieces = traceback.format_exception(type(error), error, shown)
        own["postage-traceback"] = "".join(piece[:PIECE_LIMIT] for piece in pieces)
    headers = clean_headers(delivery.properties.headers)
    headers.pop(HANDLER, None)
    # no expiration: what is parked stays until somebody looks at it
    properties = sendable(delivery.properties, expiration=None)
    return _with_record(properties, headers, own)


def original_properties(properties: pika.BasicProperties) -> pika.BasicProperties:
    """Return the properties with which a parked message goes back to the queue it came from."""
    back = sendable(properties)
    back.headers = clean_headers(properties.headers)
    return back


def republished_properties(properties: pika.BasicProperties) -> pika.BasicProperties:
    """Return the properties with which a message goes on to another error queue.

    What RabbitMQ recorded must not travel on, so it is said in our words.
    """
    parked = Parked.of(properties, b"")
    own: dict[str, Any] = {
        name: getattr(parked, field)
        for field, name in _HEADERS.items()
        if getattr(parked, field) is not None
    }
    headers = clean_headers(properties.headers)
    return _with_record(sendable(properties), headers, own)


def announcement(error_queue: str) -> tuple[bytes, pika.BasicProperties]:
    """Return the message with which a component says that there is an error queue."""
    return error_queue.encode(), pika.BasicProperties(delivery_mode=2, content_type="text/plain")


def ledger_queue() -> QueueSpec:
    """Return the value of the queue for announcements."""
    kind = queue_type_from_environment()
    arguments: dict[str, Any] = {"x-queue-type": kind, "x-max-length": LEDGER_LENGTH}
    if kind == "quorum":
        # It is looked at again and again, and RabbitMQ 4 would drop what was delivered 20 times.
        arguments["x-delivery-limit"] = UNLIMITED
    return QueueSpec(LEDGER_NAME, arguments=arguments)


# --------------------------------------------------------------------------- reading

#: The header of each part of the record of a parked message.
_HEADERS = {
    "reason": "postage-reason",
    "queue": "postage-queue",
    "exchange": "postage-exchange",
    "routing_key": "postage-routing-key",
    "handler": HANDLER,
    "attempts": ATTEMPTS,
    "first_failure": FIRST_FAILURE,
    "last_failure": "postage-parked-at",
    "parked_by": "postage-parked-by",
    "exception": "postage-exception",
    "error": "postage-error",
    "traceback": "postage-traceback",
}


@dataclass(frozen=True)
class Parked:
    """A message of an error queue, and what is known of its failure. None is for unknown.

    Attributes:
        id: Its message id; without one, a name that is made of its body.
        reason: Ours, such as "failed", or RabbitMQ's, such as "delivery_limit". None: it is
            foreign, nobody says why it is here.
        queue: The queue that it came from.
        exchange, routing_key: How it came there.
        handler: The one handler that failed, if there are several.
        attempts: How often it was tried.
        first_failure, last_failure: ISO 8601 in UTC.
        parked_by: The fingerprint of the component.
        exception, error, traceback: What was raised.
    """

    body: bytes
    properties: pika.BasicProperties
    id: str
    reason: str | None = None
    queue: str | None = None
    exchange: str | None = None
    routing_key: str | None = None
    handler: str | None = None
    attempts: int | None = None
    first_failure: str | None = None
    last_failure: str | None = None
    parked_by: str | None = None
    exception: str | None = None
    error: str | None = None
    traceback: str | None = None

    @classmethod
    def of(cls, properties: pika.BasicProperties, body: bytes) -> Parked:
        """Read a message, whoever put it into the error queue."""
        headers = properties.headers or {}
        message_id = properties.message_id or f"body-{hashlib.sha256(body).hexdigest()[:16]}"
        if "postage-reason" in headers:
            said = {field: headers.get(name) for field, name in _HEADERS.items()}
        else:
            said = _record_of_broker(headers)
        known = {field: _known(field, value) for field, value in said.items()}
        return cls(body, properties, _encodable(message_id), **known)  # type: ignore[arg-type]  # each by its field

    @property
    def is_foreign(self) -> bool:
        """Whether nothing says where it came from."""
        return self.reason is None

    def record(self) -> dict[str, Any]:
        """Return what is known of its failure, as JSON can write it."""
        return {each.name: getattr(self, each.name) for each in fields(self)[2:]}


def _known(field: str, value: Any) -> str | int | None:
    if field == "attempts":
        return int(value) if isinstance(value, int) and not isinstance(value, bool) else None
    return None if value is None or (value == "" and field == "queue") else _encodable(value)


def _record_of_broker(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return what RabbitMQ says. Its record begins with the latest dead lettering."""
    deaths = headers.get("x-death")
    if not isinstance(deaths, list) or not deaths or not isinstance(deaths[0], dict):
        return {}
    death = deaths[0]
    keys = death.get("routing-keys")
    at = death.get("time")
    return {
        "reason": death.get("reason", "unknown"),
        "queue": death.get("queue"),
        "exchange": death.get("exchange"),
        "routing_key": keys[0] if isinstance(keys, list) and keys else None,
        "handler": headers.get(HANDLER),
        "attempts": headers.get(ATTEMPT),
        "first_failure": headers.get(FIRST_FAILURE),
        "last_failure": at.strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(at, datetime) else None,
    }


# --------------------------------------------------------------------------- writing


def _relevant(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback from the handler on, without what of postage called it."""
    relevant = trace
    while relevant is not None and relevant.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        relevant = relevant.tb_next
    return relevant or trace


def clean_headers(headers: Mapping[Any, Any] | None) -> dict[Any, Any]:
    """Return the headers of a message without what they say about its failures and travels.

    The handler stays, since whoever publishes it again wants only that one to run.
    """
    cleaned: dict[Any, Any] = {}
    for name, value in (headers or {}).items():
        if name == CARBON_COPY:
            cleaned[CARBON_COPY_KEPT] = _writable(value)
        elif name not in RECORD and not str(name).startswith(TRANSIENT):
            cleaned[name] = _writable(value)
    return cleaned


def sendable(properties: pika.BasicProperties, **changes: Any) -> pika.BasicProperties:
    """Return a copy that may be published by anybody, and outlives the broker."""
    sendable = copy.copy(properties)
    # RabbitMQ takes a message only from the user that it names (406).
    changes = {"delivery_mode": 2, "user_id": None, "cluster_id": None, **changes}
    for name, value in changes.items():
        setattr(sendable, name, value)
    return sendable


def _with_record(
    properties: pika.BasicProperties, headers: dict[Any, Any], own: Mapping[str, Any]
) -> pika.BasicProperties:
    """Add our headers, as far as they fit."""
    long = {name for name, _ in CUTS}
    for name, value in own.items():
        if not isinstance(value, int):
            text = _encodable(value)
            value = text if name in long else text[:TEXT_LIMIT]
        headers[name] = value
    properties.headers = headers
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
    properties: pika.BasicProperties, headers: dict[Any, Any], own: Collection[str]
) -> None:
    """Cut our own texts until the headers fit, and leave the largest of the others if need be."""
    for name, cut in CUTS:
        if encoded_size(properties) <= HEADER_LIMIT:
            return
        if name not in own:
            continue
        headers[name] = headers[name].encode()[cut].decode("utf-8", "replace")
    others = sorted(headers.keys() - own, key=lambda name: _size_of(name, headers[name]))
    while others and encoded_size(properties) > FRAME_LIMIT:
        name = others.pop()
        del headers[name]
        headers[LEFT_OUT] = f"{headers.get(LEFT_OUT, '')} {_encodable(name)}".strip()


def _size_of(name: str, value: Any) -> int:
    return encoded_size(pika.BasicProperties(headers={name: value}))
