# SPDX-License-Identifier: MIT
"""Messages that wait in the broker before they get to their exchange or queue.

They wait in a cascade of queues, the *levels*. What is in the queue of level k leaves it
after 0.1 s x 2^k, and a message waits in those levels whose bits are set in the number of
tenths of a second that it has to wait::

    publish ──> exchange k ──true──> queue k ──expired──> exchange k-1 ──> … ──> goal
                           ──────────false──────────────>

All messages of a queue wait equally long there, so none is held up by one in front of it.
The levels are headers exchanges: the routing key stays that of the message.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from functools import partial
from typing import Any

from pika.channel import Channel

from postage.errors import (
    NOT_FOUND,
    RESOURCE_LOCKED,
    ChannelClosedError,
    ConfigurationError,
    UnroutableError,
)
from postage.headers import BROKER_RECORD
from postage.settings import queue_type_from_environment
from postage.topology import ExchangeSpec, QueueSpec, error_queue
from postage.transport.conversation import Declarable, Script
from postage.transport.publisher import Publishing

#: Steps of a second: a message waits 0.1 s, or a multiple of it.
STEPS = 10
#: Enough for more than `LONGEST`: 2^29 steps are 621 days.
LEVELS = 29
#: Seconds that a message waits at most: a year, also a leap year.
LONGEST = 366 * 24 * 3600.0
#: Seconds after which a sender binds the goal again. Its queue may have been deleted, which
#: takes the binding along, and declared anew.
RENEWAL = 10.0

#: The headers that lead a message through the cascade.
_BIT = "postage-bit-"
BIT = _BIT + "{:02}"
TO_EXCHANGE, TO_QUEUE = "postage-exchange", "postage-queue"
#: What is of no use in a message that is published again: see `stripped()`.
_LEFTOVERS = (TO_EXCHANGE, TO_QUEUE, _BIT, *BROKER_RECORD)
#: The names of the levels, of their exchanges and of their queues.
LEVEL = "postage-delay-{:02}"

#: Gets what has no goal any more. A fanout, so that nothing is lost on the way.
UNROUTABLE = ExchangeSpec("postage-unroutable", "fanout")
_OR_UNROUTABLE = {"alternate-exchange": UNROUTABLE.name}
#: Sends on what has waited, to its queue, or into the queue `LAST`.
GOAL = ExchangeSpec("postage-delay-goal", "headers", arguments=_OR_UNROUTABLE)
#: Sends on what goes to an exchange.
LAST = ExchangeSpec("postage-delay-last", "headers", arguments=_OR_UNROUTABLE)


# ------------------------------------------------------------------------- pure decisions


def seconds_of(delay: float | timedelta | None, at: datetime | None, now: datetime) -> float:
    """Return how long a message is to wait: 0 if its time has come.

    Args:
        delay: Seconds, or a timedelta.
        at: When it is to arrive, instead; with a time zone.
        now: With a time zone.

    Raises:
        ConfigurationError: Both are given, or one that makes no sense.
    """
    if at is None:
        return 0.0 if delay is None else _checked("_delay", delay)
    if delay is not None:
        raise ConfigurationError("give _delay or _at, but not both")
    if not isinstance(at, datetime):
        raise ConfigurationError(f"_at is {at!r}: give a datetime with a time zone")
    if at.utcoffset() is None:
        raise ConfigurationError(
            f"_at is {at!r}, which has no time zone: give one, as in datetime.now(timezone.utc)"
        )
    seconds = (at - now).total_seconds()
    return _checked("_at", seconds) if seconds > 0 else 0.0


def plain_seconds(what: str, value: object) -> float:
    """Return a number of seconds, or a timedelta, as a number of seconds.

    Raises:
        ConfigurationError: It is neither, or negative, or no number.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, (int, float))
        or not math.isfinite(seconds)
        or seconds < 0
    ):
        raise ConfigurationError(
            f"{what} is {value!r}: give a number of seconds, 0 or more, or a timedelta"
        )
    return float(seconds)


