# SPDX-License-Identifier: MIT
"""The node of the tests does what they rely on."""

from __future__ import annotations

import signal
from contextlib import closing

import pika
import pika.exceptions
import psutil
import pytest
from pika.adapters.utils.connection_workflow import AMQPConnectorStackTimeout

from tests.programs import Program
from tests.rabbitmq_node import RabbitNode
from tests.waiting import wait_until

pytestmark = pytest.mark.rabbitmq


def connect(url: str, timeout: float = 10.0) -> pika.BlockingConnection:
    parameters = pika.URLParameters(url)
    parameters.stack_timeout = timeout
    return pika.BlockingConnection(parameters)


def publish(url: str, queue: str, body: bytes) -> None:
    """Declare a durable queue, and publish a message to it so that it survives a restart."""
    with closing(connect(url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare(queue, durable=True)
        persistent = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent.value)
        channel.basic_publish("", queue, body, persistent, mandatory=True)


def get(url: str, queue: str) -> bytes | None:
    with closing(connect(url)) as connection:
        return connection.channel().basic_get(queue, auto_ack=True)[2]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_message_can_be_sent_and_fetched(broker_url: str) -> None:
    """The URL of a test leads to a broker that works."""
    publish(broker_url, "letters", b"hello")
    assert b"hello" == get(broker_url, "letters")


def test_a_virtual_host_is_separate(rabbitmq_node: RabbitNode, broker_url: str) -> None:
    """A queue of one virtual host is not in another."""
    other_url = rabbitmq_node.add_vhost("other")
    publish(broker_url, "letters", b"hello")
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="no queue 'letters'"):
        get(other_url, "letters")


def test_a_deleted_virtual_host_refuses_connections(rabbitmq_node: RabbitNode) -> None:
    """Deleting a virtual host takes effect at once."""
    url = rabbitmq_node.add_vhost("short-lived")
    rabbitmq_node.delete_vhost("short-lived")
    with pytest.raises(pika.exceptions.ProbableAccessDeniedError, match="not found"):
        connect(url)


def test_a_killed_node_starts_again_with_its_durable_queues(
    rabbitmq_node: RabbitNode, broker_url: str
) -> None:
    """What the broker confirmed outlives the death of the node."""
    publish(broker_url, "letters", b"hello")
    rabbitmq_node.kill()
    with pytest.raises(pika.exceptions.AMQPConnectionError):
        connect(broker_url)
    rabbitmq_node.start()
    assert b"hello" == get(broker_url, "letters")


def test_a_suspended_node_answers_only_after_it_is_resumed(
    rabbitmq_node: RabbitNode, broker_url: str
) -> None:
    """A frozen node accepts connections and is silent."""
    rabbitmq_node.suspend()
    try:
        with pytest.raises(AMQPConnectorStackTimeout):
            connect(broker_url, timeout=0.2)
    finally:
        rabbitmq_node.resume()
    connect(broker_url).close()


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
        connect(url).close()
        node = psutil.Process(program.pid).children()
        program.send_signal(number)
        assert (0 if number == signal.SIGTERM else -number) == program.wait()
        wait_until(lambda: not any(map(is_alive, node)), message="the end of the node")
