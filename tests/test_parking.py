# SPDX-License-Identifier: MIT
"""What a parked message carries: everything of the original, and why it was parked."""

from __future__ import annotations

from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import pika
import pytest

from postage.errors import printable
from postage.parking import (
    FRAME_LIMIT,
    HEADER_LIMIT,
    Parked,
    announcement,
    ledger_queue,
    original_properties,
    parked_properties,
    republished_properties,
)
from postage.topology import QueueSpec
from postage.transport.publisher import encoded_size
from postage.transport.subscriber import Delivery

FINGERPRINT = {"name": "tested", "pid": "12"}


def delivery(**properties: Any) -> Delivery:
    method = SimpleNamespace(
        delivery_tag=1, consumer_tag="c", exchange="ex", routing_key="key", redelivered=False
    )
    return Delivery(QueueSpec("q"), 1, method, pika.BasicProperties(**properties), b"body")


def park(error: BaseException | None = None, **properties: Any) -> pika.BasicProperties:
    return parked_properties(delivery(**properties), "failed", error, FINGERPRINT)


def raised(text: Any) -> Exception:
    """Return an exception with a traceback."""
    try:
        raise LookupError(text)
    except LookupError as error:
        return error


def test_the_properties_of_the_original_are_kept() -> None:
    """But it is persistent, and does not expire: it stays until somebody looks at it."""
    kept = {
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "priority": 3,
        "correlation_id": "c",
        "reply_to": "r",
        "message_id": "m",
        "timestamp": 5,
        "type": "t",
        "app_id": "a",
    }
    properties = park(**kept, delivery_mode=1, expiration="10", user_id="guest", cluster_id="c")

    assert kept == {name: getattr(properties, name) for name in kept}
    assert (2, None, None) == (
        properties.delivery_mode,
        properties.expiration,
        properties.user_id,
    )


def test_the_headers_say_where_it_came_from_and_who_gave_up() -> None:
    """And when, as ISO 8601 in UTC."""
    headers = park().headers
    parked_at = headers.pop("postage-parked-at")

    assert {
        "postage-attempts": 1,
        "postage-first-failure": parked_at,
        "postage-reason": "failed",
        "postage-queue": "q",
        "postage-exchange": "ex",
        "postage-routing-key": "key",
        "postage-parked-by": "name=tested pid=12",
    } == headers
    assert "T" == parked_at[10] and "Z" == parked_at[-1]


def test_the_headers_say_how_often_it_failed_and_where() -> None:
    """What a retry said on the way is over."""
    headers = {
        "postage-attempt": 3,
        "postage-handler": "msg_old",
        "postage-bit-00": True,
        "postage-exchange": "goal",
        "a": 1,
    }
    parked = parked_properties(
        delivery(headers=headers),
        "failed",
        None,
        FINGERPRINT,
        attempts=6,
        first_failure="2026-02-03T04:05:06Z",
        handler="msg_a",
    ).headers

    assert (6, "2026-02-03T04:05:06Z", "msg_a", "ex", 1) == (
        parked["postage-attempts"],
        parked["postage-first-failure"],
        parked["postage-handler"],
        parked["postage-exchange"],
        parked["a"],
    )
    assert parked.keys().isdisjoint({"postage-attempt", "postage-bit-00"})
    assert "postage-handler" not in park(headers=headers).headers


def test_the_headers_say_what_went_wrong() -> None:
    """With the traceback."""
    headers = park(raised("lost")).headers

    assert ("LookupError", "lost") == (headers["postage-exception"], headers["postage-error"])
    assert "in raised" in headers["postage-traceback"]
    assert headers["postage-traceback"].endswith("LookupError: lost\n")


def test_the_record_of_dead_letterings_is_left_out() -> None:
    """With it the broker drops a message that comes by the same queue again, in silence."""
    properties = delivery(headers={"x-death": [{"queue": "q"}], "a": 1}).properties
    headers = park(headers=properties.headers).headers

    assert 1 == headers["a"]
    assert "x-death" not in headers
    assert "x-death" in properties.headers


