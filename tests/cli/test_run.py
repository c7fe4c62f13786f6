# SPDX-License-Identifier: MIT
"""``postage run``, as the process that people start."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from postage.generic_application import GenericApplicationExchange
from postage.messaging import GenericProducer
from tests.programs import Program
from tests.waiting import wait_until

#: A module as people write it: nothing but components.
MODULE = """\
from postage.generic_application import GenericApplication
from postage.messaging import MessageHandler, MessageProcessor, RpcHandler
from postage.microthreads import MicroThread

VERSION = 1

class MailClerk(GenericApplication):
    @MessageHandler("command", "work")
    def msg_work(self, content):
        import time
        print("begun", flush=True)
        time.sleep(content["parameters"])
        print("ended", flush=True)

    @RpcHandler("command", "version")
    def rpc_version(self, content, reply_func):
        reply_func(VERSION)

class Ticker(MicroThread):
    def step(self):
        print("tick", flush=True)
        raise StopIteration

def broken():
    return 42

NUMBER = 42
"""


class Caller(GenericProducer):
    """Calls any of the clerks."""

    eks = [(GenericApplicationExchange, "mail-clerk/rr")]
    rpc_timeout = 20
    max_retry = 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "office.py").write_text(MODULE)
    return tmp_path


@pytest.fixture
def caller(broker_url: str) -> Iterator[Caller]:
    with Caller() as caller:
        yield caller


def start(folder: Path, *arguments: str) -> Program:
    return Program(["-m", "postage", "run", *arguments], cwd=folder)


def complaint_of(program: Program) -> tuple[int, str]:
    """Return the exit code and the one line of a command that failed."""
    with program:
        code = program.wait()
        [line] = program.stderr
        return code, line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_running_handler_end(
    folder: Path, caller: Caller, number: signal.Signals
) -> None:
    """And what is not started is for another instance."""
    with start(folder, "office:MailClerk") as program:
        program.wait_for_line("is at work")
        caller.message_work(1)
        caller.message_work(0)
        program.wait_for_line("begun")
        program.send_signal(number)
        assert 0 == program.wait()
    assert ["begun", "ended"] == program.stdout
    with start(folder, "office:MailClerk") as other:
        other.wait_for_line("ended")


def test_a_second_signal_ends_at_once(folder: Path, caller: Caller) -> None:
    """Its message is delivered again."""
    with start(folder, "office:MailClerk") as program:
        program.wait_for_line("is at work")
        caller.message_work(600)
        program.wait_for_line("begun")
        program.terminate()
        program.wait_for_line("signal 15: leaving")
        program.terminate()
        assert -signal.SIGTERM == program.wait()
    assert ["begun"] == program.stdout


def test_a_message_ends_it_too(folder: Path, caller: Caller) -> None:
    """As `quit` does for every application."""
    with start(folder, "office:MailClerk", "--group", "day") as program:
        program.wait_for_line("is at work")
        caller.message_quit(_key="mail-clerk#day")
        assert 0 == program.wait()


def test_a_name_can_be_given(folder: Path, broker_url: str) -> None:
    """Many services may run one class."""
    with start(folder, "office:MailClerk", "--name", "night-clerk") as program, Caller() as caller:
        program.wait_for_line("night-clerk ")
        assert 1 == caller.rpc_version(_key="night-clerk/rr").value


def test_several_targets_share_a_process(folder: Path, caller: Caller) -> None:
    """Applications and other microthreads."""
    with start(folder, "office:Ticker", "office:MailClerk") as program:
        program.wait_for_line("tick")
        assert 1 == caller.rpc_version().value


def test_a_restart_runs_the_new_code(folder: Path, caller: Caller) -> None:
    """But not if it cannot be compiled: then the old one stays."""
    with start(folder, "office:MailClerk") as program:
        program.wait_for_line("is at work")
        (folder / "office.py").write_text(MODULE + "\n!")
        caller.message_restart(_key="mail-clerk")
        program.wait_for_line("no restart: the new code cannot be compiled")
        (folder / "office.py").write_text(MODULE.replace("VERSION = 1", "VERSION = 2"))
        caller.message_restart(_key="mail-clerk")
        wait_until(lambda: sum("is at work" in line for line in program.lines) == 2, 60)
        wait_until(lambda: caller.rpc_version().value == 2, 60)
        program.terminate()
        assert 0 == program.wait()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["office"], "'office' is not of the form MODULE:NAME"),
        (["nowhere:Clerk"], "there is no module 'nowhere' here or on the path"),
        (["nowhere.else:Clerk"], "there is no module 'nowhere.else' here or on the path"),
        (["office:Nobody"], "'office' has nothing to run that is called 'Nobody'"),
        (["office:NUMBER"], "'office' has nothing to run that is called 'NUMBER'"),
        (["office:broken"], "made no component, but 42"),
        (["office:Ticker", "--name", "x"], "--name and --group are for applications"),
        (["office:MailClerk", "office:Ticker", "--name", "x"], "--name is for one target"),
    ],
)
def test_what_cannot_be_run_is_explained(
    folder: Path, arguments: list[str], expected: str
) -> None:
    """In one line, and the exit code says that the usage is wrong."""
    code, line = complaint_of(start(folder, *arguments))
    assert 2 == code
    assert line.startswith("postage run: ")
    assert expected in line


def test_without_a_broker_it_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time that the component is willing to wait."""
    source = MODULE.replace("MailClerk(GenericApplication):", "MailClerk(GenericApplication):\n"
                            "    from postage.messaging import GenericConsumer\n"
                            "    class consumer_class(GenericConsumer):\n"
                            "        connect_timeout = 0.5\n")
    (folder / "office.py").write_text(source)
    monkeypatch.setenv("POSTAGE_URL", "amqp://127.0.0.1:1")
    with start(folder, "office:MailClerk", "--log-level", "error") as program:
        assert 1 == program.wait()
        [line] = program.stderr
    assert line.startswith("postage run: ")
    assert "nothing listens there" in line
