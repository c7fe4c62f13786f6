# SPDX-License-Identifier: MIT
"""Receiving messages: a consumer declares, binds and consumes queues."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import pika

from postage import debugging
from postage.delay import Goal, Wait
from postage.encoders import Encoder, JsonEncoder
from postage.errors import ClosedError, ConfigurationError, DecodeError, PostageError
from postage.futures import Future
from postage.health import ConsumerHealth, latest
from postage.messages import Message, MessageResult
from postage.prefetch import DEFAULT
from postage.rpc import encoded
from postage.settings import (
    Hup,
    HupFromEnvironment,
    VhostFromEnvironment,
    compat_from_environment,
    settings_for,
)
from postage.topology import (
    Binding,
    DefaultExchange,
    Eqk,
    Exchange,
    QueueLike,
    QueueSpec,
    bindings_of,
    exchange_spec,
    queue_spec,
)
from postage.transport import connection as connections
from postage.transport import hub as hubs
from postage.transport.connection import Connection
from postage.transport.publisher import Publisher, Publishing, encoded_ahead
from postage.transport.subscriber import Delivery, Settlement, Subscriber

_Consumer = TypeVar("_Consumer", bound="GenericConsumer")

logger = logging.getLogger(__name__)

#: Seconds that the confirm of a reply, or of a parked message, is waited for.
PUBLISH_TIMEOUT = 30.0
_DEFAULT = DefaultExchange.spec()
#: Names that were warned of already: one warning a name is enough.
_warned: set[str] = set()


class _Confirm(Future[None]):
    """The broker's confirm of one publishing, or why there is none."""

    __slots__ = ()

    def settled(self, publishing: Publishing) -> None:
        if publishing.error is None:
            self.set(None)
        else:
            self.fail(publishing.error)


