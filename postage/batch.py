# SPDX-License-Identifier: MIT
"""Many messages that are confirmed together."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from postage import outbox as outboxes
from postage.errors import ClosedError
from postage.futures import refuse_in_coroutine
from postage.messages import MessageCommand
from postage.sending import Composed, Report
from postage.transport import connection as connections
from postage.transport.publisher import Publishing

if TYPE_CHECKING:
    from postage.producer import Builder, GenericProducer

#: Messages of a batch that may be without a confirm at one time. Enough to keep a broker
#: on this or another continent busy, and few enough to hold in memory.
BATCH_WINDOW = 2000
#: Messages of a batch that are handed to the loop together.
BATCH_CHUNK = 200
#: Seconds that one of them waits at most for the others, whatever the block does meanwhile.
BATCH_DELAY = 0.02


class Batch:
    """Many messages that are confirmed together. Made by `GenericProducer.batch()`.

    It has the producer's ``message_x()``, ``message()`` and ``forward()``. They return when
    the message is on its way; the end of the block waits for all of them.

    In a handler with an outbox its messages go there, and it neither waits nor lists them.

    Attributes:
        confirmed: The ids of the messages that the broker confirmed.
        failed: (message id, error) of those that certainly did not arrive everywhere.
        unknown: (message id, error) of those that may have arrived.

    Raises:
        BatchError: At the end of the block, if not every message was confirmed. An
            exception of the block itself goes first.
    """

    _noun: ClassVar[str] = "batch"

    def __init__(self, producer: GenericProducer) -> None:
        self._report = report = Report()
        self.confirmed, self.failed, self.unknown = report.confirmed, report.failed, report.unknown
        self._producer = producer
        self._publisher = producer._open()
        self._chunk: collections.deque[Publishing] = collections.deque()
        self._methods: dict[str, Callable[..., None]] = {}  # those that were called by now
        self._collecting = self._calling = False
        self._sent = 0
        self._open = self._in_outbox = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} [{self._sent} sent, {self._report.settled} settled]>"

    def __enter__(self) -> Batch:
        self._in_outbox = outboxes.current() is not None
        if not self._in_outbox:  # else it has nothing to wait for
            self._refuse_in_coroutine()
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._open = False
        self._methods.clear()  # they refer to us
        if self._publisher.hub.pid != os.getpid():
            if kind is None:
                self._check_fork()
            return
        self._finish(kind is None)

    def _finish(self, succeeded: bool) -> None:
        """End the block in the process that began it."""
        self._await_fates()
        if succeeded:
            self._report.check()

    def _await_fates(self) -> None:
        if self._report.settled < self._sent:
            self._wait_for(lambda: self._report.settled >= self._sent)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("message_"):
            raise AttributeError(
                f"a {self._noun} has no attribute {name!r}: "
                "it sends with message_*, message and forward"
            )
        method = self._methods.get(name)
        if method is None:
            builder = self._producer._builder(name, MessageCommand)
            method = self._methods[name] = partial(self._build_and_send, builder)
        return method

    def message(self, /, *args: Any, **kwds: Any) -> None:
        """Send a generic message, as `GenericProducer.message()`."""
        self._build_and_send(self._producer._build_generic, *args, **kwds)

    def forward(self, body: Mapping[str, Any], *args: Any, **kwds: Any) -> None:
        """Send a body on as it is, as `GenericProducer.forward()`."""
        self._refuse_future(kwds)
        self._send(self._producer._compose_forward(body, kwds))

    def _build_and_send(self, build: Builder, /, *args: Any, **kwds: Any) -> None:
        self._refuse_future(kwds)
        self._send(self._producer._compose(build, args, kwds))

    def _refuse_future(self, kwds: Mapping[str, Any]) -> None:
        if kwds.get("_future"):
            raise TypeError(
                f"a {self._noun} takes no _future: it waits for all of its messages at its end"
            )

    def _refuse_in_coroutine(self) -> None:
        noun = self._noun
        refuse_in_coroutine(f"the end of a {noun}", f"run the {noun} in asyncio.to_thread()")

    def _check_fork(self) -> None:
        connections.check_fork(self._publisher.connection, f"the {self._noun}")

    def _check_open(self) -> None:
        self._check_fork()
        if not self._open:
            raise ClosedError(f"a {self._noun} sends inside its with block")

    def _send(self, composed: Composed) -> None:
        self._check_open()
        self._dispatch(composed)

    def _dispatch(self, composed: Composed) -> None:
        """Put a message on its way, or into the outbox that it belongs to."""
        if composed.outbox is not None and composed.outbox.hold(self._publisher, composed):
            return
        if self._in_outbox:
            self._refuse_in_coroutine()
        hub, report = self._publisher.hub, self._report
        self._chunk.extend(report.publishings(composed))
        self._sent += 1
        if self._sent - report.settled > BATCH_WINDOW:
            self._wait_for(lambda: self._sent - report.settled <= BATCH_WINDOW // 2)
        elif len(self._chunk) >= BATCH_CHUNK:
            if not self._calling:  # else the leader is on its way to the chunk already
                self._calling = True
                hub.call(self._hand_over)
        elif not self._collecting:  # cleared before the chunk is handed over
            self._collecting = True
            hub.post(self._hand_over_soon)

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        self._publisher.hub.wait(ready, first=self._hand_over)

    # The rest is called by the leader.

    def _hand_over_soon(self) -> None:
        self._publisher.hub.call_later(BATCH_DELAY, self._hand_over_late)

    def _hand_over_late(self) -> None:
        self._collecting = False
        self._hand_over()

    def _hand_over(self) -> None:
        self._calling = False  # before the chunk is looked at
        chunk = []
        while self._chunk:
            chunk.append(self._chunk.popleft())
        if chunk:
            self._publisher.send(chunk)
