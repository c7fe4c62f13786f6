# SPDX-License-Identifier: MIT
"""Messages that leave together, or not at all."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pika
import pytest

from postage.batch import BATCH_WINDOW
from postage.broker import Broker
from postage.errors import (
    BatchError,
    BrokerBlockedError,
    ClosedError,
    EncodingError,
    NackedError,
    PostageError,
    PublishTimeoutError,
    PublishUnknownError,
    UnroutableError,
)
from postage.messaging import Transaction
from tests.forks import in_child, name_of_error
from tests.letters import Mailbox, Sender
from tests.waiting import wait_until

# Python warns of a fork beside threads, since most libraries cannot bear it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """An embedded broker, for its faults, with a mailbox."""
    with Broker() as broker:
        monkeypatch.setenv("POSTAGE_URL", broker.url)
        with closing(pika.BlockingConnection(pika.URLParameters(broker.url))) as connection:
            Mailbox(connection.channel(), "mailbox")
        yield broker


def arrived_at(broker: Broker) -> list[Any]:
    with closing(pika.BlockingConnection(pika.URLParameters(broker.url))) as connection:
        return Mailbox(connection.channel(), "mailbox").parameters()


def test_messages_leave_when_the_block_ends(mailbox: Mailbox, producer: Sender) -> None:
    """Not before, and in order."""
    with producer.transaction() as tx:
        for number in range(3):
            tx.message_number(number, _message_id=f"id-{number}")
        producer.message_outside("outside")  # confirmed behind whatever was sent before
        assert 1 == mailbox.count()
        assert "<Transaction [0 sent, 0 settled, 3 held]>" == repr(tx)

    assert ["outside", 0, 1, 2] == mailbox.parameters()
    assert ["id-0", "id-1", "id-2"] == tx.confirmed
    assert ([], []) == (tx.failed, tx.unknown)
    assert "<Transaction [3 sent, 3 settled, 0 held]>" == repr(tx)


def test_nothing_leaves_if_the_block_raises(mailbox: Mailbox, producer: Sender) -> None:
    """And the exception goes on."""
    with pytest.raises(ZeroDivisionError), producer.transaction() as tx:
        tx.message_number(1)
        _ = 1 / 0

    producer.message_behind("behind")
    assert ["behind"] == mailbox.parameters()
    assert ([], [], []) == (tx.confirmed, tx.failed, tx.unknown)
    assert "<Transaction [0 sent, 0 settled, 0 held]>" == repr(tx)


def test_more_messages_than_a_window_arrive_in_order(mailbox: Mailbox, producer: Sender) -> None:
    """It sends as a batch does."""
    count = 2 * BATCH_WINDOW
    with producer.transaction() as tx:
        for number in range(count):
            tx.message_number(number)

    assert count == len(tx.confirmed)
    assert list(range(count)) == mailbox.parameters()


def test_it_has_the_sending_methods_and_keywords(mailbox: Mailbox, producer: Sender) -> None:
    """Those of a batch."""
    with producer.transaction() as tx:
        tx.message(1, k=2)
        tx.forward({"content": {"parameters": "forwarded"}}, _key="post")
        tx.message_direct("direct", _queue=mailbox.name, _headers={"a": 1})

    methods = [mailbox.channel.basic_get(mailbox.name, auto_ack=True) for _ in range(3)]
    bodies = [json.loads(body) for _method, _properties, body in methods]
    assert {"args": [1], "kwds": {"k": 2}} == bodies[0]["content"]
    assert {"parameters": "forwarded"} == bodies[1]["content"]
    assert ("", {"a": 1}) == (methods[2][0].exchange, methods[2][1].headers)


def test_what_makes_no_sense_is_refused_in_the_block(mailbox: Mailbox, producer: Sender) -> None:
    """So it ends the transaction before anything has left."""
    with pytest.raises(EncodingError), producer.transaction() as tx:
        tx.message_good("good")
        tx.message_bad(_headers={"ratio": 0.5})

    assert [] == mailbox.parameters()
    for use in (lambda: tx.rpc_echo(1), lambda: tx.close()):
        with pytest.raises(AttributeError, match="a transaction has no attribute"):
            use()
    with pytest.raises(ClosedError, match="a transaction sends inside its with block"):
        tx.message_late()
    with producer.transaction() as tx, pytest.raises(TypeError, match="a transaction takes no"):
        tx.message_x(_future=True)


# ----------------------------------------------------------------------- what fails


def test_the_error_at_the_end_lists_what_arrived_and_what_did_not(
    mailbox: Mailbox, producer: Sender
) -> None:
    """AMQP cannot take back what it took."""
    with pytest.raises(BatchError) as caught, producer.transaction() as tx:
        tx.message_a("a", _message_id="a")
        tx.message_b("b", _key="nobody", _message_id="b")
        tx.message_c("c", _message_id="c")

    ((message_id, error),) = caught.value.failed
    assert ("b", UnroutableError) == (message_id, type(error))
    assert ["a", "c"] == caught.value.confirmed == tx.confirmed
    assert ["a", "c"] == mailbox.parameters()


def test_no_more_is_sent_when_one_is_known_to_have_failed(embedded: Broker) -> None:
    """What is behind the window is held back, and counts as failed."""
    count = 2 * BATCH_WINDOW
    with (
        Sender() as producer,
        embedded.faults.nack(),
        pytest.raises(BatchError) as caught,
        producer.transaction() as tx,
    ):
        for number in range(count):
            tx.message_number(number)

    errors = [error for _id, error in caught.value.failed]
    assert count == len(errors)
    assert NackedError is type(errors[0])
    assert "certainly not sent: a message before it failed" == str(errors[-1])
    assert [] == arrived_at(embedded)


def test_a_blocked_broker_gets_nothing(embedded: Broker) -> None:
    """It is certain that nothing was sent, and nothing is when the alarm is over."""
    with Sender() as producer:
        producer.message_first("first")
        with embedded.faults.block("an alarm"):
            producer.message_probe("probe", _confirm=False)  # who publishes then is told
            wait_until(lambda: "BLOCKED" in str(producer.conn_broker.state))
            with pytest.raises(BatchError) as caught, producer.transaction() as tx:
                tx.message_x("x", _timeout=0.3)
                tx.message_y("y", _timeout=0.3)
        producer.message_last("last")

    assert [BrokerBlockedError] * 2 == [type(error) for _id, error in caught.value.failed]
    assert ["first", "probe", "last"] == arrived_at(embedded)


def test_without_a_broker_a_large_transaction_fails_at_one_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each window would wait for its own."""
    monkeypatch.setenv("POSTAGE_URL", "amqp://127.0.0.1:1")
    with (
        Sender() as producer,
        pytest.raises(BatchError) as caught,
        producer.transaction() as tx,
    ):
        for _ in range(4 * BATCH_WINDOW):
            tx.message_x(_timeout=0.3)

    errors = [error for _id, error in caught.value.failed]
    assert 4 * BATCH_WINDOW == len(errors)
    sent = [error for error in errors if isinstance(error, PublishTimeoutError)]
    assert BATCH_WINDOW + 1 == len(sent)


