# SPDX-License-Identifier: MIT
"""What can go wrong with a broker, on request: the hooks for tests of failures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from postage.broker.errors import CONNECTION_FORCED, BrokerError, Refusal
from postage.broker.node import Node


class Edge(Protocol):
    """The sockets of a broker, as far as faults concern them."""

    node: Node
    is_refusing: bool

    def abort(self, vhost: str | None) -> int:
        """Cut connections, and return how many."""


#: Runs a callable in the broker's thread, and returns what it returns.
Call = Callable[[Callable[[Edge], Any]], Any]


class Faults:
    """Makes a running broker misbehave; every method may be called from any thread.

    Those that last are context managers, and end with their block.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    def drop(self, vhost: str | None = None) -> int:
        """Cut the connections to a virtual host, or all, without a word to the client.

        Returns:
            how many.
        """
        number: int = self._call(lambda edge: edge.abort(vhost))
        return number

    def close_connections(
        self,
        code: int = CONNECTION_FORCED,
        text: str = "closed by a fault",
        vhost: str | None = None,
    ) -> int:
        """Close the connections to a virtual host, or all, with connection.close.

        Args:
            code: the reply code, such as 320 or 541.
            text: the reason, without the name of the code.

        Returns:
            how many.
        """

        def close(edge: Edge) -> int:
            connections = edge.node.connections_of(vhost)
            for connection in connections:
                connection.force_close(code, text)
            return len(connections)

        number: int = self._call(close)
        return number

    def close_channels(
        self, code: int = 406, text: str = "closed by a fault", vhost: str | None = None
    ) -> int:
        """Close all channels with channel.close, and leave the connections open.

        Returns:
            how many.
        """

        def close(edge: Edge) -> int:
            found = [
                (connection, channel)
                for connection in edge.node.connections_of(vhost)
                for channel in connection.channels.values()
                if not channel.is_closing
            ]
            for connection, channel in found:
                connection.close_channel(channel, Refusal(code, text))
            return len(found)

        number: int = self._call(close)
        return number

    def cancel(self, queue: str, vhost: str = "/") -> int:
        """Cancel the consumers of a queue, as RabbitMQ does when it loses the queue's node.

        Returns:
            how many.

        Raises:
            BrokerError: There is no such queue.
        """

        def cancel(edge: Edge) -> int:
            host = edge.node.vhost(vhost)
            if queue not in host.queues:
                raise BrokerError(f"there is no queue {queue!r} in virtual host {vhost!r}")
            return host.cancel_consumers(host.queues[queue])

        number: int = self._call(cancel)
        return number

    @contextlib.contextmanager
    def stall(self) -> Iterator[None]:
        """Neither read nor write, as a broker that hangs."""

        def set_stalled(edge: Edge, is_stalled: bool) -> None:
            edge.node.is_stalled = is_stalled
            for connection in edge.node.connections_of():
                connection.excuse()

        self._call(lambda edge: set_stalled(edge, True))
        try:
            yield
        finally:
            self._call(lambda edge: set_stalled(edge, False))

    @contextlib.contextmanager
    def refuse(self) -> Iterator[None]:
        """Close new connections at once, as a broker that starts or that has too many."""
        with self._set("is_refusing", True, of_node=False):
            yield

    @contextlib.contextmanager
    def block(self, reason: str = "low on memory") -> Iterator[None]:
        """Block publishers with connection.blocked, as an alarm does.

        Args:
            reason: what they are told.
        """
        self._call(lambda edge: edge.node.raise_alarm("fault", reason))
        try:
            yield
        finally:
            self._call(lambda edge: edge.node.clear_alarm("fault"))

    @contextlib.contextmanager
    def delay_confirms(self, seconds: float) -> Iterator[None]:
        """Confirm what is published so many seconds late."""
        with self._set("confirm_delay", seconds):
            yield

    @contextlib.contextmanager
    def nack(self) -> Iterator[None]:
        """Throw away what is published, and say so with basic.nack."""
        with self._set("is_nacking", True):
            yield

    @contextlib.contextmanager
    def _set(self, name: str, value: Any, *, of_node: bool = True) -> Iterator[None]:
        def exchange(edge: Edge, new: Any) -> Any:
            target = edge.node if of_node else edge
            old = getattr(target, name)
            setattr(target, name, new)
            return old

        old = self._call(lambda edge: exchange(edge, value))
        try:
            yield
        finally:
            self._call(lambda edge: exchange(edge, old))
