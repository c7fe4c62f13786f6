# SPDX-License-Identifier: MIT
"""The command ``postage``. Each module here is one sub-command, found by its name.

Such a module has a docstring, the first line of which is its help, and two functions:
``add_arguments(parser)``, and ``run(options)``, which returns the exit code. It imports what it
needs when it runs, so that the help of all of them comes at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from postage import __version__
from postage.errors import PostageError

__all__ = ["CommandError", "main", "safe"]


class CommandError(Exception):
    """Raised by a command that cannot do what it shall; its text is all that is printed.

    Attributes:
        exit_code: 1 for a failure, 2 for wrong usage.
    """

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command, and return its exit code: 0 for success, 1 for failure, 2 for usage.

    Args:
        arguments: The words after ``postage``; by default those of this process.

    Raises:
        SystemExit: After the help, the version, or a message about wrong usage.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        code: int = options.command.run(options)
    except CommandError as error:
        return _fail(options, error, error.exit_code)
    except PostageError as error:
        return _fail(options, error, 1)
    return code


def safe(text: str) -> str:
    """Return a text without what a terminal would obey: it may come from anybody."""
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1]
        for character in text
    )


def commands() -> dict[str, ModuleType]:
    """Return the modules of the sub-commands, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="postage", description="Components on RabbitMQ.")
    parser.add_argument("--version", action="version", version=f"postage {__version__}")
    parser.set_defaults(command=None)
    chosen = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command_name")
    for name, module in commands().items():
        description = module.__doc__ or ""
        command = chosen.add_parser(
            name,
            help=description.partition("\n")[0].rstrip("."),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=module)
        module.add_arguments(command)
    return parser


def _fail(options: argparse.Namespace, error: Exception, code: int) -> int:
    print(f"postage {options.command_name}: {error}", file=sys.stderr)
    return code
