# SPDX-License-Identifier: MIT
"""Declaring, binding and deleting exchanges, and where messages go."""

from __future__ import annotations

from typing import Any

from tests.broker.differential.codec import Field
from tests.broker.differential.driver import Stage
from tests.broker.differential.registry import each, scenario


@each(
    durable=(("direct", "durable"), {}),
    auto_delete=(("direct", "auto_delete"), {}),
    internal=(("direct", "internal"), {}),
    fanout=(("fanout",), {}),
    alternate=(("direct",), {"alternate_exchange": "other"}),
    unknown_argument=(("direct",), {"x_unknown": "value"}),
)
def any_two_kinds_of_exchange_are_not_the_same(stage: Stage, case: Any) -> None:
    """What exists is declared with what it has: else 406 names the first difference."""
    kind, arguments = case
    client = stage.connect()
    client.open().declare_exchange("e", *kind, **arguments)
    client.open().declare_exchange("e", *kind, **arguments)
    client.open().declare_exchange("e", "direct")
    client.open().declare_exchange("e", "fanout")
    client.open().declare_exchange("e", "direct", "durable")
    client.open().declare_exchange("e", "direct", "auto_delete")
    client.open().declare_exchange("e", "direct", "internal")
    client.open().declare_exchange("e", "direct", alternate_exchange="another")


@each(misspelt="fanuot", cased="Direct", delayed="x-delayed-message")
def an_unknown_exchange_type_ends_the_connection(stage: Stage, exchange_type: str) -> None:
    """A type that the broker has not is 503, an error of the connection."""
    client = stage.connect()
    client.open().declare_exchange("e", exchange_type)
    client.ended()


@scenario
def a_passive_declaration_of_an_exchange_only_looks(stage: Stage) -> None:
    """It compares nothing; what is missing is 404; an unknown type does not matter."""
    client = stage.connect()
    client.open().declare_exchange("e", "direct")
    client.open().declare_exchange("e", "fanout", "passive", "durable")
    client.open().declare_exchange("e", "unknown", "passive")
    client.open().declare_exchange("e", "", "passive")
    client.open().declare_exchange("missing", "direct", "passive")
    client.open().declare_exchange("amq.missing", "direct", "passive")


@scenario
def names_of_exchanges_that_begin_with_amq_are_reserved(stage: Stage) -> None:
    """Declaring such a name is 403, unless the exchange exists."""
    client = stage.connect()
    client.open().declare_exchange("amq.mine", "direct")
    client.open().declare_exchange("amq.direct", "direct", "durable")
    client.open().declare_exchange("amq.direct", "direct")
    client.open().declare_exchange("amq.direct", "fanout", "durable")


@each(
    direct="amq.direct",
    fanout="amq.fanout",
    topic="amq.topic",
    headers="amq.headers",
    match="amq.match",
    trace="amq.rabbitmq.trace",
)
def predeclared_exchanges_exist_and_stay(stage: Stage, exchange: str) -> None:
    """They can be looked at, but not deleted."""
    client = stage.connect()
    client.open().declare_exchange(exchange, "direct", "passive")
    client.open().delete_exchange(exchange)
    client.open().delete_exchange(exchange, "if_unused")
    client.open().declare_exchange(exchange, "direct")


@scenario
def the_default_exchange_cannot_be_touched(stage: Stage) -> None:
    """It cannot be declared, deleted or bound: 403. Looking is no exception."""
    client = stage.connect()
    client.open().declare("q")
    client.open().declare_exchange("", "direct")
    client.open().declare_exchange("", "direct", "durable")
    client.open().declare_exchange("", "direct", "passive")
    client.open().delete_exchange("")
    client.open().bind("q", "", "key")
    client.open().unbind("q", "", "q")
    client.open().bind_exchange("amq.direct", "", "key")
    client.open().bind_exchange("", "amq.direct", "key")
    client.open().unbind_exchange("amq.direct", "", "key")


@each(
    alternate_number={"alternate_exchange": 1},
    alternate_bool={"alternate_exchange": True},
    alternate_empty={"alternate_exchange": ""},
    alternate_missing={"alternate_exchange": "missing"},
    alternate_itself={"alternate_exchange": "e"},
    unknown={"x_unknown": Field("d", 0.5)},
)
def arguments_of_exchanges_are_checked(stage: Stage, arguments: Any) -> None:
    """An exchange is made, or refused with the reason."""
    stage.open().declare_exchange("e", "direct", **arguments)


