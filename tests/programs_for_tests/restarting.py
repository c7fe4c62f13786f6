# SPDX-License-Identifier: MIT
"""An application that tells how it was started: ``restarting.py NAME [OPTION …]``.

Options: ``chdir`` changes the working directory, ``buffer`` leaves a line in the buffer of stdout,
``child`` shows what a child process gets to know, ``two`` runs a second application.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from postage.generic_application import GenericApplication
from postage.messaging import AckAndRestart, Fingerprint, MessageHandler, RpcHandler
from postage.microthreads import MicroScheduler, sleep
from tests.programs_for_tests.announcing import Announcing


def say(text: str) -> None:
    """Write a line at once."""
    print(text, flush=True)


class Restarting(Announcing, GenericApplication):
    """Restarts in all the ways that there are."""

    def announcement(self) -> str:
        return f"ready {self.name}"

    def leave(self) -> Any:
        say("leaving")
        return super().leave()

    @MessageHandler("command", "note")
    def msg_note(self, content: Any) -> None:
        say(f"note {content['parameters']}")

    @MessageHandler("command", "restart_plain")
    def msg_restart_plain(self, content: Any) -> None:
        raise AckAndRestart

    @MessageHandler("command", "restart_generator")
    def msg_restart_generator(self, content: Any) -> Generator[Any, Any, None]:
        yield sleep(0.01)
        raise AckAndRestart

    @MessageHandler("command", "restart_threaded", threaded=True)
    def msg_restart_threaded(self, content: Any) -> None:
        raise AckAndRestart

    @MessageHandler("command", "restart_async")
    async def msg_restart_async(self, content: Any) -> None:
        await asyncio.sleep(0.01)
        raise AckAndRestart

    @MessageHandler("command", "restart_now")
    def msg_restart_now(self, content: Any) -> None:
        self.restart()

    @RpcHandler("command", "restart_by_call")
    def rpc_restart(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func("restarting")
        raise AckAndRestart

    @MessageHandler("command", "work")
    def msg_work(self, content: Any) -> Generator[Any, Any, None]:
        say("begun")
        while not Path(content["parameters"]).exists():
            yield sleep(0.01)
        say("ended")

    @RpcHandler("command", "work_and_answer")
    def rpc_work(
        self, content: Any, reply_func: Callable[[Any], None]
    ) -> Generator[Any, Any, None]:
        say("begun")
        while not Path(content["parameters"]).exists():
            yield sleep(0.01)
        reply_func("answered")


def main() -> None:
    """Run until told to leave."""
    name, options = sys.argv[1], sys.argv[2:]
    say(f"started {os.getpid()} argv {sys.argv[1:]} dev {sys.flags.dev_mode} {sys.warnoptions}")
    scheduler = MicroScheduler()
    scheduler.add_microthread(Restarting(Fingerprint(name).as_dict(), None))
    if "two" in options:
        scheduler.add_microthread(Restarting(Fingerprint(f"{name}-2").as_dict(), None))
    if "child" in options:
        program = "import os; print('child', os.environ.get('POSTAGE_RESTARTED'), flush=True)"
        subprocess.run([sys.executable, "-c", program], check=True)
    if "chdir" in options:
        os.chdir("/")
    if "buffer" in options:
        sys.stdout.reconfigure(write_through=False, line_buffering=False)  # type: ignore[union-attr]
    with scheduler.stop_on_signals():
        for _ in scheduler.main():
            if "buffer" in options:
                options.remove("buffer")
                sys.stdout.write("buffered\n")
    say("left")


if __name__ == "__main__":
    main()
