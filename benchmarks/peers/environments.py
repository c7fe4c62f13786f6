# SPDX-License-Identifier: MIT
"""Virtual environments, one for each peer, made from PyPI when they are first needed.

``requirements/<peer>.txt`` pins all that is installed, and names the versions of Python that it was
pinned for. Environments are kept in the folder for caches of the user, under a name that changes
with the pins.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.interop import installation
from tests.programs import ROOT

REQUIREMENTS = Path(__file__).parent / "requirements"
PROGRAMS_27 = Path(__file__).parent / "programs_27"
#: Begins the line of a file of requirements that tells the versions of Python.
PYTHONS = "# Python "
#: The last version of the original, which needs Python 2.7 and comes to be in its own way.
ORIGINAL = "postage_121"
#: Seconds that an interpreter gets to say its version, and pip to install a peer.
PROBE_DEADLINE_SECONDS, INSTALL_DEADLINE_SECONDS = 20.0, 600.0


class UnavailableError(Exception):
    """A peer cannot be installed here; it says why."""


@dataclass(frozen=True)
class Environment:
    """What runs the program of a peer: an interpreter, its arguments, and variables."""

    python: str
    arguments: tuple[str, ...]
    variables: dict[str, str]


def names() -> list[str]:
    """Return the names of the peers whose requirements are pinned."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def pins(name: str) -> dict[str, str]:
    """Return the packages of a peer and their versions, its own first."""
    lines = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    parts = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {package: version for package, _, version in parts}


def pythons(name: str) -> list[str]:
    """Return the versions of Python for which a peer was pinned, such as "3.11"."""
    text = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith(PYTHONS)]
    return lines[0].removeprefix(PYTHONS).split()


def version(name: str) -> str:
    """Return the version of a peer."""
    return installation.PACKAGES["postage"] if name == ORIGINAL else next(iter(pins(name).values()))


@functools.cache
def environment(name: str) -> Environment:
    """Return the environment of a peer, which is made if it is not there.

    Raises:
        UnavailableError: That does not work.
    """
    found = existing(name)
    if found is None:
        print(f"Installing {name} {version(name)} in {_folder(name)}", file=sys.stderr, flush=True)
        _original() if name == ORIGINAL else _make(_python(name), name)
        found = existing(name)
    if found is None:
        raise UnavailableError(f"{name} was installed, and is not there")
    return found


def existing(name: str) -> Environment | None:
    """Return the environment of a peer, None if it was not made yet."""
    folder = _folder(name)
    if not (folder / "made").exists():
        return None
    if name == ORIGINAL:
        paths = f"{folder}{os.pathsep}{installation.PROGRAMS}"
        script = str(PROGRAMS_27 / f"{name}.py")
        return Environment((folder / "made").read_text(), (script,), {"PYTHONPATH": paths})
    python = str(folder / "bin" / "python")
    return Environment(python, ("-m", f"benchmarks.peers.{name}"), {"PYTHONPATH": str(ROOT)})


def _folder(name: str) -> Path:
    pinned = str(installation.PACKAGES) if name == ORIGINAL else str(pins(name))
    digest = hashlib.sha256(f"{pinned} {platform.python_version()}".encode()).hexdigest()[:12]
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "postage-benchmarks" / f"{name}-{digest}"


def _make(python: str, name: str) -> None:
    folder = _folder(name)
    _run([python, "-m", "venv", "--clear", str(folder)], name)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "install", "--requirement", str(REQUIREMENTS / f"{name}.txt")], name)
    (folder / "made").touch()


def _original() -> None:
    python = installation.find_python27(os.environ.get("POSTAGE_TEST_PYTHON27"))
    if python is None:
        raise UnavailableError("no Python 2.7 runs here; POSTAGE_TEST_PYTHON27 may name one")
    folder = _folder(ORIGINAL)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        installation.original(python, folder)
    except RuntimeError as error:
        raise UnavailableError(str(error)) from error
    (folder / "made").write_text(python)


def _python(name: str) -> str:
    """Return an interpreter for which a peer was pinned: this one if it is."""
    wanted = pythons(name)
    if f"{sys.version_info[0]}.{sys.version_info[1]}" in wanted:
        return sys.executable
    for each in wanted:
        # What is on the PATH may be a shim of pyenv that leads nowhere.
        found = shutil.which(f"python{each}")
        if found and _is_running([found, "--version"]):
            return found
    raise UnavailableError(f"it runs on Python {' or '.join(wanted)}, and none is on the PATH")


def _is_running(command: list[str]) -> bool:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=PROBE_DEADLINE_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _run(command: list[str], name: str) -> None:
    try:
        subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=INSTALL_DEADLINE_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        last = (error.stdout.strip() or "pip failed").splitlines()[-1]
        raise UnavailableError(f"{name} cannot be installed: {last}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{name} cannot be installed: {error}") from error
