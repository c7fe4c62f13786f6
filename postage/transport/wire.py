# SPDX-License-Identifier: MIT
"""pika's connection, with a short way for messages.

Under load nearly all that a connection reads are deliveries and confirms. `Wire` decodes these
straight from what the socket gave (see `postage.transport.frames`) and calls who consumes, as
pika would at the end of its own, longer way. Whatever else comes, comes in pieces, or is not as
it should be, goes pika's way, frame by frame and in order: so a message that is half put
together stays with pika, and all errors are pika's. In the same way `WireChannel` encodes what
is published and acknowledged, and leaves to pika what it cannot.

pika has no public way to do that. `FITS` tells whether it is built as this module expects,
which a test says of each version; if not, a `Wire` is a plain connection of pika.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any

import pika
from pika import callback, spec
from pika import frame as pika_frames
from pika.channel import Channel

from postage.transport import frames

#: Bytes that are read from the socket at once. Of 4096, as in pika, one small message in nine
#: is cut in two.
READ_SIZE = 131_072
#: What a connection of pika has, beside its methods.
_ATTRIBUTES = (
    *("_channels", "callbacks", "bytes_received", "frames_received"),
    *("_adapter_emit_data", "_body_max_length", "bytes_sent", "frames_sent"),
)
#: Bytes that are written to the socket at once, if so many wait.
WRITE_SIZE = 65_536
#: Bytes that a transport gets as one entry. It copies what is left of one that it sent in part.
PORTION = 131_072


class Outgoing(collections.deque[bytes]):
    """What a transport has to send.

    pika's transport sends the entry in front, takes it out, and puts back what the socket did
    not take. Many small entries are one here when it looks. One that it has tried before only
    grows, as TLS demands (OpenSSL, SSL_write: a retry has the same bytes and no fewer).
    """

    def __getitem__(self, index: Any) -> Any:
        front = super().__getitem__(index)
        if index == 0 and len(self) > 1 and len(front) < WRITE_SIZE:
            size, parts = 0, []
            while self and size < WRITE_SIZE:
                parts.append(self.popleft())
                size += len(parts[-1])
            front = b"".join(parts)
            self.appendleft(front)
        return front


class WireChannel(Channel):
    """A channel of pika that writes messages and acknowledgements in one step each."""

    connection: Wire

    def basic_publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        properties: pika.BasicProperties | bytes | None = None,
        mandatory: bool = False,
    ) -> None:
        """Publish, as in pika.

        Args:
            properties: They may be encoded already, by `frames.encode_properties()`: once for
                a message that goes to many addresses.
        """
        message = self._encoded(exchange, routing_key, body, properties, mandatory)
        if message is not None:
            self.connection.emit(*message)
            return
        if isinstance(properties, bytes):
            decoded = pika.BasicProperties()
            decoded.decode(properties)
            properties = decoded
        super().basic_publish(exchange, routing_key, body, properties, mandatory)

    def _encoded(
        self, exchange: str, key: str, body: bytes, properties: Any, mandatory: bool
    ) -> tuple[bytes, int] | None:
        connection = self.connection
        if not (self.is_open and connection.fits):
            return None
        try:
            if not isinstance(properties, bytes):
                properties = frames.encode_properties(properties)
            limit = connection._body_max_length
            return frames.encode_message(
                self.channel_number, exchange, key, properties, body, mandatory, limit
            )
        except Exception:  # pika knows better, or says what is wrong
            return None

    def basic_ack(self, delivery_tag: int = 0, multiple: bool = False) -> None:
        """Acknowledge, as in pika."""
        if not (self.is_open and self.connection.fits):
            super().basic_ack(delivery_tag, multiple)
            return
        self.connection.emit(frames.encode_ack(self.channel_number, delivery_tag, multiple), 1)


class Wire(pika.SelectConnection):
    """A connection of pika that reads deliveries and confirms in one step each."""

    def __init__(self, *args: Any, **kwds: Any) -> None:
        self._parts: list[bytes] = []  # of a frame that is not whole
        self._lacking = 0  # bytes until it is
        self.fits = False
        super().__init__(*args, **kwds)

    def _proto_connection_made(self, transport: Any) -> None:
        self.fits = FITS and all(hasattr(self, each) for each in _ATTRIBUTES)
        transport._MAX_RECV_BYTES = READ_SIZE
        if self.params.ssl_options is None:  # with TLS bytes may wait where no poll sees them
            transport._MAX_CONSUME_BYTES = 1  # one read an event: a poll tells if there is more
        if type(getattr(transport, "_tx_buffers", None)) is collections.deque:
            transport._tx_buffers = Outgoing(transport._tx_buffers)
        super()._proto_connection_made(transport)

    def _create_channel(self, channel_number: int, on_open_callback: Any) -> Channel:
        return WireChannel(self, channel_number, on_open_callback)

    def emit(self, data: bytes, count: int) -> None:
        """Write the bytes of some frames, as soon as possible."""
        self.bytes_sent += len(data)
        self.frames_sent += count
        if len(data) <= PORTION:
            self._adapter_emit_data(data)
            return
        for start in range(0, len(data), PORTION):
            self._adapter_emit_data(data[start : start + PORTION])

    def _on_data_available(self, data_in: bytes) -> None:
        """Take what the socket gave. Called by pika's transport."""
        if not self.fits:
            super()._on_data_available(data_in)
            return
        buffer = data_in
        if self._parts:
            self._parts.append(data_in)
            self._lacking -= len(data_in)
            if self._lacking > 0:  # joined once, not at every piece of a large body
                return
            buffer = b"".join(self._parts)
            self._parts.clear()
        offset, size = 0, len(buffer)
        try:
            while offset < size:
                delivery = frames.decode_delivery(buffer, offset)
                if delivery is not None:
                    end, number, method, properties, body = delivery
                    channel = self._channels.get(number)
                    consumer = _consumer(channel, method.consumer_tag)
                    if consumer is not None:
                        self.bytes_received += end - offset
                        self.frames_received += 3 if body else 2
                        offset = end
                        consumer(channel, method, properties, body)
                        continue
                ack = frames.decode_ack(buffer, offset)
                if ack is not None:
                    confirmed = _listener(self.callbacks, ack)
                    if confirmed is not None:
                        self.bytes_received += frames.ACK_SIZE
                        self.frames_received += 1
                        offset += frames.ACK_SIZE
                        confirmed(ack)
                        continue
                end = frames.end_of_frame(buffer, offset)
                if end > size:
                    break
                start, offset = offset, end
                super()._on_data_available(buffer[start:end])
        finally:
            if offset < size:
                self._parts.append(buffer[offset:] if offset else buffer)
                self._lacking = frames.end_of_frame(buffer, offset) - size


