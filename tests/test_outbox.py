# SPDX-License-Identifier: MIT
"""The outbox of a handler: all that it sends leaves if it succeeds, and nothing if not."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pika
import pytest

from postage import outbox as outboxes
from postage.broker import Broker
from postage.errors import ClosedError, ExitScheduler, PostageError
from postage.futures import Future
from postage.generic_application import GenericApplicationExchange
from postage.messaging import (
    DefaultExchange,
    FilterError,
    GenericProducer,
    Handler,
    MessageFilter,
    MessageHandler,
    MessageProcessor,
    RejectMessage,
    RpcHandler,
)
from postage.microthreads import sleep
from postage.outbox import OUTBOX_WINDOW, Held, Outbox
from postage.retry import RetryPolicy
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

# Python warns of a fork beside threads, since most libraries cannot bear it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

#: Seconds that a handler of a test waits for the test, and the test for what must happen.
PATIENCE = 60.0

#: The ways to write a handler.
KINDS = ["plain", "generator", "threaded", "async", "class", "class with a generator"]

Act = Callable[[Any, Any], Any]


class Children(GenericProducer):
    """Sends to the queue "children"."""

    eks = [(DefaultExchange, "children")]


@pytest.fixture
def sender(broker_url: str) -> Iterator[Sender]:
    """A producer whose messages go to the queue "q". The queue "children" is there."""
    declare_children()
    with Sender() as producer:
        yield producer


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """An embedded broker, for its faults, with a queue "children"."""
    with Broker() as broker:
        monkeypatch.setenv("POSTAGE_URL", broker.url)
        declare_children()
        yield broker


def declare_children() -> None:
    with raw_channel() as channel:
        channel.queue_declare("children", durable=True)


def waiting_children() -> int:
    """Return how many children are in their queue."""
    with raw_channel() as channel:
        return int(channel.queue_declare("children", passive=True).method.message_count)


def children(count: int) -> list[tuple[str, Any]]:
    """Take so many children, and return their ids and what they say."""
    with raw_channel() as channel:
        taken = take(channel, "children", count)
    return [
        (properties.message_id, json.loads(body)["content"]["parameters"])
        for properties, body in taken
    ]


def said(count: int) -> list[Any]:
    return [parameters for _id, parameters in children(count)]


class Own(MessageProcessor):
    """A component whose handlers have an outbox, and a producer to fill it."""

    retry = RetryPolicy(attempts=1)  # what fails is parked at once
    outbox = True

    def __init__(self, *queues: Any, **attributes: Any) -> None:
        self.log: list[Any] = []
        self.go_on = threading.Event()
        self.producer = Children()
        vars(self).update(attributes)
        super().__init__({"name": "own"}, eqk_of(*(queues or ("q",))))

    def close(self) -> None:
        super().close()
        self.producer.close()

    def wait_for(self, count: int) -> None:
        """Wait until so much was noted."""
        wait_until(lambda: len(self.log) >= count, PATIENCE, f"{count} entries in {self.log}")

    @MessageHandler("command", "last")
    def msg_last(self, content: Any) -> None:
        """Send a child behind those of others."""
        self.producer.message_child("last")


def own_with(kind: str, act: Act, **attributes: Any) -> Own:
    """Return a component whose handler of "run" is of a kind, and does something."""

    class Plain(Own):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> None:
            act(self, content["parameters"])

    class Generating(Own):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> Generator[Any, Any, None]:
            yield sleep(0.01)
            act(self, content["parameters"])
            yield sleep(0.01)

    class Threaded(Own):
        @MessageHandler("command", "run", threaded=True)
        def msg_run(self, content: Any) -> None:
            act(self, content["parameters"])

    class Async(Own):
        @MessageHandler("command", "run")
        async def msg_run(self, content: Any) -> None:
            await asyncio.sleep(0.01)
            act(self, content["parameters"])
            await asyncio.sleep(0.01)

    class ByClass(Own):
        @MessageHandler("command", "run")
        class MsgRun(Handler):
            def call(self) -> None:
                act(self.processor, self.data["parameters"])

    class ByGeneratingClass(Own):
        @MessageHandler("command", "run")
        class MsgRun(Handler):
            def call(self) -> Generator[Any, Any, None]:
                yield sleep(0.01)
                act(self.processor, self.data["parameters"])

    classes = [Plain, Generating, Threaded, Async, ByClass, ByGeneratingClass]
    return dict(zip(KINDS, classes, strict=True))[kind](**attributes)


def send_three(own: Any, parameters: Any = None) -> None:
    """Send three children, and note how many of them have left."""
    for number in range(3):
        own.producer.message_child(number)
    own.log.append((waiting_children(), own.producer.channel.outstanding))


# ---------------------------------------------------------------------- in every handler


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_handler_sends_leaves_when_it_has_succeeded(kind: str, sender: Sender) -> None:
    """In order, and nothing before. The message is acked then."""
    with Running(own := own_with(kind, send_three)):
        sender.message_run(None)
        own.wait_for(1)  # it has looked by then, and nothing was taken before
        assert [0, 1, 2] == said(3)

    assert [(0, 0)] == own.log
    assert [] == rest_of("q") + rest_of("q.error") + rest_of("children")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaves_of_a_handler_that_fails(kind: str, sender: Sender) -> None:
    """Its message is parked, and the next one has an outbox of its own."""

    def fail(own: Any, _parameters: Any) -> None:
        send_three(own)
        raise LookupError("no such thing")

    with Running(own_with(kind, fail)):
        sender.message_run(None)
        with raw_channel() as channel:
            properties, _ = take(channel, "q.error")[0]
        sender.message_last()
        assert ["last"] == said(1)

    assert "LookupError" == properties.headers["postage-exception"]
    assert [] == rest_of("children")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_message_has_the_same_children(kind: str, sender: Sender) -> None:
    """Their ids are made of its id, so a retry repeats them, and other messages do not."""
    with Running(own_with(kind, send_three)):
        sent = []
        for message_id in ("cause", "cause", "another cause"):
            sender.message_run(None, _message_id=message_id)
            sent.append(children(3))

    assert sent[0] == sent[1]
    assert 6 == len({message_id for each in sent for message_id, _ in each})


@pytest.mark.parametrize(
    ("error", "leaves"),
    [
        (ExitScheduler(), True),
        (StopIteration(), True),
        (FilterError("not mine"), False),
        (RejectMessage(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_signal_that_acks_the_message_sends_its_outbox(
    error: Exception, leaves: bool, sender: Sender
) -> None:
    """One that refuses or skips it does not."""

    def act(own: Any, _parameters: Any) -> None:
        own.producer.message_child("child")
        own.log.append("ran")
        raise error

    with Running(own := own_with("plain", act)) as running:
        sender.message_run(None)
        own.wait_for(1)
        if leaves:
            running.join()
        else:
            sender.message_last()
            assert ["last"] == said(1)

    assert int(leaves) == len(rest_of("children"))
    assert [] == rest_of("q")


def test_a_restart_sends_the_outbox_first(sender: Sender) -> None:
    """`AckAndRestart` is a success."""
    with Program(["-m", "tests.programs_for_tests.outboxes", "renewed"]) as program:
        program.wait_for_line("ready", PATIENCE)
        sender.message_renew(_eks=[(GenericApplicationExchange, "renewed/rr")])
        wait_until(lambda: program.lines.count("ready") == 2, PATIENCE)
        assert ["renewed"] == said(1)
        program.terminate()
        assert 0 == program.wait(PATIENCE)

    assert [] == rest_of("renewed") + rest_of("children")


# --------------------------------------------------------------- which handlers, which sends


def test_only_handlers_that_want_one_have_an_outbox(sender: Sender) -> None:
    """The class says so for all, a decorator for one."""

    class Mixed(Own):
        @MessageHandler("command", "without", outbox=False)
        def msg_without(self, content: Any) -> None:
            send_three(self)

        @MessageHandler("command", "with")
        def msg_with(self, content: Any) -> None:
            send_three(self)

    class Without(Own):
        outbox = False

        @MessageHandler("command", "by itself", outbox=True)
        def msg_by_itself(self, content: Any) -> None:
            send_three(self)

    with Running(mixed := Mixed(), without := Without("other")):
        sender.message_without()
        mixed.wait_for(1)
        sender.message_with()
        mixed.wait_for(2)
        wait_until(lambda: waiting_children() == 6)
        getattr(sender, "message_by itself")(_key="other")
        without.wait_for(1)

    assert [(3, 0), (3, 0)] == mixed.log
    assert [(6, 0)] == without.log
    assert not MessageProcessor.outbox


def test_a_message_or_a_producer_may_stay_out_of_it(sender: Sender) -> None:
    """Those that tell what happens leave also if it fails."""

    class Logger(Children):
        outbox = False

    def act(own: Any, _parameters: Any) -> None:
        own.producer.message_child("held")
        own.producer.message_child("at once", _outbox=False)
        with Logger() as logger, logger.batch() as batch:
            logger.message_line("logged")
            batch.message_line("in a batch")
            logger.message_line("held, too", _outbox=True)
        raise LookupError

    with Running(own_with("plain", act)):
        sender.message_run(None)
        with raw_channel() as channel:
            take(channel, "q.error")

    assert ["at once", "logged", "in a batch"] == said(3)
    assert [] == rest_of("children")


def test_outside_of_a_handler_nothing_is_held(sender: Sender) -> None:
    """The keyword means nothing there."""
    sender.message_child("child", _queue="children", _outbox=True)

    assert ["child"] == said(1)


def test_filters_have_no_part_in_it(sender: Sender) -> None:
    """One that keeps a message away may say so."""

    def keep(data: Any, own: list[Own]) -> Any:
        own[0].producer.message_child("filtered")
        raise FilterError("not today")

    component: list[Own] = []

    class Filtering(Own):
        @MessageFilter(keep, component)
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> None: ...

    component.append(Filtering())
    with Running(*component):
        sender.message_run()
        assert ["filtered"] == said(1)


def test_several_handlers_have_an_outbox_each(sender: Sender) -> None:
    """What one sends leaves when that one has ended, and has ids of its own."""

    class Several(Own):
        @MessageHandler("command", "run")
        def first(self, content: Any) -> None:
            self.producer.message_child("first")

        @MessageHandler("command", "run")
        def second(self, content: Any) -> None:
            self.log.append(waiting_children())
            self.producer.message_child("second")

        @MessageHandler("command", "run")
        def third(self, content: Any) -> None:
            self.producer.message_child("third")
            raise LookupError

    with Running(own := Several()):
        sender.message_run()
        with raw_channel() as channel:
            take(channel, "q.error")

    assert [1] == own.log
    (first_id, first), (second_id, second) = children(2)
    assert ("first", "second") == (first, second)
    assert first_id != second_id
    assert [] == rest_of("children")


def test_threads_and_children_of_a_handler_are_not_the_handler(sender: Sender) -> None:
    """A thread that it starts sends at once, and so does a forked child."""

    def act(own: Any, _parameters: Any) -> None:
        own.producer.message_child("held")
        thread = threading.Thread(target=own.producer.message_child, args=("thread",))
        thread.start()
        thread.join(PATIENCE)
        if os.fork() == 0:
            try:
                own.producer.message_child("fork")
            finally:
                os._exit(0)
        os.wait()
        raise LookupError

    with Running(own_with("plain", act)):
        sender.message_run(None)
        with raw_channel() as channel:
            take(channel, "q.error")

    assert ["thread", "fork"] == said(2)
    assert [] == rest_of("children")


def test_tasks_and_threads_of_asyncio_belong_to_the_handler(sender: Sender) -> None:
    """They copy its context. A task that outlives the handler sends by itself."""

    class Async(Own):
        @MessageHandler("command", "run")
        async def msg_run(self, content: Any) -> None:
            await asyncio.gather(self.child("task"))
            await asyncio.to_thread(self.producer.message_child, "thread")
            self.log.append(waiting_children())
            self.task = asyncio.create_task(self.later())

        async def child(self, name: str) -> None:
            self.producer.message_child(name)

        async def later(self) -> None:
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            assert outboxes.current() is None
            await self.producer.message_child("later", _future=True)
            with pytest.raises(PostageError, match="event loop"):
                self.producer.message_child("would block")

    with Running(own := Async()):
        sender.message_run()
        assert ["task", "thread"] == said(2)
        own.go_on.set()
        assert ["later"] == said(1)
        wait_until(own.task.done)
        assert own.task.exception() is None

    assert [0] == own.log


def test_handlers_that_take_turns_have_an_outbox_each(sender: Sender) -> None:
    """Also one that fails beside one that succeeds, and one without an outbox."""

    class Interleaved(Own):
        def turns(self, name: str) -> Generator[Any, Any, None]:
            for number in range(3):
                self.producer.message_child(f"{name} {number}")
                self.log.append(name)
                while len(set(self.log[number * 3 :])) < 3 and len(self.log) < number * 3 + 3:
                    yield sleep(0.001)  # until the others have had their turn

        @MessageHandler("command", "good")
        def msg_good(self, content: Any) -> Generator[Any, Any, None]:
            yield from self.turns("good")

        @MessageHandler("command", "bad")
        def msg_bad(self, content: Any) -> Generator[Any, Any, None]:
            yield from self.turns("bad")
            raise LookupError

        @MessageHandler("command", "free", outbox=False)
        def msg_free(self, content: Any) -> Generator[Any, Any, None]:
            yield from self.turns("free")

    with Running(own := Interleaved()):
        for name in ("good", "bad", "free"):
            getattr(sender, f"message_{name}")()
        with raw_channel() as channel:
            take(channel, "q.error")
        arrived = said(6)

    assert {"good", "bad", "free"} == {*own.log[:3]} == {*own.log[3:6]}
    assert [f"good {n}" for n in range(3)] == [each for each in arrived if "good" in each]
    assert [f"free {n}" for n in range(3)] == [each for each in arrived if "free" in each]
    assert [] == rest_of("children")


def test_calls_leave_at_once(sender: Sender) -> None:
    """A handler needs their answers. Their ids are not derived."""

    class Asking(Own):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> Generator[Any, Any, None]:
            self.producer.message_child("held")
            reply = yield self.producer.rpc_double(4, _queue="other", _future=True)
            self.log.append((reply.value, waiting_children()))

        @RpcHandler("command", "double")
        def rpc_double(self, content: Any, reply_func: Any) -> None:
            reply_func(content["parameters"] * 2)

    with Running(own := Asking(), Asking("other")):
        sender.message_run()
        assert ["held"] == said(1)

    assert [(8, 0)] == own.log


# ----------------------------------------------------------------------------- futures


@pytest.mark.parametrize("kind", ["plain", "generator", "async"])
def test_a_handler_does_not_wait_for_its_own_messages(kind: str, sender: Sender) -> None:
    """It would wait for ever. Others hear when they are confirmed."""

    class Waiting(Own):
        @MessageHandler("command", "plain")
        def msg_plain(self, content: Any) -> None:
            future = self.producer.message_child("child", _future=True)
            self.log += [future, future.result(), future.ready()]

        @MessageHandler("command", "generator")
        def msg_generator(self, content: Any) -> Generator[Any, Any, None]:
            future = self.producer.message_child("child", _future=True)
            self.log += [future, (yield future), future.ready()]

        @MessageHandler("command", "async")
        async def msg_async(self, content: Any) -> None:
            future = self.producer.message_child("child", _future=True)
            self.log += [future, (await future), future.ready()]

    with Running(own := Waiting()):
        getattr(sender, f"message_{kind}")()
        own.wait_for(3)
        future, *heard = own.log
        assert [None, False] == heard
        assert future.result(PATIENCE) is None
        assert ["child"] == said(1)


def test_the_future_of_a_message_that_does_not_leave_fails(sender: Sender) -> None:
    """Because the handler failed, or because of what the broker says."""

    def act(own: Any, parameters: Any) -> None:
        own.log.append(own.producer.message_child(_future=True, _queue=parameters))
        if parameters == "children":
            raise LookupError

    with Running(own := own_with("plain", act)):
        sender.message_run("children")
        sender.message_run("nowhere")
        own.wait_for(2)
        with pytest.raises(ClosedError, match="not sent: msg_run failed"):
            own.log[0].result(PATIENCE)
        with pytest.raises(PostageError, match="there is no queue"):
            own.log[1].result(PATIENCE)


def test_a_callback_of_a_future_runs_in_the_context_of_who_asked_for_it(sender: Sender) -> None:
    """A handler that runs the loop, and so sets futures of others, does not own what they send."""
    future: Future[None] = Future(sender.channel.hub.wait)

    def act(own: Any, _parameters: Any) -> None:
        future.set(None)
        raise LookupError

    future.when_ready(lambda: sender.message_child("child", _queue="children", _future=True))
    with Running(own_with("plain", act)):
        sender.message_run(None)
        assert ["child"] == said(1)
        with raw_channel() as channel:
            take(channel, "q.error")


# -------------------------------------------------------------- batches and transactions


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_batches_and_transactions_flow_into_the_outbox(kind: str, sender: Sender) -> None:
    """In order. They confirm nothing, and a transaction that raises still drops its own."""

    def act(own: Any, _parameters: Any) -> None:
        producer = own.producer
        producer.message_child("first")
        with producer.batch() as batch:
            batch.message_child("in a batch")
        with producer.transaction() as tx:
            tx.message_child("in a transaction")
            producer.message_child("before the transaction")
        with pytest.raises(ZeroDivisionError), producer.transaction() as failing:
            failing.message_child("dropped")
            _ = 1 / 0
        producer.message_child("last")
        own.log.append((batch.confirmed, tx.confirmed, waiting_children()))

    with Running(own := own_with(kind, act)):
        sender.message_run(None)
        arrived = said(5)

    assert [
        "first",
        "in a batch",
        "before the transaction",
        "in a transaction",
        "last",
    ] == arrived
    assert [([], [], 0)] == own.log
    assert [] == rest_of("children") + rest_of("q.error")


def test_a_batch_that_would_wait_in_a_coroutine_is_refused(sender: Sender) -> None:
    """What stays out of the outbox is sent, and would block the event loop."""

    def act(own: Any, _parameters: Any) -> None:
        with own.producer.batch() as batch:
            batch.message_child("child", _outbox=False)

    with Running(own_with("async", act)):
        sender.message_run(None)
        with raw_channel() as channel:
            properties, _ = take(channel, "q.error")[0]

    assert "would block the event loop" in properties.headers["postage-error"]


# ------------------------------------------------------------------------------- the order


def test_the_messages_of_several_producers_leave_in_order(sender: Sender) -> None:
    """There is no order between two channels, so one waits for the other."""

    class Both(Own):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> None:
            with Children() as other:
                for number in range(20):
                    (other if number % 3 == 0 else self.producer).message_child(number)

    with Running(Both()):
        sender.message_run()
        assert list(range(20)) == said(20)

    assert [] == rest_of("q.error")


def test_the_messages_of_a_handler_may_go_to_several_brokers(embedded: Broker) -> None:
    """Each leaves by its own producer's connection."""
    url = embedded.add_vhost("second")

    def act(own: Any, _parameters: Any) -> None:
        with Children(vhost="second") as second:
            for number in range(3):
                own.producer.message_child(number)
                second.message_child(-number, _mandatory=False)
            own.log.append(second)

    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.queue_declare("children")
        with Sender() as sender, Running(own_with("plain", act)):
            sender.message_run(None)
            assert [0, 1, 2] == said(3)
            bodies = [body for _, body in take(channel, "children", 3)]

    assert [0, -1, -2] == [json.loads(body)["content"]["parameters"] for body in bodies]


