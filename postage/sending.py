# SPDX-License-Identifier: MIT
"""A message that is ready to be sent, and what became of it, or of several."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import pika

from postage.delay import Wait
from postage.errors import (
    BatchError,
    PostageError,
    PublishError,
    PublishUnknownError,
    UnroutableError,
)
from postage.topology import ExchangeSpec
from postage.transport.publisher import Fate, Publishing, encoded_ahead

if TYPE_CHECKING:
    from postage.outbox import Outbox


class Composed:
    """A message that is ready to be sent: its body, its properties and its pairs.

    The properties are encoded already if there is nothing special about them. ``outbox`` is
    where it waits until the handler that sends it has succeeded, if anywhere, and ``wait`` how
    long it waits in the broker from then on.
    """

    __slots__ = (
        "body",
        "confirm",
        "mandatory",
        "message_id",
        "outbox",
        "pairs",
        "properties",
        "timeout",
        "wait",
    )

    def __init__(
        self,
        body: bytes,
        properties: pika.BasicProperties | bytes,
        pairs: Sequence[tuple[ExchangeSpec, str]],
        message_id: str,
        *,
        mandatory: bool,
        confirm: bool,
        timeout: float,
        outbox: Outbox | None = None,
        wait: Wait | None = None,
    ) -> None:
        self.body = body
        self.properties = properties
        self.pairs = pairs
        self.mandatory = mandatory
        self.confirm = confirm
        self.timeout = timeout
        self.outbox = outbox
        self.wait = wait
        self.message_id = message_id

    @property
    def loose_properties(self) -> pika.BasicProperties:
        """The properties of one that waits in the broker, which takes some of them."""
        assert not isinstance(self.properties, bytes)
        return self.properties

    def publishings(self, settled: Callable[[Publishing], None]) -> list[Publishing]:
        """Return one publishing for each pair."""
        deadline = time.monotonic() + self.timeout
        if self.wait is None:
            aim, properties = None, encoded_ahead(self.properties)
        else:
            aim, properties = self.wait.begin(self.mandatory), self.properties
        return [
            Publishing(
                exchange,
                key,
                self.body,
                properties,
                mandatory=self.mandatory,
                confirm=self.confirm,
                deadline=deadline,
                settled=settled,
                aim=aim,
                message_id=self.message_id,
            )
            for exchange, key in self.pairs
        ]


def publishings_of(
    composed: Composed, finished: Callable[[PostageError | None], None]
) -> list[Publishing]:
    """Return the publishings of a message.

    Args:
        composed: The message.
        finished: Called with None, or the error, when the last of them has its fate.
    """
    left = len(composed.pairs)

    def settled(_publishing: Publishing) -> None:
        nonlocal left
        left -= 1
        if not left:
            finished(outcome(publishings))

    publishings = composed.publishings(settled)
    return publishings


class Report:
    """What became of several messages: the lists of a `BatchError`."""

    def __init__(self) -> None:
        self.confirmed: list[str] = []
        self.failed: list[tuple[str, Exception]] = []
        self.unknown: list[tuple[str, Exception]] = []

    @property
    def settled(self) -> int:
        """How many messages have their fate."""
        return len(self.confirmed) + len(self.failed) + len(self.unknown)

    @property
    def has_failures(self) -> bool:
        """Whether a message was not confirmed."""
        return bool(self.failed or self.unknown)

    def note(self, message_id: str, error: PostageError | None) -> None:
        """Note what became of a message."""
        if error is None:
            self.confirmed.append(message_id)
        elif isinstance(error, PublishUnknownError):
            self.unknown.append((message_id, error))
        else:
            self.failed.append((message_id, error))

    def publishings(self, composed: Composed) -> list[Publishing]:
        """Return the publishings of a message whose fate is noted when it is known."""
        if len(composed.pairs) == 1:
            return composed.publishings(self._note_one)
        return publishings_of(composed, partial(self.note, composed.message_id))

    def _note_one(self, publishing: Publishing) -> None:
        self.note(str(publishing.message_id), publishing.error)

    def note_unsent(self, message_id: str) -> None:
        """Note a message that was held back, because one before it had failed."""
        self.note(message_id, PublishError("certainly not sent: a message before it failed"))

    def check(self) -> None:
        """Raise if a message was not confirmed.

        Raises:
            BatchError: With the lists.
        """
        if self.has_failures:
            raise BatchError(self.confirmed, self.failed, self.unknown)


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
