# SPDX-License-Identifier: MIT
"""The caller's end of an RPC call. The service's end is `postage.answering`.

A `Caller` sends a request and sees to it that the call ends, with a reply or with a falsy
result that says why there is none:

| what happens                                    | result                              |
|-------------------------------------------------|-------------------------------------|
| the reply comes                                 | what the service sent               |
| no queue is bound to the key                    | `UnroutableError`, at once          |
| the queue is there, and nobody consumes it      | `NoConsumer`, after two looks       |
| no reply within the timeout, after all retries  | `TimeoutError`                      |
| no connection, or an alarm of the broker        | the error's name, at the timeout    |
| the reply cannot be read                        | an error that says so               |
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

from pika.channel import Channel

from postage.encoders import Encoder
from postage.errors import (
    BrokerBlockedError,
    ChannelClosedError,
    ConnectionLostError,
    PostageError,
    PublishTimeoutError,
    TransportError,
    UnroutableError,
)
from postage.futures import Future
from postage.messages import (
    Message,
    MessageResultError,
    MessageResultException,
    message_from_reply,
    new_message_id,
)
from postage.topology import ExchangeSpec
from postage.transport.publisher import (
    DIRECT_REPLY_TO,
    Fate,
    Publisher,
    Publishing,
    encoded_ahead,
)
from postage.transport.replies import ReplyQueue, ReplyStream

logger = logging.getLogger(__name__)

#: Seconds without a reply after which a call looks whether anybody consumes its queue,
#: and between that look and the second one. A service that restarts is back by then.
LOOK_AFTER = 1.0
#: Looks that have to find nobody.
LOOKS = 2
#: Header that tells a service how many milliseconds its caller waits. A duration, not a
#: time of day: clocks of two hosts differ, and no call may be skipped for that.
TIMEOUT_HEADER = "postage-timeout"
#: What a publishing that is late says. It does not know of the earlier ones of its call.
_UNSENT = (PublishTimeoutError, BrokerBlockedError)
#: Largest number that fits the 32 bits which every AMQP library reads alike.
_INT_MAX = 2**31 - 1


@dataclass(slots=True)
class Request:
    """What a call sends, each time it sends it.

    ``properties`` are those of `pika.BasicProperties` without the ones that belong to the
    call (correlation_id, reply_to, expiration). They are encoded fastest in their order, with
    None where those go. ``queue`` is the single queue that the key leads to, where that is
    known. ``timeout`` is for each attempt, in seconds.
    """

    exchange: ExchangeSpec
    key: str
    body: bytes
    properties: dict[str, Any]
    timeout: float
    max_retry: int
    mandatory: bool = True
    queue: str | None = None


class Reply(Future[Message]):
    """The result of a call. What arrived is decoded by whoever asks for it first."""

    __slots__ = ("_decode",)

    def __init__(self, wait: Any, wake: Callable[[], None], decode: Callable[[bytes], Any]) -> None:
        super().__init__(wait, wake)
        self._decode = decode

    def result(self, timeout: float | None = None) -> Message:
        """Wait for the result: a message, falsy if it is no success.

        Args:
            timeout: Seconds, or None until the call itself ends, which it does.

        Raises:
            TimeoutError: This timeout ended before the call did; the call goes on.
            PostageError: A coroutine is running in this thread; it must await instead.
        """
        value: Any = super().result(timeout)
        if isinstance(value, bytes):
            self._value = value = decoded_reply(value, self._decode)
        assert isinstance(value, Message)
        return value


def decoded_reply(body: bytes, decode: Callable[[bytes], Any]) -> Message:
    """Return the result message of a reply's body. Never raises for what a peer sent."""
    logger.debug("< %s", body)
    try:
        return message_from_reply(decode(body))
    except Exception as error:  # of an encoder that knows no DecodeError, too
        return MessageResultError(f"Malformed reply: {error}")


