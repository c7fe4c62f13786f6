# SPDX-License-Identifier: MIT
"""Browsing: a look at all that a queue holds, after which what was not acknowledged is back.

AMQP 0-9-1 has no way to read a message without taking it. So a `Browser` consumes the queue on
a channel of its own, keeps what it does not acknowledge, and gives it back by closing the channel.

What that does to the order: a classic queue puts each message back to its place. A quorum queue
delivers what comes back from a closed channel before all that was never delivered, in the order
in which it came back. So the order is kept if all of it was taken, and else not: a look at the
first ten of a hundred that were looked at before leaves them behind the other ninety. Therefore
a browser always takes all, in pages, each by a consumer of its own. RabbitMQ gives back what the
consumers of a channel hold in the order of their tags, as long as there are at most 32: it keeps
them in a map of Erlang, which is sorted up to there (measured with RabbitMQ 3.10.8).
"""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

import pika
from pika.channel import Channel

from postage.errors import ConnectionFailedError, ConnectionLostError, TransportError
from postage.transport.connection import Connection
from postage.transport.conversation import Script, attempting

logger = logging.getLogger(__name__)

#: Messages of a page, which wait here at a time. RabbitMQ gives a consumer of a quorum queue never
#: more than this without a prefetch (`basic.qos` 0), so it copes with them.
PAGE = 2000
#: Pages, so that the order is kept: they are larger where there are many messages.
PAGES = 32
#: The largest prefetch that AMQP can write.
LARGEST_PAGE = 65_535
#: Seconds without a message after which the queue is asked whether there are any left: another
#: consumer may have taken them.
QUIET = 1.0
#: Seconds that a queue is given to count again what came back. A quorum queue hears of a closed
#: channel a moment after the channel is closed.
SETTLING = 5.0


class Browsed:
    """A message as it lies in the queue."""

    __slots__ = ("body", "exchange", "properties", "routing_key", "tag")

    def __init__(self, method: Any, properties: pika.BasicProperties, body: bytes) -> None:
        self.tag: int = method.delivery_tag
        self.exchange: str = method.exchange
        self.routing_key: str = method.routing_key
        self.properties = properties
        self.body = body


