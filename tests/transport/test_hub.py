# SPDX-License-Identifier: MIT
"""The hub keeps its nine rules.

Two things that would hide a broken rule are out of play unless a test wants them: the guard
comes only after a minute, and a poll lasts until something ends it (`patient`), while pika's
own would end after 5 s. So what should be woken and is not stays asleep, and the test fails
at a deadline that is never near in a sound hub.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest

from postage.errors import ClosedError, ConnectionLostError, HubReentered
from postage.transport import hub as hubs
from postage.transport.hub import Hub
from tests.waiting import wait_until

#: Seconds in which everything has happened that will happen.
DEADLINE = 20.0
#: Seconds of a timer that must not have fired yet: long beside any reaction to an event.
LATE = 4.0
#: A guard that does not come, and one that comes at once.
NEVER, SOON = 60.0, 0.01

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="for systems with fork")


def patient(hub: Hub) -> Hub:
    """Have the polls of a hub last until an event or a timer ends them."""
    poller: Any = hub.loop._poller
    assert poller._MAX_POLL_TIMEOUT == 5, "pika changed it: what ends a poll now?"
    poller._MAX_POLL_TIMEOUT = 3600
    return hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub whose guard does not come."""
    with contextlib.closing(patient(Hub(NEVER))) as hub:
        yield hub


@pytest.fixture
def guarded() -> Iterator[Hub]:
    """A hub whose guard comes at once."""
    with contextlib.closing(patient(Hub(SOON))) as hub:
        yield hub


@pytest.fixture
def shared() -> Iterator[Hub]:
    """The hub of this process, which forks respect."""
    hub = hubs.acquire()
    yield patient(hub)
    hubs.release(hub)


class Task(threading.Thread):
    """A function that runs in a thread of its own."""

    def __init__(self, function: Callable[[], Any], what: str = "") -> None:
        super().__init__(daemon=True)  # else a broken hub would keep the tests from ending
        self.what = what or repr(function)
        self.done = False
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        self.done = True

    def follows(self, hub: Hub) -> bool:
        """Tell whether it is registered in a hub as one who waits."""
        return any(visit.thread == self.ident for visit in tuple(hub._waiters))

    def leads(self, hub: Hub) -> bool:
        """Tell whether it is in the chair of a hub."""
        return repr(hub).startswith(f"<Hub [led by thread {self.ident},")

    def result(self) -> Any:
        """Return what the function returned, or raise what it raised."""
        self.join(DEADLINE)
        assert self.done, f"still running: {self.what}"
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result


def held(hub: Hub, condition: Callable[[], bool]) -> bool:
    """Wait for a condition, without an end of its own that would hide a missed wake-up."""
    return bool(Task(partial(hub.wait, condition)).result())


class Follower(Task):
    """A thread that waits until it may go. Who comes first leads, the others follow it."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.may_go = False
        self.looks = 0  # of its own: each means that it was woken, or that it led one round
        super().__init__(partial(hub.wait, self._ready))
        wait_until(lambda: self.leads(hub) or self.follows(hub))

    def _ready(self) -> bool:
        self.looks += self.ident == threading.get_ident()
        return self.may_go

    def dismiss(self) -> None:
        """Have it go."""

        def go() -> None:
            self.may_go = True

        self.hub.call(go)
        assert self.result()


class Line:
    """A socket in the loop, which like pika only buffers what is written, and its far end."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.far.setblocking(False)
        self.heard: list[bytes] = []
        self._unsent = b""
        self._events = hub.loop.READ
        hub.call(partial(hub.loop.add_handler, self.near.fileno(), self._handle, self._events))

    def write(self, data: bytes) -> None:
        """Send from the near end: in the loop, as `Channel.basic_publish` of pika."""
        self._unsent += data
        loop = self.hub.loop
        loop.update_handler(self.near.fileno(), self._events | loop.WRITE | loop.ERROR)

    def _handle(self, _descriptor: int, events: int) -> None:
        if events & self.hub.loop.WRITE:
            self._unsent = self._unsent[self.near.send(self._unsent) :]
            if self.is_flushed:
                self.hub.loop.update_handler(self.near.fileno(), self._events)
        if events & self.hub.loop.READ:
            self.heard.append(self.near.recv(4096))

    @property
    def is_flushed(self) -> bool:
        """Whether all has left."""
        return not self._unsent

    def arrived(self) -> bytes:
        """Return what arrived at the far end up to now."""
        try:
            return self.far.recv(4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.hub.call(partial(self.hub.loop.remove_handler, self.near.fileno()))
        self.near.close()
        self.far.close()


@pytest.fixture
def line(hub: Hub) -> Iterator[Line]:
    with contextlib.closing(Line(hub)) as line:
        yield line


class AtLine:
    """Do something once, before the n-th line of hub.py that this thread runs in the block.

    Args:
        free_of: A hub. At a line that holds its lock, other threads could do nothing; wait
            for the next that does not.
        file: The file of another module.
    """

    def __init__(
        self,
        number: int,
        action: Callable[[], object],
        free_of: Hub | None = None,
        file: str = hubs.__file__,
    ) -> None:
        self.number = number
        self.action = action
        self.file = file
        self.where = ""
        self.code = ""
        self._lock: Any = None if free_of is None else free_of._lock
        self._lines = 0

    def __enter__(self) -> AtLine:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _arg: object) -> Any:
        if frame.f_code.co_filename != self.file:
            return None
        if event == "line" and not self.where:
            self._lines += 1
            if self._may_act(frame) and self._lines >= self.number:
                self.code = self._code(frame)
                self.where = f"line {frame.f_lineno}: {self.code}"
                self.action()
        return self._trace

    def _may_act(self, _frame: FrameType) -> bool:
        return self._lock is None or not self._lock._is_owned()

    def _code(self, frame: FrameType) -> str:
        return linecache.getline(self.file, frame.f_lineno).strip()


