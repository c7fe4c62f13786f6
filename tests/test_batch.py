# SPDX-License-Identifier: MIT
"""Many messages that are confirmed together."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pika
import pytest

from postage.batch import BATCH_CHUNK, BATCH_WINDOW
from postage.errors import (
    BatchError,
    ClosedError,
    EncodingError,
    NackedError,
    PostageError,
    PublishTimeoutError,
    PublishUnknownError,
    UnroutableError,
)
from postage.messaging import Batch
from tests.forks import in_child, name_of_error
from tests.letters import Letters, Mailbox, Sender
from tests.nodes import Node
from tests.waiting import wait_until


@pytest.mark.parametrize("count", [0, 1, BATCH_CHUNK - 1, BATCH_CHUNK, BATCH_CHUNK + 1])
def test_a_batch_confirms_all_of_its_messages_when_its_block_ends(
    mailbox: Mailbox, producer: Sender, count: int
) -> None:
    """It lists their ids, in order."""
    with producer.batch() as batch:
        for number in range(count):
            batch.message_number(number, _message_id=f"id-{number}")

    assert list(range(count)) == mailbox.parameters()
    assert [f"id-{number}" for number in range(count)] == batch.confirmed
    assert ([], []) == (batch.failed, batch.unknown)
    assert f"<Batch [{count} sent, {count} settled]>" == repr(batch)


def test_twenty_thousand_messages_arrive_in_order_and_few_are_in_memory(
    mailbox: Mailbox, producer: Sender
) -> None:
    """No more than a window, and what is being collected, waits for confirms at a time."""
    outstanding = 0
    with producer.batch() as batch:
        for number in range(20_000):
            batch.message_number(number)
            outstanding = max(outstanding, producer.channel.outstanding)

    assert 20_000 == len(batch.confirmed)
    assert 20_000 == len(set(batch.confirmed))
    assert list(range(20_000)) == mailbox.parameters()
    assert outstanding <= BATCH_WINDOW + 2 * BATCH_CHUNK


def test_a_batch_has_the_other_sending_methods(mailbox: Mailbox, producer: Sender) -> None:
    """And the keywords that steer them."""
    with producer.batch() as batch:
        batch.message_first()
        batch.message(1, k=2)
        batch.forward({"content": {"parameters": "forwarded"}}, _key="post")
        batch.message_direct("direct", _queue=mailbox.name, _headers={"a": 1}, _timeout=5)

    methods = [mailbox.channel.basic_get(mailbox.name, auto_ack=True) for _ in range(4)]
    bodies = [json.loads(body) for _method, _properties, body in methods]
    contents = [{"parameters": {}}, {"args": [1], "kwds": {"k": 2}}, {"parameters": "forwarded"}]
    assert contents == [body["content"] for body in bodies[:3]]
    assert ("", {"a": 1}) == (methods[3][0].exchange, methods[3][1].headers)


def test_a_builder_of_the_producer_builds_for_its_batch(mailbox: Mailbox, broker_url: str) -> None:
    """The batch makes up no names of its own."""

    class Builder(Sender):
        def build_message_pair(self, a: int, b: int) -> Any:
            from postage.messaging import MessageCommand

            return MessageCommand("pair", [b, a])

    with Builder() as producer, producer.batch() as batch:
        batch.message_pair(1, 2)

    assert [[2, 1]] == mailbox.parameters()


def test_a_message_that_waits_for_others_is_sent_soon(mailbox: Mailbox, producer: Sender) -> None:
    """The block may take its time until the next one."""
    with producer.batch() as batch:
        for number in range(3):
            batch.message_number(number)
            wait_until(lambda: len(batch.confirmed) > number, timeout=10)  # noqa: B023
            assert [number] == mailbox.parameters()


def test_a_slow_block_does_not_let_its_first_messages_expire(
    mailbox: Mailbox, broker_url: str
) -> None:
    """They were handed over long before their deadline."""

    class Impatient(Sender):
        publish_timeout = 0.5

    with Impatient() as producer:
        producer.message_warm_up("warm up")
        with producer.batch() as batch:
            batch.message_first("first")
            late = time.monotonic() + 1.0
            wait_until(lambda: time.monotonic() > late)
            batch.message_second("second")

    assert ["warm up", "first", "second"] == mailbox.parameters()


# ----------------------------------------------------------------------- what fails


def test_an_unroutable_message_in_the_middle_leaves_the_others_alone(
    mailbox: Mailbox, producer: Sender
) -> None:
    """The error at the end lists it, and what was confirmed."""
    with pytest.raises(BatchError) as caught, producer.batch() as batch:
        for number in range(200):
            key = "nobody" if number == 100 else "post"
            batch.message_number(number, _key=key, _message_id=str(number))

    ((message_id, error),) = caught.value.failed
    assert "100" == message_id
    assert isinstance(error, UnroutableError)
    assert [("letters", "nobody")] == error.failed
    others = [number for number in range(200) if number != 100]
    assert others == [int(confirmed) for confirmed in caught.value.confirmed]
    assert [] == caught.value.unknown
    assert others == mailbox.parameters()
    assert str(caught.value).startswith(
        "199 message(s) confirmed, 1 failed, 0 unknown; the first: message 100: no queue is bound"
    )
    assert (batch.confirmed, batch.failed) == (caught.value.confirmed, caught.value.failed)


def test_a_message_of_several_pairs_is_one_message(mailbox: Mailbox, producer: Sender) -> None:
    """It failed if one of its pairs did."""
    pairs = [(Letters, "post"), (Letters, "nobody")]
    with pytest.raises(BatchError) as caught, producer.batch() as batch:
        batch.message_both("both", _eks=pairs)
        batch.message_one("one")

    assert (1, 1) == (len(caught.value.confirmed), len(caught.value.failed))
    assert ["both", "one"] == mailbox.parameters()


def test_a_full_queue_refuses_some_of_a_batch(mailbox: Mailbox, producer: Sender) -> None:
    """The broker's nacks are failures."""
    limits = {"x-max-length": 5, "x-overflow": "reject-publish"}
    full = mailbox.channel.queue_declare("", exclusive=True, arguments=limits).method.queue

    with pytest.raises(BatchError) as caught, producer.batch() as batch:
        for number in range(100):
            batch.message_number(number, _queue=full)

    assert caught.value.failed
    assert 100 == len(caught.value.failed) + len(caught.value.confirmed)
    assert {NackedError} == {type(error) for _id, error in caught.value.failed}


