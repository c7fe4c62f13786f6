# SPDX-License-Identifier: MIT
"""What marks a method, or a class, as a handler of messages, and what filters them.

Decorators only note facts on what they decorate. `MessageHandlerType` collects the facts
of a class and its bases into one table, by which a processor looks handlers up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from postage.retry import RetryPolicy

F = TypeVar("F", bound=Callable[..., Any])

#: Category, type and name of the messages that a handler handles; the name None stands
#: for those that no handler of this type names.
Key = tuple[str, str, "str | None"]


@dataclass(frozen=True)
class Registration:
    """One handler of a class.

    ``attribute`` is its name there, so that a subclass overrides it by that name.
    ``body_key`` is the part of the body that it gets, None for all of it. ``outbox`` says
    whether it has one, ``retry`` how often its messages are tried; None: as its processor says.
    """

    attribute: str
    body_key: str | None
    threaded: bool
    outbox: bool | None = None
    retry: RetryPolicy | None = None


class MessageHandler:
    """Marks what handles messages of a type and name.

    The decorated method is called with the content of the message, a dict; a decorated
    `Handler` subclass finds it as ``self.data``. It may be

    * a plain function: it runs to its end before the component does anything else;
    * a generator function: a microthread, which lets others run at each ``yield``;
    * a coroutine function: it runs in the event loop that the process keeps for that.

    Args:
        message_type: "command", "status", "result", or a type of your own.
        message_name: The name of the message. None: whatever no other handler names.
        threaded: Run it in a pool of threads; for what blocks, such as a database driver.
        outbox: Whether what it sends leaves only if it succeeds. None: as the attribute
            `outbox` of its processor says.
        retry: How often its message is tried. None: as its processor says.
    """

    category = "message"
    body_key: str | None = "content"

    def __init__(
        self,
        message_type: str,
        message_name: str | None = None,
        threaded: bool = False,
        *,
        outbox: bool | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.handler_data = (self.category, message_type, message_name, self.body_key)
        self.threaded = threaded
        self.outbox = outbox
        self.retry = retry

    def __call__(self, decorated: F) -> F:
        """Note on a function or class what it handles. Several may be stacked."""
        noted = vars(decorated).get("_message_handler", ())
        note = (self.handler_data, self.threaded, self.outbox, self.retry)
        decorated._message_handler = (*noted, note)  # type: ignore[attr-defined]  # ours
        return decorated


class RpcHandler(MessageHandler):
    """Marks what answers RPC calls of a type and name.

    The decorated method is called with the content and with a function that takes the
    reply: a `MessageResult`, one of the other results, or any value.
    """

    category = "rpc"

    def __init__(
        self,
        message_type: str,
        message_name: str | None = None,
        threaded: bool = False,
        *,
        outbox: bool | None = None,
    ) -> None:
        # No retry: the caller has its exception at once, and decides.
        super().__init__(message_type, message_name, threaded, outbox=outbox)


class MessageHandlerFullBody(MessageHandler):
    """Like `MessageHandler`, but the handler gets the whole body, with the fingerprint."""

    body_key = None


class Handler:
    """A handler as a class, nested in a processor and decorated. Override `call()`.

    Attributes:
        processor: Who received the message.
        data: The content, or the whole body.
        reply_func: Takes the reply, for RPC.
        result: What `call()` returned: a generator is run as a microthread.
    """

    def __init__(
        self, processor: Any, data: Any, reply_func: Callable[[Any], None] | None = None
    ) -> None:
        self.processor = processor
        self.data = data
        self.reply_func = reply_func
        self.result = self.call()

    def call(self) -> Any:
        """Handle the message."""


class MessageFilter:
    """Lets a callable look at what a handler is about to get.

    It is called with a copy of the data and returns what the handler gets instead. Any
    exception that it raises keeps the message from this handler. Several filters run from
    the bottom up, and stand above or below the handler's own decorator.

    Args:
        callable_obj: Takes the data, then the other arguments.
        *args: Further arguments for it.
        **kwds: Further arguments for it.
    """

    def __init__(self, callable_obj: Callable[..., Any], *args: Any, **kwds: Any) -> None:
        self.filter = (callable_obj, args, kwds)

    def __call__(self, decorated: F) -> F:
        """Add the filter to a function or class, and not to the class that it inherits from."""
        decorated.filters = [*getattr(decorated, "filters", []), self.filter]  # type: ignore[attr-defined]
        return decorated


class MessageHandlerType(type):
    """The metaclass of processors: gives every class its own table of handlers.

    Attributes:
        _message_handlers: By category, type and name: the handlers, those of the most
            derived class first.
    """

    _message_handlers: dict[Key, tuple[Registration, ...]]

    def __init__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> None:
        super().__init__(name, bases, attributes)
        cls._message_handlers = _table(cls)


def _table(cls: type) -> dict[Key, tuple[Registration, ...]]:
    """Collect what is noted on the attributes of a class and of all its bases.

    Noted is the attribute's name: what a subclass puts in its place is called instead,
    decorated or not; decorated, it handles what its own decorator says.
    """
    noted: dict[str, tuple[tuple[Any, bool, bool | None, RetryPolicy | None], ...]] = {}
    for base in reversed(cls.__mro__):
        for attribute, value in vars(base).items():
            own = getattr(value, "__dict__", {}).get("_message_handler", ())
            if own:
                noted.pop(attribute, None)
                noted[attribute] = own
            elif attribute in noted and not callable(value):
                del noted[attribute]  # switched off, as in `msg_quit = None`
    order = list(noted)
    table: dict[Key, list[Registration]] = {}
    for attribute in _most_derived_first(cls, order):
        for (category, message_type, message_name, body_key), threaded, outbox, retry in noted[
            attribute
        ]:
            key = (category, message_type, message_name)
            registration = Registration(attribute, body_key, threaded, outbox, retry)
            table.setdefault(key, []).append(registration)
    return {key: tuple(registrations) for key, registrations in table.items()}


def _most_derived_first(cls: type, attributes: list[str]) -> list[str]:
    """Sort by the class that says what the attribute is, then by order of definition.

    A custom handler of 'quit' must run before the inherited one, which ends it all.
    """
    depth = {
        attribute: next(i for i, base in enumerate(cls.__mro__) if attribute in vars(base))
        for attribute in attributes
    }
    return sorted(attributes, key=lambda attribute: depth[attribute])
