"""JetStream does not answer the first two times, as on a machine under load."""

from typing import Any

from consumer.bus.connection import BusUnavailable
from consumer.bus.topology import Topology
from consumer.settings import Settings
from tests.faults.quick_runner import QuickRunner

ensure = Topology.ensure
unanswered = [1, 2]


async def ensure_later(self: Topology, *args: Any) -> Any:
    if unanswered:
        unanswered.pop()
        raise BusUnavailable("NATS: $JS.API.STREAM.INFO: no answer")
    return await ensure(self, *args)


Topology.ensure = ensure_later  # type: ignore[method-assign]


def make_runner(_: Settings) -> QuickRunner:
    return QuickRunner()
