# SPDX-License-Identifier: MIT
"""Fixtures that every test may use, and the check that a test leaves nothing behind.

Two environment variables choose the broker of the tests that need a real one:

``POSTAGE_TEST_URL``
    a broker that runs already; the tests then share the one virtual host that the URL names.
``POSTAGE_TEST_RABBITMQ=required``
    without RabbitMQ such a test fails, instead of being skipped.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.rabbitmq_node import RabbitNode, find_scripts

#: Virtual hosts made by one call of rabbitmqctl. The call takes 0.3 s and each host 0.02 s, but the
#: more exist, the slower all becomes: with 400 the node needs 40 s to start.
VHOSTS_AT_ONCE = 20

#: Seconds that threads, sockets and children of a test get to end.
LEFTOVER_DEADLINE_SECONDS = 5.0


def pytest_configure() -> None:
    # SIGTERM, too, leaves by way of the fixtures, which end the processes that they started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def nodes() -> list[RabbitNode]:
    """The nodes that live longer than a test."""
    return []


@pytest.fixture(scope="session")
def rabbitmq_installed() -> None:
    """Skip what needs RabbitMQ if it is missing; for tests that start a node of their own."""
    if find_scripts() is None:
        if os.environ.get("POSTAGE_TEST_RABBITMQ") == "required":
            pytest.fail("rabbitmq-server is not installed, and POSTAGE_TEST_RABBITMQ=required")
        pytest.skip("rabbitmq-server is not installed")


@pytest.fixture(scope="session")
def rabbitmq_node(rabbitmq_installed: None, nodes: list[RabbitNode]) -> Iterator[RabbitNode]:
    """A private RabbitMQ node, which all tests share; it is started by the first that asks."""
    if "POSTAGE_TEST_URL" in os.environ:
        pytest.skip("needs a private node, and POSTAGE_TEST_URL names a broker")
    with RabbitNode() as node:
        nodes.append(node)
        yield node


@pytest.fixture(scope="session")
def broker_urls(request: pytest.FixtureRequest) -> Iterator[str]:
    """An endless supply of URLs, one for each test."""
    if "POSTAGE_TEST_URL" in os.environ:
        return itertools.repeat(os.environ["POSTAGE_TEST_URL"])
    return _urls_of_fresh_vhosts(request.getfixturevalue("rabbitmq_node"))


@pytest.fixture
def broker_url(
    broker_urls: Iterator[str], nodes: list[RabbitNode], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The URL of an empty virtual host, which is also in POSTAGE_URL, for child processes too."""
    for node in nodes:
        node.ensure_running()
    url = next(broker_urls)
    monkeypatch.setenv("POSTAGE_URL", url)
    return url


@pytest.fixture(autouse=True)
def nothing_left_over(nodes: list[RabbitNode]) -> Iterator[None]:
    """Fail a test that leaves threads, sockets or child processes behind."""
    before = _resources(nodes)
    yield
    deadline = time.monotonic() + LEFTOVER_DEADLINE_SECONDS
    while leftover := _resources(nodes) - before:
        if time.monotonic() > deadline:
            pytest.fail("left over: " + "; ".join(map(_describe, leftover)), pytrace=False)
        gc.collect()
        time.sleep(0.01)


def _urls_of_fresh_vhosts(node: RabbitNode) -> Iterator[str]:
    used: list[str] = []
    for batch in itertools.count(1):
        fresh = [f"test-{batch}-{number}" for number in range(VHOSTS_AT_ONCE)]
        node.replace_vhosts(used, fresh)
        for vhost in fresh:
            yield node.url_of(vhost)
        used = fresh


def _resources(nodes: list[RabbitNode]) -> set[threading.Thread | psutil.Process | str]:
    """Return the threads, sockets and children of this process that belong to no node."""
    of_nodes = {pid for node in nodes for pid in node.pids}
    children = {child for child in psutil.Process().children() if child.pid not in of_nodes}
    return {*threading.enumerate(), *_sockets(), *children}


def _sockets() -> Iterator[str]:
    """Yield what Linux calls the open sockets: ``socket:[inode]``."""
    descriptors = Path("/proc/self/fd")
    for descriptor in descriptors.iterdir() if descriptors.exists() else ():
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(descriptor)
            if target.startswith("socket:"):
                yield target


def _describe(resource: threading.Thread | psutil.Process | str) -> str:
    if not isinstance(resource, str):
        return repr(resource)
    for connection in psutil.Process().net_connections("all"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{connection.fd}") == resource:
                return f"{resource} from {connection.laddr} to {connection.raddr}"
    return resource
