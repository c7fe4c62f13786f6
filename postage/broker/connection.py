# SPDX-License-Identifier: MIT
"""A connection: bytes in, bytes out (AMQP 0-9-1, section 2.2 and class connection).

It holds no socket. The edge gives it what has come, takes what is to be sent, and tells it
when the peer is slow or gone.
"""

from __future__ import annotations

import enum
import hmac
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pika import amqp_object, spec

from postage.broker import channel as channels
from postage.broker import declarations, fields, frames, transactions
from postage.broker.channel import Channel, unexpected
from postage.broker.clock import Timer
from postage.broker.errors import (
    ACCESS_REFUSED,
    CHANNEL_ERROR,
    COMMAND_INVALID,
    CONNECTION_FORCED,
    INTERNAL_ERROR,
    NOT_ALLOWED,
    SYNTAX_ERROR,
    UNEXPECTED_FRAME,
    Refusal,
)

if TYPE_CHECKING:
    from postage.broker.node import Node
    from postage.broker.vhost import VirtualHost

logger = logging.getLogger(__name__)

CHANNEL_MAX = 2047
FRAME_MAX = 131_072
#: No client may ask for less (AMQP 0-9-1, frame-min-size), and none gets more before it has.
FRAME_MIN = 4_096
HEARTBEAT_SECONDS = 60
#: Seconds for the handshake, and for the answer to connection.close.
HANDSHAKE_SECONDS = 10.0
CLOSE_SECONDS = 10.0
#: Bytes that may wait for a slow reader before its consumers get no more.
ROOM = 1 << 20
#: Bytes that may wait for a slow reader before its direct replies are dropped.
REPLY_ROOM = 64 << 20

CAPABILITIES = {
    "publisher_confirms": True,
    "exchange_exchange_bindings": True,
    "basic.nack": True,
    "consumer_cancel_notify": True,
    "connection.blocked": True,
    "consumer_priorities": True,
    "authentication_failure_close": True,
    "per_consumer_qos": True,
    "direct_reply_to": True,
}


class Phase(enum.Enum):
    """How far a connection is."""

    GREETING = "waits for the protocol header"
    STARTING = "waits for the login"
    TUNING = "waits for connection.tune-ok"
    OPENING = "waits for connection.open"
    OPEN = "open"
    CLOSING = "waits for connection.close-ok"
    CLOSED = "closed"


