# SPDX-License-Identifier: MIT
"""A queue: what waits, who gets it, what becomes of it (AMQP 0-9-1, sections 3.1.3 and 1.7).

A queue decides; where dead letters go and what is written to disk is told to its `Host`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from postage.broker.arguments import QueueArguments
from postage.broker.clock import Clock, Timer
from postage.broker.consumers import Consumer, Consumers
from postage.broker.messages import Message

#: Bytes that a message is taken to need beside its content: measured with 100,000 of them.
ENTRY_BYTES = 700
#: Seconds until a dead letter is tried again that found no queue, or only full ones.
DEAD_LETTER_PAUSE = 5.0


class Entry:
    """A message in one queue.

    Attributes:
        position: its place among all that the queue ever held; a message that is given back
            returns to it.
        expires: when it is no longer delivered, on the broker's clock; None for never.
        deliveries: how often it was given back.
    """

    __slots__ = ("deliveries", "expires", "is_redelivered", "message", "position", "queue")

    def __init__(
        self, queue: Queue, message: Message, position: int, expires: float | None
    ) -> None:
        self.queue = queue
        self.message = message
        self.position = position
        self.expires = expires
        self.deliveries = 0
        self.is_redelivered = False

    def __lt__(self, other: Entry) -> bool:
        return self.position < other.position


class Host(Protocol):
    """What a queue needs from the virtual host in which it lives."""

    @property
    def clock(self) -> Clock:
        """The broker's clock."""

    def bury(self, entry: Entry, reason: str) -> None:
        """Publish a dead letter soon, and call `Queue.buried` with what became of it."""

    def keep(self, entry: Entry) -> None:
        """Take note of a message that a queue has now."""

    def keep_count(self, entry: Entry) -> None:
        """Take note of how often a message was given back."""

    def forget(self, entry: Entry) -> None:
        """Take note of a message that a queue has no longer."""

    def expire_queue(self, queue: Queue) -> None:
        """Delete a queue that nobody used for too long."""


class _Level:
    """The messages of one priority, in order: what was given back is ahead of what is new."""

    __slots__ = ("_fresh", "_is_quorum", "_returned", "_returned_heap")

    def __init__(self, is_quorum: bool) -> None:
        self._fresh: deque[Entry] = deque()
        self._is_quorum = is_quorum
        self._returned: deque[Entry] = deque()
        self._returned_heap: list[Entry] = []

    def __iter__(self) -> Iterator[Entry]:
        yield from self._returned
        yield from sorted(self._returned_heap)
        yield from self._fresh

    @property
    def head(self) -> Entry | None:
        if self._returned:
            return self._returned[0]
        if self._returned_heap:
            return self._returned_heap[0]
        return self._fresh[0] if self._fresh else None

    def push(self, entry: Entry) -> None:
        self._fresh.append(entry)

    def push_back(self, entry: Entry) -> None:
        # A classic queue puts it back in its place; a quorum queue delivers what was given
        # back before all others, in the order in which it was given back.
        if self._is_quorum:
            self._returned.append(entry)
        else:
            heapq.heappush(self._returned_heap, entry)

    def pop(self) -> Entry:
        if self._returned:
            return self._returned.popleft()
        if self._returned_heap:
            return heapq.heappop(self._returned_heap)
        return self._fresh.popleft()


