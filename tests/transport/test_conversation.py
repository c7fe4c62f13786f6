# SPDX-License-Identifier: MIT
"""A script asks the broker one thing after the other, and hears every answer."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Generator, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from pika import exceptions as pika_errors

from postage.errors import (
    ChannelClosedError,
    ClosedError,
    ConnectionLostError,
    ExchangeMismatchError,
    QueueMismatchError,
    TransportError,
)
from postage.settings import Settings
from postage.topology import Binding, ExchangeSpec, QueueSpec
from postage.transport import connection as connections
from postage.transport.connection import Connection
from postage.transport.conversation import (
    Script,
    attempting,
    bind_queue,
    converse,
    declare_exchange,
    declare_queue,
    translated,
    unbind_queue,
)
from tests.waiting import wait_until

#: Seconds after which an answer that has to come counts as missing.
DEADLINE = 30.0


class Channel:
    """A channel that keeps what it is asked, to be answered by the test."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.closed: Exception | None = None
        self._answer: Callable[..., None] | None = None
        self._on_close: list[Callable[[Any, Exception], None]] = []

    def add_on_close_callback(self, callback: Callable[[Any, Exception], None]) -> None:
        self._on_close.append(callback)

    def __getattr__(self, method: str) -> Callable[..., None]:
        return partial(self._ask, method)

    def _ask(self, method: str, callback: Callable[..., None], **arguments: Any) -> None:
        if self.closed is not None:
            raise pika_errors.ChannelWrongStateError("Channel is closed.")
        self.asked.append((method, arguments))
        self._answer = callback

    def answer(self, value: Any = None) -> None:
        assert self._answer is not None
        self._answer(value)

    def close(self, code: int, text: str = "on purpose") -> None:
        """As the broker does when it refuses."""
        self.closed = pika_errors.ChannelClosedByBroker(code, text)
        for callback in self._on_close:
            callback(self, self.closed)


class Talk:
    """A conversation on such a channel, and what was reported at its end."""

    def __init__(self, script: Callable[[Any], Script[Any]]) -> None:
        self.channel = Channel()
        self.ends: list[tuple[Any, TransportError | None]] = []
        self.shielded: list[Callable[..., None]] = []
        converse(self.channel, script(self.channel), self._end, self._shield)  # type: ignore[arg-type]

    def _end(self, result: Any, error: TransportError | None) -> None:
        self.ends.append((result, error))

    def _shield(self, function: Callable[..., None]) -> Callable[..., None]:
        self.shielded.append(function)
        return function

    @property
    def error(self) -> TransportError:
        ((result, error),) = self.ends
        assert result is None
        assert error is not None
        return error


def two_questions(channel: Any) -> Script[Any]:
    first = yield partial(channel.ask, what="first")
    second = yield partial(channel.ask, what="second")
    return first, second


# --------------------------------------------------------------------- one after the other


def test_a_script_asks_one_thing_at_a_time() -> None:
    """It goes on when the answer is there, and its result is reported."""
    talk = Talk(two_questions)
    assert [("ask", {"what": "first"})] == talk.channel.asked
    talk.channel.answer(1)
    assert [("ask", {"what": "first"}), ("ask", {"what": "second"})] == talk.channel.asked
    assert not talk.ends
    talk.channel.answer(2)
    assert [((1, 2), None)] == talk.ends


def test_a_script_without_a_question_ends_at_once() -> None:
    """Its result is reported all the same."""

    def script(_channel: Any) -> Script[str]:
        return "result"
        yield

    assert [("result", None)] == Talk(script).ends


def test_a_script_may_be_made_of_others() -> None:
    """Each passes on its result."""

    def script(channel: Any) -> Script[Any]:
        result = yield from two_questions(channel)
        return sum(result)

    talk = Talk(script)
    talk.channel.answer(1)
    talk.channel.answer(2)
    assert [(3, None)] == talk.ends


def test_every_callback_of_pika_is_shielded() -> None:
    """The answers and the close: what they raise must not reach pika."""
    talk = Talk(two_questions)
    talk.channel.answer()
    assert 3 == len(talk.shielded)
    assert talk.shielded[0] in talk.channel._on_close


