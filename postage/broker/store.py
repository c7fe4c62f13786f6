# SPDX-License-Identifier: MIT
"""What is durable, on disk: a file of SQLite that outlives a broker, also one that was killed.

AMQP 0-9-1 asks that durable exchanges, durable queues and persistent messages survive a
restart (sections 3.1.2, 3.1.3 and 4.6); RabbitMQ's publisher confirms promise it. Here is the
way to the disk and back. What is durable, and when somebody is told so, is decided elsewhere.

The broker's thread records changes, which costs no I/O, and asks for a `Store.sync`. One
thread of the store writes what was recorded, and while it does, the next changes gather.
All that was recorded between two syncs is written in one transaction, so of a dead lettering
either both halves are on disk or none.

When writing fails, for a full disk for example, then the file stays as it was before, who
waits gets the error, and the changes are kept and written with those of the next sync. So an
error means "not on disk, but perhaps later": it is the negative confirm of AMQP, not a promise
that the message is gone. After a crash meanwhile the file holds all of the failed changes
or none; it never holds later changes without them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from postage.broker.errors import BrokerError

logger = logging.getLogger(__name__)

#: Called when all that was recorded is on disk, or with the error.
Done = Callable[[Exception | None], None]

#: A row of the table of messages, and the queue and position of one.
_Row = tuple[int, int, bytes, bytes, bytes, bytes, float | None, int]
_Place = tuple[int, int]

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
#: Seconds that `close` waits for the last write.
CLOSE_TIMEOUT_SECONDS = 60.0

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

_PUT_VHOST = "INSERT OR REPLACE INTO vhosts VALUES (?)"
_DROP_VHOST = (
    "DELETE FROM messages WHERE queue IN (SELECT id FROM queues WHERE vhost = ?)",
    "DELETE FROM bindings WHERE vhost = ?",
    "DELETE FROM queues WHERE vhost = ?",
    "DELETE FROM exchanges WHERE vhost = ?",
    "DELETE FROM vhosts WHERE name = ?",
)
_PUT_EXCHANGE = "INSERT OR REPLACE INTO exchanges VALUES (?, ?, ?, ?, ?, ?)"
_DROP_EXCHANGE = "DELETE FROM exchanges WHERE vhost = ? AND name = ?"
_DROP_BINDINGS_OF = "DELETE FROM bindings WHERE vhost = ? AND source = ?"
_PUT_QUEUE = "INSERT OR REPLACE INTO queues VALUES (?, ?, ?, ?, ?)"
_DROP_QUEUE = "DELETE FROM queues WHERE id = ?"
_DROP_MESSAGES_OF = "DELETE FROM messages WHERE queue = ?"
_PUT_BINDING = "INSERT OR REPLACE INTO bindings VALUES (?, ?, ?, ?, ?, ?)"
_DROP_BINDING = (
    "DELETE FROM bindings WHERE vhost = ? AND source = ? AND to_exchange = ?"
    " AND destination = ? AND key = ? AND arguments = ?"
)
_DROP_BINDINGS_TO = "DELETE FROM bindings WHERE vhost = ? AND to_exchange = ? AND destination = ?"

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


class Store:
    """A file that keeps what is durable, for one broker at a time.

    `load` is called first, and all else from one thread only. Changes may be recorded that
    change nothing: what belongs to a queue that was dropped is forgotten with it.

    Args:
        path: the file, which is made if it is missing. Its folder must exist.

    Raises:
        StoreError: Another broker uses the file, it is no store, it is damaged, it belongs to
            a later version, or it cannot be read and written.
    """

    def __init__(self, path: str | Path) -> None:
        self._closed = True
        # The absolute path also keeps SQLite from reading more into a name, such as ":memory:".
        self.path = Path(os.path.abspath(path))
        with _errors_of(self.path):
            connection = _open(self.path)
        try:
            with _errors_of(self.path):
                queues = _queues(connection)
        except StoreError:
            connection.close()
            raise
        self._batch = _Batch()
        self._places = {queue.id: (_wire(queue.vhost), _wire(queue.name)) for queue in queues}
        self._ids = {place: id_ for id_, place in self._places.items()}
        self._next_id = max(self._places, default=0) + 1
        self._writer = _Writer(self.path, connection)
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"open, {len(self._batch)} changes not synced"
        return f"<Store {self.path} [{state}]>"

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            self._writer.stop()  # first: where warnings are errors, the next line is the last
            warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=2)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was recorded since the last sync.

        That one may still be under way, or may have failed.
        """
        return not self._batch

    def load(self) -> Stored:
        """Return what is on disk, the messages in the order of their queues and positions.

        Raises:
            StoreError: The file is damaged, or the store is closed.
        """
        self._check_open()
        return self._writer.load()

    # Recording

    def put_vhost(self, name: str) -> None:
        """Keep a virtual host."""
        self._batch.change(_PUT_VHOST, _wire(name))

    def drop_vhost(self, name: str) -> None:
        """Forget a virtual host, with all that is in it."""
        vhost = _wire(name)
        for statement in _DROP_VHOST:
            self._batch.change(statement, vhost)
        for id_ in [id_ for id_, place in self._places.items() if place[0] == vhost]:
            self._forget_queue(id_)

    def put_exchange(self, exchange: StoredExchange) -> None:
        """Keep an exchange, or what is new about it."""
        self._batch.change(
            _PUT_EXCHANGE,
            _wire(exchange.vhost),
            _wire(exchange.name),
            _wire(exchange.type),
            exchange.auto_delete,
            exchange.internal,
            exchange.arguments,
        )

    def drop_exchange(self, vhost: str, name: str) -> None:
        """Forget an exchange, with its bindings in both directions."""
        place = (_wire(vhost), _wire(name))
        self._batch.change(_DROP_EXCHANGE, *place)
        self._batch.change(_DROP_BINDINGS_OF, *place)
        self._batch.change(_DROP_BINDINGS_TO, place[0], True, place[1])

    def put_queue(self, queue: StoredQueue) -> int:
        """Keep a queue, or what is new about it, and return its number.

        Numbers are not used again while the store is open.
        """
        place = (_wire(queue.vhost), _wire(queue.name))
        id_ = self._ids.get(place)
        if id_ is None:
            id_ = self._next_id
            self._next_id += 1
            self._ids[place] = id_
            self._places[id_] = place
        self._batch.change(_PUT_QUEUE, id_, *place, queue.auto_delete, queue.arguments)
        return id_

    def drop_queue(self, queue_id: int) -> None:
        """Forget a queue, with its messages and bindings."""
        place = self._places.get(queue_id)
        if place is None:  # its virtual host went first
            return
        self._batch.change(_DROP_QUEUE, queue_id)
        self._batch.change(_DROP_MESSAGES_OF, queue_id)
        self._batch.change(_DROP_BINDINGS_TO, place[0], False, place[1])
        self._forget_queue(queue_id)

    def _forget_queue(self, id_: int) -> None:
        self._batch.dropped_queues.add(id_)
        del self._ids[self._places.pop(id_)]

    def put_binding(self, binding: StoredBinding) -> None:
        """Keep a binding."""
        self._batch.change(_PUT_BINDING, *_binding_row(binding))

    def drop_binding(self, binding: StoredBinding) -> None:
        """Forget the binding that is equal to this one."""
        self._batch.change(_DROP_BINDING, *_binding_row(binding))

    def put_message(self, queue_id: int, position: int, message: StoredMessage) -> None:
        """Keep a message of a queue. A position is used once in the life of a queue."""
        if queue_id in self._places:
            self._batch.puts[queue_id, position] = (
                queue_id,
                position,
                _wire(message.exchange),
                _wire(message.routing_key),
                message.properties,
                message.body,
                message.expires,
                message.delivery_count,
            )

    def drop_message(self, queue_id: int, position: int) -> None:
        """Forget a message. One that was put since the last sync is never written."""
        self._batch.drop((queue_id, position))

    def count_delivery(self, queue_id: int, position: int, count: int) -> None:
        """Keep how often a message was delivered."""
        self._batch.counts[queue_id, position] = count

    # Writing

    def sync(self, done: Done) -> None:
        """Have written what was recorded, and what an earlier sync could not write.

        Args:
            done: called in the store's thread, with None once all is on disk, or with the
                `StoreError`. Then the changes are kept, and written with the next sync.

        Raises:
            StoreError: The store is closed.
        """
        self._check_open()
        batch, self._batch = self._batch, _Batch()
        self._writer.write(batch, done)

    def close(self, timeout: float = CLOSE_TIMEOUT_SECONDS) -> None:
        """Write all that was recorded, and close the file. What is recorded later is forgotten.

        Raises:
            StoreError: Something could not be written, and is lost now; or it is still being
                written after so many seconds.
        """
        if self._closed:
            return
        errors: list[Exception | None] = []
        self.sync(errors.append)
        self._closed = True
        self._writer.stop()
        if not self._writer.join(timeout):
            raise StoreError(
                self.path,
                f"is still written to after {timeout:g} s",
                "what is not written when the process ends is lost",
            )
        if errors != [None]:
            raise StoreError(
                self.path,
                "could not be written to before it was closed",
                "what was not confirmed is lost",
            ) from errors[0]

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(self.path, "is closed", "open it again")


