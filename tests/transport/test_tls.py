# SPDX-License-Identifier: MIT
"""TLS: who is trusted, who is not, and what people are told about it."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from postage.errors import ConnectionFailedError, ConnectionLostError
from postage.messaging import DefaultExchange, GenericConsumer, GenericProducer
from postage.settings import Settings, TlsOptions
from postage.transport import connection as connections
from postage.transport.tls import Refusal, context_of, refusal_of
from tests.certificates import HERE, Certificates
from tests.docs.pages import run_page
from tests.programs import ROOT, Program
from tests.rabbitmq_node import HOST, RabbitNode, free_ports
from tests.transport.proxy import RESET
from tests.transport.test_connection import (
    NOWHERE,
    declaring,
    listener,
    open_up,
    settings_of,
    unused_port,
    using,
    wait_for,
)
from tests.waiting import wait_until

rabbitmq = pytest.mark.rabbitmq

#: Seconds after which an answer that has to come counts as missing.
DEADLINE = 60.0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Two CAs, and what they have signed for brokers and clients."""
    made = Certificates(tmp_path_factory.mktemp("certificates"))
    made.make_ca("ca")
    made.make_ca("other-ca")
    made.make("broker", names=HERE)
    made.make("elsewhere", names="DNS:broker.example")
    made.make("name", names="DNS:localhost")
    made.make("address", names="IP:127.0.0.1")
    made.make("expired", names=HERE, days=-1)
    made.make("client")
    made.make("old-client", days=-1)
    made.make("stranger", ca="other-ca")
    return made


class TlsNode(RabbitNode):
    """A node that also listens for TLS, and can change its certificate while it runs.

    Args:
        certificates: Where they are.
        wants_client: Whether a client must have one.
    """

    def __init__(self, certificates: Certificates, *, wants_client: bool) -> None:
        self._certificates = certificates
        [self.tls_port] = free_ports(1)
        shown = certificates.folder / f"shown-{self.tls_port}"
        self._shown = {"pem": f"{shown}.pem", "key": f"{shown}.key"}
        self._copy("broker")
        super().__init__(
            f"listeners.ssl.1 = {HOST}:{self.tls_port}",
            f"ssl_options.cacertfile = {certificates.pem('ca')}",
            f"ssl_options.certfile = {self._shown['pem']}",
            f"ssl_options.keyfile = {self._shown['key']}",
            "ssl_options.verify = verify_peer",
            f"ssl_options.fail_if_no_peer_cert = {str(wants_client).lower()}",
        )

    def show(self, name: str) -> None:
        """Show another certificate from now on."""
        self._copy(name)
        self.ctl("eval", "ssl:clear_pem_cache().")

    @contextlib.contextmanager
    def showing(self, name: str) -> Iterator[None]:
        """Show another certificate for as long as the block lasts."""
        self.show(name)
        try:
            yield
        finally:
            self.show("broker")

    def _copy(self, name: str) -> None:
        shutil.copy(self._certificates.pem(name), self._shown["pem"])
        shutil.copy(self._certificates.key(name), self._shown["key"])

    def tls_url(self, query: str = "", host: str = HOST) -> str:
        """Return the URL for TLS, with a query."""
        return f"amqps://guest:guest@{host}:{self.tls_port}/%2F?{query}"


@pytest.fixture(scope="module")
def node(
    rabbitmq_installed: None, certificates: Certificates, nodes: list[RabbitNode]
) -> Iterator[TlsNode]:
    """A node that asks clients for a certificate, and takes those without."""
    with TlsNode(certificates, wants_client=False) as node:
        nodes.append(node)
        yield node
        nodes.remove(node)


@pytest.fixture(scope="module")
def strict_node(
    rabbitmq_installed: None, certificates: Certificates, nodes: list[RabbitNode]
) -> Iterator[TlsNode]:
    """A node that takes no client without a certificate."""
    with TlsNode(certificates, wants_client=True) as node:
        nodes.append(node)
        yield node
        nodes.remove(node)


@pytest.fixture
def trusting(certificates: Certificates) -> str:
    """The query of a URL: the CA of the broker."""
    return f"cacertfile={certificates.pem('ca')}"


def showing(certificates: Certificates, name: str) -> str:
    """The query of a URL: who we are."""
    return f"&certfile={certificates.pem(name)}&keyfile={certificates.key(name)}"


