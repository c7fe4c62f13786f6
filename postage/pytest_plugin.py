# SPDX-License-Identifier: MIT
"""Fixtures for the tests of components. pytest finds them where postage is installed.

It loads this module in every project, so nothing is imported here before a fixture is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from postage.testing import Running, TestBroker, TestVhost, VhostFaults


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what chooses the broker of the tests."""
    url = "the broker of the tests (default: an embedded one); POSTAGE_TEST_URL says it, too"
    strict = "have the embedded broker refuse what RabbitMQ 4.3 refuses"
    group = parser.getgroup("postage")
    group.addoption("--postage-url", metavar="URL", help=url)
    group.addoption("--postage-strict", action="store_true", help=strict)
    parser.addini("postage_url", url, default="")
    parser.addini("postage_strict", strict, type="bool", default=False)


@pytest.fixture(scope="session")
def postage_broker_options(pytestconfig: pytest.Config) -> dict[str, Any]:
    """Arguments of the embedded broker; override it to change them."""
    is_strict = pytestconfig.getoption("--postage-strict") or pytestconfig.getini("postage_strict")
    return {"strict": bool(is_strict)}


@pytest.fixture(scope="session")
def postage_broker(
    pytestconfig: pytest.Config, postage_broker_options: dict[str, Any]
) -> Iterator[TestBroker]:
    """The broker of all tests: an embedded one, unless an option names another."""
    from postage.testing import TestBroker

    url = (
        pytestconfig.getoption("--postage-url")
        or os.environ.get("POSTAGE_TEST_URL")
        or pytestconfig.getini("postage_url")
    )
    with TestBroker(url, **postage_broker_options) as broker:
        yield broker


@pytest.fixture
def postage_vhost(postage_broker: TestBroker) -> Iterator[TestVhost]:
    """An empty virtual host, which is also in POSTAGE_URL. Its connections end with the test."""
    with postage_broker.vhost() as vhost:
        yield vhost


@pytest.fixture
def postage_url(postage_vhost: TestVhost) -> str:
    """The URL of an empty virtual host, which is also in POSTAGE_URL."""
    return postage_vhost.url


@pytest.fixture
def postage_faults(postage_vhost: TestVhost) -> VhostFaults:
    """What the embedded broker can be made to do wrong. Skips the test with another broker."""
    return postage_vhost.faults


@pytest.fixture
def postage_run(postage_vhost: TestVhost) -> Iterator[Callable[..., Running]]:
    """Runs components, instances or classes of them, until the test ends.

    ``postage_run(Greeter, name="greeter", groups=["blue"])``; see `postage.testing.running`.
    """
    from postage.testing import running

    with contextlib.ExitStack() as stack:

        def run(component: Any, **options: Any) -> Running:
            return stack.enter_context(running(component, **options))

        yield run
