# SPDX-License-Identifier: MIT
"""aio-pika: a client for asyncio, with the plain channel that its documentation begins with."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aio_pika
from aio_pika.abc import AbstractIncomingMessage
from aio_pika.patterns import RPC, JsonRPC

from benchmarks.envelope import envelope
from benchmarks.job import Job
from benchmarks.measuring import Sample, Stopwatch
from benchmarks.peers import asynchronous, protocol


def publish_singly(job: Job) -> Sample:
    """Publish with confirms, which are on unless said otherwise."""
    return asyncio.run(_publish(job))


def publish_many(job: Job) -> Sample:
    """Publish with confirms, by many tasks."""
    return asyncio.run(_publish(job))


async def _publish(job: Job) -> Sample:
    async with await aio_pika.connect(job.url) as connection:
        exchange = (await connection.channel()).default_exchange

        async def publish(number: int) -> None:
            await exchange.publish(_message(number), job.queue)

        return await asynchronous.measure(job, publish, "message")


def _message(number: int) -> aio_pika.Message:
    return aio_pika.Message(
        json.dumps(envelope(number)).encode(),
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )


def consume(job: Job) -> Sample:
    """Handle the messages of a queue that exists, by a callback: iterators cost more."""
    return asyncio.run(_consume(job))


async def _consume(job: Job) -> Sample:
    watch = Stopwatch()
    counted = 0
    handled = asyncio.Event()

    async def count(message: AbstractIncomingMessage) -> None:
        nonlocal counted
        if not counted:
            watch.start()
        json.loads(message.body)
        counted += 1
        await message.ack()
        if counted == job.count:
            watch.stop()
            handled.set()

    async with await aio_pika.connect(job.url) as connection:
        channel = await connection.channel()
        if job.prefetch:
            await channel.set_qos(prefetch_count=job.prefetch)
        queue = await channel.get_queue(job.queue)
        await queue.consume(count)
        protocol.ready()
        await handled.wait()
    return watch.sample(job.count - 1, "message")


def serve(job: Job) -> None:
    """Answer calls, with its RPC pattern, which declares the queue."""
    asyncio.run(_serve(job))


async def _serve(job: Job) -> None:
    async def following(*, message: Any) -> Any:
        return envelope(message["content"]["parameters"]["no"] + 1)

    async with await aio_pika.connect(job.url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=job.prefetch)
        rpc = await JsonRPC.create(channel)
        await rpc.register(job.queue, following, durable=True)
        protocol.ready()
        await asyncio.Event().wait()


def call(job: Job) -> Sample:
    """Call, with its RPC pattern."""
    return asyncio.run(_call(job))


async def _call(job: Job) -> Sample:
    async with await aio_pika.connect(job.url) as connection:
        rpc: RPC = await JsonRPC.create(await connection.channel())

        async def request(number: int) -> int:
            reply = await rpc.call(job.queue, {"message": envelope(number)})
            return int(reply["content"]["parameters"]["no"])

        return await asynchronous.call(job, request)


if __name__ == "__main__":
    protocol.main(publish_singly, publish_many, consume, serve, call)
