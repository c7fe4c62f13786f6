# SPDX-License-Identifier: MIT
"""What becomes of a message, as its processor decides it."""

from __future__ import annotations

import enum
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from postage.retry import Failure


class Fate(enum.Enum):
    """What becomes of a message."""

    ACK = "ack"
    REJECT = "reject"
    PARK = "park"
    STOP = "stop"  # ack, and the microthread ends
    EXIT = "exit"  # ack, and the scheduler ends
    RESTART = "restart"  # ack, and the program starts anew


@dataclass(frozen=True)
class Verdict:
    """What becomes of a message, and why. Copies for its failures are sent before."""

    fate: Fate
    reason: str = ""
    error: BaseException | None = None
    failures: tuple[Failure, ...] = ()


ACK = Verdict(Fate.ACK)
LEAVING = (Fate.STOP, Fate.EXIT, Fate.RESTART)

#: The steps of handling a message: it yields waitables, and returns the verdict.
Handling = Generator[Any, Any, Verdict]
