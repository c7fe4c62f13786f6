# SPDX-License-Identifier: MIT
"""What the tests of components need: a broker, an empty virtual host, and a component that runs.

`postage.pytest_plugin` makes fixtures of these context managers; with `unittest` they are used
as they are::

    class GreeterTest(unittest.TestCase):
        def test_it_adds(self):
            with TestBroker() as broker, broker.vhost(), running(Greeter), Producer() as producer:
                self.assertEqual(5, producer.rpc_add(2, 3).value)
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import unittest
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

from postage.broker import Broker, Faults
from postage.broker.errors import CONNECTION_FORCED, PRECONDITION_FAILED
from postage.errors import ClosedError
from postage.fingerprint import Fingerprint
from postage.microthreads import MicroScheduler
from postage.processor import MessageProcessor, Verdict
from postage.settings import TLS_VARIABLES, Settings
from postage.transport import connection as connections
from postage.transport.subscriber import Delivery

__all__ = ["Running", "TestBroker", "TestVhost", "VhostFaults", "running", "wait_until"]

Result = TypeVar("Result")

#: Seconds that a condition of a test is waited for.
TIMEOUT = 10.0
#: Seconds between two looks at it: short for a person, long for a processor.
INTERVAL = 0.01
#: Seconds that the broker has to agree that a connection ends, after a test.
CLOSE_TIMEOUT = 2.0

_numbers = itertools.count(1)


def wait_until(
    condition: Callable[[], Result], timeout: float = TIMEOUT, message: str = ""
) -> Result:
    """Call a condition until its result is true, and return that.

    A message is handled some time after it was sent: a test waits for what the handler does.

    Args:
        condition: Takes nothing.
        timeout: Seconds.
        message: What is waited for, for the error.

    Raises:
        AssertionError: It did not become true in time.
    """
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {message or condition}")
        time.sleep(INTERVAL)
    return result


class TestBroker:
    """A broker for tests, for as long as its ``with`` block: an embedded one, or one that runs.

    Args:
        url: Of a broker that runs already. None or empty: an embedded one is started.
        **options: Of the embedded one: those of `postage.broker.Broker`.

    Attributes:
        is_embedded: Whether it is an embedded one.

    Raises:
        ConfigurationError: The URL makes no sense.
    """

    __test__ = False  # pytest takes it for a class of tests otherwise

    def __init__(self, url: str | None = None, **options: Any) -> None:
        self._broker = None if url else Broker(**options)
        self._url = url or ""
        self._vhosts = itertools.count(1)
        if url:
            Settings.from_environment({"POSTAGE_URL": url})
        self.is_embedded = self._broker is not None

    def __repr__(self) -> str:
        broker = self._broker or Settings.from_environment({"POSTAGE_URL": self._url})
        return f"<TestBroker {broker}>"

    def __enter__(self) -> TestBroker:
        self.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start it, if it is an embedded one."""
        if self._broker is not None:
            self._broker.start()

    def close(self) -> None:
        """End it, if it is an embedded one."""
        if self._broker is not None:
            self._broker.close()

    @property
    def url(self) -> str:
        """The URL of its first virtual host."""
        return self._broker.url if self._broker is not None else self._url

    @contextlib.contextmanager
    def vhost(self) -> Iterator[TestVhost]:
        """Give the block an empty virtual host, and end all connections that it leaves open there.

        The virtual host is in ``POSTAGE_URL`` meanwhile, so that the code under test finds it,
        also in child processes. A broker that runs already has only the one of its URL, which
        all tests share.
        """
        before = connections.in_use()
        with contextlib.ExitStack() as stack:
            vhost = stack.enter_context(self._fresh_vhost())
            stack.enter_context(_environment("POSTAGE_URL", vhost.url))
            for variable in TLS_VARIABLES if self.is_embedded else ():
                stack.enter_context(_environment(variable, ""))  # they are for another broker
            stack.callback(_close_connections, vhost.url, before)
            yield vhost

    @contextlib.contextmanager
    def _fresh_vhost(self) -> Iterator[TestVhost]:
        if self._broker is None:
            yield TestVhost(self._url, None)
            return
        name = f"test-{next(self._vhosts)}"
        url = self._broker.add_vhost(name)
        try:
            yield TestVhost(url, VhostFaults(self._broker.faults, name))
        finally:
            self._broker.delete_vhost(name)


