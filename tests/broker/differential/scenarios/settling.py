# SPDX-License-Identifier: MIT
"""Acknowledging, rejecting, requeueing and redelivery."""

from __future__ import annotations

from typing import Any

from pika import spec

from tests.broker.differential.driver import Channel, Client, Stage
from tests.broker.differential.registry import each, scenario

KINDS: dict[str, dict[str, Any]] = {"classic": {}, "quorum": {"x_queue_type": "quorum"}}

#: A quorum queue with a delivery limit puts what is given back elsewhere than one without.
LIMITED: dict[str, dict[str, Any]] = {"limited": {"x_queue_type": "quorum", "x_delivery_limit": 20}}

BODIES = ("one", "two", "three", "four", "five")


def _filled(stage: Stage, arguments: dict[str, Any]) -> Channel:
    """Return a channel; the queue `q` has five messages."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    for body in BODIES:
        channel.post("q", body)
    return channel


@each(
    unknown=lambda channel: channel.ack(7),
    unknown_multiple=lambda channel: channel.ack(7, "multiple"),
    nack=lambda channel: channel.nack(7),
    reject=lambda channel: channel.reject(7),
    zero=lambda channel: channel.ack(0),
    zero_nack=lambda channel: channel.nack(0),
    zero_reject=lambda channel: channel.reject(0),
)
def an_unknown_delivery_tag_closes_the_channel(stage: Stage, act: Any) -> None:
    """406 names the tag, and the message is requeued."""
    channel = _filled(stage, {})
    channel.get("q")
    act(channel)
    channel.take()
    stage.drain("q", 5)


@each(
    zero_multiple=lambda channel: channel.ack(0, "multiple"),
    zero_nack_multiple=lambda channel: channel.nack(0, "multiple"),
)
def tag_zero_with_multiple_means_all(stage: Stage, act: Any) -> None:
    """It is no error if there is nothing to settle."""
    channel = _filled(stage, {})
    act(channel)
    channel.sync()
    channel.get("q")
    channel.get("q")
    act(channel)
    channel.close()
    stage.drain("q", 3)


@scenario
def a_tag_is_settled_once(stage: Stage) -> None:
    """A second ack is 406, and requeues what was left."""
    channel = _filled(stage, {})
    channel.get("q")
    channel.get("q")
    channel.ack(1)
    channel.ack(1)
    channel.take()
    stage.drain("q", 4)


@scenario
def multiple_settles_all_up_to_the_tag(stage: Stage) -> None:
    """Those above stay unsettled, and the tags below cannot be settled again."""
    channel = _filled(stage, {})
    for _ in range(4):
        channel.get("q")
    channel.ack(2)
    channel.ack(3, "multiple")
    channel.ack(1)
    channel.take()
    stage.drain("q", 2)


@scenario
def tags_are_of_the_channel(stage: Stage) -> None:
    """What one channel got another cannot settle."""
    channel = _filled(stage, {})
    channel.get("q")
    other = stage.open()
    other.ack(1)
    other.take()
    channel.ack(1)
    stage.drain("q", 4)


@each(**KINDS, **LIMITED)
def a_requeued_message_returns_to_its_place(stage: Stage, arguments: Any) -> None:
    """A message that was in the middle; the redelivered flag is set."""
    channel = _filled(stage, arguments)
    for _ in range(3):
        channel.get("q")
    channel.nack(2, "requeue")
    for _ in range(3):
        channel.get("q")
    channel.get("q")


@each(**KINDS, **LIMITED)
def messages_requeued_together_keep_their_order(stage: Stage, arguments: Any) -> None:
    """nack with multiple gives back all up to the tag."""
    channel = _filled(stage, arguments)
    for _ in range(4):
        channel.get("q")
    channel.nack(3, "multiple", "requeue")
    for _ in range(4):
        channel.get("q")


@each(**KINDS, **LIMITED)
def messages_requeued_singly_backwards(stage: Stage, arguments: Any) -> None:
    """Where each goes when the last is given back first."""
    channel = _filled(stage, arguments)
    for _ in range(3):
        channel.get("q")
    for tag in (3, 2, 1):
        channel.reject(tag, "requeue")
    stage.count("q", 5)
    for _ in range(5):
        channel.get("q")


@each(**KINDS, **LIMITED)
def a_consumer_gets_again_what_it_requeues(stage: Stage, arguments: Any) -> None:
    """With one consumer a requeued message comes back to it, before the next if prefetch is 1."""
    _filled(stage, arguments)
    consumer = stage.open()
    consumer.qos(1)
    consumer.consume("q", "c")
    consumer.take()
    for tag in (1, 2):
        consumer.nack(tag, "requeue")
        consumer.take()
    consumer.ack(3)
    consumer.take()


@each(**KINDS)
def deliveries_of_two_consumers_are_requeued_one_consumer_after_the_other(
    stage: Stage, arguments: Any
) -> None:
    """Sorted by consumer tag: what the first gives back may be delivered before the second does."""
    _filled(stage, arguments)
    channel = stage.open()
    channel.qos(1)
    channel.consume("q", "b", x_priority=1)
    channel.take()
    channel.consume("q", "a")
    channel.take()
    channel.nack(2, "multiple", "requeue")
    channel.take(2)
    stage.settle()


@each(**KINDS)
def a_requeued_message_goes_to_another_consumer(stage: Stage, arguments: Any) -> None:
    """Consumers take turns with requeued messages too."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    first, second = stage.open(), stage.open()
    for consumer, tag in ((first, "a"), (second, "b")):
        consumer.qos(1)
        consumer.consume("q", tag)
    channel.post("q", "one")
    first.take()
    first.reject(1, "requeue")
    second.take()


