# SPDX-License-Identifier: MIT
"""What the broker refuses, with the reply codes of AMQP 0-9-1 and the words of RabbitMQ.

A `Refusal` ends a channel or a connection of a client, depending on its code. `StoreError`
and `BrokerError` concern whoever runs the broker.
"""

from __future__ import annotations

CONNECTION_FORCED = 320
ACCESS_REFUSED = 403
NOT_FOUND = 404
RESOURCE_LOCKED = 405
PRECONDITION_FAILED = 406
FRAME_ERROR = 501
SYNTAX_ERROR = 502
COMMAND_INVALID = 503
CHANNEL_ERROR = 504
UNEXPECTED_FRAME = 505
RESOURCE_ERROR = 506
NOT_ALLOWED = 530
NOT_IMPLEMENTED = 540
INTERNAL_ERROR = 541

#: The codes and their names (AMQP 0-9-1 reference, constants).
NAMES = {
    311: "CONTENT_TOO_LARGE",
    312: "NO_ROUTE",
    313: "NO_CONSUMERS",
    CONNECTION_FORCED: "CONNECTION_FORCED",
    402: "INVALID_PATH",
    ACCESS_REFUSED: "ACCESS_REFUSED",
    NOT_FOUND: "NOT_FOUND",
    RESOURCE_LOCKED: "RESOURCE_LOCKED",
    PRECONDITION_FAILED: "PRECONDITION_FAILED",
    FRAME_ERROR: "FRAME_ERROR",
    SYNTAX_ERROR: "SYNTAX_ERROR",
    COMMAND_INVALID: "COMMAND_INVALID",
    CHANNEL_ERROR: "CHANNEL_ERROR",
    UNEXPECTED_FRAME: "UNEXPECTED_FRAME",
    RESOURCE_ERROR: "RESOURCE_ERROR",
    NOT_ALLOWED: "NOT_ALLOWED",
    NOT_IMPLEMENTED: "NOT_IMPLEMENTED",
    INTERNAL_ERROR: "INTERNAL_ERROR",
}

#: These end the channel only; all others end the connection.
_SOFT = frozenset({311, 313, ACCESS_REFUSED, NOT_FOUND, RESOURCE_LOCKED, PRECONDITION_FAILED})


class BrokerError(Exception):
    """Raised to whoever runs the broker, such as for an address that is in use."""


class Refusal(Exception):
    """Raised while a client's frame is handled, to close its channel or connection.

    Args:
        code: the reply code.
        text: what went wrong, without the name of the code.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"{NAMES.get(self.code, self.code)} - {self.text}"

    @property
    def closes_connection(self) -> bool:
        """Whether the whole connection ends, and not only the channel."""
        return self.code not in _SOFT


def not_found(kind: str, name: str, vhost: str) -> Refusal:
    """Return the refusal for an exchange or a queue that does not exist."""
    return Refusal(NOT_FOUND, f"no {kind} '{name}' in vhost '{vhost}'")
