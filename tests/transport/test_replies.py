# SPDX-License-Identifier: MIT
"""A reply reaches the call that waits for it, and nobody else."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pika
import pytest

from postage.encoders import JsonEncoder
from postage.errors import ConnectionLostError, TransportError
from postage.messages import MessageResult
from postage.rpc import Caller, Reply, Request, encoded
from postage.settings import Settings
from postage.topology import DefaultExchange, ExchangeSpec
from postage.transport import connection as connections
from postage.transport.connection import Connection
from postage.transport.hub import Hub
from postage.transport.publisher import DIRECT_REPLY_TO, Fate, Publisher, Publishing
from postage.transport.replies import ReplyQueue, ReplyStream
from tests.nodes import Node
from tests.rabbitmq_node import RabbitNode
from tests.transport.proxy import Proxy
from tests.waiting import wait_until

#: Seconds after which what has to come counts as missing.
DEADLINE = 30.0

DEFAULT = DefaultExchange.spec()


class Call:
    """A caller that notes what it hears."""

    def __init__(self, due: float = math.inf) -> None:
        self.due = due
        self.rung = 0
        self.replies: list[bytes] = []
        self.deaf = 0

    def ring(self, now: float) -> None:
        self.rung += 1
        self.due = math.inf

    def replied(self, body: bytes) -> None:
        self.replies.append(body)

    def deafened(self) -> None:
        self.deaf += 1


class Client:
    """A publisher that listens, for as long as its ``with`` block lasts."""

    def __init__(self, settings: Settings) -> None:
        self.connection = connections.acquire(settings, "publish")
        self.stream = ReplyStream()
        self.publisher = Publisher(self.connection, self.stream)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.publisher.close(5.0)
        connections.release(self.connection)

    def wait_for(self, condition: Callable[[], object]) -> None:
        assert self.connection.hub.wait(lambda: bool(condition()), DEADLINE)

    def make(self, key: str, correlation_id: str | None, exchange: ExchangeSpec) -> Publishing:
        return Publishing(
            exchange,
            key,
            b"request",
            pika.BasicProperties(reply_to=DIRECT_REPLY_TO, correlation_id=correlation_id),
            mandatory=True,
            confirm=True,
            deadline=time.monotonic() + DEADLINE,
            settled=lambda publishing: None,
            wants_reply=True,
        )

    def call(self, queue: str, correlation_id: str | None) -> Call:
        """Send a request, and return the call that waits for its reply."""
        call, publishing = Call(), self.make(queue, correlation_id, DEFAULT)

        def start() -> None:
            if correlation_id is not None:
                self.stream.add(correlation_id, call)
            self.publisher.send([publishing])

        self.connection.hub.call(start)
        return call


class Server:
    """A program that takes requests from a queue and answers them when it is told to."""

    def __init__(self, url: str, queue: str) -> None:
        self._queue = queue
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self._connection.channel()
        self.channel.confirm_delivery()
        self.channel.queue_declare(queue, durable=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_error: object) -> None:
        self._connection.close()

    def take(self, count: int = 1) -> list[Any]:
        """Return the properties of that many requests."""
        found: list[Any] = []

        def look() -> bool:
            method, properties, _body = self.channel.basic_get(self._queue, auto_ack=True)
            if method is not None:
                found.append(properties)
            return len(found) == count

        wait_until(look)
        return found

    def answer(self, request: Any, body: bytes, correlate: bool = True) -> None:
        correlation_id = request.correlation_id if correlate else None
        properties = pika.BasicProperties(correlation_id=correlation_id)
        self.channel.basic_publish("", request.reply_to, body, properties)


@pytest.fixture
def settings(broker_url: str) -> Settings:
    return Settings.from_environment()


@pytest.fixture
def server(broker_url: str) -> Iterator[Server]:
    with Server(broker_url, "service") as server:
        yield server


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as client:
        yield client


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    with Proxy(broker_url) as proxy:
        yield proxy


@pytest.fixture
def far_client(proxy: Proxy) -> Iterator[Client]:
    """A client whose network the test commands."""
    with Client(Settings.from_environment({"POSTAGE_URL": proxy.url})) as client:
        yield client


def props(correlation_id: str | None) -> pika.BasicProperties:
    return pika.BasicProperties(correlation_id=correlation_id)


# ------------------------------------------------------------------------ the reply stream


def test_a_reply_goes_to_the_call_with_its_id() -> None:
    """And to no other."""
    stream, one, two = ReplyStream(), Call(), Call()
    stream.add("1", one)
    stream.add("2", two)
    stream.heard(props("2"), b"second")
    stream.heard(props("1"), b"first")
    assert ([b"first"], [b"second"]) == (one.replies, two.replies)
    assert "<ReplyStream [2 pending]>" == repr(stream)


@pytest.mark.parametrize("correlation_id", ["1", "unheard of", ""])
def test_a_reply_that_nobody_waits_for_is_dropped(
    correlation_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is late, or comes twice: no reason for alarm."""
    stream, call = ReplyStream(), Call()
    stream.add("1", call)
    stream.remove("1")
    stream.remove("1")
    with caplog.at_level(logging.DEBUG):
        stream.heard(props(correlation_id), b"late")
    assert [] == call.replies
    assert 0 == len(stream)
    assert ["DEBUG"] == [record.levelname for record in caplog.records]


