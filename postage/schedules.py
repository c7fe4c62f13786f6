# SPDX-License-Identifier: MIT
"""Schedules: messages that wait in the broker until they are due, and can be cancelled.

Each waits in a queue of its own, the *holding queue*, which dead-letters it to its goal when
it expires. To cancel is to purge that queue: the broker counts what it has thrown away, and
so decides between the two that race::

    publish ──> postage-schedule-<id> ──expired──> exchange and key, or queue
            └─> postage-schedules-<n> (a copy, for those who ask what there is)

Deleting the queue would not do: for a quorum queue RabbitMQ counts first and deletes then, and
what expires in between is lost. A purge is one command of its log, as is the expiry.

A queue each costs more than a message: for many messages that nobody will cancel there is
``_delay``, with `postage.delay`.
"""

from __future__ import annotations

import copy
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import pika
from pika.channel import Channel

from postage.delay import RENEWAL, TO_EXCHANGE, TO_QUEUE, Due, Wait, stripped
from postage.errors import (
    NOT_FOUND,
    ChannelClosedError,
    ConfigurationError,
    ConnectionLostError,
    MessageNotFoundError,
    TransportError,
    UnroutableError,
)
from postage.futures import Future, refuse_in_coroutine
from postage.settings import queue_type_from_environment, settings_for
from postage.topology import DefaultExchange, ExchangeSpec, QueueSpec
from postage.transport import connection as connections
from postage.transport.browser import Browsed, Browser
from postage.transport.connection import Connection
from postage.transport.conversation import Declarable, Script, attempting
from postage.transport.publisher import Publishing, check_encodable

if TYPE_CHECKING:
    from postage.producer import GenericProducer

#: The queue in which a message waits.
HOLDING = "postage-schedule-{id}"
#: The queues that list what waits, one for each number of digits of the seconds. A message
#: expires at the head of its queue only, so one of a year must not stand before one of a minute.
LEDGER = "postage-schedules-{digits}"
#: 366 days have eight digits.
MOST_DIGITS = 8
#: Seconds that a holding queue stays after its message is due. It must be gone some day, and
#: what it still holds goes with it: what no queue would take, and what was due while the broker
#: was down for longer than this.
LINGER_SECONDS = 24 * 3600.0

#: Headers of the message: its schedule, its due time (ISO 8601), and the key that it gets.
SCHEDULE, DUE, KEY = "postage-schedule", "postage-due", "postage-key"

#: What makes no sense for a schedule: it is always mandatory and confirmed.
_REFUSED = frozenset({"_mandatory", "_confirm", "_ttl"})
_DEFAULT = DefaultExchange.spec()
#: RabbitMQ, sender-selected distribution: headers that name further queues, at once.
_COPIES = frozenset({"CC", "BCC"})
_ID = re.compile("[0-9a-f]{32}")


# ------------------------------------------------------------------------- the handle


@dataclass(frozen=True)
class Scheduled:
    """A message that waits in the broker.

    Attributes:
        id: Its id, by which another process can cancel it (`GenericProducer.cancel_schedule()`).
        due: When it leaves for its goal, in UTC.
        confirmed: With ``_future=True``: the future that is set when the broker has it.
    """

    id: str
    due: datetime
    confirmed: Future[None] | None = field(default=None, repr=False, compare=False)
    _cancel: Callable[[str], int] | None = field(default=None, repr=False, compare=False)

    def cancel(self) -> int:
        """Cancel it.

        Returns:
            How many messages that prevented: 1, or 2 if it was sent again after a lost connection.

        Raises:
            MessageNotFoundError: It is too late, or it was cancelled before.
            TransportError: The broker cannot be reached, or it is not known what became of it.
        """
        assert self._cancel is not None
        return self._cancel(self.id)


@dataclass(frozen=True)
class Entry:
    """What is known of a message that waits.

    Attributes:
        id, due: As of `Scheduled`.
        exchange, key: Where it goes to; None if that is a queue.
        queue: The queue that it goes to; None if that is an exchange.
        type, name: Of the message; None if its body is no JSON.
    """

    id: str
    due: datetime
    exchange: str | None
    key: str | None
    queue: str | None
    type: str | None
    name: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can write."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "due": self.due.isoformat()}


# ------------------------------------------------------------------- pure decisions


def ledger_of(seconds: float) -> str:
    """Return the name of the queue that lists what waits so long.

    >>> [ledger_of(each) for each in (0, 9.9, 10, 366 * 24 * 3600)]
    ['postage-schedules-1', 'postage-schedules-1', 'postage-schedules-2', 'postage-schedules-8']
    """
    return LEDGER.format(digits=len(str(int(seconds))))