class TestVhost:
    """A virtual host for a test.

    Attributes:
        url: Its URL, with the password.

    Args:
        url: As the attribute.
        faults: Its faults, if it can have some.
    """

    __test__ = False

    def __init__(self, url: str, faults: VhostFaults | None) -> None:
        self.url = url
        self._faults = faults

    def __repr__(self) -> str:
        return f"<TestVhost {Settings.from_environment({'POSTAGE_URL': self.url})}>"

    @property
    def faults(self) -> VhostFaults:
        """What can be made to go wrong.

        Raises:
            unittest.SkipTest: The broker is not an embedded one. It skips the test, also in pytest.
        """
        if self._faults is None:
            raise unittest.SkipTest("only the embedded broker has faults")
        return self._faults


class VhostFaults:
    """What can go wrong with a broker, for the connections of one virtual host.

    Those that last are context managers, and concern the whole broker.

    Args:
        faults: Those of the broker.
        vhost: The virtual host.
    """

    def __init__(self, faults: Faults, vhost: str) -> None:
        self._faults = faults
        self._vhost = vhost

    def drop(self) -> int:
        """Cut all connections without a word, as a network does.

        Returns:
            how many.
        """
        return self._faults.drop(self._vhost)

    def close_connections(
        self, code: int = CONNECTION_FORCED, text: str = "closed by a fault"
    ) -> int:
        """Close all connections with connection.close, as an administrator or a restart does.

        Args:
            code: the reply code, such as 320 or 541.
            text: the reason.

        Returns:
            how many.
        """
        return self._faults.close_connections(code, text, self._vhost)

    def close_channels(
        self, code: int = PRECONDITION_FAILED, text: str = "closed by a fault"
    ) -> int:
        """Close all channels with channel.close, as the time limit of a delivery does.

        Args:
            code: the reply code, such as 404 or 406.
            text: the reason.

        Returns:
            how many.
        """
        return self._faults.close_channels(code, text, self._vhost)

    def cancel(self, queue: str) -> int:
        """Cancel the consumers of a queue, as RabbitMQ does when it loses the queue's node.

        Args:
            queue: its name.

        Returns:
            how many.

        Raises:
            BrokerError: There is no such queue.
        """
        return self._faults.cancel(queue, self._vhost)

    def forget_consumers(self, queue: str) -> int:
        """Lose the consumers of a queue without a word, as when it moves to another node.

        Args:
            queue: its name.

        Returns:
            how many.

        Raises:
            BrokerError: There is no such queue.
        """
        return self._faults.forget_consumers(queue, self._vhost)

    def stall(self) -> AbstractContextManager[None]:
        """Neither read nor write, as a broker that hangs."""
        return self._faults.stall()

    def refuse(self) -> AbstractContextManager[None]:
        """Close new connections at once, as a broker that starts."""
        return self._faults.refuse()

    def block(self, reason: str = "low on memory") -> AbstractContextManager[None]:
        """Block publishers with connection.blocked, as an alarm does.

        Args:
            reason: what they are told.
        """
        return self._faults.block(reason)

    def delay_confirms(self, seconds: float) -> AbstractContextManager[None]:
        """Confirm what is published so many seconds late."""
        return self._faults.delay_confirms(seconds)

    def nack(self) -> AbstractContextManager[None]:
        """Throw away what is published, and say so with basic.nack."""
        return self._faults.nack()


@contextlib.contextmanager
def running(
    component: Any, *, name: str | None = None, check: bool = True, **options: Any
) -> Iterator[Running]:
    """Run a component in a thread of its own for the block, and have it leave in order.

    Args:
        component: An application, a processor or another microthread; or a class of the first
            two, of which an instance is made with a fingerprint.
        name: The name in that fingerprint; by default that of the class, in lower case.
        check: Raise at the end what went wrong in the thread.
        **options: Further arguments of the class, such as ``groups`` or ``eqk``.

    Yields:
        The `Running` component, which consumes its queues already.

    Raises:
        Exception: What ended the component, or the first exception of a message handler. What
            an RPC handler raises is the answer of its caller, and not raised here.
    """
    with contextlib.ExitStack() as stack:
        run = Running(_made(component, name, options))
        stack.callback(run.stop)
        run.start()
        yield run
        stack.close()  # not if the block failed: that error is the one to be seen
        if check:
            run.check()


