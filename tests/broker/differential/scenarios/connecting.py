# SPDX-License-Identifier: MIT
"""Opening and closing connections and channels, and what the broker says to broken frames."""

from __future__ import annotations

import struct
from typing import Any

from pika import frame, spec

from tests.broker.differential import codec
from tests.broker.differential.driver import (
    CAPABILITIES,
    NOTHING,
    Channel,
    Event,
    Silence,
    Stage,
)
from tests.broker.differential.registry import each, scenario

HEADER = frame.ProtocolHeader().marshal()


def _start_ok(response: str | bytes, mechanism: str = "PLAIN", **capabilities: Any) -> Any:
    properties = {"capabilities": {**CAPABILITIES, **capabilities}}
    return spec.Connection.StartOk(properties, mechanism=mechanism, response=response)


def _note_answer(stage: Stage, event: Event) -> None:
    stage.note(f"{len(stage.clients)}.0 < {event}")


@scenario
def the_broker_says_what_it_can(stage: Stage) -> None:
    """connection.start and connection.tune."""
    client = stage.dial()
    client.write(HEADER)
    start = client.control.next_event()
    properties = start["server_properties"]
    stage.note(f"capabilities: {sorted(properties['capabilities'].items())}")
    stage.note(f"properties: {sorted(set(properties) & {'product', 'version', 'platform'})}")
    stage.note(f"mechanisms: {sorted(start['mechanisms'].decode().split())}")
    stage.note(f"locales: {start['locales'].decode()}")
    stage.note(f"version: {start['version_major']}-{start['version_minor']}")
    _note_answer(stage, client.control.ask(_start_ok("\0guest\0guest")))
    client.control.send(spec.Connection.TuneOk(10, 4096, 0))
    _note_answer(stage, client.control.ask(spec.Connection.Open(stage.vhost)))


@each(
    older=b"AMQP\x00\x00\x08\x00",
    newer=b"AMQP\x00\x01\x00\x00",
    http=b"GET / HTTP/1.1\r\n\r\n",
)
def another_protocol_is_answered_with_ours(stage: Stage, header: bytes) -> None:
    """The broker sends the header that it speaks, and closes."""
    client = stage.dial()
    client.write(header)
    client.control.take()
    client.ended()


@scenario
def a_header_may_come_byte_by_byte(stage: Stage) -> None:
    """TCP cuts where it likes."""
    client = stage.dial()
    for position in range(len(HEADER)):
        client.write(HEADER[position : position + 1])
    stage.note(client.control.next_event().name)


@each(
    password="\0guest\0wrong",
    user="\0nobody\0guest",
    empty="\0\0",
)
def a_wrong_password_is_refused(stage: Stage, response: str) -> None:
    """403, to a client that says that it understands it."""
    client = stage.dial()
    client.write(HEADER)
    client.control.next_event()
    _note_answer(stage, client.control.ask(_start_ok(response)))
    client.ended()


@scenario
def an_unknown_mechanism_is_refused(stage: Stage) -> None:
    """RabbitMQ closes the socket without a word."""
    client = stage.dial()
    client.write(HEADER)
    client.control.next_event()
    client.control.send(_start_ok("guest", "UNKNOWN"))
    client.ended()


@scenario
def amqplain_is_understood(stage: Stage) -> None:
    """The response is a table without its length."""
    client = stage.dial()
    client.write(HEADER)
    client.control.next_event()
    table = codec.encode_table({"LOGIN": "guest", "PASSWORD": "guest"})[4:]
    _note_answer(stage, client.control.ask(_start_ok(table, "AMQPLAIN")))


@scenario
def an_unknown_vhost_is_refused(stage: Stage) -> None:
    """530."""
    client = stage.dial()
    _note_answer(stage, client.shake_hands(vhost="missing"))
    client.ended()


@each(frame_max={"frame_max": 100})
def tuning_has_limits(stage: Stage, options: Any) -> None:
    """RabbitMQ closes the socket without a word, if a client asks for more than it offers."""
    client = stage.dial()
    client.write(HEADER)
    client.control.next_event()
    client.control.ask(_start_ok("\0guest\0guest"))
    tune_ok = {"channel_max": 2047, "frame_max": 131072, "heartbeat": 0, **options}
    client.control.send(spec.Connection.TuneOk(**tune_ok))
    client.control.send(spec.Connection.Open(stage.vhost))
    client.ended()


