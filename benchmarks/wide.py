# SPDX-License-Identifier: MIT
"""What the broker pays for more of everything: members of a queue, queues, connections.

Clients are plain sockets with encoded frames (`ceiling`), so that what is measured is the broker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import psutil
from pika.adapters.blocking_connection import BlockingChannel

from benchmarks import broker, ceiling, cpu
from benchmarks.broker import Job
from benchmarks.children import in_child
from benchmarks.footprint import COMPONENT, running
from benchmarks.measuring import Case, Point, Sample, Workload
from postage.messaging import Queue
from tests.chaos.cluster import Cluster
from tests.rabbitmq_node import RabbitNode

PREFETCH = 200
QUEUES = (1, 10, 100)

#: Erlang: the bytes of processes and tables, without garbage, and those of binaries: among them
#: is a buffer for each connection, as large as the kernel's and hardly touched.
MEMORY = (
    "[garbage_collect(P) || P <- processes()], "
    "{erlang:memory(processes) + erlang:memory(ets), erlang:memory(binary)}."
)


def workloads(scale: float) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How much to send, 1 being enough for a steady rate.
    """
    count = round(30_000 * scale)
    single = "quorum, 1 node"
    members = [
        Case("classic, 1 node", partial(_alone, "classic", count), single),
        Case(single, partial(_alone, "quorum", count)),
        Case("classic, cluster of 3 nodes", partial(_together, "classic", count), single),
        Case("quorum, cluster of 3 nodes", partial(_together, "quorum", count), single),
    ]
    fanout = []
    for kind in ("classic", "quorum"):
        for number in QUEUES:
            case = Case(
                f"{kind}, {number}",
                partial(_fanout, kind, count, number),
                f"{kind}, 1" if number > 1 else None,
                at=Point(kind, number),
            )
            fanout.append(case)
    memory = [
        Case("a connection with a channel", partial(_memory, _connections, 200)),
        Case("a classic queue", partial(_memory, _classic_queues, 200)),
        Case("a quorum queue", partial(_memory, _quorum_queues, 100)),
        Case("a component (GenericApplication)", partial(_memory, _components, 10)),
    ]
    return [
        Workload("members", "Where a queue lies; all nodes on this machine", members, rounds=3),
        Workload("fanout", "Queues that get a copy of each message", fanout, "queues", 3),
        Workload("memory-each", "Memory of the broker for one more", memory, rounds=1),
    ]


# ------------------------------------------------------------------------------ members


def _alone(kind: str, count: int, url: str) -> Sample:
    server = cpu.listener(url)
    return _through(url, kind, count, [server] if server else [])


def _together(kind: str, count: int, _url: str) -> Sample:
    with Cluster() as cluster:
        servers = [cpu.listener(node.url) for node in cluster.nodes]
        return _through(cluster.nodes[0].url, kind, count, [each for each in servers if each])


def _through(url: str, kind: str, count: int, servers: list[psutil.Process]) -> Sample:
    """Publish into a queue and empty it."""
    sample: Sample = {}
    with broker.job(url, kind, count, PREFETCH) as job:
        for name, work in (("published", ceiling.publish), ("delivered", ceiling.deliver)):
            before = cpu.spent(servers)
            sample[f"{name}/s"] = in_child(work, job)["messages/s"]
            if servers:
                sample[f"nodes us/{name}"] = (cpu.spent(servers) - before) * 1e6 / count
    return sample


# ------------------------------------------------------------------------------- fanout


def _fanout(kind: str, count: int, queues: int, url: str) -> Sample:
    with broker.job(url, kind, max(1, count // queues)) as job, broker.channel(url) as channel:
        channel.exchange_declare(job.queue, "fanout", durable=True, auto_delete=True)
        names = [job.queue, *_declare(channel, kind, queues - 1)]
        for name in names:
            channel.queue_bind(name, job.queue)
        sample: Sample = in_child(_publish_to_all, job)
        for name in names[1:]:
            channel.queue_delete(name)
    return {
        "copies/s": sample["messages/s"] * queues,
        **{
            name.replace("message", "copy"): value / queues
            for name, value in sample.items()
            if name.startswith("broker")
        },
        "messages/s": sample["messages/s"],
    }


def _publish_to_all(job: Job) -> Sample:
    return ceiling.publish(job, [ceiling.encoded("", exchange=job.queue)])


def _declare(channel: BlockingChannel, kind: str, number: int) -> list[str]:
    """Declare queues as postage declares them, and return their names."""
    names = [f"postage-benchmark-{kind}-{n}" for n in range(number)]
    for name in names:
        spec = Queue(name, type=kind).spec()
        channel.queue_declare(name, durable=spec.durable, arguments=dict(spec.arguments))
    return names


# ------------------------------------------------------------------------------- memory


def _memory(
    more: Callable[[str, int], contextlib.AbstractContextManager[None]], count: int, _url: str
) -> Sample:
    with RabbitNode() as node:
        with more(node.url, 2):  # what is loaded once, is
            pass
        before = _used(node)
        with more(node.url, count):
            pairs = zip(_used(node), before, strict=True)
            used, buffers = ((after - b) / count / 1024 for after, b in pairs)
            return {"KiB": used, "KiB of buffers": buffers}


def _used(node: RabbitNode) -> tuple[int, int]:
    """Return the bytes of a node's processes and tables, and those of its buffers."""
    used, buffers = map(int, node.ctl("eval", MEMORY).strip("{}\n").split(","))
    return used, buffers


@contextlib.contextmanager
def _connections(url: str, count: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(ceiling.Wire(url))
        yield


@contextlib.contextmanager
def _classic_queues(url: str, count: int) -> Iterator[None]:
    with broker.channel(url) as channel:
        _declare(channel, "classic", count)
        yield


@contextlib.contextmanager
def _quorum_queues(url: str, count: int) -> Iterator[None]:
    with broker.channel(url) as channel:
        _declare(channel, "quorum", count)
        yield


@contextlib.contextmanager
def _components(url: str, count: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            job = stack.enter_context(broker.job(url, "quorum", 1))
            ceiling.publish(job)
            stack.enter_context(running(COMPONENT, job.queue, url))
        yield
