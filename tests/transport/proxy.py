# SPDX-License-Identifier: MIT
"""A TCP proxy before a broker, which fails as networks do."""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

import pika

HOST = "127.0.0.1"

#: Seconds until a connection on this machine, or a write to it, counts as stuck.
DEADLINE_SECONDS = 10.0

#: Makes `close()` reset the connection, instead of ending it in good order.
RESET = struct.pack("ii", 1, 0)


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
        self._answering: set[socket.socket] = set()  # the broker's ends
        self._holding = False
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
        with self._lock:
            self._holding = True
            for end in self._answering:
                self._selector.unregister(end)

    def release_answers(self) -> None:
        """Let through what waited."""
        with self._lock:
            self._holding = False
            for end in self._answering:
                self._watch(end, lambda end=end: self._forward(end))

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
            for key, _events in self._selector.select():
                with self._lock:
                    if self._is_watched(key.fileobj):  # not dropped since
                        key.data()

    def _watch(self, end: socket.socket, callback: Callable[[], object]) -> None:
        self._selector.register(end, selectors.EVENT_READ, callback)

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
        self._answering.add(broker)
        self._watch(client, lambda: self._forward(client))
        if not self._holding:
            self._watch(broker, lambda: self._forward(broker))

    def _forward(self, end: socket.socket) -> None:
        try:
            data = end.recv(65536)
            self._pairs[end].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(end)

    def _drop(self, end: socket.socket, reset: bool = False) -> None:
        other = self._pairs.get(end)
        for each in (end, other):
            if each is None or self._pairs.pop(each, None) is None:
                continue
            self._answering.discard(each)
            if self._is_watched(each):
                self._selector.unregister(each)
            if reset:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            each.close()
