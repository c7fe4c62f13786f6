# SPDX-License-Identifier: MIT
"""What a component and a script say that find no broker."""

from __future__ import annotations

import signal
import socket

import pytest

from tests.programs import Program

CALLER = """
from postage.messaging import DefaultExchange, GenericProducer

with GenericProducer() as producer:
    answer = producer.rpc_add(2, 3, _queue="greeter", _timeout=1.5, _max_retry=0)
print(answer.message)
"""

SENDER = """
from postage.messaging import GenericProducer

with GenericProducer() as producer:
    producer.message_hello("world", _queue="greeter", _timeout=1.5)
"""

COMPONENT = """
from postage import messaging

messaging.GenericConsumer.connect_timeout = {connect_timeout}
eqk = [(messaging.DefaultExchange, [("greeter", "greeter")])]
messaging.MessageProcessor(messaging.Fingerprint("greeter").as_dict(), eqk)
"""

WAYS_OUT = (
    "nothing listens there; start RabbitMQ or `postage broker`, or say in POSTAGE_URL where a "
    "broker is"
)


@pytest.fixture
def url() -> str:
    """Where no broker is."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"amqp://guest:s3cret@127.0.0.1:{listener.getsockname()[1]}/%2F"


def shown(url: str) -> str:
    """Return a URL as it is shown."""
    return url.replace(":s3cret", "")


def run(code: str, url: str) -> Program:
    return Program(["-c", code], env={"POSTAGE_URL": url})


def test_a_component_says_once_that_it_waits_for_a_broker(url: str) -> None:
    """One line names the address and both ways out; more attempts are not worth a line."""
    with run(COMPONENT.format(connect_timeout=2.5), url) as component:
        assert 1 == component.wait()
        line, *traceback = component.stderr
        assert f"no connection to {shown(url)}: {WAYS_OUT}; trying again until it works" == line
        assert "Traceback (most recent call last):" == traceback[0]
        assert "s3cret" not in component.output


def test_a_component_that_gives_up_names_the_ways_out(url: str) -> None:
    """The error at the end of the wait is one line, too."""
    with run(COMPONENT.format(connect_timeout=0.5), url) as component:
        assert 1 == component.wait()
        last = component.stderr[-1]
        words = f"declare queue 'greeter': no connection to {shown(url)} within 0.5 s: {WAYS_OUT}"
        assert f"postage.errors.ConnectionFailedError: {words}" == last


def test_a_component_that_waits_can_be_interrupted(url: str) -> None:
    """Ctrl-C ends it, whatever it waits for."""
    with run(COMPONENT.format(connect_timeout=None), url) as component:
        component.wait_for_line(WAYS_OUT)
        component.send_signal(signal.SIGINT)
        assert 0 != component.wait()


def test_a_script_that_sends_names_the_ways_out(url: str) -> None:
    """It says at once what it waits for, and so does the error in the end."""
    with run(SENDER, url) as script:
        assert 1 == script.wait()
        assert script.stderr[0].endswith(f"{WAYS_OUT}; trying again until it works")
        assert script.stderr[-1].startswith("postage.errors.PublishTimeoutError: ")
        assert script.stderr[-1].endswith(WAYS_OUT)


def test_a_script_that_calls_gets_the_ways_out_as_its_answer(url: str) -> None:
    """The falsy result of the call carries the same words."""
    with run(CALLER, url) as script:
        assert 0 == script.wait()
        [answer] = script.stdout
        assert answer.endswith(WAYS_OUT)
        [warning] = script.stderr
        assert warning.endswith("trying again until it works")
