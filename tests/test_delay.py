# SPDX-License-Identifier: MIT
"""Messages that wait in the broker arrive when they are due, with all that they carry."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from fractions import Fraction
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postage.delay import (
    BIT,
    LEVELS,
    LONGEST,
    MOST_HEADERS,
    Delayed,
    Due,
    Wait,
    bits_of,
    seconds_of,
    steps_of,
    stripped,
)
from postage.errors import (
    BatchError,
    ChannelClosedError,
    ConfigurationError,
    EncodingError,
    QueueMismatchError,
    UnroutableError,
)
from postage.messaging import (
    Exchange,
    GenericConsumer,
    GenericProducer,
    MessageHandler,
    MessageProcessor,
    Queue,
)
from postage.microthreads import ExitScheduler
from postage.topology import DefaultExchange, ExchangeSpec
from postage.transport import connection as connections
from postage.transport.publisher import Publishing
from tests.nodes import Node
from tests.waiting import wait_until

NOW = datetime(2024, 2, 29, 12, tzinfo=timezone.utc)
UNROUTABLE = "postage-unroutable"
#: What quorum queues need to lose nothing on the way.
SAFE = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}


class Letters(Exchange):
    name = "letters"


class Topics(Exchange):
    name = "topics"
    exchange_type = "topic"


class Everybody(Exchange):
    name = "everybody"
    exchange_type = "fanout"


class Sender(GenericProducer):
    eks = [(Letters, "post")]


@dataclass(frozen=True)
class Arrival:
    """A message, and when it was there."""

    when: float
    key: str
    properties: Any
    body: bytes

    @property
    def parameters(self) -> Any:
        return json.loads(self.body)["content"]["parameters"]

    @property
    def headers(self) -> dict[str, Any]:
        return dict(self.properties.headers or {})


class Post:
    """Queues, which pika reads."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def add(self, queue: str, exchange: type[Exchange] | None = None, key: str = "") -> None:
        arguments = {"x-queue-type": "quorum"}
        self.channel.queue_declare(queue, durable=True, arguments=arguments)
        if exchange is not None:
            self.channel.exchange_declare(exchange.name, exchange.exchange_type, durable=True)
            self.channel.queue_bind(queue, exchange.name, key)

    def get(self, queue: str) -> Arrival:
        """Wait for the next message of a queue."""

        def arrival() -> Arrival | None:
            method, properties, body = self.channel.basic_get(queue, auto_ack=True)
            return method and Arrival(time.monotonic(), method.routing_key, properties, body)

        found = wait_until(arrival, message=f"a message in {queue}")
        assert found is not None
        return found

    def parameters(self, queue: str, count: int) -> list[Any]:
        return [self.get(queue).parameters for _ in range(count)]

    def count(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)


@contextlib.contextmanager
def reading(url: str) -> Iterator[Post]:
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        yield Post(connection.channel())


@pytest.fixture
def post(broker_url: str) -> Iterator[Post]:
    with reading(broker_url) as post:
        yield post


@pytest.fixture
def producer(broker_url: str) -> Iterator[Sender]:
    with Sender() as producer:
        yield producer


def vhost_of(url: str) -> str:
    return url.rpartition("/")[2]


# ------------------------------------------------------------------------- pure decisions


@given(st.floats(0, LONGEST))
def test_the_steps_are_never_less_than_the_delay_and_not_a_step_more(seconds: float) -> None:
    """A step is a tenth of a second, and the levels have room for all of them."""
    steps = steps_of(seconds)
    assert 0 <= Fraction(steps, 10) - Fraction(seconds) < Fraction(1, 10)
    assert steps < 2**LEVELS


@given(st.integers(1, 2**LEVELS - 1))
def test_the_bits_sum_to_the_steps(steps: int) -> None:
    """One header for each level, up to the highest, in which every message waits."""
    bits = bits_of(steps)
    assert steps == sum(2**level * bits[BIT.format(level)] for level in range(len(bits)))
    assert len(bits) == steps.bit_length()
    assert bits[BIT.format(len(bits) - 1)]


