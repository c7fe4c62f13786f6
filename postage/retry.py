# SPDX-License-Identifier: MIT
"""How often and when a message is tried again whose handler failed. No I/O.

A policy decides from the exception and the number of the attempt alone. What carries it
out publishes a copy of the message, which waits in the broker (`postage.delay`), and
acknowledges the original when the broker has the copy. So nothing spins, nothing is held
unacknowledged while it waits, and an instance that dies loses none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pika

from postage.errors import ConfigurationError, PermanentError, Retry
from postage.headers import ATTEMPT, FIRST_FAILURE, HANDLER, ORIGIN_EXCHANGE, ORIGIN_KEY
from postage.parking import clean_headers, sendable


@dataclass(frozen=True)
class RetryPolicy:
    """How often a message is tried, and how long it waits in between.

    The pause after attempt n is ``delay * backoff ** (n - 1)`` seconds, at most `max_delay`,
    and up to `jitter` of that more or less, so that messages that failed together do not come
    back together. With ``backoff=1`` it is constant.

    Attributes:
        attempts: Attempts in total; None: without end. 1 is no retry.
        delay: Seconds of the first pause.
        backoff: By what a pause is longer than the one before.
        max_delay: Seconds of the longest pause, before jitter.
        jitter: A share of the pause, from 0 to 1.
        permanent: Exceptions that no later attempt would mend; their messages are parked at
            once. `PermanentError` always is one.

    Raises:
        ConfigurationError: An attribute makes no sense.
    """

    attempts: int | None = 6
    delay: float = 1.0
    backoff: float = 2.0
    max_delay: float = 60.0
    jitter: float = 0.2
    permanent: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        if self.attempts is not None:
            _check("attempts", self.attempts, isinstance(self.attempts, int), 1, "or None")
        for name, least in (("delay", 0.0), ("backoff", 1.0), ("max_delay", 0.0), ("jitter", 0.0)):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            _check(name, value, is_number and not isinstance(value, bool), least)
        _check("jitter", self.jitter, self.jitter <= 1, 0, "and at most 1")
        if not isinstance(self.permanent, tuple) or not all(
            isinstance(each, type) and issubclass(each, BaseException) for each in self.permanent
        ):
            raise ConfigurationError(
                f"permanent of a RetryPolicy is a tuple of exceptions, not {self.permanent!r}"
            )

    def pause(self, attempt: int, chance: float) -> float:
        """Return the seconds between an attempt and the next one.

        Args:
            attempt: Which one failed, from 1 on.
            chance: From 0 to 1, where in the jitter it shall be.
        """
        try:
            pause = min(self.delay * self.backoff ** (attempt - 1), self.max_delay)
        except OverflowError:
            pause = self.max_delay
        return pause * (1 + self.jitter * (2 * chance - 1))

    def is_permanent(self, error: BaseException) -> bool:
        """Tell whether no later attempt would mend it."""
        return isinstance(error, (PermanentError, *self.permanent))

    def decide(self, error: BaseException, attempt: int, chance: float) -> float | None:
        """Return the seconds until the next attempt, or None if there is to be none.

        Args:
            error: What the handler raised.
            attempt: Which attempt that was, from 1 on.
            chance: From 0 to 1, for the jitter.
        """
        if self.is_permanent(error):
            return None
        if self.attempts is not None and attempt >= self.attempts:
            return None
        if isinstance(error, Retry) and error.delay is not None:
            return error.delay
        return self.pause(attempt, chance)


@dataclass(frozen=True)
class Failure:
    """A handler that failed.

    Attributes:
        handler: Its name, if it is not the only one of its message.
        error: What it raised.
        attempt: Which attempt that was.
        pause: Seconds until the next one; None: the message is parked.
    """

    handler: str | None
    error: Exception
    attempt: int
    pause: float | None


def retried(
    properties: pika.BasicProperties,
    attempt: int,
    handler: str | None,
    origin: tuple[str, str],
    now: str,
) -> pika.BasicProperties:
    """Return the properties of the next attempt at a message.

    Args:
        properties: Those of the attempt that failed.
        attempt: Which one that was.
        handler: The only one to run again, if several handle the message.
        origin: By which exchange and key the first one came.
        now: The time, in case that this was the first failure.
    """
    first = (properties.headers or {}).get(FIRST_FAILURE)
    headers = clean_headers(properties.headers)
    headers[ATTEMPT] = attempt + 1
    headers[ORIGIN_EXCHANGE], headers[ORIGIN_KEY] = origin
    headers[FIRST_FAILURE] = first if isinstance(first, str) else now
    if handler is not None:
        headers[HANDLER] = handler
    # It was taken in time; an expiration would also make it leave its delay too early.
    again = sendable(properties, expiration=None)
    again.headers = headers
    return again


def _check(name: str, value: Any, makes_sense: bool, least: float, more: str = "") -> None:
    if not makes_sense or value < least:
        text = f"{name} of a RetryPolicy must be {least:g} or more {more}".rstrip()
        raise ConfigurationError(f"{text}, not {value!r}")
