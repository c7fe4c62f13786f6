# SPDX-License-Identifier: MIT
"""Publishing: properties, bodies, returns and confirms."""

from __future__ import annotations

from typing import Any

from pika import spec

from tests.broker.differential.codec import Field
from tests.broker.differential.driver import Stage
from tests.broker.differential.registry import each, scenario

#: A header of every type of field that AMQP has.
FIELDS = {
    "t": True,
    "b": Field("b", -5),
    "B": Field("B", 200),
    "s": Field("s", -300),
    "u": Field("u", 40_000),
    "I": Field("I", -70_000),
    "i": Field("i", 3_000_000_000),
    "l": Field("l", -(2**40)),
    "L": Field("L", 2**40),
    "f": Field("f", 0.5),
    "d": Field("d", -1.25e300),
    "D": Field("D", (2, 314)),
    "S": "text \N{SNOWMAN}",
    "S bytes": Field("S", b"\0\0\0\2\xff\xfe"),
    "S empty": "",
    "x": b"\0\xff",
    "A": [1, "two", [None, {"three": Field("s", 3)}], []],
    "F": {"one": 1, "more": {"two": [2]}, "empty": {}},
    "T": Field("T", 1_000_000_000),
    "V": None,
}


@scenario
def all_properties_arrive_as_they_were(stage: Stage) -> None:
    """The broker keeps properties that it gives no meaning to."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.publish(
        "q",
        "body",
        content_type="text/plain",
        content_encoding="utf-8",
        headers={"name": "value"},
        delivery_mode=2,
        priority=7,
        correlation_id="correlation",
        reply_to="somewhere",
        expiration="60000",
        message_id="message",
        timestamp=1_000_000_000,
        type="type",
        user_id="guest",
        app_id="app",
        cluster_id="cluster",
    )
    stage.drain("q", 1)
    channel.publish("q", "body", content_type="", headers={}, delivery_mode=1, priority=255)
    channel.publish("q", "body", message_id="", timestamp=2**64 - 1)
    stage.drain("q", 2)


@each(classic={}, quorum={"x_queue_type": "quorum"})
def headers_of_all_types_arrive_as_they_were(stage: Stage, arguments: Any) -> None:
    """The type of each field is kept, also of those that the broker does not know how to use."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    channel.publish("q", "body", headers=FIELDS)
    stage.drain("q", 1)


@scenario
def headers_of_all_types_survive_a_change_of_headers(stage: Stage) -> None:
    """When the broker writes the headers anew, such as for a dead letter, types are kept."""
    channel = stage.open(confirm=True)
    channel.declare("dead")
    channel.declare("q", x_dead_letter_exchange="", x_dead_letter_routing_key="dead")
    channel.publish("q", "body", headers=FIELDS)
    channel.get("q")
    channel.reject(1)
    stage.drain("dead", 1)


