# SPDX-License-Identifier: MIT
"""A component that is reached by name, host, pid or group."""

from __future__ import annotations

import collections
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import pika
import pytest

from postage.errors import ChannelClosedError, ConfigurationError, QueueMismatchError
from postage.generic_application import (
    GenericApplication,
    GenericApplicationExchange,
    LoggingProducerStub,
)
from postage.messaging import Fingerprint, GenericProducer, MessageHandler
from postage.retry import RetryPolicy
from tests.nodes import Node
from tests.programs_for_tests.components import Running, raw_channel, rest_of, take
from tests.waiting import wait_until


class Caller(GenericProducer):
    """Sends to the applications."""

    eks = [(GenericApplicationExchange, "alpha")]
    rpc_timeout = 20
    max_retry = 0


class Application(GenericApplication):
    """Notes the parameters of "note", which are the keys that it was reached by."""

    retry = RetryPolicy(attempts=1)  # what fails is parked at once

    def __init__(self, name: str, pid: int, host: str = "box", groups: Any = ()) -> None:
        self.log: list[str] = []
        super().__init__(Fingerprint(name, "test", pid=pid, host=host).as_dict(), None, groups)

    @MessageHandler("command", "note")
    def msg_note(self, content: Any) -> None:
        self.log.append(content["parameters"])

    @MessageHandler("command", "fail")
    def msg_fail(self, content: Any) -> None:
        raise LookupError("as it should")


@pytest.fixture
def caller(broker_url: str) -> Iterator[Caller]:
    """A producer for applications."""
    with Caller() as producer:
        yield producer


def wait_for_all(applications: list[Application]) -> None:
    for application in applications:
        wait_until(lambda each=application: each.consumer.subscriber.consuming)  # type: ignore[misc]


# --------------------------------------------------------------------------- addresses

#: The instances, and by which keys they are reached.
INSTANCES = {
    "alpha 1": ("alpha", 1, "box", ["red"]),
    "alpha 2": ("alpha", 2, "box", ["red", "green"]),
    "alpha 3": ("alpha", 3, "other", ["green"]),
    "beta 4": ("beta", 4, "box", ["red"]),
}

#: Keys that reach every one of some instances.
ALL_OF = {
    "alpha": {"alpha 1", "alpha 2", "alpha 3"},
    "beta": {"beta 4"},
    "@box": {"alpha 1", "alpha 2", "beta 4"},
    "@other": {"alpha 3"},
    "alpha@box": {"alpha 1", "alpha 2"},
    "alpha@other": {"alpha 3"},
    "beta@box": {"beta 4"},
    "1@box": {"alpha 1"},
    "2@box": {"alpha 2"},
    "3@other": {"alpha 3"},
    "4@box": {"beta 4"},
    "alpha#red": {"alpha 1", "alpha 2"},
    "alpha#green": {"alpha 2", "alpha 3"},
    "beta#red": {"beta 4"},
}

#: Keys that reach one of some instances in turn.
ONE_OF = {
    "alpha/rr": {"alpha 1", "alpha 2", "alpha 3"},
    "beta/rr": {"beta 4"},
    "alpha@box/rr": {"alpha 1", "alpha 2"},
    "alpha@other/rr": {"alpha 3"},
    "beta@box/rr": {"beta 4"},
    "alpha#red/rr": {"alpha 1", "alpha 2"},
    "alpha#green/rr": {"alpha 2", "alpha 3"},
    "beta#red/rr": {"beta 4"},
}


def test_every_key_reaches_those_whom_it_names(caller: Caller) -> None:
    """Each of them once, or one of them in turn, and nobody else."""
    rounds = 12
    applications = {name: Application(*arguments) for name, arguments in INSTANCES.items()}

    with Running(*applications.values()):
        for _ in range(rounds):
            for key in (*ALL_OF, *ONE_OF):
                caller.message_note(key, _key=key)
        expected = rounds * (sum(map(len, ALL_OF.values())) + len(ONE_OF))
        wait_until(lambda: sum(len(each.log) for each in applications.values()) >= expected)
        counts = {
            name: collections.Counter(application.log) for name, application in applications.items()
        }

    for key, names in ALL_OF.items():
        assert dict.fromkeys(names, rounds) == reached(counts, key)
    for key, names in ONE_OF.items():
        assert (rounds, names) == (sum(reached(counts, key).values()), reached(counts, key).keys())


def reached(counts: dict[str, collections.Counter[str]], key: str) -> dict[str, int]:
    return {name: count[key] for name, count in counts.items() if count[key]}


def test_keys_of_nobody_are_unroutable(caller: Caller) -> None:
    """Such as that of an instance that is gone."""
    with Running(application := Application("alpha", 1)):
        wait_for_all([application])

        for key in ("gamma", "2@box", "@nowhere", "alpha#red", "alpha@nowhere"):
            assert "UnroutableError" == caller.rpc_ping(_key=key).value


