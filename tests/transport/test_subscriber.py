# SPDX-License-Identifier: MIT
"""Deliveries come in once, settlements go out to where they belong, and both survive outages."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postage.errors import (
    ChannelClosedError,
    ConnectionFailedError,
    ConnectionLostError,
    ExchangeMismatchError,
    QueueMismatchError,
    TransportError,
)
from postage.generic_application import GenericApplication
from postage.prefetch import DEFAULT as DEFAULT_PREFETCH
from postage.prefetch import MOST
from postage.settings import Settings
from postage.topology import (
    Binding,
    DefaultExchange,
    ExchangeSpec,
    Queue,
    QueueSpec,
    queue_spec,
)
from postage.transport import connection as connections
from postage.transport.conversation import declare_exchange
from postage.transport.ledger import Ledger
from postage.transport.subscriber import Delivery, Settlement, Subscriber, coalesced
from tests.nodes import Node
from tests.rabbitmq_node import RabbitNode
from tests.transport.proxy import Proxy, Way
from tests.waiting import wait_until

#: Seconds after which what has to come counts as missing.
DEADLINE = 30.0

DEFAULT = DefaultExchange.spec()
LETTERS = ExchangeSpec("letters", "direct")

BOX = Queue("box", type="classic", dead_letter=None).spec()
CRATE = Queue("crate", type="classic", dead_letter=None).spec()
QUORUM = Queue("quorum").spec()
NAMELESS = Queue(exclusive=True).spec()
UID = Queue("uid", type="classic", dead_letter=None, exclusive_consumer=True).spec()


class Reader:
    """A subscriber, for as long as its ``with`` block lasts."""

    def __init__(self, settings: Settings, prefetch: int | None = 10, **options: Any) -> None:
        self.connection = connections.acquire(settings, "consume")
        self.subscriber = Subscriber(self.connection, prefetch, **options)
        self.hub = self.connection.hub

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        self.subscriber.close(5.0)
        connections.release(self.connection)

    def bind(self, queue: QueueSpec, key: str = "", exchange: ExchangeSpec = DEFAULT) -> None:
        self.subscriber.topology.bind(Binding(exchange, queue, key), DEADLINE)

    def unbind(self, queue: QueueSpec, key: str, exchange: ExchangeSpec) -> None:
        self.subscriber.topology.unbind(Binding(exchange, queue, key), DEADLINE)

    def wait_for(self, condition: Callable[[], object], what: str = "") -> None:
        assert self.hub.wait(lambda: bool(condition()), DEADLINE), what or self.subscriber

    def consume(self, *queues: QueueSpec) -> None:
        for queue in queues:
            self.subscriber.consume(queue)
        self.wait_for(lambda: self.subscriber.consuming)

    def take(self, count: int = 1) -> list[Delivery]:
        self.wait_for(lambda: len(self.subscriber.inbox) >= count)
        return [self.subscriber.inbox.popleft() for _ in range(count)]

    def settle(self, settlement: Settlement, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            self.subscriber.settle(delivery, settlement)

    def ack(self, *deliveries: Delivery) -> None:
        self.settle(Settlement.ACK, *deliveries)

    def break_channel(self) -> None:
        """Have the broker close the channel: 406, unknown delivery tag."""
        self.hub.call(lambda: self.subscriber._channel.basic_ack(999_999))
        self.wait_for(lambda: self.subscriber._channel is None)

    def work(self, count: int) -> list[bytes]:
        """Take and acknowledge that many messages, and return their bodies."""
        bodies: list[bytes] = []
        for _ in range(count):
            [delivery] = self.take()
            bodies.append(delivery.body)
            self.ack(delivery)
            self.subscriber.flush()
        return bodies


class Peer:
    """Another program on the same broker."""

    def __init__(self, url: str) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self._connection.channel()
        self.channel.confirm_delivery()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_error: object) -> None:
        self._connection.close()

    def send(self, queue: str, *bodies: bytes, exchange: str = "") -> None:
        for body in bodies:
            self.channel.basic_publish(exchange, queue, body)

    @contextlib.contextmanager
    def unconfirmed(self) -> Iterator[Any]:
        """Provide a channel for many messages."""
        with self._connection.channel() as channel:
            yield channel

    def send_numbers(self, queue: str, *numbers: int) -> None:
        self.send(queue, *[b"%d" % number for number in numbers])

    def routes(self, exchange: str, key: str) -> bool:
        """Tell whether any queue is bound to a key."""
        try:
            self.channel.basic_publish(exchange, key, b"probe", mandatory=True)
        except pika.exceptions.UnroutableError:
            return False
        return True

    def count(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)

    def consumers(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.consumer_count)

    def fetch(self, queue: str) -> bytes | None:
        body: bytes | None = self.channel.basic_get(queue, auto_ack=True)[2]
        return body


@pytest.fixture
def settings(broker_url: str) -> Settings:
    return Settings.from_environment()


@pytest.fixture
def peer(broker_url: str) -> Iterator[Peer]:
    with Peer(broker_url) as peer:
        yield peer


@pytest.fixture
def reader(settings: Settings) -> Iterator[Reader]:
    with Reader(settings) as reader:
        yield reader


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    with Proxy(broker_url) as proxy:
        yield proxy


@pytest.fixture
def far_settings(proxy: Proxy) -> Settings:
    return Settings.from_environment({"POSTAGE_URL": proxy.url})


@pytest.fixture
def far_reader(far_settings: Settings) -> Iterator[Reader]:
    """A reader whose network the test commands."""
    with Reader(far_settings) as reader:
        yield reader


def cut(proxy: Proxy, reader: Reader) -> None:
    """Cut the connection, and wait until all is consumed again."""
    losses = reader.connection.losses
    proxy.cut()
    reader.wait_for(lambda: reader.connection.losses > losses)
    reader.wait_for(lambda: reader.subscriber.consuming)


def prefetches(node: Node, settings: Settings) -> dict[str, int]:
    """Ask the broker for the prefetch of the consumer of each queue."""
    return {each.queue: each.prefetch for each in node.consumers(settings.vhost)}


def channel_count(node: Node, settings: Settings) -> int:
    return sum(each.channels for each in node.connections(settings.vhost))


# -------------------------------------------------------------------------- coalescing


@given(st.sets(st.integers(1, 60)), st.data())
def test_coalesced_acks_settle_what_was_decided_and_nothing_else(
    tags: set[int], data: st.DataObject
) -> None:
    """A broker that gets them waits for exactly those that were not decided."""
    unsettled = sorted(tags)
    acked = data.draw(st.sets(st.sampled_from(unsettled)) if unsettled else st.just(set()))
    waiting = set(unsettled)
    for tag, multiple in coalesced(unsettled, acked):
        settled = {each for each in waiting if each == tag or (multiple and each < tag)}
        assert settled  # a tag that is not outstanding would cost the channel (406)
        waiting -= settled
    assert tags - acked == waiting


@given(st.integers(1, 1000))
def test_a_run_of_acks_takes_one_frame(count: int) -> None:
    """That is what they are coalesced for."""
    tags = list(range(5, 5 + count))
    assert [(tags[-1], count > 1)] == coalesced([*tags, 5000], set(tags))


def test_acks_above_a_gap_go_singly() -> None:
    """A multiple ack would take the undecided one along."""
    acks = coalesced([1, 2, 3, 4, 5, 6], {1, 2, 4, 6})
    assert [(2, True), (4, False), (6, False)] == acks


# ------------------------------------------------------------------------- deliveries in


def test_a_delivery_shows_what_it_is(reader: Reader, peer: Peer) -> None:
    """All that AMQP says about it, and from which queue it came, as that was declared."""
    reader.bind(BOX, "key", LETTERS)
    reader.consume(BOX)
    peer.send("key", b"hello", exchange="letters")
    [delivery] = reader.take()
    assert (b"hello", BOX, "letters", "key", False) == (
        delivery.body,
        delivery.queue,
        delivery.exchange,
        delivery.routing_key,
        delivery.redelivered,
    )
    assert "<Delivery 1 from 'box'>" == repr(delivery)
    assert "<Subscriber [1 of 1 consumers live, 0 waiting, 1 unsettled]>" == repr(reader.subscriber)


def test_deliveries_come_in_order_and_are_settled(reader: Reader, peer: Peer) -> None:
    """Each once, and the queue is empty in the end."""
    reader.bind(BOX)
    reader.consume(BOX)
    peer.send_numbers("box", *range(300))
    assert [b"%d" % number for number in range(300)] == reader.work(300)
    assert reader.subscriber.close(5.0)
    assert 0 == peer.count("box")


def test_whoever_waits_is_told_of_a_delivery(reader: Reader, peer: Peer) -> None:
    """A scheduler that sleeps is woken by `on_delivery`."""
    heard: list[int] = []
    reader.subscriber.on_delivery = lambda: heard.append(len(reader.subscriber.inbox))
    reader.bind(BOX)
    reader.consume(BOX)
    peer.send_numbers("box", 1, 2)
    reader.take(2)
    assert 2 == len(heard)
    assert min(heard) > 0


@pytest.mark.parametrize("spec", [BOX, QUORUM], ids=["classic", "quorum"])
def test_no_more_than_the_prefetch_is_delivered_ahead(
    settings: Settings, peer: Peer, spec: QueueSpec
) -> None:
    """Whatever is settled makes room for as many."""
    with Reader(settings, prefetch=3) as reader:
        reader.bind(spec)
        reader.consume(spec)
        peer.send_numbers(spec.name, *range(20))
        reader.work(1)  # the slow start of a quorum queue is over
        deliveries = reader.take(3)
        assert [] == list(reader.subscriber.inbox)
        assert 16 == wait_until(lambda: peer.count(spec.name) == 16 and 16)
        reader.ack(*deliveries)
        reader.take(3)
        assert [] == list(reader.subscriber.inbox)


def test_each_queue_has_the_prefetch_for_itself(
    node: Node, settings: Settings, peer: Peer
) -> None:
    """Also when some of them start slowly, and all begin at once."""
    classic = [replace(BOX, name=f"classic-{number}") for number in range(3)]
    quorum = [replace(QUORUM, name=f"quorum-{number}") for number in range(3)]
    with Reader(settings, prefetch=7) as reader:
        for spec in (*classic, *quorum):
            reader.bind(spec)
            peer.send_numbers(spec.name, *range(20))
        reader.consume(*classic, *quorum)
        deliveries = reader.take(3 * 7 + 3)
        slow = {spec.name: 1 for spec in quorum}
        fast = {spec.name: 7 for spec in classic}
        assert {**slow, **fast} == prefetches(node, settings)
        reader.ack(*[each for each in deliveries if each.queue in quorum])
        reader.work(3 * 19)  # all of the quorum queues: those of the others were not settled
        expected = {spec.name: 7 for spec in (*classic, *quorum)}
        assert expected == prefetches(node, settings)


def test_a_queue_with_a_delivery_limit_starts_slowly(
    node: Node, reader: Reader, peer: Peer
) -> None:
    """What makes the process crash is counted alone: the first delivery comes by itself."""
    reader.bind(QUORUM)
    peer.send_numbers("quorum", *range(30))
    reader.consume(QUORUM)
    [first] = reader.take()
    assert {"quorum": 1} == prefetches(node, reader.connection.settings)
    assert [] == list(reader.subscriber.inbox)
    reader.ack(first)
    others = reader.take(10)
    assert {"quorum": 10} == prefetches(node, reader.connection.settings)
    assert [b"%d" % number for number in range(1, 11)] == [each.body for each in others]


def test_a_message_that_is_given_back_does_not_end_the_slow_start(
    node: Node, reader: Reader, peer: Peer
) -> None:
    """Only one that was handled shows that the process survives its messages."""
    reader.bind(QUORUM)
    peer.send_numbers("quorum", *range(30))
    reader.consume(QUORUM)
    [first] = reader.take()
    reader.subscriber.give_back(first)
    [again] = reader.take()
    assert {"quorum": 1} == prefetches(node, reader.connection.settings)
    reader.settle(Settlement.REJECT, again)
    reader.take(10)
    assert {"quorum": 10} == prefetches(node, reader.connection.settings)


@pytest.mark.parametrize("after", [0.0, 0.05])
def test_a_slow_start_can_be_ended_by_trust(
    node: Node, reader: Reader, peer: Peer, after: float
) -> None:
    """For a handler that waits for others; nothing is delivered twice over it."""
    others = [replace(QUORUM, name=f"other-{number}") for number in range(3)]
    for spec in (QUORUM, *others):
        reader.bind(spec)
        peer.send_numbers(spec.name, *range(20))
    for spec in (QUORUM, *others):
        reader.subscriber.consume(spec)
    firsts = reader.take(4)
    for spec in (QUORUM, *others):
        reader.subscriber.trust(spec, after)
        reader.subscriber.trust(spec, after)
    deliveries = reader.take(4 * 10)
    assert [False] * 44 == [each.redelivered for each in (*firsts, *deliveries)]
    expected = {spec.name: 10 for spec in (QUORUM, *others)}
    assert expected == prefetches(node, reader.connection.settings)


def test_a_slow_start_begins_anew_with_each_connection(
    node: Node, far_reader: Reader, proxy: Proxy, peer: Peer
) -> None:
    """Perhaps a message made the broker drop us."""
    far_reader.bind(QUORUM)
    peer.send_numbers("quorum", *range(30))
    far_reader.consume(QUORUM)
    far_reader.work(1)
    far_reader.take(10)
    cut(proxy, far_reader)
    far_reader.take(1)
    assert {"quorum": 1} == prefetches(node, far_reader.connection.settings)


def test_several_slow_starts_redeliver_nothing(
    node: Node, settings: Settings, peer: Peer
) -> None:
    """A message that were on its way while its consumer changes would count as delivered twice."""
    specs = [replace(QUORUM, name=f"quorum-{number}") for number in range(4)]
    with Reader(settings) as reader:
        for spec in specs:
            reader.bind(spec)
            peer.send_numbers(spec.name, *range(50))
        reader.consume(*specs)
        redelivered: list[Delivery] = []
        for _ in range(200):
            [delivery] = reader.take()
            if delivery.redelivered:
                redelivered.append(delivery)
            reader.ack(delivery)
            reader.subscriber.flush()
        assert [] == redelivered
        expected = {spec.name: 10 for spec in specs}
        wait_until(lambda: prefetches(node, settings) == expected)


# ---------------------------------------------------------------- when settlements leave


def test_the_ack_of_an_idle_consumer_leaves_at_once(
    settings: Settings, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that little comes twice if the process is killed."""
    monkeypatch.setattr("postage.transport.subscriber.ACK_DELAY", 2 * DEADLINE)
    with Reader(settings) as reader:
        reader.bind(BOX)
        reader.consume(BOX)
        for number in range(3):
            peer.send_numbers(BOX.name, number)
            reader.ack(*reader.take())
            reader.subscriber.flush()
            reader.wait_for(lambda: reader.subscriber.health().in_flight == 0)