@scenario
def deleting_an_exchange_that_is_missing_is_no_error(stage: Stage) -> None:
    """A client may delete twice."""
    channel = stage.open()
    channel.declare_exchange("e", "direct")
    channel.delete_exchange("e")
    channel.delete_exchange("e")
    channel.delete_exchange("missing", "if_unused")
    channel.declare_exchange("e", "direct", "passive")


@scenario
def an_exchange_in_use_is_not_deleted_if_unused(stage: Stage) -> None:
    """if-unused is about bindings from it, not to it."""
    client = stage.connect()
    channel = client.open()
    channel.declare_exchange("e", "direct")
    channel.declare("q")
    channel.bind("q", "e", "key")
    client.open().delete_exchange("e", "if_unused")
    channel.unbind("q", "e", "key")
    channel.bind_exchange("e", "amq.direct", "key")
    channel.delete_exchange("e", "if_unused")
    channel.declare_exchange("e", "direct", "passive")


@scenario
def an_auto_delete_exchange_goes_with_its_last_binding(stage: Stage) -> None:
    """It lives until it had a binding from it and has none any more."""
    client = stage.connect()
    channel = client.open()
    channel.declare_exchange("e", "fanout", "auto_delete")
    channel.declare_exchange("source", "fanout", "auto_delete")
    channel.declare("one")
    channel.declare("two")
    channel.bind_exchange("e", "source")
    channel.bind("one", "e")
    channel.bind("two", "e")
    channel.unbind("one", "e")
    channel.declare_exchange("e", "fanout", "passive")
    channel.delete("two")
    channel.declare_exchange("e", "fanout", "passive")
    client.open().declare_exchange("source", "fanout", "passive")


@scenario
def binding_what_is_missing_is_refused(stage: Stage) -> None:
    """404 names the exchange or the queue."""
    client = stage.connect()
    client.open().declare("q")
    client.open().bind("q", "missing", "key")
    client.open().bind("missing", "amq.direct", "key")
    client.open().bind("missing", "absent", "key")
    client.open().bind_exchange("amq.direct", "missing", "key")
    client.open().bind_exchange("missing", "amq.direct", "key")
    client.open().bind_exchange("missing", "absent", "key")


@scenario
def unbinding_what_is_missing(stage: Stage) -> None:
    """What RabbitMQ says when there is no such binding, queue or exchange."""
    client = stage.connect()
    client.open().declare("q")
    client.open().unbind("q", "amq.direct", "key")
    client.open().unbind("q", "missing", "key")
    client.open().unbind("missing", "amq.direct", "key")
    client.open().unbind("missing", "absent", "key")
    client.open().unbind_exchange("amq.direct", "amq.topic", "key")
    client.open().unbind_exchange("amq.direct", "missing", "key")
    client.open().unbind_exchange("missing", "amq.direct", "key")


@scenario
def a_binding_made_twice_routes_once(stage: Stage) -> None:
    """A message goes to a queue once, however many bindings lead there."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.bind("q", "amq.direct", "key")
    channel.bind("q", "amq.direct", "key")
    channel.bind("q", "amq.direct", "key", {"a": 1})
    channel.bind("q", "amq.direct", "other")
    channel.publish("key", "one", "mandatory", exchange="amq.direct")
    stage.drain("q", 1)
    channel.unbind("q", "amq.direct", "key")
    channel.publish("key", "two", "mandatory", exchange="amq.direct")
    channel.unbind("q", "amq.direct", "key", {"a": 1})
    channel.publish("key", "three", "mandatory", exchange="amq.direct")
    stage.drain("q", 1)


@scenario
def a_direct_exchange_matches_the_whole_key(stage: Stage) -> None:
    """Keys are compared as they are, the empty one too."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.bind("q", "amq.direct", "")
    channel.bind("q", "amq.direct", "a.*")
    for key in ("", "a.b", "a.*", "A.*", "missing"):
        channel.publish(key, key, "mandatory", exchange="amq.direct")
    stage.drain("q", 2)


@scenario
def a_fanout_exchange_ignores_the_key(stage: Stage) -> None:
    """Every queue that is bound gets the message, whatever the keys."""
    channel = stage.open(confirm=True)
    channel.publish("none", "none", "mandatory", exchange="amq.fanout")
    channel.declare("one")
    channel.declare("two")
    channel.bind("one", "amq.fanout", "key")
    channel.bind("two", "amq.fanout")
    channel.publish("other", "all", "mandatory", exchange="amq.fanout")
    stage.drain("one", 1)
    stage.drain("two", 1)


