# SPDX-License-Identifier: MIT
"""All tests, those on RabbitMQ beside the others: ``python -m tests``.

Both wait more than they compute, so the two together take little longer than one of them.
What the tests on RabbitMQ have to say comes last, as one piece. Arguments are handed to pytest;
the option ``-m`` is taken.
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
from typing import IO

from tests.rabbitmq_node import find_scripts

#: Pytest's exit code when nothing was selected.
NO_TESTS = 5


def main(arguments: Sequence[str]) -> int:
    """Run pytest twice at once, or once where there is one broker only.

    Returns:
        the exit code: that of the first of the two that failed.
    """
    # SIGTERM, too, ends both.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if find_scripts() is None or "POSTAGE_TEST_URL" in os.environ:
        with _pytest(*arguments) as tests:
            return tests.wait()
    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as output,
        # Two processes must not write one cache.
        _pytest(
            *("-m", "rabbitmq", "-o", "cache_dir=.pytest_cache/rabbitmq", *arguments),
            output=output,
        ) as rabbitmq,
        _pytest("-m", "not rabbitmq", *arguments) as others,
    ):
        codes = [others.wait()]
        if rabbitmq.poll() is None:
            print("Waiting for the tests on RabbitMQ.", flush=True)
        codes.append(rabbitmq.wait())
        output.seek(0)
        print("\nOn RabbitMQ:\n", output.read(), sep="\n")
    print(f"Both together took {time.monotonic() - began:.0f} s.")
    return next((code for code in codes if code not in (0, NO_TESTS)), min(codes))


@contextlib.contextmanager
def _pytest(*arguments: str, output: IO[str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run pytest, which ends in good order if we are interrupted."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments], stdout=output, stderr=output
    )
    try:
        yield process
    finally:
        process.terminate()  # nothing happens if it has ended
        process.wait()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