# ----------------------------------------------------------------------------- refusals


def test_a_refusal_reaches_the_script() -> None:
    """It can tell by the code what to make of it, and still end well."""

    def script(channel: Any) -> Script[str]:
        try:
            yield partial(channel.ask)
        except ChannelClosedError as error:
            return f"{error.code} {error.text}"
        return "unreached"

    talk = Talk(script)
    talk.channel.close(404)
    assert [("404 on purpose", None)] == talk.ends


def test_a_refusal_that_the_script_does_not_expect_is_its_error() -> None:
    """It is reported, once."""
    talk = Talk(two_questions)
    talk.channel.answer(1)
    talk.channel.close(403)
    assert isinstance(talk.error, ChannelClosedError)
    assert 403 == talk.error.code


def test_a_question_on_a_closed_channel_is_refused() -> None:
    """The script that goes on after a refusal hears that nothing more can be asked."""

    def script(channel: Any) -> Script[str]:
        with contextlib.suppress(ChannelClosedError):
            yield partial(channel.ask)
        try:
            yield partial(channel.ask)
        except ConnectionLostError as error:
            return str(error)
        return "unreached"

    talk = Talk(script)
    talk.channel.close(404)
    ((result, error),) = talk.ends
    assert error is None
    assert "Channel is closed" in result
    assert 1 == len(talk.channel.asked)


def test_what_comes_after_the_end_is_not_heard() -> None:
    """A late answer, and the close of a channel that others go on using."""
    talk = Talk(two_questions)
    talk.channel.answer(1)
    talk.channel.answer(2)
    talk.channel.answer(3)
    talk.channel.close(404)
    assert [((1, 2), None)] == talk.ends


