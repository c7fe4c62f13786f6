# SPDX-License-Identifier: MIT
"""Whose turn it is among the consumers of a queue."""

from __future__ import annotations

import pytest

from postage.broker.consumers import Consumer, Consumers
from tests.broker.doubles import Channel


def consumers_of(*found: Consumer, **options: bool) -> Consumers:
    """Return the consumers of a queue."""
    consumers = Consumers(**options)
    for each in found:
        consumers.add(each)
    return consumers


def turns(consumers: Consumers, number: int) -> list[str | None]:
    """Return who gets the next deliveries."""
    found = [consumers.next() for _ in range(number)]
    return [each.tag if each is not None else None for each in found]


def test_nobody_gets_anything_without_consumers() -> None:
    """There is no turn without consumers."""
    assert [None] == turns(Consumers(), 1)
    assert 0 == len(Consumers())


def test_consumers_take_turns() -> None:
    """Each gets as much as the others."""
    consumers = consumers_of(*(Consumer(Channel(), tag) for tag in "abc"))
    assert ["a", "b", "c", "a", "b"] == turns(consumers, 5)


def test_a_consumer_that_holds_its_prefetch_is_passed_over() -> None:
    """The others go on, and it comes back once it has settled something."""
    full = Consumer(Channel(), "full", prefetch=2)
    consumers = consumers_of(full, Consumer(Channel(), "free"))
    full.unsettled = 2
    assert ["free", "free"] == turns(consumers, 2)
    full.unsettled = 1
    assert ["free"] == turns(consumers, 1)
    consumers.wake(full)
    assert ["free", "full", "free"] == turns(consumers, 3)
    consumers.wake(full)
    assert 2 == len(consumers)


@pytest.mark.parametrize(("is_quorum", "expected"), [(True, "later"), (False, "full")])
def test_a_quorum_queue_lets_a_consumer_rest_as_soon_as_it_is_full(
    is_quorum: bool, expected: str
) -> None:
    """A classic queue finds that out with the next message."""
    full = Consumer(Channel(), "full", prefetch=1)
    consumers = consumers_of(full, is_quorum=is_quorum)
    assert ["full"] == turns(consumers, 1)
    full.unsettled = 1
    consumers.add(Consumer(Channel(), "later"))
    full.unsettled = 0
    consumers.wake(full)
    assert [expected] == turns(consumers, 1)


def test_a_consumer_that_rests_can_go() -> None:
    """It does not come back."""
    full = Consumer(Channel(can_take=False), "full")
    consumers = consumers_of(full)
    assert [None] == turns(consumers, 1)
    consumers.remove(full)
    consumers.wake(full)
    assert ([], [None]) == (list(consumers), turns(consumers, 1))


def test_the_prefetch_does_not_limit_what_needs_no_ack() -> None:
    """Without acknowledgements there is nothing to count."""
    consumer = Consumer(Channel(), "a", prefetch=1, no_ack=True)
    consumer.unsettled = 5
    assert ["a"] == turns(consumers_of(consumer), 1)


def test_a_channel_that_takes_nothing_holds_back_its_consumers() -> None:
    """A slow reader gets no more."""
    slow = Consumer(Channel(can_take=False), "slow")
    assert [None] == turns(consumers_of(slow), 1)
    assert ["fast"] == turns(consumers_of(slow, Consumer(Channel(), "fast")), 1)


def test_a_higher_priority_goes_first_as_long_as_it_can() -> None:
    """Lower ones get what the higher ones cannot take."""
    high = Consumer(Channel(), "high", prefetch=1, priority=10)
    consumers = consumers_of(Consumer(Channel(), "low", priority=-1), high)
    assert ["high", "high"] == turns(consumers, 2)
    high.unsettled = 1
    assert ["low"] == turns(consumers, 1)
    consumers.remove(high)
    assert ["low"] == turns(consumers, 1)
    assert ["low"] == [each.tag for each in consumers]


def test_only_the_active_one_gets_deliveries_until_it_goes() -> None:
    """A single active consumer is followed by the next in line."""
    first, second = Consumer(Channel(), "first", prefetch=1), Consumer(Channel(), "second")
    consumers = consumers_of(first, second, is_single_active=True)
    assert ["first", "first"] == turns(consumers, 2)
    first.unsettled = 1
    assert [None] == turns(consumers, 1)
    consumers.remove(first)
    assert ["second"] == turns(consumers, 1)
    consumers.remove(second)
    assert [None] == turns(consumers, 1)


def test_a_passive_one_that_goes_changes_nothing() -> None:
    """The active one stays active."""
    first, second = Consumer(Channel(), "first"), Consumer(Channel(), "second")
    consumers = consumers_of(first, second, is_single_active=True)
    consumers.remove(second)
    assert ["first"] == turns(consumers, 1)


@pytest.mark.parametrize("is_exclusive", [True, False])
def test_the_exclusive_one_is_known(is_exclusive: bool) -> None:
    """A queue can tell whether somebody has it for itself."""
    consumer = Consumer(Channel(), "a", exclusive=is_exclusive)
    assert (consumer if is_exclusive else None) is consumers_of(consumer).exclusive


def test_a_consumer_says_how_much_it_holds() -> None:
    """Its state is in its repr."""
    assert "<Consumer a [0 of 5 unsettled]>" == repr(Consumer(Channel(), "a", prefetch=5))
    assert "<Consumer a [0 of any unsettled]>" == repr(Consumer(Channel(), "a"))