class Queue:
    """A queue of a virtual host.

    Args:
        owner: the connection that has it for itself, None if it is not exclusive.
        id: its number in the store, None if it is not stored.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        arguments: QueueArguments,
        *,
        durable: bool = False,
        auto_delete: bool = False,
        owner: object = None,
        id: int | None = None,
    ) -> None:
        self.host = host
        self.name = name
        self.arguments = arguments
        self.durable = durable
        self.auto_delete = auto_delete
        self.owner = owner
        self.id = id
        self.consumers = Consumers(
            is_single_active=arguments.is_single_active, is_quorum=arguments.is_quorum
        )
        self.is_deleted = False
        self.unsettled = 0
        #: Messages that wait, and the bytes of their bodies.
        self.count = 0
        self.bytes = 0
        self._levels = [
            _Level(arguments.is_quorum) for _ in range((arguments.max_priority or 0) + 1)
        ]
        self._next_position = 0
        #: Dead letters that nobody took so far, with their reasons; at-least-once only.
        self._stuck: deque[tuple[Entry, str]] = deque()
        self._expiry: Timer | None = None
        self._retry: Timer | None = None
        self._use: Timer | None = None
        self._unused_since = host.clock.now()
        self._watch_use()

    def __repr__(self) -> str:
        return (
            f"<Queue {self.name} [{self.count} ready, {self.unsettled} unsettled, "
            f"{len(self.consumers)} consumers]>"
        )

    # What comes in

    def refuses(self, message: Message) -> bool:
        """Tell whether it is too full for a message, and refuses what does not fit."""
        limits = self.arguments
        if limits.overflow == "drop-head":
            return False
        # A quorum queue notices that it is full only once it holds more than it should.
        count, size = (0, 0) if limits.is_quorum else (1, len(message.body))
        return (limits.max_length is not None and self.count + count > limits.max_length) or (
            limits.max_bytes is not None and self.bytes + size > limits.max_bytes
        )

    def publish(self, message: Message) -> bool:
        """Take a message, hand it out if a consumer waits. Return False if it is full."""
        if self.refuses(message):
            if self.arguments.overflow == "reject-publish-dlx":
                entry = self._entry(message)
                self.host.keep(entry)
                self._bury(entry, "maxlen")
            return False
        entry = self._entry(message)
        self._push(entry)
        self.host.keep(entry)
        self.dispatch(newest=entry)
        self._drop_what_is_too_much()
        self._drop_expired()
        return True

    def restore(
        self, message: Message, position: int, expires: float | None, deliveries: int
    ) -> None:
        """Take back a message from the store. It may have been delivered before."""
        entry = Entry(self, message, position, expires)
        entry.deliveries = deliveries
        entry.is_redelivered = True
        self._next_position = max(self._next_position, position + 1)
        self._push(entry)

    def restored(self) -> None:
        """Begin to live, after the last message of the store is back."""
        self._drop_expired()

    def _entry(self, message: Message) -> Entry:
        waits = [ms for ms in (message.expiration, self.arguments.message_ttl) if ms is not None]
        expires = self.host.clock.now() + min(waits) / 1000 if waits else None
        position = self._next_position
        self._next_position += 1
        return Entry(self, message, position, expires)

    def _push(self, entry: Entry) -> None:
        self._level_of(entry).push(entry)
        self._counted(entry, 1)

    def _level_of(self, entry: Entry) -> _Level:
        return self._levels[min(entry.message.priority, len(self._levels) - 1)]

    def _counted(self, entry: Entry, number: int) -> None:
        self.count += number
        self.bytes += number * len(entry.message.body)

    # What goes out

    def get(self) -> Entry | None:
        """Return the first message, which is unsettled from now on; None if it is empty."""
        self.use()
        self._drop_expired()
        entry = self._pop()
        if entry is not None:
            self.unsettled += 1
            self._drop_expired()
        return entry

    def dispatch(self, newest: Entry | None = None) -> None:
        """Hand out messages for as long as there are some and consumers take them.

        Args:
            newest: was published a moment ago: a TTL of 0 lets it be delivered at once.
        """
        while self.count:
            self._drop_expired(newest)
            consumer = self.consumers.next()
            if consumer is None:
                return
            entry = self._pop()
            if entry is None:
                return
            if consumer.no_ack:
                consumer.channel.deliver(consumer, entry)
                self.host.forget(entry)
            else:
                self.unsettled += 1
                consumer.unsettled += 1
                consumer.channel.deliver(consumer, entry)

    def _pop(self) -> Entry | None:
        for level in reversed(self._levels):
            if level.head is not None:
                entry = level.pop()
                self._counted(entry, -1)
                return entry
        return None

    # What becomes of it

    def ack(self, entry: Entry) -> None:
        """Let go of a message that was handled."""
        self.unsettled -= 1
        self.host.forget(entry)

    def reject(self, entry: Entry) -> None:
        """Let go of a message that nobody wants: it is a dead letter."""
        self.unsettled -= 1
        self._bury(entry, "rejected")

    def requeue(self, entries: Iterable[Entry], *, is_lost: bool = False) -> None:
        """Take messages back that were not settled, and hand them out again.

        A classic queue puts each to its place. A quorum queue without a delivery limit puts what
        was given back on purpose behind all others, so that its log can be cut, and what is
        given back for another reason ahead of all others.

        Args:
            is_lost: their consumer is gone; nobody gave them back on purpose.
        """
        limit = self.arguments.delivery_limit
        is_to_back = self.arguments.is_quorum and limit is None and not is_lost
        for entry in entries:
            self.unsettled -= 1
            if self.is_deleted:
                self.host.forget(entry)
                continue
            entry.is_redelivered = True
            entry.deliveries += 1
            if self.arguments.is_quorum and limit is not None and entry.deliveries > limit:
                self._bury(entry, "delivery_limit")
            elif is_to_back:
                self._push_to_back(entry)
            else:
                self._level_of(entry).push_back(entry)
                self._counted(entry, 1)
                self.host.keep_count(entry)
        if not self.arguments.is_quorum:
            self._drop_what_is_too_much()
        self.dispatch()
        self._drop_what_is_too_much()
        self._drop_expired()

    def _push_to_back(self, entry: Entry) -> None:
        self.host.forget(entry)
        entry.position = self._next_position
        self._next_position += 1
        self._push(entry)
        self.host.keep(entry)

    def purge(self) -> int:
        """Throw away what waits, and return how much that was."""
        self.use()
        number = 0
        while (entry := self._pop()) is not None:
            self.host.forget(entry)
            number += 1
        return number

    def kept(self) -> Iterator[Entry]:
        """Yield what waits, in the order in which it would be delivered, then what is stuck."""
        for level in reversed(self._levels):
            yield from level
        yield from (entry for entry, _ in self._stuck)

    def close(self) -> list[Entry]:
        """Stop the timers and let go of all that is kept, which is returned."""
        self.is_deleted = True
        for timer in (self._expiry, self._retry, self._use):
            if timer is not None:
                timer.cancel()
        kept = list(self.kept())
        # Deliveries may be settled later, and nobody must get what was behind them.
        self._levels = [_Level(self.arguments.is_quorum) for _ in self._levels]
        self._stuck.clear()
        self.count = self.bytes = 0
        return kept

    def _drop_what_is_too_much(self) -> None:
        limits = self.arguments
        if limits.overflow != "drop-head":
            return
        while self.count and (
            (limits.max_length is not None and self.count > limits.max_length)
            or (limits.max_bytes is not None and self.bytes > limits.max_bytes)
        ):
            entry = self._pop()
            assert entry is not None
            self._bury(entry, "maxlen")

    def _drop_expired(self, newest: Entry | None = None) -> None:
        """Drop what has waited for too long, as far as it is at the head, as RabbitMQ does."""
        now = self.host.clock.now()
        for level in reversed(self._levels):
            while (entry := level.head) is not None:
                if entry.expires is None:
                    return
                if entry.expires > now or entry is newest:
                    self._wake_at(entry.expires)
                    return
                level.pop()
                self._counted(entry, -1)
                self._bury(entry, "expired")

    def _wake_at(self, when: float) -> None:
        if self._expiry is not None and self._expiry.is_due:
            if self._expiry.when <= when:
                return
            self._expiry.cancel()
        self._expiry = self.host.clock.call_at(when, self._drop_expired)

    def _bury(self, entry: Entry, reason: str) -> None:
        """Make a dead letter of a message that the queue no longer holds."""
        if self.arguments.dead_letter_exchange is None or self.is_deleted:
            self.host.forget(entry)
        else:
            self.host.bury(entry, reason)

    def buried(self, entry: Entry, reason: str, *, is_taken: bool) -> None:
        """Take note of what became of a dead letter."""
        if is_taken or not self._keeps_dead_letters:
            self.host.forget(entry)
            return
        self._stuck.append((entry, reason))
        if self._retry is None or not self._retry.is_due:
            self._retry = self.host.clock.call_later(DEAD_LETTER_PAUSE, self._retry_dead_letters)

    @property
    def _keeps_dead_letters(self) -> bool:
        # RabbitMQ: at-least-once dead lettering works with overflow reject-publish only.
        limits = self.arguments
        return (
            limits.is_quorum and limits.is_at_least_once and limits.overflow == "reject-publish"
        )

    def _retry_dead_letters(self) -> None:
        for _ in range(len(self._stuck)):
            self._bury(*self._stuck.popleft())

    # Use, and its end

    def add_consumer(self, consumer: Consumer) -> None:
        """Let a consumer take part."""
        self.use()
        self.consumers.add(consumer)

    def remove_consumer(self, consumer: Consumer) -> None:
        """Let a consumer go."""
        self.consumers.remove(consumer)
        if not len(self.consumers):
            self.use()

    def use(self) -> None:
        """Take note that somebody needs the queue, for the argument x-expires."""
        self._unused_since = self.host.clock.now()

    def _watch_use(self) -> None:
        if self.arguments.expires is None or self.is_deleted:
            return
        if len(self.consumers):
            self.use()
        end = self._unused_since + self.arguments.expires / 1000
        if end <= self.host.clock.now():
            self.host.expire_queue(self)
        else:
            self._use = self.host.clock.call_at(end, self._watch_use)
