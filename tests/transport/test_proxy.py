# SPDX-License-Identifier: MIT
"""The proxy fails as it is told, seen from both of its sides."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from tests.transport.proxy import HOST, Proxy, Way

#: Seconds until something that must come counts as missing.
DEADLINE_SECONDS = 10.0

#: Seconds for which something that must not come is looked for.
SILENCE_SECONDS = 0.2


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Stands where the broker would be."""
    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(DEADLINE_SECONDS)
        yield listener


@pytest.fixture
def proxy(listener: socket.socket) -> Iterator[Proxy]:
    with Proxy(f"amqp://guest:guest@{HOST}:{listener.getsockname()[1]}/") as proxy:
        yield proxy


@contextlib.contextmanager
def connected(proxy: Proxy, listener: socket.socket) -> Iterator[tuple[socket.socket, ...]]:
    """Yield the client's end and the broker's end of a connection."""
    with socket.create_connection((HOST, proxy.port), DEADLINE_SECONDS) as client:
        broker, _address = listener.accept()
        with broker:
            broker.settimeout(DEADLINE_SECONDS)
            yield client, broker


def is_silent(end: socket.socket) -> bool:
    """Tell whether nothing comes for a while, not even an end."""
    end.settimeout(SILENCE_SECONDS)
    try:
        end.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        end.settimeout(DEADLINE_SECONDS)
    return False


def test_both_ways_are_open_at_first(proxy: Proxy, listener: socket.socket) -> None:
    """Without a fault the proxy passes everything on, and the end of it."""
    with connected(proxy, listener) as (client, broker):
        client.sendall(b"request")
        assert b"request" == broker.recv(100)
        broker.sendall(b"answer")
        assert b"answer" == client.recv(100)
        client.close()

        assert b"" == broker.recv(100)


def test_a_cut_resets_both_ends(proxy: Proxy, listener: socket.socket) -> None:
    """Neither end is closed in good order."""
    with connected(proxy, listener) as (client, broker):
        proxy.cut()

        for end in (client, broker):
            with pytest.raises(ConnectionResetError):
                end.recv(100)


def test_held_answers_wait_and_requests_pass(proxy: Proxy, listener: socket.socket) -> None:
    """What the broker sends comes when it is released."""
    with connected(proxy, listener) as (client, broker):
        proxy.hold_answers()
        broker.sendall(b"answer")
        client.sendall(b"request")
        assert b"request" == broker.recv(100)
        assert is_silent(client)

        proxy.release_answers()

        assert b"answer" == client.recv(100)


def test_a_black_hole_passes_nothing_until_it_ends(proxy: Proxy, listener: socket.socket) -> None:
    """What was sent into it, and the end of a connection, come through afterwards."""
    with connected(proxy, listener) as (client, broker):
        with proxy.black_hole():
            client.sendall(b"request")
            client.close()
            assert is_silent(broker)
            with connected(proxy, listener) as (late_client, late_broker):
                late_client.sendall(b"late")
                assert is_silent(late_broker)

        assert b"request" == broker.recv(100)
        assert b"" == broker.recv(100)


@pytest.mark.parametrize("way", Way, ids=lambda way: way.name)
def test_a_half_closed_connection_ends_one_way_and_goes_on_the_other(
    proxy: Proxy, listener: socket.socket, way: Way
) -> None:
    """The one end sees the end of the connection, and the other one sees nothing at all."""
    with connected(proxy, listener) as (client, broker):
        sender, reader = (client, broker) if way is Way.REQUESTS else (broker, client)
        proxy.half_close(way)
        assert b"" == reader.recv(100)
        sender.sendall(b"nobody hears this")

        reader.sendall(b"still open")

        assert b"still open" == sender.recv(100)
        assert is_silent(sender)
        reader.close()
        assert b"" == sender.recv(100)


def test_a_delay_keeps_the_order_and_ends(proxy: Proxy, listener: socket.socket) -> None:
    """What is sent during a delay comes late, and before what is sent after it."""
    with connected(proxy, listener) as (client, broker):
        with proxy.delay(3 * SILENCE_SECONDS):
            client.sendall(b"one")
            assert is_silent(broker)
        client.sendall(b"two")
        client.close()

        received = b""
        while piece := broker.recv(100):
            received += piece
        assert b"onetwo" == received


def test_a_delay_does_not_wear_out_the_processor(proxy: Proxy, listener: socket.socket) -> None:
    """An end that was closed during a delay is not read again and again."""
    with connected(proxy, listener) as (client, broker), proxy.delay(3 * SILENCE_SECONDS):
        client.close()
        used = time.process_time()
        assert is_silent(broker)

        assert b"" == broker.recv(100)
        assert 2 * SILENCE_SECONDS > time.process_time() - used


def test_an_outage_refuses_connections_and_ends(proxy: Proxy, listener: socket.socket) -> None:
    """The port is closed for as long as the outage, and open again afterwards."""
    with connected(proxy, listener) as (client, _broker), proxy.outage():
        with pytest.raises(ConnectionResetError):
            client.recv(100)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, proxy.port), DEADLINE_SECONDS)

    with connected(proxy, listener) as (client, broker):
        client.sendall(b"again")
        assert b"again" == broker.recv(100)