class Caller:
    """One call, from its first request to its result. All methods are for the leader.

    Args:
        publisher: Sends the requests, and listens with `stream`.
        stream: Where direct replies arrive.
        request: What to send.
        reply: Gets the result.
        compat: Use a reply queue of its own for each attempt, as 1.2.1 did: its services
            send no correlation id.
    """

    __slots__ = (
        "_attempts",
        "_compat",
        "_expires",
        "_id",
        "_is_sent",
        "_look_at",
        "_looks",
        "_publisher",
        "_publishing",
        "_queue",
        "_reply",
        "_reply_to",
        "_request",
        "_stream",
        "due",
    )

    def __init__(
        self,
        publisher: Publisher,
        stream: ReplyStream,
        request: Request,
        reply: Reply,
        compat: bool = False,
    ) -> None:
        self._publisher = publisher
        self._stream = stream
        self._request = request
        self._reply = reply
        self._compat = compat
        self._id = new_message_id()
        self._attempts = 0
        self._is_sent = False  # perhaps: it was written once
        self._looks = 0
        self._publishing: Publishing | None = None
        self._queue: ReplyQueue | None = None
        self._reply_to = ""  # its name, from the moment that it is consumed
        self._expires = self._look_at = math.inf
        self.due = math.inf

    def start(self) -> None:
        """Send the first request."""
        self._stream.add(self._id, self)
        self._attempt()

    def ring(self, now: float) -> None:
        """Look whether anybody is there, or give the attempt up: it is time."""
        if self._expires <= now:
            self._time_out()
        else:
            self._look_at = math.inf
            self._remind()
            self._look()

    def replied(self, body: bytes) -> None:
        """Hear the reply."""
        self._finish(body)

    def deafened(self) -> None:
        """Send a request again that was taken: its reply address is gone.

        One that was not taken yet is published again by the publisher.
        """
        if self._publishing is not None and self._publishing.fate is not None:
            self._is_sent = True
            self._publish_again(DIRECT_REPLY_TO)

    # ----------------------------------------------------------------------- inside

    def _attempt(self) -> None:
        self._attempts += 1
        now = time.monotonic()
        self._expires = now + self._request.timeout
        if self._request.queue is not None:
            self._looks = 0
            self._look_at = now + LOOK_AFTER
        self._remind()
        if self._compat:
            self._publisher.connection.probe(_wait_for_connection, self._open_queue)
        else:
            self._publish(DIRECT_REPLY_TO)

    def _open_queue(self, _result: Any, error: TransportError | None) -> None:
        if self._reply.ready():
            return

        def opened(name: str) -> None:
            if queue is self._queue:
                self._reply_to = name
                publish = self._publish_again if self._is_sent else self._publish
                publish(name)
            else:  # the call, or this attempt, ended before
                queue.close()

        def lost(trouble: TransportError) -> None:
            if queue is self._queue:
                self._lose_queue(trouble)

        try:
            if error is not None:
                raise error
            self._close_queue()
            queue = ReplyQueue(self._publisher.connection, opened=opened, lost=lost)
            queue.on_reply = self.replied
            self._queue = queue
        except ConnectionLostError:  # on to the next connection
            self._publisher.connection.probe(_wait_for_connection, self._open_queue)
        except TransportError as refusal:
            self._fail(refusal)

    def _publish_again(self, reply_to: str) -> None:
        """Repeat a request whose reply cannot come any more, if it may be repeated."""
        if self._request.max_retry:
            self._publish(reply_to)
        else:
            self._fail(
                ConnectionLostError(
                    "the connection was lost after the request was sent, and the reply with it; "
                    "the service may have done it. It is not sent again with max_retry = 0"
                )
            )

    def _lose_queue(self, error: TransportError) -> None:
        if isinstance(error, ConnectionLostError):
            self._publisher.connection.probe(_wait_for_connection, self._open_queue)
        else:
            self._fail(error)

    def _publish(self, reply_to: str) -> None:
        request = self._request
        milliseconds = min(round(request.timeout * 1000), _INT_MAX)
        properties = {
            **request.properties,
            "headers": {**(request.properties.get("headers") or {}), TIMEOUT_HEADER: milliseconds},
            "correlation_id": self._id,
            "reply_to": reply_to,
            "expiration": str(milliseconds),  # nobody waits for the reply after that
        }
        self._publishing = Publishing(
            request.exchange,
            request.key,
            request.body,
            encoded_ahead(properties),
            mandatory=request.mandatory,
            confirm=True,
            deadline=time.monotonic() + request.timeout,
            settled=self._settled,
            wants_reply=reply_to == DIRECT_REPLY_TO,
            repeatable=request.max_retry > 0,
            message_id=properties.get("message_id"),
        )
        self._publisher.send([self._publishing])

    def _settled(self, publishing: Publishing) -> None:
        cause = None if publishing.error is None else publishing.error.__cause__
        if isinstance(cause, UnroutableError) and publishing is self._publishing:
            self._fail(cause)  # the reply to a former copy went with its channel
        elif publishing.fate in (Fate.CONFIRMED, Fate.UNKNOWN):
            self._is_sent = True  # then the reply decides
        elif self._is_sent and isinstance(publishing.error, _UNSENT):
            pass  # true of this one; the time-out says what is true of the call
        elif publishing is self._publishing and publishing.error is not None:
            self._fail(publishing.error)

    def _look(self) -> None:
        """Ask whether anybody consumes the queue: a durable one outlives its service."""
        queue = self._request.queue or ""

        def script(channel: Channel) -> Generator[Any, Any, int]:
            answer = yield partial(channel.queue_declare, queue=queue, passive=True)
            return int(answer.method.consumer_count)

        self._publisher.connection.probe(script, self._looked, self._request.timeout)

    def _looked(self, consumers: Any, error: TransportError | None) -> None:
        if self._reply.ready() or consumers:
            return
        if isinstance(error, ChannelClosedError):
            return  # it is somebody's own (405), or is not the one that the request went to (404)
        if error is not None:
            self._look_later()
            return
        self._looks += 1
        if self._looks < LOOKS:
            self._look_later()
            return
        self._finish(
            MessageResultException(
                "NoConsumer",
                f"queue {self._request.queue!r} exists and nobody consumes it: start the service",
            )
        )

    def _look_later(self) -> None:
        self._look_at = time.monotonic() + LOOK_AFTER
        self._remind()

    def _remind(self) -> None:
        self.due = min(self._expires, self._look_at)
        self._stream.remind(self._publisher.hub, self.due)

    def _time_out(self) -> None:
        self._expires = self._look_at = self.due = math.inf
        publishing = self._publishing
        is_held = publishing is None or self._publisher.withdraw(publishing)
        self._is_sent |= publishing is not None and publishing.in_doubt
        if is_held and not self._is_sent:
            self._fail(self._unsent(publishing))
        elif self._attempts > self._request.max_retry:
            tries = f"{self._attempts} times {self._request.timeout:g} s"
            self._finish(
                MessageResultException(
                    "TimeoutError",
                    f"no reply from exchange {self._request.exchange.name!r} "
                    f"key {self._request.key!r} within {tries}",
                )
            )
        else:
            self._attempt()

    def _unsent(self, publishing: Publishing | None) -> PostageError:
        if publishing is not None:
            return self._publisher.unsent(publishing)
        connection = self._publisher.connection
        return PublishTimeoutError(
            f"call exchange {self._request.exchange.name!r} key {self._request.key!r}: certainly "
            f"not sent, no reply queue on {connection.settings} in time{connection.trouble()}"
        )

    def _fail(self, error: PostageError) -> None:
        # The advice to messages, that nobody need listen, is none to a call.
        text = f"{error.fact}: start the service" if isinstance(error, UnroutableError) else error
        self._finish(MessageResultException(type(error).__name__, str(text)))

    def _finish(self, result: bytes | Message) -> None:
        self._stream.remove(self._id)
        self._close_queue()
        future: Future[Any] = self._reply
        future.set(result)

    def _close_queue(self) -> None:
        # RabbitMQ deletes it with its consumer. Without one yet, it would stay.
        if self._queue is not None and self._reply_to:
            self._queue.close()
        self._queue = None
        self._reply_to = ""


