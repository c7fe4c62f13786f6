# SPDX-License-Identifier: MIT
"""Messages whose handlers fail, and a broker that is killed while they wait."""

from __future__ import annotations

import collections
import random
import time
from typing import Any

import pytest

from postage.handlers import MessageHandler
from postage.messaging import MessageProcessor
from postage.retry import RetryPolicy
from tests.chaos.load import Scale
from tests.nodes import Node
from tests.programs_for_tests.components import Running, Sender, eqk_of, raw_channel, take
from tests.waiting import wait_until

#: Messages of the long form, and of the short one.
MANY, FEW = 10_000, 300
#: Without jitter, so that it is known when an attempt is due.
POLICY = RetryPolicy(attempts=6, delay=0.3, backoff=2.0, max_delay=2.0, jitter=0.0)
#: Seconds until all have been handled or parked.
DEADLINE = 600.0


class Clerk(MessageProcessor):
    """Fails as often as a message says, and notes when it was asked to handle which attempt."""

    retry = POLICY
    prefetch = 200

    def __init__(self) -> None:
        self.began: collections.defaultdict[int, dict[int, float]] = collections.defaultdict(dict)
        self.again = 0
        self.done: set[int] = set()
        super().__init__({"name": "clerk"}, eqk_of("q"))

    @MessageHandler("command", "work")
    def msg_work(self, content: Any) -> None:
        number, failures = content["parameters"]
        attempt = self.delivery.attempt
        if attempt in self.began[number]:
            self.again += 1  # it came twice, which a kill may cause
        self.began[number].setdefault(attempt, time.time())
        if attempt <= failures:
            raise ValueError(f"attempt {attempt} of message {number}")
        self.done.add(number)


def test_messages_that_fail_under_a_broker_that_is_killed(
    broker_url: str, node: Node, scale: Scale, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is handled or parked, after as many attempts as it should, and none comes early."""
    generator = random.Random(17)
    failures = [generator.randint(0, 7) for _ in range(MANY if scale.is_long else FEW)]
    fine = {number for number, count in enumerate(failures) if count < 6}

    with Running(clerk := Clerk()), Sender() as sender:
        sender.message_work(-1, 5)  # all queues of the cascade are there
        wait_until(lambda: -1 in clerk.done, DEADLINE)
        with sender.batch() as batch:
            for number, count in enumerate(failures):
                batch.message_work(number, count, _timeout=DEADLINE)
        wait_until(lambda: len(clerk.began) > len(failures) / 2, DEADLINE)
        node.kill()
        node.start()
        wait_until(lambda: clerk.done >= fine, DEADLINE)
        hopeless = set(range(len(failures))) - fine
        parked: dict[int, Any] = {}
        doubled = 0
        with raw_channel() as channel:
            while parked.keys() != hopeless:
                [(properties, _body)] = take(channel, "q.error")
                number = int(properties.headers["postage-error"].rsplit(maxsplit=1)[1])
                doubled += number in parked
                parked[number] = properties

    with capsys.disabled():
        print(f"\n{len(failures)} messages: {clerk.again} attempts and {doubled} parkings twice")
    assert {6} == {properties.headers["postage-attempts"] for properties in parked.values()}
    for number, count in enumerate(failures):
        began = clerk.began[number]
        assert set(range(1, min(count, 5) + 2)) == set(began)
        for attempt in range(1, len(began)):
            assert began[attempt + 1] - began[attempt] >= POLICY.pause(attempt, 0.5)
