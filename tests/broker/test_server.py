# SPDX-License-Identifier: MIT
"""Starting and stopping the embedded broker, its address, and calls from other threads."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import pytest
from pika import spec

from postage.broker import Broker, BrokerError, StoreError
from postage.broker.connection import ROOM
from tests.broker import wire
from tests.broker.wire import RawClient, body, frame, header, method
from tests.programs import Program
from tests.rabbitmq_node import free_ports
from tests.waiting import wait_until


def is_listening(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=wire.PATIENCE).close()
    except ConnectionRefusedError:
        return False
    return True


def serves(url: str) -> bool:
    """Tell whether pika can declare, publish and get."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        queue = channel.queue_declare("", exclusive=True).method.queue
        channel.basic_publish("", queue, b"hello")
        answer: Any = channel.basic_get(queue, auto_ack=True)
        return bool(answer[2] == b"hello")


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the brokers that other tests keep for a while."""
    monkeypatch.setattr(f"{__name__}.OTHERS", set(threading.enumerate()))


#: Threads that were there before the test.
OTHERS: set[threading.Thread] = set()


def threads() -> list[str]:
    new = [each for each in threading.enumerate() if each not in OTHERS]
    return [each.name for each in new if each.name == "postage-broker"]


# Starting and stopping


def test_a_broker_runs_for_as_long_as_its_block() -> None:
    """In one thread of its own."""
    with Broker() as broker:
        assert serves(broker.url)
        assert ["postage-broker"] == threads()
        assert f"<Broker on 127.0.0.1:{broker.port}>" == repr(broker)
    assert not is_listening(broker.port)
    assert [] == threads()
    assert "<Broker stopped>" == repr(broker)


def test_starting_or_closing_again_changes_nothing() -> None:
    """Nor does closing what was never started."""
    broker = Broker()
    broker.close()
    broker.start()
    port = broker.port
    broker.start()
    assert (port, ["postage-broker"]) == (broker.port, threads())
    broker.close()
    broker.close()
    assert [] == threads()


def test_a_broker_starts_again_on_the_same_port() -> None:
    """So that clients which reconnect find it; what has no store is gone."""
    broker = Broker(vhosts=["/", "one"])
    for _ in range(5):
        with broker, pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
            channel = connection.channel()
            assert 0 == channel.queue_declare("q", durable=True).method.message_count
            channel.basic_publish("", "q", b"x", pika.BasicProperties(delivery_mode=2))
            ports = {broker.port}
    assert {broker.port} == ports


def test_many_brokers_run_side_by_side() -> None:
    """Each has a port and everything else of its own."""
    with contextlib.ExitStack() as stack:
        brokers = [stack.enter_context(Broker()) for _ in range(5)]
        brokers[0].add_vhost("first")
        assert 5 == len({broker.port for broker in brokers})
        for broker in brokers:
            assert serves(broker.url)
        with pytest.raises(BrokerError, match="there is no virtual host 'first'"):
            brokers[1].delete_vhost("first")


def test_a_port_can_be_chosen() -> None:
    """And is known before the broker starts."""
    (port,) = free_ports(1)
    broker = Broker(port=port)
    assert f"amqp://guest:guest@127.0.0.1:{port}/%2F" == broker.url
    with broker:
        assert serves(broker.url)


def test_a_port_in_use_is_named_and_the_ways_out(tmp_path: Path) -> None:
    """And nothing stays of the attempt: no thread, and no lock of the store."""
    with Broker() as first:
        second = Broker(port=first.port, store=tmp_path / "store")
        with pytest.raises(BrokerError) as caught:
            second.start()
        assert (
            f"the broker cannot listen on 127.0.0.1:{first.port} (Address already in use); stop "
            "what is there, or choose another port"
        ) == str(caught.value)
        assert ["postage-broker"] == threads()
        assert serves(first.url)
    with second:
        assert first.port == second.port
        assert serves(second.url)


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("127.0.0.1", 70_000, "port must be 0-65535"),
        ("127.0.0.1", -1, "port must be 0-65535"),
        ("192.0.2.1", 0, "192.0.2.1"),
        ("no.such.host.invalid", 0, ""),
    ],
)
def test_an_address_that_cannot_be_used_is_an_error(host: str, port: int, reason: str) -> None:
    """One that names the address."""
    with pytest.raises(BrokerError) as caught:
        Broker(host, port, users={"me": "secret"}).start()
    assert f"the broker cannot listen on {host}:{port} (" in str(caught.value)
    assert reason in str(caught.value)
    assert [] == threads()


def test_a_store_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    """The broker does not listen, and leaves no thread."""
    (tmp_path / "store").write_bytes(b"no store at all" * 1000)
    with pytest.raises(StoreError, match="is damaged, or no store at all"):
        Broker(store=tmp_path / "store").start()
    assert [] == threads()


# Who may come


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.1", "example.org", "127.0.0.1.x"])
def test_other_machines_are_not_let_in_with_the_password_that_all_know(host: str) -> None:
    """It is refused before anything listens."""
    with pytest.raises(BrokerError, match="give it users whose password is not guest"):
        Broker(host)
    with pytest.raises(BrokerError, match="give it users whose password is not guest"):
        Broker(host, users={"me": "secret", "you": "guest"})


def test_other_machines_are_let_in_with_a_password_of_its_own() -> None:
    """And no such password can be given to a user later."""
    with Broker("0.0.0.0", users={"me": "se/cret"}) as broker:
        assert f"amqp://me:se%2Fcret@0.0.0.0:{broker.port}/%2F" == broker.url
        assert serves(broker.url.replace("0.0.0.0", "127.0.0.1"))
        with pytest.raises(BrokerError, match="guest is not for a broker on 0"):
            broker.add_user("guest", "guest")
        broker.add_user("guest", "another")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_this_machine_has_many_names(host: str) -> None:
    """All of them are let in with any password."""
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with Broker(host) as broker:
        assert serves(broker.url)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_users_come_and_go() -> None:
    """Open connections stay, as with RabbitMQ; a password can be replaced."""
    with Broker() as broker:
        broker.add_user("é", "one:/@")
        url = broker.url.replace("guest:guest", "%C3%A9:one%3A%2F%40")
        with pika.BlockingConnection(pika.URLParameters(url)) as connection:
            broker.add_user("é", "two")
            with pytest.raises(pika.exceptions.ProbableAuthenticationError):
                serves(url)
            assert serves(url.replace("one%3A%2F%40", "two"))
            broker.delete_user("é")
            with pytest.raises(pika.exceptions.ProbableAuthenticationError):
                serves(url.replace("one%3A%2F%40", "two"))
            assert connection.channel().is_open
        with pytest.raises(BrokerError, match="there is no user 'é'"):
            broker.delete_user("é")


def test_virtual_hosts_come_and_go() -> None:
    """Making one that is there changes nothing; deleting one closes its connections."""
    with Broker() as broker:
        url = broker.add_vhost("a/b é")
        assert broker.url_of("a/b é") == url == broker.add_vhost("a/b é")
        assert url.endswith("/a%2Fb%20%C3%A9")
        connection = pika.BlockingConnection(pika.URLParameters(url))
        broker.delete_vhost("a/b é")
        with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="vhost 'a/b é' is dele"):
            connection.process_data_events(time_limit=wire.PATIENCE)
        with pytest.raises(pika.exceptions.ProbableAccessDeniedError, match="a/b é not found"):
            serves(url)
        assert serves(broker.url)


# Stopping with clients


def test_clients_are_told_when_the_broker_stops() -> None:
    """In the words of RabbitMQ; whoever answers does not hold it up."""
    with Broker() as broker:
        connection = pika.BlockingConnection(pika.URLParameters(broker.url))
        stopper = threading.Thread(target=broker.close)
        stopper.start()
        with pytest.raises(pika.exceptions.ConnectionClosedByBroker) as caught:
            connection.process_data_events(time_limit=wire.PATIENCE)
        stopper.join()
    assert (320, "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'") == (
        caught.value.reply_code,
        caught.value.reply_text,
    )


def test_clients_that_do_not_answer_are_cut_off() -> None:
    """Such that say nothing, such that do not read, and such that are in the midst of a frame."""
    with Broker() as broker, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(broker.port)) for _ in range(3)]
        clients[1].send(wire.HEADER)
        clients[2].send(wire.HEADER + wire.login()[:30])
        slow = stack.enter_context(RawClient.opened(broker.port))
        slow.open_channel()
        slow.ask(spec.Queue.Declare(queue="q"), spec.Queue.DeclareOk)
        slow.send(wire.message("q", bytes(ROOM)[:100_000]) * 200)
        slow.send(method(spec.Basic.Consume(queue="q"), 1) + header(5)[:9])
        broker.close()
        assert [] == threads()
        for client in clients:
            kinds = {type(each.method) for each in client.rest()}
            assert {spec.Connection.Start, spec.Connection.Close} >= kinds
        assert slow.rest()
    assert not is_listening(broker.port)


def test_a_broker_that_stalls_can_be_stopped() -> None:
    """The fault ends with it, and the next start is a healthy one."""
    with Broker() as broker:
        with broker.faults.stall():
            with RawClient(broker.port) as client:
                broker.close()
                assert [] == client.rest()
            broker.start()
            assert serves(broker.url)
        assert serves(broker.url)


def test_a_stop_in_the_midst_of_traffic_leaves_nothing() -> None:
    """Whatever its clients are doing."""
    with Broker() as broker:
        stop = threading.Event()

        def publish() -> None:
            while not stop.is_set():
                # Refused, or told that the broker stops, or cut off.
                refused = contextlib.suppress(OSError, AssertionError)
                with refused, RawClient.opened(broker.port) as client:
                    client.open_channel()
                    client.send(wire.message("none", bytes(10_000)) * 20)
                    client.ask(spec.Basic.Qos(), spec.Basic.QosOk)

        clients = [threading.Thread(target=publish) for _ in range(3)]
        for client in clients:
            client.start()
        for _ in range(3):
            broker.close()
            assert not is_listening(broker.port)
            broker.start()
            assert serves(broker.url)
        stop.set()
        for client in clients:
            client.join()


# Calls


def test_calls_before_the_start_and_after_the_end_are_errors() -> None:
    """They do not wait for a thread that is not there."""
    broker = Broker()
    for _ in range(2):
        for call in (
            lambda: broker.add_vhost("x"),
            lambda: broker.delete_vhost("/"),
            lambda: broker.add_user("x", "y"),
            lambda: broker.delete_user("guest"),
            broker.faults.drop,
            broker.faults.close_connections,
            lambda: broker.faults.cancel("q"),
        ):
            with pytest.raises(BrokerError, match="the broker does not run"):
                call()
        with broker:
            pass
    assert {"guest": "guest"} == broker._users


def test_calls_come_from_any_thread() -> None:
    """Each waits for its answer."""
    with Broker() as broker:

        def make(number: int) -> None:
            for each in range(20):
                broker.add_vhost(f"{number}-{each}")

        makers = [threading.Thread(target=make, args=(number,)) for number in range(8)]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join()
        assert 161 == broker._call(lambda server: len(server.node.vhosts))


def test_an_error_of_a_call_comes_back_to_the_caller() -> None:
    """And the broker goes on."""
    with Broker() as broker:
        with pytest.raises(ZeroDivisionError):
            broker._call(lambda server: 1 / 0)
        assert serves(broker.url)


def test_a_call_while_the_broker_stops_does_not_hang() -> None:
    """It is done, or it is an error."""
    for _ in range(20):
        broker = Broker()
        broker.start()
        outcomes: list[str] = []

        def call(broker: Broker = broker, outcomes: list[str] = outcomes) -> None:
            try:
                for number in range(1000):
                    broker.add_vhost(str(number))
            except BrokerError as error:
                outcomes.append(str(error))

        caller = threading.Thread(target=call)
        caller.start()
        broker.close()
        caller.join(wire.PATIENCE)
        assert not caller.is_alive()
        assert all("does not run" in text or "was stopped" in text for text in outcomes)


def test_a_broker_whose_thread_is_gone_says_so() -> None:
    """And can be closed, and started again."""
    with Broker() as broker:
        server = broker._server
        assert server is not None
        server.stop_soon()
        wait_until(lambda: not server.is_alive)
        with pytest.raises(BrokerError, match="the broker does not run in this process"):
            broker.add_vhost("x")
        broker.close()
        broker.start()
        assert serves(broker.url)


# What is forgotten


def test_a_broker_that_is_dropped_open_warns_and_ends() -> None:
    """Its thread must not keep it alive."""
    broker = Broker()
    broker.start()
    port = broker.port
    with pytest.warns(ResourceWarning, match="was dropped without close"):
        del broker
        gc.collect()
    wait_until(lambda: not threads())
    assert not is_listening(port)


def test_a_program_that_forgets_its_broker_ends_all_the_same() -> None:
    """With an exit code of its own."""
    source = "from postage.broker import Broker; b = Broker(); b.start(); print('end'); exit(3)"
    with Program(["-c", source]) as program:
        assert 3 == program.wait()
        assert ["end"] == program.stdout


@contextlib.contextmanager
def forked_child() -> Iterator[int]:
    """Fork a child that does nothing, which is killed at the end of the block."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.pause()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_connections_end_though_a_forked_child_has_their_sockets() -> None:
    """As pools of processes do: they live on when the test of the failure is made."""
    with Broker() as broker, RawClient.opened(broker.port) as client, forked_child():
        assert 1 == broker.faults.drop()
        assert [] == client.rest()
        with RawClient.opened(broker.port) as second:
            second.send(method(spec.Connection.Close(200, "bye", 0, 0)))
            assert 1 == len(second.rest())
        broker.close()
        assert not is_listening(broker.port)
        broker.start()
        assert serves(broker.url)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_cannot_use_the_broker_of_its_parent() -> None:
    """It says so, and closing it there does nothing."""
    with Broker() as broker:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                try:
                    broker.add_vhost("x")
                except BrokerError as error:
                    os.write(writing, str(error).encode())
                broker.close()
                os.write(writing, b", closed")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        text = os.read(reading, 1000).decode()
        os.close(reading)
        os.close(writing)
        assert "the broker does not run in this process; call start() first, closed" == text
        assert serves(broker.url)


