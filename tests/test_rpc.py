# SPDX-License-Identifier: MIT
"""Calls: what their callers get in every case, and what travels for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import pika
import pytest

from postage.answering import AnsweredCalls
from postage.errors import (
    ConfigurationError,
    ConnectionLostError,
    PostageError,
    PublishTimeoutError,
    TimeoutError,
    UnroutableError,
)
from postage.generic_application import GenericApplicationExchange
from postage.messaging import (
    Exchange,
    Fingerprint,
    GenericProducer,
    JsonEncoder,
    Message,
    MessageFilter,
    MessageProcessor,
    MessageResult,
    MessageResultError,
    Queue,
    RpcCommand,
    RpcHandler,
)
from postage.microthreads import MicroScheduler, MicroThread, sleep
from tests.nodes import Node
from tests.waiting import wait_until

FINGERPRINT = {
    "name": "tester",
    "type": "application",
    "pid": "4242",
    "host": "box",
    "user": "root",
    "vhost": "/",
}


class Services(Exchange):
    name = "services"


class Client(GenericProducer):
    eks = [(Services, "service")]


class Service(MessageProcessor):
    """Answers in every way there is."""

    def __init__(self, queue: Any, key: str = "service") -> None:
        super().__init__({"name": "service"}, [(Services, [(queue, key)])])
        self.ran: list[Any] = []
        self.go_on = threading.Event()

    @RpcHandler("command", "echo")
    def rpc_echo(self, content: Any, reply_func: Any) -> None:
        self.ran.append(content["parameters"])
        reply_func(content["parameters"])

    @RpcHandler("command", "sum")
    def rpc_sum(self, content: Any, reply_func: Any) -> None:
        reply_func(MessageResult(sum(content["parameters"]), "that was easy"))

    @RpcHandler("command", "refuse")
    def rpc_refuse(self, content: Any, reply_func: Any) -> None:
        reply_func(MessageResultError("no"))

    @RpcHandler("command", "raise")
    def rpc_raise(self, content: Any, reply_func: Any) -> None:
        raise LookupError("not here")

    @RpcHandler("command", "mute")
    def rpc_mute(self, content: Any, reply_func: Any) -> None:
        pass

    @RpcHandler("command", "filtered")
    @MessageFilter(lambda content: content["no such key"])
    def rpc_filtered(self, content: Any, reply_func: Any) -> None:
        reply_func("it got through")

    @RpcHandler("command", "set")
    def rpc_set(self, content: Any, reply_func: Any) -> None:
        reply_func({1, 2})

    @RpcHandler("command", "slow")
    def rpc_slow(self, content: Any, reply_func: Any) -> Generator[Any, Any, None]:
        self.ran.append(content["parameters"])
        yield sleep(content["parameters"])
        reply_func("slow, and sure")

    @RpcHandler("command", "wait", threaded=True)
    def rpc_wait(self, content: Any, reply_func: Any) -> None:
        self.ran.append(content["parameters"])
        self.go_on.wait(30)
        reply_func("waited")


@contextlib.contextmanager
def running(service: Service) -> Iterator[Service]:
    """Run a service in a thread of its own."""
    thread = threading.Thread(target=service.start_consuming)
    thread.start()
    try:
        yield service
    finally:
        service.go_on.set()
        service.stop_consuming()
        thread.join(30)
        service.close()


@pytest.fixture(autouse=True)
def no_queues_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    """Delete the durable queues of a test where the next one finds the same virtual host."""
    yield
    url = os.environ.get("POSTAGE_TEST_URL")
    if url is not None and "broker_url" in request.fixturenames:
        with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
            for name in QUEUES:
                connection.channel().queue_delete(name)


@pytest.fixture
def service(broker_url: str) -> Iterator[Service]:
    with running(Service(Queue("service", exclusive=True))) as service:
        yield service


@pytest.fixture
def client(broker_url: str) -> Iterator[Client]:
    with Client(FINGERPRINT) as client:
        yield client


#: Names that these tests use for queues that outlive them.
QUEUES = ("service", "service.error", "deserted")

Respond = Callable[[Any, pika.BasicProperties, dict[str, Any]], None]


class PikaServer:
    """A service that postage did not write: pika, and what `respond` does with a request.

    Attributes:
        requests: Properties and body of every request.
    """

    def __init__(self, url: str, respond: Respond) -> None:
        self.requests: list[tuple[pika.BasicProperties, dict[str, Any]]] = []
        self._respond = respond
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self._channel = self._connection.channel()
        self._channel.exchange_declare(Services.name, durable=True)
        self.queue = self._channel.queue_declare("", exclusive=True).method.queue
        self._channel.queue_bind(self.queue, Services.name, "service")
        self._channel.basic_consume(self.queue, self._requested, auto_ack=True)
        self._thread = threading.Thread(target=self._channel.start_consuming)

    def __enter__(self) -> PikaServer:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.run(self._channel.stop_consuming)
        self._thread.join(30)
        self._connection.close()

    def run(self, function: Callable[[], Any]) -> None:
        """Run a function in the thread of the server."""
        self._connection.add_callback_threadsafe(function)

    def reply(self, request: pika.BasicProperties, body: bytes, *, correlated: bool = True) -> None:
        """Publish a reply from the thread of the server."""
        correlation_id = request.correlation_id if correlated else None
        properties = pika.BasicProperties(correlation_id=correlation_id)
        self._channel.basic_publish("", str(request.reply_to), body, properties)

    def _requested(self, _channel: Any, _method: Any, properties: Any, body: bytes) -> None:
        self.requests.append((properties, json.loads(body)))
        self._respond(self, properties, self.requests[-1][1])


def silent(_server: Any, _properties: Any, _body: Any) -> None:
    """Respond to nothing."""


def result_body(value: Any) -> bytes:
    return json.dumps(MessageResult(value).body).encode()


def responding(*bodies: bytes) -> Respond:
    """Respond to every request with these bodies."""

    def respond(server: PikaServer, properties: pika.BasicProperties, _body: Any) -> None:
        for body in bodies:
            server.reply(properties, body)

    return respond


def name_and_text(reply: Message) -> tuple[Any, Any]:
    """Return what a reply says that is false."""
    assert not reply
    assert isinstance(reply, MessageResult)
    return reply.value, reply.message


# --------------------------------------------------------------------------- results


@pytest.mark.parametrize("value", ["T", 0, False, None, [], {"a": [1, None]}, "ü"])
def test_a_call_returns_what_the_service_replied(
    service: Service, client: Client, value: Any
) -> None:
    """Every success is true, whatever its value."""
    reply = client.rpc_echo(value)

    assert isinstance(reply, MessageResult)
    assert (True, value, "") == (bool(reply), reply.value, reply.message)


def test_a_result_has_a_message(service: Service, client: Client) -> None:
    """It travels beside the value."""
    reply = client.rpc_sum(1, 2, 3)

    assert (True, 6, "that was easy") == (bool(reply), reply.value, reply.message)
    assert {} == reply.body["fingerprint"]


@pytest.mark.parametrize(
    ("command", "name", "text"),
    [
        ("refuse", None, "no"),
        ("raise", "LookupError", "not here"),
        ("mute", None, "the handler of rpc 'command' 'mute' ended without a reply"),
        ("unheard_of", None, "no handler for rpc 'command' 'unheard_of'"),
    ],
)
def test_a_call_that_fails_in_the_service_is_false(
    service: Service, client: Client, command: str, name: str | None, text: str
) -> None:
    """With 1.2.1 some of these took 150 seconds."""
    assert (name, text) == name_and_text(getattr(client, f"rpc_{command}")())


def test_a_call_that_a_filter_keeps_away_is_false(service: Service, client: Client) -> None:
    """The caller hears why."""
    name, text = name_and_text(client.rpc_filtered())

    assert name is None
    assert text.startswith("filtered: ")


def test_a_reply_that_cannot_be_written_is_an_exception_of_the_handler(
    service: Service, client: Client
) -> None:
    """The caller hears of it."""
    name, text = name_and_text(client.rpc_set())

    assert "EncodingError" == name
    assert "set" in text


def test_the_prefix_of_a_call_is_taken_off_once(service: Service, client: Client) -> None:
    """1.2.1 sent rpc_do_rpc_x as the command do_x."""
    assert "no handler for rpc 'command' 'do_rpc_x'" == client.rpc_do_rpc_x().message


@pytest.mark.parametrize(
    ("args", "kwds", "parameters"),
    [
        ((), {}, {}),
        ((1, 2), {}, [1, 2]),
        ((), {"self": 1, "callable": 2}, {"self": 1, "callable": 2}),
        ((1,), {"k": 2}, {"args": [1], "kwds": {"k": 2}}),
    ],
)
def test_a_call_takes_as_many_arguments_as_you_want(
    service: Service, client: Client, args: Any, kwds: Any, parameters: Any
) -> None:
    """As messages do."""
    assert parameters == client.rpc_echo(*args, **kwds).value


def test_a_builder_makes_the_request(broker_url: str, service: Service) -> None:
    """For rpc_x and for rpc_queue_x."""

    class Builder(Client):
        def build_rpc_total(self, *numbers: int) -> Message:
            return RpcCommand("sum", list(numbers))

    with Builder() as client:
        assert 3 == client.rpc_total(1, 2).value
        (reply,) = client.consume_rpc(client.rpc_queue_total(3, 4))
        assert 7 == reply.value  # type: ignore[attr-defined]


def test_a_builder_of_rpc_queue_makes_a_call_that_blocks(broker_url: str, service: Service) -> None:
    """In 1.2.1 every rpc_queue_x was such a call; where it has a builder, it still is."""

    class Old(Client):
        def build_rpc_queue_length(self, name: str) -> Message:
            return RpcCommand("echo", name)

    with Old() as client:
        assert "letters" == client.rpc_queue_length("letters").value


# ------------------------------------------------------------------------ no reply


def test_a_call_that_no_queue_is_bound_to_is_false_at_once(client: Client) -> None:
    """It took 150 seconds with 1.2.1."""
    before = time.monotonic()
    name, text = name_and_text(client.rpc_echo())
    duration = time.monotonic() - before

    assert "UnroutableError" == name
    assert "no queue is bound to exchange 'services' key 'service'" in text
    assert duration < 1.0


def declare_deserted(url: str, name: str) -> None:
    """Make a queue that nobody consumes, bound as the round robin of an application."""
    with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        exchange = GenericApplicationExchange.name
        channel.exchange_declare(exchange, durable=True)
        channel.queue_declare(name, durable=True)
        channel.queue_bind(name, exchange, f"{name}/rr")


@pytest.mark.parametrize(
    "where",
    [{"_queue": "deserted"}, {"_eks": [(GenericApplicationExchange, "deserted/rr")]}],
)
def test_a_call_to_a_queue_that_nobody_consumes_is_false_soon(
    client: Client, broker_url: str, where: dict[str, Any]
) -> None:
    """A durable queue outlives its service, so the request was routable."""
    declare_deserted(broker_url, "deserted")
    before = time.monotonic()
    name, text = name_and_text(client.rpc_echo(**where))
    duration = time.monotonic() - before

    assert "NoConsumer" == name
    assert "queue 'deserted' exists and nobody consumes it: start the service" == text
    assert duration < 15.0, "the timeout is 30 s, five times"


@pytest.mark.parametrize("queue", [Queue("service", exclusive=True), "service"])
def test_a_service_that_takes_its_time_is_a_consumer(
    client: Client, queue: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The look at its queue finds it. One that is exclusive is looked at once."""
    with running(Service(queue)):
        assert client.rpc_slow(2.5, _queue="service")

    assert caplog.text.count("RESOURCE_LOCKED") <= 1


