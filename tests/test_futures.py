# SPDX-License-Identifier: MIT
"""A future is set once, and can be waited for in three ways."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import itertools
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from postage import futures
from postage.errors import PostageError, TimeoutError
from postage.futures import Future, refuse_in_coroutine
from postage.transport.hub import Hub
from tests.transport.test_hub import DEADLINE, NEVER, AtLine, Task, patient
from tests.waiting import wait_until

FILE = futures.__file__


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Who waits for futures here, as in postage itself."""
    with contextlib.closing(patient(Hub(NEVER))) as hub:
        yield hub


@pytest.fixture
def future(hub: Hub) -> Future[Any]:
    return Future(hub.wait, hub.nudge)


# ---------------------------------------------------------------------------- once


def test_a_future_keeps_its_first_result(future: Future[Any]) -> None:
    """Later results and errors are ignored."""
    assert not future.ready()
    future.set(1)
    future.set(2)
    future.fail(LookupError())
    assert future.ready()
    assert 1 == future.result()


def test_a_future_keeps_its_first_error(future: Future[Any]) -> None:
    """It is raised whenever somebody asks for the result."""
    future.fail(LookupError("first"))
    future.fail(LookupError("second"))
    future.set(1)
    for _ in range(2):
        with pytest.raises(LookupError, match="first"):
            future.result()


def test_nothing_is_a_result(future: Future[Any]) -> None:
    """None can be set, and is returned."""
    future.set(None)
    assert future.result() is None
    future.set(1)
    assert future.result() is None


def test_two_threads_that_set_a_future_do_not_mix(hub: Hub) -> None:
    """One comes first, at whatever line the other is; who saw its result sees no other."""
    for number in itertools.count(1):
        future: Future[Any] = Future(hub.wait, hub.nudge)
        calls: list[Any] = []
        seen: list[Any] = []
        future.when_ready(lambda calls=calls: calls.append(1))

        def intrude(future: Future[Any] = future, seen: list[Any] = seen) -> None:
            Task(partial(future.set, "second")).result()
            if future.ready():
                seen.append(future.result())

        with AtLine(number, intrude, file=FILE) as at:
            future.set("first")
        assert [1] == calls, at.where
        assert seen in ([], [future.result()]), at.where
        if not at.where:
            break
    assert number > 5


# ----------------------------------------------------------------------- callbacks


def test_a_callback_is_called_when_the_future_is_set(future: Future[Any]) -> None:
    """By the thread that sets it, in the order of asking, and with the result to be had."""
    called: list[Any] = []
    future.when_ready(lambda: called.append((1, threading.get_ident(), future.result())))
    future.when_ready(lambda: called.append((2, threading.get_ident(), future.result())))
    assert not called
    setter = Task(partial(future.set, "x"))
    setter.result()
    assert [(1, setter.ident, "x"), (2, setter.ident, "x")] == called


def test_a_callback_is_called_at_once_if_the_future_is_set(future: Future[Any]) -> None:
    """An error counts as well."""
    called: list[bool] = []
    future.fail(LookupError())
    future.when_ready(lambda: called.append(True))
    assert [True] == called


def test_a_callback_is_called_once_at_whatever_line_the_future_is_set(hub: Hub) -> None:
    """Another thread sets it while this one asks to be called, and the other way round."""
    for number in itertools.count(1):
        called: list[bool] = []
        one: Future[Any] = Future(hub.wait, hub.nudge)
        other: Future[Any] = Future(hub.wait, hub.nudge)
        call = partial(called.append, True)
        with AtLine(number, lambda one=one: Task(partial(one.set, 1)).result(), file=FILE) as at:
            one.when_ready(call)
        one.set(2)
        assert [True] == called, at.where
        asking = AtLine(
            number,
            lambda other=other, call=call: Task(partial(other.when_ready, call)).result(),
            file=FILE,
        )
        with asking:
            other.set(1)
        if asking.where:
            assert [True, True] == called, asking.where
        else:
            break
    assert number > 5


def test_callbacks_are_called_once_in_a_race(hub: Hub) -> None:
    """Two threads, one asks and one sets, many times."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        many: list[Future[Any]] = [Future(hub.wait) for _ in range(5000)]
        called: list[int] = []

        def ask() -> None:
            for number, future in enumerate(many):
                future.when_ready(partial(called.append, number))
                future.when_ready(partial(called.append, number))

        def set_all(value: int) -> None:
            for future in many:
                future.set(value)

        for task in [Task(ask), Task(partial(set_all, 1)), Task(partial(set_all, 2))]:
            task.result()
    finally:
        sys.setswitchinterval(before)
    assert sorted([*range(5000), *range(5000)]) == sorted(called)


def test_a_callback_that_fails_harms_nobody(
    future: Future[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the other callbacks are called, and the waiting threads woken."""
    called: list[bool] = []

    def fail() -> None:
        raise LookupError("on purpose")

    waiter = Task(future.result)
    future.when_ready(fail)
    future.when_ready(lambda: called.append(True))
    future.set(1)
    assert [True] == called
    assert 1 == waiter.result()
    future.when_ready(fail)
    assert 2 == caplog.text.count("a callback of a future failed")


# ------------------------------------------------------------------- first way: result


