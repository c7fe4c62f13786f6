# SPDX-License-Identifier: MIT
"""Restarts: a new run of the same program, as the same process, and no message lost by it."""

from __future__ import annotations

import collections
import py_compile
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from postage import restart
from postage.generic_application import GenericApplicationExchange
from postage.messaging import GenericProducer
from tests.nodes import Node
from tests.programs import ROOT, Program
from tests.programs_for_tests.components import rest_of
from tests.waiting import wait_until

SCRIPT = "tests/programs_for_tests/restarting.py"


class Caller(GenericProducer):
    """Sends to all instances of the application "app"."""

    eks = [(GenericApplicationExchange, "app")]
    rpc_timeout = 20
    max_retry = 0


@pytest.fixture
def caller(broker_url: str) -> Iterator[Caller]:
    """A producer for the program."""
    with Caller() as producer:
        yield producer


def wait_for_runs(
    program: Program, count: int, name: str = "app", timeout: float = 30.0
) -> None:
    """Wait until so many runs of a program have consumed; all but the first are restarts."""
    wait_until(
        lambda: program.stdout.count(f"ready {name}") >= count,
        timeout,
        message=f"{count} runs of {program}: {program.output}",
    )


def starts_of(program: Program) -> list[str]:
    return [line for line in program.stdout if line.startswith("started")]


# ---------------------------------------------------------------- the same program again


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([SCRIPT, "app"], "argv ['app'] dev False []"),
        (["-m", "tests.programs_for_tests.restarting", "app"], "argv ['app'] dev False []"),
        (["-X", "dev", "-W", "error", SCRIPT, "app"], "argv ['app'] dev True ['default', 'error']"),
        ([SCRIPT, "app", "", "a b", "-m"], "argv ['app', '', 'a b', '-m'] dev False []"),
        ([SCRIPT, "app", "chdir"], "argv ['app', 'chdir'] dev False []"),
        (
            ["-c", "from tests.programs_for_tests.restarting import main; main()", "app"],
            "argv ['app'] dev False []",
        ),
    ],
    ids=["script", "module", "options", "arguments", "chdir", "command"],
)
def test_a_restart_runs_the_same_program_again(
    args: list[str], expected: str, caller: Caller
) -> None:
    """As the same process, with the options of the interpreter, which 1.2.1 lost."""
    with Program(args) as program:
        wait_for_runs(program, 1)
        for count in (2, 3):
            caller.message_restart()
            wait_for_runs(program, count)
        caller.message_quit()

        assert 0 == program.wait()

    assert [f"started {program.pid} {expected}"] * 3 == starts_of(program)
    assert [] == program.stderr


@pytest.mark.parametrize("module", ["app", "package.app", "package"])
def test_a_module_of_the_working_directory_is_found_again(
    module: str, caller: Caller, tmp_path: Path
) -> None:
    """Also if the program has changed the working directory, as services do."""
    package = tmp_path / "package"
    package.mkdir()
    for script in (tmp_path / "app.py", package / "app.py", package / "__main__.py"):
        shutil.copy(ROOT / SCRIPT, script)

    with Program(["-m", module, "app", "chdir"], cwd=tmp_path) as program:
        for count in (1, 2, 3):
            wait_for_runs(program, count)
            caller.message_restart()
        caller.message_quit()
        program.wait()


@pytest.mark.parametrize("kind", ["plain", "generator", "threaded", "async"])
def test_any_handler_restarts_by_raising_ack_and_restart(kind: str, caller: Caller) -> None:
    """Its message is settled and does not restart the new run."""
    with Program([SCRIPT, "app"]) as program:
        wait_for_runs(program, 1)
        getattr(caller, f"message_restart_{kind}")(_key="app/rr")
        wait_for_runs(program, 2)
        caller.message_note("on", _key="app/rr")
        program.wait_for_line("note on")
        caller.message_quit()
        program.wait()

    assert 2 == len(starts_of(program))
    assert [] == rest_of("app") + rest_of("app.error")


def test_a_call_that_restarts_is_answered_first(caller: Caller) -> None:
    """By what its handler says; the exception is a second answer that nobody waits for."""
    with Program([SCRIPT, "app"]) as program:
        wait_for_runs(program, 1)

        assert "restarting" == caller.rpc_restart_by_call(_key="app/rr").value
        wait_for_runs(program, 2)


def test_restart_can_be_called_at_once(caller: Caller) -> None:
    """Then its message is not settled, and comes again."""
    with Program([SCRIPT, "app"]) as program:
        wait_for_runs(program, 1)
        caller.message_restart_now(_key="app/rr")
        wait_for_runs(program, 3)


