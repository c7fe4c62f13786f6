# SPDX-License-Identifier: MIT
"""Every event in every phase of a connection, without sockets, and with a clock moved by hand.

The reply codes are those of RabbitMQ 3.10.8, but for the phases before the login is complete:
there it hangs up without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from pika import spec

from postage.broker import fields
from postage.broker.channel import MAX_MESSAGE_SIZE, MAX_UNFINISHED_SIZE
from postage.broker.connection import (
    CLOSE_SECONDS,
    FRAME_MAX,
    HANDSHAKE_SECONDS,
    REPLY_ROOM,
    ROOM,
    Phase,
)
from postage.broker.errors import Refusal
from postage.broker.vhost import VirtualHost
from tests.broker import wire
from tests.broker.wire import Caller, Desk, body, frame, header, login, method, opening, tune

STARTING, TUNING, OPENING = Phase.STARTING, Phase.TUNING, Phase.OPENING
OPEN, CLOSING, CLOSED = Phase.OPEN, Phase.CLOSING, Phase.CLOSED
CLOSE = method(spec.Connection.Close(200, "bye", 0, 0))
CLOSE_OK = method(spec.Connection.CloseOk())

#: What is sent in each phase before the event.
WAY: dict[Phase, bytes] = {
    Phase.GREETING: b"",
    STARTING: wire.HEADER,
    TUNING: wire.HEADER + login(),
    OPENING: wire.HEADER + login() + tune(),
    OPEN: wire.HEADER + login() + tune() + opening(),
    CLOSING: wire.HEADER + login() + tune() + opening() + method(spec.Connection.OpenOk()),
    CLOSED: wire.HEADER + login() + tune() + opening() + CLOSE,
}
#: Events, and what comes of each while starting, tuning, opening, open, and closing:
#: another phase, or the reply code with which the broker closes the connection.
EVENTS: dict[str, tuple[bytes, tuple[Phase | int, ...]]] = {
    "start-ok": (login(), (TUNING, 504, 504, 504, CLOSING)),
    "tune-ok": (tune(), (504, OPENING, 504, 504, CLOSING)),
    "open": (opening(), (504, 504, OPEN, 504, CLOSING)),
    "close": (CLOSE, (CLOSED, CLOSED, CLOSED, CLOSED, CLOSING)),
    "close-ok": (CLOSE_OK, (504, 504, 504, 504, CLOSED)),
    "update-secret": (
        method(spec.Connection.UpdateSecret("new", "because")),
        (504, 504, 504, OPEN, CLOSING),
    ),
    "what only a broker says": (
        method(spec.Connection.Blocked("reason")),
        (504, 504, 504, 504, CLOSING),
    ),
    "channel.open on channel 0": (
        method(spec.Channel.Open()),
        (504, 504, 504, 504, CLOSING),
    ),
    "channel.open": (method(spec.Channel.Open(), 1), (505, 505, 505, OPEN, CLOSING)),
    "close on a channel": (
        method(spec.Connection.Close(200, "bye", 0, 0), 1),
        (505, 505, 505, 504, CLOSING),
    ),
    "get on a channel": (method(spec.Basic.Get(), 1), (505, 505, 505, 504, CLOSING)),
    "header on channel 0": (header(0, channel=0), (505, 505, 505, 505, CLOSING)),
    "body on channel 0": (body(b"x", channel=0), (505, 505, 505, 505, CLOSING)),
    "body on a channel": (body(b"x"), (505, 505, 505, 505, CLOSING)),
    "heartbeat": (wire.HEARTBEAT, (STARTING, TUNING, OPENING, OPEN, CLOSING)),
    "heartbeat on a channel": (frame(8, 1, b""), (505, 505, 505, 505, CLOSING)),
    "heartbeat with content": (frame(8, 0, b"x"), (501, 501, 501, 501, CLOSING)),
    "unknown kind of frame": (frame(9, 0, b"x"), (501, 501, 501, 501, CLOSING)),
    "unknown method": (frame(1, 0, b"\0\x63\0\x63"), (540, 540, 540, 540, CLOSING)),
    "method cut off": (frame(1, 0, b"\0\x0a"), (501, 501, 501, 501, CLOSING)),
    "arguments cut off": (frame(1, 0, b"\0\x0a\0\x0b"), (501, 501, 501, 501, CLOSING)),
    "broken frame": (frame(1, 0, b"x", end=b"x"), (501, 501, 501, 501, CLOSING)),
    "frame too large": (
        frame(1, 0, bytes(FRAME_MAX + 1)),
        (501, 501, 501, 501, CLOSING),
    ),
}
CELLS = [
    (event, phase, outcome)
    for event, (_, outcomes) in EVENTS.items()
    for phase, outcome in zip((STARTING, TUNING, OPENING, OPEN, CLOSING), outcomes, strict=True)
]


@pytest.fixture
def desk() -> Desk:
    """A broker without sockets."""
    return Desk()


def in_phase(desk: Desk, phase: Phase) -> Caller:
    caller = desk.connect().send(WAY[phase])
    caller.take()
    assert phase is caller.connection.phase
    return caller


def code_of(answers: list[Any]) -> int:
    """Return the code of the connection.close that must be the only answer."""
    (answer,) = answers
    assert isinstance(answer, spec.Connection.Close), answer
    code: int = answer.reply_code
    return code


def get(caller: Caller, queue: str = "q", **options: Any) -> bytes | None:
    """Return the body of a message, None if there is none."""
    answers = caller.ask(spec.Basic.Get(queue=queue, **options))
    return b"".join(piece.fragment for piece in answers[2:]) if len(answers) > 1 else None


def serves_others(desk: Desk) -> bool:
    """Tell whether another client can declare, publish and get."""
    other = desk.opened()
    other.ask(spec.Queue.Declare(queue="of another", auto_delete=True))
    other.send(wire.message("of another", b"hello"))
    served = get(other, "of another", no_ack=True) == b"hello"
    other.send(CLOSE).connection.lost()
    return served


# Phases


@pytest.mark.parametrize(("event", "phase", "outcome"), CELLS)
def test_every_event_in_every_phase(
    desk: Desk, event: str, phase: Phase, outcome: Phase | int
) -> None:
    """It leads to another phase or is refused, whole and byte by byte; and others are served."""
    data = EVENTS[event][0]
    for step in (len(data), 1 if len(data) < 5000 else 4999):
        caller = in_phase(desk, phase)
        for start in range(0, len(data), step):
            caller.send(data[start : start + step])

        answers = caller.take()
        if isinstance(outcome, Phase):
            assert outcome is caller.connection.phase
            assert not any(isinstance(each, spec.Connection.Close) for each in answers)
        else:
            assert outcome == code_of(answers)
            assert CLOSING is caller.connection.phase
            assert [] == caller.ask(CLOSE_OK)
            assert CLOSED is caller.connection.phase
        assert serves_others(desk)


def test_before_the_greeting_all_else_is_answered_with_it(desk: Desk) -> None:
    """AMQP 0-9-1, section 4.2.2: the broker says what it speaks, and hangs up."""
    for event, (data, _) in EVENTS.items():
        caller = desk.connect().send(data)

        assert wire.HEADER == b"".join(caller.connection.take_output()), event
        assert caller.connection.is_finished and not caller.connection.wants_input
        assert serves_others(desk)


def test_after_the_end_nothing_is_heard(desk: Desk) -> None:
    """The socket is about to be closed."""
    for event, (data, _) in EVENTS.items():
        caller = in_phase(desk, CLOSED)

        assert [] == caller.ask(data), event
        assert caller.connection.is_finished


@pytest.mark.parametrize(
    "greeting", [b"AMQP\x01\x01\x00\x0a", b"AMQP\0\0\x09\0", b"AMQP\0\1\0\0", b"GET / HT", bytes(8)]
)
def test_another_protocol_is_answered_with_ours(desk: Desk, greeting: bytes) -> None:
    """Such as AMQP 1.0, or HTTP."""
    caller = desk.connect().send(greeting)

    assert wire.HEADER == b"".join(caller.connection.take_output())
    assert caller.connection.is_finished


def test_the_greeting_may_come_byte_by_byte_and_with_all_else_behind_it(desk: Desk) -> None:
    """A client may not wait for any answer."""
    caller = desk.connect()
    for byte in WAY[OPEN] + method(spec.Channel.Open(), 3):
        caller.send(bytes([byte]))

    kinds = [type(each) for each in caller.take()]
    assert [
        spec.Connection.Start,
        spec.Connection.Tune,
        spec.Connection.OpenOk,
        spec.Channel.OpenOk,
    ] == kinds
    assert "<Connection the test [open, 1 channels]>" == repr(caller.connection)


@pytest.mark.parametrize("phase", [Phase.GREETING, STARTING, TUNING, OPENING])
def test_the_handshake_must_end_in_time(desk: Desk, phase: Phase) -> None:
    """Whoever sends an octet now and then gets no more time."""
    caller = in_phase(desk, phase)
    for _ in range(9):
        desk.pass_time(HANDSHAKE_SECONDS / 10)
        caller.send(b"A" if phase is Phase.GREETING and _ == 0 else b"")
    assert phase is caller.connection.phase

    desk.pass_time(HANDSHAKE_SECONDS / 10)

    assert caller.connection.is_finished
    assert [] == caller.take()


def test_an_open_connection_may_be_silent_for_ever(desk: Desk) -> None:
    """If it has asked for no heartbeats, it is sent none."""
    caller = desk.opened(heartbeat=0)
    desk.pass_time(1e6)

    assert (OPEN, []) == (caller.connection.phase, caller.take())


# Channels

GET_EMPTY = method(spec.Basic.Get(queue="q"), 1)
PUBLISH = method(spec.Basic.Publish(routing_key="q"), 1)
#: What brings channel 1 into each state.
CHANNEL_WAY: dict[str, bytes] = {
    "closed": b"",
    "open": method(spec.Channel.Open(), 1),
    "header due": method(spec.Channel.Open(), 1) + PUBLISH,
    "body due": method(spec.Channel.Open(), 1) + PUBLISH + header(2),
    "closing": method(spec.Channel.Open(), 1) + method(spec.Basic.Get(queue="none"), 1),
}
#: Events, and what is answered in each of these states: a method, a code, or nothing.
CHANNEL_EVENTS: dict[str, tuple[bytes, tuple[type[Any] | int | None, ...]]] = {
    "open": (
        method(spec.Channel.Open(), 1),
        (spec.Channel.OpenOk, 504, 505, 505, None),
    ),
    "close": (
        method(spec.Channel.Close(200, "bye", 0, 0), 1),
        (504, spec.Channel.CloseOk, 505, 505, spec.Channel.CloseOk),
    ),
    "close-ok": (method(spec.Channel.CloseOk(), 1), (504, 503, 505, 505, None)),
    "a method": (method(spec.Basic.Qos(), 1), (504, spec.Basic.QosOk, 505, 505, None)),
    "a refused method": (method(spec.Basic.Get(queue="none"), 1), (504, 404, 505, 505, None)),
    "publish": (PUBLISH, (504, None, 505, 505, None)),
    "publish at once": (
        method(spec.Basic.Publish(immediate=True), 1),
        (504, 540, 505, 505, None),
    ),
    "header": (header(2), (505, 505, None, 505, None)),
    "header of nothing": (header(0), (505, 505, None, 505, None)),
    "header of another class": (header(2, class_id=50), (505, 505, 505, 505, None)),
    "header of too much": (
        header(MAX_MESSAGE_SIZE + 1),
        (505, 505, 406, 505, None),
    ),
    "header of 2 GiB": (header(2**31), (505, 505, 406, 505, None)),
    "header of all": (header(2**64 - 1), (505, 505, 406, 505, None)),
    "broken properties": (header(0, b"\xff\xff"), (505, 505, 502, 505, None)),
    "body": (body(b"ab"), (505, 505, 505, None, None)),
    "half a body": (body(b"a"), (505, 505, 505, None, None)),
    "no body": (body(b""), (505, 505, 505, None, None)),
    "too long a body": (body(b"abc"), (505, 505, 505, 505, None)),
    "what only a broker says": (
        method(spec.Basic.Deliver("tag", 1, False, "", ""), 1),
        (504, 503, 505, 505, None),
    ),
    "open of the connection": (
        frame(1, 1, opening()[7:-1]),
        (504, 503, 505, 505, None),
    ),
    "access.request": (
        method(spec.Access.Request(), 1),
        (504, spec.Access.RequestOk, 505, 505, None),
    ),
    "heartbeat": (frame(8, 1, b""), (505, 505, 505, 505, 505)),
    "unknown kind of frame": (frame(7, 1, b""), (501, 501, 501, 501, 501)),
    "ack of nothing": (
        method(spec.Basic.Ack(2**64 - 1), 1),
        (504, 406, 505, 505, None),
    ),
}
CHANNEL_CELLS = [
    (event, state, outcome)
    for event, (_, outcomes) in CHANNEL_EVENTS.items()
    for state, outcome in zip(CHANNEL_WAY, outcomes, strict=True)
]


@pytest.mark.parametrize(("event", "state", "outcome"), CHANNEL_CELLS)
def test_every_event_in_every_state_of_a_channel(
    desk: Desk, event: str, state: str, outcome: type[Any] | int | None
) -> None:
    """It is answered, taken or refused; another channel and other clients are served."""
    caller = desk.opened(channels=0)
    caller.ask(CHANNEL_WAY[state] + method(spec.Channel.Open(), 2))

    answers = caller.ask(CHANNEL_EVENTS[event][0])

    if outcome is None:
        assert [] == answers
    elif isinstance(outcome, int):
        assert outcome == answers[0].reply_code
        closes = not isinstance(answers[0], spec.Channel.Close)
        assert closes is Refusal(outcome, "").closes_connection
    else:
        assert [outcome] == [type(each) for each in answers]
    if caller.connection.phase is OPEN:
        assert spec.Basic.QosOk is type(caller.ask(spec.Basic.Qos(), 2)[0])
    assert serves_others(desk)


def test_a_message_is_published_when_all_of_it_has_come(desk: Desk) -> None:
    """Pieces of no octets are no pieces, and frames of other channels may be between."""
    caller = desk.opened(channels=2)
    caller.ask(spec.Queue.Declare(queue="q"))
    pieces = (PUBLISH, header(4), body(b""), body(b"ab"), body(b""), body(b"cd"))
    for piece in pieces[:-1]:
        caller.send(piece + wire.HEARTBEAT + method(spec.Basic.Qos(), 2))
    assert {spec.Basic.QosOk} == {type(each) for each in caller.take()}
    assert None is get(desk.opened())

    caller.send(pieces[-1])

    assert b"abcd" == get(desk.opened())
    assert 0 == caller.connection.unfinished


def test_a_piece_as_long_as_the_body_is_too_long_after_another(desk: Desk) -> None:
    """What was announced is what counts."""
    caller = desk.opened()

    assert 505 == code_of(caller.ask(PUBLISH + header(2) + body(b"a") + body(b"bc")))


def test_what_is_begun_and_not_finished_is_limited(desk: Desk) -> None:
    """No alarm can limit it: a publisher that is not heard cannot finish."""
    caller = desk.opened(channels=3)
    piece = bytes(FRAME_MAX)
    number = MAX_MESSAGE_SIZE // FRAME_MAX - 1
    for channel in (1, 2, 3):
        caller.send(frame(1, channel, PUBLISH[7:-1]) + header(MAX_MESSAGE_SIZE, channel=channel))
    for channel in (1, 2):
        for _ in range(number):
            caller.send(body(piece, channel))
    assert (OPEN, 2 * number * FRAME_MAX) == (
        caller.connection.phase,
        caller.connection.unfinished,
    )
    assert MAX_UNFINISHED_SIZE == caller.connection.unfinished + 2 * FRAME_MAX

    caller.send(body(piece, 3) + body(piece, 3))
    assert OPEN is caller.connection.phase
    assert 506 == code_of(caller.ask(body(piece, 3)))
    assert 0 == caller.connection.unfinished


def test_what_is_not_committed_is_limited_too(desk: Desk) -> None:
    """A transaction that is never committed would else take all memory."""
    caller = desk.opened()
    caller.ask(spec.Tx.Select())
    caller.send(wire.message("q", bytes(1000)))
    assert 1000 < caller.connection.unfinished < 3000
    caller.ask(spec.Tx.Rollback())
    assert 0 == caller.connection.unfinished
    caller.send(wire.message("q", bytes(1000)))
    caller.ask(spec.Tx.Commit())
    assert 0 == caller.connection.unfinished
    caller.send(wire.message("q", bytes(1000)))
    caller.ask(spec.Channel.Close(200, "", 0, 0))
    assert 0 == caller.connection.unfinished


def test_a_commit_that_fails_gives_back_what_was_settled(desk: Desk) -> None:
    """An exchange that was there when the message came may be gone."""
    caller = desk.opened()
    caller.ask(spec.Queue.Declare(queue="q"))
    caller.ask(spec.Exchange.Declare(exchange="e"))
    caller.send(wire.message("q", b"hello"))
    caller.ask(spec.Tx.Select())
    assert b"hello" == get(caller)
    caller.send(method(spec.Basic.Ack(1), 1) + wire.message("", exchange="e"))
    desk.opened().ask(spec.Exchange.Delete(exchange="e"))

    (answer,) = caller.ask(spec.Tx.Commit())

    assert (404, 90, 20) == (answer.reply_code, answer.class_id, answer.method_id)
    assert b"hello" == get(desk.opened())


def test_the_channels_that_are_open_count_and_not_their_numbers(desk: Desk) -> None:
    """As in RabbitMQ 3.10, where any number is free for the next."""
    caller = desk.connect().send(wire.HEADER + login() + tune(channel_max=2) + opening())
    caller.take()
    opened = [caller.ask(spec.Channel.Open(), number) for number in (65_535, 2048)]
    assert [spec.Channel.OpenOk] * 2 == [type(each) for (each,) in opened]

    caller.ask(spec.Channel.Close(200, "", 0, 0), 2048)
    assert spec.Channel.OpenOk is type(caller.ask(spec.Channel.Open(), 1)[0])
    (answer,) = caller.ask(spec.Channel.Open(), 2)

    text = "NOT_ALLOWED - number of channels opened (2) has reached the negotiated channel_max (2)"
    assert (530, text) == (answer.reply_code, answer.reply_text)


def test_two_thousand_channels_are_served(desk: Desk) -> None:
    """And 2,047 is the most."""
    caller = desk.opened(channels=2047)
    caller.ask(spec.Queue.Declare(queue="q"))
    for number in range(1, 2048):
        caller.send(wire.message("q", b"%d" % number, channel=number))

    assert [b"%d" % number for number in range(1, 2048)] == [
        get(caller, no_ack=True) for _ in range(2047)
    ]
    assert 530 == code_of(caller.ask(spec.Channel.Open(), 3000))


def test_a_channel_can_be_opened_again_after_the_broker_has_closed_it(desk: Desk) -> None:
    """Once the client has said close-ok; what it sent before is thrown away."""
    caller = desk.opened()
    (closed,) = caller.ask(method(spec.Basic.Get(queue="none"), 1) + wire.message("q", b"lost"))
    assert (404, 60, 70) == (closed.reply_code, closed.class_id, closed.method_id)

    caller.ask(spec.Channel.CloseOk())

    assert spec.Channel.OpenOk is type(caller.ask(spec.Channel.Open())[0])
    assert spec.Basic.QosOk is type(caller.ask(spec.Basic.Qos())[0])


def test_both_sides_may_close_a_channel_at_once(desk: Desk) -> None:
    """The broker answers the client's close, and waits for the answer to its own."""
    caller = desk.opened()
    caller.ask(spec.Basic.Get(queue="none"))

    assert spec.Channel.CloseOk is type(caller.ask(spec.Channel.Close(200, "", 0, 0))[0])
    caller.ask(spec.Channel.CloseOk())
    assert spec.Channel.OpenOk is type(caller.ask(spec.Channel.Open())[0])


