# SPDX-License-Identifier: MIT
"""The tables and the plots of the documentation are written from the results of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page, plots
from benchmarks.measuring import Case, Point, Result, Target, Workload
from benchmarks.reporting import as_json, table


def results() -> dict[str, Any]:
    """Return what a run of two small workloads leaves."""
    limit = Result(Case("the broker's ceiling, classic", lambda _url: {}))
    ours = Result(
        Case("batch(), classic", lambda _url: {}, limit.case.name, Target(0.85)), base=limit
    )
    limit.samples = [{"messages/s": 40_000.0}, {"messages/s": 20_000.0}]
    ours.samples = [{"messages/s": 36_000.0, "CPU us/message": 12.5}, {"messages/s": 18_000.0}]
    ours.samples[1] = {"messages/s": 18_000.0, "CPU us/message": 12.5}
    first = Result(Case("handling, 1", lambda _url: {}, at=Point("handling", 1)))
    last = Result(Case("handling, 2,000", lambda _url: {}, at=Point("handling", 2000)))
    first.samples, last.samples = [{"CPU us/message": 20.0}], [{"CPU us/message": 21.0}]
    document = as_json(
        {"machine": "2 cores"},
        2,
        [
            (Workload("batch", "Publishing", []), [limit, ours]),
            (Workload("handlers", "Handlers", [], axis="handlers"), [first, last]),
        ],
    )
    loaded: dict[str, Any] = json.loads(json.dumps(document))
    return loaded


PAGE = """\
# A page

<!-- results: batch -->
| what | was there |
<!-- end of results -->

Words.

<!-- results: targets -->
<!-- end of results -->

<!-- results: never-measured -->
stays
<!-- end of results -->
"""

FILLED = """\
# A page

<!-- results: batch -->

| Publishing | messages/s | CPU us/message | ratio | spread |
| --- | ---: | ---: | ---: | ---: |
| the broker's ceiling, classic | 30,000 |  |  |  |
| batch(), classic | 27,000 | 12.5 | 0.90 | 0.90 to 0.90 |

<!-- end of results -->

Words.

<!-- results: targets -->

| work | case | beside | measured | spread | target |
| --- | --- | --- | ---: | ---: | --- |
| Publishing | batch(), classic | the broker's ceiling, classic | 0.90 | 0.90 to 0.90 | ≥ 0.85 met |

<!-- end of results -->

<!-- results: never-measured -->
stays
<!-- end of results -->
"""


def test_tables_are_written_between_their_comments() -> None:
    """A page keeps its words, and tables of what was not measured."""
    assert FILLED == page.filled(PAGE, results())


def test_a_page_that_was_filled_is_filled_alike_again() -> None:
    """Filling twice changes nothing."""
    assert FILLED == page.filled(FILLED, results())


@pytest.mark.parametrize("name", [path.name for path in page.PAGES])
def test_the_tables_of_the_documentation_name_workloads_that_exist(name: str) -> None:
    """No table of the documentation waits for results that never come."""
    from benchmarks.__main__ import _workloads

    known = {"conditions", "targets", *(workload.name for workload in _workloads(1.0))}
    text = next(path for path in page.PAGES if path.name == name).read_text(encoding="utf-8")
    named = {match["name"] for match in page._PLACE.finditer(text)}
    assert named
    assert set() == named - known


def test_a_table_for_people_tells_what_failed() -> None:
    """A case without a sample is in the table of the terminal."""
    failed = Result(Case("bad", lambda _url: {}), [None])
    good = Result(Case("good", lambda _url: {}), [{"messages/s": 1000.0}])
    lines = table(Workload("work", "Work", []), [failed, good]).splitlines()
    assert "bad FAILED" == lines[2].strip()
    assert "1,000" in lines[3]


def test_bars_are_in_order_and_know_what_they_stand_for() -> None:
    """The fastest comes first, and a bar is coloured by who did the work."""
    bars = plots.bars_of(results()["workloads"]["batch"])
    assert ["the broker's ceiling, classic", "batch(), classic"] == [name for name, _ in bars]
    assert ["the broker's ceiling", "postage"] == [plots.kind_of(name) for name, _ in bars]
    assert "other packages" == plots.kind_of("kombu 5.4.2, classic")


def test_curves_are_made_of_the_points_of_their_cases() -> None:
    """A case with a point is on a curve."""
    curves = plots.curves_of(results()["workloads"]["handlers"], "CPU us/message")
    assert {"handling": [(1, 20.0), (2000, 21.0)]} == curves


def test_plots_and_tables_are_written_by_one_call(tmp_path: Path) -> None:
    """A report is the results, the plots in both formats, and the pages."""
    pytest.importorskip("matplotlib")
    source, some_page = tmp_path / "run.json", tmp_path / "page.md"
    source.write_text(json.dumps(results()))
    some_page.write_text(PAGE)
    written = [path.name for path in page.report(source, [some_page], tmp_path / "folder")]
    expected = ["results.json", "peers.png", "peers.svg", "growth.png", "growth.svg", "page.md"]
    assert expected == written
    assert FILLED == some_page.read_text()
    assert (tmp_path / "folder/peers.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wants plots is told what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[bench\]'"):
        list(plots.draw(results(), tmp_path))