def test_a_large_outbox_leaves_in_pieces(sender: Sender) -> None:
    """In order, and the scheduler goes on meanwhile."""
    count = 2 * OUTBOX_WINDOW + 1

    def act(own: Any, _parameters: Any) -> None:
        for number in range(count):
            own.producer.message_child(number)

    with Running(own_with("plain", act)):
        sender.message_run(None)
        assert list(range(count)) == said(count)


def test_a_producer_that_is_closed_in_the_handler_is_closed_behind_its_outbox(
    sender: Sender,
) -> None:
    """`with Producer() as producer` is how scripts send."""

    def act(own: Any, parameters: Any) -> None:
        with Children() as producer:
            producer.message_child("child")
        own.log.append(producer)
        with pytest.raises(ClosedError):
            producer.message_child("too late")
        if parameters == "fail":
            raise LookupError

    with Running(own := own_with("plain", act)):
        for parameters in ("succeed", "fail"):
            sender.message_run(parameters)
        own.wait_for(2)
        assert ["child"] == said(1)
        for producer in own.log:
            wait_until(lambda: "closed" in repr(producer._publisher))  # noqa: B023

    assert [] == rest_of("children")


# ------------------------------------------------------------------------------------ ids


def test_a_message_without_an_id_has_children_with_random_ids(sender: Sender) -> None:
    """Two equal messages are not the same message, and 1.2.1 sends no ids."""
    with Running(own_with("plain", send_three)), raw_channel() as channel:
        body = json.dumps(
            {"category": "message", "type": "command", "name": "run", "content": {"parameters": 1}}
        )
        for _ in range(2):
            channel.basic_publish("", "q", body.encode(), pika.BasicProperties())
        ids = [message_id for message_id, _ in children(6)]

    assert 6 == len({*ids})


