# SPDX-License-Identifier: MIT
"""Every publishing ends with the fate that it really had."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from decimal import Decimal
from functools import partial
from typing import Any

import pika
import pytest
from pika import spec

from postage.errors import (
    BrokerBlockedError,
    ChannelClosedError,
    ClosedError,
    ConnectionFailedError,
    EncodingError,
    ExchangeMismatchError,
    NackedError,
    PublishRefusedError,
    PublishTimeoutError,
    PublishUnknownError,
    UnroutableError,
)
from postage.settings import Settings
from postage.topology import DefaultExchange, ExchangeSpec
from postage.transport import connection as connections
from postage.transport.connection import State
from postage.transport.publisher import (
    Fate,
    Publisher,
    Publishing,
    check_encodable,
    encoded_size,
)
from tests.nodes import Node
from tests.rabbitmq_node import RabbitNode
from tests.transport.proxy import Proxy, Way
from tests.waiting import wait_until

#: Seconds after which a fate that has to be known counts as missing.
DEADLINE = 30.0
#: Seconds for a deadline that is to pass.
SOON = 0.3

DEFAULT = DefaultExchange.spec()
LETTERS = ExchangeSpec("letters", "direct")


class Sender:
    """A publisher, for as long as its ``with`` block lasts."""

    def __init__(self, settings: Settings, grace: float = 5.0) -> None:
        self.connection = connections.acquire(settings, "publish")
        self.publisher = Publisher(self.connection)
        self.settled: list[Publishing] = []
        self._grace = grace

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_error: object) -> None:
        self.publisher.close(self._grace)
        connections.release(self.connection, self._grace)

    def make(
        self,
        key: str,
        body: bytes = b"",
        exchange: ExchangeSpec = DEFAULT,
        *,
        mandatory: bool = True,
        confirm: bool = True,
        timeout: float = DEADLINE,
        **properties: Any,
    ) -> Publishing:
        return Publishing(
            exchange,
            key,
            body,
            pika.BasicProperties(**properties),
            mandatory=mandatory,
            confirm=confirm,
            deadline=time.monotonic() + timeout,
            settled=self.settled.append,
        )

    def start(self, *publishings: Publishing) -> None:
        self.publisher.hub.call(partial(self.publisher.send, publishings))

    def wait(
        self, publishings: Sequence[Publishing], timeout: float = DEADLINE
    ) -> list[Fate | None]:
        hub = self.publisher.hub
        assert hub.wait(lambda: all(each.fate for each in publishings), timeout), publishings
        return [each.fate for each in publishings]

    def send(self, *publishings: Publishing) -> list[Fate | None]:
        self.start(*publishings)
        return self.wait(publishings)

    def wait_for(self, condition: Any) -> None:
        assert self.publisher.hub.wait(lambda: bool(condition()), DEADLINE)


class Peer:
    """Another program on the same broker."""

    def __init__(self, url: str) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self._connection.channel()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_error: object) -> None:
        self._connection.close()

    def declare(self, queue: str, exchange: str = "", **arguments: Any) -> None:
        self.channel.queue_declare(queue, durable=True, arguments=arguments)
        if exchange:
            self.channel.exchange_declare(exchange, "direct", durable=True)
            self.channel.queue_bind(queue, exchange, queue)

    def count(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)

    def fetch(self, queue: str) -> list[tuple[Any, bytes]]:
        """Return the properties and bodies of all that is in a queue, and empty it."""
        found: list[tuple[Any, bytes]] = []
        while True:
            method, properties, body = self.channel.basic_get(queue, auto_ack=True)
            if method is None:
                return found
            found.append((properties, body))

    def bodies(self, queue: str) -> list[bytes]:
        return [body for _properties, body in self.fetch(queue)]


@pytest.fixture
def settings(broker_url: str) -> Settings:
    return Settings.from_environment()


@pytest.fixture
def peer(broker_url: str) -> Iterator[Peer]:
    with Peer(broker_url) as peer:
        yield peer


@pytest.fixture
def sender(settings: Settings) -> Iterator[Sender]:
    with Sender(settings) as sender:
        yield sender


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    with Proxy(broker_url) as proxy:
        yield proxy


@pytest.fixture
def far_sender(proxy: Proxy) -> Iterator[Sender]:
    """A sender whose network the test commands."""
    with Sender(Settings.from_environment({"POSTAGE_URL": proxy.url})) as sender:
        yield sender


# -------------------------------------------------------------------------- what arrives


def test_a_message_is_confirmed_when_the_broker_has_it(sender: Sender, peer: Peer) -> None:
    """And is the same on the other side."""
    peer.declare("box")
    letter = sender.make("box", b"hello", message_id="1", headers={"size": 5})
    assert [Fate.CONFIRMED] == sender.send(letter)
    assert None is letter.error
    assert [letter] == sender.settled
    [(properties, body)] = peer.fetch("box")
    assert (b"hello", "1", {"size": 5}) == (body, properties.message_id, properties.headers)


def test_messages_arrive_in_order(sender: Sender, peer: Peer) -> None:
    """However many are on their way, and whichever of their confirms come together."""
    peer.declare("box")
    letters = [sender.make("box", b"%d" % number, delivery_mode=2) for number in range(3000)]
    for start in range(0, len(letters), 64):
        sender.start(*letters[start : start + 64])
    assert [Fate.CONFIRMED] * 3000 == sender.wait(letters)
    assert [letter.body for letter in letters] == peer.bodies("box")
    assert 3000 == len(sender.settled)
    assert 0 == sender.publisher.outstanding


def test_an_unroutable_message_is_returned(sender: Sender) -> None:
    """The error names the pair."""
    letter = sender.make("nowhere", b"hello")
    assert [Fate.RETURNED] == sender.send(letter)
    assert isinstance(letter.error, UnroutableError)
    assert [("", "nowhere")] == letter.error.failed


def test_a_message_that_is_not_mandatory_may_be_dropped(sender: Sender) -> None:
    """The broker confirms what it was allowed to drop."""
    assert [Fate.CONFIRMED] == sender.send(sender.make("nowhere", mandatory=False))


@pytest.mark.parametrize("body", [b"", b"hello"])
def test_returns_are_told_apart(sender: Sender, peer: Peer, body: bytes) -> None:
    """A return has no number, so exchange, key and id decide, and among equals the order."""
    peer.declare("box", exchange="letters")
    letters = [
        sender.make(key, body, exchange, message_id=message_id)
        for key, exchange, message_id in itertools.product(
            ("box", "lost", "also lost"), (DEFAULT, LETTERS), ("1", "2", "2")
        )
    ]
    expected = [Fate.CONFIRMED if letter.key == "box" else Fate.RETURNED for letter in letters]
    for _ in range(10):
        again = [
            sender.make(each.key, body, each.exchange, message_id=each.properties.message_id)
            for each in letters
        ]
        assert expected == sender.send(*again)


def test_a_return_belongs_to_a_mandatory_message(sender: Sender) -> None:
    """Of two messages with one id only the mandatory one can have come back."""
    letters = [
        sender.make("nowhere", message_id="1", mandatory=bool(number % 2)) for number in range(200)
    ]
    assert [Fate.CONFIRMED, Fate.RETURNED] * 100 == sender.send(*letters)


def test_a_full_queue_refuses(sender: Sender, peer: Peer) -> None:
    """The error says what may be full."""
    peer.declare("box", **{"x-max-length": 1, "x-overflow": "reject-publish"})
    letters = [sender.make("box", b"%d" % number) for number in range(3)]
    assert [Fate.CONFIRMED, Fate.NACKED, Fate.NACKED] == sender.send(*letters)
    assert isinstance(letters[-1].error, NackedError)
    assert "'box'" in str(letters[-1].error)
    assert [b"0"] == peer.bodies("box")


#: Erlang: lets new channels believe that the leader of a quorum queue is on another node.
MOVE_LEADER = """
    {{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)),
    {{Name, _}} = amqqueue:get_pid(Q),
    mnesia:dirty_write(rabbit_queue, amqqueue:set_pid(Q, {{Name, {node}}})).
