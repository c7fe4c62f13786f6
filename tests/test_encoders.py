# SPDX-License-Identifier: MIT
"""How bodies are written and read."""

from __future__ import annotations

import collections
import json
import math
import traceback
import uuid
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postage.encoders import Encoder, JsonEncoder
from postage.errors import DecodeError, EncodingError

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)

#: An integer that Python refuses to convert to and from decimal digits.
HUGE = 10**5000


class Point(NamedTuple):
    x: int
    y: int


class Unwritable:
    """Offers what simplejson could be told to look for."""

    def for_json(self) -> str:
        return "for_json"

    def _asdict(self) -> dict[str, str]:
        return {"as": "dict"}

    def __iter__(self) -> Any:
        return iter("iterable")


def complaint_about(data: Any) -> str:
    with pytest.raises(EncodingError) as caught:
        JsonEncoder.encode(data)
    return str(caught.value)


def nested(levels: int) -> list[Any]:
    data: list[Any] = []
    for _ in range(levels):
        data = [data]
    return data


def test_the_plain_encoder_changes_nothing() -> None:
    """Encoder leaves data as they are, and has no content type."""
    data = {"a": (1, b"2")}

    assert data is Encoder.decode(Encoder.encode(data))
    assert "" == Encoder.content_type


@pytest.mark.parametrize("encoder", [JsonEncoder, JsonEncoder()])
def test_json_is_written_by_the_class_and_by_an_instance(encoder: JsonEncoder) -> None:
    """The methods need no instance, and one does no harm."""
    assert '{"a": [1, 2]}' == encoder.encode({"a": [1, 2]})
    assert {"a": [1, 2]} == encoder.decode('{"a": [1, 2]}')
    assert "application/json" == encoder.content_type


@given(values)
def test_json_is_written_as_the_standard_library_does(value: Any) -> None:
    """The bytes on the wire are those of 1.2.1, which used the standard library."""
    assert json.dumps(value) == JsonEncoder.encode(value)


@given(values)
def test_what_was_written_is_read_again(value: Any) -> None:
    """Decoding inverts encoding, from text and from bytes."""
    text = JsonEncoder.encode(value)

    assert value == JsonEncoder.decode(text)
    assert value == JsonEncoder.decode(text.encode())


@given(values, st.text(" \t\r\n", min_size=1), st.text(" \t\r\n"))
def test_space_around_json_does_no_harm(value: Any, before: str, after: str) -> None:
    """It is read the longer way, as RFC 8259 (2) allows it."""
    assert value == JsonEncoder.decode(before + JsonEncoder.encode(value) + after)
    assert value == JsonEncoder.decode(JsonEncoder.encode(value) + before)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Point(1, 2), "[1, 2]"),
        ({"p": [Point(1, 2)]}, '{"p": [[1, 2]]}'),
        (Decimal("1.10"), "1.10"),
        ([Decimal("-1E+5")], "[-1E+5]"),
        ({1: 2, None: 3, False: 4}, '{"1": 2, "null": 3, "false": 4}'),
        (collections.OrderedDict(b=1, a=2), '{"b": 1, "a": 2}'),
        ("né\u2028", '"n\\u00e9\\u2028"'),
        ("\ud800", '"\\ud800"'),
    ],
)
def test_some_types_have_a_settled_form(value: Any, expected: str) -> None:
    """Named tuples are arrays, decimals are numbers, and all is ASCII."""
    assert expected == JsonEncoder.encode(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, "is NaN, which JSON does not have; send None or a string"),
        (-math.inf, "is infinite, which JSON does not have; send None or a string"),
        (Decimal("NaN"), "is NaN, which JSON does not have; send None or a string"),
        (Decimal("sNaN"), "is NaN, which JSON does not have; send None or a string"),
        (Decimal("Infinity"), "is infinite, which JSON does not have; send None or a string"),
        (HUGE, "has more digits than Python converts; send it in hexadecimal"),
        (b"x", "is of type bytes, which JSON does not have; decode it, or send base64"),
        ({1}, "is of type set, which JSON does not have; make it text, a number, list or dict"),
        (
            Unwritable(),
            "is of type Unwritable, which JSON does not have; make it text, a number, list or dict",
        ),
        (uuid.UUID(int=1), "is of type UUID, which JSON does not have; make it text, a number, l"),
        ({(1, 2): 3}, "has a key of type tuple, which JSON does not have; make it a string"),
        ({b"k": 3}, "has a key of type bytes, which JSON does not have; make it a string"),
        ({math.nan: 3}, "has a key of type float, which JSON does not have; make it a string"),
        ({HUGE: 3}, "has a key of type int, which JSON does not have; make it a string"),
        ({Decimal(1): 3}, "has a key of type Decimal, which JSON does not have; make it a string"),
    ],
    ids=lambda value: type(value).__name__,  # pytest itself cannot show the huge integer
)
def test_what_json_lacks_is_refused_with_its_place(value: Any, expected: str) -> None:
    """The error names the path, the reason and a way out, also at the top."""
    data = {"content": {"parameters": {"a": [{}, ()], "x": [1, Point(2, 3), value]}}, "z": {0}}

    assert complaint_about(data).startswith(f"content.parameters.x[2] {expected}")
    assert complaint_about(value).startswith(f"the data {expected}")


