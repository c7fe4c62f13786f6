# SPDX-License-Identifier: MIT
"""Every code block of the README and of the documentation runs, and prints what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import blocks_of, run_page
from tests.programs import ROOT

PAGES = sorted(
    page
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in page.parts and blocks_of(page)
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(
    page: Path, tmp_path: Path, broker_url: str
) -> None:
    """The code blocks of a page run in order and print what the page shows."""
    run_page(page, tmp_path)
