# SPDX-License-Identifier: MIT
"""Work that several processes share: one queue with many of them, and one after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil

from benchmarks import broker, ceiling, cpu
from benchmarks.broker import Job
from benchmarks.children import in_child, service
from benchmarks.envelope import FINGERPRINT
from benchmarks.growing import Counter
from benchmarks.measuring import Case, Point, Sample, Workload, percentile
from postage.messaging import (
    DefaultExchange,
    GenericProducer,
    MessageHandler,
    MessageProcessor,
    Queue,
)
from tests.waiting import wait_until

PROCESSES = (1, 2, 4, 8)
#: Seconds until all messages are handled.
DEADLINE_SECONDS = 100.0
#: Seconds between the messages whose way through the pipeline is timed: it is empty by then.
APART = 0.01
#: Messages that come before those: the first ones connect.
WARM_UP = 20


def workloads(scale: float) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How much to send, 1 being enough for a steady rate.
    """
    kinds = {
        "counts": ("handler that counts", "quorum", 40_000, 200),
        "computes": ("handler that computes for 1 ms", "quorum", 4_000, 10),
        "waits": ("handler that waits for 10 ms", "quorum", 500, 10),
    }
    cases = []
    for work, (name, kind, count, prefetch) in kinds.items():
        first = f"{name}, 1"
        for number in PROCESSES:
            some = round(count * scale * (number if work == "waits" else 1))
            cases.append(
                Case(
                    f"{name}, {number}",
                    partial(_processes, work, (kind, some, prefetch), number),
                    first if number > 1 else None,
                    at=Point(name, number),
                )
            )
    few, many = round(200 * scale), round(3_000 * scale)
    default = "message_x()"
    pipeline = [
        Case(default, partial(_pipeline, False, 200, many, few)),
        Case("message_x(), prefetch 10", partial(_pipeline, False, 10, many, few), default),
        Case("with an outbox", partial(_pipeline, True, 200, many, few), default),
    ]
    return [
        Workload("processes", "Processes that share a queue", cases, "processes", rounds=3),
        Workload("pipeline", "Three components in a row, prefetch 200", pipeline, rounds=3),
    ]


# ------------------------------------------------------------------------ side by side


