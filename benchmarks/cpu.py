# SPDX-License-Identifier: MIT
"""The processor time of other processes: brokers and components.

Programs of other packages measure with this, too, in environments without psutil. They do
without the figures of the broker.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import psutil

#: The port of AMQP.
PORT = 5672


def listener(url: str) -> psutil.Process | None:
    """Return the process of a broker, if it runs on this machine and is ours to look at."""
    try:
        import psutil
    except ImportError:
        return None
    port = urlsplit(url).port or PORT
    try:
        sockets = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    pids = {
        each.pid
        for each in sockets
        if each.status == psutil.CONN_LISTEN and each.laddr[1:] == (port,) and each.pid
    }
    return psutil.Process(pids.pop()) if len(pids) == 1 else None


def can_be_apart() -> bool:
    """Tell whether `apart()` works here: on Linux, with two cores or more."""
    return hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1


@contextlib.contextmanager
def apart(url: str) -> Iterator[None]:
    """Give what is measured a core of its own, and a broker on this machine the others.

    So it is where the two have a machine each, or cores enough. Processes that are begun while
    the block runs inherit the core.
    """
    cores = os.sched_getaffinity(0)
    own = {max(cores)}
    broker = listener(url)
    _pin(broker, cores - own)
    os.sched_setaffinity(0, own)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        _pin(broker, cores)


def _pin(process: psutil.Process | None, cores: set[int]) -> None:
    for thread in process.threads() if process else ():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(thread.id, cores)


def spent(processes: Iterable[psutil.Process]) -> float:
    """Return the seconds of processor time that processes have taken so far."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def share(processes: Iterable[psutil.Process], seconds: float) -> float:
    """Return the processor time that processes take in some seconds, in percent of a core."""
    watched = list(processes)
    before, began = scheduled(watched), time.monotonic()
    time.sleep(seconds)
    return 100 * (scheduled(watched) - before) / (time.monotonic() - began)


def scheduled(processes: Iterable[psutil.Process]) -> float:
    """Return the seconds of `spent()`, to the nanosecond if Linux keeps such books.

    A process may take less than the hundredth of a second in which `spent()` counts. Those books
    know nothing of threads that have ended.
    """
    total = 0.0
    for process in processes:
        books = list(Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
        if books:
            total += sum(int(book.read_text().split()[0]) for book in books) / 1e9
        else:
            total += spent([process])
    return total
