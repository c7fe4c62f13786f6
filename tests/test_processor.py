# SPDX-License-Identifier: MIT
"""A component: what becomes of each message, whatever kind of handler it has."""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pika
import psutil
import pytest

from postage import processor as processors
from postage.errors import (
    ChannelClosedError,
    ClosedError,
    ForkedError,
    PostageError,
)
from postage.messaging import (
    FilterError,
    Handler,
    MessageFilter,
    MessageHandler,
    MessageHandlerFullBody,
    MessageProcessor,
    MessageResult,
    MessageResultError,
    MessageResultException,
    RejectMessage,
    RpcHandler,
)
from postage.microthreads import ExitScheduler, MicroThread, sleep
from postage.retry import RetryPolicy
from tests.nodes import Node
from tests.programs import Program
from tests.programs_for_tests.components import (
    Running,
    Sender,
    TestExchange,
    command,
    eqk_of,
    raw_channel,
    rest_of,
    take,
)
from tests.waiting import wait_until

FINGERPRINT = {"name": "tested", "type": "application"}

#: The ways to write a handler.
KINDS = ["plain", "generator", "threaded", "async", "class", "class with a generator"]


@pytest.fixture
def sender(broker_url: str) -> Iterator[Sender]:
    """A producer whose messages go to the queue "q"."""
    with Sender() as producer:
        yield producer


class Logging(MessageProcessor):
    """A processor that notes what it handled, and consumes "q" unless told otherwise."""

    retry = RetryPolicy(attempts=1)  # what fails is parked at once

    def __init__(self, *queues: Any) -> None:
        self.log: list[Any] = []
        super().__init__(FINGERPRINT, eqk_of(*(queues or ("q",))))

    def wait_for(self, *entries: Any) -> None:
        """Wait until exactly these were noted."""
        wait_until(lambda: len(self.log) >= len(entries), message=f"{entries} in {self.log}")
        assert [*entries] == self.log

    @MessageHandler("command", "last")
    def msg_last(self, content: Any) -> None:
        """Note a message that is sent behind others."""
        self.log.append("last")


Act = Callable[[Any, Any], Any]


def class_with(kind: str, act: Act) -> type[Logging]:
    """Return a processor class whose handler of "run" is of a kind, and does something."""

    class Plain(Logging):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> None:
            act(self, content)

    class Generating(Logging):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> Generator[Any, Any, None]:
            yield sleep(0.01)
            act(self, content)

    class Threaded(Logging):
        @MessageHandler("command", "run", threaded=True)
        def msg_run(self, content: Any) -> None:
            act(self, content)

    class Async(Logging):
        @MessageHandler("command", "run")
        async def msg_run(self, content: Any) -> None:
            await asyncio.sleep(0.01)
            act(self, content)

    class ByClass(Logging):
        @MessageHandler("command", "run")
        class MsgRun(Handler):
            def call(self) -> None:
                act(self.processor, self.data)

    class ByGeneratingClass(Logging):
        @MessageHandler("command", "run")
        class MsgRun(Handler):
            def call(self) -> Generator[Any, Any, None]:
                yield sleep(0.01)
                act(self.processor, self.data)

    classes = [Plain, Generating, Threaded, Async, ByClass, ByGeneratingClass]
    return dict(zip(KINDS, classes, strict=True))[kind]


def raising(error: BaseException) -> Act:
    """Return what notes that it ran, and raises."""

    def act(processor: Any, _content: Any) -> None:
        processor.log.append("ran")
        raise error

    return act


# ---------------------------------------------------------------------- the outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_a_handled_message_is_acked(kind: str, sender: Sender) -> None:
    """It is gone from its queue and parked nowhere, and what the handler returns means nothing."""
    own = class_with(kind, lambda processor, content: processor.log.append(content))()

    with Running(own):
        sender.message_run({"a": 1})
        own.wait_for({"parameters": {"a": 1}})

    assert [] == rest_of("q") + rest_of("q.error")


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_whose_handler_raises_is_parked_at_once(kind: str, sender: Sender) -> None:
    """With the exception in its headers. The component goes on."""
    own = class_with(kind, raising(LookupError("no such thing")))()

    with Running(own):
        sender.message_run({"a": 1})
        own.wait_for("ran")
        with raw_channel() as channel:
            properties, body = take(channel, "q.error")[0]
        sender.message_last()
        own.wait_for("ran", "last")

    assert {"parameters": {"a": 1}} == json.loads(body)["content"]
    assert ("failed", "LookupError", "no such thing") == tuple(
        properties.headers[f"postage-{key}"] for key in ("reason", "exception", "error")
    )
    assert [] == rest_of("q") + rest_of("q.error")


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_that_raises_filter_error_has_skipped_its_message(
    kind: str, sender: Sender
) -> None:
    """It is acked, as if a filter had kept it from the handler."""
    own = class_with(kind, raising(FilterError("not mine")))()

    with Running(own):
        sender.message_run()
        sender.message_last()
        wait_until(lambda: len(own.log) == 2)

    assert {"ran", "last"} == {*own.log}
    assert [] == rest_of("q") + rest_of("q.error")


@pytest.mark.parametrize("kind", KINDS)
def test_a_rejected_message_is_dead_lettered_by_the_broker(kind: str, sender: Sender) -> None:
    """RejectMessage leaves it to the queue's own arguments where the message goes."""
    own = class_with(kind, raising(RejectMessage()))()

    with Running(own):
        sender.message_run()
        own.wait_for("ran")
        with raw_channel() as channel:
            properties, _ = take(channel, "q.error")[0]

    assert "rejected" == properties.headers["x-first-death-reason"]
    assert "postage-reason" not in properties.headers
    assert [] == rest_of("q")


@pytest.mark.parametrize("kind", KINDS)
def test_exit_scheduler_settles_the_message_and_ends_all(kind: str, sender: Sender) -> None:
    """Other components of the scheduler leave, too, and the message does not come again."""
    own, other = class_with(kind, raising(ExitScheduler()))(), Logging("other")

    with Running(own, other) as running:
        sender.message_run()
        running.join()

    assert ["ran"] == own.log
    assert [] == rest_of("q") + rest_of("q.error")


