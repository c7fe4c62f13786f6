# SPDX-License-Identifier: MIT
"""A connection comes up, comes back, and ends."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import frame, spec

from postage.errors import (
    ChannelClosedError,
    ClosedError,
    ConnectionFailedError,
    ConnectionLostError,
    ExchangeMismatchError,
    HubReentered,
    TransportError,
)
from postage.settings import Settings
from postage.topology import ExchangeSpec
from postage.transport import connection as connections
from postage.transport import hub as hubs
from postage.transport.connection import Connection, Event, State
from postage.transport.conversation import declare_exchange
from tests.nodes import Node
from tests.rabbitmq_node import RabbitNode
from tests.transport.proxy import Proxy
from tests.waiting import wait_until

#: Seconds after which an answer that has to come counts as missing.
DEADLINE = 30.0

#: Where each event leads from each state, in the order of `Event`: attempt, opened, lost, blocked,
#: unblocked, close. A dash stands for what cannot happen.
TABLE = {
    "disconnected": "connecting   -        -            -        -        closed",
    "connecting":   "-            ready    disconnected -        -        draining",
    "ready":        "-            -        disconnected blocked  ready    draining",
    "blocked":      "-            -        disconnected blocked  ready    draining",
    "draining":     "-            draining closed       draining draining draining",
    "closed":       "-            -        -            -        -        -",
}  # fmt: skip
CELLS = [
    (State(before), event, None if after == "-" else State(after))
    for before, row in TABLE.items()
    for event, after in zip(Event, row.split(), strict=True)
]

NOWHERE = Settings((("127.0.0.1", 1),), vhost="/", user="guest", password="guest")


@pytest.fixture
def settings(broker_url: str) -> Settings:
    return Settings.from_environment()


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    with Proxy(broker_url) as proxy:
        yield proxy


@contextlib.contextmanager
def using(settings: Settings, purpose: str = "publish", grace: float = 5.0) -> Iterator[Connection]:
    connection = connections.acquire(settings, purpose)
    try:
        yield connection
    finally:
        connections.release(connection, grace)


def settings_of(url: str) -> Settings:
    return Settings.from_environment({"POSTAGE_URL": url})


def at(port: int) -> Settings:
    return replace(NOWHERE, hosts=(("127.0.0.1", port),))


def declaring(channel: Any) -> Any:
    """A script: make a queue, and return its name."""
    answer = yield partial(channel.queue_declare, queue="", exclusive=True)
    return answer.method.queue


def open_up(connection: Connection) -> None:
    connection.ask(declaring, DEADLINE, "open")


def wait_for(connection: Connection, condition: Callable[[], object]) -> None:
    assert connection.hub.wait(lambda: bool(condition()), DEADLINE)


@contextlib.contextmanager
def listener(serve: Callable[[socket.socket], object] = lambda client: None) -> Iterator[int]:
    """A port that hands each client to `serve()`, one after the other, and yields its number."""

    def run() -> None:
        with contextlib.suppress(OSError):  # shut down
            while True:
                client, _address = server.accept()
                clients.append(client)
                with contextlib.suppress(OSError):
                    serve(client)

    clients: list[socket.socket] = []
    server = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        thread.join()
        for each in (server, *clients):
            each.close()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --------------------------------------------------------------------- the state machine


@pytest.mark.parametrize(("before", "event", "after"), CELLS)
def test_each_event_leads_from_each_state_where_the_table_says(
    before: State, event: Event, after: State | None
) -> None:
    """Every legal event moves a connection, and every other one is refused."""
    connection = Connection(SimpleNamespace(on_broken=[], wait=None), NOWHERE, "publish")  # type: ignore[arg-type]
    connection.state = before
    if after is None:
        with pytest.raises(AssertionError, match=f"{event} cannot happen"):
            connection._move(event)
        assert before is connection.state
    else:
        assert after is connection._move(event)
        assert after is connection.state


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_a_pause_is_within_its_bounds(failures: int, chance: float) -> None:
    """Full jitter: from nothing to the longest pause, and no more after a thousand rounds."""
    assert 0 <= connections.backoff(failures, chance) <= connections.BACKOFF_LONGEST


def test_pauses_double_up_to_the_longest() -> None:
    """All components are back some seconds after their broker, not half a minute."""
    pauses = [connections.backoff(failures, 1.0) for failures in range(1, 9)]
    assert [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0] == pauses


@pytest.mark.parametrize("version", ["3.10.0", "3.10.8", "3.13.7", "4.0.1", "4.3.0", "10.0", "odd"])
def test_a_broker_that_is_new_enough_is_not_refused(version: str) -> None:
    """Versions are compared as numbers, and one that cannot be read is given a chance."""
    assert None is connections._too_old({"product": "RabbitMQ", "version": version})


@pytest.mark.parametrize("version", ["2.8.7", "3.8.34", "3.9.29", b"3.9.0"])
def test_a_broker_that_is_too_old_is_named(version: str | bytes) -> None:
    """The reason names the version and what is needed."""
    reason = connections._too_old({"product": b"RabbitMQ", "version": version})
    text = version.decode() if isinstance(version, bytes) else version
    assert reason is not None
    assert reason.startswith(f"RabbitMQ {text} is too old: postage needs 3.10")


@pytest.mark.parametrize("properties", [None, {}, {"product": "postage", "version": "0.1"}])
def test_the_versions_of_other_brokers_say_nothing(properties: dict[str, str] | None) -> None:
    """Only RabbitMQ's versions are known."""
    assert None is connections._too_old(properties)


