# SPDX-License-Identifier: MIT
"""The hub: who runs the I/O loop, and when.

pika is not thread-safe and does nothing unless somebody polls it. A thread of
its own for that costs two thread switches a call; polling in the calling thread
only starves the heartbeats while a handler computes. So the threads of a process
share one loop as *leader* and *followers*:

* Exactly one thread at a time is the leader. It alone may touch pika, the loop,
  and the loop-side methods of the other modules in this folder.
* A thread that waits for something becomes the leader if the chair is empty, and
  polls until what it waits for is there. Else it sleeps until the leader, who
  looks at the followers' conditions after every poll, wakes it.
* A thread that only wants something done appends it to one queue. The leader
  empties that queue before and after every poll; if there is no leader, the
  thread takes the chair for one round.
* The *guard*, a daemon thread, takes the chair when it was empty for 100 ms, and
  leaves it as soon as somebody waits. So heartbeats, confirms and deliveries go
  on while a handler computes or a script sleeps. It also pushes, within a
  millisecond, what was left to be written together with more that may come.

What wakes whom: a byte in the wake-up socket ends the leader's poll (written by
``call()``, by a follower that finds the guard in the chair, and by the
interpreter when a signal arrives); an opened gate ends a follower's sleep.

The rules that keep this sound, each named again where it is kept:

 1. one queue: who leads does not change the order of calls;
 2. a leader leaves after it emptied the queue and pushed the bytes out, or rang
    for the guard to do so, and comes back if it then sees that the queue is not
    empty any more;
 3. one heir is woken, and an heir that does not need the chair passes it on;
 4. a follower looks again after it registered, and the leader looks at all
    followers before it polls, so no wake-up is missed;
 5. callbacks record facts; nothing in them waits (`HubReentered`);
 6. nothing that a callback raises may leave the poll;
 7. signal handlers set flags, and a signal ends the poll;
 8. a fork finds the loop at rest, and the child never touches the parent's;
 9. the guard leads whenever nobody else does.

Log handlers, finalisers and signal handlers may run between any two lines of the
thread that they interrupt. They may use ``call()``: it takes no lock that the
interrupted thread could hold (the one lock is re-entrant, gates are raw locks).
A signal handler may also raise, as Ctrl-C does. Whoever that carries away is seen to
be gone (`_Visit`), and the connections start anew if it was in the middle of pika.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pika.adapters.select_connection import IOLoop

from postage.errors import ClosedError, ConnectionLostError, HubReentered

logger = logging.getLogger(__name__)

#: Seconds that the chair may stay empty before the guard takes it. Well under the
#: shortest useful heartbeat, well over the pause between two calls of a busy thread.
VACANCY = 0.1

#: After so many times the vacancy the guard looks at the chair though nobody rang. Whoever
#: leaves it rings; only an exception between two lines of that, as of Ctrl-C, prevents it.
UNASKED = 10

#: Seconds that a fork waits for the guard, and then for the leader, to step aside. They only
#: have to finish one round, so more than a moment means that one is stuck in a callback.
FORK_PATIENCE = 10.0

#: Seconds after which a leader that leaves looks for events first. A thread that only sends, and
#: never waits, hears of its confirms and of the broker's heartbeats so.
UNPOLLED = 0.01

#: Seconds for which what is written may wait to go out with more, and how many calls at most go
#: out together. A system call and a packet for each cost both sides, and the broker most, more
#: than all the rest of a small message; many in one would leave the others idle meanwhile.
LATE, TOGETHER = 0.001, 16

#: Rounds of pushing that a leader does for others before it leaves. Under load every
#: push brings new events, and the thread has its own work to return to.
PUSHES = 3


class _Timer:
    """A handle of `_Loop.call_later()`."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback


class _Loop(IOLoop):
    """pika's loop, which also knows the descriptors that it watches, and keeps the timers.

    A socket that pika has something for is nearly always writable. So `push()` tries that at
    once, and the poller is asked only about what did not take all: a message costs one system
    call, and neither a poll nor two changes of what is polled.

    An exception that leaves pika's own `process_timeouts()` takes the other timers along
    that were due. One that strikes while pika compares two timers leaves them in disorder:
    from then on a poll lasts too long. Tuples are compared without a line of Python.
    """

    def __init__(self) -> None:
        self.watched: dict[int, Callable[[int, int], None]] = {}
        self._wanted: dict[int, int] = {}  # what pika wants to hear of each of them
        self._known: dict[int, int] = {}  # what the poller knows of that
        self._untried: dict[int, None] = {}  # those that pika has something for
        #: Seconds that the next poll lasts at most, or None for until the next timer.
        self.limit: float | None = None
        self._timers: list[tuple[float, int, _Timer]] = []  # a heap
        self._numbers = itertools.count()
        self._cancelled = 0
        super().__init__()

    def add_handler(self, fd: int, handler: Callable[[int, int], None], events: int) -> None:
        self.watched[fd] = handler
        self._wanted[fd] = self._known[fd] = events
        super().add_handler(fd, handler, events)

    def update_handler(self, fd: int, events: int) -> None:
        known = self._known[fd]
        self._wanted[fd] = events
        self._untried.pop(fd, None)
        added = events & ~known
        if added & self.WRITE and not added & self.READ:
            self._untried[fd] = None
        elif events != known:
            self._tell(fd, events)

    def _tell(self, fd: int, events: int) -> None:
        self._known[fd] = events
        super().update_handler(fd, events)

    def remove_handler(self, fd: int) -> None:
        self.watched.pop(fd, None)
        self._wanted.pop(fd, None)
        self._known.pop(fd, None)
        self._untried.pop(fd, None)
        super().remove_handler(fd)

    @property
    def has_untried(self) -> bool:
        """Whether pika has something to write."""
        return bool(self._untried)

    def push(self) -> None:
        """Write what pika has to write, as far as the sockets take it now."""
        while self._untried:
            fd = next(iter(self._untried))
            self.watched[fd](fd, self.WRITE)
            if fd in self._untried:  # there is more
                del self._untried[fd]
                self._tell(fd, self._wanted[fd])

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        timer = _Timer(callback)
        due = time.monotonic() + max(0.0, delay)
        heapq.heappush(self._timers, (due, next(self._numbers), timer))
        return timer

    def remove_timeout(self, timeout_handle: Any) -> None:
        if timeout_handle.callback is None:
            return
        timeout_handle.callback = None
        self._cancelled += 1
        if self._cancelled > max(1000, len(self._timers) / 2):  # most deadlines are cancelled
            self._cancelled = 0
            timers = [each for each in self._timers if each[2].callback is not None]
            heapq.heapify(timers)
            self._timers = timers

    def process_timeouts(self) -> None:
        super().process_timeouts()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()

    def _get_remaining_interval(self) -> float | None:
        """Tell how long to poll. Asked by pika's poller."""
        interval = super()._get_remaining_interval()
        if self.limit is not None and (interval is None or self.limit < interval):
            interval = self.limit
        if self._timers and interval != 0.0:
            left = max(0.0, self._timers[0][0] - time.monotonic())
            if interval is None or left < interval:
                return left
        return interval


