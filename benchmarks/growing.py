# SPDX-License-Identifier: MIT
"""What must not get dearer: a message, when there is more of everything else.

The messages that are handled were encoded before and come from `ceiling`, so that a queue is soon
full. Queues are classic where nothing else is said: what is compared is the work of our process.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil

from benchmarks import broker, ceiling
from benchmarks.broker import Job
from benchmarks.children import in_child, service
from benchmarks.envelope import FINGERPRINT, envelope, numbers, parameters
from benchmarks.measuring import (
    Case,
    Point,
    Sample,
    Stopwatch,
    Target,
    Workload,
    cost_first,
)
from postage.messaging import (
    DefaultExchange,
    Exchange,
    GenericProducer,
    MessageHandler,
    MessageProcessor,
    Queue,
    RpcHandler,
)
from postage.microthreads import ExitScheduler

PREFETCH = 200
#: How much dearer a message may be at the end of a curve than at its beginning.
FLAT = Target(1.25, is_maximum=True)

SIZES = {"256 B": 256, "4 KiB": 4096, "256 KiB": 262_144}
HANDLERS = (1, 10, 100, 1_000, 2_000)
BINDINGS = TARGETS = CALLS = (1, 10, 100, 1_000)
BACKLOGS = (20_000, 100_000, 1_000_000)


def workloads(scale: float) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How much to send, 1 being enough for a steady rate.
    """
    count = round(20_000 * scale)
    return [
        *_sizes(scale),
        Workload(
            "handlers",
            "Handlers of one processor",
            _curve("handling", HANDLERS, lambda n: partial(_handlers, count, n)),
            axis="handlers",
            rounds=3,
        ),
        Workload(
            "bindings",
            "Bindings of one queue",
            _curve("handling", BINDINGS, lambda n: partial(_bindings, count, n)),
            axis="bindings",
            rounds=3,
        ),
        Workload(
            "pairs",
            "Pairs that a message is sent to",
            _curve("publishing", TARGETS, lambda n: partial(_targets, count, n)),
            axis="pairs of exchange and key",
            rounds=3,
        ),
        Workload(
            "inflight",
            "RPC, by calls in flight",
            _curve("calling", CALLS, lambda n: partial(_calls, round(5_000 * scale), n)),
            axis="calls in flight",
            rounds=3,
        ),
        *_backlogs(scale),
    ]


def _curve(
    name: str, values: Sequence[int], work: Callable[[int], Callable[[str], Sample]]
) -> list[Case]:
    """Return the points of a curve; the first is what the others are compared with."""
    first, *others = values
    cases = [Case(f"{name}, {first:,}", work(first), at=Point(name, first))]
    for value in others:
        target = FLAT if value == values[-1] else None
        case = Case(
            f"{name}, {value:,}", work(value), cases[0].name, target, Point(name, value)
        )
        cases.append(case)
    return cases


# ----------------------------------------------------------------------- sizes of bodies


