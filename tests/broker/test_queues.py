# SPDX-License-Identifier: MIT
"""What a queue does with its messages, on a clock of the tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postage.broker import fields
from postage.broker.arguments import read_queue_arguments
from postage.broker.clock import Clock
from postage.broker.consumers import Consumer
from postage.broker.messages import Message, join_properties
from postage.broker.queues import DEAD_LETTER_PAUSE, Entry, Queue
from tests.broker.doubles import Channel


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.clock = Clock(lambda: self.seconds)

    def wait(self, seconds: float) -> None:
        """Let time pass, timer by timer."""
        end = self.seconds + seconds
        while (when := self.clock.next_call) is not None and when <= end:
            self.seconds = max(self.seconds, when)
            self.clock.run()
        self.seconds = end


@dataclass
class Host:
    """A virtual host that writes down what its queues say."""

    time: Time = field(default_factory=Time)
    dead: list[tuple[bytes, str]] = field(default_factory=list)
    kept: dict[int, bytes] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    takes_dead_letters: bool = True

    @property
    def clock(self) -> Clock:
        return self.time.clock

    def bury(self, entry: Entry, reason: str) -> None:
        self.dead.append((entry.message.body, reason))
        entry.queue.buried(entry, reason, is_taken=self.takes_dead_letters)

    def keep(self, entry: Entry) -> None:
        self.kept[entry.position] = entry.message.body

    def keep_count(self, entry: Entry) -> None:
        self.counts.append(entry.deliveries)

    def forget(self, entry: Entry) -> None:
        del self.kept[entry.position]

    def expire_queue(self, queue: Queue) -> None:
        self.expired.append(queue.name)
        queue.close()


def queue_of(host: Host, **arguments: Any) -> Queue:
    """Return a queue with arguments, whose names are those of AMQP without the x."""
    raw = {f"x-{name.replace('_', '-')}": fields.encode(each) for name, each in arguments.items()}
    return Queue(host, "q", read_queue_arguments(raw, "queue 'q'"), durable=True)


def message(body: object, *, ttl: int | None = None, priority: int | None = None) -> Message:
    """Return a message."""
    properties: dict[str, bytes] = {}
    if ttl is not None:
        text = str(ttl).encode()
        properties["expiration"] = bytes([len(text)]) + text
    if priority is not None:
        properties["priority"] = bytes([priority])
    return Message("", "q", join_properties(properties), str(body).encode())


def fill(queue: Queue, *bodies: object, **options: int) -> None:
    """Publish messages to a queue."""
    for body in bodies:
        assert queue.publish(message(body, **options))


def take(queue: Queue, number: int) -> list[Entry]:
    """Get so many messages, which are unsettled then."""
    found = [queue.get() for _ in range(number)]
    assert None not in found
    return [entry for entry in found if entry is not None]


def waiting(queue: Queue) -> list[str]:
    """Return the bodies of what waits, in order."""
    return [entry.message.body.decode() for entry in queue.kept()]


def test_messages_come_in_order() -> None:
    """First in, first out."""
    queue = queue_of(Host())
    fill(queue, 1, 2, 3)
    assert [b"1", b"2", b"3"] == [entry.message.body for entry in take(queue, 3)]
    assert queue.get() is None
    assert (0, 3) == (queue.count, queue.unsettled)


def test_what_waits_is_handed_to_a_consumer_as_far_as_its_prefetch_allows() -> None:
    """The rest follows when something was settled."""
    queue = queue_of(Host())
    fill(queue, 1, 2, 3)
    channel = Channel()
    consumer = Consumer(channel, "c", prefetch=2)
    queue.add_consumer(consumer)
    queue.dispatch()
    assert [("c", b"1"), ("c", b"2")] == channel.delivered
    queue.ack(channel.entries[0])
    consumer.unsettled -= 1
    queue.consumers.wake(consumer)
    queue.dispatch()
    assert ("c", b"3") == channel.delivered[-1]
    assert "<Queue q [0 ready, 2 unsettled, 1 consumers]>" == repr(queue)


def test_what_needs_no_ack_is_forgotten_at_once() -> None:
    """It is not unsettled, and no longer kept."""
    host = Host()
    queue = queue_of(host)
    channel = Channel()
    queue.add_consumer(Consumer(channel, "c", no_ack=True))
    fill(queue, 1)
    assert ([("c", b"1")], {}, 0) == (channel.delivered, host.kept, queue.unsettled)


def test_a_classic_queue_takes_messages_back_to_their_places() -> None:
    """Whatever the order in which they are given back."""
    queue = queue_of(Host())
    fill(queue, *range(6))
    entries = take(queue, 5)
    queue.requeue([entries[3]])
    queue.requeue([entries[0], entries[4]])
    queue.requeue([entries[1]])
    assert ["0", "1", "3", "4", "5"] == waiting(queue)
    assert [True, True, True, True, False] == [
        entry.is_redelivered for entry in take(queue, 5)
    ]


def test_a_quorum_queue_delivers_first_what_was_given_back_first() -> None:
    """With a delivery limit, all that was given back is ahead of what was never delivered."""
    queue = queue_of(Host(), queue_type="quorum", delivery_limit=10)
    fill(queue, *range(4))
    entries = take(queue, 3)
    queue.requeue([entries[2]])
    queue.requeue([entries[0], entries[1]])
    assert ["2", "0", "1", "3"] == waiting(queue)


def test_a_quorum_queue_without_limit_puts_back_behind_all_others() -> None:
    """But what a consumer lost is ahead, as nobody wanted to wait with it."""
    host = Host()
    queue = queue_of(host, queue_type="quorum")
    fill(queue, *range(4))
    entries = take(queue, 2)
    queue.requeue([entries[0]])
    queue.requeue([entries[1]], is_lost=True)
    assert ["1", "2", "3", "0"] == waiting(queue)
    assert {1: b"1", 2: b"2", 3: b"3", 4: b"0"} == host.kept


@given(st.lists(st.sampled_from("pgrRa"), max_size=60), st.randoms())
def test_a_queue_keeps_what_was_published_and_not_settled(actions: str, random: Any) -> None:
    """Its count, its bytes, its order and what it keeps always agree with a plain list."""
    host = Host()
    queue = queue_of(host)
    held: list[Entry] = []
    expected: list[int] = []  # what waits: the positions
    number = 0
    for action in actions:
        if action == "p":
            fill(queue, number)
            expected.append(number)
            number += 1
        elif action == "g":
            entry = queue.get()
            assert (expected.pop(0) if expected else None) == (entry and entry.position)
            held += [entry] if entry else []
        elif held:
            entry = held.pop(random.randrange(len(held)))
            if action == "a":
                queue.ack(entry)
            else:
                queue.requeue([entry])
                expected = sorted([*expected, entry.position])
    assert [str(each) for each in expected] == waiting(queue)
    assert len(expected) == queue.count
    assert len(held) == queue.unsettled
    assert sum(len(str(each)) for each in expected) == queue.bytes
    assert {*expected, *(entry.position for entry in held)} == set(host.kept)


def test_a_message_that_was_given_back_too_often_dies() -> None:
    """The delivery limit of a quorum queue counts what was given back."""
    host = Host()
    queue = queue_of(host, queue_type="quorum", delivery_limit=2, dead_letter_exchange="")
    fill(queue, "poison")
    for _ in range(2):
        queue.requeue(take(queue, 1))
    assert ([], [1, 2]) == (host.dead, host.counts)
    queue.requeue(take(queue, 1))
    assert [(b"poison", "delivery_limit")] == host.dead
    assert ({}, 0) == (host.kept, queue.count)


def test_a_rejected_message_dies_or_is_gone() -> None:
    """Without a dead letter exchange nobody hears of it any more."""
    host = Host()
    for arguments in ({"dead_letter_exchange": "dlx"}, {}):
        queue = queue_of(host, **arguments)
        fill(queue, "unwanted")
        queue.reject(take(queue, 1)[0])
        assert ({}, 0) == (host.kept, queue.unsettled)
    assert [(b"unwanted", "rejected")] == host.dead


def test_messages_expire_at_their_time_and_not_before() -> None:
    """The shorter of the two times counts."""
    host = Host()
    queue = queue_of(host, message_ttl=1000, dead_letter_exchange="")
    fill(queue, "long", ttl=5000)
    fill(queue, "short", ttl=100)
    host.time.wait(0.9)
    assert [] == host.dead
    host.time.wait(0.2)
    assert [(b"long", "expired"), (b"short", "expired")] == host.dead


def test_a_message_expires_only_at_the_head() -> None:
    """As in RabbitMQ: nobody looks at what waits behind another."""
    host = Host()
    queue = queue_of(host, dead_letter_exchange="")
    fill(queue, "stays")
    fill(queue, "expires", ttl=100)
    host.time.wait(1)
    assert ["stays", "expires"] == waiting(queue)
    take(queue, 1)
    assert queue.get() is None
    assert [(b"expires", "expired")] == host.dead


def test_what_comes_to_the_head_expires_there_without_further_notice() -> None:
    """It needs nobody to look at the queue."""
    host = Host()
    queue = queue_of(host, dead_letter_exchange="")
    fill(queue, "first")
    fill(queue, "second", ttl=1000)
    take(queue, 1)
    host.time.wait(1.1)
    assert [(b"second", "expired")] == host.dead


def test_a_message_at_the_head_behind_a_full_consumer_expires() -> None:
    """A timer waits for it once it is the head."""
    host = Host()
    queue = queue_of(host, dead_letter_exchange="")
    fill(queue, "first")
    fill(queue, "second", ttl=1000)
    queue.add_consumer(Consumer(Channel(), "c", prefetch=1))
    queue.dispatch()
    host.time.wait(1.1)
    assert [(b"second", "expired")] == host.dead


def test_a_message_without_time_is_delivered_at_once_or_never() -> None:
    """A TTL of 0 is for those who wait already."""
    host = Host()
    queue = queue_of(host)
    channel = Channel()
    consumer = Consumer(channel, "c", prefetch=1)
    queue.add_consumer(consumer)
    fill(queue, "caught", ttl=0)
    assert [("c", b"caught")] == channel.delivered
    fill(queue, "missed", ttl=0)
    assert (0, 1) == (queue.count, len(host.kept))


def test_a_full_queue_drops_from_its_head() -> None:
    """By default the oldest go."""
    host = Host()
    queue = queue_of(host, max_length=2, dead_letter_exchange="")
    fill(queue, 1, 2, 3)
    assert ["2", "3"] == waiting(queue)
    assert [(b"1", "maxlen")] == host.dead


def test_a_full_queue_counts_the_bytes_of_bodies() -> None:
    """The limit is for what waits, not for what was delivered."""
    queue = queue_of(Host(), max_length_bytes=5)
    fill(queue, "aaa", "bb")
    assert ["aaa", "bb"] == waiting(queue)
    take(queue, 1)
    fill(queue, "ccc", "dd")
    assert ["ccc", "dd"] == waiting(queue)


@pytest.mark.parametrize("overflow", ["reject-publish", "reject-publish-dlx"])
def test_a_full_queue_can_refuse(overflow: str) -> None:
    """What is refused is not kept, and dies only if that is asked for."""
    host = Host()
    queue = queue_of(host, max_length=1, overflow=overflow, dead_letter_exchange="")
    fill(queue, 1)
    assert not queue.publish(message(2))
    assert ["1"] == waiting(queue)
    assert ([(b"2", "maxlen")] if overflow.endswith("dlx") else []) == host.dead
    assert [b"1"] == list(host.kept.values())
    take(queue, 1)
    fill(queue, 3)
    assert [b"1", b"3"] == list(host.kept.values())


def test_higher_priorities_come_first_and_keep_their_order() -> None:
    """What is above the highest counts as the highest, and none as the lowest."""
    queue = queue_of(Host(), max_priority=5)
    fill(queue, "low")
    fill(queue, "high", "higher", priority=9)
    fill(queue, "middle", priority=3)
    assert ["high", "higher", "middle", "low"] == waiting(queue)
    queue.requeue(reversed(take(queue, 4)))
    assert ["high", "higher", "middle", "low"] == waiting(queue)


def test_a_purge_takes_what_waits() -> None:
    """What was delivered stays with who has it."""
    host = Host()
    queue = queue_of(host)
    fill(queue, 1, 2, 3)
    (held,) = take(queue, 1)
    assert 2 == queue.purge()
    assert [held.position] == list(host.kept)
    queue.requeue([held])
    assert ["1"] == waiting(queue)


def test_a_dead_letter_that_nobody_takes_is_kept_where_that_was_promised() -> None:
    """At-least-once dead lettering tries again."""
    host = Host(takes_dead_letters=False)
    queue = queue_of(
        host,
        queue_type="quorum",
        dead_letter_exchange="",
        dead_letter_strategy="at-least-once",
        overflow="reject-publish",
    )
    fill(queue, "unwanted")
    queue.reject(take(queue, 1)[0])
    assert ([b"unwanted"], ["unwanted"], 0) == (
        list(host.kept.values()),
        waiting(queue),
        queue.count,
    )
    host.time.wait(DEAD_LETTER_PAUSE + 0.1)
    assert 2 == len(host.dead)
    host.takes_dead_letters = True
    host.time.wait(DEAD_LETTER_PAUSE + 0.1)
    assert {} == host.kept
    host.time.wait(10 * DEAD_LETTER_PAUSE)
    assert 3 == len(host.dead)


def test_a_queue_that_nobody_uses_expires() -> None:
    """A consumer, a get and a declaration count as use."""
    host = Host()
    queue = queue_of(host, expires=1000)
    host.time.wait(0.9)
    queue.get()
    host.time.wait(0.9)
    consumer = Consumer(Channel(), "c")
    queue.add_consumer(consumer)
    host.time.wait(5)
    assert [] == host.expired
    queue.remove_consumer(consumer)
    host.time.wait(0.9)
    assert [] == host.expired
    host.time.wait(0.2)
    assert ["q"] == host.expired


def test_a_deleted_queue_leaves_no_timer_and_takes_nothing_back() -> None:
    """What was delivered from it is forgotten, however it is settled."""
    host = Host()
    queue = queue_of(host, expires=1000, message_ttl=1000, dead_letter_exchange="")
    fill(queue, 1, 2, 3)
    requeued, rejected, acked = take(queue, 3)
    queue.close()
    queue.requeue([requeued])
    queue.reject(rejected)
    queue.ack(acked)
    assert ({}, [], 0) == (host.kept, host.dead, len(host.clock))
