# SPDX-License-Identifier: MIT
"""nameko: services in green threads, on kombu.

A service runs as ``nameko run`` runs it: patched by eventlet, with a `ServiceRunner`. Its number of
workers is also its prefetch count, 10 unless configured. Clients are the standalone proxy and the
publisher of its documentation, in a plain process. Requests carry the envelope as their argument.
"""

from __future__ import annotations

from benchmarks.peers import protocol

if protocol.is_service():
    import eventlet

    eventlet.monkey_patch()

import collections
import os
from typing import Any

from kombu import Queue
from nameko.amqp.publish import Publisher
from nameko.messaging import consume as consumes
from nameko.rpc import rpc
from nameko.runners import ServiceRunner
from nameko.standalone.rpc import ServiceRpcProxy

from benchmarks.envelope import envelope, numbers
from benchmarks.job import Job, check, one_by_one
from benchmarks.measuring import Sample, Stopwatch


def publish_singly(job: Job) -> Sample:
    """Publish with confirms, which are on unless said otherwise."""
    return _publish(job, use_confirms=True)


def publish_many(job: Job) -> Sample:
    """Publish without confirms: with them, each message waits for its own."""
    return _publish(job, use_confirms=False)


def _publish(job: Job, use_confirms: bool) -> Sample:
    publisher = Publisher(job.url, use_confirms=use_confirms)
    publisher.publish(envelope(0), routing_key="")  # it connects with the first message
    watch = Stopwatch()
    watch.start()
    for number in numbers(job.count):
        publisher.publish(envelope(number), routing_key=job.queue)
    watch.stop()
    return watch.sample(job.count, "message")


def consume(job: Job) -> None:
    """Handle the messages of a queue that exists."""
    watch = Stopwatch()
    counted = 0

    class Service:
        name = job.queue

        @consumes(Queue(job.queue, no_declare=True))
        def count(self, _content: Any) -> None:
            nonlocal counted
            if not counted:
                watch.start()
            counted += 1
            if counted == job.count:
                watch.stop()
                eventlet.spawn_after(0.5, _tell, watch.sample(job.count - 1, "message"))

    _run(Service, job)


def _tell(sample: Sample) -> None:
    """Print a sample, when the last message has been acknowledged, and end."""
    protocol.tell(sample)
    os._exit(0)


def serve(job: Job) -> None:
    """Answer calls, on the queue that nameko declares for the service."""

    class Service:
        name = job.queue

        @rpc
        def next(self, message: Any) -> Any:
            return envelope(message["content"]["parameters"]["no"] + 1)

    _run(Service, job)


def _run(service: type, job: Job) -> None:
    runner = ServiceRunner({**_config(job), "max_workers": job.prefetch})
    runner.add_service(service)
    runner.start()
    protocol.ready()
    runner.wait()


def call(job: Job) -> Sample:
    """Call one by one, or ahead with ``call_async``."""
    with ServiceRpcProxy(job.queue, _config(job)) as proxy:
        if job.in_flight == 1:
            return one_by_one(lambda number: _number(proxy.next(envelope(number))), job.count)
        proxy.next(envelope(0))  # it connects with the first call
        return _call_ahead(job, proxy)


def _call_ahead(job: Job, proxy: Any) -> Sample:
    calls: collections.deque[tuple[int, Any]] = collections.deque()
    watch = Stopwatch()
    watch.start()
    for number in numbers(job.count):
        if len(calls) == job.in_flight:
            _finish(*calls.popleft())
        calls.append((number, proxy.next.call_async(envelope(number))))
    while calls:
        _finish(*calls.popleft())
    watch.stop()
    return watch.sample(job.count, "call")


def _finish(number: int, reply: Any) -> None:
    check(number, _number(reply.result()))


def _number(message: Any) -> int:
    return int(message["content"]["parameters"]["no"])


def _config(job: Job) -> dict[str, Any]:
    return {"AMQP_URI": job.url, "rpc_exchange": f"{job.queue}-exchange"}


if __name__ == "__main__":
    protocol.main(publish_singly, publish_many, consume, serve, call)
