# SPDX-License-Identifier: MIT
"""Microthreads: how they take turns, wait, end and leave."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from postage.errors import ClosedError
from postage.futures import Future
from postage.microthreads import ExitScheduler, MicroScheduler, MicroThread, sleep
from tests.programs import ROOT, Program


class Counter(MicroThread):
    """Writes its name into a list at each step, and ends after some of them."""

    def __init__(self, name: str, log: list[str], steps: int = 3) -> None:
        self.name = name
        self.log = log
        self.steps = steps

    def step(self) -> Any:
        if not self.steps:
            raise StopIteration
        self.steps -= 1
        self.log.append(self.name)


class Caller(MicroThread):
    """Calls functions, one a step, and then ends."""

    def __init__(self, *functions: Callable[[], Any]) -> None:
        self.functions = list(functions)

    def step(self) -> Any:
        if not self.functions:
            raise StopIteration
        return self.functions.pop(0)()


class Script:
    """A microthread that is written as one generator."""

    def __init__(self, generator: Generator[Any, Any, None]) -> None:
        self.generator = generator

    def main(self) -> Generator[Any, Any, None]:
        return self.generator


class Box:
    """A waitable that tells, and counts how often it is asked all the same."""

    def __init__(self, hub: Any = None) -> None:
        self.hub = hub
        self.asked = 0
        self.full = False
        self.callbacks: list[Callable[[], None]] = []

    def ready(self) -> bool:
        self.asked += 1
        return self.full

    def when_ready(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def fill(self) -> None:
        self.full = True
        for callback in self.callbacks:
            callback()


class RecordingHub:
    """A hub that notes who waits and who nudges; `during` happens while it waits."""

    def __init__(self, during: Callable[[], None]) -> None:
        self.during = during
        self.waits: list[float | None] = []
        self.nudges = 0

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        self.during()
        return ready() or threading.Event().wait(timeout)

    def nudge(self) -> None:
        self.nudges += 1


def no_wait(ready: Callable[[], bool], timeout: float | None = None) -> bool:
    raise AssertionError("a scheduler never blocks for a future")


def pending() -> Future[Any]:
    return Future(no_wait)


def run(scheduler: MicroScheduler, ticks: int = 100_000) -> int:
    """Run to the end, and return the number of ticks."""
    for number, _ in enumerate(scheduler.main(), 1):
        assert number < ticks, f"{scheduler!r} does not end"
    return number


def raise_exit() -> None:
    raise ExitScheduler


# ----------------------------------------------------------------- as in Postage 1.2.1


def test_the_module_imports_neither_pika_nor_anything_that_does() -> None:
    """Microthreads can be used where nothing else of postage is."""
    program = "import sys, postage.microthreads as m; print('pika' in sys.modules, m.__name__)"

    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    assert "False postage.microthreads\n" == output


def test_adding_a_microthread_creates_it_at_once_and_steps_it_not_yet() -> None:
    """`create()` runs synchronously; the first step comes with the scheduler's cycles."""
    log: list[str] = []

    class Created(Counter):
        def create(self) -> None:
            self.log.append("created")

    scheduler = MicroScheduler()
    scheduler.add_microthread(Created("step", log))

    assert ["created"] == log
    assert 1 == len(scheduler.active_microthreads)


def test_the_first_tick_comes_before_any_work() -> None:
    """The scheduler yields once when it starts."""
    log: list[str] = []
    scheduler = MicroScheduler()
    scheduler.add_microthread(Counter("a", log))
    main = scheduler.main()

    assert 1 == next(main)
    assert [] == log

    assert 1 == next(main)
    assert ["a"] == log


def test_it_yields_after_each_microthread_and_takes_them_in_turn() -> None:
    """One step a tick, in the order in which they were added."""
    log: list[str] = []
    scheduler = MicroScheduler()
    for name in "abc":
        scheduler.add_microthread(Counter(name, log))
    main = scheduler.main()

    assert [1] * 7 == [next(main) for _ in range(7)]
    assert [*"abcabc"] == log