@pytest.mark.parametrize("kind", ["plain", "threaded", "class"])
def test_stop_iteration_settles_the_message_and_ends_only_its_component(
    kind: str, sender: Sender
) -> None:
    """A generator or coroutine cannot raise it (PEP 479): for those it is an error."""
    own, other = class_with(kind, raising(StopIteration()))(), Logging("other")

    with Running(own, other):
        sender.message_run()
        wait_until(lambda: own.consumer.subscriber.stopped())
        sender.message_last(_key="other")
        other.wait_for("last")

    assert ["ran"] == own.log
    assert [] == rest_of("q") + rest_of("q.error")


def test_quit_ends_all(sender: Sender) -> None:
    """The command that every processor knows."""
    own, other = Logging(), Logging("other")

    with Running(own, other) as running:
        sender.message_quit()
        running.join()

    assert [] == rest_of("q")


def test_a_custom_quit_handler_runs_before_the_built_in_one(sender: Sender) -> None:
    """In 1.2.1 it never ran."""

    class Own(Logging):
        @MessageHandler("command", "quit")
        def say_goodbye(self, content: Any) -> None:
            self.log.append("goodbye")

    with Running(own := Own()) as running:
        sender.message_quit()
        running.join()

    assert ["goodbye"] == own.log


def test_quit_can_be_switched_off(sender: Sender) -> None:
    """`msg_quit = None`: then it is a message that nobody handles."""

    class Own(Logging):
        msg_quit = None  # type: ignore[assignment]

    with Running(own := Own()):
        sender.message_quit()
        sender.message_last()
        own.wait_for("last")
        with raw_channel() as channel:
            properties, _ = take(channel, "q.error")[0]

    assert "unhandled" == properties.headers["postage-reason"]


# ------------------------------------------------------------------ several handlers


class Three(Logging):
    """Three handlers of one message."""

    fails: str | None = None

    def note(self, name: str, content: dict[str, Any]) -> None:
        self.log.append((name, dict(content["parameters"])))
        content["parameters"].clear()
        if name == self.fails:
            raise LookupError(name)

    @MessageHandler("command", "run")
    def first(self, content: Any) -> None:
        self.note("first", content)

    @MessageHandler("command", "run")
    def second(self, content: Any) -> None:
        self.note("second", content)

    @MessageHandlerFullBody("command", "run")
    def third(self, body: Any) -> None:
        self.note("third", body["content"])


def test_several_handlers_each_get_their_own_copy(sender: Sender) -> None:
    """What one does to the content does not reach the next one."""
    with Running(own := Three()):
        sender.message_run({"a": 1})
        own.wait_for(("first", {"a": 1}), ("second", {"a": 1}), ("third", {"a": 1}))


def test_when_one_of_several_handlers_fails_the_others_run_all_the_same(sender: Sender) -> None:
    """And the message is parked once, for the one that failed."""

    class Own(Three):
        fails = "second"

    with Running(own := Own()):
        sender.message_run({"a": 1})
        sender.message_last()
        own.wait_for(("first", {"a": 1}), ("second", {"a": 1}), ("third", {"a": 1}), "last")
        with raw_channel() as channel:
            properties, body = take(channel, "q.error")[0]

    assert "second" == properties.headers["postage-error"].strip("'")
    assert "second" == properties.headers["postage-handler"]
    assert {"a": 1} == json.loads(body)["content"]["parameters"]
    assert [] == rest_of("q") + rest_of("q.error")


def test_a_message_that_no_handler_names_goes_to_the_one_without_a_name(sender: Sender) -> None:
    """In 1.2.1 a handler without a name got only messages whose name was null."""

    class Own(Logging):
        @MessageHandlerFullBody("command")
        def msg_any(self, body: Any) -> None:
            self.log.append(body["name"])

    with Running(own := Own()):
        sender.message_walk()
        sender.message_last()
        sender.forward({**command("x"), "name": None})
        own.wait_for("walk", "last", None)


def test_a_full_body_has_the_fingerprint_of_the_sender(sender: Sender) -> None:
    """And all the other keys of the wire format."""

    class Own(Logging):
        @MessageHandlerFullBody("status", "online")
        def msg_online(self, body: Any) -> None:
            self.log.append(body)

    with Running(own := Own()):
        sender.forward({**command("online"), "type": "status", "fingerprint": {"pid": "12"}})
        wait_until(lambda: own.log)

    assert {**command("online"), "type": "status", "fingerprint": {"pid": "12"}} == own.log[0]


# -------------------------------------------------------------------------- filters


def add(data: Any, text: str, before: str = "") -> Any:
    data["parameters"] = f"{before}{data['parameters']}{text}"
    return data


def test_filters_change_what_the_handler_gets_from_the_bottom_up(sender: Sender) -> None:
    """The result of one is what the next one gets."""

    class Own(Logging):
        @MessageFilter(add, "c", before="<")
        @MessageHandler("command", "run")
        @MessageFilter(add, "b")
        def msg_run(self, content: Any) -> None:
            self.log.append(content["parameters"])

        @MessageHandler("command", "run")
        def msg_run_too(self, content: Any) -> None:
            self.log.append(content["parameters"])

    with Running(own := Own()):
        sender.message_run("a")
        own.wait_for("<abc", "a")


class Unprintable(Exception):
    """An error that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.mark.parametrize(
    "error",
    [
        FilterError("not today"),
        AttributeError("x"),
        KeyError("x"),
        RejectMessage(),
        ExitScheduler(),
        StopIteration(),
        Unprintable(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_exception_of_a_filter_keeps_the_message_from_its_handler(
    error: Exception, sender: Sender
) -> None:
    """As 1.2.1's README says. Its code let the handler run after an AttributeError."""

    def refuse(data: Any) -> Any:
        raise error

    class Own(Logging):
        @MessageHandler("command", "run")
        @MessageFilter(refuse)
        def filtered(self, content: Any) -> None:
            self.log.append("filtered")

        @MessageHandler("command", "run")
        def unfiltered(self, content: Any) -> None:
            self.log.append("unfiltered")

    with Running(own := Own()):
        sender.message_run()
        sender.message_last()
        own.wait_for("unfiltered", "last")

    assert [] == rest_of("q") + rest_of("q.error")


