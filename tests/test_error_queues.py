# SPDX-License-Identifier: MIT
"""Error queues: what is in them, and how it leaves them."""

from __future__ import annotations

import gc
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from postage.error_queues import ErrorQueue, Group, known_error_queues
from postage.errors import (
    BatchError,
    BrokerBlockedError,
    ChannelClosedError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    DecodeError,
    EncodingError,
    TransportError,
    UnroutableError,
)
from postage.parking import announcement, ledger_queue
from postage.transport.publisher import encoded_size
from tests.nodes import Node
from tests.parked import HEADERS, bodies, opened, park, park_numbers, ready, taken
from tests.waiting import wait_until


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    """A channel of pika, with the queues q and q.error."""
    with opened(broker_url) as channel:
        yield channel


@pytest.fixture
def errors(channel: BlockingChannel) -> Iterator[ErrorQueue]:
    """The error queue of q."""
    with ErrorQueue("q.error") as errors:
        yield errors


# ---------------------------------------------------------------------------- looking


def test_looking_changes_nothing_and_keeps_the_order(
    channel: BlockingChannel, errors: ErrorQueue
) -> None:
    """Also where only some are asked for: a quorum queue would put those behind the others."""
    park_numbers(channel, 30)

    for limit in (3, 30, None, 1, 0, 7):
        expected = [b"%d" % each for each in range(30)][:limit]
        assert expected == [parked.body for parked in errors.messages(limit)]
    assert b"0" == next(iter(errors)).body  # and whoever has seen enough
    assert [b"%d" % each for each in range(30)] == [each.body for each in errors]
    assert 30 == errors.count()