@each(
    word="a.b",
    star="a.*",
    star_first="*.b",
    stars="*.*",
    hash="#",
    hash_last="a.#",
    hash_first="#.b",
    hash_middle="a.#.b",
    hashes="#.a.#",
    hash_star="#.*",
    empty="",
    dot=".",
    star_alone="*",
    part_of_a_word="a*",
)
def a_topic_pattern_matches_words(stage: Stage, pattern: str) -> None:
    """A star is one word, a hash any number of words, and an empty key has no words."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.bind("q", "amq.topic", pattern)
    keys = (
        "",
        "a",
        "b",
        "a.b",
        "a.c",
        "a.b.b",
        "a.c.b",
        "c.a.b",
        ".",
        "a.",
        ".b",
        "a..b",
        "a*",
        "#",
        "*",
    )
    for key in keys:
        channel.post(key, key, exchange="amq.topic")
    stage.drain("q", 0)


@each(
    all={"x-match": "all", "a": 1, "b": "two"},
    any={"x-match": "any", "a": 1, "b": "two"},
    default={"a": 1, "b": "two"},
    all_nothing={"x-match": "all"},
    any_nothing={"x-match": "any"},
    nothing={},
    void={"x-match": "all", "a": None},
    void_any={"x-match": "any", "a": None, "missing": None},
    with_x={"x-match": "all", "x-a": 1},
    any_with_x_header={"x-match": "any", "x-a": 1},
    all_with_x={"x-match": "all-with-x", "x-a": 1},
    any_with_x={"x-match": "any-with-x", "x-a": 1, "b": "two"},
    long={"x-match": "all", "a": Field("l", 1)},
    table={"x-match": "all", "t": {"k": "v"}},
    bad_match={"x-match": "some"},
    bad_match_type={"x-match": 1},
)
def a_headers_exchange_compares_headers(stage: Stage, arguments: Any) -> None:
    """The key means nothing; the arguments of the binding are compared with the headers."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    if channel.bind("q", "amq.headers", "key", arguments).name != "queue.bind-ok":
        return
    messages: dict[str, dict[str, Any]] = {
        "empty": {},
        "a": {"a": 1},
        "a and b": {"a": 1, "b": "two"},
        "a and b and c": {"a": 1, "b": "two", "c": 3},
        "other a": {"a": 2, "b": "two"},
        "a as text": {"a": "1", "b": "two"},
        "long a": {"a": Field("l", 1), "b": "two"},
        "short a": {"a": Field("s", 1), "b": "two"},
        "double a": {"a": Field("d", 1.0), "b": "two"},
        "void a": {"a": None, "b": "two"},
        "binary b": {"a": 1, "b": b"two"},
        "x-a": {"x-a": 1},
        "x-match": {"x-match": "all"},
        "t": {"t": {"k": "v"}},
    }
    for body, headers in messages.items():
        channel.post("", body, exchange="amq.headers", headers=headers)
    channel.post("", "none", exchange="amq.headers")
    stage.drain("q", 0)


@scenario
def exchanges_route_to_exchanges(stage: Stage) -> None:
    """A message follows bindings from exchange to exchange and keeps its key and its exchange."""
    channel = stage.open(confirm=True)
    channel.declare_exchange("first", "topic")
    channel.declare_exchange("second", "direct")
    channel.declare("q")
    channel.bind_exchange("second", "first", "a.#")
    channel.bind("q", "second", "a.b")
    channel.publish("a.b", "there", "mandatory", exchange="first")
    channel.publish("a.c", "lost", "mandatory", exchange="first")
    stage.drain("q", 1)
    channel.unbind_exchange("second", "first", "a.#")
    channel.publish("a.b", "lost", "mandatory", exchange="first")
    channel.delete_exchange("second")
    channel.publish("a.b", "lost", "mandatory", exchange="first")


@scenario
def exchanges_may_be_bound_in_a_circle(stage: Stage) -> None:
    """Each exchange is visited once, so a queue behind both gets a message once."""
    channel = stage.open(confirm=True)
    channel.declare_exchange("one", "fanout")
    channel.declare_exchange("two", "fanout")
    channel.declare("q")
    channel.bind_exchange("one", "two")
    channel.bind_exchange("two", "one")
    channel.bind_exchange("one", "one")
    channel.publish("key", "lost", "mandatory", exchange="one")
    channel.bind("q", "one")
    channel.bind("q", "two")
    channel.publish("key", "there", "mandatory", exchange="one")
    channel.publish("key", "too", "mandatory", exchange="two")
    stage.drain("q", 2)


