# SPDX-License-Identifier: MIT
"""The demos, as real processes: they print what their READMEs show.

Where the READMEs show what differs from run to run (pids, the host, the user, shares of a round
robin, seconds), both sides are made alike before they are compared; ``...`` stands for anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Sequence

import pika
import psutil
import pytest

from tests.programs import ROOT, Program
from tests.waiting import wait_until

DEMOS = ROOT / "demos"

#: The host on which the READMEs were written.
README_HOST = "vm"

_BLOCK = re.compile(r"^```console\n\$ ([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PID = re.compile(r"(?<=[Cc]ook )\d+|(?<=waiter )\d+|\d+(?=@)|(?<='pid': ')\d+")
_VARYING = {
    r"('user'|'vhost'): '[^']*'": r"\1: ''",
    r"\b\d+x(?=,|$)": "Nx",
    r"took \d+\.\d s": "took N s",
    r" +": " ",
}


def shown(demo: str, command: str) -> list[list[str]]:
    """Return what a README shows that a command prints, for each time that it shows it."""
    readme = (DEMOS / demo / "README.md").read_text(encoding="utf-8")
    blocks = [match for match in _BLOCK.finditer(readme) if match[1] == f"python {command}"]
    assert blocks, f"the README of {demo} does not show {command!r}"
    return [match[2].splitlines() for match in blocks]


def alike(lines: Sequence[str], host: str) -> list[str]:
    """Return lines with what differs from run to run replaced, the same by the same."""
    text = re.sub(rf"(@|on |'host': '){re.escape(host)}\b", r"\1HOST", "\n".join(lines))
    pids: dict[str, str] = {}
    text = _PID.sub(lambda match: pids.setdefault(match[0], f"PID{len(pids) + 1}"), text)
    for pattern, replacement in _VARYING.items():
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.splitlines()


def assert_shown(shown_lines: Sequence[str], printed_lines: Sequence[str]) -> None:
    """Assert that a program printed what a README shows."""
    expected = alike(shown_lines, README_HOST)
    actual = alike(printed_lines, socket.gethostname())
    for number, (wanted, line) in enumerate(zip(expected, actual, strict=False)):
        if re.fullmatch(".*".join(map(re.escape, wanted.split("..."))), line):
            actual[number] = wanted
    assert expected == actual


def run(demo: str, *args: str) -> Program:
    """Start a program of a demo in its folder, as its README says."""
    return Program(args, cwd=DEMOS / demo)


def wait_for_consumers(url: str, queue: str, number: int) -> None:
    """Wait until that many programs consume a queue."""

    def enough() -> bool:
        with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
            try:
                declared = connection.channel().queue_declare(queue, passive=True)
            except pika.exceptions.ChannelClosedByBroker:
                return False  # not declared yet
            return bool(declared.method.consumer_count >= number)

    wait_until(enough, message=f"{number} consumer(s) of {queue!r}")


@pytest.fixture
def without_echo_queue(broker_url: str) -> None:
    """The broker is as before the first start of an echo."""
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(broker_url))) as connection:
        connection.channel().queue_delete("echo-queue")


def interrupt(program: Program) -> None:
    """End a program with Ctrl-C, which it takes quietly."""
    program.send_signal(signal.SIGINT)
    assert 0 == program.wait()
    assert [] == program.stderr


def succeed(program: Program) -> list[str]:
    """Wait for a program that succeeds quietly, and return what it printed."""
    with program:
        assert 0 == program.wait(60.0), program.output
        assert [] == program.stderr
        return program.stdout


def left_of(program: Program) -> list[psutil.Process]:
    """Return the processes that a program has started and left behind."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            is_its_own = os.getsid(process.pid) == program.pid
            if is_its_own and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return left


def test_basic_echo_prints_the_message(broker_url: str) -> None:
    """The receiver of basic_echo prints what its README shows, and the sender nothing."""
    [received] = shown("basic_echo", "echo_receive.py")
    [sent] = shown("basic_echo", "echo_send.py")
    with run("basic_echo", "echo_receive.py") as receiver:
        wait_for_consumers(broker_url, "echo-queue", 1)
        assert sent == succeed(run("basic_echo", "echo_send.py"))
        receiver.wait_for_line(received[-1])
        interrupt(receiver)
        assert received == receiver.stdout


