# SPDX-License-Identifier: MIT
"""The helpers for tests of components, as people use them who have no pytest."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pytest

from postage import messaging, microthreads
from postage.broker import BrokerError
from postage.errors import (
    ClosedError,
    ConfigurationError,
    NackedError,
    PublishTimeoutError,
    PublishUnknownError,
)
from postage.generic_application import GenericApplication, GenericApplicationExchange
from postage.settings import Settings
from postage.testing import Running, TestBroker, TestVhost, running, wait_until
from postage.transport import hub as hubs


class Greeter(GenericApplication):
    grace = 1.0

    def __init__(self, fingerprint: Any, **options: Any) -> None:
        super().__init__(fingerprint, **options)
        self.greeted: list[Any] = []

    @messaging.MessageHandler("command", "hello")
    def msg_hello(self, content: Any) -> None:
        if content["parameters"] == "nobody":
            raise LookupError("nobody is there")
        self.greeted.append(content["parameters"])

    @messaging.RpcHandler("command", "add")
    def rpc_add(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        reply_func(sum(content["parameters"]))

    @messaging.MessageHandler("command", "block")
    def msg_block(self, content: Any) -> None:
        time.sleep(content["parameters"])

    @messaging.MessageHandler("command", "become_new")
    def msg_become_new(self, content: Any) -> None:
        self.restart()


class Producer(messaging.GenericProducer):
    eks = [(GenericApplicationExchange, "greeter/rr")]


class Words(messaging.MessageProcessor):
    words: list[str]

    @messaging.MessageHandler("command", "word")
    def msg_word(self, content: Any) -> None:
        self.words.append(content["parameters"])


@pytest.fixture(scope="module")
def broker() -> Iterator[TestBroker]:
    with TestBroker() as broker:
        yield broker


@pytest.fixture
def vhost(broker: TestBroker) -> Iterator[TestVhost]:
    with broker.vhost() as vhost:
        yield vhost


def test_tls_of_another_broker_is_none_of_the_embedded_one(
    broker: TestBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables that are set on the machine of a developer do not stop the tests."""
    monkeypatch.setenv("POSTAGE_TLS_CA_FILE", "production.pem")
    with broker.vhost() as vhost:
        assert vhost.url == os.environ["POSTAGE_URL"]
        assert not Settings.from_environment().tls
    assert "production.pem" == os.environ["POSTAGE_TLS_CA_FILE"]


def has_queue(url: str, name: str) -> bool:
    """Tell whether a virtual host has a queue."""
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        try:
            connection.channel().queue_declare(name, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        return True


# ------------------------------------------------------------------------- wait_until


def test_wait_until_returns_what_the_condition_returns() -> None:
    """It calls the condition until its result is true."""
    answers = iter([0, None, "", "here"])
    assert "here" == wait_until(lambda: next(answers))


def test_wait_until_says_what_it_has_waited_for() -> None:
    """It fails like an assertion, with a message of the test."""
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: a greeting"):
        wait_until(lambda: False, 0.01, "a greeting")


# ------------------------------------------------------------------- brokers and vhosts


def test_an_embedded_broker_lives_as_long_as_its_block() -> None:
    """It starts with the block, can be asked for its URL, and is gone after it."""
    with TestBroker() as broker:
        assert broker.is_embedded
        assert broker.url.startswith("amqp://guest:guest@127.0.0.1:")
        assert "<TestBroker <Broker on 127.0.0.1:" in repr(broker)
    with pytest.raises(BrokerError), broker.vhost():
        pass


def test_options_reach_the_embedded_broker() -> None:
    """What else it takes are the arguments of the broker, such as strict."""
    with (
        TestBroker(strict=True) as broker,
        broker.vhost() as vhost,
        pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="transient"),
    ):
        connection = pika.BlockingConnection(pika.URLParameters(vhost.url))
        connection.channel().queue_declare("transient", durable=False)


