# SPDX-License-Identifier: MIT
"""An AMQP 0-9-1 broker in Python, for development, demos and tests.

It is a server that real clients connect to, with the extensions of RabbitMQ that postage and
others use, so that nothing has to be installed first. Production belongs on RabbitMQ.
"""

from __future__ import annotations

import ipaddress
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from postage.broker.errors import BrokerError
from postage.broker.faults import Faults
from postage.broker.node import CONSUMER_TIMEOUT, MEMORY_LIMIT, Node, Post
from postage.broker.server import Server
from postage.broker.store import Store, StoreError

__all__ = ["Broker", "BrokerError", "Faults", "StoreError"]

#: The user that everybody knows; RabbitMQ, too, lets it in from the same machine only.
GUEST = "guest"


class Broker:
    """An AMQP broker in a thread of its own, for as long as its ``with`` block.

    >>> with Broker() as broker:
    ...     broker.url
    'amqp://guest:guest@127.0.0.1:.../%2F'

    Args:
        host: the address to listen on. Any but that of this machine itself needs users whose
            password is not ``guest``.
        port: the port, 0 for one that is free.
        users: passwords by user. All users may do everything.
        vhosts: names of the virtual hosts.
        strict: refuse what RabbitMQ 4.3 refuses: queues that are neither durable nor
            exclusive, and a prefetch for a whole channel.
        store: a file that keeps what is durable. Without it, all is lost with the broker.
        consumer_timeout: seconds that a delivery may be unsettled before its channel is
            closed, as in RabbitMQ.
        memory_limit: bytes of messages in queues beyond which publishers are blocked.

    Raises:
        BrokerError: There is no user or no virtual host, or `host` is open to other machines
            and a password is ``guest``.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        users: Mapping[str, str] | None = None,
        vhosts: Iterable[str] = ("/",),
        strict: bool = False,
        store: str | Path | None = None,
        consumer_timeout: float = CONSUMER_TIMEOUT,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self.host = host
        self._port = port
        self._users = dict(users) if users is not None else {GUEST: GUEST}
        self._vhosts = tuple(vhosts)
        self._strict = strict
        self._store = store
        self._consumer_timeout = consumer_timeout
        self._memory_limit = memory_limit
        self._server: Server | None = None
        if not self._users or not self._vhosts:
            raise BrokerError("a broker needs at least one user and one virtual host")
        if not _is_loopback(host) and GUEST in self._users.values():
            raise BrokerError(
                f"a broker on {host} can be reached from other machines: give it users whose "
                "password is not guest"
            )
        #: Makes the running broker misbehave.
        self.faults = Faults(self._call)

    def __repr__(self) -> str:
        state = f"on {self.host}:{self._port}" if self._server is not None else "stopped"
        return f"<Broker {state}>"

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        server: Server | None = getattr(self, "_server", None)
        if server is not None and server.is_alive:  # not in a forked child
            warnings.warn(f"{self!r} was dropped without close()", ResourceWarning, stacklevel=2)
            server.stop_soon()

    def start(self) -> None:
        """Begin to serve. After `close` it starts on the same port again.

        Raises:
            BrokerError: The address cannot be used.
            StoreError: The store cannot be used.
        """
        if self._server is not None:
            return
        server = Server(self._make_node, self.host, self._port)
        server.start()
        self._server = server
        self._port = server.port

    def close(self) -> None:
        """Close all connections in good order, write what is to be kept, and stop.

        Raises:
            StoreError: Something could not be written, and is lost.
        """
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    @property
    def port(self) -> int:
        """The port on which it listens; 0 if it is free to choose, and was never started."""
        return self._port

    @property
    def url(self) -> str:
        """The URL of the first virtual host, for the first user."""
        return self.url_of(self._vhosts[0])

    def url_of(self, vhost: str) -> str:
        """Return the URL of a virtual host, for the first user."""
        user, password = next(iter(self._users.items()))
        host = f"[{self.host}]" if ":" in self.host else self.host
        login = f"{quote(user, safe='')}:{quote(password, safe='')}"
        return f"amqp://{login}@{host}:{self._port}/{quote(vhost, safe='')}"

    def add_vhost(self, name: str) -> str:
        """Make a virtual host, unless it is there, and return its URL.

        Raises:
            BrokerError: The broker does not run.
        """
        self._call(lambda server: server.node.add_vhost(name))
        return self.url_of(name)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it, and close its connections.

        Raises:
            BrokerError: There is none, or the broker does not run.
        """
        self._call(lambda server: server.node.delete_vhost(name))

    def add_user(self, name: str, password: str) -> None:
        """Let a user in, who may do everything, or give a user another password.

        Raises:
            BrokerError: The password is ``guest`` and the broker open to other machines, or it
                does not run.
        """
        if password == GUEST and not _is_loopback(self.host):
            raise BrokerError(f"the password guest is not for a broker on {self.host}")

        def add(server: Server) -> None:
            server.node.users[name] = password

        self._call(add)
        self._users[name] = password

    def delete_user(self, name: str) -> None:
        """Let a user in no more. Connections that are open stay so, as with RabbitMQ.

        Raises:
            BrokerError: There is none, or the broker does not run.
        """
        if name not in self._users:
            raise BrokerError(f"there is no user {name!r}")
        self._call(lambda server: server.node.users.pop(name))
        del self._users[name]

    def _call(self, function: Callable[[Server], object]) -> object:
        if self._server is None:
            raise BrokerError("the broker does not run; call start() first")
        return self._server.call(function)

    def _make_node(self, post: Post) -> Node:
        store = Store(self._store) if self._store is not None else None
        try:
            return Node(
                users=self._users,
                vhosts=self._vhosts,
                is_strict=self._strict,
                store=store,
                post=post,
                consumer_timeout=self._consumer_timeout,
                memory_limit=self._memory_limit,
            )
        except BaseException:
            if store is not None:
                store.close()
            raise


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