def entry_of(routing_key: str, properties: pika.BasicProperties, body: bytes) -> Entry | None:
    """Return what the copy of a message says; None if it is none of ours."""
    headers = properties.headers or {}
    try:
        due = datetime.fromisoformat(headers[DUE])
        id = str(headers[SCHEDULE])
    except (KeyError, TypeError, ValueError):
        return None
    if due.utcoffset() is None or routing_key != HOLDING.format(id=id):
        return None
    try:
        content = json.loads(body)
    except ValueError:
        content = {}
    content = content if isinstance(content, dict) else {}
    return Entry(
        id,
        due,
        headers.get(TO_EXCHANGE),
        headers.get(KEY),
        headers.get(TO_QUEUE),
        content.get("type"),
        content.get("name"),
    )


# --------------------------------------------------------------------- the topology


@dataclass(frozen=True)
class Present:
    """A queue that must be there: the goal of a message, if that is a queue."""

    queue: str
    lasts_seconds: float = 0.0

    def script(self, channel: Channel) -> Script[None]:
        """Check it.

        Raises:
            UnroutableError: It is not there.
        """
        try:
            yield partial(channel.queue_declare, queue=self.queue, passive=True)
        except ChannelClosedError as error:
            if error.code == NOT_FOUND:
                raise UnroutableError([("", self.queue)]) from None
            advice = "If it is exclusive to another connection, schedule through an exchange"
            attempt = f"look for queue {self.queue!r}, for a schedule"
            raise ChannelClosedError(error.code, error.text, attempt, advice) from None