def test_what_is_buffered_is_written_before_a_restart(caller: Caller) -> None:
    """1.2.1 lost it."""
    with Program([SCRIPT, "app", "buffer"]) as program:
        wait_for_runs(program, 1)
        caller.message_restart()
        wait_for_runs(program, 2)

        assert 1 <= program.stdout.count("buffered")


def test_a_child_process_does_not_take_itself_for_a_restarted_one(caller: Caller) -> None:
    """The variable that tells of the restart is taken out of the environment."""
    with Program([SCRIPT, "app", "child"]) as program:
        wait_for_runs(program, 1)
        caller.message_restart()
        wait_for_runs(program, 2)

        assert ["child None"] * 2 == [line for line in program.stdout if "child N" in line]


@pytest.mark.parametrize("kind", ["zip", "pyc"])
def test_a_program_without_readable_source_restarts_too(
    kind: str, caller: Caller, tmp_path: Path
) -> None:
    """There is no code that could be looked at before."""
    script = tmp_path / f"app.{kind}"
    if kind == "pyc":
        py_compile.compile(str(ROOT / SCRIPT), str(script))
    else:
        with zipfile.ZipFile(script, "w") as archive:
            archive.write(ROOT / SCRIPT, "__main__.py")
    with Program([str(script), "app"]) as program:
        wait_for_runs(program, 1)
        caller.message_restart()
        wait_for_runs(program, 2)


def test_new_code_that_cannot_be_compiled_does_not_end_the_old_one(
    caller: Caller, tmp_path: Path
) -> None:
    """One broadcast would else end all instances."""
    script = tmp_path / "app.py"
    shutil.copy(ROOT / SCRIPT, script)
    with Program([str(script), "app"]) as program:
        wait_for_runs(program, 1)
        script.write_text("def broken(:\n")
        caller.message_restart()
        program.wait_for_line("cannot be compiled")
        caller.message_note("still here")
        program.wait_for_line("note still here")
        shutil.copy(ROOT / SCRIPT, script)
        caller.message_restart()
        wait_for_runs(program, 2)


# ------------------------------------------------------------------------- once, not again


