# SPDX-License-Identifier: MIT
"""A private RabbitMQ node for the tests.

The node shares nothing with a RabbitMQ that the machine may run: its ports, its epmd, its cookie,
its data and its log are its own, under one temporary folder, and it listens on loopback only.

``python tests/rabbitmq_node.py`` runs a node in the foreground until Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

HOST = "127.0.0.1"

#: Seconds until a start or a stop counts as failed: a busy machine needs many times the usual four.
DEADLINE_SECONDS = 120.0

#: Reads lines of process ids, each of which replaces the line before. When the input ends, because
#: the node was closed or because the process that holds it died in whatever way, this shell kills
#: what the last line names and removes the folder.
GUARD = 'while read -r line; do pids=$line; done; kill -KILL $pids 2>/dev/null; rm -rf "$0"'

#: The name of a node. No other meets it, unless they were told of each other.
NODE_NAME = "postage-test"

#: Erlang: deletes virtual hosts.
DELETE_VHOSTS = """
    [rabbit_vhost:delete(V, <<"tests">>) || V <- [{old}]].
"""

#: Erlang: deletes the virtual hosts of one list, which nobody waits for since it takes as long as
#: to make them, and makes those of the other, for guest.
REPLACE_VHOSTS = """
    spawn(fun() -> [rabbit_vhost:delete(V, <<"tests">>) || V <- [{old}]] end),
    [begin
        ok = rabbit_vhost:add(V, <<"tests">>),
        ok = rabbit_auth_backend_internal:set_permissions(
            <<"guest">>, V, <<".*">>, <<".*">>, <<".*">>, <<"tests">>)
    end || V <- [{new}]].
"""


#: Erlang: closes the connections to a virtual host.
CLOSE_CONNECTIONS = """
    [rabbit_networking:close_connection(Pid, "{reason}")
        || [{{pid, Pid}}, {{vhost, {vhost}}}]
        <- rabbit_networking:connection_info_all([pid, vhost])].