class _Batch:
    """Changes that are written together: those of the topology first, then messages."""

    def __init__(self) -> None:
        self.topology: list[tuple[str, tuple[Any, ...]]] = []
        self.dropped_queues: set[int] = set()
        self.drops: set[_Place] = set()
        self.puts: dict[_Place, _Row] = {}
        self.counts: dict[_Place, int] = {}

    def __len__(self) -> int:
        return len(self.topology) + len(self.drops) + len(self.puts) + len(self.counts)

    def change(self, statement: str, *parameters: Any) -> None:
        self.topology.append((statement, parameters))

    def drop(self, place: _Place) -> None:
        if self.puts.pop(place, None) is None:
            self.drops.add(place)
        if self.counts:
            self.counts.pop(place, None)

    def absorb(self, later: _Batch) -> None:
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


class _Writer:
    """The connection and the thread that writes.

    It is a daemon: a program that forgets to close its store must end all the same. What is
    then not written was not confirmed, and a write that is cut off is as if it had not begun.
    It knows nothing of the `Store`, so that one that was dropped can be told.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._connection_lock = threading.Lock()
        self._changed = threading.Condition()
        self._next = _Batch()
        self._waiting: list[Done] = []
        self._stopping = False
        self._failed: _Batch | None = None
        self._thread = threading.Thread(target=self._run, name=f"store {path.name}", daemon=True)
        self._thread.start()

    def load(self) -> Stored:
        with self._connection_lock, _errors_of(self._path):
            return _load(self._path, self._connection)

    def write(self, batch: _Batch, done: Done) -> None:
        with self._changed:
            if self._next:
                self._next.absorb(batch)
            else:
                self._next = batch
            self._waiting.append(done)
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._write_next():
                pass
            self._checkpoint()
        finally:
            self._connection.close()

    def _write_next(self) -> bool:
        """Wait for a sync and do it. Return False if no more will come."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if not self._waiting:
                return False
            batch, self._next = self._next, _Batch()
            waiting, self._waiting = self._waiting, []
        error = self._try(batch)
        for done in waiting:
            try:
                done(error)
            except Exception:  # the others wait, too
                logger.exception("the store %s: who waited for it failed", self._path)
        return True

    def _try(self, batch: _Batch) -> StoreError | None:
        """Write a batch, and what failed before. If it fails, keep it."""
        failed, self._failed = self._failed, None
        if failed is not None:
            failed.absorb(batch)
            batch = failed
        try:
            with self._connection_lock:
                _write(self._connection, batch)
        except Exception as error:
            self._failed = batch
            if failed is None:
                logger.error("the store %s cannot be written: %s", self._path, error)
            result = StoreError(
                self._path,
                f"cannot be written: {error}",
                "free some space, or see to its disk; the changes are kept and tried again",
            )
            result.__cause__ = error
            return result
        if failed is not None:
            logger.warning("the store %s is written again", self._path)
        return None

    def _checkpoint(self) -> None:
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            # Nothing is lost: what is in the log is read from there when the file is opened.
            logger.warning("the store %s keeps its log: %s", self._path, error)