def test_a_microthread_that_is_added_in_a_cycle_runs_in_that_cycle() -> None:
    """The list of the cycle is read while it grows."""
    log: list[str] = []
    scheduler = MicroScheduler(autoquit=True)

    def add() -> None:
        log.append("adder")
        scheduler.add_microthread(Counter("added", log, steps=1))

    scheduler.add_microthread(Caller(add, lambda: log.append("again")))
    scheduler.add_microthread(Counter("other", log, steps=1))
    run(scheduler)

    assert ["adder", "other", "added", "again"] == log


def test_exit_scheduler_ends_all_after_the_others_have_finished_the_cycle() -> None:
    """`shutdown` is set, and nobody misses the turn of this cycle."""
    log: list[str] = []
    scheduler = MicroScheduler()
    scheduler.add_microthread(Counter("before", log))
    scheduler.add_microthread(Caller(raise_exit))
    scheduler.add_microthread(Counter("after", log))
    run(scheduler)

    assert ["before", "after"] == log
    assert True is scheduler.shutdown


def test_stop_iteration_in_a_step_ends_that_microthread_alone() -> None:
    """Under PEP 479 it would be a RuntimeError that ends the scheduler."""
    log: list[str] = []
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Counter("short", log, steps=1))
    scheduler.add_microthread(Counter("long", log, steps=3))
    run(scheduler)

    assert ["short", "long", "long", "long"] == log
    assert False is scheduler.shutdown


def test_stop_iteration_in_create_escapes_to_whoever_adds_the_microthread() -> None:
    """As in 1.2.1; under PEP 479 it became a RuntimeError."""

    class Unwilling(MicroThread):
        def create(self) -> None:
            raise StopIteration

    scheduler = MicroScheduler()

    with pytest.raises(StopIteration):
        scheduler.add_microthread(Unwilling())

    assert [] == scheduler.active_microthreads


def test_main_ends_by_returning() -> None:
    """1.2.1 raised StopIteration, which is a RuntimeError in a generator since Python 3.7."""
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Counter("a", [], steps=1))
    main = scheduler.main()

    with pytest.raises(StopIteration) as ending:
        while True:
            next(main)

    assert None is ending.value.value


def test_an_empty_scheduler_with_autoquit_ends_after_two_ticks() -> None:
    """One before any work, and one idle."""
    assert 2 == run(MicroScheduler(autoquit=True))


def test_autoquit_ends_when_the_last_microthread_has_ended() -> None:
    """The tick of the start, three steps, and the step that ends it."""
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Counter("a", [], steps=3))

    assert 5 == run(scheduler)


def test_autoquit_is_true_itself_and_not_only_true() -> None:
    """Something that is merely true does not end the scheduler, which then rests when idle."""
    scheduler = MicroScheduler(autoquit=1)  # type: ignore[arg-type]
    started = time.monotonic()
    main = scheduler.main()

    ticks = 0
    while time.monotonic() < started + 0.5:
        next(main)
        ticks += 1

    assert ticks < 10


