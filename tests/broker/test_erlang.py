# SPDX-License-Identifier: MIT
"""How Erlang writes values."""

from __future__ import annotations

import pytest

from postage.broker import erlang, fields


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"", "<<>>"),
        (b"what", '<<"what">>'),
        (b"\x00\x01", "<<0,1>>"),
        (b"with\x00", "<<119,105,116,104,0>>"),
        (b'a "quote"\n', '<<"a \\"quote\\"\\n">>'),
        ("ü".encode(), '<<"ü">>'),
        (b"\x80", "<<128>>"),
    ],
)
def test_a_binary_is_text_if_all_of_it_can_be_printed(value: bytes, expected: str) -> None:
    """Else it is numbers."""
    assert expected == erlang.binary(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (fields.encode("text"), '<<"text">>'),
        (fields.encode(5), "5"),
        (fields.encode(True), "true"),
        (fields.encode(None), "undefined"),
        (fields.array([]), "[]"),
        (fields.array([fields.encode(1)]), "[...]"),
    ],
)
def test_a_field_is_shown_by_its_value(value: bytes, expected: str) -> None:
    """What is in tables and arrays is left out."""
    assert expected == erlang.field(value)


def test_of_a_long_frame_only_the_beginning_is_shown() -> None:
    """Sixteen bytes of it."""
    assert 'type 9, all octets = <<"abc">>: why' == erlang.frame(9, b"abc", "why")
    words = 'type 9, first 16 octets = <<"xxxxxxxxxxxxxxxx">>: why'
    assert words == erlang.frame(9, b"x" * 17, "why")