# ------------------------------------------------------------------------------ coming up


def test_a_connection_is_made_when_it_is_first_asked(settings: Settings) -> None:
    """Acquiring costs nothing; the first question connects."""
    with using(settings) as connection:
        assert State.DISCONNECTED is connection.state
        assert connection.ask(declaring, DEADLINE, "declare").startswith("amq.gen-")
        assert State.READY is connection.state


def test_a_connection_shows_what_it_is_and_no_password(node: Node) -> None:
    """The text form is for logs."""
    settings = replace(settings_of(node.url), password="secret")
    url = f"amqp://guest@127.0.0.1:{node.port}/%2F"
    with using(settings) as connection:
        assert f"<Connection {url} to publish [disconnected]>" == repr(connection)


def test_the_broker_shows_what_a_connection_is_for(
    node: Node, settings: Settings
) -> None:
    """An operator finds the program, and which of its connections it is."""
    with using(settings, "consume") as connection:
        open_up(connection)
        names = [each.name for each in node.connections(settings.vhost)]
        assert [f"postage consume pid {os.getpid()}"] == names


def test_the_next_host_is_tried_at_once(settings: Settings) -> None:
    """Of several hosts, those that refuse are passed over, in whichever order they come."""
    hosts = tuple(("127.0.0.1", unused_port()) for _ in range(3))
    with using(replace(settings, hosts=(*hosts, *settings.hosts))) as connection:
        open_up(connection)
        assert State.READY is connection.state
        assert connection.last_error is None


def test_a_wrong_password_fails_fast(settings: Settings) -> None:
    """The error names the user and the virtual host, and shows no password."""
    settings = replace(settings, user="someone", password="letmein")
    with using(settings) as connection, pytest.raises(ConnectionFailedError) as caught:
        connection.ask(declaring, None, "declare")
    text = str(caught.value)
    assert text.startswith(f"no connection to {settings}: the broker refused the login (ACCESS_")
    assert text.endswith("); check user and password")
    assert f"//someone@127.0.0.1:{settings.hosts[0][1]}/{settings.vhost}" in str(caught.value)
    assert "letmein" not in str(caught.value)


def test_a_missing_virtual_host_fails_fast(settings: Settings) -> None:
    """The error names the virtual host."""
    settings = replace(settings, vhost="nowhere")
    with using(settings) as connection, pytest.raises(ConnectionFailedError) as caught:
        connection.ask(declaring, None, "declare")
    assert (
        f"no connection to {settings}: the broker refused the virtual host "
        "(NOT_ALLOWED - vhost nowhere not found); check its name and the user's permissions"
    ) == str(caught.value)


def test_a_virtual_host_without_permissions_fails_fast(
    rabbitmq_node: RabbitNode, settings: Settings
) -> None:
    """The error has the broker's words."""
    rabbitmq_node.ctl("add_user", "stranger", "pass")
    settings = replace(settings, user="stranger", password="pass")
    try:
        with using(settings) as connection, pytest.raises(ConnectionFailedError) as caught:
            connection.ask(declaring, None, "declare")
    finally:
        rabbitmq_node.ctl("delete_user", "stranger")
    words = f"NOT_ALLOWED - access to vhost '{settings.vhost}' refused for user 'stranger'"
    assert f"({words});" in str(caught.value)