def test_another_exception_of_a_step_ends_the_scheduler() -> None:
    """It reaches whoever runs the scheduler."""
    scheduler = MicroScheduler()
    scheduler.add_microthread(Caller(lambda: 1 // 0))

    with pytest.raises(ZeroDivisionError):
        run(scheduler)


def test_exit_scheduler_in_an_inner_scheduler_ends_only_that_one() -> None:
    """A scheduler has a `main()`, so it can be added to another."""
    log: list[str] = []
    inner, outer = MicroScheduler(), MicroScheduler(autoquit=True)
    inner.add_microthread(Counter("inner", log, steps=9))
    inner.add_microthread(Caller(raise_exit))
    outer.add_microthread(inner)
    outer.add_microthread(Counter("outer", log, steps=9))
    run(outer)

    assert 1 == log.count("inner")
    assert 9 == log.count("outer")
    assert (True, False) == (inner.shutdown, outer.shutdown)


def test_the_lists_show_who_goes_on_in_this_cycle_and_in_the_next() -> None:
    """As attributes of 1.2.1, with generators."""
    scheduler = MicroScheduler()
    scheduler.add_microthread(Counter("a", []))
    scheduler.add_microthread(Counter("b", []))
    first, second = scheduler.active_microthreads
    main = scheduler.main()
    next(main)
    next(main)

    assert [first] == scheduler.scheduled_microthreads
    assert [first, second] == scheduler.active_microthreads
    assert "<MicroScheduler [3 running, 0 waiting]>" == repr(scheduler)


def test_a_microthread_knows_its_scheduler() -> None:
    """From the moment that it was added, `create()` included."""
    seen: list[Any] = []

    class Curious(MicroThread):
        def create(self) -> None:
            seen.append(self.scheduler)

    scheduler = MicroScheduler()
    scheduler.add_microthread(Curious())

    assert [scheduler] == seen
    assert None is MicroThread.scheduler


def test_a_plain_microthread_does_nothing_and_never_ends() -> None:
    """`create()` and `step()` are there to be overridden."""
    main = MicroThread().main()

    assert [1, 1, 1] == [next(main) for _ in range(3)]


# ------------------------------------------------------------------------- waitables


def test_a_microthread_goes_on_only_when_its_waitable_is_ready() -> None:
    """Others have their turns meanwhile."""
    log: list[str] = []
    box = Box()
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(lambda: box, lambda: log.append("opened")))
    scheduler.add_microthread(Counter("other", log, steps=3))
    scheduler.add_microthread(Caller(*[lambda: None] * 3, box.fill))
    run(scheduler)

    assert ["other", "other", "other", "opened"] == log


def test_a_waitable_that_cannot_tell_is_asked() -> None:
    """`ready()` is all that a waitable needs."""

    class Plain:
        answers = iter([False, False, True])

        def ready(self) -> bool:
            return next(self.answers)

    log: list[str] = []
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(Plain, lambda: log.append("on")))
    scheduler.add_microthread(Counter("other", log, steps=5))
    run(scheduler)

    assert ["other", "other", "other", "other", "on", "other"] == log


def test_a_waitable_that_tells_is_not_asked_in_every_cycle() -> None:
    """Else the work of a cycle would grow with the number of those that wait."""
    boxes = [Box() for _ in range(100)]
    scheduler = MicroScheduler(autoquit=True)
    for box in boxes:
        scheduler.add_microthread(Caller(lambda box=box: box))
    scheduler.add_microthread(Counter("busy", [], steps=500))
    scheduler.add_microthread(Caller(*[lambda: None] * 500, *[box.fill for box in boxes]))
    run(scheduler)

    assert 0 == sum(box.asked for box in boxes)


def test_a_deadline_ends_the_waiting_too() -> None:
    """A waitable with a deadline is never waited for longer."""

    class Never:
        def __init__(self) -> None:
            self.deadline = time.monotonic() + 0.05

        def ready(self) -> bool:
            return False

    log: list[str] = []
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(Never, lambda: log.append("gave up")))
    run(scheduler)

    assert ["gave up"] == log


def test_a_deadline_ends_the_waiting_for_what_tells_too() -> None:
    """`when_ready` and `deadline` go together."""

    class Limited(Box):
        def __init__(self) -> None:
            super().__init__()
            self.deadline = time.monotonic() + 0.05

    log: list[str] = []
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(Limited, lambda: log.append("gave up")))
    run(scheduler)

    assert ["gave up"] == log


def test_the_result_of_a_waitable_is_the_value_of_the_yield() -> None:
    """`reply = yield producer.rpc_x()` works, with and without `_future=True`."""
    future = pending()
    got: list[Any] = []

    def main() -> Generator[Any, Any, None]:
        got.append((yield future))
        got.append((yield 1))

    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Script(main()))
    scheduler.add_microthread(Caller(lambda: future.set("reply")))
    run(scheduler)

    assert ["reply", 1] == got


