# SPDX-License-Identifier: MIT
"""Sending messages and calling services.

A producer's magic methods are resolved in one place (`GenericProducer.__getattr__`) and
run in three steps: *build* the message, *compose* it with its pairs and properties into a
`Composed`, and hand that to whoever sends it: the producer itself, a `Batch`, a
`Transaction`, or the outbox of the handler that runs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import pika

from postage import debugging, schedules
from postage import outbox as outboxes
from postage.batch import Batch
from postage.context import lineage
from postage.delay import MOST_HEADERS, Wait, plain_seconds
from postage.encoders import Encoder, JsonEncoder
from postage.errors import (
    ClosedError,
    ConfigurationError,
    PostageError,
    TimeoutError,
)
from postage.fingerprint import Fingerprint
from postage.futures import Future, refuse_in_coroutine
from postage.headers import CONVERSATION
from postage.health import Health
from postage.messages import (
    Message,
    MessageCommand,
    MessageResultError,
    RpcCommand,
    command_parameters,
    new_message_id,
)
from postage.outbox import Held
from postage.rpc import (
    Caller,
    Reply,
    ReplyCollector,
    Request,
    decoded_reply,
    encoded,
)
from postage.sending import Composed, publishings_of
from postage.settings import (
    Hup,
    HupFromEnvironment,
    VhostFromEnvironment,
    compat_from_environment,
    settings_for,
)
from postage.topology import DefaultExchange, Eks, Exchange, ExchangeSpec, exchange_spec
from postage.transaction import Transaction
from postage.transport import connection as connections
from postage.transport import hub as hubs
from postage.transport.connection import Connection
from postage.transport.frames import encode_plain_properties
from postage.transport.publisher import Publisher, check_encodable
from postage.transport.replies import ReplyStream

_Producer = TypeVar("_Producer", bound="GenericProducer")

logger = debugging.logger_of(__name__)

#: Characters up to which a text fits into 255 bytes of UTF-8, whatever it is made of.
_SHORT = 255 // 4

#: The longest `expiration` that RabbitMQ takes, in milliseconds: ten years.
_LONGEST_TTL_MS = 10 * 365 * 24 * 3600 * 1000

_ROUTING = frozenset({"_key", "_eks", "_queue"})
_PROPERTIES = frozenset({"_headers", "_message_id", "_mandatory", "_persistent", "_priority"})
#: What is not for RPC: a request lasts as long as its caller waits, and has an id of its own.
_DELAYS = frozenset({"_delay", "_at"})
_NOT_FOR_RPC = _DELAYS | {"_ttl", "_correlation_id"}
_MESSAGE_KEYWORDS = (
    _ROUTING | _PROPERTIES | _NOT_FOR_RPC | {"_confirm", "_timeout", "_future", "_outbox"}
)
#: The keywords of a call that needs none.
_NOTHING: Mapping[str, Any] = {}
_RPC_KEYWORDS = _ROUTING | _PROPERTIES | {"_timeout", "_max_retry", "_queue_only", "_future"}

#: Guards the lazy opening of producers. Of the process, and new in a forked child.
_opening = threading.Lock()


def _renew_lock() -> None:
    global _opening
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)

Builder = Callable[..., Any]


class _Targets(NamedTuple):
    """Where a message goes: the pairs as values, and the queue that the first leads to."""

    pairs: Sequence[tuple[ExchangeSpec, str]]
    queue: str | None


def _targets_of(pairs: Sequence[tuple[type[Exchange], str]]) -> _Targets:
    first, key = pairs[0]
    return _Targets([(exchange.spec(), key) for exchange, key in pairs], first.queue_of(key))


class GenericProducer:
    """Sends messages to exchanges and calls services.

    Subclass it, list the exchange and key pairs in `eks`, and define ``build_message_x``
    and ``build_rpc_x`` methods that return a message; or define none, and get commands:

    * ``producer.message_x(...)`` sends to every pair and returns when the broker confirmed;
    * ``producer.schedule_x(...)`` sends the same to one pair, later, and returns a handle with
      which it can be cancelled (`postage.schedules`);
    * ``producer.rpc_x(...)`` sends to the first pair and returns the service's result;
    * ``producer.rpc_queue_x(...)`` sends and returns the queue of the replies, for
      `consume_rpc()`.

    All of them take, beside the arguments of the message:

    ===================  ===============================================================
    ``_key``             another routing key, to the first exchange of `eks`
    ``_eks``             other pairs; wins over ``_key``
    ``_queue``           one queue, by its name, instead
    ``_timeout``         seconds: until the confirm, or for each attempt of an RPC call
    ``_future``          True: return at once, with a future
    ``_headers``         a dict of AMQP headers
    ``_message_id``      an id of your own
    ``_correlation_id``  an id that belongs to something else; not for RPC
    ``_priority``        0 to 255, for queues that know priorities
    ``_delay``           seconds or a timedelta that it waits in the broker; not for RPC
    ``_at``              a datetime with a time zone until which it waits there; not for RPC
    ``_ttl``             seconds or a timedelta after which it is given up; not for RPC, and
                         not with ``_delay`` or ``_at``
    ``_mandatory``       for this message only, instead of the attribute `mandatory`
    ``_persistent``      the same for `persistent`
    ``_confirm``         the same for `confirm`; not for RPC, which waits for more
    ``_outbox``          the same for `outbox`; not for RPC, which never waits there
    ``_max_retry``       RPC: how often an unanswered request is sent again
    ``_queue_only``      RPC: as ``rpc_queue_x``
    ===================  ===============================================================

    A producer connects when it first sends. It may be used by many threads, and on both
    sides of a fork.

    Attributes:
        eks: [(exchange class, routing key), …].
        encoder_class: How bodies are written.
        hup: Host, user and password, as a dict; by default from the environment.
        vhost: The virtual host; by default from the environment.
        rpc_timeout: Seconds that an attempt of an RPC call waits for its reply.
        max_retry: How often an unanswered RPC request is sent again.
        publish_timeout: Seconds within which the fate of a message is known.
        mandatory: A message that no queue is bound to is an error.
        persistent: Messages survive a restart of the broker, in durable queues.
        confirm: Wait until the broker took the responsibility.
        outbox: In a handler with an outbox, messages wait there until it has succeeded. False
            for those that tell what happens, such as log lines: they leave at once.
        compat: "1.2" to call services that run Postage 1.2.1. None: POSTAGE_COMPAT.

    Args:
        fingerprint: Entries that replace those of the automatic fingerprint.
        hup: Host, user and password.
        vhost: The virtual host.

    Raises:
        ConfigurationError: A setting makes no sense.
    """

    eks: Eks = [(Exchange, "nokey")]
    encoder_class: ClassVar[type[Encoder]] = JsonEncoder
    vhost: Any = VhostFromEnvironment()
    hup: Any = HupFromEnvironment()
    rpc_timeout: float = 30
    max_retry: int = 4
    publish_timeout: float = 30
    mandatory: bool = True
    persistent: bool = True
    confirm: bool = True
    outbox: bool = True
    compat: str | None = None

    _publisher: Publisher | None = None  # for __del__ after a failed __init__
    _closed = False

    def __init__(
        self,
        fingerprint: Mapping[str, Any] | None = None,
        hup: Mapping[str, Any] | None = None,
        vhost: str | None = None,
    ) -> None:
        debugging.attach_if_asked()
        self.vhost = vhost or self.vhost
        self.hup = Hup(hup or self.hup)
        self.encoder = self.encoder_class()
        self.fingerprint: dict[str, Any] = {
            **Fingerprint(vhost=self.vhost).as_dict(),
            **(fingerprint or {}),
        }
        self._settings = settings_for(self.hup, self.vhost)
        self._compat = compat_from_environment()
        #: What `eks` was when it was last read, and what it means.
        self._read: tuple[Any, _Targets] = (None, _Targets([], None))
        self._targets({})
        self._replies = ReplyStream()
        self._collectors: dict[str, ReplyCollector] = {}
        self._pid = os.getpid()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._publisher or "not connected yet"
        return f"<{type(self).__name__} {self._settings} [{state}]>"

    def __enter__(self: _Producer) -> _Producer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        publisher = self._publisher
        if publisher is None or self._closed or publisher.hub.pid != os.getpid():
            return
        if publisher.connection.state is not connections.State.CLOSED:
            warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=2)
            publisher.hub.call(publisher.shut)

    @property
    def default_exchange(self) -> type[Exchange]:
        """The exchange that ``_key`` alone sends to."""
        return _checked(self.eks)[0][0]

    @property
    def conn_broker(self) -> Connection:
        """The shared connection, for its state."""
        return self._open().connection

    @property
    def channel(self) -> Publisher:
        """The publishing channel, for its state."""
        return self._open()

    def health(self) -> Health:
        """Return how this producer is. Callable from any thread; it does not connect."""
        if self._closed:
            return Health("closed")
        publisher = self._publisher
        if publisher is None or publisher.hub.pid != os.getpid():
            return Health("unused")
        return publisher.health()

    # ---------------------------------------------------------------------- sending

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Resolve ``message_x``, ``schedule_x``, ``rpc_x`` and ``rpc_queue_x``.

        Raises:
            AttributeError: The name is none of those.
        """
        if name.startswith("message_"):
            return partial(self._message_send, _callable=self._builder(name, MessageCommand))
        if name.startswith("schedule_"):
            called = "message_" + name.removeprefix("schedule_")
            return partial(schedules.schedule, self, self._builder(called, MessageCommand))
        if name.startswith("rpc_"):
            if name.startswith("rpc_queue_") and not hasattr(type(self), f"build_{name}"):
                called = "rpc_" + name.removeprefix("rpc_queue_")
                builder = self._builder(called, RpcCommand)
                return partial(self._rpc_send, _callable=builder, _queue_only=True)
            return partial(self._rpc_send, _callable=self._builder(name, RpcCommand))
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r} "
            "(producers make up message_*, schedule_*, rpc_* and rpc_queue_*)"
        )

    def message(self, /, *args: Any, **kwds: Any) -> Any:
        """Send a generic message: the arguments become ``content['args']`` and ``['kwds']``.

        Returns:
            None, or a future with ``_future=True``.

        Raises:
            PublishError, EncodingError: As for every ``message_x()``.
        """
        return self._message_send(*args, _callable=self._build_generic, **kwds)

    def forward(self, body: Mapping[str, Any], *args: Any, **kwds: Any) -> Any:
        """Send the body of a message on as it is, with the fingerprint of its origin.

        Args:
            body: The dictionary form of a message.
            *args: Ignored, as in 1.2.1.
            **kwds: The underscore keywords of the magic methods.
        """
        return self._send(self._compose_forward(body, kwds), bool(kwds.get("_future", False)))

    def cancel_schedule(self, id: str) -> int:
        """Cancel what ``schedule_x()`` has sent, also in another process.

        Args:
            id: The attribute `id` of what it returned.

        Returns:
            How many messages that prevented: 1, or 2 if it was sent again after a lost connection.

        Raises:
            MessageNotFoundError: It is too late, or it was cancelled before.
            ConfigurationError: That is no id of a schedule.
            TransportError: The broker cannot be reached, or it is not known what became of it.
        """
        timeout = _seconds("publish_timeout", self.publish_timeout)
        return schedules.cancel(self._open().connection, id, timeout)

    def batch(self) -> Batch:
        """Return a batch: a context manager with the sending methods of this producer.

        Its messages are confirmed together when the block ends, at the speed of the
        network instead of one round trip each.
        """
        return Batch(self)

    def transaction(self) -> Transaction:
        """Return a transaction: a context manager with the sending methods of this producer.

        It holds the messages until the block ends, and sends them then. If the block raises,
        none leaves.
        """
        return Transaction(self)

    @staticmethod
    def _build_generic(*args: Any, **kwds: Any) -> Message:
        _refuse_unknown("message", kwds, _MESSAGE_KEYWORDS)
        return Message(*args, **kwds)

    def _builder(self, name: str, command: type[Message]) -> Builder:
        """Return what builds the messages of a magic method.

        That is the producer's ``build_<name>``, or else a command of that name, with as
        many parameters as are given.
        """
        custom = f"build_{name}"
        builder = getattr(type(self), custom, None)
        if builder is not None:
            return partial(builder, self)
        builder = vars(self).get(custom)
        if builder is not None:
            return cast(Builder, builder)
        return _command_builder(name, command is RpcCommand)

    def _message_send(self, /, *args: Any, _callable: Builder, **kwds: Any) -> Any:
        future = bool(kwds.pop("_future", False))
        return self._send(self._compose(_callable, args, kwds), future)

    def _compose(self, build: Builder, args: tuple[Any, ...], kwds: dict[str, Any]) -> Composed:
        special = _taken(kwds, _MESSAGE_KEYWORDS)
        message = build(*args, **kwds)
        message.fingerprint(**self._fingerprint())
        return self._compose_body(message.body, special)

    def _compose_forward(self, body: Mapping[str, Any], kwds: Mapping[str, Any]) -> Composed:
        _refuse_unknown("forward", kwds.keys() - _MESSAGE_KEYWORDS, _MESSAGE_KEYWORDS)
        return self._compose_body(body, kwds)

    def _compose_body(self, body: Mapping[str, Any], special: Mapping[str, Any]) -> Composed:
        pairs = self._targets(special).pairs
        wait = _wait_of(special) if special else None
        timeout = special.get("_timeout")
        outbox = outboxes.current() if special.get("_outbox", self.outbox) else None
        if outbox is not None and not special.get("_message_id"):
            kind = (body.get("type"), body.get("name"))
            addresses = tuple((exchange.name, key) for exchange, key in pairs)
            special = {**special, "_message_id": outbox.message_id(kind, addresses)}
        message_id = special.get("_message_id") or new_message_id()
        encoded_body = self._encode(body)
        _show(encoded_body, pairs)
        return Composed(
            encoded_body,
            self._build_message_properties(special, pairs, message_id),
            pairs,
            message_id,
            mandatory=bool(special.get("_mandatory", self.mandatory)),
            confirm=bool(special.get("_confirm", self.confirm)),
            timeout=_seconds("publish_timeout", self.publish_timeout)
            if timeout is None
            else _seconds("_timeout", timeout),
            outbox=outbox,
            wait=wait,
        )

    def _send(self, composed: Composed, as_future: bool) -> Any:
        publisher = self._open()
        if composed.outbox is not None:
            held = Held(composed.outbox, publisher.hub)
            if composed.outbox.hold(publisher, composed, held):
                return held if as_future else None
        future: Future[None] = Future(publisher.hub.wait, publisher.hub.nudge)

        def finished(error: PostageError | None) -> None:
            if error is None:
                future.set(None)
            else:
                future.fail(error)

        start = partial(publisher.send, publishings_of(composed, finished))
        if as_future:
            publisher.hub.call(start, together=True)
            return future
        refuse_in_coroutine("sending a message", "await producer.message_x(..., _future=True)")
        publisher.hub.wait(future.ready, first=start)  # the publisher keeps the deadline
        return future.result()

    # -------------------------------------------------------------------------- RPC

    def _rpc_send(self, /, *args: Any, _callable: Builder, **kwds: Any) -> Any:
        if not _NOT_FOR_RPC.isdisjoint(kwds):
            refused = sorted(_NOT_FOR_RPC & kwds.keys())
            raise TypeError(
                f"an RPC call takes no {', '.join(refused)}: it is sent now, lasts _timeout "
                "seconds, and its correlation id is its own"
            )
        special = _taken(kwds, _RPC_KEYWORDS)
        message = _callable(*args, **kwds)
        message.fingerprint(**self._fingerprint())
        request = self._request(message, special)
        publisher = self._open()
        if special.get("_queue_only"):
            return self._rpc_queue(publisher, request, special)
        reply = Reply(publisher.hub.wait, publisher.hub.nudge, self.encoder.decode)
        compat = bool(self.compat or self._compat)
        caller = Caller(publisher, self._replies, request, reply, compat)
        if special.get("_future"):
            publisher.hub.call(caller.start, together=True)
            return reply
        refuse_in_coroutine("an RPC call", "await producer.rpc_x(..., _future=True)")
        publisher.hub.wait(reply.ready, first=caller.start)  # the call keeps its deadlines
        return reply.result()

    def _request(self, message: Message, special: Mapping[str, Any]) -> Request:
        targets = self._targets(special)
        exchange, key = pair = targets.pairs[0]
        timeout, retries = special.get("_timeout"), special.get("_max_retry")
        if timeout is None or _seconds("_timeout", timeout, negative=True) < 0:
            timeout = _seconds("rpc_timeout", self.rpc_timeout)
        body = self._encode(message.body)
        _show(body, [pair])
        conversation, headers = lineage()
        if conversation is not None:
            headers[CONVERSATION] = conversation  # the correlation id is that of the call
        return Request(
            exchange,
            key,
            body,
            # Transient by default: it is sent again.
            self._properties(special, [pair], headers, 2 if special.get("_persistent") else 1),
            timeout=float(timeout),
            max_retry=self.max_retry if retries is None else max(0, int(retries)),
            mandatory=bool(special.get("_mandatory", True)),
            queue=targets.queue,
        )

    def _rpc_queue(self, publisher: Publisher, request: Request, special: Mapping[str, Any]) -> str:
        refuse_in_coroutine("opening a reply queue", "await producer.rpc_x(..., _future=True)")
        collector = ReplyCollector(publisher)
        try:
            queue = collector.open(self.publish_timeout)
            properties = pika.BasicProperties(
                **{**request.properties, "reply_to": queue, "correlation_id": new_message_id()}
            )
            composed = Composed(
                request.body,
                properties,
                [(request.exchange, request.key)],
                properties.message_id,
                mandatory=request.mandatory,
                confirm=True,
                timeout=self.publish_timeout,
            )
            self._send(composed, as_future=False)
        except PostageError:
            collector.close()
            raise
        self._collectors[queue] = collector
        return queue

    def consume_rpc(
        self,
        queue: str,
        result_len: int = 1,
        callback: Callable[[Any], None] | None = None,
        timeout: float | None = None,
    ) -> list[Message]:
        """Return the replies that came, or come, to the queue of an ``rpc_queue_x()`` call.

        Args:
            queue: What ``rpc_queue_x()`` returned. It is gone afterwards.
            result_len: How many replies to wait for.
            callback: Called with each reply in its dictionary form.
            timeout: Seconds; None or a negative number for `rpc_timeout`.

        Raises:
            TimeoutError: There were not that many replies in time.
            ConnectionLostError: The queue was lost with the connection.
            ConfigurationError: The queue is not one of this producer's.
        """
        refuse_in_coroutine("consume_rpc()", "use rpc_x(..., _future=True)")
        collector = self._collectors.pop(queue, None)
        if collector is None:
            raise ConfigurationError(
                f"consume_rpc: {queue!r} is no reply queue of this producer; "
                "it takes what rpc_queue_x() returned, once"
            )
        seconds = self.rpc_timeout if timeout is None or timeout < 0 else timeout
        try:
            bodies = collector.collect(result_len, seconds)
            loss = collector.error
        finally:
            collector.close()
        results = [decoded_reply(body, self.encoder.decode) for body in bodies]
        if callback is not None:
            for result in results:
                callback(result.body)
        if len(results) < result_len:
            if loss is not None:
                raise loss
            raise TimeoutError(f"{len(results)} of {result_len} replies within {seconds:g} s")
        return results or [MessageResultError("no reply was asked for")]

    # ------------------------------------------------------------------ what both need

    def _targets(self, special: Mapping[str, Any]) -> _Targets:
        """Return where a message goes. What `eks` says is read again only if it was changed."""
        if not _ROUTING.isdisjoint(special):
            return _targets_of(self._get_eks(special))
        eks = tuple(self.eks)
        if eks != self._read[0]:
            self._read = eks, _targets_of(self._get_eks(special))
        return self._read[1]

    def _get_eks(self, special: Mapping[str, Any]) -> Sequence[tuple[type[Exchange], str]]:
        """Return the pairs that a message goes to. ``_eks`` wins over ``_key``."""
        if "_queue" in special:
            if "_eks" in special or "_key" in special:
                raise TypeError("give _queue, or _key or _eks, but not both")
            pairs: list[tuple[type[Exchange], str]] = [(DefaultExchange, special["_queue"])]
        elif "_eks" in special:
            pairs = _checked(special["_eks"])
        elif "_key" in special:
            pairs = [(self.default_exchange, special["_key"])]
        else:
            pairs = _checked(self.eks)  # not only in the constructor: it may be set later
        for _exchange, key in pairs:
            if not isinstance(key, str):
                raise TypeError(f"the routing key {key!r} is no string")
        return pairs

    def _build_message_properties(
        self,
        special: Mapping[str, Any] | None = None,
        pairs: Sequence[tuple[Any, str]] = (),
        message_id: str | None = None,
    ) -> pika.BasicProperties | bytes:
        """Return the properties of a message; encoded if it has an id and nothing special."""
        conversation, headers = lineage()
        special = special or _NOTHING
        mode = 2 if special.get("_persistent", self.persistent) else 1  # AMQP 0-9-1: persistent
        app_id = self._app_id()
        is_plain = not (special or headers or conversation) and message_id is not None
        if is_plain and not _is_long(app_id, pairs):
            content_type = self.encoder.content_type or None
            with contextlib.suppress(Exception):  # whoever writes the message says what is wrong
                return encode_plain_properties(
                    content_type, mode, str(message_id), int(time.time()), app_id
                )
        properties = self._properties(special, pairs, headers, mode, message_id)
        properties["correlation_id"] = conversation
        if special:
            properties["correlation_id"] = _correlation_id_of(special) or conversation
            properties["expiration"] = _expiration_of(special)
        return pika.BasicProperties(**properties)

    def _properties(
        self,
        special: Mapping[str, Any],
        pairs: Sequence[tuple[Any, str]],
        headers: Mapping[str, Any],
        delivery_mode: int,
        message_id: str | None = None,
    ) -> dict[str, Any]:
        """Return the properties of a message, in their order (AMQP 0-9-1, 4.2.6.1)."""
        app_id = self._app_id()
        properties: dict[str, Any] = {
            "content_type": self.encoder.content_type or None,
            "headers": None,
            "delivery_mode": delivery_mode,
            "priority": None,
            "correlation_id": None,
            "reply_to": None,
            "expiration": None,
            "message_id": message_id or special.get("_message_id") or new_message_id(),
            "timestamp": int(time.time()),
            "app_id": app_id,
        }
        if special:
            headers = {**headers, **(special.get("_headers") or {})}
            properties["priority"] = _priority_of(special)
        if headers:
            properties["headers"] = dict(headers)
        if headers or "_message_id" in special or _is_long(app_id, pairs):
            if not _DELAYS.isdisjoint(special):  # there must be room for what they add
                headers = {**(headers or {}), **MOST_HEADERS}
            checked = pika.BasicProperties(**{**properties, "headers": headers})
            for _exchange, key in pairs:
                check_encodable(key, checked)
        return properties

    def _app_id(self) -> str | None:
        name = self.fingerprint.get("name")
        return None if name is None else str(name)

    def _encode(self, body: Mapping[str, Any]) -> bytes:
        return encoded(self.encoder, body)

    def _fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint, with the pid of a child that we were forked into."""
        pid = hubs.process_id
        if pid != self._pid:
            if self.fingerprint.get("pid") == str(self._pid):
                self.fingerprint["pid"] = str(pid)
            self._pid = pid
        return self.fingerprint

    def _open(self) -> Publisher:
        publisher = self._publisher
        if publisher is not None and publisher.hub.pid == hubs.process_id and not self._closed:
            return publisher
        with _opening:
            if self._closed:
                raise ClosedError(f"{type(self).__name__} is used after close()")
            if self._publisher is None or self._publisher.hub.pid != os.getpid():
                self._replies = ReplyStream()
                self._collectors = {}
                connection = connections.acquire(self._settings, "publish")
                self._publisher = Publisher(connection, self._replies)
            return self._publisher

    def close(self, timeout: float = connections.CLOSE_GRACE) -> None:
        """Wait for what is still being confirmed, then let the connection go.

        What it has in the outbox of the handler that runs is sent all the same: then the
        connection goes when the handler has ended.

        Args:
            timeout: Seconds at most.
        """
        with _opening:
            publisher, closed = self._publisher, self._closed
            self._closed = True
        if publisher is None or closed or publisher.hub.pid != os.getpid():
            return
        outbox = outboxes.current()
        release = partial(self._release, publisher, timeout)
        if outbox is None or not outbox.defer(publisher, release):
            release()

    def _release(self, publisher: Publisher, timeout: float) -> None:
        if publisher.connection.state is connections.State.CLOSED:  # by close_all()
            return
        while self._collectors:
            self._collectors.popitem()[1].close()
        publisher.close(timeout)
        # Calls that are pending end now: with the hub their time-outs may go as well.
        publisher.hub.wait(lambda: True, first=self._replies.deafened)
        connections.release(publisher.connection, timeout)

    @staticmethod
    def serialize_text_file(filepath: str | os.PathLike[str]) -> dict[str, Any]:
        """Return a text file as ``{'name': …, 'content': [line, …]}``, fit for a message.

        Args:
            filepath: A file in UTF-8.

        Raises:
            OSError: It cannot be read.
        """
        path = Path(filepath)
        with path.open(encoding="utf-8") as lines:
            return {"name": path.name, "content": list(lines)}


def _is_long(app_id: str | None, pairs: Iterable[tuple[Any, str]]) -> bool:
    """Tell whether a text of a message may be too long for AMQP, and is to be looked at."""
    for _exchange, key in pairs:
        if len(key) > _SHORT:
            return True
    return app_id is not None and len(app_id) > _SHORT


@functools.lru_cache(maxsize=1000)
def _command_builder(name: str, is_rpc: bool) -> Builder:
    command = RpcCommand if is_rpc else MessageCommand
    verb = name.removeprefix("rpc_" if is_rpc else "message_")
    known = _RPC_KEYWORDS if is_rpc else _MESSAGE_KEYWORDS

    def build(*args: Any, **kwds: Any) -> Message:
        _refuse_unknown(name, kwds, known)
        return command(verb, command_parameters(args, kwds))

    return build


def _show(body: bytes, pairs: Iterable[tuple[Any, str]]) -> None:
    if logger.isEnabledFor(debugging.DEBUG):
        logger.debug("> %s to %s", body, [(exchange.name, key) for exchange, key in pairs])


def _taken(kwds: dict[str, Any], known: frozenset[str]) -> Mapping[str, Any]:
    """Take what steers a call out of the keywords that it was given."""
    if known.isdisjoint(kwds):  # nearly always
        return _NOTHING
    return {name: kwds.pop(name) for name in tuple(kwds) if name in known}


def _refuse_unknown(name: str, kwds: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a mistyped underscore keyword, which would else become part of the message."""
    unknown = [key for key in kwds if key.startswith("_")]
    if unknown:
        raise TypeError(
            f"{name}() got unexpected keyword(s) {', '.join(sorted(unknown))}; those that steer it "
            f"are {', '.join(sorted(known))}"
        )