def test_basic_echo_waits_for_a_receiver_that_was_there_before(
    broker_url: str, without_echo_queue: None
) -> None:
    """Before the first receiver a message is refused; later it waits for the next one."""
    # Given
    with run("basic_echo", "echo_send.py") as sender:
        assert 1 == sender.wait()
        sender.wait_for_line("UnroutableError")
    with run("basic_echo", "echo_receive.py") as receiver:
        wait_for_consumers(broker_url, "echo-queue", 1)
        interrupt(receiver)

    # When
    succeed(run("basic_echo", "echo_send.py"))

    # Then
    with run("basic_echo", "echo_receive.py") as receiver:
        receiver.wait_for_line("A test message")
        interrupt(receiver)


def test_advanced_echo_shares_single_messages_and_spreads_fanouts(broker_url: str) -> None:
    """Two receivers of advanced_echo take single messages in turn, and each gets each fanout."""
    both, fanout_only = shown("advanced_echo", "echo_receive.py")
    [sent] = shown("advanced_echo", "echo_send.py")
    with (
        run("advanced_echo", "echo_receive.py") as one,
        run("advanced_echo", "echo_receive.py") as two,
    ):
        receivers = [one, two]
        wait_for_consumers(broker_url, "echo-queue", 2)

        # When
        assert sent == succeed(run("advanced_echo", "echo_send.py"))

        # Then
        wait_until(lambda: 6 == len(one.stdout) + len(two.stdout), message="three messages")
        receivers.sort(key=lambda receiver: -len(receiver.stdout))
        assert_shown(in_order(both), in_order(receivers[0].stdout))
        assert_shown(fanout_only, receivers[1].stdout)

        # When
        succeed(run("advanced_echo", "echo_send.py"))

        # Then
        wait_until(lambda: 12 == len(one.stdout) + len(two.stdout), message="six messages")
        for receiver in receivers:
            interrupt(receiver)
            assert 1 == receiver.stdout.count("A single test message")
            assert 2 == receiver.stdout.count("A fanout test message")


def in_order(lines: Sequence[str]) -> list[str]:
    """Return messages, each with its fingerprint, in an order that no queue decides."""
    pairs = sorted(zip(lines[::2], lines[1::2], strict=True), reverse=True)
    return [line for pair in pairs for line in pair]


def test_rpc_echo_prints_question_and_answer(broker_url: str) -> None:
    """The receiver of rpc_echo prints the question, the sender the answer."""
    [asked] = shown("rpc_echo", "echo_receive.py")
    answered, *_ = shown("rpc_echo", "echo_send.py")
    with run("rpc_echo", "echo_receive.py") as receiver:
        wait_for_consumers(broker_url, "echo-queue", 1)
        assert answered == succeed(run("rpc_echo", "echo_send.py"))
        interrupt(receiver)
        assert asked == receiver.stdout


def test_rpc_echo_fails_within_seconds_without_a_receiver(
    broker_url: str, without_echo_queue: None
) -> None:
    """Without a receiver the sender of rpc_echo says that it failed and why, and soon."""
    _, never_there, gone = shown("rpc_echo", "echo_send.py")
    start = time.monotonic()
    assert_call_fails(never_there)
    with run("rpc_echo", "echo_receive.py") as receiver:
        wait_for_consumers(broker_url, "echo-queue", 1)
        interrupt(receiver)
    assert_call_fails(gone)
    assert time.monotonic() - start < 30.0


def assert_call_fails(shown_lines: Sequence[str]) -> None:
    """Assert that the sender of rpc_echo fails with these lines."""
    with run("rpc_echo", "echo_send.py") as sender:
        assert 1 == sender.wait()
        assert_shown(shown_lines, [*sender.stdout, *sender.stderr])