"""


def test_a_channel_that_refuses_everything_is_not_kept(
    rabbitmq_node: RabbitNode, sender: Sender, settings: Settings, peer: Peer
) -> None:
    """What RabbitMQ 3.10 does with one that first wrote to a queue whose leader had just died."""
    # Given
    peer.declare("box", **{"x-queue-type": "quorum"})
    move = partial(MOVE_LEADER.format, vhost=settings.vhost, queue="box")
    rabbitmq_node.ctl("eval", move(node="gone@localhost"))
    assert [Fate.NACKED] == sender.send(sender.make("box"))

    # When
    rabbitmq_node.ctl("eval", move(node="node()"))

    # Then
    assert [Fate.CONFIRMED] * 3 == sender.send(*[sender.make("box") for _ in range(3)])


def test_a_sender_need_not_wait_for_the_confirm(
    far_sender: Sender, proxy: Proxy, peer: Peer
) -> None:
    """Its fate is that it was written, and the confirm is nobody's business."""
    peer.declare("box")
    far_sender.send(far_sender.make("box"))  # the channel is there
    proxy.hold_answers()
    assert [Fate.WRITTEN] == far_sender.send(far_sender.make("box", b"hello", confirm=False))
    proxy.release_answers()
    far_sender.wait_for(lambda: not far_sender.publisher.outstanding)
    assert [b"", b"hello"] == peer.bodies("box")
    assert 2 == len(far_sender.settled)


