# SPDX-License-Identifier: MIT
"""Where the broker is, and that nobody gets to see its password."""

from __future__ import annotations

import os
import pprint
import traceback
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from postage.errors import ConfigurationError
from postage.settings import (
    Hup,
    HupFromEnvironment,
    Settings,
    TlsOptions,
    VhostFromEnvironment,
    adopt_on_mismatch,
    compat_from_environment,
    debug_mode_from_environment,
    queue_type_from_environment,
    settings_for,
)

LOCAL = Settings((("localhost", 5672),), "/", "guest", "guest")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the variables of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("POSTAGE_")]:
        monkeypatch.delenv(name)


def hosts_of(url: str, **variables: str) -> tuple[tuple[str, int], ...]:
    return Settings.from_environment({"POSTAGE_URL": url, **variables}).hosts


def complaint_about(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call(*args)
    return str(caught.value)


def complaint_about_url(url: str) -> str:
    return complaint_about(Settings.from_environment, {"POSTAGE_URL": url})


# ------------------------------------------------------------------ the environment


def test_without_variables_the_broker_is_a_local_one() -> None:
    """The defaults are those of a fresh RabbitMQ."""
    assert LOCAL == Settings.from_environment({})
    assert (60, 10.0, False) == (LOCAL.heartbeat, LOCAL.connect_timeout, LOCAL.tls)


def test_a_url_states_everything() -> None:
    """Every part of a URL is read, percent-encoded where need be."""
    url = "amqps://us%2Fer:p%40ss@box:5999/v%2Fhost?heartbeat=5&connection_timeout=2.5"

    expected = Settings((("box", 5999),), "v/host", "us/er", "p@ss", True, 5, 2.5)
    assert expected == Settings.from_environment({"POSTAGE_URL": url})


def test_the_variables_of_the_process_are_read_at_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A change of the environment is seen by the next call."""
    assert "/" == Settings.from_environment().vhost
    monkeypatch.setenv("POSTAGE_VHOST", "staging")
    assert "staging" == Settings.from_environment().vhost


def test_single_variables_state_everything_but_tls() -> None:
    """Without a URL there is a variable for each part."""
    variables = {
        "POSTAGE_HOST": "box",
        "POSTAGE_PORT": "5999",
        "POSTAGE_VHOST": "v%2F",
        "POSTAGE_USER": "me",
        "POSTAGE_PASSWORD": "p%40",
    }

    expected = Settings((("box", 5999),), "v%2F", "me", "p%40")
    assert expected == Settings.from_environment(variables)


@pytest.mark.parametrize("url", ["amqp://", "amqp:///", "amqp://@/", "amqp://:@", " , "])
def test_what_the_url_leaves_out_comes_from_the_variables(url: str) -> None:
    """A URL without a part, or with an empty one, does not state it."""
    variables = {"POSTAGE_HOST": "box:1,other", "POSTAGE_USER": "me", "POSTAGE_PASSWORD": "secret"}

    expected = Settings((("box", 1), ("other", 5672)), "/", "me", "secret")
    assert expected == Settings.from_environment({"POSTAGE_URL": url, **variables})


def test_what_the_url_states_beats_the_variables() -> None:
    """Each part is taken from the URL first."""
    variables = {
        "POSTAGE_HOST": "other",
        "POSTAGE_PORT": "1",
        "POSTAGE_VHOST": "other",
        "POSTAGE_USER": "other",
        "POSTAGE_PASSWORD": "other",
        "POSTAGE_URL": "amqp://me:secret@box:2/prod",
    }

    expected = Settings((("box", 2),), "prod", "me", "secret")
    assert expected == Settings.from_environment(variables)


def test_empty_variables_count_as_none() -> None:
    """A variable that is set to nothing changes nothing."""
    names = ["URL", "HOST", "PORT", "VHOST", "USER", "PASSWORD", "RMQ_USER", "RMQ_PASSWORD"]

    assert LOCAL == Settings.from_environment({f"POSTAGE_{name}": "" for name in names})


@pytest.mark.parametrize("part", ["user", "password"])
def test_the_deprecated_variables_are_read_with_a_warning(part: str) -> None:
    """POSTAGE_RMQ_USER and POSTAGE_RMQ_PASSWORD work, and the warning names the new variable."""
    name = part.upper()

    with pytest.warns(DeprecationWarning, match=f"POSTAGE_RMQ_{name} is .* set POSTAGE_{name}$"):
        actual = Settings.from_environment({f"POSTAGE_RMQ_{name}": "x", f"POSTAGE_{name}": ""})

    assert "x" == getattr(actual, part)


def test_the_new_variables_beat_the_deprecated_ones() -> None:
    """Where both are set, the old one is not looked at, and nothing is warned of."""
    variables = {"POSTAGE_USER": "new", "POSTAGE_RMQ_USER": "old"}

    assert "new" == Settings.from_environment(variables).user


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("box", [("box", 5672)]),
        ("box:1", [("box", 1)]),
        ("amqp://box", [("box", 5672)]),
        ("AMQPS://box", [("box", 5671)]),
        ("amqp://[::1]:1,[fe80::1%25eth0]", [("::1", 1), ("fe80::1%25eth0", 5672)]),
        ("amqps://me@a:1, b\n amqps://c/v,,d:2/v", [("a", 1), ("b", 5671), ("c", 5671), ("d", 2)]),
    ],
)
def test_a_url_may_be_several(url: str, expected: list[tuple[str, int]]) -> None:
    """Commas and blanks separate URLs and plain hosts; a port that is missing is the scheme's."""
    assert tuple(expected) == hosts_of(url)


def test_a_host_without_a_port_gets_the_port_of_the_variable() -> None:
    """POSTAGE_PORT beats the default port, also for hosts of the URL."""
    assert (("a", 1), ("b", 5999)) == hosts_of("amqps://a:1,b", POSTAGE_PORT="5999")


@pytest.mark.parametrize(
    ("one", "other", "part"),
    [
        ("amqp://a", "amqps://b", "scheme"),
        ("amqp://me@a", "amqp://you@b", "user"),
        ("amqp://me:x@a", "amqp://me:y@b", "password"),
        ("amqp://a/x", "b/y", "vhost"),
        ("a?heartbeat=1", "b?heartbeat=2", "heartbeat"),
        ("amqps://a?cacertfile=x", "b?cacertfile=y", "cacertfile"),
    ],
)
def test_several_urls_must_agree(one: str, other: str, part: str) -> None:
    """Independent brokers are not one setting, and the error names what differs."""
    actual = complaint_about_url(f"{one} {other}")

    assert actual.startswith(f"POSTAGE_URL, entry 2 states another {part} than an entry before it")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("", "/"), ("/", "/"), ("/%2F", "/"), ("/%2f", "/"), ("/a", "a"), ("/%2Fa%20b", "/a b")],
)
def test_a_virtual_host_is_one_segment_of_the_path(path: str, expected: str) -> None:
    """An empty path states none, and a slash in the name is encoded."""
    assert expected == Settings.from_environment({"POSTAGE_URL": f"amqp://box{path}"}).vhost


