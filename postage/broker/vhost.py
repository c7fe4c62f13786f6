# SPDX-License-Identifier: MIT
"""A virtual host: its exchanges, queues and bindings, and the way of a message through them."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from postage.broker import arguments, dead_letters, fields
from postage.broker.clock import Clock
from postage.broker.errors import (
    ACCESS_REFUSED,
    COMMAND_INVALID,
    NOT_IMPLEMENTED,
    PRECONDITION_FAILED,
    RESOURCE_LOCKED,
    Refusal,
    not_found,
)
from postage.broker.exchanges import TYPES, Exchange
from postage.broker.messages import Message
from postage.broker.queues import ENTRY_BYTES, Entry, Queue
from postage.broker.store import (
    Store,
    StoredBinding,
    StoredExchange,
    StoredMessage,
    StoredQueue,
)

#: The exchanges of every virtual host (AMQP 0-9-1, section 3.1.3; RabbitMQ adds amq.match).
PREDECLARED = {
    "amq.direct": "direct",
    "amq.fanout": "fanout",
    "amq.topic": "topic",
    "amq.headers": "headers",
    "amq.match": "headers",
    "amq.rabbitmq.trace": "topic",
}
#: How many dead letters are published before others get their turn, which takes some 30 ms.
DEAD_LETTERS_AT_ONCE = 300
#: The queue that nobody declares: who consumes from it gets replies (RabbitMQ, direct reply-to).
REPLY_TO = "amq.rabbitmq.reply-to"


class Caller(Protocol):
    """A channel that waits for direct replies."""

    def deliver_reply(self, message: Message) -> None:
        """Send a message to the consumer of direct replies."""


@dataclass
class Outcome:
    """What became of a message that was published.

    Attributes:
        is_routed: whether a queue or a caller was found for it.
        is_refused: whether a queue was full.
        is_stored: whether it has to reach the disk.
    """

    is_routed: bool = False
    is_refused: bool = False
    is_stored: bool = False


class VirtualHost:
    """A virtual host.

    Args:
        memory: is told how many bytes more or fewer are kept.
        burial: is told of this virtual host when it has a dead letter to publish.
        store: keeps what is durable, None for nothing.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        *,
        memory: Callable[[int], None] = lambda size: None,
        burial: Callable[[VirtualHost], None] = lambda vhost: None,
        store: Store | None = None,
    ) -> None:
        self.name = name
        self.clock = clock
        self._memory = memory
        self._burial = burial
        self._store = store
        self.exchanges: dict[str, Exchange] = {}
        self.queues: dict[str, Queue] = {}
        #: The exchanges that lead to a queue or an exchange.
        self._sources: dict[Queue | Exchange, set[Exchange]] = {}
        self._callers: dict[str, Caller] = {}
        self._dead: deque[tuple[Entry, str]] = deque()
        for exchange, type_ in PREDECLARED.items():
            is_internal = exchange == "amq.rabbitmq.trace"
            self.exchanges[exchange] = TYPES[type_](exchange, durable=True, internal=is_internal)

    def __repr__(self) -> str:
        return f"<VirtualHost {self.name} [{len(self.queues)} queues]>"

    # Exchanges

    def exchange(self, name: str) -> Exchange:
        """Return an exchange.

        Raises:
            Refusal: There is none of that name.
        """
        try:
            return self.exchanges[name]
        except KeyError:
            raise not_found("exchange", name, self.name) from None

    def declare_exchange(
        self,
        name: str,
        type_: str,
        raw: Mapping[str, bytes],
        *,
        durable: bool = False,
        auto_delete: bool = False,
        internal: bool = False,
    ) -> None:
        """Make an exchange, unless there is the same already.

        Raises:
            Refusal: It is of an unknown type, its name is reserved, or there is another.
        """
        if type_ not in TYPES:
            raise Refusal(COMMAND_INVALID, f"unknown exchange type '{type_}'")
        check_not_default(name)
        owner = f"exchange '{name}' in vhost '{self.name}'"
        arguments.check_exchange_name("alternate-exchange", raw.get("alternate-exchange"), owner)
        current = self.exchanges.get(name)
        if current is None:
            if name.startswith("amq."):
                raise Refusal(
                    ACCESS_REFUSED, f"exchange name '{name}' contains reserved prefix 'amq.*'"
                )
            self._add_exchange(name, type_, raw, durable, auto_delete, internal)
            return
        arguments.check_same("type", current.type, type_, owner)
        arguments.check_same("durable", current.durable, durable, owner)
        arguments.check_same("auto_delete", current.auto_delete, auto_delete, owner)
        arguments.check_same("internal", current.internal, internal, owner)
        name = "alternate-exchange"
        arguments.check_equivalent(name, current.arguments.get(name), raw.get(name), owner)

    def _add_exchange(
        self,
        name: str,
        type_: str,
        raw: Mapping[str, bytes],
        durable: bool,
        auto_delete: bool,
        internal: bool,
    ) -> None:
        self.exchanges[name] = TYPES[type_](
            name, durable=durable, auto_delete=auto_delete, internal=internal, arguments=raw
        )
        if self._store is not None and durable:
            self._store.put_exchange(
                StoredExchange(self.name, name, type_, auto_delete, internal, fields.join(raw))
            )

    def delete_exchange(self, name: str, *, if_unused: bool = False) -> None:
        """Delete an exchange with its bindings. It is no error if there is none.

        Raises:
            Refusal: It is one of those that are always there, or it is used.
        """
        check_not_default(name)
        if name in PREDECLARED:
            raise Refusal(
                ACCESS_REFUSED,
                f"deletion of system exchange '{name}' in vhost '{self.name}' not allowed",
            )
        exchange = self.exchanges.get(name)
        if exchange is None:
            return
        if if_unused and exchange.has_bindings:
            raise Refusal(
                PRECONDITION_FAILED, f"exchange '{name}' in vhost '{self.name}' in use"
            )
        del self.exchanges[name]
        if self._store is not None and exchange.durable:
            self._store.drop_exchange(self.name, name)
        for binding in tuple(exchange.bindings):
            self._sources.get(binding.destination, set()).discard(exchange)
            self._forget_binding(exchange, binding.destination, binding.key, binding.arguments)
        self._unbind_all(exchange)

    # Queues

    def queue(self, name: str, connection: object) -> Queue:
        """Return a queue that a connection may use.

        Raises:
            Refusal: There is none of that name, or another connection has it for itself.
        """
        queue = self.queues.get(name)
        if queue is None:
            raise not_found("queue", name, self.name)
        if queue.owner is not None and queue.owner is not connection:
            raise Refusal(
                RESOURCE_LOCKED,
                f"cannot obtain exclusive access to locked queue '{name}' in vhost "
                f"'{self.name}'. It could be originally declared on another connection or the "
                "exclusive property value does not match that of the original declaration.",
            )
        return queue

    def declare_queue(
        self,
        name: str,
        raw: Mapping[str, bytes],
        connection: object,
        *,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        is_strict: bool = False,
    ) -> Queue:
        """Return a queue, which is made unless there is the same already.

        Args:
            name: empty for a name that the broker gives.

        Raises:
            Refusal: Its name is reserved, its arguments are wrong, or there is another.
        """
        is_named_here = not name
        if is_named_here:
            name = f"amq.gen-{uuid.uuid4().hex}"
        elif name.startswith("amq.") and name not in self.queues:
            raise Refusal(
                ACCESS_REFUSED, f"queue name '{name}' contains reserved prefix 'amq.*'"
            )
        owner = f"queue '{name}' in vhost '{self.name}'"
        if name in self.queues:
            queue = self.queue(name, connection)
            if exclusive is not (queue.owner is not None):
                raise Refusal(
                    RESOURCE_LOCKED,
                    f"cannot obtain exclusive access to locked {owner}. It could be originally "
                    "declared on another connection or the exclusive property value does not "
                    "match that of the original declaration.",
                )
            arguments.check_same("durable", queue.durable, durable, owner)
            arguments.check_same("auto_delete", queue.auto_delete, auto_delete, owner)
            arguments.check_equivalent_queue(queue.arguments, raw, owner)
            queue.use()
            return queue
        if is_strict:
            arguments.check_strict_queue(durable=durable, exclusive=exclusive)
        wanted = arguments.read_queue_arguments(raw, owner)
        if is_named_here and wanted.is_quorum:
            raise Refusal(
                PRECONDITION_FAILED,
                "Cannot declare a server-named queue for type rabbit_quorum_queue",
            )
        arguments.check_quorum(
            wanted, owner, durable=durable, exclusive=exclusive, auto_delete=auto_delete
        )
        id_ = None
        if self._store is not None and durable and not exclusive:
            id_ = self._store.put_queue(
                StoredQueue(self.name, name, auto_delete, fields.join(raw))
            )
        queue = Queue(
            self,
            name,
            wanted,
            durable=durable,
            auto_delete=auto_delete,
            owner=connection if exclusive else None,
            id=id_,
        )
        self.queues[name] = queue
        return queue

    def delete_queue(self, queue: Queue, *, if_unused: bool = False, if_empty: bool = False) -> int:
        """Delete a queue, and return how many messages waited in it.

        Raises:
            Refusal: It is used, or not empty.
        """
        owner = f"queue '{queue.name}' in vhost '{self.name}'"
        for flag, is_set in (("if-unused", if_unused), ("if-empty", if_empty)):
            if is_set and queue.arguments.is_quorum:
                raise Refusal(
                    NOT_IMPLEMENTED,
                    f"cannot delete {owner}. queue.delete operations with {flag} flag set are "
                    "not supported by quorum queues",
                )
        if if_unused and len(queue.consumers):
            raise Refusal(PRECONDITION_FAILED, f"{owner} in use")
        if if_empty and queue.count:
            raise Refusal(PRECONDITION_FAILED, f"{owner} not empty")
        number = queue.count
        for entry in queue.close():
            self._memory(-ENTRY_BYTES - entry.message.size)
        if self._store is not None and queue.id is not None:
            self._store.drop_queue(queue.id)
        del self.queues[queue.name]
        self._unbind_all(queue)
        for consumer in tuple(queue.consumers):
            consumer.channel.cancelled(consumer)
        return number

    def expire_queue(self, queue: Queue) -> None:
        """Delete a queue that nobody used for too long. What is in it is lost, as in RabbitMQ."""
        self.delete_queue(queue)

    def consumer_left(self, queue: Queue) -> None:
        """Let others have what a consumer gave back, or delete what it was the last one of."""
        if queue.is_deleted:
            return
        if queue.auto_delete and not len(queue.consumers):
            self.delete_queue(queue)
        else:
            queue.dispatch()

    def cancel_consumers(self, queue: Queue) -> int:
        """Take all consumers from a queue that stays, and return how many those were."""
        consumers = tuple(queue.consumers)
        for consumer in consumers:
            queue.remove_consumer(consumer)
            consumer.channel.cancelled(consumer)
        return len(consumers)

    def forget_consumers(self, queue: Queue) -> int:
        """Lose all consumers of a queue without a word, and return how many those were."""
        consumers = tuple(queue.consumers)
        for consumer in consumers:
            queue.remove_consumer(consumer)
        held = [entry for each in consumers for entry in each.channel.forgotten(each)]
        queue.requeue(held, is_lost=True)
        return len(consumers)

    def disown(self, connection: object) -> None:
        """Delete the exclusive queues of a connection that ended."""
        for queue in [each for each in self.queues.values() if each.owner is connection]:
            self.delete_queue(queue)

    # Bindings

    def bind(
        self,
        source: str,
        destination: Queue | Exchange,
        key: str,
        raw: Mapping[str, bytes],
    ) -> None:
        """Bind a queue or an exchange to an exchange.

        Raises:
            Refusal: There is no such exchange, or it does not take the arguments.
        """
        exchange = self.exchange(source)
        try:
            if not exchange.bind(destination, key, raw):
                return
        except ValueError as error:
            raise Refusal(PRECONDITION_FAILED, str(error)) from None
        self._sources.setdefault(destination, set()).add(exchange)
        if self._store is not None and self._is_kept(exchange, destination):
            self._store.put_binding(self._stored(exchange, destination, key, raw))

    def unbind(
        self,
        source: str,
        destination: Queue | Exchange,
        key: str,
        raw: Mapping[str, bytes],
    ) -> None:
        """Unbind a queue or an exchange. It is no error if it was not bound so."""
        exchange = self.exchanges.get(source)
        if exchange is None or not exchange.unbind(destination, key, raw):
            return
        self._forget_binding(exchange, destination, key, raw)
        if not exchange.leads_to(destination):
            self._sources[destination].discard(exchange)
        self._delete_if_unused(exchange)

    def _unbind_all(self, destination: Queue | Exchange) -> None:
        for exchange in self._sources.pop(destination, ()):
            for binding in exchange.unbind_all(destination):
                self._forget_binding(exchange, destination, binding.key, binding.arguments)
            self._delete_if_unused(exchange)

    def _delete_if_unused(self, exchange: Exchange) -> None:
        if not exchange.auto_delete or exchange.has_bindings:
            return
        if self.exchanges.get(exchange.name) is exchange:
            self.delete_exchange(exchange.name)

    def _is_kept(self, exchange: Exchange, destination: Queue | Exchange) -> bool:
        if isinstance(destination, Queue):
            return exchange.durable and destination.id is not None
        return exchange.durable and destination.durable

    def _forget_binding(
        self, exchange: Exchange, destination: Any, key: str, raw: Mapping[str, bytes]
    ) -> None:
        if self._store is not None and self._is_kept(exchange, destination):
            self._store.drop_binding(self._stored(exchange, destination, key, raw))

    def _stored(
        self, exchange: Exchange, destination: Queue | Exchange, key: str, raw: Mapping[str, bytes]
    ) -> StoredBinding:
        return StoredBinding(
            self.name,
            exchange.name,
            isinstance(destination, Exchange),
            destination.name,
            key,
            # In whatever order they come, equal arguments make the same binding.
            fields.join(dict(sorted(raw.items()))),
        )

    # Messages

    def publish(self, message: Message) -> Outcome:
        """Give a message to the queues to which its exchange leads.

        Raises:
            Refusal: There is no such exchange.
        """
        outcome = Outcome()
        if not message.exchange and message.routing_key.startswith(REPLY_TO + "."):
            caller = self._callers.get(message.routing_key)
            if caller is not None:
                # It is not routed all the same: RabbitMQ returns a reply that is mandatory.
                caller.deliver_reply(message)
            return outcome
        self._offer(message, self._route(message), outcome)
        return outcome

    def _offer(self, message: Message, queues: list[Queue], outcome: Outcome) -> None:
        outcome.is_routed = bool(queues)
        for queue in queues:
            if not queue.publish(message):
                outcome.is_refused = True
            elif queue.id is not None and message.is_persistent:
                outcome.is_stored = True

    def _route(self, message: Message) -> list[Queue]:
        """Return the queues for a message, each once, whatever ways lead to it."""
        if not message.exchange:
            queues = self.queues
            return [queues[key] for key in dict.fromkeys(message.keys) if key in queues]
        found: dict[Queue, None] = {}
        seen = {message.exchange}
        waiting = [self.exchange(message.exchange)]
        while waiting:
            exchange = waiting.pop()
            targets = exchange.route(message.keys, lambda: message.headers)
            for target in targets:
                if isinstance(target, Queue):
                    found[target] = None
                elif target.name not in seen:
                    seen.add(target.name)
                    waiting.append(target)
            alternate = exchange.alternate
            if not targets and alternate in self.exchanges and alternate not in seen:
                seen.add(alternate)
                waiting.append(self.exchanges[alternate])
        return list(found)

    def bury(self, entry: Entry, reason: str) -> None:
        """Publish a dead letter with the next call of `publish_dead_letters`."""
        self._dead.append((entry, reason))
        self._burial(self)

    def publish_dead_letters(self, limit: int = DEAD_LETTERS_AT_ONCE) -> None:
        """Publish what died, and what died of that, and so on, but not for ever.

        It is not done where a message dies: a long chain of queues would nest as deeply. Queues
        with a TTL of 0 can make a circle, which goes on with the next call, as RabbitMQ's does.
        """
        for _ in range(limit):
            if not self._dead:
                return
            entry, reason = self._dead.popleft()
            entry.queue.buried(entry, reason, is_taken=self._publish_dead_letter(entry, reason))

    @property
    def has_dead_letters(self) -> bool:
        """Whether there are more to be published."""
        return bool(self._dead)

    def _publish_dead_letter(self, entry: Entry, reason: str) -> bool:
        source = entry.queue.arguments
        exchange = source.dead_letter_exchange or ""
        letter = dead_letters.dead_letter(
            entry.message, entry.queue.name, reason, exchange, source.dead_letter_routing_key
        )
        if exchange and exchange not in self.exchanges:
            return False
        queues = self._route(letter)
        if reason != "rejected":
            queues = [each for each in queues if not dead_letters.is_cycle(letter, each.name)]
        outcome = Outcome()
        self._offer(letter, queues, outcome)
        return outcome.is_routed and not outcome.is_refused

    def add_caller(self, address: str, channel: Caller) -> None:
        """Let a channel get direct replies."""
        self._callers[address] = channel

    def remove_caller(self, address: str) -> None:
        """Let a channel get no more direct replies."""
        self._callers.pop(address, None)

    def is_caller(self, address: str) -> bool:
        """Tell whether somebody waits at an address for direct replies."""
        return address in self._callers

    # The store

    def restore_exchange(self, stored: StoredExchange) -> None:
        """Make an exchange again."""
        self.exchanges[stored.name] = TYPES[stored.type](
            stored.name,
            durable=True,
            auto_delete=stored.auto_delete,
            internal=stored.internal,
            arguments=fields.split(stored.arguments)[0],
        )

    def restore_queue(self, stored: StoredQueue) -> Queue:
        """Make a queue again."""
        raw = fields.split(stored.arguments)[0]
        queue = self.queues[stored.name] = Queue(
            self,
            stored.name,
            arguments.read_queue_arguments(raw, stored.name),
            durable=True,
            auto_delete=stored.auto_delete,
            id=stored.id,
        )
        return queue

    def restore_binding(self, stored: StoredBinding) -> None:
        """Make a binding again."""
        exchange = self.exchanges[stored.source]
        table: Mapping[str, Queue | Exchange] = (
            self.exchanges if stored.to_exchange else self.queues
        )
        destination = table[stored.destination]
        exchange.bind(destination, stored.key, fields.split(stored.arguments)[0])
        self._sources.setdefault(destination, set()).add(exchange)

    def restore_message(
        self, queue: Queue, position: int, stored: StoredMessage
    ) -> None:
        """Put a message back to its place. Its expiry was written on the wall clock."""
        message = Message(stored.exchange, stored.routing_key, stored.properties, stored.body)
        expires = None
        if stored.expires is not None:
            expires = stored.expires - time.time() + self.clock.now()
        queue.restore(message, position, expires, stored.delivery_count)
        self._memory(ENTRY_BYTES + message.size)

    def keep(self, entry: Entry) -> None:
        """Count a message that a queue has now, and write it down if it must not be lost."""
        message = entry.message
        self._memory(ENTRY_BYTES + message.size)
        if self._store is None or entry.queue.id is None or not message.is_persistent:
            return
        expires = None
        if entry.expires is not None:
            expires = time.time() + entry.expires - self.clock.now()
        self._store.put_message(
            entry.queue.id,
            entry.position,
            StoredMessage(
                message.exchange,
                message.routing_key,
                message.encoded,
                message.body,
                expires,
                entry.deliveries,
            ),
        )

    def keep_count(self, entry: Entry) -> None:
        """Write down how often a message was given back, if that limits it."""
        if self._is_stored(entry) and entry.queue.arguments.delivery_limit is not None:
            assert self._store is not None and entry.queue.id is not None
            self._store.count_delivery(entry.queue.id, entry.position, entry.deliveries)

    def forget(self, entry: Entry) -> None:
        """Count a message off that a queue has no longer."""
        self._memory(-ENTRY_BYTES - entry.message.size)
        if self._is_stored(entry):
            assert self._store is not None and entry.queue.id is not None
            self._store.drop_message(entry.queue.id, entry.position)

    def _is_stored(self, entry: Entry) -> bool:
        return (
            self._store is not None
            and entry.queue.id is not None
            and entry.message.is_persistent
            and not entry.queue.is_deleted
        )


def check_not_default(exchange: str) -> None:
    """Refuse to change the default exchange, or to look whether it is there.

    Raises:
        Refusal: It is that one.
    """
    if not exchange:
        raise Refusal(ACCESS_REFUSED, "operation not permitted on the default exchange")
