# SPDX-License-Identifier: MIT
"""Times to live, of messages and of queues, and limits of length.

Where time matters, a time to live is either over before the first look or longer than any test.
"""

from __future__ import annotations

from typing import Any

from tests.broker.differential.driver import Stage
from tests.broker.differential.registry import each, scenario

KINDS: dict[str, dict[str, Any]] = {"classic": {}, "quorum": {"x_queue_type": "quorum"}}

#: Dead letters of the queue go to the queue `dead`.
TO_DEAD = {"x_dead_letter_exchange": "", "x_dead_letter_routing_key": "dead"}

#: More milliseconds than any test takes.
LONG = "3600000"


@each(**KINDS)
def messages_expire_by_the_time_of_the_queue(stage: Stage, arguments: Any) -> None:
    """x-message-ttl is for each message, also for one that has a longer time of its own."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", x_message_ttl=20, **arguments)
    channel.publish("q", "one")
    channel.publish("q", "two", expiration=LONG)
    stage.count("q", 0)
    channel.get("q")


@each(**KINDS)
def messages_expire_by_their_own_time(stage: Stage, arguments: Any) -> None:
    """The shorter of both times counts."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", x_message_ttl=int(LONG), **arguments)
    channel.publish("q", "one", expiration="20")
    stage.count("q", 0)
    channel.publish("q", "two")
    stage.count("q", 1)
    stage.drain("q", 1)


@each(**KINDS)
def a_message_expires_at_the_head_only(stage: Stage, arguments: Any) -> None:
    """Behind one that lives longer it waits, and is not delivered."""
    channel = stage.open(confirm=True)
    channel.declare("clock", x_message_ttl=100)
    channel.declare("q", "durable", **arguments)
    channel.publish("q", "long")
    channel.publish("q", "short", expiration="20")
    channel.post("clock", "tick")
    stage.count("clock", 0)
    stage.count("q", 2)
    channel.get("q", "no_ack")
    channel.get("q", "no_ack")


@each(**KINDS)
def an_expired_message_behind_the_head_is_counted(stage: Stage, arguments: Any) -> None:
    """Or not: what basic.get tells of the messages behind the one it takes."""
    channel = stage.open(confirm=True)
    channel.declare("clock", x_message_ttl=100)
    channel.declare("q", "durable", **arguments)
    channel.publish("q", "long")
    channel.publish("q", "short", expiration="20")
    channel.post("clock", "tick")
    stage.count("clock", 0)
    channel.get("q")


@each(**KINDS)
def a_time_of_zero_expires_at_once(stage: Stage, arguments: Any) -> None:
    """Unless a consumer waits: then the message is delivered."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", "durable", **TO_DEAD, **arguments)
    channel.publish("q", "one", expiration="0")
    stage.count("q", 0)
    stage.drain("dead", 1)
    channel.declare("queue", "durable", x_message_ttl=0, **TO_DEAD, **arguments)
    channel.publish("queue", "two")
    stage.drain("dead", 1)
    consumer = stage.open()
    consumer.consume("queue", "c")
    if not arguments:
        channel.publish("queue", "three")
        consumer.take()


@scenario
def an_expired_message_that_somebody_holds_stays_held(stage: Stage) -> None:
    """Only ready messages expire."""
    channel = stage.open(confirm=True)
    channel.declare("clock", x_message_ttl=100)
    channel.declare("q")
    channel.publish("q", "one", expiration="50")
    channel.get("q")
    channel.post("clock", "tick")
    stage.count("clock", 0)
    channel.ack(1)
    channel.sync()
    stage.count("q", 0)


@each(**KINDS)
def a_queue_expires_without_use(stage: Stage, arguments: Any) -> None:
    """Its messages go with it, and are not dead-lettered."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", "durable", x_expires=150, **TO_DEAD, **arguments)
    channel.publish("q", "one")
    stage.gone("q")
    stage.drain("dead", 0)
    channel.declare("q", "passive")


