# SPDX-License-Identifier: MIT
"""A component that one kind of message ends, as a fault in C would: ``crashing.py QUEUE``.

It says in lines which numbers it has handled.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from postage.messaging import DefaultExchange, MessageHandler, MessageProcessor, Queue


class Crashing(MessageProcessor):
    """Handles numbers, until one of them ends the process."""

    @MessageHandler("command", "work")
    def msg_work(self, content: Any) -> None:
        print(content["parameters"], flush=True)
        time.sleep(0.0005)  # so that messages wait when the process ends

    @MessageHandler("command", "crash")
    def msg_crash(self, content: Any) -> None:
        os._exit(1)


if __name__ == "__main__":
    [_, name] = sys.argv
    queue = Queue(name, delivery_limit=3)
    Crashing({"name": "crashing"}, [(DefaultExchange, [(queue, name)])]).start_consuming()
