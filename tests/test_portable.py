# SPDX-License-Identifier: MIT
"""A message as a line of JSON, and back."""

from __future__ import annotations

import json
from typing import Any

import pika
import pytest

from postage.errors import DecodeError
from postage.portable import PROPERTIES, as_dict, line_of, message_of
from tests.parked import HEADERS

#: What has no value in the tests of single properties.
STATED = {name: "7" if kind is str else 1 for name, kind in PROPERTIES.items()}


@pytest.mark.parametrize("body", [b"", "grün\n\u2028\0".encode(), b"\xff\x00", b"\xed\xa0\x80"])
def test_a_message_comes_back_as_it_was(body: bytes) -> None:
    """In one line, whatever is in it."""
    properties = pika.BasicProperties(headers=HEADERS, **STATED)

    line = line_of(properties, body)
    again, same = message_of(line)

    assert 1 == len(line.splitlines())
    assert line.isascii()
    assert body == same
    assert HEADERS == again.headers
    assert STATED == {name: getattr(again, name) for name in PROPERTIES}


def test_what_the_message_does_not_have_is_left_out() -> None:
    """A person may read and change it."""
    assert {"body": "a", "properties": {"type": "t"}, "headers": {}} == as_dict(
        pika.BasicProperties(type="t"), b"a"
    )
    properties, body = message_of('{"body": "a"}')
    assert ({}, b"a", None) == (properties.headers, body, properties.message_id)


def test_each_type_of_amqp_has_its_form() -> None:
    """JSON has none for them."""
    headers = as_dict(pika.BasicProperties(headers=HEADERS), b"")["headers"]
    assert {"bytes": "AP8="} == headers["bytes"]
    assert {"timestamp": "2026-02-03T04:05:06+00:00"} == headers["time"]
    assert {"decimal": "-1.25"} == headers["decimal"]
    assert ["a", 1, [{"bytes": "/g=="}], {"table": {"in": {"decimal": "2"}}}] == headers["list"]


def test_texts_that_are_no_utf_8_come_back() -> None:
    """pika leaves them as bytes: names of headers, and properties."""
    properties = pika.BasicProperties(headers={b"\xffname": 1, "grün": 2})
    properties.message_id = b"\xff"
    again, _ = message_of(line_of(properties, b""))
    assert ({b"\xffname": 1, "grün": 2}, b"\xff") == (again.headers, again.message_id)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"body": None}, "'body' is no text"),
        ({"body_base64": "AA=="}, "either 'body' or 'body_base64'"),
        ({"body": "\ud800"}, "characters that UTF-8 does not have"),
        ({"bod": "a"}, "the unknown key 'bod'"),
        ({"properties": []}, "'properties' is no JSON object"),
        ({"properties": {"color": "red"}}, "the unknown property 'color'"),
        ({"properties": {"message_id": 5}}, "the property 'message_id' is no str"),
        ({"properties": {"priority": "5"}}, "the property 'priority' is no int"),
        ({"properties": {"priority": True}}, "the property 'priority' is no int"),
        ({"properties": {"priority": 256}}, "cannot be encoded"),
        ({"properties": {"message_id": "x" * 256}}, "cannot be encoded"),
        ({"headers": "a"}, "'headers' is no JSON object"),
        ({"headers": {"a": {"bytes": "=", "b": 1}}}, "'a' has an object that is not of the form"),
        ({"headers": {"a": {"byte": "="}}}, "'a' has an object that is not of the form"),
        ({"headers": {"a": {"bytes": "="}}}, "'a' has the bytes '=', which is none"),
        ({"headers": {"a": {"bytes": 1}}}, "'a' has the bytes 1, which is none"),
        ({"headers": {"a": {"timestamp": "soon"}}}, "'a' has the timestamp 'soon'"),
        ({"headers": {"a": {"timestamp": 5}}}, "'a' has the timestamp 5"),
        ({"headers": {"a": {"decimal": "one"}}}, "'a' has the decimal 'one'"),
        ({"headers": {"a": {"decimal": "NaN"}}}, "cannot be encoded"),
        ({"headers": {"a": {"table": 1}}}, "'a' is no JSON object"),
        ({"headers": {"a": 1.5}}, "cannot be encoded"),
        ({"headers": {"a": 2**70}}, "cannot be encoded"),
        ({"headers": {"a\ud800": 1}}, "a name that cannot be encoded"),
        ({"headers": {"a": "\ud800"}}, "cannot be encoded"),
        ({"headers": {"a": "x" * 131_000}}, "and a frame holds 131000"),
    ],
)
def test_what_cannot_be_published_is_refused(change: dict[str, Any], complaint: str) -> None:
    """Before anything is."""
    with pytest.raises(DecodeError, match=complaint):
        message_of(json.dumps({"body": "a"} | change))


@pytest.mark.parametrize("line", ["", "{", "[]", '"a"', "null", "[" * 100_000])
def test_what_is_no_message_is_refused(line: str) -> None:
    """With what it is instead."""
    with pytest.raises(DecodeError, match="it is no JSON"):
        message_of(line)


def test_a_body_must_be_there() -> None:
    """In one of its two forms."""
    with pytest.raises(DecodeError, match="either 'body' or"):
        message_of("{}")
    with pytest.raises(DecodeError, match="no base64"):
        message_of('{"body_base64": "ü"}')
