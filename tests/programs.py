# SPDX-License-Identifier: MIT
"""Python programs as real child processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parent.parent

#: Seconds to read the rest of what a program wrote that has ended. A process that it started in
#: another session may keep the pipes open for ever.
READERS_DEADLINE_SECONDS = 10.0


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process is there that has not ended."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Program:
    """A Python program that lives at most as long as its ``with`` block.

    ``lines`` holds what it wrote so far, ``stdout`` and ``stderr`` the same apart. It starts in the
    root of the checkout, finds the package there, and gets a process group of its own, all of which
    is killed in the end.

    Args:
        args: the arguments of the interpreter, such as ``["-m", "demos.echo"]``.
        env: what to add to the environment of the tests.
        cwd: another folder to start in.
        python: another interpreter.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = ROOT,
        python: str = sys.executable,
    ) -> None:
        self.lines: list[str] = []
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._command = [python, "-u", *args]
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            self._command,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self._readers = [
            threading.Thread(target=self._collect, args=stream, name=f"reader of {self.pid}")
            for stream in (
                (self._process.stdout, self.stdout),
                (self._process.stderr, self.stderr),
            )
        ]
        for reader in self._readers:
            reader.start()

    def __repr__(self) -> str:
        return f"<Program {self.pid} {' '.join(self._command)}>"

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The group may outlive the program: a child of it that is still there keeps the pipes open.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for reader in self._readers:
            reader.join(READERS_DEADLINE_SECONDS)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """All that the program wrote so far."""
        return "\n".join(self.lines)

    def wait_for_line(self, text: str, timeout: float = 30.0) -> str:
        """Return the first line that contains ``text``, which may have come already.

        Raises:
            AssertionError: the time has passed, or the program ended without such a line.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for line in self.lines:
                    if text in line:
                        return line
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not any(reader.is_alive() for reader in self._readers):
                    raise AssertionError(f"{self!r} did not write {text!r}, but:\n{self.output}")
                self._changed.wait(min(remaining, 0.1))

    def wait(self, timeout: float = 30.0) -> int:
        """Wait until the program has ended, and return its exit code.

        Raises:
            AssertionError: the time has passed.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self!r} still runs; it wrote:\n{self.output}") from None
        for reader in self._readers:
            reader.join(READERS_DEADLINE_SECONDS)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def _collect(self, stream: IO[str], lines: list[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    lines.append(line.rstrip("\n"))
                    self.lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
