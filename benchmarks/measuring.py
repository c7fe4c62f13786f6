# SPDX-License-Identifier: MIT
"""Repeats cases in turn, and compares them.

Machines are shared, and a second later the same work may take twice as long. So no case is
measured in one go: a round measures every case once, the next round in reverse order, and two
cases are compared within each round. Only these ratios mean something elsewhere.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks import cpu

#: What one measurement found, such as ``{"per second": 20_000.0}``. The first figure is the
#: one that cases are compared by.
Sample = dict[str, float]


@dataclass(frozen=True)
class Target:
    """What a ratio or a figure must at least, or at most, be."""

    limit: float
    is_maximum: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.is_maximum else '>='} {self.limit:g}"

    def is_met(self, value: float) -> bool:
        """Tell whether a value is good enough."""
        return value <= self.limit if self.is_maximum else value >= self.limit


@dataclass(frozen=True)
class Point:
    """Where a case lies on a curve: one of the workload's, at a value of its axis."""

    curve: str
    x: float


@dataclass(frozen=True)
class Beside:
    """A further comparison of a case: with the best of some others, which the run will show."""

    others: Sequence[str]
    target: Target | None = None


@dataclass(frozen=True)
class Case:
    """One way to do the work.

    ``measure`` takes the broker's URL. ``against`` names the case of the same workload that it
    is compared with, and ``target`` is for that ratio, or for the first figure of a case that is
    compared with none. Each of ``also`` becomes a result of its own.
    """

    name: str
    measure: Callable[[str], Sample]
    against: str | None = None
    target: Target | None = None
    at: Point | None = None
    also: Sequence[Beside] = ()


@dataclass(frozen=True)
class Workload:
    """Cases that do the same work.

    ``axis`` is what grows from one case to the next, if they are points of curves, and ``rounds``
    limits the rounds of work that takes long.
    """

    name: str
    title: str
    cases: Sequence[Case]
    axis: str = ""
    rounds: int | None = None

    def essence(self) -> Workload:
        """Return the workload with those cases alone that have a target, and what they need."""
        goals = [case for case in self.cases if case.target or case.also]
        wanted = {case.name for case in goals}
        wanted |= {case.against for case in goals if case.against}
        wanted |= {name for case in goals for beside in case.also for name in beside.others}
        return replace(self, cases=[case for case in self.cases if case.name in wanted])


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
    #: Of each round; None if it failed.
    samples: list[Sample | None] = field(default_factory=list)
    #: What the case is compared with.
    base: Result | None = None

    @property
    def failures(self) -> int:
        """In how many rounds the case failed."""
        return self.samples.count(None)

    def figures(self) -> dict[str, Spread]:
        """Return the values of each figure; none if every round failed."""
        samples = [sample for sample in self.samples if sample is not None]
        names = samples[0] if samples else ()
        return {name: Spread([each[name] for each in samples]) for name in names}

    def ratio(self) -> Spread | None:
        """Return the ratio to the case that it is compared with, of each round."""
        if self.base is None:
            return None
        pairs = zip(self.samples, self.base.samples, strict=True)
        both = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
        if not both:
            return None
        figure = next(iter(both[0][0]))
        return Spread([mine[figure] / other[figure] for mine, other in both])

    def is_met(self) -> bool | None:
        """Tell whether the median meets the target; None without a target."""
        if self.case.target is None:
            return None
        value = self.ratio() if self.base else next(iter(self.figures().values()), None)
        return value is not None and self.case.target.is_met(value.median)


def run(workload: Workload, url: str, rounds: int, progress: Callable[[str], None]) -> list[Result]:
    """Measure the cases of a workload in turn.

    A case that fails is told of and left out of that round: the others may have taken an hour.

    Args:
        workload: The cases.
        url: The broker.
        rounds: How often each case is measured.
        progress: Told what is being measured.
    """
    results = {case.name: Result(case) for case in workload.cases}
    for result in results.values():
        result.base = results[result.case.against] if result.case.against else None
    rounds = min(rounds, workload.rounds or rounds)
    for number, case in _in_turn(workload.cases, rounds):
        progress(f"{workload.name}, round {number} of {rounds}: {case.name}")
        try:
            sample = case.measure(url)
        except Exception:
            traceback.print_exc()
            sample = None
        results[case.name].samples.append(sample)
    return [each for result in results.values() for each in (result, *_beside(result, results))]


def _beside(result: Result, results: Mapping[str, Result]) -> Iterator[Result]:
    """Yield the further comparisons of a result."""
    for beside in result.case.also:
        others = [results[name] for name in beside.others if results[name].figures()]
        if others:
            best = min(others, key=_rank)
            name = f"{result.case.name}, beside {best.case.name}"
            against, target = best.case.name, beside.target
            case = replace(result.case, name=name, against=against, target=target, also=())
            yield Result(case, result.samples, best)


def _rank(result: Result) -> float:
    """Return what is the lower, the better a result is."""
    name, spread = next(iter(result.figures().items()))
    return -spread.median if name.endswith("/s") else spread.median


def _in_turn(cases: Sequence[Case], rounds: int) -> Iterator[tuple[int, Case]]:
    """Yield each case once a round, in an order that a steady drift cannot favour."""
    for number in range(1, rounds + 1):
        for case in cases if number % 2 else reversed(cases):
            yield number, case


class Stopwatch:
    """Measures the time, and the processor time of this process, that some work takes.

    Args:
        url: A broker whose processor time is measured, too, if it runs on this machine.
    """

    def __init__(self, url: str | None = None) -> None:
        self._broker = cpu.listener(url) if url else None
        self._started = self._ended = (0.0, 0.0, 0.0)

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        self._ended = self._now()

    def sample(self, count: int, unit: str) -> Sample:
        """Return how fast that was, for a number of units of work."""
        pairs = zip(self._started, self._ended, strict=True)
        seconds, mine, brokers = (b - a for a, b in pairs)
        sample = {f"{unit}s/s": count / seconds, f"CPU us/{unit}": mine * 1e6 / count}
        if self._broker is not None:
            sample[f"broker us/{unit}"] = brokers * 1e6 / count
        return sample

    def _now(self) -> tuple[float, float, float]:
        brokers = cpu.spent([self._broker]) if self._broker else 0.0
        return time.perf_counter(), time.process_time(), brokers


def cost_first(sample: Sample) -> Sample:
    """Return a sample of a `Stopwatch` by whose processor time cases are compared."""
    return dict(sorted(sample.items(), key=lambda item: not item[0].startswith("CPU")))


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
