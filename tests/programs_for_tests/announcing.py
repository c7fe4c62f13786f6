# SPDX-License-Identifier: MIT
"""Components that say when they are at work."""

from __future__ import annotations

from typing import Any

from postage.messaging import MessageProcessor
from postage.microthreads import sleep


class Announcing(MessageProcessor):
    """Prints that it is ready when every queue is consumed. To be put before other bases."""

    announced = False

    def step(self) -> Any:
        if not self.announced:
            if not self.consumer.subscriber.consuming:
                return sleep(0.01)
            self.announced = True
            print(self.announcement(), flush=True)
        return super().step()

    def announcement(self) -> str:
        return "ready"