def test_keys_by_which_rabbitmq_routes_are_renamed() -> None:
    """The copy for the error queue would come to other queues as well."""
    headers = park(headers={"CC": ["other"]}).headers

    assert ["other"] == headers["postage-cc"]
    assert "CC" not in headers


def test_headers_of_an_earlier_parking_are_replaced() -> None:
    """The last reason counts, and what it does not say was not so."""
    assert "postage-error" not in park(headers={"postage-error": "old"}).headers
    headers = park(raised("new"), headers={"postage-error": "old", "postage-reason": "old"}).headers

    assert ("new", "failed") == (headers["postage-error"], headers["postage-reason"])


@pytest.mark.parametrize("length", [10, 5_000, 200_000, 5_000_000])
def test_the_text_of_an_error_may_have_any_length(length: int) -> None:
    """Its beginning and the frames of the traceback are left."""
    properties = park(raised("begin" + "x" * length))

    assert encoded_size(properties) <= HEADER_LIMIT
    assert properties.headers["postage-error"].startswith("beginxxxxx")
    assert "in raised" in properties.headers["postage-traceback"]


def test_a_long_fingerprint_or_handler_is_cut() -> None:
    """Else nothing of the message would fit beside it."""
    fingerprint = {"name": "n" * 200_000}
    parked = parked_properties(
        delivery(headers={"a": 1}), "failed", None, fingerprint, handler="h" * 200_000
    )

    assert encoded_size(parked) < 5_000
    assert 1 == parked.headers["a"]


def test_of_a_long_traceback_the_end_is_left() -> None:
    """There is what raised."""

    def recurse(depth: int) -> Exception:
        if not depth:
            return raised("x" * 90_000)
        try:
            raise recurse(depth - 1)
        except Exception as error:
            return error

    properties = park(recurse(300))

    assert encoded_size(properties) <= HEADER_LIMIT
    assert "LookupError: xxxxx" in properties.headers["postage-traceback"]


@pytest.mark.parametrize("size", [90_000, 110_000, FRAME_LIMIT])
def test_the_headers_of_the_original_are_left_if_they_can_be(size: int) -> None:
    """Else the largest go, and are named. Ours are cut first."""
    original = {"a": "a" * 1000, "b": "", "c": "c" * 2000}
    original["b"] = "b" * (size - encoded_size(pika.BasicProperties(headers=original)))
    properties = park(raised("x" * 100_000), headers=original)
    kept = {name: value for name, value in original.items() if name in properties.headers}

    assert encoded_size(properties) <= FRAME_LIMIT
    expected = {"a", "c"} if size == FRAME_LIMIT else {"a", "b", "c"}
    assert expected == kept.keys()
    assert ("b" if size == FRAME_LIMIT else None) == properties.headers.get("postage-left-out")
    assert properties.headers["postage-error"].startswith("xxx")


def test_as_many_headers_are_left_out_as_necessary() -> None:
    """The names of those that went are kept."""
    original = {f"header-{number}": "x" * 1_300 for number in range(100)}
    properties = park(raised("lost"), headers=original, correlation_id="c" * 255)

    left_out = properties.headers["postage-left-out"].split()
    assert encoded_size(properties) <= FRAME_LIMIT
    assert original.keys() == {*left_out, *(properties.headers.keys() & original.keys())}


@pytest.mark.parametrize(
    ("text", "expected"), [("a\ud800b", r"a\ud800b"), (b"\xff", r"b'\xff'"), ("\0", "\0")]
)
def test_any_text_can_be_encoded(text: Any, expected: str) -> None:
    """A surrogate has no UTF-8, and made the component end."""
    properties = park(raised(text))

    assert expected == properties.headers["postage-error"]
    assert encoded_size(properties) > 0


