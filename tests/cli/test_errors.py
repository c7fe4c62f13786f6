# SPDX-License-Identifier: MIT
"""``postage errors``, as the process that people start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from postage.parking import announcement, ledger_queue
from tests.nodes import Node
from tests.parked import bodies, opened, park, park_numbers, ready, taken
from tests.programs import ROOT, Program
from tests.waiting import wait_until


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    """A channel of pika, with the queues q and q.error."""
    with opened(broker_url) as channel:
        yield channel


def errors(*arguments: str, **environment: str) -> tuple[int, list[str], list[str]]:
    """Run the command, and return its exit code and what it wrote."""
    with Program(["-m", "postage", "errors", *arguments], env=environment) as program:
        code = program.wait()
        return code, program.stdout, program.stderr


def on_terminal(answer: str, *arguments: str) -> tuple[int, str]:
    """Run the command on a terminal where somebody answers; return what the terminal showed."""
    ours, theirs = os.openpty()
    shown = b""
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "postage", "errors", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        os.write(ours, answer.encode())
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while piece := os.read(ours, 1024):
                shown += piece
        return process.wait(30), shown.decode()
    finally:
        os.close(ours)


def editor(folder: Path, code: str) -> str:
    """Return the command of an editor that is a Python program; its file is `path`."""
    script = folder / "editor.py"
    script.write_text(f"import pathlib, sys\npath = pathlib.Path(sys.argv[-1])\n{code}\n")
    return f"{sys.executable} {script}"


# ---------------------------------------------------------------------------- looking


def test_a_list_counts_by_queue_and_exception(channel: BlockingChannel) -> None:
    """Of the queues that are named."""
    park_numbers(channel, 2)
    park(channel, error=KeyError("a"))
    channel.basic_publish("", "q.error", b"by hand")
    channel.queue_declare("empty.error")

    code, stdout, stderr = errors("list", "q.error", "empty.error")

    assert (0, []) == (code, stderr)
    assert "q.error: 4 messages" == stdout[0]
    assert stdout[1].startswith("       2  from q  ValueError  (2")
    assert {"from an unknown queue  nothing says why", "from q  KeyError"} == {
        line[10:].partition("  (")[0] for line in stdout[2:4]
    }
    assert ["empty.error: 0 messages"] == stdout[4:]


def test_a_list_of_all_asks_the_ledger(channel: BlockingChannel) -> None:
    """Error queues that were announced, and are still there."""
    assert (0, ["no messages in 0 error queue(s)"], []) == errors("list")
    spec = ledger_queue()
    channel.queue_declare(spec.name, durable=True, arguments=spec.arguments)
    for name in ("q.error", "gone.error"):
        body, properties = announcement(name)
        channel.basic_publish("", spec.name, body, properties)
    assert (0, ["no messages in 1 error queue(s)"], []) == errors("list")
    park_numbers(channel, 1)

    code, stdout, _ = errors("list", "--json")

    [found] = json.loads("\n".join(stdout))
    assert (0, "q.error", 1) == (code, found["error_queue"], found["messages"])
    assert [("q", "failed", "ValueError", 1)] == [
        (each["queue"], each["reason"], each["exception"], each["messages"])
        for each in found["groups"]
    ]


def test_a_message_is_shown_with_all_that_is_known(channel: BlockingChannel) -> None:
    """For people, and without what a terminal would obey."""
    try:
        raise LookupError("\x1b[2Jlost")
    except LookupError as error:
        park(
            channel,
            b'{"a": [1, "gr\xc3\xbcn"]}',
            error=error,
            message_id="m",
            handler="msg_a",
            headers={"tenant": "t1"},
        )
    park(channel, b"\x00\xff" * 600, message_id="binary")

    code, stdout, _ = errors("show", "q.error", "--id", "m")
    text = "\n".join(stdout)

    assert 0 == code
    for expected in (
        "id             m",
        "reason         failed",
        "queue          q",
        "handler        msg_a",
        "attempts       6",
        "parked by      name=tested pid=12",
        "exception      LookupError",
        "header         tenant: 't1'",
        "LookupError: \\x1b[2Jlost",
        '    "grün"',
    ):
        assert expected in text
    code, stdout, _ = errors("show", "q.error")
    assert stdout[-2:] == ["00 ff " * 7 + "00 ff", "… 1200 bytes; export has all"]
    code, stdout, _ = errors("show", "q.error", "--json")
    assert ["m", "binary"] == [json.loads(line)["id"] for line in stdout]
    code, _, stderr = errors("show", "q.error", "--id", "other")
    assert (1, ["postage errors: there is no message 'other' in 'q.error'"]) == (code, stderr)
    assert 2 == ready(channel, "q.error")


# ----------------------------------------------------------------------------- acting


def test_a_retry_of_all_wants_a_yes(channel: BlockingChannel) -> None:
    """Of some, it does not."""
    park_numbers(channel, 4)

    code, _, stderr = errors("retry", "q.error")
    assert 2 == code
    assert ["postage errors: nobody is there to answer: Send all 4 messages of q.error back? "
            "Say --yes"] == stderr
    assert (0, ["1 message went back"], []) == errors("retry", "q.error", "--id", "m1")
    assert (0, ["3 messages went back"], []) == errors("retry", "q.error", "--yes")
    assert [b"1", b"0", b"2", b"3"] == bodies(channel)
    park_numbers(channel, 1)
    assert (0, ["0 messages went back"], []) == errors("retry", "q.error", "--exception", "OSError")
    assert (0, ["1 message went to q"], []) == errors("retry", "q.error", "--yes", "--to", "q")


def test_what_stays_is_an_error(channel: BlockingChannel) -> None:
    """With what is wrong with the first."""
    channel.basic_publish("", "q.error", b"by hand", pika.BasicProperties(message_id="f"))
    park_numbers(channel, 2)

    code, stdout, stderr = errors("retry", "q.error", "--yes")

    assert (1, []) == (code, stdout)
    assert [
        "postage errors: 2 message(s) confirmed, 1 failed, 0 unknown; the first: message f: "
        "nothing says which queue it came from: name one"
    ] == stderr


def test_an_edited_message_goes_back(channel: BlockingChannel, tmp_path: Path) -> None:
    """The editor gets its JSON, for people to read."""
    park(channel, b'{"item": 1}', message_id="m")
    program = editor(
        tmp_path, "assert '{\\n' in path.read_text(); path.write_text('{\"item\": \"t\u00fc\"}')"
    )

    assert (0, ["the message went to q"], []) == errors(
        "edit", "q.error", "--id", "m", EDITOR=program, VISUAL="", TMPDIR=str(tmp_path)
    )
    assert ['{"item": "tü"}'.encode()] == bodies(channel)
    assert [] == list(tmp_path.glob("postage-*"))


@pytest.mark.parametrize(
    ("code", "complaint", "left"),
    [
        ("sys.exit(3)", "nothing was changed: the editor ended with 3", 0),
        ("pass", "nothing was changed: the text is as it was", 0),
        ("path.unlink()", "nothing was changed: the editor", 0),
        ("path.write_text('{')", "is no JSON", 1),
        ("path.write_bytes(bytes([255]))", "is no JSON", 1),
        ("path.write_text('')", "is no JSON", 1),
    ],
)
def test_an_editor_that_fails_changes_nothing(
    channel: BlockingChannel, tmp_path: Path, code: str, complaint: str, left: int
) -> None:
    """What it wrote is kept, if it wrote something."""
    park(channel, b'{"item": 1}', message_id="m")

    program = editor(tmp_path, code)
    status, _, [line] = errors(
        "edit", "q.error", "--id", "m", EDITOR=program, VISUAL="", TMPDIR=str(tmp_path)
    )

    assert 1 == status
    assert complaint in line
    assert left == len(list(tmp_path.glob("postage-*")))
    assert [] == bodies(channel)
    assert [b'{"item": 1}'] == bodies(channel, "q.error")


def test_an_edit_that_cannot_be_sent_keeps_the_text(
    channel: BlockingChannel, tmp_path: Path
) -> None:
    """And the message is as it was."""
    park(channel, b"{}", message_id="m", queue="gone")
    program = editor(tmp_path, "path.write_text('[1]')")
    arguments = ("edit", "q.error", "--id", "m")

    code, _, [line] = errors(*arguments, EDITOR=program, VISUAL="", TMPDIR=str(tmp_path))

    [kept] = tmp_path.glob("postage-*")
    assert 1 == code
    assert f"; what was edited is in {kept}" in line
    assert "[1]" == kept.read_text()
    assert [b"{}"] == bodies(channel, "q.error")


@pytest.mark.parametrize(
    ("body", "queue", "complaint", "expected"),
    [
        (b"\xff", "q", "is no JSON: export it, edit the file, and import that", 1),
        (b"{}", "", "name one with --to", 2),
    ],
)
def test_what_cannot_be_edited_is_explained(
    channel: BlockingChannel, body: bytes, queue: str, complaint: str, expected: int
) -> None:
    """Before an editor is started."""
    park(channel, body, message_id="m", queue=queue)
    code, _, [line] = errors("edit", "q.error", "--id", "m", EDITOR="no-such-editor", VISUAL="")
    assert expected == code
    assert complaint in line


def test_messages_are_moved(channel: BlockingChannel) -> None:
    """With what is said about them."""
    park_numbers(channel, 3)
    channel.queue_declare("other")

    assert (0, ["1 message moved to other"], []) == errors("move", "q.error", "other", "--id", "m1")
    assert (0, ["2 messages moved to other"], []) == errors("move", "q.error", "other", "--yes")
    assert ["failed"] * 3 == [
        properties.headers["postage-reason"] for properties, _ in taken(channel, "other")
    ]


def test_an_export_is_imported_again(channel: BlockingChannel, tmp_path: Path) -> None:
    """A file that is there already stays as it is."""
    park_numbers(channel, 3)
    file = str(tmp_path / "messages.jsonl")

    assert (0, [f"3 messages written to {file}; they are in q.error as well"], []) == errors(
        "export", "q.error", file
    )
    code, _, stderr = errors("export", "q.error", file)
    assert (1, [f"postage errors: {file}: File exists: name a new file"]) == (code, stderr)
    code, stdout, _ = errors("export", "q.error", "-", "--id", "m1")
    assert (0, ["1"]) == (code, [json.loads(line)["body"] for line in stdout])
    assert (0, ["3 messages put into copy.error"], []) == errors("import", "copy.error", file)
    assert [b"0", b"1", b"2"] == bodies(channel, "copy.error") == bodies(channel, "q.error")


def test_an_export_that_fails_leaves_no_file(broker_url: str, tmp_path: Path) -> None:
    """It would look like a whole one."""
    file = tmp_path / "messages.jsonl"
    code, _, [line] = errors("export", "nothing.error", str(file))
    assert (1, False) == (code, file.exists())
    assert "404" in line


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b'{"body": "a"}\n{"body": 1}\n', "line 2: 'body' is no text; nothing was imported"),
        (b'{"body": "a"}\n\xff\n', "is no UTF-8"),
    ],
)
def test_a_damaged_file_imports_nothing(
    channel: BlockingChannel, tmp_path: Path, text: bytes, complaint: str
) -> None:
    """And the line is named."""
    (tmp_path / "damaged").write_bytes(text)
    code, _, [line] = errors("import", "q.error", str(tmp_path / "damaged"))
    assert 1 == code
    assert complaint in line
    assert "nothing was imported" in line
    assert 0 == ready(channel, "q.error")


def test_a_purge_wants_a_yes(channel: BlockingChannel) -> None:
    """From a person, or on the command line."""
    park_numbers(channel, 2)

    code, _, stderr = errors("purge", "q.error")
    assert (2, 2) == (code, ready(channel, "q.error"))
    assert "Throw away 2 messages of q.error, for good? Say --yes" in stderr[0]
    code, shown = on_terminal("n\n", "purge", "q.error")
    assert (1, 2) == (code, ready(channel, "q.error"))
    assert "Throw away 2 messages of q.error, for good? [y/N]" in shown
    assert "nothing was done" in shown
    code, shown = on_terminal("y\n", "purge", "q.error")
    assert (0, 0) == (code, ready(channel, "q.error"))
    assert "2 messages thrown away" in shown
    assert (0, ["0 messages thrown away"], []) == errors("purge", "q.error", "--yes")


def test_a_terminal_shows_progress(channel: BlockingChannel) -> None:
    """Until it is done."""
    park_numbers(channel, 40)
    code, shown = on_terminal("y\n", "retry", "q.error")
    assert 0 == code
    assert f"\r[{'#' * 15}{' ' * 15}]  50%" in shown
    assert f"\r[{'#' * 30}] 100%\r{' ' * 38}\r40 messages went back" in shown


# ------------------------------------------------------------------------------ trouble


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-action"],
        ["edit", "q.error"],
        ["move", "q.error"],
        ["show"],
        ["list", "--timeout", "0"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    """With the usage on standard error."""
    code, stdout, stderr = errors(*arguments)
    assert (2, []) == (code, stdout)
    assert "usage: postage errors" in stderr[0]


def test_without_a_broker_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, without the password."""
    monkeypatch.setenv("POSTAGE_URL", "amqp://me:secret@127.0.0.1:1")
    for arguments in (["list"], ["list", "q.error"], ["retry", "q.error", "--yes"]):
        code, _, [line] = errors(*arguments, "--timeout", "0.5")
        assert 1 == code
        assert "nothing listens there" in line
        assert "secret" not in line


