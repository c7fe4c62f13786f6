# SPDX-License-Identifier: MIT
"""The whole broker without its sockets: virtual hosts, users, connections, alarms and the disk.

The edge calls `connect` for each client and `finish_turn` after it has handed over what came,
then writes what the connections in `dirty` have to send.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from postage import __version__
from postage.broker.clock import Clock, Timer
from postage.broker.connection import Connection
from postage.broker.errors import BrokerError
from postage.broker.store import Store, Stored
from postage.broker.vhost import DEAD_LETTERS_AT_ONCE, VirtualHost

if TYPE_CHECKING:
    from postage.broker.channel import Channel

logger = logging.getLogger(__name__)

#: Seconds that a delivery may be unsettled, as in RabbitMQ.
CONSUMER_TIMEOUT = 1800.0
#: Seconds between two looks for deliveries that are unsettled for too long, at most.
LOOK_SECONDS = 60.0
#: Bytes of messages in queues, beyond which publishers wait.
MEMORY_LIMIT = 1 << 30
#: Below this part of the limit they go on.
MEMORY_RESUME = 0.9
#: How many dead letters are published in each turn once there were too many for one.
DEAD_LETTERS_LATER = 30
#: Seconds until a store that could not be written is tried again.
STORE_PAUSE = 1.0

#: Runs a callable in the thread of the node, then finishes the turn.
Post = Callable[[Callable[[], None]], None]


class Node:
    """A broker.

    Args:
        users: passwords by user.
        vhosts: names of the virtual hosts.
        is_strict: refuse what RabbitMQ 4.3 refuses.
        store: keeps what is durable, None for nothing. The node closes it.
        post: runs a callable in the thread of the node; needed with a store only.
        consumer_timeout: seconds that a delivery may be unsettled.
        memory_limit: bytes of messages in queues beyond which publishers wait.

    Attributes:
        dirty: connections that have something to send, in order.
        has_more: there is more to do, which was left for the next turn.
        is_stalled: nothing is read or written (a fault).
        is_nacking: what is published is refused and thrown away (a fault).
        confirm_delay: seconds by which confirms are late (a fault).
    """

    version = __version__

    def __init__(
        self,
        *,
        users: Mapping[str, str],
        vhosts: Iterable[str],
        clock: Clock | None = None,
        is_strict: bool = False,
        store: Store | None = None,
        post: Post | None = None,
        consumer_timeout: float = CONSUMER_TIMEOUT,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self.users = dict(users)
        self.clock = clock if clock is not None else Clock()
        self.is_strict = is_strict
        self.vhosts: dict[str, VirtualHost] = {}
        self.connections: dict[Connection, None] = {}
        self.dirty: dict[Connection, None] = {}
        self.has_more = False
        self.is_stalled = False
        self.is_nacking = False
        self.confirm_delay = 0.0
        self._store = store
        self._post = post
        self._consumer_timeout = consumer_timeout
        self._memory_limit = memory_limit
        self._memory = 0
        self._alarms: dict[str, str] = {}
        #: Virtual hosts with dead letters to publish, also such as were deleted meanwhile.
        self._burying: dict[VirtualHost, None] = {}
        self._confirming: dict[Channel, None] = {}
        self._unsynced: list[tuple[Channel, int]] = []
        self._retry: Timer | None = None
        if store is not None:
            self._restore(store.load())
        for name in vhosts:
            if name not in self.vhosts:
                self.add_vhost(name)
        self._look_for_timeouts()

    def close(self) -> None:
        """Write what is to be kept, and let go of the store."""
        if self._store is not None:
            self._store.close()

    # Virtual hosts

    def add_vhost(self, name: str) -> VirtualHost:
        """Make a virtual host, unless it is there.

        Returns:
            the virtual host.
        """
        if name not in self.vhosts:
            self.vhosts[name] = self._new_vhost(name)
            if self._store is not None:
                self._store.put_vhost(name)
        return self.vhosts[name]

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it, and close its connections.

        Raises:
            BrokerError: There is none of that name.
        """
        vhost = self.vhosts.pop(name, None)
        if vhost is None:
            raise BrokerError(f"there is no virtual host {name!r}")
        for connection in self.connections_of(name):
            connection.force_close(text=f"vhost '{name}' is deleted")
        for queue in tuple(vhost.queues.values()):
            vhost.delete_queue(queue)
        if self._store is not None:
            self._store.drop_vhost(name)

    def vhost(self, name: str) -> VirtualHost:
        """Return a virtual host.

        Raises:
            BrokerError: There is none of that name.
        """
        try:
            return self.vhosts[name]
        except KeyError:
            raise BrokerError(f"there is no virtual host {name!r}") from None

    def _new_vhost(self, name: str) -> VirtualHost:
        return VirtualHost(
            name,
            self.clock,
            memory=self._count_memory,
            burial=self._bury_soon,
            store=self._store,
        )

    def _restore(self, stored: Stored) -> None:
        """Rebuild what the store holds, in an order in which each finds what it needs."""
        for name in stored.vhosts:
            self.vhosts[name] = self._new_vhost(name)
        for exchange in stored.exchanges:
            self.vhosts[exchange.vhost].restore_exchange(exchange)
        places = {}
        for queue in stored.queues:
            vhost = self.vhosts[queue.vhost]
            places[queue.id] = (vhost, vhost.restore_queue(queue))
        for binding in stored.bindings:
            self.vhosts[binding.vhost].restore_binding(binding)
        for queue_id, position, message in stored.messages:
            vhost, restored = places[queue_id]
            vhost.restore_message(restored, position, message)
        for _, restored in places.values():
            restored.restored()

    # Connections

    def connect(self, peer: str) -> Connection:
        """Return the broker's end of a new connection.

        Args:
            peer: the address of the client.
        """
        connection = Connection(self, peer)
        self.connections[connection] = None
        return connection

    def connections_of(self, vhost: str | None = None) -> list[Connection]:
        """Return the connections to a virtual host, or all of them."""
        return [
            each
            for each in self.connections
            if vhost is None or (each.vhost is not None and each.vhost.name == vhost)
        ]

    def forget(self, connection: Connection) -> None:
        """Let go of a connection that was lost."""
        self.connections.pop(connection, None)
        self.dirty.pop(connection, None)

    # Turns

    def finish_turn(self) -> None:
        """Tell publishers what became of their messages, and have what changed written down."""
        self.clock.run()
        if "memory" in self._alarms and self._memory < MEMORY_RESUME * self._memory_limit:
            self.clear_alarm("memory")
        limit = DEAD_LETTERS_LATER if self.has_more else DEAD_LETTERS_AT_ONCE
        for vhost in tuple(self._burying):
            vhost.publish_dead_letters(limit)
            if not vhost.has_dead_letters:
                del self._burying[vhost]
        self.has_more = bool(self._burying)
        if self._confirming:
            channels, self._confirming = self._confirming, {}
            if self.confirm_delay:
                self.clock.call_later(self.confirm_delay, lambda: _send_confirms(channels))
            else:
                _send_confirms(channels)
        # What was put and dropped within a turn leaves nothing to write, but has its publisher.
        if self._store is not None and (self._unsynced or not self._store.is_clean):
            self._sync()

    def _bury_soon(self, vhost: VirtualHost) -> None:
        self._burying[vhost] = None

    def confirm_soon(self, channel: Channel) -> None:
        """Have a channel confirm at the end of the turn."""
        self._confirming[channel] = None

    def sync_soon(self, channel: Channel, number: int) -> None:
        """Have a channel told once what was stored with this turn is on disk."""
        self._unsynced.append((channel, number))

    def _sync(self) -> None:
        assert self._store is not None and self._post is not None
        waiting, self._unsynced = self._unsynced, []
        post = self._post

        def done(error: Exception | None) -> None:
            post(lambda: self._synced(waiting, error))

        self._store.sync(done)

    def _synced(self, waiting: list[tuple[Channel, int]], error: Exception | None) -> None:
        for channel, number in waiting:
            channel.synced(number, is_good=error is None)
        if error is None:
            self.clear_alarm("store")
            return
        if "store" not in self._alarms:
            logger.error("publishers wait until the store can be written again: %s", error)
        self.raise_alarm("store", "the store cannot be written")
        if self._retry is None or not self._retry.is_due:
            self._retry = self.clock.call_later(STORE_PAUSE, self._sync)

    # Alarms

    @property
    def alarm(self) -> str | None:
        """Why publishers have to wait, None if they do not."""
        return next(iter(self._alarms.values()), None)

    def raise_alarm(self, name: str, reason: str) -> None:
        """Let publishers wait."""
        self._alarms[name] = reason

    def clear_alarm(self, name: str) -> None:
        """Let publishers go on, unless there is another alarm."""
        if self._alarms.pop(name, None) is not None and not self._alarms:
            for connection in tuple(self.connections):
                connection.unblock()

    def _count_memory(self, size: int) -> None:
        self._memory += size
        if self._memory > self._memory_limit:
            self.raise_alarm("memory", "low on memory")

    def _look_for_timeouts(self) -> None:
        for connection in tuple(self.connections):
            connection.check_timeouts(self._consumer_timeout)
        self.clock.call_later(
            min(LOOK_SECONDS, max(0.01, self._consumer_timeout / 2)), self._look_for_timeouts
        )


def _send_confirms(channels: Iterable[Channel]) -> None:
    for channel in channels:
        channel.send_confirms()

