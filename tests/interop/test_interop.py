# SPDX-License-Identifier: MIT
"""Programs of Postage 1.2.1, under Python 2.7 and pika 0.9.13, and programs of ours understand
each other, on a real RabbitMQ.

The programs of `programs_27` run on both versions by the same text, as real processes.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pika
import pytest

from postage import messaging
from postage.errors import QueueMismatchError
from postage.generic_application import GenericApplication
from tests.interop.installation import Installation
from tests.programs import Program
from tests.waiting import wait_until

pytestmark = pytest.mark.interop

SEVEN_KEYS = {"type", "name", "category", "version", "fingerprint", "content", "_reserved"}

#: The fingerprint that the speaker gives itself.
SPEAKER = {
    "name": "speaker",
    "type": "application",
    "pid": "4242",
    "host": "box",
    "user": "root",
    "vhost": "/",
}


# ------------------------------------------------------------------------------ scaffold


@pytest.fixture(autouse=True)
def no_compat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compatible but what a test makes so."""
    monkeypatch.delenv("POSTAGE_COMPAT", raising=False)


@pytest.fixture
def compat(monkeypatch: pytest.MonkeyPatch) -> None:
    """POSTAGE_COMPAT=1.2, in this process."""
    monkeypatch.setenv("POSTAGE_COMPAT", "1.2")


@pytest.fixture
def name() -> str:
    """The name of an exchange and of a queue that no other test uses."""
    return f"interop-{uuid.uuid4().hex[:8]}"


@pytest.fixture(params=["1.2.1 to ours", "ours to 1.2.1"])
def two_ways(
    request: pytest.FixtureRequest, original: Installation, ours: Installation
) -> tuple[Installation, Installation]:
    """Who begins, and who answers: both versions in both roles."""
    return (original, ours) if request.param == "1.2.1 to ours" else (ours, original)


def told(program: Program, word: str) -> list[Any]:
    """Return what a program told so far under a word."""
    prefix = word + " "
    return [json.loads(line[len(prefix) :]) for line in program.lines if line.startswith(prefix)]


def wait_told(program: Program, word: str, count: int = 1) -> list[Any]:
    """Wait until a program told something that many times."""
    wait_until(
        lambda: len(told(program, word)) >= count,
        message=f"{program!r} to tell {word!r} {count} times",
    )
    return told(program, word)


@contextlib.contextmanager
def component(installation: Installation, *arguments: str, compat: bool = False) -> Iterator[Any]:
    """Run a component that is ready."""
    with installation.run("component", *arguments, compat=compat) as program:
        program.wait_for_line("ready")
        yield program


def run_to_its_end(
    installation: Installation, program: str, *arguments: str, compat: bool = False
) -> Program:
    """Run a program, and return it when it has ended well."""
    with installation.run(program, *arguments, compat=compat) as running:
        assert running.wait() == 0, running.output
    return running


def wait_for_consumers(url: str, queue: str, count: int) -> None:
    """Wait until a queue has that many consumers: a component is ready a little earlier."""
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        wait_until(
            lambda: channel.queue_declare(queue, passive=True).method.consumer_count >= count
        )


def producer_for(name: str, **attributes: Any) -> Any:
    """Return a producer of ours, in this process."""
    exchange = type("Exchange", (messaging.Exchange,), {"name": name})
    attributes = {"eks": [(exchange, "key")], "rpc_timeout": 10, "max_retry": 0, **attributes}
    producer: type[Any] = type("Producer", (messaging.GenericProducer,), attributes)
    return producer({"name": "tester"})


def processor_for(name: str, queue: Any) -> messaging.MessageProcessor:
    """Return a processor of ours, in this process."""
    exchange = type("Exchange", (messaging.Exchange,), {"name": name})
    return messaging.MessageProcessor({"name": "tester"}, [(exchange, [(queue, "key")])])


@contextlib.contextmanager
def running(processor: messaging.MessageProcessor) -> Iterator[None]:
    """Run a processor in a thread."""
    thread = threading.Thread(target=processor.start_consuming)
    thread.start()
    try:
        yield
    finally:
        processor.stop_consuming()
        thread.join()


