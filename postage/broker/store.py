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

import logging
import os
import sqlite3
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from postage.broker import store_file
from postage.broker.store_file import (
    Batch,
    Stored,
    StoredBinding,
    StoredExchange,
    StoredMessage,
    StoredQueue,
    StoreError,
    errors_of,
    wire,
)

__all__ = [
    "CLOSE_TIMEOUT_SECONDS",
    "Store",
    "StoreError",
    "Stored",
    "StoredBinding",
    "StoredExchange",
    "StoredMessage",
    "StoredQueue",
]

logger = logging.getLogger(__name__)

#: Called when all that was recorded is on disk, or with the error.
Done = Callable[[Exception | None], None]

#: Seconds that `close` waits for the last write.
CLOSE_TIMEOUT_SECONDS = 60.0


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
        with errors_of(self.path):
            connection = store_file.open_file(self.path)
        try:
            with errors_of(self.path):
                queues = store_file.read_queues(connection)
        except StoreError:
            connection.close()
            raise
        self._batch = Batch()
        self._places = {queue.id: (wire(queue.vhost), wire(queue.name)) for queue in queues}
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
        self._batch.change(store_file.PUT_VHOST, wire(name))

    def drop_vhost(self, name: str) -> None:
        """Forget a virtual host, with all that is in it."""
        vhost = wire(name)
        for statement in store_file.DROP_VHOST:
            self._batch.change(statement, vhost)
        for id_ in [id_ for id_, place in self._places.items() if place[0] == vhost]:
            self._forget_queue(id_)

    def put_exchange(self, exchange: StoredExchange) -> None:
        """Keep an exchange, or what is new about it."""
        self._batch.change(
            store_file.PUT_EXCHANGE,
            wire(exchange.vhost),
            wire(exchange.name),
            wire(exchange.type),
            exchange.auto_delete,
            exchange.internal,
            exchange.arguments,
        )

    def drop_exchange(self, vhost: str, name: str) -> None:
        """Forget an exchange, with its bindings in both directions."""
        place = (wire(vhost), wire(name))
        self._batch.change(store_file.DROP_EXCHANGE, *place)
        self._batch.change(store_file.DROP_BINDINGS_OF, *place)
        self._batch.change(store_file.DROP_BINDINGS_TO, place[0], True, place[1])

    def put_queue(self, queue: StoredQueue) -> int:
        """Keep a queue, or what is new about it, and return its number.

        Numbers are not used again while the store is open.
        """
        place = (wire(queue.vhost), wire(queue.name))
        id_ = self._ids.get(place)
        if id_ is None:
            id_ = self._next_id
            self._next_id += 1
            self._ids[place] = id_
            self._places[id_] = place
        self._batch.change(store_file.PUT_QUEUE, id_, *place, queue.auto_delete, queue.arguments)
        return id_

    def drop_queue(self, queue_id: int) -> None:
        """Forget a queue, with its messages and bindings."""
        place = self._places.get(queue_id)
        if place is None:  # its virtual host went first
            return
        self._batch.change(store_file.DROP_QUEUE, queue_id)
        self._batch.change(store_file.DROP_MESSAGES_OF, queue_id)
        self._batch.change(store_file.DROP_BINDINGS_TO, place[0], False, place[1])
        self._forget_queue(queue_id)

    def _forget_queue(self, id_: int) -> None:
        self._batch.dropped_queues.add(id_)
        del self._ids[self._places.pop(id_)]

    def put_binding(self, binding: StoredBinding) -> None:
        """Keep a binding."""
        self._batch.change(store_file.PUT_BINDING, *store_file.binding_row(binding))

    def drop_binding(self, binding: StoredBinding) -> None:
        """Forget the binding that is equal to this one."""
        self._batch.change(store_file.DROP_BINDING, *store_file.binding_row(binding))

    def put_message(self, queue_id: int, position: int, message: StoredMessage) -> None:
        """Keep a message of a queue. A position is used once in the life of a queue."""
        if queue_id in self._places:
            self._batch.puts[queue_id, position] = (
                queue_id,
                position,
                wire(message.exchange),
                wire(message.routing_key),
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
        batch, self._batch = self._batch, Batch()
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
        self._next = Batch()
        self._waiting: list[Done] = []
        self._stopping = False
        self._failed: Batch | None = None
        self._thread = threading.Thread(target=self._run, name=f"store {path.name}", daemon=True)
        self._thread.start()

    def load(self) -> Stored:
        with self._connection_lock, errors_of(self._path):
            return store_file.load(self._path, self._connection)

    def write(self, batch: Batch, done: Done) -> None:
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
            batch, self._next = self._next, Batch()
            waiting, self._waiting = self._waiting, []
        error = self._try(batch)
        for done in waiting:
            try:
                done(error)
            except Exception:  # the others wait, too
                logger.exception("the store %s: who waited for it failed", self._path)
        return True

    def _try(self, batch: Batch) -> StoreError | None:
        """Write a batch, and what failed before. If it fails, keep it."""
        failed, self._failed = self._failed, None
        if failed is not None:
            failed.absorb(batch)
            batch = failed
        try:
            with self._connection_lock:
                store_file.write(self._connection, batch)
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
