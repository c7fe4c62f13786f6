# SPDX-License-Identifier: MIT
"""The names of 1.2.1, their signatures and their defaults, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

import postage
from postage import errors, generic_application, messaging, microthreads

MESSAGING = [
    "AckAndRestart",
    "Encoder",
    "Exchange",
    "ExchangeType",
    "FilterError",
    "Fingerprint",
    "GenericConsumer",
    "GenericProducer",
    "Handler",
    "JsonEncoder",
    "Message",
    "MessageCommand",
    "MessageFilter",
    "MessageHandler",
    "MessageHandlerFullBody",
    "MessageHandlerType",
    "MessageProcessor",
    "MessageResult",
    "MessageResultError",
    "MessageResultException",
    "MessageStatus",
    "RejectMessage",
    "RpcCommand",
    "RpcHandler",
    "TimeoutError",
    "debug_mode",
    "global_hup",
    "global_password",
    "global_user",
    "global_vhost",
]


@pytest.mark.parametrize("name", MESSAGING)
def test_messaging_has_every_name_of_1_2_1(name: str) -> None:
    """Old imports go on working."""
    assert hasattr(messaging, name)


def test_messaging_has_nothing_else_of_the_environment() -> None:
    """Its attributes end in AttributeError."""
    with pytest.raises(AttributeError, match="no attribute 'global_host'"):
        messaging.global_host  # noqa: B018


def test_the_other_modules_have_every_name_of_1_2_1() -> None:
    """Old imports go on working."""
    assert {"ExitScheduler", "MicroScheduler", "MicroThread"} <= set(vars(microthreads))
    assert {
        "GenericApplication",
        "GenericApplicationExchange",
        "LoggingProducerStub",
    } <= set(vars(generic_application))


def test_all_of_messaging_exists() -> None:
    """What `from postage.messaging import *` promises is there."""
    assert [] == [name for name in messaging.__all__ if not hasattr(messaging, name)]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (messaging.Fingerprint, "name type pid host user vhost"),
        (messaging.GenericProducer, "fingerprint hup vhost"),
        (messaging.GenericConsumer, "eqk hup vhost"),
        (messaging.GenericConsumer.queue_bind, "self exchange_class queue key kwds"),
        (messaging.GenericConsumer.queue_unbind, "self exchange_class queue key"),
        (messaging.GenericConsumer.start_consuming, "self callback"),
        (messaging.GenericConsumer.ack, "self method"),
        (messaging.GenericConsumer.reject, "self method requeue"),
        (messaging.GenericConsumer.decode, "self data"),
        (messaging.GenericConsumer.rpc_reply, "self header message"),
        (messaging.GenericConsumer.add_eqk, "self eqk"),
        (messaging.GenericProducer.consume_rpc, "self queue result_len callback timeout"),
        (messaging.GenericProducer.serialize_text_file, "filepath"),
        (messaging.MessageCommand, "command parameters"),
        (messaging.RpcCommand, "command parameters"),
        (messaging.MessageStatus, "status"),
        (messaging.MessageResult, "value message"),
        (messaging.MessageResultError, "message"),
        (messaging.MessageResultException, "name message"),
        (messaging.Handler, "processor data reply_func"),
        (messaging.MessageProcessor, "fingerprint eqk hup vhost"),
        (messaging.MessageProcessor.add_timeout, "self seconds callback"),
        (microthreads.MicroScheduler, "autoquit"),
        (microthreads.MicroScheduler.add_microthread, "self mthread"),
        (generic_application.LoggingProducerStub, "fingerprint hup vhost"),
    ],
)
def test_a_signature_takes_what_1_2_1_took(function: Any, names: str) -> None:
    """The same parameters under the same names, in the same order."""
    assert names.split() == list(inspect.signature(function).parameters)


def test_an_application_takes_the_arguments_of_1_2_1_first() -> None:
    """`hup` is new, and last."""
    parameters = list(inspect.signature(generic_application.GenericApplication).parameters)
    assert ["fingerprint", "vhost", "groups", "hup"] == parameters


def test_a_handler_decorator_takes_type_and_name_first() -> None:
    """`threaded`, `outbox` and, but for calls, `retry` are new, and last."""
    for decorator, *more in (
        (messaging.MessageHandler, "retry"),
        (messaging.RpcHandler,),
        (messaging.MessageHandlerFullBody, "retry"),
    ):
        parameters = inspect.signature(decorator).parameters
        assert ["message_type", "message_name", "threaded", "outbox", *more] == list(parameters)
        assert parameters["message_name"].default is None


def test_class_attributes_have_the_defaults_of_1_2_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass that relies on one finds it."""
    monkeypatch.delenv("POSTAGE_URL", raising=False)

    producer, consumer = messaging.GenericProducer, messaging.GenericConsumer
    assert [(messaging.Exchange, "nokey")] == producer.eks
    assert (30, 4) == (producer.rpc_timeout, producer.max_retry)
    assert [] == consumer.eqk
    for each in (producer, consumer):
        assert messaging.JsonEncoder is each.encoder_class
        assert "/" == each.vhost
        assert {"host": "localhost", "user": "guest", "password": "guest"} == each.hup
    assert messaging.GenericConsumer is messaging.MessageProcessor.consumer_class
    exchange = generic_application.GenericApplicationExchange
    assert ("generic-application-exchange", "direct", True, False) == (
        exchange.name,
        exchange.exchange_type,
        exchange.durable,
        exchange.auto_delete,
    )


def test_the_globals_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.2.1 froze them at import."""
    monkeypatch.delenv("POSTAGE_URL", raising=False)
    monkeypatch.setenv("POSTAGE_VHOST", "dev")
    monkeypatch.setenv("POSTAGE_USER", "me")
    monkeypatch.setenv("POSTAGE_DEBUG_MODE", "True")

    assert ("dev", "me", "guest") == (
        messaging.global_vhost,
        messaging.global_user,
        messaging.global_password,
    )
    assert "me" == messaging.global_hup["user"]
    assert messaging.debug_mode is True


def test_the_signals_are_value_errors_and_no_errors_of_ours() -> None:
    """`except PostageError` never swallows them; old `except ValueError` clauses still see them."""
    for signal in (errors.ExitScheduler, errors.RejectMessage, errors.AckAndRestart):
        assert issubclass(signal, ValueError)
        assert not issubclass(signal, errors.PostageError)


def test_the_time_out_is_also_the_builtin_one() -> None:
    """Its name is on the wire, so it must be called that."""
    assert issubclass(messaging.TimeoutError, TimeoutError)
    assert "TimeoutError" == messaging.TimeoutError.__name__


def test_the_package_imports_its_modules_when_they_are_asked_for() -> None:
    """`import postage; postage.messaging` works as in 1.2.1."""
    assert postage.messaging is messaging
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        postage.nothing  # noqa: B018


@pytest.mark.parametrize("module", ["postage", "postage.microthreads", "postage.topology"])
def test_what_does_no_io_does_not_import_pika(module: str) -> None:
    """Only the transport, and what is built on it, knows pika."""
    program = f"import sys, {module}; sys.exit('pika' in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", program], check=False).returncode


def test_importing_everything_reads_no_environment_and_starts_no_thread() -> None:
    """A damaged setting is reported where it is used, not at import."""
    program = (
        "import os, threading; os.environ['POSTAGE_URL'] = 'amqp://['\n"
        "from postage import generic_application, messaging, microthreads\n"
        "assert threading.active_count() == 1\n"
        "try: messaging.GenericProducer()\n"
        "except ValueError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert 0 == result.returncode, result.stderr
    assert "POSTAGE_URL" in result.stdout
