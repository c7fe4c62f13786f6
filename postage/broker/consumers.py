# SPDX-License-Identifier: MIT
"""The consumers of a queue, and whose turn it is (RabbitMQ: consumer priorities, single
active consumer, prefetch of a consumer)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from postage.broker.frames import short_string

if TYPE_CHECKING:
    from postage.broker.queues import Entry


class Receiver(Protocol):
    """The channel of a consumer, as far as its queue has to know it."""

    @property
    def can_take(self) -> bool:
        """Whether the channel takes more deliveries now."""

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Send a message to a consumer."""

    def cancelled(self, consumer: Consumer) -> None:
        """Tell a consumer that its queue is gone."""

    def forgotten(self, consumer: Consumer) -> list[Entry]:
        """Return what a consumer held that its queue has forgotten; the client hears nothing."""


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

    @property
    def is_filled_by_next(self) -> bool:
        """Whether one more delivery is the last that it can take for now."""
        return 0 < self.prefetch <= self.unsettled + 1 and not self.no_ack


class Consumers:
    """The consumers of one queue. Those of the highest priority take turns.

    A consumer that can take no more rests, and comes last once `wake` says that it can again.

    Args:
        is_single_active: only one of them gets deliveries, until it goes.
        is_quorum: a quorum queue lets a consumer rest with the delivery that fills it, a classic
            queue only when there would be another one for it.
    """

    def __init__(self, *, is_single_active: bool = False, is_quorum: bool = False) -> None:
        self._members: dict[Consumer, None] = {}
        #: Those that take turns, by their priority, the highest first.
        self._levels: dict[int, deque[Consumer]] = {}
        #: Those that do not, in the order in which they stopped.
        self._resting: dict[Consumer, None] = {}
        self._is_single_active = is_single_active
        self._is_quorum = is_quorum
        self._active: Consumer | None = None

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Consumer]:
        return iter(self._members)

    @property
    def exclusive(self) -> Consumer | None:
        """The consumer that has the queue for itself, if one has."""
        return next((consumer for consumer in self if consumer.exclusive), None)

    def add(self, consumer: Consumer) -> None:
        """Let a consumer take part."""
        self._members[consumer] = None
        if consumer.priority not in self._levels:
            self._levels[consumer.priority] = deque()
            self._levels = dict(sorted(self._levels.items(), reverse=True))
        self._levels[consumer.priority].append(consumer)
        if self._is_single_active and self._active is None:
            self._active = consumer

    def remove(self, consumer: Consumer) -> None:
        """Let a consumer go; if it was the active one, the next in line becomes that.

        It is no error if it is not there: the queue may have forgotten it (a fault).
        """
        if consumer not in self._members:
            return
        del self._members[consumer]
        if consumer in self._resting:
            del self._resting[consumer]
        else:
            self._levels[consumer.priority].remove(consumer)
        if all(each.priority != consumer.priority for each in self._members):
            del self._levels[consumer.priority]
        if self._active is consumer:
            self._active = max(self._members, key=lambda each: each.priority, default=None)

    def wake(self, consumer: Consumer) -> None:
        """Let a consumer that may take more have its turn again."""
        if consumer in self._resting:
            del self._resting[consumer]
            self._levels[consumer.priority].append(consumer)

    def wake_all(self, channel: Receiver) -> None:
        """Let the consumers of a channel that may take more have their turns again."""
        for consumer in [each for each in self._resting if each.channel is channel]:
            self.wake(consumer)

    def next(self) -> Consumer | None:
        """Return the consumer whose turn it is, None if nobody can take more."""
        if self._active is not None:
            return self._active if self._active.can_take else None
        for level in self._levels.values():
            while level:
                consumer = level.popleft()
                if not consumer.can_take:
                    self._resting[consumer] = None
                    continue
                if self._is_quorum and consumer.is_filled_by_next:
                    self._resting[consumer] = None
                else:
                    level.append(consumer)
                return consumer
        return None
