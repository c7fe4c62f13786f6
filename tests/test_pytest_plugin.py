# SPDX-License-Identifier: MIT
"""The fixtures of the pytest plugin, in test suites of their own."""

from __future__ import annotations

import pytest

from postage.testing import TestBroker
from tests.programs import Program

pytest_plugins = ["pytester"]

GREETER = """
    from postage import messaging
    from postage.generic_application import GenericApplication, GenericApplicationExchange

    class Greeter(GenericApplication):
        greeted = []

        @messaging.MessageHandler("command", "hello")
        def msg_hello(self, content):
            if content["parameters"] == "nobody":
                raise LookupError("nobody is there")
            self.greeted.append(content["parameters"])

        @messaging.RpcHandler("command", "add")
        def rpc_add(self, content, reply_func):
            reply_func(sum(content["parameters"]))

    class Producer(messaging.GenericProducer):
        eks = [(GenericApplicationExchange, "greeter/rr")]
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty test suite, which has a component to test and no broker."""
    monkeypatch.delenv("POSTAGE_URL", raising=False)
    monkeypatch.delenv("POSTAGE_TEST_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "200")  # pytest cuts lines off otherwise
    pytester.makepyfile(greeter=GREETER)
    return pytester


def run(suite: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run the suite in a process of its own, where every warning is an error."""
    return suite.runpytest_subprocess("-W", "error", *arguments)


def test_the_plugin_is_found_and_imports_nothing() -> None:
    """It is loaded in every project that has postage, so it must cost and start nothing."""
    code = (
        "import sys, pytest; before = set(sys.modules); import postage.pytest_plugin; "
        "print(sorted(set(sys.modules) - before))"
    )
    with Program(["-c", code]) as program:
        assert 0 == program.wait()
        assert ["['postage', 'postage.pytest_plugin']"] == program.stdout


def test_the_plugin_does_not_load_the_client_in_a_suite_without_components(
    pytester: pytest.Pytester,
) -> None:
    """A suite that uses none of the fixtures runs without pika and without a broker."""
    pytester.makepyfile(
        """
        import sys
        import threading

        def test_nothing_was_started():
            assert "postage.pytest_plugin" in sys.modules
            assert not {"pika", "postage.testing", "postage.broker"} & set(sys.modules)
            assert 1 == threading.active_count()
        """
    )
    run(pytester).assert_outcomes(passed=1)


def test_the_names_of_the_fixtures_begin_with_postage(pytester: pytest.Pytester) -> None:
    """They are listed with their docstrings, and clash with no others."""
    lines = run(pytester, "--fixtures", "-q").outlines
    begin = next(index for index, line in enumerate(lines) if "from postage.pytest_plugin" in line)
    names = [line.split()[0] for line in lines[begin + 1 :] if " -- " in line]
    ours = [name for name in names if name.startswith("postage")]
    assert [
        "postage_broker",
        "postage_broker_options",
        "postage_faults",
        "postage_run",
        "postage_url",
        "postage_vhost",
    ] == sorted(ours)


def test_a_component_is_tested_in_a_few_lines(suite: pytest.Pytester) -> None:
    """It runs on an embedded broker, in an empty virtual host, and ends with its test."""
    suite.makepyfile(
        """
        import os
        import threading
        from greeter import Greeter, Producer
        from postage.testing import wait_until

        left_open = []

        def test_it_adds(postage_run):
            postage_run(Greeter)
            with Producer() as producer:
                assert 5 == producer.rpc_add(2, 3).value

        def test_it_greets(postage_run, postage_url):
            run = postage_run(Greeter)
            assert postage_url == os.environ["POSTAGE_URL"]
            left_open.append(Producer())
            left_open[0].message_hello("world")
            wait_until(lambda: Greeter.greeted == ["world"])

        def test_nothing_is_left():
            assert "POSTAGE_URL" not in os.environ
            assert ["postage-broker"] == [
                thread.name for thread in threading.enumerate()
                if thread is not threading.main_thread()
            ]

        def test_the_next_one_begins_anew(postage_url):
            assert postage_url.endswith("/test-3")
            with Producer() as producer:
                assert "UnroutableError" == producer.rpc_add(2, 3).value
        """
    )
    run(suite).assert_outcomes(passed=4)


def test_what_a_handler_raises_is_an_error_of_its_test(suite: pytest.Pytester) -> None:
    """A test that did not notice that its message was parked is told, with the traceback."""
    suite.makepyfile(
        """
        from greeter import Greeter, Producer
        from postage.testing import wait_until

        def send(run):
            with Producer() as producer:
                producer.message_hello("nobody")
            wait_until(lambda: run.errors)

        def test_unaware(postage_run):
            send(postage_run(Greeter))

        def test_aware(postage_run):
            send(postage_run(Greeter, check=False))
        """
    )
    result = run(suite)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["ERROR *::test_unaware - LookupError: nobody is there"])


def test_faults_concern_the_vhost_of_the_test(suite: pytest.Pytester) -> None:
    """A test makes the broker misbehave, and its component survives it."""
    suite.makepyfile(
        """
        from greeter import Greeter, Producer

        def test_it_comes_back(postage_run, postage_faults):
            postage_run(Greeter)
            with Producer() as producer:
                assert 5 == producer.rpc_add(2, 3).value
                assert 2 <= postage_faults.drop()
                assert 5 == producer.rpc_add(2, 3).value
                assert 1 == postage_faults.cancel("greeter")
        """
    )
    run(suite).assert_outcomes(passed=1)


@pytest.mark.parametrize("way", ["option", "ini", "environment"])
def test_another_broker_can_be_named(
    suite: pytest.Pytester, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option, an ini value or a variable names it; tests that need faults are skipped then."""
    suite.makepyfile(
        """
        import os
        from greeter import Greeter, Producer

        def test_it_adds(postage_run, postage_broker):
            assert not postage_broker.is_embedded
            assert postage_broker.url == os.environ["POSTAGE_URL"]
            postage_run(Greeter)
            with Producer() as producer:
                assert 5 == producer.rpc_add(2, 3).value

        def test_it_comes_back(postage_faults):
            raise AssertionError
        """
    )
    with TestBroker() as broker:
        arguments = []
        if way == "option":
            monkeypatch.setenv("POSTAGE_TEST_URL", "amqp://nowhere.invalid")  # the option wins
            arguments = [f"--postage-url={broker.url}"]
        elif way == "ini":
            suite.makeini(f"[pytest]\npostage_url = {broker.url}")
        else:
            suite.makeini("[pytest]\npostage_url = amqp://nowhere.invalid")
            monkeypatch.setenv("POSTAGE_TEST_URL", broker.url)
        result = run(suite, "-rs", *arguments)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * only the embedded broker has faults"])


@pytest.mark.parametrize("way", ["option", "ini", "fixture"])
def test_the_embedded_broker_can_be_strict(suite: pytest.Pytester, way: str) -> None:
    """An option, an ini value or a fixture makes it refuse what RabbitMQ 4.3 refuses."""
    suite.makepyfile(
        """
        import pika
        import pytest

        def test_it_is_strict(postage_url):
            connection = pika.BlockingConnection(pika.URLParameters(postage_url))
            with pytest.raises(pika.exceptions.ConnectionClosedByBroker):
                connection.channel().queue_declare("transient", durable=False)
        """
    )
    arguments = []
    if way == "option":
        arguments = ["--postage-strict"]
    elif way == "ini":
        suite.makeini("[pytest]\npostage_strict = true")
    else:
        suite.makeconftest(
            """
            import pytest

            @pytest.fixture(scope="session")
            def postage_broker_options():
                return {"strict": True}
            """
        )
    run(suite, *arguments).assert_outcomes(passed=1)
