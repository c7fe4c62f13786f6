# SPDX-License-Identifier: MIT
"""Producers are used by many threads and on both sides of a fork; consumers on one."""

from __future__ import annotations

import collections
import gc
import json
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pika
import pytest

from postage.errors import ForkedError
from postage.messaging import (
    GenericConsumer,
    MessageHandler,
    MessageProcessor,
    Queue,
)
from postage.microthreads import MicroScheduler
from tests.forks import in_child, name_of_error
from tests.letters import Letters, Mailbox, Sender
from tests.programs import Program
from tests.waiting import wait_until

# Python warns of a fork beside threads, since most libraries cannot bear it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


# --------------------------------------------------------------------------- threads


def test_eight_threads_share_a_producer(mailbox: Mailbox, producer: Sender) -> None:
    """All of their messages arrive, none twice, and those of each thread in order."""

    def send(thread: int) -> None:
        for number in range(625):
            producer.message_number(thread, number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(8)))

    arrived = mailbox.parameters()
    assert 5000 == len(arrived)
    for thread in range(8):
        assert list(range(625)) == [number for by, number in arrived if by == thread]


def test_threads_open_a_producer_at_the_same_time(mailbox: Mailbox, producer: Sender) -> None:
    """It is opened once."""
    barrier = threading.Barrier(8)

    def send(number: int) -> int:
        barrier.wait(10)
        producer.message_number(number)
        return id(producer.channel)

    with ThreadPoolExecutor(8) as pool:
        channels = set(pool.map(send, range(8)))

    assert 1 == len(channels)
    assert list(range(8)) == sorted(mailbox.parameters())


def test_threads_make_and_close_producers(mailbox: Mailbox, broker_url: str) -> None:
    """The shared connection comes and goes under them."""

    def work(thread: int) -> None:
        for number in range(25):
            with Sender() as producer:
                producer.message_number(thread, number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))

    assert 200 == len(mailbox.parameters())


# ----------------------------------------------------------------------- producers


def test_a_producer_works_on_both_sides_of_a_fork(mailbox: Mailbox, producer: Sender) -> None:
    """Whether or not it was used before, and with the fingerprint of who sends."""
    unused = Sender()
    producer.message_from("before")

    def child() -> int:
        producer.message_from("child")
        unused.message_from("child, unused")
        producer.message_from("child again")
        with producer.batch() as batch:
            batch.message_from("child, batch")
        assert producer.message_from("child, future", _future=True).result(30) is None
        return os.getpid()

    result = in_child(child)
    producer.message_from("parent")
    pid = result()
    producer.message_from("parent again")
    unused.message_from("parent, unused")
    unused.close()

    bodies = mailbox.bodies()
    by_child = [
        body["content"]["parameters"] for body in bodies if body["fingerprint"]["pid"] == str(pid)
    ]
    by_parent = [
        body["content"]["parameters"]
        for body in bodies
        if body["fingerprint"]["pid"] == str(os.getpid())
    ]
    child_sent = ["child", "child, unused", "child again", "child, batch", "child, future"]
    assert child_sent == by_child
    assert ["before", "parent", "parent again", "parent, unused"] == by_parent


def test_a_child_keeps_a_pid_that_was_given(mailbox: Mailbox, broker_url: str) -> None:
    """Only one that was found out is found out anew."""
    with Sender({"pid": "4242"}) as producer:
        in_child(lambda: producer.message_from("child"))()

    assert ["4242"] == [body["fingerprint"]["pid"] for body in mailbox.bodies()]


def test_a_child_does_not_receive_the_replies_of_its_parent(
    mailbox: Mailbox, producer: Sender
) -> None:
    """Calls go on in the parent, and the child makes its own."""
    future = producer.rpc_ask("parent", _future=True)
    wait_until(lambda: mailbox.count() == 1)
    result = in_child(lambda: bool(producer.rpc_ask("child", _timeout=0.2, _max_retry=0)))
    assert result() is False

    _method, properties, body = mailbox.channel.basic_get(mailbox.name, auto_ack=True)
    assert "parent" == json.loads(body)["content"]["parameters"]
    reply = {"content": {"type": "success", "value": 1, "message": ""}}
    correlation = pika.BasicProperties(correlation_id=properties.correlation_id)
    mailbox.channel.basic_publish("", properties.reply_to, json.dumps(reply), correlation)
    assert 1 == future.result(30).value


