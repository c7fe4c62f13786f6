# SPDX-License-Identifier: MIT
"""A TCP proxy before a broker, which fails as networks do."""

from __future__ import annotations

import collections
import contextlib
import enum
import re
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import pika

HOST = "127.0.0.1"

#: Seconds until a connection on this machine, or a write to it, counts as stuck.
DEADLINE_SECONDS = 10.0

#: Makes `close()` reset the connection, instead of ending it in good order.
RESET = struct.pack("ii", 1, 0)


class Way(enum.Enum):
    """A direction."""

    REQUESTS = "from the client to the broker"
    ANSWERS = "from the broker to the client"


class Proxy:
    """A door to a broker, at an address of its own, for as long as its ``with`` block lasts.

    All methods take effect before they return.

    Args:
        url: the URL of the broker.
    """

    def __init__(self, url: str) -> None:
        parameters = pika.URLParameters(url)
        self._broker = (parameters.host, parameters.port)
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._pairs: dict[socket.socket, socket.socket] = {}  # both ways
        self._ways: dict[socket.socket, Way] = {}  # of what is read from an end
        self._held: set[Way] = set()
        self._ended: set[socket.socket] = set()  # no more will be read from them
        self._deaf: set[socket.socket] = set()  # what would be written to them is thrown away
        self._delay = 0.0
        self._late: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()
        self._closing = False
        #: How many connections were accepted so far.
        self.accepted = 0
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = re.sub(r"(?<=@)[^/]*", f"{HOST}:{self.port}", url)
        self._alarm, self._bell = socket.socketpair()
        self._watch(self._alarm, lambda: self._alarm.recv(1))
        self._watch(self._listener, self._accept)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Proxy {HOST}:{self.port} to {self._broker} [{len(self._pairs) // 2} open]>"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing = True
        self._bell.send(b"\0")
        self._thread.join()
        self.cut()
        for end in (self._listener, self._alarm, self._bell):
            end.close()
        self._selector.close()

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            for end in tuple(self._pairs):
                self._drop(end, reset=True)

    def hold_answers(self) -> None:
        """Let what the broker sends wait here; what is sent to it goes through."""
        self._hold(Way.ANSWERS)

    def release_answers(self) -> None:
        """Let through what waited."""
        self._release(Way.ANSWERS)

    @contextlib.contextmanager
    def black_hole(self) -> Iterator[None]:
        """Let nothing through while the block lasts, not even that an end was closed.

        Connections are accepted meanwhile, and nothing comes over them. What was not given up
        goes on in the end, as packets that TCP sends again.
        """
        for way in Way:
            self._hold(way)
        try:
            yield
        finally:
            for way in Way:
                self._release(way)

    @contextlib.contextmanager
    def delay(self, seconds: float) -> Iterator[None]:
        """Let everything through so much later while the block lasts."""
        with self._lock:
            self._delay = seconds
        try:
            yield
        finally:
            with self._lock:
                self._delay = 0.0

    def half_close(self, way: Way) -> None:
        """End one direction of every connection; the other one stays open."""
        with self._lock:
            for end in self._ends_of(way):
                other = self._pairs[end]
                self._deaf.add(other)
                with contextlib.suppress(OSError):  # it was just closed by its owner
                    other.shutdown(socket.SHUT_WR)

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """Reset every connection and refuse new ones while the block lasts."""
        with self._lock:
            self._selector.unregister(self._listener)
            self._listener.close()
            self.cut()
        try:
            yield
        finally:
            with self._lock:
                self._listener = socket.create_server((HOST, self.port))
                self._watch(self._listener, self._accept)

    def _run(self) -> None:
        while not self._closing:
            due = self._late[0][0] - time.monotonic() if self._late else None
            for key, _events in self._selector.select(due):
                with self._lock:
                    if self._is_watched(key.fileobj):  # not dropped since
                        key.data()
            with self._lock:
                while self._late and self._late[0][0] <= time.monotonic():
                    _due, end, data = self._late.popleft()
                    self._pass_on(end, data)

    def _hold(self, way: Way) -> None:
        with self._lock:
            if way not in self._held:
                self._held.add(way)
                for end in self._ends_of(way):
                    self._unwatch(end)

    def _release(self, way: Way) -> None:
        with self._lock:
            if way in self._held:
                self._held.discard(way)
                for end in self._ends_of(way):
                    self._watch_end(end)

    def _ends_of(self, way: Way) -> list[socket.socket]:
        return [end for end, its_way in self._ways.items() if its_way is way]

    def _watch_end(self, end: socket.socket) -> None:
        if self._ways[end] not in self._held and end not in self._ended:
            self._watch(end, lambda: self._forward(end))

    def _watch(self, end: socket.socket, callback: Callable[[], object]) -> None:
        self._selector.register(end, selectors.EVENT_READ, callback)

    def _unwatch(self, end: socket.socket) -> None:
        if self._is_watched(end):
            self._selector.unregister(end)

    def _is_watched(self, end: object) -> bool:
        return end in {key.fileobj for key in self._selector.get_map().values()}

    def _accept(self) -> None:
        client, _address = self._listener.accept()
        self.accepted += 1
        try:
            broker = socket.create_connection(self._broker, DEADLINE_SECONDS)
        except OSError:
            client.close()
            return
        client.settimeout(DEADLINE_SECONDS)
        self._pairs[client], self._pairs[broker] = broker, client
        self._ways[client], self._ways[broker] = Way.REQUESTS, Way.ANSWERS
        self._watch_end(client)
        self._watch_end(broker)

    def _forward(self, end: socket.socket) -> None:
        try:
            data = end.recv(65536)
        except OSError:
            data = b""
        if self._delay or self._late:  # nothing overtakes what is late
            if not data:
                self._ended.add(end)  # else it would be readable for ever
                self._unwatch(end)
            last = self._late[-1][0] if self._late else 0.0
            self._late.append((max(last, time.monotonic() + self._delay), end, data))
        else:
            self._pass_on(end, data)

    def _pass_on(self, end: socket.socket, data: bytes) -> None:
        other = self._pairs.get(end)
        if other is None:
            return
        try:
            if data and other not in self._deaf:
                other.sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(end)

    def _drop(self, end: socket.socket, reset: bool = False) -> None:
        other = self._pairs.get(end)
        for each in (end, other):
            if each is None or self._pairs.pop(each, None) is None:
                continue
            del self._ways[each]
            self._ended.discard(each)
            self._deaf.discard(each)
            self._unwatch(each)
            if reset:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            each.close()
