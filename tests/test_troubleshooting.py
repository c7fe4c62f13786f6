# SPDX-License-Identifier: MIT
"""What the page for troubles quotes is what users see.

Each test provokes a trouble, and compares what is raised or logged with what stands under one
heading of the page, where ``...`` is anything. A quoted line counts only as a whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postage.broker import Broker
from postage.errors import PostageError
from postage.messaging import (
    DefaultExchange,
    Exchange,
    GenericConsumer,
    GenericProducer,
    MessageHandler,
    MessageProcessor,
    MessageResult,
    Queue,
    RpcHandler,
)
from postage.microthreads import sleep
from postage.retry import RetryPolicy
from tests.certificates import Certificates
from tests.nodes import Node
from tests.programs import ROOT, Program
from tests.programs_for_tests.components import Running, raw_channel, take
from tests.rabbitmq_node import RabbitNode
from tests.transport.proxy import Proxy
from tests.waiting import wait_until

PAGE = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")

_HEADING = re.compile(r"^#{2,3} (.+)$", re.MULTILINE)
_BLOCK = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)

#: What the page quotes under each heading, line by line.
QUOTED = {
    title: [line for block in _BLOCK.findall(body) for line in block.splitlines()]
    for title, body in zip(_HEADING.findall(PAGE), _HEADING.split(PAGE)[2::2], strict=True)
}

FINGERPRINT = {"name": "tested", "type": "application"}


class News(Exchange):
    """The exchange of these tests."""

    name = "news"


def missing(title: str, text: str) -> list[str]:
    """Return what the page quotes under a heading and the text does not say."""
    assert QUOTED[title], f"the page quotes nothing under {title!r}"
    return [
        line
        for line in QUOTED[title]
        if not re.search(".*".join(map(re.escape, line.split("..."))), text)
    ]


def assert_told(title: str, *texts: object) -> None:
    """Fail unless all that the page quotes under a heading is in one of the texts."""
    text = "\n".join(map(str, texts))
    assert [] == missing(title, text), text


def wait_until_told(title: str, caplog: pytest.LogCaptureFixture) -> None:
    """Wait until the log says all that the page quotes under a heading."""
    wait_until(
        lambda: not missing(title, "\n".join(caplog.messages)), message=f"{title!r} in the log"
    )


@pytest.fixture
def url(node: Node, broker_url: str) -> str:
    """The URL of an empty virtual host of a private broker."""
    return broker_url


@pytest.fixture
def vhost(url: str) -> str:
    return url.rsplit("/", 1)[1]


@pytest.fixture
def producer(url: str) -> Iterator[GenericProducer]:
    with GenericProducer(FINGERPRINT) as producer:
        yield producer


def eqk_of(queue: Any, exchange: type[Exchange] = DefaultExchange) -> list[Any]:
    return [(exchange, [(queue, "key")])]


def refused(
    queue: Any = "orders",
    hup: dict[str, Any] | None = None,
    *,
    exchange: type[Exchange] = DefaultExchange,
    timeout: float | None = None,
) -> PostageError:
    """Return the error of a consumer that cannot be made."""

    class Consumer(GenericConsumer):
        connect_timeout = timeout

    with pytest.raises(PostageError) as caught:
        Consumer(eqk_of(queue, exchange), hup)
    return caught.value


def login(node: Node, **entries: Any) -> dict[str, Any]:
    return {"host": "127.0.0.1", "port": node.port, "user": "guest", "password": "guest", **entries}


@contextlib.contextmanager
def stranger(node: RabbitNode, vhost: str, *permissions: str) -> Iterator[dict[str, Any]]:
    """A user with these permissions (configure, write, read), or none; yields the login."""
    node.ctl("add_user", "stranger", "pass")
    try:
        if permissions:
            node.ctl("set_permissions", "-p", vhost, "stranger", *permissions)
        yield login(node, user="stranger", password="pass")
    finally:
        node.delete_user("stranger")


@contextlib.contextmanager
def consuming(
    queue: Any, hup: dict[str, Any] | None = None, callback: Any = lambda *_: None
) -> Iterator[list[PostageError]]:
    """A consumer in a thread; yields the list that gets the error which ends it."""
    errors: list[PostageError] = []

    def run() -> None:
        try:
            consumer.start_consuming(callback)
        except PostageError as error:
            errors.append(error)

    with GenericConsumer(eqk_of(queue), hup) as consumer:
        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: consumer.subscriber.consuming or errors or hup)
        try:
            yield errors
        finally:
            consumer.stop_consuming()
            thread.join()


@contextlib.contextmanager
def rabbit_with(node: RabbitNode, **settings: int) -> Iterator[None]:
    """Change settings of RabbitMQ for what begins in the block."""
    before = {
        name: node.ctl("eval", f"application:get_env(rabbit, {name}, undefined).").strip()
        for name in settings
    }
    for name, value in settings.items():
        node.ctl("eval", f"application:set_env(rabbit, {name}, {value}).")
    try:
        yield
    finally:
        for name, old in before.items():
            node.ctl("eval", f"application:set_env(rabbit, {name}, {old}).")


@contextlib.contextmanager
def hanging_up() -> Iterator[int]:
    """A port that takes connections, and ends them without a word."""

    def run() -> None:
        with contextlib.suppress(OSError):  # shut down
            while True:
                listener.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextlib.contextmanager
def speaking_tls(certificates: Certificates, name: str) -> Iterator[int]:
    """A port that shows a certificate, and nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.pem(name), certificates.key(name))

    def run() -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:  # shut down
                return
            with client, contextlib.suppress(OSError):
                context.wrap_socket(client, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# ------------------------------------------------------------------------- the page itself


def test_each_text_of_the_page_is_provoked() -> None:
    """What is not provoked by a test stands in the table of other texts."""
    source = Path(__file__).read_text(encoding="utf-8")
    provoked = set(re.findall(r'told\(\s*"([^"]+)"', source))
    assert {title for title, lines in QUOTED.items() if lines} == provoked


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(#([^)]+)\)", PAGE))))
def test_a_link_within_the_page_leads_to_a_heading(target: str) -> None:
    """The symptoms lead to their sections."""
    # As Sphinx and GitHub make anchors of headings.
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in QUOTED}
    assert target in anchors


# --------------------------------------------------------------------------- no connection


def test_nothing_listens(caplog: pytest.LogCaptureFixture) -> None:
    """The port is closed."""
    refused(hup={"host": "127.0.0.1", "port": closed_port()}, timeout=3)
    assert_told("nothing listens there", *caplog.messages)


def test_a_wrong_password(url: str, node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """RabbitMQ's own words are in the log of pika."""
    error = refused(hup=login(node, password="wrong"))
    assert_told(
        "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN",
        error,
        *caplog.messages,
    )


def test_a_virtual_host_that_does_not_exist(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is in the error."""
    monkeypatch.setenv("POSTAGE_URL", url.rsplit("/", 1)[0] + "/nowhere")
    assert_told("NOT_ALLOWED - vhost not found", refused())


def test_a_virtual_host_without_permissions(
    rabbitmq_node: RabbitNode, broker_url: str
) -> None:
    """The user exists, and may do nothing there."""
    vhost = broker_url.rsplit("/", 1)[1]
    with stranger(rabbitmq_node, vhost) as hup:
        assert_told("NOT_ALLOWED - access to vhost refused for user", refused(hup=hup))


def test_limits_of_connections(rabbitmq_node: RabbitNode, broker_url: str) -> None:
    """Those of the virtual host, and those of the user."""
    vhost = broker_url.rsplit("/", 1)[1]
    limit = '{"max-connections": 0}'
    with stranger(rabbitmq_node, vhost, ".*", ".*", ".*") as hup:
        rabbitmq_node.ctl("set_user_limits", "stranger", limit)
        of_user = refused(hup=hup, timeout=3)
        rabbitmq_node.ctl("set_vhost_limits", "-p", vhost, limit)
        of_vhost = refused(timeout=3)
    assert_told("connection limit is reached", of_user, of_vhost)


def test_a_virtual_host_that_is_down(
    rabbitmq_node: RabbitNode, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ knows it, and could not start it."""
    vhost = broker_url.rsplit("/", 1)[1]
    rabbitmq_node.ctl("eval", f'rabbit_vhost_sup_sup:stop_and_delete_vhost(<<"{vhost}">>).')
    try:
        refused(timeout=3)
    finally:
        rabbitmq_node.ctl("restart_vhost", "-p", vhost)
    assert_told("INTERNAL_ERROR - vhost is down", *caplog.messages)


def test_a_broker_that_says_nothing(
    url: str, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """The system accepts the connection for it."""
    node.suspend()
    try:
        refused(hup=login(node, connect_timeout=0.5), timeout=3)
    finally:
        node.resume()
    assert_told("it did not answer in time", *caplog.messages)


def test_a_port_that_hangs_up() -> None:
    """Nobody knows why, so the error guesses."""
    with hanging_up() as port:
        error = refused(hup={"host": "127.0.0.1", "port": port}, timeout=3)
    assert_told("it closed the connection before a word of AMQP", error)


def test_troubles_with_tls(url: str, node: Node, tmp_path: Path) -> None:
    """No TLS there, a missing file, another CA, another name."""
    certificates = Certificates(tmp_path)
    certificates.make_ca("ca")
    certificates.make_ca("other-ca")
    certificates.make("broker", names="DNS:broker.example")

    def refused_by(port: int, ca: str) -> PostageError:
        hup = login(node, port=port, tls=True, tls_ca_file=certificates.pem(ca))
        return refused(hup=hup)

    errors = [refused_by(node.port, "ca"), refused_by(node.port, "none")]
    with speaking_tls(certificates, "broker") as port:
        errors += [refused_by(port, "ca"), refused_by(port, "other-ca")]
    assert_told("TLS errors", *errors)


# ------------------------------------------------------------------------------- declaring


def test_what_exists_with_other_arguments(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The type of a queue, a flag, an argument, the type of an exchange."""
    monkeypatch.setenv("POSTAGE_QUEUE_TYPE", "classic")
    GenericConsumer(eqk_of("orders")).close()
    monkeypatch.delenv("POSTAGE_QUEUE_TYPE")
    with raw_channel() as channel:
        channel.queue_declare("letters", auto_delete=True)
        channel.queue_declare("old", durable=True)
        channel.exchange_declare("news", "fanout")
        errors = [refused("orders"), refused("letters"), refused("old")]
        errors.append(refused("own", exchange=News))
    assert_told("PRECONDITION_FAILED - inequivalent arg", *errors)


def test_an_argument_that_a_queue_does_not_know(url: str) -> None:
    """A quorum queue has no priorities."""
    error = refused(Queue("orders", arguments={"x-max-priority": 5}))
    assert_told("PRECONDITION_FAILED - invalid arg", error)


def test_a_limit_of_queues(rabbitmq_node: RabbitNode, broker_url: str) -> None:
    """That of the virtual host."""
    vhost = broker_url.rsplit("/", 1)[1]
    rabbitmq_node.ctl("set_vhost_limits", "-p", vhost, '{"max-queues": 0}')
    assert_told("queue limit in vhost is reached", refused())


def test_a_passive_queue_that_does_not_exist(url: str) -> None:
    """It is only looked for."""
    assert_told("NOT_FOUND - no queue", refused(Queue("orders", passive=True)))


def test_a_passive_exchange_that_does_not_exist(url: str) -> None:
    """It is only looked for."""

    class Passive(Exchange):
        name = "orders"
        passive = True

    assert_told("NOT_FOUND - no exchange", refused(exchange=Passive))


def test_a_user_who_may_not_declare(rabbitmq_node: RabbitNode, broker_url: str) -> None:
    """Neither a queue nor an exchange."""
    vhost = broker_url.rsplit("/", 1)[1]
    with stranger(rabbitmq_node, vhost, "^$", "^$", "^$") as hup:
        errors = [refused(hup=hup), refused(hup=hup, exchange=News)]
    assert_told("ACCESS_REFUSED - access to queue refused for user", *errors)


def test_a_reserved_name(url: str) -> None:
    """Names of the broker's own."""
    error = refused(Queue("amq.orders"))
    assert_told("ACCESS_REFUSED - queue name contains reserved prefix", error)


def test_an_exclusive_queue_of_somebody_else(url: str) -> None:
    """Another connection has it."""
    with raw_channel() as channel:
        channel.queue_declare("orders", exclusive=True)
        error = refused(Queue("orders", exclusive=True))
    assert_told("RESOURCE_LOCKED - cannot obtain exclusive access to locked queue", error)


def test_an_exchange_of_an_unknown_type(url: str) -> None:
    """It costs the connection."""

    class Strange(Exchange):
        name = "strange"
        exchange_type = "x-nobody-knows-this"

    # RabbitMQ says "invalid" of a word that Erlang has never met, and "unknown" of others.
    error = str(refused(exchange=Strange)).replace("- invalid exchange", "- unknown exchange")
    assert_told("COMMAND_INVALID - unknown exchange type", error)


@pytest.mark.embedded
def test_a_transient_queue_in_strict_mode() -> None:
    """The embedded broker refuses it in the words of RabbitMQ 4.3."""
    with Broker(strict=True) as broker:
        hup = {"host": "127.0.0.1", "port": broker.port}
        error = refused({"name": "orders", "flags": {}}, hup)
    assert_told("INTERNAL_ERROR - Feature transient_nonexcl_queues is deprecated", error)


def test_a_queue_named_after_the_process(
    url: str, broker_kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each start leaves one behind. The warning comes once for a name."""
    with GenericConsumer(eqk_of(f"{broker_kind}-{os.getpid()}")):
        assert_told("is named after the process id and durable", *caplog.messages)


# ------------------------------------------------------------------------------- consuming


@pytest.mark.slow
def test_a_queue_in_exclusive_use(
    url: str, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """The new one says so, and waits for four heartbeats."""
    queue = {"name": "orders", "flags": {"durable": True}}
    with raw_channel() as channel:
        channel.queue_declare("orders", durable=True)
        channel.basic_consume("orders", lambda *_: None, exclusive=True)
        with consuming(queue, login(node, heartbeat=1)) as errors:
            wait_until(lambda: errors)
    assert_told("ACCESS_REFUSED - queue in exclusive use", *caplog.messages)


def test_a_handler_that_takes_too_long(
    rabbitmq_node: RabbitNode, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ looks once in channel_tick_interval."""
    limits = {"consumer_timeout": 500, "channel_tick_interval": 200}
    with (
        rabbit_with(rabbitmq_node, **limits),
        consuming("orders"),
        GenericProducer(FINGERPRINT) as producer,
    ):
        producer.message_wait(_queue="orders")
        wait_until_told("PRECONDITION_FAILED - delivery acknowledgement timed out", caplog)


def test_a_queue_that_is_deleted(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its consumer hears of it."""
    with consuming("orders"), raw_channel() as channel:
        channel.queue_delete("orders")
        wait_until_told("the broker cancelled consuming", caplog)


def test_messages_that_wait_for_a_handler(
    producer: GenericProducer, caplog: pytest.LogCaptureFixture
) -> None:
    """They were delivered ahead, and nobody began them."""
    with GenericConsumer(eqk_of(Queue("orders", exclusive=True))) as consumer:
        consumer.subscriber.unstarted_limit = 0.1
        producer.message_wait(_queue="orders")
        consumer.start()
        wait_until_told("waited for a handler and go back to their queue", caplog)


def test_a_message_that_is_skipped(
    producer: GenericProducer, caplog: pytest.LogCaptureFixture
) -> None:
    """It came by a queue of one instance."""
    with Running(Component(Queue("orders", exclusive=True))):
        producer.message_unheard_of(_queue="orders")
        wait_until_told("skipped: has no handler for it", caplog)


# -------------------------------------------------------------------- connections that go


def test_a_broker_that_is_stopped(
    url: str, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """It says goodbye to its clients."""
    with consuming(Queue("orders", exclusive=True)):
        node.stop()
        try:
            wait_until_told(
                "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'",
                caplog,
            )
        finally:
            node.start()


def test_a_connection_that_somebody_closes(
    url: str, vhost: str, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """Their words are told."""
    with consuming(Queue("orders", exclusive=True)):
        node.close_connections("Closed via management plugin", vhost)
        wait_until_told("CONNECTION_FORCED - Closed via management plugin", caplog)


@pytest.mark.slow
def test_a_broker_that_freezes(url: str, node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """Only the heartbeats tell."""
    with consuming(Queue("orders", exclusive=True), login(node, heartbeat=1)):
        node.suspend()
        try:
            wait_until_told("no heartbeat from the broker", caplog)
        finally:
            node.resume()


def test_a_network_that_cuts(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection is reset."""
    with Proxy(url) as proxy:
        monkeypatch.setenv("POSTAGE_URL", proxy.url)
        with consuming(Queue("orders", exclusive=True)):
            proxy.cut()
            wait_until_told("Connection reset by peer", caplog)


# ------------------------------------------------------------------------------ publishing


def error_of(producer: GenericProducer, *args: Any, **keywords: Any) -> PostageError:
    with pytest.raises(PostageError) as caught:
        producer.message_order(*args, **keywords)
    return caught.value


def test_a_message_that_no_queue_wants(producer: GenericProducer) -> None:
    """It is returned."""
    errors = [error_of(producer, _queue="nobody"), error_of(producer, _eks=[(News, "nobody")])]
    assert_told("no queue is bound to (NO_ROUTE, UnroutableError)", *errors)


def test_a_queue_that_is_full(producer: GenericProducer) -> None:
    """It takes nothing."""
    with GenericConsumer(
        eqk_of(Queue("orders", type="classic", max_length=0, overflow="reject-publish"))
    ):
        error = error_of(producer, _queue="orders")
    assert_told("the broker refused it (NackedError)", error)


def test_an_alarm_for_memory(
    producer: GenericProducer, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker notices the first message, and the second one waits."""
    with GenericConsumer(eqk_of(Queue("orders", exclusive=True))):
        producer.message_order(_queue="orders")
        with node.memory_alarm():
            producer.message_order(_queue="orders", _future=True)
            wait_until(lambda: any("blocks publishers" in each for each in caplog.messages))
            error = error_of(producer, _queue="orders", _timeout=0.5)
    assert_told("blocks publishers: low on memory", *caplog.messages, error)


def test_an_alarm_for_the_disk(
    rabbitmq_node: RabbitNode, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No disk has as much as is wanted."""
    with (
        GenericProducer(FINGERPRINT) as producer,
        GenericConsumer(eqk_of(Queue("orders", exclusive=True))),
    ):
        producer.message_order(_queue="orders")
        rabbitmq_node.ctl("set_disk_free_limit", "900000GB")
        try:
            producer.message_order(_queue="orders", _future=True)
            wait_until_told("blocks publishers: low on disk", caplog)
        finally:
            rabbitmq_node.ctl("set_disk_free_limit", "50MB")


def test_a_confirm_that_never_comes(producer: GenericProducer, node: Node) -> None:
    """The broker freezes."""
    with GenericConsumer(eqk_of(Queue("orders", exclusive=True))):
        producer.message_order(_queue="orders")
        node.suspend()
        try:
            error = error_of(producer, _queue="orders", _timeout=0.5)
        finally:
            node.resume()
    assert_told("written, and the confirm never came (PublishUnknownError)", error)


def test_a_message_without_a_broker() -> None:
    """Its time is over before there is one."""
    hup = {"host": "127.0.0.1", "port": closed_port()}
    with GenericProducer(FINGERPRINT, hup) as producer:
        error = error_of(producer, _queue="orders", _timeout=3)
    assert_told("certainly not sent, no connection in time (PublishTimeoutError)", error)


def test_a_user_who_may_not_write(rabbitmq_node: RabbitNode, broker_url: str) -> None:
    """Not even to the default exchange."""
    vhost = broker_url.rsplit("/", 1)[1]
    with (
        stranger(rabbitmq_node, vhost, "^$", "^$", "^$") as hup,
        GenericProducer(FINGERPRINT, hup) as producer,
    ):
        error = error_of(producer, _queue="orders")
    assert_told("ACCESS_REFUSED - access to exchange refused for user", error)


def test_a_message_that_is_too_large(rabbitmq_node: RabbitNode, broker_url: str) -> None:
    """RabbitMQ has a limit."""
    with (
        rabbit_with(rabbitmq_node, max_message_size=1000),
        GenericProducer(FINGERPRINT) as producer,
    ):
        error = error_of(producer, "x" * 2000, _queue="orders")
    assert_told("message size is larger than configured max size", error)


def test_headers_that_cannot_be_sent() -> None:
    """No broker is needed to see that."""
    with GenericProducer(FINGERPRINT) as producer:
        errors = [
            error_of(producer, _headers={"ratio": 0.5}),
            error_of(producer, _headers={"text": "x" * 140_000}),
        ]
    assert_told("EncodingError", *errors)


# ----------------------------------------------------------------------------------- calls


class Component(MessageProcessor):
    """A component with a handler of each kind of trouble."""

    retry = RetryPolicy(attempts=1)  # what fails is parked at once
    grace = 0.2

    def __init__(self, queue: Any) -> None:
        super().__init__(FINGERPRINT, eqk_of(queue))
        self.begun = False

    @MessageHandler("command", "fail")
    def msg_fail(self, content: Any) -> None:
        """Fail."""
        raise ValueError("an order without an item")

    @MessageHandler("command", "stay")
    def msg_stay(self, content: Any) -> Any:
        """Never end."""
        self.begun = True
        while True:
            yield sleep(0.05)

    @RpcHandler("command", "known")
    def rpc_known(self, content: Any, reply_func: Any) -> None:
        """Answer."""
        reply_func(MessageResult("here"))


def test_a_call_that_nobody_consumes(producer: GenericProducer) -> None:
    """The queue is there."""
    with GenericConsumer(eqk_of("orders")):
        reply = producer.rpc_known(_queue="orders", _timeout=20, _max_retry=0)
    assert "NoConsumer" == reply.value
    assert_told("NoConsumer", reply.message)


def test_a_call_that_nobody_answers(producer: GenericProducer) -> None:
    """Who consumes the queue takes no calls."""
    with consuming(Queue("orders", exclusive=True)):
        reply = producer.rpc_known(_queue="orders", _timeout=0.3, _max_retry=1)
    assert "TimeoutError" == reply.value
    assert_told("TimeoutError: no reply from exchange", reply.message)


def test_a_call_that_no_queue_is_bound_to(producer: GenericProducer) -> None:
    """It is returned."""
    replies = [producer.rpc_known(_queue="nobody"), producer.rpc_known(_eks=[(News, "nobody")])]
    assert_told("UnroutableError as a result", *[each.message for each in replies])


def test_a_call_without_a_handler(producer: GenericProducer) -> None:
    """The service says so."""
    with Running(Component(Queue("orders", exclusive=True))):
        reply = producer.rpc_unheard_of(_queue="orders", _timeout=20)
    assert_told("no handler for rpc", reply.message)


def test_a_reply_of_1_2_1(producer: GenericProducer, caplog: pytest.LogCaptureFixture) -> None:
    """It carries no correlation id."""
    with raw_channel() as channel:
        channel.queue_declare("orders", exclusive=True)
        producer.rpc_known(_queue="orders", _timeout=20, _future=True)
        [(request, _body)] = take(channel, "orders")
        channel.basic_publish("", request.reply_to, b"{}")
        wait_until_told("dropped a reply without a correlation id", caplog)


# ----------------------------------------------------------------------- messages that fail


def test_messages_that_are_parked(
    producer: GenericProducer, caplog: pytest.LogCaptureFixture
) -> None:
    """For each reason one line."""
    with Running(Component("orders")), raw_channel() as channel:
        producer.message_fail(_queue="orders")
        producer.message_unheard_of(_queue="orders")
        channel.basic_publish("", "orders", b"no JSON")
        wait_until_told("parked a message from", caplog)


def test_a_message_that_is_tried_again(
    producer: GenericProducer, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of them open the breaker."""
    component = type(
        "Component",
        (Component,),
        {"retry": RetryPolicy(attempts=2, delay=0.1), "breaker": 2},
    )
    with Running(component("orders")):
        producer.message_fail(_queue="orders")
        wait_until_told("attempt at a message failed, again in", caplog)
        wait_until_told("one message at a time, with pauses", caplog)


def test_a_message_that_cannot_be_parked(
    producer: GenericProducer, caplog: pytest.LogCaptureFixture
) -> None:
    """The error queue is another one."""
    queue = {"name": "orders", "flags": {"durable": True}}  # declares no error queue
    with raw_channel() as channel:
        channel.queue_declare("orders.error", durable=True)
        with Running(Component(queue)):
            producer.message_fail(_queue="orders")
            wait_until_told("could not park a message", caplog)


# -------------------------------------------------------------------- leaving and restarting


def test_new_code_with_a_mistake(producer: GenericProducer, tmp_path: Path) -> None:
    """The old one goes on."""
    script = tmp_path / "app.py"
    script.write_text(
        "from postage.messaging import DefaultExchange, MessageProcessor\n"
        "eqk = [(DefaultExchange, [('orders', 'orders')])]\n"
        "MessageProcessor({'name': 'orders'}, eqk).start_consuming()\n"
    )
    with Program([str(script)], env={"POSTAGE_DEBUG_MODE": "true"}) as program:
        program.wait_for_line("consuming queue")
        script.write_text("def broken(:\n")
        producer.message_restart(_queue="orders")
        program.wait_for_line("no restart")
        assert_told("no restart: the new code cannot be compiled", program.output)


def test_a_handler_that_does_not_end(
    producer: GenericProducer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its component leaves all the same."""
    with Running(component := Component("orders")):
        producer.message_stay(_queue="orders")
        wait_until(lambda: component.begun)
        component.stop_consuming()
        wait_until_told("did not end in time; it is delivered again", caplog)
