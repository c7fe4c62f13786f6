# SPDX-License-Identifier: MIT
"""Consumers: who gets which message, and what ends a consumer."""

from __future__ import annotations

from typing import Any

from pika import spec

from tests.broker.differential.codec import Field
from tests.broker.differential.driver import CAPABILITIES, Stage
from tests.broker.differential.registry import each, scenario

KINDS: dict[str, dict[str, Any]] = {"classic": {}, "quorum": {"x_queue_type": "quorum"}}


@scenario
def a_consumer_gets_what_is_there_and_what_comes(stage: Stage) -> None:
    """Deliveries follow consume-ok, in order, with tags that count up."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    channel.publish("q", "one")
    channel.publish("q", "two")
    consumer = client.open()
    consumer.consume("q", "c")
    consumer.take(2)
    channel.publish("q", "three")
    consumer.take()
    stage.count("q", 0, 1)
    consumer.ack(3, "multiple")
    consumer.close()
    stage.count("q", 0, 0)


@scenario
def a_tag_that_is_not_given_is_made_by_the_server(stage: Stage) -> None:
    """An empty consumer tag asks for one."""
    channel = stage.open()
    channel.declare("q")
    tag = channel.consume("q")["consumer_tag"]
    channel.consume("q")
    channel.cancel(tag)


@scenario
def consuming_what_is_missing_closes_the_channel(stage: Stage) -> None:
    """404 for the queue; an unknown tag may be cancelled."""
    client = stage.connect()
    client.open().consume("missing", "c")
    client.open().get("missing")
    client.open().cancel("missing")


@scenario
def a_tag_in_use_ends_the_connection(stage: Stage) -> None:
    """530, unless the tag is used on another channel."""
    client = stage.connect()
    channel = client.open()
    channel.declare("q")
    channel.consume("q", "c")
    client.open().consume("q", "c")
    channel.consume("q", "c")
    client.ended()


@scenario
def a_tag_may_be_used_again_once_cancelled(stage: Stage) -> None:
    """After cancel-ok the tag is free; what was delivered can still be acknowledged."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.publish("q", "one")
    channel.consume("q", "c")
    channel.take()
    channel.cancel("c")
    channel.cancel("c")
    channel.publish("q", "two")
    channel.consume("q", "c")
    channel.take()
    channel.ack(1)
    channel.ack(2)
    channel.close()
    stage.count("q", 0)


@each(**KINDS)
def an_exclusive_consumer_is_alone(stage: Stage, arguments: Any) -> None:
    """403 for a second one, or an exclusive one where there is one; quorum queues allow all."""
    client = stage.connect()
    channel = client.open()
    channel.declare("q", "durable", **arguments)
    channel.consume("q", "one", "exclusive")
    client.open().consume("q", "two")
    client.open().consume("q", "two", "exclusive")
    channel.cancel("one")
    channel.consume("q", "one")
    client.open().consume("q", "two", "exclusive")
    stage.count("q", 0, 4 if arguments else 1)


@scenario
def basic_get_works_beside_an_exclusive_consumer(stage: Stage) -> None:
    """Exclusive consumption is about consumers only."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    channel.qos(1)
    channel.consume("q", "c", "exclusive")
    channel.publish("q", "one")
    channel.take()
    channel.publish("q", "two")
    client.open().get("q")


@scenario
def no_ack_takes_the_message_at_once(stage: Stage) -> None:
    """No prefetch applies, and the tag of such a delivery cannot be acknowledged."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    for number in range(5):
        channel.post("q", str(number))
    consumer = client.open()
    consumer.qos(1)
    consumer.consume("q", "c", "no_ack")
    consumer.take(5)
    stage.count("q", 0, 1)
    consumer.ack(1)
    consumer.take()


@each(**KINDS)
def prefetch_limits_what_a_consumer_holds(stage: Stage, arguments: Any) -> None:
    """Each consumer of the channel has the limit that was set when it began."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    for number in range(8):
        channel.post("q", str(number))
    consumer = client.open()
    consumer.qos(2)
    consumer.consume("q", "c")
    consumer.take(2)
    stage.settle()
    consumer.ack(1)
    consumer.take()
    stage.settle()
    consumer.qos(1)
    consumer.consume("q", "d")
    consumer.take()
    stage.settle()
    consumer.ack(4, "multiple")
    consumer.take_any_order(3)
    stage.count("q", 1, 2)


@scenario
def a_global_prefetch_limits_the_channel(stage: Stage) -> None:
    """With the global flag all consumers of the channel share the limit."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    consumer = client.open()
    consumer.qos(3, "global_qos")
    consumer.consume("q", "c")
    consumer.consume("q", "d")
    for number in range(5):
        channel.post("q", str(number))
    consumer.take(3)
    stage.settle()
    consumer.ack(1)
    consumer.take()
    stage.count("q", 1, 2)


