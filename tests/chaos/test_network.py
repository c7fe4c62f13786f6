# SPDX-License-Identifier: MIT
"""A network that fails in the ways that networks have."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from tests.chaos.load import LOSS, Load, Loads, Scale
from tests.transport.proxy import Proxy, Way

#: Seconds of a heartbeat that is to be missed. Pika looks each heartbeat plus five seconds whether
#: anything came since its last look, so three of them may pass unnoticed.
HEARTBEAT = 1


class Network:
    """What lies between a broker and the programs of a load.

    Args:
        producers: The way of the producers.
        consumers: The way of the consumers.
    """

    def __init__(self, producers: Proxy, consumers: Proxy) -> None:
        self.producers = producers
        self.consumers = consumers

    def cut(self, load: Load, _number: int) -> None:
        """Reset every connection."""
        with load.noticing(LOSS):
            for way in self._ways:
                way.cut()

    def lose_confirms(self, load: Load, _number: int) -> None:
        """Reset the connections of the producers after messages arrived, and no confirms."""
        seen: set[str] = set()

        def is_in_doubt() -> bool:
            nonlocal seen
            before, seen = seen, load.unconfirmed()
            return not before.isdisjoint(seen)  # for two looks: else the confirm was under way

        with load.noticing(LOSS, load.producers):
            self.producers.hold_answers()
            load.wait_for(is_in_doubt, "a message is handled and not confirmed")
            self.producers.cut()
            self.producers.release_answers()

    def refuse(self, load: Load, _number: int) -> None:
        """Refuse every connection until all know."""
        with load.noticing(LOSS) as all_notice, self._both(Proxy.outage):
            all_notice()

    def half_close_requests(self, load: Load, _number: int) -> None:
        """End the ways to the broker, and not those back."""
        with load.noticing(LOSS):
            for way in self._ways:
                way.half_close(Way.REQUESTS)

    def half_close_answers(self, load: Load, _number: int) -> None:
        """End the ways from the broker, and not those to it."""
        with load.noticing(LOSS):
            for way in self._ways:
                way.half_close(Way.ANSWERS)

    def delay(self, load: Load, _number: int) -> None:
        """Have everything come late; it goes on all the same."""
        with self._both(lambda way: way.delay(0.2)):
            load.wait_for_progress(5)

    def swallow(self, load: Load, number: int) -> None:
        """Let nothing through for three heartbeats, or until all have lost their connections."""
        if number % 2 == 0:
            with self._both(Proxy.black_hole):
                time.sleep(3 * HEARTBEAT)  # the fault itself: nothing is waited for
        else:
            with load.noticing(LOSS) as all_notice, self._both(Proxy.black_hole):
                all_notice()

    @property
    def _ways(self) -> tuple[Proxy, Proxy]:
        return self.producers, self.consumers

    @contextlib.contextmanager
    def _both(
        self, fault: Callable[[Proxy], contextlib.AbstractContextManager[None]]
    ) -> Iterator[None]:
        with fault(self.producers), fault(self.consumers):
            yield


#: What happens to the network in turn: first what the short form has, too.
FEW_FAULTS = (
    Network.lose_confirms,
    Network.half_close_requests,
    Network.half_close_answers,
)
MANY_FAULTS = (*FEW_FAULTS, Network.cut, Network.refuse, Network.delay, Network.swallow)


@pytest.fixture
def network(broker_url: str) -> Iterator[Network]:
    with Proxy(broker_url) as producers, Proxy(broker_url) as consumers:
        yield Network(producers, consumers)


def test_a_network_that_fails(loads: Loads, network: Network, scale: Scale) -> None:
    """All faults follow each other, and nothing that was confirmed is lost."""
    with loads(heartbeat=HEARTBEAT) as load:
        load.start_consumer(url=network.consumers.url)
        for mode in ("single", "batch"):
            load.start_producer("--mode", mode, url=network.producers.url)
        for number in scale.rounds():
            for fault in MANY_FAULTS if scale.is_long else FEW_FAULTS:
                load.wait_for_progress()
                fault(network, load, number)
        load.wait_for_progress()

        judgement = load.finish()

    assert 0 < judgement.duplicates  # of what was sent again because its confirm was lost
