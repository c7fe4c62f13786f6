# SPDX-License-Identifier: MIT
"""The arguments of queues mean, and are refused, as RabbitMQ 3.10.8 has it.

The words of the refusals were compared with it for each argument with a field of each type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postage.broker import arguments, fields
from postage.broker.arguments import QueueArguments, read_queue_arguments
from postage.broker.errors import Refusal
from tests.broker.test_fields import ARRAY, SCALARS, TABLE

OWNER = "queue 'q' in vhost '/'"
QUORUM = {"x-queue-type": fields.encode("quorum")}
FIVE = b"I\0\0\0\5"
#: A field of each type; the first octet says which.
EACH_TYPE = [*SCALARS, ARRAY, TABLE]

#: Argument, what it is given, and which attribute has which value then.
MEANINGS: tuple[tuple[str, bytes, str, object], ...] = (
    ("x-message-ttl", b"I\0\0\0\0", "message_ttl", 0),
    ("x-message-ttl", b"B\xff", "message_ttl", 255),
    ("x-message-ttl", fields.encode(arguments.MAX_MS), "message_ttl", arguments.MAX_MS),
    ("x-expires", b"s\0\1", "expires", 1),
    ("x-dead-letter-exchange", fields.encode(""), "dead_letter_exchange", ""),
    ("x-dead-letter-exchange", b"S\0\0\0\1\xff", "dead_letter_exchange", "\udcff"),
    ("x-max-length", FIVE, "max_length", 5),
    ("x-quorum-initial-group-size", FIVE, "is_quorum", True),
    ("x-max-length", b"l\x7f" + b"\xff" * 7, "max_length", 2**63 - 1),
    ("x-max-length-bytes", b"u\xff\xff", "max_bytes", 65_535),
    ("x-max-priority", b"b\5", "max_priority", 5),
    ("x-max-priority", b"B\xff", "max_priority", 255),
    ("x-overflow", fields.encode("reject-publish"), "overflow", "reject-publish"),
    ("x-overflow", fields.encode("reject-publish-dlx"), "overflow", "reject-publish-dlx"),
    ("x-single-active-consumer", b"t\1", "is_single_active", True),
    ("x-single-active-consumer", b"t\0", "is_single_active", False),
    ("x-queue-type", fields.encode("quorum"), "is_quorum", True),
    ("x-queue-type", fields.encode("classic"), "is_quorum", False),
    ("x-delivery-limit", FIVE, "delivery_limit", 5),
    ("x-delivery-limit", b"I\xff\xff\xff\xff", "delivery_limit", None),
    ("x-delivery-limit", fields.encode("5"), "delivery_limit", None),
    ("x-dead-letter-strategy", fields.encode("at-least-once"), "is_at_least_once", True),
    ("x-dead-letter-strategy", fields.encode("at-most-once"), "is_at_least_once", False),
)
OF_QUORUM_QUEUES = (
    "x-delivery-limit",
    "x-dead-letter-strategy",
    "x-quorum-initial-group-size",
)

#: Argument, what it is given, and the end of the refusal.
REFUSED: tuple[tuple[str, bytes, str], ...] = (
    ("x-message-ttl", fields.encode(-1), "{value_negative,-1}"),
    ("x-message-ttl", fields.encode(arguments.MAX_MS + 1), "{value_too_large,315360000001}"),
    ("x-message-ttl", b"V", '"expected integer, got void"'),
    ("x-message-ttl", b"d" + bytes(8), '"expected integer, got double"'),
    ("x-expires", fields.encode(0), "{value_zero,0}"),
    ("x-max-length", fields.encode("5"), '"expected integer, got longstr"'),
    ("x-max-length", b"t\1", '"expected integer, got bool"'),
    ("x-max-length-bytes", fields.encode(-(2**63)), f"{{value_negative,{-(2**63)}}}"),
    ("x-max-priority", fields.encode(256), "{max_value_exceeded,256}"),
    ("x-dead-letter-routing-key", FIVE, "{unacceptable_type,signedint}"),
    ("x-overflow", fields.encode("reject"), "invalid_overflow"),
    ("x-overflow", b"x\0\0\0\0", "{unacceptable_type,binary}"),
    ("x-queue-mode", fields.encode("eager"), "\"unsupported queue mode 'eager'\""),
    ("x-queue-version", fields.encode(3), "\"unsupported queue version '3'\""),
    ("x-queue-type", fields.encode("blue"), "\"unsupported queue type 'blue'\""),
    ("x-queue-type", b"A\0\0\0\0", "{unacceptable_type,array}"),
    ("x-single-active-consumer", FIVE, "{unacceptable_type,signedint}"),
)


def read(**raw: bytes) -> QueueArguments:
    return read_queue_arguments({name.replace("_", "-"): raw[name] for name in raw}, OWNER)


def refusal_of(function: Callable[..., object], *args: Any, **options: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        function(*args, **options)
    return caught.value


def refusal_to_read(raw: Mapping[str, bytes]) -> str:
    refusal = refusal_of(read_queue_arguments, raw, OWNER)
    assert (406, False) == (refusal.code, refusal.closes_connection)
    return refusal.text


def test_a_queue_without_arguments_is_classic_and_has_no_limits() -> None:
    """And what is full of it drops its head."""
    assert QueueArguments({}) == read()
    assert "drop-head" == read().overflow


@pytest.mark.parametrize(("name", "field", "attribute", "value"), MEANINGS)
def test_an_argument_means_what_it_means_in_rabbitmq(
    name: str, field: bytes, attribute: str, value: object
) -> None:
    """Whatever type of integer it comes with."""
    raw = {name: field, **(QUORUM if name in OF_QUORUM_QUEUES else {})}

    assert value == getattr(read_queue_arguments(raw, OWNER), attribute)
    assert raw == read_queue_arguments(raw, OWNER).raw


@pytest.mark.parametrize(("name", "field", "words"), REFUSED)
def test_an_argument_is_refused_in_the_words_of_rabbitmq(
    name: str, field: bytes, words: str
) -> None:
    """Which people search for."""
    raw = {name: field, "x-dead-letter-exchange": fields.encode("")}

    assert f"invalid arg '{name}' for {OWNER}: {words}" == refusal_to_read(raw)


@pytest.mark.parametrize("name", ["x-max-length", "x-overflow", "x-single-active-consumer"])
def test_a_field_of_any_type_is_understood_or_refused(name: str) -> None:
    """Each type has a name, also one that RabbitMQ does not know."""
    for field in EACH_TYPE:
        try:
            read_queue_arguments({name: field}, OWNER)
        except Refusal as refusal:
            assert refusal.text.startswith(f"invalid arg '{name}' for {OWNER}: ")


def test_a_dead_letter_exchange_is_a_string() -> None:
    """RabbitMQ has words of its own for this one."""
    expected = f"invalid type 'signedint' for arg 'x-dead-letter-exchange' in {OWNER}"

    assert expected == refusal_to_read({"x-dead-letter-exchange": FIVE})


def test_a_dead_letter_routing_key_needs_an_exchange() -> None:
    """Else nothing would ever use it."""
    name, key = "x-dead-letter-routing-key", fields.encode("key")
    words = f"invalid arg '{name}' for {OWNER}: routing_key_but_no_dlx_defined"

    assert words == refusal_to_read({name: key})
    both = {name: key, "x-dead-letter-exchange": fields.encode("")}
    assert "key" == read_queue_arguments(both, OWNER).dead_letter_routing_key


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x-delivery-limit", "classic"),
        ("x-dead-letter-strategy", "classic"),
        ("x-quorum-initial-group-size", "classic"),
        ("x-max-age", "classic"),
        ("x-max-age", "quorum"),
        ("x-max-priority", "quorum"),
        ("x-queue-mode", "quorum"),
    ],
)
def test_an_argument_of_another_type_of_queue_is_refused(name: str, kind: str) -> None:
    """Before its value is looked at."""
    words = f"invalid arg '{name}' for {OWNER} of queue type rabbit_{kind}_queue"

    assert words == refusal_to_read({name: b"V", "x-queue-type": fields.encode(kind)})


def test_a_group_has_a_member() -> None:
    """The size of a quorum queue's group means nothing here, but must be one."""
    raw = {**QUORUM, "x-quorum-initial-group-size": fields.encode(0)}

    words = f"invalid arg 'x-quorum-initial-group-size' for {OWNER}: {{value_zero,0}}"
    assert words == refusal_to_read(raw)


