# SPDX-License-Identifier: MIT
"""TLS: what it is set up with, and what its errors mean for people.

An error says which certificate or file is wrong and which setting mends it, and is either
*final* or not. Final is what only another setting, or another broker, mends: a CA that we do
not trust, a name that the certificate is not for, a client certificate that is missing. What
others may mend while we run is tried again: a certificate that has expired is renewed, ours
too, since its file is read at each attempt.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import NamedTuple

from postage.errors import ConnectionFailedError
from postage.settings import TlsOptions, variable_of

#: What each PEM file must contain. A key may be encrypted, or be of one algorithm only.
_CERTIFICATE, _KEY = "CERTIFICATE-----", "PRIVATE KEY-----"

#: OpenSSL's codes of what is wrong with a certificate (x509_vfy.h).
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNTRUSTED = (2, 18, 19, 20, 21)  # the issuer is unknown, or signed itself
_OTHER_NAME = (62, 64)  # of a host, of an address

#: How OpenSSL calls an error, such as SSLV3_ALERT_BAD_CERTIFICATE for an alert of the peer. pika
#: keeps only the text of an error that ends the login, and with TLS 1.3 the broker's opinion of
#: our certificate arrives only then.
_REASON = re.compile(r"\[SSL: (?:\w+_(?=ALERT_))?(\w+)\]")

#: The peer has gone without an alert.
_ENDED = ("UNEXPECTED_EOF_WHILE_READING",)
#: It answered something else than TLS.
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")
#: There is no version of TLS that both sides speak.
_NO_VERSION = ("ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL")
#: What a broker may say to a client without a certificate. The last two also mean other things.
_CERTIFICATE_WANTED = ("ALERT_CERTIFICATE_REQUIRED", "ALERT_BAD_CERTIFICATE")
_CERTIFICATE_PERHAPS_WANTED = "ALERT_HANDSHAKE_FAILURE"
#: What a broker says to a client certificate that it refuses for good.
_OURS_REFUSED = {
    "ALERT_UNKNOWN_CA": "it does not know the CA of our certificate",
    "ALERT_BAD_CERTIFICATE": "it refuses our certificate",
    "ALERT_UNSUPPORTED_CERTIFICATE": "it refuses our certificate: it may be for another purpose",
    "ALERT_CERTIFICATE_REVOKED": "our certificate was revoked",
    "ALERT_CERTIFICATE_UNKNOWN": "it refuses our certificate",
    "ALERT_ACCESS_DENIED": "it denies access to our certificate",
}
_OURS_EXPIRED = "ALERT_CERTIFICATE_EXPIRED"


class Refusal(NamedTuple):
    """Why TLS did not come about, in one line, and whether trying again is in vain."""

    words: str
    is_final: bool


def context_of(options: TlsOptions) -> ssl.SSLContext:
    """Return what a connection speaks TLS with: at least 1.2, and verified unless told otherwise.

    Raises:
        ConnectionFailedError: A file cannot be used; it says which, and why.
    """
    if options.ca_file:
        _check_file(options.ca_file, "ca_file", _CERTIFICATE, "certificate")
    try:
        context = ssl.create_default_context(cafile=options.ca_file or None)
    except ssl.SSLError as error:
        raise _broken(options.ca_file, "ca_file", error) from None
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    if not options.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if options.cert_file:
        _load_certificate(context, options)
    return context


def _load_certificate(context: ssl.SSLContext, options: TlsOptions) -> None:
    cert_file = options.cert_file or ""
    key_file, key_option = (
        (options.key_file, "key_file") if options.key_file else (cert_file, "cert_file")
    )
    _check_file(cert_file, "cert_file", _CERTIFICATE, "certificate")
    _check_file(key_file, key_option, _KEY, "key")
    is_encrypted = False

    def password() -> str:  # without this OpenSSL asks on the terminal
        nonlocal is_encrypted
        is_encrypted = True
        return options.key_password or ""

    try:
        context.load_cert_chain(cert_file, key_file, password)
    except ValueError:  # a password that is longer than OpenSSL can take
        raise _password_needed(key_file, "another") from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConnectionFailedError(
                f"the key in {key_file} does not fit the certificate in {cert_file}; "
                f"set {variable_of('tls_key_file')} to the key that it was made with"
            ) from None
        if is_encrypted:
            raise _password_needed(key_file, "another" if options.key_password else "a") from None
        raise _broken(key_file, key_option, error) from None


def _password_needed(key_file: str, which: str) -> ConnectionFailedError:
    return ConnectionFailedError(
        f"the key in {key_file} needs {which} password; set {variable_of('tls_key_password')}"
    )


def _check_file(name: str, option: str, marker: str, content: str) -> None:
    """Look into a file first: OpenSSL says neither which one is wrong nor what it lacks."""
    variable = variable_of(f"tls_{option}")
    try:
        text = Path(name).read_text(encoding="latin-1")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConnectionFailedError(
            f"{variable}: {name} cannot be read: {reason}; name a PEM file that this program may "
            "read"
        ) from None
    if marker not in text:
        raise ConnectionFailedError(
            f"{variable}: {name} contains no {content} in PEM form; name a file that does"
        )


def _broken(name: str | None, option: str, error: ssl.SSLError) -> ConnectionFailedError:
    variable = variable_of(f"tls_{option}")
    return ConnectionFailedError(
        f"{variable}: {name} is damaged ({error.reason or error}); write it anew"
    )


def refusal_of(error: BaseException, options: TlsOptions, name: str) -> Refusal | None:
    """Return what an error of an attempt says about TLS, or None if it says nothing about it.

    Args:
        error: The root of what pika reports.
        options: What the attempt was made with.
        name: The name that the certificate had to be for.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return _refused_by_us(error, options, name)
    match = _REASON.search(str(error))
    if match is not None and match[1] not in _ENDED:
        return _refused_by_broker(match[1], options)
    if match is not None or isinstance(error, ssl.SSLError):
        return Refusal("the connection ended in the middle of the TLS handshake", False)
    return None