def test_a_virtual_host_that_is_full_is_waited_for(
    rabbitmq_node: RabbitNode, settings: Settings
) -> None:
    """Its limit of connections is no mistake of ours, and may allow more at any time."""
    lodger = Lodger()
    limits = ("set_vhost_limits", "-p", settings.vhost)
    rabbitmq_node.ctl(*limits, '{"max-connections": 0}')
    with using(settings) as connection:
        connection.hub.call(lambda: connection.join(lodger))
        wait_for(connection, lambda: "connection limit (0) is reached" in connection.trouble())
        rabbitmq_node.ctl(*limits, '{"max-connections": -1}')
        wait_for(connection, lambda: "connected" in lodger.heard)
        assert "refused" not in lodger.heard


def hang_up_in_the_middle_of_the_login(client: socket.socket) -> None:
    """Do as a broker that dies, or a balancer that loses it."""
    client.recv(4096)
    client.sendall(frame.Method(0, spec.Connection.Start(0, 9, {}, "PLAIN", "en_US")).marshal())
    client.recv(4096)
    client.shutdown(socket.SHUT_RDWR)


def test_a_login_without_an_answer_is_tried_again() -> None:
    """Only what the broker says is a refusal, not that it hangs up."""
    lodger = Lodger()
    with listener(hang_up_in_the_middle_of_the_login) as port, using(at(port)) as connection:
        connection.hub.call(lambda: connection.join(lodger))
        wait_for(connection, lambda: len(lodger.heard) >= 2)
        assert "refused" not in lodger.heard
        assert "in the middle of the login" in connection.trouble()


