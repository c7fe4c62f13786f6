# SPDX-License-Identifier: MIT
"""A hundred components that lose their broker at the same moment, and come back."""

from __future__ import annotations

import collections
import contextlib
import math
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from postage.generic_application import GenericApplicationExchange
from postage.messaging import GenericProducer
from tests.chaos.load import PROGRAMS
from tests.nodes import Node
from tests.programs import Program
from tests.transport.proxy import Proxy
from tests.waiting import wait_until

#: Members, how many of them a process has, and what the process ids begin at that they claim. A
#: process takes 45 MiB and 0.3 s to start, whether it has one connection or ten.
COUNT = 100
OF_A_PROCESS = 10
FIRST_PID = 5_000_000  # Linux goes up to 4,194,304

#: Seconds: many components start on a busy machine.
DEADLINE_SECONDS = 120.0


class Caller(GenericProducer):
    """Calls one member."""

    eks = [(GenericApplicationExchange, "member")]
    rpc_timeout = 30
    max_retry = 0


def ping_all() -> None:
    """Call each member through the key of its own, and check that it is the one that answers."""
    host = socket.gethostname()
    pids = [str(FIRST_PID + number) for number in range(COUNT)]
    with Caller() as caller:
        answers = [caller.rpc_ping(_key=f"{pid}@{host}").body["content"] for pid in pids]
    assert pids == [answer["value"]["pid"] for answer in answers]


@contextlib.contextmanager
def members(url: str) -> Iterator[None]:
    """Run all members, and have them leave in the end."""
    with contextlib.ExitStack() as stack:
        programs = [
            stack.enter_context(
                Program(
                    [str(PROGRAMS / "chaos_members.py"), str(FIRST_PID + first), str(OF_A_PROCESS)],
                    env={"POSTAGE_URL": url},
                )
            )
            for first in range(0, COUNT, OF_A_PROCESS)
        ]
        wait_until(
            lambda: sum(program.lines.count("ready") for program in programs) == COUNT,
            DEADLINE_SECONDS,
            "all members consume",
        )
        yield
        for program in programs:
            program.terminate()
        assert [0] * len(programs) == [program.wait(DEADLINE_SECONDS) for program in programs]


def consumers(node: Node, vhost: str) -> collections.Counter[str]:
    """Count the consumers of the queues."""
    return collections.Counter(each.queue for each in node.consumers(vhost))


def expected_attempts(seconds: float) -> float:
    """Return how many attempts a connection makes on average before an outage is over, about.

    A pause of a random length up to 0.5, 1, 2 ... s is half as long on average: so it is one more
    each time that the outage has lasted twice as long.
    """
    return 1 + math.log2(1 + seconds / 0.25)


def test_a_hundred_components_come_back_after_their_broker_was_killed(
    node: Node, broker_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them consume all of their queues again, and do not storm the broker meanwhile."""
    vhost = urlsplit(broker_url).path[1:]
    with Proxy(broker_url) as proxy, members(proxy.url):
        # Given
        ping_all()
        expected = consumers(node, vhost)
        assert [COUNT, COUNT, *[1] * COUNT] == sorted(expected.values(), reverse=True)
        connections = len(node.connections(vhost))

        # When
        before = proxy.accepted
        killed = time.monotonic()
        node.kill()
        node.start()
        node.ensure_running()
        started = time.monotonic()

        # Then
        wait_until(lambda: consumers(node, vhost) == expected, DEADLINE_SECONDS, "all consumers")
        back = time.monotonic()
        ping_all()
        attempts = (proxy.accepted - before) / connections
        outage = started - killed
        with capsys.disabled():
            print(
                f"\n{COUNT} components with {connections} connections: all back "
                f"{back - started:.1f} s after an outage of {outage:.1f} s, "
                f"{attempts:.1f} attempts to connect each"
            )
        # As many again would be a storm: pauses that stay at half a second make 8 in 4 seconds.
        assert attempts < 1.5 * expected_attempts(outage)
