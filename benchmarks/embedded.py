# SPDX-License-Identifier: MIT
"""The embedded broker beside RabbitMQ: one client publishes with confirms and consumes.

Each broker runs in a process of its own. What must cost no more is measured, too: a queue in
which 100,000 messages wait, and a topic exchange with 1,000 bindings.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pika
import psutil
from pika.channel import Channel

from benchmarks.children import in_child
from benchmarks.envelope import envelope
from benchmarks.measuring import Case, Sample, Stopwatch, Workload
from postage.broker import Broker

#: Messages that are published ahead of their confirms, and delivered ahead of their acks.
WINDOW, PREFETCH, ACK_EVERY = 1000, 200, 50
#: What must not slow it down.
BACKLOG, BINDINGS = 100_000, 1_000

RABBITMQ = "RabbitMQ, classic, transient"
EMBEDDED = "embedded, classic, transient"


def workloads(scale: float) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How much to send, 1 being enough for a steady rate.
    """
    count = round(40_000 * scale)
    backlog = round(BACKLOG * scale)
    plain = Work(count)
    bound = Work(count, bindings=BINDINGS)
    deep = Work(count, backlog=backlog)
    kept = Work(count, kind="quorum")
    cases = [
        Case(RABBITMQ, partial(_pair_in_child, plain)),
        Case(EMBEDDED, partial(_embedded, plain), RABBITMQ),
        Case(f"the same, {BINDINGS:,} bindings", partial(_embedded, bound), EMBEDDED),
        Case(f"the same, {backlog:,} waiting", partial(_embedded, deep), EMBEDDED),
        Case("embedded, quorum, with a store", partial(_embedded, kept), EMBEDDED),
    ]
    memory = [Case("embedded, 246 bytes of body", partial(_memory, backlog))]
    return [
        Workload("broker", "Published with confirms and consumed by one client", cases, rounds=3),
        Workload("memory", "Memory of messages that wait", memory, rounds=1),
    ]


@dataclass(frozen=True)
class Work:
    """What a pair does.

    Attributes:
        kind: quorum queues get persistent messages, and the broker a store.
        bindings: of other keys to the exchange through which the messages go; 0 for none.
        backlog: messages that are in the queue all the time.
    """

    count: int
    kind: str = "classic"
    bindings: int = 0
    backlog: int = 0

    @property
    def is_quorum(self) -> bool:
        return self.kind == "quorum"


def _pair_in_child(work: Work, url: str) -> Sample:
    sample: Sample = in_child(pair, url, work)
    return sample


def _embedded(work: Work, _url: str) -> Sample:
    with running(work.is_quorum) as (url, _):
        return _pair_in_child(work, url)


@contextlib.contextmanager
def running(store: bool = False) -> Iterator[tuple[str, int]]:
    """Run a broker in a process of its own. Yields its URL and its process id."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "store") if store else ""
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.embedded", path], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.terminate()
            process.communicate()


def _memory(count: int, _url: str) -> Sample:
    with running() as (url, pid):
        process = psutil.Process(pid)
        in_child(fill, url, 1_000)
        before = process.memory_info().rss
        in_child(fill, url, count)
        return {"bytes a message": (process.memory_info().rss - before) / count}


def fill(url: str, count: int) -> None:
    """Publish messages that wait."""
    body = json_body()
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        queue = f"fill-{uuid.uuid4().hex}"
        channel.queue_declare(queue)
        for _ in range(count):
            channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=1))
        channel.queue_declare(queue, passive=True)  # answered after the last of them


def json_body() -> bytes:
    """Return the envelope of all benchmarks."""
    return json.dumps(envelope(1)).encode()


class _Pair:
    """Publishes into a queue and consumes from it, over two connections on one loop."""

    def __init__(self, url: str, queue: str, target: tuple[str, str], count: int) -> None:
        self.url = url
        self.queue = queue
        self.target = target
        self.count = count
        self.sent = self.confirmed = self.received = 0
        self.watch = Stopwatch()
        self.body = json_body()
        self.connections: list[pika.SelectConnection] = []

    def run(self, persistent: bool) -> None:
        self.properties = pika.BasicProperties(
            content_type="application/json", delivery_mode=2 if persistent else 1
        )
        self.connect(self.publisher_opened)
        self.loop.start()

    def connect(self, use: Callable[[Channel], None]) -> None:
        def opened(connection: pika.connection.Connection) -> None:
            connection.channel(on_open_callback=use)

        loop = self.connections[0].ioloop if self.connections else None
        connection = pika.SelectConnection(
            pika.URLParameters(self.url), on_open_callback=opened, custom_ioloop=loop
        )
        self.connections.append(connection)

    @property
    def loop(self) -> Any:
        return self.connections[0].ioloop

    def publisher_opened(self, channel: Channel) -> None:
        self.channel = channel
        channel.confirm_delivery(self.on_confirm)
        self.connect(self.consumer_opened)

    def consumer_opened(self, channel: Channel) -> None:
        channel.basic_qos(prefetch_count=PREFETCH)
        channel.basic_consume(self.queue, self.on_delivery, callback=lambda _frame: self.begin())

    def begin(self) -> None:
        self.watch.start()
        self.publish()

    def publish(self) -> None:
        while self.sent < self.count and self.sent - self.confirmed < WINDOW:
            self.channel.basic_publish(*self.target, self.body, self.properties)
            self.sent += 1

    def on_confirm(self, frame: Any) -> None:
        tag = frame.method.delivery_tag
        self.confirmed = tag if frame.method.multiple else self.confirmed + 1
        if self.sent - self.confirmed < WINDOW // 2:
            self.publish()
        self.see()

    def on_delivery(self, channel: Channel, method: Any, _properties: Any, _body: bytes) -> None:
        self.received += 1
        if self.received % ACK_EVERY == 0 or self.received >= self.count:
            channel.basic_ack(method.delivery_tag, multiple=True)
        self.see()

    def see(self) -> None:
        if self.confirmed >= self.count and self.received >= self.count:
            self.watch.stop()
            self.loop.stop()


def pair(url: str, work: Work) -> Sample:
    """Publish and consume, and say how fast that was."""
    queue = f"pair-{uuid.uuid4().hex}"
    target = ("", queue)
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        arguments = {"x-queue-type": work.kind} if work.is_quorum else {}
        channel.queue_declare(queue, durable=work.is_quorum, arguments=arguments)
        if work.bindings:
            target = (queue, "wanted.by.this")
            channel.exchange_declare(queue, "topic", auto_delete=True)
            channel.queue_bind(queue, queue, "wanted.*.this")
            for number in range(work.bindings):
                channel.queue_bind(queue, queue, f"other.{number}.#")
        body = json_body()
        for _ in range(work.backlog):
            channel.basic_publish("", queue, body)
        channel.queue_declare(queue, passive=True)
        clients = _Pair(url, queue, target, work.count)
        clients.run(work.is_quorum)
        channel.queue_delete(queue)
    return clients.watch.sample(work.count, "message")


def main() -> None:
    """Run a broker until SIGTERM; its URL is the only line printed."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with Broker(store=sys.argv[1] or None) as broker:
        print(broker.url, flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
