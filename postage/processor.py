# SPDX-License-Identifier: MIT
"""A component: takes messages from its inbox, has them handled, and settles them.

One message passes through here in this order::

    inbox ──> read ──> look the handlers up ──> filter ──> run ──> Verdict ──> settle

`read` and the look-up decide without any I/O. Each delivery is handled by a generator: a
plain handler ends within its first step, others make it a microthread of its own. What is
to become of the message is a `Verdict`, and only `_carry_out()` acts on it. A handler runs
in a context of its own, as a task of asyncio does, and its outbox is sent before the verdict.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import itertools
import logging
import math
import os
import random
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

from postage import restart
from postage.answering import Answering, kind_of, note_loss
from postage.breaker import CircuitBreaker
from postage.consumer import PUBLISH_TIMEOUT, GenericConsumer
from postage.context import current_delivery
from postage.dedupe import Dedupe, Done
from postage.errors import (
    AckAndRestart,
    DecodeError,
    ExitScheduler,
    FilterError,
    PostageError,
    RejectMessage,
    Retry,
    printable,
)
from postage.futures import Future
from postage.handlers import MessageHandler, MessageHandlerType, Registration
from postage.headers import HANDLER
from postage.health import ComponentHealth, Incident, incident, latest, parts_of
from postage.microthreads import MicroScheduler, MicroThread
from postage.moving import Mover
from postage.outbox import Outbox
from postage.prefetch import is_plain
from postage.retry import Failure, RetryPolicy
from postage.running import Ended, Runner
from postage.topology import Eqk
from postage.transport.subscriber import Delivery
from postage.verdict import ACK, LEAVING, Fate, Handling, Verdict

_Processor = TypeVar("_Processor", bound="MessageProcessor")

logger = logging.getLogger(__name__)

#: Seconds for which messages are handled before others in the scheduler have their turn.
SLICE = 0.001
#: Deliveries after which a message may be one that ends the process each time. The broker will
#: move it to the error queue then (delivery limit), which should be known of by that time.
SUSPICIOUS = 5


class MessageProcessor(MicroThread, metaclass=MessageHandlerType):
    """A component that handles the messages of its queues.

    Subclass it and decorate methods with `MessageHandler` and `RpcHandler`; add an instance
    to a `MicroScheduler`. Many processors can share one scheduler.

    Attributes:
        consumer_class: Makes the consumer.
        prefetch: Messages that the broker delivers ahead, for each queue. None: as the
            consumer says, and if that says nothing, it adapts to how long messages take; where
            a handler lets others run, it is 10.
        unhandled: What becomes of a message without a handler: "park", "skip" or "reject".
            None: skip it if it came by a queue that only this instance has, else park it.
        retry: How often a message is tried whose handler fails, and how long it waits in
            between. Decorators may say otherwise.
        retry_by_type: The same for the messages of a type, such as "command".
        breaker: Handlers that fail in a row until messages are handled one at a time, with
            pauses as `breaker_policy` says, until one succeeds. None: never.
        dedupe: Remembers what was handled, so that a message that comes twice is not handled
            twice: a `MemoryWindow` or a `SqliteWindow`. None: nothing is remembered.
        outbox: Whether what a handler sends leaves only if it succeeds, and is confirmed
            before its message is acknowledged. Decorators may say otherwise.
        grace: Seconds that handlers in flight have to end, when the component leaves.
        threads: How many ``threaded`` handlers run at a time.
        max_body: Bytes of the largest body that is read; larger ones are parked. None: any.
        skipped: How many messages were skipped, by category, type and name.

    Args:
        fingerprint: The fingerprint of this component, as a dict.
        eqk: [(exchange class, [(queue, key), …]), …].
        hup: Host, user and password; None: from the environment.
        vhost: The virtual host; None: from the environment.

    Raises:
        PostageError: As `GenericConsumer`, which connects, declares and binds now.
    """

    consumer_class: ClassVar[type[GenericConsumer]] = GenericConsumer
    prefetch: int | None = None
    unhandled: str | None = None
    retry: RetryPolicy = RetryPolicy()
    retry_by_type: Mapping[str, RetryPolicy] = {}
    breaker: int | None = None
    breaker_policy: RetryPolicy = RetryPolicy()
    dedupe: Dedupe | None = None
    outbox: bool = False
    grace: float = 30.0
    threads: int = 8
    max_body: int | None = 4 * 1024 * 1024

    def __init__(
        self,
        fingerprint: Mapping[str, Any],
        eqk: Eqk,
        hup: Mapping[str, Any] | None = None,
        vhost: str | None = None,
    ) -> None:
        self._cause = restart.cause()  # before anything could start a child process
        self.fingerprint = fingerprint
        self.consumer = self.consumer_class(eqk, hup, vhost)
        if self.prefetch is not None:
            self.consumer.prefetch = self.prefetch
        self.consumer.adapts = self._takes_turns()
        self.skipped: collections.Counter[tuple[Any, Any, Any]] = collections.Counter()
        self._hub = self.consumer.subscriber.hub
        self._inbox = _Inbox(self)
        self._in_flight: dict[Delivery, Generator[Any, Any, None]] = {}
        self._runner = Runner(self, self.consumer)
        self._answering = Answering(self, self.consumer, self._runner, self._note_failure)
        self._breaker = CircuitBreaker(
            self.breaker, self.breaker_policy, time.monotonic, random.random
        )
        self._handled = self._failed = 0
        self._incident: Incident | None = None
        self._mover = Mover(self.consumer, fingerprint)
        self._farewell: tuple[Delivery, Verdict] | None = None
        self._stopping = False
        self._ended = False

    def __repr__(self) -> str:
        name = self.fingerprint.get("name")
        return (
            f"<{type(self).__name__} {name} [{len(self._in_flight)} in flight, {self.consumer!r}]>"
        )

    def __enter__(self: _Processor) -> _Processor:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def health(self) -> ComponentHealth:
        """Return how this component is. Callable from any thread.

        Raises:
            ForkedError: It belongs to the parent process.
        """
        health = self.consumer.health()
        fields = {each.name: getattr(health, each.name) for each in dataclasses.fields(health)}
        fields["last_error"] = latest(health.last_error, self._incident)
        return ComponentHealth(
            **fields,
            **parts_of(self.fingerprint),
            running=len(self._in_flight),
            handled=self._handled,
            failed=self._failed,
            circuit_open=self._breaker.is_open,
        )

    @property
    def delivery(self) -> Delivery:
        """What the handler that runs here handles: headers, ids, attempt, redelivered.

        Raises:
            PostageError: No handler runs here.
        """
        delivery = current_delivery()
        if delivery is None:
            raise PostageError("there is a delivery in handlers only")
        return delivery

    # -------------------------------------------------------------------- microthread

    def main(self) -> Generator[Any, Any, None]:
        """Run: consume, and handle messages, until told to leave."""
        if self.scheduler is None:  # handlers need one, so this one brings its own
            scheduler = MicroScheduler(autoquit=True)
            scheduler.add_microthread(self)
            yield from scheduler.main()
            return
        self.create()
        yield 1
        self.consumer.start()
        while not self._ended:
            if self._stopping or self._farewell is not None:
                if (yield from self._depart()):
                    return
                continue
            try:
                wanted = self._slice()
            except StopIteration:
                self._stopping = True
                continue
            yield 1 if wanted is None else wanted

    def _slice(self) -> Any:
        """Handle messages for a moment, and return what to wait for, if for anything.

        Other microthreads wait for `SLICE` seconds and one handler at most, as they would for a
        handler of that length; a turn of the scheduler costs as much as a short handler.
        """
        end = time.monotonic() + SLICE
        wanted = self.step()
        while wanted is None and self._may_go_on() and time.monotonic() < end:
            wanted = self.step()
        return wanted

    def _may_go_on(self) -> bool:
        leaving = self._stopping or self._ended or self._farewell is not None
        shutdown = self.scheduler is not None and self.scheduler.shutdown
        return not leaving and not shutdown and bool(self.consumer.subscriber.inbox)

    def step(self) -> Any:
        """Handle one message, or return the inbox to wait for."""
        failure = self.consumer.subscriber.failure
        if failure is not None:
            raise failure
        if self._breaker.is_open and (self._in_flight or self._breaker.pause()):
            return self._cooling_down()
        delivery = self.consumer.take()
        if delivery is None:
            self.consumer.subscriber.flush()
            return self._inbox
        task = self._handle(delivery)
        self._in_flight[delivery] = task
        try:
            wanted = next(task)
        except StopIteration:
            return None
        assert self.scheduler is not None
        self.scheduler.spawn(task, wanted)
        return None

    def _cooling_down(self) -> _Until:
        """Return what to wait for while the circuit breaker is open."""
        is_busy = bool(self._in_flight)

        def is_over() -> bool:
            over = self._stopping or self._farewell is not None or (is_busy and not self._in_flight)
            return over or self.consumer.subscriber.failure is not None

        return _Until(self._hub, is_over, math.inf if is_busy else self._breaker.pause())

    def _takes_turns(self) -> bool:
        """Tell whether no handler lets others run: then the prefetch may be any number."""
        registered = itertools.chain.from_iterable(type(self)._message_handlers.values())
        return all(
            not each.threaded and is_plain(getattr(self, each.attribute)) for each in registered
        )

    def start_consuming(self) -> None:
        """Handle messages until told to quit or to stop: a scheduler for this one alone."""
        self.scheduler = None
        for _ in self.main():
            pass

    def stop_consuming(self) -> None:
        """End this microthread: it takes nothing more, and leaves. Callable from anywhere."""
        self._stopping = True
        self._inbox.notify()
        self._hub.nudge()

    def restart(self) -> None:
        """Replace the program by a new run of itself, now.

        A handler that wants this raises `AckAndRestart` instead, so that its message is
        settled first.
        """
        restart.execute()

    def add_eqk(self, eqk: Eqk) -> None:
        """Declare, bind and consume further queues (`GenericConsumer.add_eqk()`)."""
        self.consumer.add_eqk(eqk)

    def add_timeout(self, seconds: float, callback: Callable[[], Any] | None = None) -> None:
        """Call back after a while, or wait for it.

        Args:
            seconds: How long.
            callback: Called by the scheduler, between two messages. None: block for that long;
                connections are served meanwhile.
        """
        if callback is None:
            self._hub.wait(lambda: False, seconds)
            return

        def later() -> Generator[Any, Any, None]:
            if not self._ended:
                callback()
            return
            yield

        if self.scheduler is None:
            raise PostageError("add_timeout with a callback needs a processor in a scheduler")
        self.scheduler.spawn(later(), _Until(self._hub, lambda: self._ended, seconds))

    @MessageHandler("command", "quit")
    def msg_quit(self, content: Any) -> None:
        """Quit: leave, and end the scheduler."""
        raise ExitScheduler

    @MessageHandler("command", "restart")
    def msg_restart(self, content: Any) -> None:
        """Restart: leave, and replace the program by a new run of itself."""
        raise AckAndRestart

    # ------------------------------------------------------------------------ leaving

    def leave(self) -> Generator[Any, Any, bool]:
        """Leave in order. A generator: handlers in flight are stepped meanwhile.

        Nothing new is taken, unstarted messages go back, handlers in flight have `grace`
        seconds, what they leave behind is delivered again, and the message that told us to
        leave is settled last.

        Returns:
            Whether the broker took every settlement.
        """
        if self._ended:
            return True
        subscriber = self.consumer.subscriber
        subscriber.stop()
        yield _Until(self._hub, subscriber.stopped, self.grace)
        while (delivery := self.consumer.take()) is not None:
            subscriber.give_back(delivery)
        yield _Until(self._hub, lambda: not self._in_flight, self.grace)
        for delivery in list(self._in_flight):
            logger.warning("%r did not end in %g s; it is delivered again", delivery, self.grace)
            self._abandon(delivery)
        if self._farewell is not None:
            self.consumer.ack(self._farewell[0])
        return self._end()

    def close(self) -> None:
        """Let the connections go, without the ceremony of `leave()`."""
        if self._ended or self._hub.pid != os.getpid():
            return  # in a forked child everything belongs to the parent
        for delivery in list(self._in_flight):
            self._abandon(delivery)
        self._farewell = None
        self._end()
        self._inbox.notify()

    def before_close(self, restarting: bool) -> None:
        """Hook: every message is settled, the connection is still there.

        Args:
            restarting: Whether this process goes on as a new run of the program.
        """

    def on_error(self, delivery: Delivery, error: BaseException) -> None:
        """Hook: a message could not be handled, at this attempt at least. For metrics and alerts.

        Not called for RPC, whose exceptions are the caller's, nor for `Retry`.

        Args:
            delivery: The message.
            error: What the handler raised, or why there was nothing to call.
        """

    def _abandon(self, delivery: Delivery) -> None:
        """Give up a handler that still runs. Its message is delivered again."""
        task = self._in_flight.pop(delivery)
        self._runner.cancel(delivery)
        is_running = inspect.getgeneratorstate(task) == inspect.GEN_RUNNING  # it closes us itself
        if self.scheduler is not None and not is_running:
            self.scheduler.discard(task)

    def _end(self) -> bool:
        clean = self.consumer.subscriber.close(PUBLISH_TIMEOUT)
        told = self._farewell is not None and self._farewell[1].fate is Fate.RESTART
        if told and not clean:
            return False  # it is delivered again; see _depart()
        if clean:
            others = self.scheduler is not None and self.scheduler.finally_do is not None
            try:
                self.before_close(restarting=told or others)
            except PostageError as error:
                logger.warning("%r could not tidy up: %s", self, error)
        self._ended = True
        self.consumer.close()
        if self.dedupe is not None:
            self.dedupe.close()
        self._runner.close()
        return clean

    def _depart(self) -> Generator[Any, Any, bool]:
        """Leave because a message, or `stop_consuming()`, says so.

        Returns:
            Whether this microthread is over. A restart without the broker's consent does not
            happen: its message would come again, and restart the new run, and so on.
        """
        clean = yield from self.leave()
        farewell = self._farewell
        if farewell is None or farewell[1].fate is Fate.STOP:
            return True
        delivery, verdict = farewell
        if verdict.fate is Fate.RESTART:
            if not clean:
                logger.warning("no restart: the connection was lost before its message was settled")
                self._farewell = None
                self.consumer.subscriber.resume()
                return False
            assert self.scheduler is not None
            self.scheduler.exit(partial(restart.execute, delivery.properties.message_id))
        raise ExitScheduler

    # ----------------------------------------------------------------- one message

    def _handle(self, delivery: Delivery) -> Generator[Any, Any, None]:
        is_answered = False
        try:
            if delivery.redelivered and _deliveries(delivery) >= SUSPICIOUS:
                yield from self._mover.announce(delivery)
            outcome = self._judge(delivery)
            if not isinstance(outcome, (Verdict, Future)):
                outcome = yield from outcome
            self._handled += 1
            is_answered = isinstance(outcome, Future)
            if isinstance(outcome, Future):
                outcome.when_ready(partial(self._confirmed, delivery, outcome))
            elif outcome is ACK:
                self.consumer.ack(delivery)
            else:
                yield from self._carry_out(delivery, outcome)
        finally:
            if not is_answered:
                self._in_flight.pop(delivery, None)
            self._runner.forget(delivery)

    def _confirmed(self, delivery: Delivery, answer: Future[None]) -> None:
        """Settle a request whose answer the broker has. Called by whoever leads."""
        note_loss(answer)
        if self._in_flight.pop(delivery, None) is None or self._ended:
            return  # it was abandoned, and is delivered again
        self.consumer.ack(delivery)
        if not self.consumer.subscriber.inbox:
            self.consumer.subscriber.flush()

    def _judge(self, delivery: Delivery) -> Verdict | Future[None] | Handling:
        """Have a message handled, and decide what becomes of it.

        Returns:
            The verdict; or the confirm of an answer, after which the message is done; or the
            steps that are left until there is a verdict.
        """
        message_id = delivery.properties.message_id
        if message_id is not None and message_id == self._cause:
            return ACK  # what this run is the answer to
        try:
            body = self._read(delivery)
        except DecodeError as error:
            if delivery.properties.reply_to is not None:
                return self._answering.refuse(delivery, str(error))
            return Verdict(Fate.PARK, "unreadable", error)
        handlers = self._handlers_of(body)
        if body["category"] == "rpc":
            return self._answer(delivery, body, handlers[0] if handlers else None)
        return self._handle_all(delivery, body, handlers)

    def _handle_all(
        self, delivery: Delivery, body: dict[str, Any], handlers: tuple[Registration, ...]
    ) -> Handling:
        """Have a message handled by all of its handlers."""
        several = len(handlers) > 1
        only = delivery.headers.get(HANDLER)
        if only is not None:
            handlers = tuple(each for each in handlers if each.attribute == only)
        if not handlers:
            return self._unhandled(delivery, body)
        failures: list[Failure] = []
        fate, reason = Fate.ACK, ""
        for number, registration in enumerate(handlers):
            if self._is_repeated(delivery, registration):
                continue
            data = self._data(body, registration, shared=number < len(handlers) - 1)
            try:
                outbox = self._outbox_of(delivery, registration)
                rest = self._runner.run(delivery, registration, (data,), outbox)
                if rest is not None:
                    yield from rest
                self._note_success(delivery, registration)
            except FilterError as error:
                keeper = printable(error)
                logger.debug("%s keeps %r from %s", keeper, delivery, registration.attribute)
            except RejectMessage:
                fate, reason = Fate.REJECT, "rejected"
                break
            except Ended:
                fate = Fate.STOP
                break
            except ExitScheduler:
                fate = Fate.EXIT
                break
            except AckAndRestart:
                fate = Fate.RESTART
                break
            except Exception as error:
                failures.append(self._failure(delivery, body, registration, several, error))
        if fate is Fate.ACK and not failures:
            return ACK
        return Verdict(fate, reason, failures=tuple(failures))

    def _answer(
        self, delivery: Delivery, body: dict[str, Any], registration: Registration | None
    ) -> Verdict | Future[None] | Handling:
        if registration is None:
            return self._answering.answer(delivery, body, None, None, None)
        data = self._data(body, registration, shared=False)
        outbox = self._outbox_of(delivery, registration)
        return self._answering.answer(delivery, body, registration, data, outbox)

    def _is_repeated(self, delivery: Delivery, registration: Registration) -> bool:
        """Tell whether a handler has handled a message before, as far as is remembered."""
        message_id = delivery.message_id
        if self.dedupe is None or message_id is None:
            return False
        if self.dedupe.get(registration.attribute, message_id) is None:
            return False
        logger.info("%s has handled message %s before", registration.attribute, message_id)
        return True

    def _note_success(self, delivery: Delivery, registration: Registration) -> None:
        if self.dedupe is not None and delivery.message_id is not None:
            self.dedupe.add(registration.attribute, delivery.message_id, Done())
        if self._breaker.succeeded():
            logger.warning("%s: a handler succeeded: back to full speed", type(self).__name__)

    def _failure(
        self,
        delivery: Delivery,
        body: Mapping[str, Any],
        registration: Registration,
        several: bool,
        error: Exception,
    ) -> Failure:
        """Note that a handler failed, and decide what becomes of its message."""
        policy = registration.retry or self.retry_by_type.get(body["type"]) or self.retry
        attempt = delivery.attempt
        if not isinstance(error, Retry):
            self._note_failure(error)
            self._tell(delivery, error)
            if not policy.is_permanent(error) and self._breaker.failed():
                logger.warning(
                    "%s: %d handlers failed in a row: one message at a time, with pauses",
                    type(self).__name__,
                    self._breaker.failures,
                )
        pause = policy.decide(error, attempt, random.random())
        return Failure(registration.attribute if several else None, error, attempt, pause)

    def _tell(self, delivery: Delivery, error: BaseException) -> None:
        """Call the hook, whose own mistakes must not change what becomes of the message."""
        try:
            self.on_error(delivery, error)
        except Exception:
            logger.exception("%s.on_error() failed", type(self).__name__)

    def _note_failure(self, error: Exception) -> None:
        self._failed += 1
        self._incident = incident(error)

    def _outbox_of(self, delivery: Delivery, registration: Registration) -> Outbox | None:
        wanted = self.outbox if registration.outbox is None else registration.outbox
        if not wanted:
            return None
        # A queue without a name goes with its connection, and so does its consumer tag.
        source = delivery.queue.name or delivery.consumer_tag
        return Outbox(source, registration.attribute, delivery.properties.message_id)

    # -------------------------------------------------------------- decisions, no I/O

    def _read(self, delivery: Delivery) -> dict[str, Any]:
        """Return the body of a message.

        Raises:
            DecodeError: It is none, and why.
        """
        size = len(delivery.body)
        if self.max_body is not None and size > self.max_body:
            raise DecodeError(
                f"the body of {size} bytes is larger than max_body ({self.max_body}): raise it, "
                "or send less"
            )
        body = self.consumer.decode(delivery.body)
        if not isinstance(body, dict):
            raise DecodeError(f"the body is no object but {type(body).__name__}")
        for key, kinds in _NEEDED.items():
            if key not in body:
                raise DecodeError(f"the body has no {key!r}")
            if not isinstance(body[key], kinds):
                raise DecodeError(f"{key!r} of the body is {type(body[key]).__name__}")
        if body["category"] not in ("message", "rpc"):
            raise DecodeError(f"the category {str(body['category'])[:40]!r} is unknown")
        return body

    def _handlers_of(self, body: Mapping[str, Any]) -> tuple[Registration, ...]:
        table = type(self)._message_handlers
        kind = body["category"], body["type"]
        return table.get((*kind, body["name"])) or table.get((*kind, None), ())

    def _unhandled(self, delivery: Delivery, body: Mapping[str, Any]) -> Verdict:
        """Decide about a message that nothing here handles.

        From a shared queue it is parked: during a rollout an old instance must not swallow
        what only the new code knows. A broadcast concerns those whom it concerns.
        """
        choice = self.unhandled or ("skip" if delivery.queue.personal else "park")
        if choice == "reject":
            return Verdict(Fate.REJECT, "unhandled")
        if choice == "park":
            return Verdict(Fate.PARK, "unhandled", DecodeError(f"no handler for {kind_of(body)}"))
        kind = (body["category"], body["type"], body["name"])
        self.skipped[kind] += 1
        if self.skipped[kind] == 1:
            name = type(self).__name__
            logger.warning("skipped %s: %s has no handler for it", kind_of(body), name)
        return ACK

    @staticmethod
    def _data(body: dict[str, Any], registration: Registration, shared: bool) -> Any:
        """Return what a handler gets: a copy, if another one gets it after this one."""
        data = body if registration.body_key is None else body[registration.body_key]
        return copy.deepcopy(data) if shared else data

    # --------------------------------------------------------------------- consequences

    def _carry_out(self, delivery: Delivery, verdict: Verdict) -> Generator[Any, Any, None]:
        obstacle = restart.obstacle() if verdict.fate is Fate.RESTART else None
        if obstacle is not None:
            logger.error("no restart: the new code cannot be compiled: %s", obstacle)
            verdict = ACK
        for failure in verdict.failures:
            if not (yield from self._mover.move(delivery, failure)):
                return  # it was given back, and comes again as a whole
        if verdict.fate is Fate.PARK:
            if verdict.error is not None:
                self._tell(delivery, verdict.error)
            if (yield from self._mover.park(delivery, verdict.reason, verdict.error)):
                self.consumer.ack(delivery)
        elif verdict.fate is Fate.REJECT:
            yield from self._mover.reject(delivery)
        elif verdict.fate in LEAVING and self._farewell is None:
            self._farewell = (delivery, verdict)  # it is settled last, see leave()
            self._inbox.notify()
        else:
            self.consumer.ack(delivery)


class _Inbox:
    """The waitable of a processor: ready when there is something to do."""

    def __init__(self, processor: MessageProcessor) -> None:
        self._processor = processor
        self._subscriber = processor.consumer.subscriber
        self._subscriber.on_delivery = self.notify
        self._callback: Callable[[], None] | None = None
        self.hub = self._subscriber.hub

    def ready(self) -> bool:
        processor, subscriber = self._processor, self._subscriber
        return bool(
            subscriber.inbox
            or processor._farewell is not None
            or processor._stopping
            or subscriber.failure is not None
        )

    def when_ready(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        if self.ready():
            self.notify()

    def notify(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class _Until:
    """A waitable that is ready when a condition holds, or after a number of seconds."""

    def __init__(self, hub: Any, ready: Callable[[], bool], seconds: float) -> None:
        self.hub = hub
        self.ready = ready
        self.deadline = time.monotonic() + seconds


#: What dispatching needs of a body, and of which types it may be.
_NEEDED: dict[str, tuple[type, ...]] = {
    "category": (str,),
    "type": (str,),
    "name": (str, type(None)),
    "content": (dict,),
}


def _deliveries(delivery: Delivery) -> int:
    """Return how often a quorum queue has delivered a message before."""
    count = delivery.headers.get("x-delivery-count")
    return count if isinstance(count, int) else 0