@scenario
def a_prefetch_size_is_not_implemented(stage: Stage) -> None:
    """A limit in bytes is 540."""
    client = stage.connect()
    channel = client.open()
    channel.call(spec.Basic.Qos(prefetch_size=100))


@scenario
def a_new_prefetch_is_for_new_consumers(stage: Stage) -> None:
    """A consumer keeps the limit that it began with."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    for number in range(3):
        channel.post("q", str(number))
    consumer = client.open()
    consumer.qos(1)
    consumer.consume("q", "c")
    consumer.take()
    consumer.qos(0)
    stage.settle()
    consumer.ack(1)
    consumer.take()


@each(**KINDS)
def consumers_take_turns(stage: Stage, arguments: Any) -> None:
    """Messages go round among consumers that have room."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    consumer = client.open()
    for tag in ("a", "b", "c"):
        consumer.consume("q", tag)
    for number in range(7):
        channel.post("q", str(number))
        consumer.take()
    consumer.cancel("b")
    for number in range(7, 10):
        channel.post("q", str(number))
        consumer.take()


@scenario
def a_full_consumer_is_passed_over(stage: Stage) -> None:
    """Who has no room gets nothing until it has."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    consumer = client.open()
    consumer.qos(1)
    consumer.consume("q", "narrow")
    consumer.qos(3)
    consumer.consume("q", "wide")
    for number in range(5):
        channel.post("q", str(number))
    consumer.take(4)
    stage.settle()
    consumer.ack(1)
    consumer.take()


@each(**KINDS)
def consumers_of_higher_priority_come_first(stage: Stage, arguments: Any) -> None:
    """The low one gets something only when the high one is full."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    consumer = client.open()
    consumer.qos(2)
    consumer.consume("q", "low", x_priority=-5)
    consumer.consume("q", "middle")
    consumer.consume("q", "high", x_priority=5)
    for number in range(5):
        channel.post("q", str(number))
    consumer.take(5)


@each(
    text={"x_priority": "5"},
    double={"x_priority": Field("d", 1.5)},
    long={"x_priority": Field("l", 2**40)},
    short={"x_priority": Field("s", -3)},
    void={"x_priority": None},
    unknown={"x_unknown": True},
    cancel_on_ha_failover={"x_cancel_on_ha_failover": True},
    timeout={"x_consumer_timeout": 1000},
)
def arguments_of_consumers_are_checked(stage: Stage, arguments: Any) -> None:
    """A consumer is made, or refused with 406 and the reason."""
    channel = stage.open()
    channel.declare("q")
    channel.consume("q", "c", **arguments)


