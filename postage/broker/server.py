# SPDX-License-Identifier: MIT
"""The edge of the broker: its sockets, on an asyncio loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar, cast

from postage.broker.connection import CLOSE_SECONDS, ROOM, Connection
from postage.broker.errors import BrokerError
from postage.broker.node import Node, Post

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Connections that may wait to be accepted.
BACKLOG = 1024
#: Seconds that clients get to answer when the broker stops.
STOP_SECONDS = 2.0
#: Seconds between two looks whether the thread that shall answer a call is still there.
LOOK_SECONDS = 1.0


class _Peer(asyncio.Protocol):
    """One socket."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._is_reading = True
        self._ending: asyncio.TimerHandle | None = None
        self.connection: Connection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._server.is_refusing:
            self._transport.abort()
            return
        # Below what the connection calls no room, so that its end is always heard of.
        self._transport.set_write_buffer_limits(high=ROOM // 2, low=ROOM // 4)
        host, port = transport.get_extra_info("peername")[:2]
        self.connection = self._server.node.connect(f"{host}:{port}")
        self._server.peers[self.connection] = self
        self._server.flush()  # to be woken when the time of the handshake is over

    def data_received(self, data: bytes) -> None:
        if self.connection is not None:
            self.connection.receive(data)
            self._server.flush()
            self.update()

    def resume_writing(self) -> None:
        if self.connection is not None and self._transport is not None:
            self.connection.wrote(self._transport.get_write_buffer_size())
            self._server.flush()
            self.update()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ending is not None:
            self._ending.cancel()
        if self._transport is not None:
            _shut(self._transport.get_extra_info("socket"))
        if self.connection is not None:
            self._server.peers.pop(self.connection, None)
            self.connection.lost()
            self._server.flush()

    def update(self) -> None:
        """Read from the client, or leave it for now."""
        if self._transport is None or self.connection is None or self._transport.is_closing():
            return
        wanted = self.connection.wants_input
        if wanted is not self._is_reading:
            self._is_reading = wanted
            (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def write(self) -> None:
        """Send what the connection has to say."""
        if self._transport is None or self.connection is None:
            return
        self._transport.write(b"".join(self.connection.take_output()))
        self.connection.wrote(self._transport.get_write_buffer_size())
        if self.connection.is_finished and self._ending is None:
            # A client that does not read what is left would keep it open for ever.
            self._ending = self._server.loop.call_later(CLOSE_SECONDS, self._transport.abort)
            self._transport.close()

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()


class Server:
    """Runs a node behind a listening socket.

    Args:
        make_node: is called in the server's thread with a function that brings a callable
            from any thread into it.
        host: the address to listen on.
        port: the port, 0 for a free one.

    Attributes:
        port: the port on which it listens, after `start`.
        is_refusing: new connections are closed at once.
    """

    node: Node
    loop: asyncio.AbstractEventLoop

    def __init__(
        self, make_node: Callable[[Post], Node], host: str, port: int
    ) -> None:
        self.host = host
        self.port = port
        self.is_refusing = False
        self.peers: dict[Connection, _Peer] = {}
        self._make_node: Callable[[Post], Node] | None = make_node
        self._error: BrokerError | None = None
        self._listener: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_flush_due = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen, and serve in a thread until `stop`.

        Raises:
            BrokerError: The address cannot be used.
        """
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        # A daemon: a program that forgets to stop it must end all the same. What is then not
        # on the disk was not confirmed.
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="postage-broker", daemon=True
        )
        self._thread.start()
        try:
            started.result()
        except BaseException:
            self._thread.join()
            self._thread = None
            raise

    def stop(self) -> None:
        """Close all connections in good order, and end the thread.

        In a forked child, which has no such thread, it does nothing.

        Raises:
            StoreError: Something could not be written, and is lost.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._end(thread)
        thread.join()
        if self._error is not None:
            raise self._error

    def stop_soon(self) -> None:
        """Have the thread end, and do not wait for it."""
        if self._thread is not None:
            self._end(self._thread)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs, in this process."""
        return self._thread is not None and self._thread.is_alive()

    def _end(self, thread: threading.Thread) -> None:
        if thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it ends at this moment
                self.loop.call_soon_threadsafe(self.loop.stop)

    def call(self, function: Callable[[Server], Result]) -> Result:
        """Run a function in the server's thread, and return what it returns.

        Raises:
            BrokerError: The server does not run.
        """
        thread = self._thread
        if thread is None or not thread.is_alive():
            raise BrokerError("the broker does not run in this process; call start() first")
        done: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def run() -> None:
            try:
                result = function(self)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)
            self.flush()
            self.update()

        with contextlib.suppress(RuntimeError):  # the loop was closed a moment ago
            self.loop.call_soon_threadsafe(run)
        while not concurrent.futures.wait([done], LOOK_SECONDS).done:
            if not thread.is_alive() and not done.done():
                raise BrokerError("the broker was stopped before it did what was asked")
        return done.result()

    # In the thread

    def _run(self, started: concurrent.futures.Future[None]) -> None:
        self.loop = loop = asyncio.new_event_loop()
        # Not kept: what belongs to the broker's owner must not live as long as this thread.
        make_node, self._make_node = self._make_node, None
        assert make_node is not None
        try:
            try:
                self.node = make_node(self._post)
                del make_node
                loop.run_until_complete(self._listen())
            except (OSError, OverflowError) as error:  # the latter: a port beyond 65535
                started.set_exception(self._unusable(error))
                return
            except BaseException as error:
                started.set_exception(error)
                return
            self.flush()
            started.set_result(None)
            loop.run_forever()
            loop.run_until_complete(self._shut_down())
        finally:
            if hasattr(self, "node"):
                try:
                    self.node.close()
                except BrokerError as error:
                    self._error = error
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    async def _listen(self) -> None:
        self._listener = await self.loop.create_server(
            lambda: _Peer(self), self.host, self.port, backlog=BACKLOG
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    def _unusable(self, error: OSError | OverflowError) -> BrokerError:
        number = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or error
        if number is not None and number > 0:  # asyncio's own text says the address again
            reason = os.strerror(number)
        remedy = "choose an address of this machine"
        if number in (errno.EADDRINUSE, errno.EACCES, None):
            remedy = "stop what is there, or choose another port"
        return BrokerError(
            f"the broker cannot listen on {self.host}:{self.port} ({reason}); {remedy}"
        )

    async def _shut_down(self) -> None:
        assert self._listener is not None
        for listening in self._listener.sockets:
            _shut(listening)
        self._listener.close()
        # Who was accepted a moment ago is on the way to `peers`.
        if accepting := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(accepting)
        self.node.is_stalled = False
        for connection in self.node.connections_of():
            connection.force_close(text="broker forced connection closure with reason 'shutdown'")
        self.flush()
        self.update()
        deadline = self.loop.time() + STOP_SECONDS
        while self.peers and self.loop.time() < deadline:
            await asyncio.sleep(0.005)
        for peer in tuple(self.peers.values()):
            peer.abort()
        while self.peers:
            await asyncio.sleep(0)
        if self._timer is not None:
            self._timer.cancel()

    def _post(self, function: Callable[[], None]) -> None:
        def run() -> None:
            function()
            self.flush()
            self.update()

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(run)

    def flush(self) -> None:
        """End a turn: send what is to be sent, and see when there is something to do again."""
        self._is_flush_due = False
        node = self.node
        node.finish_turn()
        if not node.is_stalled:
            dirty, node.dirty = node.dirty, {}
            for connection in dirty:
                if connection in self.peers:
                    self.peers[connection].write()
        is_due = node.has_more or (bool(node.dirty) and not node.is_stalled)
        if is_due and not self._is_flush_due:
            # What was written made room for more: others get their turn first.
            self._is_flush_due = True
            self.loop.call_soon(self.flush)
        self._set_timer()

    def _set_timer(self) -> None:
        when = self.node.clock.next_call
        if when is None:
            return
        if self._timer is not None:
            if self._timer.when() <= when and not self._timer.cancelled():
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(when, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self.flush()

    # What faults ask for

    def abort(self, vhost: str | None) -> int:
        """Cut the connections to a virtual host, or all, and return how many."""
        connections = [each for each in self.node.connections_of(vhost) if not each.is_finished]
        for connection in connections:
            if connection in self.peers:
                self.peers[connection].abort()
        return len(connections)

    def update(self) -> None:
        """Read from all clients that may be read from, and handle what they have sent."""
        for connection, peer in tuple(self.peers.items()):
            connection.advance()
            peer.update()
        if self.node.dirty and not self._is_flush_due:
            self._is_flush_due = True
            self.loop.call_soon(self.flush)


def _shut(shared: socket.socket) -> None:
    """Shut a socket down that is closed next: forked children of the process have it, too."""
    with contextlib.suppress(OSError):  # it is not connected any more
        shared.shutdown(socket.SHUT_RDWR)
