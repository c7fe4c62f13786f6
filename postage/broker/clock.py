# SPDX-License-Identifier: MIT
"""Timers without a loop: the core says when it wants to be woken, the edge does it.

All times are seconds of a monotonic clock, so a jump of the wall clock expires nothing.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Timer:
    """One call in the future, which can be cancelled."""

    __slots__ = ("_clock", "action", "when")

    def __init__(self, clock: Clock, when: float, action: Callable[[], None]) -> None:
        self._clock = clock
        self.when = when
        self.action: Callable[[], None] | None = action

    @property
    def is_due(self) -> bool:
        """Whether the call is still to be made."""
        return self.action is not None

    def cancel(self) -> None:
        """Forget the call, if it was not made."""
        if self.action is not None:
            self.action = None
            self._clock.cancelled()


class Clock:
    """The time, and the calls that wait for theirs.

    Args:
        now: a monotonic clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._cancelled = 0

    def __len__(self) -> int:
        return len(self._heap) - self._cancelled

    def call_at(self, when: float, action: Callable[[], None]) -> Timer:
        """Have `action` called once the time is `when`."""
        timer = Timer(self, when, action)
        heapq.heappush(self._heap, (when, next(self._numbers), timer))
        return timer

    def call_later(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Have `action` called in so many seconds."""
        return self.call_at(self.now() + seconds, action)

    def cancelled(self) -> None:
        """Take note that a timer was cancelled, and drop those once they are the most.

        A queue that lives for a moment may have a timer for a week.
        """
        self._cancelled += 1
        if self._cancelled > len(self._heap) / 2:
            self._heap = [item for item in self._heap if item[2].is_due]
            heapq.heapify(self._heap)
            self._cancelled = 0

    @property
    def next_call(self) -> float | None:
        """When `run` has something to do, None if never."""
        while self._heap and not self._heap[0][2].is_due:
            heapq.heappop(self._heap)
            self._cancelled -= 1
        return self._heap[0][0] if self._heap else None

    def run(self) -> None:
        """Make the calls that are due. One that fails is logged, and the others are made."""
        now = self.now()
        while (when := self.next_call) is not None and when <= now:
            timer = heapq.heappop(self._heap)[2]
            action, timer.action = timer.action, None
            assert action is not None
            try:
                action()
            except Exception:
                logger.exception("a timer of the broker failed")
