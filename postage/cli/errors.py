# SPDX-License-Identifier: MIT
"""Look at messages that could not be handled, and send them back.

They lie in error queues, such as orders.error for the queue orders. To list, to show and to
export them changes nothing. What goes to another queue is confirmed by the broker there before
it leaves the error queue. The broker is that of POSTAGE_URL.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from postage.cli import CommandError, safe
from postage.errors import PostageError

if TYPE_CHECKING:
    from postage.error_queues import ErrorQueue
    from postage.parking import Parked

#: Bytes of a body that is no text that are shown.
SHOWN_BYTES = 1024
#: Characters of the progress bar.
BAR_WIDTH = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.set_defaults(action=None, parser=parser)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")

    def add(name: str, action: Callable[[argparse.Namespace], int], help: str) -> Any:
        added = actions.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        added.set_defaults(action=action)
        added.add_argument(
            "--timeout",
            type=_seconds,
            default=30.0,
            metavar="SECONDS",
            help="how long the broker may take to answer (default: 30)",
        )
        return added

    listing = add("list", _list, "count the messages, by the queue and the exception")
    listing.add_argument(
        "queues",
        nargs="*",
        metavar="QUEUE.error",
        help="which error queues (default: all that components have announced)",
    )
    showing = add("show", _show, "show messages, with the traceback and the body")
    retrying = add("retry", _retry, "send messages back to the queues that they came from")
    editing = add("edit", _edit, "open the JSON of a message in $EDITOR, then send it back")
    moving = add("move", _move, "move messages to another queue, with what is said about them")
    exporting = add("export", _export, "write messages to a file, one a line; they stay")
    importing = add("import", _import, "put the messages of such a file into an error queue")
    purging = add("purge", _purge, "throw all messages of an error queue away, for good")

    for action in (showing, retrying, editing, moving, exporting, importing, purging):
        action.add_argument("queue", metavar="QUEUE.error", help="the error queue")
    moving.add_argument("target", metavar="TARGET", help="the queue that they go to")
    editing.add_argument("--id", required=True, dest="id", help="the id of the message")
    for action in (showing, retrying, moving, exporting):
        action.add_argument(
            "--id",
            action="append",
            dest="ids",
            metavar="ID",
            help="the id of a message; repeat for more (default: all)",
        )
    for action in (retrying, moving):
        action.add_argument("--exception", metavar="NAME", help="only those that failed with it")
    for action in (retrying, editing):
        action.add_argument(
            "--to",
            metavar="QUEUE",
            help="another queue; needed if nothing says where a message came from",
        )
    for action in (retrying, moving, purging):
        action.add_argument("--yes", action="store_true", help="do not ask")
    for action in (listing, showing):
        action.add_argument(
            "--json", action="store_true", help="write JSON, for other programs to read"
        )
    exporting.add_argument("file", metavar="FILE", help="a new file, or - for standard output")
    importing.add_argument("file", metavar="FILE", help="the file, or - for standard input")


def run(options: argparse.Namespace) -> int:
    """Do what is asked.

    Raises:
        CommandError: It cannot be done, or is not wanted.
        PostageError: The broker refuses, or cannot be reached.
    """
    if options.action is None:
        options.parser.print_help(sys.stderr)
        return 2
    logging.getLogger().setLevel(logging.ERROR)  # what matters is in the error that ends it
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    try:
        code: int = options.action(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise CommandError("interrupted; what was not confirmed is in its error queue") from None
    except BrokenPipeError:  # whoever reads has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


# ---------------------------------------------------------------------------- looking


def _list(options: argparse.Namespace) -> int:
    from postage.error_queues import known_error_queues
    from postage.errors import NOT_FOUND, ChannelClosedError

    names = options.queues or known_error_queues(timeout=options.timeout)
    found: list[dict[str, Any]] = []
    for name in names:
        try:
            with _opened(options, name) as queue:
                groups = [group.as_dict() for group in queue.summary()]
        except ChannelClosedError as error:
            if error.code != NOT_FOUND or options.queues:
                raise
            continue  # announced once, and deleted since
        messages = sum(group["messages"] for group in groups)
        found.append({"error_queue": name, "messages": messages, "groups": groups})
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for each in found:
        if each["messages"] or options.queues:
            print(f"{safe(each['error_queue'])}: {_messages(each['messages'])}")
            for group in each["groups"]:
                print(_row(group))
    if not options.queues and not any(each["messages"] for each in found):
        print(f"no messages in {len(found)} error queue(s)")
    return 0


def _row(group: dict[str, Any]) -> str:
    origin = f"from {group['queue']}" if group["queue"] else "from an unknown queue"
    what = group["exception"] or group["reason"] or "nothing says why"
    times = [each for each in (group["first_failure"], group["last_failure"]) if each]
    when = f"  ({' to '.join(dict.fromkeys(times))})" if times else ""
    return safe(f"  {group['messages']:6}  {origin}  {what}{when}")


def _show(options: argparse.Namespace) -> int:
    shown: set[str] = set()
    with _opened(options, options.queue, prints=True) as queue:
        for parked in queue:
            if options.ids is None or parked.id in options.ids:
                print(_json_of(parked) if options.json else _page_of(parked, first=not shown))
                shown.add(parked.id)
    missing = [id for id in options.ids or () if id not in shown]
    if missing:
        raise CommandError(f"there is no message {missing[0]!r} in {options.queue!r}")
    return 0


def _json_of(parked: Parked) -> str:
    from postage.portable import as_dict

    return json.dumps({**parked.record(), **as_dict(parked.properties, parked.body)})


def _page_of(parked: Parked, first: bool) -> str:
    """Return a message for people."""
    from postage.parking import clean_headers

    record = parked.record()
    error = record.pop("error")
    trace = record.pop("traceback")
    if parked.is_foreign:
        record["reason"] = "nothing says why it is here"
    lines = [
        f"{name.replace('_', ' '):14} {value}"
        for name, value in record.items()
        if value not in (None, "")
    ]
    if error and not trace:
        lines.append(f"{'error':14} {error}")
    for name, value in clean_headers(parked.properties.headers).items():
        lines.append(f"{'header':14} {name}: {value!r}")
    lines += ["", *trace.rstrip().splitlines()] if trace else []
    text = "\n".join([*lines, "", _pretty(parked.body)])
    return safe(text if first else f"\n{'-' * 72}\n{text}")


def _pretty(body: bytes) -> str:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        rows = [body[at : at + 16].hex(" ") for at in range(0, min(len(body), SHOWN_BYTES), 16)]
        rest = f"\n… {len(body)} bytes; export has all" if len(body) > SHOWN_BYTES else ""
        return "\n".join(rows) + rest
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


# ----------------------------------------------------------------------------- acting


def _retry(options: argparse.Namespace) -> int:
    with _opened(options, options.queue) as queue:
        _ask_if_all(options, queue, "Send", "back" if options.to is None else f"to {options.to}")
        number = queue.retry(options.ids, options.exception, options.to)
    print(f"{_messages(number)} went {'back' if options.to is None else f'to {options.to}'}")
    return 0


def _move(options: argparse.Namespace) -> int:
    with _opened(options, options.queue) as queue:
        _ask_if_all(options, queue, "Move", f"to {options.target}")
        number = queue.move(options.target, options.ids, options.exception)
    print(f"{_messages(number)} moved to {options.target}")
    return 0


def _edit(options: argparse.Namespace) -> int:
    with _opened(options, options.queue) as queue:
        parked = queue.get(options.id)
        if parked.queue is None and options.to is None:
            raise CommandError("nothing says which queue it came from: name one with --to", 2)
        with _edited(_text_of(parked)) as body:
            queue.edit(options.id, body=body, queue=options.to)
    print(f"the message went to {options.to or parked.queue}")
    return 0


def _text_of(parked: Parked) -> str:
    try:
        return json.dumps(json.loads(parked.body), indent=2, ensure_ascii=False) + "\n"
    except (ValueError, RecursionError):
        raise CommandError(
            f"the body of {parked.id!r} is no JSON: export it, edit the file, and import that"
        ) from None


@contextlib.contextmanager
def _edited(text: str) -> Iterator[bytes]:
    """Yield what becomes of a text in the editor. It is kept in a file until it is sent.

    Raises:
        CommandError: The editor failed, or what it left is no JSON, or cannot be sent.
    """
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    descriptor, name = tempfile.mkstemp(prefix="postage-", suffix=".json")
    path = Path(name)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    try:
        code = subprocess.run([*shlex.split(editor), name], check=False).returncode
        edited = path.read_bytes()
    except (OSError, ValueError) as error:
        path.unlink(missing_ok=True)
        raise CommandError(f"nothing was changed: the editor {editor!r}: {error}") from None
    if code != 0 or edited == text.encode():
        path.unlink()
        why = f"the editor ended with {code}" if code != 0 else "the text is as it was"
        raise CommandError(f"nothing was changed: {why}")
    try:
        json.loads(edited)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"nothing was changed: {name} is no JSON: {error}") from None
    try:
        yield edited.strip()
    except PostageError as error:
        raise CommandError(f"{error}; what was edited is in {name}") from None
    path.unlink()


def _export(options: argparse.Namespace) -> int:
    with _opened(options, options.queue, prints=options.file == "-") as queue:
        if options.file == "-":
            queue.export(sys.stdout, options.ids)
            return 0
        with _new_file(Path(options.file)) as file:
            number = queue.export(file, options.ids)
    print(f"{_messages(number)} written to {options.file}; they are in {options.queue} as well")
    return 0


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """Open a file that must be new, and leave none behind if what is written there fails."""
    try:
        file = open(path, "x", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}: name a new file") from None
    try:
        with file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _import(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        lines: Any = sys.stdin
        if options.file != "-":
            try:
                lines = stack.enter_context(open(options.file, encoding="utf-8"))
            except OSError as error:
                raise CommandError(f"{options.file}: {error.strerror}") from None
        queue = stack.enter_context(_opened(options, options.queue))
        try:
            number = queue.import_(lines)
        except UnicodeDecodeError as error:
            raise CommandError(
                f"{options.file} is no UTF-8: {error}; nothing was imported"
            ) from None
    print(f"{_messages(number)} put into {options.queue}")
    return 0


def _purge(options: argparse.Namespace) -> int:
    with _opened(options, options.queue) as queue:
        if not options.yes:
            _ask(f"Throw away {_messages(queue.count())} of {options.queue}, for good?")
        number = queue.purge()
    print(f"{_messages(number)} thrown away")
    return 0


# --------------------------------------------------------------------- with the person


def _ask_if_all(
    options: argparse.Namespace, queue: ErrorQueue, verb: str, direction: str
) -> None:
    if not (options.yes or options.ids or options.exception):
        _ask(f"{verb} all {_messages(queue.count())} of {options.queue} {direction}?")


def _ask(question: str) -> None:
    """Ask, and go on only after a yes.

    Raises:
        CommandError: The answer is another one, or there is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise CommandError(f"nobody is there to answer: {question} Say --yes", exit_code=2)
    try:
        answer = input(f"{safe(question)} [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was done")


@contextlib.contextmanager
def _opened(
    options: argparse.Namespace, name: str, prints: bool = False
) -> Iterator[ErrorQueue]:
    """Open an error queue whose progress is shown, if somebody looks and sees nothing else."""
    from postage.error_queues import ErrorQueue

    with ErrorQueue(name) as queue:
        queue.timeout = options.timeout
        if prints or not sys.stderr.isatty():
            yield queue
            return
        shown = ""

        def show(done: int, all: int) -> None:
            nonlocal shown
            width = BAR_WIDTH * done // max(all, 1)
            bar = f"\r[{'#' * width}{' ' * (BAR_WIDTH - width)}] {100 * done // max(all, 1):3}%"
            if bar != shown:
                shown = bar
                print(bar, end="", file=sys.stderr, flush=True)

        queue.on_progress = show
        try:
            yield queue
        finally:
            if shown:
                print(f"\r{' ' * len(shown)}\r", end="", file=sys.stderr, flush=True)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError("it must be a number of seconds, more than 0")
    return seconds


def _messages(number: int) -> str:
    return f"{number} message" if number == 1 else f"{number} messages"
