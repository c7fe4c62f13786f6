# SPDX-License-Identifier: MIT
"""How field tables are taken apart and put together."""

from __future__ import annotations

import struct
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pika.data
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pika.compat import long

from postage.broker import fields
from postage.broker.fields import FieldError

#: A field of each type, with what it is in Python. Tables and arrays are tested by themselves.
SCALARS: dict[bytes, object] = {
    b"V": None,
    b"t\x00": False,
    b"t\x01": True,
    b"t\x02": True,
    b"b\xff": -1,
    b"B\xff": 255,
    b"s\xff\xff": -1,
    b"U\xff\xff": -1,
    b"u\xff\xff": 65535,
    b"I\xff\xff\xff\xff": -1,
    b"i\xff\xff\xff\xff": 2**32 - 1,
    b"l" + b"\xff" * 8: -1,
    b"L" + b"\xff" * 8: -1,
    b"f\x3f\xc0\x00\x00": 1.5,
    b"d\x3f\xf8" + bytes(6): 1.5,
    b"D\x02\xff\xff\xff\x85": Decimal("-1.23"),
    b"D\xff\x00\x00\x00\x01": Decimal("1E-255"),
    b"T" + bytes(8): datetime(1970, 1, 1, tzinfo=timezone.utc),
    b"T" + b"\xff" * 8: 2**64 - 1,
    b"S\x00\x00\x00\x00": "",
    b"S\x00\x00\x00\x02\xc3\xa9": "é",
    b"S\x00\x00\x00\x01\xff": b"\xff",
    b"x\x00\x00\x00\x00": b"",
    b"x\x00\x00\x00\x03abc": b"abc",
}

ARRAY = b"A\x00\x00\x00\x03t\x01V"
TABLE = b"F\x00\x00\x00\x03\x01aV"

#: Fields that are broken, and how the complaint about each begins if it is the one in a table.
BROKEN = {
    b"Q": "the field at 6 has the unknown type b'Q'",
    b"": "the field at 6 is cut off",
    b"I\x00\x00\x00": "the field at 6 is cut off",
    b"S": "the length of the field at 6 is cut off",
    b"S\x00\x00\x00": "the length of the field at 6 is cut off",
    b"S\x00\x00\x00\x02a": "the field at 6 is cut off",
    b"S\xff\xff\xff\xffa": "the field at 6 is cut off",
    b"d\x7f\xf8" + bytes(6): "the number at 6 is not finite",
    b"f\xff\x80\x00\x00": "the number at 6 is not finite",
    b"A\x00\x00\x00\x01Q": "the field at 11 has the unknown type b'Q'",
    b"A\x00\x00\x00\x01t": "the field at 11 is cut off",
    b"F\x00\x00\x00\x01\x01": "the field at 13 is cut off",
    b"F\x00\x00\x00\x03\x01aQ": "the field at 13 has the unknown type b'Q'",
    b"F\x00\x00\x00\x03\x01aI": "the field at 13 is cut off",
    b"A\x00\x00\x00\x08F\x00\x00\x00\x03\x01aQ": "the field at 18 has the unknown type b'Q'",
}

names = st.text(max_size=8)
raw_fields = st.recursive(
    st.sampled_from(sorted(SCALARS)),
    lambda inner: (
        st.lists(inner, max_size=4).map(fields.array)
        | st.dictionaries(names, inner, max_size=4).map(fields.table)
    ),
    max_leaves=8,
)
tables = st.dictionaries(names, raw_fields, max_size=6)

