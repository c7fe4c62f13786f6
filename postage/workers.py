# SPDX-License-Identifier: MIT
"""Where handlers run that must not run in the scheduler's thread.

A `WorkerPool` runs what blocks, in a bounded number of threads. `EventLoop` runs
coroutines, all of a process in one thread. Both are daemons: what is still running when
the component left is abandoned, and its message is delivered again. (The pool of the
standard library would hold up the end of the process.)
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from postage.futures import Future

logger = logging.getLogger(__name__)

#: Seconds that cancelled coroutines have to end. One that blocks its thread, or does not let
#: itself be cancelled, is abandoned.
CANCEL_GRACE = 5.0


class WorkerPool:
    """Up to `size` threads, started when there is work for them.

    Args:
        size: Threads at most.
        name: For their names.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._work: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def __repr__(self) -> str:
        threads, waiting = len(self._threads), len(self._work)
        return f"<WorkerPool [{threads} of {self._size} threads, {waiting} waiting]>"

    def submit(self, function: Callable[[], Any], future: Future[Any]) -> None:
        """Run a function in a thread, and set the future to what it returns or raises."""
        with self._changed:
            self._work.append((function, future))
            if self._idle < len(self._work) and len(self._threads) < self._size:
                thread = threading.Thread(
                    target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
            self._changed.notify()

    def close(self, timeout: float) -> None:
        """Take no more work, and wait for the threads that have none, in seconds at most."""
        with self._changed:
            self._closed = True
            self._work.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # a handler may close its component
                thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._work and not self._closed:
                    self._changed.wait()
                self._idle -= 1
                if not self._work:
                    return
                function, future = self._work.popleft()
            try:
                future.set(function())
            except BaseException as error:
                future.fail(error)


class EventLoop:
    """One asyncio loop in a thread of its own, for as long as somebody uses it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="postage-asyncio", daemon=True)
        self.users = 0
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any], future: Future[Any]) -> Callable[[], Any]:
        """Run a coroutine, and set the future to its result. Returns what cancels it."""
        running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)

        def done(_running: Any) -> None:
            if running.cancelled():  # asyncio's own error is no Exception, and would end all
                future.fail(concurrent.futures.CancelledError("the coroutine was cancelled"))
                return
            error = running.exception()
            if error is not None:
                future.fail(error)
            else:
                future.set(running.result())

        running.add_done_callback(done)
        return running.cancel

    def close(self, grace: float = CANCEL_GRACE) -> None:
        """Cancel what runs and end the thread; abandon it after some seconds."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is threading.current_thread():  # a handler closes its component
            return
        self._thread.join(grace)
        if self._thread.is_alive():
            logger.warning("a coroutine did not end in %g s; it is abandoned", grace)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(_cancel_others())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


_lock = threading.Lock()
_event_loop: EventLoop | None = None


def acquire_event_loop() -> EventLoop:
    """Return the event loop of this process, which the first user starts."""
    global _event_loop
    with _lock:
        if _event_loop is None:
            _event_loop = EventLoop()
        _event_loop.users += 1
        return _event_loop


def release_event_loop(loop: EventLoop) -> None:
    """Tell that one user of the event loop is gone. The last one ends it."""
    global _event_loop
    with _lock:
        loop.users -= 1
        if loop.users > 0 or loop is not _event_loop:
            return
        _event_loop = None
    loop.close()


def _forget_after_fork() -> None:
    global _lock, _event_loop
    _lock = threading.Lock()
    _event_loop = None


os.register_at_fork(after_in_child=_forget_after_fork)