class Lodger:
    """A tenant that notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def connected(self, amqp: pika.SelectConnection) -> None:
        self.heard.append("connected")

    def disconnected(self, error: TransportError) -> None:
        self.heard.append(type(error))

    def refused(self, error: ConnectionFailedError) -> None:
        self.heard.append("refused")

    def blocked(self, blocked: bool) -> None:
        self.heard.append(blocked)


def test_a_wrong_password_is_told_to_the_tenants(settings: Settings) -> None:
    """Who waits for a connection learns that waiting is in vain."""
    lodger = Lodger()
    with using(replace(settings, password="letmein")) as connection:
        connection.hub.call(lambda: connection.join(lodger))
        wait_for(connection, lambda: "refused" in lodger.heard)
        assert [ConnectionFailedError, "refused"] == lodger.heard[:2]


def test_a_password_that_was_right_before_is_tried_on(
    node: Node, settings: Settings
) -> None:
    """A broker that comes back without its users yet is an outage, not a mistake of ours."""
    lodger = Lodger()
    node.add_user("someone", "pass", settings.vhost)
    try:
        with using(replace(settings, user="someone", password="pass")) as connection:
            connection.hub.call(lambda: connection.join(lodger))
            wait_for(connection, lambda: lodger.heard)
            node.change_password("someone", "other")
            node.close_connections("test", settings.vhost)
            wait_for(connection, lambda: ConnectionFailedError in lodger.heard)
            node.change_password("someone", "pass")
            wait_for(connection, lambda: "connected" in lodger.heard[1:])
            assert "refused" not in lodger.heard
    finally:
        node.delete_user("someone")


def speak_like_an_old_broker(client: socket.socket) -> None:
    """Answer the beginning of AMQP, as RabbitMQ 3.9 does."""
    properties = {"product": "RabbitMQ", "version": "3.9.29", "capabilities": {}}
    for answer in (
        spec.Connection.Start(0, 9, properties, "PLAIN", "en_US"),
        spec.Connection.Tune(2047, 131_072, 0),
        spec.Connection.OpenOk(""),
    ):
        client.recv(4096)
        client.sendall(frame.Method(0, answer).marshal())


def test_a_broker_that_is_too_old_is_refused_with_the_reason() -> None:
    """The error is there at once, and says which version there is and which is needed."""
    with listener(speak_like_an_old_broker) as port, using(at(port)) as connection:
        for _ in range(2):
            with pytest.raises(ConnectionFailedError, match=r"3\.9\.29 is too old"):
                connection.ask(declaring, DEADLINE, "declare")
        assert not connection.is_open
        assert 0 == connection.losses


def test_nobody_is_let_onto_a_broker_that_is_too_old() -> None:
    """A tenant is told that it is refused, and never that there is a connection."""
    lodger = Lodger()
    with listener(speak_like_an_old_broker) as port, using(at(port)) as connection:
        connection.hub.call(lambda: connection.join(lodger))
        wait_for(connection, lambda: "refused" in lodger.heard)
        assert "connected" not in lodger.heard


def test_a_question_that_nobody_answers_in_time_fails() -> None:
    """The deadline counts the time without a connection, and the error says what is wrong."""
    with using(at(unused_port())) as connection:
        with pytest.raises(ConnectionFailedError) as caught:
            connection.ask(declaring, 0.3, "declare orders")
        start = f"declare orders: no connection to {connection.settings} within 0.3 s: nothing "
        assert str(caught.value).startswith(start)
        assert "nothing listens there" in connection.trouble()


def test_a_host_that_never_answers_is_given_up() -> None:
    """An attempt is limited, and the error says that nothing came."""
    with listener() as port, using(replace(at(port), connect_timeout=0.2)) as connection:
        with pytest.raises(ConnectionFailedError):
            connection.ask(declaring, 0.1, "declare")
        wait_for(connection, lambda: "did not answer in time" in connection.trouble())


def test_a_question_that_cannot_be_answered_in_time_fails(proxy: Proxy) -> None:
    """A broker that falls silent does not hold a question for longer than it wants to wait."""
    with using(settings_of(proxy.url)) as connection:
        open_up(connection)
        proxy.hold_answers()
        with pytest.raises(ConnectionFailedError, match=r"did not answer within 0\.2 s"):
            connection.ask(declaring, 0.2, "declare")
        proxy.release_answers()


def test_a_question_in_a_callback_of_the_loop_is_refused() -> None:
    """It would wait for the loop that runs it."""
    errors: list[Exception] = []

    def ask() -> None:
        try:
            connection.ask(declaring, 1, "declare")
        except HubReentered as error:
            errors.append(error)

    with using(NOWHERE) as connection:
        connection.hub.call(ask)
        wait_for(connection, lambda: errors)


def test_a_refused_question_says_what_the_script_says(settings: Settings) -> None:
    """The script hears that its channel was closed, and its own error is the answer."""
    with using(settings) as connection:
        first = ExchangeSpec("letters", "direct")
        connection.ask(lambda channel: declare_exchange(channel, first), DEADLINE, "declare")
        other = ExchangeSpec("letters", "fanout")
        with pytest.raises(ExchangeMismatchError, match="declare exchange 'letters'"):
            connection.ask(lambda channel: declare_exchange(channel, other), DEADLINE, "declare")
        assert 0 == connection.losses


def test_a_script_may_go_on_after_a_refusal(settings: Settings) -> None:
    """A script that catches the refusal decides what the answer is."""

    def script(channel: Any) -> Any:
        try:
            yield partial(channel.queue_declare, queue="nothing", passive=True)
        except ChannelClosedError as error:
            return error.code

    with using(settings) as connection:
        assert 404 == connection.ask(script, DEADLINE, "look")


def test_a_question_that_cannot_be_written_fails_at_once(settings: Settings) -> None:
    """Asking it again and again, on one channel after the other, would not help."""

    def script(channel: Any) -> Any:
        yield partial(channel.queue_declare, queue="q" * 256)

    with using(settings) as connection:
        with pytest.raises(TransportError) as caught:
            connection.ask(script, DEADLINE, "declare")
        assert not isinstance(caught.value, ConnectionFailedError)
        assert "ShortStringTooLong" in str(caught.value)


#: Nobody knows this type: RabbitMQ closes the connection over it (503), not the channel.
STRANGE = ExchangeSpec("strange", "x-nobody-knows-this")


def test_a_question_that_costs_the_connection_is_asked_twice_and_fails(settings: Settings) -> None:
    """The error names what was attempted and what the broker says, long before the deadline."""
    with using(settings) as connection:
        with pytest.raises(ConnectionLostError, match=r"declare exchange 'strange'.*503") as caught:
            connection.ask(lambda channel: declare_exchange(channel, STRANGE), DEADLINE, "ask")
        assert 503 == caught.value.code
        assert 2 == connection.losses
        open_up(connection)


def test_the_innocent_are_answered_while_others_cost_the_connection(settings: Settings) -> None:
    """Who was asking at that moment is asked again alone, and on the next connection once more."""
    answers: dict[str, TransportError | None] = {}

    def done(name: str, _result: Any, error: TransportError | None) -> None:
        answers[name] = error

    def ask_all() -> None:
        for number in range(6):
            script = declaring if number % 2 else lambda channel: declare_exchange(channel, STRANGE)
            connection.probe(script, partial(done, f"{number}"), DEADLINE)

    with using(settings) as connection:
        open_up(connection)
        connection.hub.call(ask_all)
        wait_for(connection, lambda: len(answers) == 6)
        guilty = [ConnectionLostError, type(None)] * 3
        assert guilty == [type(answers[f"{number}"]) for number in range(6)]
        assert 4 == connection.losses


def test_a_connection_that_goes_for_another_reason_is_nobodys_fault(
    settings: Settings, node: Node
) -> None:
    """The question is asked again as often as it takes."""
    rounds: list[int] = []

    def script(channel: Any) -> Any:
        rounds.append(1)
        if len(rounds) < 4:
            with ThreadPoolExecutor() as pool:
                pool.submit(node.close_connections, "on purpose").result(DEADLINE)
        return (yield from declaring(channel))

    with using(settings) as connection:
        connection.ask(script, DEADLINE, "declare")
        assert 3 == connection.losses


def test_many_threads_may_ask_at_once(settings: Settings) -> None:
    """Each gets the answer to its own question."""

    def script(name: str, channel: Any) -> Any:
        yield partial(channel.queue_declare, queue=name, durable=True)
        answer = yield partial(channel.queue_declare, queue=name, passive=True)
        return answer.method.queue

    names = [f"box-{number}" for number in range(64)]
    with using(settings) as connection, ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(connection.ask, partial(script, name), DEADLINE, "declare")
            for name in names
        ]
        assert names == [answer.result() for answer in answers]


def test_a_setting_that_pika_refuses_is_reported() -> None:
    """It is no connection that failed, but it is told in the same way."""
    refused = pytest.raises(ConnectionFailedError, match="heartbeat")
    with using(replace(NOWHERE, heartbeat=-1)) as connection, refused:
        connection.ask(declaring, 0.2, "declare")


def test_a_broker_without_tls_is_reported(settings: Settings) -> None:
    """It is refused at once, and the error names the way out."""
    refused = pytest.raises(ConnectionFailedError, match="it speaks no TLS there; use its port")
    with using(replace(settings, tls=True)) as connection, refused:
        connection.ask(declaring, None, "declare")


def test_questions_leave_no_channel_behind(node: Node, settings: Settings) -> None:
    """The channel of each question is closed after the answer, also after a refusal."""

    def refused(channel: Any) -> Any:
        yield partial(channel.queue_declare, queue="nothing", passive=True)

    with using(settings) as connection:
        for _ in range(3):
            open_up(connection)
            with pytest.raises(ChannelClosedError):
                connection.ask(refused, DEADLINE, "look")
        wait_until(lambda: [0] == [each.channels for each in node.connections(settings.vhost)])


# --------------------------------------------------------------------------- coming back


@pytest.mark.parametrize("how", ["closed by the broker", "cut"])
def test_a_lost_connection_comes_back(
    node: Node, proxy: Proxy, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A tenant is told that it went and that it is there again; the log, once each."""
    lodger = Lodger()
    settings = settings_of(proxy.url)
    with using(settings) as connection, caplog.at_level(logging.INFO):
        connection.hub.call(lambda: connection.join(lodger))
        wait_for(connection, lambda: lodger.heard)
        if how == "cut":
            proxy.cut()
        else:
            node.close_connections("weeding", settings.vhost)
        wait_for(connection, lambda: len(lodger.heard) >= 3)
        assert ["connected", ConnectionLostError, "connected"] == lodger.heard
        assert 1 == connection.losses
    ours = [each for each in caplog.records if each.name == connections.__name__]
    assert ["WARNING", "INFO"] == [each.levelname for each in ours]
    assert ours[0].getMessage().endswith("trying again until it works")
    if how != "cut":
        assert "320 CONNECTION_FORCED - weeding" in ours[0].getMessage()
    assert f"connected to {settings} again" == ours[1].getMessage()


