# SPDX-License-Identifier: MIT
"""Producing and consuming programs under faults, and what became of their messages."""

from __future__ import annotations

import collections
import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit, urlunsplit

import pika

from tests.chaos.records import BEGUN, CONFIRMED, FAILED, HANDLED, Judgement, Records, judge
from tests.programs import ROOT, Program
from tests.waiting import wait_until

PROGRAMS = ROOT / "tests" / "programs_for_tests"

#: The component that the messages go to.
COMPONENT = "target"

#: The four ways of handling a message.
ALL_KINDS = "plain,generator,threaded,coroutine"

#: Seconds until what a fault has stopped must go on: RabbitMQ may need half a minute to start.
RECOVERY_SECONDS = 90.0

#: What the fixture `loads` gives: makes a `Load` from a URL and a heartbeat, if those matter.
Loads = Callable[..., "Load"]

#: What a program logs when it has lost a connection, and when an alarm holds it back.
LOSS = "trying again until it works"
ALARM = "blocks publishers"

#: Messages that must be confirmed, and as many handled, after a fault.
PROGRESS = 50


@dataclass(frozen=True)
class Scale:
    """How long the load lasts: seconds for each scenario. Only the long form has all faults."""

    seconds: float
    is_long: bool

    def rounds(self, pause: float = 0.0) -> Iterator[int]:
        """Yield 0, 1, ... until the time is over, at least once, and at most each `pause`."""
        began = time.monotonic()
        number = 0
        while True:
            yield number
            number += 1
            due = began + number * pause
            if max(due, time.monotonic()) - began >= self.seconds:
                return
            time.sleep(max(0.0, due - time.monotonic()))


