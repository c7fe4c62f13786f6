# SPDX-License-Identifier: MIT
"""PikaBus: a message bus on aio-pika.

A consumer handles as many messages at a time as it prefetches: its default is one at a time. It has
no calls that wait for their reply: the client knows a reply by the correlation id that it gave to
the request, which PikaBus hands on.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from PikaBus.PikaBusSetup import PikaBusSetup
from PikaBus.PikaProperties import PikaProperties

from benchmarks.envelope import envelope, numbers
from benchmarks.job import Job
from benchmarks.measuring import Sample, Stopwatch
from benchmarks.peers import asynchronous, protocol

#: Messages of a transaction.
TOGETHER = 500
#: The header that PikaBus hands on from a request to its reply.
CORRELATION = PikaProperties().correlationIdHeaderKey


def publish_singly(job: Job) -> Sample:
    """Send with confirms, which are on unless said otherwise."""
    return asyncio.run(_publish_singly(job))


async def _publish_singly(job: Job) -> Sample:
    async with _setup(job, None) as setup:
        await setup.Init()  # declares the exchanges
        bus = await setup.CreateBus()

        async def publish(number: int) -> None:
            await bus.Send(envelope(number), queue=job.queue)

        sample = await asynchronous.measure(job, publish, "message")
        await bus.Close()
    return sample


def publish_many(job: Job) -> Sample:
    """Send with confirms, in transactions, which send their messages at once in the end."""
    return asyncio.run(_publish_many(job))


async def _publish_many(job: Job) -> Sample:
    watch = Stopwatch()
    async with _setup(job, None) as setup:
        await setup.Init()  # declares the exchanges
        bus = await setup.CreateBus()
        watch.start()
        all_numbers = numbers(job.count)
        for first in range(0, job.count, TOGETHER):
            bus.StartTransaction()
            for number in all_numbers[first : first + TOGETHER]:
                await bus.Send(envelope(number), queue=job.queue)
            await bus.CommitTransaction()
        watch.stop()
        await bus.Close()
    return watch.sample(job.count, "message")


def consume(job: Job) -> Sample:
    """Handle the messages of a queue that exists."""
    return asyncio.run(_consume(job))


async def _consume(job: Job) -> Sample:
    watch = Stopwatch()
    counted = 0
    handled = asyncio.Event()

    async def count(**_arguments: Any) -> None:
        nonlocal counted
        if not counted:
            watch.start()
        counted += 1
        if counted == job.count:
            watch.stop()
            handled.set()

    async with _setup(job, job.queue) as setup:
        setup.AddMessageHandler(count)
        await setup.StartConsumers()
        protocol.ready()
        await handled.wait()
        await setup.StopConsumers()
    return watch.sample(job.count - 1, "message")


def serve(job: Job) -> None:
    """Answer messages."""
    asyncio.run(_serve(job))


async def _serve(job: Job) -> None:
    async def answer(bus: Any, payload: Any, **_arguments: Any) -> None:
        await bus.Reply(envelope(payload["content"]["parameters"]["no"] + 1))

    async with _setup(job, job.queue) as setup:
        setup.AddMessageHandler(answer)
        await setup.StartConsumers()
        protocol.ready()
        await asyncio.Event().wait()


def call(job: Job) -> Sample:
    """Send a message with a correlation id, and wait for the message that has the same."""
    return asyncio.run(_call(job))


async def _call(job: Job) -> Sample:
    waiting: dict[str, asyncio.Future[int]] = {}

    async def replied(data: Any, payload: Any, **_arguments: Any) -> None:
        correlation_id = data["incomingMessage"]["headers"][CORRELATION]
        waiting.pop(correlation_id).set_result(payload["content"]["parameters"]["no"])

    replies = f"{job.queue}-replies"
    settings = {"auto_delete": True}  # not exclusive: who replies to a queue binds it
    async with _setup(job, replies, settings) as setup:
        setup.AddMessageHandler(replied)
        await setup.StartConsumers()
        bus = await setup.CreateBus()

        async def request(number: int) -> int:
            correlation_id = str(uuid.uuid4())
            reply = waiting[correlation_id] = asyncio.get_running_loop().create_future()
            headers = {CORRELATION: correlation_id}
            await bus.Send(envelope(number), queue=job.queue, headers=headers)
            return await reply

        sample = await asynchronous.call(job, request)
        await bus.Close()
        await setup.StopConsumers()
    return sample


def _setup(
    job: Job, listener_queue: str | None, settings: dict[str, Any] | None = None
) -> PikaBusSetup:
    """Return a bus, of the job's prefetch count or its own, that takes the queue as it is."""
    prefetch = {"defaultPrefetchCount": job.prefetch, "defaultConcurrency": job.prefetch}
    return PikaBusSetup(
        job.url,
        defaultListenerQueue=listener_queue,
        defaultListenerQueueSettings=settings or {"passive": True},
        defaultDirectExchange=f"{job.queue}-direct",
        defaultTopicExchange=f"{job.queue}-topic",
        **(prefetch if job.prefetch else {}),
    )


if __name__ == "__main__":
    protocol.main(publish_singly, publish_many, consume, serve, call)
