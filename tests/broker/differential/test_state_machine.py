# SPDX-License-Identifier: MIT
"""Whatever clients do in whatever order, they see the same of RabbitMQ and of the embedded broker.

A state machine takes random steps on both brokers and compares, after each step, the dialogue, the
deliveries and the number of messages and consumers of every queue.

``POSTAGE_DIFFERENTIAL_EXAMPLES=1000`` makes a long run of other examples each time. A failure
prints the steps that lead to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pika import spec

from tests.broker.differential.driver import Channel, Event, Silence, Stage

EXAMPLES = os.environ.get("POSTAGE_DIFFERENTIAL_EXAMPLES")

SETTINGS = settings(
    max_examples=int(EXAMPLES or 20),
    stateful_step_count=40,
    derandomize=EXAMPLES is None,
    database=None,
    # The dialogue tells more than fewer steps would, and shrinking takes minutes.
    phases=[Phase.generate] if EXAMPLES is None else [Phase.generate, Phase.shrink],
    deadline=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)

#: Each queue may send its dead letters to its twin only. So all that a step does to a queue comes
#: from one place, and RabbitMQ, whose queues are processes of their own, has no choice of order.
TWINS = {"q0": "d0", "q1": "d1", "d0": "q0", "d1": "q1"}

#: The queues that exchanges route to.
BOUND = ("q0", "q1")

ALWAYS_THERE = ("amq.direct", "amq.topic", "amq.fanout", "amq.headers")
EXCHANGES = (*ALWAYS_THERE, "e0", "e1")
KEYS = ("a", "a.b", "q0", "q1", "#", "a.*", "")

#: Milliseconds that are over when a step ends, and some that are not when the test ends.
SHORT, LONG = 1, 3_600_000

#: Looks that must be the same until a broker is taken to have nothing more to do.
STABLE_LOOKS = 4

#: Seconds between two looks.
LOOK_SECONDS = 0.004

#: Seconds until two brokers that still differ are taken to disagree.
DEADLINE_SECONDS = 3.0


class Player:
    """The clients of one of the brokers."""

    def __init__(self, url: str) -> None:
        self.stage = Stage(url)
        self.stage.connect()
        self.producer = self.stage.open(confirm=True)
        self.channels: dict[str, Channel] = {}

    def channel_of(self, queue: str) -> Channel:
        """Return the channel on which a queue is consumed; each has its own."""
        if queue not in self.channels or not self.channels[queue].is_open:
            self.channels[queue] = self.stage.clients[-1].open()
        return self.channels[queue]

    def get(self, queue: str, flags: list[str], *, is_quorum: bool) -> Event:
        """Get a message. A quorum queue counts those behind it that have expired, or does not."""
        channel = self.channel_of(queue)
        if not is_quorum:
            return channel.get(queue, *flags)
        event = channel.ask(spec.Basic.Get(queue=queue, no_ack="no_ack" in flags))
        event.arguments.pop("message_count", None)
        self.stage.note(event)
        return event

    def scratch(self, act: Callable[[Channel], Event]) -> Event:
        """Do something on a channel that may be closed by it."""
        channel = self.stage.clients[-1].open()
        reply = act(channel)
        if channel.is_open:
            channel.ask(spec.Channel.Close(200, "bye", 0, 0))
            channel.is_open = False
        return reply

    def lose_connection(self) -> None:
        """Cut the connection, and begin with a new one."""
        self.stage.clients[-1].cut()
        self.stage.connect()
        self.producer = self.stage.clients[-1].open(confirm=True)
        self.channels.clear()

    def look(self, queues: dict[str, bool]) -> list[str]:
        """Return what can be seen from outside: counts, and how many deliveries have come.

        Args:
            queues: whether it is a quorum queue, by name. There, all that holds a message counts
                as a consumer, such as basic.get.
        """
        seen = []
        for queue, is_quorum in queues.items():
            counts = self.stage.look_at(queue)
            seen.append(f"{queue}: {counts.partition(',')[0] if is_quorum else counts}")
        for queue, channel in self.channels.items():
            if channel.is_open:
                channel.sync()
            seen.append(f"{len(channel.inbox)} events on the channel of {queue}")
        return seen

    def take_deliveries(self) -> Iterator[tuple[str, Event]]:
        """Note what has come, and yield it with the queue whose channel it came on."""
        for queue, channel in self.channels.items():
            # Which of the consumers of a deleted queue is cancelled first means nothing.
            channel.inbox.sort(
                key=lambda event: (event.name == "basic.cancel" and str(event)) or ""
            )
            for event in list(channel.inbox):
                channel.take()
                yield queue, event


class BothBrokers(RuleBasedStateMachine):
    """Takes each step on two brokers."""

    def __init__(self, *urls: str) -> None:
        super().__init__()
        self.players = [Player(url) for url in urls]
        self.queues: list[str] = []
        self.is_quorum: dict[str, bool] = {}
        self.arguments: dict[str, dict[str, Any]] = {}
        self.ready: dict[str, int] = {}
        #: By queue, the delivery tags, and the consumer of each.
        self.unsettled: dict[str, dict[int, str]] = {}
        self.consumers: dict[str, dict[str, bool]] = {}
        self.published = 0
        #: Consumer tags are used once: RabbitMQ counts what is settled by the tag, so that a second
        #: consumer of that tag would get beyond its prefetch.
        self.consumed = 0
        self.compared = 0
        self.has_failed = False

    def teardown(self) -> None:
        """Compare all that is left in the queues, and delete them."""
        try:
            for queue in [] if self.has_failed else self.queues:
                self.both(lambda player, queue=queue: player.stage.drain(queue, 0))
        finally:
            note("\n".join(["The dialogue:", *self.players[0].stage.lines]))
            for player in self.players:
                player.stage.__exit__(None, None, None)

    # Steps

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """Begin with two queues and their twins."""
        for queue in TWINS:
            self.declare(queue, data.draw(classic_arguments() | quorum_arguments()))
        for queue in BOUND:
            for exchange, key in (("amq.fanout", ""), ("amq.topic", "a.*"), ("amq.direct", queue)):
                for player in self.players:
                    player.producer.ask(spec.Queue.Bind(0, queue, exchange, key))

    @rule(
        exchange=st.sampled_from(["e0", "e1"]),
        exchange_type=st.sampled_from([None, "direct", "topic", "fanout", "headers"]),
        alternate=st.sampled_from(["", "amq.fanout", "e0", "e1", "missing"]),
    )
    def change_exchange(self, exchange: str, exchange_type: str | None, alternate: str) -> None:
        """Declare an exchange, or delete it if no type is given."""
        arguments = {"alternate_exchange": alternate} if alternate else {}

        def act(channel: Channel) -> Event:
            if exchange_type is None:
                return channel.delete_exchange(exchange)
            return channel.declare_exchange(exchange, exchange_type, **arguments)

        self.both(lambda player: player.scratch(act))

    @rule(
        destination=st.sampled_from([*BOUND, *BOUND, *EXCHANGES]),
        source=st.sampled_from(EXCHANGES),
        key=st.sampled_from(KEYS),
        arguments=st.sampled_from([{}, {}, {"x-match": "any", "a": 1}, {"a": 1, "b": "two"}]),
        undo=st.booleans(),
    )
    def change_binding(
        self, destination: str, source: str, key: str, arguments: dict[str, Any], undo: bool
    ) -> None:
        """Bind or unbind a queue, or an exchange."""
        if destination in BOUND:
            verb = "unbind" if undo else "bind"
        elif "e" in (destination[0], source[0]):
            verb = "unbind_exchange" if undo else "bind_exchange"
        else:
            return  # a binding between exchanges that stay would outlive the example

        def act(channel: Channel) -> Event:
            reply: Event = getattr(channel, verb)(destination, source, key, arguments)
            return reply

        self.both(lambda player: player.scratch(act))

    @rule(
        where=st.one_of(
            st.tuples(st.just(""), st.sampled_from([*TWINS, "q0", "q1"])),
            st.tuples(st.sampled_from(ALWAYS_THERE), st.sampled_from(KEYS)),
        ),
        expiration=st.sampled_from([None, None, None, SHORT, LONG]),
        priority=st.sampled_from([None, None, 0, 1, 2, 9]),
        headers=st.sampled_from([None, None, {"a": 1}, {"a": 1, "b": "two"}, {"CC": ["q1", "q0"]}]),
        is_mandatory=st.booleans(),
        is_persistent=st.booleans(),
        size=st.sampled_from([1, 1, 1, 20]),
    )
    def publish(
        self,
        where: tuple[str, str],
        expiration: int | None,
        priority: int | None,
        headers: dict[str, Any] | None,
        is_mandatory: bool,
        is_persistent: bool,
        size: int,
    ) -> None:
        """Publish a message, and wait for its confirm."""
        exchange, key = where
        if key.startswith("d") and headers:
            headers = None  # the copies would race with the dead letters
        properties: dict[str, Any] = {"headers": headers} if headers else {}
        properties |= {"delivery_mode": 2} if is_persistent else {}
        if priority is not None and expiration != SHORT:
            # RabbitMQ forgets to look whether a message that overtakes others has expired.
            properties["priority"] = priority
        properties |= {} if expiration is None else {"expiration": str(expiration)}
        self.published += 1
        body = f"{self.published:03}".ljust(size, ".")
        flags = ["mandatory"] if is_mandatory else []
        self.both(
            lambda player: player.producer.publish(
                key, body, *flags, exchange=exchange, **properties
            )
        )
        self.settle()

    @precondition(lambda self: self.queues)
    @rule(
        number=st.integers(0, 3),
        priorities=st.lists(st.sampled_from([None, 0, 1, 2]), min_size=2, max_size=4),
    )
    def publish_several(self, number: int, priorities: list[int | None]) -> None:
        """Publish some messages to a queue."""
        queue = self.queue(number)
        both = [self.arguments[name] for name in (queue, TWINS[queue]) if name in self.queues]
        if any(arguments.get("x_message_ttl") == SHORT for arguments in both):
            return  # whether a message expires before the next comes is a matter of chance
        if all("x_dead_letter_exchange" in arguments for arguments in both):
            return  # so is whether one that comes back is before the next or behind it
        for priority in priorities:
            properties = {} if priority is None else {"priority": priority}
            self.published += 1
            body = f"{self.published:03}"
            self.both(
                lambda player, body=body, properties=properties: player.producer.publish(
                    queue, body, **properties
                )
            )
        self.settle()

    @precondition(lambda self: any(self.ready.values()))
    @rule(
        number=st.integers(0, 3),
        count=st.integers(1, 3),
        no_ack=st.sampled_from([False, False, False, True]),
    )
    def get(self, number: int, count: int, no_ack: bool) -> None:
        """Get some messages of a queue that has any."""
        queues = [queue for queue, ready in self.ready.items() if ready]
        queue = queues[number % len(queues)]
        flags = ["no_ack"] if no_ack else []
        for _ in range(min(count, self.ready[queue])):
            reply = self.both(
                lambda player: player.get(queue, flags, is_quorum=self.is_quorum[queue])
            )
            if reply.name == "basic.get-ok" and not no_ack:
                self.unsettled.setdefault(queue, {})[reply["delivery_tag"]] = "get"
            self.settle()

    @precondition(lambda self: self.queues)
    @rule(
        number=st.integers(0, 3),
        prefetch=st.sampled_from([1, 2]),
        no_ack=st.sampled_from([False, False, True]),
        priority=st.sampled_from([0, 1]),
    )
    def consume(self, number: int, prefetch: int, no_ack: bool, priority: int) -> None:
        """Start a consumer of a priority that no other has: whose turn it is means nothing."""
        queue = self.queue(number)
        consumers = self.consumers.setdefault(queue, {})
        if any(tag.endswith(str(priority)) for tag in consumers):
            return
        self.consumed += 1
        tag = f"c{self.consumed} of priority {priority}"
        flags = ["no_ack"] if no_ack else []
        arguments = {"x_priority": priority} if priority else {}

        def act(player: Player) -> Event:
            channel = player.channel_of(queue)
            channel.qos(prefetch)
            return channel.consume(queue, tag, *flags, **arguments)

        self.both(act)
        consumers[tag] = no_ack
        self.settle()

    @precondition(lambda self: any(self.consumers.values()))
    @rule(number=st.integers(0, 7))
    def cancel(self, number: int) -> None:
        """Cancel a consumer."""
        pairs = [(queue, tag) for queue, tags in self.consumers.items() for tag in tags]
        queue, tag = pairs[number % len(pairs)]
        self.both(lambda player: player.channel_of(queue).cancel(tag))
        del self.consumers[queue][tag]
        self.settle()

    @precondition(lambda self: any(self.unsettled.values()))
    @rule(
        number=st.integers(0, 3),
        position=st.integers(0, 5),
        method=st.sampled_from(["ack", "nack", "nack", "reject"]),
        is_multiple=st.booleans(),
        requeue=st.booleans(),
    )
    def answer(
        self, number: int, position: int, method: str, is_multiple: bool, requeue: bool
    ) -> None:
        """Acknowledge, or reject, one delivery or several."""
        queues = [queue for queue, tags in self.unsettled.items() if tags]
        queue = queues[number % len(queues)]
        tags = self.unsettled[queue]
        tag = list(tags)[position % len(tags)]
        is_multiple = is_multiple and method != "reject"
        flags = ["multiple"] if is_multiple else []
        flags += ["requeue"] if requeue and method != "ack" else []
        if "requeue" in flags and self.consumers.get(queue) and self.is_limited(queue):
            return
        if flags == ["multiple", "requeue"] and not self.can_requeue_all(queue):
            return
        self.both(lambda player: getattr(player.channel_of(queue), method)(tag, *flags))
        for settled in [t for t in tags if t == tag or (is_multiple and t < tag)]:
            del tags[settled]
        self.settle()

    @precondition(lambda self: any(self.unsettled.values()))
    @rule(number=st.integers(0, 3))
    def recover(self, number: int) -> None:
        """Give all deliveries of a channel back."""
        queues = [queue for queue, tags in self.unsettled.items() if tags]
        queue = queues[number % len(queues)]
        if not self.can_requeue_all(queue):
            return
        if self.consumers.get(queue) and self.is_limited(queue):
            return
        self.both(lambda player: player.channel_of(queue).call(spec.Basic.Recover(requeue=True)))
        self.unsettled[queue].clear()
        self.settle()

    @rule(
        what=st.sampled_from(["declare", "delete", "purge", "close_channel", "lose_connection"]),
        queue=st.sampled_from(list(TWINS)),
        flags=st.sampled_from([(), ("if_empty",), ("if_unused",)]),
        arguments=st.data(),
    )
    def disturb(
        self, what: str, queue: str, flags: tuple[str, ...], arguments: st.DataObject
    ) -> None:
        """Do what ends deliveries or loses messages."""
        if what == "declare" or queue not in self.queues:
            self.declare(queue, arguments.draw(classic_arguments() | quorum_arguments()))
        elif what == "delete":
            self.delete(queue, () if self.is_quorum[queue] else flags)
        elif what == "purge":
            self.both(lambda player: player.scratch(lambda channel: channel.purge(queue)))
        elif what == "close_channel":
            self.close_channel(queue)
        else:
            self.both(Player.lose_connection)
            self.unsettled.clear()
            self.consumers.clear()
        self.settle()

    # What the steps are made of

    def queue(self, number: int) -> str:
        """Return one of the queues that exist."""
        return self.queues[number % len(self.queues)]

    def is_limited(self, queue: str) -> bool:
        """Whether a queue has a delivery limit, or a length, and consumers are better left alone.

        The consumer of a message that reaches the limit gets room for two others on RabbitMQ, and
        quorum queues deliver what comes back before they look at their length.
        """
        names = ("x_delivery_limit", "x_max_length", "x_max_length_bytes")
        return self.is_quorum[queue] and any(name in self.arguments[queue] for name in names)

    def can_requeue_all(self, queue: str) -> bool:
        """Whether it is certain what happens if all deliveries of a queue are given back at once.

        RabbitMQ takes them consumer by consumer, and there may be deliveries in between.
        """
        return len(set(self.unsettled[queue].values())) < 2

    def declare(self, queue: str, arguments: dict[str, Any]) -> None:
        """Declare a queue; one that dead-letters does so to its twin."""
        arguments = dict(arguments)
        if arguments.pop("dead_letters", False):
            arguments["x_dead_letter_exchange"] = ""
            arguments["x_dead_letter_routing_key"] = TWINS[queue]
        reply = self.both(
            lambda player: player.scratch(
                lambda channel: channel.declare(queue, "durable", **arguments)
            )
        )
        if reply.name == "queue.declare-ok" and queue not in self.queues:
            self.queues.append(queue)
            self.is_quorum[queue] = "x_queue_type" in arguments
            self.arguments[queue] = arguments

    def delete(self, queue: str, flags: tuple[str, ...]) -> None:
        """Delete a queue, also one with consumers."""
        reply = self.both(
            lambda player: player.scratch(lambda channel: channel.delete(queue, *flags))
        )
        if reply.name == "queue.delete-ok":
            self.queues.remove(queue)
            self.settle()
            self.close_channel(queue)

    def close_channel(self, queue: str) -> None:
        """Close the channel of a queue, with its consumers and deliveries."""

        def close(player: Player) -> None:
            channel = player.channels.pop(queue, None)
            if channel is not None and channel.is_open:
                channel.close()

        self.both(close)
        self.unsettled.pop(queue, None)
        self.consumers.pop(queue, None)

    def both(self, act: Callable[[Player], Any]) -> Any:
        """Do the same on both brokers, compare what they say, and return what the first said."""
        results = []
        for player in self.players:
            try:
                results.append(act(player))
            except Silence as silence:
                player.stage.note(f"silence: {silence}")
                results.append(Event(0, "silence"))
        self.compare()
        return results[0]

    def settle(self) -> None:
        """Wait until both brokers have nothing more to do, and compare what can be seen."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        looks: list[list[list[str]]] = []
        queues = {queue: self.is_quorum[queue] for queue in self.queues}
        while time.monotonic() < deadline:
            looks.append([player.look(queues) for player in self.players])
            last = looks[-STABLE_LOOKS:]
            is_agreed = all(one == other for one, other in last)
            if len(last) == STABLE_LOOKS and is_agreed and all(look == last[0] for look in last):
                break
            time.sleep(LOOK_SECONDS)
        for player, look in zip(self.players, looks[-1], strict=True):
            player.stage.note("; ".join(look))
        self.ready = {queue: int(look[n].split()[1]) for n, queue in enumerate(queues)}
        self.compare()
        for number, player in enumerate(self.players):
            for queue, event in player.take_deliveries():
                if number == 0 and event.name == "basic.deliver":
                    self.remember(queue, event)
        self.compare()

    def remember(self, queue: str, event: Event) -> None:
        """Remember a delivery that is to be settled."""
        if not self.consumers[queue][event["consumer_tag"]]:
            tags = self.unsettled.setdefault(queue, {})
            tags[event["delivery_tag"]] = event["consumer_tag"]

    def compare(self) -> None:
        """Compare what the brokers have said since the last time."""
        first, second = (player.stage.lines[self.compared :] for player in self.players)
        self.compared += len(first)
        self.has_failed = first != second
        assert first == second


