# SPDX-License-Identifier: MIT
"""The cases of the benchmarks do what they say, with next to nothing to do."""

from __future__ import annotations

from collections.abc import Iterator

import pika
import pytest

from benchmarks import broker, ceiling, footprint, growing, sharing, wide
from benchmarks.__main__ import main
from benchmarks.children import service
from benchmarks.envelope import FINGERPRINT, numbers, parameters
from benchmarks.measuring import Case
from postage.messaging import DefaultExchange, GenericProducer

pytestmark = pytest.mark.rabbitmq

#: How much of the work is done.
SCALE = 0.01


def chosen() -> Iterator[Case]:
    """Yield a case of each kind of work that takes no more than a second or two."""
    for module, workload, case in (
        (growing, "publish-sizes", "batch(), 256 KiB"),
        (growing, "handle-sizes", "MessageProcessor, 256 KiB"),
        (growing, "handlers", "handling, 10"),
        (growing, "bindings", "handling, 10"),
        (growing, "pairs", "publishing, 10"),
        (growing, "inflight", "calling, 10"),
        (growing, "backlog", "quorum, 1,000"),
        (sharing, "processes", "handler that counts, 2"),
        (sharing, "pipeline", "with an outbox"),
        (wide, "members", "quorum, 1 node"),
        (wide, "fanout", "classic, 10"),
        (footprint, "import", "import pika"),
        (footprint, "start", "GenericApplication"),
        (footprint, "footprint", "plain pika"),
    ):
        cases = {w.name: w.cases for w in module.workloads(SCALE)}[workload]
        yield next(each for each in cases if each.name == case)


@pytest.mark.parametrize("case", list(chosen()), ids=lambda case: case.name)
def test_a_case_measures_something(case: Case, broker_url: str) -> None:
    """A case does its work on a broker, and finds figures above zero."""
    sample = case.measure(broker_url)
    assert {} != sample
    # The broker's processor time is counted in hundredths of a second, and may be none.
    counted = {name: each for name, each in sample.items() if "broker" not in name}
    assert [] == [name for name, each in counted.items() if each <= 0 and "nodes" not in name]


def test_the_ceiling_publishes_what_postage_does(broker_url: str) -> None:
    """The messages of the ceiling have the bodies and the properties of those of postage."""

    class Producer(GenericProducer):
        pass

    with broker.job(broker_url, "classic", 1) as job:
        ceiling.publish(job)
        Producer.eks = [(DefaultExchange, job.queue)]
        with Producer(FINGERPRINT) as producer:
            producer.message_echo(**parameters(numbers(1)[0]))
        with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
            channel = connection.channel()
            limit, ours = (channel.basic_get(job.queue, auto_ack=True) for _ in range(2))
    assert ours[2] == limit[2]
    assert _set(ours[1]) == _set(limit[1])
    prefixes = [each.message_id.partition("-")[0] for each in (ours[1], limit[1])]
    assert len(prefixes[0]) == len(prefixes[1])


def _set(properties: pika.BasicProperties) -> dict[str, object]:
    """Return the properties of a message, those that differ each time without their values."""
    found = {name: value for name, value in vars(properties).items() if value is not None}
    return found | {"message_id": "some", "timestamp": "some"} if "message_id" in found else found


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_the_ceiling_leaves_nothing_behind(kind: str, broker_url: str) -> None:
    """What was published is delivered and acknowledged, to the last message."""
    with broker.job(broker_url, kind, 450, 200) as job:
        ceiling.publish(job)
        assert 450 == broker.messages_left(job)
        ceiling.deliver(job)
        assert 0 == broker.messages_left(job)


def test_the_ceiling_gets_a_reply_to_each_call(broker_url: str) -> None:
    """Calls end when each has its reply."""
    with broker.job(broker_url, "classic", 30, 200, 10) as job, service(ceiling.serve, job):
        assert ceiling.call(job)["calls/s"] > 0
        assert 0 == broker.messages_left(job)


def test_an_unknown_workload_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown workload is an error of usage."""
    with pytest.raises(SystemExit) as error:
        main(["no-such-work"])
    assert 2 == error.value.code
    assert "unknown workload(s) no-such-work" in capsys.readouterr().err
