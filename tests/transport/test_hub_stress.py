# SPDX-License-Identifier: MIT
"""The hub stands many threads, and interrupts and finalisers that strike anywhere.

As in `test_hub`, polls do not end by themselves: a wake-up that is missed leaves a thread
asleep, and the test fails at its deadline.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

import pytest

from postage.errors import ConnectionLostError
from postage.transport import hub as hubs
from postage.transport.hub import Hub
from tests.transport.test_hub import (
    DEADLINE,
    NEVER,
    SOON,
    AtLine,
    Follower,
    Line,
    Task,
    held,
    in_child,
    patient,
)
from tests.waiting import wait_until

THREADS = 24
CALLS = 20_000


@pytest.fixture(params=[NEVER, SOON], ids=["without a guard", "with a guard"])
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    with contextlib.closing(patient(Hub(request.param))) as hub:
        yield hub


@pytest.fixture
def guarded() -> Iterator[Hub]:
    """A hub whose guard comes at once: it repairs what an interrupt left behind."""
    with contextlib.closing(patient(Hub(SOON))) as hub:
        yield hub


@pytest.fixture(autouse=True)
def hectic() -> Iterator[None]:
    """Switch threads much more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def nothing() -> None:
    pass


def works(hub: Hub) -> bool:
    """Tell whether calls are run and waits end, and not because their time is up."""
    ran: list[bool] = []
    deadline = time.monotonic() + DEADLINE
    hub.call(partial(ran.append, True))
    hub.wait(lambda: len(ran) == 2, 2 * DEADLINE, first=partial(ran.append, True))
    return len(ran) == 2 and time.monotonic() < deadline


# --------------------------------------------------------------------------- many threads


