# SPDX-License-Identifier: MIT
"""Several hosts of one cluster: who is tried, when, and what is told if none is there."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from postage.errors import ConnectionFailedError
from postage.settings import Settings
from postage.transport.connection import Connection
from tests.embedded_node import EmbeddedNode
from tests.nodes import Node
from tests.rabbitmq_node import HOST, RabbitNode
from tests.transport.proxy import Proxy
from tests.transport.test_connection import (
    declaring,
    listener,
    open_up,
    unused_port,
    using,
    wait_for,
)

#: Seconds that an answer may take which has to come, also behind hosts that are slow to fail.
DEADLINE = 60.0


@pytest.fixture
def own_node(node: Node, nodes: list[Node]) -> Iterator[Node]:
    """A second node of the same kind, which may be killed."""
    with RabbitNode() if isinstance(node, RabbitNode) else EmbeddedNode() as own_node:
        nodes.append(own_node)
        yield own_node
        nodes.remove(own_node)


@pytest.fixture
def settings(broker_url: str) -> Settings:
    return Settings.from_environment()


def over(settings: Settings, *ports: int) -> Settings:
    """Return the settings with the ports as hosts; an attempt fails soon."""
    hosts = tuple((HOST, port) for port in ports)
    return replace(settings, hosts=hosts, connect_timeout=1.0)


def port_of(connection: Connection) -> int:
    """Return the port that the connection leads to, once it is there."""
    connection.ask(declaring, DEADLINE, "declare")
    assert connection.amqp is not None
    return int(connection.amqp.params.port)


@contextlib.contextmanager
def connected_to(port: int, settings: Settings) -> Iterator[Connection]:
    """A connection that has happened to choose a port: the order is random."""
    while True:
        with using(settings) as connection:
            if port == port_of(connection):
                yield connection
                return


def move(connection: Connection) -> None:
    """Have the connection lose its host, and look for one anew."""
    losses = connection.losses
    connection.hub.call(lambda: connection.abort(OSError("next, please")))
    wait_for(connection, lambda: connection.losses > losses)


def close_at_once(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_RDWR)


def answer_nonsense(client: socket.socket) -> None:
    client.recv(8)
    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    client.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def bad_host(serve: Callable[[socket.socket], object], tried: list[int]) -> Iterator[int]:
    """Yield the port of a host that is no broker, which notes that it was tried."""

    def note(client: socket.socket) -> None:
        tried.append(client.fileno())
        serve(client)

    with listener(note) as port:
        yield port


@pytest.mark.parametrize(
    "serve",
    [close_at_once, answer_nonsense, lambda client: None],
    ids=["closes at once", "answers nonsense", "hangs"],
)
def test_a_host_that_is_no_broker_is_passed_over(
    settings: Settings, serve: Callable[[socket.socket], object]
) -> None:
    """Whatever it does instead, the connection comes up with the other host."""
    tried: list[int] = []
    [(_, good)] = settings.hosts
    with bad_host(serve, tried) as bad, using(over(settings, bad, good)) as connection:
        while not tried:  # the order is random
            assert good == port_of(connection)
            move(connection)
        assert good == port_of(connection)


def test_a_lost_host_is_replaced_by_another_until_it_is_back(
    settings: Settings, broker_url: str
) -> None:
    """An outage of one host is none of the connection; after one of all, the first back is used."""
    with Proxy(broker_url) as one, Proxy(broker_url) as two:
        doors = {one.port: one, two.port: two}
        with using(over(settings, *doors)) as connection:
            first = port_of(connection)
            [second] = doors.keys() - {first}
            with doors[second].outage():
                with doors[first].outage():
                    wait_for(connection, lambda: len(connection._failures) == 2)
                assert first == port_of(connection)
            with doors[first].outage():
                assert second == port_of(connection)


def test_a_node_that_dies_is_left_for_another_and_used_again_when_it_is_back(
    settings: Settings, node: Node, own_node: Node
) -> None:
    """Two real nodes; who connects anew after the outage is spread over both."""
    both = replace(over(settings, node.port, own_node.port), vhost="/")
    with connected_to(own_node.port, both) as connection:
        own_node.kill()
        assert node.port == port_of(connection)
    own_node.start()
    with connected_to(own_node.port, both):
        pass


def test_many_programs_spread_over_the_hosts(settings: Settings, broker_url: str) -> None:
    """The first host of the list is not the one that everybody takes."""
    with Proxy(broker_url) as one, Proxy(broker_url) as two:
        while not (one.accepted and two.accepted):
            with using(over(settings, one.port, two.port)) as connection:
                open_up(connection)


def test_when_no_host_is_there_each_is_named_with_its_reason() -> None:
    """Those with the same reason are named together."""
    with listener(close_at_once) as silent:
        dead = [unused_port(), unused_port()]
        url = ",".join(f"{HOST}:{port}" for port in (*dead, silent))
        with using(Settings.from_environment({"POSTAGE_URL": url})) as connection:
            with pytest.raises(ConnectionFailedError):
                connection.ask(declaring, 0.1, "declare")
            wait_for(connection, lambda: len(connection._failures) == 3)
            [_, text] = connection.trouble().split(f"{connection.settings}: ")
    first, second = (f"{HOST}:{port}" for port in dead)
    groups = (f"{first}, {second}: nothing listens", f"{second}, {first}: nothing listens")
    assert any(group in text for group in groups)
    assert f"{HOST}:{silent}: it closed the connection before a word of AMQP" in text
