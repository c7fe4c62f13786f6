# SPDX-License-Identifier: MIT
"""Exchanges, queues and bindings as values."""

from __future__ import annotations

from typing import Any

import pytest

from postage.errors import ConfigurationError
from postage.topology import (
    DefaultExchange,
    Exchange,
    ExchangeSpec,
    Queue,
    QueueSpec,
    bindings_of,
    error_queue,
    exchange_spec,
    queue_spec,
)

#: What a named queue is declared with. It cannot be changed in the field.
NAMED = {
    "x-queue-type": "quorum",
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": "orders.error",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
    "x-delivery-limit": 50,
}


class Orders(Exchange):
    name = "orders"
    exchange_type = "topic"


class Audit(Queue):
    name = "audit"
    type = "classic"
    ttl = 1.5
    max_length = 10
    dead_letter = None


# ----------------------------------------------------------------------- exchanges


def test_an_exchange_has_the_parameters_of_its_class_attributes() -> None:
    """`parameters` holds the five keys of 1.2.1."""

    class Custom(Exchange):
        name = "custom"
        exchange_type = "fanout"
        passive = True
        durable = False
        auto_delete = True

    expected = {
        "exchange": "custom",
        "exchange_type": "fanout",
        "passive": True,
        "durable": False,
        "auto_delete": True,
    }
    assert expected == Custom.parameters
    assert expected == Custom().parameters


def test_parameters_follow_a_later_edit_of_the_class() -> None:
    """1.2.1 froze them when the class was made."""

    class Edited(Exchange):
        pass

    Edited.name = "later"

    assert "later" == Edited.parameters["exchange"]


def test_internal_and_arguments_are_parameters_only_if_they_are_set() -> None:
    """Code that passes the parameters on to another library sees what it knows."""

    class Inner(Exchange):
        internal = True
        arguments = {"alternate-exchange": "rest"}

    assert {"internal", "arguments"} == set(Inner.parameters) - set(Exchange.parameters)


def test_the_default_exchange_is_known_by_its_empty_name() -> None:
    """It must be neither declared nor bound, and its keys are queues."""
    assert DefaultExchange.spec().is_default
    assert not Orders.spec().is_default
    assert "x" == DefaultExchange.queue_of("x")
    assert Orders.queue_of("x") is None


@pytest.mark.parametrize("wrong", ["orders", None, Queue, object()])
def test_what_is_no_exchange_is_refused(wrong: object) -> None:
    """The error shows what was given."""
    with pytest.raises(ConfigurationError, match="is no exchange"):
        exchange_spec(wrong)


def test_equal_exchanges_have_equal_specs() -> None:
    """A spec is a value: it is hashable and comparable."""
    assert ExchangeSpec("orders", "topic") == Orders.spec()
    assert 1 == len({ExchangeSpec("orders", "topic"), Orders.spec()})


# -------------------------------------------------------------------------- queues


def test_a_bare_name_is_a_durable_quorum_queue_with_an_error_queue() -> None:
    """These are the arguments that the design settles."""
    spec = queue_spec("orders")

    assert NAMED == spec.arguments
    assert (True, False, False) == (spec.durable, spec.exclusive, spec.auto_delete)
    assert "orders.error" == spec.error_queue == spec.dead_letter_queue
    assert spec.counts_deliveries
    assert not spec.personal


def test_an_error_queue_has_no_other_argument() -> None:
    """It never loses, limits or expires what is parked in it."""
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}
    assert arguments == error_queue("orders.error").arguments


def test_the_environment_can_make_named_queues_classic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only quorum queues know is left out."""
    monkeypatch.setenv("POSTAGE_QUEUE_TYPE", "classic")

    spec = queue_spec("orders")

    expected = {
        "x-queue-type": "classic",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "orders.error",
    }
    assert expected == spec.arguments
    assert not spec.counts_deliveries


def test_a_bare_name_in_compat_mode_is_what_1_2_1_declared() -> None:
    """Transient and without arguments, or a program of 1.2.1 would be refused (406)."""
    spec = queue_spec("orders", compat=True)

    assert (False, {}) == (spec.durable, spec.arguments)
    assert "orders.error" == spec.error_queue


@pytest.mark.parametrize("compat", [False, True])
def test_the_flags_of_a_dict_are_used_verbatim(compat: bool) -> None:
    """Nothing is added to them."""
    flags = {"auto_delete": True, "arguments": {"x-max-length": 3}}

    spec = queue_spec({"name": "q", "flags": flags}, compat)

    assert (
        QueueSpec(
            "q",
            durable=False,
            auto_delete=True,
            arguments={"x-max-length": 3},
            error_queue="q.error",
            personal=True,
        )
        == spec
    )


def test_a_dict_without_flags_is_a_bare_name() -> None:
    """1.2.1 raised KeyError."""
    assert queue_spec("orders") == queue_spec({"name": "orders"})


def test_a_queue_is_declared_by_a_class_or_on_the_spot() -> None:
    """Both give the same value."""
    on_the_spot = Queue("audit", type="classic", ttl=1.5, max_length=10, dead_letter=None)

    assert queue_spec(Audit) == queue_spec(Audit()) == queue_spec(on_the_spot)
    expected = {"x-queue-type": "classic", "x-message-ttl": 1500, "x-max-length": 10}
    assert expected == queue_spec(Audit).arguments


def test_arguments_of_a_queue_win_over_what_is_made_from_its_attributes() -> None:
    """The broker's own names have the last word."""
    queue = Queue("q", delivery_limit=5, arguments={"x-delivery-limit": 7})

    assert 7 == queue.spec().arguments["x-delivery-limit"]