def each_line(make: Callable[[int], AtLine], scenario: Callable[[], object]) -> Iterator[str]:
    """Run a scenario, in a thread of its own, with an action at one line of it after the other.

    Yields the line, after the scenario has ended.
    """

    def run(at: AtLine) -> None:
        with at:
            scenario()

    for number in range(1, 1000):
        at = make(number)
        Task(partial(run, at), f"with the action at line {number} ({at.where})").result()
        if not at.where:
            assert number > 10, "the scenario does not use the hub"
            return
        yield at.where


# ------------------------------------------------------------------ rule 1: one queue


def test_calls_run_in_the_order_in_which_they_were_given(hub: Hub) -> None:
    """What was only posted runs before what is called, though the caller leads at once."""
    ran: list[int] = []
    hub.post(partial(ran.append, 1))
    hub.post(partial(ran.append, 2))
    hub.call(partial(ran.append, 3))
    hub.post(partial(ran.append, 4))
    assert hub.wait(lambda: len(ran) == 5, first=partial(ran.append, 5))
    assert [1, 2, 3, 4, 5] == ran


def test_calls_keep_their_order_when_the_leader_changes(hub: Hub) -> None:
    """A call that another thread was to run does not fall behind one that we run ourselves."""
    ran: list[int] = []
    busy, idle = threading.Event(), threading.Event()

    def occupy() -> None:
        busy.set()
        idle.wait(DEADLINE)

    task = Task(partial(hub.call, occupy))
    assert busy.wait(DEADLINE)
    hub.call(partial(ran.append, 1))
    idle.set()
    hub.call(partial(ran.append, 2))
    task.result()
    assert held(hub, lambda: len(ran) == 2)
    assert [1, 2] == ran


def test_a_call_is_run_by_the_leader(hub: Hub) -> None:
    """The caller does not wait for it; another thread that leads runs it."""
    leader = Follower(hub)
    where: list[int | None] = []
    hub.call(lambda: where.append(threading.get_ident()))
    leader.dismiss()
    assert [leader.ident] == where


# ------------------------------------------------------------- rule 2: leaving the chair


def test_a_call_has_pushed_its_bytes_out_when_it_returns(hub: Hub, line: Line) -> None:
    """What a called function wrote is on its way, though nobody polls any more."""
    hub.call(partial(line.write, b"hello"))
    assert b"hello" == line.arrived()


