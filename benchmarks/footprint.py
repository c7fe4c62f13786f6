# SPDX-License-Identifier: MIT
"""What a component costs that has nothing to do: to import, to start, to keep.

Every figure is of a process of its own, which runs Python as its users do.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import psutil

from benchmarks import broker, ceiling, cpu
from benchmarks.measuring import Case, Sample, Target, Workload
from benchmarks.peers import cases
from benchmarks.peers.cases import Peer
from tests.programs import ROOT, Program

#: Seconds for which idle components are watched, after so many to settle.
WATCHED, SETTLING = 20.0, 3.0
#: Seconds that a component gets to start, and to end.
DEADLINE_SECONDS = 60.0

#: Prints the milliseconds that the statement in its argument takes.
IMPORTING = """
import sys, time
began = time.perf_counter()
exec(sys.argv[1])
print((time.perf_counter() - began) * 1000)
"""

#: A component. It prints a line when it has handled the message that waits for it.
COMPONENT = """
import sys
from postage.generic_application import GenericApplication
from postage.messaging import Fingerprint, MessageHandler
from postage.microthreads import MicroScheduler

class Component(GenericApplication):
    @MessageHandler("command", "echo")
    def msg_echo(self, content):
        print("handled", flush=True)

scheduler = MicroScheduler()
scheduler.add_microthread(Component(Fingerprint(sys.argv[1]).as_dict(), None))
for _ in scheduler.main():
    pass
"""

#: The same work with plain pika.
PLAIN = """
import json, sys
import pika

def handle(channel, method, properties, body):
    json.loads(body)
    print("handled", flush=True)
    channel.basic_ack(method.delivery_tag)

channel = pika.BlockingConnection(pika.URLParameters(sys.argv[2])).channel()
channel.queue_declare(sys.argv[1], passive=True)
channel.basic_consume(sys.argv[1], handle)
channel.start_consuming()
"""


def workloads(scale: float, peers: Sequence[Peer] = ()) -> list[Workload]:
    """Return the workloads of this module.

    Args:
        scale: How long idle components are watched.
        peers: Whose components are measured, too.
    """
    watched = WATCHED * max(scale, 0.3)
    imports = [
        Case("import pika", partial(_importing, "import pika")),
        Case(
            "import postage.messaging",
            partial(_importing, "import postage.messaging"),
            target=Target(150, is_maximum=True),
        ),
        Case(
            "import postage.generic_application",
            partial(_importing, "import postage.generic_application"),
            target=Target(150, is_maximum=True),
        ),
    ]
    start = [
        Case("plain pika", partial(_starting, PLAIN)),
        Case("GenericApplication", partial(_starting, COMPONENT), "plain pika"),
        *(cases.start(peer, "plain pika") for peer in peers),
    ]
    memory = [
        Case("plain pika", partial(_keeping, PLAIN)),
        Case(
            "GenericApplication",
            partial(_keeping, COMPONENT),
            target=Target(45, is_maximum=True),
        ),
        *(cases.keep(peer) for peer in peers),
    ]
    idle = [
        Case("plain pika, 1", partial(_idle, PLAIN, 1, watched)),
        *(
            Case(
                f"GenericApplication, {number}",
                partial(_idle, COMPONENT, number, watched),
                target=Target(0.3, is_maximum=True),
            )
            for number in (1, 10)
        ),
    ]
    return [
        Workload("import", "Import, without the start of Python", imports),
        Workload("start", "From the start of Python to the first message handled", start, rounds=3),
        Workload("footprint", "Memory of an idle component", memory, rounds=3),
        Workload("idle", "Processor time of idle components", idle, rounds=1),
    ]


def _importing(statement: str, _url: str) -> Sample:
    command = [sys.executable, "-c", IMPORTING, statement]
    times = [
        float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
        for _ in range(3)
    ]
    return {"ms": min(times)}


def _starting(program: str, url: str) -> Sample:
    with broker.job(url, "quorum", 1) as job:
        ceiling.publish(job)
        began = time.perf_counter()
        with running(program, job.queue, url):
            return {"ms": (time.perf_counter() - began) * 1000}


def _keeping(program: str, url: str) -> Sample:
    with broker.job(url, "quorum", 1) as job:
        ceiling.publish(job)
        with running(program, job.queue, url) as process:
            memory = process.memory_full_info()
    return {"RSS MiB": memory.rss / 2**20, "USS MiB": memory.uss / 2**20}


def _idle(program: str, number: int, seconds: float, url: str) -> Sample:
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(number):
            job = stack.enter_context(broker.job(url, "quorum", 1))
            ceiling.publish(job)
            processes.append(stack.enter_context(running(program, job.queue, url)))
        time.sleep(SETTLING)
        return {"% of a core each": cpu.share(processes, seconds) / number}


@contextlib.contextmanager
def running(program: str, queue: str, url: str) -> Iterator[psutil.Process]:
    """Run a program that has handled a message, while the block runs."""
    with Program(["-c", program, queue, url], env={"POSTAGE_URL": url}) as component:
        component.wait_for_line("handled", DEADLINE_SECONDS)
        try:
            yield psutil.Process(component.pid)
        finally:
            component.terminate()
            component.wait(DEADLINE_SECONDS)
            with broker.channel(url) as channel:  # it stays a week, for the next on this host
                channel.queue_delete(f"{queue}@{socket.gethostname()}")