# Writing


def test_a_client_that_reads_nothing_after_its_close_is_hung_up_on() -> None:
    """Its last words are not waited for beyond the stop of the broker."""
    with Broker() as broker, RawClient.opened(broker.port) as client:
        client.open_channel()
        client.ask(spec.Queue.Declare(queue="q"), spec.Queue.DeclareOk)
        client.send(wire.message("q", bytes(100_000)) * 50)
        client.send(method(spec.Basic.Consume(queue="q", no_ack=True), 1))
        wait_until(lambda: broker._call(_is_full))
        client.send(frame(9, 0, b"") + body(b"x"))
    wait_until(lambda: not threads())


def _is_full(server: Any) -> bool:
    return bool(sum(each._unwritten for each in server.node.connections) >= ROOM)


@pytest.mark.parametrize("options", [{"users": {}}, {"vhosts": ()}])
def test_a_broker_without_users_or_virtual_hosts_is_an_error(options: dict[str, Any]) -> None:
    """Nobody could do anything with it."""
    with pytest.raises(BrokerError, match="at least one user and one virtual host"):
        Broker(**options)


def test_a_connection_may_be_closed_with_a_code_that_nobody_knows() -> None:
    """Tests of clients want that, too."""
    with Broker() as broker, RawClient.opened(broker.port) as client:
        assert 1 == broker.faults.close_connections(799, "for a test")
        closed = client.expect(spec.Connection.Close)
        assert (799, "799 - for a test") == (closed.reply_code, closed.reply_text)