@given(st.integers(1, 2**LEVELS - 1))
def test_a_message_passes_the_levels_that_its_bits_name(steps: int) -> None:
    """Followed through the bindings as the parts declare them, it waits so long and no longer."""
    delayed = Delayed("orders", steps.bit_length() - 1)
    headers = delayed.headers(steps)
    queues = {part.name: part for part in delayed.parts() if hasattr(part, "counts_deliveries")}
    links = [part for part in delayed.parts() if getattr(part, "header", "")]
    place, waited = delayed.exchange, 0
    while place != "orders":
        [place] = [
            link.destination
            for link in links
            if link.source == place and headers.get(link.header) == link.value
            # a queue and an exchange of a level have the same name
            if not link.to_exchange or link.destination != place
        ]
        level = queues.get(place)
        if level is not None and headers[BIT.format(int(place[-2:]))]:
            waited += level.arguments["x-message-ttl"]
            place = level.arguments["x-dead-letter-exchange"]
    assert 100 * steps == waited


@pytest.mark.parametrize(
    ("delay", "at", "seconds"),
    [
        (None, None, 0),
        (0, None, 0),
        (1.5, None, 1.5),
        (timedelta(minutes=1, milliseconds=1), None, 60.001),
        (timedelta(days=366), None, LONGEST),
        (None, NOW + timedelta(seconds=2), 2),
        (None, NOW - timedelta(seconds=2), 0),
        (None, datetime(2024, 2, 29, 14, tzinfo=timezone(timedelta(hours=2))), 0),
        (None, datetime(2024, 2, 29, 14, tzinfo=timezone(timedelta(hours=1))), 3600),
    ],
)
def test_a_delay_is_seconds_or_a_timedelta_or_a_point_in_time(
    delay: Any, at: Any, seconds: float
) -> None:
    """A point in time that has passed is now."""
    assert seconds == seconds_of(delay, at, NOW)


@pytest.mark.parametrize(
    ("delay", "at", "complaint"),
    [
        (-1, None, "_delay is -1: give a number of seconds, 0 or more, or a timedelta"),
        (timedelta(seconds=-1), None, "_delay is datetime.timedelta"),
        (math.nan, None, "_delay is nan"),
        (math.inf, None, "_delay is inf"),
        (True, None, "_delay is True"),
        ("5", None, "_delay is '5'"),
        (LONGEST + 1, None, "_delay is more than 366 days away"),
        (None, NOW + timedelta(days=367), "_at is more than 366 days away"),
        (None, datetime(2024, 3, 1), "which has no time zone: give one"),
        (None, date(2024, 3, 1), "give a datetime with a time zone"),
        (None, 1_700_000_000, "_at is 1700000000: give a datetime with a time zone"),
        (1, NOW, "give _delay or _at, but not both"),
    ],
)
def test_a_delay_that_makes_no_sense_is_refused(delay: Any, at: Any, complaint: str) -> None:
    """The error says what is wrong and what to do."""
    with pytest.raises(ConfigurationError) as caught:
        seconds_of(delay, at, NOW)
    assert complaint in str(caught.value)


def test_a_delay_that_is_no_number_at_all_is_refused_when_it_is_given() -> None:
    """Not later, when the message leaves an outbox or a transaction."""
    with pytest.raises(ConfigurationError):
        Wait(math.nan)


def test_what_a_delay_left_in_the_headers_is_stripped() -> None:
    """The rest stays, and nothing is left of no headers at all."""
    old = {"x-death": [], "x-first-death-queue": "q", "tenant": "blue", **MOST_HEADERS}
    assert {"tenant": "blue"} == stripped({**old, "postage-exchange": "e"})
    assert {} == stripped(None)


def publishing(properties: pika.BasicProperties, key: str = "q") -> Publishing:
    return Publishing(
        DefaultExchange.spec(),
        key,
        b"",
        properties,
        mandatory=False,
        confirm=True,
        deadline=math.inf,
        settled=lambda _publishing: None,
    )


