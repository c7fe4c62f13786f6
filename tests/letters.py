# SPDX-License-Identifier: MIT
"""A producer of letters, and the queue in which a test finds them."""

from __future__ import annotations

import json
from typing import Any

from postage.messaging import Exchange, GenericProducer


class Letters(Exchange):
    name = "letters"


class Sender(GenericProducer):
    eks = [(Letters, "post")]


class Mailbox:
    """A queue, which pika reads.

    Args:
        channel: one of a blocking connection of pika's.
        queue: the name, if it is to outlive the connection.
    """

    def __init__(self, channel: Any, queue: str = "") -> None:
        self.channel = channel
        channel.exchange_declare(Letters.name, durable=True)
        declared = channel.queue_declare(queue, durable=bool(queue), exclusive=not queue)
        self.name: str = declared.method.queue
        channel.queue_bind(self.name, Letters.name, "post")

    def count(self) -> int:
        return int(self.channel.queue_declare(self.name, passive=True).method.message_count)

    def bodies(self) -> list[Any]:
        """Return the messages that are there."""
        bodies: list[Any] = []
        count = self.count()
        # To get them one by one takes too long for thousands.
        for method, _properties, body in self.channel.consume(self.name) if count else ():
            bodies.append(json.loads(body))
            if len(bodies) == count:
                self.channel.basic_ack(method.delivery_tag, multiple=True)
                self.channel.cancel()  # gives back what came meanwhile
        return bodies

    def parameters(self) -> list[Any]:
        """Return what the messages say that are there."""
        return [body["content"]["parameters"] for body in self.bodies()]
