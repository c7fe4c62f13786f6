# SPDX-License-Identifier: MIT
"""A message that no handler can handle, from its first failure to its happy end.

The bakery is a process of its own. The broker is the one that POSTAGE_URL names, or else one
that the story brings along.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from postage.broker import Broker
from postage.error_queues import ErrorQueue
from postage.generic_application import GenericApplicationExchange
from postage.messaging import GenericProducer

HERE = Path(__file__).resolve().parent

#: Seconds until something that should have happened is missed.
PATIENCE = 60


class Customer(GenericProducer):
    eks = [(GenericApplicationExchange, "bakery/rr")]


def say(text):
    print(f"\n{text}", flush=True)


def postage(*words):
    """Run the command as one would in a terminal, and show both."""
    print(f"  $ postage {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "postage", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in result.stdout.splitlines():
        print(f"  {line}")
    return result.stdout


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("This takes too long.")
        time.sleep(0.05)


def main(folder):
    program = folder / "bakery.py"
    shutil.copy(HERE / "bakery.py", program)
    command = [sys.executable, "-m", "postage", "run", "bakery:Bakery"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    bakery = subprocess.Popen(command, cwd=folder, **quiet)
    try:
        with Customer() as customer, ErrorQueue("bakery.error") as errors:
            wait_until(customer.rpc_ping)

            say("An order, and one that the bakery does not understand.")
            customer.message_bake("3 rolls")
            customer.message_bake("dozen croissants")
            print(f"  the bakery: {bakery.stdout.readline().strip()}")

            say("It fails, waits in the broker, fails again, and is parked after three attempts.")
            wait_until(lambda: list(errors))
            postage("errors", "list", "bakery.error")
            postage("errors", "show", "bakery.error")

            say("The code is mended, and a broadcast makes every bakery start anew with it.")
            source = program.read_text()
            program.write_text(source.replace("NUMBERS = {}", 'NUMBERS = {"dozen": 12}'))
            customer.message_restart(_key="bakery")
            print('  NUMBERS = {"dozen": 12}')

            say("The parked message goes back to where it came from.")
            postage("errors", "retry", "bakery.error", "--yes")
            print(f"  the bakery: {bakery.stdout.readline().strip()}")
            wait_until(lambda: not list(errors))
            customer.message_quit(_key="bakery")
        bakery.wait(PATIENCE)
    finally:
        bakery.kill()
        bakery.wait()
        bakery.stdout.close()


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        if not os.environ.get("POSTAGE_URL"):
            os.environ["POSTAGE_URL"] = stack.enter_context(Broker()).url
        main(Path(stack.enter_context(tempfile.TemporaryDirectory())))
