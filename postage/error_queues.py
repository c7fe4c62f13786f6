# SPDX-License-Identifier: MIT
"""Error queues: look at what was parked, and send it back, on, elsewhere or away.

Whatever leaves an error queue for another queue is published there first, confirmed by the
broker, and only then acknowledged: a kill at any moment loses nothing, and leaves at most the
one message twice that was on its way.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from types import TracebackType
from typing import Any, TextIO

import pika
from pika.channel import Channel

from postage.errors import (
    NOT_FOUND,
    ChannelClosedError,
    ClosedError,
    ConfigurationError,
    ConnectionLostError,
    DecodeError,
    EncodingError,
    NackedError,
    PostageError,
    QueueMismatchError,
    TransportError,
    UnroutableError,
)
from postage.futures import Future
from postage.parking import (
    FRAME_LIMIT,
    LEDGER_NAME,
    Parked,
    original_properties,
    republished_properties,
)
from postage.portable import line_of, message_of
from postage.sending import Report
from postage.settings import settings_for
from postage.topology import DefaultExchange, error_queue
from postage.transport import connection as connections
from postage.transport.browser import Browsed, Browser
from postage.transport.conversation import Script, attempting, declare_queue
from postage.transport.publisher import Publisher, Publishing, encoded_size

#: Where a message goes, and as what.
_Letter = tuple[str, pika.BasicProperties, bytes]
#: Takes a parked message; None: it stays.
_Plan = Callable[[Parked], "_Letter | None"]

#: Seconds that the broker has to answer, and to confirm a message.
TIMEOUT = 30.0

#: What is wrong with one message, so that the next one may fare better.
_REFUSALS = (
    UnroutableError,
    NackedError,
    EncodingError,
    ConfigurationError,
    ChannelClosedError,
)


@dataclass(frozen=True)
class Group:
    """Messages of an error queue that have the same story.

    Attributes:
        queue: The queue that they came from; None: nothing says so.
        reason: As of `Parked`.
        exception: The name of what was raised.
        messages: How many there are.
        first_failure, last_failure: ISO 8601 in UTC.
    """

    queue: str | None
    reason: str | None
    exception: str | None
    messages: int
    first_failure: str | None
    last_failure: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can write."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


class ErrorQueue:
    """The messages of one error queue. A context manager.

    To look at them does not change them. While somebody looks, nobody else sees them, and they
    keep their order, also if it is a quorum queue; see `postage.transport.browser`.

    Attributes:
        timeout: Seconds for the broker to answer, and to confirm a message.
        on_progress: Called with the number of messages that were dealt with, and of all.

    Args:
        name: The queue, such as ``orders.error``.
        hup: Host, user and password; None: from the environment.
        vhost: The virtual host; None: from the environment.
    """

    timeout: float = TIMEOUT

    _closed = True  # for __del__ after a failed __init__

    def __init__(
        self, name: str, hup: Mapping[str, Any] | None = None, vhost: str | None = None
    ) -> None:
        if not name:
            raise ConfigurationError("an error queue needs a name")
        self.name = name
        self.on_progress: Callable[[int, int], None] = _ignore
        self._settings = settings_for(hup, vhost)
        self._connection = connections.acquire(self._settings, "consume")
        self._publisher: Publisher | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<ErrorQueue {self.name} {self._settings}>"

    def __enter__(self) -> ErrorQueue:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed and self._connection.hub.pid == os.getpid():
            warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=2)

    def close(self) -> None:
        """Let the connections go."""
        if self._closed:
            return
        self._closed = True
        if self._publisher is not None:
            self._publisher.close(connections.CLOSE_GRACE)
            connections.release(self._publisher.connection)
        connections.release(self._connection)

    # ------------------------------------------------------------------------ looking

    def count(self) -> int:
        """Return how many messages there are.

        Raises:
            ChannelClosedError: There is no such queue (its `code` is 404).
            TransportError: The broker cannot be reached.
        """

        def script(channel: Channel) -> Script[int]:
            with attempting(f"count queue {self.name!r}"):
                answer = yield partial(channel.queue_declare, queue=self.name, passive=True)
            return int(answer.method.message_count)

        return int(self._ask(script, "count"))

    def __iter__(self) -> Iterator[Parked]:
        return self.messages()

    def messages(self, limit: int | None = None) -> Iterator[Parked]:
        """Yield the messages, in order.

        Args:
            limit: How many at most; all are taken from the broker nevertheless, since that
                keeps their order.

        Raises:
            ChannelClosedError: There is no such queue, or it may not be read.
            TransportError: The broker cannot be reached, or the connection was lost.
        """
        with self._browse() as browser:
            for number, browsed in enumerate(browser):
                if number == limit:
                    return
                yield Parked.of(browsed.properties, browsed.body)
                self.on_progress(number + 1, browser.count)

    def summary(self) -> list[Group]:
        """Return the messages grouped by queue, reason and exception, the largest group first.

        Raises:
            TransportError: As for `messages()`.
        """
        groups: dict[tuple[str | None, str | None, str | None], Group] = {}
        for parked in self.messages():
            key = parked.queue, parked.reason, parked.exception
            groups[key] = _enlarged(groups.get(key) or Group(*key, 0, None, None), parked)
        return sorted(
            groups.values(),
            key=lambda each: (-each.messages, each.queue or "", each.exception or ""),
        )

    def get(self, id: str) -> Parked:
        """Return the first message of this id.

        Raises:
            ConfigurationError: There is none.
            TransportError: As for `messages()`.
        """
        found = [parked for parked in self.messages() if parked.id == id][:1]
        if not found:
            raise self._missing(id)
        return found[0]

    def export(self, file: TextIO, ids: Collection[str] | None = None) -> int:
        """Write messages to a file, one a line (`postage.portable`). They stay in the queue.

        Args:
            file: Open for writing text.
            ids: Which ones; None: all.

        Returns:
            How many there were.

        Raises:
            BatchError: An id is not there. The others were written.
            TransportError: As for `messages()`.
        """
        report = Report()
        wanted = _ids(ids)
        for parked in self.messages():
            if _is_chosen(parked, wanted, None):
                file.write(line_of(parked.properties, parked.body) + "\n")
                report.note(parked.id, None)
        self._note_missing(report, wanted)
        report.check()
        return len(report.confirmed)

    # ------------------------------------------------------------------------- acting

    def retry(
        self,
        ids: Collection[str] | None = None,
        exception: str | None = None,
        queue: str | None = None,
    ) -> int:
        """Send messages back to the queues that they came from, as they were.

        Their message ids are the same. Where one of several handlers failed, only that one
        runs again.

        Args:
            ids: Which ones, or one; None: all that were there at the beginning.
            exception: Only those with this name of what was raised.
            queue: Where they go instead. A foreign message, which does not say where it came
                from, needs it.

        Returns:
            How many went.

        Raises:
            BatchError: Some stayed, or may have gone and stayed; it lists them.
            TransportError: As for `messages()`.
        """

        wanted = _ids(ids)

        def plan(parked: Parked) -> _Letter | None:
            if not _is_chosen(parked, wanted, exception):
                return None
            return self._way_back(parked, queue)

        return self._transfer(plan, wanted)

    def edit(
        self,
        id: str,
        *,
        body: Any = None,
        headers: Mapping[str, Any] | None = None,
        queue: str | None = None,
    ) -> None:
        """Change a message, and send it back to the queue that it came from.

        Args:
            id: Of several with this one, the first is meant.
            body: The new one: bytes, a text, or what JSON can write. None: as it is.
            headers: What to change in them; the value None removes one.
            queue: As for `retry()`.

        Raises:
            EncodingError: The body cannot be written.
            BatchError: The message stayed as it was, or is not there.
            TransportError: As for `messages()`.
        """
        new_body = None if body is None else _encoded(body)
        pending = [id]

        def plan(parked: Parked) -> _Letter | None:
            if parked.id not in pending:
                return None
            pending.clear()
            target, properties, old_body = self._way_back(parked, queue)
            for name, value in (headers or {}).items():
                properties.headers.pop(name, None)
                if value is not None:
                    properties.headers[name] = value
            return target, properties, old_body if new_body is None else new_body

        self._transfer(plan, [id])

    def move(
        self, queue: str, ids: Collection[str] | None = None, exception: str | None = None
    ) -> int:
        """Move messages to another queue, with all that is said about their failures.

        Args:
            queue: It must exist.
            ids: As for `retry()`.
            exception: As for `retry()`.

        Returns:
            How many went.

        Raises:
            BatchError: As for `retry()`.
            TransportError: As for `messages()`.
        """

        wanted = _ids(ids)

        def plan(parked: Parked) -> _Letter | None:
            if not _is_chosen(parked, wanted, exception):
                return None
            return queue, republished_properties(parked.properties), parked.body

        return self._transfer(plan, wanted)

    def import_(self, file: Iterable[str]) -> int:
        """Put the messages of a file that `export()` wrote into this queue, which is declared.

        Args:
            file: Lines.

        Returns:
            How many there were.

        Raises:
            DecodeError: A line makes no sense; it tells which one. Nothing was imported.
            BatchError: Some were not confirmed; it lists them.
            TransportError: The queue cannot be declared, or the broker cannot be reached.
        """
        messages: list[tuple[pika.BasicProperties, bytes]] = []
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    messages.append(message_of(line))
                except DecodeError as error:
                    raise DecodeError(
                        f"line {number}: {error.reason}; nothing was imported"
                    ) from None
        self._declare()
        report = Report()
        has_trouble = False
        for number, (properties, body) in enumerate(messages, 1):
            name = Parked.of(properties, body).id
            if has_trouble:
                report.note_unsent(name)
                continue
            letter = self.name, republished_properties(properties), body
            has_trouble = _is_general(self._deliver(letter, name, report))
            self.on_progress(number, len(messages))
        report.check()
        return len(messages)

    def purge(self) -> int:
        """Throw all messages away, for good. What somebody looks at meanwhile stays.

        Returns:
            How many there were.

        Raises:
            ChannelClosedError: There is no such queue.
            TransportError: The broker cannot be reached. They may be gone.
        """
        asked: list[bool] = []

        def script(channel: Channel) -> Script[int]:
            if asked:  # what has come meanwhile, nobody has seen
                raise ConnectionLostError(f"the connection was lost while {self.name!r} was purged")
            asked.append(True)
            with attempting(f"purge queue {self.name!r}"):
                answer = yield partial(channel.queue_purge, self.name)
            return int(answer.method.message_count)

        return int(self._ask(script, "purge"))

    # ------------------------------------------------------------------------- inside

    def _check(self) -> None:
        if self._closed:
            raise ClosedError(f"the error queue {self.name!r} is used after close()")
        connections.check_fork(self._connection, f"the error queue {self.name!r}")

    def _ask(self, script: Callable[[Channel], Script[Any]], verb: str) -> Any:
        self._check()
        return self._connection.ask(script, self.timeout, f"{verb} queue {self.name!r}")

    def _browse(self) -> Browser:
        self._check()
        return Browser(self._connection, self.name, timeout=self.timeout)

    def _declare(self) -> None:
        def script(channel: Channel) -> Script[str]:
            return (yield from declare_queue(channel, error_queue(self.name)))

        # If there is another one of that name, it will do.
        with contextlib.suppress(QueueMismatchError):
            self._ask(script, "declare")

    def _way_back(self, parked: Parked, queue: str | None) -> _Letter:
        target = queue or parked.queue
        if target is None:
            raise ConfigurationError("nothing says which queue it came from: name one")
        return target, original_properties(parked.properties), parked.body

    def _transfer(self, plan: _Plan, ids: Collection[str] | None) -> int:
        """Publish what the plan makes of the messages, and acknowledge what was confirmed."""
        report = Report()
        try:
            with self._browse() as browser:
                for number, browsed in enumerate(browser, 1):
                    self.on_progress(number, browser.count)
                    parked = Parked.of(browsed.properties, browsed.body)
                    try:
                        letter = plan(parked)
                    except ConfigurationError as error:
                        report.note(parked.id, error)
                        continue
                    if letter is None:
                        continue
                    failure = self._deliver(letter, parked.id, report)
                    if failure is None:
                        browser.ack(browsed)
                    elif _is_general(failure):
                        break
                else:
                    self._note_missing(report, ids)
        except TransportError as error:
            if not report.settled:
                raise
            gone = len(report.confirmed)
            raise ConnectionLostError(f"{error}; before that, {gone} message(s) went") from error
        report.check()
        return len(report.confirmed)

    def _note_missing(self, report: Report, ids: Collection[str] | None) -> None:
        seen = {*report.confirmed, *(name for name, _ in (*report.failed, *report.unknown))}
        for id in ids or ():
            if id not in seen:
                report.note(id, self._missing(id))

    def _missing(self, id: str) -> ConfigurationError:
        return ConfigurationError(f"there is no message {id!r} in {self.name!r}")

    def _deliver(self, letter: _Letter, id: str, report: Report) -> PostageError | None:
        """Publish a message, and note and return what is wrong with that, if anything."""
        failure = None
        try:
            self._publish(*letter)
        except PostageError as error:
            failure = error
        report.note(id, failure)
        return failure

    def _publish(self, queue: str, properties: pika.BasicProperties, body: bytes) -> None:
        """Publish straight to a queue, and wait for the confirm.

        Raises:
            EncodingError: Its headers are too large for a frame, or have no AMQP form.
            PublishError: It did not arrive, or perhaps not.
        """
        _check_size(properties)
        publisher = self._publisher
        if publisher is None:
            # Another connection than that for consuming: an alarm of the broker stops it.
            publisher = Publisher(connections.acquire(self._settings, "publish"))
            self._publisher = publisher
        hub = publisher.hub
        done: Future[None] = Future(hub.wait, hub.nudge)

        def settled(publishing: Publishing) -> None:
            if publishing.error is None:
                done.set(None)
            else:
                done.fail(publishing.error)

        publishing = Publishing(
            DefaultExchange.spec(),
            queue,
            body,
            properties,
            mandatory=True,
            confirm=True,
            deadline=time.monotonic() + self.timeout,
            settled=settled,
            repeatable=False,  # in doubt it stays where it is, and somebody may look
        )
        hub.wait(done.ready, first=lambda: publisher.send([publishing]))
        done.result()


def known_error_queues(
    hup: Mapping[str, Any] | None = None, vhost: str | None = None, *, timeout: float = TIMEOUT
) -> list[str]:
    """Return the names of the error queues that components announced, sorted.

    What was announced more than once is kept once.

    Args:
        hup: As for `ErrorQueue`.
        vhost: As for `ErrorQueue`.
        timeout: Seconds for the broker to answer.

    Raises:
        TransportError: The broker cannot be reached.
    """
    latest: dict[bytes, Browsed] = {}
    try:
        with ErrorQueue(LEDGER_NAME, hup, vhost) as ledger:
            ledger.timeout = timeout
            with ledger._browse() as browser:
                for browsed in browser:
                    former = latest.get(browsed.body)
                    latest[browsed.body] = browsed
                    if former is not None:
                        browser.ack(former)
    except ChannelClosedError as error:
        if error.code != NOT_FOUND:
            raise
    return sorted(name.decode("utf-8", "backslashreplace") for name in latest)


def _ids(ids: Collection[str] | None) -> Collection[str] | None:
    """Return ids without doubles, in order. A single one may be given by itself."""
    return None if ids is None else dict.fromkeys([ids] if isinstance(ids, str) else ids)


def _is_chosen(parked: Parked, ids: Collection[str] | None, exception: str | None) -> bool:
    return (ids is None or parked.id in ids) and exception in (None, parked.exception)


def _enlarged(group: Group, parked: Parked) -> Group:
    firsts = [each for each in (group.first_failure, parked.first_failure) if each]
    lasts = [each for each in (group.last_failure, parked.last_failure) if each]
    return replace(
        group,
        messages=group.messages + 1,
        first_failure=min(firsts, default=None),
        last_failure=max(lasts, default=None),
    )


def _encoded(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    try:
        return (body if isinstance(body, str) else json.dumps(body, allow_nan=False)).encode()
    except (TypeError, ValueError) as error:
        raise EncodingError(f"the body cannot be written: {error}") from None


def _check_size(properties: pika.BasicProperties) -> None:
    try:
        size = encoded_size(properties)
    except Exception as error:  # pika's errors for values that it cannot write have no common base
        raise EncodingError(
            f"the headers cannot be encoded: {type(error).__name__}: {error}"
        ) from None
    if size > FRAME_LIMIT:
        raise EncodingError(f"the headers take {size} bytes, and a frame holds {FRAME_LIMIT}")


def _is_general(error: PostageError | None) -> bool:
    """Tell whether the next message would meet the same error: the broker has trouble."""
    return error is not None and not isinstance(error, _REFUSALS)


def _ignore(_done: int, _all: int) -> None:
    """Show no progress."""
