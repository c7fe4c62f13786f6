# SPDX-License-Identifier: MIT
"""Many messages that are confirmed together."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from postage.errors import BatchError, ClosedError, PostageError, PublishUnknownError
from postage.futures import refuse_in_coroutine
from postage.messages import MessageCommand
from postage.sending import Composed, Sending
from postage.transport import connection as connections
from postage.transport.publisher import Publishing

if TYPE_CHECKING:
    from postage.producer import Builder, GenericProducer

#: Messages of a batch that may be without a confirm at one time. Enough to keep a broker
#: on this or another continent busy, and few enough to hold in memory.
BATCH_WINDOW = 2000
#: Messages of a batch that are handed to the loop together.
BATCH_CHUNK = 64
#: Seconds that one of them waits at most for the others, whatever the block does meanwhile.
BATCH_DELAY = 0.02


class Batch:
    """Many messages that are confirmed together. Made by `GenericProducer.batch()`.

    It has the producer's ``message_x()``, ``message()`` and ``forward()``. They return when
    the message is on its way; the end of the block waits for all of them.

    Attributes:
        confirmed: The ids of the messages that the broker confirmed.
        failed: (message id, error) of those that certainly did not arrive everywhere.
        unknown: (message id, error) of those that may have arrived.

    Raises:
        BatchError: At the end of the block, if not every message was confirmed. An
            exception of the block itself goes first.
    """

    def __init__(self, producer: GenericProducer) -> None:
        self.confirmed: list[str] = []
        self.failed: list[tuple[str, Exception]] = []
        self.unknown: list[tuple[str, Exception]] = []
        self._producer = producer
        self._publisher = producer._open()
        self._chunk: collections.deque[Publishing] = collections.deque()
        self._collecting = self._calling = False
        self._sent = 0
        self._open = False

    def __repr__(self) -> str:
        return f"<Batch [{self._sent} sent, {self._settled} settled]>"

    def __enter__(self) -> Batch:
        refuse_in_coroutine("the end of a batch", "run the batch in asyncio.to_thread()")
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._open = False
        if self._publisher.hub.pid != os.getpid():
            if kind is None:
                self._check_fork()
            return
        self._wait_for(lambda: self._settled >= self._sent)
        if kind is None and (self.failed or self.unknown):
            raise BatchError(self.confirmed, self.failed, self.unknown)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("message_"):
            raise AttributeError(
                f"a batch has no attribute {name!r}: it sends with message_*, message and forward"
            )
        return partial(self._build_and_send, self._producer._builder(name, MessageCommand))

    def message(self, /, *args: Any, **kwds: Any) -> None:
        """Send a generic message, as `GenericProducer.message()`."""
        self._build_and_send(self._producer._build_generic, *args, **kwds)

    def forward(self, body: Mapping[str, Any], *args: Any, **kwds: Any) -> None:
        """Send a body on as it is, as `GenericProducer.forward()`."""
        self._refuse_future(kwds)
        self._send(self._producer._compose_forward(body, kwds))

    @property
    def _settled(self) -> int:
        return len(self.confirmed) + len(self.failed) + len(self.unknown)

    def _build_and_send(self, build: Builder, /, *args: Any, **kwds: Any) -> None:
        self._refuse_future(kwds)
        self._send(self._producer._compose(build, args, kwds))

    @staticmethod
    def _refuse_future(kwds: Mapping[str, Any]) -> None:
        if kwds.get("_future"):
            raise TypeError("a batch takes no _future: it waits for all of its messages at its end")

    def _check_fork(self) -> None:
        connections.check_fork(self._publisher.connection, "the batch")

    def _send(self, composed: Composed) -> None:
        self._check_fork()
        if not self._open:
            raise ClosedError("a batch sends inside its with block")
        hub = self._publisher.hub
        message_id = composed.message_id

        def finished(error: PostageError | None) -> None:
            if error is None:
                self.confirmed.append(message_id)
            elif isinstance(error, PublishUnknownError):
                self.unknown.append((message_id, error))
            else:
                self.failed.append((message_id, error))

        self._chunk.extend(Sending(composed, finished).publishings)
        self._sent += 1
        if self._sent - self._settled > BATCH_WINDOW:
            self._wait_for(lambda: self._sent - self._settled <= BATCH_WINDOW // 2)
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
