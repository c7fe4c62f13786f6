# SPDX-License-Identifier: MIT
"""One connection to the broker: how it comes up, how it comes back, how it ends.

A `Connection` outlives the connections of pika that it makes one after the other. Its
*tenants*, publishers and subscribers, are told when there is a new one and when it is
gone; each opens a channel of its own and puts its state back on it.

Methods without an underscore say in their docstring who may call them: any thread, or
only the leader of the hub (see `postage.transport.hub`).
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import enum
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import pika
from pika import exceptions as pika_errors
from pika.adapters.utils import connection_workflow
from pika.channel import Channel

from postage.errors import (
    ACCESS_REFUSED,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    ConnectionLostError,
    ForkedError,
    MismatchError,
    TransportError,
)
from postage.futures import Future
from postage.health import Incident, incident
from postage.settings import Settings, address_of, adopt_on_mismatch, variable_of
from postage.topology import ExchangeSpec, QueueSpec
from postage.transport import hub as hubs
from postage.transport import tls
from postage.transport.conversation import (
    Declarable,
    Done,
    Preparation,
    Script,
    converse,
    declare,
    translated,
)
from postage.transport.wire import Wire

logger = logging.getLogger(__name__)

#: Seconds of the first and of the longest pause between two rounds over the hosts. Of a hundred
#: components some have had short pauses only, and many of them, so the last one comes back the
#: longest pause after the broker, however short the outage was.
BACKOFF_FIRST, BACKOFF_LONGEST = 0.5, 10.0
#: Seconds that a connection must have lasted for the pauses to begin small again.
STABLE = 30.0
#: Seconds that a clean close may take before the socket is simply dropped.
CLOSE_GRACE = 5.0
#: Declarations that a connection remembers. To forget one costs another declaration.
KNOWN_LIMIT = 1_000
#: Seconds until a question asks again for a channel, when all of the connection are in use.
CHANNEL_PAUSE = 0.05
#: The oldest broker that declares what postage declares: quorum queues with a message
#: TTL and at-least-once dead lettering came with RabbitMQ 3.10.
OLDEST_RABBITMQ = (3, 10)
#: How RabbitMQ answers a login to a virtual host that is not there, or not for this user.
NOT_ALLOWED = 530

#: What pika makes of a connection that ends in the middle of the login, whatever the reason.
_GUESSES = (pika_errors.ProbableAuthenticationError, pika_errors.ProbableAccessDeniedError)
#: The real reason in the text of such an error, if it was the broker.
_CLOSED_BY_BROKER = re.compile(r"ConnectionClosedByBroker: \((\d+)\) (['\"])(.*)\2", re.DOTALL)


_Host = tuple[str, int]


class State(enum.Enum):
    """What a connection is doing."""

    DISCONNECTED = "disconnected"  # nobody asked yet, or between two attempts
    CONNECTING = "connecting"
    READY = "ready"
    BLOCKED = "blocked"  # by an alarm of the broker: it reads nothing more from us
    DRAINING = "draining"  # closing, until the broker agreed or the grace is over
    CLOSED = "closed"


class Event(enum.Enum):
    """What happens to a connection."""

    ATTEMPT = enum.auto()
    OPENED = enum.auto()
    LOST = enum.auto()  # or the attempt failed
    BLOCKED = enum.auto()
    UNBLOCKED = enum.auto()
    CLOSE = enum.auto()  # by us


#: Every event that may happen in a state, and where it leads. A pair that is not here
#: is a mistake of this module, except that nothing follows CLOSED.
TRANSITIONS: dict[State, dict[Event, State]] = {
    State.DISCONNECTED: {
        Event.ATTEMPT: State.CONNECTING,
        Event.CLOSE: State.CLOSED,
    },
    State.CONNECTING: {
        Event.OPENED: State.READY,
        Event.LOST: State.DISCONNECTED,
        Event.CLOSE: State.DRAINING,
    },
    State.READY: {
        Event.BLOCKED: State.BLOCKED,
        Event.UNBLOCKED: State.READY,
        Event.LOST: State.DISCONNECTED,
        Event.CLOSE: State.DRAINING,
    },
    State.BLOCKED: {
        Event.BLOCKED: State.BLOCKED,
        Event.UNBLOCKED: State.READY,
        Event.LOST: State.DISCONNECTED,
        Event.CLOSE: State.DRAINING,
    },
    State.DRAINING: {
        Event.OPENED: State.DRAINING,
        Event.BLOCKED: State.DRAINING,
        Event.UNBLOCKED: State.DRAINING,
        Event.LOST: State.CLOSED,
        Event.CLOSE: State.DRAINING,
    },
    State.CLOSED: {},
}


class Tenant(Protocol):
    """Who lives on a connection. All methods are called by the leader."""

    def connected(self, amqp: pika.SelectConnection) -> None:
        """There is a new connection: open a channel on it."""

    def disconnected(self, error: TransportError) -> None:
        """It is gone, and with it every channel."""

    def refused(self, error: ConnectionFailedError) -> None:
        """The first attempt was turned down for good: a wrong password, no such vhost."""

    def blocked(self, blocked: bool) -> None:
        """An alarm of the broker began or ended."""


class _Question:
    """A script that somebody wants run on a channel of its own, until it has an answer."""

    __slots__ = ("done", "expires", "is_suspect", "script")

    def __init__(
        self, script: Callable[[Channel], Script[Any]], done: Done, expires: float | None
    ) -> None:
        self.script = script
        self.done = done
        self.expires = expires
        self.is_suspect = False  # in flight when the broker closed a connection over something


def backoff(failures: int, chance: float) -> float:
    """Return the seconds to wait after a number of failed rounds.

    Args:
        failures: Rounds over all hosts that failed in a row, 1 or more.
        chance: From 0 to 1. Full jitter: a hundred components that lost the same broker
            come back spread over the whole pause.
    """
    return chance * min(BACKOFF_LONGEST, BACKOFF_FIRST * 2.0 ** min(failures - 1, 16))


def is_adopted(error: MismatchError) -> bool:
    """Tell whether what exists with other arguments is used as it is. Says so in the log."""
    try:
        adopted = adopt_on_mismatch()
    except ConfigurationError as mistake:  # in the loop there is nobody to raise it for
        logger.error("%s", mistake)
        return False
    if adopted:
        logger.warning("%s; used as it is", error)
    return adopted


class Connection:
    """A connection to one broker or cluster, kept up for as long as somebody uses it.

    Made by `acquire()`, which shares it. ``purpose`` is "publish" or "consume": an alarm
    of the broker stops a connection that publishes, and must not stop acknowledgements.
    """

    def __init__(self, hub: hubs.Hub, settings: Settings, purpose: str) -> None:
        self.hub = hub
        self.settings = settings
        self.purpose = purpose
        self.state = State.DISCONNECTED
        #: Why there is no connection, if there was trouble.
        self.last_error: TransportError | None = None
        #: How often a connection was lost, and how often there was one again.
        self.losses = self.reconnects = 0
        #: The last trouble, also if it is over.
        self.incident: Incident | None = None
        #: Why the broker blocks publishers, or did the last time, in its words.
        self.alarm = ""
        self.amqp: pika.SelectConnection | None = None
        self.users = 0
        self._tenants: list[Tenant] = []
        self._questions: collections.deque[_Question] = collections.deque()
        self._on_trial: _Question | None = None  # the one suspect that is asked again
        #: What was declared, and until when that is taken for granted.
        self._declared: dict[Declarable | Preparation, float] = {}
        self._hosts: list[_Host] = []
        self._host: _Host = settings.hosts[0]
        #: Why each host could not be had, since there was a connection.
        self._failures: dict[_Host, tls.Refusal] = {}
        self._warned = False
        self._rounds = 0
        self._was_ready = False
        self._interrupted = False
        self._ready_since = 0.0
        self._aborted = False
        self._timer: object | None = None
        self._clean: Future[bool] = Future(hub.wait)
        hub.on_broken.append(self._abandon)

    def __repr__(self) -> str:
        return f"<Connection {self.settings} to {self.purpose} [{self.state.value}]>"

    # ------------------------------------------------------------------- any thread

    def ask(
        self, script: Callable[[Channel], Script[Any]], timeout: float | None, what: str
    ) -> Any:
        """Run a script on a channel of its own, and return its result.

        A lost connection in the middle of it runs it again on the next one, so a script
        must be repeatable, as declarations are. If the broker closed the connection over
        something that it was asked, that is done once: the first time it may have been
        over somebody else's question.

        Args:
            script: Takes the channel.
            timeout: Seconds for all of it, the time without a connection included. None
                for as long as it takes.
            what: What is attempted, for the error.

        Raises:
            ConnectionFailedError: There was no answer in time, or the broker turned the
                login down.
            ChannelClosedError: The broker refused.
            ConnectionLostError: It closed the connection over this, twice.
        """
        answer: Future[Any] = Future(self.hub.wait)
        expires = None if timeout is None else time.monotonic() + timeout

        def done(result: Any, error: TransportError | None) -> None:
            if error is None:
                answer.set(result)
            else:
                answer.fail(error)

        question = _Question(script, done, expires)
        if not self.hub.wait(answer.ready, timeout, first=lambda: self._put(question)):
            raise ConnectionFailedError(f"{what}: {self.overdue(f'within {timeout:g} s')}")
        return answer.result()

    def overdue(self, within: str) -> str:
        """Return what to say of an answer that did not come in time.

        Args:
            within: The time, as "within 3 s".
        """
        if self._is_up:
            return f"{self.settings} did not answer {within}{self.trouble()}"
        failures = dict(self._failures)
        reason = _reasons(failures, self.settings) if failures else self.last_error
        return f"no connection to {self.settings} {within}" + (f": {reason}" if reason else "")

    def trouble(self) -> str:
        """Return what is known to be wrong, as the end of a sentence."""
        if self.state is State.BLOCKED:
            return f"; an alarm of the broker blocks publishers ({self.alarm})"
        return f"; {self.last_error}" if self.last_error is not None else ""

    def close(self, grace: float = CLOSE_GRACE) -> bool:
        """End the connection, for all tenants.

        Args:
            grace: Seconds that the broker has to agree; then the socket is dropped.

        Returns:
            Whether the broker agreed, so that all that was written before was taken.
        """
        clean = Future[bool](self.hub.wait)

        def closing() -> None:
            self._close(grace, clean)

        if not self.hub.wait(clean.ready, grace + 2 * CLOSE_GRACE, first=closing):
            return False
        with contextlib.suppress(ValueError):
            self.hub.on_broken.remove(self._abandon)
        return clean.result()

    # -------------------------------------------------------------- from the leader

    def join(self, tenant: Tenant) -> None:
        """Add a tenant and connect if there is no connection yet."""
        self._tenants.append(tenant)
        if self.is_open:
            assert self.amqp is not None
            tenant.connected(self.amqp)
        self._connect_soon()

    def leave(self, tenant: Tenant) -> None:
        """Remove a tenant."""
        with contextlib.suppress(ValueError):
            self._tenants.remove(tenant)

    @property
    def is_open(self) -> bool:
        """Whether channels can be opened."""
        # pika tells the channels of a loss first, and us only then.
        return self._is_up and self.amqp is not None and self.amqp.is_open and not self._aborted

    def probe(
        self, script: Callable[[Channel], Script[Any]], done: Done, timeout: float | None = None
    ) -> None:
        """Run a script on a channel of its own; the loop-side form of `ask()`."""
        expires = None if timeout is None else time.monotonic() + timeout
        self._put(_Question(script, done, expires))

    def knows(self, what: Declarable | Preparation) -> bool:
        """Tell whether something was declared on this connection, or need not be.

        A publish to an exchange that does not exist closes the channel, and takes
        everything that was written behind it along.
        """
        if isinstance(what, ExchangeSpec) and what.is_default:
            return True
        return self._declared.get(what, 0.0) > time.monotonic()

    def declare(self, preparation: Preparation, done: Done, timeout: float | None) -> None:
        """Declare what of a preparation is not known, after which `knows()` it."""
        part: Declarable | None = None

        def script(channel: Channel) -> Script[None]:
            nonlocal part
            for part in _parts_of(preparation):
                if not self.knows(part):
                    yield from declare(channel, part)
                    self._learn(part)
            self._learn(preparation)

        def declared(_result: Any, error: TransportError | None) -> None:
            if part is not None and isinstance(error, MismatchError) and is_adopted(error):
                self._learn(part)
                self.declare(preparation, done, timeout)  # the rest of it
            else:
                done(None, error)

        self.probe(script, declared, timeout)

    def _learn(self, what: Declarable | Preparation) -> None:
        if len(self._declared) >= KNOWN_LIMIT:
            self._declared.clear()  # some of it was for one message only
        if isinstance(what, (ExchangeSpec, QueueSpec)):
            self._declared[what] = math.inf
        else:
            self._declared[what] = time.monotonic() + what.lasts_seconds

    def forget_exchanges(self) -> None:
        """Declare each exchange again before its next use."""
        self._declared.clear()

    def abort(self, error: Exception) -> None:
        """Drop the socket without a word, as if the network had done it.

        pika has no public way to do that; a test fails if pika changes its private one.
        """
        amqp = self.amqp
        if amqp is not None and not amqp.is_closed and not self._aborted:
            self._aborted = True
            amqp._terminate_stream(error)

    # ---------------------------------------------------------------------- inside

    @property
    def _is_up(self) -> bool:
        return self.state in (State.READY, State.BLOCKED)

    def _move(self, event: Event) -> State:
        after = TRANSITIONS[self.state].get(event)
        if after is None:
            raise AssertionError(f"{event} cannot happen to {self!r}")
        if after is not self.state:
            logger.debug("%r: %s", self, event.name)
            self.state = after
        return after

    def _connect_soon(self) -> None:
        if self.state is State.DISCONNECTED and self._timer is None:
            self._timer = self.hub.call_later(0, self._attempt)

    def _attempt(self) -> None:
        self._timer = None
        if self.state is not State.DISCONNECTED:
            return
        if not self._hosts:  # a new round, in a new order: failover spreads the load
            self._hosts = random.sample(self.settings.hosts, len(self.settings.hosts))
        self._host = self._hosts.pop()
        self._warn_if_unverified()
        self._aborted = False
        self._move(Event.ATTEMPT)
        try:
            self.amqp = Wire(
                _parameters(self.settings, self._host, self.purpose),
                on_open_callback=self.hub.shielded(self._opened),
                on_open_error_callback=self.hub.shielded(self._lost),
                on_close_callback=self.hub.shielded(self._lost),
                custom_ioloop=self.hub.loop,
            )
        except Exception as error:  # a certificate that cannot be read, for instance
            self.amqp = None
            self._lost(None, error)
            return
        self.amqp.add_on_connection_blocked_callback(self.hub.shielded(self._blocked))
        self.amqp.add_on_connection_unblocked_callback(self.hub.shielded(self._unblocked))

    def _warn_if_unverified(self) -> None:
        if self.settings.tls and not self.settings.tls_options.verify and not self._warned:
            self._warned = True
            logger.warning(
                "the certificate of %s is not verified: whoever is in between can read and "
                "change everything, the password too",
                self.settings,
            )

    def _opened(self, amqp: pika.SelectConnection) -> None:
        if amqp is not self.amqp:
            return
        reason = _too_old(amqp.server_properties)
        if reason is not None:
            self.abort(ConnectionFailedError(reason))  # a failed attempt, as any other
            return
        if self._move(Event.OPENED) is State.DRAINING:
            return
        if self.last_error is not None:
            logger.info("connected to %s again", self.settings)
        self.last_error = None
        self._failures.clear()
        self.reconnects += self._was_ready
        self._was_ready = True
        self._ready_since = time.monotonic()
        for tenant in tuple(self._tenants):
            tenant.connected(amqp)
        self._put_all()

    def _lost(self, amqp: pika.SelectConnection | None, error: BaseException) -> None:
        """Hear that an attempt failed, that the connection is gone, or that it is closed."""
        if amqp is not self.amqp or self.state is State.CLOSED:
            return  # of an older connection
        opened = self._is_up
        after = self._move(Event.LOST)
        self.amqp = None
        self._declared.clear()
        if after is State.CLOSED:
            agreed = isinstance(error, pika_errors.ConnectionClosedByClient)
            self._finish_close(agreed and not self._aborted)
            return
        if opened:
            self.losses += 1
            self._hosts = []
            if time.monotonic() - self._ready_since > STABLE:
                self._rounds = 0
            trouble: TransportError = translated(error)
            news, final = self.last_error is None, False
        else:
            trouble, news, final = self._judge(error)
        if news and not final:
            level = logging.DEBUG if self._interrupted else logging.WARNING
            logger.log(level, "%s; trying again until it works", trouble)
        self._interrupted = False
        self.incident = incident(trouble)
        if not isinstance(self.last_error, ConnectionFailedError) or not opened:
            self.last_error = trouble
        for tenant in tuple(self._tenants):
            tenant.disconnected(trouble)
        if final:
            self._refuse(ConnectionFailedError(str(trouble)))
        pause = 0.0
        if not self._hosts:
            self._rounds += 1
            pause = backoff(self._rounds, random.random())
        self._timer = self.hub.call_later(pause, self._attempt)

    def _judge(self, error: BaseException) -> tuple[ConnectionFailedError, bool, bool]:
        """Say why an attempt failed, whether the log should tell, and whether others would, too.

        A login is refused for the whole cluster, TLS by one host: the next may be better.
        """
        refusal = tls.refusal_of(_root(error), self.settings.tls_options, self._server_name)
        # Once an outage; but what somebody has to mend, also if another trouble came first.
        is_news = self.last_error is None or refusal not in (None, self._failures.get(self._host))
        self._failures[self._host] = refusal or tls.Refusal(_words(error, self.settings), False)
        is_final = _is_final(error)
        if is_final:
            reasons = self._failures[self._host].words
        else:
            reasons = _reasons(self._failures, self.settings)
        if not is_final and self._failures.keys() >= set(self.settings.hosts):
            is_final = all(failure.is_final for failure in self._failures.values())
        trouble = ConnectionFailedError(f"no connection to {self.settings}: {reasons}")
        return trouble, is_news, is_final and not self._was_ready

    @property
    def _server_name(self) -> str:
        return self.settings.tls_options.server_name or self._host[0]

    def _refuse(self, error: ConnectionFailedError) -> None:
        """Tell everybody that trying again will not help."""
        self.last_error = error
        self.incident = incident(error)
        while self._questions:
            self._questions.popleft().done(None, error)
        for tenant in tuple(self._tenants):
            tenant.refused(error)

    def _blocked(self, amqp: pika.SelectConnection, frame: Any) -> None:
        if amqp is self.amqp:
            self.alarm = frame.method.reason
            logger.warning("%s blocks publishers: %s", self.settings, self.alarm)
            self._move(Event.BLOCKED)
            for tenant in tuple(self._tenants):
                tenant.blocked(True)

    def _unblocked(self, amqp: pika.SelectConnection, _frame: Any) -> None:
        if amqp is self.amqp:
            logger.info("%s takes messages again", self.settings)
            self._move(Event.UNBLOCKED)
            for tenant in tuple(self._tenants):
                tenant.blocked(False)

    def _put_all(self) -> None:
        for _ in range(len(self._questions)):
            self._put(self._questions.popleft())

    def _put(self, question: _Question) -> None:
        """Run a question now, or keep it until there is a connection.

        Suspects run one after the other, so that the innocent survive the guilty.
        """
        if self.state in (State.DRAINING, State.CLOSED):
            question.done(None, ClosedError(f"{self!r} is closed"))
        elif question.expires is not None and time.monotonic() >= question.expires:
            question.done(None, ConnectionFailedError(self.overdue("in time")))
        elif not self.is_open or (question.is_suspect and self._on_trial is not None):
            self._questions.append(question)
            self._connect_soon()
        else:
            assert self.amqp is not None
            self._run(self.amqp, question)

    def _run(self, amqp: pika.SelectConnection, question: _Question) -> None:
        begun = False

        def answer(result: Any, error: TransportError | None) -> None:
            tried = self._on_trial is question
            if tried:
                self._on_trial = None
            lost = isinstance(error, ConnectionLostError) and not self.is_open
            is_hard = isinstance(error, ConnectionLostError) and error.is_hard
            if lost and not (tried and is_hard):
                question.is_suspect |= is_hard
                self._put(question)  # once more, on the next connection
                return
            if channel.is_open:
                channel.close()
            if tried:
                self._put_all()
            question.done(result, error)

        def opened(channel: Channel) -> None:
            nonlocal begun
            begun = True  # from now on the script hears of the close, and says what it means
            converse(channel, question.script(channel), answer, self.hub.shielded)

        def closed(_channel: Channel, reason: Exception) -> None:
            if not begun:
                answer(None, translated(reason))

        try:
            channel = amqp.channel(on_open_callback=self.hub.shielded(opened))
        except pika_errors.NoFreeChannels:  # the others' questions will be answered soon
            self.hub.call_later(CHANNEL_PAUSE, lambda: self._put(question))
            return
        channel.add_on_close_callback(self.hub.shielded(closed))
        if question.is_suspect:
            self._on_trial = question

    def _abandon(self, error: BaseException) -> None:
        """Start anew: the loop broke in the middle of something (`Hub.on_broken`)."""
        self._interrupted = not isinstance(error, Exception)  # Ctrl-C is no outage
        self.abort(ConnectionLostError(f"interrupted by {type(error).__name__}"))

    def _close(self, grace: float, clean: Future[bool]) -> None:
        if self.state is State.CLOSED:
            clean.set(False)
            return
        if self.state is State.DRAINING:  # another thread closes it already
            first = self._clean
            first.when_ready(lambda: clean.set(first.result()))
            return
        amqp, attempting = self.amqp, self.state is State.CONNECTING
        self._clean = clean
        self._move(Event.CLOSE)  # it wins over the pause between two attempts
        if self._timer is not None:
            self.hub.cancel(self._timer)
            self._timer = None
        if amqp is None:
            self._finish_close(True)
            return
        if attempting:
            self.abort(ClosedError("closed while connecting"))
        elif not (amqp.is_closing or amqp.is_closed):
            amqp.close()
        overdue = ConnectionLostError(f"{self.settings} did not agree to close in {grace:g} s")
        self._timer = self.hub.call_later(grace, lambda: self.abort(overdue))

    def _finish_close(self, clean: bool) -> None:
        self.state = State.CLOSED
        if self._timer is not None:
            self.hub.cancel(self._timer)
            self._timer = None
        error = ClosedError(f"{self!r} was closed")
        while self._questions:
            self._questions.popleft().done(None, error)
        for tenant in tuple(self._tenants):
            tenant.disconnected(error)
        self._clean.set(clean)


def _parts_of(preparation: Preparation) -> Iterable[Declarable]:
    return (preparation,) if isinstance(preparation, ExchangeSpec) else preparation.parts()


def _parameters(settings: Settings, host: _Host, purpose: str) -> pika.ConnectionParameters:
    options = None
    if settings.tls:
        name = settings.tls_options.server_name or host[0]
        options = pika.SSLOptions(tls.context_of(settings.tls_options), server_hostname=name)
    return pika.ConnectionParameters(
        host=host[0],
        port=host[1],
        virtual_host=settings.vhost,
        credentials=pika.PlainCredentials(settings.user, settings.password),
        heartbeat=settings.heartbeat,
        socket_timeout=settings.connect_timeout,
        stack_timeout=settings.connect_timeout,
        connection_attempts=1,  # the rounds over hosts are ours
        ssl_options=options,
        client_properties={"connection_name": f"postage {purpose} pid {os.getpid()}"},
    )


def _too_old(properties: Any) -> str | None:
    """Return why a broker is too old, or None. Only RabbitMQ's versions are known."""
    known = dict(properties or {})

    def text(key: str) -> str:
        value = known.get(key, "")
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    if text("product") != "RabbitMQ":
        return None
    numbers = tuple(int(part) for part in text("version").split(".")[:2] if part.isdigit())
    if len(numbers) < 2 or numbers >= OLDEST_RABBITMQ:
        return None
    return (
        f"RabbitMQ {text('version')} is too old: postage needs 3.10 or later for the queues "
        "that it declares"
    )


