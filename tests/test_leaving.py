# SPDX-License-Identifier: MIT
"""How components leave: nothing is lost, nothing that was done comes again, nothing stays."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from postage.generic_application import GenericApplicationExchange
from postage.messaging import (
    GenericProducer,
    MessageHandler,
    MessageProcessor,
    MessageResult,
    RpcHandler,
)
from postage.microthreads import MicroScheduler, sleep
from postage.retry import RetryPolicy
from tests.nodes import Node
from tests.programs import Program
from tests.programs_for_tests.components import Running, Sender, eqk_of, rest_of
from tests.waiting import wait_until

#: Seconds that a handler of a test waits for the test.
PATIENCE = 60.0

KINDS = ["generator", "threaded", "async"]


class Working(MessageProcessor):
    """A component whose handlers last until `go_on` is set."""

    retry = RetryPolicy(attempts=1)  # what fails is parked at once

    def __init__(self, queue: str = "q", grace: float = 30.0) -> None:
        self.grace = grace
        self.log: list[str] = []
        self.go_on = threading.Event()
        super().__init__({"name": queue}, eqk_of(queue))

    def wait_for(self, *entries: str) -> None:
        """Wait until exactly these were noted."""
        wait_until(lambda: len(self.log) >= len(entries), message=f"{entries} in {self.log}")
        assert [*entries] == self.log

    @MessageHandler("command", "note")
    def msg_note(self, content: Any) -> None:
        self.log.append("noted")

    @MessageHandler("command", "plain")
    def msg_plain(self, content: Any) -> None:
        self.log.append("begun")
        assert self.go_on.wait(PATIENCE)
        self.log.append("ended")

    @MessageHandler("command", "threaded", threaded=True)
    def msg_threaded(self, content: Any) -> None:
        self.msg_plain(content)

    @MessageHandler("command", "generator")
    def msg_generator(self, content: Any) -> Generator[Any, Any, None]:
        self.log.append("begun")
        try:
            while not self.go_on.is_set():
                yield sleep(0.01)
            self.log.append("ended")
        except GeneratorExit:
            self.log.append("closed")
            raise

    @MessageHandler("command", "async")
    async def msg_async(self, content: Any) -> None:
        self.log.append("begun")
        try:
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            self.log.append("ended")
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise


@pytest.fixture
def sender(broker_url: str) -> Iterator[Sender]:
    """A producer whose messages go to the queue "q"."""
    with Sender() as producer:
        yield producer


def send(sender: GenericProducer, name: str, parameters: Any = None, **kwds: Any) -> None:
    getattr(sender, f"message_{name}")(parameters=parameters, **kwds)


def begin(sender: Sender, own: Working, kind: str) -> None:
    """Have a handler begin, after a first message, which a quorum queue delivers alone."""
    send(sender, "note")
    own.wait_for("noted")
    wait_until(lambda: own.consumer.subscriber.consuming)
    send(sender, kind)
    own.wait_for("noted", "begun")


def names(bodies: list[bytes]) -> list[str]:
    return [json.loads(body)["name"] for body in bodies]


# ------------------------------------------------------------------- what becomes of messages


@pytest.mark.parametrize("how", ["stop_consuming", "quit"])
def test_messages_that_were_not_started_go_back_to_their_queue(how: str, sender: Sender) -> None:
    """They are there for the next one at once, in their order."""
    with Running(own := Working()) as running:
        begin(sender, own, "plain")
        if how == "quit":
            send(sender, "quit")
        else:
            own.stop_consuming()
        for name in ("a", "b", "c"):
            send(sender, name)
        wait_until(lambda: len(own.consumer.subscriber.inbox) == 3 + (how == "quit"))
        own.go_on.set()
        running.join()

    assert ["noted", "begun", "ended"] == own.log
    assert ["a", "b", "c"] == names(rest_of("q"))


@pytest.mark.parametrize("how", ["stop_consuming", "quit", "shutdown"])
@pytest.mark.parametrize("kind", KINDS)
def test_handlers_in_flight_end_within_the_grace(how: str, kind: str, sender: Sender) -> None:
    """And their messages are settled."""
    with Running(own := Working()) as running:
        begin(sender, own, kind)
        leave(how, own, running, sender)
        wait_until(own.consumer.subscriber.stopped)
        own.go_on.set()
        running.join()

    assert ["noted", "begun", "ended"] == own.log
    assert [] == rest_of("q") + rest_of("q.error")


@pytest.mark.parametrize("how", ["stop_consuming", "quit", "shutdown", "close"])
@pytest.mark.parametrize(
    ("kind", "end"), [("generator", "closed"), ("async", "cancelled"), ("threaded", None)]
)
def test_what_handlers_leave_behind_after_the_grace_is_delivered_again(
    how: str, kind: str, end: str | None, sender: Sender
) -> None:
    """Generators are closed, coroutines are cancelled, threads are abandoned."""
    with Running(own := Working(grace=0.2)) as running:
        begin(sender, own, kind)
        leave(how, own, running, sender)
        running.join()

    assert ["noted", "begun", *([end] if end else [])] == own.log
    assert [kind] == names(rest_of("q"))
    own.go_on.set()  # for the thread


def leave(how: str, own: Working, running: Running, sender: Sender) -> None:
    if how == "quit":
        send(sender, "quit")
    elif how == "shutdown":
        running.scheduler.exit()
        running.scheduler.wake()
    else:
        getattr(own, how)()


def test_a_handler_that_fails_while_it_is_closed_does_not_keep_the_others(sender: Sender) -> None:
    """The exception ended the scheduler, and the quit message came again."""

    class Own(Working):
        @MessageHandler("command", "stubborn")
        def msg_stubborn(self, content: Any) -> Generator[Any, Any, None]:
            self.log.append("begun")
            try:
                yield sleep(3600)
            finally:
                yield sleep(3600)  # a generator that is being closed must not yield

    own, other = Own(grace=0.1), Working("other")
    with Running(own, other) as running:
        begin(sender, own, "stubborn")
        send(sender, "quit")
        running.join()

    assert ["stubborn"] == names(rest_of("q"))


def test_a_handler_that_fails_while_its_component_leaves_is_parked(sender: Sender) -> None:
    """Leaving waits for that, too."""

    class Own(Working):
        @MessageHandler("command", "fail")
        def msg_fail(self, content: Any) -> Generator[Any, Any, None]:
            self.log.append("begun")
            while not self.go_on.is_set():
                yield sleep(0.01)
            raise LookupError

    with Running(own := Own()) as running:
        begin(sender, own, "fail")
        own.stop_consuming()
        wait_until(own.consumer.subscriber.stopped)
        own.go_on.set()
        running.join()

    assert (["fail"], []) == (names(rest_of("q.error")), rest_of("q"))


def test_a_handler_may_call_others_while_its_component_leaves(sender: Sender) -> None:
    """Also one of the same scheduler that goes on."""

    class Own(Working):
        @MessageHandler("command", "call")
        def msg_call(self, content: Any) -> Generator[Any, Any, None]:
            self.log.append("begun")
            while not self.go_on.is_set():
                yield sleep(0.01)
            reply = yield sender.rpc_answer(_key="other", _future=True)
            self.log.append(reply.value)

    class Other(Working):
        @RpcHandler("command", "answer")
        def rpc_answer(self, content: Any, reply_func: Callable[[Any], None]) -> None:
            reply_func(MessageResult("answered"))

    own, other = Own(), Other("other")
    with Running(own, other):
        begin(sender, own, "call")
        own.stop_consuming()
        wait_until(own.consumer.subscriber.stopped)
        own.go_on.set()
        own.wait_for("noted", "begun", "answered")

    assert [] == rest_of("q") + rest_of("q.error")


def test_a_call_in_flight_is_answered_before_its_component_has_left(sender: Sender) -> None:
    """And its request is settled."""

    class Own(Working):
        @RpcHandler("command", "answer")
        def rpc_answer(
            self, content: Any, reply_func: Callable[[Any], None]
        ) -> Generator[Any, Any, None]:
            self.log.append("begun")
            while not self.go_on.is_set():
                yield sleep(0.01)
            reply_func("answered")

    with Running(own := Own()) as running:
        reply = sender.rpc_answer(_future=True)
        own.wait_for("begun")
        own.stop_consuming()
        wait_until(own.consumer.subscriber.stopped)
        own.go_on.set()
        running.join()

    assert "answered" == reply.result(PATIENCE).value
    assert [] == rest_of("q")


# ----------------------------------------------------------------------------- who leaves


def test_quit_ends_all_components_of_the_scheduler_in_order(sender: Sender) -> None:
    """The handlers of the others end, too, and the quit message does not come again."""
    own, second, third = Working(), Working("second"), Working("third")

    with Running(own, second, third) as running:
        for processor, queue in ((second, "second"), (third, "third")):
            send(sender, "generator", _key=queue)
            processor.wait_for("begun")
        send(sender, "quit")
        wait_until(second.consumer.subscriber.stopped)
        wait_until(third.consumer.subscriber.stopped)
        second.go_on.set()
        third.go_on.set()
        running.join()

    assert ["begun", "ended"] == second.log == third.log
    assert [] == rest_of("q") + rest_of("second") + rest_of("third")


def test_a_second_quit_is_settled_as_well(sender: Sender) -> None:
    """It must not end the next run."""
    with Running(own := Working()) as running:
        begin(sender, own, "plain")
        for _ in range(2):
            send(sender, "quit")
        wait_until(lambda: len(own.consumer.subscriber.inbox) == 2)
        own.go_on.set()
        running.join()

    remaining = names(rest_of("q"))
    with Running(Working()) as again:
        for name in remaining:  # the second may have been given back, as it was not started
            send(sender, name)
            again.join()

    assert [] == rest_of("q")


def test_a_component_can_stop_itself_in_a_handler(sender: Sender) -> None:
    """The message of that handler is settled."""

    class Own(Working):
        @MessageHandler("command", "stop")
        def msg_stop(self, content: Any) -> None:
            self.stop_consuming()

    with Running(own := Own()) as running:
        send(sender, "stop")
        running.join()

    assert [] == own.log + rest_of("q")


@pytest.mark.parametrize("kind", ["plain", "generator", "threaded", "async"])
def test_a_component_can_close_itself_in_a_handler(kind: str, sender: Sender) -> None:
    """Its microthread ends; the message was not settled and is delivered again."""

    class Own(Working):
        @MessageHandler("command", "close_plain")
        def msg_close(self, content: Any) -> None:
            self.log.append("closing")
            self.close()

        @MessageHandler("command", "close_threaded", threaded=True)
        def msg_close_in_a_thread(self, content: Any) -> None:
            self.msg_close(content)

        @MessageHandler("command", "close_async")
        async def msg_close_by_coroutine(self, content: Any) -> None:
            self.msg_close(content)

        @MessageHandler("command", "close_generator")
        def msg_close_by_generator(self, content: Any) -> Generator[Any, Any, None]:
            yield 1
            self.msg_close(content)

    with Running(own := Own()) as running:
        send(sender, f"close_{kind}")
        running.join()

    assert ["closing"] == own.log
    assert [f"close_{kind}"] == names(rest_of("q"))


def test_a_closed_component_ends_while_others_go_on(sender: Sender) -> None:
    """`close()` may be called by any thread."""
    own, other = Working(), Working("other")

    with Running(own, other) as running:
        begin(sender, own, "generator")
        own.close()
        wait_until(lambda: "closed" in own.log)
        send(sender, "note", _key="other")
        other.wait_for("noted")
        wait_until(lambda: "1 waiting" in repr(running.scheduler))

    assert ["generator"] == names(rest_of("q"))


def test_a_thread_that_fails_after_its_component_has_left_disturbs_nobody(sender: Sender) -> None:
    """Its error was raised in the scheduler, and ended the other components."""

    class Own(Working):
        @MessageHandler("command", "fail", threaded=True)
        def msg_fail(self, content: Any) -> None:
            self.msg_plain(content)
            raise LookupError("too late")

    own, other = Own(grace=0.1), Working("other")
    with Running(own, other):
        begin(sender, own, "fail")
        own.stop_consuming()
        wait_until(lambda: own._ended)
        (thread,) = (each for each in threading.enumerate() if each.name == "postage-q-0")
        own.go_on.set()
        thread.join(PATIENCE)
        for _ in range(3):
            send(sender, "note", _key="other")
        other.wait_for("noted", "noted", "noted")

    assert ["fail"] == names(rest_of("q"))


def test_a_processor_of_an_inner_scheduler_leaves_with_the_outer_one(sender: Sender) -> None:
    """It was dropped with its handlers, and its connection stayed open."""
    own, other = Working(), Working("other")
    inner = MicroScheduler()
    inner.add_microthread(own)
    running = Running(other)
    running.scheduler.add_microthread(inner)

    with running:
        begin(sender, own, "generator")
        send(sender, "quit", _key="other")
        wait_until(own.consumer.subscriber.stopped)
        own.go_on.set()
        running.join()
    own.close()

    assert ["noted", "begun", "ended"] == own.log
    assert [] == rest_of("q") + rest_of("other")


@pytest.mark.parametrize("kind", KINDS)
def test_start_consuming_returns_although_a_handler_never_ends(kind: str, sender: Sender) -> None:
    """What it waits for may never come; it kept the scheduler going for ever."""
    own = Working(grace=0.1)
    thread = threading.Thread(target=own.start_consuming)
    thread.start()
    begin(sender, own, kind)
    own.stop_consuming()
    thread.join(PATIENCE)

    assert False is thread.is_alive()
    own.go_on.set()
    assert [kind] == names(rest_of("q"))


@pytest.mark.embedded  # on RabbitMQ it takes long, and shows the same
@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop_consuming", "close", "shutdown"])
def test_a_component_leaves_without_a_broker(how: str, node: Node) -> None:
    """It does not wait for one to come back."""
    with Sender(vhost=f"gone-{how}", hup=hup_of(node, f"gone-{how}")) as sender:

        class Own(Working):
            def __init__(self) -> None:
                self.log, self.go_on = [], threading.Event()
                MessageProcessor.__init__(
                    self, {"name": "own"}, eqk_of("q"), sender.hup, sender.vhost
                )

        running = Running(own := Own())
        with running:
            send(sender, "note")
            own.wait_for("noted")
            node.kill()
            try:
                leave(how, own, running, sender)
                running.join()
            finally:
                node.start()


def hup_of(node: Node, vhost: str) -> dict[str, Any]:
    node.add_vhost(vhost)
    return {"host": f"127.0.0.1:{node.port}", "user": "guest", "password": "guest"}


# -------------------------------------------------------------------------- real processes


class Caller(GenericProducer):
    """Sends to the application "worker"."""

    eks = [(GenericApplicationExchange, "worker/rr")]
    rpc_timeout = 20
    max_retry = 0


@pytest.fixture
def caller(broker_url: str) -> Iterator[Caller]:
    """A producer for the program below."""
    with Caller() as producer:
        yield producer


def component(grace: float = 30.0) -> Program:
    return Program(["tests/programs_for_tests/component.py", "worker", str(grace)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_a_signal_lets_the_handlers_end(
    number: signal.Signals, kind: str, caller: Caller, tmp_path: Path
) -> None:
    """The process ends with code 0, and its own queue is gone."""
    file = tmp_path / "go on"
    with component() as program:
        program.wait_for_line("ready")
        send(caller, f"work_{kind}", str(file))
        program.wait_for_line("begun")
        program.send_signal(number)
        send(caller, "unstarted")
        file.touch()

        assert 0 == program.wait()

    lines = ["ready", "begun", "leaving", "ended", "left"]
    assert sorted(lines) == sorted(program.stdout)
    assert "left" == program.stdout[-1]
    assert ["unstarted"] == names(rest_of("worker"))
    assert "UnroutableError" == caller.rpc_ping(_key="worker").value


@pytest.mark.parametrize(
    ("kind", "end"), [("generator", "closed"), ("async", "cancelled"), ("threaded", None)]
)
@pytest.mark.parametrize("how", ["SIGTERM", "quit"])
def test_a_process_ends_although_a_handler_does_not(
    how: str, kind: str, end: str | None, caller: Caller, tmp_path: Path
) -> None:
    """After the grace. A pool of the standard library would hold up its exit."""
    with component(grace=0.2) as program:
        program.wait_for_line("ready")
        send(caller, f"work_{kind}", str(tmp_path / "never"))
        program.wait_for_line("begun")
        if how == "quit":
            send(caller, "quit", _key="worker")
        else:
            program.terminate()

        assert 0 == program.wait()

    assert ["ready", "begun", "leaving", *([end] if end else []), "left"] == program.stdout
    assert [f"work_{kind}"] == names(rest_of("worker"))


def test_a_second_signal_ends_a_process_at_once(caller: Caller, tmp_path: Path) -> None:
    """Its message is delivered again."""
    with component() as program:
        program.wait_for_line("ready")
        send(caller, "work_generator", str(tmp_path / "never"))
        program.wait_for_line("begun")
        program.terminate()
        program.wait_for_line("leaving")
        program.terminate()

        assert -signal.SIGTERM == program.wait()

    assert ["work_generator"] == names(remaining("worker", 1))


def remaining(queue: str, count: int) -> list[bytes]:
    """Return what is in a queue, as soon as the broker has noticed that its consumer died."""
    bodies: list[bytes] = []
    wait_until(lambda: bodies.extend(rest_of(queue)) or len(bodies) >= count)
    return bodies


def test_a_killed_process_loses_nothing(caller: Caller, tmp_path: Path) -> None:
    """What it had begun and what it had not is delivered again."""
    with component() as program:
        program.wait_for_line("ready")
        send(caller, "work_threaded", str(tmp_path / "never"))
        program.wait_for_line("begun")
        send(caller, "unstarted")
        program.kill()
        program.wait()

    assert ["unstarted", "work_threaded"] == sorted(names(remaining("worker", 2)))
