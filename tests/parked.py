# SPDX-License-Identifier: MIT
"""Messages in error queues, put there and taken without the code that is tested."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel

from postage.parking import parked_properties
from postage.topology import QueueSpec
from postage.transport.subscriber import Delivery

FINGERPRINT = {"name": "tested", "pid": "12"}

#: Headers of every type that AMQP has and pika keeps.
HEADERS = {
    "text": "grün",
    "bytes": b"\x00\xff",
    "time": datetime(2026, 2, 3, 4, 5, 6, tzinfo=timezone.utc),
    "decimal": Decimal("-1.25"),
    "yes": True,
    "small": 5,
    "large": 2**40,
    "nothing": None,
    "list": ["a", 1, [b"\xfe"], {"in": Decimal("2")}],
    "table": {"deep": {"deep": datetime(2000, 1, 1, tzinfo=timezone.utc)}, "timestamp": "none"},
}


@contextlib.contextmanager
def opened(url: str) -> Iterator[BlockingChannel]:
    """Open a channel of pika, with the queues q and q.error."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        for name, kind in (("q", "classic"), ("q.error", "quorum")):
            channel.queue_declare(name, durable=True, arguments={"x-queue-type": kind})
        yield channel
    finally:
        with contextlib.suppress(pika.exceptions.AMQPError):  # the test has closed it
            connection.close()


def park(
    channel: BlockingChannel,
    body: bytes = b"{}",
    *,
    error: Exception | None = None,
    queue: str = "q",
    into: str = "q.error",
    reason: str = "failed",
    handler: str | None = None,
    **properties: Any,
) -> None:
    """Put a message into an error queue, as a component does."""
    method = SimpleNamespace(
        delivery_tag=1, consumer_tag="c", exchange="ex", routing_key="key", redelivered=False
    )
    delivery = Delivery(QueueSpec(queue), 1, method, pika.BasicProperties(**properties), body)
    parked = parked_properties(delivery, reason, error, FINGERPRINT, attempts=6, handler=handler)
    channel.basic_publish("", into, body, parked, mandatory=True)


def park_numbers(channel: BlockingChannel, number: int) -> None:
    for each in range(number):
        park(channel, b"%d" % each, message_id=f"m{each}", error=ValueError("x"))


def taken(channel: BlockingChannel, queue: str = "q") -> list[tuple[pika.BasicProperties, bytes]]:
    """Take all that is in a queue, in order."""
    found = []
    while True:
        method, properties, body = channel.basic_get(queue, auto_ack=True)
        if method is None:
            return found
        found.append((properties, body))


def bodies(channel: BlockingChannel, queue: str = "q") -> list[bytes]:
    return [body for _, body in taken(channel, queue)]


def ready(channel: BlockingChannel, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).method.message_count)
