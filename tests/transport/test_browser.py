# SPDX-License-Identifier: MIT
"""Browsing a queue: everything is seen once, in order, and is back afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from postage.errors import ChannelClosedError, ConnectionFailedError, TransportError
from postage.settings import settings_for
from postage.transport import connection as connections
from postage.transport.browser import Browser
from postage.transport.connection import Connection
from tests.nodes import Node
from tests.parked import bodies, opened, ready
from tests.waiting import wait_until


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    """A channel of pika, with the queues q (classic) and q.error (quorum)."""
    with opened(broker_url) as channel:
        yield channel


@pytest.fixture
def connection(broker_url: str) -> Iterator[Connection]:
    """A connection for consuming."""
    connection = connections.acquire(settings_for(None, None), "consume")
    yield connection
    connections.release(connection)


def fill(channel: BlockingChannel, queue: str, number: int, first: int = 0) -> list[bytes]:
    """Publish numbers, and return their bodies."""
    numbers = [b"%d" % each for each in range(first, first + number)]
    for body in numbers:
        channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2))
    return numbers


def browse(connection: Connection, queue: str, page: int = 2000) -> Browser:
    return Browser(connection, queue, timeout=30.0, page=page)


@pytest.mark.parametrize("queue", ["q", "q.error"])
@pytest.mark.parametrize("page", [1, 7, 100])
def test_everything_is_seen_in_order_at_each_look(
    channel: BlockingChannel, connection: Connection, queue: str, page: int
) -> None:
    """However many consumers that takes, and whether or not it was seen before."""
    expected = fill(channel, queue, 128)
    with browse(connection, queue, page) as browser:
        assert (128, f"<Browser of {queue!r} [0 of 128]>") == (browser.count, repr(browser))
        assert expected == [browsed.body for browsed in browser]
    expected += fill(channel, queue, 2, first=128)
    for _ in range(2):
        with browse(connection, queue, page) as browser:
            assert expected[:1] == [next(iter(browser)).body]
    assert expected == bodies(channel, queue)


@pytest.mark.parametrize("queue", ["q", "q.error"])
def test_only_what_is_acknowledged_leaves(
    channel: BlockingChannel, connection: Connection, queue: str
) -> None:
    """And its place is free for further messages, so that pages go on."""
    expected = fill(channel, queue, 30)
    with browse(connection, queue, page=4) as browser:
        for browsed in browser:
            if int(browsed.body) % 3:
                browser.ack(browsed)
                assert ("", queue) == (browsed.exchange, browsed.routing_key)
    assert expected[::3] == bodies(channel, queue)


def test_what_comes_meanwhile_is_for_the_next_time(
    channel: BlockingChannel, connection: Connection
) -> None:
    """Else a look would never end where messages come back."""
    fill(channel, "q.error", 3)
    with browse(connection, "q.error") as browser:
        for browsed in browser:
            fill(channel, "q.error", 2)
            browser.ack(browsed)
    assert 6 == len(bodies(channel, "q.error"))


def test_it_is_all_back_when_the_look_is_over(
    channel: BlockingChannel, connection: Connection
) -> None:
    """A quorum queue counts again only a moment after its channel was closed."""
    fill(channel, "q.error", 500)
    for _ in range(5):
        with browse(connection, "q.error") as browser:
            assert 500 == browser.count


def test_what_others_take_meanwhile_is_not_waited_for(
    channel: BlockingChannel, connection: Connection
) -> None:
    """The queue is asked whether there is any more."""
    fill(channel, "q.error", 10)
    with browse(connection, "q.error", page=4) as browser:
        seen = 0
        for _ in browser:
            seen += 1
            if seen == 4:  # the next page is not yet asked for
                assert 6 == len(bodies(channel, "q.error"))
    assert 4 == seen
    wait_until(lambda: ready(channel, "q.error") == 4)


def test_a_queue_that_does_not_deliver_is_an_error(
    channel: BlockingChannel, connection: Connection
) -> None:
    """Such as one that another consumer has for itself."""
    channel.queue_declare("single", arguments={"x-single-active-consumer": True})
    fill(channel, "single", 3)
    channel.basic_qos(prefetch_count=1)
    channel.basic_consume("single", lambda *_args: None)
    wait_until(lambda: ready(channel, "single") == 2)

    with (
        pytest.raises(TransportError, match="another consumer may have it for itself"),
        Browser(connection, "single", timeout=0.5) as browser,
    ):
        list(browser)


@pytest.mark.parametrize("begun", [False, True])
def test_a_queue_that_is_not_there_is_an_error(
    channel: BlockingChannel, connection: Connection, begun: bool
) -> None:
    """From the beginning, or in the middle of it."""
    queue = "q" if begun else "nothing"
    fill(channel, "q", 3)
    with (
        pytest.raises(TransportError, match=r"was deleted|404"),
        browse(connection, queue, page=1) as browser,
    ):
        for _ in browser:
            channel.queue_delete("q")


def test_a_queue_of_somebody_else_is_an_error(
    channel: BlockingChannel, connection: Connection
) -> None:
    """The broker says so, and what we attempted is added."""
    channel.queue_declare("mine", exclusive=True)
    with (
        pytest.raises(ChannelClosedError, match="read queue 'mine': the broker answered 405"),
        browse(connection, "mine"),
    ):
        pass


def test_a_lost_connection_is_told_at_once(
    node: Node, broker_url: str, channel: BlockingChannel, connection: Connection
) -> None:
    """A second look of its own accord would see again what was dealt with."""
    fill(channel, "q.error", 10)
    vhost = broker_url.rsplit("/", 1)[1]
    with (
        pytest.raises(TransportError, match=r"closed the connection|connection was lost"),
        browse(connection, "q.error", page=1) as browser,
    ):
        for _ in browser:
            thread = threading.Thread(target=node.close_connections, args=("test", vhost))
            thread.start()
            thread.join()
    with opened(broker_url) as again:
        wait_until(lambda: ready(again, "q.error") == 10)


def test_an_ack_that_cannot_be_heard_is_an_error(
    node: Node, broker_url: str, channel: BlockingChannel, connection: Connection
) -> None:
    """The message may be there still."""
    fill(channel, "q.error", 2)
    vhost = broker_url.rsplit("/", 1)[1]
    with pytest.raises(TransportError), browse(connection, "q.error") as browser:
        for browsed in browser:
            node.close_connections("test", vhost)
            browser.ack(browsed)
    with opened(broker_url) as again:
        wait_until(lambda: ready(again, "q.error") == 2)


def test_without_a_broker_it_says_so_in_time() -> None:
    """Within the time that is given for the beginning."""
    connection = connections.acquire(settings_for({"host": "127.0.0.1:1"}, None), "consume")
    try:
        with (
            pytest.raises(ConnectionFailedError, match="nothing listens there"),
            Browser(connection, "q", timeout=0.3),
        ):
            pass
    finally:
        connections.release(connection)
