# SPDX-License-Identifier: MIT
"""Moving a message that was not handled: to its next attempt, or to its error queue.

A copy is published and confirmed first, and only then is the message acknowledged. So a
death in between loses nothing, and doubles one message, with the same id.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

from postage.consumer import PUBLISH_TIMEOUT, GenericConsumer
from postage.errors import (
    ChannelClosedError,
    EncodingError,
    PostageError,
    QueueMismatchError,
    printable,
)
from postage.futures import Future
from postage.headers import FIRST_FAILURE
from postage.microthreads import sleep
from postage.parking import FRAME_LIMIT, announcement, ledger_queue, parked_properties
from postage.retry import Failure, retried
from postage.settings import adopt_on_mismatch
from postage.topology import QueueSpec, error_queue
from postage.transport.conversation import Script, declare_queue
from postage.transport.publisher import encoded_size
from postage.transport.subscriber import Delivery

if TYPE_CHECKING:
    from pika.channel import Channel

logger = logging.getLogger(__name__)

#: Seconds before a message that could not be moved is given back to its queue.
PAUSE = 1.0
#: Bytes that the way through a delay adds to the headers at most.
DELAY_HEADERS = 1_500

#: The steps of moving a message: waitables, and in the end whether the broker has the copy.
Moving = Generator[Any, Any, bool]


class Mover:
    """Moves the messages of one component.

    Args:
        consumer: Received them.
        fingerprint: Of the component.
    """

    def __init__(self, consumer: GenericConsumer, fingerprint: Mapping[str, Any]) -> None:
        self._consumer = consumer
        self._fingerprint = fingerprint
        self._hub = consumer.subscriber.hub
        self._known: set[str] = set()  # error queues that were declared
        self._unable: set[str] = set()  # those that could not be used the last time

    def move(self, delivery: Delivery, failure: Failure) -> Moving:
        """Send a message to where it waits for its next attempt, or park it if there is none."""
        if failure.pause is not None:
            try:
                yield from self._retry(delivery, failure, failure.pause)
            except (ChannelClosedError, EncodingError) as error:
                # A pause would not mend that: the user may not bind, for instance.
                logger.error("no retry of a message from %r: %s", delivery.queue.name, error)
            except PostageError as error:
                return (yield from self._give_back(delivery, "retry", failure.error, error))
            else:
                logger.warning(
                    "attempt %d at a message from %r failed, again in %.1f s: %s: %s",
                    failure.attempt,
                    delivery.queue.name,
                    failure.pause,
                    type(failure.error).__name__,
                    printable(failure.error),
                )
                return True
        return (yield from self.park(delivery, "failed", failure.error, failure))

    def park(
        self,
        delivery: Delivery,
        reason: str,
        error: BaseException | None,
        failure: Failure | None = None,
    ) -> Moving:
        """Send a message to its error queue.

        Args:
            delivery: The message.
            reason: As for `parked_properties()`.
            error: What went wrong.
            failure: The last attempt, if a handler failed.
        """
        queue = delivery.queue.error_queue or "error"
        first = delivery.headers.get(FIRST_FAILURE)
        properties = parked_properties(
            delivery,
            reason,
            error,
            self._fingerprint,
            attempts=delivery.attempt,
            first_failure=first if isinstance(first, str) else None,
            handler=None if failure is None else failure.handler,
        )
        try:
            if queue not in self._known:
                yield from self._open(queue)
            yield self._consumer.publish(queue, delivery.body, properties, mandatory=True)
        except PostageError as trouble:
            self._known.discard(queue)
            return (yield from self._give_back(delivery, "park", error, trouble))
        self._unable.discard(delivery.queue.name)
        logger.error(
            "parked a message from %r in %r: %s: %s",
            delivery.queue.name,
            queue,
            reason,
            printable(error),
            exc_info=error if reason == "failed" else None,
        )
        return True

    def reject(self, delivery: Delivery) -> Generator[Any, Any, None]:
        """Have the broker move a message to where its queue sends what is rejected."""
        yield from self.announce(delivery)
        self._consumer.reject(delivery, requeue=False)

    def announce(self, delivery: Delivery) -> Generator[Any, Any, None]:
        """Say for `postage errors` that a message may get to its error queue by the broker."""
        queue = delivery.queue.dead_letter_queue
        if queue is None or queue in self._known:
            return
        try:
            yield from self._open(queue)
        except PostageError as error:
            logger.warning("the error queue %r could not be announced: %s", queue, error)

    # ----------------------------------------------------------------------- inside

    def _retry(
        self, delivery: Delivery, failure: Failure, pause: float
    ) -> Generator[Any, Any, None]:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        properties = retried(
            delivery.properties, failure.attempt, failure.handler, delivery.origin, now
        )
        if encoded_size(properties) + DELAY_HEADERS > FRAME_LIMIT:
            raise EncodingError("its headers leave no room for ours; it is parked")
        queue = self._consumer.subscriber.topology.name_of(delivery.queue)
        is_exclusive = delivery.queue.exclusive
        if is_exclusive and pause:  # only its own connection may bind it
            yield self._consumer.bind_for_delays(queue)
        yield self._consumer.publish(
            queue, delivery.body, properties, mandatory=True, delay=pause, is_bound=is_exclusive
        )

    def _open(self, queue: str) -> Generator[Any, Any, None]:
        """Declare an error queue, and say for `postage errors` that there is one."""
        yield self._declare(error_queue(queue))
        self._known.add(queue)
        try:
            ledger = ledger_queue()
            yield self._declare(ledger)
            yield self._consumer.publish(ledger.name, *announcement(queue), mandatory=True)
        except PostageError as error:
            logger.warning("the error queue %r could not be announced: %s", queue, error)

    def _declare(self, spec: QueueSpec) -> Future[None]:
        future: Future[None] = Future(self._hub.wait, self._hub.nudge)

        def script(channel: Channel) -> Script[str]:
            return (yield from declare_queue(channel, spec))

        def done(_result: Any, error: PostageError | None) -> None:
            if error is None or (isinstance(error, QueueMismatchError) and adopt_on_mismatch()):
                future.set(None)
            else:
                future.fail(error)

        connection = self._consumer.conn_broker
        self._hub.call(lambda: connection.probe(script, done, PUBLISH_TIMEOUT))
        return future

    def _give_back(
        self, delivery: Delivery, what: str, why: BaseException | None, trouble: PostageError
    ) -> Moving:
        """Have the broker deliver a message again, after a pause that keeps it from spinning."""
        queue = delivery.queue.name
        level = logging.DEBUG if queue in self._unable else logging.ERROR
        self._unable.add(queue)  # once an outage: it is tried again each second
        logger.log(
            level,
            "could not %s a message from %r (%s) and gives it back: %s",
            what,
            queue,
            printable(why),
            trouble,
        )
        self._consumer.subscriber.trust(delivery.queue)  # others shall not wait for this one
        yield sleep(PAUSE)
        self._consumer.reject(delivery, requeue=True)
        return False