class _Gate:
    """A door that is shut until somebody opens it, once.

    A raw lock and not a Semaphore or an Event: those take a lock of their own, and
    a finaliser that runs inside it and opens the same gate would wait for itself.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        if self._lock.locked():
            with contextlib.suppress(RuntimeError):  # another thread was faster
                self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        return self._lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout))


class _Visit:
    """A thread in the hub: it leads, or waits for a condition, or both in turn.

    It holds the lock `here` by a ``with`` block for as long as it stays. Nothing can strike
    between the ``with`` of a raw lock and its block, and no line of Python runs when the
    block is left. So by that lock the others see whether an exception that may strike
    anywhere, as that of Ctrl-C, carried the thread away before it could leave in order.
    """

    __slots__ = ("error", "gate", "here", "ready", "thread")

    def __init__(self, ready: Callable[[], bool]) -> None:
        self.thread = threading.get_ident()
        self.here = threading.Lock()
        self.gate = _Gate()
        self.ready = ready
        self.error: Exception | None = None  # of what it had asked the leader to do first

    def over(self) -> bool:
        """Tell whether there is nothing left to wait for."""
        return self.error is not None or self.ready()

    def look(self) -> bool:
        """Tell whether to wake it. A condition that raises shall do so in its own thread."""
        try:
            return self.over()
        except Exception:
            return True


class Hub:
    """One I/O loop, run by whichever thread needs it.

    Args:
        vacancy: Seconds without a leader after which the guard leads.
    """

    def __init__(self, vacancy: float = VACANCY) -> None:
        self.pid = os.getpid()
        self.loop = _Loop()
        self.loop.activate_poller()
        #: Called when the loop broke in the middle of a round: what was being
        #: parsed or written is in an unknown state, so connections start anew.
        self.on_broken: list[Callable[[BaseException], None]] = []
        #: How often the guard took the chair, for tests and the curious.
        self.guard_led = 0
        self._lock = threading.RLock()  # guards _leader and _waiters; never held in foreign code
        self._leader: _Visit | None = None  # to be asked for by _occupant()
        self._waiters: list[_Visit] = []
        #: What to run, and the visit that wants to know what it raises.
        self._calls: collections.deque[tuple[Callable[[], None], _Visit | None]]
        self._calls = collections.deque()
        self._unpushed = False  # something of ours ran since the last push and may have written
        self._pushed = False  # something was written since the last poll
        self._late = 0  # calls that have left it to others to push for them
        self._polled = time.monotonic()
        self._awake = False  # a byte is in the wake-up socket, or the leader is about to look
        self._freezer: _Visit | None = None  # the thread that forks: all others leave the chair
        self._closed = False
        self._wakeup_reader, self._wakeup_writer = socket.socketpair()
        self._wakeup_reader.setblocking(False)
        self._wakeup_writer.setblocking(False)
        self.loop.add_handler(self._wakeup_reader.fileno(), self._drain_wakeups, self.loop.READ)
        self._vacancy = vacancy
        self._start_guard()

    def __repr__(self) -> str:
        leader = self._occupant()
        if self._closed:
            state = "closed"
        elif leader is None:
            state = "no leader"
        elif self._guarded:
            state = "led by the guard"
        else:
            state = f"led by thread {leader.thread}"
        return f"<Hub [{state}, {len(self._waiters)} waiting, {len(self._calls)} calls]>"

    # ------------------------------------------------------------- from any thread

    def call(self, function: Callable[[], None], together: bool = False) -> None:
        """Have a function run by the leader, after all that was given before it.

        Args:
            function: Takes nothing; what it raises is logged.
            together: What it writes may wait for a moment, to go out together with what others
                write: unless it is the first since the last poll.
        """
        self._calls.append((function, None))  # rule 1: before the look at the chair
        if self._occupant() is None:
            visit = _Visit(_never)
            with visit.here:
                if self._take(visit):
                    self._release(visit, together)  # runs it, after what was there before
                    return
        self.nudge()

    def post(self, function: Callable[[], None]) -> None:
        """Like `call()`, but if nobody leads, leave it to the next leader.

        For what the calling thread is about to wait for anyway, or what may wait
        until the guard comes, such as acknowledgements.
        """
        self._calls.append((function, None))
        if self._occupant() is not None:
            self.nudge()

    def wait(
        self,
        ready: Callable[[], bool],
        timeout: float | None = None,
        first: Callable[[], None] | None = None,
    ) -> bool:
        """Run the loop, or let it be run, until a condition holds.

        Args:
            ready: The condition. Must be quick: the leader evaluates it after every poll.
            timeout: Seconds, or None for no limit.
            first: A function for the leader, as for `call()`, without the round of its own
                that `call()` would cost. What it raises is raised here.

        Returns:
            Whether the condition held in time.

        Raises:
            HubReentered: This thread is inside a callback of the loop.
            ClosedError: The hub was closed.
            ConnectionLostError: Another thread was leading and was interrupted (Ctrl-C) in
                the middle of `first`.
        """
        if self.leading:  # rule 5
            raise HubReentered(
                "a callback of the I/O loop tried to wait for the loop that runs it; "
                "log handlers and finalisers may send, but not wait"
            )
        deadline = None if timeout is None else time.monotonic() + timeout
        visit = _Visit(ready)
        if first is not None:
            self._calls.append((first, visit))  # rule 1
        with visit.here:
            try:
                held = self._lead_or_follow(visit, deadline, waker_owed=first is not None)
            finally:
                self._forget(visit)
        if visit.error is not None:  # rule 6: it goes to whoever asked
            raise visit.error
        return held

    def wake(self) -> None:
        """End the leader's poll. Safe everywhere, also in a signal handler."""
        if self._awake:
            return  # one byte is enough for all who come before the leader looks
        try:
            self._awake = True
            self._wakeup_writer.send(b"\0")
        except OSError:
            pass  # full: it is awake already. Closed: nobody polls
        except BaseException:  # an interrupt, perhaps before the byte was sent
            self._awake = False
            raise

    def nudge(self) -> None:
        """Let the leader look at the queue and at what others wait for.

        Needless in a callback: the leader looks before it polls. But a finaliser or a log
        handler may be called after that look; nothing of ours has run since, then.
        """
        if not (self.leading and self._unpushed):
            self.wake()

    def close(self) -> None:
        """Stop the guard and give the loop's descriptors back. For when nobody uses it any more.

        Raises:
            HubReentered: This thread is inside a callback of the loop.
        """
        if self.leading:  # rule 5
            raise HubReentered("a callback of the I/O loop tried to close the loop that runs it")
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._freeze()
        self._leader = None  # nobody can take the chair any more
        self._wake_all()
        self.loop.remove_handler(self._wakeup_reader.fileno())
        self.loop.close()
        self._wakeup_reader.close()
        self._wakeup_writer.close()

    # ------------------------------------------------- from the leader (inside the loop)

    def call_later(self, delay: float, function: Callable[[], None]) -> Any:
        """Run a function after a delay in seconds. Returns a handle for `cancel()`."""
        return self.loop.call_later(delay, self.shielded(function))

    def cancel(self, handle: Any) -> None:
        """Forget a timer that `call_later()` made."""
        self.loop.remove_timeout(handle)

    def shielded(self, function: Callable[..., None]) -> Callable[..., None]:
        """Wrap a callback for pika, so that what it raises ends in the log.

        Rule 6: an exception in a delivery callback would abort the connection.
        """

        def shield(*args: Any, **kwds: Any) -> None:
            self._unpushed = True
            try:
                function(*args, **kwds)
            except Exception:
                logger.exception("a callback of the I/O loop failed: %r", function)

        return shield

    @property
    def leading(self) -> bool:
        """Whether the calling thread is the leader, and so may touch pika."""
        leader = self._occupant()
        return leader is not None and leader.thread == threading.get_ident()

    # ------------------------------------------------------------------- the chair

    def _occupant(self) -> _Visit | None:
        """Return who sits in the chair. A leader whom an interrupt carried away does not."""
        leader = self._leader
        return leader if leader is not None and leader.here.locked() else None

    @property
    def _guarded(self) -> bool:
        leader = self._occupant()
        return leader is not None and leader.thread == self._guard.ident

    def _take(self, visit: _Visit) -> bool:
        with self._lock:
            if self._closed or self._occupant() is not None:
                return False
            if self._freezer is not None and self._freezer.thread != visit.thread:
                return False
            if visit in self._waiters:
                self._waiters.remove(visit)
            self._leader = visit
            return True

    def _release(self, visit: _Visit, together: bool = False) -> None:
        """Leave the chair: everything called for is done, everything written is sent.

        Or it is sent soon, by whoever leads next, by the guard if nobody does.
        """
        heir: _Visit | None = None
        try:
            while True:
                for _ in range(PUSHES):
                    self._run_calls()
                    if not self._unpushed or (together and self._may_be_late()):
                        break
                    if time.monotonic() - self._polled < UNPOLLED:
                        self._push()  # rule 2: pika only buffers
                    else:
                        self._poll(0.0)
                heir = self._leave(visit)
                # rule 2: what was appended meanwhile saw us in the chair
                if not self._calls or not self._take(visit):
                    break
        except BaseException:
            heir = self._leave(visit) or heir
            raise
        finally:
            if heir is not None:
                heir.gate.open()  # rule 3: exactly one, not a herd
            self._guard_bell.open()

    def _may_be_late(self) -> bool:
        """Tell whether a push may be left to others, and see to it that it is done."""
        if not self._pushed or self._late == TOGETHER:
            return False
        self._late += 1
        if self._late == 1:
            self._guard_alarm.open()
        return True

    def _leave(self, visit: _Visit) -> _Visit | None:
        with self._lock:
            if self._leader is not visit:
                return None  # an interrupt struck when we had left already
            self._leader = None
            return self._heir()

    def _heir(self) -> _Visit | None:
        """Return the follower who has waited longest. Called under the lock."""
        while self._waiters and not self._waiters[0].here.locked():
            del self._waiters[0]  # an interrupt carried it away
        return self._waiters[0] if self._waiters else None

    def _follow(self, visit: _Visit) -> bool:
        """Register a follower, unless nobody would wake it."""
        with self._lock:
            if self._closed:
                raise ClosedError("the I/O loop was closed while something waited for it")
            if self._occupant() is None and self._freezer is None:
                return False  # the chair is empty again
            if visit not in self._waiters:
                self._waiters.append(visit)
            return True

    def _forget(self, visit: _Visit) -> None:
        """Unregister a follower. If it was the heir and goes, the next one is told (rule 3)."""
        with self._lock:
            if visit not in self._waiters:
                return
            self._waiters.remove(visit)
            heir = self._heir() if self._occupant() is None else None
        if heir is not None:
            heir.gate.open()

    def _look(self) -> None:
        """Wake the followers who have what they wait for (rule 4)."""
        for visit in tuple(self._waiters):
            if visit.look():
                visit.gate.open()

    def _wake_all(self) -> None:
        with self._lock:
            waiters = tuple(self._waiters)
        for visit in waiters:
            visit.gate.open()

    def _lead_or_follow(self, visit: _Visit, deadline: float | None, waker_owed: bool) -> bool:
        while waker_owed or not visit.over():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0 and not waker_owed:
                return False
            if self._take(visit):
                waker_owed = False
                try:
                    self._lead(visit.over, deadline)
                finally:
                    self._release(visit)
            elif self._follow(visit):
                if waker_owed or self._guarded:
                    self.wake()  # the leader has a call to run, or is the guard and steps aside
                    waker_owed = False
                if not visit.over():  # rule 4: it may have come true before we registered
                    visit.gate.wait(left)
        return True

    def _lead(
        self,
        ready: Callable[[], bool],
        deadline: float | None,
        idle: Callable[[], bool] | None = None,
    ) -> None:
        while True:
            self._awake = False  # before we look: who comes after that has to wake us
            self._run_calls()
            self._look()
            if ready() or (idle is not None and idle()) or self._freezer is not None:
                return
            left = None if deadline is None else deadline - time.monotonic()
            if self._closed or (left is not None and left <= 0):
                return
            self._poll(left)

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):  # not those that they append: each round must end
            function, visit = self._calls[0]
            self._unpushed = True
            try:
                function()
            except Exception as error:  # rule 6: one caller's error is not another's
                if visit is not None:
                    visit.error = error
                else:
                    logger.exception("a call in the I/O loop failed: %r", function)
            except BaseException as error:  # nobody knows how far it came
                if visit is not None:
                    visit.error = ConnectionLostError(f"interrupted by {type(error).__name__}")
                self._break(error)
                raise
            finally:
                self._calls.popleft()

    def _push(self) -> None:
        """Write what waits to be written."""
        self._pushed, self._late = self._pushed or self.loop.has_untried, 0
        self._turn(self.loop.push)

    def _poll(self, limit: float | None = None) -> None:
        """Write, wait for events and dispatch them; 0 means only those that are there."""
        self.loop.limit = limit
        self._pushed, self._late = False, 0
        self._turn(self._push_and_poll)
        self._polled = time.monotonic()

    def _turn(self, turn: Callable[[], None]) -> None:
        """Let pika do something."""
        self._unpushed = False
        try:
            turn()
        except Exception as error:  # rule 6: pika itself failed
            logger.exception("the I/O loop failed; all connections start anew")
            self._break(error)
        except BaseException as error:  # KeyboardInterrupt, anywhere between two lines of pika
            self._break(error)
            raise

    def _push_and_poll(self) -> None:
        self.loop.push()
        if self._calls:  # appended by those that just ran. See `nudge()`
            self.loop.limit = 0.0
        self.loop.poll()
        self.loop.process_timeouts()

    def _break(self, error: BaseException) -> None:
        for callback in tuple(self.on_broken):
            try:
                callback(error)
            except Exception:
                logger.exception("a connection could not be abandoned: %r", callback)

    def _drain_wakeups(self, _fd: int, _events: int) -> None:
        with contextlib.suppress(OSError):
            if self._wakeup_reader.recv(4096).strip(b"\0"):
                # rule 7: the interpreter writes the number of the signal, and the main thread
                # runs the handler only when it is awake
                self._wake_all()

    # -------------------------------------------------------------------- the guard

    def _start_guard(self) -> None:
        self._guard_bell = _Gate()  # rung when the chair becomes empty
        self._guard_bell.open()
        self._guard_alarm = _Gate()  # rung when somebody leaves without a push
        self._dismissed = threading.Event()
        self._guard = threading.Thread(
            target=self._stand_guard, args=(self._dismissed,), name="postage-guard", daemon=True
        )
        self._guard.start()

    def _stop_guard(self) -> None:
        self._dismissed.set()
        self._guard_bell.open()
        self._guard_alarm.open()
        self.wake()
        if self._guard.ident != threading.get_ident():
            self._guard.join(FORK_PATIENCE)

    def _stand_guard(self, dismissed: threading.Event) -> None:
        while not dismissed.is_set():
            try:
                self._guard_bell.wait(UNASKED * self._vacancy)
                until = time.monotonic() + self._vacancy
                while self._guard_alarm.wait(until - time.monotonic()):
                    self._push_late(dismissed)
                    if dismissed.is_set():
                        return
                if not dismissed.is_set():
                    self._take_vacancy(dismissed)
            except BaseException:  # rule 6: the guard survives everything
                with contextlib.suppress(BaseException):
                    logger.exception("the guard of the I/O loop failed and goes on")

    def _push_late(self, dismissed: threading.Event) -> None:
        """Push for those who left it to others, unless one came meanwhile."""
        while self._late and not dismissed.wait(LATE):
            visit = _Visit(_never)
            with visit.here:
                if self._late and self._take(visit):
                    self._release(visit)

    def _take_vacancy(self, dismissed: threading.Event) -> None:
        visit = _Visit(_never)
        with visit.here:
            if not self._take(visit):
                return  # somebody leads; who leaves rings the bell
            self.guard_led += 1
            try:
                # rule 9: also if there are waiters, should all of them have missed the call
                self._lead(_never, None, idle=lambda: bool(self._waiters) or dismissed.is_set())
            finally:
                self._release(visit)

    # ---------------------------------------------------------------- signals and fork

    @contextlib.contextmanager
    def signals_wake(self) -> Iterator[None]:
        """Let signals end the leader's poll while the block runs (rule 7).

        Python restarts a poll that a signal interrupted (PEP 475), so a flag that a
        signal handler sets would be seen only after the next event. Main thread only.
        """
        before = signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)

    def _freeze(self) -> None:
        """Take the chair and keep everybody else out of it; the guard ends."""
        visit = _Visit(_never)
        visit.here.acquire()  # until _thaw()
        with self._lock:
            self._freezer = visit
        self._stop_guard()
        deadline = time.monotonic() + FORK_PATIENCE
        while not self.leading:
            with self._lock:
                if self._occupant() is None:
                    self._leader = visit
                    break
            self.wake()
            if time.monotonic() > deadline:
                logger.error("the I/O loop is stuck in a callback; going on without it")
                break
            time.sleep(0.001)

    def _thaw(self) -> None:
        visit = self._freezer
        with self._lock:
            self._freezer = None
        self._start_guard()
        if visit is not None and self._leader is visit:  # else this is in a callback
            self._release(visit)
        self._wake_all()  # they may have looked while nobody was allowed to lead

    def _disown(self) -> None:
        """In a forked child: let go of the parent's sockets without a word to the broker.

        Closing a connection would send AMQP over the parent's socket, and unregistering
        a descriptor would change the parent's epoll set, which is shared. A descriptor
        that is replaced by /dev/null does neither, and its number stays taken, so that a
        socket object that is collected later closes nothing else. Whoever still has this
        hub finds it closed.
        """
        self._lock = threading.RLock()  # another thread of the parent may hold the old one
        self._closed, self._leader = True, None
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (*self.loop.watched, self._wakeup_writer.fileno()):
            os.dup2(null, descriptor, inheritable=False)
        os.close(null)