def test_the_tour_prints_what_its_readme_shows_each_time(broker_url: str) -> None:
    """The tour prints the same twice on one broker, and leaves no process behind."""
    [expected] = shown("application", "tour.py")
    for _ in range(2):
        with run("application", "tour.py") as tour:
            assert 0 == tour.wait(60.0), tour.output
            assert [] == left_of(tour)
            assert [] == tour.stderr
            assert_shown(expected, tour.stdout)
            assert_shared_out(tour.stdout)


def test_the_tour_brings_its_own_broker_if_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without POSTAGE_URL the tour says so, and then prints the same on a broker of its own."""
    monkeypatch.delenv("POSTAGE_URL", raising=False)
    [expected] = shown("application", "tour.py")
    first, blank, *lines = succeed(run("application", "tour.py"))
    assert re.fullmatch(
        r"POSTAGE_URL is not set: the tour brings its own broker, on port \d+\.", first
    )
    assert "" == blank
    assert_shown(expected, lines)


def test_the_story_of_a_poison_message_ends_well(broker_url: str) -> None:
    """It fails, backs off and is parked; the code is mended and rolled out; it goes back."""
    [expected] = shown("poison", "story.py")
    for _ in range(2):
        with run("poison", "story.py") as story:
            assert 0 == story.wait(120.0), story.output
            assert [] == left_of(story)
            assert [] == story.stderr
            assert_shown(expected, story.stdout)


def assert_shared_out(lines: Sequence[str]) -> None:
    """Assert that in each round robin of the tour ten calls were answered, by those in it."""
    shares = [
        [int(count) for count in re.findall(r" (\d+)x", line)] for line in lines if "/rr " in line
    ]
    shares = [share for share in shares if share]
    assert [2, 2, 2, 1] == [len(share) for share in shares]
    assert {10} == {sum(share) for share in shares}


def test_the_three_meals_of_the_tour_cook_at_the_same_time(broker_url: str) -> None:
    """The waiter's three orders take less than one after the other would."""
    lines = succeed(run("application", "tour.py"))
    [seconds] = [float(match[1]) for match in re.finditer(r"took (\S+) s", "\n".join(lines))]
    assert 0.3 <= seconds < 0.9


def test_an_interrupted_tour_sends_its_staff_home(broker_url: str) -> None:
    """Ctrl-C ends the tour with one line, and its processes with it."""
    with run("application", "tour.py") as tour:
        tour.wait_for_line("At work on")
        tour.send_signal(signal.SIGINT)
        assert 1 == tour.wait()
        assert [] == left_of(tour)
        assert "The visitor has left early." == tour.stderr[-1]


def test_the_tour_does_not_disturb_a_kitchen_at_work(broker_url: str) -> None:
    """With a cook at work the tour says so and ends, and the cook stays."""
    with run("application", "kitchen.py", "cook") as cook:
        cook.wait_for_line("is at work")
        with run("application", "tour.py") as tour:
            assert 1 == tour.wait()
            assert ["A cook is at work already, and the tour brings its own: end it first."] == (
                tour.stderr
            )
        interrupt(cook)


def test_a_kitchen_started_by_hand_takes_orders(broker_url: str) -> None:
    """Cook, waiter and guest print what the README shows."""
    [cooking] = shown("application", "kitchen.py cook soup")
    [waiting] = shown("application", "kitchen.py waiter")
    [ordered] = shown("application", "order.py onion soup")
    with (
        run("application", "kitchen.py", "cook", "soup") as cook,
        run("application", "kitchen.py", "waiter") as waiter,
    ):
        cook.wait_for_line("is at work")
        waiter.wait_for_line("is at work")
        assert ordered == succeed(run("application", "order.py", "onion", "soup"))
        interrupt(waiter)
        interrupt(cook)
        assert_shown(cooking, cook.stdout)
        assert_shown(waiting, waiter.stdout)


@pytest.mark.parametrize("args", [[], ["gardener"]])
def test_a_kitchen_without_a_known_name_says_how_to_start_it(args: list[str]) -> None:
    """Without a name, or with another one, kitchen.py explains itself and fails."""
    with run("application", "kitchen.py", *args) as kitchen:
        assert 1 == kitchen.wait()
        kitchen.wait_for_line("kitchen.py cook [GROUP ...]")