def test_a_child_that_closes_its_producer_leaves_that_of_its_parent_open(
    mailbox: Mailbox, producer: Sender
) -> None:
    """Used there or not."""
    producer.message_from("before")

    def used() -> str:
        with producer:
            producer.message_from("child")
        return name_of_error(producer.message_from)

    def unused() -> str:
        producer.close()
        return name_of_error(producer.message_from)

    assert "ClosedError" == in_child(used)()
    assert "ClosedError" == in_child(unused)()
    producer.message_from("parent")

    assert ["before", "child", "parent"] == mailbox.parameters()


def test_a_child_that_drops_what_it_inherited_says_nothing(
    mailbox: Mailbox, broker_url: str
) -> None:
    """It is not the child's to close."""
    producer = Sender()
    producer.message_from("before")

    def child() -> list[str]:
        nonlocal producer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del producer
            gc.collect()
        return [str(each.message) for each in caught]

    assert [] == in_child(child)()
    producer.message_from("parent")
    producer.close()


def test_children_of_children_send(mailbox: Mailbox, producer: Sender) -> None:
    """Each has a connection of its own."""
    producer.message_from("parent")

    def grandchild() -> str:
        producer.message_from("grandchild")
        return "done"

    def child() -> Any:
        producer.message_from("child")
        result = in_child(grandchild)
        answer = result()
        producer.message_from("child again")
        return answer

    assert "done" == in_child(child)()
    assert ["parent", "child", "grandchild", "child again"] == mailbox.parameters()


def test_a_fork_while_other_threads_send_loses_and_doubles_nothing(
    mailbox: Mailbox, producer: Sender
) -> None:
    """Neither in the parent nor in a child."""
    stop = threading.Event()
    sent: collections.Counter[str] = collections.Counter()

    def send(thread: int) -> None:
        number = 0
        while not stop.is_set():
            text = f"thread {thread}, {number}"
            producer.message_from(text)
            sent[text] += 1
            number += 1

    def child(number: int) -> str:
        for _ in range(3):
            producer.message_from(f"child {number}")
        return "done"

    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send, thread) for thread in range(4)]
        try:
            for number in range(20):
                wait_until(lambda: len(sent) > number * 20)  # noqa: B023
                result = in_child(lambda: child(number))  # noqa: B023
                assert "done" == result()
                sent[f"child {number}"] += 3
        finally:
            stop.set()
        for sender in senders:
            sender.result(30)

    arrived: collections.Counter[str] = collections.Counter()
    wait_until(lambda: arrived.update(mailbox.parameters()) or arrived.total() >= sent.total())
    assert sent == arrived


def test_a_thread_that_forks_can_send_in_the_child(mailbox: Mailbox, producer: Sender) -> None:
    """It is the only thread there."""
    producer.message_from("before")

    def child() -> str:
        producer.message_from("child")
        return "done"

    with ThreadPoolExecutor(1) as pool:
        assert "done" == pool.submit(lambda: in_child(child)()).result(30)
    producer.message_from("after")

    assert ["before", "child", "after"] == mailbox.parameters()


def test_a_future_of_the_parent_does_not_hang_in_the_child(
    mailbox: Mailbox, producer: Sender
) -> None:
    """It cannot come true there."""
    future = producer.rpc_ask(_future=True)

    assert "no error" != in_child(lambda: name_of_error(future.result))()


FORKING = """
import multiprocessing, os, sys, warnings
from postage.messaging import Exchange, GenericProducer

warnings.simplefilter("ignore", DeprecationWarning)

class Letters(Exchange):
    name = "letters"

class Sender(GenericProducer):
    eks = [(Letters, "post")]

def work(name):
    producer.message_from(name)
    unused.message_from(name)
    print(name, "sent")

producer, unused = Sender(), Sender()
producer.message_from("parent")
"""


def run(tmp_path: Path, code: str) -> Program:
    program = tmp_path / "forking.py"
    program.write_text(FORKING + code)
    with Program(["-W", "error::ResourceWarning", str(program)]) as running:
        assert 0 == running.wait(60), running.output
    return running


def test_a_child_that_exits_normally_says_goodbye(mailbox: Mailbox, tmp_path: Path) -> None:
    """With the functions of atexit, its own and those that it inherited."""
    program = run(
        tmp_path,
        """
import atexit
if os.fork() == 0:
    atexit.register(print, "goodbye")
    work("child")
    sys.exit()
pid, status = os.wait()
print("child ended with", status)
work("parent again")
""",
    )

    assert ["child sent", "goodbye", "child ended with 0", "parent again sent"] == program.stdout
    assert [] == program.stderr
    assert ["parent", *["child"] * 2, *["parent again"] * 2] == mailbox.parameters()


