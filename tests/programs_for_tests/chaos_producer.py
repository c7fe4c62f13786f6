# SPDX-License-Identifier: MIT
"""A producer that records the fate of each message: ``chaos_producer.py --help``.

It sends numbered messages until the file ``stop`` is in its folder, and none while ``pause`` is.
It says so in lines: sending, paused, ended.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from postage.errors import BatchError, PostageError, PublishUnknownError
from postage.generic_application import GenericApplicationExchange
from postage.messaging import Batch, GenericProducer
from tests.chaos.records import BEGUN, CONFIRMED, FAILED, UNKNOWN, Record

#: Messages of a batch or a transaction.
SEVERAL = 50


class Producer(GenericProducer):
    """Sends messages to the round-robin queue of a component, and records their fates."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.eks = [(GenericApplicationExchange, f"{options.component}/rr")]
        self.publish_timeout = options.timeout
        super().__init__({"name": options.label})
        self._record = Record(Path(options.folder) / f"{options.label}.sent")
        self._ids = (f"{options.label}-{number}" for number in itertools.count())
        self._kinds = itertools.cycle(options.kinds.split(","))
        self._pause = 1.0 / options.rate

    def send_single(self) -> None:
        """Send a message and wait for its confirm."""
        message_id = next(self._ids)
        try:
            self._send_by(self, message_id)
        except PostageError as error:
            self._note(message_id, error)
        else:
            self._note(message_id)

    def send_several(self, batch: Batch) -> None:
        """Send messages that are confirmed together. Confirms are recorded as they come."""
        noted = 0
        try:
            with batch:
                for message_id in itertools.islice(self._ids, SEVERAL):
                    self._send_by(batch, message_id)
                    noted = self._note_confirmed(batch, noted)
        except BatchError as error:
            for message_id, reason in (*error.failed, *error.unknown):
                self._note(message_id, reason)
        self._note_confirmed(batch, noted)

    def _send_by(self, sender: Any, message_id: str) -> None:
        time.sleep(self._pause)
        self._record.write(BEGUN, message_id)
        getattr(sender, f"message_{next(self._kinds)}")(message_id, _message_id=message_id)

    def _note_confirmed(self, batch: Batch, noted: int) -> int:
        confirmed = batch.confirmed[noted:]
        for message_id in confirmed:
            self._note(message_id)
        return noted + len(confirmed)

    def _note(self, message_id: str, error: Exception | None = None) -> None:
        if error is None:
            self._record.write(CONFIRMED, message_id)
        elif isinstance(error, PublishUnknownError):
            self._record.write(UNKNOWN, message_id)
        else:
            self._record.write(FAILED, message_id, type(error).__name__)


def may_go_on(folder: Path) -> bool:
    """Tell whether there is more to send, after a pause if one is asked for."""
    stop, pause = folder / "stop", folder / "pause"
    if pause.exists() and not stop.exists():
        print("paused", flush=True)
        while pause.exists() and not stop.exists():
            time.sleep(0.01)
        print("sending", flush=True)
    return not stop.exists()


def main() -> None:
    """Send until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="where it records and looks for what to do")
    parser.add_argument("component", help="the component that it sends to")
    parser.add_argument("label", help="what its message ids begin with")
    parser.add_argument("--mode", choices=("single", "batch", "transaction"), default="single")
    parser.add_argument("--kinds", default="plain", help="what is sent in turn, such as a,b")
    parser.add_argument("--rate", type=float, default=200.0, help="messages per second at most")
    parser.add_argument("--timeout", type=float, default=30.0, help="the publish_timeout")
    options = parser.parse_args()
    with Producer(options) as producer:
        sends: dict[str, Callable[[], None]] = {
            "single": producer.send_single,
            "batch": lambda: producer.send_several(producer.batch()),
            "transaction": lambda: producer.send_several(producer.transaction()),
        }
        print("sending", flush=True)
        while may_go_on(Path(options.folder)):
            sends[options.mode]()
    print("ended", flush=True)


if __name__ == "__main__":
    main()