def _root(error: BaseException) -> BaseException:
    """Dig the reason out of the layers that pika wraps around a failed attempt."""
    while True:
        inner: Any = None
        if isinstance(error, connection_workflow.AMQPConnectionWorkflowFailed):
            inner = error.exceptions[-1] if error.exceptions else None
        elif isinstance(error, connection_workflow.AMQPConnectorPhaseErrorBase):
            inner = error.exception
        elif isinstance(error, pika_errors.AMQPConnectionError) and error.args:
            inner = error.args[0]
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _answer(root: BaseException) -> tuple[int, str]:
    """Return what the broker itself said when it ended an attempt, or 0 and nothing.

    When a connection ends in the middle of the login, pika guesses the reason from how far
    it was, and keeps of the real one only the text.
    """
    if isinstance(root, pika_errors.ConnectionClosedByBroker):
        return root.reply_code, root.reply_text
    if isinstance(root, _GUESSES) and root.args:
        match = _CLOSED_BY_BROKER.search(str(root.args[0]))
        if match:
            return int(match[1]), match[3]
    return 0, ""


def _words(error: BaseException, settings: Settings) -> str:
    """Say for people why an attempt failed, if it was not for TLS."""
    root = _root(error)
    code, text = _answer(root)
    if code == ACCESS_REFUSED:
        advice = "check user and password"
        if settings.user == "guest":
            advice += "; guest may log in from the broker's own host only"
        return f"the broker refused the login ({text.removesuffix('.')}); {advice}"
    if code == NOT_ALLOWED and "limit" in text:
        return f"the broker refused one more connection ({text}); raise the limit, or close some"
    if code == NOT_ALLOWED:
        return (
            f"the broker refused the virtual host ({text}); check its name and the user's "
            "permissions"
        )
    if code:
        return f"the broker answered {code} {text}"
    if isinstance(root, _GUESSES):
        return "the connection ended in the middle of the login"
    if isinstance(
        root,
        # The second is what pika says when it gives up in the middle of the login.
        (connection_workflow.AMQPConnectorStackTimeout, pika_errors.ConnectionOpenAborted),
    ):
        return "it did not answer in time"
    if isinstance(root, (pika_errors.IncompatibleProtocolError, ConnectionResetError)):
        advice = ""
        if not settings.tls:
            advice = "; if that is a port for TLS, write amqps://"
        elif not settings.tls_options.cert_file:  # it said so, perhaps, and the reset was faster
            advice = f"; it may want a client certificate: set {variable_of('tls_cert_file')}"
        return f"it closed the connection before a word of AMQP{advice}"
    if isinstance(root, ConnectionRefusedError):
        return (
            "nothing listens there; start RabbitMQ or `postage broker`, or say in POSTAGE_URL "
            "where a broker is"
        )
    return str(root) or type(root).__name__


