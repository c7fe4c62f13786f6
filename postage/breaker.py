# SPDX-License-Identifier: MIT
"""When a component slows down because its handlers fail one after the other. No I/O."""

from __future__ import annotations

from collections.abc import Callable

from postage.retry import RetryPolicy


class CircuitBreaker:
    """Slows a component down whose handlers fail one after the other.

    After `threshold` failures in a row it is *open*: one message at a time is handled, with a
    pause before each that grows as those of its policy do, until one succeeds.

    Args:
        threshold: Failures in a row; None: it never opens.
        policy: Says how long the pauses are.
        clock: Seconds, monotonic.
        chance: From 0 to 1, for the jitter.
    """

    def __init__(
        self,
        threshold: int | None,
        policy: RetryPolicy,
        clock: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self._threshold = threshold
        self._policy = policy
        self._clock = clock
        self._chance = chance
        self._failures = 0
        self._resume = 0.0

    @property
    def is_open(self) -> bool:
        """Whether messages are handled one at a time."""
        return self._threshold is not None and self._failures >= self._threshold

    @property
    def failures(self) -> int:
        """How many handlers have failed since the last one that succeeded."""
        return self._failures

    def pause(self) -> float:
        """Return the seconds until the next message may be handled."""
        return max(0.0, self._resume - self._clock()) if self.is_open else 0.0

    def failed(self) -> bool:
        """Note that a handler failed. Returns whether that opened it."""
        was_open = self.is_open
        self._failures += 1
        if self.is_open:
            assert self._threshold is not None
            attempt = self._failures - self._threshold + 1
            self._resume = self._clock() + self._policy.pause(attempt, self._chance())
        return self.is_open and not was_open

    def succeeded(self) -> bool:
        """Note that a handler succeeded. Returns whether that closed it."""
        was_open = self.is_open
        self._failures = 0
        return was_open
