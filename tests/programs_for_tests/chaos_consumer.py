# SPDX-License-Identifier: MIT
"""An application that records what it handles: ``chaos_consumer.py --help``.

It says ``ready`` when it consumes, and ``left`` when it ended in order. A message is its id.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from postage.generic_application import GenericApplication, GenericApplicationExchange
from postage.messaging import Fingerprint, GenericConsumer, GenericProducer, MessageHandler
from postage.microthreads import MicroScheduler, sleep
from postage.transport.subscriber import Delivery
from tests.chaos.records import BEGUN, DELIVERED, HANDLED, Record, children_of
from tests.programs_for_tests.announcing import Announcing


class Consumer(GenericConsumer):
    """Records which message ids the deliveries have, and kills its process in front of an ack."""

    record: Record
    acks_until_death = 0

    def take(self) -> Delivery | None:
        delivery = super().take()
        if delivery is not None:
            parameters = self.decode(delivery.body)["content"].get("parameters")
            self.record.write(DELIVERED, str(parameters), str(delivery.properties.message_id))
        return delivery

    def ack(self, method: Delivery) -> None:
        if self.acks_until_death:
            self.acks_until_death -= 1
            if not self.acks_until_death:
                os.kill(os.getpid(), signal.SIGKILL)
        super().ack(method)


class Component(Announcing, GenericApplication):
    """Handles messages in all the ways that there are."""

    consumer_class = Consumer

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(Fingerprint(options.component).as_dict(), None)
        self.options = options
        self.known: set[str] = set()
        self.outbox = options.target is not None
        self.record = Record(Path(options.folder) / f"{options.component}-{os.getpid()}.received")
        assert isinstance(self.consumer, Consumer)
        self.consumer.record = self.record
        self.consumer.acks_until_death = options.die_at

    @MessageHandler("command", "plain")
    def msg_plain(self, content: Any) -> None:
        self.begin(content)
        time.sleep(self.options.seconds)
        self.end(content)

    @MessageHandler("command", "generator")
    def msg_generator(self, content: Any) -> Generator[Any, Any, None]:
        self.begin(content)
        yield sleep(self.options.seconds)
        self.end(content)

    @MessageHandler("command", "threaded", threaded=True)
    def msg_threaded(self, content: Any) -> None:
        self.msg_plain(content)

    @MessageHandler("command", "coroutine")
    async def msg_coroutine(self, content: Any) -> None:
        self.begin(content)
        await asyncio.sleep(self.options.seconds)
        self.end(content)

    @MessageHandler("command", "late")
    async def msg_late(self, content: Any) -> None:
        """Take long for the first time that this process gets a message."""
        self.begin(content)
        if content["parameters"] not in self.known:
            self.known.add(content["parameters"])
            await asyncio.sleep(self.options.late)
        self.end(content)

    @MessageHandler("command", "split")
    def msg_split(self, content: Any) -> None:
        """Send two children, which leave before the ack of their parent."""
        self.begin(content)
        for child in children_of(content["parameters"]):
            pair = (GenericApplicationExchange, f"{self.options.target}/rr")
            children.message_plain(child, _eks=[pair])
        self.end(content)

    def begin(self, content: Any) -> None:
        self.record.write(BEGUN, content["parameters"])

    def end(self, content: Any) -> None:
        self.record.write(HANDLED, content["parameters"])


children = GenericProducer({"name": "children"})


def main() -> None:
    """Handle messages until told to leave."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="where it records")
    parser.add_argument("component", help="its name")
    parser.add_argument("--seconds", type=float, default=0.001, help="how long a handler takes")
    parser.add_argument("--late", type=float, default=0.0, help="how long a late message takes")
    parser.add_argument("--target", help="the component that the children of a split go to")
    parser.add_argument("--die-at", type=int, default=0, help="the ack that it kills itself at")
    options = parser.parse_args()
    scheduler = MicroScheduler()
    scheduler.add_microthread(Component(options))
    with children, scheduler.stop_on_signals():
        for _ in scheduler.main():
            pass
    print("left", flush=True)


if __name__ == "__main__":
    main()
