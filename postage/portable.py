# SPDX-License-Identifier: MIT
"""A message as one line of JSON, from which it can be made again.

The body is ``"body"`` where it is UTF-8, else ``"body_base64"``. Of the values of headers, JSON
has only texts, whole numbers, booleans, null and lists; each other one is an object with one key,
which names its type: ``bytes`` (base64), ``timestamp`` (ISO 8601 in UTC), ``decimal``, ``table``.
"""

from __future__ import annotations

import base64
import binascii
import decimal
import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pika

from postage.errors import DecodeError
from postage.parking import FRAME_LIMIT
from postage.transport.publisher import encoded_size

#: The properties of AMQP 0-9-1 (section 1.8.3) but headers, and what JSON has for them.
PROPERTIES: dict[str, type] = {
    "content_type": str,
    "content_encoding": str,
    "delivery_mode": int,
    "priority": int,
    "correlation_id": str,
    "reply_to": str,
    "expiration": str,
    "message_id": str,
    "timestamp": int,
    "type": str,
    "user_id": str,
    "app_id": str,
    "cluster_id": str,
}


def line_of(properties: pika.BasicProperties, body: bytes) -> str:
    """Return a message as a line, without its end."""
    return json.dumps(as_dict(properties, body))


def as_dict(properties: pika.BasicProperties, body: bytes) -> dict[str, Any]:
    """Return a message as JSON can write it."""
    try:
        written = {"body": body.decode()}
    except UnicodeDecodeError:
        written = {"body_base64": base64.b64encode(body).decode()}
    stated = {name: getattr(properties, name) for name in PROPERTIES}
    return {
        **written,
        "properties": {key: _to_json(each) for key, each in stated.items() if each is not None},
        "headers": _table_to_json(properties.headers or {}),
    }


def message_of(line: str) -> tuple[pika.BasicProperties, bytes]:
    """Return the properties and the body that a line holds.

    Raises:
        DecodeError: It holds no message that could be published, and why.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"it is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise DecodeError("it is no JSON object")
    unknown = sorted(data.keys() - {"body", "body_base64", "properties", "headers"})
    if unknown:
        raise DecodeError(f"it has the unknown key {unknown[0]!r}")
    try:
        headers = _table_from_json(data.get("headers", {}), "headers")
    except RecursionError:
        raise DecodeError("its headers are nested too deeply") from None
    properties = pika.BasicProperties(headers=headers, **_properties_of(data))
    body = _body_of(data)
    try:
        size = encoded_size(properties)
    except Exception as error:  # pika's errors for values of the right type have no common base
        raise DecodeError(
            f"its headers or properties cannot be encoded: {type(error).__name__}: {error}"
        ) from None
    if size > FRAME_LIMIT:
        raise DecodeError(f"its headers take {size} bytes, and a frame holds {FRAME_LIMIT}")
    return properties, body


def _body_of(data: dict[str, Any]) -> bytes:
    if ("body" in data) == ("body_base64" in data):
        raise DecodeError("it needs either 'body' or 'body_base64'")
    if "body" in data:
        text = data["body"]
        if not isinstance(text, str):
            raise DecodeError("'body' is no text")
        try:
            return text.encode()
        except UnicodeEncodeError:
            raise DecodeError("'body' has characters that UTF-8 does not have") from None
    return _bytes_from_json(data["body_base64"])


def _properties_of(data: dict[str, Any]) -> dict[str, Any]:
    stated = data.get("properties", {})
    if not isinstance(stated, dict):
        raise DecodeError("'properties' is no JSON object")
    properties: dict[str, Any] = {}
    for name, value in stated.items():
        if name not in PROPERTIES:
            raise DecodeError(f"it has the unknown property {name!r}")
        kind = PROPERTIES[name]
        # A text that is no UTF-8 has come as bytes.
        read = _from_json(value, name) if kind is str else value
        if isinstance(read, bool) or not isinstance(read, (str, bytes) if kind is str else kind):
            raise DecodeError(f"the property {name!r} is no {kind.__name__}")
        properties[name] = read
    return properties


# ------------------------------------------------------------------- values of headers


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, datetime):
        return {"timestamp": _in_utc(value).isoformat()}
    if isinstance(value, decimal.Decimal):
        return {"decimal": str(value)}
    if isinstance(value, dict):
        return {"table": _table_to_json(value)}
    if isinstance(value, (list, tuple)):
        return [_to_json(each) for each in value]
    return value


def _table_to_json(table: dict[Any, Any]) -> dict[str, Any]:
    return {_name_to_json(name): _to_json(value) for name, value in table.items()}


def _name_to_json(name: Any) -> str:
    # pika leaves a name that is no UTF-8 as bytes.
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)


def _name_from_json(name: str) -> Any:
    raw = name.encode("utf-8", "surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _from_json(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_from_json(each, name) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(kind, written)] = value.items()
        if kind == "table":
            return _table_from_json(written, name)
        if kind in _READERS:
            try:
                return _READERS[kind](written)
            except (ValueError, TypeError, AttributeError, decimal.InvalidOperation):
                raise DecodeError(f"{name!r} has the {kind} {written!r}, which is none") from None
    raise DecodeError(
        f"{name!r} has an object that is not of the form "
        '{"bytes": …}, {"timestamp": …}, {"decimal": …} or {"table": …}'
    )


def _table_from_json(value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise DecodeError(f"{name!r} is no JSON object")
    try:
        return {_name_from_json(key): _from_json(each, key) for key, each in value.items()}
    except UnicodeEncodeError:
        raise DecodeError(f"{name!r} has a name that cannot be encoded") from None


def _bytes_from_json(text: Any) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise DecodeError("it has bytes that are no base64") from None
    if base64.b64encode(data).decode() != text:  # Python 3.10 takes "=" for no bytes
        raise DecodeError("it has bytes that are no base64")
    return data


def _in_utc(stamp: datetime) -> datetime:
    # pika's are in UTC, and those of its older versions do not say so.
    return stamp.astimezone(timezone.utc) if stamp.tzinfo else stamp.replace(tzinfo=timezone.utc)


_READERS: dict[str, Callable[[Any], Any]] = {
    "bytes": _bytes_from_json,
    "timestamp": lambda text: _in_utc(datetime.fromisoformat(text)),
    "decimal": decimal.Decimal,
}
