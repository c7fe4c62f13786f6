# SPDX-License-Identifier: MIT
"""A message that is ready to be sent, and what became of it, over all of its pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pika

from postage.errors import PostageError, UnroutableError
from postage.topology import ExchangeSpec
from postage.transport.publisher import Fate, Publishing


class Composed:
    """A message that is ready to be sent: its body, its properties and its pairs."""

    __slots__ = ("body", "confirm", "mandatory", "message_id", "pairs", "properties", "timeout")

    def __init__(
        self,
        body: bytes,
        properties: pika.BasicProperties,
        pairs: Sequence[tuple[ExchangeSpec, str]],
        *,
        mandatory: bool,
        confirm: bool,
        timeout: float,
    ) -> None:
        self.body = body
        self.properties = properties
        self.pairs = pairs
        self.mandatory = mandatory
        self.confirm = confirm
        self.timeout = timeout
        self.message_id: str = properties.message_id

    def publishings(self, settled: Callable[[Publishing], None]) -> list[Publishing]:
        """Return one publishing for each pair."""
        deadline = time.monotonic() + self.timeout
        return [
            Publishing(
                exchange,
                key,
                self.body,
                self.properties,
                mandatory=self.mandatory,
                confirm=self.confirm,
                deadline=deadline,
                settled=settled,
            )
            for exchange, key in self.pairs
        ]


class Sending:
    """The publishings of one message, and what to do when the last one has its fate."""

    __slots__ = ("_finished", "_left", "publishings")

    def __init__(self, composed: Composed, finished: Callable[[PostageError | None], None]) -> None:
        self._finished = finished
        self.publishings = composed.publishings(self._settled)
        self._left = len(self.publishings)

    def _settled(self, _publishing: Publishing) -> None:
        self._left -= 1
        if not self._left:
            self._finished(outcome(self.publishings))


def outcome(publishings: Sequence[Publishing]) -> PostageError | None:
    """Return the one error that tells what became of the pairs of a message."""
    errors = [each.error for each in publishings if each.error is not None]
    unroutable = [each.pair for each in publishings if each.fate is Fate.RETURNED]
    if not errors or len(publishings) == 1:
        return errors[0] if errors else None
    if len(unroutable) == len(errors):
        delivered = [each.pair for each in publishings if each.error is None]
        return UnroutableError(unroutable, delivered)
    return next(error for error in errors if not isinstance(error, UnroutableError))
