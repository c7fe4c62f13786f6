# SPDX-License-Identifier: MIT
"""Publishing, and the fate of everything that was published.

A `Publishing` is one message on its way to one exchange and key. It is *held* until there
is a channel and its exchange is known, then *written*, and it ends with one fate:

    held ──> written ──> CONFIRMED   the broker is responsible for it now
     ^          │──────> RETURNED    mandatory, and no queue is bound to the key
     │          │──────> NACKED      the broker refused it
     └── lost ──┘                    written, then the connection went: in doubt, once more
    held, at the deadline ────────> UNSENT     certainly not sent
    written or in doubt, at the deadline ──> UNKNOWN
    in doubt, and then returned, refused or unsent ──> UNKNOWN: that is true of the second copy

What the broker will not even look at (a property that makes no sense, a user who may not
write) closes the channel, and the broker does not say which message it was. So all that
was on its way is sent again one by one, and the one that closes the channel while it is
alone is NACKED.

A channel that a message was NACKED on is not kept for the next one: when its first message
to a quorum queue comes before a new leader was elected for one that died, RabbitMQ 3.10
refuses all that follow, until the dead node is back.

Everything in `Publisher` is called by the leader of the hub, except where it says so.
"""

from __future__ import annotations

import collections
import enum
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol, cast

import pika
from pika.channel import Channel

from postage.errors import (
    ACCESS_REFUSED,
    NOT_FOUND,
    BrokerBlockedError,
    ChannelClosedError,
    ClosedError,
    ConnectionFailedError,
    ConnectionLostError,
    EncodingError,
    NackedError,
    PostageError,
    PublishRefusedError,
    PublishTimeoutError,
    PublishUnknownError,
    TransportError,
    UnroutableError,
)
from postage.health import Health, Incident, incident, latest
from postage.topology import ExchangeSpec
from postage.transport.connection import Connection, State
from postage.transport.conversation import Preparation, Script, converse, translated
from postage.transport.frames import encode_properties
from postage.transport.wire import WireChannel

logger = logging.getLogger(__name__)

#: Bytes that a content header takes beside its properties, and that a frame adds.
_HEADER_OVERHEAD = 12 + 8
#: The frame size that RabbitMQ offers by default (its `frame_max`), in bytes.
_FRAME_MAX = 131_072
#: Bytes that a short string of AMQP holds (AMQP 0-9-1, 4.2.5.3).
_SHORT_STRING = 255
#: The address by which RabbitMQ means the channel that a request was published on.
DIRECT_REPLY_TO = "amq.rabbitmq.reply-to"


class Fate(enum.Enum):
    """What became of a publishing."""

    CONFIRMED = "confirmed"
    WRITTEN = "written"  # its sender does not want to wait for more
    RETURNED = "returned"
    NACKED = "nacked"
    UNSENT = "unsent"
    UNKNOWN = "unknown"


class Publishing:
    """One message on its way to one exchange and key.

    Args:
        exchange: Where it goes; declared before the first use.
        key: The routing key.
        body: Bytes.
        properties: As pika takes them, or encoded ahead (`encoded_ahead()`); not changed.
        mandatory: Whether the broker returns it if no queue is bound to the key.
        confirm: Whether its sender waits for the broker's confirm.
        deadline: On the monotonic clock: its fate is known by then.
        settled: Called once with this object, by the leader, when its fate is known.
        wants_reply: Its ``reply_to`` is the channel that it is published on.
        repeatable: Whether it is written again if a loss leaves it in doubt.
        aim: Called whenever it is about to be written, if it may take a detour: sets
            ``preparation``, ``via`` (the name of the exchange), ``properties`` and
            ``mandatory``.
        message_id: Its id, where the properties are encoded.
    """

    __slots__ = (
        "aim",
        "body",
        "confirm",
        "deadline",
        "error",
        "exchange",
        "fate",
        "in_doubt",
        "key",
        "lost",
        "mandatory",
        "message_id",
        "preparation",
        "properties",
        "repeatable",
        "returned",
        "settled",
        "suspect",
        "via",
        "wants_reply",
    )

    def __init__(
        self,
        exchange: ExchangeSpec,
        key: str,
        body: bytes,
        properties: pika.BasicProperties | bytes,
        *,
        mandatory: bool,
        confirm: bool,
        deadline: float,
        settled: Callable[[Publishing], None],
        wants_reply: bool = False,
        repeatable: bool = True,
        aim: Callable[[Publishing], None] | None = None,
        message_id: str | None = None,
    ) -> None:
        self.exchange = exchange
        self.preparation: Preparation = exchange
        self.via = exchange.name
        self.aim = aim
        self.key = key
        self.body = body
        self.properties = properties
        self.message_id = message_id
        if not isinstance(properties, bytes):
            self.message_id = properties.message_id
        self.mandatory = mandatory
        self.confirm = confirm
        self.deadline = deadline
        self.settled = settled
        self.wants_reply = wants_reply
        self.repeatable = repeatable
        self.fate: Fate | None = None
        self.error: PostageError | None = None
        self.returned = False
        self.in_doubt = False  # a former copy was written, and had no answer
        self.lost = False  # and went with its connection
        self.suspect = False  # or with a channel that one like it has closed

    def __repr__(self) -> str:
        fate = self.fate.value if self.fate else "in doubt" if self.in_doubt else "on its way"
        return f"<Publishing to {self.exchange.name!r} key {self.key!r} [{fate}]>"

    @property
    def loose_properties(self) -> pika.BasicProperties:
        """The properties of one that has an aim, which may want to change them."""
        assert not isinstance(self.properties, bytes)
        return self.properties

    @property
    def pair(self) -> tuple[str, str]:
        """The exchange's name and the routing key."""
        return self.exchange.name, self.key