class Splitting(Own):
    """Sends one child."""

    @MessageHandler("command", "split")
    def msg_split(self, content: Any) -> None:
        self.producer.message_child("child")


def test_components_that_get_the_same_message_have_different_children(sender: Sender) -> None:
    """A receiver must not take the one's for the other's."""
    nameless = {"name": "", "flags": {"exclusive": True}}
    with Running(Splitting("q"), Splitting(nameless), Splitting(nameless)):
        sender.message_split(_eks=[(TestExchange, "q"), (TestExchange, "")], _message_id="cause")
        ids = {message_id for message_id, _ in children(3)}

    assert 3 == len(ids)


def test_an_id_of_your_own_is_kept(sender: Sender) -> None:
    """With the headers and all else that goes with a message."""

    def act(own: Any, _parameters: Any) -> None:
        own.producer.message_child(1, _message_id="mine", _headers={"a": 1}, _persistent=False)

    with Running(own_with("plain", act)):
        sender.message_run(None)
        with raw_channel() as channel:
            properties, _ = take(channel, "children")[0]

    assert ("mine", {"a": 1}, 1) == (
        properties.message_id,
        properties.headers,
        properties.delivery_mode,
    )


def test_ids_are_counted_by_what_a_message_is_and_where_it_goes() -> None:
    """A handler that takes another way gives no message the id of another."""
    first, again = (Outbox("q", "msg_run", "cause") for _ in range(2))
    to = (("", "children"),)

    debit, credit, second = (first.message_id(kind, to) for kind in ("debit", "credit", "credit"))

    assert [credit, debit, second] == [
        again.message_id(kind, to) for kind in ("credit", "debit", "credit")
    ]
    others = {
        Outbox("r", "msg_run", "cause").message_id("debit", to),
        Outbox("q", "msg_walk", "cause").message_id("debit", to),
        Outbox("q", "msg_run", "effect").message_id("debit", to),
        Outbox("q", "msg_run", "cause").message_id("debit", ()),
        *(Outbox("q", "msg_run", None).message_id("debit", to) for _ in range(2)),
    }
    assert 6 == len(others - {debit, credit, second})


