# SPDX-License-Identifier: MIT
"""How bodies are written to the wire and read from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import simplejson

from postage.errors import DecodeError, EncodingError

#: Levels of nesting that are blamed once Python gave up. No limit of ours: how many levels
#: Python manages depends on its version and on how deep the program is in calls already.
DEEP = 100
#: Characters of a path that an error shows: enough to find the place.
PATH_LENGTH = 100
#: Characters of a body that an error shows before and after the place where reading stopped.
EXCERPT_BEFORE, EXCERPT_AFTER = 10, 30


class Encoder:
    """Writes and reads bodies; this one leaves them as they are.

    Subclass it for another format and name that in the `encoder_class` of producers and
    consumers, on all sides.

    Attributes:
        content_type: The AMQP property of that name.
    """

    content_type = ""

    @classmethod
    def encode(cls, data: Any) -> Any:
        """Return data as text or bytes."""
        return data

    @classmethod
    def decode(cls, string: Any) -> Any:
        """Return the data of a body; raise `DecodeError` if it cannot be read."""
        return string


class JsonEncoder(Encoder):
    """Writes and reads JSON.

    Tuples, named ones too, become arrays, and a `Decimal` becomes a number with all of its
    digits. What JSON lacks is refused: bytes, sets, NaN. A NaN of a peer is read, though.
    """

    content_type = "application/json"

    @classmethod
    def encode(cls, data: Any) -> str:
        """Return data as JSON, in ASCII.

        Raises:
            EncodingError: A value cannot be written; it names the first one.
        """
        try:
            return _WRITER.encode(data)
        except (TypeError, ValueError, RecursionError) as error:
            deepest = DEEP if isinstance(error, RecursionError) else math.inf
            complaint = _complaint(data, deepest) or f"the data cannot be written: {error}"
        # Outside the clause, since simplejson adds a note to its error for every level.
        raise EncodingError(complaint)

    @classmethod
    def decode(cls, string: bytes | str) -> Any:
        """Return what JSON says, in UTF-8 or as text.

        Raises:
            DecodeError: It is not JSON, or too much for Python.
        """
        try:
            return _read(string if isinstance(string, str) else str(string, "utf-8"))
        except (ValueError, RecursionError) as error:
            raise DecodeError(f"the body is not readable: {_reason(error)}", string) from error


# --------------------------------------------------------------------------- writing


def _write_decimal(value: Any) -> simplejson.RawJSON:
    """Write a `Decimal`: simplejson's own way lets NaN pass before its version 4.2."""
    if isinstance(value, Decimal) and value.is_finite():
        return simplejson.RawJSON(str(value))
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


#: Made once, since that takes longer than to write a message.
_WRITER = simplejson.JSONEncoder(
    allow_nan=False,
    default=_write_decimal,
    encoding=None,  # type: ignore[arg-type]  # refuses bytes
    namedtuple_as_object=False,
    use_decimal=False,
)


class _Place(NamedTuple):
    """A value inside the data, with the way to it."""

    value: Any
    step: str = ""
    container: _Place | None = None
    depth: int = 0

    def around(self) -> Iterator[_Place]:
        """Yield the containers that it is in, the innermost first."""
        place = self.container
        while place is not None:
            yield place
            place = place.container

    def inside(self) -> list[_Place]:
        """Return the values that it contains."""
        steps: list[tuple[str, Any]] = []
        if isinstance(self.value, dict):
            steps = [(_step(key), value) for key, value in self.value.items()]
        elif isinstance(self.value, (list, tuple)):
            steps = [(f"[{index}]", value) for index, value in enumerate(self.value)]
        return [_Place(value, step, self, self.depth + 1) for step, value in steps]

    def __str__(self) -> str:
        steps = [self.step, *(place.step for place in self.around())]
        path = "".join(reversed(steps)).removeprefix(".")
        if len(path) > PATH_LENGTH:
            path = path[:PATH_LENGTH] + "..."
        return path or "the data"


def _step(key: Any) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


def _complaint(data: Any, deepest: float) -> str | None:
    """Say which value is the first that cannot be written, and why.

    It walks without recursion, as the data may be too deep or circular.
    """
    places = [_Place(data)]
    while places:
        place = places.pop()
        if place.depth > deepest:
            return f"{place} is nested too deeply"
        if complaint := _complaint_about(place):
            return f"{place} {complaint}"
        places.extend(reversed(place.inside()))
    return None


def _complaint_about(place: _Place) -> str | None:
    value = place.value
    if not isinstance(value, (dict, list, tuple)):
        return None if _can_write(value) else _why_not(value)
    if any(value is each.value for each in place.around()):
        return "contains itself"
    if isinstance(value, dict):
        for key in value:
            if not _can_write({key: None}):
                kind = type(key).__name__
                return f"has a key of type {kind}, which JSON does not have; make it a string"
    return None


def _why_not(value: Any) -> str:
    """Say why a value that contains no others cannot be written, and what to do."""
    if isinstance(value, (float, Decimal)):
        name = "NaN" if "nan" in str(value).lower() else "infinite"
        return f"is {name}, which JSON does not have; send None or a string"
    if isinstance(value, int):
        return "has more digits than Python converts; send it in hexadecimal"
    kind = type(value).__name__
    if isinstance(value, (bytes, bytearray)):
        return f"is of type {kind}, which JSON does not have; decode it, or send base64"
    return f"is of type {kind}, which JSON does not have; make it text, a number, list or dict"


def _can_write(value: Any) -> bool:
    try:
        _WRITER.encode(value)
    except (TypeError, ValueError):
        return False
    return True


# --------------------------------------------------------------------------- reading

#: NaN and the infinities, which JSON does not have and 1.2.1 sends, become floats.
_READER = simplejson.JSONDecoder(parse_constant=float)


def _read(text: str) -> Any:
    """Return what JSON says. What machines write has no space around it, and is read at once."""
    try:
        data, end = _READER.scan_once(text, 0)
    except ValueError:
        data, end = None, -1
    return data if end == len(text) else _READER.decode(text)


def _reason(error: Exception) -> str:
    """Say why a body cannot be read, with a little of it."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}"
    if isinstance(error, simplejson.JSONDecodeError):
        begin = max(error.pos - EXCERPT_BEFORE, 0)
        excerpt = error.doc[begin : error.pos + EXCERPT_AFTER]
        return f"it is not JSON: {error}, near {excerpt!r}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "it has an integer of more digits than Python converts"