def test_the_error_of_a_waitable_is_raised_at_the_yield() -> None:
    """The microthread can catch it; else it ends the scheduler, as any error does."""
    caught: list[str] = []
    first, second = pending(), pending()

    def main() -> Generator[Any, Any, None]:
        try:
            yield first
        except LookupError as error:
            caught.append(str(error))
        yield second

    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Script(main()))
    scheduler.add_microthread(
        Caller(
            lambda: first.fail(LookupError("lost")),
            lambda: None,
            lambda: second.fail(OSError("broken")),
        )
    )

    with pytest.raises(OSError, match="broken"):
        run(scheduler)

    assert ["lost"] == caught


def test_a_waitable_may_be_the_first_thing_that_a_microthread_yields() -> None:
    """Also what `main()` yields before its first step is respected."""
    box = Box()
    log: list[str] = []

    def main() -> Generator[Any, Any, None]:
        yield box
        log.append("opened")

    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Script(main()))
    scheduler.add_microthread(Caller(lambda: log.append("first"), box.fill))
    run(scheduler)

    assert ["first", "opened"] == log


def test_a_wake_up_of_an_earlier_waiting_does_not_end_a_later_one() -> None:
    """A waitable that calls back twice must not make `result()` of the next one block."""
    got: list[Any] = []
    box, future = Box(), pending()

    def main() -> Generator[Any, Any, None]:
        yield box
        got.append((yield future))

    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Script(main()))
    scheduler.add_microthread(Caller(box.fill, box.fill, box.fill, lambda: future.set(1)))
    run(scheduler)

    assert [1] == got


def test_sleepers_go_on_in_the_order_of_their_deadlines() -> None:
    """`sleep` counts from the moment that it is made."""
    log: list[str] = []
    scheduler = MicroScheduler(autoquit=True)
    for name, seconds in (("late", 0.2), ("early", 0.0), ("middle", 0.1)):
        scheduler.add_microthread(
            Caller(lambda seconds=seconds: sleep(seconds), lambda name=name: log.append(name))
        )
    run(scheduler)

    assert ["early", "middle", "late"] == log


def test_thousands_of_microthreads_can_wait() -> None:
    """For time, and for results, which arrive in any order."""
    count = 5_000
    futures = [pending() for _ in range(count)]
    results: list[Any] = []

    def waiting(number: int) -> Generator[Any, Any, None]:
        yield sleep(number % 7 / 100)
        results.append((yield futures[number]))

    def setting() -> Generator[Any, Any, None]:
        for number in reversed(range(count)):
            futures[number].set(number)
            yield 1

    scheduler = MicroScheduler(autoquit=True)
    for number in range(count):
        scheduler.add_microthread(Script(waiting(number)))
    scheduler.add_microthread(Script(setting()))
    run(scheduler)

    assert [*range(count)] == sorted(results)


# ----------------------------------------------------------------------------- idling


def test_an_idle_scheduler_does_not_spin() -> None:
    """1.2.1 ticked as fast as it could."""
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(lambda: sleep(0.3)))

    assert run(scheduler) < 10


def test_a_future_that_another_thread_sets_ends_the_idling() -> None:
    """Forty of them in a row, which took forty seconds if nothing woke the scheduler."""
    futures = [pending() for _ in range(40)]
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(*[lambda each=each: each for each in futures]))

    run_while_another_thread_sets(futures, scheduler)

    assert all(future.ready() for future in futures)


def test_what_wakes_an_inner_scheduler_wakes_the_outer_one() -> None:
    """It is the outer one that waits."""
    futures = [pending() for _ in range(40)]
    inner, middle, outer = (MicroScheduler(autoquit=True) for _ in range(3))
    inner.add_microthread(Caller(*[lambda each=each: each for each in futures]))
    middle.add_microthread(inner)
    outer.add_microthread(middle)

    run_while_another_thread_sets(futures, outer)

    assert all(future.ready() for future in futures)