def test_derived_ids_stay_the_same_from_version_to_version() -> None:
    """A retry may be run by a newer one."""
    outbox = Outbox("orders", "msg_order", "order-17")

    message_id = outbox.message_id(("command", "bill"), (("", "billing"),))

    assert "808a0d72-fffa-557d-9be7-c58cde1913b9" == message_id


# ------------------------------------------------------------------------ what goes wrong


def test_a_message_is_acked_after_its_outbox_is_confirmed(embedded: Broker) -> None:
    """As long as it is not, it is in flight, and others are handled."""
    with Sender() as sender, Running(own := own_with("threaded", wait_and_send)):
        sender.message_run(None)
        own.wait_for(1)
        with embedded.faults.delay_confirms(1.0):
            own.go_on.set()
            wait_until(lambda: "3 unconfirmed" in repr(own.producer.channel))
            assert 1 == len(own._in_flight)
            wait_until(lambda: not own._in_flight, PATIENCE)
        assert 0 == own.producer.channel.outstanding

    assert [0, 1, 2] == said(3)


def wait_and_send(own: Any, _parameters: Any) -> None:
    own.log.append("runs")
    assert own.go_on.wait(PATIENCE)
    for number in range(3):
        own.producer.message_child(number)


@pytest.mark.parametrize(
    ("queue", "error"),
    [("nowhere", "there is no queue 'nowhere'"), ("full", "the broker refused it")],
)
def test_an_outbox_that_is_not_confirmed_is_a_failure_of_its_handler(
    queue: str, error: str, sender: Sender
) -> None:
    """Its message is parked; the error lists what left. Put back, it repeats all with its ids."""

    def act(own: Any, _parameters: Any) -> None:
        own.producer.message_child("child")
        own.producer.message_child("lost", _queue=queue)

    with Running(own_with("plain", act)), raw_channel() as channel:
        limits = {"x-max-length": 0, "x-overflow": "reject-publish"}
        channel.queue_declare("full", arguments=limits)
        sender.message_run(None)
        properties, body = take(channel, "q.error")[0]
        headers = properties.headers
        first = children(1)
        channel.queue_delete("full")
        channel.queue_declare(queue, durable=True)
        channel.basic_publish("", "q", body, properties)
        second = children(1)
        take(channel, queue)

    assert ("failed", "BatchError") == (headers["postage-reason"], headers["postage-exception"])
    assert headers["postage-error"].startswith("1 message(s) confirmed, 1 failed, 0 unknown; ")
    assert error in headers["postage-error"]
    assert "child" == first[0][1]
    assert first == second