def test_a_message_that_comes_back_unasked_is_logged(
    sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for the fate of a message without confirm, but it is not lost in silence."""
    assert [Fate.WRITTEN] == sender.send(sender.make("nowhere", confirm=False))
    sender.wait_for(lambda: "there is no queue 'nowhere'" in caplog.text)


def test_what_was_written_without_confirm_is_not_sent_again(
    far_sender: Sender, proxy: Proxy, peer: Peer
) -> None:
    """Its sender was told that it is gone."""
    peer.declare("box")
    far_sender.send(far_sender.make("box", b"first"))
    proxy.hold_answers()
    far_sender.send(far_sender.make("box", b"second", confirm=False))
    wait_until(lambda: peer.count("box") == 2)
    proxy.cut()
    proxy.release_answers()
    assert [Fate.CONFIRMED] == far_sender.send(far_sender.make("box", b"third"))
    assert [b"first", b"second", b"third"] == peer.bodies("box")


def test_two_publishers_share_a_connection(settings: Settings, peer: Peer) -> None:
    """Each has a channel, and hears of its own messages only."""
    peer.declare("box")
    with Sender(settings) as one, Sender(settings) as two:
        assert one.connection is two.connection
        ones = [one.make("box", b"one", message_id="1") for _ in range(200)]
        twos = [two.make("lost", b"two", message_id="1") for _ in range(200)]
        for pair in zip(ones, twos, strict=True):
            one.start(pair[0])
            two.start(pair[1])
        assert [Fate.CONFIRMED] * 200 == one.wait(ones)
        assert [Fate.RETURNED] * 200 == two.wait(twos)
        one.publisher.close(5.0)
        peer.declare("lost")
        assert [Fate.CONFIRMED] == two.send(two.make("lost"))


# ---------------------------------------------------------------------------- exchanges


def test_an_exchange_is_declared_before_its_first_use(
    sender: Sender, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """A publish to an unknown exchange would close the channel, so it never comes to that."""
    assert [Fate.RETURNED] * 2 == sender.send(
        sender.make("lost", exchange=LETTERS), sender.make("lost", exchange=LETTERS)
    )
    peer.channel.exchange_declare("letters", passive=True)
    peer.declare("box", exchange="letters")
    assert [Fate.CONFIRMED] == sender.send(sender.make("box", exchange=LETTERS))
    assert "closed" not in caplog.text


def test_an_exchange_that_was_deleted_is_declared_anew(
    sender: Sender, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """What was written to it is in doubt, is sent again, and the log says what happened."""
    peer.declare("box", exchange="letters")
    sender.send(sender.make("box", b"first", LETTERS))
    peer.channel.exchange_delete("letters")
    fates = sender.send(
        sender.make("box", b"second", LETTERS, mandatory=False), sender.make("box", b"third")
    )
    assert [Fate.CONFIRMED] * 2 == fates
    assert b"third" in peer.bodies("box")
    peer.channel.exchange_declare("letters", passive=True)
    assert "404 NOT_FOUND - no exchange 'letters'" in caplog.text


def test_a_mismatching_exchange_fails_its_own_messages_only(sender: Sender, peer: Peer) -> None:
    """The others go through, those before it and those behind it."""
    peer.declare("box", exchange="letters")
    wrong = ExchangeSpec("letters", "fanout")
    fates = sender.send(
        sender.make("box", b"1"),
        sender.make("box", b"2", wrong),
        sender.make("box", b"3", LETTERS),
        sender.make("box", b"4", wrong),
        sender.make("box", b"5"),
    )
    assert [Fate.CONFIRMED, Fate.UNSENT, Fate.CONFIRMED, Fate.UNSENT, Fate.CONFIRMED] == fates
    assert [b"1", b"3", b"5"] == peer.bodies("box")
    error = next(each.error for each in sender.settled if each.body == b"2")
    assert isinstance(error, ExchangeMismatchError)
    assert "declare exchange 'letters' (fanout, durable)" in str(error)
    assert [Fate.UNSENT] == sender.send(sender.make("box", b"6", wrong))


def test_a_setting_that_makes_no_sense_is_reported_when_it_is_read(
    sender: Sender,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The messages to an exchange that does not match fail at once, as without it."""
    monkeypatch.setenv("POSTAGE_ON_MISMATCH", "adpot")
    peer.declare("box", exchange="letters")
    letter = sender.make("box", exchange=ExchangeSpec("letters", "fanout"))
    assert [Fate.UNSENT] == sender.send(letter)
    assert isinstance(letter.error, ExchangeMismatchError)
    assert "POSTAGE_ON_MISMATCH is 'adpot'" in caplog.text


def test_an_exchange_that_may_only_be_looked_at_is_not_made(sender: Sender, peer: Peer) -> None:
    """A passive exchange that is missing is an error of its messages."""
    passive = replace(LETTERS, passive=True)
    letter = sender.make("box", exchange=passive)
    assert [Fate.UNSENT] == sender.send(letter)
    assert isinstance(letter.error, ChannelClosedError)
    assert 404 == letter.error.code
    peer.declare("box", exchange="letters")
    assert [Fate.CONFIRMED] == sender.send(sender.make("box", exchange=passive))


def test_a_short_deadline_does_not_end_the_others_wait_for_their_exchange(
    far_sender: Sender, proxy: Proxy, peer: Peer
) -> None:
    """Who waits for the same exchange with more patience gets through after an outage."""
    peer.declare("box", exchange="letters")
    far_sender.send(far_sender.make("box", b"first"))
    proxy.hold_answers()
    hasty = far_sender.make("box", b"hasty", LETTERS, timeout=SOON)
    patient = far_sender.make("box", b"patient", LETTERS)
    far_sender.start(hasty, patient)
    assert [Fate.UNSENT] == far_sender.wait([hasty])
    assert "certainly not sent, amqp://" in str(hasty.error)
    assert "did not answer in time" in str(hasty.error)
    proxy.cut()
    proxy.release_answers()
    assert [Fate.CONFIRMED] == far_sender.wait([patient])
    assert [b"first", b"patient"] == peer.bodies("box")


# ------------------------------------------------------------------- what is not delivered


def test_without_a_broker_a_message_is_certainly_not_sent() -> None:
    """At its deadline, which is not that of the others."""
    with Sender(Settings((("127.0.0.1", 1),), "/", "guest", "guest"), grace=0) as sender:
        patient = sender.make("box")
        hasty = [sender.make("box", timeout=SOON / each) for each in (1, 2, 3)]
        sender.start(patient, *hasty)
        assert [Fate.UNSENT] * 3 == sender.wait(hasty)
        assert list(reversed(hasty)) == sender.settled
        assert None is patient.fate
        assert isinstance(hasty[0].error, PublishTimeoutError)
        assert "certainly not sent, no connection to amqp://guest@127.0.0.1:1/%2F in time" in str(
            hasty[0].error
        )
        assert "nothing listens there" in str(hasty[0].error)
    assert Fate.UNSENT is patient.fate
    assert isinstance(patient.error, ClosedError)


def test_a_refused_login_fails_what_waits_at_once(settings: Settings) -> None:
    """Waiting would not help."""
    with Sender(replace(settings, password="letmein"), grace=0) as sender:
        letters = [sender.make("box"), sender.make("box")]
        assert [Fate.UNSENT] * 2 == sender.send(*letters)
        assert [ConnectionFailedError] * 2 == [type(each.error) for each in letters]


def test_a_confirm_that_never_comes_leaves_the_fate_unknown(
    far_sender: Sender, proxy: Proxy, peer: Peer
) -> None:
    """The error says so, with the id that a receiver would see; a late confirm changes nothing."""
    peer.declare("box")
    far_sender.send(far_sender.make("box"))
    proxy.hold_answers()
    letter = far_sender.make("box", message_id="17", timeout=SOON)
    assert [Fate.UNKNOWN] == far_sender.send(letter)
    assert isinstance(letter.error, PublishUnknownError)
    assert "it may have arrived (message id 17)" in str(letter.error)
    proxy.release_answers()
    assert [Fate.CONFIRMED] == far_sender.send(far_sender.make("box"))
    assert Fate.UNKNOWN is letter.fate
    assert 3 == len(far_sender.settled)


def test_a_written_message_is_unknown_also_if_the_broker_is_gone_by_then(
    far_sender: Sender, proxy: Proxy, peer: Peer
) -> None:
    """What was written and waits to be sent again is not certainly unsent."""
    peer.declare("box")
    far_sender.send(far_sender.make("box", b"first"))
    proxy.hold_answers()
    letters = [far_sender.make("box", b"second", timeout=2 * SOON)]
    far_sender.start(*letters)
    wait_until(lambda: peer.count("box") == 2)
    with proxy.outage():
        far_sender.wait_for(lambda: far_sender.connection.losses)
        letters.append(far_sender.make("box", b"third", timeout=SOON))
        far_sender.start(letters[1])
        assert [Fate.UNKNOWN, Fate.UNSENT] == far_sender.wait(letters)
    proxy.release_answers()
    assert [Fate.CONFIRMED] == far_sender.send(far_sender.make("box", b"fourth"))
    assert [b"first", b"second", b"fourth"] == peer.bodies("box")


def test_what_is_in_doubt_is_sent_again_first_and_in_order(
    far_sender: Sender, proxy: Proxy, peer: Peer
) -> None:
    """With the same ids, so that a receiver can tell; what came meanwhile goes behind it."""
    peer.declare("box")
    far_sender.send(far_sender.make("box", b"first", message_id="1"))
    proxy.hold_answers()
    letters = [far_sender.make("box", b"%d" % n, message_id=f"{n}") for n in range(10, 15)]
    far_sender.start(*letters)
    wait_until(lambda: peer.count("box") == 6)
    with proxy.outage():
        far_sender.wait_for(lambda: far_sender.connection.losses)
        letters.append(far_sender.make("box", b"15", message_id="15"))
        far_sender.start(letters[-1])
    proxy.release_answers()
    assert [Fate.CONFIRMED] * 6 == far_sender.wait(letters)
    found = [(properties.message_id, body) for properties, body in peer.fetch("box")]
    written = [(f"{n}", b"%d" % n) for n in range(10, 15)]
    assert [("1", b"first"), *written, *written, ("15", b"15")] == found


@pytest.mark.parametrize("trouble", ["returned", "nacked", "refused"])
def test_what_becomes_of_a_second_copy_does_not_tell_of_the_first(
    far_sender: Sender, proxy: Proxy, peer: Peer, trouble: str
) -> None:
    """The first one is in the queue: nobody may say that the message did not arrive."""
    peer.declare("box", "letters")
    letter = far_sender.make("box", b"hello", message_id="1", exchange=LETTERS)
    far_sender.send(far_sender.make("box", b"first", exchange=LETTERS))
    proxy.hold_answers()
    far_sender.start(letter)
    wait_until(lambda: peer.count("box") == 2)
    with proxy.outage():
        far_sender.wait_for(lambda: far_sender.connection.losses)
        assert [b"first", b"hello"] == peer.bodies("box")
        if trouble == "returned":
            peer.channel.queue_unbind("box", "letters", "box")
        elif trouble == "nacked":
            full = {"x-max-length": 0, "x-overflow": "reject-publish"}
            peer.channel.queue_delete("box")
            peer.declare("box", "letters", **full)
        else:
            peer.channel.exchange_delete("letters")
            peer.channel.exchange_declare("letters", "fanout")
    proxy.release_answers()
    assert [Fate.UNKNOWN] == far_sender.wait([letter])
    assert isinstance(letter.error, PublishUnknownError)
    assert "may have arrived then (message id 1); the second time: " in str(letter.error)
    expected = {
        "returned": UnroutableError,
        "nacked": NackedError,
        "refused": ExchangeMismatchError,
    }
    assert isinstance(letter.error.__cause__, expected[trouble])


@pytest.mark.parametrize("way", Way, ids=lambda way: way.name)
def test_a_connection_that_ended_one_way_is_replaced(
    far_sender: Sender, proxy: Proxy, peer: Peer, way: Way
) -> None:
    """What was written to it, and what waits for its confirm, is sent again."""
    peer.declare("box")
    far_sender.send(far_sender.make("box", b"first"))
    proxy.half_close(way)
    assert [Fate.CONFIRMED] == far_sender.send(far_sender.make("box", b"second"))
    assert 1 == far_sender.connection.losses
    # In the direction that was open, the first copy may have arrived.
    assert [b"first", b"second"] == sorted(set(peer.bodies("box")))


def test_what_came_back_before_the_loss_is_not_sent_again(sender: Sender, peer: Peer) -> None:
    """Its confirm is missing, but its fate is known."""
    sender.send(sender.make("nowhere", mandatory=False))
    letter = sender.make("nowhere", b"hello", message_id="1")

    def lose_the_confirm() -> None:
        sender.publisher.send([letter])
        back = spec.Basic.Return(312, "NO_ROUTE", "", "nowhere")
        sender.publisher._returned(None, back, letter.properties, b"hello")  # type: ignore[arg-type]
        sender.connection.abort(OSError("cut"))

    sender.publisher.hub.call(lose_the_confirm)
    assert [Fate.RETURNED] == sender.wait([letter])
    assert isinstance(letter.error, UnroutableError)


@pytest.mark.slow
def test_what_was_confirmed_outlives_the_death_of_the_broker(
    node: Node, far_sender: Sender, proxy: Proxy, broker_url: str
) -> None:
    """A persistent message in a durable queue is there once it was confirmed."""
    with Peer(broker_url) as peer:
        peer.declare("box")
    letters = [
        far_sender.make("box", b"%d" % number, delivery_mode=2, timeout=4 * DEADLINE)
        for number in range(2000)
    ]
    far_sender.start(*letters)
    far_sender.wait_for(lambda: len(far_sender.settled) > 100)
    node.kill()
    with proxy.outage():
        far_sender.wait_for(lambda: far_sender.connection.losses)
        node.start()
        with Peer(broker_url) as peer:
            found = peer.bodies("box")
        confirmed = {letter.body for letter in far_sender.settled}
        assert {Fate.CONFIRMED} == {letter.fate for letter in far_sender.settled}
        assert confirmed <= set(found)
    far_sender.wait(letters, timeout=4 * DEADLINE)
    assert {Fate.CONFIRMED} == {letter.fate for letter in letters}
    with Peer(broker_url) as peer:
        again = peer.bodies("box")
    assert [each.body for each in letters if each.body not in confirmed] == again


# ------------------------------------------------------------------------------- alarms


def test_under_an_alarm_a_message_is_held_and_then_certainly_not_sent(
    node: Node, settings: Settings, broker_url: str
) -> None:
    """Only what was written before the broker said so may arrive, when the alarm lifts."""
    with Sender(settings) as sender, Peer(broker_url) as peer:
        peer.declare("box")
        sender.send(sender.make("box", b"before"))
        with node.memory_alarm():
            unaware = sender.make("box", b"unaware", timeout=4 * SOON)
            sender.start(unaware)
            sender.wait_for(lambda: sender.connection.state is State.BLOCKED)
            held = sender.make("box", b"held", timeout=SOON)
            patient = sender.make("box", b"patient")
            sender.start(held, patient)
            assert [Fate.UNSENT, Fate.UNKNOWN] == sender.wait([held, unaware])
            assert isinstance(held.error, BrokerBlockedError)
            told = "certainly not sent; an alarm of the broker blocks publishers (low on memory)"
            assert told in str(held.error)
            assert None is patient.fate
        assert [Fate.CONFIRMED] == sender.wait([patient])
        assert [b"before", b"unaware", b"patient"] == peer.bodies("box")


# ---------------------------------------------------------- what the broker will never take


def test_a_message_that_the_broker_refuses_to_read_fails_alone(sender: Sender, peer: Peer) -> None:
    """It costs the channel, and the others must neither wait for it nor arrive many times."""
    peer.declare("box")
    letters = [sender.make("box", b"%d" % n) for n in range(20)]
    letters.insert(10, sender.make("box", b"odd", expiration="soon"))
    fates = sender.send(*letters)
    assert [Fate.CONFIRMED] * 10 + [Fate.NACKED] + [Fate.CONFIRMED] * 10 == fates
    assert isinstance(letters[10].error, PublishRefusedError)
    assert 406 == letters[10].error.code
    assert "publish to exchange '' key 'box'" in str(letters[10].error)
    bodies = peer.bodies("box")
    assert [b"%d" % n for n in range(20)] == list(dict.fromkeys(bodies))
    assert max(bodies.count(body) for body in set(bodies)) <= 2


def test_a_user_who_may_not_write_is_told_so(rabbitmq_node: RabbitNode, settings: Settings) -> None:
    """At once, and in the broker's words, instead of at the deadline."""
    rabbitmq_node.ctl("add_user", "reader", "pass")
    rabbitmq_node.ctl("set_permissions", "-p", settings.vhost, "reader", ".*", "", ".*")
    try:
        with Sender(replace(settings, user="reader", password="pass")) as sender:
            letters = [sender.make("box", exchange=LETTERS) for _ in range(3)]
            assert [Fate.NACKED] * 3 == sender.send(*letters)
            for letter in letters:
                assert isinstance(letter.error, PublishRefusedError)
                assert 403 == letter.error.code
                assert "needs the permission to write" in letter.error.advice
    finally:
        rabbitmq_node.ctl("delete_user", "reader")


def test_a_message_that_cannot_be_encoded_fails_alone(sender: Sender, peer: Peer) -> None:
    """Nothing of it was written, so the channel is as good as before."""
    peer.declare("box")
    fates = sender.send(
        sender.make("box", b"1"),
        sender.make("box", b"2", priority=300),
        sender.make("box", b"3", headers={"x": 1.5}),
        sender.make("x" * 256, b"4"),
        sender.make("box", b"5"),
    )
    assert [Fate.CONFIRMED, Fate.UNSENT, Fate.UNSENT, Fate.UNSENT, Fate.CONFIRMED] == fates
    errors = [each.error for each in sender.settled if each.fate is Fate.UNSENT]
    assert [EncodingError] * 3 == [type(error) for error in errors]
    assert [b"1", b"5"] == peer.bodies("box")


# --------------------------------------------------------------------------- taking back


def test_a_message_that_is_held_can_be_taken_back(
    far_sender: Sender, proxy: Proxy, peer: Peer
) -> None:
    """What is still here never leaves then; what was written cannot be taken back."""
    peer.declare("box")
    with proxy.outage():
        held, other = far_sender.make("box", b"held"), far_sender.make("box", b"other")
        taken: list[bool] = []
        far_sender.start(held, other)
        far_sender.publisher.hub.call(lambda: taken.append(far_sender.publisher.withdraw(held)))
        far_sender.wait_for(lambda: taken)
    assert [Fate.CONFIRMED] == far_sender.wait([other])
    far_sender.publisher.hub.call(lambda: taken.append(far_sender.publisher.withdraw(other)))
    far_sender.wait_for(lambda: len(taken) == 2)
    assert [True, False] == taken
    assert None is held.fate
    assert [b"other"] == peer.bodies("box")


def test_a_message_in_doubt_is_not_taken_back_as_unsent(
    far_sender: Sender, proxy: Proxy, peer: Peer
) -> None:
    """It is not sent again, but nobody can say that it did not arrive."""
    peer.declare("box")
    far_sender.send(far_sender.make("box", b"first"))
    proxy.hold_answers()
    letter = far_sender.make("box", b"second")
    far_sender.start(letter)
    wait_until(lambda: peer.count("box") == 2)
    taken: list[bool] = []
    with proxy.outage():
        far_sender.wait_for(lambda: far_sender.connection.losses)
        far_sender.publisher.hub.call(lambda: taken.append(far_sender.publisher.withdraw(letter)))
        far_sender.wait_for(lambda: taken)
    proxy.release_answers()
    assert [False] == taken
    assert [Fate.CONFIRMED] == far_sender.send(far_sender.make("box", b"third"))
    assert [b"first", b"second", b"third"] == peer.bodies("box")


def test_a_sender_may_withdraw_others_when_it_hears_of_a_fate() -> None:
    """The deadlines of the rest are kept all the same."""
    with Sender(Settings((("127.0.0.1", 1),), "/", "guest", "guest"), grace=0) as sender:
        first, second, third = (sender.make("box", timeout=SOON) for _ in range(3))
        second.deadline = first.deadline
        third.deadline = first.deadline + SOON
        first.settled = lambda _first: sender.publisher.withdraw(second)
        sender.start(first, second, third)
        assert [Fate.UNSENT] == sender.wait([third])


# ------------------------------------------------------------------------------- the end


def test_a_close_waits_for_the_confirms(far_sender: Sender, proxy: Proxy, peer: Peer) -> None:
    """What is on its way arrives, and the close returns after that."""
    peer.declare("box")
    far_sender.send(far_sender.make("box"))
    proxy.hold_answers()
    letter = far_sender.make("box")
    far_sender.start(letter)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(far_sender.publisher.close, DEADLINE)
        wait_until(lambda: peer.count("box") == 2)
        assert None is letter.fate
        assert not closing.done()
        proxy.release_answers()
        closing.result(DEADLINE)
    assert Fate.CONFIRMED is letter.fate


def test_a_close_gives_up_after_its_grace(far_sender: Sender, proxy: Proxy, peer: Peer) -> None:
    """And says what is known of the rest."""
    peer.declare("box")
    far_sender.send(far_sender.make("box"))
    proxy.hold_answers()
    letters = [far_sender.make("box"), far_sender.make("box", exchange=LETTERS)]
    far_sender.start(*letters)
    far_sender.publisher.close(SOON)
    assert [Fate.UNKNOWN, Fate.UNSENT] == [letter.fate for letter in letters]
    assert isinstance(letters[1].error, ClosedError)
    proxy.release_answers()


def test_nothing_can_be_sent_after_the_close(sender: Sender) -> None:
    """It fails at once."""
    sender.send(sender.make("box"))
    sender.publisher.close(5.0)
    letter = sender.make("box")
    assert [Fate.UNSENT] == sender.send(letter)
    assert isinstance(letter.error, ClosedError)
    assert "closed" in repr(sender.publisher)


def test_a_closed_publisher_leaves_no_channel(
    node: Node, settings: Settings
) -> None:
    """Also if it was closed before its channel was there."""
    with Sender(settings) as sender, Sender(settings) as other:
        other.send(other.make("box"))
        sender.start(sender.make("box"))
        hub = sender.publisher.hub
        hub.wait(lambda: True, first=sender.publisher.shut)
        other.send(other.make("box"))
        wait_until(lambda: [1] == [each.channels for each in node.connections(settings.vhost)])


# ----------------------------------------------------------------- what can be encoded


def props(**properties: Any) -> pika.BasicProperties:
    return pika.BasicProperties(**properties)


@pytest.mark.parametrize("key", ["", "k" * 255, "é" * 127 + "k"])
def test_a_key_of_255_bytes_can_be_sent(key: str) -> None:
    """A short string of AMQP counts bytes."""
    check_encodable(key, props())


@pytest.mark.parametrize("key", ["k" * 256, "é" * 128])
def test_a_longer_key_cannot(key: str) -> None:
    """It would cost the channel."""
    with pytest.raises(EncodingError, match="is longer than 255 bytes"):
        check_encodable(key, props())


@pytest.mark.parametrize(
    "value",
    [
        "text",
        "",
        0,
        2**31 - 1,
        -(2**31),
        2**63 - 1,
        -(2**63),
        True,
        None,
        Decimal("1.50"),
        datetime(2026, 1, 1, tzinfo=timezone.utc),
        [1, "two", [3]],
        {"a": {"b": 1}},
    ],
)
def test_headers_of_amqp_types_can_be_sent(value: object) -> None:
    """And come out as they went in."""
    properties = props(headers={"value": value})
    check_encodable("key", properties)
    decoded = props()
    decoded.decode(b"".join(properties.encode()))
    expected = value.replace(tzinfo=None) if isinstance(value, datetime) else value
    found = decoded.headers["value"]
    assert expected == (found.replace(tzinfo=None) if isinstance(found, datetime) else found)


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"ratio": 0.5}, "header 'ratio' is the float 0.5"),
        ({"a": {"b": [1, {"c": 0.5}]}}, "header 'a.b.c' is the float 0.5"),
        ({"big": 2**63}, "header 'big' is 9223372036854775808"),
        ({"small": -(2**63) - 1}, "does not fit into 64 bits"),
        ({"thing": object()}, "cannot be encoded"),
        ({"n" * 256: 1}, "cannot be encoded"),
        ({"bad": "\ud800"}, "cannot be encoded"),
    ],
)
def test_headers_without_a_form_in_amqp_cannot(headers: dict[str, Any], words: str) -> None:
    """The error names the header where that is known."""
    with pytest.raises(EncodingError) as caught:
        check_encodable("key", props(headers=headers))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["message_id", "correlation_id", "app_id", "content_type"])
