# SPDX-License-Identifier: MIT
"""What can go wrong with a broker, on request: the hooks for tests of failures."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from postage.broker.errors import CONNECTION_FORCED, BrokerError, Refusal
from postage.broker.node import Node
from postage.broker.queues import Queue
from postage.broker.vhost import VirtualHost


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
        self._numbers = itertools.count()
        #: Values by block of what is set by several, in the thread of the broker.
        self._values: WeakKeyDictionary[Node, dict[str, dict[object, Any]]] = WeakKeyDictionary()

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
            return sum(connection.force_close(code, text) for connection in connections)

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
        return self._end_consumers(queue, vhost, VirtualHost.cancel_consumers)

    def forget_consumers(self, queue: str, vhost: str = "/") -> int:
        """Lose the consumers of a queue without a word to their clients.

        That happens when a queue moves to another node of RabbitMQ's, and a consumer is lost on
        the way: no basic.cancel is sent, what the consumer held goes back to the queue, and a
        settlement that comes later changes nothing. The channel knows its tag still.

        Returns:
            how many.

        Raises:
            BrokerError: There is no such queue.
        """
        return self._end_consumers(queue, vhost, VirtualHost.forget_consumers)

    def _end_consumers(
        self, queue: str, vhost: str, end: Callable[[VirtualHost, Queue], int]
    ) -> int:
        def find_and_end(edge: Edge) -> int:
            host = edge.node.vhost(vhost)
            if queue not in host.queues:
                raise BrokerError(f"there is no queue {queue!r} in virtual host {vhost!r}")
            return end(host, host.queues[queue])

        number: int = self._call(find_and_end)
        return number

    @contextlib.contextmanager
    def stall(self) -> Iterator[None]:
        """Neither read nor write, as a broker that hangs."""
        with self._set("is_stalled", True):
            yield

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
        name = f"fault {next(self._numbers)}"  # there may be a block within the block
        self._call(lambda edge: edge.node.raise_alarm(name, reason))
        try:
            yield
        finally:
            self._end(lambda edge: edge.node.clear_alarm(name))

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
        block = object()

        def begin(edge: Edge) -> None:
            target: Any = edge.node if of_node else edge
            # By node: a broker that is started anew begins without faults.
            values = self._values.setdefault(edge.node, {})
            values.setdefault(name, {None: getattr(target, name)})[block] = value
            setattr(target, name, value)

        def end(edge: Edge) -> None:
            values = self._values.get(edge.node, {}).get(name, {})
            if values.pop(block, None) is not None:
                target: Any = edge.node if of_node else edge
                # Blocks of several threads end in any order.
                setattr(target, name, [*values.values()][-1])

        self._call(begin)
        try:
            yield
        finally:
            self._end(end)

    def _end(self, function: Callable[[Edge], Any]) -> None:
        with contextlib.suppress(BrokerError):  # the broker was stopped, and the fault with it
            self._call(function)
