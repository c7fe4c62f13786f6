# SPDX-License-Identifier: MIT
"""What every case on a plain `pika.SelectConnection` needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pika
from pika.channel import Channel


def run(url: str, use: Callable[[Channel], None]) -> None:
    """Open a connection and a channel, and run the loop until somebody closes it.

    Args:
        url: The broker.
        use: Called with the open channel.

    Raises:
        AMQPError: The connection failed, or was closed by the broker.
    """
    reasons: list[BaseException] = []

    def opened(connection: pika.connection.Connection) -> None:
        connection.channel(on_open_callback=use)

    def closed(connection: pika.SelectConnection, reason: BaseException) -> None:
        reasons.append(reason)
        connection.ioloop.stop()

    connection = pika.SelectConnection(
        pika.URLParameters(url),
        on_open_callback=opened,
        on_open_error_callback=closed,
        on_close_callback=closed,
    )
    connection.ioloop.start()
    if not isinstance(reasons[0], pika.exceptions.ConnectionClosedByClient):
        raise reasons[0]


def server_properties(url: str) -> dict[str, Any]:
    """Return what a broker says about itself."""
    properties: dict[str, Any] = {}

    def opened(channel: Channel) -> None:
        properties.update(channel.connection.server_properties or {})
        channel.connection.close()

    run(url, opened)
    return properties
