# SPDX-License-Identifier: MIT
"""Where the replies to RPC calls arrive.

A `ReplyStream` is the direct way: replies come to the publishing channel itself, and a
correlation id tells whose they are. Any number of calls can be in flight.

A `ReplyQueue` is the way of 1.2.1: an exclusive queue for one call. It is for peers that
send no correlation id back, and for calls whose replies are collected later.

Everything here is called by the leader of the hub, except where it says so.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import pika
from pika import exceptions as pika_errors
from pika.channel import Channel

from postage.errors import ConnectionLostError, TransportError
from postage.transport.connection import Connection
from postage.transport.conversation import Script, converse, translated
from postage.transport.hub import Hub

logger = logging.getLogger(__name__)


class Caller(Protocol):
    """A call that waits for its reply."""

    #: When it wants to be rung, on the monotonic clock.
    due: float

    def ring(self, now: float) -> None:
        """It is time. Sets `due` anew, or removes itself."""

    def replied(self, body: bytes) -> None:
        """The reply came."""

    def deafened(self) -> None:
        """The reply to what was sent so far cannot come any more."""


class ReplyStream:
    """The callers that wait on one publishing channel, by correlation id.

    Nearly all calls end before their time is up. So there is one alarm for all of them: a call
    neither sets a timer nor cancels it.
    """

    def __init__(self) -> None:
        self._callers: dict[str, Caller] = {}
        self._alarm: object | None = None
        self._alarm_at = 0.0

    def __repr__(self) -> str:
        return f"<ReplyStream [{len(self._callers)} pending]>"

    def __len__(self) -> int:
        return len(self._callers)

    def add(self, correlation_id: str, caller: Caller) -> None:
        """Let a caller hear the reply that carries this id."""
        self._callers[correlation_id] = caller

    def remove(self, correlation_id: str) -> None:
        """Let it hear nothing more."""
        self._callers.pop(correlation_id, None)

    def remind(self, hub: Hub, due: float) -> None:
        """Ring the callers that are due then."""
        if self._alarm is not None:
            if self._alarm_at <= due:
                return
            hub.cancel(self._alarm)
        self._alarm_at = due
        self._alarm = hub.call_later(due - time.monotonic(), partial(self._ring, hub))

    def _ring(self, hub: Hub) -> None:
        self._alarm = None
        now = time.monotonic()
        for caller in [each for each in self._callers.values() if each.due <= now]:
            caller.ring(now)
        if self._callers:
            self.remind(hub, min(each.due for each in self._callers.values()))

    def heard(self, properties: pika.BasicProperties, body: bytes) -> None:
        """Hand a reply to its caller. One that nobody waits for any more is dropped."""
        if properties.correlation_id is None:
            logger.warning(
                "dropped a reply without a correlation id: the service runs Postage 1.2.1; "
                "set POSTAGE_COMPAT=1.2 to call it"
            )
            return
        caller = self._callers.get(properties.correlation_id)
        if caller is None:
            logger.debug("dropped a late or repeated reply: %s", properties.correlation_id)
        else:
            caller.replied(body)

    def deafened(self) -> None:
        """Tell every caller that the channel is gone, and with it its address."""
        for caller in tuple(self._callers.values()):
            caller.deafened()


class ReplyQueue:
    """An exclusive, server-named queue on a channel of its own.

    Args:
        connection: Where the requests are published: the queue goes with it.
        opened: Called when it is consumed, with its name.
        lost: Called if it goes away before `close()`.
    """

    def __init__(
        self,
        connection: Connection,
        opened: Callable[[str], None],
        lost: Callable[[TransportError], None],
    ) -> None:
        self.name = ""
        self.replies: collections.deque[bytes] = collections.deque()
        #: Called with each reply, after it was added to `replies`.
        self.on_reply: Callable[[bytes], None] = lambda body: None
        self.error: TransportError | None = None
        self._shielded = connection.hub.shielded
        self._opened_callback = opened
        self._lost = lost
        amqp = connection.amqp
        if amqp is None or not connection.is_open:
            raise ConnectionLostError("no connection for a reply queue")
        try:
            self._channel: Channel = amqp.channel(
                on_open_callback=self._shielded(self._channel_opened)
            )
        except pika_errors.NoFreeChannels as error:
            raise translated(error) from None
        self._channel.add_on_close_callback(self._shielded(self._closed))

    def close(self) -> None:
        """Let the broker delete the queue."""
        self._opened_callback = _ignore
        self._lost = _ignore
        if not (self._channel.is_closing or self._channel.is_closed):  # perhaps it opens yet
            self._channel.close()

    def _channel_opened(self, channel: Channel) -> None:
        converse(channel, self._script(channel), self._consumed, self._shielded)

    def _script(self, channel: Channel) -> Script[str]:
        answer = yield partial(channel.queue_declare, queue="", exclusive=True, auto_delete=True)
        self.name = answer.method.queue
        yield partial(
            channel.basic_consume,
            queue=self.name,
            on_message_callback=self._shielded(self._delivered),
            auto_ack=True,
        )
        return self.name

    def _consumed(self, name: Any, error: TransportError | None) -> None:
        if error is None:
            self._opened_callback(name)
        # else: the close of the channel reports it

    def _delivered(self, _channel: Channel, _method: Any, _properties: Any, body: bytes) -> None:
        self.replies.append(body)
        self.on_reply(body)

    def _closed(self, _channel: Channel, reason: Exception) -> None:
        self.error = translated(reason)
        self._lost(self.error)


def _ignore(_value: object) -> None:
    """Hear something when nobody wants to know it any more."""