def test_multiprocessing_forks(mailbox: Mailbox, tmp_path: Path) -> None:
    """Single processes, and pools that are forked by a thread of their own."""
    program = run(
        tmp_path,
        """
context = multiprocessing.get_context("fork")
process = context.Process(target=work, args=("process",))
process.start()
process.join()
print("process ended with", process.exitcode)
with context.Pool(2) as pool:
    pool.map(work, ["pool"] * 4)
    pool.close()
    pool.join()
work("parent again")
""",
    )

    assert "process ended with 0" in program.stdout
    assert [] == program.stderr
    expected = {"parent": 1, "process": 2, "pool": 8, "parent again": 2}
    assert expected == collections.Counter(mailbox.parameters())


# ------------------------------------------------------------ consumers and processors


class Listener(MessageProcessor):
    heard: list[Any]

    @MessageHandler("command", "from")
    def msg_from(self, content: Any) -> None:
        self.heard.append(content["parameters"])


def test_a_consumer_belongs_to_the_process_that_made_it(broker_url: str, producer: Sender) -> None:
    """Everything that a child asks of it is refused, except to close it."""
    with GenericConsumer([(Letters, [(Queue("letters", exclusive=True), "post")])]) as consumer:
        consumer.start()
        producer.message_from("T")
        wait_until(lambda: consumer.subscriber.inbox)

        def child() -> list[str]:
            delivery = consumer.subscriber.inbox[0]
            uses: list[Callable[[], Any]] = [
                consumer.start,
                lambda: consumer.start_consuming(print),
                consumer.take,
                lambda: consumer.ack(delivery),
                lambda: consumer.reject(delivery, True),
                lambda: consumer.add_eqk([(Letters, [("other", "post")])]),
                lambda: consumer.queue_unbind(Letters, "letters", "post"),
                lambda: consumer.rpc_reply(pika.BasicProperties(reply_to="q"), 1),
            ]
            errors = [name_of_error(use) for use in uses]
            consumer.close()
            return errors

        assert [ForkedError.__name__] * 8 == in_child(child)()
        delivery = consumer.take()
        assert delivery is not None
        consumer.ack(delivery)


def test_a_callback_that_forks_does_not_consume_in_the_child(
    broker_url: str, producer: Sender
) -> None:
    """Else the child would handle copies of what its parent handles."""
    results: list[str] = []

    def callback(_channel: Any, method: Any, _properties: Any, _body: Any) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with open(writer, "w") as pipe:
                    pipe.write(name_of_error(lambda: consumer.start_consuming(print)))
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader) as pipe:
            results.append(pipe.read())
        os.waitpid(pid, 0)
        consumer.ack(method)
        if len(results) == 2:
            consumer.stop_consuming()

    with GenericConsumer([(Letters, [(Queue("letters", exclusive=True), "post")])]) as consumer:
        producer.message_from("first")
        producer.message_from("second")
        consumer.start_consuming(callback)

    assert ["ForkedError", "ForkedError"] == results


def test_a_processor_belongs_to_the_process_that_made_it(broker_url: str, producer: Sender) -> None:
    """A child that goes on with it hears so, and the parent misses nothing."""
    eqk = [(Letters, [(Queue("letters", exclusive=True), "post")])]
    with Listener({"name": "listener"}, eqk) as listener:
        listener.heard = []
        scheduler = MicroScheduler()
        scheduler.add_microthread(listener)
        steps = scheduler.main()
        for text in ("first", "second"):
            producer.message_from(text)

        def go_on_until(count: int) -> None:
            for _ in steps:
                if len(listener.heard) >= count:
                    return

        go_on_until(1)
        assert "ForkedError" == in_child(lambda: name_of_error(lambda: go_on_until(2)))()
        assert "ForkedError" == in_child(lambda: name_of_error(listener.start_consuming))()
        assert "no error" == in_child(lambda: name_of_error(listener.close))()  # the parent's
        go_on_until(2)

    assert ["first", "second"] == listener.heard


def test_a_child_may_make_a_processor_of_its_own(broker_url: str, producer: Sender) -> None:
    """It has nothing to do with that of the parent."""

    def child() -> list[Any]:
        eqk = [(Letters, [(Queue("childs", exclusive=True), "child")])]
        with Listener({"name": "child"}, eqk) as own:
            own.heard = []
            producer.message_from("child", _key="child")
            producer.message_quit(_key="child")
            own.start_consuming()
        return own.heard

    eqk = [(Letters, [(Queue("letters", exclusive=True), "post")])]
    with Listener({"name": "listener"}, eqk) as listener:
        listener.heard = []
        producer.message_from("parent")
        assert ["child"] == in_child(child)()
        producer.message_quit()
        listener.start_consuming()

    assert ["parent"] == listener.heard