def test_after_a_failure_no_further_piece_leaves(sender: Sender) -> None:
    """It is known by then that this is not all."""

    def act(own: Any, _parameters: Any) -> None:
        own.producer.message_child("lost", _queue="nowhere")
        with Children() as other:
            own.log.append(other.message_child("held back", _future=True))

    with Running(own := own_with("plain", act)):
        sender.message_run(None)
        with raw_channel() as channel:
            properties, _ = take(channel, "q.error")[0]
        with pytest.raises(ClosedError):
            own.log[0].result(PATIENCE)

    assert "0 message(s) confirmed, 2 failed" in properties.headers["postage-error"]
    assert [] == rest_of("children")


def test_a_blocked_broker_gets_nothing_of_an_outbox(embedded: Broker) -> None:
    """Its message is parked when the alarm is over."""

    def act(own: Any, _parameters: Any) -> None:
        own.log.append("runs")
        assert own.go_on.wait(PATIENCE)
        own.producer.message_child("child", _timeout=0.3)

    with Sender() as sender, Running(own := own_with("threaded", act)):
        sender.message_run(None)
        own.wait_for(1)
        with embedded.faults.block("an alarm"):
            own.producer.message_probe(_queue="q.error", _confirm=False)
            wait_until(lambda: "BLOCKED" in str(own.producer.conn_broker.state))
            own.go_on.set()
            wait_until(lambda: own.consumer._publisher is not None, PATIENCE)  # it parks
        with raw_channel() as channel:
            _, (properties, _body) = take(channel, "q.error", 2)

    assert "an alarm of the broker blocks publishers" in properties.headers["postage-error"]
    assert [] == rest_of("children")


