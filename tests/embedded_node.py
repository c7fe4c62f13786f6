# SPDX-License-Identifier: MIT
"""The embedded broker as a private node for the tests: a process, so that it can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from tests.programs import ROOT
from tests.rabbitmq_node import (
    GUARD,
    HOST,
    BindingRow,
    ConnectionRow,
    ConsumerRow,
    QueueRow,
    free_ports,
)

PROGRAM = ROOT / "tests" / "programs_for_tests" / "broker.py"

#: Seconds until a start, a stop or a command counts as failed.
DEADLINE_SECONDS = 60.0

#: How the lines of a log begin that no test may cause.
_COMPLAINT = re.compile(r"^(\S+ \S+ (ERROR|CRITICAL)|Traceback|Exception) .*", re.MULTILINE)


class EmbeddedNode:
    """An embedded broker that lives as long as its ``with`` block, with a store in a folder.

    Killed or stopped, it starts again on the same port, with what its store kept.
    """

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.folder = Path(tempfile.mkdtemp(prefix="postage-embedded-"))
        self._heard = 0
        self._node: subprocess.Popen[bytes] | None = None
        # Not even a process that is killed leaves a suspended node behind.
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, self.folder], stdin=subprocess.PIPE, start_new_session=True
        )

    def __repr__(self) -> str:
        return f"<EmbeddedNode {HOST}:{self.port} [{'running' if self.is_running else 'stopped'}]>"

    def __enter__(self) -> EmbeddedNode:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The URL of the virtual host ``/``."""
        return self.url_of("/")

    @property
    def is_running(self) -> bool:
        """Whether the node's process exists, suspended or not."""
        return self._node is not None and self._node.poll() is None

    @property
    def pids(self) -> set[int]:
        """The process ids of the node and of its helper."""
        return {self._guard.pid} | ({self._node.pid} if self._node else set())

    def url_of(self, vhost: str) -> str:
        """Return the URL of a virtual host."""
        return f"amqp://guest:guest@{HOST}:{self.port}/{quote(vhost, safe='')}"

    def start(self) -> None:
        """Start the node, on the data of its last run, and wait until it answers."""
        assert not self.is_running, f"{self!r} was started already"
        self._drop_pipes()
        with open(self._log, "ab") as log:
            self._node = subprocess.Popen(
                [sys.executable, PROGRAM, str(self.port), self.folder / "store.sqlite"],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._tell_guard()
        self._hear("start")

    def stop(self) -> None:
        """Stop the node in good order; its data stay."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the node, as a power cut would; its data stay."""
        self._end(signal.SIGKILL)

    def suspend(self) -> None:
        """Freeze the node: its connections stay open, and nothing answers."""
        node = self._running_node()
        node.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, node.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a suspended node go on."""
        self._running_node().send_signal(signal.SIGCONT)

    def ensure_running(self) -> None:
        """Start or resume the node, in case that a test which failed has left it otherwise."""
        if self.is_running:
            self.resume()
        else:
            self.start()

    def close(self) -> None:
        """Kill the node and remove its data."""
        if self.is_running:
            self.kill()
        self._drop_pipes()
        self._guard.communicate()

    def replace_vhosts(self, old: Iterable[str], new: Iterable[str]) -> None:
        """Delete virtual hosts and make others."""
        self._tell("replace_vhosts", list(old), list(new))

    def add_vhost(self, name: str) -> str:
        """Make a virtual host, and return its URL."""
        self.replace_vhosts([], [name])
        return self.url_of(name)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it."""
        self.replace_vhosts([name], [])

    def add_user(self, name: str, password: str, vhost: str) -> None:
        """Make a user. Here all may do everything, in every virtual host."""
        self._tell("add_user", name, password)

    def change_password(self, name: str, password: str) -> None:
        """Give a user another password."""
        self._tell("add_user", name, password)

    def delete_user(self, name: str) -> None:
        """Delete a user."""
        self._tell("delete_user", name)

    def close_connections(self, reason: str, vhost: str | None = None) -> None:
        """Close the connections to a virtual host, or all, with reply code 320."""
        self._tell("close_connections", reason, vhost)

    @contextlib.contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """Block publishers for as long as the ``with`` block."""
        self._tell("raise_alarm")
        try:
            yield
        finally:
            self._tell("clear_alarm")

    def queues(self, vhost: str) -> list[QueueRow]:
        """Return the queues of a virtual host."""
        return [QueueRow(**row) for row in self._tell("queues", vhost)]

    def bindings(self, vhost: str) -> list[BindingRow]:
        """Return the bindings of a virtual host to named exchanges."""
        return [BindingRow(**row) for row in self._tell("bindings", vhost)]

    def consumers(self, vhost: str) -> list[ConsumerRow]:
        """Return the consumers of a virtual host."""
        return [ConsumerRow(**row) for row in self._tell("consumers", vhost)]

    def connections(self, vhost: str) -> list[ConnectionRow]:
        """Return the connections to a virtual host."""
        return [ConnectionRow(**row) for row in self._tell("connections", vhost)]

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the node's log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def complaints(self) -> str:
        """Return the log since the last call if it shows a defect of the broker, or nothing."""
        if not self._log.exists():
            return ""
        with open(self._log, "rb") as log:
            log.seek(self._heard)
            new = log.read()
        self._heard += len(new)
        text = new.decode(errors="replace")
        return text if _COMPLAINT.search(text) else ""

    @property
    def _log(self) -> Path:
        return self.folder / "node.log"

    def _tell(self, command: str, *arguments: object) -> Any:
        """Have the node do something, and return its answer."""
        node = self._running_node()
        assert node.stdin is not None
        node.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
        node.stdin.flush()
        return self._hear(command)

    def _hear(self, command: str) -> Any:
        assert self._node is not None and self._node.stdout is not None
        output = self._node.stdout.fileno()
        line = b""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not line.endswith(b"\n"):
            is_there = select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]
            piece = os.read(output, 65_536) if is_there else b""
            if not piece:
                raise RuntimeError(f"no answer to {command!r}; its log ends so:\n{self.log_tail()}")
            line += piece
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{command!r} failed: {answer['error']}")
        return answer["result"]

    def _tell_guard(self) -> None:
        assert self._guard.stdin is not None
        pid = self._node.pid if self._node is not None and self.is_running else ""
        self._guard.stdin.write(f"{pid}\n".encode())
        self._guard.stdin.flush()

    def _running_node(self) -> subprocess.Popen[bytes]:
        assert self._node is not None and self.is_running, f"{self!r} does not run"
        return self._node

    def _end(self, signal_number: signal.Signals) -> None:
        node = self._running_node()
        node.send_signal(signal_number)
        node.wait(DEADLINE_SECONDS)
        self._tell_guard()

    def _drop_pipes(self) -> None:
        for pipe in (self._node.stdin, self._node.stdout) if self._node is not None else ():
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