def _wire(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _name(wire: bytes) -> str:
    return wire.decode("utf-8", "surrogateescape")


def _binding_row(binding: StoredBinding) -> tuple[bytes, bytes, bool, bytes, bytes, bytes]:
    return (
        _wire(binding.vhost),
        _wire(binding.source),
        binding.to_exchange,
        _wire(binding.destination),
        _wire(binding.key),
        binding.arguments,
    )


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
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


def _open(path: Path) -> sqlite3.Connection:
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


def _write(connection: sqlite3.Connection, batch: _Batch) -> None:
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


def _put_messages(connection: sqlite3.Connection, rows: Iterable[_Row]) -> None:
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


def _drop_messages(connection: sqlite3.Connection, places: Iterable[_Place]) -> None:
    for chunk in _chunks(places):
        connection.execute(_DROP_MESSAGES.format(_lists(len(chunk), 2)), _flat(chunk))


def _count_deliveries(connection: sqlite3.Connection, counts: dict[_Place, int]) -> None:
    places: dict[int, list[_Place]] = {}
    for place, count in counts.items():
        places.setdefault(count, []).append(place)
    for count in places:
        for chunk in _chunks(places[count]):
            statement = _COUNT_DELIVERIES.format(_lists(len(chunk), 2))
            connection.execute(statement, [count, *_flat(chunk)])


def _chunks(places: Iterable[_Place]) -> Iterator[list[_Place]]:
    rest = iter(places)
    while chunk := list(itertools.islice(rest, _CHUNK_ROWS)):
        yield chunk


def _flat(places: list[_Place]) -> list[int]:
    return [*itertools.chain.from_iterable(places)]


def _lists(number: int, width: int) -> str:
    """Return placeholders, such as ``(?, ?), (?, ?)``."""
    return ", ".join([f"({', '.join('?' * width)})"] * number)


def _queues(connection: sqlite3.Connection) -> list[StoredQueue]:
    return [
        StoredQueue(_name(vhost), _name(name), bool(auto_delete), arguments, int(id_))
        for id_, vhost, name, auto_delete, arguments in connection.execute(
            "SELECT id, vhost, name, auto_delete, arguments FROM queues ORDER BY id"
        )
    ]


def _load(path: Path, connection: sqlite3.Connection) -> Stored:
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
        queues=_queues(connection),
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
