# SPDX-License-Identifier: MIT
"""An application that writes the numbers which it gets into a file: ``counting.py FOLDER``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from postage.generic_application import GenericApplication
from postage.messaging import Fingerprint, MessageHandler
from postage.microthreads import MicroScheduler, sleep
from tests.programs_for_tests.announcing import Announcing

FILE = Path(sys.argv[1]) / str(os.getpid())


class Counting(Announcing, GenericApplication):
    """Handles numbers in three ways, each of which takes some milliseconds."""


    @MessageHandler("command", "plain")
    def msg_plain(self, content: Any) -> None:
        time.sleep(0.002)
        write(content)

    @MessageHandler("command", "generator")
    def msg_generator(self, content: Any) -> Generator[Any, Any, None]:
        yield sleep(0.005)
        write(content)

    @MessageHandler("command", "threaded", threaded=True)
    def msg_threaded(self, content: Any) -> None:
        time.sleep(0.005)
        write(content)


def write(content: Any) -> None:
    """Add a line to the file of this process, which has the same name after a restart."""
    with FILE.open("a") as file:
        file.write(f"{content['parameters']}\n")


scheduler = MicroScheduler()
scheduler.add_microthread(Counting(Fingerprint("counting").as_dict(), None))
for _ in scheduler.main():
    pass
