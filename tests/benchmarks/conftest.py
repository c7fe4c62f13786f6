# SPDX-License-Identifier: MIT
"""What the tests of the benchmarks need."""

from __future__ import annotations

from multiprocessing import resource_tracker

import pytest


@pytest.fixture(scope="session", autouse=True)
def _resource_tracker() -> None:
    """Start the process that multiprocessing keeps as long as ours runs: no test leaves it."""
    resource_tracker.ensure_running()
