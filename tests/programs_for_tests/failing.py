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

from postage.messaging import DefaultExchange, GenericConsumer, MessageHandler
from postage.retry import RetryPolicy
from tests.programs_for_tests.announcing import Announcing


class Consumer(GenericConsumer):
    """Acknowledges when a message is moved: may die there."""

    def ack(self, method: Any) -> None:
        print("moved", flush=True)
        if "kill" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        super().ack(method)


class Failing(Announcing):
    """Fails always: tries twice, or parks at once."""

    consumer_class = Consumer
    retry = RetryPolicy(attempts=2 if "retry" in sys.argv else 1, delay=0.3, jitter=0)

    @MessageHandler("command", "work")
    def msg_work(self, content: Any) -> None:
        print("attempt", self.delivery.attempt, flush=True)
        raise ValueError("never")


if __name__ == "__main__":
    Failing({"name": "failing"}, [(DefaultExchange, [("q", "q")])]).start_consuming()
