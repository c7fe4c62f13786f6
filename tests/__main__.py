# SPDX-License-Identifier: MIT
"""All tests, those on RabbitMQ beside the others: ``python -m tests``.

They wait more than they compute, so several processes together take little longer than the
longest of them. What those in the background have to say comes last, each as one piece.
Arguments are handed to pytest; the option ``-m`` is taken, and paths are not for here.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from tests.rabbitmq_node import find_scripts

#: Pytest's exit code when nothing was selected.
NO_TESTS = 5

#: The tests on RabbitMQ, in two parts that take about as long as each other.
LOWER = ("tests/transport", "tests/broker")
ON_RABBITMQ = {
    "On RabbitMQ": [f"--ignore={folder}" for folder in LOWER],
    f"On RabbitMQ, {' and '.join(LOWER)}": list(LOWER),
}


def main(arguments: Sequence[str]) -> int:
    """Run pytest several times at once, or once where there is one broker only.

    Returns:
        the exit code: that of the first that failed.
    """
    pytest = [sys.executable, "-m", "pytest"]
    if find_scripts() is None or "POSTAGE_TEST_URL" in os.environ:
        return subprocess.call([*pytest, *arguments])
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        others = []
        for number, (title, chosen) in enumerate(ON_RABBITMQ.items()):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            # Two processes must not write one cache.
            cache = f"cache_dir=.pytest_cache/rabbitmq-{number}"
            command = [*pytest, "-m", "rabbitmq", "-o", cache, *arguments, *chosen]
            process = subprocess.Popen(command, stdout=output, stderr=output)
            others.append((title, process, output))
        try:
            codes = [subprocess.call([*pytest, "-m", "not rabbitmq", *arguments])]
            print("Waiting for the tests on RabbitMQ.", flush=True)
        finally:  # the terminal has told all of them of an interrupt
            ended = [process.wait() for _, process, _ in others]
        for title, _, output in others:
            output.seek(0)
            print(f"\n{title}:\n", output.read(), sep="\n")
    print(f"All together took {time.monotonic() - began:.0f} s.")
    failed = [code for code in (*codes, *ended) if code not in (0, NO_TESTS)]
    return failed[0] if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
