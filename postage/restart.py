# SPDX-License-Identifier: MIT
"""Replacing the program by a new run of itself, which rolls out new code.

The new run is the same process: same pid, same queues, so what is sent meanwhile waits for
it. It is told which message caused it. Should the broker deliver that message once more,
because its ack was lost, the new run does not restart again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from postage.transport import connection as connections

logger = logging.getLogger(__name__)

#: The variable that names the message which caused this run.
VARIABLE = "POSTAGE_RESTARTED"
#: What it says where that message had no id.
UNNAMED = "unnamed"

#: Files that the program begins with, beside its main file.
sources: list[str] = []

_cause: str | None = None


def cause() -> str | None:
    """Return the id of the message that this run is the answer to, or None.

    It is taken out of the environment, so that a child process does not take itself for
    a restarted one.
    """
    global _cause
    _cause = os.environ.pop(VARIABLE, None) or _cause
    return _cause


def command_line() -> list[str]:
    """Return how this program was started: interpreter, its options, program, arguments.

    `sys.orig_argv` keeps what 1.2.1 lost: ``-m package``, ``-X dev``, ``-W error``. The path
    of a script is made absolute, since the working directory may have changed.
    """
    arguments = list(sys.orig_argv[1:])
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None)
    position = len(arguments) - len(sys.argv)
    if (
        script is not None
        and getattr(main, "__spec__", None) is None
        and 0 <= position < len(arguments)
        and arguments[position] == sys.argv[0]
    ):
        arguments[position] = os.path.abspath(script)
    return [sys.executable, *arguments]


def obstacle() -> str | None:
    """Return why a new run would not even begin, or None.

    One broadcast reaches every instance. If the new code of the program cannot be compiled,
    all of them would end, so they stay with the old code instead.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)  # python -c has none
    for script in [*sources, *([main] if main else [])]:
        source = Path(script)
        if source.suffix == ".pyc" or not source.parent.is_dir() or hasattr(sys, "frozen"):
            continue  # compiled already, in an archive, or made into an executable
        try:
            compile(source.read_bytes(), script, "exec", dont_inherit=True)
        except (OSError, SyntaxError, ValueError) as error:
            return f"{script}: {error}"
    return None


def folder() -> str | None:
    """Return the folder that ``-m`` found this program in, if it was the working directory.

    The new run finds it there only, wherever the program has changed to since.
    """
    main = sys.modules.get("__main__")
    script, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if script is None or spec is None:
        return None
    root = str(Path(script).parents[spec.name.count(".")])
    return root if root in sys.path[:1] and Path(root).is_dir() else None  # not a zip file


def execute(message_id: str | None = None) -> NoReturn:
    """Close every connection, write out what is buffered, and become a new run.

    Args:
        message_id: Of the message that asked for it.

    Raises:
        OSError: The interpreter could not be started; this run goes on without connections.
    """
    connections.close_all()
    arguments = command_line()
    logger.info("restarting: %s", arguments)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or not there
            stream.flush()
    os.environ[VARIABLE] = message_id or UNNAMED
    os.chdir(folder() or os.curdir)
    os.execl(arguments[0], *arguments)
