# SPDX-License-Identifier: MIT
"""The code blocks of a page, and how each kind of them is run.

=================================  ==================================================
```` ```python ````, ``# name.py``  a file: it is written to the folder of the page
```` ```python ````                 run in the namespace of the page, in order
```` ```pycon ````                  a session: what it prints is compared (doctest)
```` ```console ````                commands after ``$``; what they print is compared
=================================  ==================================================

A command that ends in ``&`` stays in the background until the page ends; ``$ wait`` waits for
all of those, and what they printed is compared. In what is compared, ``...`` stands for
anything. Blocks of other languages, and those after a line ``<!-- not run: reason -->``, are
only shown.
"""

from __future__ import annotations

import contextlib
import doctest
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.certificates import openssl
from tests.programs import Program

#: Seconds that a command of a page may take.
DEADLINE_SECONDS = 60.0

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\w+\.py)\n")
_NOT_RUN = re.compile(r"<!-- not run: .+ -->\n\Z")


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, if it is one."""
        match = _FILE.match(self.text) if self.language == "python" else None
        return match[1] if match else None


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page that are to be run."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 2)
        for match in _BLOCK.finditer(text)
        if not _NOT_RUN.search(text[: match.start()])
    ]


def run_page(page: Path, folder: Path) -> None:
    """Run the blocks of a page, in order, with the folder for its files.

    Raises:
        AssertionError: Something was not printed as the page says.
    """
    names: dict[str, Any] = {"__name__": f"page {page.name}"}
    with _Console(folder) as console:
        for block in blocks_of(page):
            if block.file is not None:
                (folder / block.file).write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                code = "\n" * (block.line - 1) + block.text
                exec(compile(code, str(page), "exec", dont_inherit=True), names)
            elif block.language == "pycon":
                _run_session(block, page, names)
            elif block.language == "console":
                console.run(block)


def _run_session(block: Block, page: Path, names: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(
        block.text, names, page.name, str(page), block.line - 1
    )
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(test, out=report.append, clear_globs=False)
    names.update(test.globs)
    assert result.failed == 0, "".join(report)


class _Console:
    """A shell that knows as much as the pages need."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._background: list[Program] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Console:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def run(self, block: Block) -> None:
        for command, expected in _commands(block.text):
            assert_printed(expected, self._run(command), f"line {block.line}: {command}")

    def _run(self, command: str) -> list[str]:
        words = shlex.split(command.removesuffix("&"))
        if words[0] == "pip":
            return []  # it is installed, or the tests would not run
        if words == ["wait"]:
            for program in self._background:
                program.wait(DEADLINE_SECONDS)
            return [line for program in self._background for line in program.stdout]
        # A person types the next line when the component is there. It says so when debugging.
        in_background = command.endswith("&")
        environment = {"POSTAGE_DEBUG_MODE": "true"} if in_background else {}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words[0] == "openssl":
            openssl(*words[1:], folder=self._folder)
            return []  # what it draws while it thinks is of no interest
        if words[0] == "postage":
            words[:1] = ["python", "-m", "postage"]
        assert words[0] == "python", f"the pages do not run {words[0]}"
        program = self._stack.enter_context(
            Program(words[1:], env=environment, cwd=self._folder)
        )
        if in_background:
            self._background.append(program)
            program.wait_for_line("consuming queue", DEADLINE_SECONDS)
            return []
        assert program.wait(DEADLINE_SECONDS) == 0, program.output
        return program.lines


def _commands(text: str) -> Iterator[tuple[str, list[str]]]:
    command, printed = "", list[str]()
    for line in text.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, printed
            command, printed = line.removeprefix("$ ").strip(), []
        else:
            printed.append(line)
    if command:
        yield command, printed


def assert_printed(expected: list[str], printed: list[str], what: str) -> None:
    """Compare lines, with ``...`` in the expected ones for anything."""
    pattern = "\n".join(".*".join(map(re.escape, line.split("..."))) for line in expected)
    assert re.fullmatch(pattern, "\n".join(printed), re.DOTALL), (
        f"{what}\nexpected:\n" + "\n".join(expected) + "\nprinted:\n" + "\n".join(printed)
    )