def test_a_restart_that_is_delivered_again_is_settled_and_skipped(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new run knows which message it is the answer to."""
    monkeypatch.setenv(restart.VARIABLE, "id of the restart")
    with Program([SCRIPT, "app"]) as program:
        wait_for_runs(program, 1)
        caller.message_restart(_message_id="id of the restart", _key="app/rr")
        caller.message_note("on", _key="app/rr")
        program.wait_for_line("note on")
        caller.message_restart(_message_id="another id", _key="app/rr")
        wait_for_runs(program, 2)
        caller.message_quit()
        program.wait()

    assert 2 == len(starts_of(program))
    assert [] == rest_of("app") + rest_of("app.error")


def test_a_broadcast_restarts_a_process_with_two_applications_once(caller: Caller) -> None:
    """Each of them gets the message."""
    with Program([SCRIPT, "app", "two"]) as program:
        wait_for_runs(program, 1)
        wait_for_runs(program, 1, "app-2")
        caller.message_restart(_key=f"@{socket.gethostname()}")
        wait_for_runs(program, 2)
        wait_for_runs(program, 2, "app-2")
        for name in ("app", "app-2"):
            caller.message_note(name, _key=name)
            program.wait_for_line(f"note {name}")
        caller.message_quit()
        program.wait()

    assert 2 == len(starts_of(program))


def test_what_is_sent_to_an_instance_while_it_restarts_waits_for_its_new_run(
    caller: Caller,
) -> None:
    """Its queue is purged at a fresh start only."""
    with Program([SCRIPT, "app"]) as program:
        wait_for_runs(program, 1)
        key = f"{program.pid}@{socket.gethostname()}"
        caller.message_restart(_key=key)
        for number in range(20):
            caller.message_note(number, _key=key)
        program.wait_for_line("note 19")

    assert [f"note {number}" for number in range(20)] == [
        line for line in program.stdout if line.startswith("note")
    ]
    assert 2 == len(starts_of(program))


@pytest.mark.slow
def test_a_restart_that_cannot_be_settled_does_not_happen(
    broker_url: str, node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the broker's consent it could come again and restart the new run, and so on.

    The component goes on. Whether the message comes again depends on how much the broker had read.
    """
    monkeypatch.setenv("POSTAGE_URL", f"{broker_url}?heartbeat=2")
    file = tmp_path / "go on"
    with Caller() as caller, Program([SCRIPT, "app"]) as program:
        wait_for_runs(program, 1)
        caller.message_work(str(file), _key="app/rr")
        program.wait_for_line("begun")
        caller.message_restart()
        program.wait_for_line("leaving")
        node.suspend()
        try:
            file.touch()
            program.wait_for_line("no restart", timeout=90)
            assert 1 == len(starts_of(program))
        finally:
            node.resume()
        caller.message_note("on", _key="app/rr")
        program.wait_for_line("note on", timeout=90)

    assert len(starts_of(program)) <= 2


@pytest.mark.slow
def test_a_call_that_a_failed_restart_interrupted_is_run_again(
    broker_url: str, node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was taken for a repeated one that still runs, and was never answered."""
    monkeypatch.setenv("POSTAGE_URL", f"{broker_url}?heartbeat=2")
    # While the component leaves nobody consumes its queue; on a busy machine that is seen.
    monkeypatch.setattr("postage.rpc.LOOK_AFTER", 100.0)
    file = tmp_path / "go on"
    program_text = (
        "import tests.programs_for_tests.restarting as r; r.Restarting.grace = 3; r.main()"
    )
    with Caller() as caller, Program(["-c", program_text, "app"]) as program:
        wait_for_runs(program, 1)
        reply = caller.rpc_work_and_answer(
            str(file), _key="app/rr", _timeout=120, _max_retry=1, _future=True
        )
        program.wait_for_line("begun")
        caller.message_restart()
        program.wait_for_line("leaving")
        node.suspend()
        try:
            program.wait_for_line("no restart", timeout=90)
            file.touch()
        finally:
            node.resume()

        assert "answered" == reply.result(90).value


# ----------------------------------------------------------------------- several instances


def test_a_broadcast_rolls_out_new_code(caller: Caller, tmp_path: Path) -> None:
    """To all instances of a name, which are the same processes afterwards."""
    script = tmp_path / "app.py"
    old = (ROOT / SCRIPT).read_text()
    script.write_text(old.replace("started", "started 1.0"))

    args = [str(script), "app"]
    with Program(args) as a, Program(args) as b, Program(args) as c:
        programs = [a, b, c]
        for program in programs:
            wait_for_runs(program, 1)
        script.write_text(old.replace("started", "started 2.0"))
        caller.message_restart()
        for program in programs:
            wait_for_runs(program, 2)
        replies = [
            caller.rpc_ping(_key=f"{program.pid}@{socket.gethostname()}").value["pid"]
            for program in programs
        ]
        caller.message_quit()
        codes = [program.wait() for program in programs]

    assert [str(program.pid) for program in programs] == replies
    assert [0, 0, 0] == codes
    for program in programs:
        assert ["started 1.0", "started 2.0"] == [line[:11] for line in starts_of(program)]


@pytest.mark.slow
def test_no_message_is_lost_while_three_instances_restart_five_times(
    caller: Caller, tmp_path: Path
) -> None:
    """Each of 2,000 is handled at least once. How many were handled twice is printed."""
    kinds = ["plain", "generator", "threaded"]
    args = ["tests/programs_for_tests/counting.py", str(tmp_path)]

    with Program(args) as a, Program(args) as b, Program(args) as c:
        for number in range(5):
            for program in (a, b, c):
                wait_until(lambda each=program, n=number: each.stdout.count("ready") > n)  # type: ignore[misc]
            with caller.batch() as batch:
                for each in range(number * 400, number * 400 + 200):
                    getattr(batch, f"message_{kinds[each % 3]}")(each, _key="counting/rr")
                batch.message_restart(_key="counting")
                for each in range(number * 400 + 200, number * 400 + 400):
                    getattr(batch, f"message_{kinds[each % 3]}")(each, _key="counting/rr")
        wait_until(lambda: len(set(handled(tmp_path))) == 2000, timeout=60)
        for program in (a, b, c):
            wait_until(lambda each=program: each.stdout.count("ready") == 6)  # type: ignore[misc]
        caller.message_quit(_key="counting")
        codes = [program.wait() for program in (a, b, c)]

    counts = collections.Counter(handled(tmp_path))
    print(f"{sum(counts.values()) - len(counts)} of {len(counts)} messages were handled again")
    assert [0, 0, 0] == codes
    assert {*range(2000)} == counts.keys()
    assert [] == rest_of("counting") + rest_of("counting.error")


def handled(folder: Path) -> list[int]:
    return [int(line) for file in folder.iterdir() for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------- pure parts


@pytest.mark.parametrize("cause", [None, "some id"])
def test_the_cause_is_taken_out_of_the_environment_and_remembered(
    cause: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is the cause of a fresh start."""
    program = (
        "import os; from postage import restart as r; "
        "print(r.cause(), r.cause(), os.environ.get(r.VARIABLE))"
    )
    if cause is not None:
        monkeypatch.setenv(restart.VARIABLE, cause)
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    assert f"{cause} {cause} None\n" == output


def test_the_command_line_is_that_of_this_program() -> None:
    """With the interpreter and all of its options."""
    assert sys.executable == restart.command_line()[0]
    assert sys.orig_argv[1:] == restart.command_line()[1:]
