# SPDX-License-Identifier: MIT
"""A component that is reached by its name, host, pid or group.

Keys of the exchange, and the queues that they lead to:

=======================  ===========================================================
``{name}``               every instance of that name                 (its uid queue)
``{name}/rr``            one of them, in turn                        (the sid queue)
``@{host}``              every application of that host              (its uid queue)
``{name}@{host}``        every instance of that name on that host    (its uid queue)
``{name}@{host}/rr``     one of them, in turn                        (the hid queue)
``{pid}@{host}``         the one instance with that pid              (its uid queue)
``{name}#{group}``       every instance of that name in that group   (its uid queue)
``{name}#{group}/rr``    one of them, in turn                        (the group's queue)
=======================  ===========================================================
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

from postage import restart
from postage.errors import ConfigurationError
from postage.handlers import MessageHandler, RpcHandler
from postage.messages import MessageResult
from postage.processor import MessageProcessor
from postage.topology import Exchange, Queue, error_queue_of

logger = logging.getLogger(__name__)

#: Seconds without use after which a host's queue goes. Its work is bound to the host, and
#: hosts come and go; a week covers one that is being mended.
HID_EXPIRES = 7 * 24 * 3600.0
#: Seconds without use after which an instance's queue goes: longer than a restart takes.
UID_EXPIRES = 600.0
#: Seconds that tidying up at the start and at the end may take.
TIDY_TIMEOUT = 10.0

ROUND_ROBIN = "/rr"


class GenericApplicationExchange(Exchange):
    """The exchange that all applications of a virtual host share."""

    name = "generic-application-exchange"
    exchange_type = "direct"
    passive = False
    durable = True
    auto_delete = False

    @classmethod
    def queue_of(cls, key: str) -> str | None:
        """Return the queue of a round-robin key: its name is the key without the ending."""
        return key.removesuffix(ROUND_ROBIN) if key.endswith(ROUND_ROBIN) else None


class LoggingProducerStub:
    """Stands where a producer of log messages could: every method does nothing.

    Args:
        fingerprint: Of the application.
        hup: Host, user and password.
        vhost: The virtual host.
    """

    def __init__(
        self,
        fingerprint: Mapping[str, Any] | None = None,
        hup: Mapping[str, Any] | None = None,
        vhost: str | None = None,
    ) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwds: None


class GenericApplication(MessageProcessor):
    """A component with a name, a pid and a host, and the queues that belong to them.

    Attributes:
        exchange_class: The exchange of the keys above.
        logging_producer: Made with the fingerprint; its `log()` hears of groups.
        sid: The queue that all instances of this name share.
        hid: The queue that all instances of this name on this host share.
        uid: The queue of this instance alone.
        groups: The groups that it is in.

    Args:
        fingerprint: A fingerprint as a dict: name, pid and host make the queues.
        vhost: The virtual host; None: from the environment.
        groups: Groups to join from the start.
        hup: Host, user and password; None: from the environment.

    Raises:
        ConfigurationError: The fingerprint has no name, pid or host.
        PostageError: As `MessageProcessor`.
    """

    exchange_class: ClassVar[type[Exchange]] = GenericApplicationExchange
    logging_producer: ClassVar[type[Any]] = LoggingProducerStub

    def __init__(
        self,
        fingerprint: Mapping[str, Any],
        vhost: str | None = None,
        groups: Iterable[str] = (),
        hup: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, pid, host = (_part(fingerprint, key) for key in ("name", "pid", "host"))
        name = self.name
        self.sid = Queue(name)
        self.hid = Queue(
            f"{name}@{host}",
            type="classic",
            expires=HID_EXPIRES,
            dead_letter=None,
            error_queue=error_queue_of(name),
        )
        self.uid = Queue(
            f"{name}.{pid}@{host}",
            type="classic",
            expires=UID_EXPIRES,
            dead_letter=None,
            error_queue=error_queue_of(name),
            exclusive_consumer=True,
            personal=True,
        )
        self.groups: list[str] = []
        self.logger = self.logging_producer(fingerprint)
        eqk = [
            (
                self.exchange_class,
                [
                    (self.sid, f"{name}{ROUND_ROBIN}"),
                    (self.uid, name),
                    (self.uid, f"@{host}"),
                    (self.hid, f"{name}@{host}{ROUND_ROBIN}"),
                    (self.uid, f"{name}@{host}"),
                    (self.uid, f"{pid}@{host}"),
                ],
            )
        ]
        super().__init__(fingerprint, eqk, hup, vhost)
        self.vhost = self.consumer.vhost
        try:
            if restart.cause() is None:
                self._purge_uid()
            for group in groups:
                self.join(group)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------- groups

    def join(self, group: str) -> None:
        """Join a group: for its broadcasts, and for its round robin.

        Args:
            group: Its name.

        Raises:
            PostageError: The broker did not agree; the group is not joined then.
        """
        if group in self.groups:
            return
        name = f"{self.name}#{group}"
        # First what may be refused, because that queue exists with other arguments. 1.2.1 could
        # not do this late: it consumed all its queues in one blocking call.
        self.consumer.queue_bind(self.exchange_class, Queue(name), f"{name}{ROUND_ROBIN}")
        self.consumer.queue_bind(self.exchange_class, self.uid, name)
        self.groups.append(group)
        self.logger.log(f"Joining group {name}")

    def leave_group(self, group: str) -> None:
        """Leave a group. Its round-robin queue stays, for the others.

        Args:
            group: Its name.

        Raises:
            PostageError: The broker did not agree; the group is not left then.
        """
        if group not in self.groups:
            return
        name = f"{self.name}#{group}"
        self.consumer.queue_unbind(self.exchange_class, self.uid, name)
        self.consumer.stop_queue(Queue(name))
        self.groups.remove(group)
        self.logger.log(f"Leaving group {name}")

    @MessageHandler("command", "join_group")
    def msg_join_group(self, content: Mapping[str, Any]) -> None:
        """Join the group that ``parameters`` names, as ``group_name`` or alone."""
        self.join(_group_name(content))

    @MessageHandler("command", "leave_group")
    def msg_leave_group(self, content: Mapping[str, Any]) -> None:
        """Leave the group that ``parameters`` names, as ``group_name`` or alone."""
        self.leave_group(_group_name(content))

    @RpcHandler("command", "ping")
    def msg_ping(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        """Answer with the fingerprint."""
        reply_func(MessageResult(dict(self.fingerprint)))

    # -------------------------------------------------------------------- the uid queue

    def before_close(self, restarting: bool) -> None:
        """Delete the queue of this instance, if there will be no such instance again."""
        if not restarting:
            self._ask_uid("queue_delete")

    def _purge_uid(self) -> None:
        """Throw away what was meant for an earlier process with this pid.

        After a restart the process is the same, and what was sent meanwhile is for it.
        """
        self._ask_uid("queue_purge")

    def _ask_uid(self, method: str) -> None:
        queue = self.uid.name

        def script(channel: Any) -> Generator[Any, Any, None]:
            yield partial(getattr(channel, method), queue)

        self.consumer.conn_broker.ask(script, TIDY_TIMEOUT, f"{method} {queue!r}")


def _part(fingerprint: Mapping[str, Any], key: str) -> str:
    value = fingerprint.get(key)
    if value is None or not str(value):
        raise ConfigurationError(
            f"the fingerprint of an application needs {key!r}: "
            "GenericApplication(Fingerprint('name', 'type').as_dict())"
        )
    return str(value)


def _group_name(content: Mapping[str, Any]) -> str:
    parameters = content.get("parameters")
    name = parameters.get("group_name") if isinstance(parameters, Mapping) else parameters
    if not isinstance(name, str) or not name:
        raise ValueError("parameters need a 'group_name'")
    return name