def connects(url: str) -> bool:
    """Tell that an AMQP connection comes up."""
    with using(settings_of(url)) as connection:
        open_up(connection)
    return True


def refusal(url: str) -> str:
    """Return why no attempt can succeed, in words."""
    settings = settings_of(url)
    with using(settings) as connection, pytest.raises(ConnectionFailedError) as caught:
        connection.ask(declaring, None, "declare")  # would wait for ever, if it was tried again
    return reason_in(str(caught.value), settings)


def reason_in(text: str, settings: Settings) -> str:
    assert "\n" not in text
    assert text.startswith(f"no connection to {settings}: ")
    return text.removeprefix(f"no connection to {settings}: ")


def trouble(url: str, words: str) -> str:
    """Wait for words about what goes wrong again and again, and return the sentence."""
    settings = settings_of(url)
    heard: list[object] = []
    with using(settings) as connection:
        connection.hub.call(
            lambda: connection.probe(declaring, lambda *answer: heard.append(answer))
        )
        wait_until(lambda: words in connection.trouble(), DEADLINE, words)
        assert [] == heard  # it is tried again
        return reason_in(connection.trouble().removeprefix("; "), settings)


# --------------------------------------------------------------------------- coming up


@rabbitmq
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_broker_whose_ca_is_trusted_is_connected_to(
    node: TlsNode, trusting: str, host: str
) -> None:
    """The certificate is for the name and for the address; either will do."""
    assert connects(node.tls_url(trusting, host))


@rabbitmq
def test_a_message_goes_out_and_comes_in_over_tls(node: TlsNode, trusting: str) -> None:
    """Both connections of a process are encrypted, and the broker says how."""
    hup = {
        "host": f"{HOST}:{node.tls_port}",
        "tls": True,
        "tls_ca_file": trusting.partition("=")[2],
    }
    heard: list[bytes] = []
    eqk = [(DefaultExchange, [("letters", "letters")])]
    with GenericConsumer(eqk, hup, "/") as consumer, GenericProducer(hup=hup, vhost="/") as sender:
        sender.message_hello("world" * 100_000, _queue="letters")

        def stop(_subscriber: object, delivery: object, _properties: object, body: bytes) -> None:
            heard.append(body)
            consumer.stop_consuming()

        consumer.start_consuming(stop)
        assert 1 == len(heard)
        assert b"world" * 100_000 in heard[0]
        # Connections that were closed just now may still be listed.
        wait_until(
            lambda: ["tlsv1.3"] * 2 == node.ctl("list_connections", "ssl_protocol").split()[1:]
        )


@rabbitmq
def test_a_client_certificate_opens_the_door(
    strict_node: TlsNode, certificates: Certificates, trusting: str
) -> None:
    """Certificate and key, in two files."""
    assert connects(strict_node.tls_url(trusting + showing(certificates, "client")))


@rabbitmq
def test_a_key_may_be_in_the_file_of_the_certificate(
    strict_node: TlsNode, certificates: Certificates, trusting: str, tmp_path: Path
) -> None:
    """Then the key needs no setting."""
    both = tmp_path / "both.pem"
    names = (certificates.pem("client"), certificates.key("client"))
    both.write_text("".join(Path(name).read_text() for name in names))
    assert connects(strict_node.tls_url(f"{trusting}&certfile={both}"))