def test_the_acks_of_requests_leave_together(
    settings: Settings, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the broker has to wait for them, which has delivered half of the prefetch."""
    monkeypatch.setattr("postage.transport.subscriber.ACK_DELAY", 2 * DEADLINE)
    request = pika.BasicProperties(reply_to="someone")
    in_flight = []
    with Reader(settings, prefetch=10) as reader:
        reader.bind(BOX)
        reader.consume(BOX)
        for _ in range(10):
            peer.channel.basic_publish("", BOX.name, b"", request)
            reader.ack(*reader.take())
            reader.subscriber.flush()
            reader.hub.wait(lambda: True, first=lambda: None)  # what was posted before is done
            in_flight.append(reader.subscriber.health().in_flight)
    assert [1, 2, 3, 4, 0] * 2 == in_flight


def test_the_acks_of_requests_do_not_wait_for_long(settings: Settings, peer: Peer) -> None:
    """None of the others may come."""
    with Reader(settings, prefetch=10) as reader:
        reader.bind(BOX)
        reader.consume(BOX)
        request = pika.BasicProperties(reply_to="someone")
        peer.channel.basic_publish("", BOX.name, b"", request)
        reader.ack(*reader.take())
        reader.subscriber.flush()
        reader.wait_for(lambda: reader.subscriber.health().in_flight == 0)


# ----------------------------------------------------------------- prefetch that adapts


@pytest.fixture
def work_takes(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have all work count as much or as little, however long it takes."""

    def take(what: str) -> None:
        ahead = {"long": 1e-12, "no time": 1e12}[what]
        monkeypatch.setattr("postage.prefetch.AHEAD", ahead)

    monkeypatch.setattr("postage.prefetch.RECOVERY", 0.0)
    monkeypatch.setattr("postage.transport.subscriber.STALL", 60.0)
    return take


def work_until(reader: Reader, peer: Peer, queue: QueueSpec, prefetch: int) -> None:
    """Send and handle messages, many of which wait, until there is a prefetch."""

    def step() -> bool:
        with peer.unconfirmed() as channel:
            for number in range(5 * MOST):
                channel.basic_publish("", queue.name, b"%d" % number)
        reader.work(5 * MOST)
        return reader.subscriber.health().prefetch == prefetch

    wait_until(step)
    reader.wait_for(lambda: reader.subscriber.consuming)


@pytest.mark.parametrize("spec", [BOX, QUORUM], ids=["classic", "quorum"])
def test_a_prefetch_adapts_to_what_messages_take_and_nothing_is_delivered_twice_or_late(
    node: Node, settings: Settings, peer: Peer, work_takes: Callable[[str], None], spec: QueueSpec
) -> None:
    """Over many changes: a message that were on its way to a consumer that goes came again."""
    sent = itertools.count()
    taken: list[Delivery] = []
    with Reader(settings, prefetch=None) as reader:
        reader.bind(spec)
        reader.consume(spec)
        assert {spec.name: 1} == prefetches(node, settings)

        def handle() -> None:
            [delivery] = reader.take()
            taken.append(delivery)
            reader.ack(delivery)
            if len(taken) % 7 == 0 or not reader.subscriber.inbox:
                reader.subscriber.flush()

        def reaches(goal: int) -> bool:
            """Handle messages until the goal is reached or half of those that wait are gone."""
            with peer.unconfirmed() as channel:
                for number in itertools.islice(sent, 5 * MOST):
                    channel.basic_publish("", spec.name, b"%d" % number)
            for _ in range(5 * MOST):
                handle()
                if reader.subscriber.health().prefetch == goal:
                    return True
            return False

        for work, goal in [("no time", MOST), ("long", 1)] * 3:
            work_takes(work)
            wait_until(partial(reaches, goal))
        for _ in range(len(taken), next(sent)):
            handle()
        assert reader.subscriber.close(5.0)
    assert [b"%d" % number for number in range(len(taken))] == [each.body for each in taken]
    assert {False} == {each.redelivered for each in taken}
    assert 0 == peer.count(spec.name)


def test_the_broker_is_told_of_a_prefetch_that_adapts(
    node: Node, settings: Settings, peer: Peer, work_takes: Callable[[str], None]
) -> None:
    """Each queue has its own, and health shows the largest."""
    with Reader(settings, prefetch=None) as reader:
        for spec in (QUORUM, CRATE):
            reader.bind(spec)
        reader.consume(QUORUM, CRATE)
        work_takes("no time")
        work_until(reader, peer, QUORUM, MOST)
        reader.wait_for(lambda: prefetches(node, settings) == {"quorum": MOST, "crate": 1})
        work_takes("long")
        work_until(reader, peer, QUORUM, 1)
        reader.wait_for(lambda: prefetches(node, settings) == {"quorum": 1, "crate": 1})


def test_a_prefetch_does_not_grow_on_messages_that_were_delivered_before(
    node: Node, settings: Settings, peer: Peer, work_takes: Callable[[str], None]
) -> None:
    """One of them may be what ended the process; the broker counts it alone."""
    work_takes("no time")
    with Reader(settings) as earlier:
        earlier.bind(QUORUM)
        earlier.consume(QUORUM)
        peer.send_numbers("quorum", *range(30))
        earlier.work(1)
        earlier.take(10)
    with Reader(settings, prefetch=None) as reader:
        reader.bind(QUORUM)
        reader.consume(QUORUM)
        for _ in range(10):
            [delivery] = reader.take()
            assert delivery.redelivered
            assert {"quorum": 1} == prefetches(node, settings)
            assert [] == list(reader.subscriber.inbox)
            reader.ack(delivery)
            reader.subscriber.flush()
        [delivery] = reader.take()
        assert not delivery.redelivered
        reader.ack(delivery)
        reader.take(10)
        assert {"quorum": 10} == prefetches(node, settings)


@pytest.mark.parametrize("spec", [BOX, QUORUM], ids=["classic", "quorum"])
def test_what_waits_behind_a_message_that_takes_long_goes_to_an_idle_instance(
    settings: Settings,
    peer: Peer,
    work_takes: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    spec: QueueSpec,
) -> None:
    """And no more comes until it is done, though the consumer counts as live."""
    monkeypatch.setattr("postage.transport.subscriber.STALL", 0.2)
    work_takes("no time")
    with Reader(settings, prefetch=None) as slow, Reader(settings, prefetch=None) as idle:
        for reader in (slow, idle):
            reader.bind(spec)
        slow.consume(spec)
        work_until(slow, peer, spec, MOST)
        peer.send_numbers(spec.name, *range(20))
        [long] = slow.take()
        idle.consume(spec)
        assert [b"%d" % number for number in range(1, 20)] == idle.work(19)
        assert [] == list(slow.subscriber.inbox)
        assert slow.subscriber.health().is_healthy
        idle.subscriber.stop()
        idle.wait_for(idle.subscriber.stopped)
        peer.send_numbers(spec.name, *range(20, 30))
        wait_until(lambda: peer.count(spec.name) == 10)
        assert [] == list(slow.subscriber.inbox)
        slow.ack(long)
        slow.subscriber.flush()
        assert [b"%d" % number for number in range(20, 30)] == slow.work(10)


def test_of_messages_that_nobody_handles_yet_the_first_stays(
    settings: Settings,
    peer: Peer,
    work_takes: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another processor of the process takes long: when that is done, all goes on with this one."""
    monkeypatch.setattr("postage.transport.subscriber.STALL", 0.2)
    work_takes("no time")
    with Reader(settings, prefetch=None) as reader:
        reader.bind(QUORUM)
        reader.consume(QUORUM)
        work_until(reader, peer, QUORUM, MOST)
        peer.send_numbers("quorum", *range(20))
        reader.take(0)
        reader.wait_for(lambda: len(reader.subscriber.inbox) == 20)
        reader.wait_for(lambda: len(reader.subscriber.inbox) == 1)
        wait_until(lambda: peer.count("quorum") == 19)
        assert [b"%d" % number for number in range(20)] == reader.work(20)


def test_messages_are_given_back_once_only(
    settings: Settings,
    peer: Peer,
    work_takes: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker counts, and moves a message to the error queue that comes back too often."""
    monkeypatch.setattr("postage.transport.subscriber.STALL", 0.05)
    work_takes("no time")
    with Reader(settings, prefetch=None) as reader:
        reader.bind(QUORUM)
        reader.consume(QUORUM)
        work_until(reader, peer, QUORUM, MOST)
        peer.send_numbers("quorum", *range(20))
        # One by one, since what waits for long goes back by itself.
        for delivery in [reader.take()[0] for _ in range(20)]:
            reader.subscriber.give_back(delivery)
        reader.wait_for(lambda: len(reader.subscriber.inbox) == 20)
        looks: list[int] = []
        relieve = reader.subscriber._relieve

        def look(channel: Any) -> None:
            relieve(channel)
            looks.append(len(reader.subscriber.inbox))

        monkeypatch.setattr(reader.subscriber, "_relieve", look)
        reader.wait_for(lambda: len(looks) == 10)
        assert [20] * 10 == looks
        assert [b"%d" % number for number in range(20)] == reader.work(20)


@pytest.mark.parametrize(
    "spec",
    [
        replace(BOX, auto_delete=True),
        replace(BOX, exclusive_consumer=True),
        Queue("single", single_active_consumer=True, delivery_limit=None).spec(),
    ],
    ids=["auto_delete", "exclusive consumer", "single active consumer"],
)
def test_a_consumer_whose_queue_would_not_wait_for_it_keeps_its_prefetch(
    node: Node, settings: Settings, peer: Peer, work_takes: Callable[[str], None], spec: QueueSpec
) -> None:
    """It would be deleted with its last consumer, or go to another one."""
    work_takes("no time")
    with Reader(settings, prefetch=None) as reader:
        reader.bind(spec)
        reader.consume(spec)
        peer.send_numbers(spec.name, *range(300))
        reader.work(300)
        assert {spec.name: DEFAULT_PREFETCH} == prefetches(node, settings)


def test_handlers_that_let_others_run_fix_a_prefetch_that_adapts(
    node: Node, settings: Settings, peer: Peer, work_takes: Callable[[str], None]
) -> None:
    """It is their number then, and as it always was."""
    work_takes("no time")
    with Reader(settings, prefetch=None) as reader:
        reader.bind(QUORUM)
        reader.consume(QUORUM)
        peer.send_numbers("quorum", *range(30))
        reader.take()
        reader.subscriber.trust(QUORUM)
        reader.ack(*reader.take(DEFAULT_PREFETCH))
        reader.subscriber.flush()
        reader.take(DEFAULT_PREFETCH)
        assert {"quorum": DEFAULT_PREFETCH} == prefetches(node, settings)


# ---------------------------------------------------------------------- settlements out


def test_what_was_not_settled_comes_again(settings: Settings, peer: Peer) -> None:
    """To whoever consumes next, and only that."""
    with Reader(settings) as reader:
        reader.bind(BOX)
        reader.consume(BOX)
        peer.send_numbers("box", *range(5))
        deliveries = reader.take(5)
        reader.ack(deliveries[0], deliveries[2])
        assert reader.subscriber.close(5.0)
    with Reader(settings) as reader:
        reader.bind(BOX)
        reader.consume(BOX)
        again = reader.take(3)
        assert [(b"1", True), (b"3", True), (b"4", True)] == [
            (each.body, each.redelivered) for each in again
        ]


def test_acks_leave_although_nobody_waits(reader: Reader, peer: Peer) -> None:
    """The guard of the loop sends them, while this thread does something else."""
    reader.bind(BOX)
    reader.consume(BOX)
    peer.send_numbers("box", *range(3))
    reader.ack(*reader.take(3))
    # Nothing here touches the loop any more.
    wait_until(lambda: "0 unsettled" in repr(reader.subscriber))


def test_acks_that_are_to_leave_at_once_ask_for_one_round(reader: Reader, peer: Peer) -> None:
    """Several confirms that come together each ask for a flush; one takes all along."""
    reader.bind(BOX)
    reader.consume(BOX)
    peer.send_numbers("box", *range(6))
    deliveries = reader.take(6)
    posted: list[object] = []
    with mock.patch.object(reader.hub, "post", posted.append):
        for delivery in deliveries[:3]:
            reader.ack(delivery)
            reader.subscriber.flush()
    assert [reader.subscriber._collect, reader.subscriber._flush] == posted
    reader.hub.call(reader.subscriber._flush)
    reader.wait_for(lambda: "3 unsettled" in repr(reader.subscriber))
    for delivery in deliveries[3:]:  # it can be asked for again after that
        reader.ack(delivery)
        reader.subscriber.flush()
    reader.wait_for(lambda: "0 unsettled" in repr(reader.subscriber))


def test_a_refused_message_goes_to_the_error_queue(reader: Reader, peer: Peer) -> None:
    """REJECT dead-letters, where the queue says so."""
    reader.bind(QUORUM)
    reader.consume(QUORUM)
    peer.send("quorum", b"odd")
    reader.settle(Settlement.REJECT, *reader.take())
    wait_until(lambda: peer.count("quorum.error") == 1)
    assert b"odd" == peer.fetch("quorum.error")


def test_a_refused_message_is_dropped_where_there_is_no_error_queue(
    reader: Reader, peer: Peer
) -> None:
    """It is settled all the same, and does not come again."""
    reader.bind(BOX)
    reader.consume(BOX)
    peer.send_numbers("box", 1, 2)
    first, second = reader.take(2)
    reader.settle(Settlement.REJECT, first)
    reader.ack(second)
    assert reader.subscriber.close(5.0)
    assert 0 == peer.count("box")


def test_a_message_that_is_given_back_comes_again(reader: Reader, peer: Peer) -> None:
    """At once, also to another consumer."""
    reader.bind(BOX)
    reader.consume(BOX)
    peer.send_numbers("box", 1, 2)
    first, second = reader.take(2)
    reader.subscriber.give_back(first)
    [again] = reader.take()
    assert (b"1", True) == (again.body, again.redelivered)
    reader.ack(second, again)


@pytest.mark.parametrize("second", list(Settlement))
def test_a_second_settlement_changes_nothing(
    reader: Reader, peer: Peer, second: Settlement
) -> None:
    """The broker would close the channel over it (406), and with it all that is in flight."""
    reader.bind(BOX)
    reader.consume(BOX)
    peer.send_numbers("box", 1, 2)
    one, two = reader.take(2)
    reader.ack(one)
    reader.settle(second, one)
    reader.settle(Settlement.REQUEUE, two)
    reader.settle(second, two)
    [again] = reader.take()
    assert b"2" == again.body
    assert reader.subscriber.is_current(two)
    reader.ack(again)
    reader.settle(second, again)
    assert reader.subscriber.close(5.0)
    assert 0 == peer.count("box")


def test_a_delivery_of_an_older_channel_is_not_settled(
    far_reader: Reader, proxy: Proxy, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tag would name another message now; it comes again by itself."""
    far_reader.bind(BOX)
    far_reader.consume(BOX)
    peer.send_numbers("box", 1, 2, 3)
    old = far_reader.take(3)
    cut(proxy, far_reader)
    assert [False] * 3 == [far_reader.subscriber.is_current(each) for each in old]
    new = far_reader.take(3)
    assert [1, 2, 3] == [each.delivery_tag for each in new]
    far_reader.ack(*old)
    far_reader.settle(Settlement.REJECT, *old)
    far_reader.subscriber.give_back(old[0])
    far_reader.ack(*new[:2])
    assert far_reader.subscriber.close(5.0)
    assert 1 == peer.count("box")
    assert b"3" == peer.fetch("box")
    assert "PRECONDITION_FAILED" not in caplog.text


def test_an_outage_empties_the_inbox(far_reader: Reader, proxy: Proxy, peer: Peer) -> None:
    """What lies there is delivered again, and may not be handled twice."""
    far_reader.bind(BOX)
    far_reader.consume(BOX)
    peer.send_numbers("box", *range(5))
    far_reader.wait_for(lambda: len(far_reader.subscriber.inbox) == 5)
    cut(proxy, far_reader)
    deliveries = far_reader.take(5)
    assert [True] * 5 == [each.redelivered for each in deliveries]
    assert [] == list(far_reader.subscriber.inbox)


@pytest.mark.parametrize("way", Way, ids=lambda way: way.name)
def test_a_connection_that_ended_one_way_is_replaced(
    far_reader: Reader, proxy: Proxy, peer: Peer, way: Way
) -> None:
    """What was delivered on it comes again, and what is sent afterwards as well."""
    far_reader.bind(BOX)
    far_reader.consume(BOX)
    peer.send_numbers("box", 1)
    far_reader.take()
    losses = far_reader.connection.losses
    proxy.half_close(way)
    far_reader.wait_for(lambda: far_reader.connection.losses > losses)
    peer.send_numbers("box", 2)
    assert [b"1", b"2"] == sorted(far_reader.work(2))


def test_what_nobody_starts_goes_back(
    settings: Settings, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker would close the channel over it in the end; the warning names the remedy."""
    with Reader(settings, prefetch=4, unstarted_limit=0.2) as reader:
        reader.bind(BOX)
        reader.consume(BOX)
        peer.send_numbers("box", *range(5))
        [started] = reader.take()
        wait_until(lambda: "lower `prefetch` (now 4)" in caplog.text)
        reader.wait_for(lambda: any(each.redelivered for each in reader.subscriber.inbox))
        # What was started is not among it, and can be settled.
        assert reader.subscriber.is_current(started)
        reader.ack(started)
        assert reader.subscriber.close(5.0)
    assert "waited 0.2 s for a handler" in caplog.text
    assert 4 == peer.count("box")


# ------------------------------------------------------------------------------ topology


def queues(node: Node, settings: Settings) -> dict[str, tuple[str, bool, dict[str, Any]]]:
    """Ask the broker for the type, the durability and the arguments of each queue."""
    return {
        each.name: (each.type, each.durable, each.arguments)
        for each in node.queues(settings.vhost)
    }


def test_queues_are_declared_as_the_architecture_says(
    node: Node, reader: Reader
) -> None:
    """Arguments cannot be changed in the field, so they are part of the contract."""
    for spec in (
        queue_spec("orders"),
        queue_spec("old", compat=True),
        queue_spec(
            {"name": "verbatim", "flags": {"durable": True, "arguments": {"x-expires": 900_000}}}
        ),
        Queue("passing", expires=60, ttl=1.5, max_length=10, exclusive=True).spec(),
    ):
        reader.bind(spec)
    named = {
        "x-queue-type": "quorum",
        "x-delivery-limit": 50,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "orders.error",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    assert {
        "orders": ("quorum", True, named),
        "orders.error": (
            "quorum",
            True,
            {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1},
        ),
        "old": ("classic", False, {}),
        "verbatim": ("classic", True, {"x-expires": 900_000}),
        "passing": (
            "classic",
            False,
            {
                "x-queue-type": "classic",
                "x-expires": 60_000,
                "x-message-ttl": 1500,
                "x-max-length": 10,
            },
        ),
    } == queues(node, reader.connection.settings)


def test_the_queues_of_an_application_are_declared_as_the_architecture_says(
    node: Node, settings: Settings
) -> None:
    """The shared one is a named queue; those of a host and of an instance expire."""
    fingerprint = {"name": "app", "pid": "17", "host": "host"}
    application = GenericApplication(fingerprint)
    try:
        found = queues(node, settings)
    finally:
        application.close()
    assert ("quorum", "app.error") == (
        found["app"][0],
        found["app"][2]["x-dead-letter-routing-key"],
    )
    assert {"app", "app.error", "app@host", "app.17@host"} == set(found)
    classic = {"x-queue-type": "classic"}
    assert ("classic", True, {**classic, "x-expires": 604_800_000}) == found["app@host"]
    assert ("classic", True, {**classic, "x-expires": 600_000}) == found["app.17@host"]


def test_the_type_of_named_queues_can_be_chosen(
    node: Node, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POSTAGE_QUEUE_TYPE=classic, for brokers that have no quorum queues to spare."""
    monkeypatch.setenv("POSTAGE_QUEUE_TYPE", "classic")
    reader.bind(queue_spec("orders"))
    dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "orders.error"}
    assert {
        "orders": ("classic", True, {"x-queue-type": "classic", **dead}),
        "orders.error": ("classic", True, {"x-queue-type": "classic"}),
    } == queues(node, reader.connection.settings)


def test_what_is_sent_after_the_binding_is_kept(reader: Reader, peer: Peer) -> None:
    """Consuming may begin much later, also on a queue that has no name."""
    for spec in (BOX, NAMELESS):
        reader.bind(spec, "key", LETTERS)
    peer.send("key", b"early", exchange="letters")
    reader.consume(BOX, NAMELESS)
    assert [b"early"] * 2 == reader.work(2)


def test_a_nameless_queue_may_have_many_bindings(
    node: Node, reader: Reader, peer: Peer
) -> None:
    """They lead to one queue."""
    for key in ("a", "b", "c"):
        reader.bind(NAMELESS, key, LETTERS)
    reader.consume(NAMELESS)
    for key in ("a", "b", "c"):
        peer.send(key, key.encode(), exchange="letters")
    assert [b"a", b"b", b"c"] == reader.work(3)
    assert 1 == len(queues(node, reader.connection.settings))


def test_a_nameless_queue_gets_a_new_name_after_an_outage(
    far_reader: Reader, proxy: Proxy, peer: Peer
) -> None:
    """And all its bindings."""
    for key in ("a", "b"):
        far_reader.bind(NAMELESS, key, LETTERS)
    far_reader.consume(NAMELESS)
    before = far_reader.subscriber.topology.name_of(NAMELESS)
    assert before.startswith("amq.gen-")
    cut(proxy, far_reader)
    after = far_reader.subscriber.topology.name_of(NAMELESS)
    assert after.startswith("amq.gen-")
    assert before != after
    peer.send("a", b"a", exchange="letters")
    peer.send("b", b"b", exchange="letters")
    assert [b"a", b"b"] == far_reader.work(2)


def test_a_nameless_queue_outlives_its_channel(
    node: Node, reader: Reader, peer: Peer
) -> None:
    """A channel that is lost alone costs no messages."""
    reader.bind(NAMELESS, "key", LETTERS)
    reader.bind(BOX)
    reader.consume(NAMELESS, BOX)
    name = reader.subscriber.topology.name_of(NAMELESS)
    reader.break_channel()
    peer.send("key", b"early", exchange="letters")
    reader.wait_for(lambda: reader.subscriber.consuming)
    assert name == reader.subscriber.topology.name_of(NAMELESS)
    assert {name, "box"} == set(queues(node, reader.connection.settings))
    peer.send("key", b"late", exchange="letters")
    assert [b"early", b"late"] == reader.work(2)


def test_a_nameless_queue_that_was_deleted_is_made_anew(reader: Reader, peer: Peer) -> None:
    """With its bindings, as any other."""
    reader.bind(NAMELESS, "key", LETTERS)
    reader.consume(NAMELESS)
    before = reader.subscriber.topology.name_of(NAMELESS)
    reader.connection.ask(lambda channel: deleting(channel, before), DEADLINE, "delete")
    reader.wait_for(lambda: reader.subscriber.topology.name_of(NAMELESS) != before)
    reader.wait_for(lambda: reader.subscriber.consuming)
    peer.send("key", b"hello", exchange="letters")
    assert [b"hello"] == reader.work(1)


def deleting(channel: Any, queue: str) -> Any:
    yield partial(channel.queue_delete, queue)


def test_the_topology_is_put_back_after_an_outage(
    far_reader: Reader, proxy: Proxy, peer: Peer
) -> None:
    """Exchanges, queues and bindings that somebody deleted meanwhile, in an order that works."""
    other = ExchangeSpec("other", "topic")
    for queue, key, exchange in (
        (BOX, "a", LETTERS),
        (CRATE, "a", LETTERS),
        (BOX, "b", LETTERS),
        (BOX, "#", other),
        (QUORUM, "c", LETTERS),
    ):
        far_reader.bind(queue, key, exchange)
    far_reader.consume(BOX, CRATE, QUORUM)
    with proxy.outage():
        far_reader.wait_for(lambda: far_reader.connection.losses)
        for name in ("letters", "other"):
            peer.channel.exchange_delete(name)
        for name in ("box", "crate", "quorum", "quorum.error"):
            peer.channel.queue_delete(name)
    far_reader.wait_for(lambda: far_reader.subscriber.consuming)
    for key in ("a", "b", "c"):
        peer.send(key, key.encode(), exchange="letters")
    peer.send("any", b"topic", exchange="other")
    deliveries = far_reader.take(5)
    assert [
        (b"a", "box"),
        (b"a", "crate"),
        (b"b", "box"),
        (b"c", "quorum"),
        (b"topic", "box"),
    ] == sorted((each.body, each.queue.name) for each in deliveries)
    far_reader.ack(*deliveries)
    assert 0 == peer.count("quorum.error")


def test_a_binding_that_was_taken_back_stays_so(
    far_reader: Reader, proxy: Proxy, peer: Peer
) -> None:
    """A durable queue keeps its bindings, so an outage must not bring one back."""
    far_reader.bind(BOX, "a", LETTERS)
    far_reader.bind(BOX, "b", LETTERS)
    far_reader.consume(BOX)
    far_reader.unbind(BOX, "a", LETTERS)
    assert not peer.routes("letters", "a")
    with proxy.outage():
        far_reader.wait_for(lambda: far_reader.connection.losses)
        # As an older instance of the program would, which did not hear of it.
        peer.channel.queue_bind("box", "letters", "a")
        peer.channel.queue_unbind("box", "letters", "b")
    far_reader.wait_for(lambda: far_reader.subscriber.consuming)
    assert [False, True] == [peer.routes("letters", key) for key in "ab"]
    far_reader.bind(BOX, "a", LETTERS)
    cut(proxy, far_reader)
    assert [True, True] == [peer.routes("letters", key) for key in "ab"]


def test_a_binding_can_be_taken_back_that_is_not_there(reader: Reader) -> None:
    """As RabbitMQ itself allows."""
    reader.bind(BOX, "a", LETTERS)
    reader.unbind(BOX, "b", LETTERS)


def test_a_mismatching_queue_is_explained(reader: Reader, peer: Peer) -> None:
    """The error has the broker's words, all that was asked, and the ways out."""
    peer.channel.queue_declare("quorum", durable=True)
    with pytest.raises(QueueMismatchError) as caught:
        reader.bind(QUORUM)
    text = str(caught.value)
    assert 406 == caught.value.code
    assert text.startswith("declare queue 'quorum' (durable, x-queue-type='quorum', ")
    assert "x-delivery-limit=50" in text
    assert "inequivalent arg 'x-" in text
    assert "POSTAGE_QUEUE_TYPE=classic" in text
    assert "POSTAGE_ON_MISMATCH=adopt" in text


def test_a_mismatching_error_queue_is_explained(reader: Reader, peer: Peer) -> None:
    """It is that one which the error names."""
    peer.channel.queue_declare("quorum.error", durable=True)
    with pytest.raises(QueueMismatchError, match=r"declare queue 'quorum\.error' \(durable, "):
        reader.bind(QUORUM)


def test_a_mismatching_exchange_is_explained(reader: Reader, peer: Peer) -> None:
    """As a queue."""
    peer.channel.exchange_declare("letters", "fanout", durable=True)
    with pytest.raises(ExchangeMismatchError) as caught:
        reader.bind(BOX, "key", LETTERS)
    text = str(caught.value)
    assert text.startswith("declare exchange 'letters' (direct, durable): the broker answered 406")
    assert "POSTAGE_ON_MISMATCH=adopt" in text


def test_what_mismatches_can_be_adopted(
    far_reader: Reader,
    proxy: Proxy,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Exchange, queue and error queue are used as they are, with a warning, and after an outage."""
    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adopt")
    peer.channel.exchange_declare("letters", "fanout", durable=True)
    peer.channel.queue_declare("quorum", durable=True)
    peer.channel.queue_declare("quorum.error", durable=True)
    far_reader.bind(QUORUM, "key", LETTERS)
    far_reader.consume(QUORUM)
    for name in ("declare exchange 'letters'", "declare queue 'quorum'", "'quorum.error'"):
        assert name in caplog.text
    assert "used as it is" in caplog.text
    caplog.clear()
    cut(proxy, far_reader)
    assert "PRECONDITION_FAILED" not in caplog.text
    peer.send("whatever", b"hello", exchange="letters")
    assert [b"hello"] == far_reader.work(1)


def test_what_was_adopted_and_then_deleted_is_made_as_it_should_be(
    node: Node, reader: Reader, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to mend a mismatch is to delete the queue, also while it is consumed."""
    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adopt")
    peer.channel.queue_declare("quorum", durable=True)
    reader.bind(QUORUM, "key", LETTERS)
    reader.consume(QUORUM)
    peer.channel.queue_delete("quorum")
    reader.wait_for(lambda: not reader.subscriber.consuming)
    reader.wait_for(lambda: reader.subscriber.consuming)
    assert "quorum" == queues(node, reader.connection.settings)["quorum"][0]
    assert peer.routes("letters", "key")


class Contrary:
    """A connection to a broker where a queue comes and goes, always at the wrong moment."""

    def __init__(self) -> None:
        self.rounds = 0

    def probe(self, script: Callable[[Any], Any], done: Callable[..., None]) -> None:
        self.rounds += 1
        assert self.rounds < 10, "it goes on for ever"
        requests = script(SimpleNamespace(connection=self, queue_declare=print))
        passive = next(requests).keywords["passive"]
        refusal = (404, "NOT_FOUND - no queue") if passive else (406, "inequivalent arg 'durable'")
        try:
            requests.throw(ChannelClosedError(*refusal))
        except TransportError as error:
            done(None, error)

    def ask(self, script: Callable[[Any], Any], _timeout: float | None, _what: str) -> None:
        errors: list[TransportError] = []
        self.probe(script, lambda _result, error: errors.append(error))
        raise errors[0]


def test_what_is_learned_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adopted, then gone, then another one again: the same answer comes for ever."""
    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adopt")
    connection = Contrary()
    ledger = Ledger(connection)  # type: ignore[arg-type]
    with pytest.raises(QueueMismatchError):
        ledger.bind(Binding(DEFAULT, BOX, ""), DEADLINE)
    assert 3 == connection.rounds


def test_what_is_learned_twice_after_an_outage_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried for ever without a pause."""
    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adopt")
    connection = Contrary()
    ledger = Ledger(connection)  # type: ignore[arg-type]
    ledger._steps["queue", BOX] = lambda channel: ledger._declare_queue(channel, BOX)
    errors: list[TransportError | None] = []
    ledger.replay(errors.append)
    assert [QueueMismatchError] == [type(error) for error in errors]
    assert 3 == connection.rounds


def test_a_limit_is_no_mismatch_that_could_be_adopted(
    rabbitmq_node: RabbitNode, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The binding fails at once, and nothing is declared again and again."""
    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adopt")
    limit = '{"max-queues": 0}'
    rabbitmq_node.ctl("set_vhost_limits", "-p", broker_url.rsplit("/", 1)[1], limit)
    with (
        Reader(Settings.from_environment()) as reader,
        pytest.raises(ChannelClosedError, match=r"queue limit .* is reached\. Raise the limit"),
    ):
        reader.bind(BOX)


def test_a_queue_of_another_connection_is_refused_with_advice(reader: Reader) -> None:
    """An exclusive queue that two programs claim."""
    spec = Queue("mine", exclusive=True).spec()
    with Reader(replace(reader.connection.settings, heartbeat=59)) as other:
        other.bind(spec)
        with pytest.raises(ChannelClosedError, match="give each instance its own name") as caught:
            reader.bind(spec)
    assert 405 == caught.value.code


def test_without_a_broker_a_binding_fails_in_time() -> None:
    """The error says what was attempted."""
    with Reader(Settings((("127.0.0.1", 1),), "/", "guest", "guest")) as reader:
        binding = Binding(LETTERS, BOX, "key")
        told = "bind queue 'box' to 'letters': no connection to amqp://"
        with pytest.raises(ConnectionFailedError, match=told):
            reader.subscriber.topology.bind(binding, 0.2)


# --------------------------------------------------------------------------- going on


def test_a_queue_that_somebody_else_declared_can_be_consumed(reader: Reader, peer: Peer) -> None:
    """Also if that happens later."""
    reader.subscriber.consume(BOX)
    reader.wait_for(lambda: reader.subscriber._failures > 0)
    peer.channel.queue_declare("box")
    peer.send("box", b"hello")
    assert [b"hello"] == reader.work(1)


def test_a_queue_that_was_replaced_during_an_outage_is_reported_and_waited_for(
    far_reader: Reader, proxy: Proxy, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody made a mistake, and as soon as it is mended everything goes on."""
    far_reader.bind(QUORUM, "key", LETTERS)
    far_reader.consume(QUORUM)
    with proxy.outage():
        far_reader.wait_for(lambda: far_reader.connection.losses)
        peer.channel.queue_delete("quorum")
        peer.channel.queue_declare("quorum", durable=True)
    far_reader.wait_for(lambda: "declare queue 'quorum' (durable, x-queue-type=" in caplog.text)
    assert not far_reader.subscriber.consuming
    peer.channel.queue_delete("quorum")
    far_reader.wait_for(lambda: far_reader.subscriber.consuming)
    peer.send("key", b"hello", exchange="letters")
    assert [b"hello"] == far_reader.work(1)


def test_what_cannot_be_put_back_and_costs_the_connection_is_reported_and_tried_again(
    reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an upgrade of the broker; when that is mended, consuming goes on."""
    reader.bind(BOX)
    reader.consume(BOX)
    is_mended: list[bool] = []
    strange = ExchangeSpec("strange", "x-nobody-knows-this")

    def declaring(channel: Any) -> Any:
        yield from declare_exchange(channel, LETTERS if is_mended else strange)

    reader.subscriber.topology._steps["exchange", strange] = declaring
    reader.hub.call(lambda: reader.connection.abort(ConnectionLostError("on purpose")))
    told = "declare exchange 'strange' (x-nobody-knows-this, durable): the broker closed the "
    reader.wait_for(lambda: sum(told in each for each in caplog.messages) >= 2)
    assert not reader.subscriber.consuming
    is_mended.append(True)
    reader.wait_for(lambda: reader.subscriber.consuming)


@pytest.mark.parametrize("spec", [BOX, QUORUM], ids=["classic", "quorum"])
def test_a_queue_that_is_deleted_under_its_consumer_comes_back(
    reader: Reader, peer: Peer, spec: QueueSpec, caplog: pytest.LogCaptureFixture
) -> None:
    """Queue, bindings and consumer; the log says what happened."""
    reader.bind(spec, "key", LETTERS)
    reader.consume(spec)
    peer.channel.queue_delete(spec.name)
    reader.wait_for(lambda: not reader.subscriber.consuming)
    reader.wait_for(lambda: reader.subscriber.consuming)
    assert f"the broker cancelled consuming '{spec.name}'" in caplog.text
    peer.send("key", b"hello", exchange="letters")
    assert [b"hello"] == reader.work(1)


def test_the_other_queues_go_on_when_one_is_deleted(reader: Reader, peer: Peer) -> None:
    """Neither their messages in hand nor those that come meanwhile come twice."""
    reader.bind(BOX)
    reader.bind(CRATE)
    reader.consume(BOX, CRATE)
    peer.send_numbers("box", 1, 2)
    first, second = reader.take(2)
    reader.ack(first)
    peer.channel.queue_delete("crate")
    reader.wait_for(lambda: not reader.subscriber.consuming)
    reader.wait_for(lambda: reader.subscriber.consuming)
    assert reader.subscriber.is_current(second)
    reader.ack(second)
    peer.send_numbers("box", 3)
    peer.send_numbers("crate", 4)
    assert {b"3", b"4"} == set(reader.work(2))
    reader.subscriber.close(DEADLINE)
    assert 0 == peer.count("box")


def test_consuming_can_be_stopped_and_begun_again(reader: Reader, peer: Peer) -> None:
    """All queues, and as often as one likes."""
    reader.bind(BOX)
    reader.bind(QUORUM)
    for number in range(3):
        reader.consume(BOX, QUORUM)
        peer.send_numbers("box", number)
        peer.send_numbers("quorum", number)
        reader.work(2)
        reader.subscriber.stop()
        reader.wait_for(reader.subscriber.stopped)
        assert not reader.subscriber.consuming
        # That of a quorum queue lags behind its cancel-ok.
        wait_until(lambda: [0, 0] == [peer.consumers(name) for name in ("box", "quorum")])


def test_one_queue_can_be_stopped_and_begun_again(reader: Reader, peer: Peer) -> None:
    """The others go on meanwhile."""
    reader.bind(BOX)
    reader.bind(CRATE)
    reader.consume(BOX, CRATE)
    reader.subscriber.stop(BOX)
    peer.send_numbers("box", 1)
    peer.send_numbers("crate", 2)
    assert [b"2"] == reader.work(1)
    wait_until(lambda: peer.consumers("box") == 0)
    assert 1 == peer.count("box")
    reader.consume(BOX)
    assert [b"1"] == reader.work(1)


def test_a_consumer_that_is_stopped_before_it_began_is_not_live(reader: Reader, peer: Peer) -> None:
    """The broker's consent comes after we changed our mind."""
    reader.bind(BOX)
    reader.bind(CRATE)
    reader.consume(CRATE)

    def change_its_mind() -> None:
        reader.subscriber._consume(BOX)
        reader.subscriber._stop(None)

    reader.hub.call(change_its_mind)
    wait_until(lambda: peer.consumers("crate") == 0)
    reader.wait_for(reader.subscriber.stopped)
    assert not reader.subscriber.consuming
    assert 0 == peer.consumers("box")


def test_nothing_comes_in_after_the_stop(reader: Reader, peer: Peer) -> None:
    """And what was on its way is back in its queue."""
    reader.bind(BOX)
    reader.consume(BOX)
    for round_ in range(20):
        peer.send_numbers("box", *range(10))
        reader.subscriber.stop()
        reader.wait_for(reader.subscriber.stopped)
        inbox = list(reader.subscriber.inbox)
        wait_until(lambda: peer.count("box") == 10 - len(inbox))  # noqa: B023
        assert inbox == list(reader.subscriber.inbox), round_
        reader.consume(BOX)
        reader.work(10)


def test_a_prefetch_that_amqp_does_not_know_ends_the_consumer(settings: Settings) -> None:
    """The thread that waits for messages learns it, and need not wait for ever."""
    with Reader(settings, prefetch=70_000) as reader:
        reader.bind(BOX)
        reader.subscriber.consume(BOX)
        reader.wait_for(lambda: reader.subscriber.failure)
        assert isinstance(reader.subscriber.failure, TransportError)
        assert not reader.subscriber.consuming


def test_a_setting_that_makes_no_sense_does_not_end_the_consumer(
    far_reader: Reader,
    proxy: Proxy,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It may be read as late as after an outage, and then it is reported."""
    far_reader.bind(BOX)
    far_reader.consume(BOX)
    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adpot")
    with proxy.outage():
        far_reader.wait_for(lambda: far_reader.connection.losses)
        peer.channel.queue_delete("box")
        peer.channel.queue_declare("box")
    far_reader.wait_for(lambda: "POSTAGE_ON_MISMATCH is 'adpot'" in caplog.text)
    peer.channel.queue_delete("box")
    far_reader.wait_for(lambda: far_reader.subscriber.consuming)


# --------------------------------------------------------------------- exclusive consumers


def test_an_exclusive_consumer_takes_over_when_its_holder_goes(
    settings: Settings, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """Until then it tries again, and says so once.

    A restarted program meets its own former connection so.
    """
    with Reader(replace(settings, heartbeat=59)) as heir:
        with Reader(settings) as holder:
            holder.bind(UID)
            holder.consume(UID)
            heir.bind(UID)
            heir.subscriber.consume(UID)
            heir.wait_for(lambda: heir.subscriber._failures > 1)
            assert not heir.subscriber.consuming
            assert None is heir.subscriber.failure
        heir.wait_for(lambda: heir.subscriber.consuming)
        [warning] = [each for each in caplog.messages if "trying again for 236 s" in each]
        assert warning.startswith("consume queue 'uid': the broker answered 403 ")
        assert "Two processes claim this queue, or" in warning
        peer.send("uid", b"hello")
        assert [b"hello"] == heir.work(1)


def test_a_user_who_may_not_read_is_told_so_at_once(
    rabbitmq_node: RabbitNode, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the queue and the permission; somebody may give it."""
    vhost = broker_url.rsplit("/", 1)[1]
    node, settings = rabbitmq_node, Settings.from_environment()
    node.add_user("writer", "pass", vhost)
    try:
        with (
            Reader(replace(settings, user="writer", password="pass")) as reader,
            Reader(settings) as other,
        ):
            other.bind(BOX)
            node.ctl("set_permissions", "-p", vhost, "writer", ".*", ".*", "^$")
            reader.bind(BOX)
            reader.subscriber.consume(BOX)
            reader.wait_for(lambda: reader.subscriber._failures > 1)
            [warning] = [each for each in caplog.messages if each.startswith("consume queue 'box'")]
            assert "The user may not read it: check its permissions; trying again for" in warning
            node.ctl("set_permissions", "-p", vhost, "writer", ".*", ".*", ".*")
            reader.wait_for(lambda: reader.subscriber.consuming)
    finally:
        node.delete_user("writer")


@pytest.mark.slow
def test_two_programs_that_claim_one_queue_are_told_so(settings: Settings) -> None:
    """After four heartbeats nobody can believe in a former connection any more."""
    with Reader(settings) as holder, Reader(replace(settings, heartbeat=1)) as heir:
        holder.bind(UID)
        holder.consume(UID)
        heir.bind(UID)
        heir.subscriber.consume(UID)
        heir.wait_for(lambda: heir.subscriber.failure)
        assert isinstance(heir.subscriber.failure, ChannelClosedError)
        assert 403 == heir.subscriber.failure.code
        told = "consume queue 'uid', tried for 4 s: the broker answered 403 ACCESS_REFUSED"
        assert told in str(heir.subscriber.failure)
        assert "Two processes claim this queue" in str(heir.subscriber.failure)


@pytest.mark.slow
def test_a_refusal_is_not_counted_from_the_time_before(settings: Settings) -> None:
    """A program that began to consume late has as much patience as any other."""
    with Reader(settings) as holder, Reader(replace(settings, heartbeat=1)) as heir:
        holder.bind(UID)
        holder.consume(UID)
        heir.bind(UID)
        passed: list[bool] = []
        heir.hub.call(lambda: heir.hub.call_later(4.1, lambda: passed.append(True)))
        heir.wait_for(lambda: passed)
        heir.subscriber.consume(UID)
        heir.wait_for(lambda: heir.subscriber._failures > 0)
        assert None is heir.subscriber.failure


def test_a_refused_login_ends_the_consumer(settings: Settings) -> None:
    """The thread that waits for messages learns it."""
    with Reader(replace(settings, password="letmein")) as reader:
        heard: list[object] = []
        reader.subscriber.on_delivery = lambda: heard.append(reader.subscriber.failure)
        reader.subscriber.consume(BOX)
        reader.wait_for(lambda: reader.subscriber.failure)
        assert isinstance(reader.subscriber.failure, ConnectionFailedError)
        assert heard


# ------------------------------------------------------------------------------- the end


def test_acks_are_sent_before_the_close(settings: Settings, peer: Peer) -> None:
    """And True means that the broker took them."""
    for _ in range(10):
        with Reader(settings) as reader:
            reader.bind(BOX)
            reader.consume(BOX)
            peer.send_numbers("box", *range(5))
            reader.ack(*reader.take(5))
            assert reader.subscriber.close(5.0)
        assert 0 == peer.count("box")


def test_a_close_without_an_answer_does_not_claim_consent(
    far_reader: Reader, proxy: Proxy, peer: Peer
) -> None:
    """Nobody knows what became of the acks."""
    far_reader.bind(BOX)
    far_reader.consume(BOX)
    proxy.hold_answers()
    assert not far_reader.subscriber.close(0.2)
    proxy.release_answers()
    wait_until(lambda: peer.consumers("box") == 0)


def test_a_close_during_an_outage_does_not_claim_consent(far_reader: Reader, proxy: Proxy) -> None:
    """It returns at once: what was decided will be decided again by somebody else."""
    far_reader.bind(BOX)
    far_reader.consume(BOX)
    with proxy.outage():
        far_reader.wait_for(lambda: far_reader.connection.losses)
        assert not far_reader.subscriber.close(DEADLINE)


def test_a_close_that_the_broker_answers_with_an_error_is_no_consent(
    reader: Reader, peer: Peer
) -> None:
    """What was written behind the offence was not looked at."""
    reader.bind(BOX)
    reader.consume(BOX)
    peer.send_numbers("box", 1)
    [delivery] = reader.take()
    agreed: list[bool] = []

    def offend() -> None:
        assert reader.subscriber._channel is not None
        reader.subscriber._channel.basic_ack(1000)
        reader.subscriber._acked.add(delivery.delivery_tag)
        reader.subscriber._close(agreed)

    reader.hub.call(offend)
    reader.wait_for(lambda: agreed)
    assert [False] == agreed
    wait_until(lambda: peer.count("box") == 1)


def test_an_outage_while_leaving_is_no_consent(
    far_reader: Reader, proxy: Proxy, peer: Peer
) -> None:
    """What was decided before it is lost, though the channel that came after it closes well."""
    far_reader.bind(BOX)
    far_reader.consume(BOX)
    peer.send_numbers("box", 1)
    [delivery] = far_reader.take()
    far_reader.subscriber.stop()
    far_reader.wait_for(far_reader.subscriber.stopped)
    losses = far_reader.connection.losses
    proxy.cut()
    far_reader.wait_for(lambda: far_reader.connection.losses > losses)
    far_reader.wait_for(lambda: far_reader.subscriber._channel is not None)
    far_reader.ack(delivery)
    assert not far_reader.subscriber.close(5.0)
    assert 1 == peer.count("box")


def test_who_never_consumed_closes_at_once(reader: Reader) -> None:
    """There is nothing that the broker could disagree with."""
    reader.bind(BOX)
    assert reader.subscriber.close(5.0)


def test_a_second_close_is_no_consent(reader: Reader) -> None:
    """It settles nothing."""
    reader.bind(BOX)
    reader.consume(BOX)
    assert reader.subscriber.close(5.0)
    assert not reader.subscriber.close(5.0)


def test_consuming_goes_on_after_an_unclean_close(
    far_reader: Reader, proxy: Proxy, peer: Peer
) -> None:
    """A restart that may not happen leaves a component that works."""
    far_reader.bind(BOX)
    far_reader.bind(QUORUM)
    far_reader.consume(BOX, QUORUM)
    far_reader.subscriber.stop()
    far_reader.wait_for(far_reader.subscriber.stopped)
    proxy.hold_answers()
    assert not far_reader.subscriber.close(0.2)
    proxy.release_answers()
    far_reader.subscriber.resume()
    far_reader.wait_for(lambda: far_reader.subscriber.consuming)
    peer.send_numbers("box", 1)
    peer.send_numbers("quorum", 1)
    far_reader.work(2)
    assert far_reader.subscriber.close(5.0)
    assert [0, 0] == [peer.count(name) for name in ("box", "quorum")]


def test_after_a_resume_each_queue_is_consumed_once(
    node: Node, reader: Reader, peer: Peer
) -> None:
    """Also if it was about to be consumed anew when it was closed."""
    reader.bind(BOX)
    reader.consume(BOX)
    reader.break_channel()
    assert not reader.subscriber.close(5.0)
    reader.subscriber.resume()
    reader.wait_for(lambda: reader.subscriber.consuming)
    fired: list[bool] = []
    reader.hub.call(lambda: reader.hub.call_later(1.0, lambda: fired.append(True)))
    reader.wait_for(lambda: fired)  # the pause of the former attempt is over by then
    assert 1 == peer.consumers("box")
    # One is the peer's.
    wait_until(lambda: 1 + 1 == channel_count(node, reader.connection.settings))


def test_a_closed_subscriber_leaves_no_channel(
    node: Node, settings: Settings
) -> None:
    """Also if it was closed before its channel was there."""
    with Reader(settings) as reader, Reader(settings) as other:
        other.bind(BOX)
        agreed: list[bool] = []

        def hurry() -> None:
            reader.subscriber._consume(BOX)
            reader.subscriber._close(agreed)

        reader.hub.call(hurry)
        reader.wait_for(lambda: agreed)
        other.bind(BOX)
        wait_until(lambda: channel_count(node, settings) == 0)


def test_two_subscribers_share_a_connection(settings: Settings, peer: Peer) -> None:
    """Each has a channel, and settles its own messages only."""
    with Reader(settings) as one, Reader(settings) as two:
        assert one.connection is two.connection
        one.bind(BOX)
        two.bind(CRATE)
        one.consume(BOX)
        two.consume(CRATE)
        peer.send_numbers("box", *range(5))
        peer.send_numbers("crate", *range(5))
        one.ack(*one.take(5))
        two.take(5)
        assert one.subscriber.close(5.0)
        assert two.subscriber.close(5.0)
    assert [0, 5] == [peer.count(name) for name in ("box", "crate")]


@pytest.mark.slow
def test_nothing_is_lost_or_left_over_in_a_bad_network(
    settings: Settings, far_reader: Reader, proxy: Proxy, peer: Peer
) -> None:
    """Whatever is cut and whenever, each message is handled, and the queue is empty in the end."""
    far_reader.bind(QUORUM)
    far_reader.consume(QUORUM)
    peer.send_numbers("quorum", *range(500))
    seen: set[int] = set()
    cuts = iter((7, 50, 200, 400))
    next_cut = next(cuts)
    while len(seen) < 500:
        [delivery] = far_reader.take()
        seen.add(int(delivery.body))
        far_reader.ack(delivery)
        if len(seen) >= next_cut:
            proxy.cut()
            next_cut = next(cuts, 1000)

    def drain() -> bool:
        while far_reader.subscriber.inbox:
            far_reader.ack(far_reader.subscriber.inbox.popleft())
        return "0 waiting, 0 unsettled" in repr(far_reader.subscriber) and not peer.count("quorum")

    wait_until(drain)
    assert far_reader.subscriber.close(5.0)
    assert 0 == peer.count("quorum")
    assert 0 == peer.count("quorum.error")


#: Erlang: a queue as it is while the node is down that it is on, and as it is afterwards.
HIDE = 'mnesia:dirty_delete(rabbit_queue, rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)).'
SHOW = """
    [Q] = mnesia:dirty_read(rabbit_durable_queue,
                            rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)),
    mnesia:dirty_write(rabbit_queue, amqqueue:set_decorators(Q, [])).
"""


def change_queue(node: RabbitNode, expression: str, settings: Settings, queue: QueueSpec) -> None:
    node.ctl("eval", expression.format(vhost=settings.vhost, queue=queue.name))


def test_a_queue_whose_node_is_down_holds_up_no_other(
    rabbitmq_node: RabbitNode,
    reader: Reader,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A classic queue is on one node of a cluster; the queues that others have go on."""
    # Given
    for queue in (BOX, CRATE):
        reader.bind(queue, queue.name, LETTERS)
    reader.consume(BOX, CRATE)

    # When
    change_queue(rabbitmq_node, HIDE, settings, BOX)
    rabbitmq_node.close_connections("its node is down", settings.vhost)

    # Then
    with Peer(rabbitmq_node.url_of(settings.vhost)) as peer:
        peer.send("crate", b"to the other", exchange="letters")
        assert [b"to the other"] == reader.work(1)
        change_queue(rabbitmq_node, SHOW, settings, BOX)
        reader.wait_for(lambda: reader.subscriber.consuming)
        peer.send("box", b"to the one", exchange="letters")
        assert [b"to the one"] == reader.work(1)
    assert 1 == caplog.text.count("going on without queue 'box'"), caplog.text


def test_a_queue_whose_node_is_down_is_consumed_when_it_is_back(
    rabbitmq_node: RabbitNode, reader: Reader, peer: Peer, settings: Settings
) -> None:
    """A component can start meanwhile."""
    # Given
    peer.channel.queue_declare("box", durable=True, arguments=dict(BOX.arguments))
    change_queue(rabbitmq_node, HIDE, settings, BOX)

    # When
    for queue in (BOX, CRATE):
        reader.bind(queue, queue.name, LETTERS)
        reader.subscriber.consume(queue)

    # Then
    peer.send("crate", b"to the other", exchange="letters")
    assert [b"to the other"] == reader.work(1)
    assert not peer.routes("letters", "box")
    change_queue(rabbitmq_node, SHOW, settings, BOX)
    reader.wait_for(lambda: reader.subscriber.consuming)
    peer.send("box", b"to the one", exchange="letters")
    assert [b"to the one"] == reader.work(1)