@each(**KINDS)
def one_of_the_consumers_is_active(stage: Stage, arguments: Any) -> None:
    """With x-single-active-consumer the next takes over when the channel of the active one ends."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q", "durable", x_single_active_consumer=True, **arguments)
    consumers = [client.open() for _ in range(3)]
    for number, consumer in enumerate(consumers):
        consumer.qos(1)
        consumer.consume("q", f"c{number}")
    for number in range(4):
        channel.post("q", str(number))
    consumers[0].take()
    stage.settle()
    consumers[0].ack(1)
    consumers[0].take()
    consumers[0].close()
    consumers[1].take()
    stage.settle()
    consumers[1].ack(1)
    consumers[1].take()
    consumers[1].close()
    consumers[2].take()
    stage.count("q", 1, 1)


@scenario
def a_quorum_queue_activates_the_next_consumer_after_a_cancellation(stage: Stage) -> None:
    """The one before may settle what it has. (A classic queue of 3.10.8 then stands still.)"""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q", "durable", x_single_active_consumer=True, x_queue_type="quorum")
    consumers = [client.open() for _ in range(2)]
    for number, consumer in enumerate(consumers):
        consumer.qos(1)
        consumer.consume("q", f"c{number}")
    for number in range(3):
        channel.post("q", str(number))
    consumers[0].take()
    consumers[0].cancel("c0")
    consumers[0].ack(1)
    consumers[1].take()
    stage.count("q", 1, 1)


@each(**KINDS)
def a_queue_with_a_single_active_consumer_refuses_exclusive_ones(
    stage: Stage, arguments: Any
) -> None:
    """An exclusive consumer is 403 there; so is, on classic queues, nothing else."""
    client = stage.connect()
    client.open().declare("q", "durable", x_single_active_consumer=True, **arguments)
    client.open().consume("q", "c", "exclusive")
    client.open(confirm=True).post("q", "one")
    client.open().get("q")
    client.open().consume("q", "c", x_priority=5)


@each(**KINDS)
def deleting_a_queue_cancels_its_consumers(stage: Stage, arguments: Any) -> None:
    """The broker sends basic.cancel to those who said that they understand it."""
    client = stage.connect()
    deaf = stage.connect(capabilities={})
    channel = client.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    consumer, other = client.open(), deaf.open()
    consumer.consume("q", "c")
    consumer.consume("q", "d")
    other.consume("q", "e")
    client.open().delete("q")
    consumer.take_any_order(2)
    channel.declare("q", "durable", **arguments)
    consumer.consume("q", "c")
    other.sync()
    channel.publish("q", "one")
    consumer.take()


@scenario
def consumers_of_an_exclusive_queue_are_cancelled_with_it(stage: Stage) -> None:
    """It makes no difference that the consumer is the owner."""
    client = stage.connect()
    channel = client.open()
    channel.declare("q", "exclusive")
    channel.consume("q", "c")
    client.open().delete("q")
    channel.take()


@scenario
def a_cancel_capability_must_be_true(stage: Stage) -> None:
    """A client that says false is like one that says nothing."""
    client = stage.connect(capabilities={**CAPABILITIES, "consumer_cancel_notify": False})
    channel = client.open()
    channel.declare("q")
    channel.consume("q", "c")
    client.open().delete("q")
    channel.sync()


@scenario
def no_local_has_no_meaning(stage: Stage) -> None:
    """RabbitMQ delivers a connection's own messages to it all the same."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.consume("q", "c", "no_local")
    channel.publish("q", "one")
    channel.take()


@each(**KINDS)
def basic_get_tells_how_many_are_left(stage: Stage, arguments: Any) -> None:
    """get-ok counts the ready messages behind it."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    channel.get("q")
    for number in range(3):
        channel.post("q", str(number))
    channel.get("q")
    channel.get("q", "no_ack")
    channel.get("q")
    channel.get("q")
    channel.ack(1)
    channel.ack(3)
    channel.close()
    stage.count("q", 0)


@each(**KINDS)
def who_gets_singly_is_no_consumer(stage: Stage, arguments: Any) -> None:
    """But a quorum queue counts who got a message until it is settled."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    channel.publish("q", "one")
    channel.get("q")
    stage.note_counts("q")
    channel.ack(1)
    stage.count("q", 0)


@scenario
def flow_can_be_asked_for_but_not_stopped(stage: Stage) -> None:
    """channel.flow with active is answered; without it is 540."""
    client = stage.connect()
    channel = client.open()
    channel.call(spec.Channel.Flow(active=True))
    channel.call(spec.Channel.Flow(active=False))
    client.ended()


@scenario
def cancelling_stops_deliveries(stage: Stage) -> None:
    """After cancel-ok nothing is delivered, and messages wait for others."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    consumer = client.open()
    consumer.consume("q", "c")
    channel.publish("q", "one")
    consumer.take()
    consumer.cancel("c")
    channel.publish("q", "two")
    stage.settle()
    stage.drain("q", 1)


@each(**KINDS)
def a_cancelled_consumer_may_settle_what_it_has(stage: Stage, arguments: Any) -> None:
    """A quorum queue counts it until it has."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    consumer = client.open()
    consumer.consume("q", "c")
    channel.publish("q", "one")
    consumer.take()
    consumer.cancel("c")
    stage.note_counts("q")
    consumer.ack(1)
    stage.count("q", 0)


@scenario
def tags_of_deliveries_count_on_across_consumers_and_gets(stage: Stage) -> None:
    """One sequence of delivery tags a channel."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    for number in range(4):
        channel.post("q", str(number))
    channel.get("q", "no_ack")
    channel.get("q")
    channel.consume("q", "c", "no_ack")
    channel.take(2)
    channel.get("q")
    channel.publish("q", "five")
    channel.take()


@scenario
def delivered_messages_stay_when_a_queue_is_deleted(stage: Stage) -> None:
    """Acknowledging, or rejecting, what came from a queue that is gone is no error."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    for number in range(3):
        channel.post("q", str(number))
    for _ in range(3):
        channel.get("q")
    client.open().delete("q")
    channel.ack(1)
    channel.nack(2, "requeue")
    channel.reject(3)
    channel.declare("q")
    stage.count("q", 0)
