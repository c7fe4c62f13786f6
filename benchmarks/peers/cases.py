# SPDX-License-Identifier: MIT
"""The cases of the peers: their programs, as real processes, measured beside all others."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pika
import psutil

from benchmarks import broker
from benchmarks.children import DEADLINE_SECONDS, in_child
from benchmarks.job import Job
from benchmarks.measuring import Case, Sample
from benchmarks.peers import environments, protocol
from tests.programs import Program

#: The case that those of the peers are compared with, where nothing else is said.
PLAIN = "pika SelectConnection, classic"
#: Messages that the peers on asyncio publish at a time.
TASKS = 500
#: Seconds after which a component that has nothing to do has settled.
SETTLING = 1.0


@dataclass(frozen=True)
class Peer:
    """A peer, by the name of its program.

    Attributes:
        prefetch: Its prefetch count if nobody sets one; 0 if that is none.
        serving: The prefetch count with which it answers many calls best.
        is_fixed: Whether nobody can set its prefetch count.
        confirms: How it confirms: "together" if many messages need not wait for each other's
            confirms, "singly" if they do, or "never".
        calls: How many calls it can have in flight; 0 if it has no RPC.
        declared: The queues that it insists on declaring itself to get messages, and
        called: those that it declares to answer calls. As ``exchanges``, they are patterns for the
            name of the queue of a job.
        pace: How much of the work it is given: the slower, the less.
    """

    title: str
    program: str
    prefetch: int
    serving: int = 200
    is_fixed: bool = False
    confirms: str = "singly"
    calls: int = 1000
    declared: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    exchanges: tuple[str, ...] = ()
    pace: float = 0.3

    @property
    def name(self) -> str:
        """Its name and its version."""
        return f"{self.title} {environments.version(self.program)}"


PEERS = (
    Peer("kombu", "kombu", 0, pace=0.7),
    Peer("aio-pika", "aio_pika", 0, confirms="together", called=("{}",)),
    Peer("FastStream", "faststream", 0, confirms="together"),
    Peer("nameko", "nameko", 10, serving=10, called=("rpc-{}",), exchanges=("{}-exchange",)),
    Peer("PikaBus", "pikabus", 10, confirms="together", exchanges=("{}-direct", "{}-topic")),
    Peer("dramatiq", "dramatiq", 16, calls=0, declared=("{}", "{}.DQ", "{}.XQ")),
    Peer("celery", "celery", 4, declared=("{}",), called=("{}",), exchanges=("{}-exchange",)),
    Peer(
        "Postage",
        "postage_121",
        1,
        is_fixed=True,
        confirms="never",
        calls=1,
        exchanges=("{}-exchange",),
        pace=0.1,
    ),
)

#: The workloads that have cases of the peers.
WORKLOADS = {
    "batch",
    "single",
    "consume",
    "rpc",
    "rpc10",
    "rpc100",
    "rpc1000",
    "start",
    "footprint",
}


def available() -> list[Peer]:
    """Return the peers that can run here, installed; tell why, of those that cannot."""
    return [peer for peer in PEERS if _is_available(peer)]


def _is_available(peer: Peer) -> bool:
    try:
        environments.environment(peer.program)
    except environments.UnavailableError as error:
        print(f"{peer.name} is left out: {error}", file=sys.stderr, flush=True)
        return False
    return True


def named(peers: Sequence[Peer], *titles: str) -> list[Peer]:
    """Return those of the peers that bear one of the titles."""
    return [peer for peer in peers if peer.title in titles]


# ------------------------------------------------------------------------- publishing


def publish_singly(peer: Peer, count: int) -> Case:
    """Return the case of messages that are published one by one, with confirms."""
    work = partial(_publish, peer, "publish_singly", _share(peer, count), 1)
    return Case(f"{peer.name}, classic", work, "pika BlockingConnection, classic")


def publish_many(peer: Peer, count: int) -> Case:
    """Return the case of many messages, with confirms if they need not wait for each other."""
    name = f"{peer.name}, classic{'' if peer.confirms == 'together' else ', unconfirmed'}"
    work = partial(_publish, peer, "publish_many", _share(peer, count), TASKS)
    return Case(name, work, PLAIN)


def _publish(peer: Peer, role: str, count: int, in_flight: int, url: str) -> Sample:
    with _job(peer, peer.declared, url, count, in_flight=in_flight) as job:
        return _play(peer, role, job)


# -------------------------------------------------------------------------- consuming


def consume(peer: Peer, count: int, prefetch: int | None, *, fill: Callable[[Job], Sample]) -> Case:
    """Return the case of messages that wait in a queue.

    Args:
        peer: Who gets them.
        count: How many, at most.
        prefetch: The prefetch count; None: its own.
        fill: Puts them into the queue, in a process of its own.
    """
    chosen = peer.prefetch if prefetch is None else prefetch
    work = partial(_consume, peer, _share(peer, count), chosen, fill)
    return Case(consume_name(peer, prefetch), work, PLAIN)


def consume_name(peer: Peer, prefetch: int | None) -> str:
    """Return the name of that case."""
    if prefetch is None:
        return f"{peer.name}, classic, its own prefetch, {peer.prefetch or 'none'}"
    return f"{peer.name}, classic, prefetch {prefetch}"


def _consume(
    peer: Peer, count: int, prefetch: int, fill: Callable[[Job], Sample], url: str
) -> Sample:
    with _job(peer, peer.declared, url, count, prefetch=prefetch, in_flight=TASKS) as job:
        if peer.declared:
            _play(peer, "publish_many", job)  # it gets messages of its own kind only
        else:
            in_child(fill, job)
        sample = _play(peer, "consume", job)
        left = broker.messages_left(job)
        if left:
            raise RuntimeError(f"{left} of {count} messages were not acknowledged")
    return sample


# ---------------------------------------------------------------------------- calling


def call(peer: Peer, count: int, in_flight: int, against: str) -> Case:
    """Return the case of calls, as many in flight."""
    prefetch = peer.serving if in_flight > 1 else peer.prefetch
    work = partial(_call, peer, _share(peer, count), prefetch, in_flight)
    return Case(call_name(peer), work, against)


def call_name(peer: Peer) -> str:
    """Return the name of that case."""
    return f"{peer.name}, classic"


def _call(peer: Peer, count: int, prefetch: int, in_flight: int, url: str) -> Sample:
    with (
        _job(peer, peer.called, url, count, prefetch=prefetch, in_flight=in_flight) as job,
        _service(peer, "serve", job),
    ):
        return _play(peer, "call", job)


# --------------------------------------------------------------------------- starting


def start(peer: Peer, against: str) -> Case:
    """Return the case of a component that starts until it consumes."""
    return Case(peer.name, partial(_start, peer), against)


def _start(peer: Peer, url: str) -> Sample:
    with _job(peer, peer.declared, url, 1, prefetch=peer.prefetch) as job:
        began = time.perf_counter()
        with _service(peer, "consume", job):
            return {"ms": (time.perf_counter() - began) * 1000}


def keep(peer: Peer) -> Case:
    """Return the case of the memory of a component that has nothing to do."""
    return Case(peer.name, partial(_keep, peer))


def _keep(peer: Peer, url: str) -> Sample:
    with (
        _job(peer, peer.declared, url, 1, prefetch=peer.prefetch) as job,
        _service(peer, "consume", job) as program,
    ):
        time.sleep(SETTLING)
        memory = psutil.Process(program.pid).memory_full_info()
    return {"RSS MiB": memory.rss / 2**20, "USS MiB": memory.uss / 2**20}


# ---------------------------------------------------------------------------- running


def _share(peer: Peer, count: int) -> int:
    return max(100, round(count * peer.pace))


def _play(peer: Peer, role: str, job: Job) -> Sample:
    """Let a program do its work, and return what it measured when it has ended."""
    with _program(peer, role, job) as program:
        line = program.wait_for_line(protocol.SAMPLE, DEADLINE_SECONDS)
        if program.wait():
            raise RuntimeError(f"the program of {peer.name} failed:\n{program.output}")
    sample: Sample = json.loads(line.removeprefix(protocol.SAMPLE))
    return sample


@contextlib.contextmanager
def _service(peer: Peer, role: str, job: Job) -> Iterator[Program]:
    """Run a program that is ready, while the block runs."""
    with _program(peer, role, job) as program:
        program.wait_for_line(protocol.READY, DEADLINE_SECONDS)
        yield program


def _program(peer: Peer, role: str, job: Job) -> Program:
    environment = environments.environment(peer.program)
    return Program(
        [*environment.arguments, *protocol.command_line(role, job)],
        env={**environment.variables, "POSTAGE_URL": job.url},
        python=environment.python,
    )


@contextlib.contextmanager
def _job(
    peer: Peer,
    declared: Sequence[str],
    url: str,
    count: int,
    *,
    prefetch: int = 10,
    in_flight: int = 1,
) -> Iterator[Job]:
    """Provide a job and its queue, unless the peer declares it; what it declares is deleted."""
    with contextlib.ExitStack() as stack:
        if declared:
            name = f"postage-benchmark-{uuid.uuid4().hex[:8]}"
            job = Job(url, name, "classic", count, prefetch, in_flight)
        else:
            job = stack.enter_context(broker.job(url, "classic", count, prefetch, in_flight))
        stack.callback(_delete, peer, declared, job)
        yield job


def _delete(peer: Peer, declared: Sequence[str], job: Job) -> None:
    with pika.BlockingConnection(pika.URLParameters(job.url)) as connection:
        channel = connection.channel()
        for pattern in declared:
            channel.queue_delete(pattern.format(job.queue))
        for pattern in peer.exchanges:
            channel.exchange_delete(pattern.format(job.queue))
