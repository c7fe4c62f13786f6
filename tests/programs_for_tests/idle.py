# SPDX-License-Identifier: MIT
"""Two components that have nothing to do."""

from __future__ import annotations

from typing import Any

from postage.generic_application import GenericApplication
from postage.messaging import Fingerprint, MessageProcessor
from postage.microthreads import MicroScheduler
from tests.programs_for_tests.components import eqk_of


class Resting(MessageProcessor):
    """Says once that it is consuming."""

    said = False

    def step(self) -> Any:
        if not self.said and self.consumer.subscriber.consuming:
            self.said = True
            print("idle", flush=True)
        return super().step() if self.said else 1


scheduler = MicroScheduler()
scheduler.add_microthread(GenericApplication(Fingerprint("idle").as_dict(), None))
scheduler.add_microthread(Resting({"name": "resting"}, eqk_of("q")))
for _ in scheduler.main():
    pass
