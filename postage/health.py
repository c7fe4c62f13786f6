# SPDX-License-Identifier: MIT
"""How a producer, a consumer or a component is, as data.

A process that runs and a connection that is open prove little: what counts is that the
broker confirmed the consumers. So ``is_healthy`` of a consumer is about those.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from postage.errors import printable


class Incident(NamedTuple):
    """Something that went wrong.

    Attributes:
        at: Seconds since 1970, UTC.
        text: What, for people.
    """

    at: float
    text: str


def incident(error: BaseException) -> Incident:
    """Return an error as an incident of this moment."""
    return Incident(time.time(), printable(error) or type(error).__name__)


def latest(*incidents: Incident | None) -> Incident | None:
    """Return the last one, if there was any."""
    return max((each for each in incidents if each is not None), default=None)


@dataclass(frozen=True)
class Health:
    """What a health check wants to know. A snapshot; it changes no more.

    Attributes:
        state: Of the connection: ``disconnected``, ``connecting``, ``ready``, ``blocked``,
            ``draining`` or ``closed``; ``unused`` where nobody has connected yet.
        blocked: An alarm of the broker blocks publishers.
        in_flight: A producer's messages that have no fate yet; a consumer's deliveries that
            are not settled yet.
        reconnects: How often the connection came back.
        last_error: The last thing that went wrong, also if it is over.
    """

    state: str
    blocked: bool = False
    in_flight: int = 0
    reconnects: int = 0
    last_error: Incident | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether it does its work, or could if there were any."""
        return self.state in ("ready", "unused")

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, ``is_healthy`` too, as what JSON can write."""
        fields = dataclasses.asdict(self)
        error = self.last_error
        fields["last_error"] = None if error is None else error._asdict()
        return {"is_healthy": self.is_healthy, **fields}


@dataclass(frozen=True)
class ConsumerHealth(Health):
    """`Health` of a consumer.

    Attributes:
        consumers_wanted: How many queues are to be consumed.
        consumers_live: Of how many of them the broker confirmed it.
        waiting: Deliveries that nobody has started.
        prefetch: How many messages the broker delivers ahead now, for the queue with the most.
        last_delivery: When the last message came, in seconds since 1970, UTC; None: never.
    """

    consumers_wanted: int = 0
    consumers_live: int = 0
    waiting: int = 0
    prefetch: int = 0
    last_delivery: float | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether every queue is consumed, and there is one at least."""
        return 0 < self.consumers_wanted == self.consumers_live


@dataclass(frozen=True)
class ComponentHealth(ConsumerHealth):
    """`Health` of a processor or an application.

    Attributes:
        name, pid, host: Of its fingerprint.
        running: Messages that are being handled.
        handled: Messages that were handled since the start, failed ones too.
        failed: How many of them ended with an exception of their handler.
        circuit_open: So many handlers failed in a row that messages are handled one at a time,
            with pauses (`MessageProcessor.breaker`).
    """

    name: str = ""
    pid: str = ""
    host: str = ""
    running: int = 0
    handled: int = 0
    failed: int = 0
    circuit_open: bool = False


def parts_of(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `ComponentHealth` that tell whose it is."""
    return {key: str(fingerprint.get(key, "")) for key in ("name", "pid", "host")}
