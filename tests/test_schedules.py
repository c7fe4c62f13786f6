# SPDX-License-Identifier: MIT
"""Schedules: delivered when they are due, or cancelled, and never both nor neither."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pika
import pytest

from postage import schedules
from postage.errors import (
    ChannelClosedError,
    ClosedError,
    ConfigurationError,
    ConnectionLostError,
    EncodingError,
    MessageNotFoundError,
    PostageError,
    TransportError,
    UnroutableError,
)
from postage.messaging import (
    Exchange,
    GenericProducer,
    Message,
    MessageHandler,
    MessageProcessor,
)
from postage.microthreads import MicroScheduler
from postage.retry import RetryPolicy
from postage.schedules import Scheduled, entry_of, ledger_of, pending
from tests.letters import Letters, Mailbox, Sender
from tests.nodes import Node
from tests.waiting import wait_until

#: Seconds far away from the end of a test.
LATER = 3600.0
#: Races of cancelling against firing; more in the long form of the chaos suite.
RACES = 1000 if "POSTAGE_CHAOS_SECONDS" in os.environ else 200


def now() -> datetime:
    return datetime.now(timezone.utc)


def holding_queues(node: Node, url: str) -> list[str]:
    """The holding queues that are there."""
    rows = node.queues(url.rpartition("/")[2])
    return [row.name for row in rows if row.name.startswith("postage-schedule-")]


def delivered(mailbox: Mailbox, number: int) -> list[Any]:
    """Wait for so many messages and return what they say."""
    wait_until(lambda: mailbox.count() >= number)
    return mailbox.parameters()


@pytest.fixture
def keeping(broker_url: str) -> Iterator[Mailbox]:
    """A durable queue, for what a broker that starts again delivers."""
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    Mailbox(connection.channel(), "keeping")
    connection.close()
    yield None  # type: ignore[misc]


# ------------------------------------------------------------------------- being due


def test_a_scheduled_message_comes_when_it_is_due_and_not_before(
    producer: Sender, mailbox: Mailbox
) -> None:
    """It is a usual message, in time, with its own routing key."""
    # When
    due = now() + timedelta(seconds=0.7)
    scheduled = producer.schedule_hello("later", _at=due, _message_id="mine")
    # Then
    assert due == scheduled.due
    assert 0 == mailbox.count()
    wait_until(mailbox.count)
    assert now() >= due
    method, properties, _body = mailbox.channel.basic_get(mailbox.name, auto_ack=True)
    assert ("letters", "post") == (method.exchange, method.routing_key)
    assert ("mine", None) == (properties.message_id, properties.expiration)
    assert scheduled.id == properties.headers["postage-schedule"]
    assert due.isoformat() == properties.headers["postage-due"]


def test_a_schedule_goes_to_a_queue(producer: Sender, mailbox: Mailbox) -> None:
    """With _queue it needs no exchange."""
    kept = Mailbox(mailbox.channel, "kept")
    producer.schedule_hello("later", _delay=0.2, _queue="kept")
    assert ["later"] == delivered(kept, 1)


def test_a_schedule_for_an_exclusive_queue_is_refused(producer: Sender, mailbox: Mailbox) -> None:
    """Nobody else may ask whether it is there; the error tells the way around."""
    with pytest.raises(ChannelClosedError, match="through an exchange"):
        producer.schedule_hello("never", _delay=1, _queue=mailbox.name)


def test_what_is_due_already_comes_at_once(producer: Sender, mailbox: Mailbox) -> None:
    """A time in the past is now."""
    producer.schedule_hello("past", _at=now() - timedelta(days=1))
    producer.schedule_hello("now", _delay=0)
    east = timezone(timedelta(hours=9))
    producer.schedule_hello("long ago", _at=datetime.min.replace(tzinfo=east))
    assert ["long ago", "now", "past"] == sorted(delivered(mailbox, 3))


def test_a_schedule_is_built_like_a_message(broker_url: str, mailbox: Mailbox) -> None:
    """schedule_x is the twin of message_x, with the same build_message_x."""

    class Builder(Sender):
        def build_message_sum(self, a: int, b: int) -> Message:
            return Message(a + b)

    with Builder() as builder:
        builder.schedule_sum(1, b=2, _delay=0.1)
        wait_until(mailbox.count)
    [body] = mailbox.bodies()
    assert [3] == body["content"]["args"]


def test_a_schedule_that_waited_may_be_sent_on_later_still(
    producer: Sender, mailbox: Mailbox
) -> None:
    """What a schedule leaves in the headers does not lead the next one astray."""
    # Given
    producer.schedule_hello("again", _delay=0.1)
    wait_until(mailbox.count)
    _method, properties, _body = mailbox.channel.basic_get(mailbox.name, auto_ack=True)
    # When
    producer.schedule_hello("again", _delay=0.1, _headers=properties.headers)
    producer.message_hello("once more", _delay=0.3, _headers=properties.headers)
    # Then
    assert ["again", "once more"] == delivered(mailbox, 2)


def test_a_schedule_with_future_is_confirmed_later(producer: Sender, mailbox: Mailbox) -> None:
    """The handle is there at once, and its future says when the broker has the message."""

    async def send() -> Scheduled:
        scheduled: Scheduled = producer.schedule_hello("later", _delay=0.2, _future=True)
        assert scheduled.confirmed is not None
        await scheduled.confirmed
        return scheduled

    scheduled = asyncio.run(send())
    assert 32 == len(scheduled.id)
    assert ["later"] == delivered(mailbox, 1)


def test_a_schedule_in_an_outbox_waits_for_its_handler(
    broker_url: str, mailbox: Mailbox, producer: Sender
) -> None:
    """If that fails, nothing is scheduled; until then there is nothing to cancel."""
    attempts = list[Scheduled]()

    class Clerk(MessageProcessor):
        outbox = True
        retry = RetryPolicy(delay=0.0)

        @MessageHandler("command", "order")
        def msg_order(self, content: Any) -> None:
            attempts.append(producer.schedule_remind("later", _delay=0.3))
            with pytest.raises(MessageNotFoundError):
                attempts[-1].cancel()
            if len(attempts) == 1:
                raise RuntimeError("the first time")

    clerk = Clerk({"name": "clerk"}, [(Letters, [("orders", "order")])])
    scheduler = MicroScheduler()
    scheduler.add_microthread(clerk)
    thread = threading.Thread(target=lambda: list(scheduler.main()))
    thread.start()
    try:
        producer.message_order(_key="order")
        wait_until(mailbox.count)
        [_method, properties, _body] = mailbox.channel.basic_get(mailbox.name, auto_ack=True)
    finally:
        clerk.stop_consuming()
        scheduler.exit()
        thread.join()
    assert 2 == len(attempts)
    assert attempts[1].id == properties.headers["postage-schedule"]
    assert 0 == mailbox.count()


# ------------------------------------------------------------------------- cancelling


def test_a_cancelled_schedule_does_not_come(
    producer: Sender, mailbox: Mailbox, node: Node, broker_url: str
) -> None:
    """It is counted, and its queue is gone with it."""
    scheduled = producer.schedule_hello("never", _delay=0.5)
    assert 1 == scheduled.cancel()
    wait_until(lambda: not holding_queues(node, broker_url))
    wait_until(lambda: now() > scheduled.due)
    producer.message_hello("the next one")
    assert ["the next one"] == delivered(mailbox, 1)


def test_a_schedule_is_cancelled_once(producer: Sender, mailbox: Mailbox) -> None:
    """The second attempt says that there is nothing to cancel."""
    scheduled = producer.schedule_hello("never", _delay=LATER)
    assert 1 == scheduled.cancel()
    with pytest.raises(MessageNotFoundError, match=scheduled.id):
        scheduled.cancel()


def test_a_schedule_that_came_cannot_be_cancelled(producer: Sender, mailbox: Mailbox) -> None:
    """It is too late then."""
    scheduled = producer.schedule_hello("there", _delay=0.1)
    wait_until(mailbox.count)
    with pytest.raises(MessageNotFoundError):
        scheduled.cancel()
    assert ["there"] == mailbox.parameters()


def test_another_process_cancels_by_the_id(producer: Sender, mailbox: Mailbox) -> None:
    """The id is all that it needs."""
    scheduled = producer.schedule_hello("never", _delay=LATER)
    with GenericProducer() as other:
        assert 1 == other.cancel_schedule(scheduled.id)
    assert [] == pending()


@pytest.mark.parametrize("id", ["", "x", "0" * 31, "A" * 32, "0" * 33, None, 7])
def test_what_is_no_id_is_refused(producer: Sender, id: Any) -> None:
    """It is not looked for: it cannot be the id of a schedule."""
    with pytest.raises(ConfigurationError, match="no id of a schedule"):
        producer.cancel_schedule(id)


def test_cancelling_in_a_coroutine_is_refused(producer: Sender, mailbox: Mailbox) -> None:
    """It would block the event loop, and asyncio has a way around."""
    scheduled = producer.schedule_hello("never", _delay=LATER)

    async def cancel() -> int:
        with pytest.raises(PostageError, match="to_thread"):
            scheduled.cancel()
        return await asyncio.to_thread(scheduled.cancel)

    assert 1 == asyncio.run(cancel())


@pytest.mark.slow
def test_a_schedule_is_cancelled_or_comes(producer: Sender, mailbox: Mailbox) -> None:
    """A race of cancelling against firing has one winner: never both, and never neither."""
    # When
    cancelled, late = set[int](), list[Scheduled]()
    ahead = 0.02  # seconds before a schedule is due at which it is cancelled
    for number in range(RACES):
        scheduled = producer.schedule_race(number, _delay=0.1)
        while now() < scheduled.due - timedelta(seconds=ahead):  # a sleep is not exact enough
            pass
        try:
            assert 1 == scheduled.cancel()
        except MessageNotFoundError:
            late.append(scheduled)
            ahead += 0.001  # so about half of them are too late, on any machine
        else:
            cancelled.add(number)
            ahead -= 0.001
    # Then
    wait_until(lambda: mailbox.count() + len(cancelled) >= RACES, 60.0)
    came = sorted(mailbox.parameters())
    assert sorted(set(range(RACES)) - cancelled) == came
    assert RACES / 4 < len(came) < RACES * 3 / 4, "that was no race"
    for scheduled in late:
        mailbox.channel.queue_delete(f"postage-schedule-{scheduled.id}")


class Asking:
    """A connection in the middle of which something happens: an error, and then perhaps again."""

    def __init__(self, error: TransportError) -> None:
        self.error = error

    def ask(self, script: Callable[[Any], Any], timeout: float, what: str) -> Any:
        channel = SimpleNamespace(queue_purge=print)
        conversation = script(channel)
        next(conversation)
        if isinstance(self.error, ConnectionLostError):
            conversation.close()
            return next(script(channel))  # a lost connection runs it again on the next one
        return conversation.throw(self.error)


def test_a_connection_that_is_lost_while_cancelling_leaves_it_in_doubt() -> None:
    """To ask again could say that there is nothing to cancel, though it was cancelled."""
    with pytest.raises(ConnectionLostError, match="may have worked"):
        schedules.cancel(Asking(ConnectionLostError()), "0" * 32, 1.0)  # type: ignore[arg-type]


def test_a_broker_that_refuses_to_cancel_says_why() -> None:
    """Nothing is said about the schedule then."""
    with pytest.raises(ChannelClosedError, match=r"cancel schedule 0000.* 403"):
        refusal = ChannelClosedError(403, "ACCESS_REFUSED")
        schedules.cancel(Asking(refusal), "0" * 32, 1.0)  # type: ignore[arg-type]


# --------------------------------------------------------------------- broken brokers


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_schedules_outlive_the_broker(node: Node, broker_url: str, keeping: Any, how: str) -> None:
    """What is due later comes then, what was due meanwhile at once; one can still be cancelled."""
    # Given
    with Sender() as producer:
        later = producer.schedule_hello("later", _delay=20.0)
        never = producer.schedule_hello("never", _delay=20.0)
        meanwhile = producer.schedule_hello("meanwhile", _delay=3.0)
    # RabbitMQ 3.10.8, killed within a second after a quorum queue was declared, has forgotten
    # what is in it, though it was confirmed.
    wait_until(lambda: now() > meanwhile.due - timedelta(seconds=1.2))
    # When
    getattr(node, how)()
    wait_until(lambda: now() > meanwhile.due)
    node.start()
    # Then
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    mailbox = Mailbox(connection.channel(), "keeping")
    assert ["meanwhile"] == delivered(mailbox, 1)
    assert now() < later.due, "the broker took too long to start for this test"
    with Sender() as producer:
        assert 1 == producer.cancel_schedule(never.id)
        assert [later.id] == [entry.id for entry in pending()]
    assert ["later"] == delivered(mailbox, 1)
    assert now() >= later.due
    connection.close()


def test_the_queue_of_a_schedule_goes_after_it(
    producer: Sender,
    mailbox: Mailbox,
    node: Node,
    broker_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody has to tidy up, nor in the list."""
    monkeypatch.setattr(schedules, "LINGER_SECONDS", 1.0)
    producer.schedule_hello("short", _delay=0.2)
    assert ["short"] == delivered(mailbox, 1)
    wait_until(lambda: not holding_queues(node, broker_url))
    ledger = "postage-schedules-1"
    declare = mailbox.channel.queue_declare
    wait_until(lambda: declare(ledger, passive=True).method.message_count == 0)


