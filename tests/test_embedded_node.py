# SPDX-License-Identifier: MIT
"""The embedded broker of the tests leaves nothing behind, and says what went wrong."""

from __future__ import annotations

import signal
from contextlib import closing

import pika
import psutil
import pytest

from tests.embedded_node import EmbeddedNode
from tests.programs import Program, is_alive
from tests.waiting import wait_until

pytestmark = pytest.mark.embedded

#: Runs a node until it is killed, and prints its URL.
HOLDER = """
import time
from tests.embedded_node import EmbeddedNode
with EmbeddedNode() as node:
    if {is_suspended}:
        node.suspend()
    print(node.url, *node.pids, flush=True)
    time.sleep(600)
"""


def test_a_closed_node_leaves_no_process_and_no_folder() -> None:
    """All is gone after the block."""
    with EmbeddedNode() as node:
        processes = [psutil.Process(pid) for pid in node.pids]
        with closing(pika.BlockingConnection(pika.URLParameters(node.url))):
            pass
    assert [] == [process for process in processes if is_alive(process)]
    assert not node.folder.exists()


@pytest.mark.parametrize("is_suspended", [False, True])
def test_a_node_ends_with_the_process_that_holds_it(is_suspended: bool) -> None:
    """However suddenly that ends, and also if the node is frozen."""
    with Program(["-c", HOLDER.format(is_suspended=is_suspended)]) as program:
        words = program.wait_for_line("amqp://").split()
        processes = [psutil.Process(int(pid)) for pid in words[1:]]
        program.kill()
        assert -signal.SIGKILL == program.wait()
        wait_until(lambda: not any(map(is_alive, processes)), message="the end of the node")


def test_a_command_that_fails_says_why() -> None:
    """And the node goes on."""
    with EmbeddedNode() as node:
        with pytest.raises(RuntimeError, match="there is no virtual host 'nowhere'"):
            node.delete_vhost("nowhere")
        assert [] == node.queues("/")
        assert "" == node.complaints()


def test_a_defect_of_the_broker_is_a_complaint() -> None:
    """It is told once."""
    with EmbeddedNode() as node:
        node._tell("fail", "on purpose")
        wait_until(lambda: "on purpose" in node.log_tail())
        assert "RuntimeError: on purpose" in node.complaints()
        assert "" == node.complaints()