# Logging in


def start_ok(response: bytes, mechanism: str = "PLAIN", capabilities: bool = True) -> bytes:
    said = {"capabilities": wire.CAPABILITIES} if capabilities else {}
    return method(spec.Connection.StartOk(said, mechanism, response))


def amqplain(user: str, password: bytes) -> bytes:
    """Return the response of AMQPLAIN: a table without its length."""
    table = {"LOGIN": fields.encode(user), "PASSWORD": b"S\0\0\0" + wire.short(password)}
    return fields.join(table)[4:]


@pytest.fixture
def guarded() -> Desk:
    """A broker with users whose names and passwords are no plain words."""
    return Desk(users={"guest": "guest", "é": "pass:word é", "empty": ""})


@pytest.mark.parametrize(
    "data",
    [
        start_ok(b"\0guest\0guest"),
        start_ok(b"someone\0guest\0guest"),
        start_ok("\0é\0pass:word é".encode()),
        start_ok(b"\0empty\0"),
        start_ok(amqplain("guest", b"guest"), "AMQPLAIN"),
        start_ok(amqplain("é", "pass:word é".encode()), "AMQPLAIN"),
    ],
)
def test_who_knows_the_password_is_let_in(guarded: Desk, data: bytes) -> None:
    """By either mechanism."""
    caller = in_phase(guarded, STARTING)
    (answer,) = caller.ask(data)

    assert (2047, FRAME_MAX, 60) == (answer.channel_max, answer.frame_max, answer.heartbeat)


