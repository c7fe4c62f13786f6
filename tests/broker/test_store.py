# SPDX-License-Identifier: MIT
"""What is durable is on disk when the store says so, and stays there whatever happens."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import os
import queue
import random
import resource
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postage.broker.store import (
    Store,
    StoredBinding,
    StoredExchange,
    StoredMessage,
    StoredQueue,
    StoreError,
)
from tests.programs import Program
from tests.waiting import wait_until

#: Seconds to wait for the disk.
PATIENCE = 30.0
#: Names as clients choose them. The last is not UTF-8 on the wire.
NAMES = ("", "x", "é\0", "\udcff")
#: How much a program records before it waits for the disk.
SYNCS_UNDER_WAY = 4
#: The syncs that a test lets pass before it kills the writer at the latest. By the 160th or so
#: SQLite has written its log back into the file once.
LATEST_KILL = 600

#: Picks one of several options, at random in one way or another.
Choose = Callable[[Sequence[Any]], Any]


def message(body: bytes = b"body", **other: Any) -> StoredMessage:
    return replace(StoredMessage("exchange", "key", b"properties", body, None, 0), **other)


def a_queue(name: str = "q", vhost: str = "/") -> StoredQueue:
    return StoredQueue(vhost, name, False, b"")


def an_exchange(name: str = "e", vhost: str = "/") -> StoredExchange:
    return StoredExchange(vhost, name, "topic", False, False, b"")


def a_binding(source: str = "e", goal: str = "q", *, vhost: str = "/", to: bool = False) -> Any:
    return StoredBinding(vhost, source, to, goal, "key", b"")


def synced(store: Store) -> Exception | None:
    """Wait for a sync, and return its error."""
    results: queue.Queue[Exception | None] = queue.Queue()
    store.sync(results.put)
    return results.get(timeout=PATIENCE)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process be written to, whatever is free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Model:
    """What must be in a store, by the names of its methods. Its attributes are the content."""

    def __init__(self) -> None:
        self.vhosts: set[str] = set()
        self.exchanges: dict[tuple[str, str], StoredExchange] = {}
        self.queues: dict[int, StoredQueue] = {}
        self.bindings: set[StoredBinding] = set()
        self.messages: dict[tuple[int, int], StoredMessage] = {}

    @staticmethod
    def of(store: Store) -> Model:
        """Return what a store says is on disk."""
        model, stored = Model(), store.load()
        model.vhosts = set(stored.vhosts)
        model.exchanges = {(each.vhost, each.name): each for each in stored.exchanges}
        model.queues = {each.id: each for each in stored.queues}
        model.bindings = set(stored.bindings)
        model.messages = {(id_, position): each for id_, position, each in stored.messages}
        assert [*model.messages] == sorted(model.messages)
        return model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return repr(vars(self))

    def apply(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if name == "put_queue":
            self.queues[result] = arguments[0]
        else:
            getattr(self, name)(*arguments)

    def put_vhost(self, name: str) -> None:
        self.vhosts.add(name)

    def drop_vhost(self, name: str) -> None:
        self.vhosts.discard(name)
        self.exchanges = {key: each for key, each in self.exchanges.items() if key[0] != name}
        self.bindings = {each for each in self.bindings if each.vhost != name}
        for id_ in [id_ for id_, each in self.queues.items() if each.vhost == name]:
            self.drop_queue(id_)

    def put_exchange(self, exchange: StoredExchange) -> None:
        self.exchanges[exchange.vhost, exchange.name] = exchange

    def drop_exchange(self, vhost: str, name: str) -> None:
        self.exchanges.pop((vhost, name), None)
        self._unbind(vhost, lambda each: each.source == name)
        self._unbind(vhost, lambda each: each.to_exchange and each.destination == name)

    def drop_queue(self, id_: int) -> None:
        gone = self.queues.pop(id_, None)
        if gone is not None:
            name = gone.name
            self._unbind(gone.vhost, lambda e: not e.to_exchange and e.destination == name)
            self.messages = {key: each for key, each in self.messages.items() if key[0] != id_}

    def put_binding(self, binding: StoredBinding) -> None:
        self.bindings.add(binding)

    def drop_binding(self, binding: StoredBinding) -> None:
        self.bindings.discard(binding)

    def put_message(self, id_: int, position: int, message: StoredMessage) -> None:
        if id_ in self.queues:
            self.messages[id_, position] = message

    def drop_message(self, id_: int, position: int) -> None:
        self.messages.pop((id_, position), None)

    def count_delivery(self, id_: int, position: int, count: int) -> None:
        if (id_, position) in self.messages:
            found = self.messages[id_, position]
            self.messages[id_, position] = replace(found, delivery_count=count)

    def _unbind(self, vhost: str, is_gone: Callable[[StoredBinding], bool]) -> None:
        self.bindings -= {each for each in self.bindings if each.vhost == vhost and is_gone(each)}


def operation(choose: Choose, model: Model, number: int) -> tuple[str, tuple[Any, ...]]:
    """Return a method of the store and its arguments, of which some mean what is not there."""

    def vhost() -> str:
        return str(choose("ab"))

    def name() -> str:
        return str(choose(NAMES))

    def flag() -> bool:
        return bool(choose((False, True)))

    def id_() -> int:
        return int(choose([*model.queues, 9999]))

    def place() -> tuple[int, int]:
        found: tuple[int, int] = choose([*model.messages, (9999, 1)])
        return found

    def a_message() -> StoredMessage:
        body = bytes([number % 256]) * choose((0, 10, 300, 40_000))
        return StoredMessage(name(), name(), b"p", body, choose((None, 1.5e9 + 0.1)), 0)

    def binding() -> StoredBinding:
        return StoredBinding(vhost(), name(), flag(), name(), name(), choose((b"", b"t")))

    def known_binding() -> StoredBinding:
        found: StoredBinding = choose([*sorted(model.bindings, key=repr), a_binding()])
        return found

    methods: dict[str, Callable[[], tuple[Any, ...]]] = {
        "put_vhost": lambda: (vhost(),),
        "drop_vhost": lambda: (vhost(),),
        "put_exchange": lambda: (StoredExchange(vhost(), name(), "fanout", flag(), flag(), b"a"),),
        "drop_exchange": lambda: (vhost(), name()),
        "put_queue": lambda: (StoredQueue(vhost(), name(), flag(), choose((b"", b"t"))),),
        "drop_queue": lambda: (id_(),),
        "put_binding": lambda: (binding(),),
        "drop_binding": lambda: (known_binding(),),
        "put_message": lambda: (id_(), number, a_message()),
        "drop_message": place,
        "count_delivery": lambda: (*place(), number),
    }
    # What drops all messages of a queue is rare, or there would be few.
    rare = ["drop_vhost", "drop_queue"]
    often = ["put_message"] * 4 + ["drop_message", "count_delivery"] * 2
    method = choose([*sorted(methods.keys() - {*rare}), *often, "rarely"])
    if method == "rarely":
        method = choose(rare)
    return method, methods[method]()


def perform(choose: Choose, store: Store, model: Model, number: int) -> None:
    """Do something with a store and with its model."""
    name, arguments = operation(choose, model, number)
    model.apply(name, arguments, getattr(store, name)(*arguments))


# What is kept


def test_all_comes_back_as_it_was(tmp_path: Path) -> None:
    """Also names that are no UTF-8, empty bodies and negative positions."""
    # Given
    exchange = StoredExchange("v\udcff", "e", "x-mine", True, True, b"\0table")
    kept = StoredQueue("v\udcff", "é", True, b"\xfftable")
    binding = StoredBinding("v\udcff", "e", False, "é", "#.\udc80", b"\0")
    messages = [message(b""), message(b"\0\xff" * 9, expires=1.7e9 + 0.25, delivery_count=7)]

    # When
    with Store(tmp_path / "s") as store:
        store.put_vhost("v\udcff")
        store.put_exchange(exchange)
        id_ = store.put_queue(kept)
        store.put_binding(binding)
        store.put_message(id_, 5, messages[0])
        store.put_message(id_, -1, messages[1])
        assert None is synced(store)
        at_once = store.load()
    with Store(tmp_path / "s") as store:
        later = store.load()

    # Then
    assert at_once == later
    assert ["v\udcff"] == later.vhosts
    assert [exchange] == later.exchanges
    assert [(kept, id_)] == [(each, each.id) for each in later.queues]
    assert [binding] == later.bindings
    assert [(id_, -1, messages[1]), (id_, 5, messages[0])] == later.messages


def test_what_is_put_again_replaces_what_was_there(tmp_path: Path) -> None:
    """A queue keeps its number and its messages."""
    with Store(tmp_path / "s") as store:
        id_ = store.put_queue(a_queue())
        store.put_message(id_, 1, message())
        for _ in range(2):
            store.put_vhost("/")
            store.put_exchange(an_exchange())
            store.put_binding(a_binding())
            assert None is synced(store)
        changed_exchange = replace(an_exchange(), arguments=b"new")
        changed_queue = replace(a_queue(), arguments=b"new")
        store.put_exchange(changed_exchange)
        assert id_ == store.put_queue(changed_queue)
        assert None is synced(store)
        stored = store.load()

    assert ["/"] == stored.vhosts
    assert [changed_exchange] == stored.exchanges
    assert [changed_queue] == stored.queues
    assert [a_binding()] == stored.bindings
    assert [(id_, 1, message())] == stored.messages


@pytest.mark.parametrize("is_synced", [False, True])
def test_a_queue_goes_with_its_messages_and_bindings(tmp_path: Path, is_synced: bool) -> None:
    """An exchange of the same name keeps its bindings, and so do other queues."""
    with Store(tmp_path / "s") as store:
        gone, kept = store.put_queue(a_queue("q")), store.put_queue(a_queue("kept"))
        for id_ in (gone, kept):
            store.put_message(id_, 1, message())
        others = [a_binding(goal="kept"), a_binding(to=True), a_binding(vhost="other")]
        for binding in [a_binding(), *others]:
            store.put_binding(binding)
        if is_synced:
            assert None is synced(store)
        store.drop_queue(gone)
        assert None is synced(store)
        stored = store.load()

    assert [kept] == [each.id for each in stored.queues]
    assert [(kept, 1, message())] == stored.messages
    assert set(others) == set(stored.bindings)


def test_an_exchange_goes_with_its_bindings(tmp_path: Path) -> None:
    """Those from it and those to it, but not those of a queue of the same name."""
    with Store(tmp_path / "s") as store:
        store.put_exchange(an_exchange("gone"))
        store.put_exchange(an_exchange("kept"))
        others = [a_binding("kept", "gone"), a_binding("gone", vhost="other")]
        for binding in [a_binding("gone"), a_binding("kept", "gone", to=True), *others]:
            store.put_binding(binding)
        store.drop_exchange("/", "gone")
        assert None is synced(store)
        stored = store.load()

    assert [an_exchange("kept")] == stored.exchanges
    assert set(others) == set(stored.bindings)


@pytest.mark.parametrize("is_synced", [False, True])
def test_a_virtual_host_goes_with_all_that_is_in_it(tmp_path: Path, is_synced: bool) -> None:
    """Another one keeps all, and so does one that gets the name anew at once."""
    with Store(tmp_path / "s") as store:
        for vhost in ("gone", "kept"):
            store.put_vhost(vhost)
            store.put_exchange(an_exchange(vhost=vhost))
            store.put_message(store.put_queue(a_queue(vhost=vhost)), 1, message(vhost.encode()))
            store.put_binding(a_binding(vhost=vhost))
        if is_synced:
            assert None is synced(store)
        store.drop_vhost("gone")
        anew = store.put_queue(a_queue(vhost="gone"))
        store.put_message(anew, 1, message(b"anew"))
        assert None is synced(store)
        stored = store.load()

    assert ["kept"] == stored.vhosts
    assert [an_exchange(vhost="kept")] == stored.exchanges
    assert [a_queue(vhost="kept"), a_queue(vhost="gone")] == stored.queues
    assert [a_binding(vhost="kept")] == stored.bindings
    assert [b"kept", b"anew"] == [each.body for _, _, each in stored.messages]


def test_a_message_that_is_dropped_goes(tmp_path: Path) -> None:
    """Others of its queue and at its position in other queues stay."""
    with Store(tmp_path / "s") as store:
        first, second = store.put_queue(a_queue("1")), store.put_queue(a_queue("2"))
        for id_, position in itertools.product((first, second), (1, 2)):
            store.put_message(id_, position, message())
        assert None is synced(store)
        store.drop_message(first, 1)
        store.drop_message(second, 77)
        assert None is synced(store)
        left = [(id_, position) for id_, position, _ in store.load().messages]
    assert [(first, 2), (second, 1), (second, 2)] == left


def test_what_is_put_and_dropped_before_a_sync_is_never_written(tmp_path: Path) -> None:
    """So messages that are consumed at once cost no I/O."""
    with Store(tmp_path / "s") as store:
        id_ = store.put_queue(a_queue())
        assert None is synced(store)
        store.put_message(id_, 1, message())
        store.count_delivery(id_, 1, 2)
        store.drop_message(id_, 1)
        assert store.is_clean
        assert None is synced(store)
        assert [] == store.load().messages


@pytest.mark.parametrize("is_synced", [False, True])
def test_deliveries_are_counted(tmp_path: Path, is_synced: bool) -> None:
    """In many messages at once, before and after they are on disk."""
    with Store(tmp_path / "s") as store:
        id_ = store.put_queue(a_queue())
        for position in range(1200):
            store.put_message(id_, position, message())
        if is_synced:
            assert None is synced(store)
        for position in range(1200):
            store.count_delivery(id_, position, 1 + position % 2)
        store.count_delivery(id_, 5000, 1)
        assert None is synced(store)
        counts = [each.delivery_count for _, _, each in store.load().messages]
    assert [1, 2] * 600 == counts


def test_large_batches_are_written_whole(tmp_path: Path) -> None:
    """With more rows than fit into a statement, and with bodies of a megabyte among small ones."""
    with Store(tmp_path / "s") as store:
        ids = [store.put_queue(a_queue(name)) for name in ("1", "2")]
        expected = {
            (id_, position): message(bytes(2**20 if position % 700 == 699 else position % 300))
            for id_ in ids
            for position in range(1501)
        }
        for place, kept in expected.items():
            store.put_message(*place, kept)
        assert None is synced(store)
        assert expected == Model.of(store).messages
        for place in [*expected][::2]:
            del expected[place]
            store.drop_message(*place)
        assert None is synced(store)
        assert expected == Model.of(store).messages


def test_what_comes_for_a_queue_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    """So no message stays that belongs to nothing, or to a later queue of that number."""
    with Store(tmp_path / "s") as store:
        first, second = store.put_queue(a_queue("1")), store.put_queue(a_queue("2", "other"))
        store.drop_queue(first)
        store.drop_vhost("other")
        assert None is synced(store)
        for id_ in (first, second, 77):
            store.put_message(id_, 1, message())
            store.count_delivery(id_, 1, 1)
            store.drop_message(id_, 2)
            store.drop_queue(id_)
        assert None is synced(store)
        assert Model() == Model.of(store)


def test_numbers_of_queues_are_not_used_twice(tmp_path: Path) -> None:
    """While the store is open; and those that are in use never."""
    with Store(tmp_path / "s") as store:
        kept = store.put_queue(a_queue("kept"))
        gone = store.put_queue(a_queue())
        store.drop_queue(gone)
        again = store.put_queue(a_queue())
        assert 3 == len({kept, gone, again})
    with Store(tmp_path / "s") as store:
        assert {kept, again} == {each.id for each in store.load().queues}
        assert again == store.put_queue(a_queue())
        assert store.put_queue(a_queue("new")) not in (kept, again)


# Syncs


def test_a_sync_is_done_in_the_thread_of_the_store(tmp_path: Path) -> None:
    """Also one for which there is nothing to write."""
    threads: queue.Queue[threading.Thread] = queue.Queue()
    with Store(tmp_path / "s") as store:
        store.sync(lambda _error: threads.put(threading.current_thread()))
        thread = threads.get(timeout=PATIENCE)
        assert thread is not threading.current_thread()
        assert "store s" == thread.name


def test_syncs_are_done_in_their_order(tmp_path: Path) -> None:
    """While one is written, the next gather, and none is forgotten."""
    done: queue.Queue[tuple[int, Exception | None]] = queue.Queue()

    def note(number: int, error: Exception | None) -> None:
        done.put((number, error))

    with Store(tmp_path / "s") as store:
        id_ = store.put_queue(a_queue())
        for number in range(300):
            store.put_message(id_, number, message())
            store.sync(functools.partial(note, number))
    assert [(number, None) for number in range(300)] == [done.get_nowait() for _ in range(300)]


def test_a_store_is_clean_until_something_is_recorded(tmp_path: Path) -> None:
    """A sync that has begun makes it clean again."""
    with Store(tmp_path / "s") as store:
        assert store.is_clean
        store.put_vhost("/")
        assert not store.is_clean
        store.sync(lambda _error: None)
        assert store.is_clean


def test_an_error_of_one_who_waits_does_not_reach_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged."""

    def fail(_error: Exception | None) -> None:
        raise LookupError("my fault")

    with Store(tmp_path / "s") as store:
        store.put_vhost("/")
        store.sync(fail)
        assert None is synced(store)
    assert "my fault" in caplog.text


