# SPDX-License-Identifier: MIT
"""What a handler sends belongs to the conversation of its message, and names its cause."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from postage.handlers import MessageHandler, RpcHandler
from postage.messaging import MessageProcessor
from postage.microthreads import sleep
from postage.topology import DefaultExchange
from tests.programs_for_tests.components import Running, Sender, eqk_of, raw_channel, take


class Clerk(MessageProcessor):
    """Passes each message on to the queue "out", in all the ways that there are."""

    def __init__(self) -> None:
        super().__init__({"name": "clerk"}, eqk_of("q"))
        self.sender = Sender()
        self.sender.eks = [(DefaultExchange, "out")]

    @MessageHandler("command", "plain")
    def msg_plain(self, content: Any) -> None:
        self.sender.message_next(1)

    @MessageHandler("command", "generator")
    def msg_generator(self, content: Any) -> Generator[Any, Any, None]:
        yield sleep(0.01)
        self.sender.message_next(1)

    @MessageHandler("command", "thread", threaded=True)
    def msg_thread(self, content: Any) -> None:
        self.sender.message_next(1)

    @MessageHandler("command", "coroutine")
    async def msg_coroutine(self, content: Any) -> None:
        await asyncio.sleep(0)
        await self.sender.message_next(1, _future=True)

    @MessageHandler("command", "outbox", outbox=True)
    def msg_outbox(self, content: Any) -> None:
        self.sender.message_next(1)

    @MessageHandler("command", "own")
    def msg_own(self, content: Any) -> None:
        self.sender.message_next(1, _correlation_id="mine", _headers={"postage-causation-id": "me"})

    @MessageHandler("command", "call")
    def msg_call(self, content: Any) -> Generator[Any, Any, None]:
        assert (yield self.sender.rpc_service(_queue="q", _future=True))

    @RpcHandler("command", "service")
    def rpc_service(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        self.sender.message_next(1)
        reply_func(1)


@pytest.fixture
def sender(broker_url: str) -> Iterator[Sender]:
    with Sender() as sender:
        yield sender


def passed_on(sender: Sender, name: str, **keywords: Any) -> tuple[str | None, str | None]:
    """Send a message, and return correlation and causation id of what its handler sent."""
    with raw_channel() as channel, Running(clerk := Clerk()):
        channel.queue_declare("out")
        getattr(sender, f"message_{name}")(**keywords)
        [(properties, _body)] = take(channel, "out")
        clerk.sender.close()
    return properties.correlation_id, (properties.headers or {}).get("postage-causation-id")


@pytest.mark.parametrize("name", ["plain", "generator", "thread", "coroutine", "outbox"])
def test_the_first_message_gives_its_id_to_the_conversation(sender: Sender, name: str) -> None:
    """In every kind of handler."""
    assert ("17", "17") == passed_on(sender, name, _message_id="17")


def test_a_conversation_goes_on(sender: Sender) -> None:
    """Each message names the one before, all of them the conversation."""
    assert ("talk", "17") == passed_on(sender, "plain", _message_id="17", _correlation_id="talk")


def test_what_the_handler_says_counts(sender: Sender) -> None:
    """It may begin a conversation of its own."""
    assert ("mine", "me") == passed_on(sender, "own", _message_id="17")


def test_a_conversation_goes_on_over_a_call(sender: Sender) -> None:
    """The correlation id of a request is that of the call, so a header carries the other one."""
    conversation, cause = passed_on(sender, "call", _message_id="17", _correlation_id="talk")
    assert "talk" == conversation
    assert cause not in (None, "17")  # the request


def test_outside_of_handlers_nothing_is_added(sender: Sender) -> None:
    """A script begins conversations."""
    with raw_channel() as channel:
        channel.queue_declare("out")
        sender.message_first(_queue="out")
        [(properties, _body)] = take(channel, "out")
    assert (None, None) == (properties.correlation_id, properties.headers)
