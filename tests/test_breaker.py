# SPDX-License-Identifier: MIT
"""A component whose handlers fail in a row goes slowly until one succeeds."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from postage.errors import PermanentError
from postage.handlers import MessageHandler
from postage.messaging import MessageProcessor
from postage.microthreads import sleep
from postage.retry import RetryPolicy
from tests.programs_for_tests.components import Running, Sender, eqk_of
from tests.waiting import wait_until


class Clerk(MessageProcessor):
    """Fails as long as the test wants. Its circuit breaker opens at the third failure."""

    retry = RetryPolicy(attempts=1)
    breaker = 3
    breaker_policy = RetryPolicy(attempts=None, delay=0.05, backoff=1, jitter=0)

    def __init__(self) -> None:
        self.error: type[Exception] | None = ValueError
        self.handled_messages: list[int] = []
        self.at_once = self.most_at_once = 0
        super().__init__({"name": "clerk"}, eqk_of("q"))

    @MessageHandler("command", "work")
    def msg_work(self, content: Any) -> Generator[Any, Any, None]:
        if self._breaker.is_open:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        yield sleep(0.01)
        self.at_once = max(0, self.at_once - 1)
        if self.error is not None:
            raise self.error
        self.handled_messages.append(content["parameters"])


@pytest.fixture
def sender(broker_url: str) -> Iterator[Sender]:
    with Sender() as sender:
        yield sender


def test_it_takes_one_message_at_a_time_until_one_succeeds(
    sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so, in health and in the log."""
    caplog.set_level("WARNING", "postage")
    with Running(clerk := Clerk()):
        assert not clerk.health().circuit_open
        for number in range(30):
            sender.message_work(number)
        wait_until(lambda: clerk.health().circuit_open)
        failed = clerk.health().failed
        wait_until(lambda: clerk.health().failed >= failed + 5)
        assert clerk.health().is_healthy  # it consumes
        clerk.error = None
        wait_until(lambda: clerk.health().handled == 30)
        assert not clerk.health().circuit_open
    assert 1 == clerk.most_at_once
    assert "Clerk: 3 handlers failed in a row: one message at a time, with pauses" in caplog.text
    assert "Clerk: a handler succeeded: back to full speed" in caplog.text


def test_what_no_attempt_would_mend_does_not_open_it(sender: Sender) -> None:
    """It is the message that is wrong, and not what the component works with."""
    with Running(clerk := Clerk()):
        clerk.error = PermanentError
        for number in range(6):
            sender.message_work(number)
        wait_until(lambda: clerk.health().failed == 6)
        assert not clerk.health().circuit_open


def test_a_component_leaves_in_the_middle_of_a_pause(sender: Sender) -> None:
    """What it has not begun goes back."""

    class Patient(Clerk):
        breaker_policy = RetryPolicy(attempts=None, delay=3600, max_delay=3600)

    with Running(clerk := Patient()) as running:
        for number in range(5):
            sender.message_work(number)
        wait_until(lambda: clerk.health().circuit_open)
        sender.message_work(5)
        threading.Timer(0.1, clerk.stop_consuming).start()
        running.join()
    with Running(other := Clerk()):
        other.error = None
        wait_until(lambda: other.handled_messages)