def test_closing_writes_what_was_recorded(tmp_path: Path) -> None:
    """Without a sync; and the file then stands alone."""
    store = Store(tmp_path / "s")
    store.put_vhost("/")
    store.close()
    assert ["s"] == os.listdir(tmp_path)
    with Store(tmp_path / "s") as store:
        assert ["/"] == store.load().vhosts


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    """Closing it again does nothing."""
    store = Store(tmp_path / "s")
    store.put_vhost("/")
    assert f"<Store {tmp_path / 's'} [open, 1 changes not synced]>" == repr(store)
    store.close()
    store.close()
    assert f"<Store {tmp_path / 's'} [closed]>" == repr(store)
    with pytest.raises(StoreError, match="is closed"):
        store.sync(lambda _error: None)
    with pytest.raises(StoreError, match="is closed"):
        store.load()


def test_closing_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A disk that hangs is told about."""
    go_on = threading.Event()

    def hang(_error: Exception | None) -> None:
        go_on.wait(PATIENCE)

    store = Store(tmp_path / "s")
    store.sync(hang)
    with pytest.raises(StoreError, match=r"still written to after 0\.05 s"):
        store.close(timeout=0.05)
    go_on.set()


def test_a_store_that_is_dropped_open_warns(tmp_path: Path) -> None:
    """Its thread ends, and the file can be opened again; what was synced is in it."""
    store = Store(tmp_path / "s")
    store.put_vhost("synced")
    assert None is synced(store)
    store.put_vhost("lost")
    with pytest.warns(ResourceWarning, match="was dropped without close"):
        del store
        gc.collect()
    wait_until(lambda: "store s" not in {thread.name for thread in threading.enumerate()})
    with Store(tmp_path / "s") as store:
        assert ["synced"] == store.load().vhosts


@pytest.mark.parametrize("ending", ["", "import sys; sys.exit(3)", "raise LookupError"])
def test_a_program_ends_that_forgets_its_store(tmp_path: Path, ending: str) -> None:
    """The thread of the store does not hold it up."""
    code = f"""
