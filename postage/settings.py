# SPDX-License-Identifier: MIT
"""Where the broker is and how to log in, from the environment or from a `hup` dict.

These variables are read, each time that settings are asked for:

``POSTAGE_URL``
    ``amqp://user:password@host:port/vhost?heartbeat=60&connection_timeout=10``, with
    amqps for TLS. Every part but the scheme may be missing. Further hosts of the same
    cluster follow after commas or blanks, as URLs or as ``host:port``. The query also takes
    the TLS options of RabbitMQ's URLs: cacertfile, certfile, keyfile, verify (verify_peer or
    verify_none) and server_name_indication.
``POSTAGE_HOST``, ``POSTAGE_PORT``, ``POSTAGE_VHOST``, ``POSTAGE_USER``, ``POSTAGE_PASSWORD``
    what the URL does not say. The host may be several, with or without ports.
``POSTAGE_TLS_CA_FILE``, ``POSTAGE_TLS_CERT_FILE``, ``POSTAGE_TLS_KEY_FILE``
    how TLS is spoken, where the query does not say it; see `TlsOptions`.
``POSTAGE_TLS_KEY_PASSWORD``, ``POSTAGE_TLS_SERVER_NAME``, ``POSTAGE_TLS_VERIFY``
    the same.
``POSTAGE_RMQ_USER``, ``POSTAGE_RMQ_PASSWORD``
    deprecated names of the last two.
``POSTAGE_COMPAT``, ``POSTAGE_QUEUE_TYPE``, ``POSTAGE_ERROR_QUEUE``, ``POSTAGE_ON_MISMATCH``
    see the functions at the end.
``POSTAGE_DEBUG_MODE``
    the same.

An empty variable counts as none. No error shows a value that may be, or be taken for, a
password: a damaged URL is described by its place, never quoted.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from postage.errors import ConfigurationError

#: What holds where nobody says otherwise, as in a fresh RabbitMQ.
_DEFAULTS: dict[str, Any] = {
    "hosts": [("localhost", None)],
    "vhost": "/",
    "user": "guest",
    "password": "guest",
    "tls": False,
}

#: The registered ports of AMQP, without and with TLS.
_DEFAULT_PORTS = {False: 5672, True: 5671}


@dataclass(frozen=True)
class TlsOptions:
    """Whom a TLS connection trusts, and who we are.

    All files are PEM, and are read at each attempt to connect: a certificate that was renewed
    needs no restart.

    Attributes:
        ca_file: The CAs that may have signed the broker's certificate; None: those of the system.
        cert_file: The certificate that we show, with those between it and its CA.
        key_file: The key of that certificate; None: it is in the same file.
        key_password: Opens the key. Not shown by `repr()`.
        server_name: The name that the certificate must be for; None: that of each host.
        verify: Whether the broker's certificate is checked at all.
    """

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    key_password: str | None = field(default=None, repr=False)
    server_name: str | None = None
    verify: bool = True


@dataclass(frozen=True)
class Settings:
    """A broker, all hosts of it, and a login. Programs with equal settings share connections.

    Attributes:
        hosts: (host, port), each of which leads to the same broker or cluster.
        vhost: The virtual host.
        user: Who logs in.
        password: Not shown by `repr()` and `str()`.
        tls: Whether the connection is encrypted.
        heartbeat: Seconds after which a silent peer is asked for a sign of life; 0 is never.
        connect_timeout: Seconds that an attempt to connect to one host may take.
        tls_options: How TLS is spoken; the defaults without TLS.
    """

    hosts: tuple[tuple[str, int], ...]
    vhost: str
    user: str
    password: str = field(repr=False)
    tls: bool = False
    heartbeat: int = 60
    connect_timeout: float = 10.0
    tls_options: TlsOptions = TlsOptions()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Return the settings that the environment names.

        Args:
            environ: The variables; by default those of the process, as they are now.

        Raises:
            ConfigurationError: A variable makes no sense, or two hosts disagree.
        """
        return _resolve(_read_environment(os.environ if environ is None else environ))

    def __str__(self) -> str:
        scheme = "amqps" if self.tls else "amqp"
        hosts = ",".join(address_of(host, port) for host, port in self.hosts)
        return f"{scheme}://{quote(self.user, safe='')}@{hosts}/{quote(self.vhost, safe='')}"


def settings_for(hup: Mapping[str, Any] | None, vhost: str | None) -> Settings:
    """Return the settings that a `hup` dict names. What it lacks comes from the environment.

    Args:
        hup: With any of the keys host (or several, as ``"a:5672,b"``), user, password, port,
            tls, heartbeat, connect_timeout, and tls_ca_file and so on for the `TlsOptions`.
        vhost: The virtual host.

    Raises:
        ConfigurationError: A key is unknown, a value or a variable makes no sense.
    """
    override = {"vhost": vhost} if vhost else {}
    return _resolve(_read_environment(os.environ), _read_hup(hup or {}), override)