def test_the_place_is_the_first_in_the_order_of_writing() -> None:
    """Of several values that cannot be written, the first one is named."""
    data = {"a": {"b": [0, [math.nan]]}, "c": math.nan}

    assert complaint_about(data).startswith("a.b[1][0] is NaN")


def test_keys_that_are_no_names_are_shown_as_such() -> None:
    """A path has brackets around what would not be clear behind a dot."""
    data = {"a b": [{1: math.nan}]}

    assert complaint_about(data).startswith("['a b'][0][1] is NaN")


def test_data_that_contain_themselves_are_refused() -> None:
    """A circle is found, and its place is told."""
    circle: list[Any] = [1]
    circle.append({"again": circle})

    assert "content.x[1].again contains itself" == complaint_about({"content": {"x": circle}})


def test_a_value_that_occurs_twice_is_no_circle() -> None:
    """The same list may stand side by side with itself."""
    twice = [1]

    assert "[[1], [1]]" == JsonEncoder.encode([twice, twice])
    assert complaint_about([twice, twice, {2}]).startswith("[2] is of type set")


def test_nesting_beyond_pythons_reach_is_refused() -> None:
    """A hundred thousand levels end in an error that names the place, and not in a crash."""
    expected = "content.x" + "[0]" * 30 + "[... is nested too deeply"

    assert expected == complaint_about({"content": {"x": nested(100_000)}})


def test_an_error_of_encoding_shows_no_other_error() -> None:
    """The traceback is short: simplejson would add a note for each level."""
    try:
        JsonEncoder.encode(nested(100_000))
    except EncodingError:
        text = traceback.format_exc()

    assert "when serializing" not in text
    assert len(text) < 2000


def test_an_error_without_a_place_is_told_as_it_is() -> None:
    """Data that fail for a reason of their own, here an odd dict, still end in EncodingError."""

    class Odd(dict[str, int]):
        def items(self) -> Any:
            return iter([1]) if self.pop("fresh", None) else super().items()

    assert complaint_about([Odd(fresh=1)]).startswith("the data cannot be written: ")


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[NaN, Infinity]"])
def test_numbers_that_json_lacks_are_read(text: str) -> None:
    """What 1.2.1 writes for NaN and the infinities is understood."""
    assert json.dumps(json.loads(text)) == json.dumps(JsonEncoder.decode(text))


def test_numbers_with_a_point_become_floats() -> None:
    """Reading makes no decimals."""
    assert float is type(JsonEncoder.decode(b"1.10"))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "it is not JSON: Expecting value: line 1 column 1 (char 0), near ''"),
        (b'{"a":\n x}', "it is not JSON: Expecting value: line 2 column 2 (char 7), near "),
        (b"{} {}", "it is not JSON: Extra data: line 1 column 4 - line 1 column 6 (char 3 - 5)"),
        (b"{}\xff", "it is not UTF-8 at byte 2"),
        (b"[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        ("1" * 5000, "it has an integer of more digits than Python converts"),
        ("[-" + "1" * 5000 + "]", "it has an integer of more digits than Python converts"),
    ],
    ids=["empty", "junk", "two", "binary", "arrays", "objects", "integer", "negative"],
)
def test_a_body_that_is_no_json_is_refused_with_the_reason(
    body: bytes | str, expected: str
) -> None:
    """The error says what is wrong and keeps the body."""
    with pytest.raises(DecodeError) as caught:
        JsonEncoder.decode(body)

    assert str(caught.value).startswith(f"the body is not readable: {expected}")
    assert body is caught.value.data


@given(st.binary() | st.text())
def test_reading_fails_in_one_way_only(body: bytes | str) -> None:
    """Any body is either JSON or a DecodeError."""
    try:
        JsonEncoder.decode(body)
    except DecodeError as error:
        assert len(str(error)) < 400


def test_an_error_of_decoding_quotes_little_of_the_body() -> None:
    """Of a long body, the forty characters around the place are shown."""
    body = "[" + "1, " * 10 + "x" * 1000

    with pytest.raises(DecodeError) as caught:
        JsonEncoder.decode(body)

    assert str(caught.value).endswith(f", near ' 1, 1, 1, {'x' * 30}'")