from postage.broker.store import Store
store = Store({str(tmp_path / "s")!r})
store.put_vhost("/")
store.sync(lambda error: print("synced", error))
{ending}
"""
    with Program(["-c", code]) as program:
        program.wait()


# Full disks


def test_what_could_not_be_written_is_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While the disk is full every sync fails, and the file stays as it was."""
    # Given
    with Store(tmp_path / "s") as store:
        id_ = store.put_queue(a_queue())
        store.put_message(id_, 1, message())
        assert None is synced(store)
        before = Model.of(store)

        # When
        with full_disk():
            store.put_message(id_, 2, message())
            store.put_message(id_, 3, message())
            first_error = synced(store)
            store.drop_message(id_, 1)
            store.drop_message(id_, 2)
            store.put_queue(a_queue("other"))
            second_error = synced(store)
            meanwhile = Model.of(store)
        third_error = synced(store)
        after = store.load()

    # Then
    assert isinstance(first_error, StoreError)
    assert "cannot be written: disk I/O error; free some space" in str(first_error)
    assert isinstance(first_error.__cause__, sqlite3.OperationalError)
    assert isinstance(second_error, StoreError)
    assert None is third_error
    assert before == meanwhile
    assert [(id_, 3, message())] == after.messages
    assert [a_queue(), a_queue("other")] == after.queues
    # One line when it begins and one when it ends
    assert ["ERROR", "WARNING"] == [record.levelname for record in caplog.records]