def test_a_call_that_nobody_answers_says_what_it_waited_for(
    client: Client, broker_url: str
) -> None:
    """The text was empty in 1.2.1."""
    with PikaServer(broker_url, silent):
        reply = client.rpc_echo(_timeout=0.2, _max_retry=1)

    text = "no reply from exchange 'services' key 'service' within 2 times 0.2 s"
    assert ("TimeoutError", text) == name_and_text(reply)


@pytest.mark.parametrize("retries", [0, 3])
def test_a_call_is_repeated_as_often_as_it_says(
    client: Client, broker_url: str, retries: int
) -> None:
    """1.2.1 ignored `_max_retry`. All of the requests are the same message."""
    with PikaServer(broker_url, silent) as server:
        assert not client.rpc_echo("T", _timeout=0.1, _max_retry=retries)
        wait_until(lambda: len(server.requests) == retries + 1)

    first, *others = server.requests
    for properties, body in others:
        assert (first[0].message_id, first[1]) == (properties.message_id, body)
    assert retries == len(others)


def test_the_class_says_how_long_and_how_often(broker_url: str) -> None:
    """A negative timeout, and None, mean that of the class, as in 1.2.1."""

    class Impatient(Client):
        rpc_timeout = 0.5
        max_retry = 1

    with PikaServer(broker_url, silent) as server, Impatient() as client:
        for keywords in ({}, {"_timeout": None, "_max_retry": None}, {"_timeout": -1}):
            _name, text = name_and_text(client.rpc_echo(**keywords))
            assert text.endswith("within 2 times 0.5 s")
        wait_until(lambda: len(server.requests) == 6)


