# SPDX-License-Identifier: MIT
"""Prefetch: fixed ones and the one that adapts, with handlers that take nothing to seconds.

What counts beside the rate is fairness: for how long messages wait in the inbox of one instance
while another one is idle. And after a crash: how many messages that are innocent reach the error
queue beside the one that ends each process which handles it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import pika

from benchmarks import broker
from benchmarks.broker import Job
from benchmarks.children import in_child
from benchmarks.envelope import FINGERPRINT
from benchmarks.measuring import Case, Sample, Workload, percentile
from postage.messaging import (
    DefaultExchange,
    GenericProducer,
    MessageHandler,
    MessageProcessor,
    Queue,
)
from tests.waiting import wait_until

#: The prefetches that are compared, 0 for the one that adapts.
PREFETCHES = (1, 10, 200, 0)
#: How long handlers sleep, in seconds, and how many messages an instance has at full scale.
HANDLERS: dict[str, tuple[tuple[float, ...], int]] = {
    "0 ms": ((0.0,), 6_000),
    "1 ms": ((0.001,), 1_500),
    "10 ms": ((0.01,), 250),
    "1 s": ((1.0,), 5),
    "99% 1 ms, 1% 1 s": ((0.001,) * 60 + (1.0,) + (0.001,) * 39, 400),
}
INSTANCES = (1, 3)
#: Of the crash loop: messages, which of them ends the process, and how often it may.
INNOCENT, POISON, CRASHES = 300, 150, 10
#: Seconds that one measurement may take.
DEADLINE_SECONDS = 120.0

_SPAWN = multiprocessing.get_context("spawn")


class Handled(NamedTuple):
    """One message in the life of an instance, on the monotonic clock of the machine."""

    received: float
    started: float
    ended: float


def workloads(scale: float) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How much to handle, 1 being enough for a steady rate.
    """
    cases = []
    for handlers, (seconds, count) in HANDLERS.items():
        for instances in INSTANCES:
            base = f"{handlers}, {instances} x, prefetch 10"
            for prefetch in PREFETCHES:
                name = f"{handlers}, {instances} x, {_named(prefetch)}"
                total = max(instances, round(count * scale * instances))
                work = partial(_measure, seconds, instances, total, prefetch)
                cases.append(Case(name, work, None if name == base else base))
    crashes = [Case(_named(each), partial(_crash_loop, each)) for each in PREFETCHES]
    return [
        Workload("prefetch", "Prefetch, by what handlers take and by instances", cases, rounds=1),
        Workload("crashes", f"One of {INNOCENT} messages ends the process", crashes, rounds=1),
    ]


def _named(prefetch: int) -> str:
    return f"prefetch {prefetch}" if prefetch else "adaptive"


# ------------------------------------------------------------------ throughput, fairness


def _measure(
    seconds: Sequence[float], instances: int, count: int, prefetch: int, url: str
) -> Sample:
    with broker.job(url, "quorum", count, prefetch) as job:
        in_child(_publish, job, seconds)
        handled = _run(job, instances)
    begin = min(each[0].received for each in handled if each)
    end = max(each[-1].ended for each in handled if each)
    waits = list(_unfair_waits(handled, end))
    return {
        "messages/s": count / (end - begin),
        "unfair wait p50 ms": percentile(waits, 50) * 1000,
        "p99 ms": percentile(waits, 99) * 1000,
        "worst ms": max(waits) * 1000,
    }


def _publish(job: Job, seconds: Sequence[float]) -> None:
    with GenericProducer(FINGERPRINT) as producer, producer.batch():
        for number in range(job.count):
            producer.message_work(_queue=job.queue, seconds=seconds[number % len(seconds)])


def _unfair_waits(instances: Sequence[Sequence[Handled]], end: float) -> Iterator[float]:
    """Yield for how long each message lay in an inbox while another instance was idle.

    Idle is an instance that runs no handler, from the first message of any to the last.
    """
    begin = min(each[0].received for each in instances if each)
    for own, handled in enumerate(instances):
        idle = _merged(
            gap
            for other, theirs in enumerate(instances)
            if other != own
            for gap in _gaps(theirs, begin, end)
        )
        until = [0.0, *accumulate(stop - start for start, stop in idle)]
        for each in handled:
            yield _idle_before(idle, until, each.started) - _idle_before(
                idle, until, each.received
            )


def _gaps(
    handled: Sequence[Handled], begin: float, end: float
) -> Iterator[tuple[float, float]]:
    for each in handled:
        yield begin, max(begin, each.started)
        begin = each.ended
    yield begin, end


