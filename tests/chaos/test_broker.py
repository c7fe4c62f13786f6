# SPDX-License-Identifier: MIT
"""A broker that closes connections, dies, hangs, or has no memory left."""

from __future__ import annotations

import time

from tests.chaos.load import ALARM, LOSS, Loads, Scale
from tests.nodes import Node

#: Seconds of a heartbeat that is to be missed. Pika looks each heartbeat plus five seconds whether
#: anything came since its last look, so three of them may pass unnoticed.
HEARTBEAT = 1


def test_connections_that_the_broker_closes(loads: Loads, node: Node, scale: Scale) -> None:
    """Every two seconds all connections end, and nothing that was confirmed is lost."""
    with loads() as load:
        load.start()
        for _ in scale.rounds(2.0):
            load.wait_for_progress()
            with load.noticing(LOSS):
                node.close_connections("chaos")
        load.wait_for_progress()

        load.finish()


def test_a_broker_that_is_killed(loads: Loads, node: Node, scale: Scale) -> None:
    """A broker loses its power and starts again, and nothing that was confirmed is lost."""
    with loads() as load:
        load.start()
        for _ in scale.rounds(scale.seconds / 3):
            load.wait_for_progress()
            with load.noticing(LOSS):
                node.kill()
                node.start()
            node.ensure_running()
        load.wait_for_progress()

        load.finish()


def test_a_broker_that_hangs(loads: Loads, node: Node, scale: Scale) -> None:
    """A broker is frozen for three heartbeats, then until all programs have given it up, ..."""
    with loads(heartbeat=HEARTBEAT) as load:
        load.start()
        for number in scale.rounds():
            load.wait_for_progress()
            if number % 2 == 0:
                node.suspend()
                time.sleep(3 * HEARTBEAT)  # the fault itself: nothing is waited for
            else:
                with load.noticing(LOSS):
                    node.suspend()
            node.resume()
        load.wait_for_progress()

        load.finish()


def test_an_alarm_that_ends_in_time(loads: Loads, node: Node, scale: Scale) -> None:
    """Publishers wait for the end of an alarm and lose nothing; consumers go on meanwhile."""
    with loads() as load:
        load.start()
        for _ in scale.rounds(2.0):
            load.wait_for_progress()
            with (
                load.noticing(ALARM, load.producers) as all_notice,
                node.memory_alarm(),
            ):
                all_notice()
                load.wait_for(load.is_drained, "consumers go on during an alarm")
        load.wait_for_progress()

        judgement = load.finish()

    assert (0, 0) == (judgement.failed, judgement.unknown)


def test_an_alarm_that_lasts(loads: Loads, node: Node, scale: Scale) -> None:
    """What publishers gave up during an alarm is never delivered."""
    with loads() as load:
        load.start("--timeout", "1")
        for _ in scale.rounds(2.0):
            load.wait_for_progress()
            with node.memory_alarm():
                load.wait_for_failures(3)
                load.wait_for(load.is_drained, "consumers go on during an alarm")
        load.wait_for_progress()

        judgement = load.finish()

    assert {"BrokerBlockedError"} == set(judgement.errors)
