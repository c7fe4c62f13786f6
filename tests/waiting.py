# SPDX-License-Identifier: MIT
"""Waiting for a condition, since a test must never just sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds between two looks: short beside what is waited for, long enough to burn no processor.
INTERVAL_SECONDS = 0.01


def wait_until(condition: Callable[[], T], timeout: float = 30.0, message: str = "") -> T:
    """Call ``condition`` until its result is true, and return that result.

    Raises:
        AssertionError: ``timeout`` seconds have passed; it names ``message``, or the condition.
    """
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {message or condition}")
        time.sleep(INTERVAL_SECONDS)
    return result
