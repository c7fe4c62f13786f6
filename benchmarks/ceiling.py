# SPDX-License-Identifier: MIT
"""The limit: what the broker itself manages, for a client that does next to nothing.

Frames are encoded before the clock starts and written to a plain socket; of what comes back,
frames are counted, and read no further than their kind. What is sent is what postage sends: the
envelope, its properties, persistent and mandatory, with confirms and a window.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pika
from pika import frame, spec

from benchmarks.broker import Job
from benchmarks.envelope import envelope, numbers
from benchmarks.measuring import Sample, Stopwatch

#: Messages without a confirm at a time, as many as a batch of postage has.
WINDOW = 2000
#: Messages, and bytes, that are written at once: fewer cost the broker more.
CHUNK, CHUNK_BYTES = 500, 1 << 20
#: Deliveries that are acknowledged together.
TOGETHER = 100
#: Bytes that are read at once.
READ = 1 << 18
#: Seconds that a broker may be silent.
DEADLINE_SECONDS = 60.0

#: AMQP 4.2.3: type, channel and size of a frame; then its payload, and one byte that ends it.
_HEADER = struct.Struct(">BHI")
_FRAME_BYTES = _HEADER.size + 1
#: The payload of an ack: class and method, delivery tag, and a bit, `multiple`.
_ACK = struct.Struct(">IQB")
#: The type of a frame that announces a content: there is one for each message.
_CONTENT = spec.FRAME_HEADER

#: RabbitMQ, direct reply-to: the address of the channel that a request is published on.
_REPLY_TO = "amq.rabbitmq.reply-to"


def properties() -> pika.BasicProperties:
    """Return properties such as a producer of postage sends."""
    return pika.BasicProperties(
        content_type="application/json",
        delivery_mode=2,
        message_id="0123456789abcdef0123456789abcdef-1",
        timestamp=int(time.time()),
        app_id="bench",
    )


def encoded(
    key: str,
    body: bytes | None = None,
    exchange: str = "",
    fields: pika.BasicProperties | None = None,
    mandatory: bool = True,
) -> bytes:
    """Return the frames of one message.

    Args:
        key: Its routing key.
        body: Its body; None: the envelope of all benchmarks.
        exchange: Its exchange.
        fields: Its properties; None: those of a message of postage.
        mandatory: Whether it comes back if it leads to no queue.
    """
    body = json.dumps(envelope(numbers(1)[0])).encode() if body is None else body
    method = spec.Basic.Publish(exchange=exchange, routing_key=key, mandatory=mandatory)
    return frame.Method(1, method).marshal() + _content(body, fields or properties())


def _content(body: bytes, fields: pika.BasicProperties) -> bytes:
    size = spec.FRAME_MAX_SIZE - _FRAME_BYTES
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    head: bytes = frame.Header(1, len(body), fields).marshal()
    return head + b"".join(frame.Body(1, part).marshal() for part in parts)


class Wire:
    """A plain socket with an open connection and one open channel."""

    def __init__(self, url: str) -> None:
        to: Any = pika.URLParameters(url)
        self._unread = b""
        self._socket = socket.create_connection((to.host, to.port), DEADLINE_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.send(frame.ProtocolHeader().marshal())
        self._expect(spec.Connection.Start)
        login = f"\0{to.credentials.username}\0{to.credentials.password}"
        start = spec.Connection.StartOk({}, "PLAIN", login, "en_US")
        tune = self.ask(start, spec.Connection.Tune, 0)
        self.tell(spec.Connection.TuneOk(tune.channel_max, tune.frame_max, heartbeat=0), 0)
        self.ask(spec.Connection.Open(to.virtual_host), spec.Connection.OpenOk, 0)
        self.ask(spec.Channel.Open(), spec.Channel.OpenOk)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_error: object) -> None:
        with contextlib.suppress(OSError):
            self.ask(spec.Connection.Close(200, "done", 0, 0), spec.Connection.CloseOk, 0)
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def tell(self, method: Any, channel: int = 1) -> None:
        self.send(frame.Method(channel, method).marshal())

    def ask(self, method: Any, answer: type[Any], channel: int = 1) -> Any:
        """Call a method, and return what is answered."""
        self.tell(method, channel)
        return self._expect(answer)

    def _expect(self, answer: type[Any]) -> Any:
        while True:
            head = self._receive(_HEADER.size, socket.MSG_WAITALL)
            size = _HEADER.unpack(head)[2]
            found: Any
            _, found = frame.decode_frame(head + self._receive(size + 1, socket.MSG_WAITALL))
            if isinstance(getattr(found, "method", None), answer):
                return found.method

    def frames(self, wait: bool = True) -> Iterator[tuple[int, memoryview]]:
        """Yield type and payload of the whole frames that have come.

        Args:
            wait: For some bytes, if there are none.
        """
        data = self._unread + self._receive(READ, 0 if wait else socket.MSG_DONTWAIT)
        view, start, end = memoryview(data), 0, len(data)
        while start + _FRAME_BYTES <= end:
            kind, _channel, size = _HEADER.unpack_from(data, start)
            if start + _FRAME_BYTES + size > end:
                break
            yield kind, view[start + _HEADER.size : start + _HEADER.size + size]
            start += _FRAME_BYTES + size
        self._unread = data[start:]

    def _receive(self, size: int, flags: int) -> bytes:
        try:
            data = self._socket.recv(size, flags)
        except BlockingIOError:
            return b""
        if not data:
            raise ConnectionError("the broker has closed the connection")
        return data


class _Confirms:
    """Counts what was confirmed: RabbitMQ confirms in any order, singly and up to a tag."""

    def __init__(self) -> None:
        self._up_to = 0
        self._ahead: set[int] = set()

    @property
    def count(self) -> int:
        return self._up_to + len(self._ahead)

    def note(self, payload: memoryview) -> None:
        method, tag, multiple = _ACK.unpack(payload)
        if method != spec.Basic.Ack.INDEX:
            raise RuntimeError(f"the broker did not confirm a message, but sent {method:#x}")
        if multiple:
            self._up_to = max(self._up_to, tag)
            self._ahead = {each for each in self._ahead if each > tag}
        else:
            self._ahead.add(tag)
        while self._up_to + 1 in self._ahead:
            self._up_to += 1
            self._ahead.remove(self._up_to)


def publish(job: Job, messages: Sequence[bytes] = ()) -> Sample:
    """Publish until the last confirm.

    Args:
        job: How many messages, and to which queue.
        messages: As `encoded()` makes them, to be sent in turn; by default one to the queue.
    """
    messages = messages or [encoded(job.queue)]
    together = max(1, min(CHUNK, CHUNK_BYTES // max(map(len, messages))))
    source = itertools.islice(itertools.cycle(messages), job.count)
    confirms = _Confirms()
    sent = 0
    with Wire(job.url) as wire:
        wire.ask(spec.Confirm.Select(), spec.Confirm.SelectOk)
        watch = Stopwatch(job.url)
        watch.start()
        while confirms.count < job.count:
            has_room = sent < job.count and sent - confirms.count <= WINDOW - together
            if has_room:
                chunk = list(itertools.islice(source, together))
                wire.send(b"".join(chunk))
                sent += len(chunk)
            for _kind, payload in wire.frames(wait=not has_room):
                confirms.note(payload)
        watch.stop()
    return watch.sample(job.count, "message")


def deliver(job: Job) -> Sample:
    """Receive messages and acknowledge them, many with one ack."""
    count = acknowledged = 0
    watch = Stopwatch(job.url)
    with Wire(job.url) as wire:
        _consume(wire, job.queue, job.prefetch)
        while count < job.count:
            for kind, _payload in wire.frames():
                count += kind == _CONTENT
            if acknowledged == 0 and count:
                first = count  # these came before the clock started
                watch.start()
            if count - acknowledged >= min(TOGETHER, job.prefetch) or count == job.count:
                wire.tell(spec.Basic.Ack(count, multiple=True))
                acknowledged = count
        watch.stop()
    return watch.sample(job.count - first, "message")


def _consume(wire: Wire, queue: str, prefetch: int = 0) -> None:
    wire.ask(spec.Basic.Qos(0, prefetch), spec.Basic.QosOk)
    consume = spec.Basic.Consume(0, queue, no_ack=not prefetch)
    wire.ask(consume, spec.Basic.ConsumeOk)


# -------------------------------------------------------------------------------- RPC
#
# All requests of a client differ in nothing but the correlation id, which has as many characters
# in each of them. So it lies at the same place of each, and so it does in the replies.


def _correlation_id(number: int) -> str:
    return f"{number:032}"


def serve(ready: Callable[[], None], job: Job) -> None:
    """Answer requests for ever, with a body that was encoded before."""
    with Wire(job.url) as wire:
        _consume(wire, job.queue, job.prefetch)
        ready()
        reply: _Form | None = None
        count = 0
        while True:
            replies = []
            for kind, payload in wire.frames():
                if kind == _CONTENT:
                    if reply is None:
                        fields, place = _read_request(bytes(payload))
                        reply = _Form(fields.reply_to, reply_to=None)
                    replies.append(reply.filled(payload[place]))
            if replies:
                count += len(replies)
                ack = frame.Method(1, spec.Basic.Ack(count, multiple=True)).marshal()
                wire.send(b"".join([*replies, ack]))


def call(job: Job) -> Sample:
    """Make calls, as many in flight as there are to be."""
    request = _Form(job.queue, reply_to=_REPLY_TO)
    requests = (request.filled(_correlation_id(n).encode()) for n in range(job.count))
    count = 0
    with Wire(job.url) as wire:
        _consume(wire, _REPLY_TO)
        watch = Stopwatch(job.url)
        watch.start()
        wire.send(b"".join(itertools.islice(requests, job.in_flight)))
        while count < job.count:
            replies = sum(kind == _CONTENT for kind, _payload in wire.frames())
            count += replies
            wire.send(b"".join(itertools.islice(requests, replies)))
        watch.stop()
    return watch.sample(job.count, "call")


class _Form:
    """An encoded message in which the correlation id is left open."""

    def __init__(self, key: str, reply_to: str | None) -> None:
        fields = properties()
        fields.delivery_mode = 1
        fields.reply_to = reply_to
        fields.correlation_id = blank = _correlation_id(0)
        # RabbitMQ returns what is mandatory and goes to the address of a direct reply.
        message = encoded(key, fields=fields, mandatory=reply_to is not None)
        self._before, _, self._after = message.partition(blank.encode())

    def filled(self, correlation_id: bytes | memoryview) -> bytes:
        return b"".join((self._before, correlation_id, self._after))


def _read_request(payload: bytes) -> tuple[pika.BasicProperties, slice]:
    """Return the properties of the first request, and where the correlation id lies in all."""
    head = _HEADER.pack(_CONTENT, 1, len(payload)) + payload + bytes([spec.FRAME_END])
    content: Any = frame.decode_frame(head)[1]
    fields: pika.BasicProperties = content.properties
    start = payload.index(fields.correlation_id.encode())
    return fields, slice(start, start + len(fields.correlation_id))
