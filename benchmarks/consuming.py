# SPDX-License-Identifier: MIT
"""Consuming: messages that wait in a queue are read, counted and acknowledged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pika.channel import Channel

from benchmarks import broker, ceiling, raw
from benchmarks.broker import Job
from benchmarks.children import in_child
from benchmarks.envelope import FINGERPRINT
from benchmarks.measuring import Beside, Case, Sample, Stopwatch, Target, Workload
from benchmarks.peers import cases as of_peers
from benchmarks.peers.cases import Peer
from benchmarks.publishing import publish
from postage.messaging import DefaultExchange, MessageHandler, MessageProcessor, Queue
from postage.microthreads import ExitScheduler

#: Messages that the broker delivers ahead, for throughput.
PREFETCH = 200


def workloads(scale: float, peers: Sequence[Peer] = ()) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How much to consume, 1 being enough for a steady rate.
        peers: Who does the work, too.
    """
    count = round(30_000 * scale)
    names = [of_peers.consume_name(peer, PREFETCH) for peer in peers if not peer.is_fixed]
    cases = []
    for kind in ("classic", "quorum"):
        base = f"pika SelectConnection, {kind}"
        limit = f"the broker's ceiling, {kind}"
        cases.append(Case(limit, _case(ceiling.deliver, kind, count, PREFETCH), base))
        cases.append(Case(base, _case(_raw_in_hundreds, kind, count, PREFETCH)))
        cases.append(Case(f"{base}, acks singly", _case(_raw_singly, kind, count, PREFETCH), base))
        prefetches = ((PREFETCH, Target(0.9)), (0, None), (10, None), (1, None))
        for prefetch, target in prefetches:
            work = _case(_processor, kind, count if prefetch != 1 else count // 10, prefetch)
            name = f"MessageProcessor, {kind}, prefetch {prefetch or 'adapts (default)'}"
            also = []
            if names and prefetch == PREFETCH:
                also = [Beside(names, Target(2.5) if kind == "classic" else None)]
            cases.append(Case(name, work, base, target, also=also))
    for peer in peers:
        for wanted in (None,) if peer.is_fixed else (PREFETCH, None):
            cases.append(of_peers.consume(peer, count, wanted, fill=publish))
    return [Workload("consume", f"Consuming, prefetch {PREFETCH} unless said otherwise", cases)]


def _case(function: Callable[[Job], Sample], kind: str, count: int, prefetch: int) -> Any:
    return partial(_measure, function, kind, count, prefetch)


def _measure(
    function: Callable[[Job], Sample], kind: str, count: int, prefetch: int, url: str
) -> Sample:
    with broker.job(url, kind, count, prefetch) as job:
        in_child(publish, job)
        sample: Sample = in_child(function, job)
        left = broker.messages_left(job)
        if left:
            raise RuntimeError(f"{left} of {count} messages were not acknowledged")
    return sample


# ------------------------------------------------------------------------- plain pika


class _Counter:
    """Counts the messages, and acknowledges them a number at a time."""

    def __init__(self, job: Job, together: int) -> None:
        self.job = job
        self.together = together
        self.counted = 0
        self.watch = Stopwatch(job.url)

    def open(self, channel: Channel) -> None:
        channel.basic_qos(prefetch_count=self.job.prefetch)
        channel.basic_consume(self.job.queue, self.deliver)

    def deliver(self, channel: Channel, method: Any, _properties: Any, body: bytes) -> None:
        if not self.counted:
            self.watch.start()
        json.loads(body)
        self.counted += 1
        is_last = self.counted == self.job.count
        if is_last or self.counted % self.together == 0:
            channel.basic_ack(method.delivery_tag, multiple=self.together > 1)
        if is_last:
            self.watch.stop()
            channel.connection.close()


def _raw(job: Job, together: int) -> Sample:
    counter = _Counter(job, together)
    raw.run(job.url, counter.open)
    return counter.watch.sample(job.count - 1, "message")  # from the first to the last


def _raw_in_hundreds(job: Job) -> Sample:
    return _raw(job, together=100)


def _raw_singly(job: Job) -> Sample:
    return _raw(job, together=1)


# ---------------------------------------------------------------------------- postage


class _Processor(MessageProcessor):
    """Counts the messages, and ends after the last."""

    def __init__(self, job: Job) -> None:
        queue = Queue(job.queue, type=job.kind)
        self.prefetch = job.prefetch or None
        self.count = job.count
        self.counted = 0
        self.watch = Stopwatch(job.url)
        super().__init__(FINGERPRINT, [(DefaultExchange, [(queue, job.queue)])])

    @MessageHandler("command", "echo")
    def msg_echo(self, _content: Any) -> None:
        if not self.counted:
            self.watch.start()
        self.counted += 1
        if self.counted == self.count:
            self.watch.stop()
            raise ExitScheduler


def _processor(job: Job) -> Sample:
    processor = _Processor(job)
    processor.start_consuming()
    return processor.watch.sample(job.count - 1, "message")
