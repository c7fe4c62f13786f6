# SPDX-License-Identifier: MIT
"""The threads and the event loop that handlers may run in."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from postage import workers
from postage.futures import Future
from postage.workers import EventLoop, WorkerPool, acquire_event_loop, release_event_loop
from tests.waiting import wait_until

#: Seconds that a test waits for a thread: a deadline, not a duration.
PATIENCE = 30.0


def block(ready: Callable[[], bool], timeout: float | None = None) -> bool:
    """Wait as a thread without a hub."""
    return wait_until(ready, timeout or PATIENCE)


def pending() -> Future[Any]:
    return Future(block)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    """A pool of three threads."""
    made = WorkerPool(3, "worker")
    yield made
    made.close(PATIENCE)


def submit(pool: WorkerPool, function: Callable[[], Any]) -> Future[Any]:
    future = pending()
    pool.submit(function, future)
    return future


# --------------------------------------------------------------------------- threads


def test_a_future_gets_what_the_function_returns_or_raises(pool: WorkerPool) -> None:
    """Signals and SystemExit included: nothing is left pending."""
    assert 2 == submit(pool, lambda: 1 + 1).result()
    with pytest.raises(ZeroDivisionError):
        submit(pool, lambda: 1 // 0).result()
    with pytest.raises(SystemExit):
        submit(pool, lambda: os.sys.exit(3)).result()  # type: ignore[attr-defined]


def test_there_are_no_more_threads_than_the_size(pool: WorkerPool) -> None:
    """What comes then waits for one of them."""
    go_on = threading.Event()
    names: list[str] = []

    def work() -> None:
        names.append(threading.current_thread().name)
        assert go_on.wait(PATIENCE)

    futures = [submit(pool, work) for _ in range(5)]
    wait_until(lambda: len(names) == 3)

    assert "<WorkerPool [3 of 3 threads, 2 waiting]>" == repr(pool)
    assert ["worker-0", "worker-1", "worker-2"] == sorted(names)
    go_on.set()
    for future in futures:
        future.result()
    assert 3 == len(set(names))


def test_a_thread_that_has_nothing_to_do_is_used_again(pool: WorkerPool) -> None:
    """Threads are started when there is work for them."""
    assert "<WorkerPool [0 of 3 threads, 0 waiting]>" == repr(pool)
    for _ in range(20):
        submit(pool, lambda: None).result()
        wait_until(lambda: pool._idle == 1)

    assert "<WorkerPool [1 of 3 threads, 0 waiting]>" == repr(pool)


def test_a_closed_pool_abandons_what_runs_and_drops_what_waits() -> None:
    """Its threads are daemons, so they do not keep the process either."""
    begun, go_on = threading.Event(), threading.Event()
    done: list[int] = []
    pool = WorkerPool(1, "worker")
    running = submit(pool, lambda: begun.set() or go_on.wait(PATIENCE))
    waiting = submit(pool, lambda: done.append(1))
    (thread,) = pool._threads
    assert begun.wait(PATIENCE)

    pool.close(0.0)

    assert (True, True) == (thread.is_alive(), thread.daemon)
    go_on.set()
    assert True is running.result()
    thread.join(PATIENCE)
    assert (False, []) == (waiting.ready(), done)


# ------------------------------------------------------------------------ event loop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    """The event loop of this process."""
    made = acquire_event_loop()
    yield made
    release_event_loop(made)


def run(loop: EventLoop, coroutine: Any) -> Any:
    future = pending()
    loop.submit(coroutine, future)
    return future.result()


def test_a_future_gets_what_the_coroutine_returns_or_raises(loop: EventLoop) -> None:
    """All coroutines run in one thread."""

    async def thread() -> threading.Thread:
        return threading.current_thread()

    async def fail() -> None:
        raise LookupError("lost")

    first = run(loop, thread())

    assert "postage-asyncio" == first.name
    assert first is run(loop, thread())
    with pytest.raises(LookupError, match="lost"):
        run(loop, fail())


def test_a_cancelled_coroutine_ends_in_an_error_that_is_an_exception(loop: EventLoop) -> None:
    """asyncio's own is none, and would end whoever asks for the result."""
    future = pending()
    cancel = loop.submit(asyncio.sleep(3600), future)
    cancel()

    with pytest.raises(concurrent.futures.CancelledError) as caught:
        future.result()

    assert isinstance(caught.value, Exception)


def test_all_users_share_one_loop_and_the_last_one_ends_it() -> None:
    """The next user gets a new one."""
    first, second = acquire_event_loop(), acquire_event_loop()
    thread = first._thread
    release_event_loop(first)
    running = thread.is_alive()
    release_event_loop(second)

    assert first is second
    assert (True, False) == (running, thread.is_alive())
    third = acquire_event_loop()
    assert third is not first
    release_event_loop(third)


def test_ending_the_loop_cancels_what_runs_and_lets_it_clean_up() -> None:
    """Asynchronous generators, too."""
    log: list[str] = []
    loop = EventLoop()

    async def numbers() -> Any:
        try:
            while True:
                yield 1
        finally:
            log.append("generator closed")

    async def work() -> None:
        generator = numbers()
        log.append(f"{await generator.__anext__()}")
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            log.append("cleaned up")

    loop.submit(work(), pending())
    wait_until(lambda: log)
    loop.close()

    assert ["1", "cleaned up", "generator closed"] == log


def test_ending_a_loop_in_which_nothing_runs_is_no_trouble() -> None:
    """Python 3.10 warned of a missing event loop, in the thread."""
    loop = EventLoop()
    loop.close()

    assert False is loop._thread.is_alive()


def test_a_coroutine_that_blocks_the_loop_is_abandoned(caplog: pytest.LogCaptureFixture) -> None:
    """It held up the end of the component for ever."""
    begun, go_on = threading.Event(), threading.Event()
    loop = EventLoop()

    async def block_all() -> None:
        begun.set()
        go_on.wait(PATIENCE)

    loop.submit(block_all(), pending())
    assert begun.wait(PATIENCE)
    loop.close(grace=0.05)

    assert True is loop._thread.is_alive()
    assert "abandoned" in caplog.text
    go_on.set()
    loop._thread.join(PATIENCE)


def test_a_forked_child_has_no_loop_of_its_parent(loop: EventLoop) -> None:
    """Its thread does not exist there."""
    pid = os.fork()
    if not pid:
        os._exit(0 if workers._event_loop is None else 1)
    _, status = os.waitpid(pid, 0)

    assert 0 == os.waitstatus_to_exitcode(status)