"""

#: Erlang: does in the name of a queue's consumers what the broker does at their basic.cancel, but
#: for the cancel-ok. The first three parts of a consumer are its channel, its tag, whether it acks.
FORGET_CONSUMERS = """
    {{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)),
    Queue = amqqueue:get_pid(Q),
    Forget = case amqqueue:get_type(Q) of
        rabbit_classic_queue -> fun(Channel, Tag) ->
            ok = gen_server2:call(Queue, {{basic_cancel, Channel, Tag, undefined, <<"tests">>}})
        end;
        rabbit_quorum_queue -> fun(Channel, Tag) ->
            Cancel = rabbit_fifo:make_checkout({{Tag, Channel}}, cancel, #{{}}),
            {{ok, ok, _}} = ra:process_command(Queue, Cancel)
        end
    end,
    [Forget(element(1, C), element(2, C)) || C <- rabbit_amqqueue:consumers(Q)].
"""


def find_scripts() -> Path | None:
    """Return the folder of RabbitMQ's own scripts, None if it is not installed.

    The scripts that a Linux package puts on the PATH are wrappers, which change to the user
    ``rabbitmq`` and to the folders of the system.
    """
    packaged = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"))
    if packaged:
        return packaged[-1]
    on_path = shutil.which("rabbitmq-server")
    return Path(on_path).resolve().parent if on_path else None


@dataclass(frozen=True)
class QueueRow:
    """A queue as the broker sees it; `type` is ``classic`` or ``quorum``."""

    name: str
    type: str
    durable: bool
    auto_delete: bool
    arguments: dict[str, Any]


@dataclass(frozen=True)
class BindingRow:
    """A binding of a queue to an exchange, as the broker sees it."""

    source: str
    key: str
    destination: str


@dataclass(frozen=True)
class ConsumerRow:
    """A consumer as the broker sees it."""

    queue: str
    prefetch: int


@dataclass(frozen=True)
class ConnectionRow:
    """A connection as the broker sees it; `name` is what the client calls it."""

    name: str
    channels: int


class RabbitNode:
    """A RabbitMQ node that lives as long as its ``with`` block.

    Args:
        config: further lines of ``rabbitmq.conf``, such as ``consumer_timeout = 5000``.
        name: another name.
        beside: a node that this one may meet, which then must have another name and live longer.
    """

    def __init__(
        self, *config: str, name: str = NODE_NAME, beside: RabbitNode | None = None
    ) -> None:
        scripts = find_scripts()
        if scripts is None:
            raise FileNotFoundError("rabbitmq-server is not installed")
        self._scripts = scripts
        self.name = f"{name}@localhost"
        self.port, distribution_port, epmd_port = free_ports(3)
        self.folder = Path(tempfile.mkdtemp(prefix="postage-rabbitmq-"))
        self._environment = self._write_settings(config, distribution_port, epmd_port)
        if beside is not None:
            for shared in ("HOME", "ERL_EPMD_PORT"):  # the cookie, and where nodes are found
                self._environment[shared] = beside._environment[shared]
        self._node: subprocess.Popen[bytes] | None = None
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, self.folder], stdin=subprocess.PIPE, start_new_session=True
        )
        self._epmd = None if beside else self._start_epmd()
        self._tell_guard()

    def __repr__(self) -> str:
        return f"<RabbitNode {HOST}:{self.port} [{'running' if self.is_running else 'stopped'}]>"

    def __enter__(self) -> RabbitNode:
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
        """The process ids of the node and of its two helpers."""
        return {each.pid for each in (self._guard, self._epmd, self._node) if each}

    def url_of(self, vhost: str) -> str:
        """Return the URL of a virtual host."""
        return f"amqp://guest:guest@{HOST}:{self.port}/{quote(vhost, safe='')}"

    def start(self) -> None:
        """Start the node, on the data of its last run, and wait until it answers."""
        assert not self.is_running, f"{self!r} was started already"
        with open(self._log, "ab") as log:
            self._node = subprocess.Popen(
                [self._scripts / "rabbitmq-server", "-noinput"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._tell_guard()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self._is_answering():
            if not self.is_running or time.monotonic() > deadline:
                raise RuntimeError(f"RabbitMQ did not start; its log ends so:\n{self.log_tail()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop the node in good order; its data stay."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the node, as a power cut would; its data stay."""
        # Killed a moment after it declared a durable queue, RabbitMQ 3.10.8 may have forgotten the
        # queue, or that a quorum queue has a log: it comes back empty then, and without a leader.
        # Raft's directory is a dets table, which is written some time after the queue was declared.
        self._eval("mnesia:sync_log(), [dets:sync(Table) || Table <- dets:all()].")
        self._end(signal.SIGKILL)

    def suspend(self) -> None:
        """Freeze the node: its connections stay open, and nothing answers."""
        node = self._running_node()
        node.send_signal(signal.SIGSTOP)
        # The signal reaches one thread after the other; the kernel tells us when it has the last.
        os.waitid(os.P_PID, node.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a suspended node go on."""
        self._running_node().send_signal(signal.SIGCONT)

    def ensure_running(self) -> None:
        """Start or resume the node, in case that a test which failed has left it otherwise."""
        if self.is_running:
            self.resume()
            if self._has_quorum_queues():
                return
            # Once, after several kills, 3.10.8 had lost what runs them, and never said so.
            self.stop()
        self.start()

    def wait(self) -> int:
        """Wait until the node ends by itself, and return its exit code."""
        return self._running_node().wait()

    def close(self) -> None:
        """Kill the node and remove its data."""
        if self.is_running:
            self._end(signal.SIGKILL)
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
        self._tell_guard()
        self._guard.communicate()

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on the node, and return what it prints. It takes about 0.4 s."""
        result = subprocess.run(
            [self._scripts / "rabbitmqctl", "--quiet", *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_SECONDS,
        )
        if result.returncode != 0:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)} failed:\n{result.stdout}")
        return result.stdout

    def replace_vhosts(self, old: Iterable[str], new: Iterable[str]) -> None:
        """Delete virtual hosts soon, and make others at once, all by one call."""
        self._eval(REPLACE_VHOSTS.format(old=_erlang_list(old), new=_erlang_list(new)))

    def add_vhost(self, name: str) -> str:
        """Make a virtual host in which guest may do everything, and return its URL."""
        self.replace_vhosts([], [name])
        return self.url_of(name)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it."""
        self._eval(DELETE_VHOSTS.format(old=_erlang_list([name])))

    def add_user(self, name: str, password: str, vhost: str) -> None:
        """Make a user, who may do everything in a virtual host."""
        self.ctl("add_user", name, password)
        self.ctl("set_permissions", "-p", vhost, name, ".*", ".*", ".*")

    def change_password(self, name: str, password: str) -> None:
        """Give a user another password."""
        self.ctl("change_password", name, password)

    def delete_user(self, name: str) -> None:
        """Delete a user."""
        self.ctl("delete_user", name)

    def close_connections(self, reason: str, vhost: str | None = None) -> None:
        """Close the connections to a virtual host, or all, with reply code 320."""
        which = "_" if vhost is None else f'<<"{vhost}">>'
        self._eval(CLOSE_CONNECTIONS.format(vhost=which, reason=reason))

    def forget_consumers(self, queue: str, vhost: str) -> None:
        """Cancel the consumers of a queue without a word to their clients, as if it lost them."""
        self._eval(FORGET_CONSUMERS.format(queue=queue, vhost=vhost))

    @contextlib.contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """Block publishers for as long as the ``with`` block."""
        self._eval("vm_memory_monitor:set_vm_memory_high_watermark(0.000001).")
        try:
            yield
        finally:
            self._eval("vm_memory_monitor:set_vm_memory_high_watermark(0.4).")

    def queues(self, vhost: str) -> list[QueueRow]:
        """Return the queues of a virtual host."""
        names = ("name", "type", "durable", "auto_delete", "arguments")
        return [
            QueueRow(
                row["name"],
                "quorum" if "quorum" in row["type"] else "classic",
                row["durable"],
                row["auto_delete"],
                _table(row["arguments"]),
            )
            for row in self._rows("list_queues", "--vhost", vhost, *names)
        ]

    def bindings(self, vhost: str) -> list[BindingRow]:
        """Return the bindings of a virtual host to named exchanges."""
        names = ("source_name", "routing_key", "destination_name")
        rows = self._rows("list_bindings", "--vhost", vhost, *names)
        return [BindingRow(*(row[name] for name in names)) for row in rows if row["source_name"]]

    def consumers(self, vhost: str) -> list[ConsumerRow]:
        """Return the consumers of a virtual host."""
        names = ("queue_name", "prefetch_count")
        rows = self._rows("list_consumers", "--vhost", vhost, *names)
        return [ConsumerRow(*(row[name] for name in names)) for row in rows]

    def connections(self, vhost: str) -> list[ConnectionRow]:
        """Return the connections to a virtual host."""
        rows = self._rows("list_connections", "vhost", "client_properties", "channels")
        return [
            ConnectionRow(
                _table(row["client_properties"]).get("connection_name", ""), row["channels"]
            )
            for row in rows
            if row["vhost"] == vhost
        ]

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the node's log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def _has_quorum_queues(self) -> bool:
        """Tell whether new quorum queues work, if that can be told quickly."""
        if shutil.which("erl_call") is None:
            return True
        try:
            self._eval("true = is_pid(whereis(ra_log_wal)) andalso is_pid(whereis(ra_log_sup)).")
        except RuntimeError:
            return False
        return True

    def _eval(self, expressions: str) -> None:
        """Evaluate Erlang in the node. It takes milliseconds, if Erlang came with erl_call."""
        if shutil.which("erl_call") is None:
            self.ctl("eval", expressions)
            return
        result = subprocess.run(
            ["erl_call", "-sname", self.name, "-e"],
            env=self._environment,
            input=f"{expressions}\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_SECONDS,
        )
        if not result.stdout.startswith("{ok,"):
            raise RuntimeError(f"the node did not evaluate {expressions}\n{result.stdout}")

    def _rows(self, *arguments: str) -> list[dict[str, Any]]:
        """Return the rows of a list of rabbitmqctl."""
        rows: list[dict[str, Any]] = json.loads(self.ctl(*arguments, "--formatter", "json"))
        return rows

    @property
    def _log(self) -> Path:
        return self.folder / "node.log"

    def _write_settings(
        self, config: tuple[str, ...], distribution_port: int, epmd_port: int
    ) -> dict[str, str]:
        """Write the files that the node reads, and return the environment that names them."""
        config = (f"listeners.tcp.1 = {HOST}:{self.port}", "loopback_users = none", *config)
        (self.folder / "rabbitmq.conf").write_text("\n".join(config) + "\n")
        (self.folder / "enabled_plugins").write_text("[].\n")
        (self.folder / "rabbitmq-env.conf").touch()
        paths = {
            "HOME": "",  # Erlang makes the cookie here
            "RABBITMQ_ADVANCED_CONFIG_FILE": "advanced.config",
            "RABBITMQ_CONFIG_FILE": "rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": "rabbitmq-env.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": "enabled_plugins",
            "RABBITMQ_FEATURE_FLAGS_FILE": "feature_flags",
            "RABBITMQ_LOG_BASE": "",
            "RABBITMQ_MNESIA_BASE": "mnesia",
            "RABBITMQ_PID_FILE": "pid",
        }
        return {name: str(self.folder / path) for name, path in paths.items()} | {
            "PATH": os.environ["PATH"],
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_PORT": str(epmd_port),
            # Makes the start script become the node, instead of waiting for it.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_CTL_ERL_ARGS": "-start_epmd false",
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+S 2:2 -start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"
            ),
        }

    def _start_epmd(self) -> subprocess.Popen[bytes]:
        # In the foreground, so that its process id is known: Erlang would start a daemon.
        command = ["epmd", "-address", HOST]
        return subprocess.Popen(command, env=self._environment, start_new_session=True)

    def _tell_guard(self) -> None:
        alive = [p.pid for p in (self._node, self._epmd) if p and p.poll() is None]
        assert self._guard.stdin is not None
        self._guard.stdin.write(" ".join(map(str, alive)).encode() + b"\n")
        self._guard.stdin.flush()

    def _running_node(self) -> subprocess.Popen[bytes]:
        assert self._node is not None and self.is_running, f"{self!r} does not run"
        return self._node

    def _end(self, signal_number: signal.Signals) -> None:
        node = self._running_node()
        node.send_signal(signal_number)
        node.wait(DEADLINE_SECONDS)
        self._tell_guard()

    def _is_answering(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1.0) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return connection.recv(1) != b""
        except OSError:
            return False


def _table(fields: list[list[Any]]) -> dict[str, Any]:
    """Return a field table as a dict: rabbitmqctl prints name, type and value of each field."""
    return {name: value for name, _type, value in fields}


def _erlang_list(names: Iterable[str]) -> str:
    return ", ".join(f'<<"{name}">>' for name in names)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody uses.

    They lie below those that Linux gives to outgoing connections. A client that tries again and
    again to reach a stopped node could else be given the node's own port, connect to itself, and
    hold the port.
    """
    candidates = random.SystemRandom().sample(range(10_000, 32_000), 1_000)
    return list(itertools.islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind((HOST, port))
        except OSError:
            return False
        return True


def main() -> int:
    """Run a node until a signal comes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with RabbitNode() as node:
            print(node.url, flush=True)
            return node.wait()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
