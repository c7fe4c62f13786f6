# SPDX-License-Identifier: MIT
"""Messages carry their properties as they came, and what is broken or forbidden is refused."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postage.broker import fields
from postage.broker.errors import Refusal
from postage.broker.messages import Message, join_properties, split_properties
from tests.broker.wire import short

#: Ten years in milliseconds, which RabbitMQ lets a message wait at most.
LONGEST = 315_360_000_000


def encoded(**properties: Any) -> bytes:
    return b"".join(pika.BasicProperties(**properties).encode())


def with_headers(headers: Mapping[str, bytes]) -> bytes:
    return join_properties({"headers": fields.join(headers)})


def message(properties: bytes = b"\0\0", body: bytes = b"", key: str = "key") -> Message:
    return Message("exchange", key, properties, body)


def refusal_of(properties: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        message(properties)
    return caught.value


short_texts = st.text(max_size=20)
any_properties = st.fixed_dictionaries(
    {},
    optional={
        "content_type": short_texts,
        "content_encoding": short_texts,
        "headers": st.dictionaries(short_texts, st.integers(0, 9) | st.text(), max_size=3),
        "delivery_mode": st.sampled_from([1, 2]),
        "priority": st.integers(0, 255),
        "correlation_id": short_texts,
        "reply_to": short_texts,
        "expiration": st.integers(0, LONGEST).map(str),
        "message_id": short_texts,
        "timestamp": st.integers(0, 2**63),
        "type": short_texts,
        "user_id": short_texts,
        "app_id": short_texts,
        "cluster_id": short_texts,
    },
)


# Properties


@given(any_properties)
def test_properties_are_taken_apart_and_put_together_again(properties: dict[str, Any]) -> None:
    """Each has the bytes that the client wrote, and no other is there."""
    data = encoded(**properties)
    found = split_properties(data)

    assert properties.keys() == found.keys()
    assert data == join_properties(found)
    for name, value in properties.items():
        if isinstance(value, str):
            assert short(value.encode()) == found[name]


@given(any_properties, st.data())
def test_properties_that_are_cut_off_or_too_long_are_refused(
    properties: dict[str, Any], data: st.DataObject
) -> None:
    """Their flags say what has to be there."""
    whole = encoded(**properties)
    end = data.draw(st.integers(2, len(whole)))
    wrong = whole[:end] if end < len(whole) else whole + b"\0"

    refusal = refusal_of(wrong)

    assert (502, "the properties of a message are broken") == (refusal.code, refusal.text)


@pytest.mark.parametrize(
    "wrong",
    [
        b"\xff\xff",  # all, and nothing behind
        b"\0\1\0\0",  # more flags follow: there are none
        b"\0\2",
        b"\x20\0\xff\xff\xff\xff",
        b"\x20\0\0\0",
        b"\x08\0",
        b"\x80\0\5abc",
    ],
)
def test_flags_that_lie_are_refused(wrong: bytes) -> None:
    """RabbitMQ answers with 541, for it fails on them."""
    assert 502 == refusal_of(wrong).code


@given(st.binary(min_size=2, max_size=60))
def test_random_properties_make_a_message_or_are_refused(data: bytes) -> None:
    """And what makes one is sent on as it came, but for BCC."""
    try:
        made = message(data)
    except Refusal as refusal:
        assert refusal.code in (406, 502)
    else:
        assert data == made.encoded


# What the broker reads


def test_a_message_without_properties_is_transient_and_waits_for_ever() -> None:
    """And has the priority 0."""
    own = message(body=b"body")

    assert (False, 0, None, ("key",), {}) == (
        own.is_persistent,
        own.priority,
        own.expiration,
        own.keys,
        own.headers,
    )
    assert None is own.text("reply_to")


def test_a_message_says_what_its_properties_say() -> None:
    """The others stay encoded."""
    own = message(encoded(delivery_mode=2, priority=7, expiration="60", reply_to="é"))

    assert (True, 7, 60, "é") == (
        own.is_persistent,
        own.priority,
        own.expiration,
        own.text("reply_to"),
    )


def test_the_address_is_encoded_once() -> None:
    """A message in a fanout is delivered many times."""
    own = message(key="\udcff")

    assert b"\x08exchange\x01\xff" == own.address
    assert own.address is own.address


def test_a_property_may_be_no_utf_8() -> None:
    """It is no error to publish it, and it leaves as it came."""
    data = b"\2\0\2\xff\xfe"
    own = message(data)

    assert data == own.encoded
    assert b"\xff\xfe" == (own.text("reply_to") or "").encode("utf-8", "surrogateescape")


def test_headers_are_added_to_those_that_are_there() -> None:
    """One of the same name is replaced."""
    own = message(encoded(app_id="app", headers={"a": 1, "b": 2}))

    data = split_properties(own.with_headers({"b": b"t\1", "c": b"V"}))

    assert {"a": b"I\0\0\0\1", "b": b"t\1", "c": b"V"} == fields.split(data["headers"])[0]
    assert b"\3app" == data["app_id"]
    assert {"a", "b"} == set(own.headers)


@pytest.mark.parametrize("mode", [0, 3, 255])
def test_an_unknown_delivery_mode_is_refused(mode: int) -> None:
    """In the words of RabbitMQ, which closes the channel."""
    refusal = refusal_of(b"\x10\0" + bytes([mode]))

    assert (406, False) == (refusal.code, refusal.closes_connection)
    assert f"invalid message: {{delivery_mode_unknown,{mode}}}" == refusal.text


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("007", 7), ("+5", 5), (str(LONGEST),) * 2])
def test_an_expiration_is_a_number_of_milliseconds(text: str, value: str | int) -> None:
    """Of any digits that Erlang takes for an integer."""
    assert int(value) == message(encoded(expiration=text)).expiration


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "no_integer"),
        (b"abc", "no_integer"),
        (b" 1", "no_integer"),
        (b"\xff", "no_integer"),
        ("٣".encode(), "no_integer"),
        (b"1.5", '{leftover_string,".5"}'),
        (b"-1", "{value_negative,-1}"),
        (b"%d" % (LONGEST + 1), "{value_too_large,315360000001}"),
        (b"9" * 255, "{value_too_large,9999"),
    ],
)
def test_an_expiration_that_is_none_is_refused(text: bytes, reason: str) -> None:
    """In the words of RabbitMQ, which closes the channel."""
    refusal = refusal_of(b"\1\0" + short(text))

    assert (406, False) == (refusal.code, refusal.closes_connection)
    assert reason in refusal.text


# Headers


def test_broken_headers_are_refused() -> None:
    """A client that is sent them may fail."""
    refusal = refusal_of(b"\x20\0\0\0\0\3\1aQ")

    assert 502 == refusal.code
    assert "the headers of a message: the field at 6 has the unknown type b'Q'" == refusal.text


def test_headers_may_be_nested_as_deeply_as_a_frame_allows() -> None:
    """They leave as they came."""
    sizes = range(7 * 9_999, -1, -7)
    table = b"".join(b"\1aF" + struct.pack(">I", size) for size in sizes)
    data = b"\x20\0" + struct.pack(">I", len(table)) + table

    assert data == message(data).encoded


def test_further_keys_are_in_cc_and_bcc() -> None:
    """Only the first of them is seen by who gets the message."""
    keys = {"CC": ["cc", "\udcff"], "BCC": ["bcc"]}
    headers = {name: fields.array(map(fields.encode, keys[name])) for name in keys}
    own = message(with_headers({"a": b"V", **headers}))

    assert ("key", "cc", "\udcff", "bcc") == own.keys
    assert {"a", "CC"} == set(own.headers)
    assert with_headers({"a": b"V", "CC": headers["CC"]}) == own.encoded


def test_what_is_no_string_is_no_further_key() -> None:
    """RabbitMQ leaves it out."""
    own = message(with_headers({"CC": fields.array([b"t\1", b"S\0\0\0\2cc", b"V"])}))

    assert ("key", "cc") == own.keys


@pytest.mark.parametrize("name", ["CC", "BCC"])
def test_further_keys_that_are_no_list_are_refused(name: str) -> None:
    """In the words of RabbitMQ, which closes the channel."""
    refusal = refusal_of(with_headers({name: b"S\0\0\0\2cc"}))

    assert 406 == refusal.code
    words = f'invalid message: {{unacceptable_type_in_header,"{name}",longstr}}'
    assert words == refusal.text


# Size


def test_the_size_is_what_a_message_takes_and_never_changes() -> None:
    """It is added when a queue takes the message, and subtracted when it lets it go."""
    own = message(encoded(headers={"a": 1}), b"x" * 1000)
    before = own.size
    assert 1000 < before < 1300
    assert own.address and own.headers and own.keys
    assert before == own.size

    plain = message(body=b"x" * 1000)
    before = plain.size
    assert {} == plain.headers
    assert before == plain.size


def test_many_small_headers_count_for_what_they_need() -> None:
    """In Python they take twenty times as much as on the wire, and so they are limited."""
    headers = {f"{number:04}": b"V" for number in range(10_000)}
    data = with_headers(headers)

    assert message(data).size > 15 * len(data)
