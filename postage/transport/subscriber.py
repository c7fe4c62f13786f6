# SPDX-License-Identifier: MIT
"""Consuming: deliveries in, settlements out.

A `Subscriber` owns the channel of one consumer. It remembers which queues are consumed, and
consumes them on every new connection, when its `topology` is back there. Deliveries go into
its *inbox*, from where the consumer's thread takes them; what that thread decides about
them goes out *coalesced*.

A delivery belongs to the channel that it came on: settled on a later one, its tag would
name another message. So each delivery carries the number of its channel, and what was
decided about a delivery of an older channel is dropped; the broker delivers it again.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import itertools
import logging
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pika
from pika import spec as amqp_spec
from pika.channel import Channel

from postage.errors import (
    ACCESS_REFUSED,
    PRECONDITION_FAILED,
    RESOURCE_LOCKED,
    ChannelClosedError,
    ClosedError,
    ConnectionFailedError,
    ConnectionLostError,
    TransportError,
)
from postage.headers import attempt_of, origin_of
from postage.health import ConsumerHealth, Incident, incident, latest
from postage.prefetch import DEFAULT, STALL, Prefetch
from postage.topology import QueueSpec
from postage.transport.connection import Connection, State, backoff
from postage.transport.conversation import Script, attempting, converse, translated
from postage.transport.ledger import Ledger
from postage.transport.watchdog import INTERVAL, Watchdog

logger = logging.getLogger(__name__)

#: Seconds that a decided ack may wait for others to go with it.
ACK_DELAY = 0.01
#: Settlements that are worth a round of the loop of their own, while messages wait to be handled,
#: if half of the prefetch is not more.
TOGETHER = 16
#: Seconds after which a message that nobody started goes back to its queue. RabbitMQ's
#: consumer_timeout (30 minutes by default) counts from the delivery, not from the start.
UNSTARTED_LIMIT = 300.0
#: Heartbeats for which a queue that another connection still holds is tried again: a
#: frozen or cut-off holder is given up by the broker after two.
TAKEOVER_HEARTBEATS = 4
#: Seconds until a queue that is out of reach is tried again, give or take a half.
REACH_PAUSE = 4.0


class Settlement(enum.Enum):
    """What the broker is told about a delivery."""

    ACK = "ack"
    REQUEUE = "requeue"
    REJECT = "reject"  # dead-lettered if its queue says so, else dropped


class Delivery:
    """One message, as it was delivered.

    Attributes:
        body: Bytes.
        properties: pika's BasicProperties.
        queue: The queue it came from, as it was declared.
        exchange, routing_key, redelivered, delivery_tag, consumer_tag: AMQP's.
        received: When it came, on the monotonic clock.
    """

    __slots__ = (
        "body",
        "channel_number",
        "consumer_tag",
        "delivery_tag",
        "exchange",
        "properties",
        "queue",
        "received",
        "redelivered",
        "routing_key",
        "source",
    )

    #: By which consumer it came.
    source: _Consumer

    def __init__(
        self, queue: QueueSpec, channel_number: int, method: Any, properties: Any, body: bytes
    ) -> None:
        self.queue = queue
        self.channel_number = channel_number
        self.delivery_tag: int = method.delivery_tag
        self.consumer_tag: str = method.consumer_tag
        self.exchange: str = method.exchange
        self.routing_key: str = method.routing_key
        self.redelivered: bool = method.redelivered
        self.properties: pika.BasicProperties = properties
        self.body = body
        self.received = time.monotonic()

    def __repr__(self) -> str:
        return f"<Delivery {self.delivery_tag} from {self.queue.name!r}>"

    @property
    def headers(self) -> dict[str, Any]:
        """The headers of the message."""
        return self.properties.headers or {}

    @property
    def message_id(self) -> str | None:
        """The id of the message. Messages of Postage 1.2.1 have none."""
        message_id: str | None = self.properties.message_id
        return message_id

    @property
    def correlation_id(self) -> str | None:
        """The id of the conversation, or of the call, that the message belongs to."""
        correlation_id: str | None = self.properties.correlation_id
        return correlation_id

    @property
    def origin(self) -> tuple[str, str]:
        """By which exchange and key the message came first: a later attempt comes by others."""
        return origin_of(self.properties.headers, self.exchange, self.routing_key)

    @property
    def attempt(self) -> int:
        """Which attempt at the message this is, from 1 on."""
        return attempt_of(self.properties.headers)


class _Consumer:
    """One queue that is consumed, over all the channels that come and go.

    Attributes:
        delivered, settled: Messages that have come, and those of them that are gone. Their
            difference is what the present consumer of the broker has in hand: the others are
            counted as settled when it begins.
        after: The last delivery tag that had come when it began.
        since: Until when its work has been measured, on the monotonic clock.
        done, size, repeated: What a flush has settled of it: messages, bytes of their bodies,
            and how many of them had been delivered before.
        enough: How many of them in hand are worth a flush: half, so that the broker goes on
            meanwhile, or all while another prefetch is wanted, which takes effect only then.
    """

    __slots__ = (
        "after",
        "delivered",
        "done",
        "enough",
        "is_changing",
        "is_resting",
        "live",
        "name",
        "prefetch",
        "repeated",
        "resume",
        "settled",
        "since",
        "size",
        "spec",
        "tag",
        "wanted",
    )

    def __init__(self, spec: QueueSpec, prefetch: int | None) -> None:
        self.spec = spec
        if prefetch is None and not self._may_begin_anew():
            prefetch = DEFAULT
        # Slow start: what makes the process crash shall be counted alone, without the
        # messages that were only delivered ahead of it. Only where the broker counts.
        self.prefetch = Prefetch(prefetch, slow=spec.counts_deliveries)
        self.name = spec.name  # the real one, when it is consumed
        self.delivered = self.settled = self.after = 0
        self.since = 0.0
        self.done = self.size = self.repeated = 0
        self.enough = 1
        self.tag: str | None = None
        self.live = False  # the broker said consume-ok
        self.is_changing = False  # cancelled by us, to be begun anew
        self.is_resting = False  # until something is settled: see _relieve
        self.resume: Callable[[], None] | None = None  # how to go on after that
        self.wanted = True  # not stopped

    @property
    def waits_in_line(self) -> bool:
        """Whether another consumer may have the queue for itself."""
        return bool(self.spec.arguments.get("x-single-active-consumer"))

    @property
    def is_full(self) -> bool:
        """Whether all of its prefetch is in hand: nothing is on its way."""
        return self.delivered - self.settled >= self.prefetch.count

    @property
    def is_pressing(self) -> bool:
        """Whether the broker is about to wait for its settlements."""
        return self.delivered - self.settled >= self.enough

    @property
    def is_to_change(self) -> bool:
        """Whether another prefetch is wanted."""
        return self.enough == self.prefetch.count > 1

    def begins(self, after: int) -> None:
        """Take note that the broker is asked for a consumer."""
        self.after, self.settled = after, self.delivered
        self.enough = (self.prefetch.count + 1) // 2
        self.is_changing, self.resume = False, None

    def ended(self) -> None:
        """Take note that the broker has no consumer any more."""
        self.tag, self.live = None, False
        self.is_changing, self.is_resting, self.resume = False, False, None

    def _may_begin_anew(self) -> bool:
        """Tell whether a cancel would do no harm, while nobody else consumes the queue."""
        spec = self.spec
        return not (spec.auto_delete or spec.exclusive_consumer or self.waits_in_line)


def coalesced(unsettled: list[int], acked: set[int]) -> list[tuple[int, bool]]:
    """Return the acks to send: (delivery tag, multiple).

    A `multiple` ack takes every lower tag along, so it may only reach up to below the
    lowest tag that is not decided yet; the others go singly.

    Args:
        unsettled: The tags that the broker waits for, in ascending order.
        acked: Those of them that are decided.
    """
    prefix = 0
    acks: list[tuple[int, bool]] = []
    remaining = len(acked)
    for tag in unsettled:
        if tag not in acked:
            break
        prefix, remaining = tag, remaining - 1
    if prefix:
        acks.append((prefix, len(acked) - remaining > 1))
    if remaining:
        acks.extend((tag, False) for tag in sorted(acked) if tag > prefix)
    return acks


class Subscriber:
    """The channel of one consumer, with its topology, its inbox and its settlements.

    Args:
        connection: Whose tenant it becomes when the first queue is consumed.
        prefetch: Messages that the broker delivers ahead, for each queue; None: as many as
            are worth a tenth of a second of work.
        unstarted_limit: Seconds after which a message that nobody started goes back.
        watch_interval: Seconds between two looks whether the broker still has the consumers.
    """

    def __init__(
        self,
        connection: Connection,
        prefetch: int | None,
        unstarted_limit: float = UNSTARTED_LIMIT,
        watch_interval: float = INTERVAL,
    ) -> None:
        self.connection = connection
        self.hub = connection.hub
        self.prefetch = prefetch
        self.unstarted_limit = unstarted_limit
        self.topology = Ledger(connection)
        self.inbox: collections.deque[Delivery] = collections.deque()
        #: Called by the leader when the inbox is no longer empty.
        self.on_delivery: Callable[[], None] = _nothing
        #: Why consuming is not going on and cannot, or None.
        self.failure: TransportError | None = None
        self._consumers: dict[QueueSpec, _Consumer] = {}
        self._cancelling: dict[str, Callable[[], None]] = {}  # what to do then, by consumer tag
        self._joined = False
        self._closed = False
        self._leaving_on: int | None = None  # the channel on which all was stopped
        self._channel: Channel | None = None
        self._channel_number = 0
        self._unsettled: dict[int, None] = {}  # delivery tags of this channel, ascending
        self._acked: set[int] = set()
        self._decided: collections.deque[tuple[Delivery, Settlement]] = collections.deque()
        self._collecting = self._flushing = False
        self._is_urgent = False  # a settlement is decided that is not of a request
        self._flushed = 0.0  # when that was done, on the monotonic clock
        self._together = TOGETHER
        self._flush_timer: object | None = None
        self._stall_timer: object | None = None
        self._age_timer: object | None = None
        self._reach_timer: object | None = None
        self._failures = 0
        self._is_costly = False  # putting the topology back cost the connection, the last time
        self._refused_since: float | None = None
        self._last_delivery: float | None = None  # on the monotonic clock
        #: The last trouble with consuming, also if it is over.
        self.incident: Incident | None = None
        self._watchdog = Watchdog(
            connection,
            lambda: [each for each in self._consumers.values() if each.live],
            lambda: not self._unsettled,
            self._lost,
            watch_interval,
        )

    def __repr__(self) -> str:
        live = sum(consumer.live for consumer in tuple(self._consumers.values()))
        return (
            f"<Subscriber [{live} of {len(self._consumers)} consumers live, "
            f"{len(self.inbox)} waiting, {len(self._unsettled)} unsettled]>"
        )

    # ---------------------------------------------------------- consuming, any thread

    def consume(self, queue: QueueSpec) -> None:
        """Consume a queue from now on, on this connection and on all that follow."""
        self.hub.call(partial(self._consume, queue))

    def stop(self, queue: QueueSpec | None = None) -> None:
        """Stop consuming a queue, or all of them. What is in the inbox stays there."""
        self.hub.call(partial(self._stop, queue))

    def stopped(self) -> bool:
        """Tell whether no consumer is live any more: nothing comes in after this."""
        consumers = tuple(self._consumers.values())
        return self._channel is None or not (
            self._cancelling or any(each.tag for each in consumers)
        )

    @property
    def consuming(self) -> bool:
        """Whether every queue that is wanted is being consumed, as the broker confirmed."""
        wanted = [each for each in tuple(self._consumers.values()) if each.wanted]
        return bool(wanted) and all(each.live for each in wanted)

    def health(self) -> ConsumerHealth:
        """Return how this channel and its connection are."""
        connection, last = self.connection, self._last_delivery
        wanted = [each for each in tuple(self._consumers.values()) if each.wanted]
        return ConsumerHealth(
            state=State.CLOSED.value if self._closed else connection.state.value,
            in_flight=len(self._unsettled),
            reconnects=connection.reconnects,
            last_error=latest(connection.incident, self.incident),
            consumers_wanted=len(wanted),
            consumers_live=sum(each.live or each.is_changing for each in wanted),
            prefetch=max((each.prefetch.count for each in wanted), default=0),
            waiting=len(self.inbox),
            last_delivery=None if last is None else time.time() - (time.monotonic() - last),
        )

    def is_current(self, delivery: Delivery) -> bool:
        """Tell whether a delivery can still be settled."""
        return delivery.channel_number == self._channel_number and self._channel is not None

    def settle(self, delivery: Delivery, settlement: Settlement) -> None:
        """Decide about a delivery. It goes out soon, together with others."""
        self._decided.append((delivery, settlement))
        if delivery.properties.reply_to is None:
            self._is_urgent = True
        if not self._collecting:  # cleared before the next flush looks at what was decided
            self._collecting = True
            self.hub.post(self._collect)
        elif len(self._decided) == self._together:  # let the broker work while we do
            self.hub.call(self._flush, together=True)

    def trust(self, queue: QueueSpec, after: float = 0.0) -> None:
        """Deliver ahead although the first message of a queue is not settled yet.

        For a handler that lets others run: they may be what it waits for.

        Args:
            queue: The queue.
            after: Seconds to wait before that.
        """
        consumer = self._consumers.get(queue)
        if consumer is not None and not consumer.prefetch.is_trusted:
            self.hub.post(lambda: self._trust(consumer, after))

    def flush(self) -> None:
        """Send what was decided as soon as somebody leads, and not only after ACK_DELAY.

        Two may wait for that, unless the broker is about to wait for them. Those of requests:
        their callers have the replies, and each write costs both sides more than what is in it.
        And those that come thick and fast while another prefetch is wanted.
        """
        if self._flushing or not self._decided:  # cleared as `_collecting` is
            return
        consumers = tuple(self._consumers.values())
        is_urgent = self._is_urgent
        if is_urgent and any(each.is_to_change for each in consumers):
            is_urgent = time.monotonic() - self._flushed > ACK_DELAY
        if is_urgent or any(each.is_pressing for each in consumers):
            self._flushing = True
            self.hub.post(self._flush)

    def give_back(self, delivery: Delivery) -> None:
        """Put a delivery that was not handled back into its queue, at once."""
        self._decided.append((delivery, Settlement.REQUEUE))
        self.hub.post(self._flush)

    def close(self, grace: float) -> bool:
        """Send what was decided and close the channel.

        Returns:
            Whether the broker took all of it, since `stop()` at least: its close-ok comes
            after the acks that were written before on the same channel.
        """
        if self._closed or self.connection.state is State.CLOSED:  # the hub may be gone by now
            return False
        agreed: list[bool] = []
        self.hub.wait(lambda: bool(agreed), grace, first=partial(self._close, agreed))
        if not agreed:
            self.hub.call(self._leave)
        return agreed == [True]

    def resume(self) -> None:
        """Consume again after `close()`, which the broker did not agree to."""
        self.hub.call(self._resume)

    # --------------------------------------------------- Tenant of the connection

    def connected(self, amqp: pika.SelectConnection) -> None:
        """Put the topology back, then open a channel and consume."""
        if self._is_costly:  # the others shall have something of the new connection first
            self._pause(amqp)
        else:
            self.topology.replay(partial(self._restored, amqp))

    def disconnected(self, error: TransportError) -> None:
        """Forget what belongs to the old channel. The broker delivers it again."""
        if isinstance(error, ConnectionLostError):
            self._refused_since = None  # who holds a queue now may be our former connection
        self._channel = None
        self._channel_number += 1
        self._unsettled.clear()
        self._acked.clear()
        self._cancelling.clear()
        self._decided.clear()
        self.inbox.clear()
        for consumer in self._consumers.values():
            consumer.ended()

    def refused(self, error: ConnectionFailedError) -> None:
        """Say in the consumer's own thread that there will be no connection."""
        self._fail(error)

    def blocked(self, blocked: bool) -> None:
        """An alarm stops publishers only."""

    # -------------------------------------------------------------- inside the loop

    def _restored(self, amqp: pika.SelectConnection, error: TransportError | None) -> None:
        if self._closed:
            return
        if error is None:
            self._is_costly = False
            self._open(amqp)
        elif not isinstance(error, ConnectionLostError):
            self._try_again(amqp, error)
        elif error.is_hard:  # the connection comes back, and we with it
            self._is_costly = True
            self._failures += 1
            self.incident = incident(error)
            logger.error("%s; trying again", error)

    def _open(self, amqp: pika.SelectConnection) -> None:
        if self._closed or amqp is not self.connection.amqp or not amqp.is_open:
            return
        if self._channel is not None:  # who asked first was served
            if self._channel.is_open:
                self._start_all(self._channel)
            return
        self._channel_number += 1
        channel = amqp.channel(on_open_callback=self.hub.shielded(self._opened))
        channel.add_on_close_callback(self.hub.shielded(self._channel_closed))
        channel.add_on_cancel_callback(self.hub.shielded(self._cancelled))
        # One for all: pika calls those of `basic_cancel()` at whichever cancel-ok comes first.
        channel.add_callback(
            self.hub.shielded(self._cancel_agreed), [amqp_spec.Basic.CancelOk], one_shot=False
        )
        self._channel = channel

    def _opened(self, channel: Channel) -> None:
        if channel is not self._channel:
            return
        self._start_all(channel)
        self._watchdog.start()
        if self._age_timer is None:
            self._age_timer = self.hub.call_later(self.unstarted_limit / 10, self._give_old_back)

    def _consume(self, queue: QueueSpec) -> None:
        known = self._consumers.get(queue)
        if self._closed or (known is not None and known.wanted):
            return
        self._leaving_on = None
        consumer = self._consumers[queue] = _Consumer(queue, self.prefetch)
        if not self._joined:
            self._joined = True
            self.connection.join(self)
        elif self._channel is not None and self._channel.is_open:
            self._start(self._channel, consumer)

    def _start_all(self, channel: Channel) -> None:
        """Consume what is not being consumed."""
        # The exclusive ones first: a refusal (403) closes the channel, and then as few
        # as possible have begun.
        for consumer in sorted(
            self._consumers.values(), key=lambda each: not each.spec.exclusive_consumer
        ):
            self._start(channel, consumer)

    def _start(self, channel: Channel, consumer: _Consumer) -> None:
        if not consumer.wanted or consumer.tag is not None or consumer.is_changing:
            return
        if consumer.spec in self.topology.out_of_reach:
            if self._reach_timer is None:
                reason = self.topology.out_of_reach[consumer.spec]
                self.incident = incident(ConnectionLostError(reason))
                pause = REACH_PAUSE * random.uniform(0.5, 1.5)
                self._reach_timer = self.hub.call_later(pause, self._reach)
            return
        consumer.prefetch.begin()
        self._begin(channel, consumer)

    def _begin(self, channel: Channel, consumer: _Consumer) -> None:
        script = self._consuming(channel, consumer)
        converse(channel, script, partial(self._started, consumer), self.hub.shielded)

    def _consuming(self, channel: Channel, consumer: _Consumer) -> Script[None]:
        name = consumer.name = self.topology.name_of(consumer.spec)
        deliver = partial(self._deliver, consumer, self._channel_number)

        def consume(callback: Callable[[Any], None]) -> None:
            # In one breath: a prefetch is for the consumers that come after it on the
            # channel, and another queue's must not slip in between.
            channel.basic_qos(prefetch_count=consumer.prefetch.count)
            channel.basic_consume(
                queue=name,
                on_message_callback=self.hub.shielded(deliver),
                exclusive=consumer.spec.exclusive_consumer,
                consumer_tag=consumer.tag,
                callback=callback,
            )

        consumer.begins(next(reversed(self._unsettled), 0))
        self._gather()
        consumer.tag = f"postage-{next(_tags)}-{name}"[:250]
        with attempting(f"consume queue {name!r}"):
            yield consume

    def _started(self, consumer: _Consumer, _result: Any, error: TransportError | None) -> None:
        if error is None and consumer.wanted:
            consumer.live = True
            logger.debug("consuming queue %r", consumer.spec.name)
            self._failures = 0
            self.failure = None
            if self.consuming:
                self._refused_since = None
        elif error is not None and self._channel is not None and self._channel.is_open:
            self._fail(error)  # it could not even be asked
        # else: the close of the channel, or of the connection, says what to do

    def _deliver(
        self,
        consumer: _Consumer,
        number: int,
        _channel: Channel,
        method: Any,
        properties: Any,
        body: bytes,
    ) -> None:
        if number != self._channel_number:
            return
        delivery = Delivery(consumer.spec, number, method, properties, body)
        delivery.source = consumer
        self._unsettled[delivery.delivery_tag] = None
        self._last_delivery = delivery.received
        if consumer.delivered == consumer.settled:
            consumer.since = delivery.received
        consumer.delivered += 1
        self.inbox.append(delivery)
        if self._stall_timer is None and consumer.prefetch.fixed is None:
            self._stall_timer = self.hub.call_later(STALL, self._look_for_stall)
        self.on_delivery()

    def _stop(self, queue: QueueSpec | None) -> None:
        if queue is None:
            self._leaving_on = self._channel_number
            stopping = list(self._consumers.values())
        else:
            stopping = [self._consumers.pop(queue)] if queue in self._consumers else []
        for consumer in stopping:
            consumer.wanted = False
            self._cancel(consumer)

    def _cancel(self, consumer: _Consumer, then: Callable[[], None] = lambda: None) -> None:
        tag, channel = consumer.tag, self._channel
        consumer.live = False
        if tag is None or channel is None or not channel.is_open:
            return
        consumer.tag = None
        self._cancelling[tag] = then
        channel.basic_cancel(tag, callback=_ignore)

    def _cancel_agreed(self, frame: Any) -> None:
        self._cancelling.pop(frame.method.consumer_tag, _nothing)()

    def _cancelled(self, frame: Any) -> None:
        """Hear that the broker cancelled a consumer: its queue was deleted, or moved."""
        for consumer in self._consumers.values():
            if consumer.tag == frame.method.consumer_tag:
                consumer.ended()
                self._recover(f"the broker cancelled consuming {consumer.name!r}")
                return

    def _lost(self, consumer: _Consumer, sign: str) -> None:
        """Hear from the watchdog that a consumer is not there any more."""
        reason = f"queue {consumer.name!r}: {sign}"
        # In case that it was there after all, and for the channel, which knows it still.
        self._cancel(consumer, then=partial(self._recover, reason))

    def _reach(self) -> None:
        """Try again what was out of reach."""
        self._reach_timer = None
        self._restore()

    def _recover(self, reason: str) -> None:
        """Declare all, and consume what is not being consumed. The rest goes on undisturbed."""
        logger.warning("%s; declaring and consuming anew", reason)
        self.incident = incident(ConnectionLostError(reason))
        self._restore()

    def _restore(self) -> None:
        amqp = self.connection.amqp
        if amqp is not None and self.connection.is_open:
            self.connected(amqp)

    def _channel_closed(self, channel: Channel, reason: Exception) -> None:
        if channel is not self._channel:
            return
        error = translated(reason)
        self.disconnected(error)
        amqp = self.connection.amqp
        if self._closed or amqp is None or not self.connection.is_open:
            return
        self._try_again(amqp, error)

    def _try_again(self, amqp: pika.SelectConnection, error: TransportError) -> None:
        """Consume anew after a pause; a refusal that will not pass ends the consumer."""
        if isinstance(error, ChannelClosedError):
            error = self._explained(error)
        self._failures += 1
        self.incident = incident(error)
        if isinstance(error, ChannelClosedError) and error.code in (
            ACCESS_REFUSED,
            RESOURCE_LOCKED,
        ):
            if not self._is_patient(error):
                return
        elif isinstance(error, ChannelClosedError) and error.code == PRECONDITION_FAILED:
            logger.error("%s", error)
        else:
            logger.warning("%s; consuming anew", error)
        self._pause(amqp)

    def _pause(self, amqp: pika.SelectConnection) -> None:
        """Put all back and consume anew, after a while, if the connection lasts for that long."""

        def again() -> None:
            if self.connection.amqp is amqp and amqp.is_open and not self._closed:
                self.topology.replay(partial(self._restored, amqp))

        self.hub.call_later(backoff(self._failures, 1.0) / 2, again)

    def _is_patient(self, refusal: ChannelClosedError) -> bool:
        """Tell whether a refusal may pass: who holds the queue may be our former connection."""
        patience = TAKEOVER_HEARTBEATS * (self.connection.settings.heartbeat or 60)
        now = time.monotonic()
        if self._refused_since is None:
            self._refused_since = now
            logger.warning("%s; trying again for %g s", refusal, patience)
        if now - self._refused_since <= patience:
            return True
        attempt = f"{refusal.attempt or 'consume'}, tried for {patience:g} s"
        self._fail(ChannelClosedError(refusal.code, refusal.text, attempt, refusal.advice))
        return False

    def _explained(self, refusal: ChannelClosedError) -> ChannelClosedError:
        """Say which queue it is about, and what to do.

        A closed channel does not tell which of the requests on it was refused; the words of
        RabbitMQ do.
        """
        if refusal.attempt:
            return refusal
        names = [each.name for each in self._consumers.values()]
        name = next((each for each in names if f"queue '{each}'" in refusal.text), None)
        attempt = "" if name is None else f"consume queue {name!r}"
        return ChannelClosedError(refusal.code, refusal.text, attempt, _advice(refusal))

    def _fail(self, error: TransportError) -> None:
        logger.error("consuming ends: %s", error)
        self.failure = error
        self.incident = incident(error)
        self.on_delivery()

    # ------------------------------------------------------------------ settlements

    def _collect(self) -> None:
        """Take what was decided. It leaves within ACK_DELAY, or with the next flush."""
        if self._flush_timer is None:
            self._flush_timer = self.hub.call_later(ACK_DELAY, self._flush)

    def _flush(self) -> None:
        if self._flush_timer is not None:
            self.hub.cancel(self._flush_timer)
            self._flush_timer = None
        self._collecting = self._flushing = self._is_urgent = False
        self._flushed = time.monotonic()
        channel = self._channel
        others: dict[int, Settlement] = {}
        touched: dict[_Consumer, int] = {}  # and how many of their present term
        unsettled, acked, number = self._unsettled, self._acked, self._channel_number
        decided, ack = self._decided, Settlement.ACK
        while decided:
            delivery, settlement = decided.popleft()
            tag = delivery.delivery_tag
            if delivery.channel_number != number or tag not in unsettled:
                continue  # stale: the broker has given it to somebody else
            if tag in acked or tag in others:
                continue  # the first word counts: a second one would close the channel (406)
            consumer = delivery.source
            touched[consumer] = touched.get(consumer, 0) + (tag > consumer.after)
            if settlement is ack:
                acked.add(tag)
            else:
                others[tag] = settlement
                if settlement is Settlement.REQUEUE:
                    continue
            consumer.done += 1
            consumer.size += len(delivery.body)
            consumer.repeated += delivery.redelivered
        if channel is None or not channel.is_open:
            return
        self._account(channel, touched)
        for tag, settlement in others.items():
            channel.basic_nack(tag, requeue=settlement is Settlement.REQUEUE)
            unsettled.pop(tag, None)
        if acked and len(acked) == len(unsettled):  # the usual case: all that has come
            channel.basic_ack(next(reversed(unsettled)), len(acked) > 1)
            unsettled.clear()
        elif acked:
            for tag, multiple in coalesced(list(unsettled), acked):
                channel.basic_ack(tag, multiple)
            for tag in acked:
                del unsettled[tag]
        acked.clear()

    # ----------------------------------------------------------------------- prefetch

    def _account(self, channel: Channel, touched: dict[_Consumer, int]) -> None:
        """Take account of what is about to be settled. See `Prefetch`."""
        now = self._flushed
        is_progress = False
        for consumer, settled in touched.items():
            if consumer.done:
                is_progress = True
                seconds = now - consumer.since
                is_fresh = not consumer.repeated
                consumer.prefetch.note(consumer.done, seconds, consumer.size, is_fresh)
                consumer.since = now
                consumer.done = consumer.size = consumer.repeated = 0
                self._change(channel, consumer, now)
            consumer.settled += settled
        if is_progress:
            self._end_rest()

    def _change(self, channel: Channel, consumer: _Consumer, now: float) -> None:
        """Consume anew if another prefetch is wanted: RabbitMQ applies it to new consumers.

        Only when all of the old one is in hand, and the cancel is written before any of its
        acks: so nothing is on its way to the old consumer when it goes, which pika would
        give back. And pika writes one request at a time: while an answer is due, an
        ack would overtake the cancel, so the next settlement has to do.
        """
        count, present = consumer.prefetch.wanted(now), consumer.prefetch.count
        if count != present and consumer.live and consumer.is_full and self._may_ask():
            consumer.prefetch.change(count, now)
            self._begin_anew(channel, consumer)
            return
        enough = (present + 1) // 2 if count == present else present
        if enough != consumer.enough:
            consumer.enough = enough
            self._gather()

    def _gather(self) -> None:
        """Set how many settlements go together."""
        self._together = max([TOGETHER, *(each.enough for each in self._consumers.values())])

    def _may_ask(self) -> bool:
        """Tell whether a request would be written at once, because no answer is due."""
        return not self._cancelling and all(
            each.live or not each.tag for each in self._consumers.values()
        )

    def _begin_anew(self, channel: Channel, consumer: _Consumer) -> None:
        def begin() -> None:
            if channel is self._channel and channel.is_open and consumer.wanted:
                self._begin(channel, consumer)

        def cancelled() -> None:
            if consumer.is_resting:
                consumer.resume = begin
            else:
                begin()

        self._cancel(consumer, then=cancelled)
        consumer.is_changing = True

    def _trust(self, consumer: _Consumer, after: float) -> None:
        channel = self._channel
        if channel is None or consumer.prefetch.is_trusted:
            return
        consumer.prefetch.share()
        if after:
            self.hub.call_later(after, lambda: self._trust(consumer, 0.0))
        elif channel.is_open and consumer.live:
            if self._may_ask():
                consumer.prefetch.trust()
                self._change(channel, consumer, time.monotonic())
            elif consumer.wanted:
                self.hub.call_later(ACK_DELAY, lambda: self._trust(consumer, 0.0))

    def _look_for_stall(self) -> None:
        """Look whether messages wait behind one that takes long."""
        self._stall_timer = None
        channel = self._channel
        if self._closed or channel is None or not channel.is_open:
            return
        if not self._unsettled:
            self._end_rest()
            return
        self._stall_timer = self.hub.call_later(STALL / 2, self._look_for_stall)
        if self._may_ask():
            self._relieve(channel)

    def _relieve(self, channel: Channel) -> None:
        """Give back what waits behind a message that takes long: another instance may be idle.

        The consumer *rests* until something is settled, else the same would come again. One
        consumer at a time: the cancel must be written before what is given back. A message
        that was delivered before stays: the broker counts deliveries, and all have to be
        handled by somebody in the end.
        """
        now = time.monotonic()
        waiting = list(self.inbox)
        if len(self._unsettled) - len(self._acked) - len(self._decided) <= len(waiting):
            del waiting[:1]  # none is being handled: this one will be the next
        waiting = [each for each in waiting if not each.redelivered]
        late = [each.source for each in waiting if now - each.received >= STALL]
        consumer = next((each for each in late if each.live and each.prefetch.fixed is None), None)
        if consumer is None:
            return
        consumer.prefetch.change(1, now)
        consumer.is_resting = True
        self._begin_anew(channel, consumer)
        for delivery in waiting:
            if delivery.source is consumer:
                with contextlib.suppress(ValueError):  # the consumer's thread was faster
                    self.inbox.remove(delivery)
                    self._decided.append((delivery, Settlement.REQUEUE))
        self._flush()

    def _end_rest(self) -> None:
        for consumer in self._consumers.values():
            if consumer.is_resting:
                consumer.is_resting = False
                if consumer.resume is not None:
                    consumer.resume()

    def _give_old_back(self) -> None:
        """Requeue what nobody started in time, with a word about why."""
        self._age_timer = None
        old = time.monotonic() - self.unstarted_limit
        count = 0
        while self.inbox:
            try:
                delivery = self.inbox[0]
                if delivery.received > old:
                    break
                self.inbox.remove(delivery)
            except (IndexError, ValueError):
                continue  # the consumer's thread was faster
            self._decided.append((delivery, Settlement.REQUEUE))
            count += 1
        if count:
            logger.warning(
                "%d message(s) waited %g s for a handler and go back to their queue: "
                "lower `prefetch` (now %d), or handle faster",
                count,
                self.unstarted_limit,
                max(each.prefetch.count for each in self._consumers.values()),
            )
            self._flush()
        if not self._closed:
            self._age_timer = self.hub.call_later(self.unstarted_limit / 10, self._give_old_back)

    # ------------------------------------------------------------------------ the end

    def _close(self, agreed: list[bool]) -> None:
        if self._closed:
            agreed.append(False)
            return
        self._flush()
        channel = self._channel
        if channel is None or not channel.is_open:
            agreed.append(not self._joined)
            self._leave()
            return

        unbroken = self._leaving_on in (None, self._channel_number)

        def closed(_channel: Channel, reason: Exception) -> None:
            agreed.append(unbroken and isinstance(translated(reason), ClosedError))
            if self._closed:  # else it comes late, and consuming goes on already
                self._leave()

        self._closed = True
        channel.add_on_close_callback(self.hub.shielded(closed))
        channel.close()

    def _resume(self) -> None:
        if self._closed:
            self._closed = False
            self._leaving_on = None
            for consumer in self._consumers.values():
                consumer.wanted = True
            self.connection.join(self)

    def _leave(self) -> None:
        self._closed = True
        self.connection.leave(self)
        channel = self._channel
        if channel is not None and not (channel.is_closing or channel.is_closed):
            channel.close()
        if self._age_timer is not None:
            self.hub.cancel(self._age_timer)
            self._age_timer = None
        if self._reach_timer is not None:
            self.hub.cancel(self._reach_timer)
            self._reach_timer = None
        if self._stall_timer is not None:
            self.hub.cancel(self._stall_timer)
            self._stall_timer = None
        self._watchdog.stop()
        self.disconnected(ConnectionLostError("closed"))


def _advice(refusal: ChannelClosedError) -> str:
    """Return what to do when the broker closes the channel of a consumer."""
    if "refused for user" in refusal.text:
        return "The user may not read it: check its permissions"
    if refusal.code in (ACCESS_REFUSED, RESOURCE_LOCKED):
        return (
            "Two processes claim this queue, or the broker has not noticed the end of the former "
            "run yet: see rabbitmqctl list_consumers"
        )
    if "delivery acknowledgement" in refusal.text:
        return (
            "A handler took longer than the broker's consumer_timeout; its message is delivered "
            "again"
        )
    return ""


#: Numbers for consumer tags, which must be unique on a channel.
_tags = itertools.count(1)


def _nothing() -> None:
    """What to do when nobody said."""


def _ignore(_frame: Any) -> None:
    """Ask for an answer, which another callback hears."""