def _merged(spans: Iterator[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def _idle_before(spans: list[tuple[float, float]], until: list[float], moment: float) -> float:
    """Return how much of the spans lies before a moment.

    Args:
        spans: In order.
        until: How much all spans before each of them are together.
        moment: When.
    """
    low, high = 0, len(spans)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if spans[middle][0] < moment else (low, middle)
    if not low:
        return 0.0
    start, stop = spans[low - 1]
    return until[low - 1] + min(stop, moment) - start


def _run(job: Job, instances: int) -> list[list[Handled]]:
    """Let instances handle all messages, and return what each of them did."""
    counts = _SPAWN.RawArray("l", instances)
    ready, go, over = _SPAWN.Semaphore(0), _SPAWN.Event(), _SPAWN.Event()
    with contextlib.ExitStack() as stack:
        pipes = []
        for number in range(instances):
            receiver, sender = _SPAWN.Pipe(duplex=False)
            arguments = (sender, job, number, counts, ready, go, over)
            child = _SPAWN.Process(target=_instance, args=arguments, daemon=True)
            child.start()
            stack.callback(child.join)
            stack.callback(child.kill)
            pipes.append(receiver)
        for _ in range(instances):
            if not ready.acquire(timeout=DEADLINE_SECONDS):
                raise RuntimeError("an instance did not get ready")
        go.set()
        wait_until(lambda: sum(counts) >= job.count, DEADLINE_SECONDS, "all messages")
        over.set()
        return [receiver.recv() for receiver in pipes]


def _instance(
    results: Any, job: Job, number: int, counts: Any, ready: Any, go: Any, over: Any
) -> None:
    worker = _Worker(job, number, counts)
    ready.release()
    go.wait()

    def stop() -> None:
        over.wait()
        worker.stop_consuming()

    threading.Thread(target=stop, daemon=True).start()
    worker.start_consuming()
    results.send(worker.handled)


class _Worker(MessageProcessor):
    """Sleeps for as long as each message says."""

    def __init__(self, job: Job, number: int, counts: Any) -> None:
        self.prefetch = job.prefetch or None
        self.handled: list[Handled] = []
        self.number, self.counts = number, counts
        super().__init__(FINGERPRINT, [(DefaultExchange, [(Queue(job.queue), job.queue)])])

    @MessageHandler("command", "work")
    def msg_work(self, content: Any) -> None:
        started = time.monotonic()
        seconds = content["parameters"]["seconds"]
        if seconds:
            time.sleep(seconds)
        self.handled.append(Handled(self.delivery.received, started, time.monotonic()))
        self.counts[self.number] += 1


# --------------------------------------------------------------------------- crash loop


def _crash_loop(prefetch: int, url: str) -> Sample:
    """Start a component anew as often as it ends, until it has no message left."""
    job = Job(url, f"postage-benchmark-{os.getpid()}-{prefetch}", "quorum", INNOCENT, prefetch)
    try:
        in_child(_prepare, job)
        deadline, starts = time.monotonic() + DEADLINE_SECONDS, 1
        while not _outlives(job, deadline):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no end after {starts} starts")
            starts += 1
        return {"innocent parked": in_child(_parked, job) - 1.0, "starts": float(starts)}
    finally:
        in_child(_delete, job)


def _outlives(job: Job, deadline: float) -> bool:
    """Start a component, and tell whether it still lives when all messages are handled."""
    child = _SPAWN.Process(target=_crashing, args=(job,), daemon=True)
    child.start()
    looks = 0  # at an empty queue: the second one is long after what was in hand then
    while child.is_alive() and looks < 2 and time.monotonic() < deadline:
        child.join(1.0)
        looks += broker.messages_left(job) == 0
    is_done = child.is_alive() and looks == 2
    child.kill()
    child.join()
    return is_done


class _Crashing(MessageProcessor):
    """Ends the process at the poison."""

    def __init__(self, job: Job) -> None:
        self.prefetch = job.prefetch or None
        queue = Queue(job.queue, delivery_limit=CRASHES)
        super().__init__(FINGERPRINT, [(DefaultExchange, [(queue, job.queue)])])

    @MessageHandler("command", "work")
    def msg_work(self, _content: Any) -> None:
        time.sleep(0.0005)  # so that messages wait when the poison comes

    @MessageHandler("command", "poison")
    def msg_poison(self, _content: Any) -> None:
        os._exit(1)


def _prepare(job: Job) -> None:
    with _Crashing(job), GenericProducer(FINGERPRINT) as producer, producer.batch():
        for number in range(job.count):
            if number == POISON:
                producer.message_poison(_queue=job.queue)
            producer.message_work(_queue=job.queue)


def _crashing(job: Job) -> None:
    _Crashing(job).start_consuming()


def _parked(job: Job) -> int:
    """Return how many messages are in the error queue, when no more come."""
    with pika.BlockingConnection(pika.URLParameters(job.url)) as connection:
        channel, counts = connection.channel(), [-1, 0]
        while counts[-1] == 0 or counts[-2] != counts[-1]:
            connection.sleep(1.0)
            answer = channel.queue_declare(f"{job.queue}.error", passive=True)
            counts.append(answer.method.message_count)
        return counts[-1]


def _delete(job: Job) -> None:
    with pika.BlockingConnection(pika.URLParameters(job.url)) as connection:
        channel = connection.channel()
        channel.queue_delete(job.queue)
        channel.queue_delete(f"{job.queue}.error")
