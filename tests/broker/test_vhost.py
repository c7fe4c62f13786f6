# SPDX-License-Identifier: MIT
"""Exchanges, queues and bindings of a virtual host, and the way of a message through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from postage.broker import fields
from postage.broker.clock import Clock
from postage.broker.errors import Refusal
from postage.broker.messages import Message
from postage.broker.queues import Queue
from postage.broker.vhost import Outcome, VirtualHost

ME = object()


@pytest.fixture
def vhost() -> VirtualHost:
    """An empty virtual host."""
    return VirtualHost("v", Clock(lambda: 0.0))


def encoded(arguments: Mapping[str, Any]) -> dict[str, bytes]:
    """Return arguments as they come."""
    return {name: fields.encode(value) for name, value in arguments.items()}


def queue_of(vhost: VirtualHost, name: str, /, owner: object = ME, **options: Any) -> Queue:
    """Declare a queue; what is no flag is an argument without its x."""
    flags = {name: options.pop(name) for name in ("durable", "exclusive") if name in options}
    flags |= {"auto_delete": options.pop("auto_delete", False)}
    raw = encoded({f"x-{name.replace('_', '-')}": each for name, each in options.items()})
    return vhost.declare_queue(name, raw, owner, **flags)


def publish(vhost: VirtualHost, exchange: str, key: str, body: bytes = b"hello") -> Outcome:
    """Publish a message without properties."""
    outcome = vhost.publish(Message(exchange, key, b"\x00\x00", body))
    vhost.publish_dead_letters()
    return outcome


def counts(vhost: VirtualHost) -> dict[str, int]:
    """Return how many messages wait in which queue."""
    return {name: queue.count for name, queue in vhost.queues.items()}


def refused(call: Any, *arguments: Any, **options: Any) -> str:
    """Return the words with which a call is refused."""
    with pytest.raises(Refusal) as caught:
        call(*arguments, **options)
    return str(caught.value)


def test_every_queue_is_bound_to_the_default_exchange(vhost: VirtualHost) -> None:
    """By its name, and nothing else."""
    queue_of(vhost, "a")
    assert publish(vhost, "", "a").is_routed
    assert not publish(vhost, "", "b").is_routed
    assert {"a": 1} == counts(vhost)


def test_a_message_comes_once_however_many_ways_lead_to_a_queue(vhost: VirtualHost) -> None:
    """Bindings between exchanges may even form a ring."""
    for name in ("one", "two"):
        vhost.declare_exchange(name, "fanout", {})
    vhost.bind("one", vhost.exchange("two"), "", {})
    vhost.bind("two", vhost.exchange("one"), "", {})
    for exchange in ("one", "two"):
        vhost.bind(exchange, queue_of(vhost, "q"), "", {})
    publish(vhost, "one", "")
    publish(vhost, "two", "")
    assert {"q": 2} == counts(vhost)


def test_what_finds_no_queue_goes_to_the_alternate_exchange(vhost: VirtualHost) -> None:
    """And from there to the next; a ring ends, and so does a name that means nothing."""
    for name, other in (("a", "b"), ("b", "c"), ("c", "a"), ("lost", "nowhere")):
        vhost.declare_exchange(name, "direct", encoded({"alternate-exchange": other}))
    vhost.bind("c", queue_of(vhost, "q"), "key", {})
    assert publish(vhost, "a", "key").is_routed
    assert not publish(vhost, "a", "other").is_routed
    assert not publish(vhost, "lost", "key").is_routed
    assert {"q": 1} == counts(vhost)


def test_an_exchange_goes_with_its_last_binding_if_it_was_declared_so(vhost: VirtualHost) -> None:
    """Whether the queue was unbound or deleted; a ring of exchanges goes one by one."""
    for name in ("a", "b"):
        vhost.declare_exchange(name, "fanout", {}, auto_delete=True)
        queue = queue_of(vhost, "q")
        vhost.bind(name, queue, "", {})
    vhost.unbind("a", queue, "", {})
    assert "a" not in vhost.exchanges
    vhost.delete_queue(queue)
    assert "b" not in vhost.exchanges


def test_an_exchange_of_the_same_name_is_another_one(vhost: VirtualHost) -> None:
    """A queue that was bound to one that is gone does not take the new one with it."""
    queue = queue_of(vhost, "q")
    for _ in range(2):
        vhost.declare_exchange("a", "fanout", {}, auto_delete=True)
        vhost.bind("a", queue, "", {})
        vhost.unbind("a", queue, "", {})
    vhost.declare_exchange("a", "fanout", {}, auto_delete=True)
    vhost.delete_queue(queue)
    assert "a" in vhost.exchanges


def test_what_is_bound_to_an_exchange_that_goes_is_bound_no_more(vhost: VirtualHost) -> None:
    """A new exchange of the same name begins without bindings."""
    queue = queue_of(vhost, "q")
    vhost.declare_exchange("a", "fanout", {})
    vhost.bind("amq.fanout", vhost.exchange("a"), "", {})
    vhost.bind("a", queue, "", {})
    assert publish(vhost, "amq.fanout", "").is_routed
    vhost.delete_exchange("a")
    vhost.declare_exchange("a", "fanout", {})
    assert not publish(vhost, "amq.fanout", "").is_routed
    assert not publish(vhost, "a", "").is_routed


def test_a_queue_goes_with_its_owner(vhost: VirtualHost) -> None:
    """Exclusive queues only, and only those of that connection."""
    other = object()
    for name, owner, exclusive in (("a", ME, True), ("b", other, True), ("c", ME, False)):
        queue_of(vhost, name, owner, exclusive=exclusive)
    vhost.disown(ME)
    assert {"b", "c"} == set(vhost.queues)
    assert "RESOURCE_LOCKED" in refused(vhost.queue, "b", ME)


def test_a_declaration_is_repeated_only_with_the_same_words(vhost: VirtualHost) -> None:
    """The refusal names what differs, and both values."""
    queue_of(vhost, "q", durable=True, message_ttl=1000)
    same = queue_of(vhost, "q", durable=True, message_ttl=1000)
    assert vhost.queues["q"] is same
    words = refused(queue_of, vhost, "q", durable=True, message_ttl=2000)
    assert (
        "PRECONDITION_FAILED - inequivalent arg 'x-message-ttl' for queue 'q' in vhost 'v': "
        "received '2000' but current is '1000'"
    ) == words
    assert "inequivalent arg 'durable'" in refused(queue_of, vhost, "q", message_ttl=1000)


def test_an_expired_message_goes_round_a_ring_of_queues_once(vhost: VirtualHost) -> None:
    """Nobody would ever stop it."""
    queue_of(vhost, "a", message_ttl=0, dead_letter_exchange="", dead_letter_routing_key="b")
    queue_of(vhost, "b", message_ttl=0, dead_letter_exchange="", dead_letter_routing_key="a")
    publish(vhost, "", "a")
    assert {"a": 0, "b": 0} == counts(vhost)


def test_dead_letters_find_their_way_through_any_number_of_queues(vhost: VirtualHost) -> None:
    """A long chain does not nest: the stack would end at a hundred or two."""
    options = {"max_length": 0, "dead_letter_exchange": ""}
    for number in range(250):
        queue_of(vhost, f"q{number}", dead_letter_routing_key=f"q{number + 1}", **options)
    queue_of(vhost, "q250")
    publish(vhost, "", "q0")
    assert {"q250": 1} == {name: count for name, count in counts(vhost).items() if count}


def test_memory_is_counted_off_whatever_becomes_of_a_message() -> None:
    """What was deleted, purged, dropped, refused or died costs nothing."""
    used = 0

    def count(size: int) -> None:
        nonlocal used
        used += size

    vhost = VirtualHost("v", Clock(lambda: 0.0), memory=count)
    queue_of(vhost, "dead")
    queue_of(vhost, "short", max_length=1, dead_letter_exchange="", dead_letter_routing_key="dead")
    queue_of(vhost, "full", max_length=1, overflow="reject-publish-dlx", dead_letter_exchange="")
    queue = queue_of(vhost, "plain")
    for name in ("short", "full", "plain"):
        for _ in range(3):
            publish(vhost, "", name)
    held = queue.get()
    assert held is not None and used > 0
    for name in ("dead", "short", "plain"):
        vhost.queues[name].purge()
    vhost.delete_queue(vhost.queues["full"])
    vhost.delete_queue(queue)
    assert used > 0
    queue.ack(held)
    assert 0 == used
