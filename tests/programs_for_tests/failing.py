# SPDX-License-Identifier: MIT
"""A component whose handler fails: ``failing.py retry|park [kill]``.

With ``kill`` it dies when the broker has the copy of the message, and before it acknowledges.
It says in lines: ready, attempt N, moved.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from postage.messaging import DefaultExchange, GenericConsumer, MessageHandler, MessageProcessor
from postage.microthreads import sleep
from postage.retry import RetryPolicy


class Consumer(GenericConsumer):
    """Acknowledges when a message is moved: may die there."""

    def ack(self, method: Any) -> None:
        print("moved", flush=True)
        if "kill" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        super().ack(method)


class Failing(MessageProcessor):
    """Fails always: tries twice, or parks at once."""

    consumer_class = Consumer
    retry = RetryPolicy(attempts=2 if "retry" in sys.argv else 1, delay=0.3, jitter=0)
    announced = False

    def step(self) -> Any:
        if not self.announced:
            if not self.consumer.subscriber.consuming:
                return sleep(0.01)
            self.announced = True
            print("ready", flush=True)
        return super().step()

    @MessageHandler("command", "work")
    def msg_work(self, content: Any) -> None:
        print("attempt", self.delivery.attempt, flush=True)
        raise ValueError("never")


if __name__ == "__main__":
    Failing({"name": "failing"}, [(DefaultExchange, [("q", "q")])]).start_consuming()
