# SPDX-License-Identifier: MIT
"""What the optional arguments of queues and exchanges mean, and which are refused.

The rules and the words are those of RabbitMQ: https://www.rabbitmq.com/docs/queues#optional-arguments
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from postage.broker import fields
from postage.broker.errors import INTERNAL_ERROR, PRECONDITION_FAILED, Refusal

#: RabbitMQ's names for the types of a field table.
TYPE_NAMES = {
    b"t": "bool",
    b"b": "byte",
    b"B": "unsignedbyte",
    b"s": "short",
    b"u": "unsignedshort",
    b"I": "signedint",
    b"i": "unsignedint",
    b"l": "long",
    b"L": "long",
    b"f": "float",
    b"d": "double",
    b"D": "decimal",
    b"S": "longstr",
    b"x": "binary",
    b"A": "array",
    b"T": "timestamp",
    b"F": "table",
    b"V": "void",
}
_INTEGERS = frozenset({b"b", b"B", b"s", b"u", b"I", b"i", b"l", b"L"})
#: The longest time in milliseconds that Erlang's timers take.
_MAX_MS = 2**32 - 1
_MAX_PRIORITY = 255
_OVERFLOWS = ("drop-head", "reject-publish", "reject-publish-dlx")
_STRATEGIES = ("at-most-once", "at-least-once")


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


def _number(field: bytes, lowest: int = 0, highest: int | None = None) -> int:
    if field[:1] not in _INTEGERS:
        raise _Invalid(f"{{unacceptable_type,{TYPE_NAMES[field[:1]]}}}")
    value = fields.decode(field)
    assert isinstance(value, int)
    if value < lowest:
        raise _Invalid(f"{{value_negative,{value}}}" if lowest == 0 else "{value_zero,0}")
    if highest is not None and value > highest:
        raise _Invalid(f"{{value_too_big,{value}}}")
    return value


def _milliseconds(field: bytes) -> int:
    return _number(field, 0, _MAX_MS)


def _lifetime(field: bytes) -> int:
    value = _number(field, 0, _MAX_MS)
    if value == 0:
        raise _Invalid("{value_zero,0}")
    return value


def _priority(field: bytes) -> int:
    value = _number(field)
    if value > _MAX_PRIORITY:
        raise _Invalid(f"{{max_value_exceeded,{value}}}")
    return value


def _string(field: bytes) -> str:
    value = fields.decode(field) if field[:1] == b"S" else None
    if not isinstance(value, str):
        raise _Invalid(f"{{unacceptable_type,{TYPE_NAMES[field[:1]]}}}")
    return value


def _one_of(*allowed: str) -> Callable[[bytes], str]:
    def read(field: bytes) -> str:
        value = _string(field)
        if value not in allowed:
            raise _Invalid(f'{{invalid_value,<<"{value}">>}}')
        return value

    return read


def _flag(field: bytes) -> bool:
    if field[:1] != b"t":
        raise _Invalid(f"{{unacceptable_type,{TYPE_NAMES[field[:1]]}}}")
    return field[1:] != b"\x00"


#: Argument, attribute of `QueueArguments`, reader.
_QUEUE: dict[str, tuple[str, Callable[[bytes], Any]]] = {
    "x-message-ttl": ("message_ttl", _milliseconds),
    "x-expires": ("expires", _lifetime),
    "x-dead-letter-exchange": ("dead_letter_exchange", _string),
    "x-dead-letter-routing-key": ("dead_letter_routing_key", _string),
    "x-dead-letter-strategy": ("is_at_least_once", _one_of(*_STRATEGIES)),
    "x-max-length": ("max_length", _number),
    "x-max-length-bytes": ("max_bytes", _number),
    "x-overflow": ("overflow", _one_of(*_OVERFLOWS)),
    "x-max-priority": ("max_priority", _priority),
    "x-single-active-consumer": ("is_single_active", _flag),
    "x-delivery-limit": ("delivery_limit", _number),
    "x-queue-type": ("is_quorum", _one_of("classic", "quorum")),
}


def read_queue_arguments(raw: Mapping[str, bytes], owner: str) -> QueueArguments:
    """Return what the arguments of a queue mean. Unknown ones are kept, and mean nothing.

    Args:
        owner: the queue in words, for the refusal.

    Raises:
        Refusal: RabbitMQ would refuse one.
    """
    values: dict[str, Any] = {}
    for name, field in raw.items():
        if name in _QUEUE:
            attribute, read = _QUEUE[name]
            try:
                values[attribute] = read(field)
            except _Invalid as error:
                raise Refusal(
                    PRECONDITION_FAILED, f"invalid arg '{name}' for {owner}: {error}"
                ) from None
    values["is_quorum"] = values.get("is_quorum") == "quorum"
    values["is_at_least_once"] = values.get("is_at_least_once") == "at-least-once"
    if "dead_letter_routing_key" in values and "dead_letter_exchange" not in values:
        raise Refusal(
            PRECONDITION_FAILED,
            f"invalid arg 'x-dead-letter-routing-key' for {owner}: "
            "routing_key_but_no_dlx_defined",
        )
    return QueueArguments(raw, **values)


def check_quorum(
    arguments: QueueArguments, owner: str, *, durable: bool, exclusive: bool, auto_delete: bool
) -> None:
    """Refuse what a quorum queue cannot be.

    Raises:
        Refusal: It is not durable, exclusive, deleted with its last consumer or has priorities.
    """
    if not arguments.is_quorum:
        return
    wrong = [
        ("durable", "false", not durable),
        ("exclusive", "true", exclusive),
        ("auto-delete", "true", auto_delete),
    ]
    for name, value, is_wrong in wrong:
        if is_wrong:
            raise Refusal(
                PRECONDITION_FAILED, f"invalid property '{name}' for {owner}: '{value}'"
            )
    if arguments.max_priority is not None:
        value = _shown(arguments.raw["x-max-priority"])
        raise Refusal(
            PRECONDITION_FAILED, f"invalid arg 'x-max-priority' for {owner} of queue type {value}"
        )


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


def check_equivalent(
    current: Mapping[str, bytes], received: Mapping[str, bytes], owner: str, names: Any = None
) -> None:
    """Refuse a declaration whose arguments differ from those of what exists.

    Args:
        names: the arguments that count; None for those of queues.

    Raises:
        Refusal: One differs, in its value or in the kind of its type.
    """
    for name in _QUEUE if names is None else names:
        old, new = current.get(name), received.get(name)
        if name == "x-queue-type":
            default = fields.encode("classic")
            old, new = old or default, new or default
        if not _is_same(old, new):
            raise Refusal(
                PRECONDITION_FAILED,
                f"inequivalent arg '{name}' for {owner}: received {_described(new)} but current "
                f"is {_described(old)}",
            )


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