@scenario
def a_queue_with_a_consumer_does_not_expire(stage: Stage) -> None:
    """The time begins when the last consumer goes."""
    channel = stage.open(confirm=True)
    channel.declare("clock", x_message_ttl=300)
    channel.declare("q", x_expires=150)
    channel.consume("q", "c")
    channel.post("clock", "tick")
    stage.count("clock", 0)
    channel.publish("q", "one", "mandatory")
    channel.take()
    channel.cancel("c")
    stage.gone("q")


@scenario
def an_exclusive_queue_may_expire_too(stage: Stage) -> None:
    """The name is then free."""
    channel = stage.open()
    channel.declare("q", "exclusive", x_expires=50)
    stage.gone("q")
    channel.declare("q", "exclusive")


@each(**KINDS)
def a_full_queue_drops_its_head(stage: Stage, arguments: Any) -> None:
    """The default: the oldest goes."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", "durable", x_max_length=2, **TO_DEAD, **arguments)
    for body in ("one", "two", "three", "four"):
        channel.publish("q", body)
    stage.drain("dead", 2)
    stage.drain("q", 2)


@scenario
def a_full_queue_refuses_publishes(stage: Stage) -> None:
    """reject-publish nacks, and dead-letters nothing."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", x_max_length=2, x_overflow="reject-publish", **TO_DEAD)
    for body in ("one", "two", "three", "four"):
        channel.publish("q", body, "mandatory")
    channel.get("q", "no_ack")
    channel.publish("q", "five")
    stage.drain("dead", 0)
    stage.drain("q", 2)


@scenario
def a_full_queue_may_dead_letter_what_it_refuses(stage: Stage) -> None:
    """reject-publish-dlx nacks, and the new message is dead-lettered."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", x_max_length=2, x_overflow="reject-publish-dlx", **TO_DEAD)
    for body in ("one", "two", "three"):
        channel.publish("q", body)
    stage.drain("dead", 1)
    stage.drain("q", 2)


@scenario
def a_full_queue_without_confirms_drops_what_it_refuses(stage: Stage) -> None:
    """Nobody is told."""
    client = stage.connect()
    channel = client.open()
    channel.declare("q", x_max_length=1, x_overflow="reject-publish")
    channel.publish("q", "one")
    channel.publish("q", "two")
    client.open(confirm=True).publish("q", "three")
    stage.drain("q", 1)


@scenario
def unacknowledged_messages_do_not_fill_a_queue(stage: Stage) -> None:
    """The limit is about ready messages; a requeue may go beyond it and drops the head."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", x_max_length=2, **TO_DEAD)
    for body in ("one", "two"):
        channel.publish("q", body)
    channel.get("q")
    channel.publish("q", "three")
    stage.count("q", 2)
    channel.nack(1, "requeue")
    stage.drain("dead", 1)
    stage.drain("q", 2)


@each(**KINDS)
def a_requeue_into_a_full_queue_with_a_consumer(stage: Stage, arguments: Any) -> None:
    """A classic queue drops its head and then delivers, a quorum queue delivers first."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", "durable", x_max_length=1, **TO_DEAD, **arguments)
    consumer = stage.open()
    consumer.qos(1)
    consumer.consume("q", "c")
    channel.publish("q", "one")
    consumer.take()
    channel.publish("q", "two")
    consumer.nack(1, "requeue")
    consumer.take()
    stage.settle()
    stage.drain("dead", 0)
    stage.drain("q", 0)


@scenario
def a_queue_of_length_zero_delivers_to_those_who_wait(stage: Stage) -> None:
    """What finds no consumer is dropped."""
    channel = stage.open(confirm=True)
    channel.declare("q", x_max_length=0)
    channel.publish("q", "one")
    stage.count("q", 0)
    consumer = stage.open()
    consumer.consume("q", "c")
    channel.publish("q", "two")
    consumer.take()


@each(**KINDS)
def bytes_are_limited_too(stage: Stage, arguments: Any) -> None:
    """x-max-length-bytes counts bodies."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", x_max_length_bytes=100, **arguments)
    channel.publish("q", b"a" * 60, headers={"long": "header" * 50})
    channel.publish("q", b"b" * 40)
    stage.count("q", 2)
    channel.publish("q", b"c")
    stage.count("q", 2)
    channel.publish("q", b"d" * 101)
    stage.drain("q", 0)