def _reasons(failures: Mapping[_Host, tls.Refusal], settings: Settings) -> str:
    """Return why there is no connection: for each host, if there are several."""
    hosts: dict[str, list[str]] = {}
    for host, failure in failures.items():
        hosts.setdefault(failure.words, []).append(address_of(*host))
    if len(settings.hosts) == 1:
        return next(iter(hosts))
    return "; ".join(f"{', '.join(names)}: {words}" for words, names in hosts.items())


def _is_final(error: BaseException) -> bool:
    """Tell whether a failed attempt would fail again: the broker is there and says no."""
    root = _root(error)
    code, text = _answer(root)
    return (
        isinstance(root, ConnectionFailedError)  # ours: it is too old
        or code == ACCESS_REFUSED
        or (code == NOT_ALLOWED and "limit" not in text)  # a limit may be raised
    )


# ---------------------------------------------------------------- shared and counted

_registry_lock = threading.RLock()
_registry: dict[tuple[Settings, str], Connection] = {}


def acquire(settings: Settings, purpose: str) -> Connection:
    """Return the connection for these settings and this purpose, to be given to `release()`.

    It is not connected yet: the first tenant or question connects it.
    """
    key = (settings, purpose)
    with _registry_lock:
        connection = _registry.get(key)
        if connection is None:
            connection = _registry[key] = Connection(hubs.acquire(), settings, purpose)
        connection.users += 1
        return connection


