# SPDX-License-Identifier: MIT
"""What the tests may do to a broker and ask it, whichever it is."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from tests.rabbitmq_node import BindingRow, ConnectionRow, ConsumerRow, QueueRow


class Node(Protocol):
    """A private broker: `RabbitNode` or `EmbeddedNode`.

    It outlives being stopped or killed with its virtual hosts, and all that is durable in them.
    """

    port: int

    @property
    def url(self) -> str:
        """The URL of the virtual host ``/``."""

    @property
    def is_running(self) -> bool:
        """Whether the node's process exists, suspended or not."""

    @property
    def pids(self) -> set[int]:
        """The process ids of the node and of its helpers."""

    def url_of(self, vhost: str) -> str:
        """Return the URL of a virtual host."""

    def start(self) -> None:
        """Start the node, on the data of its last run, and wait until it answers."""

    def stop(self) -> None:
        """Stop the node in good order; its data stay."""

    def kill(self) -> None:
        """Kill the node, as a power cut would; its data stay."""

    def suspend(self) -> None:
        """Freeze the node: its connections stay open, and nothing answers."""

    def resume(self) -> None:
        """Let a suspended node go on."""

    def ensure_running(self) -> None:
        """Start or resume the node, in case that a test which failed has left it otherwise."""

    def replace_vhosts(self, old: Iterable[str], new: Iterable[str]) -> None:
        """Delete virtual hosts soon, and make others at once."""

    def add_vhost(self, name: str) -> str:
        """Make a virtual host in which guest may do everything, and return its URL."""

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it."""

    def add_user(self, name: str, password: str, vhost: str) -> None:
        """Make a user, who may do everything in a virtual host."""

    def change_password(self, name: str, password: str) -> None:
        """Give a user another password."""

    def delete_user(self, name: str) -> None:
        """Delete a user."""

    def close_connections(self, reason: str, vhost: str | None = None) -> None:
        """Close the connections to a virtual host, or all, with reply code 320."""

    def memory_alarm(self) -> AbstractContextManager[None]:
        """Block publishers for as long as the ``with`` block."""

    def queues(self, vhost: str) -> list[QueueRow]:
        """Return the queues of a virtual host."""

    def bindings(self, vhost: str) -> list[BindingRow]:
        """Return the bindings of a virtual host to named exchanges."""

    def consumers(self, vhost: str) -> list[ConsumerRow]:
        """Return the consumers of a virtual host."""

    def connections(self, vhost: str) -> list[ConnectionRow]:
        """Return the connections to a virtual host."""

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the node's log."""
