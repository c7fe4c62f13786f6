# SPDX-License-Identifier: MIT
"""Exchanges, queues and bindings, as values.

A program declares an `Exchange` or a `Queue` by subclassing; what travels inside
postage are the frozen values `ExchangeSpec`, `QueueSpec` and `Binding` that are
made from them. Nothing here talks to a broker.

What a queue is declared with cannot be changed in the field: a queue that exists
with other arguments refuses the new ones (406 PRECONDITION_FAILED). So the defaults
of this module are part of the wire contract.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from postage.errors import ConfigurationError
from postage.settings import error_queue_from_environment, queue_type_from_environment

#: Deliveries of one message after which a quorum queue gives it up. A net under crash
#: loops, far above what ordinary restarts and lost connections add up to.
DELIVERY_LIMIT = 50

#: Where a queue sends what it gives up, and a component what it cannot handle.
ERROR_QUEUE = "{name}.error"

#: The error queue of queues whose name says nothing to people (server-named ones).
NAMELESS_ERROR_QUEUE = "error"


# ------------------------------------------------------------------------- exchanges


@dataclass(frozen=True)
class ExchangeSpec:
    """What an exchange is declared with."""

    name: str
    type: str = "direct"
    passive: bool = False
    durable: bool = True
    auto_delete: bool = False
    internal: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_default(self) -> bool:
        """Whether it is AMQP's nameless exchange, which is there and takes no bindings."""
        return self.name == ""


class _Parameters:
    """The `parameters` attribute of 1.2.1: a dict made from the class attributes."""

    def __get__(self, instance: object, owner: type[Exchange]) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "exchange": owner.name,
            "exchange_type": owner.exchange_type,
            "passive": owner.passive,
            "durable": owner.durable,
            "auto_delete": owner.auto_delete,
        }
        if owner.internal:
            parameters["internal"] = True
        if owner.arguments:
            parameters["arguments"] = dict(owner.arguments)
        return parameters


class ExchangeType(type):
    """The metaclass of `Exchange`, which 1.2.1 had; for code that names it."""


class Exchange(metaclass=ExchangeType):
    """An exchange, declared by subclassing and used as a class.

    Attributes:
        name: Its name; "" is AMQP's default exchange, which routes by queue name.
        exchange_type: "direct", "fanout", "topic" or "headers".
        passive: Only check that it exists.
        durable: It survives a restart of the broker.
        auto_delete: It goes with its last binding.
        internal: Only other exchanges may publish to it.
        arguments: Such as ``{"alternate-exchange": "unrouted"}``.
    """

    name: ClassVar[str] = "noname"
    exchange_type: ClassVar[str] = "direct"
    passive: ClassVar[bool] = False
    durable: ClassVar[bool] = True
    auto_delete: ClassVar[bool] = False
    internal: ClassVar[bool] = False
    arguments: ClassVar[Mapping[str, Any]] = {}
    parameters: ClassVar[_Parameters] = _Parameters()

    @classmethod
    def spec(cls) -> ExchangeSpec:
        """Return what it is declared with, as a value."""
        return ExchangeSpec(
            cls.name,
            cls.exchange_type,
            cls.passive,
            cls.durable,
            cls.auto_delete,
            cls.internal,
            dict(cls.arguments),
        )

    @classmethod
    def queue_of(cls, key: str) -> str | None:
        """Tell which single queue a routing key leads to, where that is known.

        An RPC call uses it to find out that a service exists and nobody serves it.
        """
        return None


class DefaultExchange(Exchange):
    """AMQP's default exchange: the routing key is the name of a queue."""

    name = ""

    @classmethod
    def queue_of(cls, key: str) -> str | None:
        return key


# ---------------------------------------------------------------------------- queues


