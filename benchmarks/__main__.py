# SPDX-License-Identifier: MIT
"""The command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    broker,
    calling,
    consuming,
    delaying,
    embedded,
    footprint,
    growing,
    page,
    prefetching,
    publishing,
    reporting,
    sharing,
    wide,
)
from benchmarks.measuring import Result, Workload, run
from benchmarks.peers import cases
from benchmarks.peers.cases import Peer, available

#: How often each case is measured, and how much of the full work it does.
FULL, QUICK = (5, 1.0), (2, 0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or report, print, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments[:1]) == ["report"]:
        return _report(arguments[1:])
    return _measure(_options(arguments))


def _measure(options: argparse.Namespace) -> int:
    rounds, scale = QUICK if options.quick else FULL
    rounds = options.rounds or rounds
    progress = _Progress()
    results: list[tuple[Workload, list[Result]]] = []
    with broker.broker() as url:
        conditions = broker.conditions(url)
        print(reporting.heading(conditions, rounds), flush=True)
        for workload in _chosen(options, scale):
            found = run(workload, url, rounds, progress.tell)
            progress.clear()
            results.append((workload, found))
            print("\n" + reporting.table(workload, found), flush=True)
            if options.json is not None:  # now, because the next one may take the machine down
                document = reporting.as_json(conditions, rounds, results)
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    cases = [each for _workload, found in results for each in found]
    missed = [each for each in cases if each.is_met() is False]
    failed = [each for each in cases if each.failures]
    return 1 if failed or (options.check and missed) else 0


def _report(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description="Write plots, and the tables of the documentation, from the results of a run.",
    )
    default = page.FOLDER / "results.json"
    parser.add_argument("file", type=Path, nargs="?", default=default, help="from --json")
    try:
        for path in page.report(parser.parse_args(arguments).file):
            print(path)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    names = [workload.name for workload in _workloads(1.0)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure postage beside plain pika, on the broker of POSTAGE_URL or, "
        "without one, on a private RabbitMQ node. `python -m benchmarks report` writes what was "
        "measured into the documentation.",
    )
    parser.add_argument(
        "workload", nargs="*", help=f"what to measure (default: all): {', '.join(names)}"
    )
    parser.add_argument("--rounds", type=_positive, help=f"default {FULL[0]}, quick {QUICK[0]}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only what has a target and needs no peer, and less of it: under two minutes",
    )
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


def _chosen(options: argparse.Namespace, scale: float) -> list[Workload]:
    chosen = [
        workload
        for workload in _workloads(scale, _peers(options))
        if workload.name in options.workload or not options.workload
    ]
    if not options.quick:
        return chosen
    return [essence for essence in (each.essence() for each in chosen) if essence.cases]


def _workloads(scale: float, peers: Sequence[Peer] = ()) -> list[Workload]:
    return [
        *publishing.workloads(scale, peers),
        *consuming.workloads(scale, peers),
        *calling.workloads(scale, peers),
        *footprint.workloads(scale, peers),
        *growing.workloads(scale),
        *sharing.workloads(scale),
        *wide.workloads(scale),
        *embedded.workloads(scale),
        *delaying.workloads(scale),
        *prefetching.workloads(scale),
    ]


class _Progress:
    """Tells what is going on: in one line where somebody is watching, in a log otherwise."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._is_watched = sys.stderr.isatty()

    def tell(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        before, after = ("\r\033[K", "") if self._is_watched else ("", "\n")
        print(f"{before}{minutes}:{seconds:02} {text}", end=after, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._is_watched:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # Programs shall start as users start them: with modules that were compiled before.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no program is left behind
    sys.exit(main())