class Browser:
    """Looks at what a queue holds when it begins. A context manager and an iterator, for one use.

    Only what `ack()` is called for leaves the queue.

    Args:
        connection: One for consuming; it is connected if need be.
        queue: The name.
        timeout: Seconds that the broker has for an answer, and for a message that is there.
        page: How many messages one consumer may hold; more, if that would be too many pages.
    """

    def __init__(
        self, connection: Connection, queue: str, *, timeout: float, page: int = PAGE
    ) -> None:
        self.queue = queue
        #: How many messages there were at the beginning. No more than these are looked at, so
        #: that what comes back while they are dealt with is left for the next time.
        self.count = 0
        self._connection = connection
        self._hub = connection.hub
        self._timeout = timeout
        self._page = page
        self._channel: Channel | None = None
        self._inbox: collections.deque[Browsed] = collections.deque()
        self._pages = 0
        self._taken = 0
        self._acked = 0
        self._began = False
        self._over = False
        self._failure: TransportError | None = None
        self._finish: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<Browser of {self.queue!r} [{self._taken} of {self.count}]>"

    def __enter__(self) -> Browser:
        """Begin.

        Raises:
            ChannelClosedError: There is no such queue, or it may not be read.
            ConnectionFailedError: There was no broker in time, or it refused the login.
        """

        def begin() -> None:
            self._connection.probe(self._script, self._ended, self._timeout)

        if not self._hub.wait(lambda: self._began or self._over, self._timeout, first=begin):
            self._failure = ConnectionFailedError(
                f"read queue {self.queue!r}: {self._connection.settings} did not answer within "
                f"{self._timeout:g} s{self._connection.trouble()}"
            )
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Take the rest, which keeps the order, and give back what was not acknowledged."""
        if kind is None or kind is GeneratorExit:
            with contextlib.suppress(TransportError):
                collections.deque(self, maxlen=0)
        held = self._taken - self._acked + len(self._inbox)
        self._hub.wait(lambda: self._over, SETTLING, first=self._leave)
        deadline = time.monotonic() + SETTLING
        with contextlib.suppress(TransportError):
            while held and self._connection.is_open and self._ready() < held:
                if time.monotonic() > deadline:
                    break  # somebody else consumes it
                self._hub.wait(lambda: False, 0.01)

    def __iter__(self) -> Iterator[Browsed]:
        """Yield the messages.

        Raises:
            TransportError: The connection was lost, or the queue stopped delivering. What was
                not acknowledged is in the queue again.
        """
        quiet_since = time.monotonic()
        while self._taken < self.count:
            if self._inbox:
                browsed = self._inbox.popleft()
                self._taken += 1
                yield browsed
                quiet_since = time.monotonic()
                continue
            if self._hub.wait(self._has_news, QUIET, first=self._turn_page):
                if self._failure is not None and not self._inbox:
                    raise self._failure
            elif not self._ready():
                return  # others took the rest
            elif time.monotonic() - quiet_since > self._timeout:
                raise ConnectionLostError(
                    f"queue {self.queue!r} delivers nothing for {self._timeout:g} s, though it "
                    "has messages; another consumer may have it for itself"
                )

    def ack(self, browsed: Browsed) -> None:
        """Let a message leave the queue, and wait until the broker has heard that.

        An acknowledgement has no answer. But a channel works in order, so the answer to what
        is asked behind it says that it was heard.

        Raises:
            TransportError: The connection was lost: the message may be there still.
        """
        heard: list[Any] = []

        def ask() -> None:
            channel = self._channel
            if channel is not None and channel.is_open:
                channel.basic_ack(browsed.tag)
                channel.basic_qos(
                    prefetch_count=self._page, callback=self._hub.shielded(heard.append)
                )

        if not self._hub.wait(lambda: bool(heard) or self._over, self._timeout, first=ask):
            raise ConnectionLostError(f"queue {self.queue!r}: no answer in {self._timeout:g} s")
        if not heard:
            raise self._failure or ConnectionLostError("closed")
        self._acked += 1

    # ------------------------------------------------------------------- the leader

    def _script(self, channel: Channel) -> Script[None]:
        attempt = f"read queue {self.queue!r}"
        with attempting(attempt):
            answer = yield partial(channel.queue_declare, queue=self.queue, passive=True)
        if self._failure is not None:
            return  # nobody waits for it any more
        self.count = answer.method.message_count
        self._page = min(max(self._page, -(-self.count // PAGES)), LARGEST_PAGE)
        channel.add_on_cancel_callback(self._hub.shielded(self._cancelled))
        self._channel = channel
        self._began = True
        try:
            with attempting(attempt):
                yield self._stay
        except TransportError as error:  # no answer, or the connection would ask once more
            self._failure = self._failure or error

    def _stay(self, callback: Callable[[], None]) -> None:
        """Be the request that is answered when there is nothing more to do."""
        self._finish = callback

    def _leave(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()  # the question is over, and closes its channel

    def _ended(self, _result: Any, error: TransportError | None) -> None:
        self._over = True
        self._channel = None
        if self._failure is None:
            self._failure = error

    def _cancelled(self, _frame: Any) -> None:
        """Hear that the broker cancelled a consumer: the queue was deleted, or moved."""
        self._failure = ConnectionLostError(f"queue {self.queue!r} was deleted while it was read")

    def _turn_page(self) -> None:
        """Consume once more, if the consumers so far hold as much as they may."""
        channel = self._channel
        held = self._taken - self._acked
        if self._inbox or channel is None or not channel.is_open or held < self._pages * self._page:
            return
        self._pages += 1
        channel.basic_qos(prefetch_count=self._page)
        channel.basic_consume(
            self.queue,
            self._hub.shielded(self._deliver),
            consumer_tag=f"postage-browser-{self._pages:06}",
        )

    def _deliver(self, _channel: Channel, method: Any, properties: Any, body: bytes) -> None:
        self._inbox.append(Browsed(method, properties, body))

    # -------------------------------------------------------------------- our thread

    def _has_news(self) -> bool:
        return bool(self._inbox) or self._failure is not None or self._over

    def _ready(self) -> int:
        """Return how many messages wait in the queue."""

        def script(channel: Channel) -> Script[int]:
            answer = yield partial(channel.queue_declare, queue=self.queue, passive=True)
            return int(answer.method.message_count)

        return int(self._connection.ask(script, self._timeout, f"count queue {self.queue!r}"))
