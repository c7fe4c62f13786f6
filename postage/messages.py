# SPDX-License-Identifier: MIT
"""The messages: what a body consists of, and how it is made.

A body is a dict of exactly seven keys, and the wire format depends on that. Whatever else
travels with a message is an AMQP property or header, and no concern of this module.
"""

from __future__ import annotations

import functools
import itertools
import os
import reprlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

#: Tells that no parameters were given, where None would be a parameter.
_NO_PARAMETERS: Mapping[str, Any] = {}


class Message:
    """A message of any type; its arguments are its content.

    Subclass it for types of your own. Messages are equal if their bodies are.

    Attributes:
        type: What it asks or tells: "command", "status", "result" or your own.
        name: Its name within the type, where the constructor takes none.
        category: "message", or "rpc" if an answer is expected.
        boolean_value: Its truth value; false for results that are no success.
        body: The dict that travels.

    Args:
        *args: What becomes ``content["args"]``, if there is any.
        **kwds: What becomes ``content["kwds"]``, if there is any.
    """

    type = "none"
    name = "none"
    category = "message"
    boolean_value = True

    def __init__(self, /, *args: Any, **kwds: Any) -> None:
        content: dict[str, Any] = {}
        if args:
            content["args"] = args
        if kwds:
            content["kwds"] = kwds
        self._make_body(self.name, content)

    def _make_body(self, name: str, content: dict[str, Any]) -> None:
        self.body: dict[str, Any] = {
            "type": self.type,
            "name": name,
            "category": self.category,
            "version": "2",
            "fingerprint": {},
            "content": content,
            "_reserved": {},
        }

    def fingerprint(self, /, *mapping: Mapping[str, Any], **kwds: Any) -> None:
        """Add to the fingerprint, from a dict or from keywords."""
        self.body["fingerprint"].update(*mapping, **kwds)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        return self.body == other.body

    def __hash__(self) -> int:
        # The rest of the body may hold lists and dicts, which have no hash.
        return hash((self.body["type"], self.body["name"], self.body["category"]))

    def __bool__(self) -> bool:
        return self.boolean_value

    def __str__(self) -> str:
        return str(self.body)

    def __repr__(self) -> str:
        name, content = self.body["name"], reprlib.repr(self.body["content"])
        return f"<{type(self).__name__} {name} {content}>"


class MessageCommand(Message):
    """A command that nobody answers.

    Args:
        command: Its name.
        parameters: What the receiver needs to know; of any kind.
    """

    type = "command"

    def __init__(self, command: Any, parameters: Any = _NO_PARAMETERS) -> None:
        content = {"parameters": {} if parameters is _NO_PARAMETERS else parameters}
        self._make_body(str(command), content)


class RpcCommand(MessageCommand):
    """A command that is answered by a result."""

    category = "rpc"


class MessageStatus(Message):
    """The news of a status.

    Args:
        status: What becomes the name of the message.
    """

    type = "status"

    def __init__(self, status: Any) -> None:
        self._make_body(str(status), {})


class MessageResult(Message):
    """The answer to a command: it succeeded.

    Attributes:
        result_type: "success", "error" or "exception".

    Args:
        value: The result.
        message: Something for people.
    """

    type = "result"
    result_type = "success"

    def __init__(self, value: Any, message: Any = "") -> None:
        content = {"type": self.result_type, "value": value, "message": message}
        self._make_body(self.name, content)

    @property
    def value(self) -> Any:
        """The result; None for an error, the name of the class for an exception."""
        return self.body["content"]["value"]

    @property
    def message(self) -> Any:
        """What is said about it."""
        return self.body["content"]["message"]


class MessageResultError(MessageResult):
    """The answer to a command: it failed, which was foreseen. It is false.

    Args:
        message: What went wrong.
    """

    boolean_value = False
    result_type = "error"

    def __init__(self, message: Any) -> None:
        super().__init__(None, message)


class MessageResultException(MessageResult):
    """The answer to a command: an exception was raised. It is false.

    Args:
        name: The name of the exception's class, which is the value of the result.
        message: What the exception says.
    """

    boolean_value = False
    result_type = "exception"

    def __init__(self, name: Any, message: Any) -> None:
        super().__init__(name, message)


def message_from_reply(body: object) -> MessageResult:
    """Return the result that a decoded reply contains. Never raises for what a peer sent.

    Args:
        body: What the reply was decoded to, which should be the body of a result.

    Returns:
        The result, with the fingerprint of the replier; an error if the reply is malformed.
    """
    result: MessageResult
    match body:
        case {"content": {"type": "success", "value": value, "message": message}}:
            result = MessageResult(value, message)
        case {"content": {"type": "error", "message": message}}:
            result = MessageResultError(message)
        case {"content": {"type": "exception", "value": name, "message": message}}:
            result = MessageResultException(name, message)
        case {"content": content}:
            result = MessageResultError(f"Malformed reply {reprlib.repr(content)}")
        case _:
            result = MessageResultError(f"Malformed reply {reprlib.repr(body)}")
    fingerprint = body.get("fingerprint") if isinstance(body, dict) else None
    if isinstance(fingerprint, dict):  # a class pattern would take three times as long
        result.fingerprint(fingerprint)
    return result


def command_parameters(args: tuple[Any, ...], kwds: Mapping[str, Any]) -> Any:
    """Return the parameters of a command that was called like a function.

    >>> command_parameters((), {})
    {}
    >>> command_parameters(("a",), {})
    'a'
    >>> command_parameters(("a", "b"), {})
    ['a', 'b']
    >>> command_parameters((), {"x": 1})
    {'x': 1}
    >>> command_parameters((), {"parameters": "a"})
    'a'
    >>> command_parameters(("a",), {"x": 1})
    {'args': ['a'], 'kwds': {'x': 1}}
    """
    if args and kwds:
        return {"args": list(args), "kwds": dict(kwds)}
    if args:
        return args[0] if len(args) == 1 else list(args)
    return kwds["parameters"] if len(kwds) == 1 and "parameters" in kwds else dict(kwds)


def new_message_id() -> str:
    """Return an id that no other message has, of this process or of any other."""
    prefix, numbers = _numbering()
    return f"{prefix}-{next(numbers)}"


@functools.cache
def _numbering() -> tuple[str, Iterator[int]]:
    """Return what the ids of this process are made of.

    Threads that meet here for the first time may each get a prefix of their own, which is
    as good; `next()` on a count is atomic.
    """
    return uuid.uuid4().hex, itertools.count(1)


os.register_at_fork(after_in_child=_numbering.cache_clear)