def test_threads_wait_for_the_result(hub: Hub, future: Future[Any]) -> None:
    """All who wait are woken by the one who sets it, though the loop has no event."""
    waiters = [Task(future.result) for _ in range(5)]
    wait_until(lambda: len(hub._waiters) == 4)
    future.set("x")
    assert ["x"] * 5 == [waiter.result() for waiter in waiters]


def test_a_result_may_be_set_in_the_loop(hub: Hub, future: Future[Any]) -> None:
    """The thread that waits runs the loop itself."""
    hub.post(partial(future.set, "x"))
    assert "x" == Task(future.result).result()


def test_a_result_that_does_not_come_in_time_is_a_timeout(future: Future[Any]) -> None:
    """Of postage and of Python. The result may still come."""
    with pytest.raises(TimeoutError, match=r"no result within 0\.01 seconds") as caught:
        future.result(0.01)
    assert isinstance(caught.value, builtins.TimeoutError)
    assert isinstance(caught.value, PostageError)
    future.set(1)
    assert 1 == future.result(0.0)


def test_a_future_without_a_wake_can_be_set(hub: Hub) -> None:
    """As one that only the loop sets, which looks by itself."""
    future: Future[int] = Future(hub.wait)
    waiter = Task(future.result)
    hub.call(partial(future.set, 1))
    assert 1 == waiter.result()


# -------------------------------------------------------------------- second way: await


def test_a_coroutine_awaits_the_result(future: Future[Any]) -> None:
    """Its event loop goes on meanwhile, and another thread sets the future."""

    async def main() -> Any:
        ticks = 0
        setter = None

        async def tick() -> None:
            nonlocal ticks, setter
            while setter is None:
                await asyncio.sleep(0)
                ticks += 1
                if ticks == 5:
                    setter = Task(partial(future.set, "x"))

        ticking = asyncio.ensure_future(tick())
        result = await asyncio.wait_for(_awaited(future), DEADLINE)
        await ticking
        return result, ticks

    assert ("x", 5) == asyncio.run(main())


async def _awaited(future: Future[Any]) -> Any:
    return await future


def test_a_coroutine_awaits_what_is_there(future: Future[Any]) -> None:
    """The result and the error that were set before."""
    future.set("x")
    assert "x" == asyncio.run(_awaited(future))
    failed: Future[Any] = Future(lambda _ready, _timeout: False)
    failed.fail(LookupError("on purpose"))
    with pytest.raises(LookupError, match="on purpose"):
        asyncio.run(_awaited(failed))


def test_many_coroutines_await_one_future(future: Future[Any]) -> None:
    """In one event loop or in several."""

    async def main() -> list[Any]:
        return list(await asyncio.gather(*(_awaited(future) for _ in range(3))))

    tasks = [Task(lambda: asyncio.run(main())) for _ in range(2)]
    wait_until(lambda: len(future._callbacks) == 6)
    future.set("x")
    assert [["x"] * 3] * 2 == [task.result() for task in tasks]


def test_a_cancelled_coroutine_harms_nobody(
    future: Future[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The future is set after the coroutine, and even its event loop, is gone."""

    async def give_up() -> None:
        with pytest.raises((asyncio.TimeoutError, TimeoutError)):
            await asyncio.wait_for(_awaited(future), 0.01)
        await asyncio.sleep(0)

    async def give_up_and_hear_later() -> None:
        await give_up()
        future.set("x")
        await asyncio.sleep(0.01)

    asyncio.run(give_up())
    asyncio.run(give_up_and_hear_later())
    assert "x" == future.result()
    assert not caplog.records


# --------------------------------------------------------------- blocking in a coroutine


def test_blocking_in_a_coroutine_is_refused(future: Future[Any]) -> None:
    """It would stop the event loop; the error says what to do instead."""

    async def main() -> None:
        future.result(1.0)

    with pytest.raises(PostageError, match=r"future\.result\(\) would block .*: await the future"):
        asyncio.run(main())


def test_what_is_there_can_be_had_in_a_coroutine(future: Future[Any]) -> None:
    """The result of a future that is set does not block."""

    async def main() -> Any:
        return future.result()

    future.set(1)
    assert 1 == asyncio.run(main())


def test_blocking_in_another_thread_is_not_refused() -> None:
    """Only the thread of the event loop must not block."""

    async def main() -> None:
        with pytest.raises(PostageError, match="it would block"):
            refuse_in_coroutine("it", "do not")
        await asyncio.get_running_loop().run_in_executor(None, refuse_in_coroutine, "it", "do")

    asyncio.run(main())
    refuse_in_coroutine("it", "do not")


def test_a_program_without_asyncio_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported to find out that no coroutine can be running."""
    monkeypatch.delitem(sys.modules, "asyncio.events")
    refuse_in_coroutine("it", "do not")
    assert "asyncio.events" not in sys.modules


def test_the_state_of_a_future_can_be_seen(hub: Hub) -> None:
    """Pending, its result, or its error."""
    one: Future[str] = Future(hub.wait)
    other: Future[str] = Future(hub.wait)
    assert "<Future pending>" == repr(one)
    one.set("x")
    other.fail(LookupError("y"))
    assert "<Future 'x'>" == repr(one)
    assert "<Future LookupError('y')>" == repr(other)