class Wiretap:
    """Hears what is published to an exchange, by nothing but pika."""

    def __init__(self, url: str, name: str) -> None:
        self.heard: list[tuple[pika.BasicProperties, bytes]] = []
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self._channel = self._connection.channel()
        self._channel.exchange_declare(name, durable=True)
        self.queue: str = self._channel.queue_declare("", exclusive=True).method.queue
        self._channel.queue_bind(self.queue, name, "key")
        self._channel.basic_consume(self.queue, self._hear, auto_ack=True)

    def __enter__(self) -> Wiretap:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._connection.close()

    def ask(self, queue: str, body: dict[str, Any]) -> tuple[pika.BasicProperties, bytes]:
        """Publish a request as 1.2.1 does, and return the reply."""
        self.heard.clear()
        properties = pika.BasicProperties(content_type="application/json", reply_to=self.queue)
        self._channel.basic_publish("", queue, json.dumps(body).encode(), properties)
        return self.wait_for(lambda: len(self.heard) == 1)[0]

    def last_body(self) -> bytes:
        """Return what was heard last."""
        return self.heard[-1][1] if self.heard else b""

    def wait_for(self, condition: Callable[[], bool]) -> list[tuple[pika.BasicProperties, bytes]]:
        def is_heard() -> bool:
            self._connection.process_data_events(0)
            return condition()

        wait_until(is_heard)
        return self.heard

    def _hear(
        self, _channel: Any, _method: Any, properties: pika.BasicProperties, body: bytes
    ) -> None:
        self.heard.append((properties, body))


def speech_of(installation: Installation, url: str, name: str) -> list[bytes]:
    """Return the bodies of all that a speaker says."""
    with Wiretap(url, name) as tap:
        run_to_its_end(installation, "speaker", name)
        heard = tap.wait_for(lambda: b'"said_all"' in tap.last_body())
        return [body for _properties, body in heard]


def canonical(body: bytes) -> str:
    """Return JSON such that equal data have equal texts; 1, 1.0 and true are not equal."""
    return json.dumps(json.loads(body), sort_keys=True, ensure_ascii=False)


# ------------------------------------------------------------------------------ messages


def test_a_message_arrives_with_its_whole_body(
    two_ways: tuple[Installation, Installation], broker_url: str, name: str
) -> None:
    """A producer of one version tells a processor of the other all that it has to say."""
    speaking, hearing = two_ways
    common = {"category": "message", "version": "2", "fingerprint": SPEAKER, "_reserved": {}}

    with component(hearing, name) as processor:
        run_to_its_end(speaking, "speaker", name, "hello")

        assert [{"parameters": "T"}] == wait_told(processor, "content")
        parameters = {"text": "žluťoučký kůň", "numbers": [1, 2.5, None, True]}
        assert [
            {"type": "command", "name": "echo", "content": {"parameters": parameters}, **common}
        ] == told(processor, "echo")
        assert [
            {
                "type": "none",
                "name": "none",
                "content": {"args": [1, "a"], "kwds": {"k": 2}},
                **common,
            }
        ] == told(processor, "generic")
        assert [{"type": "status", "name": "online", "content": {}, **common}] == told(
            processor, "online"
        )


def test_both_versions_write_the_same_bodies(
    original: Installation, ours: Installation, broker_url: str, name: str
) -> None:
    """Whatever a producer says: it is the same JSON, of exactly seven keys."""
    speeches = [speech_of(installation, broker_url, name) for installation in (original, ours)]

    expected, actual = ([canonical(body) for body in speech] for speech in speeches)

    assert expected == actual
    forwarded = {"anything", "fingerprint"}
    assert {frozenset(SEVEN_KEYS), frozenset(forwarded)} == {
        frozenset(json.loads(body)) for body in speeches[1]
    }
    assert all(body.isascii() for speech in speeches for body in speech)


