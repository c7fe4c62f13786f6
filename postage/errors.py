# SPDX-License-Identifier: MIT
"""Every error and every signal of postage.

Errors say that something went wrong and share one root::

    PostageError
    ├── ConfigurationError          a setting, an argument or a declaration makes no sense
    ├── EncodingError               a value that cannot be written to the wire
    │   └── DecodeError             bytes from the wire that cannot be read
    ├── FilterError                 a message filter discards a message
    ├── PermanentError              a handler fails in a way that no later attempt would mend
    ├── TimeoutError                a result did not come in time (also the builtin one)
    ├── HubReentered                blocking code ran inside a callback of the loop
    └── TransportError
        ├── ConnectionFailedError   no broker could be reached
        ├── ConnectionLostError     the connection went away in the middle of something
        ├── ForkedError             used in a child process, made in its parent
        ├── ClosedError             used after close()
        ├── ChannelClosedError      the broker refused, with an AMQP reply code
        │   └── MismatchError       it exists already, with other arguments
        │       ├── ExchangeMismatchError
        │       └── QueueMismatchError
        ├── MessageNotFoundError    there is no such message, any more
        └── PublishError            a message was not, or perhaps not, delivered
            ├── UnroutableError     no queue is bound to the key
            ├── NackedError         the broker refused to store it
            ├── PublishRefusedError the broker refused to take it (also a ChannelClosedError)
            ├── BrokerBlockedError  held back by an alarm, certainly not sent
            ├── PublishTimeoutError still waiting for a connection, certainly not sent
            ├── PublishUnknownError sent, and the confirm never came
            └── BatchError          several messages, each with its fate

Signals steer a component and are no errors. They keep the ``ValueError`` base
that they had in 1.2.1, and are let through wherever errors are caught::

    Signal
    ├── ExitScheduler               end the scheduler
    ├── RejectMessage               refuse this message
    ├── AckAndRestart               settle this message, then run the program anew
    └── Retry                       handle this message again, later
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

#: Reply codes of AMQP 0-9-1 (section 1.5 of the specification) that are told apart.
ACCESS_REFUSED = 403
NOT_FOUND = 404
RESOURCE_LOCKED = 405
PRECONDITION_FAILED = 406
#: The lowest of those that end the whole connection for something that was asked.
HARD_ERRORS = 500


class PostageError(Exception):
    """The root of all errors that postage raises."""


class ConfigurationError(PostageError, ValueError):
    """Raised when a setting, an argument or a declaration makes no sense."""


class EncodingError(PostageError, ValueError):
    """Raised when a value cannot be written to the wire."""


class DecodeError(EncodingError):
    """Raised when a body cannot be read.

    Args:
        reason: What is wrong with it, for people.
        data: The body as it arrived.
    """

    def __init__(self, reason: str, data: Any = b"") -> None:
        super().__init__(reason)
        self.reason = reason
        self.data = data


class FilterError(PostageError):
    """Raised by a message filter to discard a message."""


class PermanentError(PostageError):
    """Raised by a handler to have its message parked at once: trying again would not help."""


class TimeoutError(PostageError, builtins.TimeoutError):
    """Raised when a result did not come in time.

    Its name is part of the wire format: an RPC call that nobody answered ends in
    an exception reply that is called ``TimeoutError``, as in 1.2.1.
    """


class HubReentered(PostageError, RuntimeError):
    """Raised when blocking code runs inside a callback of the I/O loop."""


class TransportError(PostageError):
    """Raised when the broker, or the way to it, fails."""


class ConnectionFailedError(TransportError):
    """Raised when no broker could be reached in time."""


class ConnectionLostError(TransportError):
    """Raised when the connection went away in the middle of an operation.

    Args:
        reason: Why, for people.
        code: The AMQP reply code, such as 320, if the broker closed it.
        attempt: What was attempted, if the broker closed it for that.
    """

    def __init__(self, reason: str = "", code: int | None = None, attempt: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.attempt = attempt

    @property
    def is_hard(self) -> bool:
        """Whether the broker closed it for something that it was asked.

        So it does for what AMQP calls a hard error (0-9-1, 1.5). Those with lower codes, as 320,
        are for its own reasons, or for what could not happen in a question.
        """
        return self.code is not None and self.code >= HARD_ERRORS

    def __str__(self) -> str:
        return f"{self.attempt}: {self.reason}" if self.attempt else self.reason


class ForkedError(TransportError):
    """Raised when an object that belongs to the parent is used in a forked child."""


class ClosedError(TransportError):
    """Raised when a producer, consumer or connection is used after ``close()``."""


class ChannelClosedError(TransportError):
    """Raised when the broker refuses an operation and closes the channel.

    Args:
        code: The AMQP reply code, such as 404.
        text: The broker's own words.
        attempt: What was attempted, as "declare queue 'x'".
        advice: What to do about it.
    """

    def __init__(self, code: int, text: str, attempt: str = "", advice: str = "") -> None:
        super().__init__(code, text, attempt, advice)
        self.code = code
        self.text = text
        self.attempt = attempt
        self.advice = advice

    def __str__(self) -> str:
        head = f"{self.attempt}: " if self.attempt else ""
        tail = f". {self.advice}" if self.advice else ""
        text = self.text.removesuffix(".") if tail else self.text
        return f"{head}the broker answered {self.code} {text}{tail}"


class MismatchError(ChannelClosedError):
    """Raised when something of that name exists with other arguments."""


class ExchangeMismatchError(MismatchError):
    """Raised when an exchange exists with another type or other arguments."""


class QueueMismatchError(MismatchError):
    """Raised when a queue exists with another type or other arguments."""


class MessageNotFoundError(TransportError):
    """Raised when a message is not there, or not any more: it is too late to cancel it."""


class PublishError(TransportError):
    """Raised when a message was not delivered, or perhaps not."""


class UnroutableError(PublishError):
    """Raised when the broker returned a mandatory message: no queue is bound to its key.

    Args:
        failed: The (exchange name, routing key) pairs that nobody is bound to.
        delivered: The pairs of the same call that did arrive.
    """

    def __init__(
        self,
        failed: Sequence[tuple[str, str]],
        delivered: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(failed, delivered)
        self.failed = list(failed)
        self.delivered = list(delivered)

    @property
    def fact(self) -> str:
        """What happened, without what to do about it."""
        # The default exchange: every queue is bound to it by its name, and nothing else is.
        absent = ", ".join(repr(key) for name, key in self.failed if not name)
        pairs = ", ".join(f"exchange {name!r} key {key!r}" for name, key in self.failed if name)
        facts = [f"there is no queue {absent}"] if absent else []
        facts += [f"no queue is bound to {pairs}"] if pairs else []
        others = f"; delivered to {len(self.delivered)} other pair(s) of the same call"
        return " and ".join(facts) + (others if self.delivered else "")

    def __str__(self) -> str:
        verb = "binds" if any(name for name, _ in self.failed) else "declares"
        return f"{self.fact}. Start the component that {verb} it, or send with _mandatory=False"


class NackedError(PublishError):
    """Raised when the broker refused to store a message, for instance in a full queue."""


class PublishRefusedError(ChannelClosedError, PublishError):
    """Raised when the broker refused to take a message, and closed the channel over it.

    As from a user who may not write (403), or a message that is too large (406).
    """


class BrokerBlockedError(PublishError):
    """Raised when a resource alarm of the broker held a message back: it was certainly not sent."""


class PublishTimeoutError(PublishError, builtins.TimeoutError):
    """Raised when no connection was to be had before the deadline: certainly not sent."""


class PublishUnknownError(PublishError):
    """Raised when a message was written and its confirm never came: it may have arrived."""


class BatchError(PublishError):
    """Raised if not every message of a batch, a transaction or an outbox was confirmed.

    Args:
        confirmed: The message ids that the broker confirmed.
        failed: Message id and error of those that certainly did not arrive everywhere.
        unknown: Message id and error of those that may have arrived.
    """

    def __init__(
        self,
        confirmed: Sequence[str],
        failed: Sequence[tuple[str, Exception]],
        unknown: Sequence[tuple[str, Exception]],
    ) -> None:
        super().__init__(confirmed, failed, unknown)
        self.confirmed = list(confirmed)
        self.failed = list(failed)
        self.unknown = list(unknown)

    def __str__(self) -> str:
        text = (
            f"{len(self.confirmed)} message(s) confirmed, "
            f"{len(self.failed)} failed, {len(self.unknown)} unknown"
        )
        first = (self.failed or self.unknown)[:1]
        return text + "".join(f"; the first: message {key}: {error}" for key, error in first)


def printable(error: BaseException | None) -> str:
    """Return what an error says, also if it has a `__str__` that fails."""
    try:
        return str(error)
    except Exception as failure:
        return f"({type(error).__name__} has no text: {type(failure).__name__})"


class Signal(ValueError):
    """The base of the exceptions that steer a component and are no errors."""


class ExitScheduler(Signal):
    """Raised by a microthread to end its scheduler, after the others have left."""


class RejectMessage(Signal):
    """Raised by a handler to refuse its message: the broker dead-letters or drops it."""


class AckAndRestart(Signal):
    """Raised by a handler to settle its message and replace the program by a new run."""


class Retry(Signal):
    """Raised by a handler to have its message handled again, later. It counts as an attempt.

    Args:
        delay: Seconds until then, or a `timedelta`; None: as its retry policy says.

    Raises:
        ConfigurationError: The delay is no finite number from 0 on.
    """

    def __init__(self, delay: float | timedelta | None = None) -> None:
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        if seconds is not None and not (
            isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            and 0 <= seconds < math.inf
        ):
            raise ConfigurationError(
                f"the delay of a Retry is a number of seconds from 0 on, not {delay!r}"
            )
        super().__init__(delay)
        self.delay = None if seconds is None else float(seconds)

    def __str__(self) -> str:
        return "again later" if self.delay is None else f"again in {self.delay:g} s"