def run_while_another_thread_sets(futures: list[Future[Any]], scheduler: MicroScheduler) -> None:
    """Set one future after the other, each when the scheduler idles, within 20 seconds."""
    idle = threading.Event()

    def set_all() -> None:
        for future in futures:
            assert idle.wait(20)
            idle.clear()
            future.set(1)

    setter = threading.Thread(target=set_all)
    setter.start()
    deadline = time.monotonic() + 20
    for _ in scheduler.main():
        assert time.monotonic() < deadline, "nothing woke the scheduler"
        idle.set()
    setter.join()


def test_an_idle_scheduler_waits_on_the_hub_that_a_waitable_brings_along() -> None:
    """So the loop is run by the scheduler's own thread, without a thread switch a message."""
    box = Box()
    box.hub = RecordingHub(during=box.fill)
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(lambda: box))
    run(scheduler)

    assert 1 == len(box.hub.waits)
    assert 1 == box.hub.nudges


def test_it_waits_on_the_hub_at_most_until_the_next_deadline() -> None:
    """And never longer than a second, for whoever else runs it."""
    waits: list[float | None] = []
    box = Box()
    box.hub = RecordingHub(during=lambda: None)
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(lambda: box))
    scheduler.add_microthread(Caller(lambda: sleep(0.25), box.fill))
    run(scheduler)

    waits = box.hub.waits
    assert waits
    assert [] == [wait for wait in waits if wait is None or not 0.0 <= wait <= 0.25]


def test_the_others_go_on_when_the_hub_is_closed_by_the_last_who_used_it() -> None:
    """A hub belongs to processors; one that left takes it along, and sleepers stay."""

    class ClosedHub(RecordingHub):
        def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
            super().wait(ready, timeout)
            raise ClosedError("the I/O loop was closed while something waited for it")

    log: list[str] = []
    box = Box()
    box.hub = ClosedHub(during=box.fill)
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(lambda: box, lambda: log.append("left")))
    scheduler.add_microthread(Caller(lambda: sleep(0.1), lambda: log.append("slept")))
    run(scheduler)

    assert ["left", "slept"] == log


def test_an_idle_scheduler_still_ticks_for_whoever_runs_it() -> None:
    """`main()` is a generator so that it can be part of a bigger loop."""
    scheduler = MicroScheduler()
    scheduler.add_microthread(Caller(pending))
    main = scheduler.main()

    assert [1, 1, 1, 1] == [next(main) for _ in range(4)]
    assert "<MicroScheduler [0 running, 1 waiting]>" == repr(scheduler)


# ------------------------------------------------------------- spawning and discarding


def test_a_spawned_generator_goes_on_when_what_it_yielded_is_ready() -> None:
    """For generators that were advanced already."""
    got: list[Any] = []
    future = pending()

    def generator() -> Generator[Any, Any, None]:
        got.append((yield future))

    spawned = generator()
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(lambda: scheduler.spawn(spawned, next(spawned))))
    scheduler.add_microthread(Caller(lambda: None, lambda: future.set(7)))
    run(scheduler)

    assert [7] == got


def test_a_microthread_that_was_closed_by_its_owner_ends_when_its_waiting_does() -> None:
    """Even if it waited for something that failed: nobody is there to hear of it."""
    future = pending()

    def generator() -> Generator[Any, Any, None]:
        yield future

    closed = generator()
    scheduler = MicroScheduler(autoquit=True)
    scheduler.spawn(closed, next(closed))
    scheduler.add_microthread(
        Caller(closed.close, lambda: future.fail(ValueError("of an abandoned thread")))
    )
    run(scheduler)

    assert True is future.ready()


def test_a_discarded_microthread_does_not_keep_an_autoquit_scheduler_going() -> None:
    """What it waits for may never come."""
    log: list[str] = []

    def generator() -> Generator[Any, Any, None]:
        try:
            yield pending()
        finally:
            log.append("closed")

    discarded = generator()
    scheduler = MicroScheduler(autoquit=True)
    scheduler.spawn(discarded, next(discarded))
    scheduler.add_microthread(Caller(lambda: scheduler.discard(discarded)))
    run(scheduler, ticks=20)

    assert ["closed"] == log