class Load:
    """Programs that send and handle numbered messages, for as long as the ``with`` block.

    Args:
        title: What the scenario is called in the table.
        url: The broker.
        folder: Where the programs record.
        heartbeat: Seconds, for all programs; None for the default.
    """

    def __init__(self, title: str, url: str, folder: Path, heartbeat: int | None = None) -> None:
        self.title = title
        self.url = url
        self._query = "" if heartbeat is None else f"heartbeat={heartbeat}"
        self.folder = folder
        self.producers: list[Program] = []
        self.consumers: list[Program] = []
        self._programs = contextlib.ExitStack()
        self._names: list[str] = []
        self._sent = Records(folder, "*.sent")
        self._received: dict[str, Records] = {}

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._programs.close()

    # --------------------------------------------------------------------- the programs

    @property
    def programs(self) -> list[Program]:
        """All programs, also those that ended."""
        return [*self.producers, *self.consumers]

    def start_consumer(self, *options: str, component: str = COMPONENT, url: str = "") -> Program:
        """Start a component, and wait until it consumes."""
        program = self._start("chaos_consumer.py", component, *options, url=url)
        self.consumers.append(program)
        if component not in self._names:
            self._names.append(component)
        program.wait_for_line("ready", RECOVERY_SECONDS)
        return program

    def start_producer(
        self, *options: str, component: str = COMPONENT, kinds: str = ALL_KINDS, url: str = ""
    ) -> Program:
        """Start a producer, and wait until it begins. Options: see ``chaos_producer.py``."""
        label = f"p{len(self.producers)}"
        options = (component, label, "--kinds", kinds, *options)
        program = self._start("chaos_producer.py", *options, url=url)
        self.producers.append(program)
        program.wait_for_line("sending")
        return program

    def start(self, *options: str) -> None:
        """Start a consumer, a producer of single messages, and one of batches."""
        self.start_consumer()
        self.start_producer("--mode", "single", *options)
        self.start_producer("--mode", "batch", *options)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Have no producer send for as long as the block, in which all fates are known."""
        counts = [producer.lines.count("paused") for producer in self.producers]
        (self.folder / "pause").touch()

        def are_paused() -> bool:
            return all(
                producer.lines.count("paused") > count
                for producer, count in zip(self.producers, counts, strict=True)
            )

        wait_until(are_paused, RECOVERY_SECONDS, "the producers pause")
        try:
            yield
        finally:
            (self.folder / "pause").unlink()

    def stop_producers(self) -> None:
        """Have the producers end, each of which must do so by itself and in order."""
        (self.folder / "stop").touch()
        for producer in self.producers:
            code = producer.wait(RECOVERY_SECONDS)
            if code != -signal.SIGKILL:
                assert (0, "ended") == (code, producer.lines[-1]), producer.output

    def stop_consumers(self) -> None:
        """Have the consumers leave, each of which must do so in order."""
        running = [each for each in self.consumers if each.is_running]
        for consumer in running:
            consumer.terminate()
        for consumer in running:
            code = consumer.wait(RECOVERY_SECONDS)
            assert (0, "left") == (code, consumer.lines[-1]), consumer.output

    def finish(self) -> Judgement:
        """End all in order, after everything that was confirmed was handled.

        Raises:
            AssertionError: A program hangs or failed, messages are left over in a queue, or the
                judge found a fault.
        """
        self.stop_producers()
        self.wait_for(self.is_drained, "everything that was confirmed is handled")
        self.stop_consumers()
        judgement = self.judgement()
        assert {} == judgement.faults, self.describe()
        assert {} == self.left_over(), self.describe()
        return judgement

    # ------------------------------------------------------------------- what they record

    def sent(self) -> list[list[str]]:
        """Return the lines of the producers."""
        return self._sent.lines()

    def received(self, component: str = COMPONENT) -> list[list[str]]:
        """Return the lines of all processes of a component."""
        if component not in self._received:
            self._received[component] = Records(self.folder, f"{component}-*.received")
        return self._received[component].lines()

    def judgement(self) -> Judgement:
        """Judge what was recorded so far."""
        return judge(self.sent(), self.received())

    def is_drained(self) -> bool:
        """Tell whether everything that was confirmed so far was handled."""
        return not self.judgement().lost

    def unconfirmed(self) -> set[str]:
        """Return the messages that were handled while their producers do not know their fate."""
        unknown: set[str] = set()
        for word, message, *_ in self.sent():
            (unknown.add if word == BEGUN else unknown.discard)(message)
        return unknown & {message for word, message, *_ in self.received() if word == HANDLED}

    def wait_for_progress(self, count: int = PROGRESS) -> None:
        """Wait until a number of messages more was confirmed to each producer, and handled."""
        handled = self.judgement().handled
        self._wait_for_fates(CONFIRMED, count)
        self.wait_for(
            lambda: self.judgement().handled >= handled + count, f"{count} more are handled"
        )

    def wait_for_failures(self, count: int) -> None:
        """Wait until a number of messages more was reported as failed to each producer."""
        self._wait_for_fates(FAILED, count)

    def _wait_for_fates(self, fate: str, count: int) -> None:
        def counts() -> collections.Counter[str]:
            return collections.Counter(
                message.partition("-")[0] for word, message, *_ in self.sent() if word == fate
            )

        before = counts()
        labels = [f"p{n}" for n, each in enumerate(self.producers) if each.is_running]

        def is_reached() -> bool:
            now = counts()
            return all(now[label] >= before[label] + count for label in labels)

        self.wait_for(is_reached, f"{count} more are {fate} for each producer")

    def wait_for(self, condition: Callable[[], object], message: str) -> None:
        """Wait for what must happen before long, or fail with all that is known."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{message}: not in {RECOVERY_SECONDS} s\n{self.describe()}")
            time.sleep(0.05)  # a look reads all records

    @contextlib.contextmanager
    def noticing(self, text: str, programs: Sequence[Program] = ()) -> Iterator[Callable[[], None]]:
        """Wait until each program has said something that it had not said before the block.

        Yields:
            a function that waits for it in the block.
        """
        watched = list(programs) or [each for each in self.programs if each.is_running]
        before = [said(each, text) for each in watched]

        def is_noticed() -> bool:
            return all(
                said(each, text) > count for each, count in zip(watched, before, strict=True)
            )

        def wait() -> None:
            self.wait_for(is_noticed, f"each of {watched} says {text!r}")

        yield wait
        wait()

    def left_over(self) -> dict[str, int]:
        """Return how many messages are in the queues that each component leaves behind."""
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        with contextlib.closing(connection):
            channel = connection.channel()
            names = [queue for name in self._names for queue in (name, f"{name}.error")]
            counts = {
                name: channel.queue_declare(name, passive=True).method.message_count
                for name in names
            }
        return {name: count for name, count in counts.items() if count}

    def describe(self) -> str:
        """Return all that is known, for the message of an assertion."""
        outputs = "\n".join(f"{each!r} wrote:\n{_tail(each)}" for each in self.programs)
        return f"{self.title}: {self.judgement()}\n{outputs}"

    def _start(self, program: str, *options: str, url: str) -> Program:
        parts = urlsplit(url or self.url)
        environment = {"POSTAGE_URL": urlunsplit(parts._replace(query=self._query))}
        folder = str(self.folder)
        command = [str(PROGRAMS / program), folder, *options]
        return self._programs.enter_context(Program(command, env=environment))


def said(program: Program, text: str) -> int:
    """Return in how many lines a program wrote something."""
    return sum(text in line for line in list(program.lines))


def _tail(program: Program, lines: int = 30) -> str:
    return "\n".join(program.lines[-lines:])