@pytest.mark.parametrize(
    "url",
    [
        "http://box",
        "amqp:/box",
        "amqp:box",
        "amqp://box:",
        "amqp://box:amqp",
        "amqp://box:123456",
        "amqp://:5672",
        "amqp://::1",
        "amqp://box/a/b",
        "amqp://box/a/",
        "amqp://box/a@b",
        "amqp://box#fragment",
        "amqp://me:secret@bo@x:y/",
        "me:secret@box",
        "/vhost",
        "?heartbeat=1",
    ],
)
def test_a_damaged_url_is_refused(url: str) -> None:
    """What is no URL and no host is described by its place, with the form that it needs."""
    expected = "POSTAGE_URL, entry 2 is damaged. Write amqp://user:password@host:port/vhost or "

    assert complaint_about_url(f"box,{url}").startswith(expected)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("amqp://box:0", "POSTAGE_URL, entry 1, port must be a whole number from 1 to 65535"),
        ("box:65536", "POSTAGE_URL, entry 1, port must be a whole number from 1 to 65535"),
        ("box?heartbeat=", "POSTAGE_URL, entry 1, heartbeat must be whole seconds, from 0"),
        ("box?heartbeat=1.5", "POSTAGE_URL, entry 1, heartbeat must be whole seconds, from 0"),
        ("box?heartbeat=-1", "POSTAGE_URL, entry 1, heartbeat must be whole seconds, from 0"),
        ("box?connection_timeout=0", "POSTAGE_URL, entry 1, connection_timeout must be seconds"),
        ("box?connection_timeout=nan", "POSTAGE_URL, entry 1, connection_timeout must be seconds"),
        ("box?connection_timeout=inf", "POSTAGE_URL, entry 1, connection_timeout must be seconds"),
        ("box?ssl=1", "POSTAGE_URL, entry 1: parameter 'ssl' is unknown; there are heartbeat, "),
        ("amqps://box?cacertfile=", "POSTAGE_URL, entry 1, cacertfile is empty; leave it out"),
        ("amqps://box?certfile=%FF", "POSTAGE_URL, entry 1, certfile is not percent-encoded"),
        ("amqps://box?verify=no", "POSTAGE_URL, entry 1, verify must be verify_peer (the default)"),
        (
            "amqps://box?keyfile=x",
            "POSTAGE_TLS_KEY_FILE needs a certificate: POSTAGE_TLS_CERT_FILE",
        ),
        ("amqp://me:%FF@box", "POSTAGE_URL, entry 1, password is not percent-encoded UTF-8"),
    ],
)
def test_a_part_that_makes_no_sense_is_named(url: str, expected: str) -> None:
    """The error names the variable, the entry and the part."""
    assert complaint_about_url(url).startswith(expected)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("POSTAGE_PORT", "amqp", "POSTAGE_PORT must be a whole number from 1 to 65535"),
        ("POSTAGE_HOST", "amqp://b", "POSTAGE_HOST, entry 1 is not of the form host or host:port"),
        ("POSTAGE_HOST", "a,b:x", "POSTAGE_HOST, entry 2 is not of the form host or host:port"),
        ("POSTAGE_HOST", " , ", "POSTAGE_HOST names no host"),
        ("POSTAGE_TLS_VERIFY", "0", "POSTAGE_TLS_VERIFY must be verify_peer (the default) or ver"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(name: str, value: str, expected: str) -> None:
    """The error begins with the name of the variable."""
    assert complaint_about(Settings.from_environment, {name: value}).startswith(expected)


# ------------------------------------------------------------------------------ TLS

#: Every option, in all three forms.
TLS = TlsOptions("ca.pem", "us.pem", "us.key", "sesame", "broker", verify=False)
TLS_VARIABLES = {
    "POSTAGE_TLS_CA_FILE": "ca.pem",
    "POSTAGE_TLS_CERT_FILE": "us.pem",
    "POSTAGE_TLS_KEY_FILE": "us.key",
    "POSTAGE_TLS_KEY_PASSWORD": "sesame",
    "POSTAGE_TLS_SERVER_NAME": "broker",
    "POSTAGE_TLS_VERIFY": "verify_none",
}
TLS_QUERY = (
    "cacertfile=ca.pem&certfile=us.pem&keyfile=us.key&server_name_indication=broker"
    "&verify=verify_none"
)
TLS_HUP = {
    "tls": True,
    "tls_ca_file": "ca.pem",
    "tls_cert_file": "us.pem",
    "tls_key_file": "us.key",
    "tls_key_password": "sesame",
    "tls_server_name": "broker",
    "tls_verify": False,
}


def test_a_certificate_is_verified_unless_told_otherwise() -> None:
    """`amqps://` alone trusts the CAs of the system, and wants the name of each host."""
    expected = TlsOptions(None, None, None, None, None, verify=True)
    assert expected == Settings.from_environment({"POSTAGE_URL": "amqps://box"}).tls_options


def test_tls_options_have_variables() -> None:
    """They hold for whatever is encrypted; empty ones count as none."""
    variables = {"POSTAGE_URL": "amqps://", **TLS_VARIABLES}
    assert TLS == Settings.from_environment(variables).tls_options
    empty = dict.fromkeys(TLS_VARIABLES, "")
    assert TlsOptions() == Settings.from_environment({**variables, **empty}).tls_options


def test_tls_options_can_be_in_the_url() -> None:
    """Under the names of RabbitMQ's URLs; the password of a key has a variable only."""
    settings = Settings.from_environment(
        {"POSTAGE_URL": f"amqps://box?{TLS_QUERY}", "POSTAGE_TLS_KEY_PASSWORD": "sesame"}
    )
    assert TLS == settings.tls_options


def test_tls_options_can_be_in_a_hup(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are called like the variables, and win over them."""
    monkeypatch.setenv("POSTAGE_TLS_CA_FILE", "other.pem")
    assert TLS == settings_for(TLS_HUP, None).tls_options


def test_a_file_may_have_any_name() -> None:
    """A plus is a plus, and what is special in a URL is percent-encoded."""
    url = "amqps://box?cacertfile=/my+certs/a%20b%26c%2C%40.pem&verify=verify_peer"
    options = Settings.from_environment({"POSTAGE_URL": url}).tls_options
    assert TlsOptions(ca_file="/my+certs/a b&c,@.pem") == options


@pytest.mark.parametrize("url", ["", "amqp://box", f"amqp://box?{TLS_QUERY}"])
def test_who_sets_up_tls_is_not_sent_in_the_clear(url: str) -> None:
    """The scheme was forgotten, perhaps: nobody may guess which of both is meant."""
    actual = complaint_about(
        Settings.from_environment, {"POSTAGE_URL": url, "POSTAGE_TLS_CA_FILE": "ca.pem"}
    )
    assert "POSTAGE_TLS_CA_FILE" in actual
    assert actual.startswith("TLS is off, and these are set for it: POSTAGE_TLS_")
    assert actual.endswith("; begin POSTAGE_URL with amqps://, or give a hup tls=True")


def test_a_hup_without_tls_wants_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so explicitly, so the variables are for other connections."""
    for name, value in TLS_VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("POSTAGE_URL", "amqps://box")
    assert LOCAL == settings_for({"tls": False, "host": "localhost"}, None)


def test_the_password_of_a_key_is_not_shown() -> None:
    """Neither in settings nor in options."""
    settings = Settings.from_environment({"POSTAGE_URL": "amqps://", **TLS_VARIABLES})
    assert "sesame" not in f"{settings} {settings!r} {settings.tls_options}"


# ---------------------------------------------------------------------- the values


def test_equal_settings_are_one_key() -> None:
    """Settings can be compared and used as a key, and the password counts."""
    same = Settings((("localhost", 5672),), "/", "guest", "guest")

    assert {LOCAL: 1} == {same: 1}
    assert LOCAL != Settings((("localhost", 5672),), "/", "guest", "other")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LOCAL, "amqp://guest@localhost:5672/%2F"),
        (
            Settings((("a", 1), ("::1", 2)), "v/w x", "m@e", "secret", tls=True),
            "amqps://m%40e@a:1,[::1]:2/v%2Fw%20x",
        ),
    ],
)
def test_settings_read_like_a_url_without_password(settings: Settings, expected: str) -> None:
    """str() is fit for logs, and can be given to POSTAGE_URL with the password beside it."""
    assert expected == str(settings)
    assert settings == Settings.from_environment(
        {"POSTAGE_URL": expected, "POSTAGE_PASSWORD": settings.password}
    )


