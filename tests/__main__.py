# SPDX-License-Identifier: MIT
"""All tests, in several processes at once: ``python -m tests``.

They wait more than they compute, so several processes together take little longer than the
longest of them. What those in the background have to say comes last, each as one piece.
Arguments are handed to pytest; the option ``-m`` is taken, and paths are not for here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from tests.rabbitmq_node import find_scripts

#: Pytest's exit code when nothing was selected.
NO_TESTS = 5

#: Folders that take about as long as all others, on each of the brokers.
HALF = ("tests/transport", "tests/broker")
HALF_ON_RABBITMQ = (*HALF, "tests/chaos")


def others_than(folders: Sequence[str]) -> list[str]:
    """Return the arguments that leave folders out."""
    return [f"--ignore={folder}" for folder in folders]


#: What runs in the foreground, and beside it, by title.
FOREGROUND = ["-m", "not rabbitmq", *others_than(HALF)]
BACKGROUND = {
    f"{', '.join(HALF)}": ["-m", "not rabbitmq", *HALF],
    "On RabbitMQ": ["-m", "rabbitmq", *others_than(HALF_ON_RABBITMQ)],
    f"On RabbitMQ, {', '.join(HALF_ON_RABBITMQ)}": ["-m", "rabbitmq", *HALF_ON_RABBITMQ],
}


def main(arguments: Sequence[str]) -> int:
    """Run pytest several times at once, or once where there is one broker only.

    Returns:
        the exit code: that of the first that failed.
    """
    pytest = [sys.executable, "-m", "pytest"]
    if find_scripts() is None or "POSTAGE_TEST_URL" in os.environ:
        os.execv(sys.executable, [*pytest, *arguments])
    began = time.monotonic()
    outputs = []
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(_ended_together())
        processes.append(subprocess.Popen([*pytest, *arguments, *FOREGROUND]))
        for number, chosen in enumerate(BACKGROUND.values()):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            outputs.append(output)
            # Two processes must not write one cache.
            cache = f"cache_dir=.pytest_cache/{number}"
            command = [*pytest, "-o", cache, *arguments, *chosen]
            processes.append(subprocess.Popen(command, stdout=output, stderr=output))
        codes = [processes[0].wait()]
        print("Waiting for the others.", flush=True)
        codes += [process.wait() for process in processes[1:]]
        for title, output in zip(BACKGROUND, outputs, strict=True):
            output.seek(0)
            print(f"\n{title}:\n", output.read(), sep="\n")
    print(f"All together took {time.monotonic() - began:.0f} s.")
    failed = [code for code in codes if code not in (0, NO_TESTS)]
    return failed[0] if failed else 0


@contextlib.contextmanager
def _ended_together() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Let no process of the list outlive the block, whatever ends it."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        yield processes
    except KeyboardInterrupt:  # the terminal has told all of them
        raise
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.wait()


if __name__ == "__main__":
    # SIGTERM, too, leaves by way of the blocks.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
