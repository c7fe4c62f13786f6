# SPDX-License-Identifier: MIT
"""The headers with which postage leads a message through its attempts and conversations.

Those of a delay are in `postage.delay`, those of a parked message in `postage.parking`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Beginnings of the names of headers in which RabbitMQ records where a message has been. One
#: that is published again with them would be taken for one that goes in circles, and dropped.
BROKER_RECORD = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count")

#: Which attempt at the message this delivery is, an int. Absent: the first.
ATTEMPT = "postage-attempt"
#: The only handler that is to run, where several handle the message.
HANDLER = "postage-handler"
#: When the first attempt failed: ISO 8601, UTC.
FIRST_FAILURE = "postage-first-failure"
#: By which exchange and key the first attempt came.
ORIGIN_EXCHANGE, ORIGIN_KEY = "postage-origin-exchange", "postage-origin-key"
#: The id of the message whose handler sent this one.
CAUSATION = "postage-causation-id"
#: The id of the conversation, in an RPC request, whose own correlation id is the call's.
CONVERSATION = "postage-correlation-id"


def attempt_of(headers: Mapping[str, Any] | None) -> int:
    """Return which attempt a delivery is, by its headers. Nonsense of others counts as none."""
    value = (headers or {}).get(ATTEMPT)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1


def origin_of(
    headers: Mapping[str, Any] | None, exchange: str, routing_key: str
) -> tuple[str, str]:
    """Return by which exchange and key a message came first.

    Args:
        headers: Its headers.
        exchange: By which it came now: that of its delay, if this is not the first attempt.
        routing_key: The same for the key.
    """
    origin = [(headers or {}).get(name) for name in (ORIGIN_EXCHANGE, ORIGIN_KEY)]
    if attempt_of(headers) == 1 or not all(isinstance(each, str) for each in origin):
        return exchange, routing_key
    return str(origin[0]), str(origin[1])