# ---------------------------------------------------------------------------- hup


def test_a_hup_without_entries_is_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None and an empty dict leave everything to the environment."""
    monkeypatch.setenv("POSTAGE_URL", "amqps://me:secret@box/prod")

    assert Settings.from_environment() == settings_for(None, None)
    assert Settings.from_environment() == settings_for({}, "")


def test_a_hup_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry of the dict, and the virtual host, wins."""
    monkeypatch.setenv("POSTAGE_URL", "amqp://me:secret@box:1/prod?heartbeat=1")
    hup = {
        "host": "a, b:3",
        "user": "you",
        "password": "pass",
        "port": 2,
        "tls": True,
        "heartbeat": 0,
        "connect_timeout": 1,
    }

    expected = Settings((("a", 2), ("b", 3)), "dev", "you", "pass", True, 0, 1.0)
    assert expected == settings_for(hup, "dev")


def test_what_a_hup_lacks_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dict of 1.2.1 has three entries; port, TLS and heartbeat follow the environment."""
    monkeypatch.setenv("POSTAGE_URL", "amqps://me:secret@box:1/prod?heartbeat=7")

    expected = Settings((("other", 5671),), "prod", "me", "secret", True, 7)
    assert expected == settings_for({"host": "other"}, None)


@pytest.mark.parametrize(
    ("hup", "expected"),
    [
        (
            {"hots": "box"},
            "hup['hots'] is unknown; the keys are host, user, password, tls, tls_ca_",
        ),
        ({"host": None}, "hup['host'] must be of type str, and is NoneType"),
        ({"host": ""}, "hup['host'] names no host; leave it out"),
        ({"host": "amqp://box"}, "hup['host'], entry 1 is not of the form host or host:port"),
        ({"host": "box:0"}, "hup['host'], entry 1, port must be a whole number from 1"),
        ({"user": 1}, "hup['user'] must be of type str, and is int"),
        ({"password": b"secret"}, "hup['password'] must be of type str, and is bytes"),
        ({"tls": 1}, "hup['tls'] must be of type bool, and is int"),
        ({"tls_verify": "no"}, "hup['tls_verify'] must be of type bool, and is str"),
        ({"tls_ca_file": None}, "hup['tls_ca_file'] must be of type str, and is NoneType"),
        ({"port": "5672"}, "hup['port'] must be a whole number from 1 to 65535"),
        ({"port": True}, "hup['port'] must be a whole number from 1 to 65535"),
        ({"heartbeat": 1.5}, "hup['heartbeat'] must be whole seconds, from 0 to 65535"),
        ({"connect_timeout": 0}, "hup['connect_timeout'] must be seconds, above 0"),
    ],
)
def test_a_hup_that_makes_no_sense_is_refused(hup: dict[str, Any], expected: str) -> None:
    """The error names the key, and never the value."""
    assert complaint_about(settings_for, hup, None).startswith(expected)


@pytest.mark.parametrize(
    ("hosts", "tls", "expected"),
    [
        ([("localhost", 5672)], False, "localhost"),
        ([("localhost", 5671)], True, "localhost"),
        ([("a", 5671), ("b", 5672), ("::1", 5672)], False, "a:5671,b,[::1]"),
    ],
)
def test_a_hup_has_the_three_entries_of_1_2_1(
    hosts: list[tuple[str, int]], tls: bool, expected: str
) -> None:
    """The host entry leaves out default ports and joins several hosts by commas."""
    hup = Hup.from_settings(Settings(tuple(hosts), "/", "me", "secret", tls))

    assert {"host": expected, "user": "me", "password": "secret"} == hup


@given(
    hosts=st.lists(
        st.tuples(
            st.sampled_from(["box", "::1", "10.0.0.1"]),
            st.none() | st.sampled_from([5671, 5672]) | st.integers(1, 65535),
        ),
    ),
    scheme=st.sampled_from(["", "amqp://", "amqps://"]),
    port=st.sampled_from(["", "5671", "5672", "99"]),
    vhost=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    password=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
)
def test_settings_survive_the_way_through_a_hup(
    hosts: list[tuple[str, int | None]], scheme: str, port: str, vhost: str, password: str
) -> None:
    """What the class attributes of a producer say leads back to the same settings."""
    addresses = [
        (f"[{host}]" if ":" in host else host) + (f":{number}" if number else "")
        for host, number in hosts
    ]
    variables = {
        "POSTAGE_URL": ",".join(scheme + address for address in addresses),
        "POSTAGE_PORT": port,
        "POSTAGE_VHOST": vhost,
        "POSTAGE_PASSWORD": password,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        expected = Settings.from_environment()

        assert expected == settings_for(Hup.from_settings(expected), expected.vhost)


def test_class_attributes_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults of producers are looked up when they are used, and can be replaced."""

    class Producer:
        hup: Any = HupFromEnvironment()
        vhost: Any = VhostFromEnvironment()

    assert ("localhost", "/") == (Producer.hup["host"], Producer.vhost)
    monkeypatch.setenv("POSTAGE_URL", "amqp://box/prod")
    producer = Producer()
    assert ("box", "prod") == (producer.hup["host"], producer.vhost)
    producer.vhost = "own"
    assert ("own", "prod") == (producer.vhost, Producer.vhost)


