# SPDX-License-Identifier: MIT
"""A component with a periodic job: ``periodic_jobs.py NAME SECONDS``.

It says in lines when it is ready, and of each run: run, due time, message id.
"""

from __future__ import annotations

import sys
from datetime import datetime

from postage.messaging import Fingerprint
from postage.microthreads import MicroScheduler
from postage.periodic import Periodic, PeriodicJobs
from tests.programs_for_tests.announcing import Announcing


class Component(Announcing, PeriodicJobs):
    """Has one job."""


    @Periodic(every=float(sys.argv[2]))
    def tick(self, due: datetime) -> None:
        print(f"run {due.isoformat()} {self.delivery.message_id}", flush=True)


def main() -> None:
    """Run until told to leave."""
    scheduler = MicroScheduler()
    scheduler.add_microthread(Component(Fingerprint(sys.argv[1]).as_dict(), []))
    with scheduler.stop_on_signals():
        for _ in scheduler.main():
            pass


if __name__ == "__main__":
    main()
