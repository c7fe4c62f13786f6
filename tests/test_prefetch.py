# SPDX-License-Identifier: MIT
"""How many messages are delivered ahead is decided by what they take."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postage.messaging import Handler, MessageHandler, MessageProcessor, Queue
from postage.prefetch import AHEAD, DEFAULT, MOST, MOST_BYTES, RECOVERY, Prefetch, is_plain
from tests.parked import bodies, opened, ready
from tests.programs import Program
from tests.programs_for_tests.components import Running, Sender, eqk_of
from tests.waiting import wait_until

#: Seconds after which a program counts as hanging.
DEADLINE_SECONDS = 120.0

costs = st.floats(0.0, 100.0)


def settle(prefetch: Prefetch, cost: float, now: float, size: int = 100) -> None:
    """Settle one full prefetch of messages, and change the prefetch if it wants that."""
    count = prefetch.count
    prefetch.note(count, count * cost, count * size, True)
    wanted = prefetch.wanted(now)
    if wanted != count:
        prefetch.change(wanted, now)


def adapted_to(cost: float, size: int = 100) -> Prefetch:
    """Return a prefetch after many messages that all took the same."""
    prefetch = Prefetch(None, slow=True)
    for now in range(100):
        settle(prefetch, cost, now, size)
    return prefetch


# ---------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("cost", "counts"),
    [(0.0, [1, 10, 100, MOST]), (0.001, [1, 10, 100]), (0.01, [1, 10]), (1.0, [1])],
)
def test_a_prefetch_grows_by_few_steps_until_a_tenth_of_a_second_waits(
    cost: float, counts: list[int]
) -> None:
    """Each step costs a cancel and a consume."""
    prefetch = Prefetch(None, slow=True)
    seen = [prefetch.count]
    for now in range(100):
        settle(prefetch, cost, now)
        if prefetch.count != seen[-1]:
            seen.append(prefetch.count)
    assert counts == seen


@given(costs, costs)
def test_what_waits_is_worth_twice_of_what_it_should_at_most(before: float, cost: float) -> None:
    """Whatever messages took before; and at least a quarter, where bounds allow."""
    prefetch = adapted_to(before)
    for now in range(100, 5100):
        settle(prefetch, cost, now)
    assert 1 <= prefetch.count <= MOST
    assert (prefetch.count - 1) * cost <= 2.01 * AHEAD
    if cost:
        assert prefetch.count * 2 > min(MOST, 0.99 * AHEAD / cost)


@given(st.lists(costs, min_size=1), st.integers(1, 10_000_000))
def test_a_prefetch_is_never_out_of_bounds(values: list[float], size: int) -> None:
    """Whatever is measured."""
    prefetch = Prefetch(None, slow=True)
    for now, cost in enumerate(values):
        settle(prefetch, cost, now, size)
        assert 1 <= prefetch.count <= MOST


@given(st.lists(st.sampled_from([0.04, 0.06]), min_size=1))
def test_a_prefetch_does_not_swing_with_what_differs_by_less_than_two(values: list[float]) -> None:
    """It grows once, or not at all."""
    prefetch = Prefetch(None, slow=True)
    changes = 0
    for now, cost in enumerate(values):
        before = prefetch.count
        settle(prefetch, cost, now)
        changes += prefetch.count != before
    assert changes <= 1


def test_large_bodies_keep_a_prefetch_small() -> None:
    """By their average size."""
    ideal = MOST_BYTES // (256 * 1024)
    assert ideal / 2 < adapted_to(0.0, 256 * 1024).count <= ideal
    assert 1 == adapted_to(0.0, 2 * MOST_BYTES).count


def test_a_prefetch_falls_with_the_size_of_bodies() -> None:
    """Also when they become larger by and by."""
    prefetch = adapted_to(0.0)
    for now in range(100, 110):
        settle(prefetch, 0.0, now, MOST_BYTES // 5)
    assert 5 == prefetch.count


def test_slow_messages_among_many_fast_ones_count_with_their_share() -> None:
    """One of a hundred takes a second, so all take 11 ms on an average, about."""
    prefetch = adapted_to(0.001)
    for now in range(100, 200):
        prefetch.note(99, 0.099, 0, True)
        prefetch.note(1, 1.0, 0, True)
        prefetch.change(prefetch.wanted(now), now)
    assert 5 <= prefetch.count <= 20


def test_after_a_fall_a_prefetch_rests() -> None:
    """Handlers that are slow and fast in turns would have it changed all the time."""
    prefetch = adapted_to(0.0)
    prefetch.change(1, 200.0)
    prefetch.note(1000, 0.0, 0, True)
    assert 1 == prefetch.wanted(200.0 + 0.99 * RECOVERY)
    assert 10 == prefetch.wanted(200.0 + RECOVERY)


def test_a_prefetch_does_not_grow_before_a_full_one_was_settled() -> None:
    """What was measured may have been under the earlier one."""
    prefetch = Prefetch(None, slow=True)
    settle(prefetch, 0.0, 0.0)
    prefetch.note(9, 0.0, 0, True)
    assert 10 == prefetch.count == prefetch.wanted(1.0)
    prefetch.note(1, 0.0, 0, True)
    assert 100 == prefetch.wanted(1.0)


def test_a_prefetch_does_not_grow_on_what_was_delivered_before() -> None:
    """A process that ended with one of these has had all of them in hand."""
    prefetch = Prefetch(None, slow=True)
    prefetch.note(1, 0.0, 0, False)
    assert 1 == prefetch.wanted(0.0)
    prefetch.note(1, 0.0, 0, True)
    assert 10 == prefetch.wanted(0.0)


@pytest.mark.parametrize("number", [1, 10, 200])
def test_a_number_fixes_a_prefetch(number: int) -> None:
    """Whatever is measured; with a slow start it waits for the first settlement."""
    slow, fast = Prefetch(number, slow=True), Prefetch(number, slow=False)
    assert (1, 1, number, number) == (slow.count, slow.wanted(0), fast.count, fast.wanted(0))
    for prefetch in (slow, fast):
        prefetch.note(1, 100.0, 10_000_000, False)
        assert number == prefetch.wanted(0)


def test_handlers_side_by_side_fix_a_prefetch_that_adapts() -> None:
    """A large one falls, a small one grows when it is trusted, and a number stays."""
    large, small, fixed = adapted_to(0.0), Prefetch(None, slow=True), Prefetch(3, slow=False)
    for prefetch in (large, small, fixed):
        prefetch.share()
    assert [DEFAULT, 1, 3] == [each.wanted(200) for each in (large, small, fixed)]
    small.trust()
    assert DEFAULT == small.wanted(200)
    assert [True] * 3 == [each.is_trusted for each in (large, small, fixed)]


def test_a_prefetch_begins_anew_with_one_and_keeps_what_was_measured() -> None:
    """On a new connection: perhaps a message made the broker drop the old one."""
    prefetch = adapted_to(0.001)
    cost = prefetch.cost
    prefetch.begin()
    assert (1, cost) == (prefetch.count, prefetch.cost)
    assert ("<Prefetch 1 [adapts]>", "<Prefetch 7 [fixed at 7]>") == (
        repr(prefetch),
        repr(Prefetch(7, slow=False)),
    )
    assert Prefetch(None, slow=True).cost is None


# ---------------------------------------------------------------------------- handlers


def plain() -> None:
    """Do nothing."""


def generating() -> Generator[Any, Any, None]:
    """Let others run."""
    yield


async def waiting() -> None:
    """Let others run."""


class Plain(Handler):
    """Does nothing."""

    def call(self) -> None:
        """Do nothing."""


class Generating(Handler):
    """Lets others run."""

    def call(self) -> Generator[Any, Any, None]:
        """Let others run."""
        yield


def test_a_plain_handler_is_told_from_one_that_lets_others_run() -> None:
    """Functions and classes; what only returns a generator is seen when it does."""
    expected = [True, False, False, True, False]
    assert expected == [is_plain(e) for e in (plain, generating, waiting, Plain, Generating)]


# --------------------------------------------------------------------------- components


class Logging(MessageProcessor):
    """Consumes "q"."""

    def __init__(self) -> None:
        self.count = 0
        super().__init__({"name": "tested"}, eqk_of("q"))

    @MessageHandler("command", "last")
    def msg_last(self, content: Any) -> None:
        """Count a message."""
        self.count += 1


class Threaded(Logging):
    """Has a handler that lets others run."""

    @MessageHandler("command", "other", threaded=True)
    def msg_other(self, content: Any) -> None:
        """Do nothing."""


class Several(Logging):
    """Says a number."""

    prefetch = 3


@pytest.mark.parametrize(
    ("processor_class", "is_expected"),
    [
        (Logging, lambda prefetch: prefetch > DEFAULT),
        (Threaded, lambda prefetch: prefetch == DEFAULT),
        (Several, lambda prefetch: prefetch == 3),
    ],
)
def test_the_prefetch_of_a_component_adapts_if_its_handlers_take_turns_and_nobody_says_a_number(
    broker_url: str, processor_class: type[Logging], is_expected: Any
) -> None:
    """Health shows what it is."""
    own = processor_class()
    with Sender() as sender, sender.batch():
        for _ in range(3000):
            sender.message_last(_queue="q")
    with Running(own):
        wait_until(lambda: own.count == 3000)
        assert is_expected(own.health().prefetch)


def test_only_the_message_that_ends_the_process_is_parked(broker_url: str) -> None:
    """The broker counts deliveries of all that is in hand, but then they come one by one."""
    numbers = range(300)
    box = Queue("box", delivery_limit=3).spec()
    handled: set[int] = set()

    def ends_in_order() -> bool:
        with Program(["-m", "tests.programs_for_tests.crashing", box.name]) as program:
            code = program.wait(DEADLINE_SECONDS)
        handled.update(map(int, program.stdout))
        return code == 0

    with opened(broker_url) as channel:
        channel.queue_declare(box.name, durable=True, arguments=dict(box.arguments))
        with Sender() as sender, sender.batch() as batch:
            for number in numbers:
                if number == 100:
                    batch.message_crash(_queue=box.name)
                batch.message_work(number, _queue=box.name)
            batch.message_quit(_queue=box.name)
        wait_until(ends_in_order, DEADLINE_SECONDS)
        wait_until(lambda: ready(channel, "box.error"))
        assert ["crash"] == [json.loads(body)["name"] for body in bodies(channel, "box.error")]
    assert set(numbers) == handled