class Hup(dict[str, Any]):
    """Settings as a dict (host, user, password), whose text form hides the passwords."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Hup:
        """Return the dict form of settings; `settings_for()` is the way back."""
        # A port that is left out is looked up in the environment first.
        default = None if os.environ.get("POSTAGE_PORT") else _DEFAULT_PORTS[settings.tls]
        hosts = (
            address_of(host, None if port == default else port) for host, port in settings.hosts
        )
        return cls(host=",".join(hosts), user=settings.user, password=settings.password)

    def __repr__(self) -> str:
        return repr({key: "***" if "password" in key else self[key] for key in self})


class HupFromEnvironment:
    """A class attribute that is the `Hup` of the environment at each look."""

    def __get__(self, instance: object, owner: type | None = None) -> Hup:
        return Hup.from_settings(Settings.from_environment())


class VhostFromEnvironment:
    """A class attribute that is the virtual host of the environment at each look."""

    def __get__(self, instance: object, owner: type | None = None) -> str:
        return Settings.from_environment().vhost


def compat_from_environment() -> str | None:
    """Return the version of postage whose programs are among the peers, or None.

    Raises:
        ConfigurationError: POSTAGE_COMPAT is neither 1.2 nor 1.2.1.
    """
    return "1.2" if _choice("POSTAGE_COMPAT", "", "1.2", "1.2.1") else None


def queue_type_from_environment() -> str:
    """Return the type of the queues that have a name: quorum, or else classic.

    Raises:
        ConfigurationError: POSTAGE_QUEUE_TYPE is neither.
    """
    return _choice("POSTAGE_QUEUE_TYPE", "quorum", "classic")


def error_queue_from_environment() -> str:
    """Return how error queues are called: ``{name}`` stands for the name of the queue.

    Without it all queues share one.

    Raises:
        ConfigurationError: POSTAGE_ERROR_QUEUE begins with the "amq." of the broker's own queues.
    """
    pattern = os.environ.get("POSTAGE_ERROR_QUEUE") or "{name}.error"
    if pattern.startswith("amq."):
        raise ConfigurationError(
            f"POSTAGE_ERROR_QUEUE is {pattern!r}: names that begin with amq. are the broker's own"
        )
    return pattern


def adopt_on_mismatch() -> bool:
    """Tell whether a queue or exchange that exists with other arguments is used as it is.

    Raises:
        ConfigurationError: POSTAGE_ON_MISMATCH is neither error nor adopt.
    """
    return _choice("POSTAGE_ON_MISMATCH", "error", "adopt") == "adopt"


def debug_mode_from_environment() -> bool:
    """Tell whether POSTAGE_DEBUG_MODE is true."""
    return os.environ.get("POSTAGE_DEBUG_MODE", "").lower() == "true"


def _choice(variable: str, default: str, *others: str) -> str:
    value = os.environ.get(variable) or default
    if value not in (default, *others):
        allowed = " or ".join(filter(None, (default, *others)))
        raise ConfigurationError(f"{variable} is {value!r}; set it to {allowed}, or not at all")
    return value


# ------------------------------------------------------------------- from many, one
#
# A source states some of: hosts (a list of host and perhaps port), port, vhost, user,
# password, tls, heartbeat, connect_timeout, and the TLS options as tls_ca_file and so on.
# What a better source states replaces that, and only in the end is it known which port a
# host has that came without one.

_Host = tuple[str, int | None]


def _resolve(*sources: Mapping[str, Any]) -> Settings:
    """Merge what the sources state, the best one last."""
    stated = dict(_DEFAULTS)
    for source in sources:
        if source.get("tls") is False:  # then what worse sources say about TLS is not meant
            stated = {part: value for part, value in stated.items() if part not in _TLS_PARTS}
        stated.update(source)
    default = stated.pop("port", _DEFAULT_PORTS[stated["tls"]])
    hosts = tuple((host, port or default) for host, port in stated.pop("hosts"))
    options = {part: stated.pop(part) for part in _TLS_PARTS if part in stated}
    if options and not stated["tls"]:  # who names a CA must not be sent in the clear
        raise ConfigurationError(
            f"TLS is off, and these are set for it: {', '.join(map(variable_of, options))}; "
            "begin POSTAGE_URL with amqps://, or give a hup tls=True"
        )
    return Settings(hosts=hosts, tls_options=_tls_options(options), **stated)


def _tls_options(stated: Mapping[str, Any]) -> TlsOptions:
    options = TlsOptions(**{part.removeprefix("tls_"): stated[part] for part in stated})
    if options.key_file and not options.cert_file:
        raise ConfigurationError(
            f"{variable_of('tls_key_file')} needs a certificate: {variable_of('tls_cert_file')}"
        )
    return options


#: The TLS options, and what they are called in a URL. A password of a key has no place there.
_TLS_PARTS = {
    "tls_ca_file": "cacertfile",
    "tls_cert_file": "certfile",
    "tls_key_file": "keyfile",
    "tls_key_password": "",
    "tls_server_name": "server_name_indication",
    "tls_verify": "verify",
}


def variable_of(part: str) -> str:
    """Return the variable that states a TLS part, by which errors call it."""
    return f"POSTAGE_{part.upper()}"


#: The variables that make no sense without TLS.
TLS_VARIABLES = tuple(map(variable_of, _TLS_PARTS))

#: The variables, and what they state.
_VARIABLES = {
    "POSTAGE_HOST": "hosts",
    "POSTAGE_PORT": "port",
    "POSTAGE_VHOST": "vhost",
    "POSTAGE_USER": "user",
    "POSTAGE_PASSWORD": "password",
    **dict(zip(TLS_VARIABLES, _TLS_PARTS, strict=True)),
}
#: Variables that are still read where their successors are not set.
_DEPRECATED = {
    "POSTAGE_RMQ_USER": "POSTAGE_USER",
    "POSTAGE_RMQ_PASSWORD": "POSTAGE_PASSWORD",
}


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    for old, new in _DEPRECATED.items():
        if environ.get(old) and not environ.get(new):
            warnings.warn(f"{old} is deprecated: set {new}", DeprecationWarning, stacklevel=2)
            environ = {**environ, new: environ[old]}
    stated: dict[str, Any] = {
        part: environ[name] for name, part in _VARIABLES.items() if environ.get(name)
    }
    if "hosts" in stated:
        stated["hosts"] = _read_hosts(stated["hosts"], "POSTAGE_HOST")
    if "port" in stated:
        stated["port"] = _read_number("port", stated["port"], "POSTAGE_PORT")
    if "tls_verify" in stated:
        stated["tls_verify"] = _read_verify(stated["tls_verify"], "POSTAGE_TLS_VERIFY")
    return {**stated, **_read_urls(environ.get("POSTAGE_URL", ""))}


#: What the entries of a hup dict must be that are no numbers.
_HUP_TYPES: dict[str, Any] = {
    "host": str,
    "user": str,
    "password": str,
    "tls": bool,
    **dict.fromkeys(_TLS_PARTS, str),
    "tls_verify": bool,
}


def _read_hup(hup: Mapping[str, Any]) -> dict[str, Any]:
    stated: dict[str, Any] = {}
    for key, value in hup.items():
        source = f"hup[{key!r}]"
        if key in _NUMBERS:
            stated[key] = _checked_number(key, value, source)
        elif key not in _HUP_TYPES:
            known = ", ".join([*_HUP_TYPES, *_NUMBERS])
            raise ConfigurationError(f"{source} is unknown; the keys are {known}")
        elif not isinstance(value, _HUP_TYPES[key]):
            wanted, given = _HUP_TYPES[key].__name__, type(value).__name__
            raise ConfigurationError(f"{source} must be of type {wanted}, and is {given}")
        elif key == "host":
            stated["hosts"] = _read_hosts(value, source)
        else:
            stated[key] = value
    return stated


# ----------------------------------------------------------------------- from text
#
# These patterns stand in for urllib, whose errors quote what they cannot parse. They are
# strict, lest a piece of a damaged URL be taken for something that may be shown.

_HOST = r"(?P<host> \[ [^][/?#@\s]+ \] | [^][:/?#@\s]+ ) (?: : (?P<port>[0-9]{1,5}) )?"
_HOST_FORM = re.compile(_HOST, re.VERBOSE)
_URL_FORM = re.compile(
    rf"""
    (?! [/?] )
    (?: (?P<scheme>amqps?) :// (?: (?P<login>[^/?#]*) @ )? )?
    (?: {_HOST} )?
    (?: / (?P<vhost>[^/?#@]*) )?
    (?: \? (?P<query>[^#@]*) )?
    """,
    re.VERBOSE | re.IGNORECASE,
)

#: What the query of a URL may say. The names are those that pika and RabbitMQ use.
_QUERY = {
    "heartbeat": "heartbeat",
    "connection_timeout": "connect_timeout",
    **{name: part for part, name in _TLS_PARTS.items() if name},
}

#: What numbers must be: their type, a description, and a test.
_NUMBERS: dict[str, tuple[type[int] | type[float], str, Callable[[Any], bool]]] = {
    "port": (int, "a whole number from 1 to 65535", lambda port: 1 <= port <= 65535),
    "heartbeat": (int, "whole seconds, from 0 to 65535", lambda seconds: 0 <= seconds <= 65535),
    "connect_timeout": (float, "seconds, above 0 and up to a day", lambda s: 0 < s <= 86400),
}


def _read_urls(text: str) -> dict[str, Any]:
    """Read POSTAGE_URL: all hosts that its entries name, and what they agree upon."""
    stated: dict[str, Any] = {}
    hosts: list[_Host] = []
    for source, entry in _entries(text, "POSTAGE_URL"):
        match = _URL_FORM.fullmatch(entry)
        if match is None:
            raise ConfigurationError(
                f"{source} is damaged. Write amqp://user:password@host:port/vhost or host:port, "
                "an IPv6 address in brackets, and percent-encode what is special inside a part "
                "(/ is %2F, @ is %40, a comma is %2C)"
            )
        hosts += _hosts_of(match, source)
        for part, value in _read_parts(match, source).items():
            if stated.setdefault(part, value) != value:
                names = {part: name for name, part in _QUERY.items()} | {"tls": "scheme"}
                name = names.get(part, part)
                raise ConfigurationError(
                    f"{source} states another {name} than an entry before it. All entries lead "
                    "to one cluster; for an independent broker give a producer its own hup"
                )
    return {**stated, "hosts": hosts} if hosts else stated


def _read_parts(match: re.Match[str], source: str) -> dict[str, Any]:
    """Return what a URL states, beside its host."""
    user, _, password = (match["login"] or "").partition(":")
    texts = {"user": user, "password": password, "vhost": match["vhost"]}
    parts: dict[str, Any] = {
        part: _unquoted(text, f"{source}, {part}") for part, text in texts.items() if text
    }
    if match["scheme"]:
        parts["tls"] = match["scheme"].lower() == "amqps"
    for parameter in filter(None, (match["query"] or "").split("&")):
        name, _, text = parameter.partition("=")
        if name not in _QUERY:
            known = ", ".join(_QUERY)
            raise ConfigurationError(f"{source}: parameter {name!r} is unknown; there are {known}")
        parts[_QUERY[name]] = _read_parameter(_QUERY[name], text, f"{source}, {name}")
    return parts


def _read_parameter(part: str, text: str, source: str) -> Any:
    text = _unquoted(text, source)
    if part in _NUMBERS:
        return _read_number(part, text, source)
    if not text:
        raise ConfigurationError(f"{source} is empty; leave it out for the default")
    return _read_verify(text, source) if part == "tls_verify" else text


def _read_hosts(text: str, source: str) -> list[_Host]:
    hosts: list[_Host] = []
    for place, entry in _entries(text, source):
        match = _HOST_FORM.fullmatch(entry)
        if match is None:
            raise ConfigurationError(
                f"{place} is not of the form host or host:port, an IPv6 address in brackets; "
                "a URL belongs into POSTAGE_URL"
            )
        hosts += _hosts_of(match, place)
    if not hosts:
        raise ConfigurationError(f"{source} names no host; leave it out for the default")
    return hosts


def _entries(text: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield what commas and blanks separate, each with a name for errors."""
    for number, entry in enumerate(text.replace(",", " ").split(), 1):
        yield f"{source}, entry {number}", entry


def _hosts_of(match: re.Match[str], source: str) -> list[_Host]:
    if not match["host"]:
        return []
    port = match["port"]
    if port is not None:
        port = _checked_number("port", int(port), f"{source}, port")
    return [(match["host"].strip("[]"), port)]


def address_of(host: str, port: int | None) -> str:
    """Return a host as it is written in a URL."""
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def _unquoted(text: str, source: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{source} is not percent-encoded UTF-8") from None


def _read_verify(text: str, source: str) -> bool:
    if text not in ("verify_peer", "verify_none"):
        raise ConfigurationError(f"{source} must be verify_peer (the default) or verify_none")
    return text == "verify_peer"


def _read_number(part: str, text: str, source: str) -> Any:
    try:
        number = _NUMBERS[part][0](text)
    except ValueError:  # it quotes the text
        number = None
    return _checked_number(part, number, source)


def _checked_number(part: str, value: Any, source: str) -> Any:
    kind, words, is_good = _NUMBERS[part]
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or not is_good(value):
        raise ConfigurationError(f"{source} must be {words}")
    return kind(value)