# ------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "mistake",
    [
        pika_errors.UnsupportedAMQPFieldException("float"),
        pika_errors.ShortStringTooLong("x"),
        AssertionError("A non-string value was supplied"),
        struct.error("out of range"),
        TypeError("unexpected keyword"),
        ValueError("queue must be a str"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_cannot_be_encoded_ends_the_script(mistake: Exception) -> None:
    """It is no lost connection: asking again on the next one would not help."""

    def ask(callback: Any) -> None:
        raise mistake

    def script(_channel: Any) -> Script[None]:
        yield ask

    error = Talk(script).error
    assert not isinstance(error, ConnectionLostError)
    assert type(mistake).__name__ in str(error)
    assert mistake is error.__cause__


def test_a_mistake_of_the_script_is_reported() -> None:
    """Who waits for its result does not wait for ever."""

    def script(channel: Any) -> Script[None]:
        yield partial(channel.ask)
        raise LookupError("on purpose")

    talk = Talk(script)
    talk.channel.answer()
    assert "the broker cannot be asked: LookupError: on purpose" == str(talk.error)
    assert not isinstance(talk.error, ConnectionLostError)


def test_a_script_that_is_no_good_from_the_start_is_reported() -> None:
    """Before it asked anything."""

    def script(_channel: Any) -> Script[None]:
        raise LookupError("on purpose")
        yield

    assert "LookupError: on purpose" in str(Talk(script).error)


# --------------------------------------------------------------------------- translation


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (pika_errors.ChannelClosedByBroker(404, "x"), ChannelClosedError, "404 x"),
        (pika_errors.ConnectionClosedByBroker(320, "x"), ConnectionLostError, "320 x"),
        (pika_errors.ChannelClosedByClient(0, "x"), ClosedError, "closed by this program"),
        (pika_errors.ConnectionClosedByClient(0, "x"), ClosedError, "closed by this program"),
        (
            pika_errors.StreamLostError("Stream connection lost: " + repr(OSError(104, "Reset"))),
            ConnectionLostError,
            "the connection was lost: Reset",
        ),
        (
            pika_errors.StreamLostError("Transport indicated EOF"),
            ConnectionLostError,
            "the connection was lost: the other side ended it without a word",
        ),
        (pika_errors.StreamLostError("x"), ConnectionLostError, "lost: StreamLostError: x"),
        (
            pika_errors.AMQPHeartbeatTimeout("No activity … in the last 120 seconds"),
            ConnectionLostError,
            "the connection was lost: no heartbeat from the broker for 120 s",
        ),
        (pika_errors.AMQPHeartbeatTimeout("x"), ConnectionLostError, "AMQPHeartbeatTimeout: x"),
        (ConnectionResetError("x"), ConnectionLostError, "lost: ConnectionResetError: x"),
        (None, ConnectionLostError, "the connection was lost"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_pika_become_ours(
    error: Exception | None, expected: type[TransportError], words: str
) -> None:
    """Who reads the log need not know pika."""
    ours = translated(error)
    assert expected is type(ours)
    assert words in str(ours)


def test_errors_of_ours_stay_what_they_are() -> None:
    """As the one that a connection was aborted with."""
    error = ConnectionLostError("interrupted")
    assert error is translated(error)


def test_a_refusal_says_what_was_attempted() -> None:
    """The innermost attempt counts, and the class is kept."""
    with pytest.raises(QueueMismatchError) as caught, attempting("outer"), attempting("inner", "x"):
        raise QueueMismatchError(406, "text")
    assert ("inner", "x") == (caught.value.attempt, caught.value.advice)
    assert "inner: the broker answered 406 text. x" == str(caught.value)
    with pytest.raises(ConnectionLostError), attempting("anything"):
        raise ConnectionLostError


@pytest.mark.parametrize(
    ("code", "text"),
    [(503, "inner: COMMAND_INVALID"), (320, "COMMAND_INVALID"), (None, "COMMAND_INVALID")],
)
def test_what_cost_the_connection_says_what_was_attempted(code: int | None, text: str) -> None:
    """What AMQP calls a hard error is for something that was asked; others come at any time."""
    with pytest.raises(ConnectionLostError) as caught, attempting("outer"), attempting("inner"):
        raise ConnectionLostError("COMMAND_INVALID", code)
    assert (code, text) == (caught.value.code, str(caught.value))


def test_a_close_of_the_connection_keeps_its_code() -> None:
    """Whoever has to decide need not read the text."""
    lost = translated(pika_errors.ConnectionClosedByBroker(541, "INTERNAL_ERROR"))
    assert isinstance(lost, ConnectionLostError)
    assert 541 == lost.code
    cut = translated(pika_errors.StreamLostError("x"))
    assert isinstance(cut, ConnectionLostError)
    assert None is cut.code


# ------------------------------------------------------------------------- declarations

EXCHANGE = ExchangeSpec("news", "topic", arguments={"alternate-exchange": "lost"})
QUEUE = QueueSpec("orders", arguments={"x-queue-type": "quorum"})


def test_an_exchange_is_declared_as_specified() -> None:
    """All that the value says is asked for."""
    talk = Talk(lambda channel: declare_exchange(channel, EXCHANGE))
    expected = {
        "exchange": "news",
        "exchange_type": "topic",
        "passive": False,
        "durable": True,
        "auto_delete": False,
        "internal": False,
        "arguments": {"alternate-exchange": "lost"},
    }
    assert [("exchange_declare", expected)] == talk.channel.asked
    talk.channel.answer()
    assert [(None, None)] == talk.ends


def test_a_queue_is_declared_as_specified() -> None:
    """Its name is returned, which may be the broker's choice."""
    talk = Talk(lambda channel: declare_queue(channel, QUEUE))
    expected = {
        "queue": "orders",
        "passive": False,
        "durable": True,
        "exclusive": False,
        "auto_delete": False,
        "arguments": {"x-queue-type": "quorum"},
    }
    assert [("queue_declare", expected)] == talk.channel.asked
    talk.channel.answer(SimpleNamespace(method=SimpleNamespace(queue="amq.gen-1")))
    assert [("amq.gen-1", None)] == talk.ends


def test_the_default_exchange_is_left_alone() -> None:
    """It exists, and refuses to be declared, bound to and unbound from."""
    binding = Binding(ExchangeSpec(""), QUEUE, "orders")
    for script in (
        lambda channel: declare_exchange(channel, ExchangeSpec("")),
        lambda channel: bind_queue(channel, binding, "orders"),
        lambda channel: unbind_queue(channel, binding, "orders"),
    ):
        talk = Talk(script)
        assert [(None, None)] == talk.ends
        assert not talk.channel.asked


def test_a_queue_is_bound_and_unbound_by_its_real_name() -> None:
    """The binding says where to, and the name may be the broker's choice."""
    binding = Binding(EXCHANGE, QUEUE, "weather.#")
    expected = {"queue": "amq.gen-1", "exchange": "news", "routing_key": "weather.#"}
    bound = Talk(lambda channel: bind_queue(channel, binding, "amq.gen-1"))
    unbound = Talk(lambda channel: unbind_queue(channel, binding, "amq.gen-1"))
    assert [("queue_bind", expected)] == bound.channel.asked
    assert [("queue_unbind", expected)] == unbound.channel.asked
    for talk, verb in ((bound, "bind"), (unbound, "unbind")):
        talk.channel.close(404)
        assert isinstance(talk.error, ChannelClosedError)
        assert talk.error.attempt.startswith(f"{verb} queue 'amq.gen-1' ")
        assert talk.error.attempt.endswith(" 'news' with key 'weather.#'")


def test_a_mismatch_names_all_that_was_asked_for() -> None:
    """And the ways out. The broker names only the first difference."""
    queue = Talk(lambda channel: declare_queue(channel, QUEUE))
    exchange = Talk(lambda channel: declare_exchange(channel, EXCHANGE))
    for talk in (queue, exchange):
        talk.channel.close(406, "inequivalent arg")
    assert isinstance(queue.error, QueueMismatchError)
    assert isinstance(exchange.error, ExchangeMismatchError)
    assert "declare queue 'orders' (durable, x-queue-type='quorum')" == queue.error.attempt
    attempt = "declare exchange 'news' (topic, durable, alternate-exchange='lost')"
    assert attempt == exchange.error.attempt
    for talk in (queue, exchange):
        assert "inequivalent arg" in str(talk.error)
        assert "POSTAGE_ON_MISMATCH=adopt" in str(talk.error)


@pytest.mark.parametrize(
    ("code", "advice"),
    [(405, "exclusive to another connection"), (403, "permissions"), (404, "passive"), (541, "")],
)
def test_another_refusal_is_no_mismatch(code: int, advice: str) -> None:
    """Its advice fits the code, if there is one."""
    queue = Talk(lambda channel: declare_queue(channel, QUEUE))
    exchange = Talk(lambda channel: declare_exchange(channel, EXCHANGE))
    for talk in (queue, exchange):
        talk.channel.close(code)
        assert ChannelClosedError is type(talk.error)
        assert talk.error.attempt.startswith("declare ")
    assert isinstance(queue.error, ChannelClosedError)
    assert advice in queue.error.advice
    assert bool(advice) == bool(queue.error.advice)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("PRECONDITION_FAILED - invalid arg 'x-max-priority' for queue 'a'", "Leave the argument"),
        ("PRECONDITION_FAILED - cannot declare queue 'a': queue limit in", "Raise the limit"),
        ("PRECONDITION_FAILED - something new", ""),
    ],
)
def test_a_precondition_that_failed_for_another_reason_is_no_mismatch(
    text: str, advice: str
) -> None:
    """There is nothing that could be adopted."""
    queue = Talk(lambda channel: declare_queue(channel, QUEUE))
    exchange = Talk(lambda channel: declare_exchange(channel, EXCHANGE))
    for talk in (queue, exchange):
        talk.channel.close(406, text)
        assert ChannelClosedError is type(talk.error)
        assert "POSTAGE_ON_MISMATCH" not in str(talk.error)
    assert isinstance(queue.error, ChannelClosedError)
    assert advice in queue.error.advice
    assert bool(advice) == bool(queue.error.advice)


# ----------------------------------------------------------------------- the real broker


@pytest.fixture
def connection(broker_url: str) -> Iterator[Connection]:
    """A connection that nobody else uses."""
    connection = connections.acquire(Settings.from_environment(), "publish")
    yield connection
    connections.release(connection)


def ask(connection: Connection, script: Callable[[Any], Script[Any]]) -> Any:
    return connection.ask(script, DEADLINE, "ask")


def test_rabbitmq_answers_a_script(connection: Connection) -> None:
    """A queue is declared, bound, found and unbound in one conversation."""

    def script(channel: Any) -> Generator[Any, Any, tuple[str, int]]:
        exchange = ExchangeSpec("news", "topic", durable=False)
        yield from declare_exchange(channel, exchange)
        name = yield from declare_queue(channel, QueueSpec("", exclusive=True, durable=False))
        yield from bind_queue(channel, Binding(exchange, QUEUE, "a.*"), name)
        found = yield partial(channel.queue_declare, queue=name, passive=True)
        yield from unbind_queue(channel, Binding(exchange, QUEUE, "a.*"), name)
        yield from unbind_queue(channel, Binding(exchange, QUEUE, "never.bound"), name)
        return name, found.method.message_count

    name, messages = ask(connection, script)
    assert name.startswith("amq.gen-")
    assert 0 == messages


def test_rabbitmq_refuses_another_declaration(connection: Connection) -> None:
    """Of a queue and of an exchange that exist with other arguments."""
    ask(connection, lambda channel: declare_queue(channel, QueueSpec("orders")))
    with pytest.raises(QueueMismatchError, match=r"inequivalent arg 'x-queue-type'.*POSTAGE_ON"):
        ask(connection, lambda channel: declare_queue(channel, QUEUE))
    ask(connection, lambda channel: declare_exchange(channel, ExchangeSpec("news")))
    with pytest.raises(ExchangeMismatchError, match=r"inequivalent arg 'type'.*POSTAGE_ON"):
        ask(connection, lambda channel: declare_exchange(channel, ExchangeSpec("news", "topic")))


def test_rabbitmq_does_not_find_what_is_not_there(connection: Connection) -> None:
    """Neither a queue that is only checked, nor the exchange of a binding."""
    with pytest.raises(ChannelClosedError, match=r"declare queue 'none' .*404 NOT_FOUND"):
        ask(connection, lambda channel: declare_queue(channel, QueueSpec("none", passive=True)))
    ask(connection, lambda channel: declare_queue(channel, QueueSpec("orders")))
    binding = Binding(ExchangeSpec("none"), QUEUE, "key")
    with pytest.raises(ChannelClosedError, match=r"bind queue 'orders' to 'none' .*404 NOT_FOUND"):
        ask(connection, lambda channel: bind_queue(channel, binding, "orders"))


@pytest.mark.parametrize("value", [1.5, object(), 2**70, {1: 2}], ids=str)
def test_pika_cannot_encode_every_argument(connection: Connection, value: Any) -> None:
    """The error comes at once, the script is not run again, and the connection works on."""
    runs = 0

    def script(channel: Any) -> Script[Any]:
        nonlocal runs
        runs += 1
        return (yield from declare_queue(channel, QueueSpec("orders", arguments={"x-y": value})))

    with pytest.raises(TransportError, match="the broker cannot be asked: "):
        ask(connection, script)
    assert 1 == runs
    assert "orders" == ask(connection, lambda channel: declare_queue(channel, QueueSpec("orders")))
    assert 0 == connection.losses


def test_a_lost_connection_is_heard_in_the_middle_of_a_script(connection: Connection) -> None:
    """It is run again, from its beginning, on the next connection."""
    runs: list[str] = []

    def script(channel: Any) -> Script[str]:
        runs.append("run")
        yield partial(channel.queue_declare, queue="orders", durable=True)
        if len(runs) == 1:
            connection.abort(ConnectionLostError("on purpose"))
        try:
            yield partial(channel.queue_declare, queue="orders", durable=True)
        except ConnectionLostError:
            runs.append("lost")
            raise
        return "result"

    assert "result" == ask(connection, script)
    wait_until(lambda: runs == ["run", "lost", "run"])
