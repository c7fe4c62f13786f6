# SPDX-License-Identifier: MIT
"""How the four types of exchanges route, and how their bindings come and go."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

import pika
import pika.data
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika.adapters.blocking_connection import BlockingChannel
from pika.compat import long

from postage.broker import fields
from postage.broker.exchanges import TYPES, Binding, Direct, Exchange, Fanout, Headers, Topic

#: Patterns of the topic exchange with keys that they match, and keys that they do not.
TOPICS: list[tuple[str, list[str], list[str]]] = [
    ("", [""], ["a", "."]),
    ("a", ["a"], ["", "A", "a.", ".a", "a.a", "*", "#"]),
    ("a.b", ["a.b"], ["a", "b", "a.b.", "a..b", "ab"]),
    (".", ["."], ["", "a", "..", "a.b"]),
    ("a.", ["a."], ["a", "a.b", "a.."]),
    ("*", ["a", "*", "#"], ["", ".", "a.", "a.b"]),
    ("*.*", [".", "a.", ".a", "a.b"], ["", "a", "..", "a.b.c"]),
    ("a.*", ["a.", "a.b", "a.*", "a.#"], ["a", "b.a", "a.b.c"]),
    ("*.b", [".b", "a.b"], ["b", "b.a", "a.a.b"]),
    ("#", ["", "a", ".", "a.b", "a.b.c", "#", "*"], []),
    ("a.#", ["a", "a.", "a.b", "a.b.c"], ["", "b", "b.a"]),
    ("#.a", ["a", ".a", "b.a", "b.c.a"], ["", "a.", "a.b"]),
    ("#.a.#", ["a", "a.b", "b.a", "a.a", "b.a.c.d"], ["", "b", "."]),
    ("a.#.b", ["a.b", "a.c.b", "a.b.b", "a.c.d.b"], ["a", "b", "ab", "a.b.c"]),
    ("#.#", ["", "a", ".", "a.b.c"], []),
    ("#.*", ["a", ".", "a.b", "a.b.c"], [""]),
    ("*.#", ["a", ".", "a.b", "a.b.c"], [""]),
    ("*.#.*", [".", "a.b", "a.b.c"], ["", "a"]),
    ("#.*.#.*.#", [".", "a.b", "a.b.c"], ["", "a"]),
    ("#.a.*", ["a.b", "b.a.b", "a.a"], ["a", "a.b.c", "b.a"]),
    ("#a", ["#a"], ["a", "ba", "#"]),
    ("a*", ["a*"], ["a", "ab", "*"]),
]

#: The values of a header that match one another in each group, and none of another group.
MATCHING_VALUES: list[list[bytes]] = [
    [b"S\x00\x00\x00\x011", b"x\x00\x00\x00\x011"],
    [b"S\x00\x00\x00\x00", b"x\x00\x00\x00\x00"],
    [
        b"b\x01",
        b"B\x01",
        b"s\x00\x01",
        b"u\x00\x01",
        b"I\x00\x00\x00\x01",
        b"i\x00\x00\x00\x01",
        b"l" + bytes(7) + b"\x01",
        b"L" + bytes(7) + b"\x01",
        b"f\x3f\x80\x00\x00",
        b"d\x3f\xf0" + bytes(6),
        b"T" + bytes(7) + b"\x01",
    ],
    [b"l" + bytes(8), b"d" + bytes(8), b"d\x80" + bytes(7), b"T" + bytes(8)],
    [b"b\xff", b"s\xff\xff", b"I\xff\xff\xff\xff", b"l" + b"\xff" * 8],
    [b"B\xff"],
    [b"u\xff\xff"],
    [b"i\xff\xff\xff\xff"],
    [b"T" + b"\xff" * 8],
    [b"t\x00"],
    [b"t\x01", b"t\x02"],
    [b"D\x00\x00\x00\x00\x01"],
    [b"D\x01\x00\x00\x00\x0a"],
    [b"A\x00\x00\x00\x00", b"F\x00\x00\x00\x00"],
    [fields.array([b"S\x00\x00\x00\x011"])],
    [fields.array([b"x\x00\x00\x00\x011"])],
    [fields.table({"a": b"V"})],
    [fields.table({"a": b"V", "b": b"V"})],
    [fields.table({"b": b"V", "a": b"V"})],
]

ONE, TWO, VOID = fields.encode("1"), fields.encode("2"), fields.encode(None)

#: Arguments of bindings to a headers exchange, with the headers that match and those that do not.
HEADERS: list[tuple[dict[str, Any], list[dict[str, bytes]], list[dict[str, bytes]]]] = [
    ({}, [{}, {"a": ONE}], []),
    ({"x-match": "all"}, [{}, {"a": ONE}], []),
    ({"x-match": "any"}, [], [{}, {"a": ONE}]),
    ({"x-match": "all-with-x"}, [{}, {"a": ONE}], []),
    ({"x-match": "any-with-x"}, [], [{}, {"x-match": fields.encode("any-with-x")}]),
    ({"a": "1"}, [{"a": ONE}, {"b": TWO, "a": ONE}], [{}, {"a": TWO}, {"A": ONE}, {"a": VOID}]),
    ({"a": "1", "b": "2"}, [{"a": ONE, "b": TWO}], [{"a": ONE}, {"b": TWO}, {"a": ONE, "b": ONE}]),
    ({"x-match": "all", "a": "1", "b": "2"}, [{"b": TWO, "a": ONE}], [{"a": ONE}, {}]),
    (
        {"x-match": "any", "a": "1", "b": "2"},
        [{"a": ONE}, {"b": TWO}, {"a": ONE, "b": TWO}, {"a": ONE, "b": ONE}],
        [{}, {"a": TWO}, {"c": ONE}],
    ),
    ({"a": None}, [{"a": ONE}, {"a": TWO}, {"a": VOID}], [{}, {"b": ONE}]),
    ({"x-match": "any", "a": None}, [{"a": ONE}, {"a": VOID}], [{}, {"b": ONE}]),
    ({"": None}, [{"": ONE}, {"": VOID}], [{}, {"a": ONE}]),
    ({"x-match": "any", "": None}, [{"": ONE}], [{}, {"a": ONE}]),
    ({"x-a": "1"}, [{}, {"x-a": TWO}], []),
    ({"x-a": "1", "a": "1"}, [{"a": ONE}], [{}, {"x-a": ONE}]),
    ({"x-match": "any", "x-a": "1"}, [], [{}, {"x-a": ONE}]),
    ({"x-match": "any", "x-a": "1", "a": "1"}, [{"a": ONE}], [{}, {"x-a": ONE}]),
    ({"x-match": "all-with-x", "x-a": "1", "a": "1"}, [{"x-a": ONE, "a": ONE}], [{"a": ONE}, {}]),
    ({"x-match": "any-with-x", "x-a": "1", "a": "1"}, [{"x-a": ONE}, {"a": ONE}], [{}]),
]

#: Values of x-match that are refused, and how RabbitMQ says so.
REFUSED_MATCHES = {
    b"S\x00\x00\x00\x04some": 'value <<"some">>',
    b"S\x00\x00\x00\x00": "value <<>>",
    b'S\x00\x00\x00\x03q"\\': r'value <<"q\"\\">>',
    b"S\x00\x00\x00\x03\t\n\x1b": r'value <<"\t\n\e">>',
    b"S\x00\x00\x00\x02a\x01": "value <<97,1>>",
    b"S\x00\x00\x00\x02\xc3\xa9": 'value <<"é">>',
    b"S\x00\x00\x00\x03\xe2\x80\x93": "value <<226,128,147>>",
    b"x\x00\x00\x00\x03all": 'type binary (value <<"all">>)',
    b"I\x00\x00\x00\x05": "type signedint (value 5)",
    b"i\x00\x00\x00\x05": "type unsignedint (value 5)",
    b"b\xfb": "type byte (value -5)",
    b"B\x05": "type unsignedbyte (value 5)",
    b"s\x00\x05": "type short (value 5)",
    b"u\x00\x05": "type unsignedshort (value 5)",
    b"l" + bytes(7) + b"\x05": "type long (value 5)",
    b"f\x3f\xc0\x00\x00": "type float (value 1.5)",
    b"d\x3f\xf8" + bytes(6): "type double (value 1.5)",
    b"t\x01": "type bool (value true)",
    b"V": "type void (value undefined)",
    b"D\x01\x00\x00\x00\x0a": "type decimal (value {1,10})",
    b"T" + bytes(7) + b"\x05": "type timestamp (value 5)",
    b"A\x00\x00\x00\x00": "type array (value [])",
    b"F\x00\x00\x00\x03\x01aV": "type table (value [...])",
}

#: Patterns and keys that share few words, so that they often match.
words = st.sampled_from(["", "a", "b", "*", "#"])
patterns = st.lists(words, max_size=6).map(".".join)
keys = st.lists(st.sampled_from(["", "a", "b", "c", "*", "#"]), max_size=8).map(".".join)

some_fields = st.sampled_from([ONE, TWO, VOID, b"I\x00\x00\x00\x01"])
header_names = st.sampled_from(["", "a", "b", "c", "x-a", "x-match"])
header_tables = st.dictionaries(header_names, some_fields, max_size=4)
match_words = st.sampled_from(["all", "any", "all-with-x", "any-with-x"])
binding_tables = st.builds(
    lambda table, match: {**table, "x-match": fields.encode(match)} if match else table,
    header_tables.map(lambda table: {name: table[name] for name in table if name != "x-match"}),
    st.none() | match_words,
)


class Destination:
    """A queue or an exchange, of which only the identity counts."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