class Listener(Protocol):
    """Who waits for replies. Called by the leader."""

    def heard(self, properties: pika.BasicProperties, body: bytes) -> None:
        """A reply came in."""

    def deafened(self) -> None:
        """The channel is gone: replies to what was published on it cannot come any more."""

    def __len__(self) -> int:
        """How many replies are waited for."""


class Publisher:
    """The channel that a producer publishes on, and what is on its way over it.

    Args:
        connection: Whose tenant it becomes at the first publishing.
        listener: Gets the replies to what is published with `wants_reply`, if any.
    """

    def __init__(self, connection: Connection, listener: Listener | None = None) -> None:
        self.connection = connection
        self.hub = connection.hub
        self._listener = listener
        self._listening = False
        self._channel: WireChannel | None = None
        self._preparing: WireChannel | None = None
        self._joined = False
        self._closed = False
        #: The last message that did not arrive, or refusal, also if it is over.
        self.incident: Incident | None = None
        self._next_tag = 1
        self._held: collections.deque[Publishing] = collections.deque()
        self._written: dict[int, Publishing] = {}  # by delivery tag, oldest first
        self._alone = False  # what was written last is a suspect
        self._refusing = False  # a message was nacked on this channel
        self._declaring = False
        self._alarm: object | None = None
        self._alarm_at = 0.0

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._channel else "without a channel"
        return f"<Publisher [{state}, {len(self._held)} held, {len(self._written)} unconfirmed]>"

    # ------------------------------------------------------------------ any thread

    @property
    def outstanding(self) -> int:
        """How many publishings have no fate yet."""
        return len(self._held) + len(self._written)

    def health(self) -> Health:
        """Return how this channel and its connection are."""
        connection = self.connection
        return Health(
            state=State.CLOSED.value if self._closed else connection.state.value,
            blocked=connection.state is State.BLOCKED,
            in_flight=self.outstanding,
            reconnects=connection.reconnects,
            last_error=latest(connection.incident, self.incident),
        )

    def close(self, grace: float) -> None:
        """Wait for what is on its way, at most `grace` seconds, and close the channel."""
        self.hub.wait(lambda: not self.outstanding, grace)
        self.hub.wait(lambda: self._closed, grace, first=self.shut)

    # ------------------------------------------------------------------ the leader

    def send(self, publishings: Iterable[Publishing]) -> None:
        """Publish in order. The fate of each is reported through its `settled`."""
        if self._closed:
            for publishing in publishings:
                self._settle(publishing, Fate.UNSENT, ClosedError("the producer is closed"))
            return
        for publishing in publishings:
            self._held.append(publishing)
            if self._alarm is None or publishing.deadline < self._alarm_at:
                self._set_alarm(publishing.deadline)
        if not self._joined:
            self._joined = True
            self.connection.join(self)
        self._pump()

    def withdraw(self, publishing: Publishing) -> bool:
        """Take back what is still held. Returns whether it is certainly not sent."""
        try:
            self._held.remove(publishing)
        except ValueError:
            return False
        return not publishing.in_doubt

    def shut(self) -> None:
        """Close the channel and settle what is left as it stands."""
        if self._closed:
            return
        self._closed = True
        self.connection.leave(self)
        for channel in (self._channel, self._preparing):
            if channel is not None and not (channel.is_closing or channel.is_closed):
                channel.close()
        self._channel = self._preparing = None
        self._expire(float("inf"))
        if self._alarm is not None:
            self.hub.cancel(self._alarm)
            self._alarm = None

    # ----------------------------------------------------- Tenant of the connection

    def connected(self, amqp: pika.SelectConnection) -> None:
        """Open a channel in confirm mode."""
        channel = cast(
            WireChannel, amqp.channel(on_open_callback=self.hub.shielded(self._prepare))
        )
        channel.add_on_close_callback(self.hub.shielded(self._channel_closed))
        self._preparing = channel

    def disconnected(self, error: TransportError) -> None:
        """Keep what has no fate: what was written is in doubt and goes first, in order."""
        self._channel = self._preparing = None
        self._declaring = self._refusing = False
        written = [each for each in self._written.values() if each.fate is None]
        self._written.clear()
        for publishing in reversed(written):
            if publishing.returned:  # its ack was lost, the answer was not
                self._settle(publishing, Fate.RETURNED)
            elif not publishing.repeatable:
                self._settle(publishing, Fate.UNKNOWN)
            else:
                publishing.in_doubt = True
                publishing.lost |= isinstance(error, ConnectionLostError)
                self._held.appendleft(publishing)
        if self._listening and self._listener is not None:
            self._listening = False
            self._listener.deafened()

    def refused(self, error: ConnectionFailedError) -> None:
        """Fail at once what waits for a connection that will not come."""
        while self._held:
            self._settle(self._held.popleft(), Fate.UNSENT, error)

    def blocked(self, blocked: bool) -> None:
        """Hold what comes while an alarm lasts: what is written then is delivered later."""
        if not blocked:
            self._pump()

    # ------------------------------------------------------------------- inside

    def _prepare(self, channel: WireChannel) -> None:
        if channel is not self._preparing:
            return
        channel.add_on_return_callback(self.hub.shielded(self._returned))
        converse(
            channel, self._script(channel), partial(self._prepared, channel), self.hub.shielded
        )

    def _script(self, channel: Channel) -> Script[None]:
        yield partial(channel.confirm_delivery, self.hub.shielded(self._confirmed))

    def _prepared(self, channel: WireChannel, _result: Any, error: TransportError | None) -> None:
        if channel is not self._preparing:
            return
        self._preparing = None
        if error is not None:
            logger.warning("no publishing channel: %s", error)
            return  # the close of the channel tries again
        self._channel = channel
        self._next_tag = 1  # AMQP counts publishings anew on each channel
        self._pump()

    def _channel_closed(self, channel: Channel, reason: Exception) -> None:
        if channel is not self._channel and channel is not self._preparing:
            return
        error = translated(reason)
        self.incident = incident(error)
        found = isinstance(error, ChannelClosedError) and self._accuse(error)
        self.disconnected(error)
        self.connection.forget_exchanges()  # one of them may have been deleted (404)
        amqp = self.connection.amqp
        if amqp is not None and self.connection.is_open and not self._closed:
            logger.warning("a publishing channel was closed: %s", error)
            self.hub.call_later(0.0 if found else 0.1, partial(self._reopen, amqp))

    def _accuse(self, error: ChannelClosedError) -> bool:
        """Settle the one message that closed the channel, or suspect all that it can be."""
        if len(self._written) == 1 and error.code != NOT_FOUND:  # an exchange can be made anew
            [publishing] = self._written.values()
            name, key = publishing.pair
            attempt = f"publish to exchange {name!r} key {key!r}"
            advice = "To publish needs the permission to write to the exchange"
            refusal = PublishRefusedError(
                error.code, error.text, attempt, advice if error.code == ACCESS_REFUSED else ""
            )
            # A copy that went with the channel before was refused then, too.
            self._settle(publishing, Fate.NACKED, refusal, is_certain=not publishing.lost)
            return True
        for publishing in self._written.values():
            publishing.suspect = True
        return False

    def _reopen(self, amqp: pika.SelectConnection) -> None:
        if self.connection.amqp is amqp and amqp.is_open and self._joined and not self._closed:
            self.connected(amqp)

    def _renew(self) -> None:
        """Go on with another channel."""
        channel, amqp = self._channel, self.connection.amqp
        assert channel is not None and amqp is not None
        self.disconnected(ConnectionLostError("its channel refused a message"))
        channel.close()
        self._reopen(amqp)

    def _pump(self) -> None:
        """Write what is held, in order, until something has to be waited for."""
        known: Preparation | None = None  # mostly the same for many
        while self._held and self._channel is not None and self.connection.state is State.READY:
            if self._refusing and not self._listener:  # a reply comes to this channel alone
                if not self._written:
                    self._renew()
                break
            publishing = self._held[0]
            if self._written and (self._alone or publishing.suspect):
                break
            if publishing.aim is not None:
                publishing.aim(publishing)
            if publishing.preparation is not known:
                known = publishing.preparation
                if not self.connection.knows(known):
                    self._declare(publishing)
                    break
            self._held.popleft()
            self._write(self._channel, publishing)

    def _declare(self, publishing: Publishing) -> None:
        if self._declaring:
            return
        self._declaring = True
        preparation = publishing.preparation

        def declared(_result: Any, error: TransportError | None) -> None:
            self._declaring = False
            if error is not None:
                refused = [each for each in self._held if each.preparation == preparation]
                for each in refused:
                    self._held.remove(each)
                    self._settle(each, Fate.UNSENT, error)
            self._pump()

        # Without a deadline: others wait for the same exchange, each with its own.
        self.connection.declare(preparation, declared, None)

    def _listen(self, channel: Channel) -> None:
        """Consume the replies that come straight to this channel.

        RabbitMQ, direct reply-to: the consumer must exist before the first request is
        published on the same channel, and takes no acks. It need not be confirmed first.
        """
        assert self._listener is not None
        heard = self._listener.heard
        channel.basic_consume(
            DIRECT_REPLY_TO,
            self.hub.shielded(lambda _channel, _method, properties, body: heard(properties, body)),
            auto_ack=True,
        )
        self._listening = True

    def _write(self, channel: WireChannel, publishing: Publishing) -> None:
        if publishing.wants_reply and not self._listening:
            self._listen(channel)
        try:
            channel.basic_publish(
                publishing.via,
                publishing.key,
                publishing.body,
                publishing.properties,
                publishing.mandatory,
            )
        except Exception as error:  # pika marshals before it writes: nothing of it has left
            unencodable = EncodingError(f"the message cannot be encoded: {error}")
            self._settle(publishing, Fate.UNSENT, unencodable)
            return
        self._written[self._next_tag] = publishing
        self._next_tag += 1
        self._alone = publishing.suspect
        if not publishing.confirm:
            self._settle(publishing, Fate.WRITTEN)

    def _confirmed(self, frame: Any) -> None:
        method = frame.method
        fate = Fate.CONFIRMED if method.NAME == "Basic.Ack" else Fate.NACKED
        self._refusing = self._refusing or fate is Fate.NACKED
        tag = method.delivery_tag
        if not method.multiple:
            tags = [tag] if tag in self._written else []
        else:
            # Acks are not monotone: resolve only what is outstanding, from the oldest on.
            tags = []
            for outstanding in self._written:
                if outstanding > tag:
                    break
                tags.append(outstanding)
        for each in tags:
            publishing = self._written.pop(each)
            self._settle(publishing, Fate.RETURNED if publishing.returned else fate)
        if self._held and not self._written:
            self._pump()

    def _returned(self, _channel: Channel, method: Any, properties: Any, _body: bytes) -> None:
        """Mark the oldest publishing that it can be: a return carries no delivery tag.

        Returns come in the order of publishing, and each before its own ack.
        """
        for publishing in self._written.values():
            if (
                publishing.key == method.routing_key
                and publishing.message_id == properties.message_id
                and publishing.via == method.exchange
                and publishing.mandatory
                and not publishing.returned
            ):
                publishing.returned = True
                if publishing.via != publishing.exchange.name:
                    self.connection.forget_exchanges()  # its detour was deleted
                if not publishing.confirm:
                    logger.warning("%s", UnroutableError([publishing.pair]))
                return

    def _settle(
        self,
        publishing: Publishing,
        fate: Fate,
        error: PostageError | None = None,
        is_certain: bool = False,
    ) -> None:
        if publishing.fate is not None:
            return  # its sender did not want to wait for more than the writing
        if fate is not Fate.CONFIRMED and fate is not Fate.WRITTEN:
            error = error or _error_of(publishing, fate)
            if publishing.in_doubt and not is_certain:
                fate, error = Fate.UNKNOWN, _doubtful(publishing, error)
            publishing.error = error
            self.incident = incident(error)
        publishing.fate = fate
        publishing.settled(publishing)

    # -------------------------------------------------------------------- deadlines

    def _set_alarm(self, deadline: float) -> None:
        """Look at the deadlines then. Most come in order, so one timer does for all."""
        if self._alarm is not None:
            self.hub.cancel(self._alarm)
        self._alarm_at = deadline
        self._alarm = self.hub.call_later(deadline - time.monotonic(), self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._expire(time.monotonic())
        self._pump()
        left = [each.deadline for each in (*self._written.values(), *self._held)]
        if left and not self._closed:
            self._set_alarm(min(left))

    def _expire(self, now: float) -> None:
        written = {tag: each for tag, each in self._written.items() if each.deadline <= now}
        held = [each for each in self._held if each.deadline <= now]
        # All go before the first sender is told: it may send or withdraw others over it.
        for tag in written:
            del self._written[tag]
        if held:
            self._held = collections.deque(each for each in self._held if each.deadline > now)
        for publishing in written.values():
            self._settle(publishing, Fate.RETURNED if publishing.returned else Fate.UNKNOWN)
        for publishing in held:
            self._settle(publishing, Fate.UNSENT, self.unsent(publishing))

    def unsent(self, publishing: Publishing) -> TransportError:
        """Return why a publishing that is still held was not sent."""
        name, key = publishing.pair
        text = f"publish to exchange {name!r} key {key!r}: certainly not sent"
        if self._closed:
            return ClosedError(f"{text}, the producer was closed")
        if self.connection.state is State.BLOCKED:
            return BrokerBlockedError(text + self.connection.trouble())
        return PublishTimeoutError(f"{text}, {self.connection.overdue('in time')}")


def _error_of(publishing: Publishing, fate: Fate) -> TransportError:
    name, key = publishing.pair
    if fate is Fate.RETURNED:
        return UnroutableError([publishing.pair])
    if fate is Fate.NACKED:
        return NackedError(
            f"publish to exchange {name!r} key {key!r}: the broker refused it; "
            "a queue that it goes to is full (x-overflow reject-publish) or failing"
        )
    return PublishUnknownError(
        f"publish to exchange {name!r} key {key!r}: written, and the confirm never came; "
        f"it may have arrived (message id {publishing.message_id})"
    )


def _doubtful(publishing: Publishing, error: PostageError) -> PostageError:
    """Return what is known of a message whose first copy was written and never confirmed."""
    if isinstance(error, PublishUnknownError):
        return error
    name, key = publishing.pair
    unknown = PublishUnknownError(
        f"publish to exchange {name!r} key {key!r}: it was written before a connection or channel "
        f"was lost, and may have arrived then (message id {publishing.message_id}); "
        f"the second time: {error}"
    )
    unknown.__cause__ = error
    return unknown


def check_encodable(
    key: str, properties: pika.BasicProperties, frame_max: int = _FRAME_MAX
) -> None:
    """Refuse, in the sender's thread, what would break the channel or the connection.

    Args:
        key: The routing key.
        properties: What is to be sent with the message.
        frame_max: Bytes of the largest frame; a header that is larger costs the connection
            (501 FRAME_ERROR).

    Raises:
        EncodingError: The key or a property is too long, or a header has no AMQP form.
    """
    for name, value in (properties.headers or {}).items():
        _check_header(str(name), value)
    try:
        key_size, size = len(key.encode()), encoded_size(properties)
    except Exception as error:
        raise EncodingError(f"the properties of the message cannot be encoded: {error}") from None
    if key_size > _SHORT_STRING:
        raise EncodingError(f"the routing key {key[:40]!r}… is longer than 255 bytes")
    if size > frame_max:
        raise EncodingError(
            f"the headers and properties of the message take {size} bytes, and a frame holds "
            f"{frame_max}: put large values into the content"
        )


def encoded_ahead(
    properties: pika.BasicProperties | dict[str, Any] | bytes,
) -> pika.BasicProperties | bytes:
    """Return properties as they are written: once for many addresses, and by their sender.

    What cannot be encoded is returned as pika takes it: whoever writes it says so.

    Args:
        properties: Of pika, or its keywords for them (see `encode_properties()`), or encoded.
    """
    if isinstance(properties, bytes):
        return properties
    try:
        return encode_properties(properties)
    except Exception:
        return pika.BasicProperties(**properties) if isinstance(properties, dict) else properties


def encoded_size(properties: pika.BasicProperties) -> int:
    """Return how many bytes the header frame of a message takes."""
    return len(encode_properties(properties)) + _HEADER_OVERHEAD


def _check_header(name: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_header(name, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_header(f"{name}.{key}", item)
    elif isinstance(value, float):
        raise EncodingError(
            f"header {name!r} is the float {value!r}, which AMQP libraries do not agree on: "
            "send a string, an int or a Decimal"
        )
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise EncodingError(f"header {name!r} is {value}, which does not fit into 64 bits")
