# SPDX-License-Identifier: MIT
"""A broker that closes connections, dies, hangs, or has no memory left."""

from __future__ import annotations

from tests.chaos.load import Loads, Scale
from tests.nodes import Node


def test_connections_that_the_broker_closes(loads: Loads, node: Node, scale: Scale) -> None:
    """Every two seconds all connections end, and nothing that was confirmed is lost."""
    with loads() as load:
        load.start()
        for _ in scale.rounds(2.0):
            load.wait_for_progress()
            node.close_connections("chaos")
        load.wait_for_progress()

        load.finish()


def test_a_broker_that_is_killed(loads: Loads, node: Node, scale: Scale) -> None:
    """A broker loses its power and starts again, and nothing that was confirmed is lost."""
    with loads() as load:
        load.start()
        for _ in scale.rounds(scale.seconds / 3):
            load.wait_for_progress()
            node.kill()
            node.start()
            node.ensure_running()
        load.wait_for_progress()

        load.finish()
