# SPDX-License-Identifier: MIT
"""dramatiq: a task queue on pika.

It declares its queues, and gets messages of its own kind only, which are JSON with the envelope in
it. It has no replies on RabbitMQ: results need Redis or Memcached. So there is no RPC here.
"""

from __future__ import annotations

import itertools
import os
import threading
from typing import Any

from benchmarks.envelope import envelope, numbers
from benchmarks.job import Job
from benchmarks.measuring import Sample, Stopwatch
from benchmarks.peers import protocol

if protocol.is_service() and protocol.job().prefetch:
    # Its name has small letters, and dramatiq reads it when it is imported.
    os.environ["dramatiq_queue_prefetch"] = str(protocol.job().prefetch)  # noqa: SIM112

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker


def publish_singly(job: Job) -> Sample:
    """Send with confirms."""
    return _publish(job, confirm_delivery=True)


def publish_many(job: Job) -> Sample:
    """Send without confirms: with them, each message waits for its own."""
    return _publish(job, confirm_delivery=False)


def _publish(job: Job, confirm_delivery: bool) -> Sample:
    broker = RabbitmqBroker(url=job.url, confirm_delivery=confirm_delivery)

    @dramatiq.actor(broker=broker, queue_name=job.queue)
    def count(_message: Any) -> None:
        pass

    broker.declare_queue(job.queue, ensure=True)
    watch = Stopwatch()
    watch.start()
    for number in numbers(job.count):
        count.send(envelope(number))
    watch.stop()
    broker.close()
    return watch.sample(job.count, "message")


def consume(job: Job) -> Sample:
    """Handle the messages of a queue."""
    broker = RabbitmqBroker(url=job.url)
    watch = Stopwatch()
    counter = itertools.count(1)
    handled = threading.Event()

    @dramatiq.actor(broker=broker, queue_name=job.queue)
    def count(_message: Any) -> None:
        counted = next(counter)
        if counted == 1:
            watch.start()
        if counted == job.count:
            watch.stop()
            handled.set()

    worker = dramatiq.Worker(broker)  # with 8 threads: one is no faster
    worker.start()
    while worker.consumers[job.queue].consumer is None:
        handled.wait(0.001)
    protocol.ready()
    handled.wait()
    worker.stop()
    broker.close()
    return watch.sample(job.count - 1, "message")


if __name__ == "__main__":
    protocol.main(publish_singly, publish_many, consume)
