# SPDX-License-Identifier: MIT
"""What a message looks like after it died in a queue, and which deaths go round in circles.

The rules are RabbitMQ's: https://www.rabbitmq.com/docs/dlx
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

from postage.broker import fields
from postage.broker.messages import Message, join_headers, join_properties

_COUNT = "count"
#: What a field holds at most.
_LARGEST = 2**63 - 1


def dead_letter(
    message: Message, queue: str, reason: str, exchange: str, routing_key: str | None
) -> Message:
    """Return the dead letter that is made of a message.

    Args:
        queue: where it died.
        reason: rejected, expired, maxlen or delivery_limit.
        exchange: the dead letter exchange.
        routing_key: that of the queue, None to keep those of the message.
    """
    headers = dict(message.headers)
    properties = dict(message.properties)
    death = {
        _COUNT: fields.encode(1),
        "reason": fields.encode(reason),
        "queue": fields.encode(queue),
        "time": fields.encode(datetime.now(timezone.utc)),
        "exchange": fields.encode(message.exchange),
        "routing-keys": fields.array(fields.encode(key) for key in message.public_keys),
    }
    if "expiration" in properties:
        # It would expire again at once where it goes.
        death["original-expiration"] = fields.encode(message.text("expiration") or "")
        del properties["expiration"]
    if "x-death" not in headers:
        for name in ("reason", "queue", "exchange"):
            headers[f"x-first-death-{name}"] = death[name]
    headers["x-death"] = _with_death(headers.get("x-death"), death)
    if routing_key is not None:
        headers.pop("CC", None)
    properties["headers"] = join_headers(headers)
    letter = Message(
        exchange,
        message.routing_key if routing_key is None else routing_key,
        join_properties(properties),
        message.body,
    )
    if routing_key is None:
        letter.keys = message.keys  # those of BCC are in no header any more
    return letter


def is_cycle(letter: Message, queue: str) -> bool:
    """Tell whether a dead letter comes back to a queue with no rejection on its way.

    RabbitMQ drops it then: nobody but itself would ever stop the circle.
    """
    way = []
    for death in _deaths(letter.headers.get("x-death")):
        way.append(death)
        if death.get("queue") == fields.encode(queue):
            return all(each.get("reason") != fields.encode("rejected") for each in way)
    return False


def _deaths(field: bytes | None) -> Sequence[dict[str, bytes]]:
    if field is None or field[:1] != b"A":
        return []
    return [fields.fields_of(item) for item in fields.items(field) if item[:1] == b"F"]


def _with_death(field: bytes | None, death: dict[str, bytes]) -> bytes:
    """Return the header x-death with one more death: the last is the first of the list."""
    others: list[dict[str, bytes]] = []
    for old in _deaths(field):
        if all(old.get(name) == death[name] for name in ("queue", "reason")):
            count = fields.decode(old[_COUNT]) if _COUNT in old else 0
            # A client may have written any number.
            number = min(count + 1, _LARGEST) if isinstance(count, int) else 1
            death = {**old, _COUNT: fields.encode(number)}
        else:
            # RabbitMQ turns those round each time.
            others.insert(0, old)
    return fields.array(fields.table(each) for each in (death, *others))