# ----------------------------------------------------------------------- passwords

#: Passwords that cannot occur in a text by chance, with all that is special in a URL.
passwords = st.text(st.sampled_from("äöüß€§ /?#@:,%[]&=+.-0123456789\"'\\"), min_size=8)

#: Places for a password, with what goes wrong in such a URL.
DAMAGED_URLS = [
    "amqp://u:{}@host:abc/",
    "amqp://u:{}@host:99999/",
    "amqp://u:{}@host/a/b",
    "amqp://u:{}@host?nonsense=1",
    "amqp://u:{}@host?heartbeat=x",
    "amqp://u:{}@host,amqp://u:other@host",
    "amqp://u:{}@[::1",
    "amqp://u:{}@",
    "amqp://u:{}",
    "amqp:/u:{}@host",
    "amqp//u:{}@host",
    "http://u:{}@host",
    "u:{}@host",
    "://u:{}@host",
    "amqp://u:%FF{}@host",
    "{}",
]


@given(password=passwords, url=st.sampled_from(DAMAGED_URLS), encoded=st.booleans())
@example(password="pa/ss€€€€", url="amqp://u:{}@host", encoded=False)
@example(password="12/34567@", url="amqp://u:{}@host", encoded=False)
@example(password="12,34567@", url="amqp://u:{}@host", encoded=False)
@example(password="12?34567=", url="amqp://u:{}@host", encoded=False)
def test_no_error_shows_a_password(password: str, url: str, encoded: bool) -> None:
    """Not even the traceback of a damaged URL contains what may be a password."""
    assume(password.strip())  # blanks alone are in every traceback
    secret = quote(password, safe="") if encoded else password
    for call in (
        lambda: Settings.from_environment({"POSTAGE_URL": url.format(secret)}),
        lambda: Settings.from_environment({"POSTAGE_HOST": url.format(secret)}),
        lambda: Settings.from_environment({"POSTAGE_PORT": url.format(secret)}),
        lambda: settings_for({"host": url.format(secret)}, None),
    ):
        try:
            call()
        except ConfigurationError:
            text = traceback.format_exc()
            assert password not in text
            assert secret not in text