@dataclass(frozen=True)
class QueueSpec:
    """What a queue is declared and consumed with.

    ``exclusive_consumer`` refuses a second consumer; ``error_queue`` names where its
    failed messages go; ``personal`` tells that it belongs to one instance, so that a
    message that nobody handles concerns nobody else.
    """

    name: str
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    passive: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    exclusive_consumer: bool = False
    error_queue: str | None = None
    personal: bool = False

    @property
    def counts_deliveries(self) -> bool:
        """Whether the broker gives a message up after some deliveries."""
        return "x-delivery-limit" in self.arguments

    @property
    def dead_letter_queue(self) -> str | None:
        """The queue that its arguments send given-up messages to, if it is a plain queue."""
        if self.arguments.get("x-dead-letter-exchange") == "":
            return self.arguments.get("x-dead-letter-routing-key")
        return None


class Queue:
    """A queue, declared by subclassing, or made on the spot with keywords.

    Either ``class Orders(Queue): name = "orders"`` or ``Queue("orders", ttl=60)``.

    Attributes:
        name: Its name. Without one the broker invents a name at each connection, which
            needs ``exclusive``.
        type: "quorum" or "classic". None decides: quorum (or what POSTAGE_QUEUE_TYPE
            says), but classic where quorum cannot be (not durable, exclusive, auto_delete).
        durable: It survives a restart of the broker. None: durable unless exclusive.
        auto_delete: It goes with its last consumer.
        exclusive: Only this connection sees it, and it goes with the connection.
        passive: Only check that it exists.
        expires: Seconds without use after which the broker deletes it.
        ttl: Seconds after which a message is given up.
        max_length: Messages that it holds at most.
        max_length_bytes: Bytes of bodies that it holds at most.
        overflow: What happens then: "reject-publish" or "drop-head".
        dead_letter: The queue that gets what it gives up, ``{name}`` standing for its
            own name; or a pair of exchange name and routing key; None drops it.
        error_queue: The queue for messages that a component cannot handle. None: the one of
            ``dead_letter``, or ``{name}.error``.
        delivery_limit: Deliveries of one message before it is given up (quorum only).
        single_active_consumer: One consumer at a time gets messages.
        exclusive_consumer: A second consumer is refused.
        personal: It belongs to one instance: unhandled messages are skipped, not parked.
            None decides by ``exclusive`` and ``auto_delete``.
        arguments: Further arguments, as the broker names them; they win.
    """

    name: str = ""
    type: str | None = None
    durable: bool | None = None
    auto_delete: bool = False
    exclusive: bool = False
    passive: bool = False
    expires: float | None = None
    ttl: float | None = None
    max_length: int | None = None
    max_length_bytes: int | None = None
    overflow: str | None = None
    dead_letter: str | tuple[str, str] | None = ERROR_QUEUE
    error_queue: str | None = None
    delivery_limit: int | None = DELIVERY_LIMIT
    single_active_consumer: bool = False
    exclusive_consumer: bool = False
    personal: bool | None = None
    arguments: Mapping[str, Any] = {}

    def __init__(self, name: str | None = None, **attributes: Any) -> None:
        if name is not None:
            attributes["name"] = name
        for key, value in attributes.items():
            if key.startswith("_") or not hasattr(Queue, key) or callable(getattr(Queue, key)):
                raise ConfigurationError(f"Queue has no attribute {key!r}")
            setattr(self, key, value)

    def __repr__(self) -> str:
        return f"<Queue {self.name!r}>"

    def __getitem__(self, key: str) -> Any:
        """Give ``["name"]`` and ``["flags"]``, as the dicts of 1.2.1 did."""
        spec = self.spec()
        if key == "name":
            return spec.name
        if key == "flags":
            return {
                "durable": spec.durable,
                "exclusive": spec.exclusive,
                "auto_delete": spec.auto_delete,
                "arguments": dict(spec.arguments),
            }
        raise KeyError(key)

    def spec(self) -> QueueSpec:
        """Return what it is declared with, as a value.

        Raises:
            ConfigurationError: The attributes contradict each other.
        """
        if not self.name and not self.exclusive:
            raise ConfigurationError("a queue without a name must be exclusive")
        durable = not self.exclusive if self.durable is None else self.durable
        replicable = durable and not self.exclusive and not self.auto_delete
        kind = self.type or (queue_type_from_environment() if replicable else "classic")
        if kind == "quorum" and not replicable:
            raise ConfigurationError(
                f"queue {self.name!r}: a quorum queue is durable, not exclusive and not "
                "auto_delete; leave the type out or say type='classic'"
            )
        personal = self.exclusive or self.auto_delete if self.personal is None else self.personal
        return QueueSpec(
            self.name,
            durable=durable,
            exclusive=self.exclusive,
            auto_delete=self.auto_delete,
            passive=self.passive,
            arguments={**self._made_arguments(kind), **self.arguments},
            exclusive_consumer=self.exclusive_consumer,
            error_queue=self._error_queue(),
            personal=personal,
        )

    def _error_queue(self) -> str:
        if self.error_queue is not None:
            return self.error_queue.format(name=self.name)
        if isinstance(self.dead_letter, str) and self.dead_letter != ERROR_QUEUE:
            return self.dead_letter.format(name=self.name) if self.name else NAMELESS_ERROR_QUEUE
        return error_queue_of(self.name)

    def _made_arguments(self, kind: str) -> dict[str, Any]:
        made: dict[str, Any] = {"x-queue-type": kind}
        overflow = self.overflow
        if self.dead_letter is not None and not (self.exclusive or self.auto_delete):
            exchange, key = (
                ("", self._error_queue()) if isinstance(self.dead_letter, str) else self.dead_letter
            )
            made["x-dead-letter-exchange"] = exchange
            made["x-dead-letter-routing-key"] = key
            if kind == "quorum" and overflow in (None, "reject-publish"):
                # RabbitMQ, quorum queues: at-least-once dead lettering needs reject-publish.
                made["x-dead-letter-strategy"] = "at-least-once"
                overflow = "reject-publish"
        if kind == "quorum" and self.delivery_limit is not None:
            made["x-delivery-limit"] = self.delivery_limit
        if overflow is not None:
            made["x-overflow"] = overflow
        for argument, seconds in (("x-expires", self.expires), ("x-message-ttl", self.ttl)):
            if seconds is not None:
                made[argument] = _milliseconds(f"queue {self.name!r}: {argument}", seconds)
        for argument, number in (
            ("x-max-length", self.max_length),
            ("x-max-length-bytes", self.max_length_bytes),
        ):
            if number is not None:
                made[argument] = number
        if self.single_active_consumer:
            made["x-single-active-consumer"] = True
        return made


