# SPDX-License-Identifier: MIT
"""Messages that leave together, or not at all."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, ClassVar

from postage.batch import Batch
from postage.sending import Composed

if TYPE_CHECKING:
    from postage.producer import GenericProducer


class Transaction(Batch):
    """A batch that holds its messages to its end. Made by `GenericProducer.transaction()`.

    ``message_x()``, ``message()`` and ``forward()`` build and check a message, and keep it.
    The end of the block sends all, in order, and waits for the confirms. If the block
    raises, they are dropped.

    It does not make several messages one: AMQP has no such thing. Once they are on their
    way, some may be confirmed and others not, which the error at the end tells. As soon as
    one is known to have failed, no more are sent.

    Attributes:
        confirmed: The ids of the messages that the broker confirmed.
        failed: (message id, error) of those that certainly did not arrive everywhere.
        unknown: (message id, error) of those that may have arrived.

    Raises:
        BatchError: At the end of the block, if not every message was confirmed.
        ClosedError: The producer was closed before. Nothing was sent.
    """

    _noun: ClassVar[str] = "transaction"

    def __init__(self, producer: GenericProducer) -> None:
        super().__init__(producer)
        self._held: collections.deque[Composed] = collections.deque()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-2]}, {len(self._held)} held]>"

    def _send(self, composed: Composed) -> None:
        self._check_open()
        self._held.append(composed)

    def _finish(self, succeeded: bool) -> None:
        held, self._held = self._held, collections.deque()
        if not succeeded:
            held.clear()
        if held:
            self._producer._open()  # raises if it was closed meanwhile
        while held and not self._report.has_failures:
            self._dispatch(held.popleft())
        self._await_fates()  # first, so that the lists tell in order what happened
        for composed in held:
            self._report.note_unsent(composed.message_id)
        self._sent += len(held)
        super()._finish(succeeded)