@given(passwords)
def test_no_text_form_shows_a_password(password: str) -> None:
    """Settings and Hup can be printed in every way."""
    settings = Settings((("localhost", 5672),), "/", "guest", password)
    hup = Hup.from_settings(settings)

    for text in (str(settings), repr(settings), f"{hup}", f"{hup!r}", "%s %r" % (hup, [hup])):  # noqa: UP031
        assert password not in text
    assert password not in pprint.pformat({"a": hup, "wide": "x" * 100})


def test_a_hup_shows_that_there_is_a_password() -> None:
    """A password is shown as stars, and its absence as such."""
    assert "{'host': 'box', 'password': '***'}" == repr(Hup(host="box", password="secret"))
    assert "{'host': 'box'}" == str(Hup(host="box"))
    assert "{'tls_key_password': '***'}" == str(Hup(tls_key_password="secret"))


# -------------------------------------------------------------------- the switches


@pytest.mark.parametrize(
    ("variable", "value", "function", "expected"),
    [
        ("POSTAGE_COMPAT", "", compat_from_environment, None),
        ("POSTAGE_COMPAT", "1.2", compat_from_environment, "1.2"),
        ("POSTAGE_COMPAT", "1.2.1", compat_from_environment, "1.2"),
        ("POSTAGE_QUEUE_TYPE", "", queue_type_from_environment, "quorum"),
        ("POSTAGE_QUEUE_TYPE", "quorum", queue_type_from_environment, "quorum"),
        ("POSTAGE_QUEUE_TYPE", "classic", queue_type_from_environment, "classic"),
        ("POSTAGE_ON_MISMATCH", "", adopt_on_mismatch, False),
        ("POSTAGE_ON_MISMATCH", "error", adopt_on_mismatch, False),
        ("POSTAGE_ON_MISMATCH", "adopt", adopt_on_mismatch, True),
        ("POSTAGE_DEBUG_MODE", "", debug_mode_from_environment, False),
        ("POSTAGE_DEBUG_MODE", "1", debug_mode_from_environment, False),
        ("POSTAGE_DEBUG_MODE", "True", debug_mode_from_environment, True),
    ],
)
def test_switches_are_read_from_the_environment(
    variable: str,
    value: str,
    function: Callable[[], Any],
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each switch has its values and its default."""
    monkeypatch.setenv(variable, value)

    assert expected == function()


@pytest.mark.parametrize(
    ("variable", "function", "allowed"),
    [
        ("POSTAGE_COMPAT", compat_from_environment, "1.2 or 1.2.1"),
        ("POSTAGE_QUEUE_TYPE", queue_type_from_environment, "quorum or classic"),
        ("POSTAGE_ON_MISMATCH", adopt_on_mismatch, "error or adopt"),
    ],
)
def test_a_switch_with_another_value_is_refused(
    variable: str, function: Callable[[], Any], allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the variable and its values."""
    monkeypatch.setenv(variable, "2")

    actual = complaint_about(function)

    assert f"{variable} is '2'; set it to {allowed}, or not at all" == actual