def test_a_reply_without_an_id_names_the_switch(caplog: pytest.LogCaptureFixture) -> None:
    """Only a service that runs Postage 1.2.1 sends such, and there is a way to call it."""
    stream, call = ReplyStream(), Call()
    stream.add("1", call)
    stream.heard(props(None), b"whose?")
    assert [] == call.replies
    assert "set POSTAGE_COMPAT=1.2" in caplog.text


def test_every_call_hears_that_the_channel_is_gone() -> None:
    """Also if one of them gives up over it."""
    stream = ReplyStream()

    class Quitter(Call):
        def deafened(self) -> None:
            super().deafened()
            stream.remove("1")

    calls = [Quitter(), Call(), Call()]
    for number, call in enumerate(calls, 1):
        stream.add(f"{number}", call)
    stream.deafened()
    assert [1, 1, 1] == [call.deaf for call in calls]
    assert 2 == len(stream)


def test_replies_may_come_in_any_order(client: Client, server: Server) -> None:
    """Many calls are in flight on one channel."""
    calls = [client.call("service", f"{number}") for number in range(50)]
    for request in reversed(server.take(50)):
        server.answer(request, request.correlation_id.encode())
    client.wait_for(lambda: all(call.replies for call in calls))
    assert [[b"%d" % number] for number in range(50)] == [call.replies for call in calls]


