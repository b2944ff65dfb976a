"""The NATS client gives up for good while the model is loaded, which would take a minute."""

import time

from consumer.ports import ModelDescription
from consumer.settings import Settings
from tests.faults.causes import bus_closed
from tests.faults.quick_runner import QuickRunner


class Runner(QuickRunner):
    def load(self) -> ModelDescription:
        while not bus_closed.opened:
            time.sleep(0.01)
        bus_closed.close_all()
        time.sleep(60)
        return super().load()


def make_runner(_: Settings) -> Runner:
    return Runner()
