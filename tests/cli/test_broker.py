# SPDX-License-Identifier: MIT
"""``postage broker``, as the process that people start."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from tests.programs import Program
from tests.waiting import wait_until


def start(*options: str, port: int = 0) -> Program:
    """Start a broker."""
    return Program(["-m", "postage", "broker", f"--port={port}", *options])


def url_of(broker: Program) -> str:
    """Return the URL that a broker says that it listens on."""
    match = re.fullmatch(r"listening on (\S+) \(.*\)", broker.wait_for_line("listening on"))
    assert match, broker.output
    return match[1]


@contextlib.contextmanager
def connected(url: str) -> Iterator[pika.BlockingConnection]:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        yield connection
    finally:
        with contextlib.suppress(pika.exceptions.AMQPError):  # the broker has ended
            connection.close()


def end(broker: Program, number: signal.Signals = signal.SIGTERM) -> None:
    """End a broker, which succeeds and says nothing about it."""
    broker.send_signal(number)
    assert 0 == broker.wait(), broker.output
    assert [] == broker.stderr


def failed(broker: Program) -> str:
    """Return the one line of a broker that failed."""
    with broker:
        assert 1 == broker.wait(), broker.output
        assert [] == broker.stdout
        [line] = broker.stderr
        return line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_listens_and_ends_with_a_signal(number: signal.Signals) -> None:
    """One line names the URL and where production belongs; SIGINT and SIGTERM end it well."""
    with start() as broker:
        url = url_of(broker)
        assert re.fullmatch(r"amqp://guest:guest@127\.0\.0\.1:\d+/%2F", url)
        with connected(url) as connection:
            connection.channel()
        end(broker, number)
        assert [
            f"listening on {url} (a broker for development: production belongs on RabbitMQ)"
        ] == broker.stdout


def test_its_end_closes_connections_in_good_order() -> None:
    """A client is told with connection.close and 320 that the broker ends."""
    with start() as broker, connected(url_of(broker)) as connection:
        broker.terminate()
        with pytest.raises(pika.exceptions.ConnectionClosedByBroker) as closed:
            while True:
                connection.process_data_events(time_limit=10)
        assert 320 == closed.value.reply_code
        assert 0 == broker.wait()


def test_a_second_signal_ends_it_at_once() -> None:
    """A client that does not answer delays the end, but not after a second signal."""
    with start() as broker:
        port = int(url_of(broker).partition("127.0.0.1:")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"AMQP\x00\x00\x09\x01")
            assert client.recv(8)  # connection.start, after which we say nothing more
            broker.send_signal(signal.SIGINT)
            wait_until(lambda: _is_ended(client), message="the broker has begun to end")
            with contextlib.suppress(ProcessLookupError):
                broker.send_signal(signal.SIGINT)
            assert broker.wait() in (0, -signal.SIGINT)
        assert [] == broker.stderr


def _is_ended(client: socket.socket) -> bool:
    client.settimeout(0.05)
    try:
        while True:
            data = client.recv(4096)
            if not data or b"CONNECTION_FORCED" in data:
                return True
    except TimeoutError:
        return False


def test_a_port_in_use_is_named_with_the_way_out() -> None:
    """The line names the address and the option that chooses another port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        line = failed(start(port=port))
    assert line.startswith(f"postage broker: the broker cannot listen on 127.0.0.1:{port} (")
    assert "address already in use" in line.lower()
    assert line.endswith("or choose another port (--port NUMBER)")


def test_it_can_be_started_again_on_its_port() -> None:
    """What is left of old connections does not keep the port from the next broker."""
    with start() as broker:
        url = url_of(broker)
        with connected(url) as connection:
            connection.channel()
            end(broker)
    with start(port=pika.URLParameters(url).port) as broker:
        assert url == url_of(broker)


def test_other_machines_need_a_password_of_their_own() -> None:
    """Whoever names another address must name users, too; guest is not let in there."""
    line = failed(start("--host=0.0.0.0"))
    assert line.endswith("password is not guest (--user NAME:PASSWORD or --users FILE)")
    with start("--host=0.0.0.0", "--user=dev:s3cret") as broker:
        url = url_of(broker)
        assert url.startswith("amqp://dev@0.0.0.0:")
        assert "s3cret" not in broker.output
        with connected(url.replace("dev@0.0.0.0", "dev:s3cret@127.0.0.1")) as connection:
            connection.channel()