@scenario
def bodies_of_any_size_arrive_whole(stage: Stage) -> None:
    """A body is cut into frames of the negotiated size, both ways."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    sizes = (0, 1, 131063, 131064, 131065, 400_000)
    for size in sizes:
        channel.publish("q", bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    for _ in sizes:
        channel.get("q", "no_ack")


@scenario
def a_body_may_come_in_any_pieces(stage: Stage) -> None:
    """Frames of one byte and empty frames are as good as full ones."""
    client = stage.connect()
    channel = client.open()
    channel.declare("q")
    channel.send(spec.Basic.Publish(routing_key="q"), {}, b"in pieces", frame_size=1)
    channel.send(spec.Basic.Publish(routing_key="q"))
    client.write_frame(2, 1, b"\0\x3c\0\0" + (4).to_bytes(8, "big") + b"\0\0")
    for piece in (b"", b"ab", b"", b"cd"):
        client.write_frame(3, 1, piece)
    channel.sync()
    stage.drain("q", 2)


@scenario
def deliveries_are_cut_to_the_frame_size_of_the_consumer(stage: Stage) -> None:
    """A connection that asked for small frames gets small frames."""
    small = stage.connect(frame_max=4096)
    channel = stage.connect().open(confirm=True)
    channel.declare("q")
    channel.publish("q", b"x" * 20_000)
    small.open().get("q", "no_ack")
    stage.note(f"longest frame: {small.longest_frame}")


@scenario
def a_message_that_goes_nowhere_is_dropped(stage: Stage) -> None:
    """Without the mandatory flag it is dropped, and confirmed all the same."""
    channel = stage.open(confirm=True)
    channel.publish("missing", "lost")
    channel.publish("missing", "lost", exchange="amq.topic")


@scenario
def a_mandatory_message_that_goes_nowhere_is_returned(stage: Stage) -> None:
    """It comes back as it was, before its confirm."""
    channel = stage.open(confirm=True)
    channel.publish("missing", "one", "mandatory")
    channel.publish(
        "missing",
        "two",
        "mandatory",
        exchange="amq.direct",
        headers={"a": Field("s", 1), "CC": ["absent"], "BCC": ["hidden"]},
        expiration="5",
        delivery_mode=2,
    )
    channel.publish("missing", b"x" * 200_000, "mandatory")


@scenario
def a_return_needs_no_confirm_mode(stage: Stage) -> None:
    """Returns come on any channel, in the order of publishing."""
    channel = stage.open()
    channel.publish("missing", "one", "mandatory")
    channel.publish("missing", "two", "mandatory")
    channel.take(2)


@scenario
def immediate_is_not_implemented(stage: Stage) -> None:
    """RabbitMQ gave the flag up: 540 ends the connection."""
    client = stage.connect()
    channel = client.open()
    channel.declare("q", "exclusive")
    channel.publish("q", "one", "immediate")
    channel.take()
    client.ended()


@scenario
def publishing_to_a_missing_exchange_closes_the_channel(stage: Stage) -> None:
    """404; what was sent behind it on this channel is thrown away."""
    client = stage.connect()
    channel = client.open()
    channel.declare("q")
    channel.publish("q", "before")
    channel.publish("key", "lost", exchange="missing")
    channel.publish("q", "behind")
    channel.take()
    stage.drain("q", 1)


@each(
    other={"user_id": "other"},
    empty={"user_id": ""},
    own={"user_id": "guest"},
    expiration_text={"expiration": "abc"},
    expiration_empty={"expiration": ""},
    expiration_negative={"expiration": "-1"},
    expiration_fraction={"expiration": "1.5"},
    expiration_spaces={"expiration": " 5"},
    expiration_trailing={"expiration": "5s"},
    expiration_plus={"expiration": "+60000"},
    expiration_zeros={"expiration": "0060000"},
    expiration_biggest={"expiration": "4294967295"},
    expiration_too_big={"expiration": "4294967296"},
    expiration_huge={"expiration": "9" * 11},
    delivery_mode_0={"delivery_mode": 0},
    delivery_mode_3={"delivery_mode": 3},
    x_death={"headers": {"x-death": "nonsense"}},
    timestamp={"timestamp": 0},
)
def properties_are_checked(stage: Stage, properties: Any) -> None:
    """A message is taken, or refused with 406 and the reason."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.publish("q", "one", **properties)
    stage.drain("q", 0)


@scenario
def confirms_tell_what_was_taken(stage: Stage) -> None:
    """Each message is confirmed, and tags count from the select."""
    channel = stage.open()
    channel.declare("q")
    channel.publish("q", "unconfirmed")
    channel.call(spec.Confirm.Select())
    channel.is_confirming = True
    for number in range(20):
        channel.publish("q", str(number), wait=False, delivery_mode=number % 2 + 1)
    channel.confirms(20)
    channel.call(spec.Confirm.Select())
    channel.publish("q", "last")
    stage.count("q", 22)


@scenario
def confirms_of_a_quorum_queue(stage: Stage) -> None:
    """A quorum queue confirms as well, also if a message goes to a classic one too."""
    channel = stage.open(confirm=True)
    channel.declare("quorum", "durable", x_queue_type="quorum")
    channel.declare("classic")
    channel.bind("quorum", "amq.fanout")
    channel.bind("classic", "amq.fanout")
    for number in range(10):
        channel.publish("", str(number), wait=False, exchange="amq.fanout")
    channel.confirms(10)
    stage.drain("quorum", 10)
    stage.drain("classic", 10)


@scenario
def a_message_for_several_queues_is_confirmed_once(stage: Stage) -> None:
    """A nack by one of the queues makes it a nack."""
    channel = stage.open(confirm=True)
    channel.declare("open")
    channel.declare("full", x_max_length=0, x_overflow="reject-publish")
    channel.bind("open", "amq.fanout")
    channel.publish("", "one", exchange="amq.fanout")
    channel.bind("full", "amq.fanout")
    channel.publish("", "two", exchange="amq.fanout")
    stage.drain("open", 2)


@scenario
def messages_keep_their_order(stage: Stage) -> None:
    """What one channel publishes to a queue comes out in that order."""
    channel = stage.open()
    channel.declare("q")
    for number in range(100):
        channel.send(spec.Basic.Publish(routing_key="q"), {}, str(number).encode())
    consumer = stage.connect().open()
    consumer.consume("q", "c", "no_ack")
    bodies = [consumer.next_event().body for _ in range(100)]
    stage.note(b" ".join(bodies))


@scenario
def persistent_and_transient_messages_share_a_queue(stage: Stage) -> None:
    """The delivery mode changes no order."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable")
    for number in range(6):
        channel.post("q", str(number), delivery_mode=1 + number % 2)
    stage.drain("q", 6)