class GenericConsumer:
    """Declares and binds the queues of an `eqk`, and consumes them.

    It connects, declares and binds when it is made, so what is sent from then on is kept.
    The methods that talk to the broker may be used by one thread at a time.

    Attributes:
        encoder_class: How bodies are read.
        vhost: The virtual host; by default from the environment.
        hup: Host, user and password, as a dict; by default from the environment.
        eqk: [(exchange class, [(queue, key), …]), …], used if none is given.
        prefetch: Messages that the broker delivers ahead, for each queue. None: as many as
            suit the handlers of its processor, and 10 without one.
        adapts: Whether None means that; a processor sets it.
        connect_timeout: Seconds to go on trying while there is no broker; None: for ever.
        compat: "1.2" to declare queues as 1.2.1 did. None: POSTAGE_COMPAT.
        qk_list: The (queue, key) pairs that were bound.

    Args:
        eqk: As the attribute.
        hup: Host, user and password.
        vhost: The virtual host.

    Raises:
        ConfigurationError: A setting or the `eqk` makes no sense.
        ConnectionFailedError: There was no broker in time, or it refused the login.
        QueueMismatchError, ExchangeMismatchError: It exists with other arguments.
        ChannelClosedError: The broker refuses a declaration otherwise.
        ConnectionLostError: The broker closes the connection over a declaration.
    """

    encoder_class: ClassVar[type[Encoder]] = JsonEncoder
    vhost: Any = VhostFromEnvironment()
    hup: Any = HupFromEnvironment()
    eqk: Eqk = []
    prefetch: int | None = None
    adapts: bool = False
    connect_timeout: float | None = 60
    compat: str | None = None

    _closed = True  # for __del__ after a failed __init__

    def __init__(
        self,
        eqk: Eqk = (),
        hup: Mapping[str, Any] | None = None,
        vhost: str | None = None,
    ) -> None:
        debugging.attach_if_asked()
        self.vhost = vhost or self.vhost
        self.hup = Hup(hup or self.hup)
        self.encoder = self.encoder_class()
        self.eqk = list(eqk) or list(self.eqk)
        self.qk_list: list[tuple[QueueLike, str]] = []
        self.discard_all_messages = False
        self._compat = (self.compat or compat_from_environment()) is not None
        self._settings = settings_for(self.hup, self.vhost)
        self._known: dict[str, QueueSpec] = {}
        self._consuming = False
        self._publisher: Publisher | None = None
        self._connection = connections.acquire(self._settings, "consume")
        self._closed = False
        self.subscriber = Subscriber(self._connection, DEFAULT)
        try:
            self.add_eqk(self.eqk)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._settings} [{self.subscriber!r}]>"

    def __enter__(self: _Consumer) -> _Consumer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._closed or self._connection.hub.pid != os.getpid():
            return
        if self._connection.state is not connections.State.CLOSED:
            warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=2)
            self.subscriber.stop()
            while self.subscriber.inbox:  # nobody will look into it any more
                self.subscriber.give_back(self.subscriber.inbox.popleft())

    @property
    def conn_broker(self) -> Connection:
        """The shared connection, for its state."""
        return self._connection

    @property
    def channel(self) -> Subscriber:
        """The consuming channel, for its state."""
        return self.subscriber

    def health(self) -> ConsumerHealth:
        """Return how this consumer is. Callable from any thread.

        Raises:
            ForkedError: It belongs to the parent process.
        """
        self._check_fork()
        health = self.subscriber.health()
        publisher = self._publisher
        if publisher is None:
            return health
        sending = publisher.health()
        return replace(
            health,
            blocked=sending.blocked,
            last_error=latest(health.last_error, sending.last_error),
        )

    # --------------------------------------------------------------------- topology

    def add_eqk(self, eqk: Eqk) -> None:
        """Declare and bind further queues. If consuming has begun, they are consumed, too.

        Args:
            eqk: As the attribute.

        Raises:
            PostageError: As for the constructor.
        """
        for exchange, queue, binding in bindings_of(eqk, self._compat):
            self.queue_bind(exchange, queue, binding.key)

    def queue_bind(
        self, exchange_class: type[Exchange], queue: QueueLike, key: str, **kwds: Any
    ) -> None:
        """Declare an exchange and a queue, and bind the one to the other.

        Args:
            exchange_class: The exchange.
            queue: Its name, a dict with 'name' and 'flags', or a `Queue`. The name of a queue
                that this consumer declared already means that one.
            key: The routing key.
            **kwds: Flags for a queue that is given by its name, as in 1.2.1.

        Raises:
            PostageError: As for the constructor.
        """
        self._check()
        spec = self._spec(queue, kwds)
        binding = Binding(exchange_spec(exchange_class), spec, key)
        self.subscriber.topology.bind(binding, self.connect_timeout)
        logger.debug("bound queue %r to %r, key %r", spec.name, binding.exchange.name, key)
        self._known[spec.name] = spec
        self.qk_list.append((queue, key))
        if self._consuming:
            self.subscriber.consume(spec)

    def queue_unbind(self, exchange_class: type[Exchange], queue: QueueLike, key: str) -> None:
        """Take a binding back. The queue stays, and goes on being consumed.

        Args:
            exchange_class: The exchange.
            queue: The queue, as for `queue_bind()`.
            key: The routing key.

        Raises:
            PostageError: As for the constructor.
        """
        self._check()
        binding = Binding(exchange_spec(exchange_class), self._spec(queue, {}), key)
        self.subscriber.topology.unbind(binding, self.connect_timeout)

    def stop_queue(self, queue: QueueLike) -> None:
        """Stop consuming one queue. It stays, with its bindings, for others."""
        spec = self._known.pop(self._spec(queue, {}).name, None)
        if spec is not None:  # None would stop all
            self.subscriber.stop(spec)

    def _spec(self, queue: QueueLike, flags: dict[str, Any]) -> QueueSpec:
        if isinstance(queue, str):
            if flags:
                return queue_spec({"name": queue, "flags": flags})
            if queue in self._known:
                return self._known[queue]
            _warn_of_pid(queue)
        return queue_spec(queue, self._compat)

    # -------------------------------------------------------------------- consuming

    def start(self) -> None:
        """Begin to consume every queue that is bound. Deliveries go into the inbox."""
        self._check()
        self._consuming = True
        default = None if self.adapts else DEFAULT
        self.subscriber.prefetch = default if self.prefetch is None else self.prefetch
        for spec in self._known.values():
            self.subscriber.consume(spec)

    def start_consuming(self, callback: Callable[[Any, Any, Any, bytes], Any]) -> None:
        """Consume, and call back with each message, until `stop_consuming()` is called.

        Args:
            callback: Called in this thread with the subscriber, the delivery (for `ack()` and
                `reject()`), its properties and its body.

        Raises:
            TransportError: Consuming cannot go on.
        """
        self.start()
        subscriber = self.subscriber
        while self._consuming:
            self._check_fork()
            subscriber.flush()
            subscriber.hub.wait(
                lambda: bool(subscriber.inbox or subscriber.failure) or not self._consuming
            )
            if subscriber.failure is not None:
                raise subscriber.failure
            while self._consuming:
                delivery = self.take()
                if delivery is None:
                    break
                callback(subscriber, delivery, delivery.properties, delivery.body)

    def stop_consuming(self) -> None:
        """Stop consuming every queue; `start_consuming()` returns. Callable from anywhere."""
        self._consuming = False
        for spec in list(self._known.values()):  # one by one: they may be consumed again
            self.subscriber.stop(spec)

    def take(self) -> Delivery | None:
        """Return the next delivery that can still be settled, or None if there is none."""
        self._check_fork()  # a child finds copies of its parent's deliveries
        subscriber = self.subscriber
        inbox = subscriber.inbox
        while inbox:
            try:
                delivery = inbox.popleft()
            except IndexError:  # the leader was faster, and gave it back
                break
            if subscriber.is_current(delivery):
                logger.debug("< %s from %r", delivery.body, delivery.queue.name)
                return delivery
        return None

    def ack(self, method: Delivery) -> None:
        """Tell the broker that a message is done."""
        self._check_fork()
        self.subscriber.settle(method, Settlement.ACK)

    def reject(self, method: Delivery, requeue: bool) -> None:
        """Give a message back to its queue, or refuse it.

        Args:
            method: The delivery.
            requeue: Whether it is to be delivered again. If not, it is dead-lettered where
                the queue says so, else dropped.
        """
        self._check_fork()
        settlement = Settlement.REQUEUE if requeue else Settlement.REJECT
        self.subscriber.settle(method, settlement)

    def decode(self, data: bytes) -> Any:
        """Return what a body says.

        Raises:
            DecodeError: It cannot be read.
        """
        try:
            return self.encoder.decode(data)
        except PostageError:
            raise
        except Exception as error:  # of an encoder that knows no DecodeError
            raise DecodeError(f"the body is not readable: {error}", data) from error

    # ---------------------------------------------------------------------- sending

    def rpc_reply(self, header: pika.BasicProperties, message: Any) -> None:
        """Answer an RPC request, and wait until the broker took the answer.

        Args:
            header: The properties of the request.
            message: A result message, or any value, which is sent as a success.

        Raises:
            ConfigurationError: The request does not say where to.
            EncodingError: The value cannot be written.
            PublishError: The broker did not take it.
        """
        self.reply(header, self.reply_body(message), PUBLISH_TIMEOUT).result()

    def reply_body(self, message: Any) -> bytes:
        """Return the body of an answer.

        Raises:
            EncodingError: The value cannot be written.
        """
        result = message if hasattr(message, "body") else MessageResult(message)
        assert isinstance(result, Message) or hasattr(result, "body")
        return encoded(self.encoder, result.body)

    def reply(self, header: pika.BasicProperties, body: bytes, timeout: float) -> Future[None]:
        """Send an answer to where the request says. Returns a future for the confirm.

        An answer is transient and never mandatory: with direct reply-to, RabbitMQ returns a
        mandatory one even though it delivers it.

        Raises:
            ConfigurationError: The request does not say where.
        """
        if header.reply_to is None:
            raise ConfigurationError("there is no reply_to: the sender wants no answer")
        properties = {
            "content_type": self.encoder.content_type or None,
            "delivery_mode": 1,
            "correlation_id": header.correlation_id,
        }
        return self.publish(header.reply_to, body, encoded_ahead(properties), False, timeout)

    def publish(
        self,
        queue: str,
        body: bytes,
        properties: pika.BasicProperties | bytes,
        mandatory: bool,
        timeout: float = PUBLISH_TIMEOUT,
        delay: float = 0.0,
        is_bound: bool = False,
    ) -> Future[None]:
        """Publish straight to a queue, and return a future for the confirm.

        With a delay it gets there so many seconds later, without an ``expiration`` and without
        what an earlier delay left in its headers. The confirm comes now.

        It goes over the publishing connection: an alarm of the broker may stop that one, and
        must not stop the acknowledgements on this one.
        """
        self._check()
        publisher = self._publisher
        if publisher is None:
            connection = connections.acquire(self._settings, "publish")
            publisher = self._publisher = Publisher(connection)
        logger.debug("> %s to %r", body, queue)
        confirm = _Confirm(publisher.hub.wait, publisher.hub.nudge)
        publishing = Publishing(
            _DEFAULT,
            queue,
            body,
            properties,
            mandatory=mandatory,
            confirm=True,
            deadline=time.monotonic() + timeout,
            settled=confirm.settled,
            aim=Wait(delay).begin(mandatory, is_bound) if delay else None,
        )
        publisher.hub.call(partial(publisher.send, (publishing,)), together=True)
        return confirm

    def bind_for_delays(self, queue: str) -> Future[None]:
        """Bind an exclusive queue of this consumer, so that delayed messages get to it.

        Args:
            queue: Its real name. Then `publish()` takes ``is_bound``.
        """
        self._check()
        connection = self._connection
        future: Future[None] = Future(connection.hub.wait, connection.hub.nudge)
        goal = Goal(queue)

        def bind() -> None:
            if connection.knows(goal):
                future.set(None)
            else:
                connection.declare(goal, done, PUBLISH_TIMEOUT)

        def done(_result: Any, error: PostageError | None) -> None:
            if error is None:
                future.set(None)
            else:
                future.fail(error)

        connection.hub.call(bind)
        return future

    # ----------------------------------------------------------------------- the end

    def close(self, timeout: float = connections.CLOSE_GRACE) -> bool:
        """Send what was decided about messages, and let the connections go.

        What was delivered and not settled is delivered again, to whoever consumes then.

        Args:
            timeout: Seconds at most, for each connection.

        Returns:
            Whether the broker took everything that was decided.
        """
        if self._closed:
            return True
        self._closed = True
        self._consuming = False
        if self._connection.hub.pid != os.getpid():
            return False  # the parent's
        if self._connection.state is connections.State.CLOSED:
            return False  # by close_all(), and nothing of it is left
        clean = self.subscriber.close(timeout)
        connections.release(self._connection, timeout)
        if self._publisher is not None:
            self._publisher.close(timeout)
            connections.release(self._publisher.connection, timeout)
        return clean

    def _check(self) -> None:
        if self._closed:
            raise ClosedError(f"{type(self).__name__} is used after close()")
        self._check_fork()

    def _check_fork(self) -> None:
        if self._connection.hub.pid != hubs.process_id:  # asked for each message
            connections.check_fork(self._connection, type(self).__name__)


def _warn_of_pid(name: str) -> None:
    """Warn of a queue that every start of the program leaves behind."""
    pid = str(os.getpid())
    if len(pid) > 2 and name not in _warned and re.search(rf"(?<!\d){pid}(?!\d)", name):
        _warned.add(name)
        logger.warning(
            "queue %r is named after the process id and durable: every start leaves one behind; "
            "use Queue(%r, exclusive=True)",
            name,
            name,
        )