def test_a_timeout_of_zero_is_over_at_once(client: Client, broker_url: str) -> None:
    """As in 1.2.1."""
    with PikaServer(broker_url, silent):
        name, _text = name_and_text(client.rpc_echo(_timeout=0, _max_retry=0))

    assert name in ("TimeoutError", "PublishTimeoutError")


def test_an_instance_runs_a_repeated_request_once(service: Service, client: Client) -> None:
    """While it still runs, and when it is done. 1.2.1 ran it up to five times."""
    assert client.rpc_slow(0.7, _timeout=0.2, _max_retry=20)
    assert [0.7] == service.ran

    first = client.rpc_echo("first", _message_id="the same")
    second = client.rpc_echo("second", _message_id="the same")

    assert ("first", "first") == (first.value, second.value)
    assert [0.7, "first"] == service.ran


def test_a_late_reply_is_dropped(client: Client, broker_url: str) -> None:
    """The next call gets its own."""
    with PikaServer(broker_url, silent) as server:
        assert not client.rpc_late(_timeout=0.1, _max_retry=0)
        wait_until(lambda: len(server.requests) == 1)
        late = server.requests[0][0]

        server._respond = responding(result_body("mine"))
        server.run(lambda: server.reply(late, result_body("late")))
        assert "mine" == client.rpc_echo().value