def test_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """However many attempts fail while it lasts."""
    attempts: list[Any] = []
    lodger = Lodger()
    lodger.disconnected = attempts.append  # type: ignore[method-assign]
    with using(at(unused_port())) as connection:
        connection.hub.call(lambda: connection.join(lodger))
        wait_for(connection, lambda: len(attempts) >= 3)
    ours = [each for each in caplog.records if each.name == connections.__name__]
    assert ["WARNING"] == [each.levelname for each in ours]


def test_a_broker_that_was_killed_is_found_again(
    node: Node, settings: Settings
) -> None:
    """However long it takes until it is back."""
    with using(settings) as connection:
        open_up(connection)
        node.kill()
        wait_for(connection, lambda: isinstance(connection.last_error, ConnectionFailedError))
        node.start()
        connection.ask(declaring, 2 * DEADLINE, "declare")
        assert 1 == connection.losses


@pytest.mark.embedded  # on RabbitMQ it takes long, and shows the same
@pytest.mark.slow
def test_a_frozen_broker_is_noticed(node: Node, settings: Settings) -> None:
    """Nothing is closed and nothing answers: only the heartbeats tell."""
    with using(replace(settings, heartbeat=1)) as connection:
        open_up(connection)
        node.suspend()
        try:
            wait_for(connection, lambda: connection.losses)
        finally:
            node.resume()
        open_up(connection)


