# SPDX-License-Identifier: MIT
"""The nodes of the tests do what they rely on, whichever broker it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit, urlunsplit

import pika
import pika.exceptions
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorStackTimeout

from tests.nodes import Node
from tests.rabbitmq_node import BindingRow, ConnectionRow, ConsumerRow, QueueRow
from tests.waiting import wait_until


def connect(url: str, timeout: float = 10.0) -> pika.BlockingConnection:
    parameters = pika.URLParameters(url)
    parameters.stack_timeout = timeout
    parameters.client_properties = {"connection_name": "node test"}
    return pika.BlockingConnection(parameters)


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    connection = connect(broker_url)
    yield connection.channel()
    if connection.is_open:
        connection.close()


@pytest.fixture
def vhost(broker_url: str) -> str:
    return urlsplit(broker_url).path[1:]


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


def test_a_message_can_be_sent_and_fetched(broker_url: str) -> None:
    """The URL of a test leads to a broker that works."""
    publish(broker_url, "letters", b"hello")
    assert b"hello" == get(broker_url, "letters")


def test_a_virtual_host_is_separate(node: Node, broker_url: str) -> None:
    """A queue of one virtual host is not in another."""
    other_url = node.add_vhost("other")
    publish(broker_url, "letters", b"hello")
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="no queue 'letters'"):
        get(other_url, "letters")


def test_a_deleted_virtual_host_refuses_connections(node: Node) -> None:
    """Deleting a virtual host takes effect at once."""
    url = node.add_vhost("short-lived")
    node.delete_vhost("short-lived")
    with pytest.raises(pika.exceptions.ProbableAccessDeniedError, match="not found"):
        connect(url)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_node_starts_again_with_its_durable_queues(
    node: Node, broker_url: str, how: str
) -> None:
    """What the broker confirmed outlives the death of the node."""
    publish(broker_url, "letters", b"hello")
    getattr(node, how)()
    with pytest.raises(pika.exceptions.AMQPConnectionError):
        connect(broker_url)
    node.start()
    assert b"hello" == get(broker_url, "letters")


def test_a_suspended_node_answers_only_after_it_is_resumed(node: Node, broker_url: str) -> None:
    """A frozen node accepts connections and is silent."""
    node.suspend()
    try:
        with pytest.raises(AMQPConnectorStackTimeout):
            connect(broker_url, timeout=0.2)
    finally:
        node.resume()
    connect(broker_url).close()


def test_a_node_shows_its_queues(node: Node, channel: BlockingChannel, vhost: str) -> None:
    """With their flags and arguments."""
    quorum = {"x-queue-type": "quorum", "x-delivery-limit": 3}
    channel.queue_declare("letters", durable=True, arguments=quorum)
    channel.queue_declare("passing", auto_delete=True, arguments={"x-expires": 60_000})
    assert [
        QueueRow("letters", "quorum", True, False, quorum),
        QueueRow("passing", "classic", False, True, {"x-expires": 60_000}),
    ] == sorted(node.queues(vhost), key=lambda queue: queue.name)


def test_a_node_shows_its_bindings(node: Node, channel: BlockingChannel, vhost: str) -> None:
    """But not those that every queue has to the default exchange."""
    channel.queue_declare("letters")
    channel.queue_bind("letters", "amq.direct", "post")
    assert [BindingRow("amq.direct", "post", "letters")] == node.bindings(vhost)


def test_a_node_shows_its_consumers(node: Node, channel: BlockingChannel, vhost: str) -> None:
    """With the prefetch that was set when they began."""
    channel.queue_declare("letters")
    channel.basic_qos(prefetch_count=7)
    channel.basic_consume("letters", print)
    wait_until(lambda: [ConsumerRow("letters", 7)] == node.consumers(vhost))


def test_a_node_shows_its_connections(node: Node, channel: BlockingChannel, vhost: str) -> None:
    """With the name that the client gave, and how many channels are open."""
    channel.connection.channel()
    wait_until(lambda: [ConnectionRow("node test", 2)] == node.connections(vhost))


def test_a_node_closes_connections(node: Node, channel: BlockingChannel, vhost: str) -> None:
    """The client is told why."""
    node.close_connections("enough", vhost)
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="enough") as caught:
        channel.connection.process_data_events(30)
    assert 320 == caught.value.reply_code


def test_a_node_lets_users_in(node: Node, broker_url: str, vhost: str) -> None:
    """Until their password is another, or they are deleted."""
    address = urlsplit(broker_url)
    url = urlunsplit(address._replace(netloc=f"postman:secret@127.0.0.1:{node.port}"))
    node.add_user("postman", "secret", vhost)
    try:
        connect(url).close()
        node.change_password("postman", "other")
        with pytest.raises(pika.exceptions.ProbableAuthenticationError):
            connect(url)
        node.change_password("postman", "secret")
        connect(url).close()
    finally:
        node.delete_user("postman")
    with pytest.raises(pika.exceptions.ProbableAuthenticationError):
        connect(url)


def test_an_alarm_blocks_publishers_until_it_ends(node: Node, channel: BlockingChannel) -> None:
    """They are told of both."""
    heard: list[str] = []

    def has_heard(*expected: str) -> bool:
        channel.connection.process_data_events(0.01)
        return [*expected] == heard

    channel.connection.add_on_connection_blocked_callback(lambda *_: heard.append("blocked"))
    channel.connection.add_on_connection_unblocked_callback(lambda *_: heard.append("unblocked"))
    with node.memory_alarm():
        channel.basic_publish("", "nobody", b"")
        wait_until(lambda: has_heard("blocked"))
    wait_until(lambda: has_heard("blocked", "unblocked"))