def test_a_vhost_is_in_the_environment_while_its_block_lasts(
    broker: TestBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POSTAGE_URL names it, for child processes, too; afterwards all is as before."""
    monkeypatch.setenv("POSTAGE_URL", "amqp://before")
    show = [sys.executable, "-c", "import os; print(os.environ['POSTAGE_URL'])"]
    with broker.vhost() as vhost:
        assert vhost.url == os.environ["POSTAGE_URL"]
        assert vhost.url == subprocess.check_output(show, text=True).strip()
        assert "guest:guest" not in repr(vhost)
    assert "amqp://before" == os.environ["POSTAGE_URL"]
    monkeypatch.delenv("POSTAGE_URL")
    with broker.vhost():
        pass
    assert "POSTAGE_URL" not in os.environ


def test_each_vhost_is_empty(broker: TestBroker) -> None:
    """What one test leaves behind, the next one does not find."""
    eqk = [(GenericApplicationExchange, [("greeter", "greeter/rr")])]
    with broker.vhost() as vhost, messaging.GenericConsumer(eqk), Producer() as producer:
        producer.message_hello("first")
        assert has_queue(vhost.url, "greeter")
    with broker.vhost() as vhost:
        assert not has_queue(vhost.url, "greeter")


def test_what_a_test_leaves_open_is_closed(broker: TestBroker) -> None:
    """Producers and processors of the block have no connection after it, and the hub has ended."""
    with broker.vhost():
        greeter = Greeter(messaging.Fingerprint("greeter").as_dict())
        producer = Producer()
        producer.message_hello("world")
        assert hubs.current() is not None
    assert hubs.current() is None
    with pytest.raises(ClosedError):
        producer.message_hello("world")
    assert "greeter" == greeter.name  # it was not dropped before


def test_what_was_open_before_stays_open(broker: TestBroker) -> None:
    """The connections of a longer fixture are none of the test's business."""
    with broker.vhost() as outer, Producer() as producer:
        with running(Greeter), broker.vhost():
            assert 5 == producer.rpc_add(2, 3).value
            with Producer() as inner:
                assert "UnroutableError" == inner.rpc_add(2, 3).value
        assert outer.url == os.environ["POSTAGE_URL"]
        with running(Greeter):
            assert 5 == producer.rpc_add(2, 3).value


def test_a_broker_that_runs_already_has_one_vhost_and_no_faults(broker: TestBroker) -> None:
    """All tests share the virtual host of its URL, and those that need faults are skipped."""
    with TestBroker(broker.url) as other:
        assert not other.is_embedded
        assert "guest:guest" not in repr(other)
        with other.vhost() as vhost:
            assert broker.url == other.url == vhost.url == os.environ["POSTAGE_URL"]
            with pytest.raises(unittest.SkipTest, match="only the embedded broker has faults"):
                _ = vhost.faults
    with broker.vhost(), running(Greeter), Producer() as producer:
        assert 5 == producer.rpc_add(2, 3).value  # the other one did not end it


def test_a_url_that_makes_no_sense_is_refused_at_once() -> None:
    """The error is the one that POSTAGE_URL would cause."""
    with pytest.raises(ConfigurationError):
        TestBroker("http://localhost")


# ---------------------------------------------------------------------------- running


def test_a_class_of_an_application_runs_under_its_name(vhost: TestVhost) -> None:
    """The name of the class, in lower case, is the name that it is reached by."""
    with running(Greeter) as run, Producer() as producer:
        assert 5 == producer.rpc_add(2, 3).value
        assert "greeter" == run.component.name
        assert "running, 0 errors" in repr(run)
    assert "stopped, 0 errors" in repr(run)


def test_an_application_may_have_another_name_and_groups(vhost: TestVhost) -> None:
    """The name is for the fingerprint, and all else for the class."""
    with running(Greeter, name="host", groups=["blue"]), Producer() as producer:
        assert 5 == producer.rpc_add(2, 3, _key="host#blue/rr").value


def test_two_instances_of_an_application_share_its_work(vhost: TestVhost) -> None:
    """Each has an address of its own, though they are one process."""
    with running(Greeter), running(Greeter), Producer() as producer:
        answers = [producer.rpc_ping().value["pid"] for _ in range(10)]
        assert 2 == len(set(answers))
        queue = producer.rpc_queue_ping(_key="greeter")
        assert set(answers) == {each.value["pid"] for each in producer.consume_rpc(queue, 2)}


def test_a_processor_runs_with_its_queues(vhost: TestVhost) -> None:
    """A class takes its arguments, and a message is waited for."""
    eqk = [(messaging.DefaultExchange, [("words", "words")])]
    Words.words = []
    with running(Words, eqk=eqk), messaging.GenericProducer() as producer:
        producer.message_word("hello", _queue="words")
        wait_until(lambda: Words.words == ["hello"])


def test_an_instance_runs_as_it_was_made(vhost: TestVhost) -> None:
    """It keeps its fingerprint, and takes no further arguments."""
    greeter = Greeter(messaging.Fingerprint("greeter").as_dict())
    with running(greeter), Producer() as producer:
        assert str(os.getpid()) == producer.rpc_ping().value["pid"]
    with pytest.raises(TypeError, match="made already"), running(greeter, name="host"):
        pass


def test_a_plain_microthread_runs_too(vhost: TestVhost) -> None:
    """Whatever a scheduler takes can run, and ends with the block."""
    steps: list[int] = []

    class Counter(microthreads.MicroThread):
        def step(self) -> Any:
            steps.append(len(steps))
            return microthreads.sleep(0.01)

    with running(Counter()):
        wait_until(lambda: len(steps) > 2)
    assert steps[-1] == len(steps) - 1


def test_it_consumes_when_the_block_begins(vhost: TestVhost) -> None:
    """A fault that needs a consumer finds one."""
    with running(Greeter):
        assert 1 == vhost.faults.cancel("greeter")


def test_it_leaves_in_order(vhost: TestVhost) -> None:
    """Its handlers in flight finish, its own queue is gone, and what was not begun waits."""
    with running(Greeter) as run, Producer() as producer:
        producer.message_block(0.2)
        wait_until(lambda: run.component._in_flight)
    greeter = run.component
    with Producer() as producer:
        answer = producer.rpc_ping(_queue=greeter.uid.name, _timeout=1, _max_retry=0)
        assert "UnroutableError" == answer.value
        producer.message_hello("later")
        with running(Greeter) as run:
            wait_until(lambda: ["later"] == run.component.greeted)


def test_what_a_message_handler_raises_is_raised_at_the_end(vhost: TestVhost) -> None:
    """Nobody else would hear of it: the message is parked, and its sender long gone."""
    with pytest.raises(LookupError, match="nobody is there"), running(Greeter) as run:
        with Producer() as producer:
            producer.message_hello("nobody")
        wait_until(lambda: run.errors)
        with pytest.raises(LookupError):
            run.check()


def test_a_message_without_a_handler_is_an_error_too(vhost: TestVhost) -> None:
    """It would be parked in production as well."""
    with pytest.raises(Exception, match="no handler for message 'command' 'wave'"):  # noqa: SIM117
        with running(Greeter) as run, Producer() as producer:
            producer.message_wave()
            wait_until(lambda: run.errors)


def test_errors_can_be_looked_at_instead(vhost: TestVhost) -> None:
    """A test of what goes wrong says check=False, and finds the exceptions in `errors`."""
    with running(Greeter, check=False) as run, Producer() as producer:
        producer.message_hello("nobody")
        wait_until(lambda: run.errors)
    assert ["nobody is there"] == [str(error) for error in run.errors]


def test_what_an_rpc_handler_raises_is_the_answer(vhost: TestVhost) -> None:
    """The caller hears of it, so the end of the block does not."""
    with running(Greeter) as run, Producer() as producer:
        answer = producer.rpc_add("two", "three")
        assert not answer
        assert "TypeError" == answer.value
    assert [] == run.errors


def test_the_error_of_the_block_comes_before_those_of_the_component(vhost: TestVhost) -> None:
    """A failed assertion is not hidden by what may be its consequence."""
    with pytest.raises(ZeroDivisionError), running(Greeter) as run, Producer() as producer:
        producer.message_hello("nobody")
        wait_until(lambda: run.errors)
        _ = 1 / 0


def test_what_ends_the_component_is_raised(vhost: TestVhost) -> None:
    """An exception that leaves the scheduler ends the thread, and is raised at the end."""

    class Failing(microthreads.MicroThread):
        def step(self) -> Any:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"), running(Failing()) as run:
        run.wait()


def test_quit_ends_it_and_can_be_waited_for(vhost: TestVhost) -> None:
    """A component that leaves by itself has left when `wait()` returns."""
    with running(Greeter) as run, Producer() as producer:
        producer.message_quit()
        run.wait()
        assert not run.wants_restart
        assert "stopped" in repr(run)


def test_restart_ends_it_and_leaves_the_tests_alone(vhost: TestVhost) -> None:
    """The test sees that it was asked for; the process is not replaced."""
    with running(Greeter) as run, Producer() as producer:
        assert not run.wants_restart
        producer.message_restart()
        run.wait()
        assert run.wants_restart


def test_restart_from_within_a_handler_is_refused(vhost: TestVhost) -> None:
    """It would replace the process of the tests without a word."""
    with pytest.raises(RuntimeError, match="would replace the process of the tests"):  # noqa: SIM117
        with running(Greeter) as run, Producer() as producer:
            producer.message_become_new()
            wait_until(lambda: run.errors)


def test_a_component_that_does_not_leave_is_named(
    vhost: TestVhost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that blocks for longer than the grace fails the test, and not the next one."""
    monkeypatch.setattr("postage.testing.TIMEOUT", 0.0)
    monkeypatch.setattr(Greeter, "grace", 0.05)
    threads = threading.active_count()
    with pytest.raises(AssertionError, match=r"Greeter .* did not end in 0\.05 s"):  # noqa: SIM117
        with running(Greeter) as run, Producer() as producer:
            producer.message_block(0.5)
            wait_until(lambda: run.component._in_flight, timeout=10.0)
    wait_until(lambda: threading.active_count() <= threads, timeout=10.0)


def test_a_component_that_was_never_started_is_closed(vhost: TestVhost) -> None:
    """Stopping it closes its connections."""
    run = Running(Greeter(messaging.Fingerprint("greeter").as_dict()))
    run.stop()
    assert hubs.current() is None


# ----------------------------------------------------------------------------- faults


def test_a_dropped_connection_comes_back(vhost: TestVhost) -> None:
    """Both sides of a call reconnect, and only this virtual host was concerned."""
    with running(Greeter), Producer() as producer:
        assert 5 == producer.rpc_add(2, 3).value
        assert vhost.faults.drop() >= 2
        assert 5 == producer.rpc_add(2, 3).value


def test_a_connection_that_the_broker_closes_comes_back(vhost: TestVhost) -> None:
    """The orderly end of a connection is survived, too."""
    with running(Greeter) as run, Producer() as producer:
        producer.message_hello("before")
        assert 2 == vhost.faults.close_connections()
        producer.message_hello("after")
        wait_until(lambda: {"before", "after"} <= set(run.component.greeted))


def test_a_channel_that_the_broker_closes_comes_back(vhost: TestVhost) -> None:
    """A component that lost its channel opens another one, and goes on."""
    with running(Greeter), Producer() as producer:
        assert 1 == vhost.faults.close_channels()
        assert 5 == producer.rpc_add(2, 3).value


def test_a_cancelled_consumer_comes_back(vhost: TestVhost) -> None:
    """A broker that cancels a consumer is asked again."""
    with running(Greeter), Producer() as producer:
        vhost.faults.cancel("greeter")
        assert 5 == producer.rpc_add(2, 3).value
    with pytest.raises(BrokerError, match="there is no queue 'other'"):
        vhost.faults.cancel("other")


def test_the_consumers_of_a_queue_can_be_forgotten(vhost: TestVhost) -> None:
    """Those of the test's virtual host only."""
    with running(Greeter):
        assert 1 == vhost.faults.forget_consumers("greeter")
    with pytest.raises(BrokerError, match="there is no queue 'other'"):
        vhost.faults.forget_consumers("other")


@pytest.mark.parametrize("fault", ["block", "stall"])
def test_a_message_waits_until_the_broker_takes_it(vhost: TestVhost, fault: str) -> None:
    """Faults that last are context managers; what is sent meanwhile arrives when they end."""
    with running(Greeter) as run, Producer() as producer:
        producer.message_hello("before")
        with getattr(vhost.faults, fault)():
            future = producer.message_hello("meanwhile", _future=True)
            with pytest.raises(TimeoutError):
                future.result(0.1)
        future.result(10.0)
        wait_until(lambda: ["before", "meanwhile"] == run.component.greeted)


def test_a_confirm_that_is_late_leaves_the_sender_in_doubt(vhost: TestVhost) -> None:
    """The message arrives, but its sender does not hear of that in time."""
    with running(Greeter) as run:
        producer = Producer()
        with vhost.faults.delay_confirms(60.0), pytest.raises(PublishUnknownError):
            producer.message_hello("world", _timeout=0.3)
        wait_until(lambda: ["world"] == run.component.greeted)
        producer.close(0.0)


def test_a_nack_is_an_error_of_the_publisher(vhost: TestVhost) -> None:
    """The message is thrown away, and its sender is told."""
    with running(Greeter) as run, Producer() as producer:
        with vhost.faults.nack(), pytest.raises(NackedError):
            producer.message_hello("nobody hears this")
        producer.message_hello("world")
        wait_until(lambda: ["world"] == run.component.greeted)


def test_a_refused_connection_is_tried_again(vhost: TestVhost) -> None:
    """While new connections are refused nothing can be sent; later it can."""
    with Producer() as producer:
        with vhost.faults.refuse(), pytest.raises(PublishTimeoutError):
            producer.message_hello("world", _timeout=0.2)
        with running(Greeter):
            assert 5 == producer.rpc_add(2, 3).value