@scenario
def an_alternate_exchange_gets_what_goes_nowhere(stage: Stage) -> None:
    """Alternates form a chain, and a mandatory message that ends in a queue is not returned."""
    channel = stage.open(confirm=True)
    channel.declare_exchange("first", "direct", alternate_exchange="second")
    channel.declare_exchange("second", "direct", alternate_exchange="third")
    channel.declare_exchange("third", "fanout")
    channel.publish("key", "lost", "mandatory", exchange="first")
    channel.declare("two")
    channel.declare("three")
    channel.bind("two", "second", "key")
    channel.bind("three", "third")
    channel.publish("key", "one", "mandatory", exchange="first")
    channel.publish("other", "two", "mandatory", exchange="first")
    stage.drain("two", 1)
    stage.drain("three", 1)


@scenario
def an_alternate_exchange_may_be_missing_or_itself(stage: Stage) -> None:
    """A message that goes nowhere in the end is returned."""
    channel = stage.open(confirm=True)
    channel.declare_exchange("first", "direct", alternate_exchange="missing")
    channel.declare_exchange("second", "direct", alternate_exchange="second")
    channel.declare_exchange("third", "direct", alternate_exchange="fourth")
    channel.declare_exchange("fourth", "direct", alternate_exchange="third")
    channel.publish("key", "one", "mandatory", exchange="first")
    channel.publish("key", "two", "mandatory", exchange="second")
    channel.publish("key", "three", "mandatory", exchange="third")


@scenario
def an_exchange_behind_another_uses_its_alternate(stage: Stage) -> None:
    """Each exchange that routes nowhere hands the message to its own alternate."""
    channel = stage.open(confirm=True)
    channel.declare_exchange("first", "fanout", alternate_exchange="amq.fanout")
    channel.declare_exchange("second", "direct", alternate_exchange="third")
    channel.declare_exchange("third", "fanout")
    channel.bind_exchange("second", "first")
    channel.declare("q")
    channel.declare("all")
    channel.bind("q", "third")
    channel.bind("all", "amq.fanout")
    channel.publish("key", "one", "mandatory", exchange="first")
    stage.drain("q", 1)
    stage.drain("all", 0)


@scenario
def an_internal_exchange_takes_nothing_from_clients(stage: Stage) -> None:
    """Publishing to it is 403; other exchanges may route to it."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare_exchange("inside", "fanout", "internal")
    channel.declare_exchange("outside", "fanout")
    channel.bind_exchange("inside", "outside")
    channel.declare("q")
    channel.bind("q", "inside")
    channel.publish("key", "one", "mandatory", exchange="outside")
    stage.drain("q", 1)
    channel.publish("key", "two", exchange="inside")


@scenario
def a_deleted_queue_loses_its_bindings(stage: Stage) -> None:
    """A queue of the same name starts without bindings, but the one to the default exchange."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.bind("q", "amq.topic", "#")
    channel.delete("q")
    channel.declare("q")
    channel.publish("key", "lost", "mandatory", exchange="amq.topic")
    channel.publish("q", "there", "mandatory")
    stage.drain("q", 1)


@scenario
def copies_go_to_the_keys_in_cc_and_bcc(stage: Stage) -> None:
    """CC stays in the headers and BCC is taken out of them."""
    channel = stage.open(confirm=True)
    for queue in ("to", "cc1", "cc2", "bcc"):
        channel.declare(queue)
    headers = {"CC": ["cc1", "cc2", "missing"], "BCC": ["bcc", "to"], "other": 1}
    channel.publish("to", "one", "mandatory", headers=headers)
    for queue in ("to", "cc1", "cc2", "bcc"):
        stage.drain(queue, 1)
    channel.publish("missing", "two", "mandatory", headers={"CC": ["cc1"]})
    channel.publish("missing", "three", "mandatory", headers={"BCC": ["absent"]})
    channel.publish("missing", "four", "mandatory", headers={"BCC": ["bcc"]})
    stage.drain("cc1", 1)
    stage.drain("bcc", 1)


@each(
    cc_text={"CC": "cc"},
    cc_number={"CC": 1},
    cc_numbers={"CC": [1]},
    cc_mixed={"CC": ["cc", 1]},
    cc_empty={"CC": []},
    cc_binary={"CC": [b"cc"]},
    bcc_text={"BCC": "cc"},
    bcc_numbers={"BCC": [1]},
    lower_case={"cc": ["cc"]},
)
def copies_need_a_list_of_texts(stage: Stage, headers: Any) -> None:
    """CC and BCC of another type are refused with 406."""
    channel = stage.open(confirm=True)
    channel.declare("to")
    channel.declare("cc")
    channel.publish("to", "one", headers=headers)
    stage.drain("to", 0)
    stage.drain("cc", 0)