def test_users_come_from_the_command_line_and_from_a_file(tmp_path: Path) -> None:
    """All of them are let in, with their passwords, and guest is not."""
    users = tmp_path / "users"
    users.write_text("# who works here\n\neve:pass:word\n")
    users.chmod(stat.S_IRUSR)
    with start("--user=adam:apple", f"--users={users}") as broker:
        url = url_of(broker)
        for login in ("adam:apple", "eve:pass%3Aword"):
            with connected(url.replace("adam@", f"{login}@")):
                pass
        with (
            pytest.raises(pika.exceptions.ProbableAuthenticationError),
            connected(url.replace("adam@", "guest:guest@")),
        ):
            pass


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--user=secret"], "argument --user: it must be of the form NAME:PASSWORD"),
        (["--user=:secret"], "argument --user: it must be of the form NAME:PASSWORD"),
        (["--user=a:secret", "--user=a:secret"], "the user 'a' is given twice"),
        (["--users=FILE"], "FILE, line 1: it must be of the form NAME:PASSWORD"),
        (["--port=65536"], "argument --port: it must be a whole number from 0 to 65535"),
        (["--port=five"], "argument --port: it must be a whole number from 0 to 65535"),
    ],
)
def test_wrong_usage_is_explained_without_passwords(
    options: list[str], text: str, tmp_path: Path
) -> None:
    """Such a start exits with 2; a damaged user is not shown, since it may be a password."""
    users = tmp_path / "users"
    users.write_text("secret\n")
    with start(*(option.replace("FILE", str(users)) for option in options)) as broker:
        assert 2 == broker.wait()
        assert broker.stderr[-1].endswith(text.replace("FILE", str(users)))
        assert "secret" not in broker.output


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        (None, 1, "cannot be read from FILE (No such file or directory)"),
        (b"\xff:x", 1, "cannot be read from FILE (it is not UTF-8)"),
        (b"# nobody\n", 2, "FILE names no user; write NAME:PASSWORD, one a line"),
    ],
)
def test_a_file_of_users_that_is_of_no_use_is_named(
    content: bytes | None, code: int, text: str, tmp_path: Path
) -> None:
    """The line names the file and the reason."""
    users = tmp_path / "users"
    if content is not None:
        users.write_bytes(content)
    with start(f"--users={users}") as broker:
        assert code == broker.wait()
        assert broker.stderr[-1].endswith(text.replace("FILE", str(users)))


def test_a_store_keeps_what_is_durable(tmp_path: Path) -> None:
    """A durable queue and its persistent message are there after the next start."""
    store = tmp_path / "broker.db"
    with start(f"--store={store}") as broker:
        assert f"what is durable is kept in {store}" in broker.wait_for_line("listening on")
        with connected(url_of(broker)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.queue_declare("kept", durable=True)
            channel.basic_publish("", "kept", b"me", pika.BasicProperties(delivery_mode=2))
        end(broker)
    with start(f"--store={store}") as broker, connected(url_of(broker)) as connection:
        assert b"me" == connection.channel().basic_get("kept", auto_ack=True)[2]


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """The line names the file."""
    store = tmp_path / "no-such-folder" / "broker.db"
    assert str(store) in failed(start(f"--store={store}"))


@pytest.mark.parametrize(("options", "code"), [([], None), (["--strict"], 541)])
def test_strict_mode_refuses_what_later_versions_refuse(
    options: list[str], code: int | None
) -> None:
    """A queue that is neither durable nor exclusive is refused with --strict only."""
    with start(*options) as broker, connected(url_of(broker)) as connection:
        answered = None
        try:
            connection.channel().queue_declare("transient", durable=False)
        except pika.exceptions.ConnectionClosedByBroker as error:
            answered = error.reply_code
        assert code == answered


def test_an_ignored_interrupt_stays_ignored() -> None:
    """A shell starts what is in the background of a script without SIGINT; that holds here, too."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "from postage.cli import main; sys.exit(main(['broker', '--port=0']))"
    )
    with Program(["-c", code]) as broker:
        url = url_of(broker)
        os.kill(broker.pid, signal.SIGINT)
        with connected(url) as connection:
            connection.channel()
        end(broker)