def test_a_filter_of_a_full_body_handler_gets_the_full_body(sender: Sender) -> None:
    """And may return anything, None included."""
    names: list[str] = []

    class Own(Logging):
        @MessageFilter(lambda body: names.append(body["name"]))
        @MessageHandlerFullBody("command", "run")
        class MsgRun(Handler):
            def call(self) -> None:
                self.processor.log.append(self.data)

    with Running(own := Own()):
        sender.message_run()
        own.wait_for(None)

    assert ["run"] == names


# ------------------------------------------------------------- kinds of handlers, time


def test_a_generator_handler_lets_other_messages_be_handled(sender: Sender) -> None:
    """It is a microthread of its own from its first yield on."""

    class Own(Logging):
        opened = False

        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> Generator[Any, Any, None]:
            self.log.append("begun")
            while not self.opened:
                yield 1
            self.log.append("ended")

        @MessageHandler("command", "open")
        def msg_open(self, content: Any) -> None:
            self.opened = True
            self.log.append("opened")

    with Running(own := Own()):
        sender.message_last()  # the first message of a quorum queue comes alone
        own.wait_for("last")
        sender.message_run()
        sender.message_open()
        own.wait_for("last", "begun", "opened", "ended")

    assert [] == rest_of("q")


def test_threaded_handlers_run_side_by_side_in_a_bounded_number_of_threads(sender: Sender) -> None:
    """`threads` of them; the scheduler goes on meanwhile."""
    go_on = threading.Event()

    class Own(Logging):
        threads = 3

        @MessageHandler("command", "run", threaded=True)
        def msg_run(self, content: Any) -> None:
            self.log.append(threading.current_thread().name)
            assert go_on.wait(30)

    with Running(own := Own()):
        sender.message_last()
        own.wait_for("last")
        for _ in range(6):
            sender.message_run()
        wait_until(lambda: len(own._in_flight) == 6)
        sender.message_last()
        wait_until(lambda: own.log.count("last") == 2)
        running = [name for name in own.log if name != "last"]
        go_on.set()
        wait_until(lambda: len(own.log) == 8)

    assert ["postage-tested-0", "postage-tested-1", "postage-tested-2"] == sorted(running)
    assert [] == rest_of("q") + rest_of("q.error")


def test_async_handlers_run_side_by_side_in_one_loop(sender: Sender) -> None:
    """Which is the same for all components of the process."""

    class Own(Logging):
        @MessageHandler("command", "run")
        async def msg_run(self, content: Any) -> None:
            self.log.append((asyncio.get_running_loop(), threading.current_thread()))
            while len(self.log) + len(other.log) < 4:
                await asyncio.sleep(0.01)

    own, other = Own(), Own("other")
    with Running(own, other):
        for key in ("q", "other"):
            for _ in range(2):
                sender.message_run(_key=key)
        wait_until(lambda: len(own.log) + len(other.log) == 4)
        wait_until(lambda: not own._in_flight and not other._in_flight)

    assert 1 == len({*own.log, *other.log})


@pytest.mark.parametrize("kind", ["a generator", "a coroutine"])
def test_a_threaded_handler_that_is_a_generator_or_coroutine_is_run_all_the_same(
    kind: str, sender: Sender
) -> None:
    """Its thread only makes the generator; acking the message then would lose it."""

    class Own(Logging):
        @MessageHandler("command", "a generator", threaded=True)
        def msg_generator(self, content: Any) -> Generator[Any, Any, None]:
            yield sleep(0.01)
            self.log.append("ran")

        @MessageHandler("command", "a coroutine", threaded=True)
        async def msg_coroutine(self, content: Any) -> None:
            await asyncio.sleep(0.01)
            self.log.append("ran")

    with Running(own := Own()):
        sender.forward(command(kind))
        own.wait_for("ran")

    assert [] == rest_of("q") + rest_of("q.error")


def test_a_threaded_class_handler_may_return_a_generator(sender: Sender) -> None:
    """Its `call()` runs in the thread, what it returns in the scheduler."""

    class Own(Logging):
        @MessageHandler("command", "run", threaded=True)
        class MsgRun(Handler):
            def call(self) -> Generator[Any, Any, None]:
                yield sleep(0.01)
                self.processor.log.append("ran")

    with Running(own := Own()):
        sender.message_run()
        own.wait_for("ran")


def test_an_asynchronous_generator_is_no_handler_and_its_message_is_parked(sender: Sender) -> None:
    """Nothing could run it; acking the message would lose it."""

    class Own(Logging):
        @MessageHandler("command", "run")
        async def msg_run(self, content: Any) -> Any:
            yield 1

    with Running(Own()):
        sender.message_run()
        with raw_channel() as channel:
            properties, _ = take(channel, "q.error")[0]

    assert ("failed", "TypeError") == (
        properties.headers["postage-reason"],
        properties.headers["postage-exception"],
    )


def test_a_coroutine_that_was_cancelled_parks_its_message(sender: Sender) -> None:
    """CancelledError is no Exception: it ended the whole component."""

    class Own(Logging):
        @MessageHandler("command", "run")
        async def msg_run(self, content: Any) -> None:
            raise asyncio.CancelledError

    with Running(own := Own()):
        sender.message_run()
        with raw_channel() as channel:
            properties, _ = take(channel, "q.error")[0]
        sender.message_last()
        own.wait_for("last")

    assert "CancelledError" == properties.headers["postage-exception"]


def test_two_processors_of_one_scheduler_do_not_hold_each_other_up(sender: Sender) -> None:
    """In 1.2.1 the first one blocked in its consuming loop, also with nothing to do."""
    own, other, idle = Logging(), Logging("other"), Logging("idle")

    with Running(idle, own, other):
        for _ in range(3):
            sender.message_last()
            sender.message_last(_key="other")
        own.wait_for("last", "last", "last")
        other.wait_for("last", "last", "last")


def test_a_plain_microthread_goes_on_beside_an_idle_processor(sender: Sender) -> None:
    """With `sleep` it takes no processor time either."""
    ticks: list[int] = []

    class Ticking(MicroThread):
        def step(self) -> Any:
            ticks.append(1)
            return sleep(0.01)

    with Running(own := Logging()) as running:
        running.scheduler.add_microthread(ticking := Ticking())
        wait_until(lambda: len(ticks) > 10)
        ticking.step = lambda: next(iter(()))  # type: ignore[method-assign]
        sender.message_last()
        own.wait_for("last")


