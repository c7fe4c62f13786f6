# SPDX-License-Identifier: MIT
"""A synchronous AMQP client that hides nothing, and the stage on which it plays a scenario.

A `Stage` gives connections to one virtual host and writes down the dialogue as lines of text.
`1.2 >` is what channel 2 of connection 1 sends, `1.2 <` what the broker answers there.
Two brokers agree on a scenario if the dialogues are equal. So nothing may be in one that differs
from run to run: server-generated names become numbered ones, times of the broker become `now`,
and what may come in any order is awaited by `take_any_order`.

A scenario is sure to see everything, whatever the load of the machine, since it says how many
events it awaits. What comes beyond that is looked for at its end, and written down as well.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from pika import amqp_object, frame, spec

from tests.broker.differential import codec

#: Seconds until something that must come counts as missing.
DEADLINE_SECONDS = 10.0

#: Seconds without an event, after which nothing is taken to be on its way.
QUIET_SECONDS = 0.01

#: Seconds between two looks at what cannot be awaited, such as a number of messages.
POLL_SECONDS = 0.005

#: What the broker sends by itself. All else answers what the client sent last.
UNASKED = {
    "basic.ack",
    "basic.cancel",
    "basic.deliver",
    "basic.nack",
    "basic.return",
    "connection.blocked",
    "connection.unblocked",
}

#: What a client says that it can do, so that it sees all that RabbitMQ would tell it.
CAPABILITIES = {
    "authentication_failure_close": True,
    "basic.nack": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
    "publisher_confirms": True,
}

#: A method that changes nothing and is answered. (basic.qos would lift a global prefetch.)
NOTHING = spec.Channel.Flow(active=True)

#: Names that the broker makes, and what they are called in a dialogue.
GENERATED = re.compile(r"(amq\.gen|amq\.ctag|amq\.rabbitmq\.reply-to)([-.][\w+/=.-]{8,})")

#: How a virtual host is called in a dialogue.
VHOST = "VHOST"


class Silence(Exception):
    """What had to come did not, or the connection has ended."""


@dataclass(frozen=True)
class Event:
    """What the broker sent on a channel: a method, with its content if it has one."""

    channel: int
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    properties: dict[str, Any] | None = None
    body: bytes = b""

    def __str__(self) -> str:
        if self.name.endswith(".close"):
            return _describe_close(self.name, self.arguments)
        words = [self.name, *_describe_arguments(self.arguments)]
        if self.properties is not None:
            words.append(_describe_content(self.properties, self.body))
        return " ".join(words)

    def __getitem__(self, name: str) -> Any:
        if name not in self.arguments:
            raise Silence(f"{name} expected, got {self}")
        return self.arguments[name]

    @property
    def headers(self) -> dict[str, Any]:
        """The headers of the message."""
        return dict((self.properties or {}).get("headers", {}))


class Stage:
    """Connections to one virtual host, and the dialogue with its broker."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.vhost = unquote(urlsplit(url).path[1:])
        self.lines: list[str] = []
        self.clients: list[Client] = []
        #: What the clients may have made: the methods that delete it.
        self._made: dict[tuple[str, str], amqp_object.Method] = {}
        self._names: dict[str, str] = {}
        self._inspector: Channel | None = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for client in self.clients:
            client.close()
        self._delete_all()
        if self._inspector is not None:
            self._inspector.client.close()

    # What a scenario uses

    def dial(self) -> Client:
        """Return a connection that has not said a word yet."""
        client = Client(self, len(self.clients) + 1)
        self.clients.append(client)
        return client

    def connect(self, **options: Any) -> Client:
        """Return an open connection; see `Client.shake_hands`."""
        client = self.dial()
        client.shake_hands(**options)
        return client

    def open(self, *, confirm: bool = False) -> Channel:
        """Return a new channel on the first connection."""
        client = self.clients[0] if self.clients else self.connect()
        return client.open(confirm=confirm)

    def note(self, text: object) -> None:
        """Write a line into the dialogue."""
        self.lines.append(self.normalise(str(text)).replace("\n", "\\n"))

    def count(self, queue: str, messages: int, consumers: int = 0) -> None:
        """Note how many messages and consumers a queue has; wait until they are that many."""
        wanted = f"{messages} messages, {consumers} consumers"
        seen = self._poll(lambda: self.look_at(queue), wanted.__eq__)
        self.note(f"      {queue}: {seen}")

    def note_counts(self, queue: str) -> None:
        """Note how many messages and consumers a queue has at this moment."""
        self.note(f"      {queue}: {self.look_at(queue)}")

    def look_at(self, queue: str) -> str:
        """Return how many messages and consumers a queue has, in words."""
        reply = self.inspector.ask(spec.Queue.Declare(queue=queue, passive=True))
        if reply.name != "queue.declare-ok":
            return str(reply)
        return f"{reply['message_count']} messages, {reply['consumer_count']} consumers"

    def drain(self, queue: str, messages: int) -> list[Event]:
        """Take all messages of a queue, note them, and wait until they are that many."""
        taken: list[Event] = []

        def take_all() -> int:
            channel = self.inspector
            while (
                event := channel.ask(spec.Basic.Get(queue=queue, no_ack=True))
            ).properties is not None:
                taken.append(event)
            if event.name != "basic.get-empty":
                raise Silence(f"{queue}: {event}")
            return len(taken)

        self._poll(take_all, lambda count: count >= messages)
        for event in taken:
            redelivered = "redelivered " if event["redelivered"] else ""
            origin = f"{event['exchange']!r} {event['routing_key']!r}"
            content = _describe_content(event.properties or {}, event.body)
            self.note(f"      {queue}: {redelivered}{origin} {content}")
        if not taken:
            self.note(f"      {queue}: no message")
        return taken

    def gone(self, queue: str) -> None:
        """Wait until a queue does not exist."""

        def is_gone() -> bool:
            # Unlike a passive declaration, a binding does not count as a use of the queue.
            reply = self.inspector.ask(spec.Queue.Bind(0, queue, "amq.direct", "probe"))
            return reply.arguments.get("reply_code") == spec.NOT_FOUND

        seen = self._poll(is_gone, bool)
        self.note(f"      {queue}: {'gone' if seen else 'is still there'}")

    def settle(self) -> None:
        """Note what came unawaited, once all channels have nothing more to say."""
        for client in self.clients:
            client.settle()

    # What only the classes below use

    @property
    def inspector(self) -> Channel:
        """A channel of a connection of its own, which writes no lines."""
        if self._inspector is None or not self._inspector.is_open:
            client = self._inspector.client if self._inspector else Client(self, 0)
            if self._inspector is None:
                client.shake_hands()
            self._inspector = client.open()
        return self._inspector

    def remember_queue(self, name: str) -> None:
        """Delete this queue in the end: the next scenario begins with an empty virtual host."""
        self._made["queue", name] = spec.Queue.Delete(queue=name)

    def remember_exchange(self, name: str) -> None:
        """Delete this exchange in the end."""
        if name and not name.startswith("amq."):
            self._made["exchange", name] = spec.Exchange.Delete(exchange=name)

    def normalise(self, text: str) -> str:
        """Return the text without what differs from run to run."""
        text = GENERATED.sub(self._number, text)
        return re.sub(rf"(vhost[ =]'?){re.escape(self.vhost)}(?=['\s])", rf"\1{VHOST}", text)

    def _delete_all(self) -> None:
        def deleted(method: amqp_object.Method) -> bool:
            # An exclusive queue is locked (405) until its connection has ended all the way.
            return self.inspector.ask(method).arguments.get("reply_code") != spec.RESOURCE_LOCKED

        for method in self._made.values():
            self._poll(partial(deleted, method), bool)

    def _number(self, match: re.Match[str]) -> str:
        return self._names.setdefault(match[0], f"{match[1]}-{len(self._names) + 1}")

    def _poll(self, look: Callable[[], Any], is_right: Callable[[Any], bool]) -> Any:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not is_right(seen := look()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return seen


class Client:
    """One connection. Its number is 0 if the dialogue must not mention it."""

    def __init__(self, stage: Stage, number: int) -> None:
        self.stage = stage
        self.number = number
        self.is_open = True
        self._is_ready = False
        parts = urlsplit(stage.url)
        self._socket = socket.create_connection((parts.hostname, parts.port or 5672))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        self._content: dict[int, tuple[Event, int]] = {}
        #: How many heartbeats came.
        self.heartbeats = 0
        #: How many bytes the longest frame had, with its head and its end.
        self.longest_frame = 0
        self.channels: dict[int, Channel] = {}
        self.control = self.channel(0)

    def shake_hands(
        self,
        *,
        user: str = "guest",
        password: str = "guest",
        vhost: str | None = None,
        capabilities: dict[str, Any] = CAPABILITIES,
        frame_max: int = 131072,
        channel_max: int = 2047,
        heartbeat: int = 0,
    ) -> Event:
        """Open the connection, and return what the broker says in the end."""
        self.write(frame.ProtocolHeader().marshal())
        self.control.next_event()
        response = f"\0{user}\0{password}"
        start_ok = spec.Connection.StartOk({"capabilities": capabilities}, response=response)
        if (event := self.control.ask(start_ok)).name != "connection.tune":
            return event
        self.control.send(spec.Connection.TuneOk(channel_max, frame_max, heartbeat))
        event = self.control.ask(spec.Connection.Open(self.stage.vhost if vhost is None else vhost))
        self._is_ready = event.name == "connection.open-ok"
        return event

    def channel(self, number: int) -> Channel:
        """Return a channel of that number, which is new and was not opened."""
        self.channels[number] = Channel(self, number)
        return self.channels[number]

    def open(self, number: int | None = None, *, confirm: bool = False) -> Channel:
        """Return an open channel, in confirm mode if asked."""
        channel = self.channel(number or max(self.channels) + 1)
        channel.ask(spec.Channel.Open())
        if confirm:
            channel.ask(spec.Confirm.Select())
            channel.is_confirming = True
        return channel

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        # The broker may be gone; what it said before is still to be read.
        with contextlib.suppress(OSError):
            self._socket.sendall(data)

    def write_frame(self, frame_type: int, channel: int, payload: bytes, end: int = 0xCE) -> None:
        """Send a frame, be it sound or not."""
        head = struct.pack(">BHI", frame_type, channel, len(payload))
        self.write(head + payload + bytes([end]))

    def read(self, timeout: float) -> bool:
        """Take in what comes within so many seconds, and return whether anything came."""
        if not self.is_open:
            return False
        self._socket.settimeout(max(timeout, 0.001))
        try:
            data = self._socket.recv(1 << 20)
        except TimeoutError:
            return False
        except OSError:  # reset: the broker closed, with bytes of ours unread
            data = b""
        finally:
            self._socket.settimeout(None)
        if not data:
            self._end()
        self._buffer += data
        self._take_frames()
        return True

    def ended(self) -> None:
        """Note that the broker has closed the socket; wait until it has."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.is_open and time.monotonic() < deadline:
            self.read(deadline - time.monotonic())
        self.stage.note(f"{self.number}   {'is still open' if self.is_open else 'end of stream'}")

    def settle(self) -> None:
        """Note what came unawaited."""
        for channel in [c for c in self.channels.values() if c.is_open and c.number]:
            with contextlib.suppress(Silence):
                channel.sync()
        while self.read(QUIET_SECONDS):
            pass
        for channel in self.channels.values():
            channel.note_all()

    def cut(self) -> None:
        """Close the socket without a word, as a process does that is killed."""
        self.is_open = False
        self._socket.close()

    def close(self) -> None:
        """End the connection in good order, if it ever was in one."""
        if self.is_open and self.control.is_open and self._is_ready:
            with contextlib.suppress(Silence):
                self.control.ask(spec.Connection.Close(200, "bye", 0, 0))
        self.cut()

    def _end(self) -> None:
        self._socket.close()
        self.is_open = False
        for channel in self.channels.values():
            channel.is_open = False

    def _take_frames(self) -> None:
        while len(self._buffer) >= 7:
            if self._buffer[:4] == b"AMQP":  # the broker speaks another version
                self._receive(Event(0, f"protocol header {bytes(self._buffer[4:8])!r}"))
                del self._buffer[:8]
                continue
            frame_type, number, size = struct.unpack_from(">BHI", self._buffer)
            if len(self._buffer) < size + 8:
                return
            payload = bytes(self._buffer[7 : size + 7])
            self.longest_frame = max(self.longest_frame, size + 8)
            assert self._buffer[size + 7] == spec.FRAME_END, "a frame without its end"
            del self._buffer[: size + 8]
            self._take_frame(frame_type, number, payload)

    def _take_frame(self, frame_type: int, number: int, payload: bytes) -> None:
        if frame_type == spec.FRAME_METHOD:
            event = _decode_method(number, payload)
            if event.name in ("basic.deliver", "basic.get-ok", "basic.return"):
                self._content[number] = event, -1
            else:
                self._receive(event)
        elif frame_type == spec.FRAME_HEADER:
            event, _ = self._content[number]
            (size,) = struct.unpack_from(">Q", payload, 4)
            properties = codec.decode_properties(payload[12:])
            event = Event(number, event.name, event.arguments, properties)
            self._take_content(event, size)
        elif frame_type == spec.FRAME_BODY:
            event, missing = self._content[number]
            body = event.body + payload
            event = Event(number, event.name, event.arguments, event.properties, body)
            self._take_content(event, missing - len(payload))
        else:
            assert frame_type == spec.FRAME_HEARTBEAT, f"a frame of type {frame_type}"
            self.heartbeats += 1

    def _take_content(self, event: Event, missing: int) -> None:
        if missing:
            self._content[event.channel] = event, missing
        else:
            del self._content[event.channel]
            self._receive(event)

    def _receive(self, event: Event) -> None:
        if event.name == "connection.close":
            self.write(frame.Method(0, spec.Connection.CloseOk()).marshal())
            for channel in self.channels.values():
                channel.is_open = False
        if event.channel not in self.channels:
            self.channel(event.channel)
        self.channels[event.channel].receive(event)


class Channel:
    """One channel: its methods send, wait for the answer if there is one, and note both."""

    def __init__(self, client: Client, number: int) -> None:
        self.client = client
        self.number = number
        self.is_open = True
        self.is_confirming = False
        self.inbox: list[Event] = []
        self._published = 0
        self._unconfirmed: list[int] = []

    # Exchanges and queues

    def declare(self, queue: str = "", *flags: str, **arguments: Any) -> Event:
        """Declare a queue; arguments that are not flags are written with `_` for `-`."""
        method = spec.Queue.Declare(queue=queue, arguments=_dashed(arguments))
        return self.call(_flagged(method, flags))

    def declare_exchange(
        self, exchange: str, exchange_type: str = "direct", *flags: str, **arguments: Any
    ) -> Event:
        """Declare an exchange."""
        type_: Any = exchange_type  # pika: of the type of its default, an enum
        method = spec.Exchange.Declare(
            exchange=exchange,
            type=type_,
            arguments=_dashed(arguments),
        )
        return self.call(_flagged(method, flags))

    def delete(self, queue: str, *flags: str) -> Event:
        """Delete a queue."""
        return self.call(_flagged(spec.Queue.Delete(queue=queue), flags))

    def delete_exchange(self, exchange: str, *flags: str) -> Event:
        """Delete an exchange."""
        return self.call(_flagged(spec.Exchange.Delete(exchange=exchange), flags))

    def purge(self, queue: str) -> Event:
        """Purge a queue."""
        return self.call(spec.Queue.Purge(queue=queue))

    def bind(self, queue: str, exchange: str, key: str = "", arguments: Any = None) -> Event:
        """Bind a queue to an exchange."""
        return self.call(
            spec.Queue.Bind(queue=queue, exchange=exchange, routing_key=key, arguments=arguments)
        )

    def unbind(self, queue: str, exchange: str, key: str = "", arguments: Any = None) -> Event:
        """Unbind a queue from an exchange."""
        return self.call(
            spec.Queue.Unbind(queue=queue, exchange=exchange, routing_key=key, arguments=arguments)
        )

    def bind_exchange(
        self, destination: str, source: str, key: str = "", arguments: Any = None
    ) -> Event:
        """Bind an exchange to another."""
        return self.call(
            spec.Exchange.Bind(
                destination=destination, source=source, routing_key=key, arguments=arguments
            )
        )

    def unbind_exchange(
        self, destination: str, source: str, key: str = "", arguments: Any = None
    ) -> Event:
        """Unbind an exchange from another."""
        return self.call(
            spec.Exchange.Unbind(
                destination=destination, source=source, routing_key=key, arguments=arguments
            )
        )

    # Messages

    def publish(
        self,
        key: str,
        body: bytes | str = b"",
        *flags: str,
        exchange: str = "",
        wait: bool = True,
        **properties: Any,
    ) -> None:
        """Publish a message; in confirm mode, wait for its confirm and note what came before it."""
        body = body.encode() if isinstance(body, str) else body
        method = _flagged(spec.Basic.Publish(exchange=exchange, routing_key=key), flags)
        self._note(">", f"{_describe_method(method)} {_describe_content(properties, body)}")
        self.send(method, properties, body)
        if self.is_confirming:
            self._published += 1
            self._unconfirmed.append(self._published)
            if wait:
                self._await_confirm(self._published)

    def post(
        self, key: str, body: bytes | str = b"", exchange: str = "", **properties: Any
    ) -> None:
        """Publish without a line, and return when the message is where it belongs."""
        assert self.is_confirming, "only a channel in confirm mode can tell when"
        body = body.encode() if isinstance(body, str) else body
        self.send(spec.Basic.Publish(exchange=exchange, routing_key=key), properties, body)
        self._published += 1
        self._unconfirmed.append(self._published)
        event = self.next_event(lambda event: event.name in ("basic.ack", "basic.nack"))
        if event.name != "basic.ack":
            self._note("<", event)

    def confirms(self, count: int) -> None:
        """Wait for so many confirms, and note them by their kind, since their order is free."""
        fates: dict[str, list[int]] = {}
        for _ in range(count):
            event = self.next_event()
            fates.setdefault(event.name, []).append(event.arguments.get("delivery_tag", 0))
        for name, tags in sorted(fates.items()):
            self._note("<", f"{name} {' '.join(map(str, sorted(tags)))}")

    def consume(self, queue: str, tag: str = "", *flags: str, **arguments: Any) -> Event:
        """Consume a queue."""
        method = spec.Basic.Consume(queue=queue, consumer_tag=tag, arguments=_dashed(arguments))
        return self.call(_flagged(method, flags))

    def cancel(self, tag: str) -> Event:
        """Cancel a consumer."""
        return self.call(spec.Basic.Cancel(consumer_tag=tag))

    def get(self, queue: str, *flags: str) -> Event:
        """Get a message."""
        return self.call(_flagged(spec.Basic.Get(queue=queue), flags))

    def qos(self, prefetch: int, *flags: str) -> Event:
        """Set the prefetch of the consumers that follow."""
        return self.call(_flagged(spec.Basic.Qos(prefetch_count=prefetch), flags))

    def ack(self, tag: int, *flags: str) -> None:
        """Acknowledge."""
        self.tell(_flagged(spec.Basic.Ack(delivery_tag=tag), flags))

    def nack(self, tag: int, *flags: str) -> None:
        """Acknowledge negatively; requeue only if the flag says so."""
        self.tell(_flagged(spec.Basic.Nack(delivery_tag=tag, requeue=False), flags))

    def reject(self, tag: int, *flags: str) -> None:
        """Reject; requeue only if the flag says so."""
        self.tell(_flagged(spec.Basic.Reject(delivery_tag=tag, requeue=False), flags))

    def close(self) -> Event:
        """Close the channel."""
        reply = self.call(spec.Channel.Close(200, "bye", 0, 0))
        self.is_open = False
        return reply

    # All methods

    def call(self, method: amqp_object.Method) -> Event:
        """Send a method, note it and the answer, which is returned."""
        self._note(">", _describe_method(method))
        reply = self.ask(method)
        self._note("<" if reply.channel == self.number else "<<", reply)
        return reply

    def tell(self, method: amqp_object.Method) -> None:
        """Send a method that has no answer, and note it."""
        self._note(">", _describe_method(method))
        self.send(method)

    def ask(self, method: amqp_object.Method) -> Event:
        """Send a method and return the answer, without a line."""
        self.send(method)
        return self.next_event(is_wanted=lambda event: event.name not in UNASKED)

    def send(
        self,
        method: amqp_object.Method,
        properties: dict[str, Any] | None = None,
        body: bytes = b"",
        *,
        frame_size: int = 131064,
    ) -> None:
        """Send a method, with its content if there are properties, without a line."""
        client = self.client
        if isinstance(method, spec.Queue.Declare) and method.queue:
            client.stage.remember_queue(method.queue)
        elif isinstance(method, spec.Exchange.Declare) and method.exchange:
            client.stage.remember_exchange(method.exchange)
        client.write_frame(spec.FRAME_METHOD, self.number, codec.encode_method(method))
        if properties is not None:
            head = struct.pack(">HHQ", 60, 0, len(body)) + codec.encode_properties(properties)
            client.write_frame(spec.FRAME_HEADER, self.number, head)
            for start in range(0, len(body), frame_size):
                part = body[start : start + frame_size]
                client.write_frame(spec.FRAME_BODY, self.number, part)

    def sync(self) -> None:
        """Return when the broker has taken all that was sent on this channel."""
        event = self.ask(NOTHING)
        if event.name != "channel.flow-ok":
            self._note("<", event)

    # What comes unasked

    def take(self, count: int = 1) -> list[Event]:
        """Wait for so many events that were not asked for, and note them in their order."""
        events = []
        for _ in range(count):
            events.append(self.next_event())
            self._note("<", events[-1])
        return events

    def take_any_order(self, count: int) -> list[Event]:
        """Wait for so many events, and note them in an order that has nothing to do with time."""
        events = sorted((self.next_event() for _ in range(count)), key=str)
        for event in events:
            self._note("<", event)
        return events

    def next_event(self, is_wanted: Callable[[Event], bool] = lambda _event: True) -> Event:
        """Return the next event that is wanted, or the end of the channel or connection."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            for source in (self, self.client.control):
                for event in source.inbox:
                    is_end = event.name in ("channel.close", "connection.close")
                    if is_end or (source is self and is_wanted(event)):
                        source.inbox.remove(event)
                        return event
            if not self.client.is_open or not self.client.read(deadline - time.monotonic()):
                raise Silence(f"{self.client.number}.{self.number} < nothing")

    def receive(self, event: Event) -> None:
        """Take an event in; called by the connection."""
        if event.name == "channel.close":
            self.is_open = False
            self.client.write(frame.Method(self.number, spec.Channel.CloseOk()).marshal())
        if event.name == "queue.declare-ok":  # which may have a name that the broker made
            self.client.stage.remember_queue(event["queue"])
        if event.name in ("basic.ack", "basic.nack") and self.is_confirming:
            self.inbox.extend(self._singly(event))
        else:
            self.inbox.append(event)

    def note_all(self) -> None:
        """Note what is in the inbox."""
        for event in self.inbox:
            self._note("< beyond that:", event)
        self.inbox.clear()

    def _singly(self, event: Event) -> Iterable[Event]:
        """Split a multiple confirm: how many a broker answers at once is a matter of chance."""
        last = event["delivery_tag"]
        tags = [
            tag for tag in self._unconfirmed if tag == last or (event["multiple"] and tag < last)
        ]
        for tag in tags or [-last]:  # one that nobody waits for is an error, and is to be seen
            yield Event(self.number, event.name, {"delivery_tag": tag})
        self._unconfirmed = [tag for tag in self._unconfirmed if tag not in tags]

    def _await_confirm(self, tag: int) -> None:
        while True:
            event = self.next_event(
                lambda event: event.name in ("basic.return", "basic.ack", "basic.nack")
            )
            self._note("<" if event.channel == self.number else "<<", event)
            if event.name != "basic.return" and event.arguments.get("delivery_tag", tag) == tag:
                return

    def _note(self, direction: str, what: object) -> None:
        if self.client.number:
            self.client.stage.note(f"{self.client.number}.{self.number} {direction} {what}")


def _decode_method(number: int, payload: bytes) -> Event:
    (index,) = struct.unpack_from(">I", payload)
    method = spec.methods[index]().decode(payload, 4)
    return Event(number, _name(method), dict(vars(method)))


def _name(method: amqp_object.Method) -> str:
    """Return the name as the specification writes it, such as `queue.declare-ok`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", method.NAME).lower()


def _flagged(method: amqp_object.Method, flags: Iterable[str]) -> amqp_object.Method:
    for flag in flags:
        assert flag in vars(method), f"{method.NAME} has no flag {flag}"
        setattr(method, flag, True)
    return method


def _dashed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in arguments.items()}


def _describe_method(method: amqp_object.Method) -> str:
    if method.NAME.endswith(".Close"):
        return _describe_close(_name(method), vars(method))
    return " ".join([_name(method), *_describe_arguments(vars(method))])


def _describe_arguments(arguments: dict[str, Any]) -> Iterable[str]:
    """Yield words: a flag that is set by its name alone, and nothing for what is empty."""
    for name, value in arguments.items():
        if value is True:
            yield name
        elif name == "arguments" and value:
            yield _describe_value(value)
        elif value not in (None, False, "", {}) or (name.endswith("_count") and value == 0):
            yield f"{name}={value!r}"


def _describe_close(name: str, arguments: dict[str, Any]) -> str:
    index = (arguments["class_id"] or 0) << 16 | (arguments["method_id"] or 0)
    text = f"{name} {arguments['reply_code']} {arguments['reply_text']}"
    if not index:
        return text
    method = spec.methods.get(index)
    return f"{text} ({_name(method) if method else (index >> 16, index & 0xFFFF)})"


def _describe_content(properties: dict[str, Any], body: bytes) -> str:
    short = repr(body) if len(body) <= 64 else f"{body[:8]!r}... of {len(body)} bytes"
    words = [f"{name}={_describe_value(value)}" for name, value in properties.items()]
    return " ".join([short, *words])


def _describe_value(value: Any) -> str:
    """Return a value with the tables in it sorted by name: their order means nothing."""
    if isinstance(value, dict):
        fields = (f"{name}: {_describe_value(value[name])}" for name in sorted(value))
        return "{" + ", ".join(fields) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_describe_value, value)) + "]"
    return repr(value)
