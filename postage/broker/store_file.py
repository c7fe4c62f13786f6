# SPDX-License-Identifier: MIT
"""The file of a store: its tables, what is read from it, and what a batch of changes writes.

Names are the bytes of the wire, and arguments are encoded tables: the file knows nothing of
what they mean.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from postage.broker.errors import BrokerError

#: A row of the table of messages, and the queue and position of one.
Row = tuple[int, int, bytes, bytes, bytes, bytes, float | None, int]
Place = tuple[int, int]

#: "PTBR": in the header of SQLite's files stands which application one belongs to.
_APPLICATION_ID = 0x50544252
#: The version of the tables. A file of a later one is refused.
_VERSION = 1

#: Bytes of a page. With 16 KiB, SQLite wrote small bodies 1.5 times and large ones twice as fast
#: as with its 4 KiB; a single commit took as long.
_PAGE_BYTES = 16_384
#: Bytes that the write-ahead log may keep when it begins anew; a large batch makes it longer.
_LOG_BYTES = 64 * 1024 * 1024
#: Seconds to wait for a broker that is about to close the same file.
_LOCK_TIMEOUT_SECONDS = 1.0

#: Rows in one statement. After each statement SQLite's module has to get the interpreter's lock
#: back, and a busy broker holds that for 5 ms: with one row a statement it writes 700 rows/s
#: beside a busy thread, with 500 it writes 50,000. They need 4,000 variables; before 3.32 SQLite
#: allows 999.
_CHUNK_ROWS = 500 if sqlite3.sqlite_version_info >= (3, 32) else 120
#: Bytes of the bodies in one statement, since SQLite copies them first.
_CHUNK_BYTES = 1024 * 1024
#: Statements that SQLite keeps prepared: those of chunks are large, and of many lengths.
_CACHED_STATEMENTS = 32

# Names are the bytes of the wire, since AMQP lets them be no UTF-8. Nothing here can fail for a
# reason that lasts, such as a constraint: a batch that cannot be written holds up all others.
_TABLES = (
    "CREATE TABLE vhosts (name BLOB PRIMARY KEY NOT NULL) WITHOUT ROWID",
    "CREATE TABLE exchanges (vhost BLOB NOT NULL, name BLOB NOT NULL, type BLOB NOT NULL,"
    " auto_delete INTEGER NOT NULL, internal INTEGER NOT NULL, arguments BLOB NOT NULL,"
    " PRIMARY KEY (vhost, name)) WITHOUT ROWID",
    "CREATE TABLE queues (id INTEGER PRIMARY KEY NOT NULL, vhost BLOB NOT NULL,"
    " name BLOB NOT NULL, auto_delete INTEGER NOT NULL, arguments BLOB NOT NULL)",
    "CREATE TABLE bindings (vhost BLOB NOT NULL, source BLOB NOT NULL,"
    " to_exchange INTEGER NOT NULL, destination BLOB NOT NULL, key BLOB NOT NULL,"
    " arguments BLOB NOT NULL,"
    " PRIMARY KEY (vhost, source, to_exchange, destination, key, arguments)) WITHOUT ROWID",
    "CREATE INDEX bindings_by_destination ON bindings (vhost, to_exchange, destination)",
    "CREATE TABLE messages (queue INTEGER NOT NULL, position INTEGER NOT NULL,"
    " exchange BLOB NOT NULL, routing_key BLOB NOT NULL, properties BLOB NOT NULL,"
    " body BLOB NOT NULL, expires REAL, delivery_count INTEGER NOT NULL,"
    " PRIMARY KEY (queue, position))",
)

PUT_VHOST = "INSERT OR REPLACE INTO vhosts VALUES (?)"
DROP_VHOST = (
    "DELETE FROM messages WHERE queue IN (SELECT id FROM queues WHERE vhost = ?)",
    "DELETE FROM bindings WHERE vhost = ?",
    "DELETE FROM queues WHERE vhost = ?",
    "DELETE FROM exchanges WHERE vhost = ?",
    "DELETE FROM vhosts WHERE name = ?",
)
PUT_EXCHANGE = "INSERT OR REPLACE INTO exchanges VALUES (?, ?, ?, ?, ?, ?)"
DROP_EXCHANGE = "DELETE FROM exchanges WHERE vhost = ? AND name = ?"
DROP_BINDINGS_OF = "DELETE FROM bindings WHERE vhost = ? AND source = ?"
PUT_QUEUE = "INSERT OR REPLACE INTO queues VALUES (?, ?, ?, ?, ?)"
DROP_QUEUE = "DELETE FROM queues WHERE id = ?"
DROP_MESSAGES_OF = "DELETE FROM messages WHERE queue = ?"
PUT_BINDING = "INSERT OR REPLACE INTO bindings VALUES (?, ?, ?, ?, ?, ?)"
DROP_BINDING = (
    "DELETE FROM bindings WHERE vhost = ? AND source = ? AND to_exchange = ?"
    " AND destination = ? AND key = ? AND arguments = ?"
)
DROP_BINDINGS_TO = "DELETE FROM bindings WHERE vhost = ? AND to_exchange = ? AND destination = ?"

_PUT_MESSAGES = "INSERT OR REPLACE INTO messages VALUES "
#: With a plain list of pairs SQLite would read the whole table.
_AT_PLACES = (
    " WHERE rowid IN (WITH place (queue, position) AS (VALUES {}) SELECT messages.rowid"
    " FROM place CROSS JOIN messages ON messages.queue = place.queue"
    " AND messages.position = place.position)"
)
_DROP_MESSAGES = "DELETE FROM messages" + _AT_PLACES
_COUNT_DELIVERIES = "UPDATE messages SET delivery_count = ?" + _AT_PLACES


class StoreError(BrokerError):
    """Raised when the file cannot be used. It names the file, the reason, and what to do.

    Args:
        path: the file.
        reason: what went wrong.
        remedy: what to do about it.
    """

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"the store {path} {reason}; {remedy}")
        self.path = path
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class StoredExchange:
    """A durable exchange. Its arguments are an encoded table."""

    vhost: str
    name: str
    type: str
    auto_delete: bool
    internal: bool
    arguments: bytes


@dataclass(frozen=True)
class StoredQueue:
    """A durable queue. Its arguments are an encoded table; the store gives it its number."""

    vhost: str
    name: str
    auto_delete: bool
    arguments: bytes
    id: int = field(default=0, compare=False)


@dataclass(frozen=True)
class StoredBinding:
    """A binding between what is durable. Its arguments are an encoded table."""

    vhost: str
    source: str
    to_exchange: bool
    destination: str
    key: str
    arguments: bytes


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A persistent message in a durable queue. `expires` is in seconds since the epoch."""

    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    expires: float | None
    delivery_count: int


