# SPDX-License-Identifier: MIT
"""A private RabbitMQ cluster for the tests.

Its nodes are `RabbitNode`s that meet each other. A quorum queue has a member on each of them, one
of which is its leader; a classic queue is on one of them alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any
from urllib.parse import quote

from tests.rabbitmq_node import DEADLINE_SECONDS, HOST, RabbitNode
from tests.waiting import wait_until

NAMES = ("one", "two", "three")

#: Lines of ``rabbitmq.conf``: a node that has lost sight of the others closes its connections, as
#: is advised for clusters of three.
CONFIG = ("cluster_partition_handling = pause_minority",)

#: Lines of ``rabbitmq.conf`` with which a fresh node joins the cluster of the first. If that one
#: had such lines, too, it would look for the others for five seconds.
JOIN = (
    "cluster_formation.peer_discovery_backend = classic_config",
    f"cluster_formation.classic_config.nodes.1 = {NAMES[0]}@localhost",
    "cluster_formation.classic_config.nodes.2 = {name}@localhost",
)


class Cluster:
    """Three RabbitMQ nodes that are one broker, as long as the ``with`` block lasts."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.nodes: list[RabbitNode] = []
        self._frozen: set[RabbitNode] = set()
        for name in NAMES:
            first = self.nodes[0] if self.nodes else None
            join = [line.format(name=name) for line in JOIN] if first else []
            node = RabbitNode(*CONFIG, *join, name=name, beside=first)
            self._stack.callback(node.close)
            self.nodes.append(node)

    def __repr__(self) -> str:
        return f"<Cluster of {', '.join(map(repr, self.nodes))}>"

    def __enter__(self) -> Cluster:
        with contextlib.ExitStack() as on_failure:
            on_failure.push(self)
            self.nodes[0].start()  # whom the others join
            self.start()
            on_failure.pop_all()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def answering(self) -> list[RabbitNode]:
        """The nodes that run and are not frozen."""
        return [node for node in self.nodes if node.is_running and node not in self._frozen]

    def url_of(self, vhost: str) -> str:
        """Return the URL of a virtual host, with all nodes."""
        first, *others = (f"{HOST}:{node.port}" for node in self.nodes)
        return ",".join([f"amqp://guest:guest@{first}/{quote(vhost, safe='')}", *others])

    def start(self) -> None:
        """Start the nodes that do not run, all at once: they may wait for each other."""
        with ThreadPoolExecutor() as threads:
            stopped = [node for node in self.nodes if not node.is_running]
            for started in [threads.submit(node.start) for node in stopped]:
                started.result()

    def leader_of(self, queue: str, vhost: str) -> RabbitNode:
        """Return the node with the leader of a quorum queue, once one that runs was elected."""

        def leader() -> RabbitNode | None:
            name = self._look_at(queue, vhost).get("leader")
            return next((node for node in self.answering if node.name == name), None)

        found = wait_until(leader, DEADLINE_SECONDS, f"a leader of {queue}")
        assert found is not None
        return found

    def members_of(self, queue: str, vhost: str) -> set[RabbitNode]:
        """Return the nodes on which a quorum queue has a member that runs."""
        names = self._look_at(queue, vhost).get("online", [])
        return {node for node in self.nodes if node.name in names}

    def wait_for_members(self, queue: str, vhost: str) -> None:
        """Wait until a quorum queue has a member that runs on each node."""
        wait_until(
            lambda: self.members_of(queue, vhost) == {*self.nodes},
            DEADLINE_SECONDS,
            f"all members of {queue}",
        )

    def clients(self, vhost: str) -> dict[str, RabbitNode]:
        """Return the connections to a virtual host by their names, with the nodes they lead to."""
        nodes = {node.port: node for node in self.nodes}
        rows = self._rows("list_connections", "vhost", "port", "client_properties")
        return {
            value: nodes[row["port"]]
            for row in rows
            for name, _type, value in row["client_properties"]
            if name == "connection_name" and row["vhost"] == vhost
        }

    @contextlib.contextmanager
    def frozen(self, node: RabbitNode, tick_seconds: int) -> Iterator[None]:
        """Freeze a node until the others take it for dead, and for as long as the block.

        Args:
            node: The node.
            tick_seconds: About how long a node may be silent, instead of a minute.
        """
        others = [each for each in self.answering if each is not node]
        self._set_tick(tick_seconds)
        node.suspend()
        self._frozen.add(node)
        try:
            wait_until(
                lambda: not any(node.name in each.ctl("eval", "nodes().") for each in others),
                DEADLINE_SECONDS,
                f"{others} give {node} up",
            )
            yield
        finally:
            self._frozen.discard(node)
            node.resume()
            self._set_tick(60)

    def _set_tick(self, seconds: int) -> None:
        for node in self.answering:
            node.ctl("eval", f"net_kernel:set_net_ticktime({seconds}, 0).")

    def _look_at(self, queue: str, vhost: str) -> dict[str, Any]:
        rows = self._rows("list_queues", "--vhost", vhost, "name", "leader", "online")
        return next((row for row in rows if row["name"] == queue), {})

    def _rows(self, *arguments: str) -> list[dict[str, Any]]:
        """Return the rows of a list of rabbitmqctl, which asks all nodes that run."""

        def ask() -> str | None:
            for node in self.answering:
                # A node that believes for a moment that it is alone pauses itself.
                with contextlib.suppress(RuntimeError):
                    return node.ctl(*arguments, "--formatter", "json")
            return None

        answer = wait_until(ask, DEADLINE_SECONDS, f"a node that answers {arguments[0]}")
        rows: list[dict[str, Any]] = json.loads(answer or "[]")
        return rows
