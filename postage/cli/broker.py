# SPDX-License-Identifier: MIT
"""Run a broker for development and tests, with nothing else installed.

It speaks AMQP 0-9-1 as RabbitMQ does, in the foreground, until Ctrl-C. Only programs of this
machine reach it, unless --host says otherwise. Production belongs on RabbitMQ.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from postage.cli import CommandError

if TYPE_CHECKING:
    from postage.broker import Broker

#: The registered port of AMQP, where postage looks if it is not told otherwise.
PORT = 5672

GUEST = ("guest", "guest")

#: The options that help, by the end of what the broker says.
WAYS_OUT = {
    "choose another port": "--port NUMBER",
    "password is not guest": "--user NAME:PASSWORD or --users FILE",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen on; another one than that of this machine itself needs users "
        "with passwords of their own (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=PORT,
        help="the port, 0 for one that is free (default: %(default)s)",
    )
    parser.add_argument(
        "--store",
        type=Path,
        metavar="FILE",
        help="keep what is durable in this file (default: it ends with the broker)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse what RabbitMQ 4.3 refuses: queues that are neither durable nor exclusive, "
        "and a prefetch for a whole channel",
    )
    parser.add_argument(
        "--user",
        type=_user,
        action="append",
        default=[],
        metavar="NAME:PASSWORD",
        dest="users",
        help="a user, who may do everything; repeat for more (default: guest:guest). Other users "
        "of this machine can see it in the list of processes",
    )
    parser.add_argument(
        "--users",
        type=Path,
        metavar="FILE",
        dest="users_file",
        help="a file with such users, one a line",
    )


def run(options: argparse.Namespace) -> int:
    """Run the broker until a signal ends it.

    Raises:
        CommandError: It cannot listen, its store cannot be used, or its users make no sense.
    """
    from postage.broker import Broker, BrokerError

    users = _users(options)
    try:
        broker = Broker(
            options.host,
            options.port,
            users=dict(users),
            strict=options.strict,
            store=options.store,
        )
        with _signals() as wait, broker:
            print(_greeting(broker, users[0], options), flush=True)
            wait()
    except BrokerError as error:
        raise CommandError(f"{error}{_way_out(str(error))}") from None
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("it must be a whole number from 0 to 65535")
    return int(text)


def _user(text: str) -> tuple[str, str]:
    """Read a user. The text of an error is without the password."""
    name, _, password = text.partition(":")
    if not name or not password:
        raise argparse.ArgumentTypeError("it must be of the form NAME:PASSWORD")
    return name, password


def _users(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the users of the command line, then those of the file; guest, if there are none."""
    users = [*options.users, *_read_users(options.users_file)] or [GUEST]
    names = [name for name, _ in users]
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"the user {name!r} is given twice", exit_code=2)
    return users


def _read_users(path: Path | None) -> list[tuple[str, str]]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise CommandError(f"the users cannot be read from {path} ({reason})") from None
    users = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            users.append(_user(line.strip()))
        except argparse.ArgumentTypeError as error:
            raise CommandError(f"{path}, line {number}: {error}", exit_code=2) from None
    if not users:
        raise CommandError(f"{path} names no user; write NAME:PASSWORD, one a line", exit_code=2)
    return users


def _greeting(broker: Broker, user: tuple[str, str], options: argparse.Namespace) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    login = "guest:guest" if user == GUEST else quote(user[0], safe="")
    kept = f"; what is durable is kept in {options.store}" if options.store else ""
    return (
        f"listening on amqp://{login}@{host}:{broker.port}/%2F "
        f"(a broker for development: production belongs on RabbitMQ{kept})"
    )


def _way_out(text: str) -> str:
    ways = [f" ({option})" for end, option in WAYS_OUT.items() if text.endswith(end)]
    return "".join(ways)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Let SIGINT and SIGTERM wait until they are asked for; the second one ends the process.

    They are blocked before the broker starts its thread, which inherits that: a signal can
    neither strike between two lines nor be handled elsewhere.
    """
    chosen = [
        each
        for each in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(each) is not signal.SIG_IGN  # a shell does so for its background
    ]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, chosen)
    handlers = [(each, signal.getsignal(each)) for each in chosen]

    def wait() -> None:
        signal.sigwait(chosen)
        for each in chosen:
            signal.signal(each, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield wait
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for each, handler in handlers:
            signal.signal(each, handler)
