# SPDX-License-Identifier: MIT
"""Everything that 1.2.1 had in this module, and its new companions. Re-exports only.

``global_hup``, ``global_vhost``, ``global_user``, ``global_password`` and ``debug_mode`` are
read from the environment whenever they are asked for; 1.2.1 froze them at import.
"""

from __future__ import annotations

from typing import Any

from postage.batch import Batch
from postage.consumer import GenericConsumer
from postage.encoders import Encoder, JsonEncoder
from postage.errors import (
    AckAndRestart,
    FilterError,
    PostageError,
    RejectMessage,
    TimeoutError,
    UnroutableError,
)
from postage.fingerprint import Fingerprint
from postage.futures import Future
from postage.handlers import (
    Handler,
    MessageFilter,
    MessageHandler,
    MessageHandlerFullBody,
    MessageHandlerType,
    RpcHandler,
)
from postage.messages import (
    Message,
    MessageCommand,
    MessageResult,
    MessageResultError,
    MessageResultException,
    MessageStatus,
    RpcCommand,
)
from postage.processor import MessageProcessor
from postage.producer import GenericProducer
from postage.settings import Hup, Settings, debug_mode_from_environment
from postage.topology import DefaultExchange, Exchange, ExchangeType, Queue
from postage.transaction import Transaction

__all__ = [
    "AckAndRestart",
    "Batch",
    "DefaultExchange",
    "Encoder",
    "Exchange",
    "ExchangeType",
    "FilterError",
    "Fingerprint",
    "Future",
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
    "PostageError",
    "Queue",
    "RejectMessage",
    "RpcCommand",
    "RpcHandler",
    "TimeoutError",
    "Transaction",
    "UnroutableError",
]

_GLOBALS = {
    "global_hup": lambda: Hup.from_settings(Settings.from_environment()),
    "global_vhost": lambda: Settings.from_environment().vhost,
    "global_user": lambda: Settings.from_environment().user,
    "global_password": lambda: Settings.from_environment().password,
    "debug_mode": debug_mode_from_environment,
}


def __getattr__(name: str) -> Any:
    if name in _GLOBALS:
        return _GLOBALS[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
