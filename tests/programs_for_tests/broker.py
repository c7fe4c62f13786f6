# SPDX-License-Identifier: MIT
"""The embedded broker as a process of its own, which does what it is told.

It reads commands as lines of JSON, such as ``["add_vhost", "letters"]``, and answers each with a
line: ``{"result": ...}`` or ``{"error": "..."}``. The first line says that it listens. It ends with
its input, and with SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from postage.broker import Broker, fields

if TYPE_CHECKING:
    from postage.broker.server import Server
    from postage.broker.vhost import VirtualHost


class Commands:
    """What the tests may tell a broker to do, or ask it. Each public method is a command."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._alarm = contextlib.ExitStack()

    def replace_vhosts(self, old: Iterable[str], new: Iterable[str]) -> None:
        for name in old:
            self._broker.delete_vhost(name)
        for name in new:
            self._broker.add_vhost(name)

    def add_user(self, name: str, password: str) -> None:
        self._broker.add_user(name, password)

    def delete_user(self, name: str) -> None:
        self._broker.delete_user(name)

    def close_connections(self, reason: str, vhost: str | None) -> None:
        self._broker.faults.close_connections(text=reason, vhost=vhost)

    def raise_alarm(self) -> None:
        self._alarm.enter_context(self._broker.faults.block())

    def clear_alarm(self) -> None:
        self._alarm.close()

    def queues(self, vhost: str) -> Any:
        return self._look(
            vhost,
            lambda host: [
                {
                    "name": queue.name,
                    "type": "quorum" if queue.arguments.is_quorum else "classic",
                    "durable": queue.durable,
                    "auto_delete": queue.auto_delete,
                    "arguments": {
                        name: fields.decode(field) for name, field in queue.arguments.raw.items()
                    },
                }
                for queue in host.queues.values()
            ],
        )

    def bindings(self, vhost: str) -> Any:
        return self._look(
            vhost,
            lambda host: [
                {
                    "source": exchange.name,
                    "key": binding.key,
                    "destination": binding.destination.name,
                }
                for exchange in host.exchanges.values()
                for binding in exchange.bindings
            ],
        )

    def consumers(self, vhost: str) -> Any:
        return self._look(
            vhost,
            lambda host: [
                {"queue": queue.name, "prefetch": consumer.prefetch}
                for queue in host.queues.values()
                for consumer in queue.consumers
            ],
        )

    def connections(self, vhost: str) -> Any:
        def rows(server: Server) -> list[dict[str, Any]]:
            return [
                {
                    "name": str(connection.properties.get("connection_name", "")),
                    "channels": len(connection.channels),
                }
                for connection in server.node.connections_of(vhost)
            ]

        return self._broker._call(rows)

    def fail(self, words: str) -> None:
        """Let something fail in the broker's thread that nobody waits for."""

        def fail() -> None:
            raise RuntimeError(words)

        self._broker._call(lambda server: server.loop.call_soon(fail))

    def _look(self, vhost: str, rows: Any) -> Any:
        def look(server: Server) -> Any:
            host: VirtualHost = server.node.vhost(vhost)
            return rows(host)

        # There is no public way to look into the broker: it has no management plugin.
        return self._broker._call(look)


def tell(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def end(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(0)


def main(port: str, store: str) -> None:
    """Run a broker until the input ends."""
    signal.signal(signal.SIGTERM, end)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with Broker(port=int(port), store=store) as broker:
        commands = Commands(broker)
        tell({"result": broker.url})
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            try:
                result = getattr(commands, name)(*arguments)
            except Exception as error:
                tell({"error": f"{type(error).__name__}: {error}"})
            else:
                tell({"result": result})


if __name__ == "__main__":
    main(*sys.argv[1:])