@pytest.mark.parametrize(
    "data",
    [
        start_ok(b"\0guest\0Guest"),
        start_ok(b"\0guest\0"),
        start_ok(b"\0guest\0\xff\xfe"),
        start_ok(b"\0nobody\0guest"),
        start_ok(b"\0\0"),
        start_ok(b"\0\xff\0guest"),
        start_ok(amqplain("guest", b"wrong"), "AMQPLAIN"),
        start_ok(amqplain("guest", b"\xff"), "AMQPLAIN"),
        start_ok(amqplain("nobody", b"guest"), "AMQPLAIN"),
    ],
)
def test_who_does_not_know_the_password_is_refused(
    guarded: Desk, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """403, as RabbitMQ words it; the log says who."""
    (answer,) = in_phase(guarded, STARTING).ask(data)

    mechanism = "AMQPLAIN" if b"AMQPLAIN" in data else "PLAIN"
    assert (403, 0, 0) == (answer.reply_code, answer.class_id, answer.method_id)
    assert answer.reply_text == (
        f"ACCESS_REFUSED - Login was refused using authentication mechanism {mechanism}. For "
        "details see the broker logfile."
    )
    assert "the test: login of user " in caplog.text


def test_an_old_client_that_is_refused_is_hung_up_on(guarded: Desk) -> None:
    """One that does not know authentication_failure_close expects no close."""
    caller = in_phase(guarded, STARTING)

    assert [] == caller.ask(start_ok(b"\0guest\0wrong", capabilities=False))
    assert caller.connection.is_finished


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (start_ok(b"guest"), 502),
        (start_ok(b"\0guest"), 502),
        (start_ok(b"\0guest\0guest\0"), 502),
        (start_ok(b""), 502),
        (start_ok(b"guest", "AMQPLAIN"), 502),
        (start_ok(b"\5LOGINV", "AMQPLAIN"), 502),
        (start_ok(b"", "AMQPLAIN"), 502),
    ],
)
def test_a_login_that_cannot_be_read_is_refused(guarded: Desk, data: bytes, code: int) -> None:
    """RabbitMQ hangs up without a word."""
    assert code == code_of(in_phase(guarded, STARTING).ask(data))