def test_a_publishing_is_aimed_anew_each_time() -> None:
    """It waits only for what is left, and its properties are those of a copy."""
    properties = pika.BasicProperties(headers={"a": 1, "postage-exchange": "x"}, expiration="1")
    each = publishing(properties)

    Due(time.monotonic() + 3600, False)(each)
    assert "postage-delay-15" == each.via
    assert (Delayed("q", 15), True) == (each.preparation, each.mandatory)
    assert {
        "a",
        "postage-queue",
        *(BIT.format(k) for k in range(16)),
    } == each.properties.headers.keys()
    assert each.properties.expiration is None

    Due(time.monotonic() - 1, False)(each)
    assert ("", ExchangeSpec(""), False) == (each.via, each.preparation, each.mandatory)
    assert {"a": 1} == each.properties.headers
    assert {"a": 1, "postage-exchange": "x"} == properties.headers
    assert "1" == properties.expiration


# ------------------------------------------------------------------------------ arriving


@pytest.mark.parametrize("delay", [0.1, 0.35, 1.6, timedelta(milliseconds=700)])
def test_a_message_is_never_early(post: Post, producer: Sender, delay: Any) -> None:
    """Not by the clock of this machine, which is that of the sender and of the receiver."""
    post.add("orders")
    seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
    due = time.monotonic() + seconds

    producer.message_order(_queue="orders", _delay=delay)

    assert post.get("orders").when >= due


def test_a_message_arrives_at_a_point_in_time(post: Post, producer: Sender) -> None:
    """And not before."""
    post.add("orders")
    at = datetime.now(timezone(timedelta(hours=5))) + timedelta(seconds=0.5)

    producer.message_order(_queue="orders", _at=at)
    post.get("orders")

    assert datetime.now(timezone.utc) >= at


@pytest.mark.parametrize("keywords", [{"_delay": 0}, {"_at": NOW}, {"_delay": None, "_at": None}])
def test_a_message_that_is_due_goes_straight(
    post: Post, producer: Sender, node: Node, broker_url: str, keywords: dict[str, Any]
) -> None:
    """Nothing is declared for it."""
    post.add("orders")

    producer.message_order(_queue="orders", **keywords)

    assert post.get("orders").headers.keys() <= {"x-delivery-count"}
    assert ["orders"] == [row.name for row in node.queues(vhost_of(broker_url))]


def test_of_two_messages_the_one_that_is_due_first_comes_first(
    post: Post, producer: Sender
) -> None:
    """None waits for one that was sent before it."""
    post.add("orders")
    for delay in (2.4, 0.8, 1.6):
        producer.message_order(str(delay), _queue="orders", _delay=delay)
    assert ["0.8", "1.6", "2.4"] == post.parameters("orders", 3)


def test_many_messages_for_one_point_in_time_all_arrive(post: Post, producer: Sender) -> None:
    """Once each. Those that were written in different tenths of a second took different ways."""
    post.add("orders")
    at = datetime.now(timezone.utc) + timedelta(seconds=1)
    with producer.batch() as batch:
        for number in range(100):
            batch.message_order(number, _queue="orders", _at=at)
    assert set(range(100)) == set(post.parameters("orders", 100))


@pytest.mark.parametrize("key", ["a.b.c", "a.#", "#", "a.*.ü", ""])
def test_a_message_keeps_its_key_its_headers_and_its_properties(
    post: Post, producer: Sender, key: str
) -> None:
    """Also a key that means something to others."""
    post.add("all", Topics, "#")

    producer.message_order(
        1,
        _eks=[(Topics, key)],
        _delay=0.2,
        _headers={"tenant": "blue", "list": [1, "two"]},
        _message_id="id-1",
        _correlation_id="c-1",
        _priority=3,
    )

    arrival = post.get("all")
    properties = arrival.properties
    assert (key, 1) == (arrival.key, arrival.parameters)
    assert {"tenant": "blue", "list": [1, "two"]} == stripped(arrival.headers)
    assert ("id-1", "c-1", 3, 2) == (
        properties.message_id,
        properties.correlation_id,
        properties.priority,
        properties.delivery_mode,
    )
    assert properties.content_type == "application/json"


def test_a_queue_is_found_by_a_name_with_dots(post: Post, producer: Sender) -> None:
    """And nobody else's queue is, whatever the name looks like."""
    post.add("orders.#")
    post.add("orders.eu")
    producer.message_order(1, _queue="orders.#", _delay=0.1)
    assert 1 == post.get("orders.#").parameters
    assert 0 == post.count("orders.eu")


