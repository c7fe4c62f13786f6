# SPDX-License-Identifier: MIT
"""The RabbitMQ node of the tests is configured as they want it, and leaves nothing behind."""

from __future__ import annotations

import signal
from contextlib import closing
from typing import Any

import pika
import psutil
import pytest

from tests.programs import Program, is_alive
from tests.rabbitmq_node import ConsumerRow, RabbitNode
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


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_forgotten_consumer_hears_nothing(
    kind: str, rabbitmq_node: RabbitNode, broker_url: str
) -> None:
    """Its queue has no consumers any more and keeps its messages, and its channel stays open."""
    vhost = broker_url.rpartition("/")[2]
    heard: list[Any] = []
    with closing(pika.BlockingConnection(pika.URLParameters(broker_url))) as connection:
        # Given
        channel = connection.channel()
        channel.confirm_delivery()
        for queue in ("letters", "others"):
            channel.queue_declare(queue, durable=True, arguments={"x-queue-type": kind})
            channel.basic_consume(queue, lambda *delivery: heard.append(delivery[-1]))
        channel.add_on_cancel_callback(heard.append)

        # When
        rabbitmq_node.forget_consumers("letters", vhost)

        # Then
        assert [ConsumerRow("others", 0)] == rabbitmq_node.consumers(vhost)
        for queue in ("letters", "others"):
            channel.basic_publish("", queue, queue.encode())
        connection.process_data_events(30)  # until there was something
        assert [b"others"] == heard
        assert 1 == channel.queue_declare("letters", passive=True).method.message_count
        assert channel.is_open