@pytest.mark.parametrize("is_closed_at_once", [False, True])
def test_the_next_sync_writes_what_failed_with_what_is_new(
    tmp_path: Path, is_closed_at_once: bool
) -> None:
    """A queue that was dropped meanwhile takes with it what could not be written."""
    with Store(tmp_path / "s") as store:
        gone, kept = store.put_queue(a_queue("gone")), store.put_queue(a_queue("kept"))
        with full_disk():
            store.put_message(gone, 1, message())
            store.put_message(kept, 1, message())
            assert isinstance(synced(store), StoreError)
        store.drop_queue(gone)
        store.put_message(kept, 2, message())
        store.count_delivery(kept, 1, 3)
        if not is_closed_at_once:
            assert None is synced(store)
    with Store(tmp_path / "s") as store:
        stored = store.load()
    assert [kept] == [each.id for each in stored.queues]
    expected = [(kept, 1, message(delivery_count=3)), (kept, 2, message())]
    assert expected == stored.messages


def test_nothing_of_a_batch_is_written_that_fails_halfway(tmp_path: Path) -> None:
    """Whatever the reason: here a position that SQLite has no room for."""
    with Store(tmp_path / "s") as store:
        id_ = store.put_queue(a_queue())
        store.put_message(id_, 2**64, message())
        assert isinstance(synced(store), StoreError)
        assert Model() == Model.of(store)
        store.drop_queue(id_)
        store.put_vhost("/")
        assert None is synced(store)
        assert ["/"] == store.load().vhosts


