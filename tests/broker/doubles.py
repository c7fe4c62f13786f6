# SPDX-License-Identifier: MIT
"""A channel in the place of that of a connection."""

from __future__ import annotations

from dataclasses import dataclass, field

from postage.broker.consumers import Consumer
from postage.broker.queues import Entry


@dataclass
class Channel:
    """A channel that takes deliveries, or not, and writes them down.

    Attributes:
        delivered: the tags of consumers, and the bodies that they got.
        entries: what they got.
    """

    can_take: bool = True
    delivered: list[tuple[str, bytes]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        self.delivered.append((consumer.tag, entry.message.body))
        self.entries.append(entry)

    def cancelled(self, consumer: Consumer) -> None:
        raise AssertionError(f"{consumer!r} was cancelled")

    def forgotten(self, consumer: Consumer) -> list[Entry]:
        raise AssertionError(f"{consumer!r} was forgotten")