def test_a_topic_exchange_routes_a_message_when_it_is_due(post: Post, producer: Sender) -> None:
    """To each queue whose pattern matches, and to no other."""
    post.add("eu", Topics, "orders.eu.*")
    post.add("all", Topics, "orders.#")
    post.add("us", Topics, "orders.us.*")
    producer.message_order(1, _eks=[(Topics, "orders.eu.new")], _delay=0.2)
    assert (1, 1) == (post.get("eu").parameters, post.get("all").parameters)
    assert 0 == post.count("us")


def test_a_fanout_and_other_pairs_get_a_message_each(post: Post, producer: Sender) -> None:
    """The pairs of a call wait apart, and no goal is mistaken for another."""
    post.add("one", Everybody)
    post.add("two", Everybody)
    post.add("three", Letters, "post")
    producer.message_order(1, _eks=[(Everybody, ""), (Letters, "post")], _delay=0.2)
    assert [1, 1, 1] == [post.get(queue).parameters for queue in ("one", "two", "three")]
    assert [0, 0, 0] == [post.count(queue) for queue in ("one", "two", "three")]


def test_a_body_is_forwarded_later(post: Post, producer: Sender) -> None:
    """As it is."""
    post.add("orders")
    producer.forward({"any": "body"}, _queue="orders", _delay=0.1)
    assert {"any": "body"} == json.loads(post.get("orders").body)


def test_a_generic_message_is_sent_later(post: Post, producer: Sender) -> None:
    """`message()` takes the keywords, too."""
    post.add("orders")
    producer.message(1, _queue="orders", _delay=0.1)
    assert [1] == json.loads(post.get("orders").body)["content"]["args"]


def test_a_batch_may_hold_messages_with_any_delay(post: Post, producer: Sender) -> None:
    """They are confirmed at its end, which does not wait until they arrive."""
    post.add("orders")
    with producer.batch() as batch:
        batch.message_order("later", _queue="orders", _delay=3600)
        for number in range(20):
            batch.message_order(number, _queue="orders", _delay=number / 10)
    assert 21 == len(batch.confirmed)
    assert set(range(20)) == set(post.parameters("orders", 20))


def test_in_a_transaction_a_delay_begins_when_its_block_ends(post: Post, producer: Sender) -> None:
    """A point in time stays what it is."""
    post.add("orders")
    at = datetime.now(timezone.utc) + timedelta(seconds=0.4)
    with producer.transaction() as tx:
        tx.message_order("for a while", _queue="orders", _delay=0.4)
        tx.message_order("until then", _queue="orders", _at=at)
        wait_until(lambda: datetime.now(timezone.utc) > at)
        ended = time.monotonic()

    first, second = post.get("orders"), post.get("orders")

    assert ["until then", "for a while"] == [first.parameters, second.parameters]
    assert second.when >= ended + 0.4
    assert first.headers.keys() <= {"x-delivery-count"}  # it was due


def test_in_an_outbox_a_delay_begins_when_its_handler_has_ended(
    post: Post, producer: Sender
) -> None:
    """What a handler sends after a while counts from when it leaves."""
    post.add("later")
    ended: list[float] = []

    class Worker(MessageProcessor):
        outbox = True

        @MessageHandler("command", "order")
        def msg_order(self, content: Any) -> None:
            producer.message_reminder(1, _queue="later", _delay=0.3)
            ended.append(time.monotonic())
            raise ExitScheduler

    worker = Worker({}, [(DefaultExchange, [("orders", "orders")])])
    with GenericProducer() as other:
        other.message_order(_queue="orders")
    worker.start_consuming()

    assert post.get("later").when >= ended[0] + 0.3


def test_a_transaction_refuses_a_bad_delay_at_once(producer: Sender) -> None:
    """Nothing of it is sent."""
    with pytest.raises(ConfigurationError), producer.transaction() as tx:
        tx.message_order(_delay=-1)