def test_closing_tells_what_is_lost(tmp_path: Path) -> None:
    """The store is closed all the same, and holds what was synced."""
    store = Store(tmp_path / "s")
    store.put_vhost("synced")
    assert None is synced(store)
    store.put_vhost("lost")
    with full_disk(), pytest.raises(StoreError, match="what was not confirmed is lost"):
        store.close()
    store.close()
    with Store(tmp_path / "s") as store:
        assert ["synced"] == store.load().vhosts


def test_a_log_that_cannot_be_written_back_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost then: it is read when the file is opened."""
    store = Store(tmp_path / "s")
    store.put_vhost("/")
    assert None is synced(store)
    with full_disk():
        store.close()
    assert "keeps its log" in caplog.text
    with Store(tmp_path / "s") as store:
        assert ["/"] == store.load().vhosts


def test_a_full_disk_and_a_crash_leave_what_was_synced(tmp_path: Path) -> None:
    """What failed is in the file as a whole or not at all."""
    code = f"""
from tests.broker import test_store
test_store.fill_disk({str(tmp_path / "s")!r})
"""
    with Program(["-c", code]) as program:
        program.wait_for_line("failed")
        program.kill()
        program.wait()
    with Store(tmp_path / "s") as store:
        positions = [position for _, position, _ in store.load().messages]
        assert positions in ([0], [*range(10)])


def fill_disk(path: str) -> None:
    """Have one message synced and nine not, then wait to be killed."""
    store = Store(path)
    id_ = store.put_queue(a_queue())
    store.put_message(id_, 0, message())
    assert None is synced(store)
    # Room for a few of the nine
    limit = os.path.getsize(path + "-wal") + 200_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for position in range(1, 10):
        store.put_message(id_, position, message(bytes(50_000)))
    assert isinstance(synced(store), StoreError)
    print("failed", flush=True)
    threading.Event().wait(PATIENCE)


# Kills


@pytest.mark.parametrize("seed", range(20))
def test_what_was_synced_survives_a_kill(tmp_path: Path, seed: int) -> None:
    """All that was synced is there, what was recorded after it is there up to some sync, and
    the file goes on to be used."""
    # Given
    path = tmp_path / "s"
    code = f"""
