# SPDX-License-Identifier: MIT
"""A message whose handler fails is handled again later, or parked after so many attempts."""

from __future__ import annotations

import collections
import random
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from postage.error_queues import known_error_queues
from postage.errors import ExitScheduler, PermanentError, RejectMessage, Retry
from postage.handlers import MessageHandler, RpcHandler
from postage.messaging import GenericProducer, MessageProcessor
from postage.retry import RetryPolicy
from postage.transport.subscriber import Delivery
from tests.nodes import Node
from tests.programs import Program
from tests.programs_for_tests.components import (
    Running,
    Sender,
    TestExchange,
    eqk_of,
    raw_channel,
    rest_of,
    take,
)
from tests.waiting import wait_until

#: Soon, so that a test does not take long; long enough for the broker to be seen at work.
SOON = RetryPolicy(attempts=3, delay=0.2, backoff=1, jitter=0)
ONCE = RetryPolicy(attempts=1)


class Clerk(MessageProcessor):
    """Notes each attempt, and fails as often as the message says."""

    retry = SOON
    retry_by_type = {"status": ONCE}

    def __init__(self, *queues: Any, prefetch: int | None = None) -> None:
        self.attempts: collections.defaultdict[Any, list[int]] = collections.defaultdict(list)
        self.times: collections.defaultdict[Any, list[float]] = collections.defaultdict(list)
        self.handled_by: list[tuple[str, Any]] = []
        super().__init__({"name": "clerk", "pid": "1", "host": "h"}, eqk_of(*(queues or ["q"])))

    def work(self, key: Any, failures: int, error: type[Exception] = ValueError) -> None:
        self.times[key].append(time.time())
        self.attempts[key].append(self.delivery.attempt)
        if len(self.attempts[key]) <= failures:
            raise error(f"failure {len(self.attempts[key])}")
        self.handled_by.append((key, self.delivery.message_id))

    @MessageHandler("command", "work")
    def msg_work(self, content: Any) -> None:
        self.work(content["parameters"]["key"], content["parameters"]["failures"])

    @MessageHandler("command", "hard", retry=RetryPolicy(attempts=2, delay=0.1, jitter=0))
    def msg_hard(self, content: Any) -> None:
        self.work("hard", 99)

    @MessageHandler("status", "odd")
    def msg_odd(self, content: Any) -> None:
        self.work("odd", 99)

    @MessageHandler("command", "poison")
    def msg_poison(self, content: Any) -> None:
        self.work("poison", 99, PermanentError)

    @MessageHandler("command", "patience")
    def msg_patience(self, content: Any) -> None:
        self.attempts["patience"].append(self.delivery.attempt)
        if len(self.attempts["patience"]) < 3:
            raise Retry(delay=0.1)
        self.handled_by.append(("patience", None))

    @MessageHandler("command", "two")
    def msg_first(self, content: Any) -> None:
        self.work("first", 0)

    @MessageHandler("command", "two")
    def msg_second(self, content: Any) -> None:
        self.work("second", 2)

    @RpcHandler("command", "divide")
    def rpc_divide(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        self.work("divide", 99)

    @MessageHandler("command", "refuse")
    def msg_fails_first(self, content: Any) -> None:
        self.work("before", 1)

    @MessageHandler("command", "refuse")
    def msg_refuses(self, content: Any) -> None:
        raise RejectMessage


@pytest.fixture
def sender(broker_url: str) -> Iterator[Sender]:
    with Sender() as sender:
        yield sender


def test_a_message_is_tried_again_after_a_pause(sender: Sender) -> None:
    """Never early. It keeps its id, and knows which attempt it is."""
    with Running(clerk := Clerk()):
        sender.message_work(key="a", failures=2, _message_id="17", _headers={"own": "header"})
        wait_until(lambda: clerk.handled_by)
    assert [("a", "17")] == clerk.handled_by
    assert [1, 2, 3] == clerk.attempts["a"]
    first, second, third = clerk.times["a"]
    assert second - first >= SOON.delay
    assert third - second >= SOON.delay
    assert [] == rest_of("q")
    assert [] == rest_of("q.error")


def test_others_are_handled_while_one_waits(sender: Sender) -> None:
    """It waits in the broker, and holds up nobody."""
    with Running(clerk := Clerk()):
        sender.message_work(key="a", failures=1)
        for key in "bcd":
            sender.message_work(key=key, failures=0)
        wait_until(lambda: len(clerk.handled_by) == 4)
    assert ["b", "c", "d", "a"] == [key for key, _id in clerk.handled_by]


def test_after_the_last_attempt_it_is_parked(sender: Sender) -> None:
    """With what failed, how often and when, and with the headers of its sender."""
    with Running(clerk := Clerk()), raw_channel() as channel:
        sender.message_work(key="a", failures=99, _message_id="17", _headers={"own": "header"})
        [(properties, body)] = take(channel, "q.error")
    assert [1, 2, 3] == clerk.attempts["a"]
    headers = properties.headers
    assert ("17", "header") == (properties.message_id, headers["own"])
    assert ("failed", "ValueError", "failure 3") == (
        headers["postage-reason"],
        headers["postage-exception"],
        headers["postage-error"],
    )
    assert 3 == headers["postage-attempts"]
    assert (TestExchange.name, "q") == (
        headers["postage-exchange"],
        headers["postage-routing-key"],
    )
    assert "processor.py" not in headers["postage-traceback"]
    assert "in msg_work" in headers["postage-traceback"]
    first, last = (
        datetime.fromisoformat(headers[name].replace("Z", "+00:00"))
        for name in ("postage-first-failure", "postage-parked-at")
    )
    assert first <= last
    assert b'"key": "a"' in body
    assert not [name for name in headers if name.startswith("postage-bit")]


@pytest.mark.parametrize(
    ("name", "category", "attempts"), [("hard", "command", 2), ("poison", "command", 1)]
)
def test_a_handler_or_an_exception_may_have_another_policy(
    sender: Sender, name: str, category: str, attempts: int
) -> None:
    """The decorator's goes before the processor's; a `PermanentError` before any."""
    with Running(clerk := Clerk()), raw_channel() as channel:
        getattr(sender, f"message_{name}")()
        take(channel, "q.error")
    assert list(range(1, attempts + 1)) == clerk.attempts[name]


def test_a_type_of_messages_may_have_another_policy(sender: Sender) -> None:
    """Here status messages are tried once."""
    with Running(clerk := Clerk()), raw_channel() as channel:
        body = b'{"type":"status","name":"odd","category":"message","content":{}}'
        channel.basic_publish(TestExchange.name, "q", body)
        [(properties, parked)] = take(channel, "q.error")
    assert ([1], body) == (clerk.attempts["odd"], parked)
    assert 1 == properties.headers["postage-attempts"]


def test_a_handler_may_ask_for_another_time(sender: Sender) -> None:
    """That is no failure."""
    with Running(clerk := Clerk()):
        sender.message_patience()
        wait_until(lambda: clerk.handled_by)
        assert [1, 2, 3] == clerk.attempts["patience"]
        assert 0 == clerk.health().failed


def test_only_the_handler_that_failed_runs_again(sender: Sender) -> None:
    """The other one has done its work."""
    with Running(clerk := Clerk()):
        sender.message_two()
        wait_until(lambda: len(clerk.handled_by) == 2)
    assert ([1], [1, 2, 3]) == (clerk.attempts["first"], clerk.attempts["second"])


def test_a_rejected_message_is_tried_again_for_those_who_failed_before(sender: Sender) -> None:
    """The rejection is about the message as it came, and goes to the error queue."""
    with Running(clerk := Clerk()), raw_channel() as channel:
        sender.message_refuse()
        take(channel, "q.error")
        wait_until(lambda: clerk.handled_by)
    assert [1, 2] == clerk.attempts["before"]


def test_a_component_hears_of_its_failures(
    sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    """Of each attempt, and of what cannot be read. A hook that fails itself does no harm."""

    class Telling(Clerk):
        told: list[tuple[str, int]] = []

        def on_error(self, delivery: Delivery, error: BaseException) -> None:
            self.told.append((type(error).__name__, delivery.attempt))
            raise LookupError("no such counter")

    with Running(Telling()), raw_channel() as channel:
        sender.message_work(key="a", failures=99)
        take(channel, "q.error")
        channel.basic_publish(TestExchange.name, "q", b"no JSON")
        take(channel, "q.error")
        sender.message_patience()
        sender.message_work(key="b", failures=0)
    assert [("ValueError", attempt) for attempt in (1, 2, 3)] == Telling.told[:3]
    assert [("DecodeError", 1)] == Telling.told[3:]
    assert "Telling.on_error() failed" in caplog.text


def test_a_call_is_never_retried(sender: Sender) -> None:
    """Its caller has the exception at once, and decides."""
    with Running(clerk := Clerk()):
        reply = sender.rpc_divide()
        assert ("ValueError", "failure 1") == (reply.value, reply.message)
        sender.message_work(key="a", failures=0)
        wait_until(lambda: clerk.handled_by)
    assert [1] == clerk.attempts["divide"]


def test_a_message_whose_headers_leave_no_room_is_parked(
    sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    """Ours beside them would not fit into a frame, which would cost the connection."""
    with Running(clerk := Clerk()), raw_channel() as channel:
        sender.message_work(key="a", failures=99, _headers={"large": "x" * 130_500})
        [(properties, _body)] = take(channel, "q.error")
        sender.message_work(key="b", failures=0)
        wait_until(lambda: clerk.handled_by)
    assert [1] == clerk.attempts["a"]
    assert 130_500 == len(properties.headers["large"])
    assert "no retry of a message from 'q': its headers leave no room" in caplog.text
    assert 0 == clerk.health().reconnects


def test_a_message_of_a_queue_of_one_instance_is_retried_there(sender: Sender) -> None:
    """Also if only the broker knows its name."""
    with Running(clerk := Clerk({"name": "", "flags": {"exclusive": True}})):
        sender.message_work(key="a", failures=1, _key="")
        wait_until(lambda: clerk.handled_by)
    assert [1, 2] == clerk.attempts["a"]


def test_a_message_whose_queue_is_gone_by_then_is_kept(sender: Sender) -> None:
    """In the queue for what has no goal any more."""
    with Running(clerk := Clerk({"name": "gone", "flags": {"exclusive": True}})):
        sender.message_hard(_key="gone", _message_id="17")
        wait_until(lambda: clerk.attempts["hard"])
    with raw_channel() as channel:
        [(properties, _body)] = take(channel, "postage-unroutable")
    assert "17" == properties.message_id


def test_a_message_that_waits_outlives_the_broker(sender: Sender, node: Node) -> None:
    """And its component, which comes back by itself."""
    with Running(clerk := Clerk()):
        sender.message_work(key="warm", failures=1)  # the cascade is there
        wait_until(lambda: clerk.handled_by)
        for number in range(20):
            sender.message_work(key=number, failures=1)
        wait_until(lambda: len(clerk.attempts) == 21)
        node.kill()
        node.start()
        wait_until(lambda: len(clerk.handled_by) >= 21, 120)
    assert {"warm", *range(20)} == {key for key, _id in clerk.handled_by}


def test_every_message_is_handled_or_parked(sender: Sender) -> None:
    """Whatever number of its attempts fail, and in whatever order they come back."""
    generator = random.Random(7)
    failures = {number: generator.randint(0, 4) for number in range(300)}
    with Running(clerk := Clerk()), raw_channel() as channel:
        with sender.batch() as batch:
            for number, count in failures.items():
                batch.message_work(key=number, failures=count)
        fine = {number for number, count in failures.items() if count < 3}
        wait_until(lambda: {key for key, _id in clerk.handled_by} >= fine, 120)
        take(channel, "q.error", len(failures) - len(fine))
    assert fine == {key for key, _id in clerk.handled_by}
    for number, count in failures.items():
        assert list(range(1, min(count, 2) + 2)) == clerk.attempts[number]
        pauses = [
            later - earlier
            for earlier, later in zip(clerk.times[number], clerk.times[number][1:], strict=False)
        ]
        assert all(pause >= SOON.delay for pause in pauses)


def test_a_component_that_quits_does_not_forget_a_failure(sender: Sender) -> None:
    """The copy for the handler that failed is sent before the message is settled."""

    class Quitting(Clerk):
        @MessageHandler("command", "leave")
        def msg_fails(self, content: Any) -> None:
            raise ValueError

        @MessageHandler("command", "leave")
        def msg_leaves(self, content: Any) -> None:
            raise ExitScheduler

    with Running(Quitting()) as running:
        sender.message_leave()
        running.join()
    with raw_channel() as channel:
        [(properties, _body)] = take(channel, "q")
    assert (2, "msg_fails") == (
        properties.headers["postage-attempt"],
        properties.headers["postage-handler"],
    )


@pytest.mark.parametrize("way", ["retry", "park"])
def test_a_process_that_is_killed_between_copy_and_ack_loses_nothing(
    broker_url: str, way: str
) -> None:
    """The message is delivered again beside its copy: twice at most, with the same id."""
    program = ["tests/programs_for_tests/failing.py", way]
    with GenericProducer({"name": "tester"}) as producer, raw_channel() as channel:
        with Program([*program, "kill"]) as killed:
            killed.wait_for_line("ready")
            producer.message_work(_queue="q", _message_id="17")
            assert -signal.SIGKILL == killed.wait()
        with Program(program) as other:
            parked = take(channel, "q.error", 2)
            other.wait_for_line("moved")
            producer.message_quit(_queue="q")
            assert 0 == other.wait()
    assert ["17", "17"] == [properties.message_id for properties, _body in parked]
    assert [] == rest_of("q") + rest_of("q.error")


def test_the_error_queues_of_a_component_are_known(sender: Sender) -> None:
    """Also if only the broker moves messages there: after a rejection, or many deliveries."""

    class Rejecting(Clerk):
        @MessageHandler("command", "reject")
        def msg_reject(self, content: Any) -> None:
            raise RejectMessage

    assert [] == known_error_queues()
    with Running(Rejecting("q", "other")), raw_channel() as channel:
        sender.message_reject()
        take(channel, "q.error")
        wait_until(lambda: known_error_queues() == ["q.error"])
    with raw_channel() as channel:
        sender.message_work(key="a", failures=0, _queue="other")
        for _ in range(6):
            method = wait_until(lambda: channel.basic_get("other")[0])
            channel.basic_nack(method.delivery_tag)
    with Running(Rejecting("other")):
        wait_until(lambda: known_error_queues() == ["other.error", "q.error"])
