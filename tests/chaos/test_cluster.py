# SPDX-License-Identifier: MIT
"""Nodes of a cluster that are killed, stopped or frozen, one at a time.

The clients go on with the others, and the component's quorum queue with its members there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator

import pytest

from tests.chaos.cluster import Cluster
from tests.chaos.load import ALL_KINDS, COMPONENT, Load, Loads, Scale
from tests.nodes import Node
from tests.rabbitmq_node import RabbitNode

pytestmark = pytest.mark.rabbitmq

#: Seconds of silence after which a frozen node is given up, by the others and by its clients.
TICK_SECONDS = 4
HEARTBEAT_SECONDS = 4


@pytest.fixture(scope="module")
def cluster(rabbitmq_installed: None, nodes: list[Node]) -> Iterator[Cluster]:
    """A cluster, which the tests of this module share."""
    with Cluster() as cluster:
        nodes.extend(cluster.nodes)
        yield cluster
        for node in cluster.nodes:
            nodes.remove(node)


@pytest.fixture(scope="module")
def names() -> Iterator[str]:
    """An endless supply of names of virtual hosts."""
    return (f"cluster-{number}" for number in itertools.count())


@pytest.fixture
def vhost(cluster: Cluster, names: Iterator[str]) -> str:
    """An empty virtual host of the cluster, all of which runs."""
    cluster.start()  # a test that failed may have left it otherwise
    name = next(names)
    cluster.nodes[0].add_vhost(name)
    return name


@pytest.fixture
def broker_url(cluster: Cluster, vhost: str) -> str:
    """The virtual host on one of the nodes, where what is left over is looked for."""
    return cluster.nodes[0].url_of(vhost)


def start(load: Load, url: str) -> None:
    """Start a consumer and two producers that know all nodes."""
    load.start_consumer(url=url)
    for mode in ("single", "batch"):
        load.start_producer("--mode", mode, kinds=ALL_KINDS, url=url)


def busiest(cluster: Cluster, vhost: str) -> RabbitNode:
    """Return a node that at least a third of the clients is connected to."""
    wheres = list(cluster.clients(vhost).values())
    return max(cluster.nodes, key=wheres.count)


def go_on(load: Load, cluster: Cluster, vhost: str, clients: Collection[str]) -> None:
    """Wait until all clients are connected to nodes that answer, and have done some work."""
    load.wait_for(
        lambda: {*clients} <= cluster.clients(vhost).keys(), f"{clients} are connected again"
    )
    load.wait_for_progress()


def lose(
    node: RabbitNode, load: Load, *, cluster: Cluster, vhost: str, by: Callable[[], None]
) -> set[str]:
    """Lose a node under load, see all go on without it, and again when it is back.

    Returns:
        The clients that had to go elsewhere.
    """
    before = cluster.clients(vhost)
    by()
    go_on(load, cluster, vhost, set(before))
    node.start()
    cluster.wait_for_members(COMPONENT, vhost)
    return {name for name, where in before.items() if where is node}


def test_nodes_that_are_killed(loads: Loads, cluster: Cluster, vhost: str, scale: Scale) -> None:
    """The leader loses its power, then another node, and nothing that was confirmed is lost."""
    with loads() as load:
        start(load, cluster.url_of(vhost))
        load.wait_for_progress()
        for _ in scale.rounds():
            leader = cluster.leader_of(COMPONENT, vhost)
            lose(leader, load, cluster=cluster, vhost=vhost, by=leader.kill)
            other = busiest(cluster, vhost)
            assert other is not leader  # nobody has come back to it
            assert lose(other, load, cluster=cluster, vhost=vhost, by=other.kill)
        load.wait_for_progress()

        load.finish()


@pytest.mark.chaos
def test_nodes_that_are_restarted_one_by_one(
    loads: Loads, cluster: Cluster, vhost: str, scale: Scale
) -> None:
    """As for an upgrade: each client has to move, and nothing that was confirmed is lost."""
    with loads() as load:
        start(load, cluster.url_of(vhost))
        load.wait_for_progress()
        for _ in scale.rounds():
            clients = set(cluster.clients(vhost))
            moved = [
                lose(node, load, cluster=cluster, vhost=vhost, by=node.stop)
                for node in cluster.nodes
            ]
            assert clients == set().union(*moved)
        load.wait_for_progress()

        load.finish()


@pytest.mark.chaos
def test_a_node_that_freezes(loads: Loads, cluster: Cluster, vhost: str, scale: Scale) -> None:
    """Without a word it stops answering, until others take over, and nothing confirmed is lost."""
    with loads(heartbeat=HEARTBEAT_SECONDS) as load:
        start(load, cluster.url_of(vhost))
        for _ in scale.rounds():
            load.wait_for_progress()
            node = busiest(cluster, vhost)
            clients = set(cluster.clients(vhost))
            with cluster.frozen(node, TICK_SECONDS):
                go_on(load, cluster, vhost, clients)
            cluster.wait_for_members(COMPONENT, vhost)
        load.wait_for_progress()

        load.finish()