def test_both_versions_write_the_same_replies(
    original: Installation, ours: Installation, broker_url: str, name: str
) -> None:
    """Whatever a service answers: it is the same JSON, of exactly seven keys."""
    questions = {
        "double": "é\U0001f600",
        "mirror": {"a": [1, 1.0, None, True, "é"]},
        "refuse": None,
        "report": None,
        "fail": None,
    }
    answers: list[dict[str, str]] = []
    for installation in (original, ours):
        queue = f"{name}-{installation}"
        with component(installation, name, json.dumps(queue)), Wiretap(broker_url, "tap") as tap:
            answers.append({})
            for command, parameters in questions.items():
                body = messaging.RpcCommand(command, parameters).body
                _properties, reply = tap.ask(queue, body)
                answers[-1][command] = canonical(reply)

    expected, actual = answers

    assert expected == actual
    assert {frozenset(SEVEN_KEYS)} == {frozenset(json.loads(reply)) for reply in actual.values()}
    assert {"type": "exception", "value": "ValueError", "message": "boom"} == json.loads(
        actual["fail"]
    )["content"]


def test_not_a_number_of_121_arrives(
    original: Installation, ours: Installation, broker_url: str, name: str
) -> None:
    """1.2.1 writes NaN, which JSON does not have, and we read it."""
    with component(ours, name) as processor:
        run_to_its_end(original, "speaker", name, "nan")

        processor.wait_for_line('content {"parameters": [NaN, Infinity]}')


def test_a_message_of_121_that_nobody_handles_is_parked(
    original: Installation, ours: Installation, broker_url: str, name: str
) -> None:
    """It goes to the error queue as it came; 1.2.1 sends no property that could help."""
    with Wiretap(broker_url, name) as tap, component(ours, name):
        run_to_its_end(original, "speaker", name, "unknown")
        [(_properties, body)] = tap.wait_for(lambda: len(tap.heard) == 1)

        connection = pika.BlockingConnection(pika.URLParameters(broker_url))
        with contextlib.closing(connection):

            def look() -> bytes | None:
                try:
                    return connection.channel().basic_get(f"{name}.error", auto_ack=True)[2]
                except pika.exceptions.ChannelClosedByBroker:  # it is not declared yet
                    return None

            assert body == wait_until(look)


def test_properties_and_headers_of_ours_do_not_trouble_121(
    original: Installation, broker_url: str, name: str
) -> None:
    """pika 0.9.13 reads every property, and every kind of header that postage itself writes."""
    headers = {
        "postage-text": "é",
        "postage-empty": "",
        "postage-flag": True,
        "postage-int": 2**31 - 1,
        "postage-negative": -(2**31),
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "postage-long": "x" * 60_000,
    }
    with component(original, name) as processor, producer_for(name) as producer:
        producer.message_content(1, _headers=headers, _message_id="an-id", _persistent=True)
        producer.message_content(2, _persistent=False)

        assert [{"parameters": 1}, {"parameters": 2}] == wait_told(processor, "content", 2)
        first, second = told(processor, "properties")
    assert headers == first["headers"]
    assert second["headers"] is None
    assert (2, 1) == (first["delivery_mode"], second["delivery_mode"])
    assert ("an-id", "tester") == (first["message_id"], first["app_id"])
    assert isinstance(first["timestamp"], int)
    assert "application/json" == first["content_type"]


def test_a_batch_of_ours_arrives_at_121_in_order(
    original: Installation, broker_url: str, name: str
) -> None:
    """What is pipelined is no different on the wire."""
    with component(original, name) as processor, producer_for(name) as producer:
        with producer.batch() as batch:
            for number in range(200):
                batch.message_content(number)

        assert [{"parameters": number} for number in range(200)] == wait_told(
            processor, "content", 200
        )


# ------------------------------------------------------------------------------ RPC


