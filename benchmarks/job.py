# SPDX-License-Identifier: MIT
"""What a measurement is to do, and calls with their checks.

Programs of other packages import this module, in environments of their own: it needs nothing but
the standard library.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.envelope import numbers
from benchmarks.measuring import Sample, percentile

#: Calls before the clock starts: the first ones connect.
WARM_UP = 50


@dataclass(frozen=True)
class Job:
    """What a measurement is to do, for the processes that take part in it.

    ``kind`` is the type of the queue, "classic" or "quorum", both as postage declares them, or
    "transient" for one without flags and arguments. ``prefetch`` is 0 where
    nobody says a number: a broker of AMQP sets no limit then, and postage adapts.
    """

    url: str
    queue: str
    kind: str
    count: int
    prefetch: int
    in_flight: int = 1


def one_by_one(call: Callable[[int], Any], count: int) -> Sample:
    """Make calls one by one, and return how long they took."""
    milliseconds = []
    for number in numbers(WARM_UP + count):
        started = time.perf_counter()
        result = call(number)
        milliseconds.append((time.perf_counter() - started) * 1000)
        check(number, result)
    return latencies(milliseconds[WARM_UP:])


def latencies(milliseconds: list[float]) -> Sample:
    """Return the figures of calls that took so long."""
    return {f"p{percent} ms": percentile(milliseconds, percent) for percent in (50, 90, 99)}


def check(number: int, result: Any) -> None:
    """Check a reply: every service here adds one."""
    if result != number + 1:
        raise RuntimeError(f"the reply to {number} is {result!r}")