def test_many_threads_share_one_hub(hub: Hub) -> None:
    """No call is lost, none overtakes another of its thread, and one thread leads at a time."""
    ran: list[list[int]] = [[] for _ in range(THREADS)]
    chair = threading.Lock()
    overlaps: list[int] = []

    def do(thread: int, number: int) -> None:
        if not chair.acquire(blocking=False):
            overlaps.append(number)  # another leader is in the middle of this
            return
        ran[thread].append(number)
        if number % 16 == 0:
            time.sleep(0)  # invite another thread
        chair.release()

    def work(thread: int) -> None:
        chance = random.Random(thread)
        for number in range(CALLS // THREADS):
            action = partial(do, thread, number)
            have = partial(lambda number: ran[thread][-1:] == [number], number)
            kind = chance.choice(["call", "call", "post", "first", "wait", "give up"])
            if kind == "post":
                hub.post(action)
            elif kind == "first":
                assert hub.wait(have, first=action)
            else:
                hub.call(action)
                if kind == "wait":
                    assert hub.wait(have)
                elif kind == "give up":
                    assert not hub.wait(lambda: False, chance.random() / 1000)
        assert hub.wait(lambda: len(ran[thread]) == CALLS // THREADS)

    for task in [Task(partial(work, thread)) for thread in range(THREADS)]:
        task.result()
    assert not overlaps
    assert [list(range(CALLS // THREADS))] * THREADS == ran
    wait_until(lambda: hub._vacancy == NEVER or "guard" in repr(hub))
    assert repr(hub).endswith(", 0 waiting, 0 calls]>")


def test_two_threads_pass_a_token(hub: Hub) -> None:
    """Each wake-up depends on the one before it: with one missed, all would end."""
    token = 0

    def turn(number: int) -> None:
        nonlocal token
        token = number

    def play(parity: int, first: bool) -> None:
        for number in range(parity, 3000, 2):
            assert hub.wait(lambda number=number: token == number)
            if first:
                assert hub.wait(lambda: True, first=partial(turn, number + 1))
            else:
                hub.call(partial(turn, number + 1))

    for task in [Task(partial(play, 0, True)), Task(partial(play, 1, False))]:
        task.result()
    assert 3000 == token


def test_events_reach_those_who_wait_for_them(hub: Hub) -> None:
    """Many threads wait, each for a socket of its own, while many write to them."""
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(contextlib.closing(Line(hub))) for _ in range(8)]

        def listen(line: Line) -> None:
            for number in range(200):
                assert hub.wait(lambda number=number: b"".join(line.heard).count(b".") > number)
                hub.call(partial(line.write, b"!"))

        tasks = [Task(partial(listen, line)) for line in lines]
        for _ in range(200):
            for line in lines:
                line.far.send(b".")
        for task in tasks:
            task.result()
        answers = [0] * len(lines)

        def answered() -> bool:
            for number, line in enumerate(lines):
                answers[number] += len(line.arrived())
            return answers == [200] * len(lines)

        assert hub.wait(answered, DEADLINE)  # the sockets were full: go on writing


# ----------------------------------------------------------------- finalisers, log handlers


def test_finalisers_may_call_whenever_the_collector_runs(hub: Hub) -> None:
    """In the middle of a call or a wait, of any thread: no deadlock, and none is lost."""
    made = itertools.count()
    dropped: list[int] = []
    ran: list[int] = []

    class Dropped:
        def __init__(self) -> None:
            self.number = next(made)
            self.itself = self  # only the collector frees it

        def __del__(self) -> None:
            dropped.append(self.number)
            hub.call(partial(ran.append, self.number))

    def drop() -> None:
        for _ in range(3):
            Dropped()

    def work() -> None:
        for _ in range(150):
            drop()
            hub.call(drop)
            assert hub.wait(lambda: True, first=drop)

    before = gc.get_threshold()
    gc.set_threshold(5)
    try:
        for task in [Task(work) for _ in range(4)]:
            task.result()
    finally:
        gc.set_threshold(*before)
    total = 4 * 150 * 9
    # Not at the first try, if the guard is in the middle of a collection.
    wait_until(lambda: gc.collect() >= 0 and len(dropped) == total, DEADLINE)
    assert held(hub, lambda: len(ran) == total)
    assert list(range(total)) == sorted(ran)


def test_a_log_handler_may_call_wherever_something_is_logged(hub: Hub) -> None:
    """The hub logs what fails in it, and pika, at the level DEBUG, what it does in the loop."""
    sent: list[int] = []
    ran: list[int] = []

    class Sender(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            sent.append(len(sent))  # under the lock of the handler
            hub.call(partial(ran.append, sent[-1]))

    def fail() -> None:
        raise LookupError("on purpose")

    def work() -> None:
        for _ in range(100):
            hub.call(fail)
            hub.call(partial(hub.loop.add_callback_threadsafe, nothing))
            assert hub.wait(lambda: True, first=partial(hub.call_later, 0.0, fail))

    pika_logger = logging.getLogger("pika.adapters.select_connection")
    sender, level = Sender(), pika_logger.level
    pika_logger.setLevel(logging.DEBUG)
    for logger in (hubs.logger, pika_logger):
        logger.addHandler(sender)
    try:
        for task in [Task(work) for _ in range(4)]:
            task.result()
        assert held(hub, lambda: len(ran) == len(sent))
    finally:
        for logger in (hubs.logger, pika_logger):
            logger.removeHandler(sender)
        pika_logger.setLevel(level)
    assert sent == sorted(ran)
    assert len(sent) > 4 * 300


# ------------------------------------------------------------------------------ interrupts


class StrikeAtLine(AtLine):
    """Raise KeyboardInterrupt before the n-th line of hub.py that this thread runs.

    But not before the line of a ``with`` that is about to be left: its exit is part of the
    block, and Python does not look for signals in between.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, self._strike)
        self._lines_of: dict[FrameType, int] = {}

    def _strike(self) -> None:
        raise KeyboardInterrupt

    def _may_act(self, frame: FrameType) -> bool:
        before, self._lines_of[frame] = self._lines_of.get(frame, 0), frame.f_lineno
        return not (before > frame.f_lineno and self._code(frame).startswith("with "))


def struck(at: StrikeAtLine, action: Callable[[], object]) -> None:
    with at, contextlib.suppress(KeyboardInterrupt):
        action()


def lead(hub: Hub) -> None:
    """Lead until somebody follows, and leave the chair to the follower."""
    hub.wait(lambda: bool(hub._waiters), DEADLINE, first=nothing)


def follow(hub: Hub) -> None:
    """Wait in vain."""
    hub.wait(lambda: False, 0.005, first=nothing)


@pytest.mark.parametrize("action", [lead, follow, Hub.call], ids=["lead", "follow", "call"])
def test_an_interrupt_at_any_line_leaves_the_hub_sound(
    guarded: Hub, action: Callable[[Hub], object]
) -> None:
    """Who was carried away neither keeps the chair nor stands in the way of other followers."""
    hub = guarded
    if action is Hub.call:
        action = partial(Hub.call, function=nothing)
    for number in range(1, 1000):
        before = [] if action is lead else [Follower(hub)]
        at = StrikeAtLine(number)
        task = Task(partial(struck, at, partial(action, hub)), f"line {number}")
        wait_until(lambda task=task: task.done or task.follows(hub) or task.leads(hub), DEADLINE)
        after = [Follower(hub)]
        hub.nudge()
        task.result()
        followers = before + after
        while followers:
            # By itself, or the guard has made it: nothing else happens that would help.
            wait_until(
                lambda followers=followers: any(each.leads(hub) for each in followers),
                DEADLINE,
                f"nobody leads after an interrupt at {at.where}: {hub}",
            )
            followers.pop(0).dismiss()
        assert Task(partial(works, hub)).result(), f"not after an interrupt at {at.where}"
        if not at.where:
            break
    assert number > 10


class Alarm(KeyboardInterrupt):
    """Raised by a signal, as by Ctrl-C."""


@pytest.fixture
def alarm() -> Iterator[Callable[[Callable[[], object], float], bool]]:
    """A function that runs another one and interrupts it after some seconds."""

    def strike(_number: int, _frame: FrameType | None) -> None:
        raise Alarm

    def interrupted(action: Callable[[], object], seconds: float) -> bool:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            action()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Alarm:
            return True
        return False

    before = signal.signal(signal.SIGALRM, strike)
    yield interrupted
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# Python ignores an interrupt that strikes in the callback of a weak reference, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_random_leave_the_hub_sound(
    guarded: Hub, alarm: Callable[[Callable[[], object], float], bool]
) -> None:
    """Hundreds of signals strike the main thread while others work; all of it goes on."""
    hub = guarded
    over = False
    turns = [0] * 3

    def work(number: int) -> None:
        while not over:
            done: list[bool] = []
            with contextlib.suppress(ConnectionLostError):  # the main thread led, and was struck
                assert hub.wait(lambda done=done: bool(done), first=partial(done.append, True))
            turns[number] += 1

    def set_timers() -> None:
        for _ in range(10):  # the loop shall compare timers while it is struck
            hub.call_later(chance.random() / 100, nothing)

    def work_of_main() -> None:
        for _ in range(100):
            hub.call(set_timers)
            hub.wait(lambda: True, first=nothing)
            hub.wait(lambda: False, 0.0001)

    tasks = [Task(partial(work, number)) for number in range(len(turns))]
    chance = random.Random(1)
    strikes = 0
    for _ in range(300):
        strikes += alarm(work_of_main, chance.random() / 200)
        assert works(hub), f"not after {strikes} interrupts: {hub}"
        before = list(turns)
        wait_until(lambda before=before: all(map(int.__gt__, turns, before)), DEADLINE, repr(hub))
    over = True
    for task in tasks:
        task.result()
    assert strikes > 100


# ----------------------------------------------------------------------------------- forks


def test_many_forks_under_load() -> None:
    """No thread of the parent loses anything, and every child can make a hub of its own."""
    hub = patient(hubs.acquire())
    over = False
    ran: list[list[int]] = [[] for _ in range(4)]

    def work(number: int) -> int:
        mine = ran[number]
        for turn in itertools.count():
            hub.call(partial(mine.append, 2 * turn))
            have = partial(lambda turn: len(mine) == 2 * turn + 2, turn)
            assert hub.wait(have, first=partial(mine.append, 2 * turn + 1))
            if over:
                return 2 * turn + 2
        raise AssertionError

    def child() -> None:
        own = hubs.acquire()
        assert works(own)
        hubs.release(own)

    tasks = [Task(partial(work, number)) for number in range(len(ran))]
    for number in range(50):
        in_child(child if number % 5 == 0 else partial(os.getpid))
    over = True
    for mine, task in zip(ran, tasks, strict=True):
        assert list(range(task.result())) == mine
    hubs.release(hub)