def test_a_question_during_an_outage_is_answered_after_it(proxy: Proxy) -> None:
    """A question outlives the connection on which it was asked, and is asked again."""
    runs: list[object] = []
    outage = contextlib.ExitStack()

    def script(channel: Any) -> Any:
        runs.append(channel)
        if len(runs) == 1:
            outage.enter_context(proxy.outage())
        yield from declaring(channel)
        return "answer"

    with using(settings_of(proxy.url)) as connection, ThreadPoolExecutor() as pool, outage:
        answer = pool.submit(connection.ask, script, DEADLINE, "declare")
        wait_until(lambda: isinstance(connection.last_error, ConnectionFailedError))
        outage.close()
        assert "answer" == answer.result()
        assert 2 == len(runs)


def test_a_question_that_expired_during_an_outage_is_not_asked_any_more(proxy: Proxy) -> None:
    """Who asked without waiting hears of it when there is a connection again."""
    runs: list[object] = []
    errors: list[TransportError | None] = []

    def script(channel: Any) -> Any:
        runs.append(channel)
        yield from declaring(channel)

    with using(settings_of(proxy.url)) as connection:
        open_up(connection)
        with proxy.outage():
            wait_for(connection, lambda: connection.losses)
            connection.hub.call(
                lambda: connection.probe(script, lambda _, error: errors.append(error), 0.1)
            )
            connection.hub.wait(lambda: False, 0.2)
        wait_for(connection, lambda: errors)
        assert [ConnectionFailedError] == [type(error) for error in errors]
        assert [] == runs


def test_the_pauses_begin_small_again_after_a_stable_time(proxy: Proxy) -> None:
    """A connection that lasted owes nothing to the outage before it."""
    with using(settings_of(proxy.url)) as connection:
        open_up(connection)
        connection._rounds = 5
        proxy.cut()
        wait_for(connection, lambda: connection.losses and connection.is_open)
        assert 6 == connection._rounds
        connection._ready_since -= connections.STABLE
        proxy.cut()
        wait_for(connection, lambda: connection.losses == 2 and connection.is_open)
        assert 1 == connection._rounds


def test_an_exchange_is_forgotten_with_its_connection(proxy: Proxy) -> None:
    """It may have been deleted during the outage, so it is declared anew."""
    exchange = ExchangeSpec("letters")
    done: list[Any] = []
    with using(settings_of(proxy.url)) as connection:
        connection.hub.call(
            lambda: connection.declare(exchange, lambda *outcome: done.append(outcome), None)
        )
        wait_for(connection, lambda: done)
        assert [(None, None)] == done
        assert connection.knows(exchange)
        proxy.cut()
        wait_for(connection, lambda: connection.losses)
        assert not connection.knows(exchange)
        assert connection.knows(ExchangeSpec(""))


def test_a_mismatching_exchange_can_be_adopted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """POSTAGE_ON_MISMATCH=adopt uses an exchange as it is, and says so."""
    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adopt")
    done: list[Any] = []
    with using(settings) as connection:
        direct, fanout = (ExchangeSpec("letters", kind) for kind in ("direct", "fanout"))
        connection.ask(lambda channel: declare_exchange(channel, direct), DEADLINE, "declare")
        connection.hub.call(
            lambda: connection.declare(fanout, lambda *outcome: done.append(outcome), None)
        )
        wait_for(connection, lambda: done)
        assert [(None, None)] == done
        assert connection.knows(fanout)
    assert "declare exchange 'letters' (fanout, durable)" in caplog.text
    assert "used as it is" in caplog.text


def test_an_aborted_connection_is_gone_at_once_and_comes_back(
    node: Node, settings: Settings
) -> None:
    """`abort()` uses a private call of pika; this fails if pika changes it."""
    lodger = Lodger()
    with using(settings) as connection:
        connection.hub.call(lambda: connection.join(lodger))
        wait_for(connection, lambda: lodger.heard)
        connection.hub.call(lambda: connection.abort(OSError("as if the cable was cut")))
        wait_for(connection, lambda: len(lodger.heard) == 3)
        assert ["connected", ConnectionLostError, "connected"] == lodger.heard
        assert 1 == connection.losses
    words = "client unexpectedly closed TCP connection"
    wait_until(lambda: words in node.log_tail(), message="a line in the broker's log")