def release(connection: Connection, grace: float = CLOSE_GRACE) -> bool:
    """Give a connection back. The last user closes it, and with it perhaps the hub.

    Returns:
        Whether it goes on for others, or was closed with the broker's consent.
    """
    key = (connection.settings, connection.purpose)
    with _registry_lock:
        if _registry.get(key) is not connection:
            return False  # of a parent process
        connection.users -= 1
        if connection.users > 0:
            return True
        del _registry[key]
    clean = connection.close(grace)
    hubs.release(connection.hub)
    return clean


def in_use() -> tuple[Connection, ...]:
    """Return every connection of this process that somebody uses."""
    with _registry_lock:
        return tuple(_registry.values())


def close_all(grace: float = CLOSE_GRACE, spare: Collection[Connection] = ()) -> bool:
    """Close every connection of this process, whoever uses it.

    Args:
        grace: Seconds that the broker has to agree, for each of them.
        spare: Connections that stay.

    Returns:
        Whether the broker agreed to each of them.
    """
    with _registry_lock:
        closing = {key: each for key, each in _registry.items() if each not in spare}
        for key in closing:
            del _registry[key]
    clean = True
    for connection in closing.values():
        clean = connection.close(grace) and clean
        hubs.release(connection.hub)
    return clean


def check_fork(connection: Connection, what: str) -> None:
    """Refuse to use a connection that belongs to the parent process.

    Raises:
        ForkedError: It does.
    """
    if connection.hub.pid != hubs.process_id:
        raise ForkedError(
            f"{what} was made in process {connection.hub.pid} and is used in its child "
            f"{hubs.process_id}: make it after the fork"
        )


def _forget_after_fork() -> None:
    global _registry_lock
    _registry_lock = threading.RLock()
    _registry.clear()


os.register_at_fork(after_in_child=_forget_after_fork)

# A script that ends without close() says goodbye to the broker all the same.
atexit.register(close_all, 2.0)