@dataclass(frozen=True)
class Holding:
    """What has to be there before a message is scheduled."""

    id: str
    exchange: ExchangeSpec
    key: str
    ledger: str
    expires_ms: int
    lasts_seconds: float = RENEWAL

    def parts(self) -> Iterator[Declarable]:
        """Yield it in the order in which it is declared."""
        yield Present(self.key) if self.exchange.is_default else self.exchange
        yield _queue(self.ledger, {}, {"x-delivery-limit": 2**31 - 1})  # it is read again and again
        yield _queue(
            HOLDING.format(id=self.id),
            {
                "x-expires": self.expires_ms,
                "x-dead-letter-exchange": self.exchange.name,
                "x-dead-letter-routing-key": self.key,
            },
            # RabbitMQ, quorum queues: what has expired stays until it is confirmed where it goes,
            # which needs reject-publish.
            {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"},
        )


def _queue(name: str, arguments: Mapping[str, Any], quorum: Mapping[str, Any]) -> QueueSpec:
    kind = queue_type_from_environment()
    more = quorum if kind == "quorum" else {}
    return QueueSpec(name, arguments={"x-queue-type": kind, **arguments, **more})


def _now() -> datetime:
    return datetime.now(timezone.utc)


# -------------------------------------------------------------------- what is to be sent


@dataclass(frozen=True)
class Hold(Wait):
    """That a message waits in a queue of its own."""

    id: str = ""
    exchange: ExchangeSpec = _DEFAULT
    key: str = ""

    def headers(self) -> dict[str, Any]:
        """Return the headers that are added."""
        assert self.at is not None
        goal = (
            {TO_QUEUE: self.key}
            if self.exchange.is_default
            else {TO_EXCHANGE: self.exchange.name, KEY: self.key}
        )
        ledger = ledger_of(self.seconds())
        return {SCHEDULE: self.id, DUE: self.at.isoformat(), **goal, "BCC": [ledger]}

    def begin(self, mandatory: bool, is_bound: bool = False) -> HeldDue:
        """Return when the message is due that is sent now."""
        seconds, headers = self.seconds(), self.headers()
        expires_ms = math.ceil((seconds + LINGER_SECONDS) * 1000)
        holding = Holding(self.id, self.exchange, self.key, headers["BCC"][0], expires_ms)
        due = time.monotonic() + seconds
        return HeldDue(due, mandatory, is_bound, holding=holding, headers=headers)


@dataclass(frozen=True, kw_only=True)
class HeldDue(Due):
    """When a publishing is due that waits in a queue of its own."""

    holding: Holding
    headers: Mapping[str, Any] = field(hash=False)

    def __call__(self, publishing: Publishing) -> None:
        """Lead a publishing into its holding queue, for the time that is left by now."""
        left = max(0.0, self.time - time.monotonic())
        properties = copy.copy(publishing.loose_properties)
        properties.headers = {**stripped(properties.headers), **self.headers}
        properties.expiration = str(math.ceil(left * 1000))
        publishing.properties = properties
        publishing.preparation = self.holding


# ------------------------------------------------------------------------- scheduling


def schedule(
    producer: GenericProducer, build: Callable[..., Any], /, *args: Any, **kwds: Any
) -> Scheduled:
    """Send a message that waits until it is due: `GenericProducer.schedule_x()`.

    Raises:
        ConfigurationError: It has no due time, or more than one goal.
        PostageError: As for ``message_x()``.
    """
    if refused := sorted(_REFUSED & kwds.keys()):
        raise TypeError(
            f"a schedule takes no {', '.join(refused)}: it waits until it is due, and is always "
            "mandatory and confirmed"
        )
    as_future = bool(kwds.pop("_future", False))
    composed = producer._compose(build, args, kwds)
    if composed.wait is None:
        raise ConfigurationError("a schedule needs its due time: give _at or _delay")
    if len(composed.pairs) != 1:
        raise ConfigurationError(
            f"a schedule has one goal, and eks has {len(composed.pairs)}: give _key, _queue or "
            "_eks with one pair, or schedule a message for each"
        )
    if copies := sorted(_COPIES & (composed.loose_properties.headers or {}).keys()):
        raise ConfigurationError(f"header {copies[0]!r} would have a schedule delivered at once")
    [(exchange, key)] = composed.pairs
    at, seconds = composed.wait.at, composed.wait.seconds()
    due = at.astimezone(timezone.utc) if at and seconds else _now() + timedelta(seconds=seconds)
    hold = Hold(at=due, id=uuid.uuid4().hex, exchange=exchange, key=key)
    with_ours = copy.copy(composed.loose_properties)
    with_ours.headers = {**(with_ours.headers or {}), **hold.headers()}
    check_encodable(key, with_ours)
    composed.pairs = [(_DEFAULT, HOLDING.format(id=hold.id))]
    composed.wait, composed.mandatory, composed.confirm = hold, True, True
    confirmed = producer._send(composed, as_future)
    return Scheduled(hold.id, due, confirmed, producer.cancel_schedule)


def cancel(connection: Connection, id: str, timeout: float) -> int:
    """Cancel a schedule, and return how many messages that prevented.

    Raises:
        MessageNotFoundError: It is too late, or it was cancelled before.
        ConfigurationError: That is no id of a schedule.
        TransportError: The broker cannot be reached, or it is not known what became of it.
    """
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise ConfigurationError(f"{id!r} is no id of a schedule, which has 32 hexadecimal digits")
    refuse_in_coroutine("cancelling", "await asyncio.to_thread(scheduled.cancel)")
    queue = HOLDING.format(id=id)
    asked: list[bool] = []

    def script(channel: Channel) -> Script[int]:
        if asked:
            raise ConnectionLostError(
                f"the connection was lost while schedule {id} was cancelled: that may have worked"
            )
        asked.append(True)
        try:
            with attempting(f"cancel schedule {id}"):
                answer = yield partial(channel.queue_purge, queue)
        except ChannelClosedError as error:
            if error.code == NOT_FOUND:
                return 0
            raise
        number = int(answer.method.message_count)
        if number:  # else its dead letter may still be under way
            with suppress(TransportError):  # it goes by itself, only later
                yield partial(channel.queue_delete, queue)
        return number

    number = int(connection.ask(script, timeout, f"cancel schedule {id}"))
    if not number:
        raise MessageNotFoundError(
            f"there is nothing to cancel of schedule {id}: its message is under way, or it was "
            "cancelled before"
        )
    return number


# ---------------------------------------------------------------------------- looking


def pending(
    hup: Mapping[str, Any] | None = None, vhost: str | None = None, timeout: float = 30.0
) -> list[Entry]:
    """Return what waits, in the order in which it is due. Nothing is changed.

    Args:
        hup: Host, user and password; None: from the environment.
        vhost: The virtual host; None: from the environment.
        timeout: Seconds for the broker to answer.

    Raises:
        TransportError: The broker cannot be reached, or refuses.
    """
    connection = connections.acquire(settings_for(hup, vhost), "consume")
    try:
        entries = {each.id: each for each in _announced(connection, timeout)}
        now = _now()
        waiting = [
            each
            for each in entries.values()
            if each.due > now and _waits(connection, each.id, timeout)
        ]
        return sorted(waiting, key=lambda each: (each.due, each.id))
    finally:
        connections.release(connection)


def _announced(connection: Connection, timeout: float) -> Iterator[Entry]:
    for digits in range(1, MOST_DIGITS + 1):
        try:
            with Browser(connection, LEDGER.format(digits=digits), timeout=timeout) as browser:
                yield from filter(None, map(_entry, browser))
        except ChannelClosedError as error:
            if error.code != NOT_FOUND:
                raise


def _entry(browsed: Browsed) -> Entry | None:
    return entry_of(browsed.routing_key, browsed.properties, browsed.body)


def _waits(connection: Connection, id: str, timeout: float) -> bool:
    """Tell whether a message is still in its holding queue: it may have been cancelled."""

    def script(channel: Channel) -> Script[int]:
        queue = HOLDING.format(id=id)
        try:
            answer = yield partial(channel.queue_declare, queue=queue, passive=True)
        except ChannelClosedError as error:
            if error.code == NOT_FOUND:
                return 0
            raise
        return int(answer.method.message_count)

    return bool(connection.ask(script, timeout, f"look for schedule {id}"))
