# SPDX-License-Identifier: MIT
"""Heartbeats: all clients are idle at the same time, since it takes seconds until one is missed."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import kombu
import pika
import pytest

if sys.version_info >= (3, 11):  # see conftest.py
    import aio_pika
    import amqpstorm

#: Seconds between the heartbeats that the clients ask for.
HEARTBEAT_SECONDS = 1

#: The same, as the end of a URL.
ASK = f"?heartbeat={HEARTBEAT_SECONDS}"

#: Either side gives up after two that are missing; RabbitMQ needs up to three intervals to see it.
IDLE_SECONDS = 3.5 * HEARTBEAT_SECONDS


def idle_in_pika(url: str) -> str:
    """Be idle, then declare a queue and return its name."""
    with pika.BlockingConnection(pika.URLParameters(f"{url}{ASK}")) as connection:
        connection.process_data_events(time_limit=IDLE_SECONDS)
        queue: str = connection.channel().queue_declare("pika", exclusive=True).method.queue
        return queue


def idle_in_kombu(url: str) -> str:
    """Be idle, but for the calls that kombu and py-amqp need."""
    with kombu.Connection(url, heartbeat=HEARTBEAT_SECONDS) as connection:
        channel = connection.default_channel
        assert HEARTBEAT_SECONDS == connection.get_heartbeat_interval()
        deadline = time.monotonic() + IDLE_SECONDS
        while time.monotonic() < deadline:
            connection.heartbeat_check()
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
        queue: str = kombu.Queue("kombu", exclusive=True)(channel).declare()
        return queue


def idle_in_aio_pika(url: str) -> str:
    """Be idle, while tasks of aiormq watch the connection."""

    async def idle() -> str:
        async with await aio_pika.connect(f"{url}{ASK}") as connection:
            closed = asyncio.ensure_future(connection.closed())
            done, _pending = await asyncio.wait([closed], timeout=IDLE_SECONDS)
            assert not done
            channel = await connection.channel()
            return (await channel.declare_queue("aio-pika", exclusive=True)).name

    return asyncio.run(idle())


def idle_in_amqpstorm(url: str) -> str:
    """Be idle, while threads of amqpstorm watch the connection."""
    with amqpstorm.UriConnection(f"{url}{ASK}") as connection:
        assert not threading.Event().wait(IDLE_SECONDS)
        connection.check_for_errors()
        declared = connection.channel().queue.declare("amqpstorm", exclusive=True)
        queue: str = declared["queue"]
        return queue


def test_idle_connections_with_a_small_heartbeat_live(url: str) -> None:
    """Heartbeats go both ways, and none comes where a client cannot expect it."""
    clients = {"pika": idle_in_pika, "kombu": idle_in_kombu}
    if sys.version_info >= (3, 11):
        clients |= {"aio-pika": idle_in_aio_pika, "amqpstorm": idle_in_amqpstorm}
    with ThreadPoolExecutor(len(clients)) as pool:
        idling = [pool.submit(client, url) for client in clients.values()]
        names = [each.result() for each in idling]
    assert list(clients) == names


def test_the_broker_leaves_a_client_that_sends_no_heartbeats(url: str) -> None:
    """kombu sends them only when it is asked to, and here nobody asks."""
    with kombu.Connection(url, heartbeat=HEARTBEAT_SECONDS) as connection:
        connection.connect()
        with pytest.raises(OSError) as caught:
            connection.drain_events(timeout=30)
        assert not isinstance(caught.value, TimeoutError)
