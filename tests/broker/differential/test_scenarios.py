# SPDX-License-Identifier: MIT
"""RabbitMQ and the embedded broker say the same in every scenario, and what was recorded."""

from __future__ import annotations

import pytest

from tests.broker.differential import transcripts
from tests.broker.differential.differences import DIFFERENCES
from tests.broker.differential.registry import SCENARIOS

RECORDED = transcripts.read()


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in DIFFERENCES])
def test_the_broker_says_what_rabbitmq_says(name: str, vhost: str) -> None:
    """The whole dialogue is that of RabbitMQ 3.10.8."""
    assert RECORDED[name] == SCENARIOS[name].dialogue(vhost)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("name", DIFFERENCES)
def test_rabbitmq_says_what_it_said(name: str, rabbitmq_vhost: str) -> None:
    """Also where the embedded broker is meant to differ."""
    assert RECORDED[name] == SCENARIOS[name].dialogue(rabbitmq_vhost)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_where_the_embedded_broker_is_meant_to_differ_it_does(
    name: str, embedded_vhost: str
) -> None:
    """The list of differences holds nothing that was overcome."""
    assert RECORDED[name] != SCENARIOS[name].dialogue(embedded_vhost)


def test_all_that_is_recorded_is_played() -> None:
    """A scenario that is renamed or removed leaves no dialogue behind."""
    assert list(SCENARIOS) == list(RECORDED)