def _sizes(scale: float) -> list[Workload]:
    publishing, handling = [], []
    for text, size in SIZES.items():
        count = round(scale * max(500, min(20_000, 60_000_000 // size)))
        limit = f"the broker's ceiling, {text}"
        publishing += [
            Case(limit, partial(_publish_ceiling, count, size), at=Point("ceiling", size)),
            Case(
                f"batch(), {text}",
                partial(_publish_batch, count, size),
                limit,
                at=Point("batch()", size),
            ),
        ]
        handling += [
            Case(limit, partial(_handle_ceiling, count, size), at=Point("ceiling", size)),
            Case(
                f"MessageProcessor, {text}",
                partial(_handle, count, size),
                limit,
                at=Point("MessageProcessor", size),
            ),
        ]
    axis = "size of the body"
    return [
        Workload("publish-sizes", f"Publishing, by {axis}", publishing, axis, rounds=3),
        Workload("handle-sizes", f"Handling, by {axis}", handling, axis, rounds=3),
    ]


def _padding(size: int) -> str:
    return "x" * (size - len(json.dumps(_padded(""))))


def _padded(padding: str) -> dict[str, Any]:
    return {**envelope(0), "content": {"parameters": {"": padding}}}


def _publish_ceiling(count: int, size: int, url: str) -> Sample:
    with broker.job(url, "classic", count) as job:
        sample: Sample = in_child(ceiling.publish, job, [_message_of(job, size)])
        return sample


def _message_of(job: Job, size: int) -> bytes:
    return ceiling.encoded(job.queue, json.dumps(_padded(_padding(size))).encode())


def _publish_batch(count: int, size: int, url: str) -> Sample:
    with broker.job(url, "classic", count) as job:
        sample: Sample = in_child(_batch, job, _padding(size))
        return sample


def _batch(job: Job, padding: str) -> Sample:
    with _Producer([(DefaultExchange, job.queue)]) as producer:
        watch = Stopwatch(job.url)
        watch.start()
        with producer.batch() as batch:
            for _ in range(job.count):
                batch.message_echo(**{"": padding})
        watch.stop()
    return watch.sample(job.count, "message")


def _handle_ceiling(count: int, size: int, url: str) -> Sample:
    with broker.job(url, "classic", count, PREFETCH) as job:
        ceiling.publish(job, [_message_of(job, size)])
        sample: Sample = in_child(ceiling.deliver, job)
        return sample


def _handle(count: int, size: int, url: str) -> Sample:
    with broker.job(url, "classic", count, PREFETCH) as job:
        ceiling.publish(job, [_message_of(job, size)])
        sample: Sample = in_child(_handle_echo, job)
        return sample


# ---------------------------------------------------------------- handlers and bindings


class Counter(MessageProcessor):
    """Counts the messages, and ends after the last. Handlers call `count`."""

    def __init__(self, job: Job, eqk: Any = None) -> None:
        self.queue = Queue(job.queue, type=job.kind)
        self.prefetch = job.prefetch
        self.expected = job.count
        self.counted = 0
        self.watch = Stopwatch(job.url)
        super().__init__(FINGERPRINT, eqk or [(DefaultExchange, [(self.queue, job.queue)])])

    def count(self) -> None:
        if not self.counted:
            self.watch.start()
        self.counted += 1
        if self.counted == self.expected:
            self.watch.stop()
            raise ExitScheduler

    def consume(self) -> Sample:
        """Handle the messages that are expected, and say what that cost."""
        self.start_consuming()
        return cost_first(self.watch.sample(self.expected - 1, "message"))


class _Echo(Counter):
    @MessageHandler("command", "echo")
    def msg_echo(self, _content: Any) -> None:
        self.count()


def _handle_echo(job: Job) -> Sample:
    counter = _Echo(job)
    counter.start_consuming()
    return counter.watch.sample(job.count - 1, "message")


def _handlers(count: int, handlers: int, url: str) -> Sample:
    with broker.job(url, "classic", count, PREFETCH) as job:
        bodies = [_body_of(f"x_{number}") for number in range(handlers)]
        ceiling.publish(job, [ceiling.encoded(job.queue, body) for body in bodies])
        sample: Sample = in_child(_handle_many, job, handlers)
        return sample


def _body_of(name: str) -> bytes:
    return json.dumps({**envelope(numbers(1)[0]), "name": name}).encode()


def _handle_many(job: Job, handlers: int) -> Sample:
    def handler(name: str) -> Any:
        def handle(self: Counter, _content: Any) -> None:
            self.count()

        return MessageHandler("command", name)(handle)

    names = [f"x_{number}" for number in range(handlers)]
    processor = type("Many", (Counter,), {f"msg_{name}": handler(name) for name in names})
    counter: Counter = processor(job)
    return counter.consume()


def _bindings(count: int, bindings: int, url: str) -> Sample:
    with broker.job(url, "classic", count, PREFETCH) as job:
        keys = [f"key.{number}.of.many" for number in range(bindings)]
        with broker.channel(url) as channel:
            channel.exchange_declare(job.queue, "topic", durable=True, auto_delete=True)
            for key in keys:
                channel.queue_bind(job.queue, job.queue, key)
        messages = [ceiling.encoded(key, exchange=job.queue) for key in keys]
        ceiling.publish(job, messages)
        sample: Sample = in_child(_handle_bound, job, keys)
        return sample


def _exchange(name_: str, type_: str) -> type[Exchange]:
    class Named(Exchange):
        name = name_
        exchange_type = type_
        auto_delete = True

    return Named


def _handle_bound(job: Job, keys: list[str]) -> Sample:
    queue = Queue(job.queue, type=job.kind)
    counter = _Echo(job, [(_exchange(job.queue, "topic"), [(queue, key) for key in keys])])
    return counter.consume()


# ------------------------------------------------------------------------------ sending


class _Producer(GenericProducer):
    def __init__(self, eks: Any) -> None:
        self.eks = eks
        super().__init__(FINGERPRINT)
        self.message_echo()  # it connects with the first message


def _targets(count: int, targets: int, url: str) -> Sample:
    with broker.job(url, "classic", count) as job:
        keys = [f"key-{number}" for number in range(targets)]
        with broker.channel(url) as channel:
            channel.exchange_declare(job.queue, "direct", durable=True, auto_delete=True)
            for key in keys:
                channel.queue_bind(job.queue, job.queue, key)
        sample: Sample = in_child(_send_to, job, keys)
        return sample


def _send_to(job: Job, keys: list[str]) -> Sample:
    exchange = _exchange(job.queue, "direct")
    times = max(1, job.count // len(keys))
    with _Producer([(exchange, key) for key in keys]) as producer:
        watch = Stopwatch(job.url)
        watch.start()
        with producer.batch() as batch:
            for number in numbers(times):
                batch.message_echo(**parameters(number))
        watch.stop()
    return cost_first(watch.sample(times * len(keys), "publishing"))


# -------------------------------------------------------------------------------- calls


class _Server(MessageProcessor):
    prefetch = PREFETCH

    def __init__(self, job: Job) -> None:
        queue = Queue(job.queue, type=job.kind)
        super().__init__(FINGERPRINT, [(DefaultExchange, [(queue, job.queue)])])

    @RpcHandler("command", "next")
    def msg_next(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func(content["parameters"]["no"] + 1)


def _serve(ready: Callable[[], None], job: Job) -> None:
    server = _Server(job)
    ready()
    server.start_consuming()


def _calls(count: int, in_flight: int, url: str) -> Sample:
    with broker.job(url, "classic", count) as job, service(_serve, job):
        sample: Sample = in_child(_call, job, in_flight)
        return sample


class _Caller(GenericProducer):
    def __init__(self, job: Job) -> None:
        self.eks = [(DefaultExchange, job.queue)]
        super().__init__(FINGERPRINT)


def _call(job: Job, in_flight: int) -> Sample:
    calls: collections.deque[Any] = collections.deque()
    with _Caller(job) as producer:
        producer.rpc_next(**parameters(0))  # it connects with the first call
        watch = Stopwatch(job.url)
        watch.start()
        for number in numbers(job.count):
            if len(calls) == in_flight:
                calls.popleft().result()
            calls.append(producer.rpc_next(**parameters(number), _future=True))
        while calls:
            calls.popleft().result()
        watch.stop()
    return cost_first(watch.sample(job.count, "call"))


# ------------------------------------------------------------------------------ backlog


def _backlogs(scale: float) -> list[Workload]:
    counts = [round(backlog * scale) for backlog in BACKLOGS]
    cases = []
    for kind in ("classic", "quorum"):
        work = partial(partial, _backlog, kind, counts[0])
        cases += _curve(kind, counts, work)
    title = f"The first {counts[0]:,} of the messages that wait"
    return [Workload("backlog", title, cases, axis="messages in the queue", rounds=1)]


def _backlog(kind: str, count: int, backlog: int, url: str) -> Sample:
    with broker.job(url, kind, backlog, PREFETCH) as job:
        ceiling.publish(job)
        front = Job(url, job.queue, kind, count, PREFETCH)
        sample: Sample = in_child(_handle_front, front)
        return sample


def _handle_front(job: Job) -> Sample:
    sample = _Echo(job).consume()
    memory = psutil.Process(os.getpid()).memory_info().rss
    return {**sample, "RSS MiB": memory / 2**20}