class Board:
    """What processes write for the one that has started them: a line each, without locks.

    Every process counts what it has handled, and notes when it was the first and the last time.
    """

    def __init__(self, lines: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.counts = spawn.RawArray("q", lines)
        self.began = spawn.RawArray("d", lines)
        self.ended = spawn.RawArray("d", lines)
        self.go = spawn.Event()

    def note(self, line: int) -> None:
        now = time.perf_counter()  # one clock for all processes of a machine
        if not self.counts[line]:
            self.began[line] = now
        self.ended[line] = now
        self.counts[line] += 1

    @property
    def seconds(self) -> float:
        """Seconds from the first message to the last, of all processes that had one."""
        busy = [line for line, count in enumerate(self.counts) if count]
        seconds: float = max(self.ended[n] for n in busy) - min(self.began[n] for n in busy)
        return seconds


class _Worker(MessageProcessor):
    def __init__(self, job: Job, work: str, note: Callable[[], None]) -> None:
        self.prefetch = job.prefetch
        self.work = getattr(self, work)
        self.note = note
        super().__init__(FINGERPRINT, _eqk(job))

    @MessageHandler("command", "echo")
    def msg_echo(self, _content: Any) -> None:
        self.work()
        self.note()

    def counts(self) -> None:
        """Do nothing more."""

    def computes(self) -> None:
        """Take a millisecond of a core."""
        end = time.thread_time() + 0.001
        while time.thread_time() < end:
            pass

    def waits(self) -> None:
        """Wait, as for a database."""
        time.sleep(0.01)


def _work(job: Job, work: str, board: Board, line: int, ready: Any) -> None:
    worker = _Worker(job, work, lambda: board.note(line))
    ready.send(None)
    board.go.wait()
    worker.start_consuming()


def _processes(work: str, how: tuple[str, int, int], number: int, url: str) -> Sample:
    kind, count, prefetch = how
    with broker.job(url, kind, count, prefetch) as job:
        ceiling.publish(job)
        board = Board(number)
        with _started(job, work, board, number) as processes:
            server = cpu.listener(url)
            brokers = [server] if server else []
            ours, theirs = cpu.scheduled(processes), cpu.spent(brokers)
            board.go.set()
            wait_until(lambda: sum(board.counts) >= count, DEADLINE_SECONDS, "all messages")
            ours, theirs = cpu.scheduled(processes) - ours, cpu.spent(brokers) - theirs
    sample = {
        "messages/s": count / board.seconds,
        "CPU us/message": ours * 1e6 / count,
    }
    if server:
        sample["broker us/message"] = theirs * 1e6 / count
        sample["broker, % of a core"] = theirs * 100 / board.seconds
    return sample


@contextlib.contextmanager
def _started(job: Job, work: str, board: Board, number: int) -> Iterator[list[psutil.Process]]:
    """Provide processes that wait for the word to begin."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    children = [
        spawn.Process(target=_work, args=(job, work, board, line, sender), daemon=True)
        for line in range(number)
    ]
    try:
        for child in children:
            child.start()
        for _ in children:
            if not receiver.poll(DEADLINE_SECONDS):
                raise RuntimeError("a process did not start")
            receiver.recv()
        yield [psutil.Process(child.pid) for child in children]
    finally:
        for child in children:
            if child.pid:
                child.kill()
                child.join()


# --------------------------------------------------------------------- one after another


class _Station(MessageProcessor):
    """Sends each message on to the next queue."""

    def __init__(self, job: Job, target: str, outbox: bool) -> None:
        self.prefetch = job.prefetch
        self.outbox = outbox
        self.producer = _Producer(target)
        super().__init__(FINGERPRINT, _eqk(job))

    @MessageHandler("command", "echo")
    def msg_echo(self, content: Any) -> None:
        self.producer.message_echo(**content["parameters"])


def _station(ready: Callable[[], None], job: Job, target: str, outbox: bool) -> None:
    station = _Station(job, target, outbox)
    ready()
    station.start_consuming()


class _Terminus(Counter):
    """Notes how long the first messages took, and how fast the others come."""

    def __init__(self, job: Job, few: int) -> None:
        self.few = few
        self.milliseconds: list[float] = []
        super().__init__(job)

    @MessageHandler("command", "echo")
    def msg_echo(self, content: Any) -> None:
        if len(self.milliseconds) < self.few:
            sent = content["parameters"]["at"]
            self.milliseconds.append((time.perf_counter() - sent) * 1000)
            return
        self.count()


def _terminus(job: Job, few: int) -> Sample:
    terminus = _Terminus(job, few)
    terminus.start_consuming()
    sample = terminus.watch.sample(job.count - 1, "message")
    late = terminus.milliseconds[WARM_UP:]
    latencies = {f"p{percent} ms": percentile(late, percent) for percent in (50, 90, 99)}
    return {key: value for key, value in sample.items() if "CPU" not in key} | latencies


class _Producer(GenericProducer):
    def __init__(self, queue: str) -> None:
        self.eks = [(DefaultExchange, queue)]
        super().__init__(FINGERPRINT)


def _eqk(job: Job) -> Any:
    return [(DefaultExchange, [(Queue(job.queue, type=job.kind), job.queue)])]


def _send(ready: Callable[[], None], job: Job, last: Job, few: int) -> None:
    ready()
    wait_until(lambda: broker.is_consumed(last), DEADLINE_SECONDS, "the last component")
    with _Producer(job.queue) as producer:
        for _ in range(few):
            producer.message_echo(at=time.perf_counter())
            time.sleep(APART)
        with producer.batch() as batch:
            for _ in range(job.count):
                batch.message_echo(at=0)


def _pipeline(outbox: bool, prefetch: int, many: int, few: int, url: str) -> Sample:
    few += WARM_UP
    with contextlib.ExitStack() as stack:
        first, second, last = (
            stack.enter_context(broker.job(url, "quorum", many, prefetch)) for _ in range(3)
        )
        for here, there in ((first, second), (second, last)):
            stack.enter_context(service(_station, here, there.queue, outbox))
        stack.enter_context(service(_send, first, last, few))
        sample: Sample = in_child(_terminus, last, few)
        return sample