def test_a_scheduler_goes_on_after_its_last_processor_has_left(sender: Sender) -> None:
    """The loop of the connections is closed then, and must not be waited on."""
    ticks: list[int] = []

    class Ticking(MicroThread):
        def step(self) -> Any:
            ticks.append(1)
            if len(ticks) > 1000:
                raise StopIteration
            return sleep(0.001)

    own = Logging()
    running = Running(own)
    running.scheduler.add_microthread(Ticking())
    with running:
        sender.close()
        own.stop_consuming()
        running.join()

    assert 1001 == len(ticks)


def test_a_processor_runs_without_a_scheduler_too(sender: Sender) -> None:
    """`start_consuming()` returns when it was told to stop."""
    own = Logging()
    thread = threading.Thread(target=own.start_consuming)
    thread.start()
    sender.message_last()
    own.wait_for("last")
    own.stop_consuming()
    thread.join(30)

    assert False is thread.is_alive()
    assert [] == rest_of("q")


# --------------------------------------------------------- calls from inside handlers


class Adding(Logging):
    """Answers "add" on the queue "adder"."""

    def __init__(self) -> None:
        super().__init__("adder")

    @RpcHandler("command", "add")
    def rpc_add(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func(sum(content["parameters"]))


def test_a_generator_handler_calls_another_component_and_its_own(sender: Sender) -> None:
    """1.2.1 waited for itself until the timeout."""

    class Own(Logging):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> Generator[Any, Any, None]:
            reply = yield sender.rpc_add(1, 2, _key="adder", _future=True)
            self.log.append(reply.value)
            reply = yield sender.rpc_double(reply.value, _future=True)
            self.log.append(reply.value)

        @RpcHandler("command", "double")
        def rpc_double(self, content: Any, reply_func: Callable[[Any], None]) -> None:
            reply_func(2 * content["parameters"])

    with Running(own := Own(), Adding()):
        sender.message_last()
        own.wait_for("last")
        sender.message_run()
        own.wait_for("last", 3, 6)


def test_an_async_handler_calls_another_component_and_its_own(sender: Sender) -> None:
    """It awaits the future; the blocking form says that it would block the loop."""

    class Own(Logging):
        @MessageHandler("command", "run")
        async def msg_run(self, content: Any) -> None:
            reply = await sender.rpc_add(1, 2, _key="adder", _future=True)
            self.log.append(reply.value)
            reply = await sender.rpc_double(reply.value, _future=True)
            self.log.append(reply.value)
            with pytest.raises(PostageError, match="would block the event loop"):
                sender.rpc_double(1)
            self.log.append("refused")

        @RpcHandler("command", "double")
        async def rpc_double(self, content: Any, reply_func: Callable[[Any], None]) -> None:
            reply_func(2 * content["parameters"])

    with Running(own := Own(), Adding()):
        sender.message_last()
        own.wait_for("last")
        sender.message_run()
        own.wait_for("last", 3, 6, "refused")


@pytest.mark.parametrize("threaded", [False, True])
def test_a_handler_makes_a_blocking_call_to_a_component_elsewhere(
    threaded: bool, sender: Sender
) -> None:
    """A plain one runs the loop meanwhile, so its connections stay alive."""

    class Own(Logging):
        @MessageHandler("command", "run", threaded=threaded)
        def msg_run(self, content: Any) -> None:
            self.log.append(sender.rpc_add(1, 2, _key="adder").value)

    with Running(Adding()), Running(own := Own()):
        sender.message_run()
        own.wait_for(3)


def test_a_threaded_handler_calls_its_own_component(sender: Sender) -> None:
    """The scheduler is free to answer meanwhile."""

    class Own(Logging):
        @MessageHandler("command", "run", threaded=True)
        def msg_run(self, content: Any) -> None:
            self.log.append(sender.rpc_double(4).value)

        @RpcHandler("command", "double", threaded=True)
        def rpc_double(self, content: Any, reply_func: Callable[[Any], None]) -> None:
            reply_func(2 * content["parameters"])

    with Running(own := Own()):
        sender.message_last()
        own.wait_for("last")
        sender.message_run()
        own.wait_for("last", 8)


# ------------------------------------------------------------------- heartbeats, idling


@pytest.fixture
def heartbeat(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Connections with a heartbeat of two seconds, which is also the value."""
    monkeypatch.setenv("POSTAGE_URL", f"{broker_url}?heartbeat=2")
    return 2


def compute(seconds: float) -> None:
    """Keep the thread busy with Python code, as a handler would that computes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


@pytest.mark.slow
def test_a_handler_that_computes_for_three_heartbeats_keeps_its_connection(heartbeat: int) -> None:
    """Its message is acked once. 1.2.1 lost the connection and the component."""

    class Own(Logging):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> None:
            self.log.append("run")
            compute(3 * heartbeat)

    with Sender() as sender, Running(own := Own()):
        sender.message_run()
        sender.message_last()
        own.wait_for("run", "last")
        connection = own.consumer.conn_broker

    assert 0 == connection.losses
    assert [] == rest_of("q") + rest_of("q.error")


@pytest.mark.slow
def test_a_blocking_call_of_three_heartbeats_keeps_the_connections_of_both_sides(
    heartbeat: int,
) -> None:
    """The called handler computes, the calling one waits inside its own handler."""

    class Slow(Logging):
        @RpcHandler("command", "compute")
        def rpc_compute(self, content: Any, reply_func: Callable[[Any], None]) -> None:
            self.log.append("computing")
            compute(3 * heartbeat)
            reply_func("computed")

    class Own(Logging):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> None:
            self.log.append(sender.rpc_compute(_key="slow").value)

    with Sender() as sender, Running(slow := Slow("slow")), Running(own := Own()):
        sender.message_run()
        sender.message_last()
        own.wait_for("computed", "last")
        connections = [own.consumer.conn_broker, slow.consumer.conn_broker, sender.conn_broker]

    assert ["computing"] == slow.log
    assert [0, 0, 0] == [connection.losses for connection in connections]
    assert [] == rest_of("q") + rest_of("slow")


@pytest.mark.embedded  # on RabbitMQ it takes long, and shows the same
@pytest.mark.slow
def test_an_idle_component_takes_less_than_a_hundredth_of_a_core(broker_url: str) -> None:
    """1.2.1 could not have a scheduler with two components that idle."""
    with Program(["tests/programs_for_tests/idle.py"]) as program:
        program.wait_for_line("idle")

        assert psutil.Process(program.pid).cpu_percent(interval=5.0) < 1.0


# ------------------------------------------------------------------------ RPC, server


class Answering(Logging):
    """Answers calls in all the ways that there are."""

    @RpcHandler("command", "value")
    def rpc_value(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func({"got": content["parameters"]})

    @RpcHandler("command", "message")
    def rpc_message(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func(MessageResult(1, "well done"))

    @RpcHandler("command", "refuse")
    def rpc_refuse(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func(MessageResultError("no"))

    @RpcHandler("command", "silent")
    def rpc_silent(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        self.log.append("silent")

    @RpcHandler("command", "filtered")
    @MessageFilter(lambda content: content["missing"])
    def rpc_filtered(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        self.log.append("filtered")

    @RpcHandler("command", "raise")
    def rpc_raise(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        raise LookupError("not found")

    @RpcHandler("command", "unprintable")
    def rpc_unprintable(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        raise Unprintable

    @RpcHandler("command", "filtered_unprintably")
    @MessageFilter(lambda content: (_ for _ in ()).throw(Unprintable))
    def rpc_filtered_unprintably(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        self.log.append("filtered")

    @RpcHandler("command", "surrogate")
    def rpc_surrogate(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        raise LookupError("\ud800")

    @RpcHandler("command", "unserialisable")
    def rpc_unserialisable(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func(object())

    @RpcHandler("command", "twice")
    def rpc_twice(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func(1)
        raise LookupError("afterwards")

    @RpcHandler("command", "reject")
    def rpc_reject(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        raise RejectMessage("not me")

    @RpcHandler("command", "exit")
    def rpc_exit(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        raise ExitScheduler

    @RpcHandler("command", "stop")
    def rpc_stop(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        raise StopIteration

    @RpcHandler("command", "generator")
    def rpc_generator(
        self, content: Any, reply_func: Callable[[Any], None]
    ) -> Generator[Any, Any, None]:
        yield sleep(0.01)
        reply_func("generator")

    @RpcHandler("command", "threaded", threaded=True)
    def rpc_threaded(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func("threaded")

    @RpcHandler("command", "async")
    async def rpc_async(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        await asyncio.sleep(0.01)
        reply_func("async")

    @RpcHandler("command", "class")
    class RpcClass(Handler):
        def call(self) -> None:
            assert self.reply_func is not None
            self.reply_func("class")

    @RpcHandler("command", "class_with_generator")
    class RpcClassWithGenerator(Handler):
        def call(self) -> Generator[Any, Any, None]:
            yield sleep(0.01)
            assert self.reply_func is not None
            self.reply_func("class with a generator")


@pytest.fixture
def answering(sender: Sender) -> Iterator[Answering]:
    """A component that runs, and has handled or answered all in the end."""
    with Running(processor := Answering()):
        yield processor
    assert [] == rest_of("q")


Result = tuple[type[Any], Any, Any]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("value", (MessageResult, {"got": {}}, "")),
        ("message", (MessageResult, 1, "well done")),
        ("refuse", (MessageResultError, None, "no")),
        ("raise", (MessageResultException, "LookupError", "not found")),
        ("surrogate", (MessageResultException, "LookupError", "\ud800")),
        ("twice", (MessageResult, 1, "")),
        ("generator", (MessageResult, "generator", "")),
        ("threaded", (MessageResult, "threaded", "")),
        ("async", (MessageResult, "async", "")),
        ("class", (MessageResult, "class", "")),
        ("class_with_generator", (MessageResult, "class with a generator", "")),
    ],
)
def test_a_call_is_answered_by_what_its_handler_replies_or_raises(
    name: str, expected: Result, sender: Sender, answering: Answering
) -> None:
    """A value is sent as a success, a result message as it is, an exception as such."""
    reply = getattr(sender, f"rpc_{name}")()

    assert expected == (type(reply), reply.value, reply.message)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("unknown", MessageResultError, "no handler for rpc 'command' 'unknown'"),
        ("silent", MessageResultError, "ended without a reply"),
        ("filtered", MessageResultError, "filtered: KeyError: 'missing'"),
        ("filtered_unprintably", MessageResultError, "filtered: Unprintable: (Unprintable has no"),
        ("unserialisable", MessageResultException, "object, which JSON does not have"),
        ("unprintable", MessageResultException, "has no text"),
    ],
)
def test_a_call_that_nobody_answers_gets_an_error_at_once(
    name: str, kind: type[Any], text: str, sender: Sender, answering: Answering
) -> None:
    """1.2.1 acked it in silence, and the caller waited for 150 seconds."""
    reply = getattr(sender, f"rpc_{name}")()

    assert kind is type(reply)
    assert text in reply.message
    assert sender.rpc_value(1)


def test_a_call_of_another_type_is_looked_up_like_any_message(sender: Sender) -> None:
    """1.2.1 knew RPC commands only, and acked the others without a word."""

    class Own(Logging):
        @RpcHandler("question")
        def rpc_question(self, content: Any, reply_func: Callable[[Any], None]) -> None:
            reply_func("answer")

    with Running(Own()), raw_channel() as channel:
        replies = ask(channel, {**command("x", category="rpc"), "type": "question"})

    assert ["answer"] == [reply["content"]["value"] for reply in replies]


def ask(
    channel: Any, body: dict[str, Any], count: int = 1, queue: str = "q", **properties: Any
) -> list[Any]:
    """Send a call by hand, and return the bodies of so many replies."""
    reply_to = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_publish(
        "", queue, json.dumps(body), pika.BasicProperties(reply_to=reply_to, **properties)
    )
    return [json.loads(reply) for _, reply in take(channel, reply_to, count)]


def test_a_reply_carries_the_correlation_id_and_the_wire_format(
    sender: Sender, answering: Answering
) -> None:
    """It is transient, as it concerns nobody when its caller is gone."""
    with raw_channel() as channel:
        reply_to = channel.queue_declare("", exclusive=True).method.queue
        channel.basic_publish(
            "",
            "q",
            json.dumps(command("value", 1, "rpc")),
            pika.BasicProperties(reply_to=reply_to, correlation_id="abc"),
        )
        properties, body = take(channel, reply_to)[0]

    assert ("application/json", "abc", 1) == (
        properties.content_type,
        properties.correlation_id,
        properties.delivery_mode,
    )
    assert {
        "type": "result",
        "name": "none",
        "category": "message",
        "version": "2",
        "fingerprint": {},
        "content": {"type": "success", "value": {"got": 1}, "message": ""},
        "_reserved": {},
    } == json.loads(body)


def test_a_handler_may_reply_several_times(sender: Sender, answering: Answering) -> None:
    """Also by raising after a reply, as in 1.2.1."""
    with raw_channel() as channel:
        replies = ask(channel, command("twice", category="rpc"), count=2)

    assert [1, "LookupError"] == [reply["content"]["value"] for reply in replies]


def test_a_rejected_call_is_answered_and_dead_lettered(
    sender: Sender, answering: Answering
) -> None:
    """The caller learns of it, and whoever looks into the error queue, too."""
    reply = sender.rpc_reject()
    with raw_channel() as channel:
        properties, _ = take(channel, "q.error")[0]

    assert ("RejectMessage", "not me") == (reply.value, reply.message)
    assert "rejected" == properties.headers["x-first-death-reason"]


@pytest.mark.parametrize(("name", "error"), [("exit", "ExitScheduler"), ("stop", "StopIteration")])
def test_a_call_that_ends_the_component_is_answered_first(
    name: str, error: str, sender: Sender
) -> None:
    """And is settled: it must not end the next run as well."""
    with Running(Answering()) as running:
        reply = getattr(sender, f"rpc_{name}")()
        running.join()

    assert error == reply.value
    assert [] == rest_of("q")


def test_a_call_without_a_reply_address_is_parked(sender: Sender, answering: Answering) -> None:
    """Its handler does not run: nobody could be told what came of it."""
    sender.forward(command("silent", category="rpc"))
    sender.message_last()
    answering.wait_for("last")
    with raw_channel() as channel:
        properties, _ = take(channel, "q.error")[0]

    assert "unanswerable" == properties.headers["postage-reason"]


def test_a_reply_to_a_caller_that_is_gone_is_no_trouble(
    sender: Sender, answering: Answering
) -> None:
    """The call is acked, and the component goes on."""
    with raw_channel() as channel:
        channel.basic_publish(
            "",
            "q",
            json.dumps(command("value", category="rpc")),
            pika.BasicProperties(reply_to="nowhere"),
        )

    assert sender.rpc_value(1)


# -------------------------------------------------------------------- repeated calls


def test_a_repeated_call_is_answered_again_and_not_run_again(sender: Sender) -> None:
    """A caller repeats it after its timeout, with the same message id."""

    class Own(Logging):
        @RpcHandler("command", "count")
        def rpc_count(self, content: Any, reply_func: Callable[[Any], None]) -> None:
            self.log.append("counted")
            reply_func(len(self.log))

    body = command("count", category="rpc")
    with Running(own := Own()), raw_channel() as channel:
        first = ask(channel, body, message_id="1")
        again = ask(channel, body, message_id="1")
        other = ask(channel, body, message_id="2")
        nameless = [ask(channel, body)[0] for _ in range(2)]

    results = [reply["content"]["value"] for reply in (*first, *again, *other, *nameless)]
    assert [1, 1, 2, 3, 4] == results
    assert ["counted"] * 4 == own.log


class Slow(Logging):
    """Answers when it is told to, before or after its only reply."""

    go_on = False

    @RpcHandler("command", "reply_late")
    def rpc_reply_late(
        self, content: Any, reply_func: Callable[[Any], None]
    ) -> Generator[Any, Any, None]:
        self.log.append("begun")
        while not self.go_on:
            yield sleep(0.01)
        reply_func("replied")

    @RpcHandler("command", "reply_early")
    def rpc_reply_early(
        self, content: Any, reply_func: Callable[[Any], None]
    ) -> Generator[Any, Any, None]:
        self.log.append("begun")
        reply_func("replied")
        while not self.go_on:
            yield sleep(0.01)


def test_a_call_that_is_repeated_while_it_runs_is_answered_when_it_ends(sender: Sender) -> None:
    """Both addresses get the one answer."""
    with Running(own := Slow()), raw_channel() as channel:
        sender.message_last()
        own.wait_for("last")
        queues = [channel.queue_declare("", exclusive=True).method.queue for _ in range(2)]
        for queue in queues:
            channel.basic_publish(
                "",
                "q",
                json.dumps(command("reply_late", category="rpc")),
                pika.BasicProperties(reply_to=queue, message_id="1"),
            )
        sender.message_last()
        own.wait_for("last", "begun", "last")
        own.go_on = True
        bodies = [json.loads(take(channel, queue)[0][1]) for queue in queues]

    assert ["replied", "replied"] == [body["content"]["value"] for body in bodies]


def test_a_call_that_is_repeated_after_its_reply_and_before_its_end_is_answered_at_once(
    sender: Sender,
) -> None:
    """The first reply may have been lost with the connection of the caller."""
    with Running(own := Slow()), raw_channel() as channel:
        sender.message_last()
        own.wait_for("last")
        replies = [
            ask(channel, command("reply_early", category="rpc"), message_id="1")[0]
            for _ in range(2)
        ]
        own.go_on = True

    assert ["replied", "replied"] == [reply["content"]["value"] for reply in replies]
    assert ["last", "begun"] == own.log


def test_a_call_that_nobody_waits_for_any_more_is_skipped(sender: Sender) -> None:
    """Its time passed while it lay in the inbox behind a slow message."""

    class Own(Logging):
        prefetch = 10  # it would be given back, if that adapted

        @RpcHandler("command", "late")
        def rpc_late(self, content: Any, reply_func: Callable[[Any], None]) -> None:
            self.log.append("late")
            reply_func(1)

        @MessageHandler("command", "slow")
        def msg_slow(self, content: Any) -> None:
            self.log.append("slow")
            wait_until(lambda: calls and all(call.ready() for call in calls))
            self.log.append("done")

    calls: list[Any] = []
    with Running(own := Own()):
        sender.message_last()
        own.wait_for("last")
        wait_until(lambda: own.consumer.subscriber.consuming)
        with raw_channel() as channel:  # in the inbox before the timeout of the call begins
            channel.basic_publish("", "q", json.dumps(command("slow")))
            channel.basic_publish(
                "",
                "q",
                json.dumps(command("late", category="rpc")),
                pika.BasicProperties(reply_to="nowhere", headers={"postage-timeout": 100}),
            )
        calls.append(sender.rpc_unanswered(_key="q", _timeout=1.0, _future=True))
        sender.message_last()
        own.wait_for("last", "slow", "done", "last")

    assert [] == rest_of("q") + rest_of("q.error")


# ------------------------------------------------------------------ nobody handles it


def send_unhandled(sender: Sender, own: Logging, queue: str, count: int = 1) -> None:
    for _ in range(count):
        sender.message_unknown(_queue=queue)
    sender.message_last(_queue=queue)
    own.wait_for("last")


def test_a_message_that_nobody_handles_is_parked_if_it_came_by_a_shared_queue(
    sender: Sender,
) -> None:
    """During a rollout an old instance must not swallow what only the new code knows."""
    with Running(own := Logging()):
        send_unhandled(sender, own, "q")
        with raw_channel() as channel:
            properties, _ = take(channel, "q.error")[0]

    assert ("unhandled", "no handler for message 'command' 'unknown'") == (
        properties.headers["postage-reason"],
        properties.headers["postage-error"],
    )


@pytest.mark.parametrize("flag", ["exclusive", "auto_delete"])
def test_a_message_that_nobody_handles_is_skipped_if_it_came_by_a_queue_of_one_instance(
    flag: str, sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    """It is counted, and warned of once: a broadcast concerns those whom it concerns."""
    with Running(own := Logging({"name": "mine", "flags": {flag: True}})):
        send_unhandled(sender, own, "mine", 3)

    assert {("message", "command", "unknown"): 3} == dict(own.skipped)
    assert 1 == caplog.text.count("skipped message 'command' 'unknown'")


@pytest.mark.parametrize(
    ("choice", "queue", "parked"),
    [
        ("park", {"name": "mine", "flags": {"auto_delete": True}}, ["unhandled"]),
        ("skip", "q", []),
        ("reject", "q", [None]),
    ],
)
def test_what_becomes_of_unhandled_messages_can_be_chosen(
    choice: str, queue: Any, parked: list[Any], sender: Sender
) -> None:
    """The class attribute `unhandled` says park, skip or reject, for every queue."""

    class Own(Logging):
        unhandled = choice

    name = queue if isinstance(queue, str) else queue["name"]
    with Running(own := Own(queue)):
        send_unhandled(sender, own, name)
        with raw_channel() as channel:
            taken = take(channel, f"{name}.error", len(parked)) if parked else []

    assert parked == [properties.headers.get("postage-reason") for properties, _ in taken]
    if not parked:
        assert [] == rest_of("q.error")


# -------------------------------------------------------- the connection goes meanwhile


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_when_the_broker_closes_the_connection_meanwhile(
    kind: str, sender: Sender, node: Node
) -> None:
    """What was being handled is delivered again, what comes later is handled, too."""
    go_on = threading.Event()

    def act(processor: Any, content: Any) -> None:
        processor.log.append(content["parameters"])

    cls = class_with(kind, act)

    class Own(cls):  # type: ignore[valid-type,misc]
        @MessageHandler("command", "begin")
        def msg_begin(self, content: Any) -> None:
            self.log.append("begun")

    with Running(own := Own()):
        for number in range(50):
            sender.message_run(number)
            if number == 25:
                node.close_connections("a test")
        wait_until(lambda: {*range(50)} <= {*own.log})
        wait_until(lambda: not own._in_flight)
        losses = own.consumer.conn_broker.losses
    go_on.set()

    assert 1 == losses
    assert [] == rest_of("q") + rest_of("q.error")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "generator", "threaded", "async"])
def test_a_message_is_delivered_again_if_the_connection_goes_while_it_is_handled(
    kind: str, sender: Sender, node: Node
) -> None:
    """Its ack would name another message on the new channel, so it is dropped."""
    closed = threading.Event()

    class Own(Logging):
        def begin(self) -> None:
            self.log.append("begun")

        @MessageHandler("command", "plain")
        def msg_plain(self, content: Any) -> None:
            self.begin()
            assert closed.wait(60)
            self.log.append("ended")

        @MessageHandler("command", "generator")
        def msg_generator(self, content: Any) -> Generator[Any, Any, None]:
            self.begin()
            while not closed.is_set():
                yield sleep(0.01)
            self.log.append("ended")

        @MessageHandler("command", "threaded", threaded=True)
        def msg_threaded(self, content: Any) -> None:
            self.msg_plain(content)

        @MessageHandler("command", "async")
        async def msg_async(self, content: Any) -> None:
            self.begin()
            while not closed.is_set():
                await asyncio.sleep(0.01)
            self.log.append("ended")

    with Running(own := Own()):
        sender.forward(command(kind))
        own.wait_for("begun")
        connection = own.consumer.conn_broker
        node.close_connections("a test")
        wait_until(lambda: connection.losses == 1)
        closed.set()
        wait_until(lambda: own.log.count("ended") == 2)
        sender.message_last()
        wait_until(lambda: "last" in own.log)
        wait_until(lambda: not own._in_flight)

    assert {"begun": 2, "ended": 2, "last": 1} == {each: own.log.count(each) for each in own.log}
    assert [] == rest_of("q") + rest_of("q.error")


# ----------------------------------------------------------------- timers and topology


def test_add_timeout_calls_back_in_the_thread_of_the_scheduler(sender: Sender) -> None:
    """Between two messages."""

    class Own(Logging):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> None:
            self.add_timeout(0.05, lambda: self.log.append(threading.current_thread().name))

    with Running(own := Own()):
        sender.message_run()
        own.wait_for("scheduler of the test")


def test_add_timeout_without_a_callback_waits(sender: Sender) -> None:
    """As the sleep of 1.2.1 did; connections are served meanwhile."""

    class Own(Logging):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> None:
            before = time.monotonic()
            self.add_timeout(0.1)
            self.log.append(time.monotonic() - before >= 0.1)

    with Running(own := Own()):
        sender.message_run()
        own.wait_for(True)


def test_add_timeout_with_a_callback_needs_a_scheduler(broker_url: str) -> None:
    """Nobody would call back."""
    with Logging() as own, pytest.raises(PostageError, match="scheduler"):
        own.add_timeout(1, print)


def test_a_timer_does_not_keep_a_processor_that_stopped(sender: Sender) -> None:
    """`start_consuming()` returned an hour late, and the callback met closed connections."""
    own = Logging()
    thread = threading.Thread(target=own.start_consuming)
    thread.start()
    wait_until(lambda: own.consumer.subscriber.consuming)
    sender.message_last()
    own.wait_for("last")
    own.add_timeout(3600, lambda: own.log.append("late"))
    own.stop_consuming()
    thread.join(30)

    assert False is thread.is_alive()
    assert ["last"] == own.log


def test_queues_that_are_added_while_it_runs_are_consumed_at_once(sender: Sender) -> None:
    """1.2.1 only bound them, until it consumed anew."""

    class Own(Logging):
        @MessageHandler("command", "grow")
        def msg_grow(self, content: Any) -> None:
            self.add_eqk(eqk_of("more"))
            self.log.append("grown")

    with Running(own := Own()):
        sender.message_grow()
        own.wait_for("grown")
        sender.message_last(_key="more")
        own.wait_for("grown", "last")


def test_a_queue_that_is_bound_with_several_keys_is_consumed_once(sender: Sender) -> None:
    """1.2.1 had a consumer for each binding, and so a multiple of its prefetch."""
    eqk = [(TestExchange, [("q", key) for key in ("q", "a", "b")])]

    class Own(Logging):
        def __init__(self) -> None:
            self.log = []
            MessageProcessor.__init__(self, FINGERPRINT, eqk)

    with Running(own := Own()), raw_channel() as channel:
        wait_until(lambda: own.consumer.subscriber.consuming)
        sender.message_last(_key="b")
        own.wait_for("last")
        wait_until(lambda: own.consumer.subscriber.consuming)
        consumers = channel.queue_declare("q", passive=True).method.consumer_count

    assert 1 == consumers


def test_what_was_sent_before_the_scheduler_ran_is_kept(sender: Sender) -> None:
    """A processor declares and binds when it is made."""
    own = Logging()
    sender.message_last()

    with Running(own):
        own.wait_for("last")


def test_the_prefetch_of_the_processor_wins_over_that_of_its_consumer(broker_url: str) -> None:
    """None leaves it to the consumer."""

    class Own(Logging):
        prefetch = 3

    with Logging() as default, Own() as own:
        assert (None, 3) == (default.consumer.prefetch, own.consumer.prefetch)


def test_a_processor_shows_its_state(broker_url: str) -> None:
    """Its name, what is in flight, and its consumer."""
    with Logging() as own:
        assert repr(own).startswith("<Logging tested [0 in flight, <GenericConsumer amqp://")


def test_a_failed_constructor_leaves_nothing_open(broker_url: str) -> None:
    """The queue exists with other arguments; the error names them."""
    with raw_channel() as channel:
        channel.queue_declare("q", durable=True)

    with pytest.raises(ChannelClosedError, match="x-queue-type"):
        Logging()


def test_a_processor_of_the_parent_process_says_so_in_a_child(broker_url: str) -> None:
    """Its sockets belong to the parent."""
    with Logging() as own:
        pid = os.fork()
        if not pid:
            try:
                own.add_eqk(eqk_of("more"))
            except ForkedError:
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(pid, 0)

    assert 0 == os.waitstatus_to_exitcode(status)


def test_a_closed_processor_refuses_new_queues(broker_url: str) -> None:
    """And closing it twice is no trouble."""
    own = Logging()
    own.close()
    own.close()

    with pytest.raises(ClosedError):
        own.add_eqk(eqk_of("more"))


# ----------------------------------------------------------------------- what a message costs


class CountingTable(dict[Any, Any]):
    """A table that counts how often it is asked."""

    asked = 0

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked += 1
        return super().get(key, default)

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("somebody walks through the handlers")


@pytest.mark.parametrize("count", [1, 1000])
def test_a_handler_is_looked_up_and_not_searched(count: int) -> None:
    """By its name, and then by its type alone, however many handlers there are."""
    methods: dict[str, Any] = {}
    for number in range(count):
        decorate = MessageHandler("command", f"number_{number}")
        methods[f"msg_{number}"] = decorate(lambda self, content: None)
    own_class = type("Own", (MessageProcessor,), methods)
    table = own_class._message_handlers = CountingTable(own_class._message_handlers)
    own = own_class.__new__(own_class)
    for name, found in ((f"number_{count - 1}", f"msg_{count - 1}"), ("unknown", None)):
        table.asked = 0
        handlers = own._handlers_of({"category": "message", "type": "command", "name": name})
        assert found == (handlers[0].attribute if handlers else None)
        assert table.asked <= 2


@pytest.mark.parametrize("seconds, steps", [(0.0, 1), (math.inf, 10)])
def test_messages_are_handled_for_a_moment_before_others_have_their_turn(
    broker_url: str, monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int
) -> None:
    """Until the moment is over, or there is none left."""
    with Logging() as own, monkeypatch.context() as patch:
        patch.setattr(processors, "SLICE", seconds)
        patch.setattr(own.consumer.subscriber, "inbox", [None] * 10)
        patch.setattr(own, "step", own.consumer.subscriber.inbox.pop)
        assert own._slice() is None
        assert 10 - steps == len(own.consumer.subscriber.inbox)


def test_nothing_is_handled_after_the_message_that_says_to_leave(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the moment is not over, and others are there: they go back to their queue."""
    monkeypatch.setattr(processors, "SLICE", math.inf)
    with Logging() as own:
        with sender.batch() as batch:
            for name in ("last", "quit", "last"):
                getattr(batch, f"message_{name}")()
        own.start_consuming()
        assert ["last"] == own.log
        assert ["last"] == [json.loads(rest)["name"] for rest in rest_of("q")]
