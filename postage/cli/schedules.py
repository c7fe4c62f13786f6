# SPDX-License-Identifier: MIT
"""List the scheduled messages that wait in the broker, and cancel them.

The broker is that of POSTAGE_URL and the other settings of the environment.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from postage.cli import safe

if TYPE_CHECKING:
    from postage.schedules import Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.set_defaults(action=None, parser=parser)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")

    def add(name: str, action: Callable[[argparse.Namespace], int], help: str) -> Any:
        added = actions.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        added.set_defaults(action=action)
        return added

    listing = add("list", _list, "list what waits, in the order in which it is due")
    listing.add_argument(
        "--json", action="store_true", help="write JSON, for other programs to read"
    )
    cancelling = add("cancel", _cancel, "cancel scheduled messages, unless it is too late")
    cancelling.add_argument("ids", nargs="+", metavar="ID", help="the id of a schedule")


def run(options: argparse.Namespace) -> int:
    """Do what is asked.

    Raises:
        PostageError: The broker refuses, or cannot be reached.
    """
    if options.action is None:
        options.parser.print_help(sys.stderr)
        return 2
    # What matters is in the errors; a queue that is not there is none.
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    code: int = options.action(options)
    return code


def _list(options: argparse.Namespace) -> int:
    from postage.schedules import pending

    entries = pending()
    if options.json:
        print(json.dumps([entry.as_dict() for entry in entries], indent=2))
        return 0
    for entry in entries:
        print(_row(entry))
    if not entries:
        print("nothing is scheduled")
    return 0


def _row(entry: Entry) -> str:
    goal = (
        f"queue {entry.queue}"
        if entry.exchange is None
        else f"exchange {entry.exchange} key {entry.key}"
    )
    due = entry.due.isoformat(timespec="seconds")
    what = f"{entry.type} {entry.name}" if entry.type else "no message of postage"
    return safe(f"{entry.id}  {due}  {goal}  {what}")


def _cancel(options: argparse.Namespace) -> int:
    from postage.errors import ConfigurationError, MessageNotFoundError
    from postage.producer import GenericProducer

    code = 0
    with GenericProducer() as producer:
        for id in dict.fromkeys(options.ids):
            try:
                producer.cancel_schedule(id)
            except ConfigurationError as error:
                print(safe(f"postage schedules: {error}"), file=sys.stderr)
                code = 2
            except MessageNotFoundError as error:
                print(f"postage schedules: {error}", file=sys.stderr)
                code = code or 1
            else:
                print(f"cancelled {id}")
    return code