Q1, Q2, Q3 = Destination("q1"), Destination("q2"), Destination("q3")


def no_headers() -> dict[str, bytes]:
    raise AssertionError("this type of exchange must not look at the headers")


def encoded(arguments: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: fields.encode(value) for name, value in arguments.items()}


def routed(
    exchange: Exchange, *keys: str, headers: Mapping[str, bytes] | None = None
) -> set[object]:
    return set(exchange.route(keys, no_headers if headers is None else lambda: headers))


def bound(type_: type[Exchange], *bindings: Any) -> Exchange:
    exchange = type_("events")
    for destination, key, arguments in bindings:
        exchange.bind(destination, key, arguments)
    return exchange


def headers_exchange(*bindings: tuple[Any, dict[str, bytes]]) -> Exchange:
    return bound(Headers, *((destination, "", arguments) for destination, arguments in bindings))


def is_match(pattern: str, key: str) -> bool:
    """Match as the specification describes it, with each word closed by a dot."""
    parts = {"*": r"[^.]*\.", "#": r"([^.]*\.)*"}
    expression = "".join(parts.get(word, re.escape(word + ".")) for word in split_key(pattern))
    return re.fullmatch(expression, "".join(word + "." for word in split_key(key))) is not None


def split_key(key: str) -> list[str]:
    return key.split(".") if key else []


