# SPDX-License-Identifier: MIT
"""What tests of components share: an exchange, a producer, a way to run, a raw channel."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel

from postage.messaging import Exchange, GenericProducer, MessageProcessor
from postage.microthreads import MicroScheduler
from tests.waiting import wait_until

#: Seconds that a scheduler gets to end. Leaving has deadlines of its own that are shorter.
END_DEADLINE_SECONDS = 90.0


class TestExchange(Exchange):
    """Where the producer sends to, and the queues of the tests are bound to."""

    __test__ = False

    name = "test-exchange"


class Sender(GenericProducer):
    """Sends to the key of `eqk_of("q")`. A call waits for 20 seconds, once."""

    eks = [(TestExchange, "q")]
    rpc_timeout = 20
    max_retry = 0


def eqk_of(*queues: Any) -> list[Any]:
    """Return an eqk in which each queue is bound with its name as the key."""
    return [
        (TestExchange, [(queue, queue if isinstance(queue, str) else queue["name"])])
        for queue in queues
    ]


class Running:
    """Processors that run in one scheduler, in a thread of its own, while the block lasts.

    In the end they stop, and what ended the scheduler otherwise is raised.
    """

    def __init__(self, *processors: MessageProcessor) -> None:
        self.processors = processors
        self.scheduler = MicroScheduler(autoquit=True)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="scheduler of the test")

    def __enter__(self) -> Running:
        for processor in self.processors:
            self.scheduler.add_microthread(processor)
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for processor in self.processors:
            processor.stop_consuming()
        try:
            self.join()
        finally:
            for processor in self.processors:
                processor.close()
        if kind is None and self.error is not None:
            raise self.error

    def join(self) -> None:
        """Wait until the scheduler has ended by itself."""
        self.thread.join(END_DEADLINE_SECONDS)
        assert not self.thread.is_alive(), f"{self.scheduler!r} does not end"

    def _run(self) -> None:
        try:
            for _ in self.scheduler.main():
                pass
        except BaseException as error:
            self.error = error


@contextlib.contextmanager
def raw_channel() -> Iterator[BlockingChannel]:
    """Open a channel of pika to the broker that POSTAGE_URL names, with confirms."""
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["POSTAGE_URL"]))
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
    finally:
        connection.close()


def take(channel: BlockingChannel, queue: str, count: int = 1) -> list[tuple[Any, bytes]]:
    """Take messages out of a queue as they come, and return their properties and bodies."""
    taken: list[tuple[Any, bytes]] = []

    def take_what_is_there() -> bool:
        while len(taken) < count:
            method, properties, body = channel.basic_get(queue, auto_ack=True)
            if method is None:
                return False
            assert body is not None
            taken.append((properties, body))
        return True

    wait_until(take_what_is_there, message=f"{count} messages in {queue}")
    return taken


def rest_of(queue: str) -> list[bytes]:
    """Return the bodies that are ready in a queue, which is empty then."""
    with raw_channel() as channel:
        bodies = (channel.basic_get(queue, auto_ack=True)[2] for _ in itertools.count())
        return list(itertools.takewhile(lambda body: body is not None, bodies))  # type: ignore[arg-type]


def command(name: str, parameters: Any = None, category: str = "message") -> dict[str, Any]:
    """Return the body of a command."""
    return {
        "type": "command",
        "name": name,
        "category": category,
        "version": "2",
        "fingerprint": {},
        "content": {"parameters": {} if parameters is None else parameters},
        "_reserved": {},
    }