#: What pika can write.
pika_scalars: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-(2**63), 2**63 - 1).map(long)
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.integers(-999, 999).map(lambda number: Decimal(number).scaleb(-2))
)
pika_values: st.SearchStrategy[Any] = st.recursive(
    pika_scalars | st.datetimes(min_value=datetime(1970, 1, 1)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)


def written_by_pika(table: dict[str, Any]) -> bytes:
    pieces: list[bytes] = []
    pika.data.encode_table(pieces, table)
    return b"".join(pieces)


def with_length(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def complaint_about(data: bytes, offset: int = 0) -> str:
    with pytest.raises(FieldError) as caught:
        fields.split(data, offset)
    return str(caught.value)


def nested_arrays(levels: int) -> bytes:
    """Arrays in arrays, without the time that their number squared would take."""
    sizes = range(5 * (levels - 1), -1, -5)
    return b"".join(b"A" + struct.pack(">I", size) for size in sizes)


# Tables


def test_an_empty_table_has_no_fields() -> None:
    """Four octets of zero are a table."""
    assert ({}, 4) == fields.split(bytes(4))
    assert bytes(4) == fields.join({})


@pytest.mark.parametrize("field", [*SCALARS, ARRAY, TABLE])
def test_a_field_of_each_type_stays_as_it_is(field: bytes) -> None:
    """A table gives the bytes of its fields, and these make the same table."""
    table = with_length(b"\x04name" + field)
    assert ({"name": field}, len(table)) == fields.split(table)
    assert table == fields.join({"name": field})


def test_fields_keep_their_order() -> None:
    """The fields come in the order in which the client wrote them."""
    table = with_length(b"\x01bV\x01at\x01\x00V")
    assert ["b", "a", ""] == list(fields.split(table)[0])
    assert table == fields.join(fields.split(table)[0])


def test_the_first_of_fields_with_one_name_counts() -> None:
    """A second field of the same name is left out, as RabbitMQ looks up the first."""
    assert {"a": b"t\x01"} == fields.split(with_length(b"\x01at\x01\x01at\x00"))[0]


def test_a_name_may_be_no_utf_8() -> None:
    """Any octets make a name, and come back as they were."""
    table = with_length(b"\x02\xff\x00V")
    assert {"\udcff\x00": b"V"} == fields.split(table)[0]
    assert table == fields.join({"\udcff\x00": b"V"})


def test_a_name_has_up_to_255_octets() -> None:
    """The longest name is written, a longer one is refused."""
    longest = "é" * 127 + "a"
    assert {longest: b"V"} == fields.split(fields.join({longest: b"V"}))[0]
    with pytest.raises(FieldError, match="the name of a field has 256 octets, 255 are allowed"):
        fields.join({longest + "a": b"V"})


def test_a_table_begins_at_an_offset_and_leaves_what_follows() -> None:
    """What is before and after the table is none of its business."""
    table = with_length(b"\x01aV")
    assert ({"a": b"V"}, 3 + len(table)) == fields.split(b"Q\xff\xff" + table + b"Q\xff\xff", 3)


@pytest.mark.parametrize("field", BROKEN)
def test_a_broken_field_is_refused_with_its_place(field: bytes) -> None:
    """The complaint says what is wrong, and where."""
    assert BROKEN[field] == complaint_about(with_length(b"\x01a" + field))


def test_a_value_must_not_end_after_its_table() -> None:
    """The bytes that follow a table do not complete its last field."""
    assert "the field at 6 is cut off" == complaint_about(b"\x00\x00\x00\x03\x01at" + b"\x01")


def test_a_name_must_not_end_after_its_table() -> None:
    """The bytes that follow a table do not complete its last name."""
    assert "the field at 7 is cut off" == complaint_about(b"\x00\x00\x00\x02\x02ab" + b"V")


def test_a_table_must_not_end_after_the_data() -> None:
    """The complaint counts what is missing."""
    assert "the table at 1 ends 2 octets after the data" == complaint_about(
        b"\xff\x00\x00\x00\x03V", 1
    )
    assert "the length of the table at 1 is cut off" == complaint_about(b"\xff\x00\x00\x00", 1)


def test_thousands_of_levels_cost_neither_the_stack_nor_the_square() -> None:
    """A client may fill a frame with arrays in arrays."""
    field = nested_arrays(26_000)
    assert {"a": field} == fields.split(fields.join({"a": field}))[0]
    assert [field[5:]] == fields.items(field)


def test_the_innermost_of_thousands_of_levels_is_checked() -> None:
    """The last array is one octet too long."""
    field = nested_arrays(1_000)[:-1] + b"\x01"
    assert "the field at 5001 is cut off" == complaint_about(fields.join({"a": field}))


@given(tables)
def test_a_table_is_put_together_as_it_was(table: dict[str, bytes]) -> None:
    """Splitting and joining are each other's reverse, at any offset and whatever follows."""
    joined = fields.join(table)
    split, end = fields.split(b"xx" + joined + b"yy", 2)
    assert (list(table.items()), 2 + len(joined)) == (list(split.items()), end)


@given(tables)
def test_a_truncated_table_is_refused(table: dict[str, bytes]) -> None:
    """Wherever the data end too early, that is noticed."""
    joined = fields.join(table)
    for length in range(len(joined)):
        complaint_about(joined[:length])


@given(tables)
def test_a_table_with_a_shorter_length_is_refused_or_has_fewer_fields(
    table: dict[str, bytes],
) -> None:
    """What a table holds ends with it, wherever a wrong length lets it end."""
    joined = fields.join(table)
    for length in range(len(joined) - 4):
        data = struct.pack(">I", length) + joined[4:]
        try:
            split, end = fields.split(data)
        except FieldError:
            continue
        assert 4 + length == end
        assert list(table.items())[: len(split)] == list(split.items())


@given(tables.map(fields.join), st.integers(0, 2**16), st.integers(0, 255))
@example(b"\x00\x00\x00\x0a\x01aF\x00\x00\x00\x02\xffa", 0, 0)
def test_a_damaged_table_is_taken_or_refused(data: bytes, place: int, octet: int) -> None:
    """No input makes another error, and what is taken can be read to its last level."""
    damaged = bytearray(data)
    damaged[place % len(data)] = octet
    try:
        table = fields.split(bytes(damaged))[0]
    except FieldError:
        return
    unread = list(table.values())
    while unread:
        field = unread.pop()
        if field[:1] == b"A":
            unread += fields.items(field)
        elif field[:1] == b"F":
            unread += fields.fields_of(field).values()
        else:
            fields.decode(field)


@given(st.dictionaries(names, pika_values, max_size=4))
def test_the_tables_of_pika_come_back_exactly(table: dict[str, Any]) -> None:
    """What pika writes is split and joined to the same bytes."""
    written = written_by_pika(table)
    split, end = fields.split(written)
    assert (list(table), len(written)) == (list(split), end)
    assert written == fields.join(split)


# Arrays and tables as fields


def test_an_array_gives_its_elements() -> None:
    """An array is made of fields, and gives them back."""
    assert [b"t\x01", b"V"] == fields.items(ARRAY)
    assert ARRAY == fields.array([b"t\x01", b"V"])
    assert [] == fields.items(fields.array([]))


def test_a_table_field_gives_its_fields() -> None:
    """A table field is made of fields with names, and gives them back."""
    assert {"a": b"V"} == fields.fields_of(TABLE)
    assert TABLE == fields.table({"a": b"V"})
    assert {} == fields.fields_of(fields.table({}))


def test_nested_arrays_and_tables_are_opened_one_by_one() -> None:
    """The elements of an array may be arrays and tables."""
    assert [ARRAY, TABLE] == fields.items(fields.array([ARRAY, TABLE]))
    assert {"x": ARRAY, "y": TABLE} == fields.fields_of(fields.table({"x": ARRAY, "y": TABLE}))


@pytest.mark.parametrize("field", [b"", b"V", TABLE, ARRAY + b"V", ARRAY[:-1], *BROKEN])
def test_only_an_array_has_items(field: bytes) -> None:
    """Other fields, broken ones and two at once are refused."""
    with pytest.raises(FieldError):
        fields.items(field)


@pytest.mark.parametrize("field", [b"", b"V", ARRAY, TABLE + b"V", TABLE[:-1], *BROKEN])
def test_only_a_table_has_fields(field: bytes) -> None:
    """Other fields, broken ones and two at once are refused."""
    with pytest.raises(FieldError):
        fields.fields_of(field)


# Values


@pytest.mark.parametrize(("field", "value"), SCALARS.items())
def test_a_field_is_a_python_value(field: bytes, value: object) -> None:
    """Each type gives the value that comes nearest."""
    decoded = fields.decode(field)
    assert (type(value), value) == (type(decoded), decoded)


@pytest.mark.parametrize("field", [ARRAY, TABLE])
def test_arrays_and_tables_stay_fields(field: bytes) -> None:
    """They are opened by functions of their own, which need no recursion."""
    assert field == fields.decode(field)


@pytest.mark.parametrize("field", [b"", b"Q", b"I\x00", b"VV", b"S\x00\x00\x00\x01"])
def test_a_broken_field_has_no_value(field: bytes) -> None:
    """What is not exactly one field is refused."""
    with pytest.raises(FieldError):
        fields.decode(field)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (None, b"V"),
        (True, b"t\x01"),
        (False, b"t\x00"),
        (1, b"l" + bytes(7) + b"\x01"),
        (-(2**63), b"l\x80" + bytes(7)),
        (1.5, b"d\x3f\xf8" + bytes(6)),
        ("é", b"S\x00\x00\x00\x02\xc3\xa9"),
        ("\udcff", b"S\x00\x00\x00\x01\xff"),
        (b"\xff", b"x\x00\x00\x00\x01\xff"),
        (datetime(1970, 1, 1, 0, 0, 1, 999_999, timezone.utc), b"T" + bytes(7) + b"\x01"),
        (datetime(1970, 1, 1, 0, 0, 1), b"T" + bytes(7) + b"\x01"),
        (datetime(1970, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), b"T" + bytes(8)),
    ],
)
def test_a_python_value_is_written_with_the_type_that_rabbitmq_uses(
    value: Any, field: bytes
) -> None:
    """Strings are S, all integers l, times T in whole seconds of UTC."""
    assert field == fields.encode(value)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, float("nan"), float("inf"), datetime.min])
