# SPDX-License-Identifier: MIT
"""The peers of the benchmarks: what pins them, and their programs.

Nothing is installed for these tests. A peer runs only where the benchmarks have installed it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.peers import cases, environments
from benchmarks.peers.cases import PEERS, Peer
from tests.programs import ROOT

PEERS_FOLDER = ROOT / "benchmarks" / "peers"
#: A line of requirements: one version of one package, and nothing else.
PIN = re.compile(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.-]+")
PINNED = environments.names()


def program_of(peer: Peer) -> Path:
    """Return the file of a peer's program."""
    folder = environments.PROGRAMS_27 if peer.program == environments.ORIGINAL else PEERS_FOLDER
    return folder / f"{peer.program}.py"


def imported(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, but for the types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module.startswith("benchmarks"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(module: str) -> Path | None:
    """Return the file of a module of the benchmarks, None if it is none."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return path if module.startswith("benchmarks.") and path.exists() else None


def helpers_of(program: Path) -> set[Path]:
    """Return the files of the benchmarks that a program loads, and those that they load."""
    found: set[Path] = set()
    waiting = [program]
    while waiting:
        files = {file_of(module) for module in imported(waiting.pop())} - {None, *found}
        found |= {file for file in files if file}
        waiting += [file for file in files if file]
    return found


def modules_of(peer: Peer) -> set[str]:
    """Return the modules that a peer's environment has, as far as packages bear their names."""
    if peer.program == environments.ORIGINAL:
        return {"postage", "meeting_point"}
    return {name.replace("-", "_") for name in environments.pins(peer.program)}


@pytest.mark.parametrize("name", PINNED)
def test_requirements_pin_one_version_of_each_package(name: str) -> None:
    """Each line is a pin, no package comes twice, and the peer itself comes first."""
    text = (environments.REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]

    assert [] == [line for line in lines if not PIN.fullmatch(line)]
    assert len(lines) == len({line.partition("==")[0].lower() for line in lines})
    assert name == lines[0].partition("==")[0].lower().replace("-", "_")


@pytest.mark.parametrize("name", PINNED)
def test_requirements_name_the_versions_of_python_they_were_pinned_for(name: str) -> None:
    """There is a version, and all look like one."""
    pythons = environments.pythons(name)

    assert pythons
    assert [] == [version for version in pythons if not re.fullmatch(r"3\.\d+", version)]


def test_every_peer_is_pinned_and_every_pin_is_a_peers() -> None:
    """Postage 1.2.1 is pinned by the tests of interoperability."""
    assert sorted([*PINNED, environments.ORIGINAL]) == sorted(peer.program for peer in PEERS)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.program)
def test_programs_of_peers_compile(peer: Peer) -> None:
    """That of 1.2.1 is fit for Python 2.7 and for this one."""
    path = program_of(peer)

    compile(path.read_text(encoding="utf-8"), str(path), "exec")


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.program)
def test_programs_of_peers_need_nothing_but_what_is_pinned_and_python(peer: Peer) -> None:
    """In the environment of a peer there is neither our postage nor what it needs.

    psutil may be missing there: `benchmarks.cpu` does without.
    """
    program = program_of(peer)
    allowed = {*sys.stdlib_module_names, "benchmarks", "psutil", *modules_of(peer)}
    foreign = {
        (path.name, module)
        for path in {program, *helpers_of(program)}
        for module in imported(path)
        if module.partition(".")[0] not in allowed
    }

    assert set() == foreign


@pytest.mark.slow
def test_a_peer_that_is_installed_answers_calls(broker_url: str) -> None:
    """Its service and its client are programs, in the environment that the benchmarks made."""
    installed = [peer for peer in PEERS if peer.calls and environments.existing(peer.program)]
    if not installed:
        pytest.skip("no peer is installed; `make bench` installs them")

    sample = cases.call(installed[0], 300, 10, cases.PLAIN).measure(broker_url)

    assert {"calls/s", "CPU us/call"} == set(sample)
