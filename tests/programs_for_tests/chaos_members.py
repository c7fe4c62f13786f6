# SPDX-License-Identifier: MIT
"""Several instances of one component in one process: ``chaos_members.py FIRST COUNT``.

They have the numbers from FIRST on for process ids. Each says ``ready`` when it consumes.
"""

from __future__ import annotations

import sys

from postage.generic_application import GenericApplication
from postage.messaging import Fingerprint
from postage.microthreads import MicroScheduler
from tests.programs_for_tests.announcing import Announcing

#: Seconds. Who asks for another heartbeat gets a connection of its own, and the members of one
#: process shall have as many as processes of one member.
HEARTBEAT = 60


class Member(Announcing, GenericApplication):
    """Announces that it is consuming."""


def main(first: int, count: int) -> None:
    """Run until told to leave."""
    scheduler = MicroScheduler()
    for number in range(count):
        fingerprint = Fingerprint("member", pid=first + number).as_dict()
        scheduler.add_microthread(Member(fingerprint, hup={"heartbeat": HEARTBEAT + number}))
    with scheduler.stop_on_signals():
        for _ in scheduler.main():
            pass


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
