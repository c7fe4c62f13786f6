# SPDX-License-Identifier: MIT
"""What a dead letter looks like."""

from __future__ import annotations

from typing import Any

import pika
import pytest
from pika import spec

from postage.broker import fields
from postage.broker.dead_letters import dead_letter, is_cycle
from postage.broker.messages import Message


def message(exchange: str = "source", key: str = "key", **properties: Any) -> Message:
    """Return a message with properties as pika encodes them."""
    encoded = b"".join(pika.BasicProperties(**properties).encode())
    return Message(exchange, key, encoded, b"body")


def properties_of(letter: Message) -> spec.BasicProperties:
    """Return the properties as pika decodes them."""
    properties: spec.BasicProperties = spec.BasicProperties().decode(letter.encoded)
    return properties


def deaths_of(letter: Message) -> list[dict[str, Any]]:
    """Return the deaths without their times."""
    deaths = (properties_of(letter).headers or {})["x-death"]
    return [{name: each for name, each in death.items() if name != "time"} for death in deaths]


def test_a_dead_letter_says_where_and_why_it_died() -> None:
    """The body and the other headers stay as they are."""
    letter = dead_letter(message(headers={"mine": 1}), "q", "rejected", "dlx", None)
    assert ("dlx", "key", b"body") == (letter.exchange, letter.routing_key, letter.body)
    assert [
        {
            "count": 1,
            "reason": "rejected",
            "queue": "q",
            "exchange": "source",
            "routing-keys": ["key"],
        }
    ] == deaths_of(letter)
    headers = properties_of(letter).headers or {}
    assert (1, "rejected", "q", "source") == (
        headers["mine"],
        headers["x-first-death-reason"],
        headers["x-first-death-queue"],
        headers["x-first-death-exchange"],
    )


def test_a_second_death_at_the_same_place_is_counted() -> None:
    """The last death is the first of the list; RabbitMQ turns the others round each time."""
    letter = message()
    for queue in ("a", "b", "a"):
        letter = dead_letter(letter, queue, "expired", "dlx", None)
    assert [("a", 2), ("b", 1)] == [(each["queue"], each["count"]) for each in deaths_of(letter)]
    assert "a" == (properties_of(letter).headers or {})["x-first-death-queue"]


def test_the_deaths_before_the_last_are_turned_round_each_time() -> None:
    """This is how RabbitMQ 3.10 writes them."""
    letter = message()
    for queue in ("a", "b", "c", "d"):
        letter = dead_letter(letter, queue, "expired", "dlx", None)
    assert ["d", "b", "a", "c"] == [each["queue"] for each in deaths_of(letter)]


def test_another_reason_is_another_death() -> None:
    """A queue may appear once for each reason."""
    letter = dead_letter(message(), "q", "expired", "dlx", None)
    letter = dead_letter(letter, "q", "rejected", "dlx", None)
    assert ["rejected", "expired"] == [each["reason"] for each in deaths_of(letter)]


def test_the_expiration_goes_into_the_death() -> None:
    """Else it would expire again where it goes."""
    letter = dead_letter(message(expiration="100", priority=3), "q", "expired", "dlx", None)
    assert (None, None, 3) == (
        properties_of(letter).expiration,
        letter.expiration,
        letter.priority,
    )
    assert "100" == deaths_of(letter)[0]["original-expiration"]


def test_the_routing_key_of_the_queue_replaces_all_others() -> None:
    """Those of the header CC, too."""
    cc = {"CC": ["other"]}
    assert ("key", "other") == dead_letter(message(headers=cc), "q", "maxlen", "", None).keys
    letter = dead_letter(message(headers=cc), "q", "maxlen", "", "new")
    assert (("new",), ["key", "other"]) == (letter.keys, deaths_of(letter)[0]["routing-keys"])


@pytest.mark.parametrize(
    ("deaths", "expected"),
    [
        ([("q", "expired")], True),
        ([("q", "expired"), ("other", "maxlen")], True),
        ([("q", "rejected")], False),
        ([("q", "expired"), ("other", "rejected")], False),
        ([("other", "expired")], False),
        ([], False),
    ],
)
def test_a_circle_is_one_unless_somebody_rejected_on_the_way(
    deaths: list[tuple[str, str]], expected: bool
) -> None:
    """Only what nobody else would ever stop is a circle."""
    letter = message()
    for queue, reason in deaths:
        letter = dead_letter(letter, queue, reason, "dlx", None)
    assert expected is is_cycle(letter, "q")


def test_what_a_client_wrote_into_the_header_does_no_harm() -> None:
    """The header may be of any type, and hold anything."""
    for value in ("text", 1, ["text", {"queue": 1}], [{"count": "many", "queue": "q"}]):
        letter = dead_letter(message(headers={"x-death": value}), "q", "rejected", "dlx", None)
        assert "rejected" == deaths_of(letter)[0]["reason"]
        assert not is_cycle(letter, "q")


def test_headers_of_all_types_survive() -> None:
    """They are not decoded on their way."""
    odd = fields.join({"f": b"d" + b"\x3f\xf8" + bytes(6), "u": b"u\x00\x01", "s": b"s\xff\xff"})
    original = Message("", "q", b"\x20\x00" + odd, b"")
    letter = dead_letter(original, "q", "rejected", "dlx", None)
    assert dict(original.headers).items() <= dict(letter.headers).items()