def test_a_caller_of_121_gets_every_kind_of_reply(
    original: Installation, ours: Installation, broker_url: str, name: str
) -> None:
    """Success, a plain value, an error, an exception, and an error where nobody answers."""
    calls = [
        ["double", 21],
        ["mirror", {"text": "é"}],
        ["refuse", 0],
        ["report", 0],
        ["fail", 0],
        ["unknown", 0],
    ]
    with component(ours, name):
        caller = run_to_its_end(original, "caller", name, json.dumps(calls))

    success, mirrored, error, reported, exception, unknown = told(caller, "reply")
    content = {"type": "success", "value": 42, "message": "doubled"}
    assert ["MessageResult", True, content] == success
    content = {"type": "success", "value": {"text": "é"}, "message": ""}
    assert ["MessageResult", True, content] == mirrored
    content = {"type": "error", "value": None, "message": "bad"}
    assert ["MessageResultError", False, content] == error
    content = {"type": "exception", "value": "Mishap", "message": "told by hand"}
    assert ["MessageResultException", False, content] == reported
    content = {"type": "exception", "value": "ValueError", "message": "boom"}
    assert ["MessageResultException", False, content] == exception
    assert ["MessageResultError", False] == unknown[:2]
    assert "unknown" in unknown[2]["message"]


def test_in_compat_mode_ours_gets_every_kind_of_reply_of_121(
    original: Installation, broker_url: str, name: str, compat: None
) -> None:
    """Success, a plain value, an error and exceptions."""
    with component(original, name), producer_for(name) as producer:
        success = producer.rpc_double(21)
        mirrored = producer.rpc_mirror({"text": "é"})
        error = producer.rpc_refuse()
        reported = producer.rpc_report()
        exception = producer.rpc_fail()

    assert messaging.MessageResult(42, "doubled") == success and success
    assert messaging.MessageResult({"text": "é"}) == mirrored and mirrored
    assert messaging.MessageResultError("bad") == error and not error
    assert messaging.MessageResultException("Mishap", "told by hand") == reported and not reported
    assert messaging.MessageResultException("ValueError", "boom") == exception and not exception


def test_the_class_attribute_compat_does_what_the_variable_does(
    original: Installation, broker_url: str, name: str
) -> None:
    """One producer of a program can call 1.2.1 while the others do not."""
    with component(original, name), producer_for(name, compat="1.2") as producer:
        assert 42 == producer.rpc_double(21).body["content"]["value"]


def test_many_calls_in_flight_to_121_find_their_replies(
    original: Installation, broker_url: str, name: str, compat: None
) -> None:
    """Replies without a correlation id are told apart, by threads and by futures."""
    numbers = range(60)
    with component(original, name), producer_for(name, rpc_timeout=30) as producer:
        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(producer.rpc_double, numbers))
        futures = [producer.rpc_double(number, _future=True) for number in numbers]
        replies += [future.result(30) for future in futures]

    expected = [number * 2 for number in (*numbers, *numbers)]
    assert expected == [reply.body["content"]["value"] for reply in replies]


def test_a_queue_of_replies_hears_121(original: Installation, broker_url: str, name: str) -> None:
    """rpc_queue_x and consume_rpc need no compatibility: the queue is for one call anyway."""
    with component(original, name), producer_for(name) as producer:
        queue = producer.rpc_queue_double(21)

        assert [messaging.MessageResult(42, "doubled")] == producer.consume_rpc(queue)