@each(**KINDS)
def rejected_messages_are_dropped(stage: Stage, arguments: Any) -> None:
    """Without requeue, and without a dead letter exchange, they are gone."""
    channel = _filled(stage, arguments)
    for _ in range(4):
        channel.get("q")
    channel.reject(1)
    channel.nack(3, "multiple")
    channel.close()
    stage.drain("q", 2)


def _close_channel(channel: Channel, client: Client) -> None:
    channel.close()


def _close_connection(channel: Channel, client: Client) -> None:
    client.close()


def _cut_connection(channel: Channel, client: Client) -> None:
    client.cut()


def _fail_channel(channel: Channel, client: Client) -> None:
    channel.declare("missing", "passive")


@each(
    channel_close=_close_channel,
    connection_close=_close_connection,
    connection_lost=_cut_connection,
    channel_error=_fail_channel,
)
def the_end_of_a_channel_requeues_what_it_held(stage: Stage, act: Any) -> None:
    """In whatever way it ends: consumed and got messages return to their places."""
    _filled(stage, {})
    client = stage.connect()
    channel = client.open()
    channel.qos(2)
    channel.consume("q", "c")
    channel.take(2)
    channel.get("q")
    channel.ack(1)
    channel.take()
    act(channel, client)
    stage.count("q", 4)
    stage.drain("q", 4)


@each(unlimited=KINDS["quorum"], **LIMITED)
def the_end_of_a_channel_requeues_into_a_quorum_queue(stage: Stage, arguments: Any) -> None:
    """A quorum queue counts the deliveries that ended so."""
    _filled(stage, arguments)
    channel = stage.open()
    channel.qos(2)
    channel.consume("q", "c")
    channel.take(2)
    channel.ack(1)
    channel.take()
    channel.close()
    stage.count("q", 4)
    stage.drain("q", 4)


@scenario
def redelivered_is_set_once_delivered(stage: Stage) -> None:
    """A message that was given back is redelivered to everyone from then on."""
    channel = _filled(stage, {})
    channel.get("q")
    channel.reject(1, "requeue")
    other = stage.connect().open()
    other.get("q")
    other.nack(1, "requeue")
    other.get("q")
    other.get("q")


@each(
    recover=lambda channel: channel.call(spec.Basic.Recover(requeue=True)),
    recover_async=lambda channel: channel.tell(spec.Basic.RecoverAsync(requeue=True)),
)
def recover_requeues_all_of_the_channel(stage: Stage, act: Any) -> None:
    """Consumers get them again, with new tags."""
    channel = _filled(stage, {})
    consumer = stage.open()
    consumer.qos(3)
    consumer.consume("q", "c")
    consumer.take(3)
    consumer.ack(1)
    consumer.take()
    consumer.cancel("c")
    act(consumer)
    consumer.sync()
    stage.count("q", 4)
    stage.drain("q", 4)
    act(channel)


@each(recover=spec.Basic.Recover, recover_async=spec.Basic.RecoverAsync)
def recover_without_requeue_is_not_implemented(stage: Stage, method: Any) -> None:
    """540 ends the connection."""
    channel = stage.open()
    channel.tell(method(requeue=False))
    channel.take()


@scenario
def recover_redelivers_to_a_consumer(stage: Stage) -> None:
    """A consumer that has not been cancelled sees the messages again."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    consumer = client.open()
    consumer.consume("q", "c")
    channel.post("q", "one")
    consumer.take()
    consumer.call(spec.Basic.Recover(requeue=True))
    consumer.take()
    consumer.ack(2)
    consumer.sync()
    stage.settle()


@scenario
def a_quorum_queue_counts_deliveries(stage: Stage) -> None:
    """x-delivery-count tells how often a message was given back."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", x_queue_type="quorum")
    channel.publish("q", "one", headers={"own": "header", "x-delivery-count": 7})
    channel.publish("q", "two")
    for tag in (1, 2, 3):
        channel.get("q")
        channel.reject(tag, "requeue")
    channel.get("q", "no_ack")
    channel.get("q", "no_ack")


@each(zero=0, one=1, two=2)
def a_delivery_limit_drops_what_is_given_back_too_often(stage: Stage, limit: int) -> None:
    """Without a dead letter exchange the message is gone."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", x_queue_type="quorum", x_delivery_limit=limit)
    channel.publish("q", "poison")
    channel.publish("q", "good")
    for tag in range(1, limit + 2):
        channel.get("q")
        channel.reject(tag, "requeue")
    channel.get("q", "no_ack")
    stage.count("q", 0)


@scenario
def a_delivery_limit_counts_lost_channels(stage: Stage) -> None:
    """A consumer that dies with the message counts like one that gives it back."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare(
        "q",
        "durable",
        x_queue_type="quorum",
        x_delivery_limit=1,
        x_dead_letter_exchange="",
        x_dead_letter_routing_key="dead",
    )
    channel.publish("q", "poison")
    for _ in range(2):
        consumer = stage.open()
        consumer.consume("q", "c")
        consumer.take()
        consumer.close()
    stage.drain("dead", 1)
    stage.count("q", 0)


@scenario
def requeueing_takes_an_expired_message_away(stage: Stage) -> None:
    """The time of a message runs on while somebody holds it."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", x_dead_letter_exchange="", x_dead_letter_routing_key="dead")
    channel.publish("q", "one", expiration="50")
    channel.publish("q", "two")
    channel.get("q")
    channel.declare("clock", x_message_ttl=150)
    channel.post("clock", "tick")
    stage.count("clock", 0)
    channel.nack(1, "requeue")
    stage.drain("dead", 1)
    stage.drain("q", 1)
