# SPDX-License-Identifier: MIT
"""A result to come, which can be waited for in three ways.

``future.result(timeout)`` blocks, ``reply = yield future`` parks a microthread, and
``await future`` suspends a coroutine. It knows neither pika nor the hub: whoever makes
it says how its thread can wait.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import logging
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from postage.errors import PostageError, TimeoutError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Waits until a condition holds, or for a number of seconds; tells whether it holds.
Wait = Callable[[Callable[[], bool], "float | None"], bool]


class Future(Generic[T]):
    """One result, or one error, that somebody sets once.

    Args:
        wait: How a thread waits for it.
        wake: Called after it was set, by the thread that set it; ends the wait of others.
    """

    __slots__ = ("_callbacks", "_done", "_error", "_unset", "_value", "_wait", "_wake")

    def __init__(self, wait: Wait, wake: Callable[[], None] | None = None) -> None:
        self._wait = wait
        self._wake = wake
        self._done = False
        self._unset = threading.Lock()  # locked for good by the one thread that sets it
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callbacks: collections.deque[tuple[contextvars.Context, Callable[[], None]]] = (
            collections.deque()
        )

    def __repr__(self) -> str:
        if not self._done:
            return "<Future pending>"
        return f"<Future {self._error if self._error is not None else self._value!r}>"

    def set(self, value: T) -> None:
        """Set the result. Later results and errors are ignored."""
        if self._unset.acquire(False):
            self._value = value
            self._finish()

    def fail(self, error: BaseException) -> None:
        """Set an error, which `result()` raises. Later results and errors are ignored."""
        if self._unset.acquire(False):
            self._error = error
            self._finish()

    def ready(self) -> bool:
        """Tell whether the result, or an error, is there."""
        return self._done

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result and return it.

        Args:
            timeout: Seconds, or None for as long as it takes.

        Raises:
            TimeoutError: The time was up before the result came; it may still come.
            PostageError: A coroutine is running in this thread; it must await instead.
            Exception: What was set as the error.
        """
        if not self._done:
            refuse_in_coroutine("future.result()", "await the future")
            if not self._wait(self.ready, timeout):
                raise TimeoutError(f"no result within {timeout} seconds")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # set before _done

    def when_ready(self, callback: Callable[[], None]) -> None:
        """Call back once, as soon as it is set, in whichever thread sets it.

        The callback must be quick and must not wait: it may run in the I/O loop. What it
        raises is logged. As in asyncio, it runs in a copy of the context of whoever asked
        for it: the thread that sets the future may be in the middle of another handler.
        """
        self._callbacks.append((contextvars.copy_context(), callback))
        if self._done:  # set meanwhile: whoever takes it out of the queue calls it
            self._call_back()

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio

        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()

        def arrive() -> None:
            if not arrived.done():
                arrived.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # closed: nobody awaits it any more
                loop.call_soon_threadsafe(arrive)

        self.when_ready(wake)
        yield from arrived.__await__()
        return self.result()

    def _finish(self) -> None:
        self._done = True
        self._call_back()
        if self._wake is not None:
            self._wake()

    def _call_back(self) -> None:
        while self._callbacks:
            try:
                context, callback = self._callbacks.popleft()
            except IndexError:  # another thread took it
                return
            try:
                context.run(callback)
            except Exception:
                logger.exception("a callback of a future failed: %r", callback)


def refuse_in_coroutine(what: str, instead: str) -> None:
    """Raise if a coroutine runs in this thread: blocking would stop its event loop.

    Raises:
        PostageError: It does.
    """
    events = sys.modules.get("asyncio.events")  # not imported: no coroutine can be running
    if events is not None and events._get_running_loop() is not None:
        raise PostageError(f"{what} would block the event loop of the running coroutine: {instead}")
