# SPDX-License-Identifier: MIT
"""Publishing with confirms: many messages at once, and one by one."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pika
from pika.channel import Channel

from benchmarks import broker, ceiling, cpu, raw
from benchmarks.broker import Job
from benchmarks.children import in_child
from benchmarks.envelope import FINGERPRINT, envelope, numbers, parameters
from benchmarks.measuring import Case, Sample, Stopwatch, Target, Workload
from benchmarks.peers import cases
from benchmarks.peers.cases import Peer
from postage.messaging import DefaultExchange, GenericProducer

#: Messages that plain pika sends ahead of their confirms; as many as a batch of postage does.
WINDOW = 2000
#: Messages that it writes before it lets its loop run.
CHUNK = 500

_PERSISTENT = pika.BasicProperties(content_type="application/json", delivery_mode=2)


def workloads(scale: float, peers: Sequence[Peer] = ()) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How much to send, 1 being enough for a steady rate.
        peers: Who does the work, too.
    """
    many, some = round(30_000 * scale), round(2_000 * scale)
    batch, single = [], []
    for kind in ("classic", "quorum"):
        base = f"pika SelectConnection, {kind}"
        limit = f"the broker's ceiling, {kind}"
        batch.append(Case(limit, _case(ceiling.publish, kind, many)))
        batch.append(Case(base, _case(publish, kind, many), limit))
        batch.append(Case(f"batch(), {kind}", _case(_batch, kind, many), limit, Target(0.85)))
        base = f"pika BlockingConnection, {kind}"
        single.append(Case(base, _case(_blocking, kind, some)))
        single.append(Case(f"message_x(), {kind}", _case(_one_by_one, kind, some), base))
    if cpu.can_be_apart():
        limit = "the broker's ceiling, quorum, cores apart"
        work = _case(ceiling.publish, "quorum", many, apart=True)
        batch.append(Case(limit, work))
        work = _case(_batch, "quorum", many, apart=True)
        batch.append(Case("batch(), quorum, cores apart", work, limit, Target(0.85)))
    for peer in peers:
        batch.append(cases.publish_many(peer, many))
        if peer.confirms != "never":
            single.append(cases.publish_singly(peer, some))
    return [
        Workload("batch", "Confirmed publishing, many at once", batch),
        Workload("single", "Confirmed publishing, one by one", single),
    ]


def _case(
    function: Callable[[Job], Sample], kind: str, count: int, apart: bool = False
) -> Callable[[str], Sample]:
    return partial(_measure, function, kind, count, apart)


def _measure(
    function: Callable[[Job], Sample], kind: str, count: int, apart: bool, url: str
) -> Sample:
    cores = cpu.apart(url) if apart else contextlib.nullcontext()
    with broker.job(url, kind, count) as job, cores:
        sample: Sample = in_child(function, job)
        return sample


# ------------------------------------------------------------------------- plain pika


class _Publisher:
    """Publishes messages, as many ahead of their confirms as the window allows."""

    def __init__(self, job: Job) -> None:
        self.queue = job.queue
        self.count = job.count
        self.numbers = iter(numbers(job.count))
        self.sent = 0
        self.outstanding: dict[int, None] = {}
        self.watch = Stopwatch(job.url)

    def open(self, channel: Channel) -> None:
        self.channel = channel
        channel.confirm_delivery(self.confirmed, callback=lambda _frame: self.start())

    def start(self) -> None:
        self.watch.start()
        self.publish()

    def publish(self) -> None:
        room = min(CHUNK, WINDOW - len(self.outstanding))
        for number in itertools.islice(self.numbers, room):
            body = json.dumps(envelope(number)).encode()
            self.channel.basic_publish("", self.queue, body, _PERSISTENT, mandatory=True)
            self.sent += 1
            self.outstanding[self.sent] = None
        if self.sent < self.count and len(self.outstanding) < WINDOW:
            self.channel.connection.ioloop.add_callback_threadsafe(self.publish)

    def confirmed(self, frame: Any) -> None:
        tag, was_full = frame.method.delivery_tag, len(self.outstanding) == WINDOW
        tags = [tag] if not frame.method.multiple else self.up_to(tag)
        for each in tags:
            del self.outstanding[each]
        if was_full:
            self.publish()
        if self.sent == self.count and not self.outstanding:
            self.watch.stop()
            self.channel.connection.close()

    def up_to(self, tag: int) -> list[int]:
        return list(itertools.takewhile(lambda each: each <= tag, self.outstanding))


def publish(job: Job) -> Sample:
    """Publish with plain pika, until the last confirm."""
    publisher = _Publisher(job)
    raw.run(job.url, publisher.open)
    return publisher.watch.sample(job.count, "message")


def _blocking(job: Job) -> Sample:
    with pika.BlockingConnection(pika.URLParameters(job.url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        watch = Stopwatch(job.url)
        watch.start()
        for number in numbers(job.count):
            body = json.dumps(envelope(number)).encode()
            channel.basic_publish("", job.queue, body, _PERSISTENT, mandatory=True)
        watch.stop()
    return watch.sample(job.count, "message")


# ---------------------------------------------------------------------------- postage


class _Producer(GenericProducer):
    def __init__(self, job: Job) -> None:
        self.eks = [(DefaultExchange, job.queue)]
        super().__init__(FINGERPRINT)
        self.message_echo()  # it connects with the first message


def _batch(job: Job) -> Sample:
    with _Producer(job) as producer:
        watch = Stopwatch(job.url)
        watch.start()
        with producer.batch() as batch:
            for number in numbers(job.count):
                batch.message_echo(**parameters(number))
        watch.stop()
    return watch.sample(job.count, "message")


def _one_by_one(job: Job) -> Sample:
    with _Producer(job) as producer:
        watch = Stopwatch(job.url)
        watch.start()
        for number in numbers(job.count):
            producer.message_echo(**parameters(number))
        watch.stop()
    return watch.sample(job.count, "message")
