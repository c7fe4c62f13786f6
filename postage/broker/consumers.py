# SPDX-License-Identifier: MIT
"""The consumers of a queue, and whose turn it is (RabbitMQ: consumer priorities, single
active consumer, prefetch of a consumer)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from postage.broker.frames import short_string


class Receiver(Protocol):
    """The channel of a consumer, as far as a queue has to know it."""

    @property
    def can_take(self) -> bool:
        """Whether the channel takes more deliveries now."""


class Consumer:
    """A consumer of a queue.

    Attributes:
        prefetch: how many deliveries it may hold unsettled, 0 for any number.
        unsettled: how many it holds.
    """

    __slots__ = (
        "channel",
        "encoded_tag",
        "exclusive",
        "no_ack",
        "prefetch",
        "priority",
        "tag",
        "unsettled",
    )

    def __init__(
        self,
        channel: Receiver,
        tag: str,
        *,
        no_ack: bool = False,
        exclusive: bool = False,
        prefetch: int = 0,
        priority: int = 0,
    ) -> None:
        self.channel = channel
        self.tag = tag
        self.encoded_tag = short_string(tag)
        self.no_ack = no_ack
        self.exclusive = exclusive
        self.prefetch = prefetch
        self.priority = priority
        self.unsettled = 0

    def __repr__(self) -> str:
        return f"<Consumer {self.tag} [{self.unsettled} of {self.prefetch or 'any'} unsettled]>"

    @property
    def can_take(self) -> bool:
        """Whether it takes one more delivery."""
        if self.prefetch and self.unsettled >= self.prefetch and not self.no_ack:
            return False
        return self.channel.can_take


class Consumers:
    """The consumers of one queue. Those of the highest priority take turns.

    Args:
        is_single_active: only one of them gets deliveries, until it goes.
    """

    def __init__(self, is_single_active: bool = False) -> None:
        self._levels: dict[int, deque[Consumer]] = {}
        self._priorities: list[int] = []
        self._is_single_active = is_single_active
        self._active: Consumer | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Consumer]:
        for priority in self._priorities:
            yield from self._levels[priority]

    @property
    def exclusive(self) -> Consumer | None:
        """The consumer that has the queue for itself, if one has."""
        return next((consumer for consumer in self if consumer.exclusive), None)

    def add(self, consumer: Consumer) -> None:
        """Let a consumer take part."""
        if consumer.priority not in self._levels:
            self._levels[consumer.priority] = deque()
            self._priorities = sorted(self._levels, reverse=True)
        self._levels[consumer.priority].append(consumer)
        self._count += 1
        if self._is_single_active and self._active is None:
            self._active = consumer

    def remove(self, consumer: Consumer) -> None:
        """Let a consumer go; if it was the active one, the next in line becomes that."""
        level = self._levels[consumer.priority]
        level.remove(consumer)
        self._count -= 1
        if not level:
            del self._levels[consumer.priority]
            self._priorities.remove(consumer.priority)
        if self._active is consumer:
            self._active = next(iter(self), None)

    def next(self) -> Consumer | None:
        """Return the consumer whose turn it is, None if nobody can take more."""
        if self._active is not None:
            return self._active if self._active.can_take else None
        for priority in self._priorities:
            level = self._levels[priority]
            for _ in range(len(level)):
                consumer = level[0]
                level.rotate(-1)
                if consumer.can_take:
                    return consumer
        return None
