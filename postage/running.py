# SPDX-License-Identifier: MIT
"""Runs handlers: filters, calls, and goes on with what is no plain function.

A handler runs in a context of its own, as a task of asyncio does. A plain function without
an outbox is over when `Runner.run()` returns: most are, and those cost neither a generator nor
a microthread.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from postage import outbox as outboxes
from postage.consumer import GenericConsumer
from postage.context import enter
from postage.errors import AckAndRestart, ExitScheduler, FilterError, printable
from postage.futures import Future
from postage.handlers import Registration
from postage.outbox import Outbox
from postage.transport.subscriber import Delivery

if TYPE_CHECKING:
    from postage.workers import EventLoop, WorkerPool

#: Seconds after which a handler in a thread or a coroutine is trusted not to crash the process,
#: and messages beside its own are delivered ahead: it may wait for one of them.
TRUST_AFTER = 1.0

#: What is left of a handler: it yields waitables.
Rest = Generator[Any, Any, None]


class Ended(Exception):
    """A handler raised StopIteration, which must not leave a generator."""


class Runner:
    """Runs the handlers of one component.

    Args:
        component: Whose attributes they are; its `threads` says how many of those that are
            ``threaded`` run at a time.
        consumer: Received the messages.
    """

    def __init__(self, component: Any, consumer: GenericConsumer) -> None:
        self._component = component
        self._subscriber = consumer.subscriber
        self._hub = consumer.subscriber.hub
        self._cancels: dict[Delivery, Callable[[], Any]] = {}
        self._pool: WorkerPool | None = None
        self._event_loop: EventLoop | None = None

    def run(
        self,
        delivery: Delivery,
        registration: Registration,
        arguments: tuple[Any, ...],
        outbox: Outbox | None,
    ) -> Rest | None:
        """Filter the data and call a handler. Returns what is left to do, if anything is.

        Raises, now or while the rest is done:
            FilterError: A filter keeps the message from it; any exception of a filter does.
            Ended: It raised `StopIteration`.
            BatchError: Not all of its outbox was confirmed.
        """
        handler = getattr(self._component, registration.attribute)
        call = self._filtered(handler, arguments)
        context = outboxes.context_of(outbox)
        if outbox is None:
            return self._start(delivery, registration, handler, call, context)
        return self._run_with_outbox(delivery, registration, handler, call, context, outbox)

    def forget(self, delivery: Delivery) -> None:
        """Note that a message is handled."""
        self._cancels.pop(delivery, None)

    def cancel(self, delivery: Delivery) -> None:
        """Cancel the coroutine that handles a message, if one does."""
        cancel = self._cancels.pop(delivery, None)
        if cancel is not None:
            cancel()

    def close(self) -> None:
        """Let threads and the event loop go."""
        if self._pool is not None:
            self._pool.close(0.0)
            self._pool = None
        if self._event_loop is not None:
            from postage import workers

            workers.release_event_loop(self._event_loop)
            self._event_loop = None

    # ----------------------------------------------------------------------- inside

    def _filtered(self, handler: Any, arguments: tuple[Any, ...]) -> Callable[[], Any]:
        """Return the call of a handler, with what its filters leave of the data.

        Raises:
            FilterError: One of them keeps the message from it.
        """
        data = arguments[0]
        for function, args, kwds in getattr(handler, "filters", ()):
            try:
                data = function(data, *args, **kwds)
            except FilterError:
                raise
            except Exception as error:
                raise FilterError(f"{type(error).__name__}: {printable(error)}") from error
        owner = (self._component,) if isinstance(handler, type) else ()
        return partial(handler, *owner, data, *arguments[1:])

    def _run_with_outbox(
        self,
        delivery: Delivery,
        registration: Registration,
        handler: Any,
        call: Callable[[], Any],
        context: contextvars.Context,
        outbox: Outbox,
    ) -> Rest:
        """Run a handler to its end, and send its outbox if it succeeded."""
        signal = None
        with outbox:
            try:
                rest = self._start(delivery, registration, handler, call, context)
                if rest is not None:
                    yield from rest
            except (Ended, ExitScheduler, AckAndRestart) as success:
                signal = success
            yield from outbox.commit()
        if signal is not None:
            raise signal

    def _start(
        self,
        delivery: Delivery,
        registration: Registration,
        handler: Any,
        call: Callable[[], Any],
        context: contextvars.Context,
    ) -> Rest | None:
        """Call a handler in its context. Returns what is left of it, if anything is."""
        if registration.threaded:
            self._subscriber.trust(delivery.queue, TRUST_AFTER)
            call_it = partial(context.run, _call, delivery, call)
            return self._follow(delivery, registration, handler, call_it, context)
        try:
            result = context.run(_call, delivery, call)
        except StopIteration:
            raise Ended from None
        if result is None:
            return None
        return self._rest(delivery, registration, _result_of(handler, result), context)

    def _follow(
        self,
        delivery: Delivery,
        registration: Registration,
        handler: Any,
        call: Callable[[], Any],
        context: contextvars.Context,
    ) -> Rest:
        """Run a handler in a thread, and go on here with what it returned."""
        try:
            result = yield self._in_thread(call)
        except StopIteration:
            raise Ended from None
        rest = self._rest(delivery, registration, _result_of(handler, result), context)
        if rest is not None:
            yield from rest

    def _rest(
        self,
        delivery: Delivery,
        registration: Registration,
        result: Any,
        context: contextvars.Context,
    ) -> Rest | None:
        """Return how to go on with what a handler returned; None if it is over."""
        if inspect.isgenerator(result):
            self._subscriber.trust(delivery.queue)
            return outboxes.steps(context, result)
        if inspect.iscoroutine(result):
            self._subscriber.trust(delivery.queue, TRUST_AFTER)
            return _until(context.run(self._in_event_loop, delivery, result))
        if inspect.isasyncgen(result):
            raise TypeError(f"the handler {registration.attribute} is an asynchronous generator")
        return None

    def _in_thread(self, call: Callable[[], Any]) -> Future[Any]:
        if self._pool is None:
            from postage import workers

            component = self._component
            name = f"postage-{component.fingerprint.get('name') or type(component).__name__}"
            self._pool = workers.WorkerPool(component.threads, name)
        future: Future[Any] = Future(self._hub.wait, self._hub.nudge)
        self._pool.submit(call, future)
        return future

    def _in_event_loop(self, delivery: Delivery, coroutine: Any) -> Future[Any]:
        """Start a coroutine. asyncio gives it a copy of the context that this runs in."""
        if self._event_loop is None:
            from postage import workers

            self._event_loop = workers.acquire_event_loop()
        future: Future[Any] = Future(self._hub.wait, self._hub.nudge)
        self._cancels[delivery] = self._event_loop.submit(coroutine, future)
        return future


def _call(delivery: Delivery, call: Callable[[], Any]) -> Any:
    enter(delivery)
    return call()


def _result_of(handler: Any, result: Any) -> Any:
    """Return what a handler returned; one that is a class keeps it as an attribute."""
    return getattr(result, "result", None) if isinstance(handler, type) else result


def _until(future: Future[Any]) -> Rest:
    yield future
