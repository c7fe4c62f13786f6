# SPDX-License-Identifier: MIT
"""Timers are called when it is time, in their order, and cost nothing once they are cancelled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postage.broker.clock import Clock
from tests.broker.wire import Time


class Noting:
    """A clock that is moved by hand, and what it has called."""

    def __init__(self) -> None:
        self.time = Time()
        self.clock = Clock(self.time)
        self.calls: list[str] = []

    def note(self, text: str) -> Callable[[], None]:
        return lambda: self.calls.append(text)

    def go_to(self, when: float) -> list[str]:
        """Let it be that time, and return what has been called."""
        self.time.now = when
        self.clock.run()
        calls, self.calls = self.calls, []
        return calls


def test_a_timer_is_called_once_when_its_time_has_come() -> None:
    """Not before, and not again."""
    own = Noting()
    timer = own.clock.call_later(5, own.note("a"))

    assert (1005, 1005, True) == (timer.when, own.clock.next_call, timer.is_due)
    assert [] == own.go_to(1004.999)
    assert ["a"] == own.go_to(1005)
    assert (None, False, 0) == (own.clock.next_call, timer.is_due, len(own.clock))
    assert [] == own.go_to(2000)


def test_timers_are_called_in_the_order_of_their_times() -> None:
    """Those of one time in the order in which they were made."""
    own = Noting()
    for text, when in (("c", 1002), ("a", 1001), ("d", 1002), ("b", 1001.5)):
        own.clock.call_at(when, own.note(text))

    assert ["a", "b", "c", "d"] == own.go_to(1010)


def test_a_cancelled_timer_is_not_called() -> None:
    """Cancelling twice, or after the call, changes nothing."""
    own = Noting()
    first = own.clock.call_later(1, own.note("first"))
    second = own.clock.call_later(2, own.note("second"))
    first.cancel()
    first.cancel()

    assert (1002, 1) == (own.clock.next_call, len(own.clock))
    assert ["second"] == own.go_to(1010)
    second.cancel()
    assert 0 == len(own.clock)


def test_a_call_may_make_and_cancel_timers() -> None:
    """Those that are due by then are called, too."""
    own = Noting()
    later = own.clock.call_at(1003, own.note("cancelled"))

    def act() -> None:
        own.calls.append("acted")
        later.cancel()
        own.clock.call_at(1002, own.note("made"))
        own.clock.call_at(1020, own.note("later"))

    own.clock.call_at(1001, act)
    assert ["acted", "made"] == own.go_to(1010)
    assert 1020 == own.clock.next_call


def test_a_call_that_fails_does_not_keep_others_from_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged with its traceback."""

    def fail() -> None:
        raise ZeroDivisionError

    own = Noting()
    own.clock.call_at(1001, fail)
    own.clock.call_at(1002, own.note("next"))

    assert ["next"] == own.go_to(1010)
    assert "a timer of the broker failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_cancelled_timers_are_let_go() -> None:
    """Each of many queues that live for a moment may have had a timer for a week."""
    own = Noting()
    own.clock.call_later(9, own.note("stays"))
    for _ in range(1000):
        own.clock.call_later(7 * 86_400, own.note("never")).cancel()
        assert len(own.clock._heap) <= 3
    assert 1 == len(own.clock)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20),
    st.lists(st.integers(0, 9), max_size=5),
)
def test_any_timers_are_called_as_a_list_says(
    timers: list[tuple[int, int]], looks: list[int]
) -> None:
    """Each has a time, and perhaps another at which it is cancelled."""
    own = Noting()
    made = [own.clock.call_at(1000 + at, own.note(str(n))) for n, (at, _) in enumerate(timers)]
    left = {number: at for number, (at, _) in enumerate(timers)}
    for look in sorted(looks):
        for number, (_, cancelled) in enumerate(timers):
            if cancelled <= look and number % 2:
                made[number].cancel()
                left.pop(number, None)
        due = sorted((at, number) for number, at in left.items() if at <= look)
        assert [str(number) for _, number in due] == own.go_to(1000 + look)
        for _, number in due:
            del left[number]
        assert len(left) == len(own.clock)