def test_a_parked_message_says_everything(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """What happened, to what, and to whom."""
    try:
        raise LookupError("lost")
    except LookupError as error:
        park(channel, b"\xff\x00", error=error, handler="msg_a", message_id="m", headers=HEADERS)
    parked = errors.get("m")

    assert b"\xff\x00" == parked.body
    assert ("failed", "q", "ex", "key", "msg_a", 6) == (
        parked.reason,
        parked.queue,
        parked.exchange,
        parked.routing_key,
        parked.handler,
        parked.attempts,
    )
    assert ("LookupError", "lost") == (parked.exception, parked.error)
    assert parked.traceback is not None and "raise LookupError" in parked.traceback
    assert "name=tested pid=12" == parked.parked_by
    assert HEADERS == {key: parked.properties.headers[key] for key in HEADERS}


def test_a_summary_groups_by_queue_and_exception(
    channel: BlockingChannel, errors: ErrorQueue
) -> None:
    """The largest group first."""
    park(channel, error=KeyError("a"))
    for _ in range(3):
        park(channel, error=ValueError("b"))
    park(channel, queue="other", reason="unhandled")
    channel.basic_publish("", "q.error", b"by hand")

    summary = errors.summary()

    assert [
        (3, "q", "failed", "ValueError"),
        (1, None, None, None),
        (1, "other", "unhandled", None),
        (1, "q", "failed", "KeyError"),
    ] == [(each.messages, each.queue, each.reason, each.exception) for each in summary]
    assert summary[0].first_failure is not None
    assert Group(None, None, None, 1, None, None) == summary[1]


def test_what_is_not_there_is_said(errors: ErrorQueue, broker_url: str) -> None:
    """No such message, no such queue, and after the end."""
    with pytest.raises(ConfigurationError, match=r"there is no message 'm' in 'q\.error'"):
        errors.get("m")
    with (
        ErrorQueue("nothing.error") as nothing,
        pytest.raises(ChannelClosedError, match=r"read queue 'nothing\.error'.* 404"),
    ):
        nothing.summary()
    with pytest.raises(ClosedError):
        nothing.count()
    with pytest.raises(ConfigurationError):
        ErrorQueue("")


def test_what_is_dropped_open_warns(channel: BlockingChannel) -> None:
    """As every object here that holds a connection."""
    errors = ErrorQueue("q.error")
    connection, message = errors._connection, repr(errors)
    with pytest.warns(ResourceWarning, match="was dropped without close"):
        del errors
        gc.collect()
    from postage.transport import connection as connections

    connections.release(connection)
    assert "<ErrorQueue q.error " in message
    assert "guest:guest" not in message


def test_many_messages_are_read_in_order(
    channel: BlockingChannel, errors: ErrorQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one consumer may hold: RabbitMQ gives one no more than 2,000 at a time."""
    park_numbers(channel, 250)
    expected = [b"%d" % each for each in range(250)]
    progress: list[tuple[int, int]] = []
    errors.on_progress = lambda done, all: progress.append((done, all))

    assert expected == [each.body for each in errors]
    assert [(each, 250) for each in range(1, 251)] == progress


# ------------------------------------------------------------------------------ retry


def test_a_retry_sends_the_original_back(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """Without a word of what had happened, except which handler it is for."""
    channel.queue_declare("copied")
    for handler in (None, "msg_a"):
        park(
            channel,
            b"\x80binary",
            error=ValueError("x"),
            handler=handler,
            message_id="m",
            correlation_id="c",
            content_type="t",
            headers=HEADERS
            | {
                "postage-attempt": 3,
                "postage-attempts": 9,
                "postage-first-failure": "2020",
                "postage-bit-03": True,
                "postage-exchange": "goal",
                "CC": ["copied"],
            },
        )

    assert 2 == errors.retry()
    (first, body), (second, _) = taken(channel)

    assert b"\x80binary" == body
    assert ("m", "c", "t", 2) == (
        first.message_id,
        first.correlation_id,
        first.content_type,
        first.delivery_mode,
    )
    assert HEADERS | {"postage-cc": ["copied"]} == first.headers
    assert first.headers | {"postage-handler": "msg_a"} == second.headers
    assert 0 == errors.count()
    assert [] == bodies(channel, "copied")


def test_a_retry_may_choose(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """By ids, and by the exception. What is not chosen keeps its order."""
    for number in range(6):
        error = (ValueError if number % 2 else KeyError)("x")
        park(channel, b"%d" % number, message_id=f"m{number}", error=error)

    assert 1 == errors.retry("m1")
    assert 1 == errors.retry(exception="ValueError", ids=["m5", "m5"])
    assert [b"1", b"5"] == bodies(channel)
    assert 0 == errors.retry(exception="OSError")
    assert [b"0", b"2", b"3", b"4"] == [each.body for each in errors]


def test_an_id_that_is_not_there_is_named(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """The others go."""
    park_numbers(channel, 2)
    with pytest.raises(BatchError, match="there is no message 'm7'") as caught:
        errors.retry(["m1", "m7"])

    assert (["m1"], ["m7"]) == (caught.value.confirmed, [each for each, _ in caught.value.failed])
    assert [b"1"] == bodies(channel)


def test_a_message_without_an_id_gets_a_name(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """Which is the same at each look."""
    for body in (b"a", b"b"):
        park(channel, body)
    first, second = [each.id for each in errors]

    assert first != second
    assert 1 == errors.retry([second])
    assert [b"b"] == bodies(channel)


def test_what_rabbitmq_dead_lettered_goes_back_again_and_again(
    channel: BlockingChannel, errors: ErrorQueue
) -> None:
    """Its own record would make RabbitMQ drop the message the second time, in silence."""
    channel.queue_declare(
        "limited",
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-delivery-limit": 1,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": "q.error",
        },
    )
    channel.basic_publish("", "limited", b"poison", pika.BasicProperties(message_id="m"))
    for _ in range(3):

        def give_back() -> bool:
            method, _, _ = channel.basic_get("limited")
            if method is not None:
                channel.basic_nack(method.delivery_tag)
            return errors.count() == 1

        wait_until(give_back)
        [parked] = errors
        assert ("delivery_limit", "limited", "", "limited") == (
            parked.reason,
            parked.queue,
            parked.exchange,
            parked.routing_key,
        )
        assert parked.last_failure is not None and parked.last_failure.endswith("Z")
        assert 1 == errors.retry()
        assert 0 == errors.count()
    [(properties, body)] = taken(channel, "limited")
    assert (b"poison", "m") == (body, properties.message_id)
    assert "x-death" not in properties.headers


def test_a_foreign_message_needs_a_target(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """Nothing says where it came from. The others go nevertheless."""
    channel.basic_publish("", "q.error", b"by hand", pika.BasicProperties(message_id="f"))
    park_numbers(channel, 1)

    assert [True, False] == [each.is_foreign for each in errors]
    with pytest.raises(BatchError, match="nothing says which queue") as caught:
        errors.retry()
    assert ["m0"] == caught.value.confirmed
    assert [b"0"] == bodies(channel)
    assert 1 == errors.retry(queue="q")
    assert [b"by hand"] == bodies(channel)


def test_what_cannot_go_stays(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """Its queue is gone, for instance."""
    park(channel, b"gone", queue="gone", message_id="g")
    park_numbers(channel, 1)
    with pytest.raises(BatchError) as caught:
        errors.retry()

    [(id, error)] = caught.value.failed
    assert "g" == id
    assert isinstance(error, UnroutableError)
    assert [b"0"] == bodies(channel)
    assert [b"gone"] == [each.body for each in errors]


def test_a_message_of_another_user_goes_back(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """RabbitMQ takes a message only from the user that it names."""
    properties = pika.BasicProperties(user_id="guest", message_id="m")
    channel.basic_publish("", "q.error", b"{}", properties)

    assert "guest" == errors.get("m").properties.user_id
    assert 1 == errors.retry(queue="q")
    [(properties, _)] = taken(channel)
    assert properties.user_id is None


def test_a_component_that_fails_again_at_once_makes_no_endless_retry(
    channel: BlockingChannel, errors: ErrorQueue, broker_url: str
) -> None:
    """What was there at the beginning goes, once."""
    park_numbers(channel, 40)
    stopped = threading.Event()

    def fail_again() -> None:
        with opened(broker_url) as back:
            while not stopped.is_set():
                method, properties, body = back.basic_get("q")
                if method is not None:
                    park(back, body, message_id=properties.message_id)
                    back.basic_ack(method.delivery_tag)

    thread = threading.Thread(target=fail_again)
    thread.start()
    try:
        assert 40 == errors.retry()
        wait_until(lambda: errors.count() == 40)
    finally:
        stopped.set()
        thread.join()


# ------------------------------------------------------------------------------- edit


def test_an_edited_message_goes_back(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """Only the first of that id, and the others keep their order."""
    for body in (b"0", b"1", b"2"):
        park(channel, body, message_id="m", headers={"a": 1, "b": 2})

    errors.edit("m", body={"new": "ü"}, headers={"a": None, "c": b"\xff"})
    errors.edit("m", body=b"\xff", queue="q")
    errors.edit("m", body="text")

    assert [
        ({"b": 2, "c": b"\xff"}, b'{"new": "\\u00fc"}'),
        ({"a": 1, "b": 2}, b"\xff"),
        ({"a": 1, "b": 2}, b"text"),
    ] == [(properties.headers, body) for properties, body in taken(channel)]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"body": object()}, EncodingError),
        ({"body": float("nan")}, EncodingError),
        ({"headers": {"a": "x" * 140_000}}, BatchError),
        ({"headers": {"a": object()}}, BatchError),
        ({"queue": "gone"}, BatchError),
    ],
)
def test_an_edit_that_cannot_be_sent_changes_nothing(
    channel: BlockingChannel, errors: ErrorQueue, change: Any, error: type[Exception]
) -> None:
    """Headers that do not fit into a frame would cost the connection."""
    park_numbers(channel, 3)
    with pytest.raises(error):
        errors.edit("m1", **change)

    assert [b"0", b"1", b"2"] == [each.body for each in errors]
    assert [] == bodies(channel)


# ------------------------------------------------------------------------------- move


def test_a_moved_message_says_the_same(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """Also one that only RabbitMQ has said something about."""
    channel.queue_declare("elsewhere.error", durable=True)
    channel.queue_declare(
        "rejecting",
        arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "q.error"},
    )
    park(channel, b"ours", error=ValueError("x"), message_id="o", headers=HEADERS)
    channel.basic_publish("", "rejecting", b"rabbit's", pika.BasicProperties(message_id="r"))
    method, _, _ = channel.basic_get("rejecting")
    assert method is not None
    channel.basic_reject(method.delivery_tag, requeue=False)
    wait_until(lambda: errors.count() == 2)
    before = [each.record() for each in errors]

    assert 2 == errors.move("elsewhere.error")
    with ErrorQueue("elsewhere.error") as elsewhere:
        after = list(elsewhere)

    assert before == [each.record() for each in after]
    assert ("failed", "rejected") == (after[0].reason, after[1].reason)
    assert "x-death" not in after[1].properties.headers
    assert HEADERS == {key: after[0].properties.headers[key] for key in HEADERS}


# ------------------------------------------------------------------ export and import


def test_an_export_can_be_imported_elsewhere(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """Each message is what it was, and its source still has it."""
    kept = {"content_type": "t", "priority": 3, "timestamp": 7, "correlation_id": "c", "type": "x"}
    park(channel, b"\xff\x00", error=ValueError("x"), message_id="a", headers=HEADERS, **kept)
    park(channel, "grün\n\u2028".encode(), message_id="b")
    channel.basic_publish("", "q.error", b"", pika.BasicProperties())
    before = list(errors)
    file = io.StringIO()

    assert 3 == errors.export(file)
    assert 3 == len(file.getvalue().splitlines())
    with ErrorQueue("fresh.error") as fresh:
        file.seek(0)
        assert 3 == fresh.import_(file)
        after = list(fresh)

    for others in (after, list(errors)):
        assert [each.body for each in before] == [each.body for each in others]
        assert [each.record() for each in before] == [each.record() for each in others]
    assert HEADERS == {key: after[0].properties.headers[key] for key in HEADERS}
    assert kept == {key: getattr(after[0].properties, key) for key in kept}


def test_an_export_may_choose(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """And says what is not there."""
    park_numbers(channel, 3)
    file = io.StringIO()
    with pytest.raises(BatchError, match="there is no message 'm9'"):
        errors.export(file, ["m1", "m9"])
    [line] = file.getvalue().splitlines()
    assert "1" == json.loads(line)["body"]


def test_a_damaged_file_imports_nothing(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """All of it is read before the first is sent, and the line is named."""
    lines = ['{"body": "a"}\n', "\n", '{"body": "b"}\n', '{"body": \n', '{"body": "c"}\n']
    with pytest.raises(DecodeError, match=r"line 4: it is no JSON: .*; nothing was imported"):
        errors.import_(lines)
    assert 0 == errors.count()


def test_an_import_into_a_full_queue_says_what_did_not_fit(channel: BlockingChannel) -> None:
    """The others are in it."""
    channel.queue_declare(
        "small.error", arguments={"x-max-length": 2, "x-overflow": "reject-publish"}
    )
    with ErrorQueue("small.error") as small:
        with pytest.raises(BatchError) as caught:
            small.import_(f'{{"body": "{each}", "properties": {{"message_id": "{each}"}}}}'
                          for each in range(4))
        assert ["0", "1"] == caught.value.confirmed
        assert ["2", "3"] == [id for id, _ in caught.value.failed]
        assert 2 == small.count()


def test_an_import_into_a_blocked_broker_says_what_was_not_sent(
    node: Node, errors: ErrorQueue
) -> None:
    """The rest is not tried: each would wait as long."""
    lines = [f'{{"body": "", "properties": {{"message_id": "{each}"}}}}' for each in range(50)]
    errors.timeout = 0.5
    with node.memory_alarm(), pytest.raises(BatchError) as caught:
        errors.import_(lines)

    # RabbitMQ blocks a connection when it publishes: the first message may pass.
    first = caught.value.confirmed + [id for id, _ in caught.value.unknown]
    assert first in ([], ["0"])
    assert [str(each) for each in range(len(first), 50)] == [id for id, _ in caught.value.failed]


def test_a_purge_tells_how_many_there_were(channel: BlockingChannel, errors: ErrorQueue) -> None:
    """And they are gone."""
    park_numbers(channel, 5)
    assert 5 == errors.purge()
    assert 0 == errors.count()
    assert 0 == errors.purge()


# ---------------------------------------------------------------- names of error queues


def test_the_error_queues_that_were_announced_are_known(channel: BlockingChannel) -> None:
    """Each once, however often: what is there twice is dropped when somebody looks."""
    assert [] == known_error_queues()
    spec = ledger_queue()
    channel.queue_declare(spec.name, durable=True, arguments=spec.arguments)
    for name in ("b.error", "a.error", "b.error", "ä.error", "b.error"):
        body, properties = announcement(name)
        channel.basic_publish("", spec.name, body, properties)

    assert ["a.error", "b.error", "ä.error"] == known_error_queues()
    assert 3 == ready(channel, spec.name)
    assert ["a.error", "b.error", "ä.error"] == known_error_queues()


# ------------------------------------------------------------------- a broker in trouble


def test_a_blocked_broker_stops_a_retry_and_nothing_is_lost(
    node: Node, channel: BlockingChannel
) -> None:
    """It is an error soon, and what was not confirmed stays."""
    park_numbers(channel, 5)
    with ErrorQueue("q.error") as errors:
        errors.timeout = 1.0
        assert 1 == errors.retry(["m0"])
        with node.memory_alarm():
            with pytest.raises(BatchError) as caught:
                errors.retry()
            [(id, error)] = caught.value.failed + caught.value.unknown
        assert "m1" == id
        assert isinstance(error, BrokerBlockedError) or caught.value.unknown
        assert [b"1", b"2", b"3", b"4"] == [each.body for each in errors]
        errors.timeout = 30.0
        assert 4 == errors.retry()
    assert {b"0", b"1", b"2", b"3", b"4"} == set(bodies(channel))


def test_a_broker_that_freezes_stops_a_retry_and_nothing_is_lost(
    node: Node, channel: BlockingChannel
) -> None:
    """What was on its way may have arrived; it stays, and the next retry goes on."""
    park_numbers(channel, 20)
    with ErrorQueue("q.error") as errors:
        errors.timeout = 1.0

        def freeze(done: int, _all: int) -> None:
            if done == 10:
                node.suspend()

        errors.on_progress = freeze
        try:
            with pytest.raises(BatchError) as caught:
                errors.retry()
        finally:
            node.resume()
        assert [b"%d" % each for each in range(9)] == [
            each.encode()[1:] for each in caught.value.confirmed
        ]
        assert ["m9"] == [id for id, _ in caught.value.unknown]
    with ErrorQueue("q.error") as errors:
        wait_until(lambda: errors.count() == 11)
        assert 11 == errors.retry()
    found = bodies(channel)
    assert {b"%d" % each for each in range(20)} == set(found)
    assert len(found) <= 21


def test_a_connection_that_is_lost_in_the_middle_is_an_error_and_loses_nothing(
    node: Node, broker_url: str
) -> None:
    """It says how many have gone before. The next call goes on."""
    with opened(broker_url) as channel:
        park_numbers(channel, 300)
    vhost = broker_url.rsplit("/", 1)[1]
    with ErrorQueue("q.error") as errors:
        closing = threading.Thread(target=node.close_connections, args=("test", vhost))

        def close_all(done: int, _all: int) -> None:
            if done == 100:
                closing.start()
            if done == 150:  # by now at the latest
                closing.join()

        errors.on_progress = close_all
        with pytest.raises(TransportError, match=r"message\(s\) (went|confirmed)"):
            errors.retry()
        closing.join()
        errors.on_progress = lambda done, all: None
        wait_until(lambda: errors.retry() == 0)
    with opened(broker_url) as channel:
        found = bodies(channel)
        assert 0 == ready(channel, "q.error")
    assert {b"%d" % each for each in range(300)} == set(found)
    assert len(found) <= 301


def test_without_a_broker_it_says_so_in_time() -> None:
    """And not after as long as a component would wait."""
    with ErrorQueue("q.error", {"host": "127.0.0.1:1"}) as errors:
        errors.timeout = 0.5
        with pytest.raises(ConnectionFailedError, match="nothing listens there"):
            list(errors)
        with pytest.raises(ConnectionFailedError, match="nothing listens there"):
            errors.count()


def test_headers_at_the_limit_of_a_frame_can_be_moved(
    channel: BlockingChannel, errors: ErrorQueue
) -> None:
    """Ours give way."""
    filler = {"a": "x" * (130_900 - 100)}
    channel.basic_publish("", "q.error", b"{}", pika.BasicProperties(headers=filler))
    channel.queue_declare("elsewhere")

    assert 1 == errors.move("elsewhere")
    [(properties, _)] = taken(channel, "elsewhere")
    assert filler == properties.headers
    assert encoded_size(properties) < 131_072