def test_unknown_arguments_are_kept_and_mean_nothing() -> None:
    """RabbitMQ shows them to whoever looks at the queue."""
    assert {"mine": b"V"} == read(mine=b"V").raw


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"durable": False}, "non-durable"),
        ({"exclusive": True}, "exclusive-owner"),
        ({"auto_delete": True}, "auto-delete"),
    ],
)
def test_a_quorum_queue_is_durable_and_shared(flags: dict[str, bool], name: str) -> None:
    """It outlives its clients; a classic queue may be anything."""
    flags = {"durable": True, "exclusive": False, "auto_delete": False, **flags}
    quorum = read_queue_arguments(QUORUM, OWNER)

    refusal = refusal_of(arguments.check_quorum, quorum, OWNER, **flags)

    assert (406, f"invalid property '{name}' for {OWNER}") == (refusal.code, refusal.text)
    arguments.check_quorum(read(), OWNER, **flags)
    arguments.check_quorum(quorum, OWNER, durable=True, exclusive=False, auto_delete=False)


def test_strict_mode_refuses_what_will_be_refused() -> None:
    """With the names of the features of RabbitMQ 4.3."""
    refusal = refusal_of(arguments.check_strict_queue, durable=False, exclusive=False)
    assert 541 == refusal.code
    assert refusal.text.startswith("Feature `transient_nonexcl_queues` is deprecated.")
    arguments.check_strict_queue(durable=True, exclusive=False)
    arguments.check_strict_queue(durable=False, exclusive=True)

    refusal = refusal_of(arguments.check_strict_qos, is_global=True)
    assert 541 == refusal.code
    assert refusal.text.startswith("Feature `global_qos` is deprecated.")
    arguments.check_strict_qos(is_global=False)


