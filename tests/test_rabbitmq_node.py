# SPDX-License-Identifier: MIT
"""The RabbitMQ node of the tests is configured as they want it, and leaves nothing behind."""

from __future__ import annotations

import signal

import pika
import psutil
import pytest

from tests.programs import Program, is_alive
from tests.rabbitmq_node import RabbitNode
from tests.waiting import wait_until

pytestmark = pytest.mark.rabbitmq


@pytest.mark.usefixtures("rabbitmq_installed")
def test_a_closed_node_leaves_no_process_and_no_folder() -> None:
    """A node reads its lines of configuration, stops in good order, and is gone after the block."""
    with RabbitNode("consumer_timeout = 5000") as node:
        processes = [psutil.Process(pid) for pid in node.pids]
        timeout = node.ctl("eval", "application:get_env(rabbit, consumer_timeout).")
        node.stop()
    assert "{ok,5000}" == timeout.strip()
    assert [] == [process for process in processes if is_alive(process)]
    assert not node.folder.exists()


@pytest.mark.usefixtures("rabbitmq_installed")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_node_ends_with_the_program_that_runs_it(number: signal.Signals) -> None:
    """Not even a program that is killed leaves its node behind."""
    with Program(["tests/rabbitmq_node.py"]) as program:
        url = program.wait_for_line("amqp://", timeout=120.0)
        pika.BlockingConnection(pika.URLParameters(url)).close()
        node = psutil.Process(program.pid).children()
        program.send_signal(number)
        assert (0 if number == signal.SIGTERM else -number) == program.wait()
        wait_until(lambda: not any(map(is_alive, node)), message="the end of the node")
