# SPDX-License-Identifier: MIT
"""Delayed messages: how late they are.

Many messages with delays of all lengths are sent at once. The sender and the receiver are
processes of their own, which share the clock of the machine.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import psutil
from pika.channel import Channel

from benchmarks import broker, cpu, embedded, raw
from benchmarks.broker import Job
from benchmarks.children import in_child, service
from benchmarks.envelope import FINGERPRINT
from benchmarks.measuring import Case, Sample, Workload, percentile
from postage.messaging import GenericProducer
from tests.rabbitmq_node import RabbitNode

#: Seconds of the shortest and of the longest delay.
SHORTEST, LONGEST = 0.1, 20.0
#: Seconds for which the CPU of an idle broker is measured, after so many to settle.
WATCHED, SETTLING = 30.0, 5.0
#: Seconds for which the receiver looks out for messages that come twice.
LINGER = 1.0


def workloads(scale: float) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How much to send, and how long it waits.
    """
    longest = LONGEST * scale
    cases = []
    for count in (round(1_000 * scale), round(10_000 * scale)):
        cases.append(Case(f"RabbitMQ, {count:,}", partial(_measure, count, longest)))
        cases.append(Case(f"embedded, {count:,}", partial(_embedded, count, longest)))
    idle = [
        Case("RabbitMQ", partial(_idle_rabbitmq, round(10_000 * scale), WATCHED * scale)),
        Case("embedded", partial(_idle_embedded, round(10_000 * scale), WATCHED * scale)),
    ]
    title = f"Delays of {SHORTEST:g} to {longest:g} s, messages sent at once"
    return [
        Workload("delay", title, cases, rounds=1),
        Workload("waiting", "CPU of a broker while messages wait an hour", idle, rounds=1),
    ]


def _idle_rabbitmq(count: int, seconds: float, _url: str) -> Sample:
    with RabbitNode() as node:
        return _cpu(node.url, node.pids, count, seconds)


def _idle_embedded(count: int, seconds: float, _url: str) -> Sample:
    with embedded.running(store=True) as (url, pid):
        return _cpu(url, {pid}, count, seconds)


def _cpu(url: str, pids: Collection[int], count: int, seconds: float) -> Sample:
    """Measure what processes take, a broker before and after it got messages that wait."""
    with broker.job(url, "quorum", 0) as job:
        in_child(_send_for_an_hour, job, 10)  # the queues of the cascade are there
        idle = _share(pids, seconds)
        in_child(_send_for_an_hour, job, count)
        waiting = _share(pids, seconds)
    return {"idle, % of a core": idle, f"with {count:,} waiting": waiting}


def _share(pids: Collection[int], seconds: float) -> float:
    """Return the CPU that processes take, in percent of a core."""
    time.sleep(SETTLING)
    return cpu.share([psutil.Process(pid) for pid in pids], seconds)


def _send_for_an_hour(job: Job, count: int) -> None:
    os.environ["POSTAGE_URL"] = job.url
    with GenericProducer(FINGERPRINT) as producer, producer.batch() as batch:
        for number in range(count):
            batch.message_due(number, _queue=job.queue, _delay=3600 + number % 1000)


def _embedded(count: int, longest: float, _url: str) -> Sample:
    with embedded.running(store=True) as (url, _):
        return _measure(count, longest, url)


def _measure(count: int, longest: float, url: str) -> Sample:
    with broker.job(url, "quorum", count, prefetch=200) as job, service(_send, job, longest):
        sample: Sample = in_child(_receive, job)
        return sample


def _send(ready: Callable[[], None], job: Job, longest: float) -> None:
    os.environ["POSTAGE_URL"] = job.url
    chance = random.Random(job.count)
    with GenericProducer(FINGERPRINT) as producer:
        ready()
        with producer.batch() as batch:
            for number in range(job.count):
                delay = chance.uniform(SHORTEST, longest)
                due = time.time() + delay
                batch.message_due(number, due, _queue=job.queue, _delay=delay)


class _Receiver:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.lateness: list[float] = []
        self.numbers: Counter[int] = Counter()

    def open(self, channel: Channel) -> None:
        channel.basic_qos(prefetch_count=self.job.prefetch)
        channel.basic_consume(self.job.queue, self.deliver)

    def deliver(self, channel: Channel, method: Any, _properties: Any, body: bytes) -> None:
        now = time.time()
        number, due = json.loads(body)["content"]["parameters"]
        self.lateness.append((now - due) * 1000)
        self.numbers[number] += 1
        channel.basic_ack(method.delivery_tag)
        if len(self.lateness) == self.job.count:
            channel.connection.ioloop.call_later(LINGER, channel.connection.close)


def _receive(job: Job) -> Sample:
    receiver = _Receiver(job)
    raw.run(job.url, receiver.open)
    late = receiver.lateness
    return {
        "late p50 ms": percentile(late, 50),
        "p99": percentile(late, 99),
        "worst": max(late),
        "early": sum(each < 0 for each in late),
        "doubled": receiver.numbers.total() - len(receiver.numbers),
    }