def _consumer(channel: Channel | None, tag: str) -> Callable[..., None] | None:
    """Return whom pika would give a delivery to, if there is nothing else to be done about it."""
    if channel is None or tag in channel._cancelled:
        return None
    content = channel._content_assembler
    if content._method_frame or content._header_frame or content._body_fragments:
        return None  # a message is half put together
    consumer: Callable[..., None] | None = channel._consumers.get(tag)
    return consumer


def _listener(callbacks: Any, ack: Any) -> Callable[[Any], None] | None:
    """Return whom pika would give a confirm to, if it is one, and for good."""
    entries = callbacks._stack.get(str(ack.channel_number), {}).get(spec.Basic.Ack.NAME, ())
    if len(entries) != 1:
        return None
    [entry] = entries
    if entry["one_shot"] or entry["only"] is not None or entry["arguments"] is not None:
        return None
    listener: Callable[[Any], None] = entry["callback"]
    return listener


def _fits() -> bool:
    """Try what `Wire` relies on: messages and confirms that pika and we treat alike."""
    seen: list[Any] = []
    try:
        connection = types.SimpleNamespace(callbacks=callback.CallbackManager())
        channel = Channel(connection, 1, None)  # type: ignore[arg-type]
        channel._consumers["tag"] = seen.append
        connection.callbacks.add(1, spec.Basic.Ack, seen.append, False)
        deliver = spec.Basic.Deliver("tag", 1, False, "", "key")
        properties = spec.BasicProperties(headers={"a": 1, "b": "c", "d": True}, timestamp=1)
        ack = pika_frames.Method(1, spec.Basic.Ack(1, True))
        parts = (
            pika_frames.Method(1, deliver),
            pika_frames.Header(1, 4, properties),
            pika_frames.Body(1, b"body"),
        )
        message = b"".join(part.marshal() for part in parts)
        publish = pika_frames.Method(1, spec.Basic.Publish(0, "", "key", True))
        published = b"".join(part.marshal() for part in (publish, *parts[1:]))
        encoded = frames.encode_properties(properties)
        expected = (len(message), 1, deliver, properties, b"body")
        return (
            frames.decode_delivery(message, 0) == expected
            and frames.decode_ack(ack.marshal(), 0) == ack
            and frames.encode_message(1, "", "key", encoded, b"body", True, 4) == (published, 3)
            and frames.encode_ack(1, 1, True) == ack.marshal()
            and _consumer(channel, "tag") == _listener(connection.callbacks, ack) == seen.append
        )
    except Exception:
        return False


#: Whether pika is built as `Wire` expects.
FITS = _fits()
