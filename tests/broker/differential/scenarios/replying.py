# SPDX-License-Identifier: MIT
"""Direct reply-to: the pseudo-queue amq.rabbitmq.reply-to."""

from __future__ import annotations

from tests.broker.differential.driver import Channel, Stage
from tests.broker.differential.registry import scenario

REPLY_TO = "amq.rabbitmq.reply-to"


def _address(channel: Channel, server: Channel) -> str:
    """Return the reply address of the channel, as a server sees it."""
    channel.publish("requests", "request", reply_to=REPLY_TO, correlation_id="1")
    properties = server.take()[0].properties or {}
    return str(properties["reply_to"])


def _consume_requests(stage: Stage) -> Channel:
    server = stage.connect().open()
    server.declare("requests")
    server.consume("requests", "server", "no_ack")
    return server


@scenario
def a_reply_goes_straight_to_the_caller(stage: Stage) -> None:
    """The server publishes to the address that it got; the caller consumes without a queue."""
    server = _consume_requests(stage)
    client = stage.connect().open()
    client.consume(REPLY_TO, "replies", "no_ack")
    address = _address(client, server)
    server.publish(address, "reply", correlation_id="1")
    client.take()
    server.publish(address, "again", headers={"a": 1})
    client.take()


@scenario
def a_request_needs_a_reply_consumer(stage: Stage) -> None:
    """406 on publish, if the channel does not consume replies."""
    _consume_requests(stage)
    client = stage.connect().open()
    client.publish("requests", "request", reply_to=REPLY_TO)
    client.take()


@scenario
def a_reply_consumer_acknowledges_nothing(stage: Stage) -> None:
    """406 without no-ack."""
    stage.open().consume(REPLY_TO, "replies")


@scenario
def a_channel_has_one_reply_consumer(stage: Stage) -> None:
    """406 for a second one; another channel may have its own."""
    channel = stage.open()
    channel.consume(REPLY_TO, "replies", "no_ack")
    stage.open().consume(REPLY_TO, "replies", "no_ack")
    channel.consume(REPLY_TO, "others", "no_ack")


@scenario
def a_reply_consumer_can_be_cancelled(stage: Stage) -> None:
    """The address is then gone, and another consumer may follow."""
    server = _consume_requests(stage)
    client = stage.connect().open()
    client.consume(REPLY_TO, "", "no_ack", "exclusive")
    _address(client, server)
    tag = client.consume("requests", "", "no_ack")["consumer_tag"]
    client.cancel(tag)
    client.consume(REPLY_TO, "replies", "no_ack")


@scenario
def cancelling_a_reply_consumer_ends_the_address(stage: Stage) -> None:
    """What is sent to it then goes nowhere; a new consumer has a new address."""
    server = _consume_requests(stage)
    client = stage.connect().open()
    client.consume(REPLY_TO, "replies", "no_ack")
    address = _address(client, server)
    client.cancel("replies")
    server.publish(address, "late")
    server.sync()
    client.consume(REPLY_TO, "replies", "no_ack")
    other = _address(client, server)
    stage.note(f"a new address: {other != address}")
    server.publish(address, "late", "mandatory")
    server.publish(other, "reply")
    client.take()
    server.take()


@scenario
def a_reply_to_a_caller_that_is_gone_goes_nowhere(stage: Stage) -> None:
    """Mandatory replies are then returned; others are dropped."""
    server = _consume_requests(stage)
    caller = stage.connect()
    client = caller.open()
    client.consume(REPLY_TO, "replies", "no_ack")
    address = _address(client, server)
    client.close()
    server.publish(address, "late")
    server.publish(address, "late", "mandatory")
    server.take()
    server.declare(address, "passive")


@scenario
def a_mandatory_reply_is_delivered_and_returned(stage: Stage) -> None:
    """RabbitMQ routes it to no queue, and says so, although the caller got it."""
    server = _consume_requests(stage)
    client = stage.connect().open()
    client.consume(REPLY_TO, "replies", "no_ack")
    address = _address(client, server)
    server.publish(address, "reply", "mandatory")
    client.take()
    server.take()


@scenario
def a_reply_is_confirmed(stage: Stage) -> None:
    """To a caller that lives and to one that does not."""
    server = _consume_requests(stage)
    client = stage.connect().open()
    client.consume(REPLY_TO, "replies", "no_ack")
    address = _address(client, server)
    replier = stage.clients[0].open(confirm=True)
    replier.publish(address, "reply")
    client.take()
    client.close()
    replier.publish(address, "late")


@scenario
def a_reply_address_can_be_declared_to_see_whether_it_lives(stage: Stage) -> None:
    """declare-ok while the caller lives, 404 after."""
    server = _consume_requests(stage)
    client = stage.connect().open()
    client.consume(REPLY_TO, "replies", "no_ack")
    address = _address(client, server)
    server.declare(address, "passive")
    server.declare(address)
    server.declare(REPLY_TO, "passive")
    server.declare(REPLY_TO)
    client.close()
    stage.clients[0].open().declare(address, "passive")
    stage.clients[0].open().declare(address)


@scenario
def the_pseudo_queue_is_no_queue(stage: Stage) -> None:
    """What else can be done with its name."""
    client = stage.connect()
    client.open().get(REPLY_TO)
    client.open().purge(REPLY_TO)
    client.open().bind(REPLY_TO, "amq.direct", "key")
    client.open().delete(REPLY_TO)
    channel = client.open(confirm=True)
    channel.publish(REPLY_TO, "one", "mandatory")
    channel.publish(REPLY_TO + ".nonsense", "one", "mandatory")
    client.open().declare(REPLY_TO + ".nonsense", "passive")
    client.open().consume(REPLY_TO + ".nonsense", "c", "no_ack")


@scenario
def a_reply_to_of_another_name_is_left_alone(stage: Stage) -> None:
    """Only the exact name is replaced."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.publish("q", "one", reply_to="elsewhere")
    channel.publish("q", "two", reply_to=REPLY_TO + ".x")
    stage.drain("q", 2)


@scenario
def a_call_works_on_one_channel_with_confirms(stage: Stage) -> None:
    """Requests may go through any exchange."""
    server = _consume_requests(stage)
    server.bind("requests", "amq.topic", "call.#")
    client = stage.connect().open(confirm=True)
    client.consume(REPLY_TO, "replies", "no_ack")
    client.publish("call.me", "request", "mandatory", exchange="amq.topic", reply_to=REPLY_TO)
    properties = server.take()[0].properties or {}
    server.publish(str(properties["reply_to"]), "reply")
    client.take()
