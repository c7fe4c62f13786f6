# SPDX-License-Identifier: MIT
"""`health()` tells what a process that runs and an open connection do not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pika
import pytest

from postage.broker import Broker
from postage.errors import BatchError, UnroutableError
from postage.generic_application import GenericApplication, GenericApplicationExchange
from postage.health import Incident, latest
from postage.messaging import (
    Exchange,
    Fingerprint,
    GenericConsumer,
    GenericProducer,
    MessageHandler,
    RpcHandler,
)
from postage.microthreads import MicroScheduler
from tests.nodes import Node
from tests.waiting import wait_until


class Letters(Exchange):
    name = "letters"


class Sender(GenericProducer):
    eks = [(Letters, "post")]


class Caller(GenericProducer):
    eks = [(GenericApplicationExchange, "clerk/rr")]
    max_retry = 0


class Clerk(GenericApplication):
    """Handles a message as long as the test wants."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        super().__init__(Fingerprint("clerk", "component").as_dict())

    @MessageHandler("command", "wait", threaded=True)
    def msg_wait(self, content: Any) -> None:
        self.may_end.wait(60)

    @MessageHandler("command", "fail")
    def msg_fail(self, content: Any) -> None:
        raise ValueError("no pencil")

    @RpcHandler("command", "divide")
    def rpc_divide(self, content: Any, reply_func: Any) -> None:
        reply_func(1 / 0)


def vhost_of(url: str) -> str:
    return url.rsplit("/", 1)[1]


@pytest.fixture
def consumer(broker_url: str) -> Iterator[GenericConsumer]:
    with GenericConsumer([(Letters, [("box", "post")])]) as consumer:
        yield consumer


def test_a_producer_that_was_not_used_has_nothing_wrong(broker_url: str) -> None:
    """And asking does not connect it."""
    with Sender() as producer:
        assert ("unused", True) == (producer.health().state, producer.health().is_healthy)
    assert ("closed", False) == (producer.health().state, producer.health().is_healthy)


def test_a_producer_tells_of_what_is_under_way_and_what_failed(
    consumer: GenericConsumer, node: Node, broker_url: str
) -> None:
    """It heals when the connection is back; what failed last stays to be read."""
    with Sender() as producer:
        producer.message_first()
        fresh = producer.health()
        assert ("ready", 0, 0, None) == (
            fresh.state,
            fresh.in_flight,
            fresh.reconnects,
            fresh.last_error,
        )
        with pytest.raises(UnroutableError):
            producer.message_lost(_key="nobody")
        error = producer.health().last_error
        assert error is not None
        assert "no queue is bound" in error.text
        assert abs(time.time() - error.at) < 3600

        node.close_connections("maintenance", vhost_of(broker_url))
        wait_until(lambda: producer.health().reconnects == 1)
        producer.message_again()
        health = producer.health()
        assert ("ready", True) == (health.state, health.is_healthy)
        assert health.last_error is not None
        assert "maintenance" in health.last_error.text


def test_a_producer_that_is_blocked_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not healthy: nothing that it sends arrives."""
    with Broker() as broker:
        monkeypatch.setenv("POSTAGE_URL", broker.url)
        with closing(pika.BlockingConnection(pika.URLParameters(broker.url))) as connection:
            channel = connection.channel()
            channel.exchange_declare(Letters.name, durable=True)
            channel.queue_declare("box")
            channel.queue_bind("box", Letters.name, "post")
        with Sender() as producer:
            with broker.faults.block("low on memory"):
                producer.message_first(_confirm=False)  # who publishes then is told
                wait_until(lambda: producer.health().blocked)
                future = producer.message_second(_future=True)
                wait_until(lambda: producer.health().in_flight)
                assert ("blocked", False) == (producer.health().state, producer.health().is_healthy)
            future.result(60)
            assert (False, 0, True) == (
                producer.health().blocked,
                producer.health().in_flight,
                producer.health().is_healthy,
            )


def test_a_batch_that_fails_is_the_last_error(broker_url: str, consumer: GenericConsumer) -> None:
    """That of its message, as for a single one."""
    with Sender() as producer:
        with pytest.raises(BatchError), producer.batch() as batch:
            batch.message_lost(_key="nobody")
        error = producer.health().last_error
        assert error is not None
        assert "key 'nobody'" in error.text


def test_a_consumer_is_healthy_when_the_broker_confirmed_it(
    node: Node, broker_url: str, consumer: GenericConsumer
) -> None:
    """Not when it is connected only, nor while its connection is gone."""
    before = consumer.health()
    assert ("ready", 0, 0, False) == (
        before.state,
        before.consumers_wanted,
        before.consumers_live,
        before.is_healthy,
    )
    consumer.start()
    wait_until(lambda: consumer.health().is_healthy)
    assert (1, 1, None) == (
        consumer.health().consumers_wanted,
        consumer.health().consumers_live,
        consumer.health().last_delivery,
    )
    with Sender() as producer:
        producer.message_hello()
    wait_until(lambda: consumer.health().waiting == 1)
    health = consumer.health()
    assert 1 == health.in_flight
    assert health.last_delivery is not None
    assert abs(time.time() - health.last_delivery) < 3600
    delivery = consumer.take()
    assert delivery is not None
    consumer.ack(delivery)
    wait_until(lambda: consumer.health().in_flight == 0)

    node.close_connections("maintenance", vhost_of(broker_url))
    wait_until(lambda: consumer.health().reconnects == 1)
    wait_until(lambda: consumer.health().is_healthy)
    assert "maintenance" in str(consumer.health().last_error)
    consumer.close()
    assert ("closed", False) == (consumer.health().state, consumer.health().is_healthy)


def test_an_application_tells_who_it_is_and_what_it_did(broker_url: str) -> None:
    """Handlers that run, messages that were handled, and how many of them failed."""
    scheduler = MicroScheduler()
    with Clerk() as clerk, Caller() as caller:
        scheduler.add_microthread(clerk)
        thread = threading.Thread(target=lambda: list(scheduler.main()), daemon=True)
        thread.start()
        wait_until(lambda: clerk.health().is_healthy)
        assert (3, 3) == (clerk.health().consumers_wanted, clerk.health().consumers_live)
        parts = (clerk.health().name, clerk.health().pid, clerk.health().host)
        assert tuple(str(clerk.fingerprint[key]) for key in ("name", "pid", "host")) == parts

        caller.message_wait()
        wait_until(lambda: clerk.health().running == 1)
        assert 0 == clerk.health().handled
        clerk.may_end.set()
        wait_until(lambda: clerk.health().handled == 1)
        caller.message_fail()
        wait_until(lambda: clerk.health().failed == 1)
        error = clerk.health().last_error
        assert error is not None
        assert "no pencil" == error.text
        assert not caller.rpc_divide()
        wait_until(lambda: clerk.health().running == 0)
        assert (3, 2) == (clerk.health().handled, clerk.health().failed)
        assert clerk.health().is_healthy

        written = json.loads(json.dumps(clerk.health().as_dict()))
        assert True is written["is_healthy"]
        assert {"at", "text"} == written["last_error"].keys()
        caller.message_quit(_key="clerk")
        thread.join(60)
        assert not clerk.health().is_healthy


def test_the_latest_incident_counts() -> None:
    """And none is none."""
    first, second = Incident(1.0, "first"), Incident(2.0, "second")
    assert second == latest(first, None, second)
    assert latest(None, None) is None
