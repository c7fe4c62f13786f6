# SPDX-License-Identifier: MIT
"""Microthreads: generators that a scheduler advances in turn.

A microthread yields after each step. What it yields says when it wants to go on:

* a *waitable*: when that is ready. A waitable is any object with a method ``ready()``;
  if it has a ``deadline`` (on the monotonic clock), then at the latest; if it has
  ``when_ready(callback)``, the scheduler is told instead of asking again and again; if it
  has a ``result()``, the microthread gets that as the value of its ``yield``, or its error;
* anything else, such as the ``1`` of 1.2.1: in the next cycle. It is then the value of the
  ``yield``, so ``reply = yield producer.rpc_x()`` works even where ``_future=True`` was forgotten.

When no microthread can go on, the scheduler waits instead of spinning, and lets the I/O
loop run meanwhile. This module knows neither pika nor that loop: a waitable that needs it
brings it along, as its ``hub``.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

from postage.errors import ClosedError, ExitScheduler

__all__ = ["ExitScheduler", "MicroScheduler", "MicroThread", "sleep"]

logger = logging.getLogger(__name__)

#: Seconds that an idle scheduler waits at most before it yields to whoever runs it.
IDLE = 1.0


class Waitable(Protocol):
    """What a microthread may yield to be resumed only when it is ready."""

    def ready(self) -> bool:
        """Tell whether the microthread can go on."""


class _Hub(Protocol):
    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool: ...

    def nudge(self) -> None: ...


class sleep:  # noqa: N801 - used as a function: `yield sleep(0.5)`
    """A waitable that is ready after a number of seconds.

    Args:
        seconds: 0 or more. Counted on the monotonic clock, which no correction moves.
    """

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def ready(self) -> bool:
        """Tell whether the time is over."""
        return time.monotonic() >= self.deadline


class MicroThread:
    """A microthread: override `step()`, and perhaps `create()`."""

    #: The scheduler that runs it, from the moment that it was added to one.
    scheduler: MicroScheduler | None = None

    def create(self) -> None:
        """Prepare. Called once, when the microthread is added to a scheduler."""

    def step(self) -> Any:
        """Do a little, and return None, or a waitable to rest until it is ready.

        Raise `StopIteration` to end the microthread, `ExitScheduler` to end all.
        """

    def main(self) -> Generator[Any, Any, None]:
        """Run: create, then step for ever."""
        try:
            self.create()
        except StopIteration:
            return
        yield 1
        while True:
            try:
                wanted = self.step()
            except StopIteration:  # would be a RuntimeError if it left a generator (PEP 479)
                return
            yield 1 if wanted is None else wanted


class _Task:
    """A microthread in a scheduler."""

    __slots__ = ("generator", "owner", "waiting")

    def __init__(self, generator: Generator[Any, Any, Any], owner: Any) -> None:
        self.generator = generator
        self.owner = owner
        self.waiting: Any = None


class MicroScheduler:
    """Advances microthreads in turn, until `ExitScheduler` is raised or, perhaps, none is left.

    A scheduler has a `main()` itself, so it can be added to another one.

    Attributes:
        active_microthreads: The generators that go on in this cycle.
        scheduled_microthreads: Those that go on in the next.
        shutdown: Whether `ExitScheduler` was raised.
        autoquit: Whether it ends when no microthread is left.

    Args:
        autoquit: As the attribute.
    """

    def __init__(self, autoquit: bool = False) -> None:
        self.shutdown = False
        self.autoquit = autoquit
        #: The scheduler that this one was added to.
        self.scheduler: MicroScheduler | None = None
        #: What to do when all have left, instead of returning: a restart sets it.
        self.finally_do: Callable[[], None] | None = None
        self._active: list[_Task] = []
        self._scheduled: list[_Task] = []
        self._waiting: dict[_Task, None] = {}
        #: Those of them whose waitables do not tell, or not alone.
        self._asked: dict[_Task, None] = {}
        #: Those of them that only sleep: deadline, number, task. A heap.
        self._sleeping: list[tuple[float, int, _Task]] = []
        self._numbers = itertools.count()
        self._woken: collections.deque[tuple[_Task, Any]] = collections.deque()
        self._leaving = False
        self._hub: _Hub | None = None
        self._idle_lock = threading.Lock()
        self._idle_lock.acquire()

    def __repr__(self) -> str:
        running = len(self._active) + len(self._scheduled)
        return f"<MicroScheduler [{running} running, {len(self._waiting)} waiting]>"

    @property
    def active_microthreads(self) -> list[Generator[Any, Any, Any]]:
        """The generators that go on in this cycle."""
        return [task.generator for task in self._active]

    @property
    def scheduled_microthreads(self) -> list[Generator[Any, Any, Any]]:
        """The generators that go on in the next cycle."""
        return [task.generator for task in self._scheduled]

    def add_microthread(self, mthread: Any) -> None:
        """Add an object with a `main()`, and start it.

        Args:
            mthread: A `MicroThread`, a `MicroScheduler`, or anything with a generator
                method `main()`. Its `create()` runs now.
        """
        if hasattr(mthread, "scheduler"):
            mthread.scheduler = self
        generator = mthread.main()
        task = _Task(generator, mthread)
        self._rest(task, next(generator), self._active)  # start

    def spawn(self, generator: Generator[Any, Any, Any], waiting: Any = None) -> None:
        """Add a generator that was advanced already.

        Args:
            generator: A microthread.
            waiting: What it yielded last.
        """
        self._rest(_Task(generator, None), waiting, self._scheduled)

    def discard(self, generator: Generator[Any, Any, Any]) -> None:
        """Close a microthread, which may wait for something that never comes."""
        for task in [task for task in self._waiting if task.generator is generator]:
            self._end_waiting(task)
        _close(generator)

    def wake(self) -> None:
        """End an idle wait. From any thread."""
        if self.scheduler is not None:
            self.scheduler.wake()  # it is the outermost that waits
        if self._hub is not None:
            self._hub.nudge()
        with contextlib.suppress(RuntimeError):  # it is awake already
            self._idle_lock.release()

    def main(self) -> Generator[Any, Any, None]:
        """Run. A generator that yields after each step, so that it fits into a bigger loop.

        It returns when it ends (1.2.1 raised `StopIteration`, which PEP 479 forbids).
        """
        yield 1
        while True:
            self._collect_ready()
            if not self._active:
                yield self._idle()
            for task in self._active:  # also those that are added meanwhile
                self._advance(task)
                yield 1
            if self.shutdown:
                break
            self._active, self._scheduled = self._scheduled, []
            if self.autoquit is True and not (self._active or self._waiting):
                return
        yield from self._leave()
        if self.finally_do is not None:
            if self.scheduler is not None:
                self.scheduler.exit(self.finally_do)
            else:
                self.finally_do()

    def exit(self, then: Callable[[], None] | None = None) -> None:
        """End as `ExitScheduler` does, and do something when all have left."""
        self.shutdown = True
        self.finally_do = then or self.finally_do

    @contextlib.contextmanager
    def stop_on_signals(self, *signals: signal.Signals) -> Iterator[None]:
        """Let signals end the scheduler in order while the block runs. Main thread only.

        The handler only sets a flag. A second signal acts as it would without this.

        Args:
            *signals: By default SIGINT and SIGTERM.
        """
        chosen = signals or (signal.SIGINT, signal.SIGTERM)
        previous: dict[signal.Signals, Any] = {}

        def handle(number: int, _frame: object) -> None:
            self.shutdown = True
            for each, handler in previous.items():
                signal.signal(each, handler)
            logger.info("signal %d: leaving", number)

        with contextlib.ExitStack() as stack:
            from postage.transport import hub as hubs

            hub = hubs.acquire()
            stack.callback(hubs.release, hub)
            self._hub = hub
            stack.enter_context(hub.signals_wake())
            for each in chosen:
                previous[each] = signal.signal(each, handle)
            stack.callback(lambda: [signal.signal(*pair) for pair in previous.items()])
            yield

    # ----------------------------------------------------------------------- inside

    def _advance(self, task: _Task) -> bool:
        """Advance a microthread by a step, and tell whether it goes on."""
        try:
            wanted = self._resume(task)
        except ExitScheduler:
            self.shutdown = True
            return False
        except StopIteration:
            return False
        self._rest(task, wanted, self._scheduled)
        return True

    def _resume(self, task: _Task) -> Any:
        waited, task.waiting = task.waiting, None
        if getattr(task.generator, "gi_frame", task) is None:
            raise StopIteration  # it was closed meanwhile, and must not hear of an error
        if hasattr(waited, "ready") and not hasattr(waited, "result"):
            waited = None
        if waited is None or not hasattr(task.generator, "send"):
            return next(task.generator)
        try:
            value = waited.result() if hasattr(waited, "ready") else waited
        except Exception as error:
            return task.generator.throw(error)
        return task.generator.send(value)

    def _rest(self, task: _Task, wanted: Any, runnable: list[_Task]) -> None:
        """Put a microthread where it belongs until it goes on."""
        task.waiting = wanted
        if not hasattr(wanted, "ready"):
            runnable.append(task)
            return
        self._waiting[task] = None
        self._hub = getattr(wanted, "hub", None) or self._hub
        if type(wanted) is sleep:
            heapq.heappush(self._sleeping, (wanted.deadline, next(self._numbers), task))
        elif not _tells(wanted):
            self._asked[task] = None
        if hasattr(wanted, "when_ready"):
            wanted.when_ready(lambda: self._hear(task, wanted))

    def _hear(self, task: _Task, waitable: Any) -> None:
        self._woken.append((task, waitable))
        self.wake()

    def _collect_ready(self) -> None:
        """Let those go on whose waiting is over."""
        while self._woken:
            self._let_go_on(*self._woken.popleft())
        now = time.monotonic()
        while self._sleeping and self._sleeping[0][0] <= now:
            _, _, task = heapq.heappop(self._sleeping)
            self._let_go_on(task, task.waiting)
        for task in list(self._asked):
            if task.waiting.ready() or _overdue(task.waiting):
                self._let_go_on(task, task.waiting)

    def _let_go_on(self, task: _Task, waitable: Any) -> None:
        # A waitable may tell twice, and the task wait for another one by then.
        if task in self._waiting and task.waiting is waitable:
            self._end_waiting(task)
            self._active.append(task)

    def _end_waiting(self, task: _Task) -> None:
        del self._waiting[task]
        self._asked.pop(task, None)

    def _idle(self) -> Any:
        """Wait until a microthread can go on, or let the outer scheduler do so.

        Returns:
            What to yield: inside another scheduler a waitable for it, else 1.
        """
        asked = [task.waiting for task in self._asked]
        deadlines = [due for due in map(_deadline, asked) if due is not None]
        deadlines += [due for due, _, _ in self._sleeping[:1]]

        def ready() -> bool:
            if self._woken or (self.shutdown and not self._leaving):
                return True
            return any(each.ready() for each in asked)

        if self.scheduler is not None:
            return _Idle(ready, min(deadlines, default=None), self._hub)
        if not self._waiting and self.autoquit is True:
            return 1
        now = time.monotonic()
        timeout = max(0.0, min(min(deadlines, default=now + IDLE), now + IDLE) - now)
        if self._hub is not None:
            try:
                self._hub.wait(ready, timeout)
            except ClosedError:  # whoever brought it along has left
                self._hub = None
        elif not ready():
            self._idle_lock.acquire(timeout=timeout)
        return 1

    def _leave(self) -> Generator[Any, Any, None]:
        """Let those leave that know how to, and close the others.

        A microthread knows if it has a `leave()`, which returns a generator that ends
        when it has left; an inner scheduler ends by itself. Handlers in flight go on
        meanwhile, as microthreads here.
        """
        self._leaving = True
        tasks = [*self._scheduled, *self._waiting]  # the cycle is over: none is active
        self._active, self._scheduled, self._waiting = [], [], {}
        self._asked, self._sleeping = {}, []
        left = set()
        for task in tasks:
            if isinstance(task.owner, MicroScheduler):
                task.owner.shutdown = True
            elif hasattr(task.owner, "leave"):
                _close(task.generator)
                task = _Task(task.owner.leave(), task.owner)
            elif task.owner is not None:
                _close(task.generator)
                continue
            if task.owner is not None:
                left.add(task.owner)
            self._rest(task, task.waiting, self._active)
        while left:
            self._collect_ready()
            if not self._active:
                yield self._idle()
            for task in self._active:
                if not self._advance(task):
                    left.discard(task.owner)
                yield 1
            self._active, self._scheduled = self._scheduled, []
        for task in (*self._active, *self._waiting):
            _close(task.generator)
        self._active, self._waiting = [], {}
        self._asked, self._sleeping = {}, []


class _Idle:
    """What an inner scheduler waits for, for the outer one."""

    def __init__(self, ready: Callable[[], bool], deadline: float | None, hub: _Hub | None) -> None:
        self.ready = ready
        self.deadline = deadline
        self.hub = hub


def _close(generator: Generator[Any, Any, Any]) -> None:
    """Close a generator. What goes wrong in it then is no reason for the others not to leave."""
    try:
        generator.close()
    except Exception:
        logger.exception("a microthread failed when it was closed: %r", generator)


def _tells(waitable: Any) -> bool:
    return hasattr(waitable, "when_ready") and _deadline(waitable) is None


def _deadline(waitable: Any) -> float | None:
    return getattr(waitable, "deadline", None)


def _overdue(waitable: Any) -> bool:
    deadline = _deadline(waitable)
    return deadline is not None and time.monotonic() >= deadline
