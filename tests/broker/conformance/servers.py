# SPDX-License-Identifier: MIT
"""The brokers that the clients of this folder judge, and what a test may do to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol
from urllib.parse import unquote, urlsplit

from postage.broker import Broker
from tests.rabbitmq_node import RabbitNode

#: Erlang: ends the processes that hold the sockets of one virtual host, so that their clients see
#: the connection break without a close frame.
CUT = """
    [exit(proplists:get_value(pid, Info), kill)
     || Info <- rabbit_networking:connection_info_all([pid, vhost]),
        proplists:get_value(vhost, Info) =:= <<"{vhost}">>].
"""


class Server(Protocol):
    """A broker under judgement."""

    def new_url(self) -> str:
        """Make a virtual host and return its URL."""

    def discard(self, url: str) -> None:
        """Forget a virtual host that ``new_url`` made."""

    def close_connections(self, url: str) -> None:
        """Close the connections to a virtual host by connection.close, with reply code 320."""

    def cut(self, url: str) -> None:
        """Break the connections to a virtual host, without a close frame."""


class RabbitMQ:
    """A RabbitMQ node.

    Args:
        node: the node.
        urls: URLs of its virtual hosts, one for each test.
    """

    def __init__(self, node: RabbitNode, urls: Iterator[str]) -> None:
        self._node = node
        self._urls = urls

    def __repr__(self) -> str:
        return f"<RabbitMQ {self._node!r}>"

    def new_url(self) -> str:
        self._node.ensure_running()
        return next(self._urls)

    def discard(self, url: str) -> None:
        """Leave it to the supply of URLs, which deletes many virtual hosts at once."""

    def close_connections(self, url: str) -> None:
        self._node.ctl("close_all_connections", "--vhost", _vhost_of(url), "by the test")

    def cut(self, url: str) -> None:
        self._node.ctl("eval", CUT.format(vhost=_vhost_of(url)))


class Embedded:
    """The embedded broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._made = 0

    def __repr__(self) -> str:
        return f"<Embedded {self._broker!r}>"

    def new_url(self) -> str:
        self._made += 1
        return self._broker.add_vhost(f"conformance-{self._made}")

    def discard(self, url: str) -> None:
        self._broker.delete_vhost(_vhost_of(url))

    def close_connections(self, url: str) -> None:
        self._broker.faults.close_connections(vhost=_vhost_of(url))

    def cut(self, url: str) -> None:
        self._broker.faults.drop(vhost=_vhost_of(url))


def _vhost_of(url: str) -> str:
    return unquote(urlsplit(url).path[1:])
