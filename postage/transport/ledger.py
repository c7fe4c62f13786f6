# SPDX-License-Identifier: MIT
"""What a consumer declared, bound and unbound: put back on every new connection.

Steps are kept in an order that works, exchanges and queues before what needs them, and the
latest word about a binding last: a durable queue keeps its bindings, so one that was taken
back has to be taken back again if the broker was away.

Each step runs on a probe channel (`Connection.ask()`), since a refusal closes the channel
that it happens on. A refusal may teach something that makes the next attempt differ: that
what exists is adopted as it is, that what was adopted is there no more, or that a queue is
out of reach. What teaches the same a second time is the answer.

A queue is *out of reach* while the node of a cluster is down that it is on: a classic queue
is on one node. Then it cannot be declared, bound or consumed. What concerns it is left out
until the steps are taken again, lest it hold up the queues that other nodes have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pika
from pika.channel import Channel

from postage.errors import NOT_FOUND, ChannelClosedError, MismatchError, TransportError
from postage.topology import Binding, ExchangeSpec, QueueSpec, error_queue
from postage.transport.connection import Connection, is_adopted
from postage.transport.conversation import (
    Script,
    bind_queue,
    declare_exchange,
    declare_queue,
    unbind_queue,
)

logger = logging.getLogger(__name__)

#: What to do on a channel, by kind and value.
_Steps = dict[tuple[str, Any], Callable[[Channel], Script[None]]]


#: What a refusal taught: about what, and the code that taught it, or `OUT_OF_REACH`.
_Lesson = tuple[ExchangeSpec | QueueSpec, int]
OUT_OF_REACH = -1


class _Learned(TransportError):
    """A refusal after which the same steps are tried again, and do something else."""

    def __init__(self, lesson: _Lesson, refusal: ChannelClosedError) -> None:
        super().__init__(lesson, refusal)
        self.lesson = lesson
        self.refusal = refusal


class Ledger:
    """The topology of one consumer.

    Args:
        connection: Where it is put.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._steps: _Steps = {}
        self._names: dict[ExchangeSpec | QueueSpec, str] = {}  # what the broker called the nameless
        self._named_on: pika.SelectConnection | None = None
        self._adopted: set[ExchangeSpec | QueueSpec] = set()
        #: The queues that are out of reach, as far as is known, and what the broker said.
        self.out_of_reach: Mapping[QueueSpec, str] = {}

    # ------------------------------------------------------------------- any thread

    def bind(self, binding: Binding, timeout: float | None) -> None:
        """Declare exchange, queue and binding, now and on every new connection.

        Args:
            binding: All three.
            timeout: Seconds, as for `Connection.ask()`.

        Raises:
            QueueMismatchError, ExchangeMismatchError: It exists with other arguments.
            ChannelClosedError: The broker refuses it otherwise.
            ConnectionFailedError: There was no broker in time.
            ConnectionLostError: The broker closes the connection over it.
        """
        steps: _Steps = {}
        exchange, queue = binding.exchange, binding.queue
        if not exchange.is_default:
            steps["exchange", exchange] = lambda channel: self._declare_exchange(channel, exchange)
        steps["queue", queue] = lambda channel: self._declare_queue(channel, queue)
        steps["binding", binding] = lambda channel: bind_queue(
            channel, binding, self.name_of(queue)
        )
        what = f"bind queue {queue.name!r} to {exchange.name!r}"
        if exchange.is_default:  # there is nothing to bind
            what = f"declare queue {queue.name!r}"
        self._perform(steps, timeout, what)

    def unbind(self, binding: Binding, timeout: float | None) -> None:
        """Unbind, now and on every new connection.

        Raises:
            TransportError: As for `bind()`.
        """
        step: _Steps = {
            ("binding", binding): lambda channel: unbind_queue(
                channel, binding, self.name_of(binding.queue)
            )
        }
        self._perform(step, timeout, f"unbind queue {binding.queue.name!r}")

    def name_of(self, queue: QueueSpec) -> str:
        """Return the real name of a declared queue."""
        return self._names.get(queue, queue.name)

    def _perform(self, steps: _Steps, timeout: float | None, what: str) -> None:
        missing: dict[QueueSpec, str] = {}
        learned: set[_Lesson] = set()

        def script(channel: Channel) -> Script[None]:
            return _in_order(channel, steps, missing)

        while True:
            try:
                self._connection.ask(script, timeout, what)
                break
            except _Learned as news:
                if news.lesson in learned:  # it goes in circles
                    raise news.refusal from None
                learned.add(news.lesson)
        self._note({**self.out_of_reach, **missing})
        for key, step in steps.items():
            if key[0] == "binding":
                self._steps.pop(key, None)  # to the end: the latest word on a binding counts
            self._steps[key] = step  # exchanges and queues stay before what needs them

    # ------------------------------------------------------------------- the leader

    def replay(self, done: Callable[[TransportError | None], None]) -> None:
        """Take every step again.

        Args:
            done: Called with None, or with why it was refused.
        """
        steps = dict(self._steps)
        if not steps:
            done(None)
            return
        missing: dict[QueueSpec, str] = {}
        learned: set[_Lesson] = set()

        def script(channel: Channel) -> Script[None]:
            return _in_order(channel, steps, missing)

        def replayed(_result: Any, error: TransportError | None) -> None:
            if isinstance(error, _Learned):
                if error.lesson not in learned:
                    learned.add(error.lesson)
                    self._connection.probe(script, replayed)
                    return
                error = error.refusal  # it goes in circles
            if error is None:
                self._note(missing)
            done(error)

        self._connection.probe(script, replayed)

    def _note(self, missing: Mapping[QueueSpec, str]) -> None:
        """Remember which queues are out of reach. Says in the log what is new about it."""
        before, self.out_of_reach = self.out_of_reach, missing
        for queue, reason in missing.items():
            if queue not in before:
                logger.warning("going on without queue %r until it is back: %s", queue.name, reason)
        for queue in before:
            if queue not in missing:
                logger.info("queue %r is back", queue.name)

    def _declare_exchange(self, channel: Channel, spec: ExchangeSpec) -> Script[None]:
        yield from self._declare(channel, spec)

    def _declare_queue(self, channel: Channel, spec: QueueSpec) -> Script[None]:
        if self._named_on is not channel.connection:  # the nameless went with the former one
            self._names.clear()
            self._named_on = channel.connection
        target = spec.dead_letter_queue
        if target is not None and not spec.passive and spec not in self._adopted:
            yield from self._declare(channel, error_queue(target))
        name = yield from self._declare(channel, spec)
        if not spec.name:
            self._names[spec] = name

    def _declare(self, channel: Channel, spec: ExchangeSpec | QueueSpec) -> Script[str]:
        """Declare it, or if that makes no sense (any more), see whether it is there.

        A mismatch that was adopted would be one again, and a nameless queue another one.
        """
        passive = spec.passive or spec in self._adopted
        try:
            if isinstance(spec, ExchangeSpec):
                yield from declare_exchange(channel, replace(spec, passive=passive))
                return spec.name
            asked = replace(spec, name=self.name_of(spec), passive=passive or spec in self._names)
            return (yield from declare_queue(channel, asked))
        except ChannelClosedError as error:
            if self._learns(spec, error):
                raise _Learned((spec, error.code), error) from error
            raise

    def _learns(self, spec: ExchangeSpec | QueueSpec, error: ChannelClosedError) -> bool:
        """Note what a refused declaration tells, and whether the next attempt differs."""
        if isinstance(error, MismatchError) and is_adopted(error):
            self._adopted.add(spec)
            return True
        if error.code == NOT_FOUND and (spec in self._adopted or spec in self._names):
            self._adopted.discard(spec)  # it was deleted: then it can be made as it should be
            self._names.pop(spec, None)
            return True
        return False


def _in_order(channel: Channel, steps: _Steps, missing: dict[QueueSpec, str]) -> Script[None]:
    """Take steps, but for those of queues that are out of reach, and add to these."""
    for (kind, subject), step in steps.items():
        queue = subject.queue if isinstance(subject, Binding) else subject
        if queue in missing:
            continue
        try:
            yield from step(channel)
        except _Learned:
            raise
        except ChannelClosedError as error:
            # A queue that does not exist would have been made.
            if kind != "queue" or error.code != NOT_FOUND or subject.passive:
                raise
            missing[subject] = error.text
            raise _Learned((subject, OUT_OF_REACH), error) from error
