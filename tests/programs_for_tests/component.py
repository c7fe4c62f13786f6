# SPDX-License-Identifier: MIT
"""An application whose handlers last until a file exists: ``component.py NAME [GRACE]``.

It says what it does in lines: ready, begun, leaving, ended, closed, cancelled, left.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from postage.generic_application import GenericApplication
from postage.messaging import Fingerprint, MessageHandler
from postage.microthreads import MicroScheduler, sleep


def say(text: str) -> None:
    """Write a line at once."""
    # One write for both: print() lets the lines of two threads mix.
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Component(GenericApplication):
    """Announces that it is consuming, and then handles messages in four ways."""

    grace = float(sys.argv[2]) if len(sys.argv) > 2 else 30.0
    announced = False

    def step(self) -> Any:
        if not self.announced:
            if not self.consumer.subscriber.consuming:
                return sleep(0.01)
            self.announced = True
            say("ready")
        return super().step()

    def leave(self) -> Any:
        say("leaving")
        return super().leave()

    @MessageHandler("command", "work_plain")
    def msg_plain(self, content: Any) -> None:
        say("begun")
        wait_for(content)
        say("ended")

    @MessageHandler("command", "work_threaded", threaded=True)
    def msg_threaded(self, content: Any) -> None:
        self.msg_plain(content)

    @MessageHandler("command", "work_generator")
    def msg_generator(self, content: Any) -> Generator[Any, Any, None]:
        say("begun")
        try:
            while not Path(content["parameters"]).exists():
                yield sleep(0.01)
            say("ended")
        except GeneratorExit:
            say("closed")
            raise

    @MessageHandler("command", "work_async")
    async def msg_async(self, content: Any) -> None:
        say("begun")
        try:
            while not Path(content["parameters"]).exists():
                await asyncio.sleep(0.01)
            say("ended")
        except asyncio.CancelledError:
            say("cancelled")
            raise


def wait_for(content: Any) -> None:
    """Block until the file exists that the message names."""
    while not Path(content["parameters"]).exists():
        time.sleep(0.01)


def main() -> None:
    """Run until told to leave."""
    scheduler = MicroScheduler()
    scheduler.add_microthread(Component(Fingerprint(sys.argv[1]).as_dict(), None))
    with scheduler.stop_on_signals():
        for _ in scheduler.main():
            pass
    say("left")


if __name__ == "__main__":
    main()
