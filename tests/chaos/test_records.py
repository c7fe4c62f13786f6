# SPDX-License-Identifier: MIT
"""The judge of the chaos tests must find what is made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.records import Record, Records, judge


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.split(",") if line.strip()]


def test_what_was_confirmed_and_handled_is_counted_without_a_fault() -> None:
    """Two messages that went well are two of each, and no fault."""
    judgement = judge(
        lines("begun a, confirmed a, begun b, confirmed b"),
        lines("begun a, handled a, begun b, handled b"),
    )

    assert (2, 2, 0, 0) == (
        judgement.sent,
        judgement.confirmed,
        judgement.failed,
        judgement.unknown,
    )
    assert (2, 0) == (judgement.handled, judgement.duplicates)
    assert {} == judgement.faults


@pytest.mark.parametrize(
    ("sent", "received", "faults"),
    [
        ("begun a, confirmed a", "", {"lost": ["a"]}),
        ("begun a, confirmed a", "begun a", {"lost": ["a"]}),
        ("begun a, failed a Blocked", "handled a", {"ghosts": ["a (Blocked)"]}),
        ("begun a, confirmed a", "handled a, handled b", {"strangers": ["b"]}),
        (
            "begun a, failed a Blocked, confirmed a",
            "",
            {"lost": ["a"], "contradictions": ["a"]},
        ),
    ],
    ids=["lost", "begun and not handled", "ghost", "stranger", "contradiction"],
)
def test_each_fault_is_found_and_named(
    sent: str, received: str, faults: dict[str, list[str]]
) -> None:
    """A judge that saw no fault here could not be trusted elsewhere."""
    assert faults == judge(lines(sent), lines(received)).faults


@pytest.mark.parametrize("received", ["", "handled a"])
def test_what_is_not_known_may_have_been_handled_or_not(received: str) -> None:
    """A message of unknown fate is no fault either way."""
    assert {} == judge(lines("begun a, unknown a"), lines(received)).faults


@pytest.mark.parametrize("received", ["", "handled a"])
def test_a_message_whose_producer_died_may_have_been_handled_or_not(received: str) -> None:
    """Without a fate a message is counted as unreported, and is no fault either way."""
    judgement = judge(lines("begun a"), lines(received))

    assert (1, {}) == (judgement.unreported, judgement.faults)


def test_duplicates_are_counted_and_no_fault() -> None:
    """A message that was handled three times was so twice more than needed."""
    judgement = judge(lines("begun a, confirmed a"), lines("handled a, handled a, handled a"))

    assert (1, 2, {}) == (judgement.handled, judgement.duplicates, judgement.faults)


def test_errors_are_counted_by_name() -> None:
    """The judgement says how often each error was reported."""
    judgement = judge(lines("failed a Blocked, failed b Blocked, failed c Unroutable"), [])

    assert {"Blocked": 2, "Unroutable": 1} == dict(judgement.errors)


def test_records_are_read_on_and_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    """A process that dies in the middle of a line leaves one that is not read."""
    records = Records(tmp_path, "*.sent")
    first, second = Record(tmp_path / "1.sent"), Record(tmp_path / "2.sent")
    first.write("begun", "a")
    assert [["begun", "a"]] == records.lines()

    first.write("failed", "a", "Blocked")
    second.write("begun", "b")
    with open(tmp_path / "1.sent", "a") as file:
        file.write("confir")

    lines = records.lines()
    assert [["begun", "a"], ["begun", "b"], ["failed", "a", "Blocked"]] == sorted(lines)
    assert lines == records.lines()