# ------------------------------------------------------------------------------ looking


def test_what_waits_is_listed(producer: Sender, mailbox: Mailbox) -> None:
    """In the order in which it is due, with its goal and its message, again and again."""
    # Given
    Mailbox(mailbox.channel, "kept")
    second = producer.schedule_hello("b", _delay=LATER)
    first = producer.schedule_report("a", _delay=LATER / 2, _queue="kept")
    gone = producer.schedule_hello("c", _delay=LATER)
    gone.cancel()
    came = producer.schedule_hello("d", _delay=0.1)
    wait_until(lambda: mailbox.count() and now() > came.due)
    # When
    entries = pending()
    # Then
    assert [first.id, second.id] == [entry.id for entry in entries]
    assert [first.due, second.due] == [entry.due for entry in entries]
    assert (None, None, "kept") == (entries[0].exchange, entries[0].key, entries[0].queue)
    assert ("letters", "post", None) == (entries[1].exchange, entries[1].key, entries[1].queue)
    assert ("command", "report") == (entries[0].type, entries[0].name)
    assert entries == pending()


def test_nothing_is_listed_where_nothing_waits(broker_url: str) -> None:
    """Also where there never was a schedule."""
    assert [] == pending()


@pytest.mark.parametrize(
    ("seconds", "digits"), [(0.0, 1), (9.99, 1), (10.0, 2), (99.0, 2), (366 * 24 * 3600.0, 8)]
)
def test_schedules_are_listed_by_the_digits_of_their_seconds(seconds: float, digits: int) -> None:
    """So that none waits long behind another one of the list, though it has expired."""
    assert f"postage-schedules-{digits}" == ledger_of(seconds)
    assert digits <= schedules.MOST_DIGITS