@st.composite
def classic_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a classic queue."""
    arguments = draw(common_arguments())
    if "x_max_length" in arguments:
        overflow = draw(
            st.sampled_from([None, "drop-head", "reject-publish", "reject-publish-dlx"])
        )
        arguments |= {"x_overflow": overflow} if overflow else {}
    if draw(st.booleans()):
        arguments["x_max_priority"] = 2
    return arguments


@st.composite
def quorum_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a quorum queue. When one that is full refuses publishes is a matter of time."""
    arguments = {"x_queue_type": "quorum", **draw(common_arguments())}
    if "dead_letters" in arguments:
        arguments.pop("x_max_length_bytes", None)  # several at once: RabbitMQ turns their order
    if draw(st.booleans()):
        arguments["x_delivery_limit"] = 1
    return arguments


@st.composite
def common_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments that all queues know."""
    arguments: dict[str, Any] = {
        "x_message_ttl": draw(st.sampled_from([None, None, None, SHORT, LONG])),
        "x_max_length": draw(st.sampled_from([None, None, 1, 2])),
        "x_max_length_bytes": draw(st.sampled_from([None, None, None, 25])),
        "dead_letters": draw(st.sampled_from([None, True, True])),
    }
    return {name: value for name, value in arguments.items() if value is not None}


@pytest.mark.rabbitmq
def test_the_brokers_agree_whatever_the_steps(rabbitmq_vhost: str, embedded_vhost: str) -> None:
    """Random steps lead to the same observations on RabbitMQ and on the embedded broker."""
    run_state_machine_as_test(
        lambda: BothBrokers(rabbitmq_vhost, embedded_vhost), settings=SETTINGS
    )
