# SPDX-License-Identifier: MIT
"""The command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    broker,
    calling,
    consuming,
    delaying,
    embedded,
    prefetching,
    publishing,
    reporting,
)
from benchmarks.measuring import Result, Workload, run
from benchmarks.peers import cases
from benchmarks.peers.cases import Peer, available

#: How often each case is measured, and how much of the full work it does.
FULL, QUICK = (7, 1.0), (2, 0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = _options(arguments)
    rounds, scale = QUICK if options.quick else FULL
    rounds = options.rounds or rounds
    results: dict[str, list[Result]] = {}
    with broker.broker() as url:
        conditions = broker.conditions(url)
        print(reporting.heading(conditions, rounds), flush=True)
        for workload in _workloads(scale, _peers(options)):
            if workload.name in options.workload or not options.workload:
                results[workload.name] = run(workload, url, rounds, _progress)
                _progress("")
                print("\n" + reporting.table(workload, results[workload.name]), flush=True)
    if options.json is not None:
        document = reporting.as_json(conditions, rounds, results)
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    missed = [each for cases in results.values() for each in cases if each.is_met() is False]
    return 1 if options.check and missed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [workload.name for workload in _workloads(1.0)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure postage beside plain pika, on the broker of POSTAGE_URL or, "
        "without one, on a private RabbitMQ node.",
    )
    parser.add_argument(
        "workload", nargs="*", help=f"what to measure (default: all): {', '.join(names)}"
    )
    parser.add_argument("--rounds", type=_positive, help=f"default {FULL[0]}, quick {QUICK[0]}")
    parser.add_argument("--quick", action="store_true", help="less work: under two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to a file")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a ratio misses its target"
    )
    parser.add_argument(
        "--no-peers", action="store_true", help="measure plain pika and postage alone"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.workload) - set(names))
    if unknown:
        parser.error(f"unknown workload(s) {', '.join(unknown)}; known are {', '.join(names)}")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError("not positive")
    return number


def _peers(options: argparse.Namespace) -> list[Peer]:
    """Return the peers that are to be measured: they are installed if need be."""
    if options.no_peers or options.quick:
        return []
    return available() if cases.WORKLOADS & set(options.workload or cases.WORKLOADS) else []


def _workloads(scale: float, peers: Sequence[Peer] = ()) -> list[Workload]:
    return [
        *publishing.workloads(scale, peers),
        *consuming.workloads(scale, peers),
        *calling.workloads(scale, peers),
        *embedded.workloads(scale),
        *delaying.workloads(scale),
        *prefetching.workloads(scale),
    ]


def _progress(text: str) -> None:
    """Show what is going on, where somebody may be watching."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