def test_a_call_writes_without_a_poll(
    hub: Hub, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket is nearly always writable, so it is tried at once and the poller is not asked."""
    polls: list[object] = []
    hub.call(partial(hub._poll, 0.0))  # one that just was: after a while a call looks for events
    monkeypatch.setattr(hubs, "UNPOLLED", DEADLINE)
    monkeypatch.setattr(hub.loop._poller, "poll", lambda: polls.append("poll"))
    monkeypatch.setattr(hub.loop._poller, "update_handler", lambda *_args: polls.append("update"))
    for _ in range(10):
        hub.call(partial(line.write, b"hello"))
    monkeypatch.undo()
    assert b"hello" * 10 == line.arrived()
    assert [] == polls


def test_what_a_socket_does_not_take_at_once_follows(hub: Hub, line: Line) -> None:
    """Then the poller is asked when it takes more."""
    size = 8_000_000
    hub.call(partial(line.write, bytes(size)))
    assert not line.is_flushed
    line.far.settimeout(DEADLINE)

    def read() -> int:
        count = 0
        while count < size:
            count += len(line.far.recv(1_000_000))
        return count

    reader = Task(read)
    assert held(hub, lambda: line.is_flushed)
    assert size == reader.result()


def test_a_thread_that_only_calls_hears_events(hub: Hub, line: Line) -> None:
    """It never waits, so a call looks for events if nobody did for a while."""
    line.far.send(b"event")

    def heard() -> bool:
        hub.call(lambda: None)
        return line.heard == [b"event"]

    wait_until(heard)


@pytest.fixture
def no_hurry(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody but the test pushes, and no call polls."""
    monkeypatch.setattr(hubs, "LATE", DEADLINE)
    monkeypatch.setattr(hubs, "UNPOLLED", DEADLINE)
    hub.call(partial(hub._poll, 0.0))


def test_calls_write_together(hub: Hub, line: Line, no_hurry: None) -> None:
    """The first after a poll writes at once, and those that follow wait for one that may not."""
    hub.call(lambda: None)  # this one has nothing to write
    for letter in (b"a", b"b", b"c"):
        hub.call(partial(line.write, letter), together=True)
    assert b"a" == line.arrived()
    hub.call(partial(line.write, b"d"))
    assert b"bcd" == line.arrived()


def test_only_so_many_calls_write_together(hub: Hub, line: Line, no_hurry: None) -> None:
    """The broker shall not idle while they are collected."""
    for _ in range(1 + hubs.TOGETHER):
        hub.call(partial(line.write, b"x"), together=True)
    assert b"x" == line.arrived()
    hub.call(partial(line.write, b"x"), together=True)
    assert b"x" * (hubs.TOGETHER + 1) == line.arrived()


def test_who_waits_pushes_what_is_late(hub: Hub, line: Line, no_hurry: None) -> None:
    """It polls, and the first call after that writes at once again."""
    for letter in (b"a", b"b"):
        hub.call(partial(line.write, letter), together=True)
    assert b"a" == line.arrived()
    line.far.send(b"answer")
    assert held(hub, lambda: bool(line.heard))
    assert b"b" == line.arrived()
    hub.call(partial(line.write, b"c"), together=True)
    assert b"c" == line.arrived()


def test_the_guard_pushes_what_is_late(hub: Hub, line: Line) -> None:
    """A thread that calls and then computes does not keep its messages back."""
    arrived = b""
    for round_ in range(1, 101):
        hub.call(partial(line.write, b"a"), together=True)
        hub.call(partial(line.write, b"b"), together=True)
        deadline = time.monotonic() + DEADLINE
        while len(arrived) < 2 * round_:
            arrived += line.arrived()
            assert time.monotonic() < deadline
    assert b"ab" * 100 == arrived


def test_a_fork_pushes_what_is_late(shared: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guard would have done is not forgotten with it."""
    monkeypatch.setattr(hubs, "LATE", DEADLINE)
    with shared_line(shared) as line:
        shared.call(partial(shared._poll, 0.0))
        for letter in (b"a", b"b", b"c"):
            shared.call(partial(line.write, letter), together=True)
        in_child(lambda: None)
        assert b"abc" == line.arrived()


def test_a_leader_is_woken_once_for_many_calls(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte in the wake-up socket is enough for all who call before the leader looks."""
    ran: list[int] = []
    busy, idle = threading.Event(), threading.Event()

    def occupy() -> None:
        busy.set()
        idle.wait(DEADLINE)

    leader = Follower(hub)
    hub.call(occupy)
    assert busy.wait(DEADLINE)
    sent: list[bytes] = []
    writer = hub._wakeup_writer
    spy = types.SimpleNamespace(send=lambda byte: sent.append(byte) or writer.send(byte))
    monkeypatch.setattr(hub, "_wakeup_writer", spy)
    for number in range(100):
        hub.call(partial(ran.append, number))
    idle.set()
    wait_until(lambda: len(ran) == 100)
    monkeypatch.undo()
    leader.dismiss()
    assert len(sent) <= 1


def test_a_wait_has_pushed_its_bytes_out_when_it_returns(hub: Hub, line: Line) -> None:
    """So has a function that was given with a wait that was over at once."""
    assert hub.wait(lambda: True, first=partial(line.write, b"hello"))
    assert b"hello" == line.arrived()


def test_what_a_callback_writes_at_the_end_is_pushed_out(hub: Hub, line: Line) -> None:
    """An answer that a callback wrote does not stay behind when its leader leaves."""
    answered: list[bool] = []

    def answer() -> None:
        line.write(b"pong")
        answered.append(True)

    hub.call(lambda: hub.call_later(0.0, answer))
    assert hub.wait(lambda: bool(answered))
    assert b"pong" == line.arrived()


@pytest.mark.parametrize("scenario", ["call", "wait"])
def test_no_call_is_left_behind_an_empty_chair(hub: Hub, scenario: str) -> None:
    """Another thread may call while a leader leaves, at whatever line that is."""
    ran: list[str] = []
    scenarios: dict[str, Callable[[], object]] = {
        "call": lambda: hub.call(lambda: None),
        "wait": lambda: hub.wait(lambda: True, first=lambda: None),
    }

    def intrude() -> None:
        Task(lambda: hub.call(partial(ran.append, "x"))).result()

    for where in each_line(lambda number: AtLine(number, intrude, hub), scenarios[scenario]):
        assert not hub._calls, f"left behind at {where}"
        assert ran, f"not run at {where}"
        ran.clear()


@pytest.mark.parametrize("scenario", ["call", "wait", "fork"])
def test_a_finaliser_may_call_between_any_two_lines(hub: Hub, scenario: str) -> None:
    """It does not wait for the thread that it interrupts, and its call is not left behind."""
    ran: list[str] = []

    def freeze_and_thaw() -> None:
        hub._freeze()
        hub._thaw()

    scenarios: dict[str, Callable[[], object]] = {
        "call": lambda: hub.call(lambda: None),
        "wait": lambda: hub.wait(lambda: True, first=lambda: None),
        "fork": freeze_and_thaw,
    }

    def intrude() -> None:
        hub.call(partial(ran.append, "x"))

    for where in each_line(lambda number: AtLine(number, intrude), scenarios[scenario]):
        assert not hub._calls, f"left behind at {where}"
        assert ran, f"not run at {where}"
        ran.clear()


def test_a_finaliser_may_call_just_before_its_thread_polls(hub: Hub) -> None:
    """At whatever line that is, the poll does not begin, or ends at once."""
    ran: list[str] = []
    ats: list[AtLine] = []

    def make(number: int) -> AtLine:
        ran.clear()
        ats.append(AtLine(number, lambda: hub.call(partial(ran.append, "x"))))
        return ats[-1]

    for _ in each_line(make, lambda: hub.wait(lambda: bool(ran))):
        if ats[-1].code == "self.loop.poll()":
            break  # the lines after it are not reached before there is something to run
    else:
        pytest.fail("the scenario never polls")


def test_a_call_in_a_call_runs_before_the_leader_polls(hub: Hub) -> None:
    """A chain of calls needs no event to go on."""
    ran: list[int] = []

    def step(number: int) -> None:
        ran.append(number)
        if number < 5:
            hub.call(partial(step, number + 1))

    task = Task(lambda: hub.wait(lambda: len(ran) == 5, first=partial(step, 1)))
    assert task.result()
    assert [1, 2, 3, 4, 5] == ran


# ----------------------------------------------------------------- rule 3: one heir


def test_the_follower_that_has_waited_longest_leads_next(hub: Hub) -> None:
    """The chair that a leader leaves does not stay empty while others wait."""
    first, second, third = Follower(hub), Follower(hub), Follower(hub)
    assert first.leads(hub)
    first.dismiss()
    wait_until(lambda: second.leads(hub), DEADLINE)
    second.dismiss()
    wait_until(lambda: third.leads(hub), DEADLINE)
    third.dismiss()


def test_a_leader_that_leaves_wakes_no_herd(hub: Hub) -> None:
    """There are as many wake-ups as successions, not that many times the followers."""
    followers = [Follower(hub) for _ in range(30)]
    for follower in followers:
        wait_until(lambda follower=follower: follower.leads(hub), DEADLINE)
        follower.dismiss()
    assert sum(follower.looks for follower in followers) < 30 * 12


def test_an_heir_that_does_not_need_the_chair_passes_it_on(hub: Hub) -> None:
    """The heir has its result already: the next follower leads instead."""
    first, second, third = Follower(hub), Follower(hub), Follower(hub)

    def dismiss_both() -> None:
        first.may_go = second.may_go = True

    hub.call(dismiss_both)
    assert first.result()
    assert second.result()
    wait_until(lambda: third.leads(hub), DEADLINE)
    third.dismiss()


def test_an_heir_whose_time_is_up_passes_the_chair_on(hub: Hub) -> None:
    """A leader may leave at any line of a follower that goes by itself."""
    leader = Follower(hub)
    last_is_there = threading.Event()

    def abdicate() -> None:
        assert last_is_there.wait(DEADLINE)
        leader.dismiss()

    def wait_in_vain(at: AtLine) -> None:
        with at:
            assert not hub.wait(lambda: False, 0.01)

    for number in range(1, 1000):
        last_is_there.clear()
        at = AtLine(number, abdicate, hub)
        task = Task(partial(wait_in_vain, at))
        wait_until(lambda task=task, at=at: at.where or task.done or task.follows(hub), DEADLINE)
        last = Follower(hub)
        last_is_there.set()
        task.result()
        if not at.where:
            leader.dismiss()
        wait_until(lambda last=last: last.leads(hub), DEADLINE, at.where)
        leader = last
        if not at.where:
            break
    leader.dismiss()
    assert number > 20


# --------------------------------------------------------- rule 4: no wake-up is missed


def test_a_follower_misses_nothing_while_it_falls_asleep(hub: Hub) -> None:
    """At whatever line its condition comes true, and the leader has had its look."""
    leader = Follower(hub)
    came: list[bool] = []

    def come() -> None:
        looks = leader.looks
        hub.call(partial(came.append, True))
        wait_until(lambda: leader.looks > looks, DEADLINE)

    ats: list[AtLine] = []

    def make(number: int) -> AtLine:
        came.clear()
        ats.append(AtLine(number, come, hub))
        return ats[-1]

    for _ in each_line(make, lambda: hub.wait(lambda: bool(came))):
        if ats[-1].code.startswith("return self._lock.acquire("):
            break  # it is asleep
    else:
        pytest.fail("the scenario never sleeps")
    leader.dismiss()


def test_a_follower_is_woken_by_what_a_leader_does_last(hub: Hub) -> None:
    """Its condition comes true in the call after which the leader leaves: it needs no event."""
    first, second, third = Follower(hub), Follower(hub), Follower(hub)

    def dismiss_both() -> None:
        first.may_go = third.may_go = True

    hub.call(dismiss_both)
    assert first.result()
    assert third.result()
    second.dismiss()


def test_a_follower_is_woken_by_what_arrives_when_a_leader_leaves(hub: Hub, line: Line) -> None:
    """The last push of a leader brought it, and the heir is another thread, and polls."""
    busy, idle = threading.Event(), threading.Event()

    def occupy() -> None:
        busy.set()
        idle.wait(DEADLINE)

    caller = Task(partial(hub.call, occupy))
    assert busy.wait(DEADLINE)
    heir = Follower(hub)
    follower = Task(partial(hub.wait, lambda: bool(line.heard)))
    wait_until(lambda: follower.follows(hub))
    line.far.send(b"news")
    idle.set()
    caller.result()
    assert follower.result()
    assert [b"news"] == line.heard
    heir.dismiss()


def test_a_condition_that_raises_does_so_in_its_own_thread(hub: Hub) -> None:
    """The leader goes on."""
    leader = Follower(hub)
    broken: list[bool] = []

    def condition() -> bool:
        if broken:
            raise LookupError("of the follower")
        return False

    task = Task(partial(hub.wait, condition))
    wait_until(lambda: task.follows(hub))
    hub.call(partial(broken.append, True))
    with pytest.raises(LookupError):
        task.result()
    assert leader.leads(hub)
    leader.dismiss()


def test_a_wait_ends_when_its_time_is_up(hub: Hub) -> None:
    """The leader's and a follower's, and one that begins too late."""
    assert not hub.wait(lambda: False, 0.01)
    leader = Follower(hub)
    assert not hub.wait(lambda: False, 0.01)
    assert not hub.wait(lambda: False, 0.0)
    leader.dismiss()
    assert "<Hub [no leader, 0 waiting, 0 calls]>" == repr(hub)


# ------------------------------------------------------- rule 5: nothing waits in a callback


def test_waiting_in_a_call_is_refused(hub: Hub) -> None:
    """Who asked for the call hears of it, and the hub goes on."""

    def wait_twice() -> None:
        hub.wait(lambda: False, first=partial(hub.wait, lambda: False))

    with pytest.raises(HubReentered, match="may send, but not wait"):
        Task(wait_twice).result()
    assert hub.wait(lambda: True, first=lambda: None)


def test_waiting_in_a_callback_is_refused(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody asked for a timer, so it is logged, and the loop goes on."""
    rang: list[bool] = []

    def wait() -> None:
        rang.append(True)
        hub.wait(lambda: False)

    hub.call(lambda: hub.call_later(0.0, wait))
    assert hub.wait(lambda: bool(rang))
    assert "HubReentered" in caplog.text
    assert hub.wait(lambda: True, first=lambda: None)


def test_closing_in_a_callback_is_refused(hub: Hub) -> None:
    """The loop that runs the callback cannot be taken away from under it."""
    with pytest.raises(HubReentered):
        hub.wait(lambda: False, first=hub.close)
    assert hub.wait(lambda: True, first=lambda: None)


def test_a_callback_may_call(hub: Hub) -> None:
    """The function runs after the callback, in the same round."""
    ran: list[str] = []

    def ring() -> None:
        hub.call(partial(ran.append, "call"))
        ran.append("timer")

    hub.call(lambda: hub.call_later(0.0, ring))
    assert Task(lambda: hub.wait(lambda: len(ran) == 2)).result()
    assert ["timer", "call"] == ran


# --------------------------------------------------------- rule 6: nothing leaves the poll


def fail() -> None:
    raise LookupError("on purpose")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_error_in_a_call_is_logged(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """The other calls run all the same."""
    ran: list[int] = []
    hub.post(partial(ran.append, 1))
    hub.post(fail)
    hub.call(partial(ran.append, 2))
    assert [1, 2] == ran
    assert "a call in the I/O loop failed" in caplog.text


def test_an_error_in_what_a_wait_asked_for_ends_the_wait(hub: Hub) -> None:
    """Whoever leads, it goes to the one who asked, who would wait for ever."""
    with pytest.raises(LookupError):
        Task(partial(hub.wait, lambda: False, first=fail)).result()
    leader = Follower(hub)
    with pytest.raises(LookupError):
        Task(partial(hub.wait, lambda: False, first=fail)).result()
    assert leader.leads(hub)
    leader.dismiss()


def test_an_error_in_a_timer_is_logged(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """The other timers that are due ring all the same."""
    rang: list[int] = []

    def set_timers() -> None:
        hub.call_later(0.0, partial(rang.append, 1))
        hub.call_later(0.0, fail)
        hub.call_later(0.0, partial(rang.append, 2))

    hub.on_broken.append(lambda error: rang.append(3))
    assert hub.wait(lambda: len(rang) >= 2, first=set_timers)
    assert [1, 2] == rang
    assert "a callback of the I/O loop failed" in caplog.text


def test_timers_ring_in_the_order_in_which_they_are_due(hub: Hub) -> None:
    """Those that are due at the same time in the order in which they were set."""
    rang: list[int] = []

    def set_timers() -> None:
        hub.call_later(0.02, partial(rang.append, 3))
        hub.call_later(-1.0, partial(rang.append, 1))
        hub.call_later(0.0, partial(rang.append, 2))

    assert hub.wait(lambda: len(rang) == 3, first=set_timers)
    assert [1, 2, 3] == rang


def test_cancelled_timers_do_not_pile_up(hub: Hub) -> None:
    """Most deadlines are far away, and cancelled."""
    rang: list[int] = []

    def set_timers() -> None:
        hub.call_later(0.01, partial(rang.append, 1))
        for _ in range(10_000):
            timer = hub.call_later(3600.0, fail)
            hub.cancel(timer)
            hub.cancel(timer)

    hub.call(set_timers)
    assert len(hub.loop._timers) < 3000
    assert held(hub, lambda: bool(rang))


def test_a_cancelled_timer_does_not_ring(hub: Hub) -> None:
    """Nor does it ring when the loop breaks."""
    rang: list[int] = []

    def set_timers() -> None:
        cancelled = hub.call_later(0.0, partial(rang.append, 1))
        hub.call_later(0.0, partial(rang.append, 2))
        hub.cancel(cancelled)
        hub.loop.add_callback_threadsafe(fail)

    assert hub.wait(lambda: bool(rang), first=set_timers)
    assert [2] == rang


def test_an_error_of_pika_breaks_connections_and_nothing_else(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    """All connections hear of it, one that fails does not keep it from the next."""
    heard: list[BaseException] = []
    hub.on_broken.extend([lambda error: fail(), heard.append])
    hub.call(partial(hub.loop.add_callback_threadsafe, fail))
    assert held(hub, lambda: bool(heard))
    assert [LookupError] == [type(error) for error in heard]
    assert "all connections start anew" in caplog.text
    assert "a connection could not be abandoned" in caplog.text
    assert hub.wait(lambda: True, first=lambda: None)


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_timers_that_were_due_when_the_loop_broke_still_ring(
    hub: Hub, error: type[BaseException]
) -> None:
    """pika forgets them."""
    rang: list[int] = []

    def break_loop() -> None:
        raise error

    def set_timers() -> None:
        hub.loop.call_later(0.0, break_loop)  # as one of pika's own, such as a heartbeat
        hub.call_later(0.0, partial(rang.append, 1))
        hub.call_later(0.0, partial(rang.append, 2))

    with contextlib.suppress(KeyboardInterrupt):
        hub.wait(lambda: False, 0.1, first=set_timers)
    assert held(hub, lambda: len(rang) == 2)
    assert [1, 2] == rang


def test_an_interrupt_in_the_poll_breaks_the_connections(hub: Hub) -> None:
    """It goes on to the thread that it was meant for, and the hub works afterwards."""
    heard: list[BaseException] = []
    hub.on_broken.append(heard.append)
    with pytest.raises(KeyboardInterrupt):
        hub.wait(lambda: False, first=partial(hub.loop.add_callback_threadsafe, interrupt))
    assert [KeyboardInterrupt] == [type(error) for error in heard]
    assert hub.wait(lambda: True, first=lambda: None)


def test_an_interrupt_in_a_call_breaks_the_connections(hub: Hub) -> None:
    """What the call wrote may be half a frame. The next calls are not lost."""
    heard: list[BaseException] = []
    ran: list[int] = []
    hub.on_broken.append(heard.append)
    hub.post(interrupt)
    hub.post(partial(ran.append, 1))
    with pytest.raises(KeyboardInterrupt):
        hub.call(partial(ran.append, 2))
    assert [KeyboardInterrupt] == [type(error) for error in heard]
    assert held(hub, lambda: len(ran) == 2)
    assert [1, 2] == ran


def test_who_asked_for_an_interrupted_call_does_not_wait_for_ever(hub: Hub) -> None:
    """The interrupt is for the leader; the follower hears that its call was cut short."""
    asked = threading.Event()

    def lead() -> None:
        with pytest.raises(KeyboardInterrupt):
            hub.wait(lambda: False, first=asked.set)

    leader = Task(lead)
    assert asked.wait(DEADLINE)
    with pytest.raises(ConnectionLostError, match="interrupted by KeyboardInterrupt"):
        Task(partial(hub.wait, lambda: False, first=interrupt)).result()
    leader.result()


def test_the_guard_survives_everything(guarded: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is raised while it leads, and also while it leaves the chair."""

    def stop() -> None:
        raise SystemExit

    wait_until(lambda: "guard" in repr(guarded))
    for _ in range(20):
        led = guarded.guard_led
        guarded.call(lambda: guarded.call(stop))
        wait_until(lambda led=led: guarded.guard_led > led, DEADLINE)
    task = Task(lambda: guarded.wait(lambda: True, first=lambda: None))
    assert task.result()
    assert "the guard of the I/O loop failed and goes on" in caplog.text


def test_the_guard_survives_what_is_raised_while_it_leaves(guarded: Hub) -> None:
    """It steps aside for one who waits, and what it still has to run fails."""
    wait_until(lambda: "guard" in repr(guarded))
    came: list[bool] = []

    def stop() -> None:
        raise SystemExit

    def last() -> None:
        guarded.post(stop)  # run when the guard leaves: `last` was run in its last round
        guarded.call_later(0.05, partial(came.append, True))

    with contextlib.suppress(SystemExit):  # if this thread was the leader
        guarded.wait(lambda: bool(came), first=last)
    led = guarded.guard_led
    wait_until(lambda: guarded.guard_led > led, DEADLINE)


def test_a_log_handler_that_fails_does_not_end_the_guard(guarded: Hub) -> None:
    """Even the report of its failure may fail."""

    def refuse(_record: logging.LogRecord) -> bool:
        raise SystemExit

    hubs.logger.addFilter(refuse)
    try:
        wait_until(lambda: "guard" in repr(guarded))
        led = guarded.guard_led
        guarded.call(fail)
        wait_until(lambda: guarded.guard_led > led, DEADLINE)
    finally:
        hubs.logger.removeFilter(refuse)


# --------------------------------------------------------- rule 7: a signal ends the poll


@pytest.fixture
def flags() -> Iterator[list[int]]:
    """The signals that arrived; SIGUSR1 is handled."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: arrived.append(number))
    yield arrived
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_ends_the_poll_of_the_main_thread(hub: Hub, flags: list[int]) -> None:
    """The flag that its handler sets is seen at once."""
    late: list[bool] = []
    polling = threading.Event()

    def begin() -> None:
        hub.call_later(LATE, partial(late.append, True))
        hub.call_later(0.05, polling.set)

    def send() -> None:
        assert polling.wait(DEADLINE)
        os.kill(os.getpid(), signal.SIGUSR1)

    with hub.signals_wake():
        task = Task(send)
        assert hub.wait(lambda: bool(flags), 2 * LATE, first=begin)
    assert not late
    task.result()


def test_a_signal_wakes_the_main_thread_while_another_leads(hub: Hub, flags: list[int]) -> None:
    """Also if the system gives the signal to the other thread, as it may."""
    late: list[bool] = []
    leader = Follower(hub)

    def send() -> None:
        wait_until(lambda: hub._waiters)
        signal.pthread_kill(leader.ident or 0, signal.SIGUSR1)

    with hub.signals_wake():
        hub.call(lambda: hub.call_later(LATE, partial(late.append, True)))
        task = Task(send)
        assert hub.wait(lambda: bool(flags), 2 * LATE)
    assert not late
    task.result()
    leader.dismiss()


def test_signals_go_where_they_went_before_when_the_block_ends(hub: Hub) -> None:
    """The wake-up descriptor of another library is put back."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno())
        with hub.signals_wake():
            pass
        assert writer.fileno() == signal.set_wakeup_fd(before)


# ----------------------------------------------------------------------- rule 8: a fork


def in_child(function: Callable[[], object]) -> None:
    """Fork, and run a function in the child, which must not raise."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(DEADLINE))
            function()
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as report:
        text = report.read()
    _, status = os.waitpid(pid, 0)
    assert 0 == status, text


def shared_line(hub: Hub) -> Any:
    return contextlib.closing(Line(hub))


def test_a_child_has_a_hub_of_its_own(shared: Hub) -> None:
    """It begins without one, and the first that asks makes one that works."""

    def child() -> None:
        assert hubs.current() is None
        hub = hubs.acquire()
        assert hub is not shared
        assert (shared.pid, hub.pid) == (os.getppid(), os.getpid())
        assert hub.wait(lambda: True, first=lambda: None)
        assert Task(lambda: hub.wait(lambda: True, first=lambda: None)).result()
        hubs.release(hub)
        assert hubs.current() is None

    in_child(child)
    assert hubs.current() is shared


def test_the_descriptors_of_the_parent_lead_nowhere_in_a_child(shared: Hub) -> None:
    """Their numbers stay taken, so that a socket object of the parent closes nothing else."""
    with shared_line(shared) as line:
        watched = {line.near.fileno(), *shared.loop.watched, shared._wakeup_writer.fileno()}

        def child() -> None:
            for descriptor in watched:
                assert os.path.samestat(os.fstat(descriptor), os.stat(os.devnull))
                assert not os.get_inheritable(descriptor)

        assert len(watched) == 3
        in_child(child)


def test_the_hub_of_the_parent_is_closed_in_a_child(shared: Hub) -> None:
    """Whoever still has it is refused, in every thread, though others waited at the fork."""
    leader, follower = Follower(shared), Follower(shared)

    def child() -> None:
        shared.call(fail)
        shared.post(fail)
        shared.close()
        wait = partial(shared.wait, lambda: False)
        for attempt in (wait, lambda: Task(wait).result()):
            with pytest.raises(ClosedError):
                attempt()

    in_child(child)
    leader.dismiss()
    follower.dismiss()


@pytest.mark.parametrize("deed", ["exit", "close", "unregister", "release", "wake"])
def test_nothing_that_a_child_does_disturbs_the_parent(shared: Hub, deed: str) -> None:
    """The set of descriptors that the parent polls is shared with the child."""
    with shared_line(shared) as line:

        def child() -> None:
            if deed == "close":
                line.near.close()
            elif deed == "unregister":
                with contextlib.suppress(OSError):
                    shared.loop.remove_handler(line.near.fileno())
            elif deed == "release":
                hubs.release(shared)
            elif deed == "wake":
                shared.wake()

        in_child(child)
        line.far.send(b"news")
        assert held(shared, lambda: bool(line.heard))
        shared.call(partial(line.write, b"answer"))
        assert wait_until(line.arrived) == b"answer"


def test_a_fork_finds_the_loop_at_rest(shared: Hub) -> None:
    """It waits for the leader, who leaves the chair after the callback that it is in."""
    inside: list[bool] = []
    busy = threading.Event()

    def work() -> None:
        inside.append(True)
        busy.set()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: shared._freezer is not None, 5.0)
        inside.clear()

    def child() -> None:
        assert not inside

    leader = Follower(shared)
    shared.call(work)
    assert busy.wait(DEADLINE)
    in_child(child)
    leader.dismiss()


def test_leaders_and_followers_go_on_after_a_fork(shared: Hub) -> None:
    """In the parent nothing was lost: neither a waiting thread nor a call nor the guard."""
    leader, follower = Follower(shared), Follower(shared)
    shared.call(lambda: None)
    in_child(lambda: None)
    assert not (leader.done or follower.done)
    wait_until(lambda: leader.leads(shared) or follower.leads(shared), DEADLINE)
    leader.dismiss()
    follower.dismiss()
    wait_until(lambda: "guard" in repr(shared), DEADLINE)


def test_a_fork_in_a_thread_leaves_the_hub_to_the_parent(shared: Hub) -> None:
    """Any thread may fork, while others lead and wait."""
    leader, follower = Follower(shared), Follower(shared)
    Task(partial(in_child, lambda: hubs.release(hubs.acquire()))).result()
    leader.dismiss()
    follower.dismiss()


def test_a_fork_in_a_callback_does_not_take_the_chair_away(shared: Hub) -> None:
    """The leader that runs the callback still leads when it has forked."""
    led: list[bool] = []

    def fork() -> None:
        in_child(lambda: None)
        led.append(shared.leading)

    follower = Follower(shared)
    shared.call(fork)
    wait_until(lambda: led, DEADLINE)
    assert [True] == led
    follower.dismiss()


def test_there_is_one_guard_after_many_forks(shared: Hub) -> None:
    """The guard ends before each fork, and another one begins."""
    for _ in range(5):
        in_child(lambda: None)
    guards = [thread for thread in threading.enumerate() if thread.name == "postage-guard"]
    assert 1 == len(guards)
    wait_until(lambda: "guard" in repr(shared), DEADLINE)


def test_a_fork_does_not_wait_for_ever_for_a_stuck_guard(
    shared: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It gives up and says so. The guard that was stuck ends when it can, another is there."""
    monkeypatch.setattr(hubs, "FORK_PATIENCE", 0.05)
    stuck, free = threading.Event(), threading.Event()
    guard = shared._guard
    wait_until(lambda: "guard" in repr(shared))

    def get_stuck() -> None:
        stuck.set()
        free.wait(DEADLINE)

    shared.call(get_stuck)
    assert stuck.wait(DEADLINE)
    in_child(lambda: hubs.release(hubs.acquire()))
    assert "stuck in a callback" in caplog.text
    free.set()
    guard.join(DEADLINE)
    assert not guard.is_alive()
    assert shared._guard.is_alive()
    assert shared.wait(lambda: True, first=lambda: None)


def test_followers_go_on_after_a_fork_that_gave_up(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stuck leader left while nobody was allowed to take the chair."""
    monkeypatch.setattr(hubs, "FORK_PATIENCE", 0.05)
    leader, follower = Follower(hub), Follower(hub)
    stuck, free = threading.Event(), threading.Event()

    def get_stuck() -> None:
        stuck.set()
        free.wait(DEADLINE)
        leader.may_go = True

    hub.call(get_stuck)
    assert stuck.wait(DEADLINE)
    hub._freeze()
    looks = follower.looks
    free.set()
    assert leader.result()
    wait_until(lambda: follower.looks >= looks + 2, DEADLINE)  # it was woken, and sleeps again
    hub._thaw()
    wait_until(lambda: follower.leads(hub), DEADLINE)
    follower.dismiss()


def test_a_signal_in_a_child_does_not_wake_the_parent(shared: Hub, flags: list[int]) -> None:
    """The wake-up descriptor of the interpreter leads nowhere there, too."""
    woken: list[bool] = []
    with shared.signals_wake():
        leader = Follower(shared)
        in_child(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        wait_until(lambda: leader.leads(shared), DEADLINE)
        shared.call(lambda: woken.append(True))
        leader.dismiss()
    assert not flags


# ---------------------------------------------------------------------- rule 9: the guard


def test_the_guard_leads_when_nobody_else_does(guarded: Hub) -> None:
    """Timers ring and events are heard while no thread of the program waits."""
    rang: list[int | None] = []
    guarded.call(lambda: guarded.call_later(0.1, lambda: rang.append(threading.get_ident())))
    wait_until(lambda: rang, DEADLINE)
    assert [guarded._guard.ident] == rang
    assert guarded.guard_led > 0
    assert "<Hub [led by the guard, 0 waiting, 0 calls]>" == repr(guarded)


def test_the_guard_leads_while_a_thread_computes(guarded: Hub) -> None:
    """A handler that never gives up the processor does not stop the timers."""
    rang: list[bool] = []
    guarded.call(lambda: guarded.call_later(0.1, partial(rang.append, True)))
    deadline = time.monotonic() + DEADLINE
    while not rang:
        sum(range(1000))
        assert time.monotonic() < deadline


def test_the_guard_runs_what_was_posted(guarded: Hub) -> None:
    """Nobody else would."""
    ran: list[bool] = []
    guarded.post(partial(ran.append, True))
    wait_until(lambda: ran, DEADLINE)


def test_the_guard_steps_aside_for_a_thread_that_waits(guarded: Hub) -> None:
    """The one that waits polls itself: a hop to another thread would cost it time."""
    for _ in range(20):
        wait_until(lambda: "guard" in repr(guarded))
        follower = Follower(guarded)
        wait_until(lambda follower=follower: follower.leads(guarded), DEADLINE)
        follower.dismiss()


def test_the_guard_does_not_come_while_somebody_leads(guarded: Hub) -> None:
    """Its vacancy is over many times, and it lets the leader lead."""
    rounds: list[int | None] = []

    def ring() -> None:
        rounds.append(threading.get_ident())
        guarded.call_later(SOON, ring)

    assert guarded.wait(lambda: len(rounds) > 20, first=ring)
    assert {threading.get_ident()} == set(rounds)


# ------------------------------------------------------------------------------ the end


def test_closing_ends_every_wait(hub: Hub) -> None:
    """The leader's and those of the followers."""
    tasks = [Follower(hub) for _ in range(4)]
    hub.close()
    for task in tasks:
        with pytest.raises(ClosedError):
            task.result()
    assert "<Hub [closed, 0 waiting, 0 calls]>" == repr(hub)


def test_closing_wakes_all_who_sleep(hub: Hub) -> None:
    """The heir of the last leader finds the chair taken, and so does not pass it on."""
    leader = Follower(hub)

    def look() -> bool:
        if hub._closed and threading.get_ident() == heir.ident:
            wait_until(closer_leads.is_set)
        return False

    closer_leads = threading.Event()
    heir = Task(partial(hub.wait, look))
    wait_until(lambda: heir.follows(hub))
    last = Follower(hub)

    class WhenTheCloserLeads(AtLine):
        def _may_act(self, frame: FrameType) -> bool:
            return frame.f_code.co_name == "close" and hub.leading

    def let_the_heir_go() -> None:
        closer_leads.set()
        wait_until(lambda: heir.done, DEADLINE)

    with WhenTheCloserLeads(1, let_the_heir_go) as at:
        hub.close()
    assert at.where
    for task in (leader, heir, last):
        with pytest.raises(ClosedError):
            task.result()


def test_closing_ends_a_wait_at_whatever_line_it_is() -> None:
    """A thread that is about to follow is not forgotten."""
    for number in range(1, 1000):
        with contextlib.closing(patient(Hub(NEVER))) as hub:
            leader = Follower(hub)
            at = AtLine(number, lambda hub=hub: Task(hub.close).result(), hub)

            def wait(at: AtLine = at, hub: Hub = hub) -> None:
                with at:
                    hub.wait(lambda: False)

            for task in (Task(wait, at.where), leader):
                with pytest.raises(ClosedError):
                    task.result()
            if at.code.startswith("return self._lock.acquire("):
                break  # it is asleep
    assert number > 10


def test_a_closed_hub_does_nothing(hub: Hub) -> None:
    """A call is accepted, a wait is refused, closing again is fine."""
    hub.close()
    ran: list[bool] = []
    hub.call(partial(ran.append, True))
    hub.post(partial(ran.append, True))
    hub.wake()
    hub.nudge()
    with pytest.raises(ClosedError):
        hub.wait(lambda: False)
    with pytest.raises(ClosedError):
        hub.wait(lambda: True, first=partial(ran.append, True))
    assert hub.wait(lambda: True)
    hub.close()
    assert not ran


def test_the_last_user_closes_the_hub_of_the_process() -> None:
    """Users are counted."""
    first = hubs.acquire()
    second = hubs.acquire()
    assert first is second is hubs.current()
    hubs.release(first)
    assert first is hubs.current()
    hubs.release(second)
    assert hubs.current() is None
    assert repr(first).startswith("<Hub [closed,")
    hubs.release(first)


def test_the_state_of_a_hub_can_be_seen(hub: Hub) -> None:
    """Who leads, how many wait, how many calls are left."""
    hub.post(lambda: None)
    assert "<Hub [no leader, 0 waiting, 1 calls]>" == repr(hub)
    leader, follower = Follower(hub), Follower(hub)
    wait_until(lambda: f"<Hub [led by thread {leader.ident}, 1 waiting, 0 calls]>" == repr(hub))
    leader.dismiss()
    follower.dismiss()
