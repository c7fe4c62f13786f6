# SPDX-License-Identifier: MIT
"""FastStream: a framework on aio-pika, with validation by pydantic.

Its log of each message is off. It would use uvloop and orjson if they were installed, with which it
was no faster in this work. A subscriber without a prefetch count has none, so the broker delivers
all that it has.
"""

from __future__ import annotations

import asyncio
from typing import Any

from faststream.rabbit import Channel, RabbitBroker, RabbitQueue

from benchmarks.envelope import envelope
from benchmarks.job import Job
from benchmarks.measuring import Sample, Stopwatch
from benchmarks.peers import asynchronous, protocol


def publish_singly(job: Job) -> Sample:
    """Publish with confirms, which are on unless said otherwise."""
    return asyncio.run(_publish(job))


def publish_many(job: Job) -> Sample:
    """Publish with confirms, by many tasks; it has no batches for RabbitMQ."""
    return asyncio.run(_publish(job))


async def _publish(job: Job) -> Sample:
    async with RabbitBroker(job.url, logger=None) as broker:
        await broker.connect()

        async def publish(number: int) -> None:
            await broker.publish(envelope(number), queue, persist=True)

        queue = RabbitQueue(job.queue, declare=False)
        return await asynchronous.measure(job, publish, "message")


def consume(job: Job) -> Sample:
    """Handle the messages of a queue that exists."""
    return asyncio.run(_consume(job))


async def _consume(job: Job) -> Sample:
    broker = _broker(job)
    watch = Stopwatch()
    counted = 0
    handled = asyncio.Event()

    @broker.subscriber(RabbitQueue(job.queue, declare=False))
    async def count(_message: dict[str, Any]) -> None:
        nonlocal counted
        if not counted:
            watch.start()
        counted += 1
        if counted == job.count:
            watch.stop()
            handled.set()

    async with broker:
        await broker.start()
        protocol.ready()
        await handled.wait()
    return watch.sample(job.count - 1, "message")


def serve(job: Job) -> None:
    """Answer calls."""
    asyncio.run(_serve(job))


async def _serve(job: Job) -> None:
    broker = _broker(job)

    @broker.subscriber(RabbitQueue(job.queue, declare=False))
    async def answer(message: dict[str, Any]) -> dict[str, Any]:
        return envelope(message["content"]["parameters"]["no"] + 1)

    async with broker:
        await broker.start()
        protocol.ready()
        await asyncio.Event().wait()


def call(job: Job) -> Sample:
    """Call with ``broker.request()``, which holds a lock until the reply is there."""
    return asyncio.run(_call(job))


async def _call(job: Job) -> Sample:
    async with RabbitBroker(job.url, logger=None) as broker:
        await broker.connect()

        async def request(number: int) -> int:
            reply = await broker.request(envelope(number), job.queue, timeout=60.0)
            message: Any = await reply.decode()
            return int(message["content"]["parameters"]["no"])

        return await asynchronous.call(job, request)


def _broker(job: Job) -> RabbitBroker:
    channel = Channel(prefetch_count=job.prefetch) if job.prefetch else None
    return RabbitBroker(job.url, logger=None, default_channel=channel)


if __name__ == "__main__":
    protocol.main(publish_singly, publish_many, consume, serve, call)