@scenario
def channels_are_limited_in_number(stage: Stage) -> None:
    """One channel more than negotiated ends the connection, whatever its number."""
    client = stage.connect(channel_max=2)
    client.open(5)
    client.open(7).close()
    client.open(6)
    client.channel(1).call(spec.Channel.Open())
    client.ended()


@scenario
def heartbeats_come_and_are_expected(stage: Stage) -> None:
    """The broker sends them, and gives a silent client up."""
    client = stage.connect(heartbeat=1)
    client.ended()
    stage.note(f"heartbeats came: {client.heartbeats > 0}")


@scenario
def a_client_closes_its_connection(stage: Stage) -> None:
    """close-ok; channels that are open do not matter, and exclusive queues are gone."""
    client = stage.connect()
    client.open().declare("q", "exclusive")
    client.control.call(spec.Connection.Close(200, "bye", 0, 0))
    client.cut()
    stage.gone("q")


@scenario
def a_channel_number_may_be_used_again(stage: Stage) -> None:
    """After close-ok, and after an error as well."""
    client = stage.connect()
    channel = client.open(3)
    channel.declare("q", "exclusive")
    channel.close()
    channel = client.open(3)
    channel.declare("missing", "passive")
    channel = client.open(3, confirm=True)
    channel.publish("q", "one")
    channel.get("q")


