# SPDX-License-Identifier: MIT
"""Dead letters: why, where to, and what their headers tell."""

from __future__ import annotations

from typing import Any

from tests.broker.differential.codec import Field
from tests.broker.differential.driver import Stage
from tests.broker.differential.registry import each, scenario

KINDS: dict[str, dict[str, Any]] = {"classic": {}, "quorum": {"x_queue_type": "quorum"}}

#: Dead letters of the queue go to the queue `dead`.
TO_DEAD = {"x_dead_letter_exchange": "", "x_dead_letter_routing_key": "dead"}


@each(**KINDS)
def a_rejected_message_is_dead_lettered(stage: Stage, arguments: Any) -> None:
    """By reject, by nack, and by nack of several."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", "durable", **TO_DEAD, **arguments)
    for body in ("one", "two", "three", "four"):
        channel.publish("q", body, headers={"own": 1}, content_type="text/plain")
        channel.get("q")
    channel.reject(1)
    stage.drain("dead", 1)
    channel.nack(2)
    stage.drain("dead", 1)
    channel.nack(4, "multiple")
    stage.drain("dead", 2)


@each(**KINDS)
def an_expired_message_is_dead_lettered(stage: Stage, arguments: Any) -> None:
    """Its expiration is taken away, and kept in x-death."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", "durable", **TO_DEAD, **arguments)
    channel.publish("q", "one", expiration="20", delivery_mode=2)
    stage.drain("dead", 1)
    channel.declare("by-queue", "durable", x_message_ttl=20, **TO_DEAD, **arguments)
    channel.publish("by-queue", "two")
    channel.publish("by-queue", "three", expiration="3600000")
    stage.drain("dead", 2)


@each(**KINDS)
def a_message_beyond_the_length_is_dead_lettered(stage: Stage, arguments: Any) -> None:
    """The reason is maxlen."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", "durable", x_max_length=1, **TO_DEAD, **arguments)
    channel.publish("q", "one", expiration="3600000")
    channel.publish("q", "two")
    stage.drain("dead", 1)
    stage.drain("q", 1)


@scenario
def a_message_given_back_too_often_is_dead_lettered(stage: Stage) -> None:
    """The reason is delivery_limit, and x-delivery-count goes along."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", "durable", x_queue_type="quorum", x_delivery_limit=1, **TO_DEAD)
    channel.publish("q", "one", headers={"own": 1})
    for tag in (1, 2):
        channel.get("q")
        channel.reject(tag, "requeue")
    stage.drain("dead", 1)


@scenario
def a_dead_letter_keeps_its_routing_keys(stage: Stage) -> None:
    """Without a routing key of its own the queue uses those of the message, CC and BCC too."""
    channel = stage.open(confirm=True)
    channel.declare_exchange("dlx", "topic")
    for queue in ("q", "copy"):
        channel.declare(queue, x_dead_letter_exchange="dlx")
    channel.declare("dead")
    channel.bind("dead", "dlx", "q")
    channel.declare("dead-copy")
    channel.bind("dead-copy", "dlx", "copy")
    headers = {"CC": ["copy"], "BCC": ["blind"]}
    channel.publish("q", "one", headers=headers)
    channel.get("q")
    channel.reject(1)
    stage.drain("dead", 1)
    stage.drain("dead-copy", 1)


@scenario
def a_dead_letter_routing_key_replaces_all_keys(stage: Stage) -> None:
    """CC is taken away then, and x-death keeps it."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("copy")
    channel.declare("q", **TO_DEAD)
    channel.publish("q", "one", headers={"CC": ["copy"], "BCC": ["blind"], "own": 1})
    stage.drain("copy", 1)
    channel.get("q")
    channel.reject(1)
    stage.drain("dead", 1)
    stage.drain("copy", 0)


@each(**KINDS)
def deaths_are_counted_by_queue_and_reason(stage: Stage, arguments: Any) -> None:
    """The latest is first in x-death; x-first-death-* stays."""
    channel = stage.open(confirm=True)
    channel.declare("first", "durable", x_dead_letter_exchange="amq.direct", **arguments)
    channel.declare("second", "durable", x_dead_letter_exchange="", **arguments)
    channel.bind("second", "amq.direct", "first")
    channel.publish("first", "one")
    for _ in range(2):
        first = channel.get("first")
        channel.reject(first["delivery_tag"])
        stage.count("second", 1)
        second = channel.get("second")
        channel.reject(second["delivery_tag"])
        stage.count("first", 1)
    channel.get("first")


@each(**KINDS)
def a_circle_by_rejection_goes_on(stage: Stage, arguments: Any) -> None:
    """A message may return to its queue as often as a client rejects it."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", x_dead_letter_exchange="", **arguments)
    channel.publish("q", "one")
    for _ in range(3):
        event = channel.get("q")
        channel.reject(event["delivery_tag"])
        stage.count("q", 1)
    channel.get("q")