class Connection:
    """The broker's end of a connection.

    Args:
        node: the broker.
        peer: the address of the client, for the log.

    Attributes:
        phase: how far it is.
        is_blocked: it has published during an alarm, and is not heard until that ends.
        unfinished: bytes of messages of which the end has not come, or that are not committed.
    """

    def __init__(self, node: Node, peer: str) -> None:
        self.node = node
        self.peer = peer
        self.phase = Phase.GREETING
        self.user = ""
        self.vhost: VirtualHost | None = None
        self.properties: Mapping[str, Any] = {}
        self.channels: dict[int, Channel] = {}
        self.is_blocked = False
        self.unfinished = 0
        self._reader = frames.FrameReader(FRAME_MIN + frames.OVERHEAD)
        self._outgoing: list[bytes] = []
        self._outgoing_size = 0
        #: Bytes that the edge could not write yet.
        self._unwritten = 0
        self._frame_max = FRAME_MIN
        self._channel_max = CHANNEL_MAX
        self._heartbeat = 0.0
        self._last_received = node.clock.now()
        self._timer: Timer = node.clock.call_later(HANDSHAKE_SECONDS, self._give_up)

    def __repr__(self) -> str:
        phase = self.phase.name.lower()
        return f"<Connection {self.peer} [{phase}, {len(self.channels)} channels]>"

    # The edge

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer, and do what they ask for."""
        self._last_received = self.node.clock.now()
        self._reader.feed(data)
        self.advance()

    def advance(self) -> None:
        """Handle what has come, for as long as it may be handled."""
        if self.phase is Phase.GREETING and not self._greet():
            return
        if not self.may_advance:
            return
        incoming = self._reader.frames()
        try:
            for frame in incoming:
                self._handle(frame)
                if not self.may_advance:
                    return
        except Refusal as refusal:
            self.close(refusal)
        finally:
            incoming.close()

    @property
    def may_advance(self) -> bool:
        """Whether more of what has come may be handled now."""
        if self.phase is Phase.CLOSED or self.node.is_stalled:
            return False
        return self.phase is Phase.CLOSING or (not self.is_blocked and self.has_room)

    @property
    def wants_input(self) -> bool:
        """Whether more bytes should be read: heartbeats come even where nothing is handled."""
        return (
            self.phase is not Phase.CLOSED
            and not self.node.is_stalled
            and len(self._reader) < ROOM
        )

    @property
    def is_finished(self) -> bool:
        """Whether the socket can be closed once all is written."""
        return self.phase is Phase.CLOSED

    @property
    def has_room(self) -> bool:
        """Whether the peer reads fast enough for more."""
        return self._outgoing_size + self._unwritten < ROOM

    @property
    def has_room_for_replies(self) -> bool:
        """Whether direct replies may be sent, which wait nowhere else."""
        return self._outgoing_size + self._unwritten < REPLY_ROOM

    def take_output(self) -> list[bytes]:
        """Return what is to be written, and count it as unwritten until `wrote` says otherwise."""
        data, self._outgoing = self._outgoing, []
        self._unwritten += self._outgoing_size
        self._outgoing_size = 0
        return data

    def wrote(self, unwritten: int) -> None:
        """Take note of how many bytes the peer has yet to read."""
        had_room = self.has_room
        self._unwritten = unwritten
        if not had_room and self.has_room:
            for channel in tuple(self.channels.values()):
                channel.dispatch()
            self.advance()

    def lost(self) -> None:
        """Give back what the client had, after the socket was closed for whatever reason."""
        if self.phase is Phase.OPEN:
            logger.info("%s: client unexpectedly closed TCP connection", self.peer)
        self._timer.cancel()
        self.phase = Phase.CLOSED
        self._release()
        self.node.forget(self)

    # Sending

    def send(self, data: bytes) -> None:
        """Send a frame."""
        self._outgoing.append(data)
        self._outgoing_size += len(data)
        self.node.dirty[self] = None

    def send_content(self, method: bytes, number: int, encoded: bytes, body: bytes) -> None:
        """Send a message, after the frame of the method that carries it."""
        pieces = frames.content(number, encoded, body, self._frame_max)
        self._outgoing.append(method)
        self._outgoing += pieces
        self._outgoing_size += len(method) + sum(map(len, pieces))
        self.node.dirty[self] = None

    def knows(self, capability: str) -> bool:
        """Tell whether the client said that it knows an extension of RabbitMQ."""
        capabilities = self.properties.get("capabilities")
        return isinstance(capabilities, dict) and capabilities.get(capability) is True

    # Receiving

    def _greet(self) -> bool:
        header = self._reader.take(len(frames.PROTOCOL_HEADER))
        if header is None:
            return False
        if header != frames.PROTOCOL_HEADER:
            # AMQP 0-9-1, 4.2.2: say what is spoken here, and hang up.
            self.send(frames.PROTOCOL_HEADER)
            self._finish()
            return False
        self.phase = Phase.STARTING
        properties = {
            "product": "postage broker",
            "version": self.node.version,
            "platform": "Python",
            "information": "A development broker. Production belongs on RabbitMQ.",
            "capabilities": CAPABILITIES,
            "cluster_name": "postage",
        }
        self._send(spec.Connection.Start(0, 9, properties, "PLAIN AMQPLAIN", "en_US"))
        return True

    def _send(self, method: amqp_object.Method) -> None:
        self.send(frames.method(0, method))

    def _handle(self, frame: frames.Frame) -> None:
        """Handle a frame. What it asks for in vain ends its channel, or the connection."""
        method: amqp_object.Method | None = None
        try:
            method = frames.method_of(frame)
            if frame.type == frames.HEARTBEAT:
                return
            if frame.channel == 0:
                self._handle_own(frame, method)
            else:
                self._handle_channel(frame, method)
        except Refusal as refusal:
            self._refuse(refusal, frame)
        except Exception as error:
            logger.exception("the broker failed on a frame of %s", self.peer)
            self._refuse(Refusal(INTERNAL_ERROR, repr(error)), frame)
        # Those of a circle get no more than their part of a turn.
        if self.vhost is not None and not self.node.has_more:
            self.vhost.publish_dead_letters()

    def _refuse(self, refusal: Refusal, frame: frames.Frame) -> None:
        channel = self.channels.get(frame.channel)
        cause = frames.kind_of(frame)
        if refusal.closes_connection or channel is None:
            self.close(refusal, cause)
        else:
            self.close_channel(channel, refusal, cause)

    def _handle_own(self, frame: frames.Frame, method: amqp_object.Method | None) -> None:
        if method is None:
            raise Refusal(UNEXPECTED_FRAME, "a message on channel 0")
        if self.phase is Phase.CLOSING:
            if isinstance(method, spec.Connection.CloseOk):
                self._finish()
            elif isinstance(method, spec.Connection.Close):
                self._send(spec.Connection.CloseOk())
            return
        if isinstance(method, spec.Connection.Close):
            self._release()
            self._send(spec.Connection.CloseOk())
            self._finish()
            return
        handler = _OWN.get((self.phase, type(method)))
        if handler is None:
            state = "running" if self.phase is Phase.OPEN else self.phase.name.lower()
            raise Refusal(CHANNEL_ERROR, f"unexpected method in connection state {state}")
        handler(self, method)

    def _handle_channel(self, frame: frames.Frame, method: amqp_object.Method | None) -> None:
        if self.phase is Phase.CLOSING:
            return
        if self.phase is not Phase.OPEN or self.vhost is None:
            raise Refusal(UNEXPECTED_FRAME, f"channel {frame.channel} before connection.open")
        channel = self.channels.get(frame.channel)
        if channel is None:
            self._open_channel(frame, method, self.vhost)
        elif channel.is_closing:
            self._wait_for_close(channel, method)
        elif method is not None:
            self._handle_method(channel, method, frame.payload)
        elif channel.due == "method":
            self.close(unexpected("method"))
        elif frame.type == frames.HEADER:
            channel.content_header(frame.payload)
            self._block_publisher()
        else:
            channel.content_body(frame.payload)
            self._block_publisher()

    def _handle_method(self, channel: Channel, method: amqp_object.Method, payload: bytes) -> None:
        if channel.due != "method":
            raise unexpected(channel.due)
        if isinstance(method, spec.Channel.Close):
            channel.send_confirms()
            channel.close()
            del self.channels[channel.number]
            channel.send(spec.Channel.CloseOk())
            return
        if isinstance(method, spec.Channel.Open):
            raise Refusal(CHANNEL_ERROR, "second 'channel.open' seen")
        handler = _METHODS.get(type(method))
        if handler is None:
            raise Refusal(COMMAND_INVALID, "unimplemented method")
        handler(channel, method, payload)

    def _open_channel(
        self, frame: frames.Frame, method: amqp_object.Method | None, vhost: VirtualHost
    ) -> None:
        if method is None:
            raise unexpected("method")
        if not isinstance(method, spec.Channel.Open):
            raise Refusal(CHANNEL_ERROR, "expected 'channel.open'")
        if len(self.channels) >= self._channel_max:  # RabbitMQ, too, takes any number for one
            text = (
                f"number of channels opened ({len(self.channels)}) has reached the negotiated "
                f"channel_max ({self._channel_max})"
            )
            self.close(Refusal(NOT_ALLOWED, text))
            return
        channel = self.channels[frame.channel] = Channel(self, frame.channel, vhost)
        channel.send(spec.Channel.OpenOk())

    def _wait_for_close(self, channel: Channel, method: amqp_object.Method | None) -> None:
        """Throw away what the client sent before it knew that its channel is closed."""
        if isinstance(method, spec.Channel.Close):
            channel.send(spec.Channel.CloseOk())
        elif isinstance(method, spec.Channel.CloseOk):
            del self.channels[channel.number]

    # The handshake

    def _log_in(self, method: spec.Connection.StartOk) -> None:
        self.properties = method.client_properties or {}
        reader = _MECHANISMS.get(method.mechanism)
        if reader is None:
            self._hang_up(f"unknown login mechanism '{method.mechanism}'")
            return
        user, password = reader(method.response)
        wanted = self.node.users.get(user)
        given = password.encode("utf-8", "surrogateescape")
        if wanted is None or not hmac.compare_digest(wanted.encode("utf-8"), given):
            logger.warning("%s: login of user %r refused", self.peer, user)
            if not self.knows("authentication_failure_close"):
                self._finish()
                return
            self.close(
                Refusal(
                    ACCESS_REFUSED,
                    f"Login was refused using authentication mechanism {method.mechanism}. For "
                    "details see the broker logfile.",
                )
            )
            return
        self.user = user
        self.phase = Phase.TUNING
        self._send(spec.Connection.Tune(CHANNEL_MAX, FRAME_MAX, HEARTBEAT_SECONDS))

    def _tune(self, method: spec.Connection.TuneOk) -> None:
        trouble = _out_of_range("frame_max", method.frame_max, FRAME_MIN, FRAME_MAX)
        trouble = trouble or _out_of_range("channel_max", method.channel_max, 1, CHANNEL_MAX)
        if trouble is not None:
            self._hang_up(trouble)
            return
        self._frame_max = method.frame_max
        self._channel_max = method.channel_max
        self._heartbeat = float(method.heartbeat)
        self._reader.max_size = self._frame_max + frames.OVERHEAD
        self.phase = Phase.OPENING

    def _open(self, method: spec.Connection.Open) -> None:
        vhost = self.node.vhosts.get(method.virtual_host)
        if vhost is None:
            raise Refusal(NOT_ALLOWED, f"vhost {method.virtual_host} not found")
        self.vhost = vhost
        self.phase = Phase.OPEN
        self._timer.cancel()
        self._send(spec.Connection.OpenOk())
        if self._heartbeat:
            self._timer = self.node.clock.call_later(self._heartbeat / 2, self._beat)

    def _update_secret(self, method: spec.Connection.UpdateSecret) -> None:
        self._send(spec.Connection.UpdateSecretOk())

    def _give_up(self) -> None:
        self._hang_up(f"{self.phase.value} for too long")

    def _hang_up(self, reason: str) -> None:
        """End the connection without a word to the client, as RabbitMQ does in a handshake."""
        logger.warning("%s: %s", self.peer, reason)
        self._finish()

    # Heartbeats

    def _beat(self) -> None:
        """Send a heartbeat, unless more waits to be sent, and look for those of the peer."""
        if not self.wants_input:
            self.excuse()
        if self.node.clock.now() - self._last_received > 2 * self._heartbeat:
            logger.warning("%s: missed heartbeats, timeout: %gs", self.peer, self._heartbeat)
            self._release()
            self._finish()
            return
        if not self._outgoing and not self._unwritten:
            self.send(frames.HEARTBEAT_FRAME)
        self._timer = self.node.clock.call_later(self._heartbeat / 2, self._beat)

    # Alarms

    def _block_publisher(self) -> None:
        """Read no more from a client that publishes, while the broker is short of something."""
        if self.node.alarm is not None and not self.is_blocked:
            self.is_blocked = True
            if self.knows("connection.blocked"):
                self._send(spec.Connection.Blocked(self.node.alarm))

    def unblock(self) -> None:
        """Read again from a client that was blocked."""
        if self.is_blocked:
            self.is_blocked = False
            if self.knows("connection.blocked"):
                self._send(spec.Connection.Unblocked())
            self.excuse()
            self.advance()

    def excuse(self) -> None:
        """Do not miss the heartbeats of a time in which nothing was read."""
        self._last_received = self.node.clock.now()

    # The end

    def close(self, refusal: Refusal, cause: frames.Kind | None = None) -> None:
        """Close the connection for a reason that the client is told."""
        if self.phase in (Phase.CLOSING, Phase.CLOSED):
            return
        logger.info("%s: closing the connection: %s", self.peer, refusal)
        if self.phase is Phase.GREETING:
            self._finish()
            return
        self._release()
        class_id, method_id = _index_of(cause)
        self._send(spec.Connection.Close(refusal.code, _cut(refusal), class_id, method_id))
        self.phase = Phase.CLOSING
        self._timer.cancel()
        self._timer = self.node.clock.call_later(CLOSE_SECONDS, self._finish)

    def close_channel(
        self, channel: Channel, refusal: Refusal, cause: frames.Kind | None = None
    ) -> None:
        """Close a channel for a reason that the client is told."""
        logger.info("%s: closing channel %d: %s", self.peer, channel.number, refusal)
        channel.send_confirms()
        channel.close()
        channel.is_closing = True
        class_id, method_id = _index_of(cause)
        channel.send(spec.Channel.Close(refusal.code, _cut(refusal), class_id, method_id))

    def force_close(self, code: int = CONNECTION_FORCED, text: str = "broker forced it") -> bool:
        """Close the connection on behalf of whoever runs the broker, unless it ends already."""
        is_ending = self.phase in (Phase.CLOSING, Phase.CLOSED)
        self.close(Refusal(code, text))
        return not is_ending

    def check_timeouts(self, limit: float) -> None:
        """Close the channels in which a delivery is unsettled for too long, in seconds."""
        for channel in tuple(self.channels.values()):
            try:
                channel.check_timeout(limit)
            except Refusal as refusal:
                self.close_channel(channel, refusal)

    def _release(self) -> None:
        open_channels = list(self.channels.values())
        self.channels.clear()
        for channel in open_channels:
            if not channel.is_closing:
                channel.close()
                channel.is_closing = True
        if self.vhost is not None:
            self.vhost.disown(self)
            self.vhost.publish_dead_letters()

    def _finish(self) -> None:
        """Let the edge close the socket."""
        self._timer.cancel()
        self.phase = Phase.CLOSED
        self.node.dirty[self] = None


def _read_plain(response: bytes) -> tuple[str, str]:
    """Take apart a response of mechanism PLAIN (RFC 4616)."""
    parts = response.split(b"\x00")
    if len(parts) != 3:
        raise Refusal(SYNTAX_ERROR, "invalid response of mechanism PLAIN")
    return parts[1].decode("utf-8", "replace"), parts[2].decode("utf-8", "surrogateescape")


def _read_amqplain(response: bytes) -> tuple[str, str]:
    """Take apart a response of mechanism AMQPLAIN: a table without its length."""
    try:
        table = fields.split(len(response).to_bytes(4, "big") + response)[0]
        user, password = fields.decode(table["LOGIN"]), fields.decode(table["PASSWORD"])
    except (KeyError, fields.FieldError):
        raise Refusal(SYNTAX_ERROR, "invalid response of mechanism AMQPLAIN") from None
    return str(user), str(password)


def _out_of_range(name: str, value: int, lowest: int, highest: int) -> str | None:
    """Say what is wrong with an answer to connection.tune, None if nothing is."""
    unit = " octets" if name == "frame_max" else ""
    if 0 < value < lowest:
        return (
            f"negotiated {name} = {value}{unit} is lower than the minimum allowed value "
            f"({lowest}{unit})"
        )
    if value == 0 or value > highest:
        return (
            f"negotiated {name} = {value}{unit} is higher than the maximum allowed value "
            f"({highest}{unit})"
        )
    return None


def _index_of(kind: frames.Kind | None) -> tuple[int, int]:
    return divmod(kind.INDEX or 0, 1 << 16) if kind is not None else (0, 0)


def _cut(refusal: Refusal) -> str:
    """Return the text of a refusal as far as a short string holds it."""
    return str(refusal).encode("utf-8", "replace")[:255].decode("utf-8", "ignore")


#: What a connection does with the methods of channel 0, depending on how far it is.
_OWN: dict[tuple[Phase, type[amqp_object.Method]], Callable[[Connection, Any], None]] = {
    (Phase.STARTING, spec.Connection.StartOk): Connection._log_in,
    (Phase.TUNING, spec.Connection.TuneOk): Connection._tune,
    (Phase.OPENING, spec.Connection.Open): Connection._open,
    (Phase.OPEN, spec.Connection.UpdateSecret): Connection._update_secret,
}
_METHODS = {**channels.HANDLERS, **declarations.HANDLERS, **transactions.HANDLERS}
_MECHANISMS = {"PLAIN": _read_plain, "AMQPLAIN": _read_amqplain}