@scenario
def what_a_channel_knew_is_forgotten(stage: Stage) -> None:
    """Confirm mode, the last queue, tags and prefetch are those of a new channel."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q", "exclusive")
    for number in range(3):
        channel.post("q", str(number))
    channel.get("q")
    channel.qos(1)
    channel.close()
    channel = client.open(1)
    channel.publish("q", "unconfirmed")
    channel.sync()
    channel.consume("q", "c")
    channel.take(4)
    channel.call(spec.Confirm.Select())
    channel.is_confirming = True
    channel.publish("q", "confirmed")
    channel.purge("")


@each(
    open_twice=lambda client: client.channels[1].tell(spec.Channel.Open()),
    not_opened=lambda client: client.channel(7).tell(spec.Basic.Qos()),
    publish_on_not_opened=lambda client: client.channel(7).send(spec.Basic.Publish(), {}, b""),
    close_not_opened=lambda client: client.channel(7).tell(spec.Channel.Close(200, "", 0, 0)),
    close_ok_not_opened=lambda client: client.channel(7).tell(spec.Channel.CloseOk()),
    channel_method_on_zero=lambda client: client.control.tell(spec.Queue.Declare(queue="q")),
    channel_open_on_zero=lambda client: client.control.tell(spec.Channel.Open()),
    connection_method_on_channel=lambda client: client.channels[1].tell(spec.Connection.Open()),
    connection_opened_twice=lambda client: client.control.tell(spec.Connection.Open("/")),
    start_ok_again=lambda client: client.control.tell(_start_ok("\0guest\0guest")),
    answer_of_the_broker=lambda client: client.channels[1].tell(spec.Queue.PurgeOk(5)),
    deliver_from_the_client=lambda client: client.channels[1].send(
        spec.Basic.Deliver("c", 1, False, "e", "k"), {}, b""
    ),
    stray_close_ok=lambda client: client.channels[1].tell(spec.Channel.CloseOk()),
    stray_flow_ok=lambda client: client.channels[1].tell(spec.Channel.FlowOk(True)),
)
def methods_out_of_place(stage: Stage, act: Any) -> None:
    """What the broker says to a method that does not belong where it came."""
    client = stage.connect()
    channel = client.open()
    act(client)
    _note_end(stage, client.channels.get(7, channel))


def _note_end(stage: Stage, channel: Channel) -> None:
    """Note what the broker says, and whether the channel still works."""
    try:
        stage.note(f"1.{channel.number} < {channel.ask(NOTHING)}")
    except Silence:
        stage.note("end of stream" if not channel.client.is_open else "no answer")


def _method(index: int, arguments: bytes = b"") -> bytes:
    return struct.pack(">I", index) + arguments


def _header(class_id: int, size: int, flags: int = 0) -> bytes:
    return struct.pack(">HHQH", class_id, 0, size, flags)


PUBLISH = codec.encode_method(spec.Basic.Publish(routing_key="q"))

BROKEN: dict[str, tuple[tuple[int, bytes], ...]] = {
    "body_alone": ((3, b"body"),),
    "header_alone": ((2, _header(60, 0)),),
    "two_publishes": ((1, PUBLISH), (1, PUBLISH)),
    "publish_and_body": ((1, PUBLISH), (3, b"body")),
    "header_of_another_class": ((1, PUBLISH), (2, _header(50, 0))),
    "method_for_a_body": ((1, PUBLISH), (2, _header(60, 4)), (1, PUBLISH)),
    "header_for_a_body": ((1, PUBLISH), (2, _header(60, 4)), (2, _header(60, 4))),
    "body_too_long": ((1, PUBLISH), (2, _header(60, 4)), (3, b"too long")),
    "body_for_none": ((1, PUBLISH), (2, _header(60, 0)), (3, b"")),
    "unknown_class": ((1, _method(0x00630001)),),
    "unknown_method": ((1, _method(0x003C0063)),),
    "unknown_frame_type": ((5, b"what"),),
    "method_without_index": ((1, b""),),
    "method_cut": ((1, PUBLISH[:7]),),
    "header_cut": ((1, PUBLISH), (2, b"\0\x3c\0\0")),
    "properties_cut": ((1, PUBLISH), (2, _header(60, 0, 0x8000) + b"\5ab")),
    "table_cut": ((1, codec.encode_method(spec.Queue.Declare(queue="q"))[:-4] + b"\0\0\0\7\1a"),),
    "unknown_field": (
        (
            1,
            codec.encode_method(
                spec.Queue.Declare(queue="q", arguments={"a": codec.Field("?", b"")})
            ),
        ),
    ),
    "heartbeat_on_a_channel": ((8, b""),),
    "heartbeat_with_content": ((8, b"beat"),),
}


@each(**BROKEN)
def frames_out_of_place(stage: Stage, frames: Any) -> None:
    """What the broker says to frames that make no sense."""
    client = stage.connect()
    channel = client.open()
    for frame_type, payload in frames:
        client.write_frame(frame_type, 1, payload)
    _note_end(stage, channel)


@scenario
def a_frame_that_ends_wrongly_ends_the_connection(stage: Stage) -> None:
    """501."""
    client = stage.connect()
    channel = client.open()
    client.write_frame(1, 1, codec.encode_method(spec.Basic.Qos()), end=0)
    _note_end(stage, channel)


@scenario
def a_frame_above_the_negotiated_size_ends_the_connection(stage: Stage) -> None:
    """501; RabbitMQ takes 8 bytes more than were negotiated."""
    client = stage.connect(frame_max=4096)
    channel = client.open()
    channel.declare("q", "exclusive")
    channel.send(spec.Basic.Publish(routing_key="q"), {}, b"x" * 4096, frame_size=4096)
    channel.get("q", "no_ack")
    channel.send(spec.Basic.Publish(routing_key="q"), {}, b"x" * 4097, frame_size=4097)
    _note_end(stage, channel)


@scenario
def a_closed_channel_swallows_what_is_on_its_way(stage: Stage) -> None:
    """A publish in the middle of the close does no harm."""
    client = stage.connect()
    channel = client.open()
    channel.declare("q")
    channel.tell(spec.Queue.Declare(queue="missing", passive=True))
    for number in range(5):
        channel.publish("q", str(number))
    channel.take()
    again = client.open(1)
    again.declare("q", "passive")


@each(
    access=spec.Access.Request(),
    update_secret=spec.Connection.UpdateSecret("guest", "for a test"),
)
def methods_that_few_clients_use(stage: Stage, method: Any) -> None:
    """What RabbitMQ answers to them."""
    client = stage.connect()
    channel = client.open()
    (client.control if method.NAME.startswith("Connection") else channel).call(method)