@each(**KINDS)
def a_circle_by_expiry_alone_ends(stage: Stage, arguments: Any) -> None:
    """A message that comes back without a rejection on its way is dropped."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", x_message_ttl=20, x_dead_letter_exchange="", **arguments)
    channel.publish("q", "one")
    stage.count("q", 0)
    channel.declare("one", "durable", x_message_ttl=20, **_to("two"), **arguments)
    channel.declare("two", "durable", x_message_ttl=20, **_to("one"), **arguments)
    channel.publish("one", "two")
    stage.count("one", 0)
    stage.count("two", 0)


@scenario
def a_circle_by_length_alone_ends(stage: Stage) -> None:
    """A queue that drops its head into itself does not spin."""
    channel = stage.open(confirm=True)
    channel.declare("q", x_max_length=1, x_dead_letter_exchange="")
    for body in ("one", "two", "three"):
        channel.publish("q", body)
    stage.drain("q", 1)


@scenario
def a_circle_of_expiry_and_rejection_goes_on(stage: Stage) -> None:
    """The usual retry: rejected, then it waits, then it comes back."""
    channel = stage.open(confirm=True)
    channel.declare("work", **_to("wait"))
    channel.declare("wait", x_message_ttl=20, **_to("work"))
    channel.publish("work", "one")
    for _ in range(3):
        stage.count("work", 1)
        event = channel.get("work")
        channel.reject(event["delivery_tag"])
    stage.count("work", 1)
    stage.drain("work", 1)


@scenario
def a_client_that_keeps_x_death_continues_the_count(stage: Stage) -> None:
    """A message published with x-death is taken to have died before."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", x_message_ttl=20, **TO_DEAD)
    channel.publish("q", "one")
    (letter,) = stage.drain("dead", 1)
    channel.post("q", "two", headers=letter.headers)
    stage.drain("dead", 1)
    channel.post("dead", "three", headers=letter.headers)
    stage.drain("dead", 1)


@each(
    text={"x-death": "nonsense"},
    empty={"x-death": []},
    foreign={"x-death": [{"queue": "other", "reason": "rejected", "count": 5}]},
    short_count={"x-death": [{"queue": "q", "reason": "rejected", "count": Field("s", 5)}]},
    first_death={"x-first-death-reason": "mine", "x-first-death-queue": 5},
)
def an_x_death_of_a_client(stage: Stage, headers: Any) -> None:
    """What becomes of headers that a client made up, when the message dies."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", **TO_DEAD)
    channel.publish("q", "one", headers=headers)
    channel.get("q")
    channel.reject(1)
    stage.drain("dead", 1)


@scenario
def dead_letters_to_a_missing_exchange_are_dropped(stage: Stage) -> None:
    """The exchange is looked up when a message dies, not before."""
    channel = stage.open(confirm=True)
    channel.declare("q", x_dead_letter_exchange="dlx")
    channel.publish("q", "one")
    channel.publish("q", "two")
    channel.get("q")
    channel.reject(1)
    channel.declare_exchange("dlx", "fanout")
    channel.declare("dead")
    channel.bind("dead", "dlx")
    channel.get("q")
    channel.reject(2)
    stage.drain("dead", 1)


@scenario
def dead_letters_go_to_many(stage: Stage) -> None:
    """A dead letter is routed as any message is, also by an internal or alternate exchange."""
    channel = stage.open(confirm=True)
    channel.declare_exchange("dlx", "direct", "internal", alternate_exchange="amq.fanout")
    for queue in ("one", "two"):
        channel.declare(queue)
        channel.bind(queue, "amq.fanout")
    channel.declare("q", x_dead_letter_exchange="dlx")
    channel.publish("q", "body")
    channel.get("q")
    channel.reject(1)
    stage.drain("one", 1)
    stage.drain("two", 1)


@scenario
def dead_letters_pass_through_two_queues(stage: Stage) -> None:
    """Each queue adds its line in front."""
    channel = stage.open(confirm=True)
    channel.declare("one", x_message_ttl=10, **_to("two"))
    channel.declare("two", x_max_length=0, **_to("three"))
    channel.declare("three", "durable", x_queue_type="quorum", **_to("four"))
    channel.declare("four")
    channel.publish("one", "body", expiration="3600000", headers={"CC": ["nowhere"]})
    stage.count("three", 1)
    channel.get("three")
    channel.reject(1)
    stage.drain("four", 1)


@scenario
def purged_and_deleted_messages_are_no_dead_letters(stage: Stage) -> None:
    """Neither are those that are acknowledged."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", **TO_DEAD)
    for body in ("one", "two"):
        channel.publish("q", body)
    channel.get("q", "no_ack")
    channel.purge("q")
    channel.publish("q", "three")
    channel.delete("q")
    stage.drain("dead", 0)


@scenario
def at_least_once_dead_letters_arrive(stage: Stage) -> None:
    """A quorum queue with at-least-once and reject-publish, as 3.10.8 takes them."""
    channel = stage.open(confirm=True)
    channel.declare("dead", "durable", x_queue_type="quorum")
    channel.declare(
        "q",
        "durable",
        x_queue_type="quorum",
        x_dead_letter_strategy="at-least-once",
        x_overflow="reject-publish",
        x_delivery_limit=1,
        **TO_DEAD,
    )
    channel.publish("q", "rejected", headers={"own": 1})
    channel.get("q")
    channel.reject(1)
    stage.drain("dead", 1)
    channel.publish("q", "expired", expiration="20")
    stage.drain("dead", 1)
    channel.publish("q", "returned")
    for tag in (2, 3):
        channel.get("q")
        channel.reject(tag, "requeue")
    stage.drain("dead", 1)
    stage.count("q", 0)


def _to(queue: str) -> dict[str, str]:
    return {"x_dead_letter_exchange": "", "x_dead_letter_routing_key": queue}
