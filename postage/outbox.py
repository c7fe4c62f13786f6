# SPDX-License-Identifier: MIT
"""The outbox of a handler: what the handler sends leaves when it has succeeded.

Each handler runs in a context of its own (`contextvars`), in which its outbox, if it has
one, is *current*: in the scheduler's thread, in a pool's, at each step of a generator and
in a coroutine with its tasks. A producer asks for the current outbox when it composes a
message, and leaves the message there instead of sending it. The processor commits the
outbox before it settles the handler's message.

A thread that a handler starts itself has an empty context, and a forked child is another
process: what they send is not the handler's.
"""

from __future__ import annotations

import collections
import contextvars
import enum
import logging
import os
import threading
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from postage.errors import ClosedError, PostageError
from postage.futures import Future
from postage.messages import new_message_id
from postage.sending import Composed, Report, publishings_of
from postage.transport.publisher import Publisher

if TYPE_CHECKING:
    from postage.transport.hub import Hub

logger = logging.getLogger(__name__)

#: Messages that are handed to the loop together. A larger outbox leaves in pieces, between
#: which the loop has time for others; each piece waits for the confirms of the former.
OUTBOX_WINDOW = 1000
#: The name space of the message ids that are derived. Made up once; another one would make
#: a retry by a newer version repeat what the older one sent under other ids.
_IDS = uuid.UUID("0d3c1a55-2c7e-4a0e-9c55-6f1b6d0f5a57")

_current: contextvars.ContextVar[Outbox | None] = contextvars.ContextVar("outbox", default=None)


class State(enum.Enum):
    """Whether an outbox takes messages."""

    OPEN = "open"
    COMMITTED = "committed"  # its handler succeeded: what comes later is not the handler's
    DROPPED = "dropped"  # its handler failed, or was given up and may still run


@dataclass(frozen=True)
class Parcel:
    """A message in an outbox. ``future`` is that of its sender, if it wants to know."""

    publisher: Publisher
    composed: Composed
    future: Held | None


