# SPDX-License-Identifier: MIT
"""A channel: publishing, confirms, consumers and settlements (AMQP 0-9-1, classes channel,
basic and confirm). Exchanges and queues are in `declarations`."""

from __future__ import annotations

import enum
import itertools
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from pika import amqp_object, spec

from postage.broker import arguments, fields, frames
from postage.broker.consumers import Consumer
from postage.broker.errors import (
    ACCESS_REFUSED,
    NOT_ALLOWED,
    NOT_FOUND,
    NOT_IMPLEMENTED,
    PRECONDITION_FAILED,
    RESOURCE_ERROR,
    RESOURCE_LOCKED,
    UNEXPECTED_FRAME,
    Refusal,
)
from postage.broker.messages import Message, join_properties
from postage.broker.queues import ENTRY_BYTES, Entry, Queue
from postage.broker.vhost import REPLY_TO, Outcome, VirtualHost

if TYPE_CHECKING:
    from postage.broker.connection import Connection
    from postage.broker.transactions import Transaction

logger = logging.getLogger(__name__)

#: The largest body in bytes, as in RabbitMQ 3.10 (max_message_size).
MAX_MESSAGE_SIZE = 134_217_728
#: Bytes of messages of which the end has not come, or that are not committed, in all channels of
#: a connection. No alarm can limit these: who is not read any more cannot finish them.
MAX_UNFINISHED_SIZE = 2 * MAX_MESSAGE_SIZE


class Settlement(enum.Enum):
    """What becomes of a delivery."""

    ACK = "it was handled"
    REQUEUE = "it goes back"
    REJECT = "nobody wants it"


class Unsettled(NamedTuple):
    """A delivery that waits for its settlement.

    Attributes:
        is_lost: it is in its queue again, which forgot the consumer: its settlement is for nothing.
    """

    tag: int
    entry: Entry
    consumer: Consumer | None
    since: float
    is_lost: bool = False


class _Content:
    """A message that is being received."""

    __slots__ = ("body", "encoded", "method", "size")

    def __init__(self, method: spec.Basic.Publish) -> None:
        self.method = method
        self.size = -1  # before its header has come
        self.encoded = b""
        # Not a list of pieces: a client may send one octet at a time.
        self.body = bytearray()


