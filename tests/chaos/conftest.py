# SPDX-License-Identifier: MIT
"""How long the chaos lasts, and the table of what became of the messages.

``POSTAGE_CHAOS_SECONDS`` says for how many seconds each scenario is under load. Without it the
short form runs, which has one fault of most kinds and leaves out what carries the marker ``chaos``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.load import Load, Loads, Scale
from tests.chaos.records import Judgement

#: Seconds under load of each scenario in the short form: time for one fault.
SHORT_SECONDS = 2.0

#: The rows of the table: title and judgement.
ROWS = pytest.StashKey[list[tuple[str, Judgement]]]()

#: The columns of the table after the title: attributes of a judgement.
COLUMNS = ("sent", "confirmed", "failed", "unknown", "unreported", "handled", "duplicates", "lost")


@pytest.fixture(scope="session")
def scale() -> Scale:
    """How long the load of a scenario lasts."""
    seconds = os.environ.get("POSTAGE_CHAOS_SECONDS")
    return Scale(float(seconds or SHORT_SECONDS), is_long=bool(seconds))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("POSTAGE_CHAOS_SECONDS"):
        return
    left_out = [item for item in items if item.get_closest_marker("chaos")]
    items[:] = [item for item in items if not item.get_closest_marker("chaos")]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def loads(request: pytest.FixtureRequest, broker_url: str, tmp_path: Path) -> Iterator[Loads]:
    """Make loads: ``loads(url=..., heartbeat=...)``. What became of each is in the table."""
    rows = request.config.stash.setdefault(ROWS, [])
    made: list[Load] = []

    def make(url: str = broker_url, heartbeat: int | None = None) -> Load:
        folder = tmp_path / f"load-{len(made)}"
        folder.mkdir()
        made.append(Load(request.node.name, url, folder, heartbeat))
        return made[-1]

    yield make
    for load in made:
        rows.append((load.title, load.judgement()))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    width = max(len(title) for title, _ in rows)
    heading = "".join(f"{name:>11}" for name in COLUMNS)
    terminalreporter.section("what became of the messages")
    terminalreporter.write_line(f"{'scenario':{width}}{heading}")
    for title, judgement in rows:
        values = (getattr(judgement, name) for name in COLUMNS)
        numbers = (value if isinstance(value, int) else len(value) for value in values)
        terminalreporter.write_line(f"{title:{width}}{''.join(f'{n:>11}' for n in numbers)}")