def _wait_for_connection(_channel: Channel) -> Generator[Any, Any, None]:
    """Ask nothing: the answer comes as soon as there is a connection."""
    return
    yield


class ReplyCollector:
    """A reply queue that is read by the caller's own thread (`rpc_queue_x`, `consume_rpc`).

    Args:
        publisher: Whose connection it lives on.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._name: Future[str] = Future(publisher.hub.wait)
        self._queue: ReplyQueue | None = None
        self._closed = False

    def open(self, timeout: float) -> str:
        """Open the queue and return its name.

        Raises:
            TransportError: It could not be opened in time.
        """
        connection = self._publisher.connection

        def named(name: str) -> None:
            self._name.set(name)
            if self._closed and self._queue is not None:  # before it was open
                self._queue.close()

        def opened(_result: Any, error: TransportError | None) -> None:
            try:
                if error is not None:
                    raise error
                if not self._closed:
                    self._queue = ReplyQueue(connection, named, self._name.fail)
            except TransportError as trouble:
                self._name.fail(trouble)

        def first() -> None:
            connection.probe(_wait_for_connection, opened, timeout)

        if not self._publisher.hub.wait(self._name.ready, timeout, first):
            raise PublishTimeoutError(
                f"no reply queue on {connection.settings} within {timeout:g} s"
                f"{connection.trouble()}: nothing was sent"
            )
        return self._name.result(0)

    def collect(self, count: int, timeout: float) -> list[bytes]:
        """Return `count` replies, or fewer if the time is over, or the queue gone, before."""
        queue = self._queue
        assert queue is not None
        self._publisher.hub.wait(
            lambda: len(queue.replies) >= count or queue.error is not None, timeout
        )
        return [queue.replies.popleft() for _ in range(min(count, len(queue.replies)))]

    @property
    def error(self) -> TransportError | None:
        """Why the queue is gone, with what was in it, or None."""
        return self._queue.error if self._queue is not None else None

    def close(self) -> None:
        """Let the broker delete the queue."""
        self._closed = True
        if self._queue is not None and self._name.ready():  # else when it is consumed
            self._publisher.hub.call(self._queue.close)


def encoded(encoder: Encoder, body: Any) -> bytes:
    """Return the bytes that the body of a message travels as.

    Raises:
        EncodingError: It holds something that the encoder cannot write.
    """
    text = encoder.encode(body)
    return text if isinstance(text, bytes) else text.encode("utf-8")