def test_a_consumer_publishes_again_after_a_delay(post: Post, producer: Sender) -> None:
    """What it received may have come through a delay itself, and may expire."""
    post.add("again")
    with GenericConsumer([(DefaultExchange, [("orders", "orders")])]) as consumer:
        producer.message_order(7, _queue="orders", _delay=0.3, _headers={"tenant": "blue"})
        received = post.get("orders")
        received.properties.expiration = "1"
        due = time.monotonic() + 0.3
        consumer.publish(
            "again", received.body, received.properties, mandatory=True, delay=0.3
        ).result(30)
        arrival = post.get("again")
    assert arrival.when >= due
    assert (7, {"tenant": "blue"}) == (arrival.parameters, stripped(arrival.headers))
    assert {1} == {death["count"] for death in arrival.headers["x-death"]}  # of this pass
    assert arrival.properties.expiration is None


# --------------------------------------------------------------------------- the topology


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_the_cascade_is_declared_up_to_the_level_that_is_needed(
    post: Post,
    producer: Sender,
    node: Node,
    broker_url: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names and arguments are part of the contract: they live in brokers for years."""
    monkeypatch.setenv("POSTAGE_QUEUE_TYPE", kind)
    post.add("orders")
    producer.message_order(_queue="orders", _delay=0.5)

    rows = {row.name: row for row in node.queues(vhost_of(broker_url)) if row.name != "orders"}

    safe = SAFE if kind == "quorum" else {}
    levels = {
        f"postage-delay-{level:02}": {
            "x-queue-type": kind,
            "x-message-ttl": 100 * 2**level,
            "x-dead-letter-exchange": below,
            **safe,
        }
        for level, below in enumerate(
            ["postage-delay-goal", "postage-delay-00", "postage-delay-01"]
        )
    }
    expected = {UNROUTABLE: {"x-queue-type": kind}, **levels}
    assert expected == {name: row.arguments for name, row in rows.items()}
    assert all(row.durable and row.type == kind for row in rows.values())
    bindings = {(row.source, row.destination) for row in node.bindings(vhost_of(broker_url))}
    assert bindings == {
        ("postage-unroutable", "postage-unroutable"),
        ("postage-delay-goal", "orders"),
        ("postage-delay-00", "postage-delay-00"),
        ("postage-delay-00", "postage-delay-goal"),
        ("postage-delay-01", "postage-delay-01"),
        ("postage-delay-01", "postage-delay-00"),
        ("postage-delay-02", "postage-delay-02"),
        ("postage-delay-02", "postage-delay-01"),
    }
    for exchange in (*levels, "postage-delay-goal"):
        post.channel.exchange_declare(exchange, "headers", durable=True, passive=True)
    post.get("orders")


def test_what_goes_to_an_exchange_has_one_step_more(
    post: Post, producer: Sender, node: Node, broker_url: str
) -> None:
    """The last queue drops what no queue is bound for, so that it holds up nobody."""
    post.add("orders", Letters, "post")
    producer.message_order(_delay=0.1)
    rows = {row.name: row.arguments for row in node.queues(vhost_of(broker_url))}
    assert rows["postage-delay-last"] == {
        "x-queue-type": "quorum",
        "x-message-ttl": 0,
        "x-dead-letter-exchange": "postage-delay-last",
    }
    post.get("orders")


def test_a_message_can_wait_for_a_year(
    post: Post, producer: Sender, node: Node, broker_url: str
) -> None:
    """In the highest of 29 levels."""
    post.add("orders")
    producer.message_order(_queue="orders", _delay=timedelta(days=366))
    wait_until(lambda: post.count("postage-delay-28") == 1)
    assert {f"postage-delay-{k:02}" for k in range(29)} == {
        row.name for row in node.queues(vhost_of(broker_url)) if "delay" in row.name
    }


def test_a_level_that_somebody_declared_otherwise_is_an_error(post: Post, producer: Sender) -> None:
    """It names the queue; what does not pass that level is sent."""
    post.add("orders")
    post.add("postage-delay-03")

    with pytest.raises(QueueMismatchError) as caught:
        producer.message_order("long", _queue="orders", _delay=1)

    assert "declare queue 'postage-delay-03'" in str(caught.value)
    producer.message_order("short", _queue="orders", _delay=0.3)
    assert "short" == post.get("orders").parameters


def test_a_level_that_somebody_declared_otherwise_is_adopted_if_asked(
    post: Post, producer: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the cascade is declared all the same."""
    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adopt")
    arguments = {"x-message-ttl": 400, "x-dead-letter-exchange": "postage-delay-01"}
    post.channel.queue_declare("postage-delay-02", durable=True, arguments=arguments)
    post.add("orders")
    producer.message_order("adopted", _queue="orders", _delay=0.5)
    assert "adopted" == post.get("orders").parameters


def test_producers_that_delay_for_the_first_time_at_once_get_on(
    post: Post, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection declares everything; two of them share one."""
    post.add("orders")
    with contextlib.ExitStack() as stack:
        producers = [stack.enter_context(Sender()) for _ in range(2)]
        monkeypatch.setenv("POSTAGE_URL", f"{broker_url}?heartbeat=30")
        producers += [stack.enter_context(Sender()) for _ in range(2)]
        futures = [
            each.message_order(number, _queue="orders", _delay=0.5, _future=True)
            for number, each in enumerate(producers)
        ]
        for future in futures:
            future.result(30)
        assert 2 == len(connections.in_use())
    assert {0, 1, 2, 3} == set(post.parameters("orders", 4))


# ------------------------------------------------------------------------------- trouble


def test_a_queue_that_does_not_exist_is_an_error_at_once(producer: Sender) -> None:
    """As for a message that does not wait."""
    with pytest.raises(UnroutableError) as caught:
        producer.message_order(_queue="nowhere", _delay=1)
    assert [("", "nowhere")] == caught.value.failed


def test_a_batch_says_which_of_its_delayed_messages_failed(post: Post, producer: Sender) -> None:
    """The others are sent."""
    post.add("orders")
    with pytest.raises(BatchError) as caught, producer.batch() as batch:
        batch.message_order(1, _queue="nowhere", _delay=0.2, _message_id="bad")
        batch.message_order(2, _queue="orders", _delay=0.2, _message_id="good")
    assert (["good"], ["bad"]) == (caught.value.confirmed, [key for key, _ in caught.value.failed])
    assert 2 == post.get("orders").parameters


def test_a_queue_that_is_exclusive_to_another_connection_is_refused(
    post: Post, producer: Sender
) -> None:
    """The error says how else to reach it."""
    name = post.channel.queue_declare("", exclusive=True).method.queue
    with pytest.raises(ChannelClosedError) as caught:
        producer.message_order(_queue=name, _delay=1)
    assert 405 == caught.value.code
    assert "delay through an exchange instead" in str(caught.value)


def test_a_message_whose_queue_was_deleted_is_found_among_the_unroutable(
    post: Post, producer: Sender
) -> None:
    """With its headers and its key."""
    post.add("orders")
    producer.message_order(1, _queue="orders", _delay=0.5, _headers={"tenant": "blue"})
    post.channel.queue_delete("orders")

    arrival = post.get(UNROUTABLE)

    assert ("orders", 1) == (arrival.key, arrival.parameters)
    assert ("orders", "blue") == (arrival.headers["postage-queue"], arrival.headers["tenant"])


def test_a_message_whose_exchange_was_deleted_is_found_among_the_unroutable(
    post: Post, producer: Sender
) -> None:
    """With its headers and its key."""
    post.add("orders", Letters, "post")
    producer.message_order(1, _delay=0.5)
    post.channel.exchange_delete(Letters.name)

    arrival = post.get(UNROUTABLE)

    assert ("post", 1) == (arrival.key, arrival.parameters)
    assert "letters" == arrival.headers["postage-exchange"]


def test_messages_for_keys_that_nobody_is_bound_to_hold_up_no_others(
    post: Post, producer: Sender
) -> None:
    """RabbitMQ keeps 32 dead letters on their way, and those that lead nowhere for ever."""
    post.add("orders", Letters, "post")
    with producer.batch() as batch:
        for _ in range(100):
            batch.message_order("lost", _key="nobody", _delay=1)
    producer.message_order("found", _delay=1.5)
    assert "found" == post.get("orders").parameters


def test_a_queue_that_was_declared_anew_is_found_again(
    post: Post, producer: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The binding went with the old queue. A sender renews it from time to time."""
    post.add("orders")
    monkeypatch.setattr("postage.delay.RENEWAL", 1.0)
    producer.message_order(1, _queue="orders", _delay=0.5)
    stale = time.monotonic() + 1.0
    assert 1 == post.get("orders").parameters

    post.channel.queue_delete("orders")
    post.add("orders")
    wait_until(lambda: time.monotonic() > stale)
    producer.message_order(2, _queue="orders", _delay=0.5)

    arrival = post.get("orders")
    assert (2, "orders") == (arrival.parameters, arrival.headers["postage-queue"])


def test_a_level_that_was_deleted_is_made_again(post: Post, producer: Sender) -> None:
    """The message that finds it missing is an error, the next one is sent."""
    post.add("orders")
    producer.message_order(1, _queue="orders", _delay=0.8)
    assert 1 == post.get("orders").parameters
    post.channel.queue_delete("postage-delay-03")

    with pytest.raises(UnroutableError):
        producer.message_order(2, _queue="orders", _delay=0.8)
    producer.message_order(3, _queue="orders", _delay=0.8)

    assert 3 == post.get("orders").parameters


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_messages_that_wait_outlive_the_broker(broker_url: str, node: Node, end: str) -> None:
    """Nothing is lost when it is stopped or killed, and nothing early."""
    with reading(broker_url) as post:
        post.add("orders")
    with Sender() as producer:
        producer.message_order("first", _queue="orders", _delay=3.3)
        # RabbitMQ 3.10 may bring a quorum queue back empty if it is killed within seconds
        # after the queue was declared. In good order it writes down what there is.
        node.stop()
        node.start()
        begun = time.monotonic()
        with producer.batch() as batch:
            for number in range(50):
                batch.message_order(number, _queue="orders", _delay=1 + number / 20)
        getattr(node, end)()
        node.start()
        with reading(broker_url) as post:
            arrived = {
                each.parameters: each.when for each in (post.get("orders") for _ in range(51))
            }
            assert {"first", *range(50)} == arrived.keys()
            assert all(arrived[number] >= begun + 1 + number / 20 for number in range(50))
            # The cascade is still there, and is used again.
            producer.message_order("after", _queue="orders", _delay=0.1)
            assert "after" == post.get("orders").parameters


def test_time_without_a_connection_counts_as_waiting(broker_url: str, node: Node) -> None:
    """What is due when the broker is there again goes straight."""
    with reading(broker_url) as post:
        post.add("orders")
    with Sender() as producer:
        producer.message_order("first", _queue="orders")
        node.stop()
        future = producer.message_order("held", _queue="orders", _delay=0.3, _future=True)
        due = time.monotonic() + 0.3
        node.start()
        wait_until(lambda: time.monotonic() > due)
        future.result(60)
    with reading(broker_url) as post:
        assert ["first", "held"] == post.parameters("orders", 2)


# ----------------------------------------------------------------------------- bad input


def test_a_delay_is_not_for_calls(producer: Sender) -> None:
    """Whether or not a method builds the request."""
    for keyword in ("_delay", "_at", "_ttl", "_correlation_id"):
        with pytest.raises(TypeError) as caught:
            producer.rpc_status(**{keyword: 1})
        assert f"an RPC call takes no {keyword}" in str(caught.value)


def test_headers_must_leave_room_for_those_of_the_delay(producer: Sender) -> None:
    """A header frame that is too large would cost the connection."""
    headers = {"large": "x" * 130_900}
    with pytest.raises(EncodingError):
        producer.message_order(_headers=headers, _delay=1)
    with pytest.raises(UnroutableError):
        producer.message_order(_headers=headers)


def test_the_connection_of_a_delay_is_the_shared_one(post: Post, producer: Sender) -> None:
    """Declaring takes channels for a moment, and no connection."""
    post.add("orders")
    producer.message_order(_queue="orders", _delay=0.1)
    assert 1 == len(connections.in_use())
    post.get("orders")


def test_a_queue_of_a_component_is_a_goal_like_any_other(post: Post, producer: Sender) -> None:
    """Its arguments do not matter."""
    queue = Queue("component", ttl=60)
    with GenericConsumer([(DefaultExchange, [(queue, "component")])]):
        producer.message_order(1, _queue="component", _delay=0.1)
        assert 1 == post.get("component").parameters
