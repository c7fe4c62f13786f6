# SPDX-License-Identifier: MIT
"""Child processes: what is measured runs alone, and so does the service that it calls."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

#: Not forked: a child shall find neither connections nor threads of this process.
_SPAWN = multiprocessing.get_context("spawn")
#: Seconds that a measurement, or the start of a service, may take on a very busy machine.
DEADLINE_SECONDS = 120.0


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, and return what it returns.

    Raises:
        RuntimeError: It raised, which its process has printed, or took too long.
    """
    with _child(_send_result, function, arguments) as results:
        return _receive(results, function)


@contextlib.contextmanager
def service(function: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """Run a service in a process of its own while the block runs.

    Args:
        function: Takes a function, which it calls when it is ready, and the arguments. It may
            run for ever.
        *arguments: Further arguments for it.

    Raises:
        RuntimeError: It ended, or did not get ready in time.
    """
    with _child(_serve, function, arguments) as results:
        _receive(results, function)
        yield


@contextlib.contextmanager
def _child(main: Callable[..., Any], *arguments: Any) -> Iterator[Connection]:
    receiver, sender = _SPAWN.Pipe(duplex=False)
    child = _SPAWN.Process(target=main, args=(sender, *arguments), daemon=True)
    child.start()
    sender.close()
    try:
        yield receiver
    finally:
        receiver.close()
        child.kill()
        child.join()


def _receive(results: Connection, function: Callable[..., Any]) -> Any:
    try:
        if results.poll(DEADLINE_SECONDS):
            return results.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed; its process has said why") from None
    raise RuntimeError(f"{function.__name__} took more than {DEADLINE_SECONDS:g} s")


def _send_result(
    results: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    results.send(function(*arguments))


def _serve(results: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    function(lambda: results.send(None), *arguments)
