# SPDX-License-Identifier: MIT
"""The identity of a component."""

from __future__ import annotations

import getpass
import multiprocessing
import os
import socket
from typing import Any

import pytest

from postage.fingerprint import Fingerprint

KEYS = ["name", "type", "pid", "host", "user", "vhost"]


def test_a_fingerprint_consists_of_what_it_was_given() -> None:
    """The dict and the tuple hold the six values in a fixed order."""
    values = ["echo", "application", "42", "box", "root", "/dev"]

    fingerprint = Fingerprint(*values)

    assert dict(zip(KEYS, values, strict=True)) == fingerprint.as_dict()
    assert tuple(values) == fingerprint.as_tuple()
    assert KEYS == list(fingerprint.as_dict())


def test_what_is_not_given_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process, host, user and virtual host come from the system; name and type stay None."""
    monkeypatch.setenv("POSTAGE_URL", "amqp://localhost/staging")

    actual = Fingerprint().as_tuple()

    found = (str(os.getpid()), socket.gethostname(), getpass.getuser(), "staging")
    assert (None, None, *found) == actual


def test_values_become_text() -> None:
    """A number, for instance a process id, is carried as a string."""
    assert ("1", "2", "3", "4", "5", "6") == Fingerprint(1, 2, 3, 4, 5, 6).as_tuple()


def test_a_forked_child_tells_its_own_process() -> None:
    """The process id is read when the fingerprint is made, not when the module is imported."""
    with multiprocessing.get_context("fork").Pool(1) as child:
        pid, fingerprint = child.apply(os.getpid), child.apply(Fingerprint)

    assert str(pid) == fingerprint.pid


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found"), OSError("no user")])
def test_a_user_without_a_name_is_told_by_number(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container whose uid has no entry in the password file, the uid stands in."""

    def fail() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", fail)

    assert str(os.getuid()) == Fingerprint(vhost="/").user


def test_fingerprints_with_equal_values_are_equal() -> None:
    """Equality and hash depend on the values alone."""
    one, same, other = Fingerprint("a", pid=1), Fingerprint("a", pid="1"), Fingerprint("b", pid=1)

    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != one.as_dict()


def test_the_representation_shows_the_values() -> None:
    """A fingerprint reads like the call that makes it."""
    values: dict[str, Any] = dict.fromkeys(KEYS, "x") | {"name": None}

    expected = "Fingerprint(name=None, type='x', pid='x', host='x', user='x', vhost='x')"
    assert expected == repr(Fingerprint(**values))
