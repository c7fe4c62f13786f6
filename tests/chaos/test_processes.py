# SPDX-License-Identifier: MIT
"""Processes that die in the middle of something, and others that take over."""

from __future__ import annotations

import collections
import os
import signal

from tests.chaos.load import RECOVERY_SECONDS, Loads, Scale
from tests.chaos.records import (
    BEGUN,
    DELIVERED,
    FATES,
    HANDLED,
    Records,
    children_of,
    judge,
)
from tests.programs import Program
from tests.waiting import wait_until

#: What a consumer is told whose handlers shall be found in the middle of something.
SLOW = ("--seconds", "0.02")


def kill_amid(program: Program, records: Records, count: int = 1) -> set[str]:
    """Kill a program in the middle of some messages, and return these.

    It is frozen for each look, lest the moment pass meanwhile.
    """

    def is_killed() -> bool:
        program.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if len(open_ends(records)) < count:
            program.send_signal(signal.SIGCONT)
            return False
        program.kill()
        return True

    wait_until(is_killed, RECOVERY_SECONDS, "the moment to kill a program")
    assert -signal.SIGKILL == program.wait()
    return open_ends(records)


def open_ends(records: Records) -> set[str]:
    """Return the messages that were begun and have not come to an end."""
    ends = (HANDLED, *FATES)
    ended = {message for word, message, *_ in records.lines() if word in ends}
    return {message for word, message, *_ in records.lines() if word == BEGUN} - ended


def test_consumers_that_are_killed(loads: Loads, scale: Scale) -> None:
    """What a process was handling when it was killed is handled by another one."""
    with loads() as load:
        consumer = load.start_consumer(*SLOW)
        load.start_producer("--mode", "single")
        load.start_producer("--mode", "batch", "--rate", "50")
        interrupted: set[str] = set()
        for _ in scale.rounds(2.0):
            load.wait_for_progress()
            records = Records(load.folder, f"*-{consumer.pid}.received")
            interrupted |= kill_amid(consumer, records)
            consumer = load.start_consumer(*SLOW)
        load.wait_for_progress()

        load.finish()

    handled = {message for word, message, *_ in load.received() if word == HANDLED}
    assert interrupted
    assert interrupted <= handled


def test_consumers_that_are_told_to_leave(loads: Loads, scale: Scale) -> None:
    """A process that gets SIGTERM under load ends its handlers: nothing is handled twice."""
    with loads() as load:
        consumer = load.start_consumer(*SLOW)
        load.start_producer("--mode", "single")
        load.start_producer("--mode", "batch", "--rate", "50")
        for _ in scale.rounds(2.0):
            load.wait_for_progress()
            former, consumer = consumer, load.start_consumer(*SLOW)
            former.terminate()
            assert (0, "left") == (former.wait(RECOVERY_SECONDS), former.lines[-1])
        load.wait_for_progress()

        judgement = load.finish()

    assert 0 == judgement.duplicates


def test_producers_that_are_killed(loads: Loads, scale: Scale) -> None:
    """What a process knew to be confirmed when it was killed is there."""
    with loads() as load:
        load.start_consumer()
        for _ in scale.rounds(2.0):
            label = f"p{len(load.producers)}"
            producer = load.start_producer("--mode", "batch")
            load.wait_for_progress()
            kill_amid(producer, Records(load.folder, f"{label}.sent"), count=2)
        load.start_producer("--mode", "batch")
        load.wait_for_progress()

        judgement = load.finish()

    assert 0 < judgement.unreported


def test_handlers_that_die_between_their_outbox_and_their_ack(loads: Loads, scale: Scale) -> None:
    """Children of a message whose handler ran again come again, with the ids that they had."""
    with loads() as load:
        load.start_consumer(component="children")
        options = ("--target", "children", "--seconds", "0")
        dying = ("--die-at", "40")
        splitter = load.start_consumer(*options, *dying)
        load.start_producer("--mode", "batch", "--rate", "100", kinds="split")
        for _ in scale.rounds(2.0):
            assert -signal.SIGKILL == splitter.wait(RECOVERY_SECONDS)
            splitter = load.start_consumer(*options, *dying)
        assert -signal.SIGKILL == splitter.wait(RECOVERY_SECONDS)
        load.start_consumer(*options)
        load.wait_for_progress()
        load.stop_producers()
        sent = [
            [word, child, *more]
            for word, message, *more in load.sent()
            for child in children_of(message)
        ]
        load.wait_for(
            lambda: not judge(sent, load.received("children")).lost, "all children are handled"
        )

        load.finish()

    judgement = judge(sent, load.received("children"))
    assert {} == judgement.faults
    assert 0 < judgement.duplicates
    ids: dict[str, set[str]] = collections.defaultdict(set)
    for word, child, *more in load.received("children"):
        if word == DELIVERED:
            ids[child] |= set(more)
    assert {1} == {len(each) for each in ids.values()}
