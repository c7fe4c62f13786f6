# SPDX-License-Identifier: MIT
"""An application whose handler sends three children: ``outboxes.py NAME [MOMENT]``.

At the moment "handled" or "committed" it kills itself, as a machine does that loses power. It
says so in lines: ready, handled, committed.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from postage.generic_application import GenericApplication
from postage.messaging import (
    AckAndRestart,
    DefaultExchange,
    Fingerprint,
    GenericConsumer,
    GenericProducer,
    MessageHandler,
)
from postage.microthreads import MicroScheduler
from postage.retry import RetryPolicy
from tests.programs_for_tests.announcing import Announcing


def reach(moment: str) -> None:
    """Say what was reached, and die if this is the moment."""
    print(moment, flush=True)
    if sys.argv[2:] == [moment]:
        os.kill(os.getpid(), signal.SIGKILL)


class Consumer(GenericConsumer):
    """Reaches a moment between the confirms of the outbox and the ack."""

    def ack(self, method: Any) -> None:
        reach("committed")
        super().ack(method)


class Children(GenericProducer):
    """Sends to the queue that the test reads."""

    eks = [(DefaultExchange, "children")]


class Component(Announcing, GenericApplication):
    """Sends what the message says, as children."""

    retry = RetryPolicy(attempts=1)  # what fails is parked at once
    consumer_class = Consumer
    outbox = True

    @MessageHandler("command", "split")
    def msg_split(self, content: Any) -> None:
        for part in content["parameters"]:
            children.message_part(part)
        reach("handled")

    @MessageHandler("command", "renew")
    def msg_renew(self, content: Any) -> None:
        children.message_part("renewed")
        raise AckAndRestart


children = Children()


def main() -> None:
    """Run until told to leave."""
    scheduler = MicroScheduler()
    scheduler.add_microthread(Component(Fingerprint(sys.argv[1]).as_dict(), None))
    with children, scheduler.stop_on_signals():
        for _ in scheduler.main():
            pass


if __name__ == "__main__":
    main()