def headers_match(arguments: dict[str, bytes], headers: dict[str, bytes]) -> bool:
    """Match as the specification describes it, one argument after the other."""
    match = str(fields.decode(arguments.get("x-match", fields.encode("all"))))
    results = [
        name in headers and (value == VOID or matches_value(value, headers[name]))
        for name, value in arguments.items()
        if name != "x-match" and (match.endswith("-with-x") or not name.startswith("x-"))
    ]
    return all(results) if match.startswith("all") else any(results)


def matches_value(one: bytes, other: bytes) -> bool:
    return any(one in group and other in group for group in [*MATCHING_VALUES, [TWO]])


# All types


def test_the_types_are_known_by_their_names() -> None:
    """A client declares a type by its name."""
    assert {"direct": Direct, "fanout": Fanout, "headers": Headers, "topic": Topic} == TYPES


def test_an_exchange_says_what_was_declared() -> None:
    """The attributes are those of the declaration, and false where it says nothing."""
    arguments = {"alternate-exchange": fields.encode("other"), "x": fields.encode(1)}
    exchange = Topic("events", durable=True, auto_delete=True, internal=True, arguments=arguments)
    assert ("events", "topic", True, True, True, arguments, "other") == (
        exchange.name,
        exchange.type,
        exchange.durable,
        exchange.auto_delete,
        exchange.internal,
        exchange.arguments,
        exchange.alternate,
    )
    plain = Topic("plain")
    assert (False, False, False, {}, None) == (
        plain.durable,
        plain.auto_delete,
        plain.internal,
        plain.arguments,
        plain.alternate,
    )


@pytest.mark.parametrize(
    ("value", "name"),
    [("other", "other"), ("", ""), (b"other", None), (1, None), (None, None)],
)
def test_an_alternate_exchange_is_named_by_a_string(value: object, name: str | None) -> None:
    """Other types than strings name nothing."""
    assert name == Topic("events", arguments=encoded({"alternate-exchange": value})).alternate