from tests.broker import test_store
test_store.write_until_killed({str(path)!r}, {seed})
"""
    with Program(["-c", code]) as program:
        # When
        number = random.Random(f"kill {seed}").randint(1, LATEST_KILL)
        wait_until(lambda: len(program.stdout) >= number, message="syncs")
        program.kill()
        program.wait()
        assert [] == program.stderr
        last_synced = int(program.stdout[-1])

    # Then
    with Store(path) as store:
        found = Model.of(store)
        candidates = (model for point, model in sync_points(seed) if point >= last_synced)
        # One more than may be under way: the last may be done, and its number not yet printed.
        assert found in itertools.islice(candidates, SYNCS_UNDER_WAY + 2)
        choose = random.Random(seed).choice
        for later in range(10**6, 10**6 + 50):
            perform(choose, store, found, later)
        assert None is synced(store)
        assert found == Model.of(store)


def write_until_killed(path: str, seed: int) -> None:
    """Write at random, and print the number of the last operation of each sync that is done."""
    slots = threading.Semaphore(SYNCS_UNDER_WAY)

    def report(number: int, error: Exception | None) -> None:
        print(number if error is None else error, flush=True)
        slots.release()

    store = Store(path)
    for number, _model in random_life(seed, store):
        slots.acquire()
        store.sync(functools.partial(report, number))


def random_life(seed: int, store: Any) -> Iterator[tuple[int, Model]]:
    """Do things with a store, and yield when it is to be synced. One seed means one life."""
    numbers, model = random.Random(seed), Model()
    for number in itertools.count(1):
        perform(numbers.choice, store, model, number)
        if numbers.random() < 0.2:
            yield number, model


def sync_points(seed: int) -> Iterator[tuple[int, Model]]:
    """Yield what must be in the file after each sync of `write_until_killed`."""
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "never synced") as store:
        yield from random_life(seed, store)


# Random lives


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_store_holds_what_was_recorded(data: st.DataObject) -> None:
    """Whatever is done with it, through full disks and after it was closed and opened again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        store, model, on_disk = Store(path), Model(), Model()
        try:
            for number in range(data.draw(st.integers(0, 60))):
                step = data.draw(st.sampled_from(["do"] * 8 + ["sync", "fail", "reopen"]))
                if step == "do":
                    perform(lambda each: data.draw(st.sampled_from(each)), store, model, number)
                    continue
                if step == "fail":
                    with full_disk():
                        is_written = synced(store) is None  # if there is nothing to write
                elif step == "sync":
                    is_written = synced(store) is None
                    assert is_written
                else:
                    store.close()
                    store = Store(path)
                    is_written = True
                if is_written:
                    on_disk = copy.deepcopy(model)
                assert on_disk == Model.of(store)
        finally:
            store.close()
        with Store(path) as store:
            assert model == Model.of(store)