# ---------------------------------------------------------------------------- leaving


class Leaver(MicroThread):
    """Rests for ever, and takes its time to leave."""

    def __init__(self, name: str, log: list[str], seconds: float = 0.0) -> None:
        self.name = name
        self.log = log
        self.seconds = seconds

    def step(self) -> Any:
        return pending()

    def leave(self) -> Generator[Any, Any, None]:
        self.log.append(f"{self.name} leaves")
        yield sleep(self.seconds)
        self.log.append(f"{self.name} left")


def test_all_who_know_how_to_leave_do_so_side_by_side() -> None:
    """None of them waits for another."""
    log: list[str] = []
    scheduler = MicroScheduler()
    scheduler.add_microthread(Leaver("slow", log, 0.1))
    scheduler.add_microthread(Leaver("quick", log))
    scheduler.add_microthread(Caller(raise_exit))
    run(scheduler)

    assert ["slow leaves", "quick leaves", "quick left", "slow left"] == log


def test_those_who_do_not_know_how_to_leave_are_closed() -> None:
    """Their `finally` blocks run, and one that fails or yields there holds up nobody."""
    log: list[str] = []

    def plain(name: str, last: Callable[[], Any]) -> Generator[Any, Any, None]:
        try:
            while True:
                yield 1
        finally:
            log.append(name)
            last()

    def stubborn() -> Generator[Any, Any, None]:
        try:
            yield pending()
        finally:
            yield 1

    scheduler = MicroScheduler()
    scheduler.add_microthread(Script(plain("failing", lambda: 1 // 0)))
    scheduler.add_microthread(Script(stubborn()))
    scheduler.add_microthread(Script(plain("orderly", lambda: None)))
    scheduler.add_microthread(Leaver("leaver", log))
    scheduler.add_microthread(Caller(raise_exit))
    run(scheduler)

    assert ["failing", "orderly", "leaver leaves", "leaver left"] == log


def test_what_was_spawned_goes_on_while_others_leave_and_is_closed_after() -> None:
    """Handlers in flight are such microthreads: leaving waits for them, up to a grace."""
    log: list[str] = []

    def handler(name: str, seconds: float) -> Generator[Any, Any, None]:
        try:
            yield sleep(seconds)
            log.append(f"{name} done")
        finally:
            log.append(f"{name} closed")

    scheduler = MicroScheduler()
    for name, seconds in (("short", 0.05), ("long", 3600.0)):
        spawned = handler(name, seconds)
        scheduler.spawn(spawned, next(spawned))
    scheduler.add_microthread(Leaver("leaver", log, 0.2))
    scheduler.add_microthread(Caller(raise_exit))
    run(scheduler)

    expected = ["leaver leaves", "short done", "short closed", "leaver left", "long closed"]
    assert expected == log


def test_an_inner_scheduler_leaves_in_order_too() -> None:
    """Its microthreads were just dropped if it was closed like one that cannot leave."""
    log: list[str] = []
    inner, outer = MicroScheduler(), MicroScheduler()
    inner.add_microthread(Leaver("inside", log))
    outer.add_microthread(inner)
    outer.add_microthread(Leaver("outside", log))
    outer.add_microthread(Caller(lambda: None, raise_exit))
    run(outer)

    assert {"inside left", "outside left"} < set(log)


def test_what_is_to_be_done_finally_is_done_when_all_have_left() -> None:
    """A restart waits for the other components of the process."""
    log: list[str] = []
    scheduler = MicroScheduler()
    scheduler.add_microthread(Leaver("leaver", log))
    scheduler.add_microthread(Caller(lambda: scheduler.exit(lambda: log.append("finally"))))
    run(scheduler)

    assert ["leaver leaves", "leaver left", "finally"] == log


def test_what_an_inner_scheduler_is_to_do_finally_is_left_to_the_outermost() -> None:
    """A restart concerns the whole process."""
    log: list[str] = []
    inner, outer = MicroScheduler(), MicroScheduler()
    outer.add_microthread(inner)
    outer.add_microthread(Leaver("leaver", log))
    inner.add_microthread(Caller(lambda: inner.exit(lambda: log.append("finally"))))
    run(outer)

    assert ["leaver leaves", "leaver left", "finally"] == log


# ---------------------------------------------------------------------------- signals


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Signals that reached the handlers which the program had before."""
    numbers: list[int] = []
    before = {
        each: signal.signal(each, lambda number, _frame: numbers.append(number))
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    yield numbers
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_scheduler_in_order(number: signal.Signals, handled: list[int]) -> None:
    """As ExitScheduler does."""
    log: list[str] = []
    scheduler = MicroScheduler()
    scheduler.add_microthread(Leaver("leaver", log))
    scheduler.add_microthread(Caller(lambda: signal.raise_signal(number)))

    with scheduler.stop_on_signals():
        run(scheduler)

    assert ["leaver leaves", "leaver left"] == log
    assert [] == handled


def test_the_signals_can_be_chosen(handled: list[int]) -> None:
    """Others go on to whoever handled them before."""
    scheduler = MicroScheduler()
    scheduler.add_microthread(
        Caller(
            lambda: signal.raise_signal(signal.SIGTERM),
            lambda: signal.raise_signal(signal.SIGUSR1),
        )
    )

    with scheduler.stop_on_signals(signal.SIGUSR1):
        run(scheduler)

    assert [signal.SIGTERM] == handled


def test_the_previous_handlers_are_restored_after_the_block(handled: list[int]) -> None:
    """With or without a signal, and with an error too."""
    with MicroScheduler().stop_on_signals():
        pass
    with pytest.raises(ZeroDivisionError), MicroScheduler().stop_on_signals():
        raise ZeroDivisionError

    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)

    assert [signal.SIGINT, signal.SIGTERM] == handled


def test_a_second_signal_acts_as_it_would_without_the_block(handled: list[int]) -> None:
    """Whoever presses Ctrl-C twice does not want to wait."""
    scheduler = MicroScheduler()

    with scheduler.stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
        assert [] == handled
        signal.raise_signal(signal.SIGINT)

    assert [signal.SIGINT] == handled


def test_a_scheduler_goes_on_after_the_block_that_stopped_on_signals() -> None:
    """The hub of the block is closed by then, and must not be waited on."""
    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Caller(lambda: None, lambda: sleep(0.05)))
    main = scheduler.main()

    with scheduler.stop_on_signals():
        next(main)
        next(main)

    assert [1] == list({*main})


IDLE_PROGRAM = """
from postage.microthreads import MicroScheduler, MicroThread, sleep

class Resting(MicroThread):
    def step(self):
        print("resting", flush=True)
        return sleep(3600)
    def leave(self):
        print("leaving", flush=True)
        yield sleep({seconds})

scheduler = MicroScheduler()
scheduler.add_microthread(Resting())
with scheduler.stop_on_signals():
    for _ in scheduler.main():
        pass
print("left", flush=True)
"""


def test_sigterm_ends_an_idle_program() -> None:
    """The poll that Python restarts after a signal (PEP 475) does not hold it up."""
    with Program(["-c", IDLE_PROGRAM.format(seconds=0)]) as program:
        program.wait_for_line("resting")
        program.terminate()

        assert 0 == program.wait()
        assert ["resting", "leaving", "left"] == program.stdout


def test_a_second_sigterm_kills_a_program_that_takes_its_time_to_leave() -> None:
    """At once, as the default handler does."""
    with Program(["-c", IDLE_PROGRAM.format(seconds=3600)]) as program:
        program.wait_for_line("resting")
        program.terminate()
        program.wait_for_line("leaving")
        program.terminate()

        assert -signal.SIGTERM == program.wait()