def test_an_exchange_shows_its_bindings() -> None:
    """The representation has type, name and number of bindings."""
    exchange = bound(Direct, (Q1, "a", {}), (Q1, "b", {}), (Q2, "a", {}))
    assert "<Direct 'events' [3 bindings]>" == repr(exchange)


@pytest.mark.parametrize("type_", TYPES.values())
def test_an_exchange_without_bindings_routes_nowhere(type_: type[Exchange]) -> None:
    """A message is lost until something is bound."""
    exchange = type_("events")
    assert (set(), False, []) == (
        routed(exchange, "", headers={}),
        exchange.has_bindings,
        list(exchange.bindings),
    )


@pytest.mark.parametrize("type_", TYPES.values())
def test_a_repeated_binding_is_no_change(type_: type[Exchange]) -> None:
    """One unbind undoes two equal binds."""
    exchange = type_("events")
    assert exchange.bind(Q1, "a", {"b": ONE, "c": TWO})
    assert not exchange.bind(Q1, "a", {"c": TWO, "b": ONE})
    assert [Binding(Q1, "a", {"b": ONE, "c": TWO})] == list(exchange.bindings)
    assert exchange.unbind(Q1, "a", {"c": TWO, "b": ONE})
    assert not exchange.has_bindings


@pytest.mark.parametrize("type_", TYPES.values())
def test_only_a_binding_that_exists_is_removed(type_: type[Exchange]) -> None:
    """Destination, key and arguments must be the same."""
    exchange = type_("events")
    assert exchange.bind(Q1, "a", {"b": ONE})
    assert not exchange.unbind(Q2, "a", {"b": ONE})
    assert not exchange.unbind(Q1, "b", {"b": ONE})
    assert not exchange.unbind(Q1, "a", {"b": TWO})
    assert not exchange.unbind(Q1, "a", {})
    assert exchange.has_bindings
    assert exchange.unbind(Q1, "a", {"b": ONE})
    assert not exchange.unbind(Q1, "a", {"b": ONE})


@pytest.mark.parametrize("type_", TYPES.values())
def test_a_destination_stays_while_one_of_its_bindings_matches(type_: type[Exchange]) -> None:
    """Two bindings that differ in their arguments lead to the same queue, once."""
    exchange = bound(type_, (Q1, "a", {}), (Q1, "a", {"b": ONE}))
    assert {Q1} == routed(exchange, "a", headers={"b": ONE})
    assert exchange.unbind(Q1, "a", {})
    assert {Q1} == routed(exchange, "a", headers={"b": ONE})
    assert exchange.unbind(Q1, "a", {"b": ONE})
    assert set() == routed(exchange, "a", headers={"b": ONE})


@pytest.mark.parametrize("type_", TYPES.values())
def test_all_bindings_of_a_destination_are_removed_at_once(type_: type[Exchange]) -> None:
    """What is bound by others stays."""
    exchange = bound(type_, (Q1, "a", {}), (Q2, "a", {}), (Q1, "b", {}), (Q1, "a", {"c": ONE}))
    removed = exchange.unbind_all(Q1)
    assert [Binding(Q1, "a"), Binding(Q1, "b"), Binding(Q1, "a", {"c": ONE})] == removed
    assert [Binding(Q2, "a")] == list(exchange.bindings)
    assert {Q2} == routed(exchange, "a", headers={"c": ONE})
    assert [] == exchange.unbind_all(Q1)


@pytest.mark.parametrize("type_", TYPES.values())
def test_a_binding_keeps_its_arguments(type_: type[Exchange]) -> None:
    """What the caller does with its dict later changes no binding."""
    arguments = {"a": ONE}
    exchange = bound(type_, (Q1, "", arguments))
    arguments.clear()
    assert exchange.unbind(Q1, "", {"a": ONE})


def test_bindings_are_values() -> None:
    """Equal bindings are equal keys, whatever the order of their arguments."""
    binding = Binding(Q1, "a", {"b": ONE, "c": TWO})
    assert {binding: None} == {Binding(Q1, "a", {"c": TWO, "b": ONE}): None}
    assert 4 == len({binding, Binding(Q2, "a"), Binding(Q1, "b"), Binding(Q1, "a")})