def test_properties_are_limited_to_255_bytes(name: str) -> None:
    """They are short strings, too."""
    check_encodable("key", props(**{name: "x" * 255}))
    with pytest.raises(EncodingError):
        check_encodable("key", props(**{name: "x" * 256}))


def test_a_key_that_is_no_unicode_is_refused() -> None:
    """As every other text that has no bytes."""
    with pytest.raises(EncodingError):
        check_encodable("\ud800", props())


def with_header_frame_of(size: int) -> pika.BasicProperties:
    """Properties whose header frame takes that many bytes."""
    properties = props(headers={"filler": ""})
    properties.headers["filler"] = "x" * (size - encoded_size(properties))
    assert size == encoded_size(properties)
    return properties


def test_the_largest_header_that_is_allowed_really_arrives(sender: Sender, peer: Peer) -> None:
    """And a longer one would cost the connection; RabbitMQ forgives the 8 bytes of the frame."""
    frame_max = 131_072
    properties = with_header_frame_of(frame_max)
    check_encodable("k" * 255, properties)
    with pytest.raises(EncodingError, match="a frame holds 131072"):
        check_encodable("k" * 255, with_header_frame_of(frame_max + 1))
    peer.declare("k" * 255)
    assert [Fate.CONFIRMED] == sender.send(
        sender.make("k" * 255, b"hello", headers=properties.headers)
    )
    assert 0 == sender.connection.losses
    [(found, _body)] = peer.fetch("k" * 255)
    assert properties.headers == found.headers
    too_much = with_header_frame_of(frame_max + 9).headers
    sender.start(sender.make("k" * 255, timeout=SOON, headers=too_much))
    sender.wait_for(lambda: sender.connection.losses)


def test_a_body_may_be_larger_than_a_frame(sender: Sender, peer: Peer) -> None:
    """It is divided."""
    peer.declare("box")
    body = bytes(range(256)) * 4096
    assert [Fate.CONFIRMED] == sender.send(sender.make("box", body))
    assert [body] == peer.bodies("box")


def test_a_publishing_shows_where_it_is() -> None:
    """The text form is for logs."""
    with Sender(Settings((("127.0.0.1", 1),), "/", "guest", "guest"), grace=0) as sender:
        letter = sender.make("box", exchange=LETTERS)
        assert "<Publishing to 'letters' key 'box' [on its way]>" == repr(letter)
        assert "<Publisher [without a channel, 0 held, 0 unconfirmed]>" == repr(sender.publisher)
        logging.getLogger(__name__).debug("%r", letter)
