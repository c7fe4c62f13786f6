# SPDX-License-Identifier: MIT
"""Repeats cases in turn, and compares them.

Machines are shared, and a second later the same work may take twice as long. So no case is
measured in one go: a round measures every case once, the next round in reverse order, and two
cases are compared within each round. Only these ratios mean something elsewhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

#: What one measurement found, such as ``{"per second": 20_000.0}``. The first figure is the
#: one that cases are compared by.
Sample = dict[str, float]


@dataclass(frozen=True)
class Target:
    """What a ratio must at least, or at most, be."""

    limit: float
    is_maximum: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.is_maximum else '>='} {self.limit:g}"

    def is_met(self, ratio: float) -> bool:
        """Tell whether a ratio is good enough."""
        return ratio <= self.limit if self.is_maximum else ratio >= self.limit


@dataclass(frozen=True)
class Case:
    """One way to do the work.

    ``measure`` takes the broker's URL. ``against`` names the case of the same workload that it
    is compared with, and ``target`` is for that ratio.
    """

    name: str
    measure: Callable[[str], Sample]
    against: str | None = None
    target: Target | None = None


@dataclass(frozen=True)
class Workload:
    """Cases that do the same work."""

    name: str
    title: str
    cases: Sequence[Case]


@dataclass(frozen=True)
class Spread:
    """Many values of one figure."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values)

    @property
    def highest(self) -> float:
        return max(self.values)


@dataclass
class Result:
    """What the rounds of one case found."""

    case: Case
    samples: list[Sample] = field(default_factory=list)
    #: What the case is compared with.
    base: Result | None = None

    def figures(self) -> dict[str, Spread]:
        """Return the values of each figure."""
        return {name: Spread([each[name] for each in self.samples]) for name in self.samples[0]}

    def ratio(self) -> Spread | None:
        """Return the ratio to the case that it is compared with, of each round."""
        if self.base is None:
            return None
        figure = next(iter(self.samples[0]))
        pairs = zip(self.samples, self.base.samples, strict=True)
        return Spread([mine[figure] / other[figure] for mine, other in pairs])

    def is_met(self) -> bool | None:
        """Tell whether the median ratio meets the target; None without a target."""
        ratio = self.ratio()
        if ratio is None or self.case.target is None:
            return None
        return self.case.target.is_met(ratio.median)


def run(workload: Workload, url: str, rounds: int, progress: Callable[[str], None]) -> list[Result]:
    """Measure the cases of a workload in turn.

    Args:
        workload: The cases.
        url: The broker.
        rounds: How often each case is measured.
        progress: Told what is being measured.
    """
    results = {case.name: Result(case) for case in workload.cases}
    for result in results.values():
        result.base = results[result.case.against] if result.case.against else None
    for number, case in _in_turn(workload.cases, rounds):
        progress(f"{workload.name}, round {number} of {rounds}: {case.name}")
        results[case.name].samples.append(case.measure(url))
    return list(results.values())


def _in_turn(cases: Sequence[Case], rounds: int) -> Iterator[tuple[int, Case]]:
    """Yield each case once a round, in an order that a steady drift cannot favour."""
    for number in range(1, rounds + 1):
        for case in cases if number % 2 else reversed(cases):
            yield number, case


class Stopwatch:
    """Measures the time, and the processor time of this process, that some work takes."""

    _started = _ended = (0.0, 0.0)

    def start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self._ended = time.perf_counter(), time.process_time()

    def sample(self, count: int, unit: str) -> Sample:
        """Return how fast that was, for a number of units of work."""
        seconds, cpu_seconds = (b - a for a, b in zip(self._started, self._ended, strict=True))
        return {f"{unit}s/s": count / seconds, f"CPU us/{unit}": cpu_seconds * 1e6 / count}


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
