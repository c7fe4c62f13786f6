# SPDX-License-Identifier: MIT
"""The command ``postage``, without the work of its sub-commands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

import postage
from postage import cli
from postage.errors import ConfigurationError
from tests.programs import Program


def run(function: Callable[[], int]) -> int:
    """Run what `main` runs when the arguments are read."""
    command = argparse.Namespace(run=lambda options: function())
    parser = argparse.ArgumentParser()
    parser.set_defaults(command=command, command_name="try")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_parser", lambda: parser)
        return cli.main([])


def test_without_a_command_the_help_is_printed_and_the_usage_is_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing but ``postage`` prints its help on standard error, and exits with 2."""
    assert 2 == cli.main([])
    printed = capsys.readouterr()
    assert "" == printed.out
    assert re.search(r"^    broker +Run a broker for development", printed.err, re.MULTILINE)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    """``postage --version`` prints one line."""
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert 0 == exit.value.code
    assert f"postage {postage.__version__}\n" == capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["no-such-command"], ["--no-such-option"]])
def test_wrong_usage_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown command or option is wrong usage, and explained on standard error."""
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert 2 == exit.value.code
    assert "usage: postage" in capsys.readouterr().err


def test_each_module_of_the_folder_is_a_command_with_help() -> None:
    """A sub-command is a module with a docstring, ``add_arguments`` and ``run``."""
    found = cli.commands()
    assert "broker" in found
    for module in found.values():
        assert module.__doc__
        assert callable(module.add_arguments)
        assert callable(module.run)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (cli.CommandError("it went wrong"), 1),
        (cli.CommandError("it went wrong", exit_code=2), 2),
        (ConfigurationError("it went wrong"), 1),
    ],
)
def test_an_error_is_one_line_and_owns_its_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a command raises is printed without a traceback, and decides the exit code."""

    def fail() -> int:
        raise error

    assert code == run(fail)
    assert "postage try: it went wrong\n" == capsys.readouterr().err


def test_what_a_command_returns_is_the_exit_code() -> None:
    """A command that returns 0 succeeded."""
    assert 0 == run(lambda: 0)


def test_it_runs_as_a_module() -> None:
    """``python -m postage`` is the same command."""
    with Program(["-m", "postage", "--version"]) as program:
        assert 0 == program.wait()
        assert [f"postage {postage.__version__}"] == program.stdout


def test_it_is_installed_as_a_command() -> None:
    """The package brings the command ``postage`` along."""
    [command] = entry_points(group="console_scripts", name="postage")
    assert cli.main is command.load()


def test_the_help_imports_neither_the_client_nor_the_broker() -> None:
    """The help comes at once: what a command needs is imported when it runs."""
    code = (
        "import sys; from postage import cli; cli.main([]); "
        "print([name for name in ('pika', 'asyncio', 'sqlite3') if name in sys.modules])"
    )
    with Program(["-c", code]) as program:
        assert 0 == program.wait()
        assert ["[]"] == program.stdout