def _checked(what: str, value: object) -> float:
    seconds = plain_seconds(what, value)
    if seconds > LONGEST:
        raise ConfigurationError(
            f"{what} is more than 366 days away: keep the message in a database until then"
        )
    return seconds


def steps_of(seconds: float) -> int:
    """Return how many tenths of a second are needed: never less than the seconds."""
    return math.ceil(Fraction(seconds) * STEPS)


def bits_of(steps: int) -> dict[str, bool]:
    """Return the headers of the levels up to the highest one in which a message waits."""
    return {BIT.format(k): bool(steps >> k & 1) for k in range(steps.bit_length())}


def stripped(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the headers of a message without what an earlier delay has left.

    Needed whenever a message that was received is published again. With two goals it would
    go to both; and with the broker's record of its dead letterings (`x-death`) the second
    pass through a queue would be taken for a circle, and the message be dropped in silence.
    """
    return {
        name: value
        for name, value in (headers or {}).items()
        if not name.startswith(_LEFTOVERS)
    }


# ------------------------------------------------------------------------- the topology


@dataclass(frozen=True)
class Link:
    """A binding: what a headers exchange sends on if it has a header. A fanout asks for none.

    ``value`` None means any.
    """

    source: str
    destination: str
    header: str = ""
    value: bool | str | None = None
    to_exchange: bool = False
    lasts_seconds: float = math.inf

    def script(self, channel: Channel) -> Script[None]:
        """Bind.

        Raises:
            UnroutableError: The destination is not there.
            ChannelClosedError: The broker refuses it otherwise.
        """
        arguments = {"x-match": "all", self.header: self.value} if self.header else {}
        bind = (
            partial(channel.exchange_bind, self.destination, self.source)
            if self.to_exchange
            else partial(channel.queue_bind, self.destination, self.source)
        )
        try:
            yield partial(bind, routing_key="", arguments=arguments)
        except ChannelClosedError as error:
            raise self._explained(error) from None

    def _explained(self, error: ChannelClosedError) -> UnroutableError | ChannelClosedError:
        if error.code == NOT_FOUND and self.header == TO_QUEUE:
            return UnroutableError([("", self.destination)])
        advice = ""
        if error.code == RESOURCE_LOCKED:
            advice = "It is exclusive to another connection: delay through an exchange instead"
        attempt = f"bind {self.destination!r} to {self.source!r}, for delayed messages"
        return ChannelClosedError(error.code, error.text, attempt, advice)


@dataclass(frozen=True)
class Delayed:
    """A way through the cascade: where it begins and where it ends.

    ``goal`` is an exchange, or the name of a queue.
    """

    goal: ExchangeSpec | str
    level: int
    is_bound: bool = False  # somebody else sees to it: see `Goal`

    @property
    def lasts_seconds(self) -> float:
        """How long it is taken for granted that the goal is bound."""
        return RENEWAL

    @property
    def exchange(self) -> str:
        """The name of the exchange where it begins."""
        return LEVEL.format(self.level)

    def headers(self, steps: int) -> dict[str, Any]:
        """Return the headers that lead a message through."""
        if isinstance(self.goal, str):
            return {**bits_of(steps), TO_QUEUE: self.goal}
        return {**bits_of(steps), TO_EXCHANGE: self.goal.name}

    def parts(self) -> Iterator[Declarable]:
        """Yield what has to be there, in the order in which it is declared."""
        yield from _end()
        for level in range(self.level + 1):
            yield from _level(level)
        if isinstance(self.goal, str):
            if not self.is_bound:
                yield _link_to(self.goal)
            return
        last = _last_queue()
        yield from (LAST, last, Link(GOAL.name, last.name, TO_EXCHANGE), self.goal)
        name = self.goal.name
        yield Link(LAST.name, name, TO_EXCHANGE, name, True, RENEWAL)


@dataclass(frozen=True)
class Goal:
    """A queue at the end of the cascade, to be bound by the connection that it is exclusive to."""

    queue: str
    lasts_seconds: float = RENEWAL

    def parts(self) -> Iterator[Declarable]:
        """Yield what has to be there, in the order in which it is declared."""
        yield from _end()
        yield _link_to(self.queue)


def _end() -> Iterator[Declarable]:
    unroutable = error_queue(UNROUTABLE.name)
    yield from (UNROUTABLE, unroutable, Link(UNROUTABLE.name, unroutable.name), GOAL)


def _link_to(queue: str) -> Link:
    return Link(GOAL.name, queue, TO_QUEUE, queue, lasts_seconds=RENEWAL)


def _level(level: int) -> Iterator[Declarable]:
    exchange = ExchangeSpec(LEVEL.format(level), "headers")
    below = LEVEL.format(level - 1) if level else GOAL.name
    queue = _queue(
        exchange.name,
        {
            "x-message-ttl": 1000 // STEPS * 2**level,
            "x-dead-letter-exchange": below,  # and no key: the message keeps its own
        },
        # RabbitMQ, quorum queues: what has expired stays until it is confirmed where it goes,
        # which needs reject-publish.
        {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"},
    )
    bit = BIT.format(level)
    yield from (exchange, queue)
    yield Link(exchange.name, queue.name, bit, True)
    yield Link(exchange.name, below, bit, False, to_exchange=True)


def _last_queue() -> QueueSpec:
    """Return the queue before the last step, if that leads to an exchange.

    It drops what no queue is bound for by then. The queue of a level would not: it tries
    again for ever (at-least-once), and 32 such messages keep all others in it.
    """
    return _queue(LAST.name, {"x-message-ttl": 0, "x-dead-letter-exchange": LAST.name})


def _queue(
    name: str, arguments: Mapping[str, Any] | None = None, quorum: Mapping[str, Any] | None = None
) -> QueueSpec:
    kind = queue_type_from_environment()
    more = quorum or {} if kind == "quorum" else {}
    return QueueSpec(name, arguments={"x-queue-type": kind, **(arguments or {}), **more})


# -------------------------------------------------------------------- what is to be sent


@dataclass(frozen=True)
class Wait:
    """What the sender of a message wants: to wait so long, or until then.

    Raises:
        ConfigurationError: As `seconds_of()`.
    """

    delay: float | timedelta | None = None
    at: datetime | None = None

    def __post_init__(self) -> None:
        self.seconds()

    def seconds(self) -> float:
        """Return the seconds that are left."""
        return seconds_of(self.delay, self.at, datetime.now(timezone.utc))

    def begin(self, mandatory: bool, is_bound: bool = False) -> Due:
        """Return when a message is due that is sent now."""
        return Due(time.monotonic() + self.seconds(), mandatory, is_bound)


@dataclass(frozen=True)
class Due:
    """When a publishing is due, on the monotonic clock, and whether it is mandatory then.

    It aims the publishing whenever that is about to be written: when there was no connection
    for a while, there is less to wait.
    """

    time: float
    mandatory: bool
    is_bound: bool = False

    def __call__(self, publishing: Publishing) -> None:
        """Lead a publishing into the cascade, or straight to its exchange if it is due."""
        steps = steps_of(max(0.0, self.time - time.monotonic()))
        exchange = publishing.exchange
        publishing.properties = properties = copy.copy(publishing.loose_properties)
        headers = stripped(properties.headers)
        if steps:
            goal = publishing.key if exchange.is_default else exchange
            delayed = Delayed(goal, steps.bit_length() - 1, self.is_bound)
            headers |= delayed.headers(steps)
            properties.expiration = None  # it would leave the first queue then
            publishing.preparation, publishing.via = delayed, delayed.exchange
            publishing.mandatory = True  # every level has a queue, unless somebody deleted it
        else:
            publishing.preparation, publishing.via = exchange, exchange.name
            publishing.mandatory = self.mandatory
        properties.headers = headers or None


#: The headers that are added at most, beside the name of the goal.
MOST_HEADERS = Delayed("q" * 255, LEVELS - 1).headers(2**LEVELS - 1)
