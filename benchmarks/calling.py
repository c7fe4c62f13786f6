# SPDX-License-Identifier: MIT
"""RPC: one call after the other, and many at a time."""

from __future__ import annotations

import collections
import itertools
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.channel import Channel

from benchmarks import broker, ceiling, raw
from benchmarks.broker import Job
from benchmarks.children import in_child, service
from benchmarks.envelope import FINGERPRINT, envelope, numbers, parameters
from benchmarks.job import WARM_UP, check, latencies, one_by_one
from benchmarks.measuring import Beside, Case, Sample, Stopwatch, Target, Workload
from benchmarks.peers import cases as of_peers
from benchmarks.peers.cases import Peer
from postage.messaging import (
    DefaultExchange,
    GenericProducer,
    MessageProcessor,
    Queue,
    RpcHandler,
)

#: Calls that are in flight at a time, where it is not one.
IN_FLIGHT = (10, 100, 1000)
#: Requests that the broker delivers ahead, for throughput.
PREFETCH = 200

#: RabbitMQ, direct reply-to: the address of the channel that a request is published on.
REPLY_TO = "amq.rabbitmq.reply-to"


def workloads(scale: float, peers: Sequence[Peer] = ()) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How many calls to make, 1 being enough for a steady rate.
        peers: Who does the work, too.
    """
    return [
        _one(round(2_000 * scale), peers),
        *(_many(round(10_000 * scale), in_flight, peers) for in_flight in IN_FLIGHT),
    ]


def _one(count: int, peers: Sequence[Peer]) -> Workload:
    """Return the workload of calls one after the other."""
    tutorial = "RabbitMQ tutorial 6, same JSON"
    nameko = [of_peers.call_name(peer) for peer in of_peers.named(peers, "nameko")]
    cases = [
        Case(tutorial, _case(_tutorial_json_client, _tutorial_json_server, "transient", count)),
        Case(
            "RabbitMQ tutorial 6, a number",
            _case(_tutorial_client, _tutorial_server, "transient", count),
            tutorial,
        ),
    ]
    for kind in ("classic", "quorum"):
        is_classic = kind == "classic"
        work = _case(_raw_client, _raw_server, kind, count)
        cases.append(Case(f"pika SelectConnection, {kind}", work, tutorial))
        target = Target(1.15, is_maximum=True) if is_classic else None
        also = [Beside(nameko, Target(0.4, is_maximum=True) if is_classic else None)]
        work = _case(_client, _server, kind, count)
        cases.append(Case(f"rpc_x(), {kind}", work, tutorial, target, also=also if nameko else ()))
    cases += [of_peers.call(peer, count, 1, tutorial) for peer in peers if peer.calls]
    return Workload("rpc", "RPC, one call in flight", cases)


def _many(count: int, in_flight: int, peers: Sequence[Peer]) -> Workload:
    """Return the workload of so many calls in flight."""
    callers = [peer for peer in peers if peer.calls >= in_flight]
    rivals = [of_peers.call_name(peer) for peer in of_peers.named(callers, "nameko", "FastStream")]
    cases = []
    for kind, times in (("classic", 10), ("quorum", 5)):
        base = f"pika SelectConnection, {kind}"
        work = _case(ceiling.call, ceiling.serve, kind, count, PREFETCH, in_flight)
        cases.append(Case(f"the broker's ceiling, {kind}", work, base))
        work = _case(_raw_client, _raw_server, kind, count, PREFETCH, in_flight)
        cases.append(Case(base, work))
        for prefetch in (PREFETCH, 0, 10):
            name = f"rpc_x(_future=True), {kind}, prefetch {prefetch or 'adapts (default)'}"
            work = _case(_futures_client, _server, kind, count, prefetch, in_flight)
            is_goal = in_flight == 100 and prefetch == PREFETCH
            also = [Beside(rivals, Target(times) if is_goal else None)] if rivals else ()
            cases.append(Case(name, work, base, also=also))
    cases += [of_peers.call(peer, count, in_flight, of_peers.PLAIN) for peer in callers]
    rounds = None if in_flight == 100 else 3
    return Workload(f"rpc{in_flight}", f"RPC, {in_flight:,} calls in flight", cases, rounds=rounds)


def _case(
    client: Callable[[Job], Sample],
    server: Callable[[Callable[[], None], Job], None],
    kind: str,
    count: int,
    prefetch: int = 0,
    in_flight: int = 1,
) -> Callable[[str], Sample]:
    def measure(url: str) -> Sample:
        with broker.job(url, kind, count, prefetch, in_flight) as job, service(server, job):
            sample: Sample = in_child(client, job)
            return sample

    return measure


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
    sample = one_by_one(client.call, job.count)
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
    """Keeps calls in flight, whose replies come by direct reply-to."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.is_alone = job.in_flight == 1
        self.numbers = iter(numbers(job.count + (WARM_UP if self.is_alone else 0)))
        self.pending: dict[str, int] = {}
        self.watch = Stopwatch(job.url)
        self.called = 0.0
        self.milliseconds: list[float] = []

    def open(self, channel: Channel) -> None:
        self.channel = channel
        channel.basic_consume(REPLY_TO, self.replied, auto_ack=True)
        self.watch.start()
        for number in itertools.islice(self.numbers, self.job.in_flight):
            self.call(number)

    def call(self, number: int) -> None:
        correlation_id = str(number)
        self.pending[correlation_id] = number
        self.called = time.perf_counter()
        properties = pika.BasicProperties(reply_to=REPLY_TO, correlation_id=correlation_id)
        body = json.dumps(envelope(number)).encode()
        self.channel.basic_publish("", self.job.queue, body, properties)

    def replied(
        self, _channel: Channel, _method: Any, properties: pika.BasicProperties, body: bytes
    ) -> None:
        number = self.pending.pop(properties.correlation_id)
        check(number, json.loads(body)["content"]["parameters"]["no"])
        if self.is_alone:
            self.milliseconds.append((time.perf_counter() - self.called) * 1000)
        following = next(self.numbers, None)
        if following is not None:
            self.call(following)
        elif not self.pending:
            self.watch.stop()
            self.channel.connection.close()

    def sample(self) -> Sample:
        if self.is_alone:
            return latencies(self.milliseconds[WARM_UP:])
        return self.watch.sample(self.job.count, "call")


def _raw_client(job: Job) -> Sample:
    client = _RawClient(job)
    raw.run(job.url, client.open)
    return client.sample()


# ---------------------------------------------------------------------------- postage


class _Server(MessageProcessor):
    def __init__(self, job: Job) -> None:
        self.prefetch = job.prefetch or None
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
        return one_by_one(lambda number: producer.rpc_next(**parameters(number)).value, job.count)


def _futures_client(job: Job) -> Sample:
    calls: collections.deque[tuple[int, Any]] = collections.deque()
    with _Producer(job) as producer:
        producer.rpc_next(**parameters(0))  # it connects with the first call
        watch = Stopwatch(job.url)
        watch.start()
        for number in numbers(job.count):
            if len(calls) == job.in_flight:
                _finish(*calls.popleft())
            calls.append((number, producer.rpc_next(**parameters(number), _future=True)))
        while calls:
            _finish(*calls.popleft())
        watch.stop()
    return watch.sample(job.count, "call")


def _finish(number: int, reply: Any) -> None:
    check(number, reply.result().value)
