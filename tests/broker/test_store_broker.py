# SPDX-License-Identifier: MIT
"""What the embedded broker has confirmed is there after it was killed, as far as it is durable."""

from __future__ import annotations

import contextlib
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pika
import pytest
from pika import spec
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.select_connection import SelectConnection

from postage.broker import Broker, StoreError
from tests.broker import wire
from tests.broker.test_bad_input import small_broker
from tests.broker.wire import RawClient, method
from tests.embedded_node import EmbeddedNode
from tests.waiting import wait_until

PERSISTENT = pika.BasicProperties(delivery_mode=2)
TRANSIENT = pika.BasicProperties(delivery_mode=1)
QUORUM = {"x-queue-type": "quorum"}
#: What is published in each round until the broker is killed, and how much is under way.
MESSAGES = 20_000
WINDOW = 2_000


@contextlib.contextmanager
def confirming(url: str) -> Iterator[BlockingChannel]:
    """A channel whose publishings return when they are confirmed; its broker may be killed."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()
    yield channel
    with contextlib.suppress(pika.exceptions.AMQPError):
        connection.close()


def publish(
    channel: BlockingChannel,
    body: bytes = b"x",
    queue: str = "q",
    properties: pika.BasicProperties = PERSISTENT,
) -> None:
    channel.basic_publish("", queue, body, properties)


def get(channel: BlockingChannel, queue: str = "q", auto_ack: bool = True) -> Any:
    """Return method, properties and body of a message, or None for each."""
    return channel.basic_get(queue, auto_ack)


def count(channel: BlockingChannel, queue: str = "q") -> int:
    number: int = channel.queue_declare(queue, passive=True).method.message_count
    return number


def drain(channel: BlockingChannel, queue: str = "q") -> list[bytes]:
    """Return the bodies of all that waits in a queue."""
    number = count(channel, queue)
    bodies: list[bytes] = []
    tag = channel.basic_consume(queue, lambda *args: bodies.append(args[3]), auto_ack=True)

    def look() -> bool:
        channel.connection.process_data_events(0)
        return len(bodies) >= number

    wait_until(look)
    channel.basic_cancel(tag)
    return bodies


class Publisher:
    """A client of pika that publishes to a queue as fast as it is confirmed.

    Args:
        on_confirms: called with the number of confirms so far, after each of them.
    """

    def __init__(self, url: str, on_confirms: Callable[[int], None]) -> None:
        self.confirmed: set[int] = set()
        self.published = 0
        self._on_confirms = on_confirms
        self._unconfirmed: list[int] = []
        self._channel: Any = None
        self._connection = SelectConnection(
            pika.URLParameters(url),
            on_open_callback=self._connected,
            on_open_error_callback=self._ended,
            on_close_callback=self._ended,
        )

    def run(self) -> None:
        """Publish until the connection ends."""
        self._connection.ioloop.start()
        self._connection.ioloop.close()

    def _ended(self, _connection: Any, _error: Any) -> None:
        self._connection.ioloop.stop()

    def _connected(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._opened)

    def _opened(self, channel: Any) -> None:
        self._channel = channel
        channel.confirm_delivery(self._confirmed, lambda _: self._fill())

    def _confirmed(self, frame: Any) -> None:
        assert isinstance(frame.method, spec.Basic.Ack)
        tag = frame.method.delivery_tag
        is_multiple = frame.method.multiple
        told = {each for each in self._unconfirmed if each == tag or (is_multiple and each < tag)}
        self._unconfirmed = [each for each in self._unconfirmed if each not in told]
        self.confirmed |= told
        self._on_confirms(len(self.confirmed))
        self._fill()

    def _fill(self) -> None:
        while self.published < MESSAGES and len(self._unconfirmed) < WINDOW:
            self.published += 1
            self._unconfirmed.append(self.published)
            self._channel.basic_publish("", "q", b"%d" % self.published, PERSISTENT)
        if not self._unconfirmed:
            self._connection.close()


# Killed


@pytest.mark.embedded
@pytest.mark.parametrize("arguments", [{}, QUORUM], ids=["classic", "quorum"])
def test_every_confirmed_message_is_there_after_a_kill(
    arguments: dict[str, str], embedded_node: EmbeddedNode, broker_url: str
) -> None:
    """In its order and once, whenever it happens; what is unconfirmed may be there, or not."""
    chance = random.Random(len(arguments))
    for low, high in ((1, 500), (2_000, 10_000), (10_000, 19_000)):
        limit = chance.randrange(low, high)
        with confirming(broker_url) as channel:
            channel.queue_declare("q", durable=True, arguments=arguments)

        def kill(confirms: int, limit: int = limit) -> None:
            if confirms >= limit and embedded_node.is_running:
                embedded_node.kill()

        publisher = Publisher(broker_url, kill)
        publisher.run()
        embedded_node.start()

        assert len(publisher.confirmed) >= limit
        with confirming(broker_url) as channel:
            found = [int(body) for body in drain(channel)]
        assert set() == publisher.confirmed - {*found}
        assert [*range(1, len(found) + 1)] == found
        assert len(found) <= publisher.published


@pytest.mark.embedded
def test_what_is_settled_and_confirmed_after_it_is_gone_after_a_kill(
    embedded_node: EmbeddedNode, broker_url: str
) -> None:
    """A purge, a deletion and acknowledgements are on disk before a later confirm."""
    with confirming(broker_url) as channel:
        for queue in ("acked", "purged", "deleted", "left"):
            channel.queue_declare(queue, durable=True)
            for number in range(5):
                publish(channel, b"%d" % number, queue)
        deliveries = [get(channel, "acked", auto_ack=False) for _ in range(4)]
        for method_frame, _, _ in deliveries[::2]:
            channel.basic_ack(method_frame.delivery_tag)
        channel.queue_purge("purged")
        channel.queue_delete("deleted")
        publish(channel, b"5", "left")
        embedded_node.kill()
    embedded_node.start()

    with confirming(broker_url) as channel:
        assert [b"1", b"3", b"4"] == drain(channel, "acked")
        assert [] == drain(channel, "purged")
        assert [b"0", b"1", b"2", b"3", b"4", b"5"] == drain(channel, "left")
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="no queue 'deleted'"):
            count(channel, "deleted")


@pytest.mark.embedded
def test_a_committed_transaction_is_there_after_a_kill(
    embedded_node: EmbeddedNode, broker_url: str
) -> None:
    """commit-ok comes when all of it is on disk."""
    vhost = broker_url.rpartition("/")[2]
    with RawClient.opened(embedded_node.port, vhost) as client:
        client.open_channel()
        for queue in ("a", "b"):
            client.ask(spec.Queue.Declare(queue=queue, durable=True), spec.Queue.DeclareOk)
        client.ask(spec.Tx.Select(), spec.Tx.SelectOk)
        for queue in ("a", "b"):
            begin = method(spec.Basic.Publish(routing_key=queue), 1)
            client.send((begin + wire.header(0, b"\x10\0\2")) * 200)
        client.ask(spec.Tx.Commit(), spec.Tx.CommitOk)
        embedded_node.kill()
    embedded_node.start()

    with confirming(broker_url) as channel:
        assert [200, 200] == [count(channel, queue) for queue in ("a", "b")]


@pytest.mark.embedded
def test_a_dead_letter_is_in_one_queue_after_a_kill(
    embedded_node: EmbeddedNode, broker_url: str
) -> None:
    """Whatever the moment: it leaves the one and enters the other in one step."""
    with confirming(broker_url) as channel:
        dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}
        channel.queue_declare("dead", durable=True)
        channel.queue_declare("q", durable=True, arguments=dead)
        for number in range(300):
            publish(channel, b"%d" % number)
        channel.basic_consume("q", lambda *args: args[0].basic_reject(args[1].delivery_tag, False))
        killer = threading.Timer(0.02, embedded_node.kill)
        killer.start()
        with pytest.raises(pika.exceptions.AMQPError):
            while True:
                channel.connection.process_data_events(0.01)
        killer.join()
    embedded_node.start()

    with confirming(broker_url) as channel:
        found = drain(channel, "q") + drain(channel, "dead")
    assert [*range(300)] == sorted(map(int, found))


# Restarted


@pytest.fixture(params=["stop", "kill"])
def restart(request: pytest.FixtureRequest, embedded_node: EmbeddedNode) -> Callable[[], None]:
    """End the node in some way, and start it again."""

    def restart() -> None:
        getattr(embedded_node, request.param)()
        embedded_node.start()

    return restart


@pytest.mark.embedded
def test_what_is_durable_is_there_after_a_restart(
    restart: Callable[[], None], broker_url: str
) -> None:
    """Exchanges, queues and bindings, with all their arguments; what is not is gone."""
    with confirming(broker_url) as channel:
        for kind in ("direct", "fanout", "topic", "headers"):
            channel.exchange_declare(kind, kind, durable=True)
        channel.exchange_declare("spare", "fanout", durable=True, internal=True)
        channel.exchange_declare(
            "first", "topic", durable=True, arguments={"alternate-exchange": "spare"}
        )
        channel.exchange_declare("transient", "fanout")
        channel.queue_declare("q", durable=True, arguments={"x-max-length": 3, "mine": True})
        channel.queue_declare("spared", durable=True, arguments=QUORUM)
        channel.queue_declare("transient")
        channel.queue_declare("exclusive", durable=True, exclusive=True)
        channel.queue_declare("auto", durable=True, auto_delete=True)
        channel.exchange_bind("topic", "first", "a.#")
        channel.queue_bind("q", "topic", "*.b")
        channel.queue_bind("q", "headers", arguments={"x-match": "any", "n": 1})
        channel.queue_bind("spared", "spare")
        for place in (("transient", "topic"), ("q", "transient")):
            channel.queue_bind(*place, routing_key="#")
        channel.queue_bind("exclusive", "amq.fanout")
        channel.queue_bind("q", "direct", "unbound")
        channel.queue_unbind("q", "direct", "unbound")
        publish(channel, b"to nobody", "none")
        publish(channel, b"settled", "q")
        get(channel)
    restart()

    with confirming(broker_url) as channel:
        channel.basic_publish("first", "a.b", b"1")
        channel.basic_publish("first", "other", b"2")
        channel.basic_publish("headers", "", b"3", pika.BasicProperties(headers={"n": 1}))
        channel.basic_publish("direct", "unbound", b"4")
        assert ([b"1", b"3"], [b"2"]) == (drain(channel), drain(channel, "spared"))
        for number in range(5):
            publish(channel, b"%d" % number)
        assert [b"2", b"3", b"4"] == drain(channel)
        channel.queue_declare("q", durable=True, arguments={"x-max-length": 3, "mine": True})
        channel.queue_declare("auto", durable=True, auto_delete=True, passive=True)
        declarations: tuple[Callable[[Any], Any], ...] = (
            lambda channel: channel.queue_declare("transient", passive=True),
            lambda channel: channel.queue_declare("exclusive", passive=True),
            lambda channel: channel.exchange_declare("transient", passive=True),
        )
        for declare in declarations:
            with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="404"):
                declare(channel.connection.channel())
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="internal"):
            channel.basic_publish("spare", "", b"x")


@pytest.mark.embedded
def test_only_persistent_messages_are_there_after_a_restart(
    restart: Callable[[], None], broker_url: str
) -> None:
    """Exactly as they were published, of any size."""
    odd = pika.BasicProperties(
        delivery_mode=2,
        headers={"n": 1, "deep": {"list": [1, None, "é", b"\xff"]}},
        priority=3,
        correlation_id="c",
        timestamp=5,
        type="é",
    )
    bodies = [b"", b"x", bytes(range(256)) * 1000, bytes(3_000_000)]
    with confirming(broker_url) as channel:
        channel.queue_declare("q", durable=True)
        for body in bodies:
            publish(channel, b"transient", properties=TRANSIENT)
            publish(channel, body, properties=odd)
    restart()

    with confirming(broker_url) as channel:
        found = [get(channel) for _ in range(len(bodies) + 1)]
    assert [*bodies, None] == [body for _, _, body in found]
    assert [odd] * len(bodies) == [properties for _, properties, _ in found[:-1]]
    assert {("", "q")} == {(each.exchange, each.routing_key) for each, _, _ in found[:-1]}


@pytest.mark.embedded
def test_time_goes_on_while_the_broker_is_down(
    embedded_node: EmbeddedNode, broker_url: str
) -> None:
    """What should have expired meanwhile does so at the start, and goes where it has to."""
    with confirming(broker_url) as channel:
        channel.queue_declare("dead", durable=True)
        dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}
        channel.queue_declare("q", durable=True, arguments=dead)
        channel.queue_declare("ttl", durable=True, arguments={**dead, "x-message-ttl": 700})
        for ttl in ("700", "800", "60000"):
            properties = pika.BasicProperties(delivery_mode=2, expiration=ttl)
            publish(channel, ttl.encode(), properties=properties)
        publish(channel, b"of the queue", "ttl")
        publish(channel, b"for ever")
        published = time.monotonic()
        embedded_node.kill()
    wait_until(lambda: time.monotonic() > published + 0.85)
    embedded_node.start()

    with confirming(broker_url) as channel:
        wait_until(lambda: count(channel, "dead") == 3)
        letters = {body for _, _, body in (get(channel, "dead") for _ in range(3))}
        assert {b"700", b"800", b"of the queue"} == letters
        assert [b"60000", b"for ever"] == drain(channel)
        assert [] == drain(channel, "ttl")


@pytest.mark.embedded
def test_a_time_to_live_that_has_not_ended_goes_on(
    restart: Callable[[], None], broker_url: str
) -> None:
    """It does not begin anew."""
    with confirming(broker_url) as channel:
        channel.queue_declare("q", durable=True)
        properties = pika.BasicProperties(delivery_mode=2, expiration="1500")
        publish(channel, properties=properties)
        published = time.monotonic()
    restart()

    with confirming(broker_url) as channel:
        if time.monotonic() < published + 1.2:  # the machine may be slow
            assert 1 == count(channel)
        wait_until(lambda: count(channel) == 0)
    assert time.monotonic() >= published + 1.4


@pytest.mark.embedded
def test_deliveries_are_counted_over_a_restart(
    restart: Callable[[], None], broker_url: str
) -> None:
    """So that a message which kills its consumers does not get new lives."""
    arguments = {
        **QUORUM,
        "x-delivery-limit": 3,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "dead",
    }
    with confirming(broker_url) as channel:
        channel.queue_declare("dead", durable=True)
        channel.queue_declare("q", durable=True, arguments=arguments)
        publish(channel, b"poison")
        for _ in range(2):
            channel.basic_nack(get(channel, auto_ack=False)[0].delivery_tag)
        publish(channel, b"to be sure", "dead")
        channel.queue_purge("dead")
    restart()

    with confirming(broker_url) as channel:
        for number in (2, 3):
            frame, properties, _ = get(channel, auto_ack=False)
            assert (True, number) == (frame.redelivered, properties.headers["x-delivery-count"])
            channel.basic_nack(frame.delivery_tag)
        assert None is get(channel)[0]
        wait_until(lambda: count(channel, "dead") == 1)
        _, properties, body = get(channel, "dead")
        assert (b"poison", "delivery_limit") == (body, properties.headers["x-death"][0]["reason"])


@pytest.mark.embedded
def test_the_order_outlives_a_restart(restart: Callable[[], None], broker_url: str) -> None:
    """Also that of priorities, and of what was held by somebody."""
    with confirming(broker_url) as channel:
        channel.queue_declare("q", durable=True)
        channel.queue_declare("p", durable=True, arguments={"x-max-priority": 5})
        for number in range(10):
            publish(channel, b"%d" % number)
            properties = pika.BasicProperties(delivery_mode=2, priority=number % 3)
            publish(channel, b"%d" % number, "p", properties)
        held = [get(channel, auto_ack=False) for _ in range(6)]
        channel.basic_nack(held[4][0].delivery_tag)
    restart()

    with confirming(broker_url) as channel:
        publish(channel, b"10")
        assert [b"%d" % number for number in range(11)] == drain(channel)
        assert [2, 5, 8, 1, 4, 7, 0, 3, 6, 9] == [int(body) for body in drain(channel, "p")]


@pytest.mark.embedded
def test_virtual_hosts_outlive_a_restart(embedded_node: EmbeddedNode) -> None:
    """And those that were deleted are gone with all that was in them."""
    embedded_node.replace_vhosts([], ["kept", "gone"])
    for vhost in ("kept", "gone"):
        with confirming(embedded_node.url_of(vhost)) as channel:
            channel.queue_declare("q", durable=True)
            publish(channel)
    embedded_node.delete_vhost("gone")
    embedded_node.stop()
    embedded_node.start()
    try:
        with confirming(embedded_node.url_of("kept")) as channel:
            assert 1 == count(channel)
        with pytest.raises(pika.exceptions.ProbableAccessDeniedError, match="vhost gone not found"):
            pika.BlockingConnection(pika.URLParameters(embedded_node.url_of("gone")))
        with confirming(embedded_node.add_vhost("gone")) as channel:
            assert 0 == channel.queue_declare("q", durable=True).method.message_count
    finally:
        embedded_node.replace_vhosts(["kept", "gone"], [])


# A full disk


def test_a_full_disk_is_said_and_survived(tmp_path: Path) -> None:
    """Publishings are refused and their publisher is blocked; then all goes on."""
    store = str(tmp_path / "store")
    with small_broker(store=store) as (port, process, program), RawClient.opened(port) as client:
        client.open_channel()
        client.ask(spec.Queue.Declare(queue="q", durable=True), spec.Queue.DeclareOk)
        client.ask(spec.Confirm.Select(), spec.Confirm.SelectOk)
        persistent = wire.header(1, b"\x10\0\2")
        publishing = method(spec.Basic.Publish(routing_key="q"), 1) + persistent
        client.send(publishing + wire.body(b"1"))
        client.expect(spec.Basic.Ack)

        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, most))
        client.send(publishing + wire.body(b"2"))
        assert 2 == client.expect(spec.Basic.Nack).delivery_tag
        program.wait_for_line("publishers wait until the store can be written again")
        client.send(publishing + wire.body(b"3"))
        client.expect(spec.Connection.Blocked)
        with RawClient.opened(port) as other:
            other.open_channel()
            other.ask(spec.Basic.Get(queue="q"), spec.Basic.GetOk)

        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
        # The third was taken before its publisher was blocked, and its fate is known by now.
        kinds = {type(client.receive().method) for _ in range(2)}
        assert spec.Connection.Unblocked in kinds
        assert kinds <= {spec.Connection.Unblocked, spec.Basic.Ack, spec.Basic.Nack}
        client.send(publishing + wire.body(b"4"))
        assert 4 == client.expect(spec.Basic.Ack).delivery_tag
        process.kill()
        program.wait()
    with Broker(store=store) as broker, confirming(broker.url) as channel:
        found = drain(channel)
        assert {b"1", b"4"} <= {*found}
        assert sorted(found) == found


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process be written to, whatever is free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_broker_that_cannot_write_when_it_stops_says_so(tmp_path: Path) -> None:
    """It is stopped all the same, and can be started again."""
    broker = Broker(store=tmp_path / "store")
    broker.start()
    with confirming(broker.url) as channel:
        channel.queue_declare("q", durable=True)
        publish(channel, b"kept")
    with full_disk():
        broker.add_vhost("lost")
        with pytest.raises(StoreError, match="could not be written to before it was closed"):
            broker.close()
    assert "<Broker stopped>" == repr(broker)
    with broker, confirming(broker.url) as channel:
        assert [b"kept"] == drain(channel)


def test_two_brokers_cannot_share_a_store(tmp_path: Path) -> None:
    """The second one says which file it is, and what to do."""
    with (
        Broker(store=tmp_path / "store"),
        pytest.raises(StoreError, match="store is in use by another broker; stop that broker"),
    ):
        Broker(store=tmp_path / "store").start()