def test_the_exception_of_the_block_goes_first(mailbox: Mailbox, producer: Sender) -> None:
    """What was sent before is waited for; that some of it failed is in the lists."""
    with pytest.raises(ZeroDivisionError), producer.batch() as batch:
        batch.message_good("good")
        batch.message_bad("bad", _key="nobody")
        _ = 1 / 0

    assert (1, 1) == (len(batch.confirmed), len(batch.failed))
    assert ["good"] == mailbox.parameters()


def test_a_message_that_cannot_be_written_is_refused_where_it_is_sent(
    mailbox: Mailbox, producer: Sender
) -> None:
    """The block may catch that and go on."""
    with producer.batch() as batch:
        batch.message_first("first")
        with pytest.raises(EncodingError):
            batch.message_bad({1, 2})
        with pytest.raises(EncodingError):
            batch.message_bad(_headers={"ratio": 0.5})
        batch.message_second("second")

    assert 2 == len(batch.confirmed)
    assert ["first", "second"] == mailbox.parameters()


def test_without_a_broker_all_of_a_batch_fails_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is unknown, since nothing was sent."""
    monkeypatch.setenv("POSTAGE_URL", "amqp://127.0.0.1:1")
    with (
        Sender() as producer,
        pytest.raises(BatchError) as caught,
        producer.batch() as batch,
    ):
        for number in range(BATCH_CHUNK * 2):
            batch.message_number(number, _timeout=0.3)

    assert BATCH_CHUNK * 2 == len(caught.value.failed)
    assert {PublishTimeoutError} == {type(error) for _id, error in caught.value.failed}


def test_what_was_written_and_never_confirmed_is_unknown(
    node: Node, mailbox: Mailbox, producer: Sender
) -> None:
    """A frozen broker may have taken it."""
    producer.message_warm_up("warm up")
    node.suspend()
    try:
        with pytest.raises(BatchError) as caught, producer.batch() as batch:
            for number in range(10):
                batch.message_number(number, _timeout=0.3, _message_id=str(number))
    finally:
        node.resume()

    assert [str(number) for number in range(10)] == [each for each, _ in caught.value.unknown]
    assert {PublishUnknownError} == {type(error) for _id, error in caught.value.unknown}
    assert ([], []) == (caught.value.confirmed, caught.value.failed)


def test_a_block_that_is_not_too_fast_does_not_fill_the_memory_either(
    node: Node, mailbox: Mailbox, broker_url: str
) -> None:
    """While a broker is frozen, a batch waits as soon as its window is full."""

    class Impatient(Sender):
        publish_timeout = 2

    outstanding = 0
    with Impatient() as producer:
        producer.message_warm_up("warm up")
        node.suspend()
        try:
            with pytest.raises(BatchError), producer.batch() as batch:
                for number in range(BATCH_WINDOW + 10 * BATCH_CHUNK):
                    batch.message_number(number)
                    outstanding = max(outstanding, producer.channel.outstanding)
                    if number % (BATCH_CHUNK // 2) == 0:
                        wait_until(lambda: not batch._chunk)
        finally:
            node.resume()

    assert outstanding <= BATCH_WINDOW + 2 * BATCH_CHUNK


def test_a_connection_that_is_lost_during_a_batch_loses_nothing(
    node: Node, producer: Sender, broker_url: str
) -> None:
    """What was in doubt is sent again, with the same id."""
    vhost = broker_url.rsplit("/", 1)[1]
    with closing(pika.BlockingConnection(pika.URLParameters(broker_url))) as connection:
        Mailbox(connection.channel(), "kept")
    stop = threading.Event()

    def cut() -> None:
        node.close_connections("cut by a test", vhost)
        stop.set()

    with producer.batch() as batch:
        cutter = threading.Thread(target=cut)
        cutter.start()
        number = 0
        while not stop.is_set():
            batch.message_number(number)
            number += 1
        cutter.join()
        batch.message_number(number)

    assert number + 1 == len(batch.confirmed)
    with closing(pika.BlockingConnection(pika.URLParameters(broker_url))) as connection:
        arrived = set(Mailbox(connection.channel(), "kept").parameters())
    assert set(range(number + 1)) == arrived


# ---------------------------------------------------------------------- how it is used


def test_threads_have_a_batch_each(mailbox: Mailbox, producer: Sender) -> None:
    """They share the producer, and each keeps its order."""

    def send(sender: int) -> int:
        with producer.batch() as batch:
            for number in range(1000):
                batch.message_number(sender, number)
        return len(batch.confirmed)

    with ThreadPoolExecutor(8) as pool:
        assert [1000] * 8 == list(pool.map(send, range(8)))

    arrived = mailbox.parameters()
    for sender in range(8):
        assert list(range(1000)) == [number for by, number in arrived if by == sender]


def test_a_batch_sends_inside_its_block_only(mailbox: Mailbox, producer: Sender) -> None:
    """Outside nobody would wait for the confirm."""
    batch = producer.batch()
    with pytest.raises(ClosedError, match="inside its with block"):
        batch.message_early()
    with batch:
        batch.message_good("good")
    with pytest.raises(ClosedError, match="inside its with block"):
        batch.message_late()

    assert ["good"] == mailbox.parameters()


@pytest.mark.parametrize("name", ["rpc_echo", "rpc_queue_echo", "consume_rpc", "close"])
def test_a_batch_makes_no_calls(producer: Sender, name: str) -> None:
    """It says what it does instead."""
    batch = producer.batch()

    with pytest.raises(AttributeError, match=f"no attribute '{name}': it sends with message_"):
        getattr(batch, name)
    assert not hasattr(batch, name)


def test_a_batch_has_no_futures(producer: Sender) -> None:
    """Somebody would wait for a None."""
    with producer.batch() as batch:
        for send in (batch.message_x, batch.message):
            with pytest.raises(TypeError, match="_future"):
                send(_future=True)
        with pytest.raises(TypeError, match="_future"):
            batch.forward({}, _future=True)

    assert [] == batch.confirmed


def test_a_batch_refuses_a_misspelt_keyword(producer: Sender) -> None:
    """As the producer does."""
    with producer.batch() as batch:
        for send in (batch.message_x, batch.message):
            with pytest.raises(TypeError, match="_kye"):
                send(_kye="k")
        with pytest.raises(TypeError, match="_kye"):
            batch.forward({}, _kye="k")


def test_a_batch_in_a_coroutine_is_refused(producer: Sender) -> None:
    """Its end would block the event loop. In a thread it works."""

    def send(batch: Batch) -> int:
        with batch:
            batch.message_x(_mandatory=False)
        return len(batch.confirmed)

    async def main() -> int:
        with pytest.raises(PostageError, match="would block the event loop"), producer.batch():
            pass
        return await asyncio.to_thread(send, producer.batch())

    assert 1 == asyncio.run(main())


def test_a_batch_of_a_closed_producer_is_refused(producer: Sender) -> None:
    """Whether it was closed before, or inside the block."""
    with pytest.raises(PostageError), producer.batch() as batch:
        batch.message_x(_mandatory=False)
        producer.close()
        batch.message_y(_mandatory=False)
    with pytest.raises(ClosedError):
        producer.batch()


def test_an_open_batch_belongs_to_the_process_that_opened_it(
    mailbox: Mailbox, producer: Sender
) -> None:
    """A child hears so when it sends, and when its copy of the block ends."""
    with producer.batch() as batch:
        batch.message_before("before")
        uses = (batch.message_x, lambda: batch.__exit__(None, None, None))
        heard = in_child(lambda: [name_of_error(use) for use in uses])()
        batch.message_after("after")

    assert ["ForkedError", "ForkedError"] == heard
    assert ["before", "after"] == mailbox.parameters()