class Running:
    """A component that runs in a thread of its own; `running()` makes it.

    Attributes:
        component: The component.
        errors: What went wrong with its messages: the exceptions of handlers, and why others were
            parked in an error queue.
        wants_restart: It was told to restart, and has left. In a test it does not come back,
            for it would replace the process of the tests.
    """

    def __init__(self, component: Any) -> None:
        self.component = component
        self.errors: list[BaseException] = []
        self._failure: BaseException | None = None
        self._scheduler = _Scheduler()
        self._thread = threading.Thread(
            target=self._run, name=f"running {type(component).__name__}", daemon=True
        )
        if isinstance(component, MessageProcessor):
            self._listen(component)

    def __repr__(self) -> str:
        state = "running" if self._thread.is_alive() else "stopped"
        return f"<Running {self.component!r} [{state}, {len(self.errors)} errors]>"

    @property
    def wants_restart(self) -> bool:
        """Whether it was told to restart, and has left."""
        return self._scheduler.wants_restart and not self._thread.is_alive()

    def start(self, timeout: float = TIMEOUT) -> None:
        """Start the thread, and wait until the component consumes its queues.

        Args:
            timeout: Seconds.

        Raises:
            AssertionError: It does not consume in time.
            Exception: What ended it meanwhile.
        """
        self._scheduler.add_microthread(self.component)
        self._thread.start()
        wait_until(self._is_at_work, timeout, f"{self.component!r} consumes its queues")
        if self._failure is not None:
            raise self._failure

    def wait(self, timeout: float = TIMEOUT) -> None:
        """Wait until the component has ended by itself, as after ``message_quit()``.

        Args:
            timeout: Seconds.

        Raises:
            AssertionError: It is still there.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise AssertionError(f"{self.component!r} did not end in {timeout:g} s")

    def stop(self) -> None:
        """Have the component leave in order, and wait until it has left.

        Raises:
            AssertionError: It did not leave in its `grace`, since a handler blocks.
        """
        if self._thread.is_alive():
            self._scheduler.exit()
            with contextlib.suppress(ClosedError):  # it has just left
                self._scheduler.wake()
            self.wait(getattr(self.component, "grace", 0.0) + TIMEOUT)
        self._close()

    def check(self) -> None:
        """Raise what went wrong so far, if something did."""
        for error in filter(None, (self._failure, *self.errors)):
            raise error

    def _run(self) -> None:
        try:
            for _ in self._scheduler.main():
                pass
        except BaseException as error:  # it is raised in the thread of the test
            self._failure = error
        finally:
            self._close()

    def _close(self) -> None:
        if hasattr(self.component, "close"):
            self.component.close()

    def _is_at_work(self) -> bool:
        if not self._thread.is_alive() or not isinstance(self.component, MessageProcessor):
            return True
        consumer = self.component.consumer
        return consumer.subscriber.consuming or not consumer.qk_list

    def _listen(self, component: MessageProcessor) -> None:
        """Hear of the messages that go wrong, and of a restart."""
        park = component._park

        def listening(delivery: Delivery, verdict: Verdict) -> Generator[Any, Any, None]:
            if verdict.error is not None:
                self.errors.append(verdict.error)
            return park(delivery, verdict)

        vars(component).update(_park=listening, restart=_no_restart)


class _Scheduler(MicroScheduler):
    """A scheduler that notes a restart, and does not replace the process."""

    def __init__(self) -> None:
        super().__init__(autoquit=True)
        self.wants_restart = False

    def exit(self, then: Callable[[], None] | None = None) -> None:
        super().exit(self._note if then is not None else None)

    def _note(self) -> None:
        self.wants_restart = True


def _no_restart() -> None:
    raise RuntimeError(
        "restart() would replace the process of the tests; raise AckAndRestart in the handler"
    )


def _made(component: Any, name: str | None, options: dict[str, Any]) -> Any:
    """Return the component, or an instance of the class."""
    if isinstance(component, type):
        # Its own pid: two instances of one process are two for the broker.
        fingerprint = Fingerprint(
            name or component.__name__.lower(), "test", pid=f"{os.getpid()}.{next(_numbers)}"
        )
        return component(fingerprint.as_dict(), **options)
    if name is not None or options:
        raise TypeError("name and options are for a class; this component was made already")
    return component


def _close_connections(url: str, spare: Collection[connections.Connection]) -> None:
    """Close the connections to a virtual host, whoever uses them."""
    here = Settings.from_environment({"POSTAGE_URL": url})
    others = [
        each
        for each in connections.in_use()
        if (each.settings.hosts, each.settings.vhost) != (here.hosts, here.vhost)
    ]
    connections.close_all(CLOSE_TIMEOUT, spare=[*others, *spare])


@contextlib.contextmanager
def _environment(variable: str, value: str) -> Iterator[None]:
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before
