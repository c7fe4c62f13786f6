# SPDX-License-Identifier: MIT
"""Shows what was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measuring import Result, Spread, Workload

METHOD = (
    "Every case runs once a round in a process of its own, in alternating order; figures are\n"
    "medians over the rounds, the spread is from the lowest to the highest. A ratio compares two\n"
    "cases of the same round. Only ratios can be compared with those of another machine."
)


def heading(conditions: Mapping[str, str], rounds: int) -> str:
    """Return what was measured on, and how."""
    width = max(map(len, conditions))
    lines = [f"{name:{width}}  {value}" for name, value in conditions.items()]
    return "\n".join([*lines, f"{'rounds':{width}}  {rounds}", "", METHOD])


def table(workload: Workload, results: Sequence[Result]) -> str:
    """Return the results of a workload as a table."""
    figures = list(next(filter(None, (result.figures() for result in results)), ()))
    rows = [[workload.title, *figures, "spread", "ratio", "spread", "target"]]
    rows += [_row(result, figures) for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])],
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(result: Result, figures: Sequence[str]) -> list[str]:
    spreads = result.figures()
    ratio = result.ratio()
    if not spreads:
        return [f"{result.case.name} FAILED", *[""] * (len(figures) + 4)]
    return [
        result.case.name,
        *(_number(spreads[name].median) if name in spreads else "" for name in figures),
        _range(spreads[figures[0]], _number),
        f"{ratio.median:.2f}" if ratio else "",
        _range(ratio, "{:.2f}".format) if ratio else "",
        _verdict(result),
    ]


def _verdict(result: Result) -> str:
    met = result.is_met()
    if met is None:
        return ""
    return f"{result.case.target} {'met' if met else 'MISSED'}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _range(spread: Spread, text: Any) -> str:
    return f"{text(spread.lowest)}-{text(spread.highest)}"


def as_json(
    conditions: Mapping[str, str], rounds: int, results: Sequence[tuple[Workload, Sequence[Result]]]
) -> dict[str, Any]:
    """Return everything, fit for JSON: workloads, their cases, and the samples of each."""
    return {
        "conditions": dict(conditions),
        "rounds": rounds,
        "workloads": {
            workload.name: {
                "title": workload.title,
                "axis": workload.axis,
                "cases": [_case_as_json(result) for result in cases],
            }
            for workload, cases in results
        },
    }


def _case_as_json(result: Result) -> dict[str, Any]:
    ratio, at = result.ratio(), result.case.at
    return {
        "case": result.case.name,
        "point": [at.curve, at.x] if at else None,
        "samples": result.samples,
        "medians": {name: spread.median for name, spread in result.figures().items()},
        "against": result.case.against,
        "ratio": [ratio.median, ratio.lowest, ratio.highest] if ratio else None,
        "target": str(result.case.target) if result.case.target else None,
        "met": result.is_met(),
    }