def test_a_connection_that_is_lost_while_an_outbox_leaves_repeats_its_ids(
    embedded: Broker,
) -> None:
    """What was in doubt is sent again, and the message comes again; all with the same ids."""
    with Sender() as sender, Running(own := own_with("threaded", wait_and_send)):
        sender.message_run(None)
        own.wait_for(1)
        with embedded.faults.delay_confirms(PATIENCE):
            own.go_on.set()
            wait_until(lambda: "3 unconfirmed" in repr(own.producer.channel))
        assert embedded.faults.drop() >= 2
        own.wait_for(2)  # delivered again
        wait_until(lambda: not own._in_flight and not own.producer.channel.outstanding, PATIENCE)

    taken = children(6)
    assert 3 == len({message_id for message_id, _ in taken})
    assert {0, 1, 2} == {parameters for _, parameters in taken}
    assert [] == rest_of("q") + rest_of("q.error")


@pytest.mark.parametrize(("moment", "before"), [("handled", []), ("committed", ["a", "b", "c"])])
def test_a_process_that_is_killed_repeats_its_children_with_the_same_ids(
    moment: str, before: list[str], sender: Sender
) -> None:
    """Killed before the commit it has sent none. After it, the ack is what is missing."""
    program = ["-m", "tests.programs_for_tests.outboxes", "splitter"]
    eks = [(GenericApplicationExchange, "splitter/rr")]
    with Program([*program, moment]) as killed:
        killed.wait_for_line("ready", PATIENCE)
        sender.message_split(["a", "b", "c"], _eks=eks)
        assert -signal.SIGKILL == killed.wait(PATIENCE)
    first = children(len(before)) if before else []
    assert before == [parameters for _, parameters in first]
    assert [] == rest_of("children")

    with Program(program) as again:
        second = children(3)
        again.terminate()
        assert 0 == again.wait(PATIENCE)

    assert ["a", "b", "c"] == [parameters for _, parameters in second]
    assert first in ([], second)
    assert [] == rest_of("splitter") + rest_of("splitter.error") + rest_of("children")