@pytest.mark.parametrize("type_", [Direct, Fanout, Topic])
def test_other_types_take_any_arguments(type_: type[Exchange]) -> None:
    """Only a headers exchange knows x-match."""
    assert type_("events").bind(Q1, "", encoded({"x-match": "some"}))


@pytest.mark.parametrize("type_", TYPES.values())
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 2), patterns, binding_tables)))
def test_what_is_unbound_leaves_nothing(type_: type[Exchange], steps: list[Any]) -> None:
    """Bindings are those of a set, and the table of an exchange without them is as good as new."""
    exchange, expected = type_("events"), set[Binding]()
    for is_bind, number, key, arguments in steps:
        destination = (Q1, Q2, Q3)[number]
        binding = Binding(destination, key, arguments)
        if is_bind:
            assert (binding not in expected) == exchange.bind(destination, key, arguments)
            expected.add(binding)
        else:
            assert (binding in expected) == exchange.unbind(destination, key, arguments)
            expected.discard(binding)
        assert (expected, bool(expected)) == (set(exchange.bindings), exchange.has_bindings)
    for destination in (Q1, Q2, Q3):
        exchange.unbind_all(destination)
    assert state(type_("events")) == state(exchange)


def state(value: Any) -> Any:
    """Return what an object holds, down to values that can be compared."""
    if isinstance(value, dict):
        return {key: state(held) for key, held in value.items()}
    if hasattr(value, "__slots__"):
        return {name: state(getattr(value, name)) for name in value.__slots__}
    return state(vars(value)) if hasattr(value, "__dict__") else value


# Direct and fanout


def test_a_direct_exchange_compares_keys() -> None:
    """Only the same key leads to a queue; it may be empty or look like a pattern."""
    exchange = bound(Direct, (Q1, "a", {}), (Q2, "a", {}), (Q3, "", {}), (Q3, "#", {}))
    assert {Q1, Q2} == routed(exchange, "a")
    assert {Q3} == routed(exchange, "")
    assert {Q3} == routed(exchange, "#")
    assert set() == routed(exchange, "A")


def test_a_direct_exchange_uses_all_keys_of_a_message() -> None:
    """The keys in CC and BCC count too, and a queue is found once."""
    exchange = bound(Direct, (Q1, "a", {}), (Q1, "b", {}), (Q2, "b", {}), (Q3, "c", {}))
    assert {Q1, Q2} == routed(exchange, "a", "b", "d")


def test_a_fanout_exchange_looks_at_nothing() -> None:
    """Each queue is found, once, whatever the key."""
    exchange = bound(Fanout, (Q1, "a", {}), (Q1, "b", {}), (Q2, "", {}))
    assert {Q1, Q2} == routed(exchange, "z", "y")


def test_what_was_routed_is_the_callers() -> None:
    """Changing the result changes no binding."""
    for type_ in TYPES.values():
        exchange = bound(type_, (Q1, "a", {}))
        exchange.route(["a"], dict).clear()
        assert {Q1} == routed(exchange, "a", headers={})


# Topic


@pytest.mark.parametrize(("pattern", "matching", "other"), TOPICS)
def test_a_topic_exchange_matches_words(
    pattern: str, matching: list[str], other: list[str]
) -> None:
    """A star is one word, a hash any number of words, and the empty key has none."""
    exchange = bound(Topic, (Q1, pattern, {}))
    assert matching == [key for key in matching + other if routed(exchange, key)]


def test_a_topic_exchange_uses_all_keys_of_a_message() -> None:
    """The keys in CC and BCC count too, and a queue is found once."""
    exchange = bound(Topic, (Q1, "a.*", {}), (Q1, "#", {}), (Q2, "b", {}), (Q3, "c", {}))
    assert {Q1, Q2} == routed(exchange, "a.b", "b")


def test_a_topic_exchange_drops_empty_branches() -> None:
    """A branch goes with its last binding, and no sooner."""
    exchange = bound(Topic, (Q1, "a.b.c", {}), (Q1, "a", {}), (Q2, "a.b.d", {}))
    exchange.unbind(Q1, "a.b.c", {})
    assert state(bound(Topic, (Q1, "a", {}), (Q2, "a.b.d", {}))._root) == state(exchange._root)
    exchange.unbind(Q1, "a", {})
    assert {Q2} == routed(exchange, "a.b.d")
    exchange.unbind(Q2, "a.b.d", {})
    assert {} == exchange._root.children