@pytest.mark.parametrize("mechanism", ["EXTERNAL", "plain", ""])
def test_an_unknown_mechanism_is_hung_up_on(
    desk: Desk, mechanism: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a word, as by RabbitMQ; the log has the reason."""
    caller = in_phase(desk, STARTING)

    assert [] == caller.ask(start_ok(b"\0guest\0guest", mechanism))
    assert caller.connection.is_finished
    assert f"the test: unknown login mechanism '{mechanism}'" in caplog.text


@pytest.mark.parametrize(
    "said",
    [{}, {"capabilities": 5}, {"capabilities": {"connection.blocked": "yes"}}, {"a": {"b": {}}}],
)
def test_what_a_client_says_about_itself_may_be_odd(desk: Desk, said: dict[str, Any]) -> None:
    """A capability is known if it is true."""
    caller = in_phase(desk, STARTING)
    caller.send(method(spec.Connection.StartOk(said, "PLAIN", b"\0guest\0guest")))

    assert TUNING is caller.connection.phase
    assert not caller.connection.knows("connection.blocked")


def test_an_unknown_virtual_host_is_refused(desk: Desk) -> None:
    """530, as in RabbitMQ."""
    (answer,) = in_phase(desk, OPENING).ask(opening("none"))

    assert (530, "NOT_ALLOWED - vhost none not found") == (answer.reply_code, answer.reply_text)


# Tuning


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"frame_max": 0}, "frame_max = 0 octets is higher than the maximum allowed value (131072"),
        ({"frame_max": 1}, "frame_max = 1 octets is lower than the minimum allowed value (4096"),
        ({"frame_max": 4095}, "frame_max = 4095 octets is lower than"),
        ({"frame_max": 131_073}, "frame_max = 131073 octets is higher than"),
        ({"frame_max": 2**32 - 1}, "frame_max = 4294967295 octets is higher than"),
        ({"channel_max": 0}, "channel_max = 0 is higher than the maximum allowed value (2047)"),
        ({"channel_max": 2048}, "channel_max = 2048 is higher than"),
        ({"channel_max": 65_535}, "channel_max = 65535 is higher than"),
    ],
)
def test_limits_beyond_those_of_the_broker_are_hung_up_on(
    desk: Desk, values: dict[str, int], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a word, as by RabbitMQ; 0, which means no limit, is beyond any."""
    caller = in_phase(desk, TUNING)

    assert [] == caller.ask(tune(**values))
    assert caller.connection.is_finished
    assert f"the test: negotiated {words}" in caplog.text


@pytest.mark.parametrize("frame_max", [4096, 5000, 131_072])
def test_no_frame_is_larger_than_agreed(desk: Desk, frame_max: int) -> None:
    """Neither of those that are sent, nor of those that are taken."""
    caller = desk.connect().send(wire.HEADER + login() + tune(frame_max=frame_max) + opening())
    caller.ask(method(spec.Channel.Open(), 1) + method(spec.Queue.Declare(queue="q"), 1))
    data = bytes(range(256)) * 800
    desk.opened().send(PUBLISH + header(len(data)) + body(data[:100_000]) + body(data[100_000:]))

    answers = caller.ask(spec.Basic.Get(queue="q"))

    assert data == b"".join(piece.fragment for piece in answers[2:])
    assert frame_max - 8 == max(len(piece.fragment) for piece in answers[2:])
    assert 501 == code_of(caller.ask(frame(3, 1, bytes(frame_max + 1))))


def test_before_the_tuning_frames_are_small(desk: Desk) -> None:
    """Nobody who has not logged in can fill the memory."""
    refused = in_phase(desk, STARTING)
    assert 501 == code_of(refused.ask(frame(1, 0, bytes(4097))[:7]))


# Heartbeats


def beats(answers: list[Any]) -> int:
    return sum(type(each).__name__ == "Heartbeat" for each in answers)


def test_a_connection_with_heartbeats_gets_them(desk: Desk) -> None:
    """One in each half of the interval, the first at once."""
    caller = desk.opened(heartbeat=10)
    found = 0
    for _ in range(10):
        desk.pass_time(5)
        found += beats(caller.ask(wire.HEARTBEAT))

    assert 10 == found


def test_no_heartbeat_waits_behind_what_is_not_read(desk: Desk) -> None:
    """They would else pile up for as long as the client beats."""
    caller = desk.opened(heartbeat=10)
    caller.take()
    for _ in range(10):
        desk.pass_time(5)
        caller.send(wire.HEARTBEAT)

    assert 1 == beats(caller.take())


def test_a_client_that_misses_two_heartbeats_is_lost(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """It is hung up on without a word, and what it held goes to others at once."""
    caller = desk.opened(heartbeat=10)
    caller.ask(spec.Queue.Declare(queue="q"))
    caller.ask(wire.message("q", b"hello"))
    assert b"hello" == get(caller)
    desk.pass_time(20)
    assert OPEN is caller.connection.phase

    desk.pass_time(5)

    assert caller.connection.is_finished
    assert {"Heartbeat"} >= {type(each).__name__ for each in caller.take()}
    assert "the test: missed heartbeats, timeout: 10s" in caplog.text
    assert b"hello" == get(desk.opened())


@pytest.mark.parametrize("sign", [wire.HEARTBEAT, wire.HEARTBEAT[:1], GET_EMPTY])
def test_any_octet_is_a_sign_of_life(desk: Desk, sign: bytes) -> None:
    """A frame that is on its way may be long."""
    caller = desk.opened(heartbeat=10)
    caller.ask(spec.Queue.Declare(queue="q"))
    for number in range(8):
        desk.pass_time(19)
        caller.send(sign if len(sign) > 1 else wire.HEARTBEAT[number : number + 1])

    assert OPEN is caller.connection.phase


def test_a_client_that_is_not_read_from_is_not_missed(desk: Desk) -> None:
    """While the broker stalls it hears nobody, and after that all get their time."""
    caller = desk.opened(heartbeat=10)
    desk.node.is_stalled = True
    for _ in range(30):
        desk.pass_time(5)
    assert 1 == len(caller.connection.take_output())  # heartbeats do not pile up
    caller.connection.wrote(0)
    desk.node.is_stalled = False

    desk.pass_time(15)
    assert OPEN is caller.connection.phase
    desk.pass_time(10)
    assert caller.connection.is_finished


def test_a_reader_so_slow_that_it_is_not_heard_is_not_missed(desk: Desk) -> None:
    """Its heartbeats wait in its socket."""
    caller = desk.opened(heartbeat=10)
    caller.connection.take_output()
    caller.connection.wrote(ROOM)
    caller.send(wire.HEARTBEAT * (ROOM // 8))
    assert not caller.connection.wants_input
    for _ in range(10):
        desk.pass_time(5)
    assert (OPEN, []) == (caller.connection.phase, caller.connection.take_output())

    caller.connection.wrote(0)
    assert caller.connection.wants_input


# Slow readers


def consuming(desk: Desk, number: int, size: int, **options: Any) -> Caller:
    """Return a client that consumes from a queue with messages, and has read nothing."""
    publisher = desk.opened()
    publisher.ask(spec.Queue.Declare(queue="q"))
    piece = wire.message("q", bytes(size))
    for _ in range(number):
        publisher.send(piece)
    caller = desk.opened(**options)
    caller.send(method(spec.Basic.Consume(queue="q", no_ack=True), 1))
    return caller


def read(caller: Caller, unwritten: int = 0) -> int:
    """Take what was written, and return how many octets that were."""
    size = sum(map(len, caller.connection.take_output()))
    caller.connection.wrote(unwritten)
    return size


def test_a_slow_reader_is_sent_no_more_than_it_takes(desk: Desk) -> None:
    """What waits, waits in the queue, and the reader gets all of it in the end."""
    caller = consuming(desk, 100, 50_000)
    queue = desk.node.vhosts["/"].queues["q"]
    assert 70 < queue.count < 80

    first = read(caller, unwritten=ROOM)
    assert ROOM < first < ROOM + 51_000
    desk.node.finish_turn()
    assert [] == caller.connection.take_output()

    caller.connection.wrote(0)
    sizes = []
    while (size := read(caller)) > 0:
        sizes.append(size)
    assert max(sizes) < ROOM + 51_000
    assert 5_000_000 < first + sum(sizes) < 5_100_000
    assert 0 == queue.count


def test_a_client_that_does_not_read_is_not_heard_either(desk: Desk) -> None:
    """Else what it asks for would fill the memory."""
    publisher = desk.opened()
    publisher.ask(spec.Queue.Declare(queue="q"))
    publisher.send(wire.message("q", bytes(100_000)))
    caller = desk.opened()
    ask = method(spec.Basic.Get(queue="q"), 1) + method(spec.Basic.Nack(0, True), 1)
    for _ in range(1000):
        caller.send(ask)

    total, size = 0, read(caller)
    assert size < ROOM + 101_000
    while size:
        total += size
        size = read(caller)
    assert total > 1000 * 100_000


def test_what_a_client_sends_waits_in_its_socket_while_it_is_not_heard(desk: Desk) -> None:
    """The broker holds one MiB of it, and what one reading of the socket adds."""
    caller = desk.opened()
    caller.connection.take_output()
    caller.connection.wrote(ROOM)
    sent = 0
    while caller.connection.wants_input:
        sent += len(wire.message("q", bytes(60_000)))
        caller.send(wire.message("q", bytes(60_000)))

    assert ROOM <= sent < ROOM + 61_000
    caller.connection.wrote(0)
    assert caller.connection.wants_input


def test_direct_replies_are_dropped_for_who_does_not_read_them(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """No queue holds them, and no alarm concerns them."""
    caller = desk.opened()
    caller.ask(spec.Queue.Declare(queue="requests"))
    caller.ask(spec.Basic.Consume(queue="amq.rabbitmq.reply-to", no_ack=True))
    properties = b"\2\0" + wire.short(b"amq.rabbitmq.reply-to")
    caller.send(method(spec.Basic.Publish(routing_key="requests"), 1) + header(0, properties))
    server = desk.opened()
    (_, request) = server.ask(spec.Basic.Get(queue="requests"))
    reply = wire.message(request.properties.reply_to, bytes(120_000))
    number = REPLY_ROOM // 120_000
    for _ in range(number):
        server.send(reply)
    assert "" == caplog.text

    for _ in range(10):
        server.send(reply)

    assert "the test reads no replies: one is dropped" in caplog.text
    assert number * 120_000 < read(caller) < REPLY_ROOM + 1_000_000
    server.send(reply)
    assert 120_000 < read(caller) < 121_000


# Alarms


def test_an_alarm_blocks_who_publishes(desk: Desk) -> None:
    """It is told when it does, and what it sends from then on waits; others go on."""
    publisher, consumer = desk.opened(), desk.opened()
    consumer.ask(spec.Queue.Declare(queue="q"))
    desk.node.raise_alarm("test", "because")
    assert [] == publisher.take() + consumer.take()

    (blocked,) = publisher.ask(wire.message("q", b"one"))
    assert [] == publisher.ask(wire.message("q", b"two") + method(spec.Basic.Qos(), 1))

    assert (spec.Connection.Blocked, "because") == (type(blocked), blocked.reason)
    assert None is get(consumer)
    desk.node.clear_alarm("test")
    unblocked, *others = publisher.take()
    assert spec.Connection.Unblocked is type(unblocked)
    assert [spec.Basic.QosOk] == [type(each) for each in others]
    assert [b"one", b"two", None] == [get(consumer) for _ in range(3)]


def test_a_client_that_knows_of_no_alarms_is_blocked_without_a_word(desk: Desk) -> None:
    """It did not say that it knows connection.blocked."""
    publisher = desk.opened(capabilities={})
    publisher.ask(spec.Queue.Declare(queue="q"))
    desk.node.raise_alarm("test", "because")

    assert [] == publisher.ask(wire.message("q", b"one") + method(spec.Basic.Qos(), 1))
    desk.node.clear_alarm("test")
    assert [spec.Basic.QosOk] == [type(each) for each in publisher.take()]


def test_publishers_wait_until_all_alarms_are_over(desk: Desk) -> None:
    """The first reason is the one that they are told."""
    publisher = desk.opened()
    desk.node.raise_alarm("one", "first")
    desk.node.raise_alarm("two", "second")
    (blocked,) = publisher.ask(wire.message("q"))
    desk.node.clear_alarm("one")
    desk.node.clear_alarm("one")

    assert ("first", []) == (blocked.reason, publisher.take())
    desk.node.clear_alarm("two")
    assert [spec.Connection.Unblocked] == [type(each) for each in publisher.take()]


def test_a_blocked_client_that_beats_is_not_missed(desk: Desk) -> None:
    """And one that is dead is: its heartbeats are read, though nothing is handled."""
    alive, dead = desk.opened(heartbeat=10), desk.opened(heartbeat=10)
    desk.node.raise_alarm("test", "because")
    for each in (alive, dead):
        each.send(wire.message("q"))
    for _ in range(10):
        alive.send(wire.HEARTBEAT)
        desk.pass_time(5)

    assert (OPEN, CLOSED) == (alive.connection.phase, dead.connection.phase)
    desk.node.clear_alarm("test")
    assert OPEN is alive.connection.phase


def test_a_blocked_client_can_be_closed(desk: Desk) -> None:
    """By whoever runs the broker: its answer is heard."""
    publisher = desk.opened()
    desk.node.raise_alarm("test", "because")
    publisher.ask(wire.message("q"))
    publisher.connection.force_close()

    assert 320 == code_of(publisher.take())
    publisher.send(CLOSE_OK)
    assert publisher.connection.is_finished


def test_messages_beyond_the_limit_block_publishers_until_some_are_gone() -> None:
    """Nobody who publishes for ever without a consumer can fill the memory."""
    desk = Desk(memory_limit=1_000_000)
    publisher, consumer = desk.opened(), desk.opened()
    consumer.ask(spec.Queue.Declare(queue="q"))
    piece = wire.message("q", bytes(10_000))
    while publisher.connection.wants_input:
        publisher.send(piece)
    assert [spec.Connection.Blocked] == [type(each) for each in publisher.take()]
    queue = desk.node.vhosts["/"].queues["q"]
    assert 90 <= queue.count <= 100

    full = queue.count
    while not (answers := publisher.take()):
        assert None is not get(consumer, no_ack=True)
        assert queue.count > 0.89 * full
    # What had waited came in, and was too much again.
    kinds = [type(each) for each in answers]
    assert [spec.Connection.Unblocked, spec.Connection.Blocked] == kinds
    assert full == queue.count


# The end


def holding(desk: Desk) -> Caller:
    """Return a client that holds a message of a shared queue, and an exclusive queue."""
    caller = desk.opened()
    caller.ask(spec.Queue.Declare(queue="q"))
    caller.ask(spec.Queue.Declare(queue="own", exclusive=True))
    caller.send(wire.message("q", b"held"))
    assert b"held" == get(caller)
    return caller


@pytest.mark.parametrize(
    "end",
    [
        lambda caller: caller.ask(CLOSE),
        lambda caller: caller.connection.force_close(),
        lambda caller: caller.connection.lost(),
        lambda caller: caller.ask(frame(1, 0, b"x", end=b"x")),
        lambda caller: caller.ask(CLOSE) and caller.connection.lost(),
    ],
    ids=["client", "broker", "lost", "error", "client, lost"],
)
def test_however_a_connection_ends_others_get_what_it_had(
    desk: Desk, end: Callable[[Caller], object]
) -> None:
    """At once, and its exclusive queues are gone."""
    end(holding(desk))
    other = desk.opened()

    assert b"held" == get(other)
    (answer,) = other.ask(spec.Queue.Declare(queue="own", passive=True))
    assert 404 == answer.reply_code


def test_a_timeout_of_nothing_does_not_keep_the_broker_busy() -> None:
    """It closes the channel at the next look."""
    desk = Desk(consumer_timeout=0)
    caller = holding(desk)
    desk.pass_time(1)

    (answer,) = caller.take()
    assert (spec.Channel.Close, 406) == (type(answer), answer.reply_code)


def begin_circle(caller: Caller) -> None:
    """Publish a message that dies for ever.

    A death by rejection is in the header, so that no rule breaks the circle.
    """
    for queue, other in (("q", "r"), ("r", "q")):
        arguments = {"x-message-ttl": 0, "x-dead-letter-exchange": ""}
        arguments["x-dead-letter-routing-key"] = other
        caller.ask(spec.Queue.Declare(queue=queue, arguments=arguments))
    death = {"queue": fields.encode("s"), "reason": fields.encode("rejected")}
    headers = fields.join({"x-death": fields.array([fields.table(death)])})
    caller.send(method(spec.Basic.Publish(routing_key="q"), 1) + header(0, b"\x20\0" + headers))


def test_a_circle_of_dead_letters_leaves_time_for_others(desk: Desk) -> None:
    """Each turn takes a part of it."""
    caller = desk.opened()
    begin_circle(caller)

    for _ in range(3):
        desk.node.finish_turn()
        assert desk.node.has_more
        assert serves_others(desk)
    for queue in ("q", "r"):
        caller.ask(spec.Queue.Delete(queue=queue))
    assert not desk.node.has_more


def test_a_turn_looks_only_at_virtual_hosts_with_dead_letters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thousand others cost nothing."""
    desk = Desk(vhosts=("a", "/", "b"))
    caller = desk.opened()
    arguments = {"x-message-ttl": 10, "x-dead-letter-exchange": ""}
    arguments["x-dead-letter-routing-key"] = "dead"
    caller.ask(spec.Queue.Declare(queue="q", arguments=arguments))
    caller.ask(spec.Queue.Declare(queue="dead"))
    caller.send(wire.message("q", b"late"))
    looked_at: list[str] = []
    publish = VirtualHost.publish_dead_letters

    def spy(vhost: VirtualHost, limit: int) -> None:
        looked_at.append(vhost.name)
        publish(vhost, limit)

    monkeypatch.setattr(VirtualHost, "publish_dead_letters", spy)
    desk.pass_time(1)
    desk.pass_time(1)

    assert ["/"] == looked_at
    monkeypatch.undo()
    assert b"late" == get(caller, "dead")


def test_dead_letters_of_a_deleted_virtual_host_are_counted_off(desk: Desk) -> None:
    """Those that were not published by then, too."""
    used = desk.node._memory
    begin_circle(desk.opened())
    assert desk.node._memory > used

    desk.node.delete_vhost("/")
    desk.node.finish_turn()

    assert not desk.node.has_more
    assert used == desk.node._memory


def test_a_connection_that_was_lost_is_forgotten(desk: Desk) -> None:
    """Nothing of it stays in the node."""
    caller = holding(desk)
    caller.connection.lost()

    assert [] == desk.node.connections_of()
    assert {} == desk.node.dirty
    assert CLOSED is caller.connection.phase


def test_a_client_that_does_not_answer_close_is_hung_up_on(desk: Desk) -> None:
    """After ten seconds, whatever else it says."""
    caller = desk.opened()
    caller.connection.force_close(541, "INTERNAL")
    assert 541 == code_of(caller.take())
    for _ in range(9):
        desk.pass_time(CLOSE_SECONDS / 10)
        caller.send(method(spec.Basic.Qos(), 1) + wire.HEARTBEAT)
    assert CLOSING is caller.connection.phase

    desk.pass_time(CLOSE_SECONDS / 10)

    assert caller.connection.is_finished
    assert [] == caller.take()


def test_a_connection_is_closed_once(desk: Desk) -> None:
    """Both sides may do it at once."""
    caller = desk.opened()
    caller.connection.force_close()
    caller.connection.force_close()
    answers = caller.ask(CLOSE)

    assert [spec.Connection.Close, spec.Connection.CloseOk] == [type(each) for each in answers]
    assert CLOSING is caller.connection.phase
    caller.send(CLOSE_OK)
    caller.connection.force_close()
    assert ([], CLOSED) == (caller.take(), caller.connection.phase)


def test_one_that_has_not_greeted_is_hung_up_on(desk: Desk) -> None:
    """It could not make anything of connection.close."""
    caller = desk.connect()
    caller.connection.force_close()

    assert ([], CLOSED) == (caller.take(), caller.connection.phase)


@pytest.mark.parametrize("text", ["x" * 300, "é" * 200])
def test_a_text_is_cut_where_a_short_string_ends(desk: Desk, text: str) -> None:
    """And never within a letter."""
    caller = desk.opened()
    caller.connection.force_close(320, text)
    (answer,) = caller.take()

    assert 254 <= len(answer.reply_text.encode()) <= 255
    assert f"CONNECTION_FORCED - {text}".startswith(answer.reply_text)


def test_a_refusal_of_a_name_that_is_no_utf_8_can_be_read(desk: Desk) -> None:
    """Clients decode the text of a close as UTF-8."""
    publish = spec.Basic.Publish(exchange=b"\xff\xfe", routing_key=b"\xff")
    (answer,) = desk.opened().ask(method(publish, 1) + header(0))

    assert (404, "NOT_FOUND - no exchange '??' in vhost '/'") == (
        answer.reply_code,
        answer.reply_text,
    )


def test_an_error_of_the_broker_itself_ends_one_connection(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged with its traceback, the client is told 541, and others are served."""
    caller = desk.opened()
    queues = desk.node.vhosts["/"].queues
    broken: Any = SimpleNamespace(owner=None)
    queues["broken"] = broken
    answers = caller.ask(spec.Basic.Get(queue="broken"))
    del queues["broken"]

    assert 541 == code_of(answers)
    assert "the broker failed on a frame of the test" in caplog.text
    assert "AttributeError" in caplog.text
    assert serves_others(desk)
