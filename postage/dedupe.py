# SPDX-License-Identifier: MIT
"""Messages that a component has handled already, so that a repeated one is not handled again.

The broker delivers at least once: after a lost acknowledgement a message comes again. What a
handler did is known by the name of the handler and the id of the message. It is noted when
the handler has succeeded, before its message is acknowledged. So a crash in between, or two
instances that get both copies at the same time, still run it twice: what must never happen
twice belongs into one transaction with what it changes.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from postage.errors import ConfigurationError

logger = logging.getLogger(__name__)

#: Seconds that a process waits at most while another one writes to the same file.
BUSY_TIMEOUT = 10.0
#: Additions between two removals of what is too old.
SWEEP_EVERY = 1000


class Done(NamedTuple):
    """What is known of a message that was handled.

    Attributes:
        replies: The bodies of the replies, for an RPC call.
    """

    replies: tuple[bytes, ...] = ()


class Dedupe(Protocol):
    """Remembers what was handled. Called by the component's thread."""

    def get(self, handler: str, message_id: str) -> Done | None:
        """Return what is known of a message, or None."""

    def add(self, handler: str, message_id: str, done: Done) -> None:
        """Remember that a handler has handled a message."""

    def close(self) -> None:
        """Let go what it holds."""


class MemoryWindow:
    """The latest messages of one process, in memory. They are forgotten when it ends.

    Args:
        seconds: How long a message is remembered.
        size: How many are remembered at most, the latest ones.
        clock: Seconds, monotonic.

    Raises:
        ConfigurationError: One of them is not above 0.
    """

    def __init__(
        self,
        seconds: float = 3600.0,
        size: int = 100_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_above_0(seconds=seconds, size=size)
        self._seconds = seconds
        self._size = size
        self._clock = clock
        self._known: collections.OrderedDict[tuple[str, str], tuple[float, Done]] = (
            collections.OrderedDict()
        )

    def get(self, handler: str, message_id: str) -> Done | None:
        """Return what is known of a message, or None."""
        known = self._known.get((handler, message_id))
        if known is None or self._clock() - known[0] > self._seconds:
            return None
        return known[1]

    def add(self, handler: str, message_id: str, done: Done) -> None:
        """Remember that a handler has handled a message."""
        now, key = self._clock(), (handler, message_id)
        self._known.pop(key, None)  # to the end: the oldest are in front
        self._known[key] = (now, done)
        while self._known:
            at, _done = next(iter(self._known.values()))
            if len(self._known) <= self._size and now - at <= self._seconds:
                break
            self._known.popitem(last=False)

    def close(self) -> None:
        """Nothing is held."""


class SqliteWindow:
    """Messages in a file, which all processes of a host may share. It outlives them.

    Each addition is committed, and survives the death of the process. After that of the machine
    the last ones may be missing.

    Args:
        path: The file. Its folder must exist.
        seconds: How long a message is remembered.

    Raises:
        ConfigurationError: The file cannot be used, or `seconds` is not above 0.
    """

    def __init__(self, path: str | Path, seconds: float = 24 * 3600.0) -> None:
        _check_above_0(seconds=seconds)
        self._path = Path(path)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._additions = 0
        self._pid = 0
        self._connection: sqlite3.Connection | None = None
        with self._lock:
            self._open()

    def get(self, handler: str, message_id: str) -> Done | None:
        """Return what is known of a message, or None; None, too, if the file fails."""
        with self._lock, self._logged("looked up"):
            rows = self._open().execute(
                "SELECT reply FROM handled LEFT JOIN replies USING (handler, message_id) "
                "WHERE handler = ? AND message_id = ? AND at > ? ORDER BY number",
                (handler, message_id, time.time() - self._seconds),
            )
            found = [row[0] for row in rows]
            if found:
                return Done(tuple(each for each in found if each is not None))
        return None

    def add(self, handler: str, message_id: str, done: Done) -> None:
        """Remember that a handler has handled a message, if the file can be written."""
        with self._lock, self._logged("noted"), self._open() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO handled VALUES (?, ?, ?)",
                (handler, message_id, time.time()),
            )
            connection.execute(
                "DELETE FROM replies WHERE handler = ? AND message_id = ?", (handler, message_id)
            )
            connection.executemany(
                "INSERT INTO replies VALUES (?, ?, ?, ?)",
                [(handler, message_id, *each) for each in enumerate(done.replies)],
            )
            self._additions += 1
            if self._additions % SWEEP_EVERY == 1:
                self._forget_old(connection)

    def close(self) -> None:
        """Close the file. It is opened again if it is used again."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _logged(self, what: str) -> Iterator[None]:
        """Go on without the file if it fails: a message that comes twice beats one that is lost."""
        try:
            yield
        except (sqlite3.Error, ConfigurationError) as error:
            logger.error(
                "a handled message could not be %s in %s (%s): repeated ones may be handled again",
                what,
                self._path,
                error,
            )

    def _open(self) -> sqlite3.Connection:
        """Return the connection of this process: SQLite's must not be carried over a fork."""
        if self._connection is not None and self._pid == os.getpid():
            return self._connection
        try:
            connection = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT, check_same_thread=False
            )
            # A write-ahead log lets others read meanwhile, and needs no sync for each addition.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            with connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS handled (handler TEXT, message_id TEXT, at REAL, "
                    "PRIMARY KEY (handler, message_id)) WITHOUT ROWID"
                )
                connection.execute("CREATE INDEX IF NOT EXISTS handled_at ON handled (at)")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS replies (handler TEXT, message_id TEXT, "
                    "number INTEGER, reply BLOB, PRIMARY KEY (handler, message_id, number)) "
                    "WITHOUT ROWID"
                )
        except sqlite3.Error as error:
            raise ConfigurationError(
                f"the file of handled messages {self._path} cannot be used ({error}): "
                "name one that this program may write, on a disk with room"
            ) from error
        self._connection, self._pid = connection, os.getpid()
        return connection

    def _forget_old(self, connection: sqlite3.Connection) -> None:
        old = time.time() - self._seconds
        connection.execute(
            "DELETE FROM replies WHERE (handler, message_id) IN "
            "(SELECT handler, message_id FROM handled WHERE at <= ?)",
            (old,),
        )
        connection.execute("DELETE FROM handled WHERE at <= ?", (old,))


def _check_above_0(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigurationError(f"{name} of a window must be above 0, not {value!r}")