@dataclass(frozen=True)
class Stored:
    """All that is on disk. A message comes with its queue's number and its position."""

    vhosts: list[str]
    exchanges: list[StoredExchange]
    queues: list[StoredQueue]
    bindings: list[StoredBinding]
    messages: list[tuple[int, int, StoredMessage]]


class Batch:
    """Changes that are written together: those of the topology first, then messages."""

    def __init__(self) -> None:
        self.topology: list[tuple[str, tuple[Any, ...]]] = []
        self.dropped_queues: set[int] = set()
        self.drops: set[Place] = set()
        self.puts: dict[Place, Row] = {}
        self.counts: dict[Place, int] = {}

    def __len__(self) -> int:
        return len(self.topology) + len(self.drops) + len(self.puts) + len(self.counts)

    def change(self, statement: str, *parameters: Any) -> None:
        self.topology.append((statement, parameters))

    def drop(self, place: Place) -> None:
        if self.puts.pop(place, None) is None:
            self.drops.add(place)
        if self.counts:
            self.counts.pop(place, None)

    def absorb(self, later: Batch) -> None:
        """Add later changes to these, which may have been tried already."""
        self.topology += later.topology
        self.dropped_queues |= later.dropped_queues
        for place in later.drops:
            self.puts.pop(place, None)
            self.counts.pop(place, None)
        # Also those that were put here: an error of the last step does not tell whether they
        # are in the file.
        self.drops |= later.drops
        self.puts |= later.puts
        self.counts |= later.counts


def wire(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _name(wire: bytes) -> str:
    return wire.decode("utf-8", "surrogateescape")


def binding_row(binding: StoredBinding) -> tuple[bytes, bytes, bool, bytes, bytes, bytes]:
    return (
        wire(binding.vhost),
        wire(binding.source),
        binding.to_exchange,
        wire(binding.destination),
        wire(binding.key),
        binding.arguments,
    )


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Translate what SQLite raises while the file is opened or read."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise StoreError(
                path,
                "is in use by another broker",
                "stop that broker, or give this one a file of its own",
            ) from error
        raise StoreError(
            path,
            f"cannot be read and written: {error}",
            "the broker needs a file, in a folder, that it may both write to",
        ) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from error
    except (AttributeError, TypeError, UnicodeDecodeError) as error:
        # SQLite takes any type in any column, so a damaged byte can make text of a blob.
        raise _damaged(path, f"there is a value of a wrong type: {error}") from error


def _damaged(path: Path, reason: str) -> StoreError:
    return StoreError(
        path,
        f"is damaged, or no store at all: {reason}",
        "put back a copy of it, or move it away, with the files beside it that begin with its "
        "name, to begin with an empty one",
    )