def _milliseconds(what: str, seconds: float) -> int:
    if not math.isfinite(seconds) or seconds < 0:
        raise ConfigurationError(f"{what} is {seconds!r}: give seconds, 0 or more")
    return round(seconds * 1000)


#: A delivery limit that nothing reaches.
UNLIMITED = 2**31 - 1


def error_queue_of(name: str) -> str:
    """Return the name of the error queue that belongs to a queue of this name.

    Names that begin with "amq." are the broker's own and cannot be declared (403).
    """
    if not name or name.startswith("amq."):
        return NAMELESS_ERROR_QUEUE
    return error_queue_from_environment().replace("{name}", name)


def error_queue(name: str) -> QueueSpec:
    """Return the value of an error queue: durable, and quorum without a delivery limit.

    RabbitMQ 4 gives quorum queues a limit of 20 deliveries unless they say otherwise, and each
    look into the queue is one. There is no way to say "none" that RabbitMQ 3.10 knows, too.
    """
    kind = queue_type_from_environment()
    limit = {"x-delivery-limit": UNLIMITED} if kind == "quorum" else {}
    return QueueSpec(name, arguments={"x-queue-type": kind, **limit})


#: How a program may name a queue: by name, as 1.2.1's dict, as a class, or as an instance.
QueueLike = str | Mapping[str, Any] | type[Queue] | Queue

_FLAGS = ("durable", "exclusive", "auto_delete", "passive")