# Files that cannot be used


def test_two_brokers_cannot_share_a_store(tmp_path: Path) -> None:
    """Not in one process and not in two; after a kill the file is free."""
    path = tmp_path / "s"
    code = f"""
import time
from postage.broker.store import Store
store = Store({str(path)!r})
print("open", flush=True)
time.sleep(60)
"""
    with Program(["-c", code]) as program:
        program.wait_for_line("open")
        with pytest.raises(StoreError) as caught:
            Store(path)
        program.kill()
        program.wait()
    expected = (
        f"the store {path} is in use by another broker; "
        "stop that broker, or give this one a file of its own"
    )
    assert expected == str(caught.value)
    assert (path, "is in use by another broker") == (caught.value.path, caught.value.reason)
    with Store(path) as store:
        assert [] == store.load().vhosts
        with pytest.raises(StoreError, match="in use"):
            Store(path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """It is not made: the path may be a mistake."""
    with pytest.raises(StoreError, match=f"has no folder to be in; make {tmp_path / 'no'},"):
        Store(tmp_path / "no" / "s")
    assert [] == os.listdir(tmp_path)


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    """The error says that a file is needed."""
    with pytest.raises(
        StoreError, match=r"cannot be read and written: .*; the broker needs a file"
    ):
        Store(tmp_path)


def test_a_name_of_sqlite_is_only_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path belongs to the folder in which the store was opened."""
    monkeypatch.chdir(tmp_path)
    with Store(":memory:") as store:
        assert tmp_path / ":memory:" == store.path
    assert [":memory:"] == os.listdir(tmp_path)


@pytest.mark.parametrize("size", [10, 100, 1000, 40_000])
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, size: int) -> None:
    """And left as it is."""
    path, content = tmp_path / "letters", random.Random(size).randbytes(size)
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"is damaged, or no store at all: .*; put back a copy"):
        Store(path)
    assert content == path.read_bytes()
    assert ["letters"] == os.listdir(tmp_path)


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    """Such as one that was made beforehand to give it its owner."""
    (tmp_path / "s").touch()
    with Store(tmp_path / "s") as store:
        store.put_vhost("/")
        assert None is synced(store)


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_file_of_another_application_is_refused(tmp_path: Path, mode: str) -> None:
    """And left as it is."""
    path = tmp_path / "s"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute("CREATE TABLE messages (mine)")
    content = path.read_bytes()
    with pytest.raises(StoreError, match="belongs to another application"):
        Store(path)
    assert content == path.read_bytes()


def test_a_file_that_another_application_uses_is_refused(tmp_path: Path) -> None:
    """As long as it is locked."""
    path = tmp_path / "s"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="in use"):
            Store(path)
    Store(path).close()


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    """The error says which version it is of."""
    path = tmp_path / "s"
    Store(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(StoreError, match="is of version 2, and this is a broker for version 1"):
        Store(path)


def filled(path: Path) -> bytearray:
    """Make a store with many pages, and return what is in its file."""
    with Store(path) as store:
        id_ = store.put_queue(a_queue())
        for position in range(2000):
            store.put_message(id_, position, message(b"x" * 300))
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, part: float) -> None:
    """The error says what to do."""
    path = tmp_path / "s"
    content = filled(path)
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(StoreError, match=r"is damaged, or no store at all: .*; put back a copy"):
        Store(path)


def test_a_file_with_a_damaged_page_is_refused(tmp_path: Path) -> None:
    """All pages are looked at before anything is taken from it. (The contents of bodies have no
    checksums.)"""
    path = tmp_path / "s"
    content = filled(path)
    page = 16_384
    refused = 0
    for start in range(page, len(content), page):
        # The head of a page of a tree
        path.write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])
        with pytest.raises(StoreError, match="is damaged"), Store(path) as store:
            store.load()
        refused += 1
    assert refused > 20


@pytest.mark.parametrize("column", ["vhost", "name", "id"])
def test_a_value_of_a_wrong_type_is_damage(tmp_path: Path, column: str) -> None:
    """SQLite takes any type, so it does not notice."""
    path = tmp_path / "s"
    with Store(path) as store:
        store.put_queue(a_queue())
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        if column == "id":  # a table without its key, such as after a damaged declaration
            connection.execute("DROP TABLE queues")
            connection.execute("CREATE TABLE queues (id, vhost, name, auto_delete, arguments)")
            connection.execute("INSERT INTO queues VALUES (NULL, x'', x'', 0, x'')")
        else:
            connection.execute(f"UPDATE queues SET {column} = 'text'")
    with pytest.raises(StoreError, match="is damaged, or no store at all: there is a value"):
        Store(path)


@pytest.mark.parametrize("name", ["folder/s", "folder"])
def test_what_may_only_be_read_is_refused(name: str) -> None:
    """The error names the file, or the folder, in which SQLite has to make its log."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "folder"
        folder.mkdir()
        path = folder / "s"
        Store(path).close()
        # For root, which may write to whatever it likes, another user tries it.
        for place, mode in ((Path(base), 0o755), (folder, 0o777), (path, 0o666)):
            place.chmod(mode)
        forbidden = Path(base) / name
        forbidden.chmod(forbidden.stat().st_mode & ~0o222)
        code = f"""
import os
from postage.broker.store import Store, StoreError
if os.getuid() == 0:
    os.setuid(65534)
try:
    Store({str(path)!r})
except StoreError as error:
    print(error)
"""
        with Program(["-c", code]) as program:
            program.wait()
        folder.chmod(0o777)
    expected = f"the store {path} needs to write to {forbidden}; let the broker's user "
    assert [expected + "read and write there"] == program.lines


def test_the_module_needs_nothing_of_the_client() -> None:
    """The broker stands alone."""
    code = """
import sys
import postage
before = {*sys.modules}
import postage.broker.store
names = [name for name in sys.modules if name.startswith("postage.") and name not in before]
print(sorted(name for name in names if not name.startswith("postage.broker")))
"""
    with Program(["-c", code]) as program:
        program.wait()
    assert ["[]"] == program.lines