def test_two_applications_of_one_process_are_both_reached_by_its_pid(caller: Caller) -> None:
    """In 1.2.1 they shared one queue and stole each other's messages."""
    applications = [Application("alpha", 7), Application("beta", 7)]

    with Running(*applications):
        for _ in range(5):
            caller.message_note("7@box", _key="7@box")
        wait_until(lambda: [5, 5] == [len(each.log) for each in applications])


@pytest.mark.slow
def test_two_processes_that_claim_one_instance_learn_of_it(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one ends with an error after four heartbeats, the first one goes on."""
    monkeypatch.setenv("POSTAGE_URL", f"{broker_url}?heartbeat=1")
    with Caller() as caller, Running(first := Application("alpha", 1)):
        wait_for_all([first])
        second = Application("alpha", 1)
        running = Running(second)
        with pytest.raises(ChannelClosedError, match="Two processes claim this queue"), running:
            running.join()
        caller.message_note("1@box", _key="1@box")
        wait_until(lambda: ["1@box"] == first.log)


# ------------------------------------------------------------------------------ queues


def vhost_of(broker_url: str) -> str:
    return unquote(urlsplit(broker_url).path[1:])


def test_the_queues_of_an_application_outlive_what_they_must(
    caller: Caller, broker_url: str, node: Node
) -> None:
    """Names, flags and arguments cannot be changed in the field."""
    with Running(application := Application("alpha", 1, groups=["red"])):
        wait_for_all([application])
        queues = node.queues(vhost_of(broker_url))
        bindings = node.bindings(vhost_of(broker_url))

    shared = {
        "x-queue-type": "quorum",
        "x-delivery-limit": 50,
        "x-dead-letter-exchange": "",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    assert {
        "alpha": {**shared, "x-dead-letter-routing-key": "alpha.error"},
        "alpha.error": {"x-queue-type": "quorum"},
        "alpha#red": {**shared, "x-dead-letter-routing-key": "alpha#red.error"},
        "alpha#red.error": {"x-queue-type": "quorum"},
        "alpha@box": {"x-queue-type": "classic", "x-expires": 7 * 24 * 3600 * 1000},
        "alpha.1@box": {"x-queue-type": "classic", "x-expires": 600_000},
    } == {queue.name: queue.arguments for queue in queues}
    assert {(True, False)} == {(queue.durable, queue.auto_delete) for queue in queues}
    assert {
        ("alpha/rr", "alpha"),
        ("alpha", "alpha.1@box"),
        ("@box", "alpha.1@box"),
        ("alpha@box/rr", "alpha@box"),
        ("alpha@box", "alpha.1@box"),
        ("1@box", "alpha.1@box"),
        ("alpha#red", "alpha.1@box"),
        ("alpha#red/rr", "alpha#red"),
    } == {
        (binding.key, binding.destination)
        for binding in bindings
        if binding.source == "generic-application-exchange"
    }


def test_each_queue_is_consumed_once_and_that_of_the_instance_exclusively(
    caller: Caller, broker_url: str, node: Node
) -> None:
    """1.2.1 consumed the instance's queue once for each of its keys."""
    with Running(application := Application("alpha", 1, groups=["red"])):
        caller.message_note("x", _key="alpha/rr")
        caller.message_note("x", _key="alpha#red/rr")
        wait_until(lambda: len(application.log) == 2)
        wait_for_all([application])
        consumers = node.consumers(vhost_of(broker_url))
        with (
            raw_channel() as channel,
            pytest.raises(pika.exceptions.ChannelClosedByBroker) as error,
        ):
            channel.basic_consume("alpha.1@box", print)

    assert ["alpha", "alpha#red", "alpha.1@box", "alpha@box"] == sorted(
        consumer.queue for consumer in consumers
    )
    assert 403 == error.value.reply_code


def test_the_queue_of_an_instance_is_purged_at_a_fresh_start(caller: Caller) -> None:
    """What is in it was meant for an earlier process with this pid."""
    with raw_channel() as channel:
        channel.queue_declare(
            "alpha.1@box",
            durable=True,
            arguments={"x-queue-type": "classic", "x-expires": 600_000},
        )
        caller.message_note("old", _queue="alpha.1@box")
        with Running(application := Application("alpha", 1)):
            caller.message_note("new", _key="1@box")
            wait_until(lambda: application.log)

    assert ["new"] == application.log


def test_the_queue_of_an_instance_is_deleted_when_it_quits(caller: Caller) -> None:
    """The others stay, with what is in them."""
    with Running(Application("alpha", 1)) as running:
        caller.message_quit(_key="1@box")
        running.join()
    caller.message_note("for the next one", _key="alpha/rr")

    assert "UnroutableError" == caller.rpc_ping(_key="1@box").value
    with raw_channel() as channel, pytest.raises(pika.exceptions.ChannelClosedByBroker) as error:
        channel.queue_declare("alpha.1@box", passive=True)
    assert 404 == error.value.reply_code
    assert 1 == len(rest_of("alpha"))


def test_quit_by_a_broadcast_ends_all_of_a_name(caller: Caller) -> None:
    """Each of them gets its own."""
    first, second = Running(Application("alpha", 1)), Running(Application("alpha", 2))
    with Running(other := Application("beta", 3)), first, second:
        caller.message_quit(_key="alpha")
        first.join()
        second.join()
        caller.message_note("still here", _key="beta")
        wait_until(lambda: ["still here"] == other.log)


# ------------------------------------------------------------------------------ groups


def test_a_group_can_be_joined_and_left_by_messages(caller: Caller) -> None:
    """Late, too, with its round robin, which 1.2.1 could not consume then."""
    applications = [Application("alpha", 1), Application("alpha", 2)]
    first, second = applications

    with Running(*applications):
        caller.message_join_group({"group_name": "red"}, _key="1@box")
        wait_until(lambda: ["red"] == first.groups)
        for key in ("alpha#red", "alpha#red/rr"):
            caller.message_note(key, _key=key)
        wait_until(lambda: ["alpha#red", "alpha#red/rr"] == sorted(first.log))

        caller.message_join_group({"group_name": "red"}, _key="2@box")
        wait_until(lambda: ["red"] == second.groups)
        wait_for_all(applications)
        first.log.clear()
        for _ in range(20):
            caller.message_note("x", _key="alpha#red/rr")
        wait_until(lambda: len(first.log) + len(second.log) == 20)
        assert first.log and second.log

        caller.message_leave_group({"group_name": "red"}, _key="1@box")
        wait_until(lambda: [] == first.groups)
        wait_for_all(applications)
        first.log.clear()
        second.log.clear()
        for key in ("alpha#red", "alpha#red/rr", "alpha#red/rr"):
            caller.message_note(key, _key=key)
        wait_until(lambda: len(second.log) == 3)

    assert [] == first.log


def test_joining_twice_and_leaving_what_was_not_joined_is_no_trouble(caller: Caller) -> None:
    """The logger hears of what happened only."""
    texts: list[str] = []

    class Logger(LoggingProducerStub):
        def log(self, text: str) -> None:
            texts.append(text)

    class Own(Application):
        logging_producer = Logger

    with Running(application := Own("alpha", 1, groups=["red", "red"])):
        for group in ("red", "green", "green"):
            caller.message_join_group({"group_name": group}, _key="1@box")
        for group in ("red", "red", "blue"):
            caller.message_leave_group({"group_name": group}, _key="1@box")
        caller.message_join_group("yellow", _key="1@box")
        wait_until(lambda: ["green", "yellow"] == application.groups)
        caller.message_note("still here", _key="1@box")
        wait_until(lambda: application.log)

    assert [
        "Joining group alpha#red",
        "Joining group alpha#green",
        "Leaving group alpha#red",
        "Joining group alpha#yellow",
    ] == texts


@pytest.mark.parametrize("parameters", [{}, {"group_name": ""}, {"group_name": 5}, [], 5])
@pytest.mark.parametrize("command", ["join_group", "leave_group"])
def test_a_message_that_names_no_group_is_parked(
    command: str, parameters: Any, caller: Caller
) -> None:
    """Its error says what is missing."""
    with Running(Application("alpha", 1)), raw_channel() as channel:
        getattr(caller, f"message_{command}")(parameters=parameters, _key="1@box")
        wait_until(lambda: exists("alpha.error"))
        properties, _ = take(channel, "alpha.error")[0]

    assert "parameters need a 'group_name'" == properties.headers["postage-error"]


def exists(queue: str) -> bool:
    with raw_channel() as channel:
        try:
            channel.queue_declare(queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        return True


def test_groups_are_not_shared_with_other_instances_nor_with_the_caller(caller: Caller) -> None:
    """In 1.2.1 the list of the default was that of all, and the given one was the caller's."""
    given = ["red"]
    with (
        Application("alpha", 1) as first,
        Application("alpha", 2) as second,
        Application("alpha", 3, groups=given) as third,
    ):
        first.join("green")
        third.join("blue")
        groups = [first.groups, second.groups, third.groups]

    assert [["green"], [], ["red", "blue"]] == groups
    assert ["red"] == given


def test_a_group_that_cannot_be_joined_is_not_joined_by_half(caller: Caller) -> None:
    """Its round-robin queue exists with other arguments: no broadcasts of the group then."""
    with raw_channel() as channel:
        channel.queue_declare("alpha#red", durable=True)

    with Running(application := Application("alpha", 1)):
        with pytest.raises(QueueMismatchError):
            application.join("red")
        caller.message_note("red", _key="alpha#red", _mandatory=False)
        caller.message_note("alpha", _key="alpha")
        wait_until(lambda: application.log)

    assert ["alpha"] == application.log
    assert [] == application.groups


def test_a_constructor_that_cannot_join_leaves_nothing_open(caller: Caller) -> None:
    """The fixtures would find the connection."""
    with raw_channel() as channel:
        channel.queue_declare("alpha#red", durable=True)

    with pytest.raises(QueueMismatchError):
        Application("alpha", 1, groups=["red"])


# ---------------------------------------------------------------------------- messages


def test_ping_answers_with_the_fingerprint(caller: Caller) -> None:
    """By any key that reaches somebody."""
    with Running(application := Application("alpha", 1)):
        replies = [caller.rpc_ping(_key=key).value for key in ("1@box", "alpha/rr", "@box")]

    assert [application.fingerprint] * 3 == replies
    assert ("alpha", "test", "1", "box") == tuple(
        replies[0][key] for key in ("name", "type", "pid", "host")
    )


def test_a_broadcast_that_concerns_somebody_else_is_skipped(caller: Caller) -> None:
    """What comes by a shared queue and nobody handles is parked."""
    with Running(application := Application("alpha", 1)), raw_channel() as channel:
        caller.message_unknown(_key="alpha")
        caller.message_note("on", _key="alpha")
        wait_until(lambda: application.log)
        assert {("message", "command", "unknown"): 1} == application.skipped
        assert [] == rest_of("alpha.error")
        caller.message_unknown(_key="alpha/rr")
        caller.message_unknown(_key="alpha@box/rr")
        headers = [properties.headers for properties, _ in take(channel, "alpha.error", 2)]

    assert ["alpha", "alpha@box"] == sorted(each["postage-queue"] for each in headers)


@pytest.mark.parametrize("key", ["alpha", "alpha/rr", "alpha@box/rr", "1@box"])
def test_what_fails_is_parked_in_the_error_queue_of_the_name(key: str, caller: Caller) -> None:
    """Those of hosts and instances come and go."""
    with Running(Application("alpha", 1)), raw_channel() as channel:
        caller.message_fail(_key=key)
        wait_until(lambda: exists("alpha.error"))
        properties, _ = take(channel, "alpha.error")[0]

    assert "as it should" == properties.headers["postage-error"]


# ------------------------------------------------------------------------- construction


def test_it_is_made_as_in_1_2_1(caller: Caller) -> None:
    """`GenericApplication(fingerprint, vhost, groups)`, which raised a NameError there."""
    fingerprint = Fingerprint("alpha", "application").as_dict()
    with GenericApplication(fingerprint, None, ["red"]) as application:
        assert caller.vhost == application.vhost
        assert ["red"] == application.groups
        assert isinstance(application.logger, LoggingProducerStub)
        host = fingerprint["host"]
        assert ("alpha", f"alpha@{host}", f"alpha.{os.getpid()}@{host}") == (
            application.sid["name"],
            application.hid["name"],
            application.uid["name"],
        )


@pytest.mark.parametrize("key", ["name", "pid", "host"])
@pytest.mark.parametrize("change", [lambda print_, key: print_.pop(key), lambda print_, key: None])
def test_a_fingerprint_that_lacks_something_is_refused(
    key: str, change: Callable[[dict[str, Any], str], Any], broker_url: str
) -> None:
    """The error says what it needs. 1.2.1 called the queues None."""
    fingerprint = Fingerprint("alpha").as_dict()
    fingerprint[key] = None if change(fingerprint, key) is None else fingerprint.get(key)

    with pytest.raises(ConfigurationError, match=f"needs '{key}'"):
        GenericApplication(fingerprint, None)


def test_the_stub_of_a_logger_does_nothing_whatever_it_is_told() -> None:
    """But it has no special methods that would mislead Python."""
    stub = LoggingProducerStub({"name": "x"}, {"host": "h"}, "/")

    assert None is stub.log("text")
    assert None is stub.message_anything(1, a=2)
    assert isinstance(copy.copy(stub), LoggingProducerStub)
    assert isinstance(LoggingProducerStub(), LoggingProducerStub)


def test_a_round_robin_key_tells_its_queue() -> None:
    """So a call finds out that nobody consumes it."""
    assert "alpha#red" == GenericApplicationExchange.queue_of("alpha#red/rr")
    assert None is GenericApplicationExchange.queue_of("alpha")


def test_a_call_to_an_application_that_is_gone_says_that_nobody_consumes(caller: Caller) -> None:
    """The queue of the name outlives its instances."""
    with Running(Application("alpha", 1)) as running:
        caller.message_quit(_key="1@box")
        running.join()

    assert "NoConsumer" == caller.rpc_ping(_key="alpha/rr").value
