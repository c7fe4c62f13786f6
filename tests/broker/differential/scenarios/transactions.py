# SPDX-License-Identifier: MIT
"""The class tx."""

from __future__ import annotations

from typing import Any

from pika import spec

from tests.broker.differential.driver import Stage
from tests.broker.differential.registry import each, scenario


@scenario
def a_commit_publishes_and_acknowledges(stage: Stage) -> None:
    """Until then nothing happens."""
    channel = stage.open()
    channel.declare("q")
    channel.publish("q", "before")
    channel.call(spec.Tx.Select())
    channel.publish("q", "one")
    channel.publish("q", "two")
    stage.count("q", 1)
    channel.get("q")
    channel.ack(1)
    channel.call(spec.Tx.Commit())
    stage.count("q", 2)
    channel.close()
    stage.drain("q", 2)


@scenario
def a_rollback_forgets(stage: Stage) -> None:
    """What was published is gone, and what was acknowledged is not."""
    channel = stage.open()
    channel.declare("q")
    channel.publish("q", "before")
    channel.call(spec.Tx.Select())
    channel.publish("q", "one")
    channel.get("q")
    channel.ack(1)
    channel.call(spec.Tx.Rollback())
    channel.ack(1)
    channel.call(spec.Tx.Commit())
    stage.count("q", 0)


@each(commit=spec.Tx.Commit, rollback=spec.Tx.Rollback)
def a_channel_must_be_transactional(stage: Stage, method: Any) -> None:
    """406 otherwise."""
    stage.open().call(method())


@scenario
def a_channel_is_either_transactional_or_confirming(stage: Stage) -> None:
    """406 for the other."""
    client = stage.connect()
    channel = client.open()
    channel.call(spec.Tx.Select())
    channel.call(spec.Confirm.Select())
    channel = client.open()
    channel.call(spec.Confirm.Select())
    channel.call(spec.Tx.Select())


@scenario
def a_mandatory_message_is_returned_at_the_commit(stage: Stage) -> None:
    """And an error of a publish comes at once."""
    channel = stage.open()
    channel.call(spec.Tx.Select())
    channel.publish("missing", "one", "mandatory")
    channel.call(spec.Tx.Commit())
    channel.take()
    channel.publish("key", "one", exchange="missing")
    channel.take()
