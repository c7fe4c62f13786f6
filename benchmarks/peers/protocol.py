# SPDX-License-Identifier: MIT
"""How a peer's program is told what to do, and how it tells what it found.

``python -m benchmarks.peers.<name> <role> <job as JSON>`` plays a role, which is a function of the
program. A service prints a line when the broker delivers to it, and runs until it is killed; the
others print a line with their sample as JSON. It needs nothing but the standard library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from benchmarks.job import Job
from benchmarks.measuring import Sample

#: What the lines of a program begin with. Their libraries may print others.
READY, SAMPLE = "benchmarks: ready", "benchmarks: sample "


def main(*roles: Callable[[Job], Sample | None]) -> None:
    """Play the role that the command line names."""
    play = next(role for role in roles if role.__name__ == sys.argv[1])
    sample = play(job())
    if sample is not None:
        tell(sample)


def job() -> Job:
    """Return what the command line says is to do."""
    return Job(**json.loads(sys.argv[2]))


def command_line(role: str, what: Job) -> Sequence[str]:
    """Return the arguments that make a program play a role."""
    return [role, json.dumps(asdict(what))]


def tell(sample: Sample) -> None:
    """Tell what was measured."""
    print(SAMPLE + json.dumps(sample), flush=True)


def is_service() -> bool:
    """Tell whether this program is a service: some libraries must be patched before imports."""
    return sys.argv[1:2] in (["consume"], ["serve"])


def ready() -> None:
    """Say that the broker delivers to this program from now on."""
    print(READY, flush=True)