def test_an_error_that_cannot_be_shown_says_so() -> None:
    """A `__str__` that fails must not keep a message from being parked."""

    class NoText(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "(NoText has no text: RuntimeError)" == printable(NoText())
    assert "lost" == printable(LookupError("lost"))
    assert "(NoText has no text: RuntimeError)" == park(NoText()).headers["postage-error"]


# ---------------------------------------------------------------------------- reading


def dead(**death: Any) -> dict[str, Any]:
    """Return the headers of a message that RabbitMQ dead-lettered twice."""
    older = {"queue": "postage-delay-03", "reason": "expired", "routing-keys": ["old"]}
    return {"x-death": [death, older], "x-first-death-queue": "q", "x-delivery-count": 2}


def test_what_was_parked_is_read() -> None:
    """All of it."""
    parked = Parked.of(park(raised("lost"), message_id="m"), b"body")

    assert ("m", b"body", "failed", "q", "ex", "key", None, 1) == (
        parked.id,
        parked.body,
        parked.reason,
        parked.queue,
        parked.exchange,
        parked.routing_key,
        parked.handler,
        parked.attempts,
    )
    assert ("LookupError", "lost", False) == (parked.exception, parked.error, parked.is_foreign)
    assert parked.first_failure == parked.last_failure
    assert {"id", "reason", "traceback"} <= parked.record().keys()
    assert parked.record().keys().isdisjoint({"body", "properties"})


def test_what_rabbitmq_dead_lettered_is_read() -> None:
    """Its latest word counts; what a retry said before is true still."""
    headers = dead(
        queue="q",
        reason="delivery_limit",
        exchange="ex",
        time=datetime(2026, 2, 3, 4, 5, 6, tzinfo=timezone.utc),
        **{"routing-keys": ["key", "other"]},
    )
    headers |= {"postage-attempt": 3, "postage-first-failure": "2020", "postage-handler": "msg_a"}
    parked = Parked.of(pika.BasicProperties(headers=headers), b"")

    assert ("delivery_limit", "q", "ex", "key", "msg_a", 3) == (
        parked.reason,
        parked.queue,
        parked.exchange,
        parked.routing_key,
        parked.handler,
        parked.attempts,
    )
    assert ("2020", "2026-02-03T04:05:06Z") == (parked.first_failure, parked.last_failure)
    moved = republished_properties(parked.properties)
    assert parked.record() == Parked.of(moved, b"").record()
    assert [] == [name for name in moved.headers if name.startswith("x-")]
    assert {"postage-handler": "msg_a"} == original_properties(parked.properties).headers


@pytest.mark.parametrize(
    "headers",
    [None, {}, {"a": 1}, {"x-death": []}, {"x-death": "x"}, {"x-death": ["x"]}, {"CC": 1}],
)
def test_what_nobody_says_anything_about_is_foreign(headers: Any) -> None:
    """It is no error: anybody may publish to an error queue."""
    parked = Parked.of(pika.BasicProperties(headers=headers), b"body")

    assert parked.is_foreign
    assert "body-230d8358dc8e8890" == parked.id
    assert {"id": parked.id} == {key: each for key, each in parked.record().items() if each}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"postage-reason": b"\xff", "postage-attempts": "x"}, (r"\xff", None, None)),
        ({"postage-reason": 5, "postage-queue": ""}, ("5", None, None)),
        ({"postage-reason": "a", "postage-attempts": True}, ("a", None, None)),
        (dead(queue=5, time="x"), ("unknown", "5", None)),
        (dead(reason="expired", **{"routing-keys": []}), ("expired", None, None)),
    ],
)
def test_a_record_of_the_wrong_types_is_read_as_far_as_it_goes(
    headers: Any, expected: Any
) -> None:
    """Whoever wrote it."""
    parked = Parked.of(pika.BasicProperties(headers=headers), b"")
    assert expected == (parked.reason, parked.queue, parked.attempts)


def test_the_ledger_keeps_what_is_looked_at_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """RabbitMQ 4 would drop a message of a quorum queue after 20 deliveries."""
    assert {
        "x-queue-type": "quorum",
        "x-max-length": 10_000,
        "x-delivery-limit": 2**31 - 1,
    } == ledger_queue().arguments
    monkeypatch.setenv("POSTAGE_QUEUE_TYPE", "classic")
    assert {"x-queue-type": "classic", "x-max-length": 10_000} == ledger_queue().arguments
    body, properties = announcement("q.error")
    assert (b"q.error", 2) == (body, properties.delivery_mode)