def test_no_pattern_makes_matching_exponential() -> None:
    """Hashes in a row would be tried in more ways than there are atoms."""
    exchange = bound(Topic, (Q1, ".".join(["#"] * 128), {}), (Q2, ".".join(["#", "a"] * 64), {}))
    assert {Q1} == routed(exchange, ".".join("a" * 63))
    assert {Q1, Q2} == routed(exchange, ".".join("a" * 128))


@given(st.lists(patterns, max_size=12, unique=True), st.lists(keys, min_size=1, max_size=3))
def test_a_topic_exchange_matches_like_a_regular_expression(
    patterns: list[str], keys: list[str]
) -> None:
    """The walk through the trie finds what trying one binding after the other finds."""
    exchange = bound(Topic, *((pattern, pattern, {}) for pattern in patterns))
    expected = {p for p in patterns if any(is_match(p, key) for key in keys)}
    assert expected == routed(exchange, *keys)


# Headers


@pytest.mark.parametrize(("arguments", "matching", "other"), HEADERS)
def test_a_headers_exchange_compares_arguments(
    arguments: dict[str, Any], matching: list[dict[str, bytes]], other: list[dict[str, bytes]]
) -> None:
    """All or any of the arguments must be there, those with x- only if asked for."""
    exchange = headers_exchange((Q1, encoded(arguments)))
    assert matching == [h for h in matching + other if routed(exchange, "", headers=h)]


def test_a_headers_exchange_compares_values_and_not_types() -> None:
    """Strings match bytes and numbers match numbers, but true is not one."""
    values = [value for group in MATCHING_VALUES for value in group]
    exchange = headers_exchange(*((value, {"a": value}) for value in values))
    for group in MATCHING_VALUES:
        for value in group:
            assert set(group) == routed(exchange, headers={"a": value})


def test_a_headers_exchange_ignores_keys() -> None:
    """The key makes another binding, and does not choose."""
    exchange = bound(Headers, (Q1, "a", {"h": ONE}), (Q1, "b", {"h": ONE}))
    assert {Q1} == routed(exchange, "c", headers={"h": ONE})
    exchange.unbind(Q1, "a", {"h": ONE})
    assert {Q1} == routed(exchange, "c", headers={"h": ONE})


def test_a_message_is_compared_with_few_of_many_bindings() -> None:
    """Bindings that share an argument are told apart by another one."""
    shared = {"type": ONE}
    numbers = range(1_000)
    exchange = headers_exchange(*((n, shared | encoded({"id": n})) for n in numbers))
    assert 1 == max(len(found) for found in exchange._all.values() if ("type", b"1") not in found)
    assert {77} == routed(exchange, headers=shared | encoded({"id": 77}))


@pytest.mark.parametrize("match", ["all", "any", "all-with-x", "any-with-x"])
def test_the_four_ways_to_match_are_taken(match: str) -> None:
    """RabbitMQ 3.10 knows these values of x-match."""
    assert Headers("events").bind(Q1, "", encoded({"x-match": match}))


@pytest.mark.parametrize(("value", "text"), REFUSED_MATCHES.items())
def test_other_ways_to_match_are_refused(value: bytes, text: str) -> None:
    """The complaint is RabbitMQ's, and nothing is bound."""
    exchange = Headers("events")
    with pytest.raises(ValueError) as caught:
        exchange.bind(Q1, "", {"x-match": value})
    kinds = "longstr" if text.startswith("type") else "all, any, all-with-x, or any-with-x"
    assert f"Invalid x-match field {text}; expected {kinds}" == str(caught.value)
    assert not exchange.has_bindings


@given(st.lists(binding_tables, max_size=12), st.lists(header_tables, min_size=1, max_size=4))
def test_a_headers_exchange_matches_like_a_walk_over_its_bindings(
    tables: list[dict[str, bytes]], messages: list[dict[str, bytes]]
) -> None:
    """The index finds what comparing one binding after the other finds, also after unbinds."""
    exchange = headers_exchange(*enumerate(tables))
    for removed, headers in enumerate(messages):
        exchange.unbind_all(removed)
        left = list(enumerate(tables))[removed + 1 :]
        expected = {number for number, table in left if headers_match(table, headers)}
        assert expected == routed(exchange, headers=headers)