def test_a_handler_that_is_given_up_sends_nothing(sender: Sender) -> None:
    """Its message is delivered again, and what still runs of it hears that it was given up."""
    log: list[Any] = []

    def act(own: Any, _parameters: Any) -> None:
        own.producer.message_child("first")
        own.log.append("runs")
        assert own.go_on.wait(PATIENCE)
        try:
            own.producer.message_child("second")
        except ClosedError as error:
            log.append(str(error))

    own = own_with("threaded", act, grace=0.1)
    with Running(own) as running:
        sender.message_run(None)
        own.wait_for(1)
        own.stop_consuming()
        running.join()
        own.go_on.set()
        wait_until(lambda: log)

    assert ["msg_run failed or was given up: what it sends does not leave"] == log
    assert [] == rest_of("children")
    assert 1 == len(rest_of("q"))


# ------------------------------------------------------------------------------------ RPC


class Serving(Own):
    """A service that sends a child with every answer."""

    child = "children"

    @RpcHandler("command", "add")
    def rpc_add(self, content: Any, reply_func: Any) -> None:
        self.producer.message_child("child", _queue=self.child)
        reply_func(sum(content["parameters"]))
        self.log.append("ran")
        if self.child == "fail":
            raise LookupError("after the reply")

    @RpcHandler("command", "late")
    def rpc_late(self, content: Any, reply_func: Any) -> None:
        self.producer.message_child("child")
        self.log.append(reply_func)
        reply_func("in time")