@each(**KINDS)
def a_large_message_drops_several(stage: Stage, arguments: Any) -> None:
    """In which order they become dead letters."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", "durable", x_max_length_bytes=10, **TO_DEAD, **arguments)
    for body in ("one", "two", "three", "a large one"[:10]):
        channel.post("q", body)
    stage.drain("dead", 3)
    stage.drain("q", 1)


@each(
    drop_head={"x_max_length_bytes": 10},
    reject={"x_max_length_bytes": 10, "x_overflow": "reject-publish"},
    reject_dlx={"x_max_length_bytes": 10, "x_overflow": "reject-publish-dlx"},
)
def a_message_that_does_not_fit(stage: Stage, arguments: Any) -> None:
    """What a queue does with one that is too large for what room is left, or for any."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", **TO_DEAD, **arguments)
    for body in (b"a" * 6, b"b" * 5, b"c" * 4, b"d" * 11):
        channel.publish("q", body)
    stage.drain("dead", 0)
    stage.drain("q", 0)


@scenario
def both_limits_hold(stage: Stage) -> None:
    """Whichever is reached first."""
    channel = stage.open(confirm=True)
    channel.declare("q", x_max_length=3, x_max_length_bytes=10)
    for body in (b"aaaa", b"bbbb", b"cccc", b"d", b"e", b"f"):
        channel.publish("q", body)
    stage.drain("q", 0)


@scenario
def a_full_quorum_queue_may_refuse_publishes(stage: Stage) -> None:
    """A quorum queue refuses a message or two later than a classic one; what it took it has."""
    channel = stage.open(confirm=True)
    channel.declare(
        "q", "durable", x_queue_type="quorum", x_max_length=1, x_overflow="reject-publish"
    )
    for body in ("one", "two", "three", "four"):
        channel.publish("q", body)
    stage.drain("q", 1)


@scenario
def messages_of_higher_priority_come_first(stage: Stage) -> None:
    """Above the maximum is the maximum, none is zero; order is kept within a priority."""
    channel = stage.open(confirm=True)
    channel.declare("q", x_max_priority=5)
    for number, priority in enumerate((0, 5, 3, 9, 3, None, 1, 255, 5)):
        properties = {} if priority is None else {"priority": priority}
        channel.post("q", str(number), **properties)
    stage.drain("q", 9)


@scenario
def priorities_mean_nothing_to_other_queues(stage: Stage) -> None:
    """Without x-max-priority order is that of publishing."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.declare("zero", x_max_priority=0)
    channel.declare("quorum", "durable", x_queue_type="quorum")
    for queue in ("q", "zero", "quorum"):
        for priority in (0, 9, 5):
            channel.post(queue, str(priority), priority=priority)
        stage.drain(queue, 3)


@scenario
def a_requeued_message_keeps_its_priority(stage: Stage) -> None:
    """It returns to its place within its priority."""
    channel = stage.open(confirm=True)
    channel.declare("q", x_max_priority=5)
    for number, priority in enumerate((1, 5, 5, 1)):
        channel.post("q", str(number), priority=priority)
    for _ in range(3):
        channel.get("q")
    channel.nack(3, "multiple", "requeue")
    stage.count("q", 4)
    stage.drain("q", 4)


@scenario
def a_full_queue_with_priorities_drops_the_lowest(stage: Stage) -> None:
    """The head that is dropped is that of the lowest priority."""
    channel = stage.open(confirm=True)
    channel.declare("q", x_max_priority=5, x_max_length=2)
    for number, priority in enumerate((3, 1, 5, 0, 1)):
        channel.publish("q", str(number), priority=priority)
    stage.drain("q", 2)


@scenario
def a_message_of_low_priority_expires_behind_the_others(stage: Stage) -> None:
    """Only the head of the queue expires, and that is the first of the highest priority."""
    channel = stage.open(confirm=True)
    channel.declare("clock", x_message_ttl=100)
    channel.declare("q", x_max_priority=5)
    channel.post("q", "high", priority=5)
    channel.post("q", "low", priority=1, expiration="20")
    channel.post("clock", "tick")
    stage.count("clock", 0)
    stage.count("q", 2)
    stage.drain("q", 1)
