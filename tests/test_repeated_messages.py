# SPDX-License-Identifier: MIT
"""A component with `dedupe` handles a message once, and answers a call again as before."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from postage.dedupe import MemoryWindow, SqliteWindow
from postage.errors import PostageError
from postage.handlers import MessageHandler, RpcHandler
from postage.messaging import MessageProcessor
from postage.retry import RetryPolicy
from tests.programs_for_tests.components import Running, Sender, eqk_of, raw_channel
from tests.waiting import wait_until


class Clerk(MessageProcessor):
    """Counts what its handlers do."""

    retry = RetryPolicy(attempts=1)

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.broken = False
        super().__init__({"name": "clerk"}, eqk_of("q"))

    @MessageHandler("command", "note")
    def msg_note(self, content: Any) -> None:
        if self.broken:
            raise ValueError("no pencil")
        self.counts["note"] += 1

    @MessageHandler("command", "two")
    def msg_first(self, content: Any) -> None:
        self.counts["first"] += 1

    @MessageHandler("command", "two")
    def msg_second(self, content: Any) -> None:
        if self.broken:
            raise ValueError("no pencil")
        self.counts["second"] += 1

    @RpcHandler("command", "count")
    def rpc_count(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        self.counts["count"] += 1
        reply_func(self.counts["count"])

    @MessageHandler("command", "last")
    def msg_last(self, content: Any) -> None:
        self.counts["last"] += 1


@pytest.fixture(params=["memory", "sqlite"])
def clerk_class(
    request: pytest.FixtureRequest, broker_url: str, tmp_path: Path
) -> type[Clerk]:
    def window() -> Any:
        return MemoryWindow() if request.param == "memory" else SqliteWindow(tmp_path / "handled")

    return type("Careful", (Clerk,), {"dedupe": window()})


@pytest.fixture
def sender(broker_url: str) -> Iterator[Sender]:
    with Sender() as sender:
        yield sender


def wait_for_the_last(sender: Sender, clerk: Clerk) -> None:
    """Wait until all that was sent before was handled."""
    before = clerk.counts["last"]
    sender.message_last()
    wait_until(lambda: clerk.counts["last"] > before)


def test_a_repeated_message_is_handled_once(sender: Sender, clerk_class: type[Clerk]) -> None:
    """Two messages with other ids are two, and so are those without any."""
    with Running(clerk := clerk_class()):
        for message_id in ("1", "1", "2", "1"):
            sender.message_note(_message_id=message_id)
        wait_for_the_last(sender, clerk)
        assert 2 == clerk.counts["note"]
        with raw_channel() as channel:
            body = b'{"type":"command","name":"note","category":"message","content":{}}'
            for _ in range(2):
                channel.basic_publish("test-exchange", "q", body)
        wait_until(lambda: clerk.counts["note"] == 4)


def test_what_failed_is_not_remembered(sender: Sender, clerk_class: type[Clerk]) -> None:
    """It can be sent again. Of two handlers only the one that failed runs again."""
    with Running(clerk := clerk_class()):
        clerk.broken = True
        sender.message_note(_message_id="1")
        sender.message_two(_message_id="2")
        wait_for_the_last(sender, clerk)
        clerk.broken = False
        sender.message_note(_message_id="1")
        sender.message_two(_message_id="2")
        wait_for_the_last(sender, clerk)
    assert (1, 1, 1) == tuple(clerk.counts[name] for name in ("note", "first", "second"))


def test_a_repeated_call_gets_the_stored_reply(sender: Sender, clerk_class: type[Clerk]) -> None:
    """Its handler does not run again."""
    with Running(clerk_class()):
        replies = [sender.rpc_count(_message_id=each).value for each in ("1", "1", "2", "1")]
    assert [1, 1, 2, 1] == replies


def test_another_process_knows_what_is_in_the_file(
    sender: Sender, broker_url: str, tmp_path: Path
) -> None:
    """Also replies, after the first one has ended."""

    def clerk() -> Clerk:
        window = SqliteWindow(tmp_path / "handled")
        careful: Clerk = type("Careful", (Clerk,), {"dedupe": window})()
        return careful

    with Running(first := clerk()):
        assert 1 == sender.rpc_count(_message_id="1").value
        sender.message_note(_message_id="2")
        wait_for_the_last(sender, first)
    with Running(second := clerk()):
        assert 1 == sender.rpc_count(_message_id="1").value
        sender.message_note(_message_id="2")
        wait_for_the_last(sender, second)
    assert (0, 0) == (second.counts["count"], second.counts["note"])


def test_without_a_window_a_message_is_handled_as_often_as_it_comes(sender: Sender) -> None:
    """That is the default."""
    with Running(clerk := Clerk()):
        for _ in range(3):
            sender.message_note(_message_id="1")
        wait_for_the_last(sender, clerk)
        assert 3 == clerk.counts["note"]


def test_there_is_a_delivery_in_handlers_only(broker_url: str) -> None:
    """Nobody else handles anything."""
    with Clerk() as clerk, pytest.raises(PostageError, match="a delivery in handlers only"):
        _ = clerk.delivery