def test_a_consumer_has_a_priority() -> None:
    """0 if it does not say so."""
    assert 0 == arguments.read_priority(None, OWNER)
    assert -1 == arguments.read_priority(fields.encode(-1), OWNER)
    refusal = refusal_of(arguments.read_priority, fields.encode("1"), OWNER)
    words = f"invalid arg 'x-priority' for {OWNER}: \"expected integer, got longstr\""
    assert (406, words) == (refusal.code, refusal.text)


# Declaring again


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {}),
        ({"x-max-length": FIVE}, {"x-max-length": fields.encode(5)}),
        ({"x-max-length": b"B\5"}, {"x-max-length": b"l" + bytes(7) + b"\5"}),
        ({}, {"x-queue-type": fields.encode("classic")}),
        ({"x-queue-type": fields.encode("classic")}, {}),
        ({"mine": FIVE}, {"mine": b"V"}),
    ],
)
def test_a_declaration_may_say_the_same_in_other_words(
    old: dict[str, bytes], new: dict[str, bytes]
) -> None:
    """Integers have many types, and unknown arguments do not count."""
    arguments.check_equivalent_queue(read_queue_arguments(old, OWNER), new, OWNER)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (None, FIVE, "received the value '5' of type 'signedint' but current is none"),
        (b"B\5", None, "received none but current is the value '5' of type 'unsignedbyte'"),
        (FIVE, fields.encode(6), "received '6' but current is '5'"),
    ],
)
def test_a_declaration_with_another_value_is_refused(
    old: bytes | None, new: bytes | None, words: str
) -> None:
    """With both of them, since people have to find out what exists."""
    refusal = refusal_of(arguments.check_equivalent, "x-max-length", old, new, OWNER)

    expected = f"inequivalent arg 'x-max-length' for {OWNER}: {words}"
    assert (406, expected) == (refusal.code, refusal.text)


@pytest.mark.parametrize(
    ("kind", "first"), [("classic", "x-message-ttl"), ("quorum", "x-dead-letter-exchange")]
)
def test_each_type_of_queue_looks_at_its_arguments_in_its_order(kind: str, first: str) -> None:
    """Which of two is named depends on that."""
    raw = {
        "x-message-ttl": FIVE,
        "x-dead-letter-exchange": fields.encode("dlx"),
        "x-queue-type": fields.encode(kind),
    }
    current = read_queue_arguments(raw, OWNER)
    refusal = refusal_of(arguments.check_equivalent_queue, current, {}, OWNER)
    assert f"inequivalent arg '{first}'" in refusal.text


def test_flags_and_types_must_be_the_same() -> None:
    """A bool is shown as Erlang writes it."""
    arguments.check_same("durable", True, True, OWNER)
    refusal = refusal_of(arguments.check_same, "durable", True, False, OWNER)
    words = f"inequivalent arg 'durable' for {OWNER}: received 'false' but current is 'true'"
    assert (406, words) == (refusal.code, refusal.text)


@given(
    st.dictionaries(
        st.sampled_from(sorted({name for name, *_ in MEANINGS + REFUSED})),
        st.sampled_from(EACH_TYPE),
        max_size=3,
    )
)
def test_any_arguments_are_understood_or_refused(raw: dict[str, bytes]) -> None:
    """And what was understood is the same as itself."""
    try:
        understood = read_queue_arguments(raw, OWNER)
    except Refusal as refusal:
        assert 406 == refusal.code
    else:
        arguments.check_equivalent_queue(understood, raw, OWNER)
