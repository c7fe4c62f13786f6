# SPDX-License-Identifier: MIT
"""The message that all cases send: 246 bytes of JSON, as a producer of postage makes them."""

from __future__ import annotations

from typing import Any

#: Fixed, so that a body is as long on every machine.
FINGERPRINT = {
    "name": "bench",
    "type": "demo",
    "pid": "12345",
    "host": "host",
    "user": "user",
    "vhost": "/",
}


def numbers(count: int) -> range:
    """Return the numbers of so many messages, all of six digits."""
    return range(100_000, 100_000 + count)


def parameters(number: int) -> dict[str, int]:
    """Return the parameters of one message."""
    return {"no": number}


def envelope(number: int) -> dict[str, Any]:
    """Return the whole body, for programs that do without postage."""
    return {
        "type": "command",
        "name": "echo",
        "category": "message",
        "version": "2",
        "fingerprint": FINGERPRINT,
        "content": {"parameters": parameters(number)},
        "_reserved": {},
    }