def test_a_value_that_does_not_fit_is_refused(value: Any) -> None:
    """Integers have 64 bits, times begin in 1970, numbers are finite."""
    with pytest.raises(FieldError, match="does not fit into a field"):
        fields.encode(value)


@pytest.mark.parametrize("value", [[], {}, object(), 1j])
def test_a_value_without_a_type_is_refused(value: Any) -> None:
    """Arrays and tables are put together from fields, not from Python's."""
    with pytest.raises(TypeError, match="is no value that a field can hold"):
        fields.encode(value)


@given(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.binary()
    | st.datetimes(min_value=datetime(1970, 1, 1), timezones=st.just(timezone.utc)).map(
        lambda time: time.replace(microsecond=0)
    )
)
def test_a_value_comes_back_from_its_field(value: Any) -> None:
    """Encoding and decoding are each other's reverse."""
    decoded = fields.decode(fields.encode(value))
    assert (type(value), value) == (type(decoded), decoded)


@given(pika_scalars)
def test_a_value_that_pika_wrote_is_read_as_pika_reads_it(value: Any) -> None:
    """Both give the same Python value for a scalar."""
    written = written_by_pika({"a": value})
    expected = pika.data.decode_table(written, 0)[0]["a"]
    assert expected == fields.decode(fields.split(written)[0]["a"])
