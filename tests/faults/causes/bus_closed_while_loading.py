"""The NATS client closes permanently during loading, which would take a minute."""

import time
from typing import Any

from consumer.bus.topology import Topology
from consumer.ports.model import ModelDescription
from consumer.settings import Settings
from tests.faults.causes import bus_closed
from tests.support.quick_runner import QuickRunner

ensure = Topology.ensure
ensured: list[Any] = []


async def ensure_and_note(self: Topology, *args: Any) -> Any:
    durable = await ensure(self, *args)
    ensured.append(durable)
    return durable


Topology.ensure = ensure_and_note  # type: ignore[method-assign]


class Runner(QuickRunner):
    def load(self) -> ModelDescription:
        while not ensured:  # otherwise the start fails at the next call of the JetStream API
            time.sleep(0.01)
        bus_closed.close_all()
        time.sleep(60)
        return super().load()


def make_runner(_: Settings) -> Runner:
    return Runner()
