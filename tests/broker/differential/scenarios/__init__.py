# SPDX-License-Identifier: MIT
"""The scenarios, by what they are about. Importing this package fills `registry.SCENARIOS`."""

from tests.broker.differential.scenarios import (
    connecting,
    consuming,
    dead_lettering,
    declaring,
    exchanges,
    expiring,
    publishing,
    replying,
    settling,
    transactions,
)

__all__ = [
    "connecting",
    "consuming",
    "dead_lettering",
    "declaring",
    "exchanges",
    "expiring",
    "publishing",
    "replying",
    "settling",
    "transactions",
]
