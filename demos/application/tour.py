# SPDX-License-Identifier: MIT
"""Opens a restaurant in a temporary folder, reaches its staff in every way, and closes it.

The staff are processes of their own. All that connects them to this one is the broker: the one
that POSTAGE_URL names, or else one that the tour brings along.
"""

import collections
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kitchen import COOKING_TIME, KitchenProducer

from postage.broker import Broker

HERE = Path(__file__).resolve().parent
HOST = socket.gethostname()

#: Seconds that a process gets to end.
END_TIMEOUT = 30


class Staff:
    """The processes of cooks and waiters. Whoever is left in the end is sent home."""

    def __init__(self, program):
        self.program = program
        self._processes = {}  # by label, such as "cook 4711"

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            with process:
                self._wait(process)

    def hire(self, name, *groups):
        """Start an application, and return its pid when it is at work."""
        process = subprocess.Popen(
            [sys.executable, "-u", self.program, name, *groups], stdout=subprocess.PIPE, text=True
        )
        self._processes[f"{name} {process.pid}"] = process
        if "is at work" not in process.stdout.readline():
            sys.exit(f"The {name} did not come to work.")
        return process.pid

    def labels(self):
        """Return label and pid of everybody, in the order of their start."""
        return [(label, str(process.pid)) for label, process in self._processes.items()]

    def exit_codes(self):
        """Wait until all have ended, and return their exit codes by label."""
        return {label: self._wait(process) for label, process in self._processes.items()}

    @staticmethod
    def _wait(process):
        try:
            return process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


class Tour:
    """What the visitor sees."""

    def __init__(self, producer, staff):
        self.producer = producer
        self.staff = staff

    def everyone(self, key, number):
        """Ping a key that reaches that many, and print who answers."""
        queue = self.producer.rpc_queue_ping(_key=key)
        pids = [answer.value["pid"] for answer in self.producer.consume_rpc(queue, number)]
        names = [label for label, pid in self.staff.labels() if pid in pids]
        tell(key, "ping", ", ".join(names))

    def in_turn(self, key, times=10):
        """Ping a key that reaches one at a time, and print how often each one answered."""
        pings = [self.producer.rpc_ping(_key=key) for _ in range(times)]
        tally = collections.Counter(answer.value["pid"] for answer in pings)
        counts = [f"{label} {tally[pid]}x" for label, pid in self.staff.labels() if pid in tally]
        tell(key, f"ping, {times} times", ", ".join(counts))

    def serve(self, *dishes):
        """Order all at once, and print what comes."""
        start = time.monotonic()
        meals = [self.producer.rpc_serve(dish, _key="waiter/rr", _future=True) for dish in dishes]
        for dish, meal in zip(dishes, meals, strict=True):
            tell("waiter/rr", f"serve {dish}", meal.result().value)
        return time.monotonic() - start

    def send(self, command, key, *words, **parameters):
        """Send a command that nobody answers."""
        getattr(self.producer, f"message_{command}")(*words, **parameters, _key=key)
        tell(key, " ".join([command, *words, *parameters.values()]))

    def opening(self):
        cook = self.staff.hire("cook", "soup")
        other = self.staff.hire("cook")
        waiter = self.staff.hire("waiter")
        print(f"At work on {HOST}: cook {cook} in group soup, cook {other}, waiter {waiter}.")
        print("Each is a process of its own. What reaches whom is a matter of the routing key:\n")
        tell("ROUTING KEY", "SENT", "ANSWERED")
        return cook, other

    def calls(self):
        say("A call. The waiter takes an order, and calls one of the cooks.")
        self.serve("onion soup")
        say("Three at once: while one is on the stove, the waiter and the cooks go on.")
        seconds = self.serve("bread", "ratatouille", "quiche")
        print(f"  Each takes {COOKING_TIME} s to cook, all of them took {seconds:.1f} s.")

    def messages(self):
        say("A message to all cooks. The broker has it when the call returns; nobody answers.")
        self.send("season", "cook", "pepper")
        self.everyone("cook", 2)  # they answer when they have read what came before
        self.serve("omelette")

    def names_and_pids(self, other):
        say("Who is there? Everyone whom a key reaches answers the ping.")
        self.everyone("cook", 2)
        self.everyone("waiter", 1)
        self.everyone(f"{other}@{HOST}", 1)
        say("One of them, in turn.")
        self.in_turn("cook/rr")

    def hosts(self):
        say("All of one host.")
        self.everyone(f"@{HOST}", 3)
        self.everyone(f"cook@{HOST}", 2)
        self.in_turn(f"cook@{HOST}/rr")

    def groups(self, cook, other):
        say("All of a group.")
        self.everyone("cook#soup", 1)
        say(f"Cook {other} joins it.")
        self.send("join_group", f"{other}@{HOST}", group_name="soup")
        self.everyone(f"{other}@{HOST}", 1)  # it answers when it has joined
        self.everyone("cook#soup", 2)
        self.in_turn("cook#soup/rr")
        say(f"Cook {cook} leaves it.")
        self.send("leave_group", f"{cook}@{HOST}", group_name="soup")
        self.everyone(f"{cook}@{HOST}", 1)
        self.everyone("cook#soup", 1)
        self.in_turn("cook#soup/rr")

    def new_code(self):
        say("New code for all cooks: change kitchen.py, send one message. They keep pid and mail.")
        change(self.staff.program, 'SEASONING = "salt"', 'SEASONING = "chili"')
        self.send("restart", "cook")
        self.everyone("cook", 2)  # what is sent while they restart waits for them
        self.serve("omelette")

    def closing_time(self):
        say("Closing time.")
        self.send("quit", "cook")
        self.send("quit", "waiter")
        for label, code in self.staff.exit_codes().items():
            print(f"  {label} has left, exit code {code}")


def say(text):
    print(f"\n{text}")


def tell(key, sent, answered=""):
    print(f"  {key:<16}  {sent:<18}  {answered}".rstrip())


def change(program, old, new):
    """Replace a line of a program, and print that as a patch."""
    program.write_text(program.read_text().replace(old, new, 1))
    print(f"  - {old}\n  + {new}")


def expect_nobody(producer, name):
    """Exit if there is such an application already, or no broker."""
    answer = producer.rpc_ping(_key=name, _timeout=2, _max_retry=0)
    if answer:
        sys.exit(f"A {name} is at work already, and the tour brings its own: end it first.")
    if answer.value not in ("UnroutableError", "TimeoutError"):
        sys.exit(f"{answer.value}: {answer.message}")


@contextlib.contextmanager
def broker_of_our_own():
    """Start a broker, and tell this process and its children where it is."""
    with Broker() as broker:
        os.environ["POSTAGE_URL"] = broker.url
        print(f"POSTAGE_URL is not set: the tour brings its own broker, on port {broker.port}.\n")
        yield


def main():
    with contextlib.ExitStack() as stack:
        if not any(os.environ.get(name) for name in ("POSTAGE_URL", "POSTAGE_HOST")):
            stack.enter_context(broker_of_our_own())
        producer = stack.enter_context(KitchenProducer({"name": "tour"}))
        expect_nobody(producer, "cook")
        expect_nobody(producer, "waiter")
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        program = Path(shutil.copy(HERE / "kitchen.py", folder))
        tour = Tour(producer, stack.enter_context(Staff(program)))
        cooks = tour.opening()
        tour.calls()
        tour.messages()
        tour.names_and_pids(cooks[1])
        tour.hosts()
        tour.groups(*cooks)
        tour.new_code()
        tour.closing_time()
        print(f"\nThe code of all of them: {HERE / 'kitchen.py'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nThe visitor has left early.")
