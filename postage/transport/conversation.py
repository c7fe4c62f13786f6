# SPDX-License-Identifier: MIT
"""Conversations: generators that talk to the broker over one channel, step by step.

AMQP's declarations are questions with answers, pika's callbacks scatter them. A script
puts them in order again: it yields one request at a time and is resumed with the answer,
or with an error if the broker closes the channel over it::

    def script(channel):
        reply = yield partial(channel.queue_declare, queue="orders", passive=True)
        return reply.method.consumer_count

Everything here runs in the loop. pika's exceptions become ours here and nowhere else.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

from pika import exceptions as pika_errors
from pika.channel import Channel

from postage.errors import (
    ACCESS_REFUSED,
    NOT_FOUND,
    PRECONDITION_FAILED,
    RESOURCE_LOCKED,
    ChannelClosedError,
    ClosedError,
    ConnectionLostError,
    ExchangeMismatchError,
    QueueMismatchError,
    TransportError,
)
from postage.topology import Binding, ExchangeSpec, QueueSpec

T = TypeVar("T")

#: A request of a script: a pika method that takes a `callback` for the answer.
Request = Callable[..., Any]
Script = Generator[Request, Any, T]
#: Takes the script's result and None, or None and the error.
Done = Callable[[Any, "TransportError | None"], None]


class Scripted(Protocol):
    """A value that is declared by a script of its own, such as a binding."""

    @property
    def lasts_seconds(self) -> float:
        """How long it is taken for granted that it is there."""

    def script(self, channel: Channel) -> Script[Any]:
        """Declare it."""


Declarable = ExchangeSpec | QueueSpec | Scripted


class Detour(Protocol):
    """Where a message goes that does not go straight to its exchange. Hashable."""

    @property
    def lasts_seconds(self) -> float:
        """How long it is taken for granted that it is there."""

    def parts(self) -> Iterable[Declarable]:
        """Return what it consists of, in the order in which it is declared."""


#: What has to be there before a message is published.
Preparation = ExchangeSpec | Detour


def translated(error: BaseException | None) -> TransportError:
    """Return the postage error that says what an error of pika says."""
    if isinstance(error, TransportError):
        return error
    if isinstance(error, pika_errors.ChannelClosedByBroker):
        return ChannelClosedError(error.reply_code, error.reply_text)
    if isinstance(error, pika_errors.ConnectionClosedByBroker):
        return ConnectionLostError(
            f"the broker closed the connection: {error.reply_code} {error.reply_text}",
            error.reply_code,
        )
    if isinstance(error, (pika_errors.ChannelClosedByClient, pika_errors.ConnectionClosedByClient)):
        return ClosedError("closed by this program")
    return ConnectionLostError(f"the connection was lost{_reason(error)}")


#: What pika says when nothing came from the broker for two heartbeats.
_SILENCE = re.compile(r"in the last (\d+) seconds")
#: What pika makes of an error of the socket.
_CUT = re.compile(r"Stream connection lost: \w+\((?:\d+, )?(['\"])(.*)\1\)$", re.DOTALL)


def _reason(error: BaseException | None) -> str:
    """Say for people why a connection went, as the end of a sentence."""
    if error is None:
        return ""
    text = str(error)
    if isinstance(error, pika_errors.AMQPHeartbeatTimeout) and (match := _SILENCE.search(text)):
        return f": no heartbeat from the broker for {match[1]} s"
    if isinstance(error, pika_errors.StreamLostError):
        if match := _CUT.match(text):
            return f": {match[2]}"
        if "EOF" in text:
            return ": the other side ended it without a word"
    return f": {type(error).__name__}: {text}"


def _unsent(error: Exception) -> TransportError:
    """Return the error of a request that was not sent, or of a script that could make none.

    If it is not for the channel, it is a mistake, such as an argument that cannot be encoded.
    No new connection would mend that.
    """
    if isinstance(error, (pika_errors.AMQPConnectionError, pika_errors.AMQPChannelError)):
        return translated(error)
    mistake = TransportError(f"the broker cannot be asked: {type(error).__name__}: {error}")
    mistake.__cause__ = error
    return mistake


class _Conversation:
    def __init__(self, channel: Channel, script: Script[Any], done: Done, shielded: Any) -> None:
        self._script = script
        self._done: Done | None = done
        self._shielded = shielded
        channel.add_on_close_callback(shielded(self._hear_close))
        self._advance(partial(next, script))

    def _hear(self, answer: Any = None) -> None:
        if self._done is not None:
            self._advance(partial(self._script.send, answer))

    def _hear_close(self, _channel: Channel, reason: Exception) -> None:
        if self._done is not None:
            self._advance(partial(self._script.throw, translated(reason)))

    def _advance(self, step: Callable[[], Request]) -> None:
        while True:
            try:
                request = step()
            except StopIteration as end:
                self._finish(end.value, None)
                return
            except TransportError as error:
                return self._finish(None, error)
            except Exception as error:
                return self._finish(None, _unsent(error))
            try:
                request(callback=self._shielded(self._hear))
                return None
            except Exception as error:  # such as: the channel is closed already
                step = partial(self._script.throw, _unsent(error))

    def _finish(self, result: Any, error: TransportError | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(result, error)


def converse(channel: Channel, script: Script[Any], done: Done, shielded: Any) -> None:
    """Run a script on an open channel and report its result or its error.

    Args:
        channel: Where the script's requests go; it stays open.
        script: The generator, not yet started.
        done: Called once.
        shielded: Wraps the callbacks that pika is given (`Hub.shielded`).
    """
    _Conversation(channel, script, done, shielded)


# ------------------------------------------------------------------ what scripts share


@contextlib.contextmanager
def attempting(attempt: str, advice: str = "") -> Iterator[None]:
    """Say in a refusal of the broker what was attempted and what to do about it."""
    try:
        yield
    except ChannelClosedError as error:
        if error.attempt:
            raise
        raise type(error)(error.code, error.text, attempt, advice) from None
    except ConnectionLostError as error:
        if error.attempt or not error.is_hard:
            raise
        raise ConnectionLostError(error.reason, error.code, attempt) from None


def declare(channel: Channel, what: Declarable) -> Script[Any]:
    """Return the script that declares an exchange, a queue, or what has a script of its own."""
    if isinstance(what, ExchangeSpec):
        return declare_exchange(channel, what)
    if isinstance(what, QueueSpec):
        return declare_queue(channel, what)
    return what.script(channel)


def declare_exchange(channel: Channel, spec: ExchangeSpec) -> Script[None]:
    """Declare an exchange.

    Raises:
        ExchangeMismatchError: It exists with another type or other arguments.
        ChannelClosedError: The broker refuses it otherwise.
        ConnectionLostError: The connection went, perhaps over this (`is_hard`).
    """
    if spec.is_default:
        return  # it exists, and must not be declared (403)
    attempt = f"declare exchange {spec.name!r} ({_asked_for(spec)})"
    try:
        with attempting(attempt):
            yield partial(
                channel.exchange_declare,
                exchange=spec.name,
                exchange_type=spec.type,
                passive=spec.passive,
                durable=spec.durable,
                auto_delete=spec.auto_delete,
                internal=spec.internal,
                arguments=dict(spec.arguments),
            )
    except ChannelClosedError as error:
        if not _is_mismatch(error):
            raise
        raise ExchangeMismatchError(
            error.code,
            error.text,
            attempt,
            "Declare it as it is, delete it, or set POSTAGE_ON_MISMATCH=adopt to use it as it is",
        ) from None


def declare_queue(channel: Channel, spec: QueueSpec) -> Script[str]:
    """Declare a queue.

    Returns:
        Its name, which is the broker's choice if it has none.

    Raises:
        QueueMismatchError: It exists with other arguments.
        ChannelClosedError: The broker refuses it otherwise.
        ConnectionLostError: The connection went, perhaps over this (`is_hard`).
    """
    attempt = f"declare queue {spec.name!r} ({_asked_for(spec)})"
    try:
        with attempting(attempt):
            answer = yield partial(
                channel.queue_declare,
                queue=spec.name,
                passive=spec.passive,
                durable=spec.durable,
                exclusive=spec.exclusive,
                auto_delete=spec.auto_delete,
                arguments=dict(spec.arguments),
            )
    except ChannelClosedError as error:
        refusal = QueueMismatchError if _is_mismatch(error) else ChannelClosedError
        raise refusal(error.code, error.text, attempt, _advice(error)) from None
    return str(answer.method.queue)


def bind_queue(channel: Channel, binding: Binding, queue: str) -> Script[None]:
    """Bind a queue, of the given real name, to an exchange."""
    if binding.exchange.is_default:
        return  # every queue is bound to it by its name, and it refuses other bindings (403)
    with attempting(f"bind queue {queue!r} to {binding.exchange.name!r} with key {binding.key!r}"):
        yield partial(
            channel.queue_bind, queue=queue, exchange=binding.exchange.name, routing_key=binding.key
        )


def unbind_queue(channel: Channel, binding: Binding, queue: str) -> Script[None]:
    """Take a binding back. One that is not there is fine (RabbitMQ answers as if it was)."""
    if binding.exchange.is_default:
        return
    with attempting(
        f"unbind queue {queue!r} from {binding.exchange.name!r} with key {binding.key!r}"
    ):
        yield partial(
            channel.queue_unbind,
            queue=queue,
            exchange=binding.exchange.name,
            routing_key=binding.key,
        )


def _is_mismatch(error: ChannelClosedError) -> bool:
    """Tell whether something exists with other arguments.

    RabbitMQ answers 406 as well where nothing exists yet: for an argument that a type of queue
    does not take, and at a limit.
    """
    return error.code == PRECONDITION_FAILED and "inequivalent arg" in error.text


def _advice(error: ChannelClosedError) -> str:
    """Return what to do about a refused declaration of a queue."""
    if _is_mismatch(error):
        return (
            "Delete or rename the queue, ask for what it has (POSTAGE_QUEUE_TYPE=classic, a dict "
            "with its flags, or POSTAGE_COMPAT=1.2 for one that Postage 1.2.1 declared), or set "
            "POSTAGE_ON_MISMATCH=adopt to use it as it is"
        )
    if error.code == PRECONDITION_FAILED and "invalid arg" in error.text:
        return "Leave the argument out, or ask for a value and a type of queue that go with it"
    if error.code == PRECONDITION_FAILED and "limit" in error.text:
        return "Raise the limit (rabbitmqctl set_vhost_limits), or delete queues that nobody uses"
    if error.code == ACCESS_REFUSED and "reserved prefix" in error.text:
        return "Names that begin with amq. are the broker's own"
    if error.code == NOT_FOUND and "home node" in error.text:
        return "The node of the cluster that it is on must come back"
    return {
        RESOURCE_LOCKED: "It is exclusive to another connection: give each instance its own name",
        ACCESS_REFUSED: "The user may not declare it: check its permissions",
        NOT_FOUND: "It is declared passive here: start who declares it first",
    }.get(error.code, "")


def _asked_for(spec: ExchangeSpec | QueueSpec) -> str:
    flags = [
        name
        for name in ("passive", "durable", "exclusive", "auto_delete", "internal")
        if getattr(spec, name, False)
    ]
    if isinstance(spec, ExchangeSpec):
        flags.insert(0, spec.type)
    return ", ".join([*flags, *(f"{key}={value!r}" for key, value in spec.arguments.items())])
