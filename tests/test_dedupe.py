# SPDX-License-Identifier: MIT
"""What was handled is remembered: by handler and message, for a time, with its replies."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from postage.dedupe import SWEEP_EVERY, Dedupe, Done, MemoryWindow, SqliteWindow
from postage.errors import ConfigurationError
from tests.forks import in_child


@pytest.fixture(params=["memory", "sqlite"])
def window(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Dedupe]:
    with closing(
        MemoryWindow() if request.param == "memory" else SqliteWindow(tmp_path / "handled")
    ) as window:
        yield window


def test_a_message_is_known_to_the_handler_that_handled_it(window: Dedupe) -> None:
    """Another handler of the same message has to run all the same."""
    assert window.get("msg_echo", "1") is None
    window.add("msg_echo", "1", Done())
    assert Done() == window.get("msg_echo", "1")
    assert window.get("msg_echo", "2") is None
    assert window.get("msg_other", "1") is None


def test_the_replies_of_a_call_are_kept_in_order(window: Dedupe) -> None:
    """Byte for byte. What is noted again replaces what was there."""
    replies = (b"\x00\xff", b"", b"third")
    window.add("rpc_add", "1", Done(replies))
    window.add("rpc_add", "2", Done())
    assert replies == window.get("rpc_add", "1").replies  # type: ignore[union-attr]  # it is there
    window.add("rpc_add", "1", Done((b"new",)))
    assert Done((b"new",)) == window.get("rpc_add", "1")
    assert Done(()) == window.get("rpc_add", "2")


def test_a_message_is_forgotten_when_its_time_is_over() -> None:
    """In memory: by a clock that never jumps."""
    now = [0.0]
    window = MemoryWindow(seconds=10, clock=lambda: now[0])
    window.add("msg", "old", Done())
    now[0] = 8
    window.add("msg", "new", Done())
    assert window.get("msg", "old") is not None
    now[0] = 11
    assert [None, Done()] == [window.get("msg", name) for name in ("old", "new")]
    window.add("msg", "newest", Done())
    assert 2 == len(window._known)


def test_the_latest_messages_are_kept() -> None:
    """Memory is bounded, also if all of them are young."""
    window = MemoryWindow(size=3)
    for number in range(5):
        window.add("msg", str(number), Done())
    window.add("msg", "2", Done())
    window.add("msg", "5", Done())
    assert ["2", "4", "5"] == [name for name in map(str, range(9)) if window.get("msg", name)]


def test_a_file_outlives_its_process(tmp_path: Path) -> None:
    """And others of the host share it."""
    with closing(SqliteWindow(tmp_path / "handled")) as one:
        one.add("msg", "1", Done((b"reply",)))
        with closing(SqliteWindow(tmp_path / "handled")) as other:
            assert Done((b"reply",)) == other.get("msg", "1")
            other.add("msg", "2", Done())
        assert one.get("msg", "2") is not None
    with closing(SqliteWindow(tmp_path / "handled")) as later:
        assert later.get("msg", "1") is not None


def test_old_entries_leave_the_file(tmp_path: Path) -> None:
    """With their replies."""
    path = tmp_path / "handled"
    with closing(SqliteWindow(path, seconds=60)) as window:
        window.add("msg", "old", Done((b"reply",)))
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE handled SET at = at - 61")
        assert window.get("msg", "old") is None
        for number in range(SWEEP_EVERY):
            window.add("msg", str(number), Done())
        with closing(sqlite3.connect(path)) as connection:
            assert [(SWEEP_EVERY,)] == list(connection.execute("SELECT count(*) FROM handled"))
            assert [(0,)] == list(connection.execute("SELECT count(*) FROM replies"))


def test_a_window_may_be_used_by_several_threads(tmp_path: Path) -> None:
    """Handlers in threads end there."""
    with closing(SqliteWindow(tmp_path / "handled")) as window:

        def work(first: int) -> None:
            for number in range(first, first + 50):
                window.add("msg", str(number), Done())

        threads = [threading.Thread(target=work, args=(50 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(window.get("msg", str(number)) for number in range(200))


def test_a_forked_child_opens_the_file_for_itself(tmp_path: Path) -> None:
    """SQLite's connections must not be carried over a fork."""
    with closing(SqliteWindow(tmp_path / "handled")) as window:
        window.add("msg", "1", Done())

        def child() -> str:
            window.add("msg", "2", Done())
            return str(window.get("msg", "1") is not None and window._pid == os.getpid())

        assert "True" == in_child(child)()
        assert window.get("msg", "2") is not None


def test_a_file_that_fails_later_loses_no_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and what is repeated meanwhile is handled again."""
    path = tmp_path / "handled"
    with closing(SqliteWindow(path)) as window:
        window.add("msg", "1", Done())
        window.close()
        for each in tmp_path.iterdir():
            each.unlink()
        path.mkdir()
        window.add("msg", "2", Done())
        assert window.get("msg", "1") is None
    assert f"a handled message could not be noted in {path}" in caplog.text
    assert f"a handled message could not be looked up in {path}" in caplog.text


def test_a_window_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    """When it is made."""
    for make in (
        lambda: MemoryWindow(seconds=0),
        lambda: MemoryWindow(size=-1),
        lambda: SqliteWindow(tmp_path / "handled", seconds=float("nan")),
        lambda: SqliteWindow(tmp_path / "missing" / "handled"),
    ):
        with pytest.raises(ConfigurationError):
            make()