def _refused_by_us(error: ssl.SSLCertVerificationError, options: TlsOptions, name: str) -> Refusal:
    code = error.verify_code
    if code == _EXPIRED:
        words = "its certificate has expired: renew it at the broker, if the clock here is right"
        return Refusal(words, False)
    if code == _NOT_YET_VALID:
        return Refusal("its certificate is not valid yet: compare the clocks", False)
    if code in _OTHER_NAME:
        variable = variable_of("tls_server_name")
        words = f"its certificate is not for {name}; use a name that it is for, or set {variable}"
        return Refusal(words, True)
    if code in _UNTRUSTED:
        trusted = f"in {options.ca_file}" if options.ca_file else "of this system"
        words = (
            f"its certificate is not from a CA {trusted} ({error.verify_message}); set "
            f"{variable_of('tls_ca_file')} to the CA of the broker"
        )
        return Refusal(words, True)
    return Refusal(f"its certificate is refused: {error.verify_message}", True)


def _refused_by_broker(reason: str, options: TlsOptions) -> Refusal:
    ours = f"{variable_of('tls_cert_file')} is {options.cert_file}"
    if reason in _NO_TLS:
        words = "it speaks no TLS there; use its port for TLS (5671 as a rule), or amqp://"
    elif reason in _NO_VERSION:
        words = "it offers no TLS 1.2 or later, and postage speaks nothing older"
    elif reason in _CERTIFICATE_WANTED and not options.cert_file:
        words = f"it wants a client certificate; set {variable_of('tls_cert_file')}"
    elif reason == _CERTIFICATE_PERHAPS_WANTED and not options.cert_file:
        words = (
            "it ended the TLS handshake; it may want a client certificate: set "
            f"{variable_of('tls_cert_file')}"
        )
    elif reason == _OURS_EXPIRED:
        return Refusal(f"our certificate has expired: renew it; {ours}", False)
    elif reason in _OURS_REFUSED:
        words = f"{_OURS_REFUSED[reason]}; {ours}"
    else:
        return Refusal(f"TLS failed: {reason.replace('_', ' ').lower()}", False)
    return Refusal(words, True)
