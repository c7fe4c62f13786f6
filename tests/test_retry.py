# SPDX-License-Identifier: MIT
"""How often and when a message is tried again, and when a component slows down."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postage.breaker import CircuitBreaker
from postage.errors import ConfigurationError, PermanentError, Retry
from postage.headers import (
    ATTEMPT,
    FIRST_FAILURE,
    HANDLER,
    ORIGIN_EXCHANGE,
    ORIGIN_KEY,
    attempt_of,
    origin_of,
)
from postage.retry import RetryPolicy, retried

MIDDLE = 0.5  # of the jitter: none


def test_the_default_is_six_attempts_in_half_a_minute() -> None:
    """1, 2, 4, 8 and 16 seconds, a fifth more or less."""
    policy = RetryPolicy()
    pauses = [policy.decide(ValueError(), attempt, MIDDLE) for attempt in range(1, 7)]
    assert [1, 2, 4, 8, 16, None] == pauses
    assert (0.8, 1.2) == (policy.pause(1, 0), policy.pause(1, 1))


@given(
    attempt=st.integers(1, 10**6),
    chance=st.floats(0, 1),
    delay=st.floats(0, 1e9),
    backoff=st.floats(1, 1e9),
    longest=st.floats(0, 1e9),
    jitter=st.floats(0, 1),
)
def test_a_pause_is_never_negative_nor_longer_than_the_longest(
    attempt: int, chance: float, delay: float, backoff: float, longest: float, jitter: float
) -> None:
    """But for the jitter, and whatever overflows."""
    policy = RetryPolicy(None, delay, backoff, longest, jitter)
    assert 0 <= policy.pause(attempt, chance) <= longest * (1 + jitter)


def test_pauses_can_be_constant_and_without_end() -> None:
    """As a poll of something that will be there some day."""
    policy = RetryPolicy(attempts=None, delay=5, backoff=1, jitter=0)
    assert {5} == {policy.decide(ValueError(), attempt, 0.9) for attempt in (1, 2, 1000, 10**9)}


def test_a_single_attempt_is_no_retry() -> None:
    """Its message is parked at once."""
    assert RetryPolicy(attempts=1).decide(ValueError(), 1, MIDDLE) is None


def test_what_no_attempt_would_mend_is_not_tried_again() -> None:
    """`PermanentError`, what the policy names, and their subclasses."""
    policy = RetryPolicy(permanent=(LookupError,))
    assert policy.decide(PermanentError(), 1, MIDDLE) is None
    assert policy.decide(KeyError(), 1, MIDDLE) is None
    assert 1 == policy.decide(ValueError(), 1, MIDDLE)


def test_a_handler_may_say_when_to_try_again() -> None:
    """Exactly then; as often as the policy allows."""
    policy = RetryPolicy(attempts=2)
    assert 30 == policy.decide(Retry(30), 1, 0.9)
    assert 90 == policy.decide(Retry(timedelta(minutes=1.5)), 1, 0.9)
    assert 1 == policy.decide(Retry(), 1, MIDDLE)
    assert policy.decide(Retry(30), 2, MIDDLE) is None


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), True, "1", timedelta(-1)])
def test_a_retry_at_a_time_that_makes_no_sense_is_refused(delay: Any) -> None:
    """Where it is raised."""
    with pytest.raises(ConfigurationError, match="the delay of a Retry is a number of seconds"):
        Retry(delay)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attempts": 0}, "attempts of a RetryPolicy must be 1 or more or None, not 0"),
        ({"attempts": 2.5}, "attempts"),
        ({"delay": -1}, "delay of a RetryPolicy must be 0 or more, not -1"),
        ({"delay": float("nan")}, "delay"),
        ({"delay": "1"}, "delay"),
        ({"backoff": 0.5}, "backoff of a RetryPolicy must be 1 or more, not 0.5"),
        ({"max_delay": float("inf")}, "max_delay"),
        ({"jitter": 1.5}, "jitter of a RetryPolicy must be 0 or more and at most 1, not 1.5"),
        ({"permanent": [ValueError]}, "permanent of a RetryPolicy is a tuple of exceptions"),
        ({"permanent": ("ValueError",)}, "permanent of a RetryPolicy is a tuple of exceptions"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(arguments: dict[str, Any], words: str) -> None:
    """When it is made, and not when the first handler fails."""
    with pytest.raises(ConfigurationError, match=words):
        RetryPolicy(**arguments)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (None, 1),
        ({}, 1),
        ({ATTEMPT: 3}, 3),
        ({ATTEMPT: "x"}, 1),
        ({ATTEMPT: -7}, 1),
        ({ATTEMPT: True}, 1),
    ],
)
def test_the_attempt_is_in_a_header(headers: dict[str, Any] | None, expected: int) -> None:
    """What makes no sense there counts as the first, so it ends at some time."""
    assert expected == attempt_of(headers)


def test_the_properties_of_the_next_attempt_count_on() -> None:
    """The time of the first failure stays, as what is the sender's. Nothing changes in place."""
    headers = {"own": 1, "x-death": [{"queue": "q"}]}
    original = pika.BasicProperties(headers=headers, message_id="7", expiration="1000")
    first = retried(original, 1, None, ("news", "key"), "noon")
    origin = {ORIGIN_EXCHANGE: "news", ORIGIN_KEY: "key"}
    assert {"own": 1, ATTEMPT: 2, FIRST_FAILURE: "noon", **origin} == first.headers
    assert ("news", "key") == origin_of(first.headers, "postage-delay-00", "q")
    assert ("now", "here") == origin_of(headers, "now", "here")
    assert ("7", None) == (first.message_id, first.expiration)
    second = retried(first, 2, "msg_echo", ("news", "key"), "one")
    expected = {"own": 1, ATTEMPT: 3, FIRST_FAILURE: "noon", HANDLER: "msg_echo", **origin}
    assert expected == second.headers
    assert ({"own": 1, "x-death": [{"queue": "q"}]}, "1000") == (headers, original.expiration)


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_breaker_opens_after_failures_in_a_row_and_closes_with_a_success() -> None:
    """While it is open the pauses grow."""
    clock = Clock()
    breaker = CircuitBreaker(3, RetryPolicy(), clock, lambda: MIDDLE)
    assert [False, False] == [breaker.failed(), breaker.failed()]
    assert not breaker.succeeded()
    assert [False, False, True] == [breaker.failed() for _ in range(3)]
    assert (True, 1) == (breaker.is_open, breaker.pause())
    clock.now += 1
    assert (True, 0) == (breaker.is_open, breaker.pause())
    assert not breaker.failed()
    assert 2 == breaker.pause()
    clock.now += 0.5
    assert 1.5 == breaker.pause()
    assert breaker.succeeded()
    assert (False, 0, 0) == (breaker.is_open, breaker.pause(), breaker.failures)


def test_a_breaker_without_a_threshold_never_opens() -> None:
    """For those who do not want one."""
    breaker = CircuitBreaker(None, RetryPolicy(), Clock(), lambda: MIDDLE)
    assert not any(breaker.failed() for _ in range(100))
    assert (False, 0) == (breaker.is_open, breaker.pause())