class Channel:
    """A channel of a connection.

    Attributes:
        number: its number.
        last_queue: the queue that it declared last: an empty name means this one.
        is_closing: the broker has closed it, and waits for the client to say so too.
        is_confirming: what is published is confirmed.
        transaction: what waits for tx.commit, None without transactions.
    """

    def __init__(self, connection: Connection, number: int, vhost: VirtualHost) -> None:
        self.connection = connection
        self.number = number
        self.node = connection.node
        self.vhost = vhost
        self.last_queue: str | None = None
        self.is_closing = False
        self.is_confirming = False
        self.transaction: Transaction | None = None
        self.consumers: dict[str, tuple[Consumer, Queue]] = {}
        # A plain dict is slow to find its first item once many before it are gone.
        self.unsettled: OrderedDict[int, Unsettled] = OrderedDict()
        self._next_tag = 1
        self._prefetch = 0
        #: The prefetch of the whole channel, and how many deliveries count for it.
        self._limit = 0
        self._held = 0
        self._content: _Content | None = None
        self._reply_tag: str | None = None
        self._reply_address: str | None = None
        self._published = 0
        #: Publishings that wait for the disk, and those whose fate is told with this turn.
        self._unconfirmed: set[int] = set()
        self._acks: list[int] = []
        self._nacks: list[int] = []

    def __repr__(self) -> str:
        return (
            f"<Channel {self.number} [{len(self.consumers)} consumers, "
            f"{len(self.unsettled)} unsettled]>"
        )

    # Frames

    def send(self, method: amqp_object.Method) -> None:
        """Send a method."""
        self.connection.send(frames.method(self.number, method))

    @property
    def due(self) -> str:
        """The kind of frame that has to come next."""
        if self._content is None:
            return "method"
        return "content header" if self._content.size < 0 else "content body"

    def content_header(self, payload: bytes) -> None:
        """Take the header of a message.

        Raises:
            Refusal: None was due, or it announces too much.
        """
        content = self._content
        if content is None or self.due != "content header":
            raise unexpected(self.due)
        class_id, content.size, content.encoded = frames.decode_content_header(payload)
        if class_id != spec.Basic.INDEX:
            raise Refusal(
                UNEXPECTED_FRAME,
                f"expected content header for class 60, got one for class {class_id} instead",
            )
        if content.size > MAX_MESSAGE_SIZE:
            raise Refusal(
                PRECONDITION_FAILED,
                f"message size {content.size} is larger than configured max size "
                f"{MAX_MESSAGE_SIZE}",
            )
        if content.size == 0:
            self._publish(content, b"")

    def content_body(self, payload: bytes) -> None:
        """Take a part of the body of a message.

        Raises:
            Refusal: None was due, it is more than was announced, or the connection has begun too
                much and not finished it.
        """
        content = self._content
        if content is None or self.due != "content body":
            raise unexpected(self.due)
        if not content.body and len(payload) == content.size:
            self._publish(content, payload)
            return
        content.body += payload
        self._hold(len(payload))
        if len(content.body) > content.size:
            raise unexpected("content body")
        if len(content.body) == content.size:
            self._publish(content, bytes(content.body))

    def _hold(self, size: int) -> None:
        self.connection.unfinished += size
        if self.connection.unfinished > MAX_UNFINISHED_SIZE:
            raise Refusal(
                RESOURCE_ERROR,
                f"more than {MAX_UNFINISHED_SIZE} octets of messages that were not finished, or "
                "not committed",
            )

    def _forget_content(self) -> None:
        if self._content is not None:
            self.connection.unfinished -= len(self._content.body)
            self._content = None

    # Publishing

    def begin_publish(self, method: spec.Basic.Publish, payload: bytes) -> None:
        """Begin to receive a message."""
        if method.immediate:
            raise Refusal(NOT_IMPLEMENTED, "immediate=true")
        self._content = _Content(method)

    def _publish(self, content: _Content, body: bytes) -> None:
        self._forget_content()
        method = content.method
        if method.exchange and self.vhost.exchange(method.exchange).internal:
            raise Refusal(
                ACCESS_REFUSED,
                f"cannot publish to internal exchange '{method.exchange}' in vhost "
                f"'{self.vhost.name}'",
            )
        message = Message(method.exchange, method.routing_key, content.encoded, body)
        self._check_user(message)
        self._translate_reply_to(message)
        if self.transaction is not None:
            self.transaction.messages.append((message, method.mandatory))
            self.transaction.size += ENTRY_BYTES + message.size
            self._hold(ENTRY_BYTES + message.size)
        else:
            self.publish(message, method.mandatory)

    def publish(self, message: Message, mandatory: bool) -> Outcome:
        """Let a message go its way, and tell its publisher what became of it."""
        if self.is_confirming:
            self._published += 1
        if self.node.is_nacking:
            self._told(self._published, is_good=False)
            return Outcome()
        outcome = self.vhost.publish(message)
        if mandatory and not outcome.is_routed:
            self._return(message)
        if outcome.is_refused:
            self._told(self._published, is_good=False)
        elif outcome.is_stored:
            self._wait_for_disk(self._published)
        else:
            self._told(self._published, is_good=True)
        return outcome

    def _check_user(self, message: Message) -> None:
        user = message.text("user_id")
        if user is not None and user != self.connection.user:
            raise Refusal(
                PRECONDITION_FAILED,
                f"user_id property set to '{user}' but authenticated user was "
                f"'{self.connection.user}'",
            )

    def _translate_reply_to(self, message: Message) -> None:
        if message.properties.get("reply_to") != _ENCODED_REPLY_TO:
            return
        if self._reply_address is None:
            raise Refusal(PRECONDITION_FAILED, "fast reply consumer does not exist")
        address = frames.short_string(self._reply_address)
        message.properties = {**message.properties, "reply_to": address}
        message.encoded = join_properties(message.properties)

    def _return(self, message: Message) -> None:
        method = spec.Basic.Return(312, "NO_ROUTE", message.exchange, message.routing_key)
        self.connection.send_content(
            frames.method(self.number, method), self.number, message.encoded, message.body
        )

    # Confirms

    def select_confirms(self, method: spec.Confirm.Select, payload: bytes) -> None:
        """Confirm what is published from now on."""
        if self.transaction is not None:
            raise Refusal(PRECONDITION_FAILED, "cannot switch from tx to confirm mode")
        self.is_confirming = True
        if not method.nowait:
            self.send(spec.Confirm.SelectOk())

    def _told(self, number: int, *, is_good: bool) -> None:
        if self.is_confirming:
            (self._acks if is_good else self._nacks).append(number)
            self.node.confirm_soon(self)

    def _wait_for_disk(self, number: int) -> None:
        if self.is_confirming:
            self._unconfirmed.add(number)
            self.node.sync_soon(self, number)

    def synced(self, number: int, *, is_good: bool) -> None:
        """Take note that a message has reached the disk, or could not."""
        if self.transaction is not None:
            self.send(spec.Tx.CommitOk())
        elif number in self._unconfirmed:
            self._unconfirmed.remove(number)
            self._told(number, is_good=is_good)

    def send_confirms(self) -> None:
        """Tell the publisher what has become of its messages since the last time."""
        acks, nacks = self._acks, self._nacks
        self._acks, self._nacks = [], []
        if self.is_closing:
            return
        # A refusal goes first: an acknowledgement of many must not cover it.
        for number in nacks:
            self.send(spec.Basic.Nack(number, requeue=False))
        for number, multiple in coalesced(acks, self._unconfirmed):
            self.send(spec.Basic.Ack(number, multiple))

    # Deliveries

    @property
    def can_take(self) -> bool:
        """Whether it takes more deliveries now."""
        return self.connection.has_room and (not self._limit or self._held < self._limit)

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Send a message to a consumer."""
        tag = self._next_tag
        self._next_tag += 1
        if not consumer.no_ack:
            self.unsettled[tag] = Unsettled(tag, entry, consumer, self.node.clock.now())
            self._held += 1
        message = entry.message
        method = frames.deliver(
            self.number, consumer.encoded_tag, tag, entry.is_redelivered, message.address
        )
        self.connection.send_content(method, self.number, _encoded(entry), message.body)

    def deliver_reply(self, message: Message) -> None:
        """Send a message to the consumer of direct replies, unless it reads none of them."""
        if not self.connection.has_room_for_replies:
            # No queue holds them, so nothing but this limits them.
            logger.warning("%s reads no replies: one is dropped", self.connection.peer)
            return
        encoded_tag = frames.short_string(self._reply_tag or "")
        # RabbitMQ counts them with the others, but never on: each carries the next tag.
        method = frames.deliver(self.number, encoded_tag, self._next_tag, False, message.address)
        self.connection.send_content(method, self.number, message.encoded, message.body)

    def dispatch(self) -> None:
        """Take from all queues what the consumers can take by now."""
        for queue in {queue: None for _, queue in self.consumers.values()}:
            queue.consumers.wake_all(self)
            queue.dispatch()

    def get(self, method: spec.Basic.Get, payload: bytes) -> None:
        """Send one message, if there is one."""
        queue = self.queue(method.queue)
        if queue.arguments.is_quorum and queue.arguments.is_single_active:
            raise Refusal(
                RESOURCE_LOCKED,
                f"cannot obtain access to locked queue '{queue.name}' in vhost "
                f"'{self.vhost.name}'. basic.get operations are not supported by quorum queues "
                "with single active consumer",
            )
        entry = queue.get()
        if entry is None:
            self.send(spec.Basic.GetEmpty())
            return
        tag = self._next_tag
        self._next_tag += 1
        if method.no_ack:
            queue.ack(entry)
        else:
            self.unsettled[tag] = Unsettled(tag, entry, None, self.node.clock.now())
        message = entry.message
        answer = spec.Basic.GetOk(
            tag, entry.is_redelivered, message.exchange, message.routing_key, queue.count
        )
        frame = frames.method(self.number, answer)
        encoded = _encoded(entry, is_got=True)
        self.connection.send_content(frame, self.number, encoded, message.body)

    # Consumers

    def queue(self, name: str) -> Queue:
        """Return a queue; an empty name means the one that was declared last.

        Raises:
            Refusal: There is none, or it belongs to another connection.
        """
        if not name:
            if self.last_queue is None:
                raise Refusal(NOT_FOUND, "no previously declared queue")
            name = self.last_queue
        return self.vhost.queue(name, self.connection)

    def qos(self, method: spec.Basic.Qos, payload: bytes) -> None:
        """Limit what may be unsettled: for each later consumer, or for the whole channel."""
        if method.prefetch_size:
            raise Refusal(NOT_IMPLEMENTED, f"prefetch_size!=0 ({method.prefetch_size})")
        if self.node.is_strict:
            arguments.check_strict_qos(is_global=method.global_qos)
        if method.global_qos:
            self._limit = method.prefetch_count
        else:
            self._prefetch = method.prefetch_count
        self.send(spec.Basic.QosOk())
        if method.global_qos:
            self.dispatch()

    def consume(self, method: spec.Basic.Consume, payload: bytes) -> None:
        """Begin to consume from a queue, or to get direct replies."""
        tag = method.consumer_tag or f"amq.ctag-{uuid.uuid4().hex}"
        if tag in self.consumers or tag == self._reply_tag:
            raise Refusal(NOT_ALLOWED, f"attempt to reuse consumer tag '{tag}'")
        if method.queue == REPLY_TO:
            self._consume_replies(tag, method)
            return
        queue = self.queue(method.queue)
        raw = frames.arguments_of(type(method), payload)
        owner = f"queue '{queue.name}' in vhost '{self.vhost.name}'"
        priority = arguments.read_priority(raw.get("x-priority"), owner)
        # A quorum queue takes an exclusive consumer for any other.
        exclusive = method.exclusive and not queue.arguments.is_quorum
        if queue.consumers.exclusive or (
            exclusive and (len(queue.consumers) or queue.arguments.is_single_active)
        ):
            raise Refusal(ACCESS_REFUSED, f"{owner} in exclusive use")
        consumer = Consumer(
            self,
            tag,
            no_ack=method.no_ack,
            exclusive=exclusive,
            prefetch=self._prefetch,
            priority=priority,
        )
        self.consumers[tag] = (consumer, queue)
        queue.add_consumer(consumer)
        if not method.nowait:
            self.send(spec.Basic.ConsumeOk(tag))
        queue.dispatch()

    def _consume_replies(self, tag: str, method: spec.Basic.Consume) -> None:
        if not method.no_ack:
            raise Refusal(PRECONDITION_FAILED, "reply consumer cannot acknowledge")
        if self._reply_tag is not None:
            raise Refusal(PRECONDITION_FAILED, "reply consumer already set")
        self._reply_tag = tag
        self._reply_address = f"{REPLY_TO}.{uuid.uuid4().hex}"
        self.vhost.add_caller(self._reply_address, self)
        if not method.nowait:
            self.send(spec.Basic.ConsumeOk(tag))

    def cancel(self, method: spec.Basic.Cancel, payload: bytes) -> None:
        """End a consumer. It is no error if there is none."""
        if method.consumer_tag == self._reply_tag:
            self._stop_replies()
        found = self.consumers.pop(method.consumer_tag, None)
        if found is not None:
            consumer, queue = found
            queue.remove_consumer(consumer)
        if not method.nowait:
            self.send(spec.Basic.CancelOk(method.consumer_tag))
        if found is not None:
            self.vhost.consumer_left(queue)

    def cancelled(self, consumer: Consumer) -> None:
        """Tell a client that the broker has ended its consumer."""
        del self.consumers[consumer.tag]
        if self.connection.knows("consumer_cancel_notify"):
            self.send(spec.Basic.Cancel(consumer.tag, nowait=True))

    def forgotten(self, consumer: Consumer) -> list[Entry]:
        """Return what a consumer held that its queue has forgotten; the client hears nothing.

        As in RabbitMQ the channel goes on to know the tag, and takes settlements of what is lost.
        """
        lost = [each for each in self.unsettled.values() if each.consumer is consumer]
        for each in lost:
            self.unsettled[each.tag] = each._replace(is_lost=True)
        self._held -= len(lost)
        if self._limit:
            self.dispatch()
        return [each.entry for each in lost]

    def _stop_replies(self) -> None:
        if self._reply_address is not None:
            self.vhost.remove_caller(self._reply_address)
        self._reply_tag = self._reply_address = None

    # Settlements

    def ack(self, method: spec.Basic.Ack, payload: bytes) -> None:
        """Let go of deliveries that were handled."""
        self._settle(self._take(method.delivery_tag, method.multiple), Settlement.ACK)

    def nack(self, method: spec.Basic.Nack, payload: bytes) -> None:
        """Give deliveries back, or refuse them for good."""
        how = Settlement.REQUEUE if method.requeue else Settlement.REJECT
        self._settle(self._take(method.delivery_tag, method.multiple), how)

    def reject(self, method: spec.Basic.Reject, payload: bytes) -> None:
        """Give one delivery back, or refuse it for good."""
        how = Settlement.REQUEUE if method.requeue else Settlement.REJECT
        self._settle(self._take(method.delivery_tag, multiple=False), how)

    def recover(self, method: spec.Basic.Recover, payload: bytes) -> None:
        """Give back all that is unsettled."""
        if not method.requeue:
            raise Refusal(NOT_IMPLEMENTED, "requeue=false")
        settled = self._take(0, multiple=True)
        if isinstance(method, spec.Basic.Recover):
            self.send(spec.Basic.RecoverOk())
        self.settle(settled, Settlement.REQUEUE)

    def _settle(self, settled: list[Unsettled], how: Settlement) -> None:
        if self.transaction is not None:
            self.transaction.settlements.append((settled, how))
        else:
            self.settle(settled, how)

    def settle(self, settled: list[Unsettled], how: Settlement) -> None:
        """Tell the queues what became of deliveries, and let others have their turn.

        As in RabbitMQ one consumer comes after the other, and has what it can take by then.
        """
        groups: dict[tuple[str, str], list[Unsettled]] = {}
        for each in settled:
            tag = each.consumer.tag if each.consumer is not None else ""
            groups.setdefault((each.entry.queue.name, tag), []).append(each)
        for _, group in sorted(groups.items()) if len(groups) > 1 else groups.items():
            queue = group[0].entry.queue
            self._release(queue, group)
            if how is Settlement.REQUEUE:
                queue.requeue([each.entry for each in group])
                continue
            # Dead letters leave in the order in which the messages were in the queue.
            for entry in sorted(each.entry for each in group):
                (queue.ack if how is Settlement.ACK else queue.reject)(entry)
            queue.dispatch()
        if self._limit:
            self.dispatch()

    def _release(self, queue: Queue, group: list[Unsettled]) -> None:
        """Let the consumer of some deliveries take so many more."""
        consumer = group[0].consumer
        if consumer is None:
            return
        consumer.unsettled -= len(group)
        self._held -= len(group)
        if not self._limit:
            queue.consumers.wake(consumer)

    def take_back(self, settled: list[Unsettled]) -> None:
        """Hold deliveries again whose settlement was rolled back."""
        self.unsettled.update((each.tag, each) for each in settled)
        self.unsettled = OrderedDict(sorted(self.unsettled.items()))

    def _take(self, tag: int, multiple: bool) -> list[Unsettled]:
        """Return the deliveries that a tag means, which are settled now."""
        unsettled = self.unsettled
        tags: Iterable[int]
        if multiple and tag == 0:
            tags = tuple(unsettled)
        elif tag not in unsettled:
            raise Refusal(PRECONDITION_FAILED, f"unknown delivery tag {tag}")
        elif multiple:  # they are in the order of their tags
            tags = tuple(itertools.takewhile(lambda each: each <= tag, unsettled))
        else:
            tags = (tag,)
        found = [unsettled.pop(each) for each in tags]
        return [each for each in found if not each.is_lost]

    def check_timeout(self, limit: float) -> None:
        """Refuse to wait any longer for a settlement (RabbitMQ, consumer_timeout).

        Raises:
            Refusal: A delivery is unsettled for longer than `limit` seconds.
        """
        oldest = next(iter(self.unsettled.values()), None)
        if oldest is not None and self.node.clock.now() - oldest.since > limit:
            raise Refusal(
                PRECONDITION_FAILED,
                f"delivery acknowledgement on channel {self.number} timed out. Timeout value "
                f"used: {int(limit * 1000)} ms. This timeout value can be configured, see "
                "consumers doc guide to learn more",
            )

    # The channel itself

    def flow(self, method: spec.Channel.Flow, payload: bytes) -> None:
        """Go on with deliveries, which cannot be paused."""
        if not method.active:
            # RabbitMQ: only prefetch slows consumers down.
            raise Refusal(NOT_IMPLEMENTED, "active=false")
        self.send(spec.Channel.FlowOk(True))

    def close(self) -> None:
        """Give back and forget all that the channel had."""
        self._stop_replies()
        consumers = list(self.consumers.values())
        self.consumers.clear()
        for consumer, queue in consumers:
            queue.remove_consumer(consumer)
        if self.transaction is not None:
            self.connection.unfinished -= self.transaction.size
            for each, _ in self.transaction.settlements:
                self.take_back(each)
        settled = self._take(0, multiple=True)
        self._unconfirmed.clear()
        self._forget_content()
        # All consumers are gone by now: what is given back is ahead of what comes later.
        _give_back(settled, is_lost=True)
        queues = {each.entry.queue: None for each in settled}
        for queue in {**queues, **{queue: None for _, queue in consumers}}:
            self.vhost.consumer_left(queue)


_ENCODED_REPLY_TO = frames.short_string(REPLY_TO)


def coalesced(acks: list[int], unconfirmed: set[int]) -> list[tuple[int, bool]]:
    """Return the fewest acknowledgements for publishings: their numbers, and whether multiple.

    >>> coalesced([1, 2, 3, 5], unconfirmed={4})
    [(3, True), (5, False)]
    """
    if not acks:
        return []
    lowest = min(unconfirmed, default=None)
    below = [number for number in acks if lowest is None or number < lowest]
    first = [(max(below), len(below) > 1)] if below else []
    return first + [(number, False) for number in acks if lowest is not None and number > lowest]


def _give_back(settled: Iterable[Unsettled], *, is_lost: bool = False) -> None:
    queues: dict[Queue, list[Entry]] = {}
    for each in settled:
        queues.setdefault(each.entry.queue, []).append(each.entry)
    for queue, entries in queues.items():
        queue.requeue(entries, is_lost=is_lost)


def _encoded(entry: Entry, is_got: bool = False) -> bytes:
    """Return the properties of a delivery; a quorum queue counts those before it."""
    if (entry.deliveries or is_got) and entry.queue.arguments.is_quorum:
        # RabbitMQ tells a consumer of the deliveries before, basic.get also that there were none.
        count = fields.encode(entry.deliveries)
        return entry.message.with_headers({"x-delivery-count": count})
    return entry.message.encoded


def unexpected(due: str) -> Refusal:
    """Return the refusal of a frame in the place of one that is due."""
    words = {
        "method": "method frame, got non method",
        "content header": "content header for class 60, got non content header",
        "content body": "content body, got non content body",
    }
    return Refusal(UNEXPECTED_FRAME, f"expected {words[due]} frame instead")


Handler = Callable[[Channel, Any, bytes], None]

#: What a channel does with the methods of its classes.
HANDLERS: dict[type[amqp_object.Method], Handler] = {
    spec.Basic.Ack: Channel.ack,
    spec.Basic.Cancel: Channel.cancel,
    spec.Basic.Consume: Channel.consume,
    spec.Basic.Get: Channel.get,
    spec.Basic.Nack: Channel.nack,
    spec.Basic.Publish: Channel.begin_publish,
    spec.Basic.Qos: Channel.qos,
    spec.Basic.Recover: Channel.recover,
    spec.Basic.RecoverAsync: Channel.recover,
    spec.Basic.Reject: Channel.reject,
    spec.Channel.Flow: Channel.flow,
    spec.Confirm.Select: Channel.select_confirms,
}
