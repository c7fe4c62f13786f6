# SPDX-License-Identifier: MIT
"""Consumers that the broker no longer has, though it never said so.

RabbitMQ cancels a consumer when its queue goes, but not in every way that a consumer can
be lost when a queue moves to another node. Then the connection is fine, heartbeats go on,
and the component waits for ever. So it is asked now and then, by passive declarations on a
probe channel, how many consumers and messages the queues have.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from pika.channel import Channel

from postage.errors import NOT_FOUND, ChannelClosedError, TransportError
from postage.transport.connection import Connection
from postage.transport.conversation import Script

#: Seconds between two looks, give or take a half: many components look at different times.
INTERVAL = 30.0


class Watched(Protocol):
    """A consumer that the broker confirmed."""

    @property
    def tag(self) -> str | None:
        """What the broker knows it by; another one after each new start."""

    @property
    def name(self) -> str:
        """The real name of its queue."""

    @property
    def delivered(self) -> int:
        """How many messages have come by it."""

    @property
    def waits_in_line(self) -> bool:
        """Whether another consumer may have the queue for itself."""


@dataclass(frozen=True)
class Sight:
    """What was seen of a queue, and what had come from it by then."""

    tag: str | None
    delivered: int
    messages: int
    consumers: int

    def is_starved_since(self, earlier: Sight | None) -> bool:
        """Tell whether messages wait, and waited at an earlier look, but none came."""
        return (
            earlier is not None
            and self.messages > 0
            and earlier.messages > 0
            and (self.tag, self.delivered) == (earlier.tag, earlier.delivered)
        )


class Watchdog:
    """Looks after the consumers of one subscriber. All of it is called by the leader.

    Args:
        connection: Where to ask.
        watched: Returns the consumers that should be there.
        is_idle: Tells whether nothing that was delivered waits to be settled. A consumer
            that has its prefetch in hand gets no more, however much waits.
        lost: Called with a consumer that is gone, and with how that was seen.
        interval: Seconds.
    """

    def __init__(
        self,
        connection: Connection,
        watched: Callable[[], Collection[Watched]],
        is_idle: Callable[[], bool],
        lost: Callable[[Any, str], None],
        interval: float = INTERVAL,
    ) -> None:
        self._connection = connection
        self._watched = watched
        self._is_idle = is_idle
        self._lost = lost
        self._interval = interval
        self._timer: object | None = None
        self._seen: dict[str, Sight] = {}  # by the name of the queue

    def start(self) -> None:
        """Look from now on, until `stop()`."""
        if self._timer is None:
            pause = self._interval * random.uniform(0.5, 1.5)
            self._timer = self._connection.hub.call_later(pause, self._look)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._connection.hub.cancel(self._timer)
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        self.start()
        watched = {each.name: each for each in self._watched()}
        if watched and self._connection.is_open:
            tags = {name: each.tag for name, each in watched.items()}
            answered = partial(self._judge, watched, tags)
            self._connection.probe(partial(_count, watched), answered, self._interval)

    def _judge(
        self,
        watched: dict[str, Watched],
        tags: dict[str, str | None],
        counts: dict[str, tuple[int, int]] | None,
        _error: TransportError | None,
    ) -> None:
        """Compare with what is believed. What changed meanwhile is left for the next look."""
        seen: dict[str, Sight] = {}
        for name, (messages, consumers) in (counts or {}).items():
            each = watched[name]
            if each.tag is None or each.tag != tags[name]:
                continue
            sight = Sight(each.tag, each.delivered, messages, consumers)
            if consumers == 0:
                self._lost(each, "the broker has no consumer")
                continue
            if not self._is_idle() or each.waits_in_line:
                continue
            if sight.is_starved_since(self._seen.get(name)):
                self._lost(each, f"{messages} message(s) wait and none comes")
            else:
                seen[name] = sight
        self._seen = seen


def _count(names: Iterable[str], channel: Channel) -> Script[dict[str, tuple[int, int]]]:
    """Return how many messages are ready in each queue, and how many consumers it has."""
    counts: dict[str, tuple[int, int]] = {}
    for name in names:
        try:
            answer = yield partial(channel.queue_declare, queue=name, passive=True)
        except ChannelClosedError as error:
            if error.code == NOT_FOUND:  # it was deleted, and nobody told us
                counts[name] = (0, 0)
            return counts  # a refusal closes the channel; the others are for the next look
        counts[name] = (answer.method.message_count, answer.method.consumer_count)
    return counts