def test_a_late_reply_does_no_harm(
    client: Client, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The channel goes on, and the next call gets its own reply."""
    late = client.call("service", "1")
    [request] = server.take()
    removed: list[bool] = []
    client.connection.hub.call(lambda: removed.append(client.stream.remove("1") is None))
    client.wait_for(lambda: removed)
    server.answer(request, b"late")
    server.answer(request, b"whose?", correlate=False)
    client.wait_for(lambda: "set POSTAGE_COMPAT=1.2" in caplog.text)
    call = client.call("service", "2")
    server.answer(*server.take(), b"in time")
    client.wait_for(lambda: call.replies)
    assert ([], [b"in time"]) == (late.replies, call.replies)


def test_two_clients_of_one_connection_hear_their_own_replies(
    settings: Settings, server: Server
) -> None:
    """An address belongs to a channel, even if the ids are the same."""
    with Client(settings) as one, Client(settings) as two:
        calls = [one.call("service", "1"), two.call("service", "1")]
        for number, request in enumerate(server.take(2)):
            server.answer(request, b"%d" % number)
        one.wait_for(lambda: all(call.replies for call in calls))
        assert [b"0", b"1"] == sorted(call.replies[0] for call in calls)


def test_a_channel_that_published_before_can_listen_later(client: Client, server: Server) -> None:
    """The consumer of the replies is there before the first request, and only then."""
    plain = client.make("service", None, DEFAULT)
    plain.wants_reply, plain.properties = False, pika.BasicProperties()
    client.connection.hub.call(lambda: client.publisher.send([plain]))
    server.take()
    call = client.call("service", "1")
    server.answer(*server.take(), b"reply")
    client.wait_for(lambda: call.replies)


def test_a_call_hears_once_that_its_reply_cannot_come(
    far_client: Client, proxy: Proxy, server: Server
) -> None:
    """The address went with the channel; the next request has another one."""
    call = far_client.call("service", "1")
    [request] = server.take()
    far_client.wait_for(lambda: not far_client.publisher.outstanding)
    proxy.cut()
    far_client.wait_for(lambda: call.deaf)
    far_client.wait_for(lambda: far_client.connection.is_open)
    other = far_client.call("service", "2")
    [later] = server.take()
    assert request.reply_to != later.reply_to
    server.answer(later, b"reply")
    far_client.wait_for(lambda: other.replies)
    assert (1, 0) == (call.deaf, other.deaf)


def test_a_call_hears_of_the_loss_of_its_channel_alone(client: Client, server: Server) -> None:
    """A publish by the same producer may have closed it."""
    call = client.call("service", "1")
    server.take()
    client.wait_for(lambda: not client.publisher.outstanding)
    odd = client.make("service", None, DEFAULT)
    odd.wants_reply, odd.properties = False, pika.BasicProperties(expiration="soon")
    client.connection.hub.call(lambda: client.publisher.send([odd]))
    client.wait_for(lambda: call.deaf)
    assert Fate.NACKED is odd.fate
    assert 0 == client.connection.losses


def test_a_request_in_doubt_is_sent_again_with_an_address_that_works(
    far_client: Client, proxy: Proxy, server: Server
) -> None:
    """Its reply comes over the new channel, with the same correlation id."""
    warm_up = far_client.call("service", "0")
    server.answer(*server.take(), b"warm")
    far_client.wait_for(lambda: warm_up.replies and not far_client.publisher.outstanding)
    proxy.hold_answers()
    call = far_client.call("service", "1")
    [first] = server.take()
    proxy.cut()
    proxy.release_answers()
    [second] = server.take()
    assert ("1", "1") == (first.correlation_id, second.correlation_id)
    assert first.reply_to != second.reply_to
    server.answer(second, b"reply")
    far_client.wait_for(lambda: call.replies)


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_pending_call_survives_the_loss_of_its_channel(
    far_client: Client, proxy: Proxy, server: Server, confirmed: bool
) -> None:
    """It is sent again, with the same message id, whether the first request was taken or not."""
    hub = far_client.connection.hub
    properties = {"message_id": "17", "delivery_mode": 1}
    request = Request(DEFAULT, "service", b"{}", properties, timeout=DEADLINE, max_retry=1)
    reply = Reply(hub.wait, hub.nudge, JsonEncoder().decode)
    caller = Caller(far_client.publisher, far_client.stream, request, reply)
    if not confirmed:
        far_client.connection.ask(no_question, DEADLINE, "connect")
        warm_up = far_client.call("service", "0")
        server.answer(*server.take(), b"warm")
        far_client.wait_for(lambda: warm_up.replies and not far_client.publisher.outstanding)
        proxy.hold_answers()
    hub.call(caller.start)
    [first] = server.take()
    if confirmed:
        far_client.wait_for(lambda: not far_client.publisher.outstanding)
    proxy.cut()
    proxy.release_answers()
    [second] = server.take()
    assert ("17", "17") == (first.message_id, second.message_id)
    server.answer(second, encoded(JsonEncoder(), MessageResult(5).body))
    assert 5 == reply.result(DEADLINE).value
    assert (0 if confirmed else 1) == len(far_client.stream)  # nobody removed the other call


def no_question(_channel: Any) -> Any:
    return
    yield


# ------------------------------------------------------------------------- the reply queue


class Mailbox:
    """A reply queue, and what it tells."""

    def __init__(self, connection: Connection) -> None:
        self.opened: list[str] = []
        self.lost: list[TransportError] = []
        self.heard: list[bytes] = []
        self.queue = ReplyQueue(connection, self.opened.append, self.lost.append)
        self.queue.on_reply = self.heard.append


def mailbox(client: Client) -> Mailbox:
    """Open a reply queue, and wait until it is consumed."""
    boxes: list[Mailbox] = []
    client.connection.ask(no_question, DEADLINE, "connect")
    client.connection.hub.call(lambda: boxes.append(Mailbox(client.connection)))
    client.wait_for(lambda: boxes and boxes[0].opened)
    return boxes[0]


def exists(client: Client, queue: str) -> bool:
    def script(channel: Any) -> Any:
        yield partial(channel.queue_declare, queue=queue, passive=True)

    try:
        client.connection.ask(script, DEADLINE, "look")
    except TransportError:
        return False
    return True


def test_a_reply_queue_hears_what_is_sent_to_it(client: Client, server: Server) -> None:
    """With or without a correlation id, as 1.2.1 answers."""
    box = mailbox(client)
    assert [box.queue.name] == box.opened
    assert box.queue.name.startswith("amq.gen-")
    request = pika.BasicProperties(reply_to=box.queue.name)
    for number in range(3):
        server.answer(request, b"%d" % number)
    client.wait_for(lambda: len(box.heard) == 3)
    assert [b"0", b"1", b"2"] == box.heard == list(box.queue.replies)
    assert None is box.queue.error


def test_a_reply_queue_goes_when_it_is_closed(client: Client) -> None:
    """And does not call that a loss."""
    box = mailbox(client)
    assert exists(client, box.queue.name)
    client.connection.hub.call(box.queue.close)
    client.connection.hub.call(box.queue.close)
    wait_until(lambda: not exists(client, box.queue.name))
    assert [] == box.lost


def test_a_reply_queue_that_is_closed_early_is_never_opened(node: Node, client: Client) -> None:
    """The call is over, and must not be sent any more; no queue and no channel stays behind."""
    client.connection.ask(no_question, DEADLINE, "connect")
    boxes: list[Mailbox] = []

    def hurry() -> None:
        boxes.append(Mailbox(client.connection))
        boxes[0].queue.close()

    client.connection.hub.call(hurry)
    # Later boxes open behind it, so it would be open by then.
    later = mailbox(client)
    assert [] == boxes[0].opened
    assert [] == boxes[0].lost
    client.connection.hub.call(later.queue.close)
    vhost = client.connection.settings.vhost

    wait_until(lambda: [] == node.queues(vhost))
    wait_until(lambda: [0] == [each.channels for each in node.connections(vhost)])


def test_a_reply_queue_goes_with_its_connection(far_client: Client, proxy: Proxy) -> None:
    """And tells it once."""
    box = mailbox(far_client)
    proxy.cut()
    far_client.wait_for(lambda: box.lost)
    assert [ConnectionLostError] == [type(error) for error in box.lost]
    assert box.lost[0] is box.queue.error


def test_a_reply_queue_that_may_not_be_declared_is_lost(
    rabbitmq_node: RabbitNode, settings: Settings
) -> None:
    """With the broker's words."""
    rabbitmq_node.ctl("add_user", "caller", "pass")
    rabbitmq_node.ctl("set_permissions", "-p", settings.vhost, "caller", "", ".*", ".*")
    try:
        with Client(replace(settings, user="caller", password="pass")) as client:
            boxes: list[Mailbox] = []
            client.connection.ask(no_question, DEADLINE, "connect")
            client.connection.hub.call(lambda: boxes.append(Mailbox(client.connection)))
            client.wait_for(lambda: boxes and boxes[0].lost)
            assert "403 ACCESS_REFUSED" in str(boxes[0].lost[0])
            assert [] == boxes[0].opened
    finally:
        rabbitmq_node.ctl("delete_user", "caller")


def test_without_a_connection_there_is_no_reply_queue() -> None:
    """Whoever wants one has to wait for the connection first."""
    connection = connections.acquire(
        Settings((("127.0.0.1", 1),), "/", "guest", "guest"), "publish"
    )
    try:
        with pytest.raises(ConnectionLostError, match="no connection for a reply queue"):
            Mailbox(connection)
    finally:
        connections.release(connection)


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_call_that_must_not_run_twice_ends_with_the_loss_of_its_channel(
    far_client: Client, proxy: Proxy, server: Server, confirmed: bool
) -> None:
    """`max_retry` is 0: its request is not sent again, whether it was taken or not."""
    hub = far_client.connection.hub
    request = Request(DEFAULT, "service", b"{}", {}, timeout=DEADLINE, max_retry=0)
    reply = Reply(hub.wait, hub.nudge, JsonEncoder().decode)
    caller = Caller(far_client.publisher, far_client.stream, request, reply)
    warm_up = far_client.call("service", "0")
    server.answer(*server.take(), b"warm")
    far_client.wait_for(lambda: warm_up.replies and not far_client.publisher.outstanding)
    if not confirmed:
        proxy.hold_answers()
    hub.call(caller.start)
    server.take()
    if confirmed:
        far_client.wait_for(lambda: not far_client.publisher.outstanding)
    proxy.cut()
    proxy.release_answers()
    result = reply.result(DEADLINE)
    assert not result
    assert "ConnectionLostError" == result.value
    assert "the service may have done it" in result.message
    other = far_client.call("service", "2")
    [next_request] = server.take()  # and no copy of the one before
    assert "2" == next_request.correlation_id
    server.answer(next_request, b"reply")
    far_client.wait_for(lambda: other.replies)


# ----------------------------------------------------------------------- one alarm for all


def test_calls_in_flight_share_one_timer() -> None:
    """A call neither sets a timer of its own nor cancels one, however many are in flight."""
    stream = ReplyStream()
    made: list[float] = []
    timers = types.SimpleNamespace(
        call_later=lambda seconds, _ring: made.append(seconds) or "timer",
        cancel=lambda _timer: made.append(0.0),
    )
    for number in range(1000):
        caller = Call(time.monotonic() + 30.0 + number)
        stream.add(str(number), caller)
        stream.remind(timers, caller.due)  # type: ignore[arg-type]
    for number in range(1000):
        stream.remove(str(number))
    assert 1 == len(made)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with contextlib.closing(Hub()) as hub:
        yield hub


def test_a_call_with_less_time_than_those_before_is_rung_first(hub: Hub) -> None:
    """The alarm is set anew for it, and then for the next one."""
    stream = ReplyStream()
    now = time.monotonic()
    late, soon, sooner = Call(now + 3600.0), Call(now + 0.02), Call(now + 0.01)
    for name, caller in {"late": late, "soon": soon, "sooner": sooner}.items():
        stream.add(name, caller)
        hub.call(partial(stream.remind, hub, caller.due))
    assert hub.wait(lambda: soon.rung == 1, DEADLINE)
    assert (0, 1, 1) == (late.rung, soon.rung, sooner.rung)
