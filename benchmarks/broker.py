# SPDX-License-Identifier: MIT
"""The broker, its queues, and the facts that belong beside every figure."""

from __future__ import annotations

import contextlib
import os
import platform
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pika
from pika.adapters.blocking_connection import BlockingChannel

from benchmarks import raw
from benchmarks.job import Job as Job
from postage.topology import Queue, QueueSpec
from tests.rabbitmq_node import RabbitNode


@contextlib.contextmanager
def broker() -> Iterator[str]:
    """Provide a broker: the one of POSTAGE_URL, or a private RabbitMQ node. Yields its URL."""
    url = os.environ.get("POSTAGE_URL")
    if url:
        yield url
        return
    with RabbitNode() as node:
        os.environ["POSTAGE_URL"] = node.url  # for postage, in this process and in its children
        try:
            yield node.url
        finally:
            del os.environ["POSTAGE_URL"]


def conditions(url: str) -> dict[str, str]:
    """Return what the figures depend on."""
    server = raw.server_properties(url)
    return {
        "machine": f"{os.cpu_count()} cores, {_processor()}, load {os.getloadavg()[0]:.1f}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "postage": version("postage"),
        "pika": version("pika"),
        "simplejson": version("simplejson"),
        "broker": f"{_text(server, 'product')} {_text(server, 'version')}",
        "platform of the broker": _text(server, "platform"),
    }


@contextlib.contextmanager
def job(
    url: str, kind: str, count: int, prefetch: int = 10, in_flight: int = 1
) -> Iterator[Job]:
    """Provide a job, whose queue exists as long as the block runs."""
    name = f"postage-benchmark-{uuid.uuid4().hex[:8]}"
    spec = QueueSpec(name, durable=False) if kind == "transient" else Queue(name, type=kind).spec()
    with channel(url) as opened:
        opened.queue_declare(name, durable=spec.durable, arguments=dict(spec.arguments))
    try:
        yield Job(url, name, kind, count, prefetch, in_flight)
    finally:
        with channel(url) as opened:
            opened.queue_delete(name)
            if spec.error_queue:
                opened.queue_delete(spec.error_queue)


def messages_left(job: Job) -> int:
    """Return how many messages are in the queue of a job, and with nobody."""
    with channel(job.url) as opened:
        return int(opened.queue_declare(job.queue, passive=True).method.message_count)


def is_consumed(job: Job) -> bool:
    """Tell whether the queue of a job has a consumer."""
    with channel(job.url) as opened:
        return bool(opened.queue_declare(job.queue, passive=True).method.consumer_count)


@contextlib.contextmanager
def channel(url: str) -> Iterator[BlockingChannel]:
    """Provide a channel over a connection of its own."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        yield connection.channel()


def _text(properties: dict[str, object], key: str) -> str:
    value = properties.get(key, "unknown")
    return value.decode() if isinstance(value, bytes) else str(value)


def _processor() -> str:
    """Return the name of the processor, where Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
