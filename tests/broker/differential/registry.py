# SPDX-License-Identifier: MIT
"""The table of scenarios, which the decorators below fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.broker.differential.driver import Silence, Stage


@dataclass(frozen=True)
class Scenario:
    """What clients do to a broker."""

    name: str
    play: Callable[[Stage], None]

    def dialogue(self, url: str) -> list[str]:
        """Return what the clients and the broker of an empty virtual host say to each other."""
        with Stage(url) as stage:
            try:
                self.play(stage)
                stage.settle()
            except Silence as silence:
                stage.note(f"silence: {silence}")
            return stage.lines


#: All scenarios by name.
SCENARIOS: dict[str, Scenario] = {}


def scenario(play: Callable[[Stage], None]) -> Callable[[Stage], None]:
    """Enter a scenario in the table."""
    _enter(Scenario(play.__name__, play))
    return play


def each(**cases: Any) -> Callable[[Callable[[Stage, Any], None]], Callable[[Stage, Any], None]]:
    """Enter a scenario for each case, which it is called with."""

    def decorate(play: Callable[[Stage, Any], None]) -> Callable[[Stage, Any], None]:
        for name, case in cases.items():
            _enter(Scenario(f"{play.__name__}[{name}]", partial(_play_case, play, case)))
        return play

    return decorate


def _play_case(play: Callable[[Stage, Any], None], case: Any, stage: Stage) -> None:
    play(stage, case)


def _enter(entry: Scenario) -> None:
    assert entry.name not in SCENARIOS, f"two scenarios are called {entry.name}"
    SCENARIOS[entry.name] = entry
