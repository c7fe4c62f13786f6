# SPDX-License-Identifier: MIT
"""AMQP by hand: a peer that may send anything, over TCP or without sockets, and sees what comes.

Methods are coded by pika, whose codec the broker uses too. What must be wrong is built from bytes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TypeVar

import pika.frame
from pika import amqp_object, spec

from postage.broker.clock import Clock
from postage.broker.node import Node

Method = TypeVar("Method", bound=amqp_object.Method)

HEADER = b"AMQP\x00\x00\x09\x01"
HEARTBEAT = pika.frame.Heartbeat().marshal()
#: What pika says that it knows, as far as brokers ask for it.
CAPABILITIES = {
    "authentication_failure_close": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
}
#: Seconds to wait for the broker. RabbitMQ takes three to refuse some handshakes.
PATIENCE = 30.0


def frame(kind: int, channel: int, payload: bytes, end: bytes = b"\xce") -> bytes:
    """Return a frame, whatever is in it."""
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + end


def method(value: amqp_object.Method, channel: int = 0) -> bytes:
    """Return the frame of a method."""
    return pika.frame.Method(channel, value).marshal()


def header(size: int, properties: bytes = b"\0\0", class_id: int = 60, channel: int = 1) -> bytes:
    """Return the frame of a content header."""
    return frame(spec.FRAME_HEADER, channel, struct.pack(">HHQ", class_id, 0, size) + properties)


def body(data: bytes, channel: int = 1) -> bytes:
    """Return the frame of a piece of a body."""
    return frame(spec.FRAME_BODY, channel, data)


def message(
    key: str | bytes, data: bytes = b"", *, exchange: str = "", channel: int = 1, **flags: Any
) -> bytes:
    """Return the frames that publish a message without properties."""
    publish = spec.Basic.Publish(exchange=exchange, routing_key=key, **flags)
    begin = method(publish, channel) + header(len(data), channel=channel)
    return begin + body(data, channel) if data else begin


def login(
    password: str = "guest",
    *,
    user: str = "guest",
    mechanism: str = "PLAIN",
    capabilities: dict[str, bool] | None = None,
) -> bytes:
    """Return the frame of connection.start-ok."""
    response = f"\0{user}\0{password}"
    known = CAPABILITIES if capabilities is None else capabilities
    return method(spec.Connection.StartOk({"capabilities": known}, mechanism, response, "en_US"))


def tune(channel_max: int = 2047, frame_max: int = 131_072, heartbeat: int = 0) -> bytes:
    """Return the frame of connection.tune-ok."""
    return method(spec.Connection.TuneOk(channel_max, frame_max, heartbeat))


def opening(vhost: str = "/") -> bytes:
    """Return the frame of connection.open."""
    return method(spec.Connection.Open(vhost))


def short(data: bytes) -> bytes:
    """Return a short string."""
    return bytes([len(data)]) + data


def split(data: bytearray) -> Iterator[Any]:
    """Take the frames that are complete from the data."""
    while data:
        size, decoded = pika.frame.decode_frame(bytes(data))
        if decoded is None:
            return
        del data[:size]
        yield decoded


class RawClient:
    """A TCP connection to a broker. It sends heartbeats only if it is told to."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._socket = socket.create_connection((host, port), timeout=PATIENCE)
        self._received = bytearray()
        self._frames: Iterator[Any] = iter(())

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @classmethod
    def opened(cls, port: int, vhost: str = "/", **tuning: int) -> RawClient:
        """Return a client with an open connection and no channel."""
        client = cls(port)
        try:
            client.send(HEADER)
            client.expect(spec.Connection.Start)
            client.send(login())
            client.expect(spec.Connection.Tune)
            client.send(tune(**tuning) + opening(vhost))
            client.expect(spec.Connection.OpenOk)
        except BaseException:
            client.close()
            raise
        return client

    def open_channel(self, number: int = 1) -> None:
        """Open a channel, and wait until it is."""
        self.ask(spec.Channel.Open(), spec.Channel.OpenOk, number)

    def send(self, data: bytes) -> None:
        """Send bytes. It is no error if the broker takes no more."""
        # What it has said before can be read all the same.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def ask(self, value: amqp_object.Method, answer: type[Method], channel: int = 1) -> Method:
        """Send a method, and return the answer."""
        self.send(method(value, channel))
        return self.expect(answer)

    def receive(self) -> Any:
        """Return the next frame but for heartbeats, None if the broker closed the connection.

        Raises:
            TimeoutError: None has come.
        """
        while True:
            for decoded in self._frames:
                if not isinstance(decoded, pika.frame.Heartbeat):
                    return decoded
            try:
                data = self._socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._received += data
            self._frames = split(self._received)

    def expect(self, kind: type[Method]) -> Method:
        """Return the next method, which must be of that kind."""
        decoded = self.receive()
        value = decoded.method if isinstance(decoded, pika.frame.Method) else decoded
        assert isinstance(value, kind), f"expected {kind.NAME}, got {value!r}"
        return value

    def rest(self) -> list[Any]:
        """Return all frames until the broker closes the connection."""
        return list(iter(self.receive, None))

    def shut_down(self) -> None:
        """Say that nothing more will be sent, and go on to read."""
        self._socket.shutdown(socket.SHUT_WR)

    def set_timeout(self, seconds: float) -> None:
        """Say how long sending and receiving may take."""
        self._socket.settimeout(seconds)

    def reset_on_close(self) -> None:
        """Hang up without an orderly end of the TCP connection."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        """Hang up, without a word."""
        self._socket.close()


class Time:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A broker without sockets and without a clock of its own."""

    def __init__(self, **settings: Any) -> None:
        self.time = Time()
        settings = {"users": {"guest": "guest"}, "vhosts": ("/",), **settings}
        self.node = Node(clock=Clock(self.time), **settings)

    def connect(self) -> Caller:
        """Return a client that has not said anything."""
        return Caller(self)

    def opened(self, *, channels: int = 1, heartbeat: int = 0, **login_as: Any) -> Caller:
        """Return a client with an open connection and some channels."""
        caller = Caller(self)
        caller.send(HEADER + login(**login_as) + tune(heartbeat=heartbeat) + opening())
        for number in range(1, channels + 1):
            caller.send(method(spec.Channel.Open(), number))
        caller.take()
        return caller

    def pass_time(self, seconds: float) -> None:
        """Let time go by."""
        self.time.now += seconds
        self.node.finish_turn()


class Caller:
    """A client of a `Desk`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._received = bytearray()
        self.connection = desk.node.connect("the test")

    def send(self, data: bytes) -> Caller:
        """Send bytes, which end a turn of the broker."""
        self.connection.receive(data)
        self._desk.node.finish_turn()
        return self

    def take(self) -> list[Any]:
        """Return the methods and other frames that have come since the last time."""
        self._received += b"".join(self.connection.take_output())
        self.connection.wrote(0)
        return [
            decoded.method if isinstance(decoded, pika.frame.Method) else decoded
            for decoded in split(self._received)
        ]

    def ask(self, data: bytes | amqp_object.Method, channel: int = 1) -> list[Any]:
        """Send bytes, or a method, and return what comes back."""
        self.send(data if isinstance(data, bytes) else method(data, channel))
        return self.take()