GOOD = {"postage-schedule": "a", "postage-due": "2030-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (None, b""),
        ({}, b""),
        ({**GOOD, "postage-due": None}, b""),
        ({**GOOD, "postage-due": "soon"}, b""),
        ({**GOOD, "postage-due": "2030-01-01T00:00:00"}, b""),
        ({**GOOD, "postage-schedule": "b"}, b""),
    ],
)
def test_what_others_put_into_the_list_is_passed_over(headers: Any, body: bytes) -> None:
    """It says nothing about a schedule."""
    properties = pika.BasicProperties(headers=headers)
    assert entry_of("postage-schedule-a", properties, body) is None


@pytest.mark.parametrize("body", [b"", b"\xff\x00", b"[]", b"7", b'{"name": null}'])
def test_a_schedule_with_any_body_is_listed(body: bytes) -> None:
    """What is no JSON has no type and no name."""
    entry = entry_of("postage-schedule-a", pika.BasicProperties(headers=GOOD), body)
    assert entry is not None
    assert (None, None) == (entry.type, entry.name)


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "when",
    [
        {},
        {"_delay": -1},
        {"_delay": math.nan},
        {"_delay": math.inf},
        {"_delay": True},
        {"_delay": "soon"},
        {"_delay": timedelta(seconds=-1)},
        {"_delay": 367 * 24 * 3600},
        {"_at": datetime(2030, 1, 1)},
        {"_at": 7},
        {"_at": datetime(9999, 1, 1, tzinfo=timezone.utc)},
        {"_at": datetime(2030, 1, 1, tzinfo=timezone.utc), "_delay": 1},
    ],
)
def test_a_due_time_that_makes_no_sense_is_refused(producer: Sender, when: dict[str, Any]) -> None:
    """Before anything is sent."""
    with pytest.raises(ConfigurationError):
        producer.schedule_hello("never", **when)
    assert [] == pending()