def test_a_second_reply_is_dropped(client: Client, broker_url: str) -> None:
    """The first one counts."""
    numbers = iter(range(100))

    def twice(server: PikaServer, properties: Any, _body: Any) -> None:
        server.reply(properties, result_body(next(numbers)))
        server.reply(properties, result_body("again"))

    with PikaServer(broker_url, twice):
        assert [0, 1, 2] == [client.rpc_echo().value for _ in range(3)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"[1, 2]",
        b'"text"',
        b"{}",
        b'{"content": null}',
        b'{"content": {"type": "success"}}',
        b'{"content": {"type": "triumph", "value": 1, "message": ""}}',
        b'{"content": {"type": "exception", "message": "no name"}}',
    ],
)
def test_a_malformed_reply_is_an_error(client: Client, broker_url: str, body: bytes) -> None:
    """Some of them raised in 1.2.1."""
    with PikaServer(broker_url, responding(body)):
        name, text = name_and_text(client.rpc_echo())

    assert name is None
    assert text.startswith("Malformed reply")


def test_an_encoder_that_knows_no_decode_error_does_not_break_a_call(broker_url: str) -> None:
    """One of 1.2.1 raises what it likes."""

    class Old(JsonEncoder):
        @classmethod
        def decode(cls, string: Any) -> Any:
            return json.loads(string)

    class OldClient(Client):
        encoder_class = Old

    with PikaServer(broker_url, responding(b"not JSON")), OldClient() as client:
        _name, text = name_and_text(client.rpc_echo())

    assert text.startswith("Malformed reply: Expecting value")


def test_the_reply_keeps_the_fingerprint_of_the_replier(client: Client, broker_url: str) -> None:
    """1.2.1 lost it."""
    result = MessageResult(1)
    result.fingerprint(Fingerprint("replier").as_dict())

    with PikaServer(broker_url, responding(json.dumps(result.body).encode())):
        assert "replier" == client.rpc_echo().body["fingerprint"]["name"]