# The tables above are true


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    """A channel to RabbitMQ, in confirm mode: a message has been routed when publish returns."""
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


def found_by_rabbitmq(
    channel: BlockingChannel, exchange: str, bindings: list[tuple[str, Any]]
) -> Callable[[str, Any], set[int]]:
    """Bind a queue for each binding; return what finds those that get a message, by number."""
    queues = [channel.queue_declare("", exclusive=True).method.queue for _ in bindings]
    for queue, (key, arguments) in zip(queues, bindings, strict=True):
        channel.queue_bind(queue, exchange, key, arguments)

    def publish(key: str, headers: Any) -> set[int]:
        channel.basic_publish(exchange, key, b"", pika.BasicProperties(headers=headers))
        purged = [channel.queue_purge(queue).method.message_count for queue in queues]
        return {number for number, count in enumerate(purged) if count}

    return publish


@pytest.mark.rabbitmq
def test_rabbitmq_matches_the_same_words(channel: BlockingChannel) -> None:
    """RabbitMQ routes every key of the table to the same patterns."""
    bindings = [(pattern, {}) for pattern, _, _ in TOPICS]
    publish = found_by_rabbitmq(channel, "amq.topic", bindings)
    exchange = bound(Topic, *((n, key, {}) for n, (key, _) in enumerate(bindings)))
    for key in sorted({key for _, matching, other in TOPICS for key in matching + other}):
        assert publish(key, {}) == routed(exchange, key), key


@pytest.mark.rabbitmq
def test_rabbitmq_compares_the_same_arguments(channel: BlockingChannel) -> None:
    """RabbitMQ routes all headers of the table to the same bindings."""
    bindings = [("", arguments) for arguments, _, _ in HEADERS]
    publish = found_by_rabbitmq(channel, "amq.headers", bindings)
    exchange = headers_exchange(*((n, encoded(a)) for n, (_, a) in enumerate(bindings)))
    for headers in [headers for _, matching, other in HEADERS for headers in matching + other]:
        decoded = {name: fields.decode(field) for name, field in headers.items()}
        assert publish("", decoded) == routed(exchange, headers=headers), headers


@pytest.mark.rabbitmq
def test_rabbitmq_compares_the_same_values(channel: BlockingChannel) -> None:
    """RabbitMQ matches the values of all types that pika writes as the table of values does."""
    values = ["1", b"1", "", b"", 0, long(0), 1, long(1), datetime(1970, 1, 1, 0, 0, 1), True]
    values += [False, None, Decimal(1), Decimal("1.0"), Decimal("0.1"), [], {}, ["1"], [b"1"]]
    values += [[1], [long(1)], {"a": None}, {"a": None, "b": None}, {"b": None, "a": None}]
    publish = found_by_rabbitmq(channel, "amq.headers", [("", {"a": value}) for value in values])
    exchange = headers_exchange(*((n, written(value)) for n, value in enumerate(values)))
    for value in values:
        expected = publish("", {"a": value})
        assert expected == routed(exchange, headers=written(value)), value


@pytest.mark.rabbitmq
@pytest.mark.parametrize(
    "match", ["some", "", 'q"\\', "a\tb", "é", "\u2013", 5, True, None, [], b"all"]
)
def test_rabbitmq_refuses_with_the_same_text(broker_url: str, match: Any) -> None:
    """RabbitMQ's channel is closed with 406 and what the exchange says."""
    with pytest.raises(ValueError) as ours:
        Headers("amq.headers").check(written(match, "x-match"))
    with (
        pika.BlockingConnection(pika.URLParameters(broker_url)) as connection,
        pytest.raises(pika.exceptions.ChannelClosedByBroker) as theirs,
    ):
        channel = connection.channel()
        queue = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(queue, "amq.headers", "", {"x-match": match})
    assert (406, f"PRECONDITION_FAILED - {ours.value}") == theirs.value.args


def written(value: Any, name: str = "a") -> dict[str, bytes]:
    """Return the table of one field that pika writes."""
    pieces: list[bytes] = []
    pika.data.encode_table(pieces, {name: value})
    return fields.split(b"".join(pieces))[0]