def test_the_deadline_counts_from_the_end_of_the_block(mailbox: Mailbox, producer: Sender) -> None:
    """The block may take its time."""
    with producer.transaction() as tx:
        tx.message_x("x", _timeout=1.0)
        began = threading.Event()
        threading.Timer(1.5, began.set).start()
        assert began.wait(60)

    assert ["x"] == mailbox.parameters()


def test_what_was_written_and_never_confirmed_is_in_doubt(embedded: Broker) -> None:
    """The broker may have taken it."""
    with Sender() as producer:
        producer.message_first("first")
        with (
            embedded.faults.delay_confirms(60),
            pytest.raises(BatchError) as caught,
            producer.transaction() as tx,
        ):
            tx.message_x("x", _timeout=0.5, _message_id="x")

    ((message_id, error),) = caught.value.unknown
    assert ("x", PublishUnknownError) == (message_id, type(error))
    assert ([], []) == (caught.value.confirmed, caught.value.failed)


def test_a_connection_that_is_lost_during_the_end_loses_nothing(embedded: Broker) -> None:
    """What was in doubt is sent again, with the same id."""
    with Sender() as producer:
        producer.message_first("first")
        with embedded.faults.delay_confirms(60):
            tx = producer.transaction()

            def send() -> None:
                with tx:
                    for number in range(100):
                        tx.message_number(number)

            thread = threading.Thread(target=send)
            thread.start()
            wait_until(lambda: producer.channel.outstanding == 100)
            wait_until(lambda: "100 unconfirmed" in repr(producer.channel))
        assert embedded.faults.drop() >= 1
        thread.join(60)

    assert 100 == len(tx.confirmed)
    assert {"first", *range(100)} == set(arrived_at(embedded))


# ---------------------------------------------------------------------- how it is used


def test_a_transaction_in_a_coroutine_is_refused(mailbox: Mailbox, producer: Sender) -> None:
    """Its end would block the event loop. In a thread it works."""

    def send(tx: Transaction) -> int:
        with tx:
            tx.message_x("x")
        return len(tx.confirmed)

    async def main() -> int:
        with pytest.raises(PostageError, match="the end of a transaction would block"):
            producer.transaction().__enter__()
        return await asyncio.to_thread(send, producer.transaction())

    assert 1 == asyncio.run(main())


def test_a_producer_that_is_closed_in_the_block_sends_nothing(
    mailbox: Mailbox, producer: Sender
) -> None:
    """The error says so."""
    with pytest.raises(ClosedError, match="after close"), producer.transaction() as tx:
        tx.message_x("x")
        producer.close()

    assert [] == mailbox.parameters()


def test_an_open_transaction_belongs_to_the_process_that_opened_it(
    mailbox: Mailbox, producer: Sender
) -> None:
    """A child hears so, and sends nothing of what its parent holds."""
    with producer.transaction() as tx:
        tx.message_before("before")
        uses = (tx.message_x, lambda: tx.__exit__(None, None, None))
        heard = in_child(lambda: [name_of_error(use) for use in uses])()
        tx.message_after("after")

    assert ["ForkedError", "ForkedError"] == heard
    assert ["before", "after"] == mailbox.parameters()