def test_a_reply_is_logged(
    service: Service, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """By both ends, as is the request, at the level that POSTAGE_DEBUG_MODE shows."""
    caplog.set_level(logging.DEBUG, "postage")
    assert client.rpc_echo("T")

    shown = [(each[0], '"category": "rpc"' in each) for each in caplog.messages if each[1] == " "]
    assert [(">", True), ("<", True), (">", False), ("<", False)] == shown


def test_a_reply_without_a_correlation_id_is_dropped_with_a_warning(
    client: Client, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It names the switch for services that run 1.2.1."""

    def respond(server: PikaServer, properties: Any, _body: Any) -> None:
        server.reply(properties, result_body(1), correlated=False)

    with PikaServer(broker_url, respond):
        name, _text = name_and_text(client.rpc_echo(_timeout=0.3, _max_retry=0))

    assert "TimeoutError" == name
    assert "set POSTAGE_COMPAT=1.2 to call it" in caplog.text


# ------------------------------------------------------------------- what is sent


def test_a_request_says_who_waits_and_how_long(client: Client, broker_url: str) -> None:
    """It is transient, and the broker drops it when nobody waits any more."""
    with PikaServer(broker_url, responding(result_body(1))) as server:
        assert client.rpc_echo("T", _timeout=5, _headers={"tenant": "blue"})

    ((properties, body),) = server.requests
    expected = {
        "type": "command",
        "name": "echo",
        "category": "rpc",
        "version": "2",
        "fingerprint": FINGERPRINT,
        "content": {"parameters": "T"},
        "_reserved": {},
    }
    assert expected == body
    assert ("application/json", 1, "5000", "tester") == (
        properties.content_type,
        properties.delivery_mode,
        properties.expiration,
        properties.app_id,
    )
    assert {"tenant": "blue", "postage-timeout": 5000} == properties.headers
    assert properties.reply_to.startswith("amq.rabbitmq.reply-to.")
    assert properties.message_id and properties.correlation_id and properties.timestamp


def test_a_request_can_be_made_persistent(client: Client, broker_url: str) -> None:
    """For who wants that."""
    with PikaServer(broker_url, responding(result_body(1))) as server:
        assert client.rpc_echo(_persistent=True, _message_id="mine")

    properties = server.requests[0][0]
    assert (2, "mine") == (properties.delivery_mode, properties.message_id)


def test_a_call_goes_to_the_first_pair_only(service: Service, broker_url: str) -> None:
    """As in 1.2.1. Pairs given with the call beat a key, and neither is in the content."""

    class Undecided(GenericProducer):
        eks = [(Services, "service"), (Services, "nobody")]

    pairs = [(Services, "service"), (Services, "nobody")]
    with Undecided() as client:
        assert {} == client.rpc_echo().value
        assert {} == client.rpc_echo(_key="nobody", _eks=pairs).value
        assert not client.rpc_echo(_key="nobody")


# ------------------------------------------------------------------------ waiting


def test_two_hundred_calls_are_in_flight(service: Service, client: Client) -> None:
    """Each gets its own reply."""
    futures = [client.rpc_echo(number, _future=True) for number in range(200)]

    assert list(range(200)) == [future.result(30).value for future in futures]


def test_threads_call_with_one_client(service: Service, client: Client) -> None:
    """Each gets its own reply."""
    wrong: list[Any] = []

    def call(thread: int) -> None:
        for number in range(50):
            if [thread, number] != client.rpc_echo(thread, number).value:
                wrong.append((thread, number))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == wrong
    assert 400 == len(service.ran)


def test_a_future_raises_only_for_its_own_timeout(service: Service, client: Client) -> None:
    """The call goes on. It never raises for what happens to the call."""
    future = client.rpc_wait("w", _future=True)
    lost = client.rpc_echo(_key="nobody", _future=True)

    with pytest.raises(TimeoutError, match=r"no result within 0\.1 seconds"):
        future.result(0.1)
    assert not future.ready()
    service.go_on.set()
    assert "waited" == future.result(30).value
    assert "UnroutableError" == lost.result(30).value


def test_a_call_in_a_coroutine_is_awaited(service: Service, client: Client) -> None:
    """Messages, too."""

    async def main() -> Any:
        sent = await client.message_quiet(_future=True, _mandatory=False)
        one = await client.rpc_echo("one", _future=True)
        others = [client.rpc_echo(number, _future=True) for number in range(20)]
        return sent, one.value, [reply.value for reply in await asyncio.gather(*others)]

    assert (None, "one", list(range(20))) == asyncio.run(main())


def test_blocking_forms_in_a_coroutine_raise(service: Service, client: Client) -> None:
    """They would stop the event loop. What to do instead is said, and nothing is sent."""
    queue = client.rpc_queue_echo()
    pending = client.rpc_wait(_future=True)
    wait_until(lambda: service.ran == [{}, {}])

    async def main() -> None:
        for block in (
            client.rpc_echo,
            client.rpc_queue_echo,
            client.message_echo,
            client.message,
            lambda: client.forward({}),
            lambda: client.consume_rpc(queue),
            pending.result,
        ):
            with pytest.raises(PostageError, match="would block the event loop"):
                block()

    asyncio.run(main())
    service.go_on.set()
    assert client.consume_rpc(queue)
    assert pending.result(30)
    assert [{}, {}] == service.ran


def test_a_call_in_a_microthread_is_yielded(service: Service, client: Client) -> None:
    """Others go on meanwhile."""
    replies: list[Any] = []

    class Asking(MicroThread):
        def main(self) -> Generator[Any, Any, None]:
            yield
            for number in range(5):
                reply = yield client.rpc_echo(number, _future=True)
                replies.append(reply.value)
            lost = yield client.rpc_echo(_key="nobody", _future=True)
            replies.append(lost.value)

    scheduler = MicroScheduler(autoquit=True)
    scheduler.add_microthread(Asking())
    for _ in scheduler.main():
        pass

    assert [0, 1, 2, 3, 4, "UnroutableError"] == replies


def test_a_handler_calls_its_own_component(broker_url: str, client: Client) -> None:
    """A generator handler can: it lets the component answer."""

    class Narcissus(Service):
        @RpcHandler("command", "reflect")
        def rpc_reflect(self, content: Any, reply_func: Any) -> Generator[Any, Any, None]:
            reply = yield client.rpc_echo("me", _future=True)
            reply_func(reply)

    with running(Narcissus(Queue("service", exclusive=True))):
        assert "me" == client.rpc_reflect().value


# --------------------------------------------------------------------- lost connections


def test_a_call_gets_its_reply_although_the_connection_was_lost(
    node: Node, client: Client, broker_url: str
) -> None:
    """It is sent again, and the service does not run it again."""
    with running(Service("service")) as service:
        assert client.rpc_echo("before")
        future = client.rpc_wait("during", _future=True)
        wait_until(lambda: service.ran == ["before", "during"])
        vhost = broker_url.rsplit("/", 1)[1]
        node.close_connections("cut by a test", vhost)
        assert "after" == client.rpc_echo("after").value
        service.go_on.set()

        assert "waited" == future.result(30).value
        assert ["before", "during", "after"] == service.ran


@pytest.mark.parametrize(("retries", "expected"), [(0, "ConnectionLostError"), (1, "TimeoutError")])
def test_a_call_that_was_sent_never_claims_that_it_was_not(
    node: Node, client: Client, retries: int, expected: str
) -> None:
    """The connection does not come back in time, and what the service did is not known."""
    with running(Service(Queue("service", exclusive=True))) as service:
        future = client.rpc_wait("taken", _future=True, _timeout=2, _max_retry=retries)
        wait_until(lambda: service.ran == ["taken"])
        node.kill()
        try:
            name, text = name_and_text(future.result(30))
        finally:
            node.start()

    assert expected == name
    assert "certainly not sent" not in text


@pytest.fixture
def closed_port() -> int:
    """A port that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("compat", [None, "1.2"])
def test_without_a_broker_a_call_is_false_at_its_timeout(
    closed_port: int, compat: str | None
) -> None:
    """Nothing was sent, so there is nothing to repeat."""

    class Compatible(Client):
        pass

    Compatible.compat = compat
    with Compatible(hup={"host": f"127.0.0.1:{closed_port}"}) as client:
        name, text = name_and_text(client.rpc_echo(_timeout=0.3))

    assert "PublishTimeoutError" == name
    assert "certainly not sent" in text
    assert f"127.0.0.1:{closed_port}" in text


def test_without_a_broker_a_reply_queue_is_an_error_at_its_deadline(closed_port: int) -> None:
    """It says whom it asked, and that nothing was sent."""

    class Impatient(Client):
        publish_timeout = 0.3

    with (
        Impatient(hup={"host": f"127.0.0.1:{closed_port}"}) as client,
        pytest.raises(
            PublishTimeoutError, match=f"no reply queue on .*:{closed_port}.*start RabbitMQ"
        ),
    ):
        client.rpc_queue_echo()


def test_a_wrong_password_makes_a_call_false_at_once(broker_url: str) -> None:
    """The text does not show it."""
    with Client(hup={**Client.hup, "password": "hunter2"}) as client:
        name, text = name_and_text(client.rpc_echo())

    assert "ConnectionFailedError" == name
    assert "check user and password" in text
    assert "hunter2" not in text


@pytest.mark.parametrize("shared", [False, True])
def test_a_call_that_is_pending_when_its_client_is_closed_is_false(
    service: Service, broker_url: str, shared: bool
) -> None:
    """Whoever awaits it does not wait for ever, whether or not others use the connection."""
    other = Client()
    if shared:
        assert other.rpc_echo()
    client = Client()

    async def main() -> Message:
        future = client.rpc_wait(_future=True)
        await asyncio.to_thread(wait_until, lambda: len(service.ran) == 1 + shared)
        await asyncio.to_thread(client.close)
        return await asyncio.wait_for(future, 15)

    with closing(other):
        assert "ClosedError" == name_and_text(asyncio.run(main()))[0]


# ------------------------------------------------------------------------ reply queues


def test_replies_of_several_services_are_collected(broker_url: str, client: Client) -> None:
    """A key may lead to many queues. Each reply is also shown to the callback."""
    seen: list[Any] = []
    first = Service(Queue("first", exclusive=True))
    second = Service(Queue("second", exclusive=True))
    with running(first), running(second):
        queue = client.rpc_queue_echo("T")
        replies = client.consume_rpc(queue, result_len=2, callback=seen.append, timeout=30)

    assert ["T", "T"] == [reply.value for reply in replies]  # type: ignore[attr-defined]
    assert [reply.body for reply in replies] == seen
    assert (["T"], ["T"]) == (first.ran, second.ran)


def test_a_call_with_queue_only_returns_its_reply_queue(service: Service, client: Client) -> None:
    """The name of 1.2.1 for rpc_queue_x."""
    queue = client.rpc_echo("T", _queue_only=True)

    assert isinstance(queue, str)
    assert ["T"] == [reply.value for reply in client.consume_rpc(queue)]  # type: ignore[attr-defined]


def test_too_few_replies_are_a_timeout(service: Service, client: Client) -> None:
    """The callback has seen those that came, and the queue is gone."""
    seen: list[Any] = []
    queue = client.rpc_queue_echo("T")

    with pytest.raises(TimeoutError, match=r"1 of 2 replies within 0\.3 s"):
        client.consume_rpc(queue, 2, seen.append, 0.3)
    assert ["T"] == [body["content"]["value"] for body in seen]
    with pytest.raises(ConfigurationError, match="is no reply queue of this producer"):
        client.consume_rpc(queue)


def test_a_malformed_reply_in_a_reply_queue_is_an_error(client: Client, broker_url: str) -> None:
    """As for other calls."""
    with PikaServer(broker_url, responding(b"not JSON", result_body(1))):
        queue = client.rpc_queue_echo()
        first, second = client.consume_rpc(queue, 2)

    assert (False, True) == (bool(first), bool(second))


def test_a_reply_queue_that_nobody_can_answer_is_not_opened(
    node: Node, client: Client, broker_url: str
) -> None:
    """The request was not routable. 1.2.1 returned a name."""
    with pytest.raises(UnroutableError):
        client.rpc_queue_echo()

    wait_until(lambda: [] == queues(node, broker_url))


def queues(node: Node, url: str) -> list[str]:
    vhost = url.rsplit("/", 1)[1]
    return [queue.name for queue in node.queues(vhost)]


def test_a_reply_queue_goes_with_its_producer(
    node: Node, service: Service, broker_url: str
) -> None:
    """Even if others go on using the connection."""
    with Client() as other, Client() as client:
        assert other.rpc_echo()
        client.rpc_queue_echo()
        client.close()
        wait_until(lambda: queues(node, broker_url) == ["service"])


def test_a_reply_queue_that_is_lost_is_an_error_at_once(
    node: Node, service: Service, client: Client, broker_url: str
) -> None:
    """It goes with its connection, and nothing can come any more."""
    queue = client.rpc_queue_wait()
    wait_until(lambda: service.ran)
    vhost = broker_url.rsplit("/", 1)[1]
    node.close_connections("cut by a test", vhost)

    with pytest.raises(ConnectionLostError):
        client.consume_rpc(queue, timeout=30)


# --------------------------------------------------------------------- services of 1.2.1


def answer_like_1_2_1(server: PikaServer, properties: Any, body: dict[str, Any]) -> None:
    """Send the parameters back, without any property."""
    value = MessageResult(body["content"]["parameters"])
    server._channel.basic_publish("", properties.reply_to, json.dumps(value.body))


def test_a_service_of_1_2_1_can_be_called(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt has a queue of its own, since no correlation id comes back."""
    monkeypatch.setenv("POSTAGE_COMPAT", "1.2")
    with PikaServer(broker_url, answer_like_1_2_1) as server, Client() as client:
        assert "T" == client.rpc_echo("T").value
        futures = [client.rpc_echo(number, _future=True) for number in range(20)]
        assert list(range(20)) == [future.result(30).value for future in futures]

    reply_queues = {properties.reply_to for properties, _body in server.requests}
    assert 21 == len(reply_queues)
    assert all(queue.startswith("amq.gen-") for queue in reply_queues)


def test_a_class_can_say_that_its_services_run_1_2_1(broker_url: str) -> None:
    """Others of the process are not concerned."""

    class Compatible(Client):
        compat = "1.2"

    with PikaServer(broker_url, answer_like_1_2_1), Compatible() as client, Client() as other:
        assert "T" == client.rpc_echo("T").value
        assert not other.rpc_echo("T", _timeout=0.2, _max_retry=0)


def test_each_attempt_to_call_1_2_1_has_its_queue_and_leaves_none(
    node: Node, broker_url: str
) -> None:
    """Whether the call ends with a reply or with none."""

    class Compatible(Client):
        compat = "1.2"

    with Compatible() as client:
        with PikaServer(broker_url, silent) as server:
            reply = client.rpc_echo(_timeout=0.3, _max_retry=2)
            assert "TimeoutError" == name_and_text(reply)[0]
            assert 3 == len({properties.reply_to for properties, _body in server.requests})
            assert 1 == len({properties.message_id for properties, _body in server.requests})
        assert "UnroutableError" == name_and_text(client.rpc_echo())[0]
        wait_until(lambda: queues(node, broker_url) == [])


def test_a_call_to_1_2_1_that_ends_before_its_queue_is_open_leaves_none(
    node: Node, broker_url: str
) -> None:
    """And sends no request then, which nobody would wait for."""

    class Compatible(Client):
        compat = "1.2"

    with PikaServer(broker_url, silent) as server, Compatible() as client:
        assert not client.rpc_echo(_timeout=0.2, _max_retry=0)
        for number in range(50):
            assert not client.rpc_echo(_timeout=0.0001 * number, _max_retry=0)
        wait_until(lambda: queues(node, broker_url) == [server.queue])


def test_a_call_to_1_2_1_survives_the_loss_of_its_connection(
    node: Node, broker_url: str
) -> None:
    """Its queue is gone, so it is sent again with another one."""

    class Compatible(Client):
        compat = "1.2"

    with Compatible() as client, running(Service("service")) as service:
        future = client.rpc_wait("T", _future=True)
        wait_until(lambda: service.ran == ["T"])
        vhost = broker_url.rsplit("/", 1)[1]
        node.close_connections("cut by a test", vhost)
        assert client.rpc_echo("after")
        service.go_on.set()

        assert "waited" == future.result(30).value


# ---------------------------------------------------------------------- answered calls


def request(message_id: str | None) -> pika.BasicProperties:
    return pika.BasicProperties(message_id=message_id, reply_to="caller")


def test_an_answered_call_is_known() -> None:
    """While it runs, and afterwards with its replies."""
    calls = AnsweredCalls()
    assert calls.repeated(request("1")) is None

    running_entry = calls.repeated(request("1"))
    assert running_entry is not None
    assert not running_entry.done
    running_entry.waiting.append(request("1"))
    assert [request("1")] == calls.add("1", b"reply")

    calls.finish("1", settled=True)
    entry = calls.repeated(request("1"))
    assert entry is not None
    assert (True, [b"reply"], []) == (entry.done, entry.replies, entry.waiting)


def test_a_request_without_an_id_is_never_known() -> None:
    """1.2.1 sends none."""
    calls = AnsweredCalls()

    assert [None, None] == [calls.repeated(request(None)) for _ in range(2)]
    assert [] == calls.add(None, b"reply")
    calls.finish(None, settled=True)
    calls.finish("never heard of", settled=True)


def test_only_the_latest_answered_calls_are_known() -> None:
    """Memory is bounded, in number and in bytes."""
    calls = AnsweredCalls(size=2, limit=10)
    for number in range(3):
        calls.repeated(request(str(number)))
        calls.add(str(number), b"x" * (11 if number == 2 else 10))
        calls.finish(str(number), settled=True)

    assert [True, False, True] == [calls.repeated(request(str(n))) is None for n in (0, 1, 2)]


def test_a_call_that_could_not_be_settled_may_run_again() -> None:
    """It is forgotten."""
    calls = AnsweredCalls()
    calls.repeated(request("1"))
    calls.finish("1", settled=False)

    assert calls.repeated(request("1")) is None