class Outbox:
    """What one handler sends while it handles one message. A context manager: it ends there.

    Args:
        source: Where the handler's message came from. Handlers of several queues may get
            the same message, and what they send must not have the same ids.
        handler: The name of the handler.
        cause: The id of its message, if that has one.
    """

    def __init__(self, source: str, handler: str, cause: str | None) -> None:
        self.pid = os.getpid()
        self._origin = (source, cause, handler)
        self._cause = cause
        self._numbers: collections.Counter[str] = collections.Counter()
        self._state = State.OPEN
        self._held: collections.deque[Parcel] = collections.deque()
        self._then: list[Callable[[], None]] = []
        self._finally: list[Callable[[], None]] = []
        self._lock = threading.Lock()  # a handler may send from several threads

    def __repr__(self) -> str:
        return f"<Outbox of {self._origin[2]} [{self._state.value}, {len(self._held)} held]>"

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end()

    @property
    def is_committed(self) -> bool:
        """Whether the handler ended well, so that this is not its outbox any more."""
        return self._state is State.COMMITTED

    # -------------------------------------------------------------- while the handler runs

    def message_id(self, kind: Any, addresses: Any) -> str:
        """Return the id of the next message: the same again when its handler runs again.

        Messages are counted apart by what they are and where they go. So a handler that takes
        another way the second time does not give one message the id of another, which a
        receiver that drops repeated ids would lose.

        Without the id of the handler's own message there is nothing to derive it from: two
        equal messages are not the same one.
        """
        if not self._cause:
            return new_message_id()
        what = ascii((*self._origin, kind, addresses))
        with self._lock:
            self._numbers[what] += 1
            return str(uuid.uuid5(_IDS, f"{what} {self._numbers[what]}"))

    def hold(self, publisher: Publisher, composed: Composed, future: Held | None = None) -> bool:
        """Keep a message, and tell whether it is kept; if not, it is not this handler's.

        Raises:
            ClosedError: The handler failed or was given up, so nothing of it may leave.
        """
        return self._keep(lambda: self._held.append(Parcel(publisher, composed, future)))

    def then(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function when all messages are confirmed; at once, if they are.

        Raises:
            ClosedError: The handler failed or was given up.
        """
        act = partial(function, *args)
        if not self._keep(lambda: self._then.append(act)):
            act()

    def defer(self, publisher: Publisher, function: Callable[[], None]) -> bool:
        """Put off what would end a publisher whose messages are here. Returns whether."""
        with self._lock:
            is_needed = any(parcel.publisher is publisher for parcel in self._held)
            if self._state is State.OPEN and is_needed:
                self._finally.append(function)
                return True
            return False

    def _keep(self, keep: Callable[[], None]) -> bool:
        with self._lock:
            if self._state is State.DROPPED:
                raise ClosedError(
                    f"{self._origin[2]} failed or was given up: what it sends does not leave"
                )
            if self._state is State.OPEN:
                keep()
                return True
            return False

    # ------------------------------------------------------------ when the handler has ended

    def commit(self) -> Generator[Any, Any, None]:
        """Send everything in order, and wait for the confirms. A generator: others run.

        Messages of several producers leave in pieces, one after the other, since there is no
        order between two channels. After a failure no further piece leaves.

        Raises:
            BatchError: Not every message was confirmed.
        """
        with self._lock:
            self._state = State.COMMITTED
        report = Report()
        while self._held and not report.has_failures:
            yield self._send(self._take(), report)
        for parcel in self._held:
            report.note_unsent(parcel.composed.message_id)
        report.check()
        for act in self._then:
            act()

    def _take(self) -> list[Parcel]:
        publisher = self._held[0].publisher
        taken: list[Parcel] = []
        while self._held and self._held[0].publisher is publisher and len(taken) < OUTBOX_WINDOW:
            taken.append(self._held.popleft())
        return taken

    @staticmethod
    def _send(parcels: list[Parcel], report: Report) -> Future[None]:
        """Send messages of one producer. The future is set when the fate of all is known."""
        publisher = parcels[0].publisher
        sent: Future[None] = Future(publisher.hub.wait, publisher.hub.nudge)
        expected = report.settled + len(parcels)

        def finished(parcel: Parcel, error: PostageError | None) -> None:
            report.note(parcel.composed.message_id, error)
            if parcel.future is not None:
                parcel.future.settle(error)
            if report.settled == expected:
                sent.set(None)

        publishings = [
            publishing
            for parcel in parcels
            for publishing in publishings_of(parcel.composed, partial(finished, parcel))
        ]
        publisher.hub.call(partial(publisher.send, publishings), together=True)
        return sent

    def _end(self) -> None:
        """Drop what was not sent, and let those go on who had to wait for the end."""
        with self._lock:
            if self._state is State.OPEN:
                self._state = State.DROPPED
        while self._held:
            future = self._held.popleft().future
            if future is not None:
                future.settle(ClosedError(f"not sent: {self._origin[2]} failed"))
        for function in self._finally:
            try:
                function()
            except PostageError:
                logger.exception("a producer of %s could not be closed", self._origin[2])


class Held(Future[None]):
    """The future of a message in an outbox.

    It is set when the handler has ended and the message is confirmed. So the handler itself
    would wait for ever; there, waiting for it is over at once.
    """

    __slots__ = ("_outbox",)

    def __init__(self, outbox: Outbox, hub: Hub) -> None:
        super().__init__(hub.wait, hub.nudge)
        self._outbox = outbox

    def settle(self, error: PostageError | None) -> None:
        """Set it to None or to an error."""
        if error is None:
            self.set(None)
        else:
            self.fail(error)

    def is_own(self) -> bool:
        """Tell whether its own handler is running here."""
        return current() is self._outbox

    def result(self, timeout: float | None = None) -> None:
        """Wait until it is confirmed. Does not wait in its own handler."""
        if not self.is_own():
            super().result(timeout)

    def __await__(self) -> Generator[Any, None, None]:
        if not self.is_own():
            yield from super().__await__()


def current() -> Outbox | None:
    """Return the outbox of the handler that runs here, or None if there is none."""
    outbox = _current.get()
    if outbox is None or outbox.is_committed or outbox.pid != os.getpid():
        return None
    return outbox


def context_of(outbox: Outbox | None) -> contextvars.Context:
    """Return a context for a handler, in which this outbox, or none, is current."""
    context = contextvars.copy_context()
    context.run(_current.set, outbox)
    return context


def steps(
    context: contextvars.Context, generator: Generator[Any, Any, Any]
) -> Generator[Any, Any, None]:
    """Go on with a generator as ``yield from`` does, with each of its steps in a context."""
    step: Callable[[], Any] = partial(next, generator)
    while True:
        try:
            wanted = context.run(step)
        except StopIteration:
            return
        if isinstance(wanted, Held) and context.run(wanted.is_own):
            step = partial(generator.send, None)
            continue
        try:
            step = partial(generator.send, (yield wanted))
        except GeneratorExit:
            context.run(generator.close)
            raise
        except BaseException as error:
            step = partial(generator.throw, error)
