# SPDX-License-Identifier: MIT
"""``postage schedules``, as the process that people start."""

from __future__ import annotations

import json

from tests.letters import Mailbox, Sender
from tests.programs import Program

LATER = 3600.0


def run(*words: str) -> tuple[int, list[str], list[str]]:
    """Return the exit code of the command, and what it wrote."""
    with Program(["-m", "postage", "schedules", *words]) as program:
        return program.wait(), program.stdout, program.stderr


def test_what_waits_is_listed_for_people(producer: Sender, mailbox: Mailbox) -> None:
    """A line each: the id, the due time, where it goes and what it is."""
    Mailbox(mailbox.channel, "kept")
    second = producer.schedule_hello("b", _delay=LATER)
    first = producer.schedule_report("a", _delay=LATER / 2, _queue="kept")
    code, lines, errors = run("list")
    assert (0, []) == (code, errors)
    assert [
        f"{first.id}  {first.due.isoformat(timespec='seconds')}  queue kept  command report",
        f"{second.id}  {second.due.isoformat(timespec='seconds')}  "
        "exchange letters key post  command hello",
    ] == lines


def test_what_waits_is_listed_for_programs(producer: Sender, mailbox: Mailbox) -> None:
    """As JSON."""
    scheduled = producer.schedule_hello("a", _delay=LATER)
    code, lines, _errors = run("list", "--json")
    assert 0 == code
    assert [
        {
            "id": scheduled.id,
            "due": scheduled.due.isoformat(),
            "exchange": "letters",
            "key": "post",
            "queue": None,
            "type": "command",
            "name": "hello",
        }
    ] == json.loads("\n".join(lines))


def test_an_empty_list_says_so(broker_url: str) -> None:
    """For people in words, for programs as an empty list."""
    assert (0, ["nothing is scheduled"], []) == run("list")
    assert (0, ["[]"], []) == run("list", "--json")


def test_what_a_terminal_would_obey_is_shown_and_not_obeyed(
    producer: Sender, mailbox: Mailbox
) -> None:
    """A name may come from anybody."""
    producer.schedule_hello("a", _delay=LATER, _key="\x1b[2J")
    _code, lines, _errors = run("list")
    assert r"key \x1b[2J" in lines[0]


def test_several_schedules_are_cancelled(producer: Sender, mailbox: Mailbox) -> None:
    """Success means that none of them will come."""
    ids = [producer.schedule_hello("never", _delay=LATER).id for _ in range(2)]
    assert (0, [f"cancelled {id}" for id in ids], []) == run("cancel", *ids)
    assert (0, ["nothing is scheduled"], []) == run("list")


def test_what_cannot_be_cancelled_is_a_failure(producer: Sender, mailbox: Mailbox) -> None:
    """The others are cancelled all the same."""
    gone, there = (producer.schedule_hello("never", _delay=LATER) for _ in range(2))
    gone.cancel()
    code, lines, errors = run("cancel", gone.id, there.id)
    assert (1, [f"cancelled {there.id}"]) == (code, lines)
    assert 1 == len(errors)
    assert gone.id in errors[0]


def test_what_is_no_id_is_wrong_usage(broker_url: str) -> None:
    """As is to name none, or no action."""
    assert 2 == run("cancel", "x")[0]
    assert 2 == run("cancel")[0]
    assert 2 == run()[0]


def test_a_broker_that_is_not_there_is_a_failure() -> None:
    """The error is one line."""
    with Program(
        ["-m", "postage", "schedules", "list"],
        env={"POSTAGE_URL": "amqp://guest:wrong@127.0.0.1:1/%2F?timeout=1"},
    ) as program:
        assert 1 == program.wait(60.0)
    assert program.stdout == []