def test_a_pipe_that_is_closed_ends_it_quietly(channel: BlockingChannel) -> None:
    """As ``head`` does when it has seen enough."""
    for number in range(30):
        park(channel, b"x" * 10_000, message_id=f"m{number}")
    process = subprocess.Popen(
        [sys.executable, "-m", "postage", "errors", "show", "q.error"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        process.stdout.read(100)
        process.stdout.close()
        assert b"" == process.stderr.read()
    assert 1 == process.wait(30)
    wait_until(lambda: ready(channel, "q.error") == 30)


def test_ctrl_c_ends_a_retry_in_order(channel: BlockingChannel) -> None:
    """What was not confirmed stays."""
    park_numbers(channel, 2_000)
    with Program(["-m", "postage", "errors", "retry", "q.error", "--yes"]) as program:
        wait_until(lambda: ready(channel, "q") > 100)
        program.send_signal(signal.SIGINT)
        assert 1 == program.wait()
    assert ["postage errors: interrupted; what was not confirmed is in its error queue"] == (
        program.stderr
    )
    check_that_nothing_is_lost(channel, 2_000)


def test_a_kill_in_the_middle_of_a_retry_loses_nothing(channel: BlockingChannel) -> None:
    """At most the one message that was on its way is there twice."""
    park_numbers(channel, 2_000)
    with Program(["-m", "postage", "errors", "retry", "q.error", "--yes"]) as program:
        wait_until(lambda: ready(channel, "q") > 300)
        program.kill()
        program.wait()
    check_that_nothing_is_lost(channel, 2_000)


def check_that_nothing_is_lost(channel: BlockingChannel, number: int) -> None:
    wait_until(lambda: ready(channel, "q") + ready(channel, "q.error") >= number)
    gone, left = bodies(channel), bodies(channel, "q.error")
    assert 0 < len(gone) < number
    assert {b"%d" % each for each in range(number)} == {*gone, *left}
    assert len(gone) + len(left) <= number + 1


def test_a_blocked_broker_is_named(node: Node, channel: BlockingChannel) -> None:
    """After as long as a confirm may take; nothing has moved."""
    park_numbers(channel, 2)
    channel.queue_declare("other")
    with node.memory_alarm():
        code, stdout, _ = errors("list", "q.error")
        assert (0, "q.error: 2 messages") == (code, stdout[0])
        code, _, [line] = errors("move", "q.error", "other", "--yes", "--timeout", "1")
    assert 1 == code
    assert "alarm" in line or "confirm never came" in line
    wait_until(lambda: ready(channel, "q.error") == 2)