def queue_spec(queue: QueueLike, compat: bool = False) -> QueueSpec:
    """Return the value of a queue in any of its forms.

    Args:
        queue: A name, ``{"name": …, "flags": {…}}``, or a `Queue`.
        compat: Declare a bare name as 1.2.1 did: classic, transient, without arguments.

    Raises:
        ConfigurationError: It is none of those, or contradicts itself.
    """
    if isinstance(queue, str):
        if compat:
            return QueueSpec(queue, durable=False, error_queue=error_queue_of(queue))
        return Queue(queue, exclusive=not queue).spec()
    if isinstance(queue, Queue):
        return queue.spec()
    if isinstance(queue, type) and issubclass(queue, Queue):
        return queue().spec()
    if isinstance(queue, Mapping):
        return _spec_of_dict(queue, compat)
    raise ConfigurationError(
        f"{queue!r} is no queue: give a name, a dict with 'name' and 'flags', or a Queue"
    )


def _spec_of_dict(queue: Mapping[str, Any], compat: bool) -> QueueSpec:
    unknown = sorted(set(queue) - {"name", "flags"})
    if unknown or not isinstance(queue.get("name"), str):
        raise ConfigurationError(
            f"queue {dict(queue)!r}: give a dict with the keys 'name' (str) and 'flags' (dict)"
        )
    if "flags" not in queue:
        return queue_spec(queue["name"], compat)
    flags = dict(queue["flags"])
    arguments = flags.pop("arguments", None) or {}
    wrong = sorted(set(flags) - set(_FLAGS))
    if wrong:
        raise ConfigurationError(
            f"queue {queue['name']!r}: unknown flag(s) {', '.join(wrong)}; "
            f"known are {', '.join(_FLAGS)}, arguments"
        )
    chosen = {flag: bool(flags.get(flag, False)) for flag in _FLAGS}
    return QueueSpec(
        queue["name"],
        **chosen,
        arguments=dict(arguments),
        error_queue=error_queue_of(queue["name"]),
        personal=chosen["exclusive"] or chosen["auto_delete"],
    )


# -------------------------------------------------------------------------- bindings

#: (exchange class, [(queue, key), …]), and so on: the `eqk` of consumers.
Eqk = Iterable[Any]
#: [(exchange class, key), …]: the `eks` of producers.
Eks = Iterable[tuple[type[Exchange], str]]


@dataclass(frozen=True)
class Binding:
    """A queue that gets what an exchange routes by a key."""

    exchange: ExchangeSpec
    queue: QueueSpec
    key: str


def exchange_spec(exchange: object) -> ExchangeSpec:
    """Return the value of an exchange class (or instance).

    Raises:
        ConfigurationError: It is no exchange.
    """
    if isinstance(exchange, Exchange) or (
        isinstance(exchange, type) and issubclass(exchange, Exchange)
    ):
        return exchange.spec()
    raise ConfigurationError(f"{exchange!r} is no exchange: give a subclass of Exchange")


def bindings_of(eqk: Eqk, compat: bool = False) -> Iterator[tuple[Any, QueueLike, Binding]]:
    """Read an `eqk`: pairs of an exchange and its list of (queue, key).

    The flat form of 1.2.1's README, ``(Exchange, [(queue, key)], Exchange, […])``, is
    read as well. Yields the exchange class, the queue as it was given, and the binding.

    Raises:
        ConfigurationError: It is not of that form.
    """
    flat: list[Any] = []
    for entry in eqk:
        if isinstance(entry, type) or (flat and len(flat) % 2):
            flat.append(entry)
        elif isinstance(entry, (tuple, list)) and len(entry) == 2:
            flat.extend(entry)
        else:
            raise ConfigurationError(f"eqk: {entry!r} is no pair of an exchange and its queues")
    if len(flat) % 2:
        raise ConfigurationError(f"eqk: the exchange {flat[-1]!r} has no list of queues")
    for exchange, pairs in zip(flat[::2], flat[1::2], strict=True):
        spec = exchange_spec(exchange)
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ConfigurationError(f"eqk: {pair!r} is no pair of a queue and a routing key")
            queue, key = pair
            if not isinstance(key, str):
                raise ConfigurationError(f"eqk: the routing key {key!r} is no string")
            yield exchange, queue, Binding(spec, queue_spec(queue, compat), key)
