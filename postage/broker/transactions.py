# SPDX-License-Identifier: MIT
"""Transactions: what is published and settled takes effect together (AMQP 0-9-1, class tx)."""

from __future__ import annotations

from dataclasses import dataclass, field

from pika import amqp_object, spec

from postage.broker.channel import Channel, Handler, Settlement, Unsettled
from postage.broker.errors import PRECONDITION_FAILED, Refusal
from postage.broker.messages import Message


@dataclass
class Transaction:
    """What a channel has published and settled since the last commit or rollback.

    Attributes:
        messages: the published ones, and whether they are mandatory.
        size: how many bytes these need.
        settlements: the deliveries, and what is to become of them.
    """

    messages: list[tuple[Message, bool]] = field(default_factory=list)
    size: int = 0
    settlements: list[tuple[list[Unsettled], Settlement]] = field(default_factory=list)


def select(channel: Channel, method: spec.Tx.Select, payload: bytes) -> None:
    """Begin with transactions; one follows the other from now on."""
    if channel.is_confirming:
        raise Refusal(PRECONDITION_FAILED, "cannot switch from confirm to tx mode")
    channel.transaction = channel.transaction or Transaction()
    channel.send(spec.Tx.SelectOk())


def commit(channel: Channel, method: spec.Tx.Commit, payload: bytes) -> None:
    """Let all take effect. The answer waits for the disk, if something has to reach it."""
    done = _end(channel)
    try:
        outcomes = [channel.publish(message, mandatory) for message, mandatory in done.messages]
    except Refusal:  # an exchange is gone by now, and the channel ends: all is given back
        for settled, _ in done.settlements:
            channel.take_back(settled)
        raise
    for settled, how in done.settlements:
        channel.settle(settled, how)
    if any(outcome.is_stored for outcome in outcomes):
        channel.node.sync_soon(channel, 0)
    else:
        channel.send(spec.Tx.CommitOk())


def roll_back(channel: Channel, method: spec.Tx.Rollback, payload: bytes) -> None:
    """Forget what was published, and hold again what was settled."""
    for settled, _ in _end(channel).settlements:
        channel.take_back(settled)
    channel.send(spec.Tx.RollbackOk())


def _end(channel: Channel) -> Transaction:
    ended = channel.transaction
    if ended is None:
        raise Refusal(PRECONDITION_FAILED, "channel is not transactional")
    channel.transaction = Transaction()
    channel.connection.unfinished -= ended.size
    return ended


#: What a channel does with the methods of this class.
HANDLERS: dict[type[amqp_object.Method], Handler] = {
    spec.Tx.Commit: commit,
    spec.Tx.Rollback: roll_back,
    spec.Tx.Select: select,
}