def test_an_exclusive_queue_is_classic_and_transient_and_personal() -> None:
    """A quorum queue can be neither exclusive nor transient."""
    spec = Queue(exclusive=True).spec()

    assert ("", False, True) == (spec.name, spec.durable, spec.personal)
    assert {"x-queue-type": "classic"} == spec.arguments
    assert "error" == spec.error_queue


def test_dead_letters_may_go_to_an_exchange() -> None:
    """Then what a component parks goes to the queue's own error queue."""
    spec = Queue("q", dead_letter=("graveyard", "q")).spec()

    assert "graveyard" == spec.arguments["x-dead-letter-exchange"]
    assert spec.dead_letter_queue is None
    assert "q.error" == spec.error_queue


def test_an_error_queue_can_be_shared() -> None:
    """The name is a template."""
    spec = Queue("q", dead_letter="{name}-dead", error_queue="errors").spec()

    assert "q-dead" != spec.error_queue == "errors"


def test_a_queue_gives_name_and_flags_like_the_dicts_of_1_2_1() -> None:
    """Applications read `sid['name']`."""
    queue = Queue("q", type="classic", dead_letter=None)

    assert "q" == queue["name"]
    assert {
        "durable": True,
        "exclusive": False,
        "auto_delete": False,
        "arguments": {"x-queue-type": "classic"},
    } == queue["flags"]
    with pytest.raises(KeyError):
        queue["other"]


@pytest.mark.parametrize(
    ("queue", "words"),
    [
        (7, "is no queue"),
        (None, "is no queue"),
        (Exchange, "is no queue"),
        ({"flags": {}}, "keys 'name'"),
        ({"name": 7}, "keys 'name'"),
        ({"name": "q", "flag": {}}, "keys 'name'"),
        ({"name": "q", "flags": {"durabel": True}}, "durabel"),
        (Queue(), "must be exclusive"),
        (Queue("q", type="quorum", exclusive=True), "quorum"),
        (Queue("q", type="quorum", auto_delete=True), "quorum"),
        (Queue("q", ttl=-1), "x-message-ttl"),
        (Queue("q", expires=float("nan")), "x-expires"),
    ],
)
def test_what_makes_no_sense_as_a_queue_is_refused_with_its_reason(queue: Any, words: str) -> None:
    """The error names what is wrong."""
    with pytest.raises(ConfigurationError, match=words):
        queue_spec(queue)


@pytest.mark.parametrize("attribute", ["durabel", "spec", "_made_arguments", "__class__"])
def test_an_unknown_attribute_of_a_queue_is_refused(attribute: str) -> None:
    """A typing mistake must not declare another queue than was meant."""
    with pytest.raises(ConfigurationError, match="no attribute"):
        Queue("q", **{attribute: True})


# ------------------------------------------------------------------------ bindings


def test_an_eqk_is_read_pair_by_pair() -> None:
    """Each (queue, key) becomes a binding, in order."""
    eqk = [(Orders, [("orders", "order.*"), (Audit, "#")])]

    bindings = [binding for _exchange, _queue, binding in bindings_of(eqk)]

    assert [("orders", "order.*"), ("audit", "#")] == [
        (binding.queue.name, binding.key) for binding in bindings
    ]
    assert {"orders"} == {binding.exchange.name for binding in bindings}


def test_the_flat_eqk_of_the_1_2_1_readme_is_read() -> None:
    """1.2.1 itself raised TypeError."""
    eqk = (Orders, [("a", "x")], Exchange, [("b", "y")])

    assert [("orders", "a"), ("noname", "b")] == [
        (binding.exchange.name, binding.queue.name) for _e, _q, binding in bindings_of(eqk)
    ]


@pytest.mark.parametrize(
    "eqk",
    [
        [Orders],
        [("orders", [("q", "k")])],
        [(Orders, ["q"])],
        [(Orders, [("q",)])],
        [(Orders, [("q", 7)])],
        [Orders, [("q", "k")], Orders],
        ["orders"],
        [7],
    ],
)
def test_an_eqk_of_another_form_is_refused(eqk: Any) -> None:
    """The error says what was expected."""
    with pytest.raises(ConfigurationError):
        list(bindings_of(eqk))


def test_all_queues_can_share_an_error_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or have one by another name. What a queue says itself goes first."""
    monkeypatch.setenv("POSTAGE_ERROR_QUEUE", "error")
    shared = Queue("orders").spec()
    assert "error" == shared.error_queue == shared.arguments["x-dead-letter-routing-key"]
    assert "own" == Queue("orders", error_queue="own").spec().error_queue
    monkeypatch.setenv("POSTAGE_ERROR_QUEUE", "failed.{name}")
    assert "failed.orders" == queue_spec("orders").error_queue
    assert "failed.odd{x}" == queue_spec("odd{x}").error_queue
    monkeypatch.setenv("POSTAGE_ERROR_QUEUE", "amq.errors")
    with pytest.raises(ConfigurationError, match="names that begin with amq"):
        Queue("orders").spec()
