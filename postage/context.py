# SPDX-License-Identifier: MIT
"""What the handler that runs here handles.

Each handler runs in a context of its own (`contextvars`), also in a thread of the pool, at
each step of a generator, and in a coroutine with its tasks. Whoever is called there can ask
for the delivery: the handler for its headers, a producer for the ids of the conversation.
"""

from __future__ import annotations

import contextvars

from postage.headers import CAUSATION, CONVERSATION
from postage.transport.subscriber import Delivery

_delivery: contextvars.ContextVar[Delivery | None] = contextvars.ContextVar(
    "delivery", default=None
)


def current_delivery() -> Delivery | None:
    """Return what the handler that runs here handles, or None outside of handlers."""
    return _delivery.get()


def enter(delivery: Delivery) -> None:
    """Say what is handled in this context."""
    _delivery.set(delivery)


def lineage() -> tuple[str | None, dict[str, str]]:
    """Return what a message takes over that is sent here.

    Returns:
        The id of the conversation, and a header that names the message whose handler runs.
    """
    delivery = current_delivery()
    if delivery is None:
        return None, {}
    cause = delivery.message_id
    return conversation_of(delivery), {CAUSATION: str(cause)} if cause else {}


def conversation_of(delivery: Delivery) -> str | None:
    """Return the id of the conversation that a message belongs to: its own, if it began one."""
    header = delivery.headers.get(CONVERSATION)
    if isinstance(header, str) and header:
        return header
    if delivery.properties.reply_to is None and delivery.properties.correlation_id:
        return str(delivery.properties.correlation_id)
    return delivery.message_id
