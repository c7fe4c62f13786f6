# SPDX-License-Identifier: MIT
"""What the clients send and what they read, where it is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The largest frame that RabbitMQ offers, in bytes, and what a frame has around its payload.
FRAME_MAX = 131_072
FRAME_OVERHEAD = 8

#: Sizes of bodies, in bytes: none, one, around the limits of one frame, and many frames.
BODY_SIZES = [
    0,
    1,
    FRAME_MAX - FRAME_OVERHEAD,
    FRAME_MAX - FRAME_OVERHEAD + 1,
    FRAME_MAX,
    2**20,
    2**24,
]

#: Exchange types, each with the binding and the key of a message that it routes, and the key of one
#: that it does not. A headers exchange looks at the header ``kind`` instead, which is the key here.
ROUTES = [
    ("direct", "red", "red", "blue"),
    ("fanout", "", "anything", None),
    ("topic", "*.red.#", "deep.red.sea.shell", "red.sea"),
    ("headers", "red", "red", "blue"),
]


def body_of(size: int) -> bytes:
    """Return a body in which bytes that are lost, doubled or swapped show."""
    pattern = b"".join(number.to_bytes(4, "big") for number in range(size // 4 + 1))
    return pattern[:size]


def death_of(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the newest x-death entry, without its time and without what is empty or missing."""
    entry: dict[str, Any] = dict(headers["x-death"][0])
    assert entry.pop("time")
    return entry
