# SPDX-License-Identifier: MIT
"""Writes what was measured into the documentation, from the JSON of a run.

The tables stand in the page between comments, which name a workload or `conditions` or `targets`:

    <!-- results: batch -->
    <!-- end of results -->

What stands between other lines is written by people, and stays.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from tests.programs import ROOT

PAGES = (ROOT / "docs/topics/performance.md", ROOT / "docs/topics/scaling.md")
#: Where the plots go, and the JSON.
FOLDER = ROOT / "docs/topics/performance"

_PLACE = re.compile(
    r"(?<=<!-- results: )(?P<name>[\w-]+)(?P<open> -->\n).*?(?=<!-- end of results -->)", re.DOTALL
)


def report(
    source: Path, pages: Sequence[Path] = PAGES, folder: Path = FOLDER
) -> Iterator[Path]:
    """Write the results, the plots and the tables of a run, and yield the files.

    Args:
        source: What ``--json`` wrote.
        pages: In which the tables are replaced.
        folder: For the rest.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    results = json.loads(source.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "results.json"
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)
        yield target
    yield from plots.draw(results, folder)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text, results), encoding="utf-8")
        yield page


def filled(text: str, results: Mapping[str, Any]) -> str:
    """Return a page with the tables of a run. What was not measured, stays."""

    def replace(match: re.Match[str]) -> str:
        lines = _table(match["name"], results)
        if lines is None:
            return match[0]
        return f"{match['name']}{match['open']}\n" + "\n".join(lines) + "\n\n"

    return _PLACE.sub(replace, text)


def _table(name: str, results: Mapping[str, Any]) -> list[str] | None:
    special: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
        "conditions": _conditions,
        "targets": _targets,
    }
    if name in special:
        return special[name](results)
    workload = results["workloads"].get(name)
    return None if workload is None else _cases(workload)


def _conditions(results: Mapping[str, Any]) -> list[str]:
    rows = [*results["conditions"].items(), ("rounds", str(results["rounds"]))]
    return _markdown(["condition", "value"], [[*row] for row in rows], "ll")


def _targets(results: Mapping[str, Any]) -> list[str]:
    rows = [
        [workload["title"], each["case"], each["against"] or "", *_ratio(each), _verdict(each)]
        for workload in results["workloads"].values()
        for each in workload["cases"]
        if each["target"]
    ]
    header = ["work", "case", "beside", "measured", "spread", "target"]
    return _markdown(header, rows, "lllrrl")


def _cases(workload: Mapping[str, Any]) -> list[str]:
    cases = [each for each in workload["cases"] if " beside " not in each["case"]]
    figures = max((list(each["medians"]) for each in cases), key=len)
    has_ratios = any(each["ratio"] for each in cases)
    rows = []
    for each in cases:
        medians = each["medians"]
        row = [each["case"], *(number(medians.get(name)) for name in figures)]
        if has_ratios:
            row += _ratio(each) if each["ratio"] else ["", ""]
        rows.append(row)
    header = [workload["title"], *figures, *(["ratio", "spread"] if has_ratios else [])]
    return _markdown(header, rows, "l" + "r" * (len(header) - 1))


def _ratio(case: Mapping[str, Any]) -> list[str]:
    """Return what is compared with a target, and its spread."""
    if case["ratio"]:
        median, lowest, highest = case["ratio"]
        return [f"{median:.2f}", f"{lowest:.2f} to {highest:.2f}"]
    values = [next(iter(sample.values())) for sample in case["samples"] if sample]
    if not values:
        return ["", ""]
    figure, median = next(iter(case["medians"].items()))
    return [f"{number(median)} {figure}", f"{number(min(values))} to {number(max(values))}"]


def _verdict(case: Mapping[str, Any]) -> str:
    return f"{case['target'].replace('<=', '≤').replace('>=', '≥')} {_MET[case['met']]}"


_MET = {True: "met", False: "**missed**", None: ""}


def number(value: float | None) -> str:
    """Return a figure as people read it."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    marks = ["---:" if each == "r" else "---" for each in align]
    lines = [header, marks, *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
