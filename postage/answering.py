# SPDX-License-Identifier: MIT
"""The service's end of an RPC call. The caller's end is `postage.rpc`.

A request is answered by its handler, by whatever that raises, or by a word about why there is
no answer. It is acknowledged when the broker has the answers. A request that comes again is
answered again, and its handler does not run again, as far as `AnsweredCalls` remembers.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pika

from postage.consumer import PUBLISH_TIMEOUT, GenericConsumer
from postage.dedupe import Done
from postage.errors import (
    AckAndRestart,
    DecodeError,
    ExitScheduler,
    FilterError,
    PostageError,
    RejectMessage,
    printable,
)
from postage.futures import Future
from postage.handlers import Registration
from postage.messages import MessageResultError, MessageResultException
from postage.outbox import Outbox
from postage.rpc import TIMEOUT_HEADER
from postage.running import Ended, Rest, Runner
from postage.transport.subscriber import Delivery
from postage.verdict import ACK, Fate, Handling, Verdict

if TYPE_CHECKING:
    from postage.processor import MessageProcessor

logger = logging.getLogger(__name__)


class Answered:
    """The replies to one request, for those who repeat it."""

    __slots__ = ("done", "replies", "waiting")

    def __init__(self) -> None:
        self.replies: list[bytes] = []
        self.waiting: list[pika.BasicProperties] = []  # repeats that came while it still ran
        self.done = False


class AnsweredCalls:
    """The latest answered requests of one component, by message id.

    A caller whose timeout ends sends the request again with the same message id. The
    instance that ran it already answers from here instead of running it twice. Another
    instance cannot know. ``max_retry = 0`` keeps the caller from sending a request twice; the
    broker may still deliver it twice, if an instance dies with it.

    Args:
        size: How many requests are remembered.
        limit: Bytes of replies beyond which one is not remembered.
    """

    def __init__(self, size: int = 256, limit: int = 65_536) -> None:
        self._size = size
        self._limit = limit
        self._answered: collections.OrderedDict[str, Answered] = collections.OrderedDict()

    def repeated(self, properties: pika.BasicProperties) -> Answered | None:
        """Return the entry of a request that is known already, else note it as running."""
        if properties.message_id is None:
            return None
        known = self._answered.get(properties.message_id)
        if known is None:
            self._answered[properties.message_id] = Answered()
            while len(self._answered) > self._size:
                self._answered.popitem(last=False)
        return known

    def add(self, message_id: str | None, reply: bytes) -> list[pika.BasicProperties]:
        """Keep a reply. Returns the repeats that wait for it."""
        entry = self._answered.get(message_id) if message_id is not None else None
        if entry is None:
            return []
        entry.replies.append(reply)
        return list(entry.waiting)

    def finish(self, message_id: str | None, settled: bool) -> None:
        """Note that the handler ended. What it could not settle may run again."""
        entry = self._answered.get(message_id) if message_id is not None else None
        if entry is None or message_id is None:
            return
        entry.done = True
        entry.waiting.clear()
        if not settled or sum(map(len, entry.replies)) > self._limit:
            del self._answered[message_id]


class _Request:
    """A request, and what was answered so far."""

    __slots__ = ("answers", "delivery", "message_id", "patience", "replies")

    def __init__(self, delivery: Delivery, patience: float) -> None:
        self.delivery = delivery
        self.patience = patience  # seconds that its caller waits
        self.message_id: str | None = delivery.properties.message_id
        self.replies: list[bytes] = []
        self.answers: list[Future[None]] = []  # their confirms


class Answering:
    """Answers the requests of one component.

    Args:
        component: Whose handlers answer.
        consumer: Received the requests.
        runner: Runs the handlers.
        failed: Called with what a handler raises that is no answer by design.
    """

    def __init__(
        self,
        component: MessageProcessor,
        consumer: GenericConsumer,
        runner: Runner,
        failed: Callable[[Exception], None],
    ) -> None:
        self._component = component
        self._consumer = consumer
        self._runner = runner
        self._failed = failed
        self._answered = AnsweredCalls()

    def refuse(self, delivery: Delivery, why: str) -> Handling:
        """Answer what cannot even be read."""
        return self._confirmed([self._reply(delivery, self._error(why))], ACK)

    def answer(
        self,
        delivery: Delivery,
        body: Mapping[str, Any],
        registration: Registration | None,
        data: Any,
        outbox: Outbox | None,
    ) -> Verdict | Future[None] | Handling:
        """Answer a request.

        Args:
            delivery: The request.
            body: What it says.
            registration: Its handler, if it has one.
            data: What the handler gets.
            outbox: The handler's, if it has one.

        Returns:
            The verdict; or the confirm of the answer, after which the request is done; or the
            steps that are left until there is a verdict.
        """
        header = delivery.properties
        if header.reply_to is None:
            why = DecodeError("an RPC request without reply_to")
            return Verdict(Fate.PARK, "unanswerable", why)
        patience = _patience(delivery)
        if time.monotonic() - delivery.received > patience:  # by our own clock alone
            logger.debug("nobody waits for the answer to %r any more", delivery)
            return ACK
        known = self._answered.repeated(header)
        if known is not None:
            if not known.done:
                known.waiting.append(header)  # for what comes after what has come
            return self._confirmed([self._reply(delivery, each) for each in known.replies], ACK)
        try:
            request = _Request(delivery, patience)
            return self._answer_new(request, body, registration, data, outbox)
        except BaseException:
            self._answered.finish(header.message_id, settled=False)
            raise

    # ----------------------------------------------------------------------- inside

    def _answer_new(
        self,
        request: _Request,
        body: Mapping[str, Any],
        registration: Registration | None,
        data: Any,
        outbox: Outbox | None,
    ) -> Future[None] | Handling:
        if registration is None:
            self._send(request, self._error(f"no handler for {kind_of(body)}"))
            return self._settled(request, ACK)
        dedupe, message_id = self._component.dedupe, request.message_id
        if dedupe is not None and message_id is not None:
            known = dedupe.get(registration.attribute, message_id)
            if known is not None:
                for reply in known.replies:
                    self._send(request, reply)
                return self._settled(request, ACK)
        verdict, rest = ACK, None
        try:
            arguments = data, self._reply_function(request, outbox)
            rest = self._runner.run(request.delivery, registration, arguments, outbox)
        except Exception as error:
            verdict = self._answer_error(request, registration, error)
        if rest is not None:
            return self._go_on(request, body, registration, rest)
        self._conclude(request, body, registration)
        if verdict is ACK and len(request.answers) == 1:
            self._answered.finish(request.message_id, settled=True)
            return request.answers[0]
        return self._settled(request, verdict)

    def _go_on(
        self, request: _Request, body: Mapping[str, Any], registration: Registration, rest: Rest
    ) -> Handling:
        """Answer with a handler that is no plain function."""
        is_ended = False
        try:
            verdict = ACK
            try:
                yield from rest
            except Exception as error:
                verdict = self._answer_error(request, registration, error)
            self._conclude(request, body, registration)
            is_ended = True
        finally:
            if not is_ended:
                self._answered.finish(request.message_id, settled=False)
        return (yield from self._settled(request, verdict))

    def _conclude(
        self, request: _Request, body: Mapping[str, Any], registration: Registration
    ) -> None:
        """Note that the handler has ended."""
        if not request.answers:
            why = f"the handler of {kind_of(body)} ended without a reply"
            self._send(request, self._error(why))
        dedupe, message_id = self._component.dedupe, request.message_id
        if dedupe is not None and message_id is not None:
            dedupe.add(registration.attribute, message_id, Done(tuple(request.replies)))

    def _settled(self, request: _Request, verdict: Verdict) -> Handling:
        """Wait until the broker took the answers: only then is the request done."""
        settled = False
        try:
            verdict = yield from self._confirmed(request.answers, verdict)
            settled = True
        finally:
            self._answered.finish(request.message_id, settled)
        return verdict

    def _confirmed(self, answers: list[Future[None]], verdict: Verdict) -> Handling:
        for answer in list(answers):
            if not answer.ready():
                with contextlib.suppress(PostageError):
                    yield answer
            note_loss(answer)
        return verdict

    def _reply_function(self, request: _Request, outbox: Outbox | None) -> Callable[[Any], None]:
        def reply_func(message: Any) -> None:
            reply = self._consumer.reply_body(message)
            if outbox is None:
                self._send(request, reply)
            else:
                outbox.then(partial(self._send, request), reply)

        return reply_func

    def _send(self, request: _Request, reply: bytes) -> None:
        request.replies.append(reply)
        properties = request.delivery.properties
        request.answers.append(self._consumer.reply(properties, reply, request.patience))
        for waiting in self._answered.add(request.message_id, reply):
            request.answers.append(self._consumer.reply(waiting, reply, PUBLISH_TIMEOUT))

    def _reply(self, delivery: Delivery, reply: bytes) -> Future[None]:
        return self._consumer.reply(delivery.properties, reply, _patience(delivery))

    def _answer_error(
        self, request: _Request, registration: Registration, error: Exception
    ) -> Verdict:
        """Answer with what the handler raised, and decide what becomes of the request."""
        text = printable(error)
        if isinstance(error, FilterError):
            self._send(request, self._error(f"filtered: {text}" if text else "filtered"))
            return ACK
        if isinstance(error, Ended):
            self._send(request, self._exception("StopIteration", ""))
            return Verdict(Fate.STOP)
        self._send(request, self._exception(type(error).__name__, text))
        if isinstance(error, RejectMessage):
            return Verdict(Fate.REJECT, "rejected")
        if isinstance(error, ExitScheduler):
            return Verdict(Fate.EXIT)
        if isinstance(error, AckAndRestart):
            return Verdict(Fate.RESTART)
        self._failed(error)
        logger.error("%s failed: %s", registration.attribute, text, exc_info=error)
        return ACK

    def _error(self, text: str) -> bytes:
        return self._consumer.reply_body(MessageResultError(text))

    def _exception(self, name: str, text: str) -> bytes:
        return self._consumer.reply_body(MessageResultException(name, text))


def kind_of(body: Mapping[str, Any]) -> str:
    """Say what kind of message a body is."""
    return f"{body['category']} {body['type']!r} {body['name']!r}"


def note_loss(answer: Future[None]) -> None:
    """Say so if the broker did not take an answer, by its confirm."""
    try:
        answer.result(0)
    except PostageError as error:  # the caller has stopped waiting by now
        logger.warning("an answer was lost: %s", error)


def _patience(delivery: Delivery) -> float:
    """Return the seconds that the caller of an RPC waits, counted from the delivery."""
    timeout = delivery.headers.get(TIMEOUT_HEADER)
    return timeout / 1000 if isinstance(timeout, int) and timeout >= 0 else PUBLISH_TIMEOUT
