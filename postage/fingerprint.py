# SPDX-License-Identifier: MIT
"""Who a component is: what it tells the others with each of its messages."""

from __future__ import annotations

import getpass
import os
import socket
from typing import Any

from postage.settings import Settings

#: What messages carry, in the order of the tuple form.
_KEYS = ("name", "type", "pid", "host", "user", "vhost")


class Fingerprint:
    """The identity of a component. What is not given is found out, at that moment.

    So a forked child that makes a new one tells its own process id.

    Args:
        name: The name of the component.
        type: A rough category, such as "application".
        pid: The process id.
        host: The name of this machine.
        user: The user that runs the process.
        vhost: The virtual host that it works on.

    Raises:
        ConfigurationError: `vhost` is not given, and the environment makes no sense.
    """

    def __init__(
        self,
        name: Any = None,
        type: Any = None,
        pid: Any = None,
        host: Any = None,
        user: Any = None,
        vhost: Any = None,
    ) -> None:
        self.name: str | None = None if name is None else str(name)
        self.type: str | None = None if type is None else str(type)
        self.pid = str(os.getpid() if pid is None else pid)
        self.host = str(socket.gethostname() if host is None else host)
        self.user = str(_user() if user is None else user)
        self.vhost = str(Settings.from_environment().vhost if vhost is None else vhost)

    def __repr__(self) -> str:
        values = ", ".join(f"{key}={value!r}" for key, value in self.as_dict().items())
        return f"Fingerprint({values})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        return self.as_tuple() == other.as_tuple()

    def __hash__(self) -> int:
        return hash(self.as_tuple())

    def as_dict(self) -> dict[str, str | None]:
        """Return it as messages carry it."""
        return dict(zip(_KEYS, self.as_tuple(), strict=True))

    def as_tuple(self) -> tuple[str | None, ...]:
        """Return name, type, pid, host, user and vhost."""
        return tuple(getattr(self, key) for key in _KEYS)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a uid that has no name
        return str(os.getuid())