def test_the_reply_of_a_service_leaves_behind_its_outbox(sender: Sender) -> None:
    """Who has the answer finds the child in its queue."""
    with Running(Serving()):
        assert 3 == sender.rpc_add([1, 2]).value
        assert 1 == waiting_children()


@pytest.mark.parametrize(("child", "error"), [("nowhere", "BatchError"), ("fail", "LookupError")])
def test_a_service_whose_outbox_or_handler_fails_replies_with_that_alone(
    child: str, error: str, sender: Sender
) -> None:
    """The reply that it had prepared does not leave."""
    with raw_channel() as channel:
        channel.queue_declare("fail", durable=True)
    with Running(own := Serving(child=child)):
        reply = sender.rpc_add([1, 2])
        assert (False, error) == (bool(reply), reply.value)

    assert ["ran"] == own.log
    assert [] == rest_of("q") + rest_of("q.error") + rest_of("fail")


def test_a_reply_that_comes_after_the_handler_is_sent_at_once(sender: Sender) -> None:
    """There is nothing to wait for any more."""
    with Running(own := Serving()):
        assert "in time" == sender.rpc_late().value
        own.log[0]("too late")


def test_a_reply_that_cannot_be_written_is_an_error_of_the_handler(sender: Sender) -> None:
    """It is written when the handler gives it, not when it leaves."""

    class Unwritable(Own):
        @RpcHandler("command", "ask")
        def rpc_ask(self, content: Any, reply_func: Any) -> None:
            self.producer.message_child("child")
            reply_func({1, 2})

    with Running(Unwritable()):
        assert "EncodingError" == sender.rpc_ask().value

    assert [] == rest_of("children")


# ------------------------------------------------------------------------------- contexts


def test_each_handler_has_a_context_of_its_own(sender: Sender) -> None:
    """What it sets is there at its next step, and in no other handler."""
    setting: contextvars.ContextVar[str] = contextvars.ContextVar("setting", default="unset")

    class Setting(Own):
        outbox = False

        @MessageHandler("command", "set")
        def msg_set(self, content: Any) -> Generator[Any, Any, None]:
            name = content["parameters"]
            before = setting.get()
            setting.set(name)
            while len(self.log) < 2:
                self.log += [name] * (name not in self.log)
                yield sleep(0.001)
            self.log.append((name, before, setting.get()))

    with Running(own := Setting()):
        for name in ("a", "b"):
            sender.message_set(name)
        own.wait_for(4)

    assert {("a", "unset", "a"), ("b", "unset", "b")} == {*own.log[2:]}


def test_steps_go_on_as_yield_from_does() -> None:
    """Values, errors and the end go through."""
    heard: list[Any] = []

    def inner() -> Generator[Any, Any, None]:
        try:
            heard.append((yield 1))
            yield 2
        except LookupError as error:
            heard.append(error)
        try:
            yield 3
        finally:
            heard.append("closed")

    error = LookupError()
    steps = outboxes.steps(contextvars.copy_context(), inner())
    assert [1, 2] == [next(steps), steps.send("sent")]
    assert 3 == steps.throw(error)
    steps.close()
    assert ["sent", error, "closed"] == heard

    assert [1, 2, 3] == list(outboxes.steps(contextvars.copy_context(), inner()))
    with pytest.raises(StopIteration):
        next(outboxes.steps(contextvars.copy_context(), (each for each in ())))


def test_an_outbox_shows_its_state(sender: Sender) -> None:
    """And ends as dropped, unless it was committed."""
    with Outbox("q", "msg_run", None) as outbox:
        context = outboxes.context_of(outbox)
        future = context.run(sender.message_child, _queue="children", _future=True)
        assert "<Outbox of msg_run [open, 1 held]>" == repr(outbox)
        assert isinstance(future, Held)
    assert "<Outbox of msg_run [dropped, 0 held]>" == repr(outbox)
    assert context.run(outboxes.current) is outbox

    with Outbox("q", "msg_run", None) as outbox:
        assert [] == list(outbox.commit())
    assert "<Outbox of msg_run [committed, 0 held]>" == repr(outbox)
    assert outboxes.context_of(outbox).run(outboxes.current) is None