def test_without_compat_mode_a_reply_of_121_is_dropped_with_advice(
    original: Installation, broker_url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The reply cannot be told from another, so the call ends falsy, and a warning says why."""
    with component(original, name) as processor, producer_for(name) as producer:
        reply = producer.rpc_double(21, _timeout=2, _max_retry=0)

        assert 1 == len(wait_told(processor, "properties"))
    assert not reply
    assert "TimeoutError" == reply.body["content"]["value"]
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "POSTAGE_COMPAT=1.2" in warning.getMessage()


def test_a_reply_larger_than_a_frame_arrives(
    two_ways: tuple[Installation, Installation], broker_url: str, name: str
) -> None:
    """RabbitMQ's frames hold 131,072 bytes."""
    calling, answering = two_ways
    text = "x" * 100_000
    with component(answering, name):
        calls = json.dumps([["double", text]])
        caller = run_to_its_end(calling, "caller", name, calls, compat=True)

    [(_kind, is_success, content)] = told(caller, "reply")
    assert is_success
    assert text * 2 == content["value"]


def test_a_caller_of_121_reaches_a_generic_application(
    original: Installation, broker_url: str, name: str
) -> None:
    """The exchange and the keys of applications are those of 1.2.1."""
    fingerprint = messaging.Fingerprint(name, "application").as_dict()
    exchange = GenericApplication.exchange_class.name
    with GenericApplication(fingerprint) as application, running(application):
        calls = json.dumps([["ping", 0]])
        caller = run_to_its_end(original, "caller", exchange, calls, f"{name}/rr")

    [(_kind, is_success, content)] = told(caller, "reply")
    assert is_success
    assert fingerprint == content["value"]


# ------------------------------------------------------------------------------ queues


@pytest.mark.parametrize("first", ["1.2.1", "ours"])
def test_in_compat_mode_both_versions_serve_one_queue(
    first: str, original: Installation, ours: Installation, broker_url: str, name: str
) -> None:
    """Whoever declares it first, the other one agrees, and callers of both get both."""
    one, other = (original, ours) if first == "1.2.1" else (ours, original)
    calls = json.dumps([["whoami", 0]] * 10)

    with component(one, name, compat=True), component(other, name, compat=True):
        wait_for_consumers(broker_url, name, 2)
        for installation in (original, ours):
            caller = run_to_its_end(installation, "caller", name, calls, compat=True)

            replies = [content["value"] for _kind, _truth, content in told(caller, "reply")]
            assert 10 == len(replies)
            assert {"1.2.1", "ours"} == set(replies)


def test_a_queue_of_121_is_refused_without_compat_mode(
    original: Installation, broker_url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the queue and a way out, and both that one and compat mode are."""
    with component(original, name):
        with pytest.raises(QueueMismatchError, match="POSTAGE_ON_MISMATCH=adopt") as refusal:
            processor_for(name, name)
        assert name in str(refusal.value)

        for variable, value in (("POSTAGE_ON_MISMATCH", "adopt"), ("POSTAGE_COMPAT", "1.2")):
            with monkeypatch.context() as environment:
                environment.setenv(variable, value)
                processor_for(name, name).close()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"auto_delete": True},
        {"durable": True},
        {"durable": True, "auto_delete": True, "arguments": {"x-expires": 60_000}},
    ],
    ids=["no flags", "auto_delete", "durable", "arguments"],
)
def test_the_flags_of_a_dict_are_used_verbatim_by_both(
    flags: dict[str, Any], original: Installation, ours: Installation, broker_url: str, name: str
) -> None:
    """So they agree about the queue without compat mode, whoever declares it first."""
    for number, (one, other) in enumerate([(original, ours), (ours, original)]):
        queue = json.dumps({"name": f"{name}-{number}", "flags": flags})
        with component(one, name, queue), component(other, name, queue):
            pass


# ------------------------------------------------------------------------------ quit, restart


def test_quit_ends_a_component_of_the_other_version(
    two_ways: tuple[Installation, Installation], broker_url: str, name: str
) -> None:
    """The command is settled, so that it does not end the next one."""
    telling, told_to_quit = two_ways
    with component(told_to_quit, name) as processor:
        run_to_its_end(telling, "speaker", name, "quit")

        assert 0 == processor.wait()
        assert "ended null" == processor.stdout[-1]
    with component(told_to_quit, name) as successor:
        run_to_its_end(telling, "speaker", name, "hello")
        wait_told(successor, "content")


def test_restart_restarts_a_component_of_the_other_version_once(
    two_ways: tuple[Installation, Installation], broker_url: str, name: str
) -> None:
    """It is the same process, and it goes on with what is sent afterwards."""
    telling, told_to_restart = two_ways
    with component(told_to_restart, name) as processor:
        run_to_its_end(telling, "speaker", name, "restart")
        assert [processor.pid, processor.pid] == wait_told(processor, "ready", 2)

        run_to_its_end(telling, "speaker", name, "hello")
        wait_told(processor, "content")
        run_to_its_end(telling, "speaker", name, "quit")
        assert 0 == processor.wait()
        assert 2 == len(told(processor, "ready"))
