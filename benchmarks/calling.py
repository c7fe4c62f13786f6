# SPDX-License-Identifier: MIT
"""RPC: one call after the other, and a hundred at a time."""

from __future__ import annotations

import collections
import itertools
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.channel import Channel

from benchmarks import broker, ceiling, raw
from benchmarks.broker import Job
from benchmarks.children import in_child, service
from benchmarks.envelope import FINGERPRINT, envelope, numbers, parameters
from benchmarks.measuring import Case, Sample, Stopwatch, Target, Workload, percentile
from postage.messaging import (
    DefaultExchange,
    GenericProducer,
    MessageProcessor,
    Queue,
    RpcHandler,
)

#: Calls that are in flight at a time, where it is not one.
IN_FLIGHT = 100
#: Calls before the clock starts: the first ones connect.
WARM_UP = 50

#: RabbitMQ, direct reply-to: the address of the channel that a request is published on.
REPLY_TO = "amq.rabbitmq.reply-to"


def workloads(scale: float) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How many calls to make, 1 being enough for a steady rate.
    """
    tutorial = "RabbitMQ tutorial 6, same JSON"
    few, many = round(2_000 * scale), round(10_000 * scale)
    one = [
        Case(tutorial, _case(_tutorial_json_client, _tutorial_json_server, "transient", few)),
        Case(
            "RabbitMQ tutorial 6, a number",
            _case(_tutorial_client, _tutorial_server, "transient", few),
            tutorial,
        ),
        Case(
            "rpc_x(), classic",
            _case(_client, _server, "classic", few),
            tutorial,
            Target(1.15, is_maximum=True),
        ),
        Case("rpc_x(), quorum", _case(_client, _server, "quorum", few), tutorial),
    ]
    hundred = []
    for kind in ("classic", "quorum"):
        base = f"pika SelectConnection, {kind}"
        limit = f"the broker's ceiling, {kind}"
        hundred.append(Case(limit, _case(ceiling.call, ceiling.serve, kind, many, 200), base))
        hundred.append(Case(base, _case(_raw_client, _raw_server, kind, many)))
        for prefetch in (200, 10):
            name = f"rpc_x(_future=True), {kind}, prefetch {prefetch}"
            work = _case(_futures_client, _server, kind, many, prefetch)
            hundred.append(Case(name, work, base))
    return [
        Workload("rpc", "RPC, one call in flight", one),
        Workload("rpc100", f"RPC, {IN_FLIGHT} calls in flight", hundred),
    ]


def _case(
    client: Callable[[Job], Sample],
    server: Callable[[Callable[[], None], Job], None],
    kind: str,
    count: int,
    prefetch: int = 10,
) -> Callable[[str], Sample]:
    def measure(url: str) -> Sample:
        with broker.job(url, kind, count, prefetch) as job, service(server, job):
            sample: Sample = in_child(client, job)
            return sample

    return measure


def _one_by_one(call: Callable[[int], int], count: int) -> Sample:
    """Make calls one by one, and return how long they took."""
    milliseconds = []
    for number in numbers(WARM_UP + count):
        started = time.perf_counter()
        result = call(number)
        milliseconds.append((time.perf_counter() - started) * 1000)
        _check(number, result)
    measured = milliseconds[WARM_UP:]
    return {f"p{percent} ms": percentile(measured, percent) for percent in (50, 90, 99)}


def _check(number: int, result: Any) -> None:
    """Check a reply: every service here adds one."""
    if result != number + 1:
        raise RuntimeError(f"the reply to {number} is {result!r}")


# ----------------------------------------------------------------------- the tutorial
#
# https://www.rabbitmq.com/tutorials/tutorial-six-python: its server and its client, with bodies
# that are numbers, as there, or the JSON that all other cases send.


@dataclass(frozen=True)
class _Codec:
    encode: Callable[[int], str]
    decode: Callable[[bytes], int]


_NUMBER = _Codec(str, int)
_JSON = _Codec(
    lambda number: json.dumps(envelope(number)),
    lambda body: int(json.loads(body)["content"]["parameters"]["no"]),
)


def _serve_tutorial(ready: Callable[[], None], job: Job, codec: _Codec) -> None:
    def on_request(
        channel: BlockingChannel, method: Any, properties: pika.BasicProperties, body: bytes
    ) -> None:
        response = codec.encode(codec.decode(body) + 1)
        channel.basic_publish(
            exchange="",
            routing_key=properties.reply_to,
            properties=pika.BasicProperties(correlation_id=properties.correlation_id),
            body=response.encode(),
        )
        channel.basic_ack(delivery_tag=method.delivery_tag)

    channel = pika.BlockingConnection(pika.URLParameters(job.url)).channel()
    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue=job.queue, on_message_callback=on_request)
    ready()
    channel.start_consuming()


class _TutorialClient:
    """Calls with a callback queue of its own and a correlation id for each call."""

    def __init__(self, job: Job, codec: _Codec) -> None:
        self.queue = job.queue
        self.codec = codec
        self.connection = pika.BlockingConnection(pika.URLParameters(job.url))
        self.channel = self.connection.channel()
        self.callback_queue = self.channel.queue_declare(queue="", exclusive=True).method.queue
        self.channel.basic_consume(
            queue=self.callback_queue, on_message_callback=self.on_response, auto_ack=True
        )
        self.response: bytes | None = None
        self.correlation_id = ""

    def on_response(
        self, _channel: Any, _method: Any, properties: pika.BasicProperties, body: bytes
    ) -> None:
        if properties.correlation_id == self.correlation_id:
            self.response = body

    def call(self, number: int) -> int:
        self.response = None
        self.correlation_id = str(uuid.uuid4())
        self.channel.basic_publish(
            exchange="",
            routing_key=self.queue,
            properties=pika.BasicProperties(
                reply_to=self.callback_queue, correlation_id=self.correlation_id
            ),
            body=self.codec.encode(number).encode(),
        )
        while self.response is None:
            self.connection.process_data_events(time_limit=None)
        return self.codec.decode(self.response)


def _call_tutorial(job: Job, codec: _Codec) -> Sample:
    client = _TutorialClient(job, codec)
    sample = _one_by_one(client.call, job.count)
    client.connection.close()
    return sample


def _tutorial_server(ready: Callable[[], None], job: Job) -> None:
    _serve_tutorial(ready, job, _NUMBER)


def _tutorial_client(job: Job) -> Sample:
    return _call_tutorial(job, _NUMBER)


def _tutorial_json_server(ready: Callable[[], None], job: Job) -> None:
    _serve_tutorial(ready, job, _JSON)


def _tutorial_json_client(job: Job) -> Sample:
    return _call_tutorial(job, _JSON)


# ------------------------------------------------------------------------- plain pika


def _raw_server(ready: Callable[[], None], job: Job) -> None:
    def answer(
        channel: Channel, method: Any, properties: pika.BasicProperties, body: bytes
    ) -> None:
        result = json.loads(body)["content"]["parameters"]["no"] + 1
        channel.basic_publish(
            "",
            properties.reply_to,
            json.dumps(envelope(result)).encode(),
            pika.BasicProperties(correlation_id=properties.correlation_id),
        )
        channel.basic_ack(method.delivery_tag)

    def opened(channel: Channel) -> None:
        channel.basic_qos(prefetch_count=job.prefetch)
        channel.basic_consume(job.queue, answer, callback=lambda _frame: ready())

    raw.run(job.url, opened)


class _RawClient:
    """Keeps many calls in flight, whose replies come by direct reply-to."""

    def __init__(self, job: Job) -> None:
        self.queue = job.queue
        self.numbers = iter(numbers(job.count))
        self.pending: dict[str, int] = {}
        self.watch = Stopwatch(job.url)

    def open(self, channel: Channel) -> None:
        self.channel = channel
        channel.basic_consume(REPLY_TO, self.replied, auto_ack=True)
        self.watch.start()
        for number in itertools.islice(self.numbers, IN_FLIGHT):
            self.call(number)

    def call(self, number: int) -> None:
        correlation_id = str(number)
        self.pending[correlation_id] = number
        properties = pika.BasicProperties(reply_to=REPLY_TO, correlation_id=correlation_id)
        body = json.dumps(envelope(number)).encode()
        self.channel.basic_publish("", self.queue, body, properties)

    def replied(
        self, _channel: Channel, _method: Any, properties: pika.BasicProperties, body: bytes
    ) -> None:
        number = self.pending.pop(properties.correlation_id)
        _check(number, json.loads(body)["content"]["parameters"]["no"])
        following = next(self.numbers, None)
        if following is not None:
            self.call(following)
        elif not self.pending:
            self.watch.stop()
            self.channel.connection.close()


def _raw_client(job: Job) -> Sample:
    client = _RawClient(job)
    raw.run(job.url, client.open)
    return client.watch.sample(job.count, "call")


# ---------------------------------------------------------------------------- postage


class _Server(MessageProcessor):
    def __init__(self, job: Job) -> None:
        self.prefetch = job.prefetch
        queue = Queue(job.queue, type=job.kind)
        super().__init__(FINGERPRINT, [(DefaultExchange, [(queue, job.queue)])])

    @RpcHandler("command", "next")
    def msg_next(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func(content["parameters"]["no"] + 1)


def _server(ready: Callable[[], None], job: Job) -> None:
    server = _Server(job)
    ready()
    server.start_consuming()


class _Producer(GenericProducer):
    def __init__(self, job: Job) -> None:
        self.eks = [(DefaultExchange, job.queue)]
        super().__init__(FINGERPRINT)


def _client(job: Job) -> Sample:
    with _Producer(job) as producer:
        return _one_by_one(lambda number: producer.rpc_next(**parameters(number)).value, job.count)


def _futures_client(job: Job) -> Sample:
    calls: collections.deque[tuple[int, Any]] = collections.deque()
    with _Producer(job) as producer:
        producer.rpc_next(**parameters(0))  # it connects with the first call
        watch = Stopwatch(job.url)
        watch.start()
        for number in numbers(job.count):
            if len(calls) == IN_FLIGHT:
                _finish(*calls.popleft())
            calls.append((number, producer.rpc_next(**parameters(number), _future=True)))
        while calls:
            _finish(*calls.popleft())
        watch.stop()
    return watch.sample(job.count, "call")


def _finish(number: int, reply: Any) -> None:
    _check(number, reply.result().value)
