# SPDX-License-Identifier: MIT
"""Where a version of postage is installed, and how 1.2.1 comes to be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tests.programs import ROOT, Program

PROGRAMS = Path(__file__).parent / "programs_27"
PACKAGES = {"pika": "0.9.13", "postage": "1.2.1"}

#: Seconds that an interpreter gets to say its version, and pip to fetch the packages.
PROBE_DEADLINE_SECONDS = 20.0
INSTALL_DEADLINE_SECONDS = 180.0

PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "1", "--timeout", "15"]


@dataclass(frozen=True)
class Installation:
    """A version of postage, and the Python that runs it."""

    version: str
    python: str
    path: Path

    def __str__(self) -> str:
        return self.version

    def run(self, program: str, *arguments: str, compat: bool = False) -> Program:
        """Start one of `programs_27`."""
        environment = {
            "PYTHONPATH": str(self.path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",  # the restart of 1.2.1 forgets the option -u
            "POSTAGE_COMPAT": "1.2" if compat else "",
        }
        script = str(PROGRAMS / f"{program}.py")
        return Program([script, *arguments], env=environment, python=self.python)


def ours() -> Installation:
    """Return postage as it is in this checkout."""
    return Installation("ours", sys.executable, ROOT)


def original(python: str, folder: Path) -> Installation:
    """Install Postage 1.2.1 into a folder.

    Args:
        python: Python 2.7.
        folder: An empty folder.

    Raises:
        RuntimeError: That does not work; it says why.
    """
    complaint = _install_with_its_pip(python, folder)
    if complaint:
        complaint += _unpack_with_our_pip(folder)
    found = _ask(python, "import pika, postage; print(postage.__version__)", PYTHONPATH=str(folder))
    if found != PACKAGES["postage"]:
        raise RuntimeError((complaint.strip() or "it does not run").splitlines()[-1])
    return Installation(PACKAGES["postage"], python, folder)


def find_python27(named: str | None = None) -> str | None:
    """Return a Python 2.7 that runs: the one named, or one of the PATH or of pyenv."""
    for candidate in [named] if named else _candidates():
        if _ask(candidate, "import sys; print(sys.version_info[:2])") == "(2, 7)":
            return candidate
    return None


def _candidates() -> Iterator[str]:
    # What is on the PATH may be a shim of pyenv that leads nowhere.
    on_path = shutil.which("python2.7")
    if on_path is not None:
        yield on_path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob("versions/2.7*/bin/python2.7"), reverse=True))


def _ask(python: str, code: str, **environment: str) -> str | None:
    """Return what a piece of code prints, None if it does not run."""
    try:
        return subprocess.run(
            [python, "-c", code],
            env={**os.environ, "PYTHONPATH": "", **environment},
            cwd="/",  # or else it would import what lies in the root of the checkout
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            timeout=PROBE_DEADLINE_SECONDS,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _install_with_its_pip(python: str, folder: Path) -> str:
    """Install the packages with the pip of Python 2.7; return a complaint, or nothing."""
    return _run([python, *PIP, "install", "--no-deps", "--target", str(folder), *_requirements()])


def _unpack_with_our_pip(folder: Path) -> str:
    """Fetch the packages with the pip of this Python, and unpack the modules."""
    archives = folder / "archives"
    sources = ["--no-deps", "--no-binary", ":all:", "--dest", str(archives)]
    complaint = _run([sys.executable, *PIP, "download", *sources, *_requirements()])
    for archive in archives.glob("*.tar.gz"):
        _unpack(archive, folder)
    return complaint


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as members:
        for member in members:
            # Such as pika-0.9.13/pika/adapters/blocking_connection.py
            parts = PurePosixPath(member.name).parts[1:]
            content = members.extractfile(member) if member.isfile() else None
            if content is not None and parts[0] in PACKAGES and ".." not in parts:
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())


def _requirements() -> list[str]:
    return [f"{name}=={version}" for name, version in PACKAGES.items()]


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=INSTALL_DEADLINE_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{error}\n"
    return result.stdout if result.returncode else ""
