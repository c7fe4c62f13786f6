# SPDX-License-Identifier: MIT
"""What the optional arguments of queues and exchanges mean, and which are refused.

The rules and the words are those of RabbitMQ: https://www.rabbitmq.com/docs/queues#optional-arguments
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from postage.broker import fields
from postage.broker.erlang import TYPE_NAMES
from postage.broker.errors import INTERNAL_ERROR, PRECONDITION_FAILED, Refusal

_INTEGERS = frozenset({b"b", b"B", b"s", b"u", b"I", b"i", b"l", b"L"})
#: Milliseconds that RabbitMQ lets anything wait at most: ten years.
MAX_MS = 315_360_000_000
_MAX_PRIORITY = 255
_CLASSIC = fields.encode("classic")


@dataclass(frozen=True)
class QueueArguments:
    """The arguments of a queue, understood. Times are in milliseconds.

    Attributes:
        raw: all that was given, by name, each value encoded with its type.
    """

    raw: Mapping[str, bytes]
    is_quorum: bool = False
    message_ttl: int | None = None
    expires: int | None = None
    dead_letter_exchange: str | None = None
    dead_letter_routing_key: str | None = None
    is_at_least_once: bool = False
    max_length: int | None = None
    max_bytes: int | None = None
    overflow: str = "drop-head"
    max_priority: int | None = None
    is_single_active: bool = False
    delivery_limit: int | None = None


class _Invalid(ValueError):
    """A value that is refused, in the words of Erlang."""


def _integer(field: bytes) -> int:
    value = fields.decode(field) if field[:1] in _INTEGERS else None
    if not isinstance(value, int):
        raise _Invalid(f'"expected integer, got {TYPE_NAMES[field[:1]]}"')
    return value


def _number(field: bytes) -> int:
    value = _integer(field)
    if value < 0:
        raise _Invalid(f"{{value_negative,{value}}}")
    return value


def _milliseconds(field: bytes) -> int:
    value = _number(field)
    if value > MAX_MS:
        raise _Invalid(f"{{value_too_large,{value}}}")
    return value


def _lifetime(field: bytes) -> int:
    value = _milliseconds(field)
    if value == 0:
        raise _Invalid("{value_zero,0}")
    return value


def _group_size(field: bytes) -> int:
    value = _number(field)
    if value == 0:
        raise _Invalid("{value_zero,0}")
    return value


def _priority(field: bytes) -> int:
    value = _number(field)
    if value > _MAX_PRIORITY:
        raise _Invalid(f"{{max_value_exceeded,{value}}}")
    return value


def _string(field: bytes) -> str:
    if field[:1] != b"S":
        raise _Invalid(f"{{unacceptable_type,{TYPE_NAMES[field[:1]]}}}")
    return field[5:].decode("utf-8", "surrogateescape")


def _one_of(*allowed: str, otherwise: str) -> Callable[[bytes], str]:
    def read(field: bytes) -> str:
        value = _string(field)
        if value not in allowed:
            raise _Invalid(otherwise.format(value))
        return value

    return read


def _flag(field: bytes) -> bool:
    if field[:1] != b"t":
        raise _Invalid(f"{{unacceptable_type,{TYPE_NAMES[field[:1]]}}}")
    return field[1:] != b"\x00"


def _version(field: bytes) -> int:
    value = _number(field)
    if value not in (1, 2):
        raise _Invalid(f"\"unsupported queue version '{value}'\"")
    return value


#: Readers of arguments, in the order in which RabbitMQ looks at them.
_QUEUE: dict[str, Callable[[bytes], Any]] = {
    "x-expires": _lifetime,
    "x-message-ttl": _milliseconds,
    "x-dead-letter-exchange": _string,
    "x-dead-letter-routing-key": _string,
    "x-dead-letter-strategy": _one_of(
        "at-most-once", "at-least-once", otherwise="invalid_dlx_strategy"
    ),
    "x-max-length": _number,
    "x-max-length-bytes": _number,
    "x-max-in-memory-length": _number,
    "x-max-in-memory-bytes": _number,
    "x-max-priority": _priority,
    "x-overflow": _one_of(
        "drop-head", "reject-publish", "reject-publish-dlx", otherwise="invalid_overflow"
    ),
    "x-queue-mode": _one_of("default", "lazy", otherwise="\"unsupported queue mode '{}'\""),
    "x-queue-version": _version,
    "x-single-active-consumer": _flag,
    "x-queue-type": _one_of("classic", "quorum", otherwise="\"unsupported queue type '{}'\""),
    "x-quorum-initial-group-size": _group_size,
    "x-queue-leader-locator": _one_of(
        "client-local", "balanced", otherwise="invalid_queue_locator_arg"
    ),
}
#: Where a value goes, for those that mean something on one node.
_ATTRIBUTES = {
    "x-expires": "expires",
    "x-message-ttl": "message_ttl",
    "x-dead-letter-exchange": "dead_letter_exchange",
    "x-dead-letter-routing-key": "dead_letter_routing_key",
    "x-max-length": "max_length",
    "x-max-length-bytes": "max_bytes",
    "x-max-priority": "max_priority",
    "x-overflow": "overflow",
    "x-single-active-consumer": "is_single_active",
}
#: Arguments of the one type of queue that the other refuses; those of streams both refuse.
_OF_STREAMS = frozenset(
    {"x-max-age", "x-stream-max-segment-size-bytes", "x-initial-cluster-size"}
)
_NOT_CLASSIC = _OF_STREAMS | {
    "x-dead-letter-strategy",
    "x-delivery-limit",
    "x-max-in-memory-length",
    "x-max-in-memory-bytes",
    "x-queue-leader-locator",
    "x-quorum-initial-group-size",
}
_NOT_QUORUM = _OF_STREAMS | {
    "x-max-priority",
    "x-queue-master-locator",
    "x-queue-mode",
    "x-queue-version",
}
#: What must be the same when a queue is declared again, in the order in which RabbitMQ looks.
_COMPARED_CLASSIC = (
    "x-expires",
    "x-message-ttl",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-max-length",
    "x-max-length-bytes",
    "x-max-priority",
    "x-overflow",
    "x-queue-mode",
    "x-queue-version",
    "x-single-active-consumer",
    "x-queue-type",
    "x-queue-master-locator",
)
_COMPARED_QUORUM = (
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-dead-letter-strategy",
    "x-expires",
    "x-max-length",
    "x-max-length-bytes",
    "x-max-in-memory-length",
    "x-max-in-memory-bytes",
    "x-overflow",
    "x-single-active-consumer",
    "x-queue-type",
    "x-quorum-initial-group-size",
    "x-delivery-limit",
    "x-message-ttl",
    "x-queue-leader-locator",
)


def read_queue_arguments(raw: Mapping[str, bytes], owner: str) -> QueueArguments:
    """Return what the arguments of a queue mean. Unknown ones are kept, and mean nothing.

    Args:
        owner: the queue in words, for the refusal.

    Raises:
        Refusal: RabbitMQ would refuse one.
    """
    kind = _read("x-queue-type", raw.get("x-queue-type", _CLASSIC), owner)
    is_quorum = kind == "quorum"
    for name in raw:
        if name in (_NOT_QUORUM if is_quorum else _NOT_CLASSIC):
            raise Refusal(
                PRECONDITION_FAILED,
                f"invalid arg '{name}' for {owner} of queue type rabbit_{kind}_queue",
            )
    values = {name: _read(name, raw[name], owner) for name in _QUEUE if name in raw}
    if "x-dead-letter-routing-key" in raw and "x-dead-letter-exchange" not in raw:
        raise Refusal(
            PRECONDITION_FAILED,
            f"invalid arg 'x-dead-letter-routing-key' for {owner}: "
            "routing_key_but_no_dlx_defined",
        )
    return QueueArguments(
        raw,
        is_quorum=is_quorum,
        is_at_least_once=values.get("x-dead-letter-strategy") == "at-least-once",
        delivery_limit=_delivery_limit(raw.get("x-delivery-limit")),
        **{name: values[each] for each, name in _ATTRIBUTES.items() if each in values},
    )


def _read(name: str, field: bytes, owner: str) -> Any:
    if name == "x-dead-letter-exchange":
        check_exchange_name(name, field, owner)
    try:
        return _QUEUE[name](field)
    except _Invalid as error:
        raise Refusal(
            PRECONDITION_FAILED, f"invalid arg '{name}' for {owner}: {error}"
        ) from None


def _delivery_limit(field: bytes | None) -> int | None:
    """Return the limit. RabbitMQ takes anything, and what is no limit for none."""
    value = fields.decode(field) if field is not None and field[:1] in _INTEGERS else None
    return value if isinstance(value, int) and value >= 0 else None


def read_priority(field: bytes | None, owner: str) -> int:
    """Return the priority of a consumer.

    Raises:
        Refusal: It is no integer.
    """
    try:
        return _integer(field) if field is not None else 0
    except _Invalid as error:
        raise Refusal(
            PRECONDITION_FAILED, f"invalid arg 'x-priority' for {owner}: {error}"
        ) from None


def check_exchange_name(name: str, field: bytes | None, owner: str) -> None:
    """Refuse what cannot be the name of an exchange.

    Raises:
        Refusal: It is no string.
    """
    if field is not None and field[:1] != b"S":
        raise Refusal(
            PRECONDITION_FAILED,
            f"invalid type '{TYPE_NAMES[field[:1]]}' for arg '{name}' in {owner}",
        )


def check_quorum(
    arguments: QueueArguments, owner: str, *, durable: bool, exclusive: bool, auto_delete: bool
) -> None:
    """Refuse what a quorum queue cannot be.

    Raises:
        Refusal: It is not durable, exclusive, or deleted with its last consumer.
    """
    wrong = {"auto-delete": auto_delete, "exclusive-owner": exclusive, "non-durable": not durable}
    for name, is_wrong in wrong.items():
        if arguments.is_quorum and is_wrong:
            raise Refusal(PRECONDITION_FAILED, f"invalid property '{name}' for {owner}")


def check_strict_queue(*, durable: bool, exclusive: bool) -> None:
    """Refuse the queues that RabbitMQ 4.3 refuses.

    Raises:
        Refusal: It is neither durable nor exclusive.
    """
    if not durable and not exclusive:
        raise _deprecated("transient_nonexcl_queues")


def check_strict_qos(*, is_global: bool) -> None:
    """Refuse the prefetch of a whole channel, as RabbitMQ 4.3 does.

    Raises:
        Refusal: It is one.
    """
    if is_global:
        raise _deprecated("global_qos")


def _deprecated(feature: str) -> Refusal:
    return Refusal(
        INTERNAL_ERROR,
        f"Feature `{feature}` is deprecated. By default, this feature is not permitted anymore: "
        "the broker runs in strict mode, as RabbitMQ 4.3 does",
    )


def check_equivalent_queue(
    current: QueueArguments, received: Mapping[str, bytes], owner: str
) -> None:
    """Refuse a declaration whose arguments differ from those of the queue that exists.

    Raises:
        Refusal: One differs, in its value or in the kind of its type.
    """
    names = _COMPARED_QUORUM if current.is_quorum else _COMPARED_CLASSIC
    for name in names:
        check_equivalent(name, current.raw.get(name), received.get(name), owner)


def check_equivalent(name: str, old: bytes | None, new: bytes | None, owner: str) -> None:
    """Refuse a declaration of which one argument differs from that of what exists.

    Raises:
        Refusal: It differs, in its value or in the kind of its type.
    """
    if _is_same(old, new) or (name == "x-queue-type" and {old, new} == {None, _CLASSIC}):
        return
    words = f"received {_described(new)} but current is {_described(old)}"
    if old is not None and new is not None:
        words = f"received '{_shown(new)}' but current is '{_shown(old)}'"
    raise Refusal(PRECONDITION_FAILED, f"inequivalent arg '{name}' for {owner}: {words}")


def check_same(name: str, current: object, received: object, owner: str) -> None:
    """Refuse a declaration with another flag or type than what exists has.

    Raises:
        Refusal: They differ.
    """
    if current != received:
        raise Refusal(
            PRECONDITION_FAILED,
            f"inequivalent arg '{name}' for {owner}: received '{_word(received)}' but current "
            f"is '{_word(current)}'",
        )


def _is_same(old: bytes | None, new: bytes | None) -> bool:
    if old == new:
        return True
    if old is None or new is None:
        return False
    both_integers = old[:1] in _INTEGERS and new[:1] in _INTEGERS
    return both_integers and fields.decode(old) == fields.decode(new)


def _described(field: bytes | None) -> str:
    if field is None:
        return "none"
    return f"the value '{_shown(field)}' of type '{TYPE_NAMES[field[:1]]}'"


def _shown(field: bytes) -> str:
    return _word(fields.decode(field))


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
