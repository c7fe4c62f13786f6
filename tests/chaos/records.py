# SPDX-License-Identifier: MIT
"""What programs under chaos record, and the judge of it.

A record is a line that is appended to a file by one write, so a killed process leaves whole
lines. A producer writes ``begun ID`` before it sends, and then the fate that the library
reported: ``confirmed ID``, ``failed ID ERROR`` (certainly not delivered) or ``unknown ID``. A
consumer writes ``delivered ID MESSAGE_ID`` when it takes a message, ``begun ID`` when a handler
begins, and ``handled ID`` before its ack.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

BEGUN = "begun"
CONFIRMED = "confirmed"
FAILED = "failed"
UNKNOWN = "unknown"
DELIVERED = "delivered"
HANDLED = "handled"

#: The words that a producer ends the way of a message with.
FATES = (CONFIRMED, FAILED, UNKNOWN)


class Record:
    """A file to which lines are appended that outlive the process.

    Args:
        path: The file. Several processes may write to one.
    """

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, *words: str) -> None:
        """Append a line."""
        os.write(self._descriptor, f"{' '.join(words)}\n".encode())


class Records:
    """The lines that several processes append to their files, as far as they are whole.

    Args:
        folder: Where the files are.
        pattern: What their names look like.
    """

    def __init__(self, folder: Path, pattern: str) -> None:
        self._folder = folder
        self._pattern = pattern
        self._lines: list[list[str]] = []
        self._offsets: collections.Counter[Path] = collections.Counter()

    def lines(self) -> list[list[str]]:
        """Return the words of all lines so far. What was read once is not read again."""
        for path in self._folder.glob(self._pattern):
            with open(path, "rb") as file:
                file.seek(self._offsets[path])
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._offsets[path] += len(whole)
            self._lines += [line.split() for line in whole.decode().splitlines()]
        return self._lines


def children_of(message: str) -> list[str]:
    """Return the messages into which a message is split."""
    return [f"{message}.{number}" for number in range(2)]


@dataclass(frozen=True)
class Judgement:
    """What became of the messages of a scenario.

    Attributes:
        sent: How many were begun to be sent.
        confirmed: How many of them were reported as confirmed.
        failed: How many as certainly not delivered.
        unknown: How many as perhaps delivered.
        unreported: How many have no fate, since their producer died.
        handled: How many different ones were handled.
        duplicates: How often a message was handled once more.
        lost: Confirmed and not handled.
        ghosts: Reported as certainly not delivered, with the error, and handled.
        strangers: Handled, and never sent.
        contradictions: With more than one fate.
        errors: How often each error was reported.
    """

    sent: int
    confirmed: int
    failed: int
    unknown: int
    unreported: int
    handled: int
    duplicates: int
    lost: Sequence[str]
    ghosts: Sequence[str]
    strangers: Sequence[str]
    contradictions: Sequence[str]
    errors: collections.Counter[str]

    @property
    def faults(self) -> dict[str, Sequence[str]]:
        """What must not be, by name, as far as it is."""
        names = ("lost", "ghosts", "strangers", "contradictions")
        return {name: found for name in names if (found := getattr(self, name))}


def judge(sent: Iterable[Sequence[str]], received: Iterable[Sequence[str]]) -> Judgement:
    """Compare what producers reported with what consumers handled.

    Args:
        sent: The words of the producers' lines.
        received: The words of the consumers' lines.
    """
    begun: set[str] = set()
    fates: collections.defaultdict[str, set[str]] = collections.defaultdict(set)
    errors: dict[str, str] = {}
    for word, message, *more in sent:
        begun.add(message)
        if word in FATES:
            fates[message].add(word)
        if word == FAILED:
            errors[message] = " ".join(more)
    handled = collections.Counter(message for word, message, *_ in received if word == HANDLED)

    def having(fate: str) -> set[str]:
        return {message for message, known in fates.items() if fate in known}

    confirmed, failed = having(CONFIRMED), having(FAILED)
    return Judgement(
        sent=len(begun),
        confirmed=len(confirmed),
        failed=len(failed),
        unknown=len(having(UNKNOWN)),
        unreported=len(begun - fates.keys()),
        handled=len(handled),
        duplicates=handled.total() - len(handled),
        lost=sorted(confirmed - handled.keys()),
        ghosts=sorted(f"{message} ({errors[message]})" for message in failed & handled.keys()),
        strangers=sorted(handled.keys() - begun),
        contradictions=sorted(message for message, known in fates.items() if len(known) > 1),
        errors=collections.Counter(errors.values()),
    )