@rabbitmq
def test_a_key_may_have_a_password(
    strict_node: TlsNode, certificates: Certificates, trusting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password comes from a variable of its own."""
    key = certificates.encrypt_key("client", "sesame")
    monkeypatch.setenv("POSTAGE_URL", strict_node.tls_url())
    monkeypatch.setenv("POSTAGE_TLS_CA_FILE", certificates.pem("ca"))
    monkeypatch.setenv("POSTAGE_TLS_CERT_FILE", certificates.pem("client"))
    monkeypatch.setenv("POSTAGE_TLS_KEY_FILE", key)
    monkeypatch.setenv("POSTAGE_TLS_KEY_PASSWORD", "sesame")
    with using(Settings.from_environment()) as connection:
        open_up(connection)


@rabbitmq
def test_the_name_of_the_broker_can_be_said(node: TlsNode, trusting: str) -> None:
    """A broker that is reached by another name than its certificate is for."""
    with node.showing("elsewhere"):
        assert connects(node.tls_url(f"{trusting}&server_name_indication=broker.example"))


@rabbitmq
def test_verification_can_be_turned_off_and_the_log_says_so(
    node: TlsNode, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the CA nor the name is looked at; one warning a connection, not one an attempt."""
    settings = settings_of(node.tls_url("verify=verify_none"))
    with node.showing("elsewhere"), using(settings) as connection:
        open_up(connection)
        connection.hub.call(lambda: connection.abort(OSError("cut")))
        wait_for(connection, lambda: connection.losses)
        open_up(connection)
    told = [each.getMessage() for each in caplog.records if "not verified" in each.getMessage()]
    assert [f"the certificate of {settings} is not verified: whoever is in between can read and "
            "change everything, the password too"] == told  # fmt: skip


def test_settings_that_differ_in_tls_share_no_connection() -> None:
    """One of them may trust what the other does not."""
    ours = replace(NOWHERE, tls=True, tls_options=TlsOptions(ca_file="ours.pem"))
    theirs = replace(ours, tls_options=TlsOptions(ca_file="theirs.pem"))
    with using(ours) as one, using(replace(ours)) as same, using(theirs) as other:
        assert one is same
        assert one is not other


@rabbitmq
def test_the_page_about_tls_leads_to_a_connection(rabbitmq_installed: None, tmp_path: Path) -> None:
    """Its commands make certificates, and its lines a broker, that go together."""
    page = ROOT / "docs" / "how-to" / "tls.md"
    run_page(page, tmp_path)
    [lines] = re.findall(r"^```ini\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    [port] = free_ports(1)
    lines = lines.replace("/etc/rabbitmq/tls", str(tmp_path)).replace(
        "_cert = false", "_cert = true"
    )
    config = lines.replace("ssl.default = 5671", f"ssl.1 = {HOST}:{port}").splitlines()
    ours = f"certfile={tmp_path}/greeter.pem&keyfile={tmp_path}/greeter.key"
    with RabbitNode(*config):
        assert connects(f"amqps://{HOST}:{port}?cacertfile={tmp_path}/ca.pem&{ours}")


# --------------------------------------------------------------- refused, for good


@rabbitmq
def test_a_broker_of_another_ca_is_refused(node: TlsNode, certificates: Certificates) -> None:
    """The error names the file of the CA, and the variable to set; nothing is tried again."""
    other = certificates.pem("other-ca")
    assert (
        f"its certificate is not from a CA in {other} (self-signed certificate in certificate "
        "chain); set POSTAGE_TLS_CA_FILE to the CA of the broker"
    ) == refusal(node.tls_url(f"cacertfile={other}")).replace("self signed", "self-signed")


@rabbitmq
def test_without_a_ca_those_of_the_system_decide(node: TlsNode) -> None:
    """`amqps://` verifies by default."""
    actual = refusal(node.tls_url())
    assert actual.startswith("its certificate is not from a CA of this system (self")
    assert actual.endswith("set POSTAGE_TLS_CA_FILE to the CA of the broker")


@rabbitmq
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_broker_of_another_name_is_refused(node: TlsNode, trusting: str, host: str) -> None:
    """The error says which name was wanted."""
    with node.showing("elsewhere"):
        assert (
            f"its certificate is not for {host}; use a name that it is for, or set "
            "POSTAGE_TLS_SERVER_NAME"
        ) == refusal(node.tls_url(trusting, host))


@rabbitmq
def test_a_broker_that_wants_a_client_certificate_says_so(
    strict_node: TlsNode, trusting: str
) -> None:
    """With TLS 1.3 it says so only after the handshake, and the error says it all the same."""
    expected = "it wants a client certificate; set POSTAGE_TLS_CERT_FILE"
    assert expected == refusal(strict_node.tls_url(trusting))


@rabbitmq
def test_a_client_certificate_of_another_ca_is_refused(
    strict_node: TlsNode, certificates: Certificates, trusting: str
) -> None:
    """The error names our file."""
    assert (
        "it does not know the CA of our certificate; POSTAGE_TLS_CERT_FILE is "
        f"{certificates.pem('stranger')}"
    ) == refusal(strict_node.tls_url(trusting + showing(certificates, "stranger")))


@rabbitmq
def test_a_port_without_tls_is_refused(node: TlsNode, trusting: str) -> None:
    """An amqps URL at the port for amqp."""
    url = node.tls_url(trusting).replace(str(node.tls_port), str(node.port))
    expected = "it speaks no TLS there; use its port for TLS (5671 as a rule), or amqp://"
    assert expected == refusal(url)


@pytest.mark.parametrize("end", ["ca", "certificate", "key"])
def test_a_file_that_is_not_there_is_named(certificates: Certificates, end: str) -> None:
    """The error names the variable and the file, and does not wait for a broker."""
    files = {name: certificates.pem("client") for name in ("ca", "certificate")}
    files = {**files, "key": certificates.key("client"), end: "/nowhere/it.pem"}
    variable = {"ca": "CA", "certificate": "CERT", "key": "KEY"}[end]
    names = f"cacertfile={files['ca']}&certfile={files['certificate']}&keyfile={files['key']}"
    assert (
        f"POSTAGE_TLS_{variable}_FILE: /nowhere/it.pem cannot be read: No such file or directory; "
        "name a PEM file that this program may read"
    ) == refusal(f"amqps://{HOST}:{unused_port()}/?{names}")


def test_a_component_ends_at_once_over_a_file_that_is_not_there() -> None:
    """The last line on its standard error is that one line, without any secret."""
    code = "from postage.messaging import *; GenericConsumer([(DefaultExchange, [('q', 'q')])])"
    environment = {
        "POSTAGE_URL": "amqps://me:s3cret@127.0.0.1/",
        "POSTAGE_TLS_CERT_FILE": "/nowhere/it.pem",
        "POSTAGE_TLS_KEY_PASSWORD": "sesame",
    }
    with Program(["-c", code], env=environment) as component:
        assert 1 == component.wait(DEADLINE)
        assert component.stderr[-1].startswith(
            "postage.errors.ConnectionFailedError: no connection to amqps://me@127.0.0.1:5671/%2F: "
            "POSTAGE_TLS_CERT_FILE: /nowhere/it.pem cannot be read"
        )
        assert "sesame" not in component.output
        assert "s3cret" not in component.output


# ------------------------------------------------------- refused, until it is mended


@rabbitmq
def test_a_certificate_that_is_renewed_is_taken(
    node: TlsNode, trusting: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One that has expired is tried again, the log says so, and nobody need start us anew."""
    with using(settings_of(node.tls_url(trusting))) as connection:
        with node.showing("expired"):
            with pytest.raises(ConnectionFailedError, match="has expired: renew it at the broker"):
                connection.ask(declaring, 0.5, "declare")
            wait_for(connection, lambda: "has expired" in connection.trouble())
        connection.ask(declaring, DEADLINE, "declare")
    [told] = [each.getMessage() for each in caplog.records if "expired" in each.getMessage()
              and each.name == connections.__name__]  # fmt: skip
    assert told.endswith("if the clock here is right; trying again until it works")


@rabbitmq
def test_a_certificate_that_expires_while_we_run_is_told(
    node: TlsNode, trusting: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log of an outage does not end with its first line, if somebody has to act."""
    with using(settings_of(node.tls_url(trusting))) as connection:
        open_up(connection)
        with node.showing("expired"):
            connection.hub.call(lambda: connection.abort(OSError("cut")))
            wait_for(connection, lambda: "has expired" in connection.trouble())
        open_up(connection)
    ours = [each for each in caplog.records if each.name == connections.__name__]
    lost, expired = [each.getMessage() for each in ours if each.levelname == "WARNING"]
    assert "cut" in lost
    assert "its certificate has expired" in expired


@rabbitmq
def test_our_own_certificate_is_read_at_each_attempt(
    strict_node: TlsNode, certificates: Certificates, trusting: str, tmp_path: Path
) -> None:
    """One that has expired is renewed under the same name."""
    ours = {ending: tmp_path / f"ours.{ending}" for ending in ("pem", "key")}

    def renew(name: str) -> None:
        shutil.copy(certificates.key(name), ours["key"])
        shutil.copy(certificates.pem(name), ours["pem"])

    renew("old-client")
    url = strict_node.tls_url(f"{trusting}&certfile={ours['pem']}&keyfile={ours['key']}")
    with using(settings_of(url)) as connection:
        with pytest.raises(ConnectionFailedError):
            connection.ask(declaring, 0.1, "declare")
        wait_for(connection, lambda: "our certificate has expired" in connection.trouble())
        assert f"POSTAGE_TLS_CERT_FILE is {ours['pem']}" in connection.trouble()
        renew("client")
        connection.ask(declaring, DEADLINE, "declare")


@rabbitmq
def test_a_port_for_tls_is_suspected_when_amqp_is_not_answered(node: TlsNode) -> None:
    """RabbitMQ says nothing that could be read, so nobody is sure, and it is tried again."""
    url = node.url.replace(str(node.port), str(node.tls_port))
    assert (
        "it closed the connection before a word of AMQP; if that is a port for TLS, write amqps://"
    ) == trouble(url, "AMQP")


def test_a_broker_that_goes_away_in_the_handshake_is_tried_again() -> None:
    """As one does that ends, or a load balancer without a broker behind it."""

    def read_and_go(client: socket.socket) -> None:
        client.recv(4096)
        client.shutdown(socket.SHUT_RDWR)

    with listener(read_and_go) as port:
        expected = "the connection ended in the middle of the TLS handshake"
        assert expected == trouble(f"amqps://{HOST}:{port}", "handshake")


@pytest.mark.parametrize("is_known", [False, True], ids=["without", "with"])
def test_a_broker_that_goes_away_after_the_handshake_may_want_a_certificate(
    certificates: Certificates, trusting: str, is_known: bool
) -> None:
    """With TLS 1.3 the end of the connection may overtake the reason for it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.pem("broker"), certificates.key("broker"))

    def serve(client: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            context.wrap_socket(client.dup(), server_side=True) as us,
        ):
            us.recv(8)
            us.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()

    with listener(serve) as port:
        ours = showing(certificates, "client") if is_known else ""
        actual = trouble(f"amqps://{HOST}:{port}?{trusting}{ours}", "before a word of AMQP")
    assert is_known is not actual.endswith(
        "; it may want a client certificate: set POSTAGE_TLS_CERT_FILE"
    )


def test_a_broker_that_hangs_in_the_handshake_is_given_up() -> None:
    """The handshake is part of the time that an attempt may take."""
    with listener() as port:
        url = f"amqps://{HOST}:{port}?connection_timeout=0.2"
        assert "it did not answer in time" == trouble(url, "answer")


def test_a_broker_with_old_tls_only_is_refused(certificates: Certificates) -> None:
    """TLS 1.1 is not spoken."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.pem("broker"), certificates.key("broker"))
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(ssl.SSLError):
            context.wrap_socket(client.dup(), server_side=True).close()

    with listener(serve) as port:
        expected = "it offers no TLS 1.2 or later, and postage speaks nothing older"
        assert expected == refusal(f"amqps://{HOST}:{port}")


# ------------------------------------------------------------------- several hosts


@rabbitmq
def test_each_host_answers_for_its_own_name(
    node: TlsNode, strict_node: TlsNode, certificates: Certificates, trusting: str
) -> None:
    """A cluster whose nodes have a certificate each, for the name that each is reached by."""
    url = f"{node.tls_url(trusting + showing(certificates, 'client'), 'localhost')},"
    url += f"{HOST}:{strict_node.tls_port}"
    used: set[int] = set()
    with node.showing("name"), strict_node.showing("address"), using(settings_of(url)) as both:
        while len(used) < 2:  # the order is random
            both.ask(declaring, DEADLINE, "declare")
            assert both.amqp is not None
            used.add(both.amqp.params.port)
            both.hub.call(lambda: both.abort(OSError("next, please")))


@rabbitmq
def test_a_host_that_is_refused_does_not_keep_us_from_the_next(
    node: TlsNode, trusting: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong certificate is final for its host only, and the log names that host."""
    url = f"{node.tls_url(trusting, 'localhost')},{HOST}:{node.tls_port}"
    with node.showing("name"), using(settings_of(url)) as connection:
        while "is not for 127.0.0.1" not in caplog.text:  # the order is random
            connection.ask(declaring, DEADLINE, "declare")
            connection.hub.call(lambda: connection.abort(OSError("next, please")))
            wait_for(connection, lambda: connection.is_open)
    [told] = {each.getMessage() for each in caplog.records if "is not for" in each.getMessage()
              and each.name == connections.__name__}  # fmt: skip
    assert f": {HOST}:{node.tls_port}: its certificate is not for 127.0.0.1; use" in told


@rabbitmq
def test_hosts_that_are_all_refused_are_all_named(node: TlsNode, trusting: str) -> None:
    """Then there is nothing to wait for, and each has its reason."""
    url = f"{node.tls_url(trusting, 'localhost')},{HOST}:{node.port}"
    with node.showing("elsewhere"):
        actual = refusal(url)
    one = (
        f"localhost:{node.tls_port}: its certificate is not for localhost; use a name that it is "
        "for, or set POSTAGE_TLS_SERVER_NAME"
    )
    other = (
        f"{HOST}:{node.port}: it speaks no TLS there; use its port for TLS (5671 as a rule), or "
        "amqp://"
    )
    assert actual in (f"{one}; {other}", f"{other}; {one}")


@rabbitmq
def test_a_refused_host_beside_a_dead_one_is_no_reason_to_give_up(
    node: TlsNode, certificates: Certificates
) -> None:
    """The dead one may come back, and be the right one."""
    query = f"cacertfile={certificates.pem('other-ca')}"
    url = f"{node.tls_url(query)},{HOST}:{unused_port()}"
    actual = trouble(url, "not from a CA")
    settings = settings_of(url)
    with using(settings) as connection:
        with pytest.raises(ConnectionFailedError, match=r"declare: no connection to .* within 2 s"):
            connection.ask(declaring, 2, "declare")
        wait_for(connection, lambda: "nothing listens" in connection.trouble())
        wait_for(connection, lambda: "not from a CA" in connection.trouble())
    assert f"{HOST}:{node.tls_port}: its certificate" in actual


# ------------------------------------------------------------------------- contexts


def complaint(options: TlsOptions) -> str:
    with pytest.raises(ConnectionFailedError) as caught:
        context_of(options)
    assert "sesame" not in f"{caught.value} {options!r}"
    return str(caught.value)


def test_by_default_everything_is_verified() -> None:
    """The CAs are those of the system, and no version before 1.2 is spoken."""
    context = context_of(TlsOptions())
    assert ssl.CERT_REQUIRED is context.verify_mode
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_only_the_ca_that_is_named_is_trusted(certificates: Certificates) -> None:
    """Those of the system do not count beside it."""
    context = context_of(TlsOptions(ca_file=certificates.pem("ca")))
    [ca] = context.get_ca_certs()
    assert ((("commonName", "ca"),),) == ca["subject"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ca_file": "KEY"}, "CA_FILE: KEY contains no certificate in PEM form; name a file that"),
        ({"cert_file": "KEY"}, "CERT_FILE: KEY contains no certificate in PEM form"),
        ({"key_file": "PEM"}, "KEY_FILE: PEM contains no key in PEM form"),
        ({"key_file": None}, "CERT_FILE: PEM contains no key in PEM form"),
        ({"ca_file": "DAMAGED"}, "CA_FILE: DAMAGED is damaged ("),
        ({"key_file": "DAMAGED"}, "KEY_FILE: DAMAGED is damaged ("),
        ({"ca_file": "FOLDER"}, "CA_FILE: FOLDER cannot be read: Is a directory; name a PEM"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    certificates: Certificates, tmp_path: Path, change: dict[str, str | None], expected: str
) -> None:
    """The error says which setting names it, and what is wrong with it."""
    damaged = tmp_path / "damaged.pem"
    lines = [f"-----BEGIN {what}-----\nAAAA\n-----END {what}-----\n"
             for what in ("CERTIFICATE", "PRIVATE KEY")]  # fmt: skip
    damaged.write_text("".join(lines))
    names = {
        "KEY": certificates.key("client"),
        "PEM": certificates.pem("client"),
        "DAMAGED": str(damaged),
        "FOLDER": str(tmp_path),
    }
    options = TlsOptions(cert_file=names["PEM"], key_file=names["KEY"])
    actual = complaint(
        replace(options, **{key: name and names[name] for key, name in change.items()})
    )
    for short, long in names.items():
        actual = actual.replace(long, short)
    assert actual.startswith(f"POSTAGE_TLS_{expected}")


def test_a_key_that_does_not_fit_is_named(certificates: Certificates) -> None:
    """With the certificate that it does not fit."""
    pem, key = certificates.pem("client"), certificates.key("stranger")
    assert (
        f"the key in {key} does not fit the certificate in {pem}; set POSTAGE_TLS_KEY_FILE to the "
        "key that it was made with"
    ) == complaint(TlsOptions(cert_file=pem, key_file=key))


@pytest.mark.parametrize(
    ("password", "which"), [(None, "a"), ("sesame!", "another"), ("sesame" * 1000, "another")]
)
def test_a_key_without_its_password_is_named(
    certificates: Certificates, password: str | None, which: str
) -> None:
    """OpenSSL would ask on the terminal; no error shows the password."""
    pem, key = certificates.pem("client"), certificates.encrypt_key("client", "sesame")
    assert (f"the key in {key} needs {which} password; set POSTAGE_TLS_KEY_PASSWORD") == complaint(
        TlsOptions(cert_file=pem, key_file=key, key_password=password)
    )


# ---------------------------------------------------------------------------- words


def verification_error(code: int, message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, f"[SSL: CERTIFICATE_VERIFY_FAILED] {message}")
    error.verify_code, error.verify_message = code, message
    return error


def alert(name: str) -> ssl.SSLError:
    return ssl.SSLError(1, f"[SSL: {name}] {name.lower().replace('_', ' ')} (_ssl.c:1006)")


WITHOUT, WITH = TlsOptions(), TlsOptions(cert_file="us.pem")


@pytest.mark.parametrize(
    ("error", "options", "is_final", "words"),
    [
        (verification_error(9, "not yet"), WITHOUT, False, "its certificate is not valid yet: com"),
        (verification_error(10, "expired"), WITHOUT, False, "its certificate has expired: renew"),
        (verification_error(20, "no issuer"), WITHOUT, True, "its certificate is not from a CA of"),
        (verification_error(64, "IP"), WITHOUT, True, "its certificate is not for box; use a name"),
        (verification_error(26, "bad use"), WITHOUT, True, "its certificate is refused: bad use"),
        (alert("TLSV13_ALERT_CERTIFICATE_REQUIRED"), WITHOUT, True, "it wants a client certificat"),
        (alert("SSLV3_ALERT_BAD_CERTIFICATE"), WITHOUT, True, "it wants a client certificate; set"),
        (alert("SSLV3_ALERT_BAD_CERTIFICATE"), WITH, True, "it refuses our certificate; POSTAGE_T"),
        (alert("SSLV3_ALERT_HANDSHAKE_FAILURE"), WITHOUT, True, "it ended the TLS handshake; it m"),
        (alert("SSLV3_ALERT_HANDSHAKE_FAILURE"), WITH, False, "TLS failed: alert handshake failu"),
        (alert("SSLV3_ALERT_CERTIFICATE_EXPIRED"), WITH, False, "our certificate has expired: ren"),
        (alert("SSLV3_ALERT_CERTIFICATE_REVOKED"), WITH, True, "our certificate was revoked; POST"),
        (alert("TLSV1_ALERT_PROTOCOL_VERSION"), WITHOUT, True, "it offers no TLS 1.2 or later"),
        (alert("TLSV1_ALERT_INTERNAL_ERROR"), WITHOUT, False, "TLS failed: alert internal error"),
        (alert("UNEXPECTED_EOF_WHILE_READING"), WITH, False, "the connection ended in the middle"),
        (ssl.SSLEOFError(8, "EOF occurred"), WITH, False, "the connection ended in the middle of"),
    ],
)  # fmt: skip
def test_an_error_of_tls_says_who_has_to_do_what(
    error: ssl.SSLError, options: TlsOptions, is_final: bool, words: str
) -> None:
    """What only another setting mends is final; what the broker or a renewal mends is not."""
    actual = refusal_of(error, options, "box")
    assert isinstance(actual, Refusal)
    assert (is_final, True) == (actual.is_final, actual.words.startswith(words))
    assert "\n" not in actual.words


def test_pika_keeps_only_the_text_of_what_ends_the_login() -> None:
    """With TLS 1.3 the opinion of the broker about our certificate comes during the login."""
    text = repr(ConnectionLostError(repr(alert("TLSV1_ALERT_UNKNOWN_CA"))))
    actual = refusal_of(OSError(text), WITH, "box")
    words = "it does not know the CA of our certificate; POSTAGE_TLS_CERT_FILE is us.pem"
    assert Refusal(words, True) == actual


def test_other_errors_say_nothing_about_tls() -> None:
    """They are left to others."""
    assert None is refusal_of(ConnectionRefusedError(111, "refused"), WITHOUT, "box")
