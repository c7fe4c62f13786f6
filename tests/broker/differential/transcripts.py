# SPDX-License-Identifier: MIT
"""What RabbitMQ 3.10.8 said in each scenario: the lines of `transcripts.txt`.

``python -m tests.broker.differential.transcripts record`` starts a private RabbitMQ node, plays
the scenarios and writes the file. Parts of names as arguments limit it to those scenarios.
``check`` plays them on RabbitMQ and writes nothing, but tells what differs from the file, with
``--times N`` again and again: what differs now and then depends on chance, and must be mended.
``embedded`` does the same on the embedded broker.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from postage.broker import Broker
from tests.broker.differential import scenarios
from tests.broker.differential.registry import SCENARIOS, Scenario
from tests.rabbitmq_node import RabbitNode

__all__ = ["VHOST", "read", "scenarios", "write"]

PATH = Path(__file__).with_suffix(".txt")

#: Begins the line with the name of a scenario.
MARK = "== "

#: The virtual host of the scenarios, in which no test but these does anything.
VHOST = "differential"


def read() -> dict[str, list[str]]:
    """Return the recorded dialogues by the name of their scenario."""
    dialogues: dict[str, list[str]] = {}
    if not PATH.exists():
        return dialogues
    for line in PATH.read_text(encoding="utf-8").split("\n"):
        if line.startswith(MARK):
            lines = dialogues[line.removeprefix(MARK)] = []
        elif line:
            lines.append(line)
    return dialogues


def write(dialogues: dict[str, list[str]]) -> None:
    """Write the dialogues to the file, in the order of the table."""
    parts = ["\n".join([MARK + name, *dialogues[name]]) for name in SCENARIOS if name in dialogues]
    PATH.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> int:
    """Record, or tell what differs from the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("record", "check", "embedded"))
    parser.add_argument("names", nargs="*", help="parts of names of scenarios")
    parser.add_argument("--times", type=int, default=1, metavar="N")
    options = parser.parse_args()
    chosen = [
        scenario
        for name, scenario in SCENARIOS.items()
        if not options.names or any(part in name for part in options.names)
    ]
    with ExitStack() as stack:
        broker = stack.enter_context(Broker() if options.action == "embedded" else RabbitNode())
        url = broker.add_vhost(VHOST)
        if options.action == "record":
            write({**read(), **{scenario.name: scenario.dialogue(url) for scenario in chosen}})
            return 0
        played = [_differs(each, url) for _ in range(options.times) for each in chosen]
        return int(any(played))


def _differs(scenario: Scenario, url: str) -> bool:
    """Play a scenario, and print how its dialogue differs from the record."""
    began = time.monotonic()
    recorded, dialogue = read().get(scenario.name, []), scenario.dialogue(url)
    seconds = time.monotonic() - began
    if recorded == dialogue:
        return False
    print(f"{MARK}{scenario.name} ({seconds:.2f} s)")
    print("\n".join(difflib.unified_diff(recorded, dialogue, n=2, lineterm="")), flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