def open_file(path: Path) -> sqlite3.Connection:
    """Open the file or make it, with its lock held. One that is not ours stays as it is."""
    if not os.path.isdir(path.parent):
        raise StoreError(
            path, "has no folder to be in", f"make {path.parent}, or name another place"
        )
    # SQLite says nothing better than "disk I/O error". It makes a log beside the file.
    for place in (path.parent, path):
        if place.exists() and not os.access(place, os.R_OK | os.W_OK):
            raise StoreError(
                path, f"needs to write to {place}", "let the broker's user read and write there"
            )
    connection = sqlite3.connect(
        path,
        timeout=_LOCK_TIMEOUT_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=_CACHED_STATEMENTS,
    )
    try:
        # From now on a lock, once taken, is held until the file is closed. The kernel takes
        # it from a process that is killed.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}").fetchall()  # if it is new
        connection.execute("BEGIN EXCLUSIVE")
        is_new = _check(path, connection)
        connection.execute("COMMIT")
        _configure(connection)
        if is_new:
            _make_tables(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(path: Path, connection: sqlite3.Connection) -> bool:
    """Return whether the file is new, and holds nothing.

    Raises:
        StoreError: It belongs to another application or to a later version.
    """
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not (application_id or version or tables):
        return True
    if application_id != _APPLICATION_ID:
        raise StoreError(
            path,
            "belongs to another application",
            "give the broker a file of its own; this one was not changed",
        )
    if version != _VERSION:
        raise StoreError(
            path,
            f"is of version {version}, and this is a broker for version {_VERSION}",
            "use the postage that wrote it, or another file; this one was not changed",
        )
    return False


def _configure(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    # A commit returns when the log is on the disk, not only with the kernel.
    connection.execute("PRAGMA synchronous = FULL").fetchall()
    connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}").fetchall()


def _make_tables(connection: sqlite3.Connection) -> None:
    with _transaction(connection):
        for statement in _TABLES:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}").fetchall()
        connection.execute(f"PRAGMA user_version = {_VERSION}").fetchall()


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # After some errors SQLite has rolled back already. An error of this one says nothing
        # that the first did not say.
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        raise


def write(connection: sqlite3.Connection, batch: Batch) -> None:
    """Write a batch, or nothing of it. It may be written twice: the result is the same."""
    if not batch:
        return
    with _transaction(connection):
        for statement, parameters in batch.topology:
            connection.execute(statement, parameters)
        _drop_messages(connection, batch.drops)
        gone = batch.dropped_queues
        _put_messages(connection, (row for row in batch.puts.values() if row[0] not in gone))
        _count_deliveries(connection, batch.counts)


def _put_messages(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    values: list[Any] = []
    number = size = 0
    for row in rows:
        values += row
        number += 1
        size += len(row[5])
        if number == _CHUNK_ROWS or size >= _CHUNK_BYTES:
            connection.execute(_PUT_MESSAGES + _lists(number, 8), values)
            values = []
            number = size = 0
    if number:
        connection.execute(_PUT_MESSAGES + _lists(number, 8), values)


def _drop_messages(connection: sqlite3.Connection, places: Iterable[Place]) -> None:
    for chunk in _chunks(places):
        connection.execute(_DROP_MESSAGES.format(_lists(len(chunk), 2)), _flat(chunk))


def _count_deliveries(connection: sqlite3.Connection, counts: dict[Place, int]) -> None:
    places: dict[int, list[Place]] = {}
    for place, count in counts.items():
        places.setdefault(count, []).append(place)
    for count in places:
        for chunk in _chunks(places[count]):
            statement = _COUNT_DELIVERIES.format(_lists(len(chunk), 2))
            connection.execute(statement, [count, *_flat(chunk)])


def _chunks(places: Iterable[Place]) -> Iterator[list[Place]]:
    rest = iter(places)
    while chunk := list(itertools.islice(rest, _CHUNK_ROWS)):
        yield chunk


def _flat(places: list[Place]) -> list[int]:
    return [*itertools.chain.from_iterable(places)]


def _lists(number: int, width: int) -> str:
    """Return placeholders, such as ``(?, ?), (?, ?)``."""
    return ", ".join([f"({', '.join('?' * width)})"] * number)


def read_queues(connection: sqlite3.Connection) -> list[StoredQueue]:
    return [
        StoredQueue(_name(vhost), _name(name), bool(auto_delete), arguments, int(id_))
        for id_, vhost, name, auto_delete, arguments in connection.execute(
            "SELECT id, vhost, name, auto_delete, arguments FROM queues ORDER BY id"
        )
    ]


def load(path: Path, connection: sqlite3.Connection) -> Stored:
    (complaint,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if complaint != "ok":
        raise _damaged(path, " ".join(complaint.split()))
    return Stored(
        vhosts=[_name(name) for (name,) in connection.execute("SELECT name FROM vhosts")],
        exchanges=[
            StoredExchange(_name(vhost), _name(name), _name(type_), bool(auto), bool(internal), raw)
            for vhost, name, type_, auto, internal, raw in connection.execute(
                "SELECT vhost, name, type, auto_delete, internal, arguments FROM exchanges"
            )
        ],
        queues=read_queues(connection),
        bindings=[
            StoredBinding(_name(vhost), _name(source), bool(to), _name(goal), _name(key), raw)
            for vhost, source, to, goal, key, raw in connection.execute(
                "SELECT vhost, source, to_exchange, destination, key, arguments FROM bindings"
            )
        ],
        messages=[
            (queue, position, StoredMessage(_name(exchange), _name(key), *rest))
            for queue, position, exchange, key, *rest in connection.execute(
                "SELECT queue, position, exchange, routing_key, properties, body, expires,"
                " delivery_count FROM messages ORDER BY queue, position"
            )
        ],
    )