@pytest.mark.parametrize("keyword", ["_mandatory", "_confirm", "_ttl"])
def test_what_makes_no_sense_for_a_schedule_is_refused(producer: Sender, keyword: str) -> None:
    """It is always mandatory and confirmed, and expires when it is due."""
    with pytest.raises(TypeError, match=keyword):
        producer.schedule_hello("never", _delay=1, **{keyword: 1})


def test_an_unknown_keyword_is_refused(producer: Sender) -> None:
    """As for every message."""
    with pytest.raises(TypeError, match="_dely"):
        producer.schedule_hello("never", _dely=1)


def test_a_schedule_has_one_goal(producer: Sender) -> None:
    """With two it could be cancelled for one of them only."""
    with pytest.raises(ConfigurationError, match="one goal"):
        producer.schedule_hello("never", _delay=1, _eks=[(Letters, "a"), (Letters, "b")])


def test_a_schedule_for_a_queue_that_is_not_there_is_refused(producer: Sender) -> None:
    """As for every message to a queue."""
    with pytest.raises(UnroutableError, match="nowhere"):
        producer.schedule_hello("never", _delay=1, _queue="nowhere")


def test_an_exchange_of_another_type_is_refused(producer: Sender, mailbox: Mailbox) -> None:
    """As for every message."""

    class Other(Exchange):
        name = "letters"
        exchange_type = "fanout"

    with pytest.raises(PostageError, match="letters"):
        producer.schedule_hello("never", _delay=1, _eks=[(Other, "post")])


