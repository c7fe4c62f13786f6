# SPDX-License-Identifier: MIT
"""What a parked message carries: everything of the original, and why it was parked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pika
import pytest

from postage.parking import FRAME_LIMIT, HEADER_LIMIT, parked_properties, printable
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
    """All of them are texts."""
    headers = park().headers
    parked_at = headers.pop("postage-parked-at")

    assert {
        "postage-reason": "failed",
        "postage-queue": "q",
        "postage-exchange": "ex",
        "postage-routing-key": "key",
        "postage-parked-by": "name=tested pid=12",
    } == headers
    assert "T" == parked_at[10] and "Z" == parked_at[-1]


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


def test_headers_of_an_earlier_parking_are_replaced() -> None:
    """The last reason counts."""
    headers = park(raised("new"), headers={"postage-error": "old", "postage-reason": "old"}).headers

    assert ("new", "failed") == (headers["postage-error"], headers["postage-reason"])


@pytest.mark.parametrize("length", [10, 5_000, 200_000, 5_000_000])
def test_the_text_of_an_error_may_have_any_length(length: int) -> None:
    """Its beginning and the frames of the traceback are left."""
    properties = park(raised("begin" + "x" * length))

    assert encoded_size(properties) <= HEADER_LIMIT
    assert properties.headers["postage-error"].startswith("beginxxxxx")
    assert "in raised" in properties.headers["postage-traceback"]


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