def _never() -> bool:
    return False


# ------------------------------------------------------------- one hub for the process

#: The id of this process, without a system call for each message.
process_id = os.getpid()

_process_lock = threading.RLock()
_process_hub: Hub | None = None
_process_users = 0
_inherited: list[Hub] = []  # of parent processes: kept, so that no finaliser touches them


def acquire() -> Hub:
    """Return the hub of this process, which the first user starts. Pair with `release()`."""
    global _process_hub, _process_users
    with _process_lock:
        if _process_hub is None:
            _process_hub = Hub()
        _process_users += 1
        return _process_hub


def release(hub: Hub) -> None:
    """Tell that one user of the hub is gone. The last one closes it."""
    global _process_hub, _process_users
    with _process_lock:
        if hub is not _process_hub:
            return  # it belongs to the process that we were forked from
        _process_users -= 1
        if _process_users > 0:
            return
        _process_hub = None
    hub.close()


def current() -> Hub | None:
    """Return the hub of this process if it runs."""
    return _process_hub


def _before_fork() -> None:
    _process_lock.acquire()
    if _process_hub is not None:
        _process_hub._freeze()


def _after_fork_in_parent() -> None:
    if _process_hub is not None:
        _process_hub._thaw()
    _process_lock.release()


def _after_fork_in_child() -> None:
    global _process_hub, _process_users, _process_lock, process_id
    process_id = os.getpid()
    _process_lock = threading.RLock()
    if _process_hub is not None:
        _process_hub._disown()
        _inherited.append(_process_hub)
    _process_hub, _process_users = None, 0


os.register_at_fork(  # rule 8
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