@pytest.mark.parametrize("header", ["CC", "BCC"])
def test_copies_of_a_schedule_are_refused(producer: Sender, header: str) -> None:
    """They would be delivered at once."""
    with pytest.raises(ConfigurationError, match=header):
        producer.schedule_hello("never", _delay=1, _headers={header: ["post"]})


def test_headers_that_leave_no_room_are_refused(producer: Sender) -> None:
    """They would cost the connection."""
    with pytest.raises(EncodingError):
        producer.schedule_hello("never", _delay=1, _headers={"x": "y" * 130_700})


def test_a_closed_producer_schedules_nothing(broker_url: str) -> None:
    """As for every message."""
    producer = Sender()
    producer.close()
    with pytest.raises(ClosedError):
        producer.schedule_hello("never", _delay=1)


def test_the_longest_schedule_can_be_made_and_cancelled(producer: Sender, mailbox: Mailbox) -> None:
    """366 days are within what RabbitMQ takes."""
    scheduled = producer.schedule_hello("next year", _delay=timedelta(days=366))
    assert 1 == len(pending())
    assert 1 == scheduled.cancel()


def test_classic_queues_serve_as_well(
    producer: Sender, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POSTAGE_QUEUE_TYPE chooses them."""
    monkeypatch.setenv("POSTAGE_QUEUE_TYPE", "classic")
    producer.schedule_hello("later", _delay=0.2)
    assert 1 == producer.schedule_hello("never", _delay=LATER).cancel()
    assert ["later"] == delivered(mailbox, 1)
