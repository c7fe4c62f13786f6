# SPDX-License-Identifier: MIT
"""How many messages the broker delivers ahead: a decision without I/O.

What waits in an inbox shall be worth about `AHEAD` seconds of work. That is enough to keep a
handler busy over the round trip to the broker, and little enough that no message waits for long
beside an instance that is idle. So it follows from what a message costs, which is measured:
the time in which messages of the queue were in hand, divided by how many were settled. That
holds for one handler at a time, for replies that wait for their confirm, and for several
processors in one process alike.

RabbitMQ applies a prefetch to new consumers only (`basic.qos` with ``global=false``), so each
change costs a cancel and a consume. Therefore it changes by a factor of two at least, and
after a fall it does not grow for `RECOVERY` seconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

#: Where nothing is measured: what a queue has in hand for handlers that run side by side, for
#: consumers without a processor, and where a change of consumers would do harm.
DEFAULT = 10
#: Seconds of work that are to wait in the inbox.
AHEAD = 0.1
#: The most that is ever in hand: more is not faster, and all of it comes again after a crash.
MOST = 200
#: Bytes of bodies that may be in hand, by their average size.
MOST_BYTES = 4 * 1024 * 1024
#: The largest factor of one step: the first measurements may mislead.
STEP = 10
#: Messages that the measured cost is an average of, about. A slow one in a hundred counts.
MEMORY = 200
#: Seconds for which a message may wait in the inbox before all go back that wait with it.
STALL = 0.5
#: Seconds without growth after a fall.
RECOVERY = 1.0


class Prefetch:
    """The prefetch of one queue: a number, or one that adapts to the handlers.

    Either begins with 1 where `slow` (*slow start*): a message that ends the process each time is
    alone in hand then, and the broker counts no others with it.

    Attributes:
        count: What the consumer has, or will have when it is begun.
        fixed: The number, None: it adapts.

    Args:
        fixed: As the attribute.
        slow: Whether it begins with 1. One that adapts always does.
    """

    __slots__ = (
        "_bytes",
        "_fell",
        "_is_fresh",
        "_is_proven",
        "_seconds",
        "_settled",
        "_since_change",
        "_slow",
        "count",
        "fixed",
    )

    def __init__(self, fixed: int | None, slow: bool) -> None:
        self.fixed = fixed
        self._slow = slow or fixed is None
        self._settled = self._seconds = self._bytes = 0.0
        self._fell = float("-inf")
        self.count = 0
        self.begin()

    def __repr__(self) -> str:
        how = "adapts" if self.fixed is None else f"fixed at {self.fixed}"
        return f"<Prefetch {self.count} [{how}]>"

    @property
    def cost(self) -> float | None:
        """Seconds that a message takes, None: nothing is known yet."""
        return self._seconds / self._settled if self._settled else None

    def begin(self) -> None:
        """Begin anew, on a new channel. What is known of the handlers stays known."""
        self.count = 1 if self._slow or self.fixed is None else self.fixed
        self._is_proven = not self._slow
        self._is_fresh = False
        self._since_change = 0

    def note(self, settled: int, seconds: float, size: int, is_fresh: bool) -> None:
        """Take account of messages that were handled.

        Args:
            settled: How many.
            seconds: How long messages of this queue were in hand since the last note.
            size: Bytes of all their bodies.
            is_fresh: None was delivered before. One that was may be what ended the process.
        """
        keep = max(0.0, 1.0 - settled / MEMORY)
        self._settled = self._settled * keep + settled
        self._seconds = self._seconds * keep + seconds
        self._bytes = self._bytes * keep + size
        self._is_proven = True
        self._is_fresh = is_fresh
        self._since_change += settled

    @property
    def is_trusted(self) -> bool:
        """Whether there is nothing that `trust()` would change."""
        return self._is_proven and self.fixed is not None

    def share(self) -> None:
        """Take note that handlers let others run: now it says how many do so side by side."""
        if self.fixed is None:
            self.fixed = DEFAULT

    def trust(self) -> None:
        """Take note that a message will not end the process, though none is settled yet."""
        self._is_proven = True

    def wanted(self, now: float) -> int:
        """Return what it should be by now: `count`, if it may stay.

        Args:
            now: On the monotonic clock.
        """
        count = self.count
        if not self._is_proven:
            return count
        if self.fixed is not None:
            return self.fixed
        room = self._room()
        if count > 1 and count - 1 >= 2 * room:
            return max(1, int(1 + room))
        is_time = self._since_change >= count and now - self._fell >= RECOVERY
        if 1 + room >= 2 * count and self._is_fresh and is_time:
            return min(int(1 + room), STEP * count)
        return count

    def change(self, count: int, now: float) -> None:
        """Take note that the consumer is begun anew with another count."""
        if count < self.count:
            self._fell = now
        self.count = count
        self._since_change = 0

    def _room(self) -> float:
        """Return how many messages may wait beside the one that is being handled."""
        seconds, size = self._seconds / self._settled, self._bytes / self._settled
        by_time = AHEAD / seconds if seconds > 0 else MOST
        by_size = MOST_BYTES / size - 1 if size else MOST
        return min(by_time, by_size, MOST - 1)


def is_plain(handler: Callable[..., Any]) -> bool:
    """Tell whether a handler runs to its end before anything else, as far as can be seen.

    A prefetch is also the number of handlers that run side by side, where they do.

    Args:
        handler: A function, or a class with a method `call()`.
    """
    function = inspect.unwrap(getattr(handler, "call", handler))
    kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return not any(is_kind(function) for is_kind in kinds)