def _checked(eks: Eks) -> list[tuple[type[Exchange], str]]:
    pairs = list(eks)
    if not pairs:
        raise ConfigurationError("eks is empty: give at least one (exchange, routing key)")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ConfigurationError(f"eks: {pair!r} is no pair of an exchange and a routing key")
        exchange_spec(pair[0])
        if not isinstance(pair[1], str):
            raise ConfigurationError(f"eks: the routing key {pair[1]!r} is no string")
    return [(exchange, key) for exchange, key in pairs]


def _wait_of(special: Mapping[str, Any]) -> Wait | None:
    delay, at = special.get("_delay"), special.get("_at")
    if delay is None and at is None:
        return None
    if special.get("_ttl") is not None:
        raise ConfigurationError(
            "give _ttl, or _delay or _at, but not both: a message that expires would leave the "
            "queue early in which it waits"
        )
    return Wait(delay, at)


def _expiration_of(special: Mapping[str, Any]) -> str | None:
    """Return the property that makes a message expire: milliseconds, as text."""
    ttl = special.get("_ttl")
    if ttl is None:
        return None
    milliseconds = round(plain_seconds("_ttl", ttl) * 1000)
    if not 1 <= milliseconds <= _LONGEST_TTL_MS:
        raise ConfigurationError(f"_ttl is {ttl!r}: give at least 0.001 seconds, at most ten years")
    return str(milliseconds)


def _priority_of(special: Mapping[str, Any]) -> int | None:
    priority = special.get("_priority")
    if priority is None:
        return None
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 255:
        raise ConfigurationError(f"_priority is {priority!r}: give an int from 0 to 255")
    return priority


def _correlation_id_of(special: Mapping[str, Any]) -> str | None:
    value = special.get("_correlation_id")
    if value is None:
        return None
    try:
        fits = isinstance(value, str) and len(value.encode()) <= 255
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise ConfigurationError(
            f"_correlation_id is {value!r:.60}: give a string of at most 255 bytes of UTF-8"
        )
    return str(value)


def _seconds(what: str, value: Any, negative: bool = False) -> float:
    if type(value) is float and 0.0 <= value < math.inf:
        return value
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or (value < 0 and not negative)
    ):
        raise ConfigurationError(f"{what} is {value!r}: give a number of seconds, 0 or more")
    return float(value)