def test_an_attempt_can_be_aborted() -> None:
    """The private call of pika works before the connection is open, too."""
    with listener() as port, using(at(port)) as connection:
        connection.hub.call(connection._connect_soon)
        wait_for(connection, lambda: connection.state is State.CONNECTING)
        connection.hub.call(lambda: connection.abort(OSError("enough")))
        wait_for(connection, lambda: connection.last_error)
        assert isinstance(connection.last_error, ConnectionFailedError)


def test_an_interrupted_loop_begins_with_new_connections(settings: Settings) -> None:
    """After Ctrl-C in the middle of pika nobody knows what was parsed or written."""
    lodger = Lodger()

    def interrupt() -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        connection.hub.call_later(0.01, interrupt)  # the guard steps aside soon

    with using(settings) as connection:
        connection.hub.call(lambda: connection.join(lodger))
        wait_for(connection, lambda: lodger.heard)
        with pytest.raises(KeyboardInterrupt):
            connection.hub.wait(
                lambda: False, DEADLINE, first=lambda: connection.hub.call_later(0, interrupt)
            )
        wait_for(connection, lambda: len(lodger.heard) == 3)
        assert ["connected", ConnectionLostError, "connected"] == lodger.heard
        open_up(connection)


# ------------------------------------------------------------------------------ blocked


def publish(connection: Connection, queue: str) -> None:
    """Publish without waiting: RabbitMQ speaks of an alarm only to those who publish."""
    assert connection.amqp is not None
    connection.amqp.channel(on_open_callback=lambda channel: channel.basic_publish("", queue, b""))


def test_an_alarm_is_told_to_the_tenants_and_so_is_its_end(node: Node, settings: Settings) -> None:
    """A connection that publishes under an alarm is blocked, and open all the same."""
    lodger = Lodger()
    with using(settings) as connection:
        connection.hub.call(lambda: connection.join(lodger))
        wait_for(connection, lambda: lodger.heard)
        with node.memory_alarm():
            connection.hub.call(lambda: publish(connection, "nobody"))
            wait_for(connection, lambda: connection.state is State.BLOCKED)
            assert connection.is_open
            assert "alarm" in connection.trouble()
            # A question that goes unanswered says why.
            with pytest.raises(ConnectionFailedError, match="an alarm of the broker blocks"):
                connection.ask(declaring, 0.2, "declare")
        wait_for(connection, lambda: connection.state is State.READY)
        assert ["connected", True, False] == lodger.heard


def test_a_blocked_connection_is_dropped_when_its_grace_is_over(
    node: Node, settings: Settings
) -> None:
    """A broker under an alarm does not answer a close, so nobody may wait for it for long."""
    connection = connections.acquire(settings, "publish")
    open_up(connection)
    with node.memory_alarm():
        connection.hub.call(lambda: publish(connection, "nobody"))
        wait_for(connection, lambda: connection.state is State.BLOCKED)
        assert not connections.release(connection, grace=0.2)
    assert State.CLOSED is connection.state


# ------------------------------------------------------------------------------- the end


def test_a_close_tells_whether_the_broker_agreed(settings: Settings) -> None:
    """True means that all that was written before was taken."""
    connection = connections.acquire(settings, "publish")
    open_up(connection)
    assert connections.release(connection)
    assert State.CLOSED is connection.state


def test_a_close_that_nobody_answers_ends_after_its_grace(proxy: Proxy) -> None:
    """The socket is dropped then, and nobody claims that the broker agreed."""
    connection = connections.acquire(settings_of(proxy.url), "publish")
    open_up(connection)
    proxy.hold_answers()
    assert not connections.release(connection, grace=0.2)
    assert State.CLOSED is connection.state


def test_a_connection_that_was_aborted_does_not_close_with_consent(settings: Settings) -> None:
    """What was written before the abort may be lost, so the close must not deny it."""
    connection = connections.acquire(settings, "publish")
    open_up(connection)
    connection.hub.post(lambda: connection.abort(OSError("cut")))
    assert not connections.release(connection)


def test_a_connection_that_was_never_made_closes_at_once() -> None:
    """There is nobody who could disagree."""
    assert connections.release(connections.acquire(NOWHERE, "publish"))


def test_a_close_wins_over_the_pause_between_two_attempts() -> None:
    """Nobody waits for a pause to end, and no attempt follows."""
    connection = connections.acquire(at(unused_port()), "publish")
    with pytest.raises(ConnectionFailedError):
        connection.ask(declaring, 0.1, "declare")
    wait_for(connection, lambda: connection.last_error)
    connections.release(connection)
    assert State.CLOSED is connection.state


def test_a_close_wins_over_an_attempt() -> None:
    """A host that accepts and never answers does not hold anybody."""
    with listener() as port:
        connection = connections.acquire(at(port), "publish")
        connection.hub.call(connection._connect_soon)
        wait_for(connection, lambda: connection.state is State.CONNECTING)
        assert not connections.release(connection, grace=DEADLINE)
        assert State.CLOSED is connection.state


def test_two_threads_may_close_a_connection(proxy: Proxy) -> None:
    """Both learn how it ended, and neither waits in vain."""
    connection = connections.acquire(settings_of(proxy.url), "publish")
    open_up(connection)
    proxy.hold_answers()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(connection.close, DEADLINE)
        wait_until(lambda: connection.state is State.DRAINING)
        second = pool.submit(connections.release, connection, DEADLINE)
        wait_until(lambda: connection._clean._callbacks)
        proxy.release_answers()
        assert [True, True] == [first.result(DEADLINE), second.result(DEADLINE)]


def test_a_closed_connection_answers_nothing(settings: Settings) -> None:
    """Questions that wait, and those that come later, fail."""
    errors: list[TransportError | None] = []
    with using(settings) as other:  # keeps the hub
        connection = connections.acquire(replace(settings, user="other"), "publish")
        other.hub.post(lambda: connection.probe(declaring, lambda _, error: errors.append(error)))
        connections.release(connection)
        with pytest.raises(ClosedError):
            connection.ask(declaring, DEADLINE, "declare")
        assert [ClosedError] == [type(error) for error in errors]
        assert not connection.close()


def test_tenants_hear_of_the_close(settings: Settings) -> None:
    """What they wait for will not come."""
    lodger = Lodger()
    connection = connections.acquire(settings, "publish")
    connection.hub.call(lambda: connection.join(lodger))
    wait_for(connection, lambda: lodger.heard)
    connections.release(connection)
    assert ["connected", ClosedError] == lodger.heard


def test_a_tenant_that_left_hears_nothing_more(proxy: Proxy) -> None:
    """And may leave twice."""
    lodger = Lodger()
    with using(settings_of(proxy.url)) as connection:
        connection.hub.call(lambda: connection.join(lodger))
        wait_for(connection, lambda: lodger.heard)
        connection.hub.call(lambda: connection.leave(lodger))
        connection.hub.call(lambda: connection.leave(lodger))
        proxy.cut()
        wait_for(connection, lambda: connection.losses and connection.is_open)
        assert ["connected"] == lodger.heard


# ------------------------------------------------------------------------ shared and counted


def test_equal_settings_share_a_connection_until_the_last_user_goes(settings: Settings) -> None:
    """The last release ends the connection, the loop and its guard thread."""
    first = connections.acquire(settings, "publish")
    second = connections.acquire(replace(settings), "publish")
    other = connections.acquire(settings, "consume")
    open_up(first)
    assert first is second
    assert first is not other
    assert connections.release(first)
    assert State.READY is first.state
    assert connections.release(second)
    assert State.CLOSED is first.state
    assert first.hub is hubs.current()
    assert connections.release(other)
    assert None is hubs.current()
    assert "postage-guard" not in [thread.name for thread in threading.enumerate()]


def test_a_connection_that_was_released_is_made_anew(settings: Settings) -> None:
    """A program may close everything and begin again."""
    for _ in range(3):
        with using(settings) as connection:
            open_up(connection)


def test_all_connections_can_be_closed_whoever_uses_them(settings: Settings) -> None:
    """What is released afterwards is gone already."""
    some = [
        connections.acquire(settings, "publish"),
        connections.acquire(settings, "publish"),
        connections.acquire(settings, "consume"),
    ]
    for connection in some:
        open_up(connection)
    assert connections.close_all()
    assert [State.CLOSED] * 3 == [connection.state for connection in some]
    assert None is hubs.current()
    assert [False] * 3 == [connections.release(connection) for connection in some]
    assert connections.close_all()


def test_what_a_connection_remembers_is_bounded(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Declarations for one message each would pile up for as long as it lasts."""
    monkeypatch.setattr(connections, "KNOWN_LIMIT", 10)
    connection = connections.acquire(Settings.from_environment(), "publish")
    try:
        for number in range(25):
            spec = ExchangeSpec(f"news-{number}", "direct")
            declared: list[object] = []
            connection.hub.call(
                lambda spec=spec, declared=declared: connection.declare(
                    spec, lambda _result, error: declared.append(error), 30.0
                )
            )
            wait_for(connection, lambda declared=declared: declared)
            assert [None] == declared
            assert connection.knows(spec)
            assert len(connection._declared) <= 10
    finally:
        connections.release(connection)
