"""The first run lasts until the test lets it go on."""

from consumer.settings import Settings
from generation_contracts import Request
from tests.faults.moments import TimedRunner, hold


class HeldInRun(TimedRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        super().begin(request, save_memory=save_memory)
        hold("run")


def make_runner(_: Settings) -> HeldInRun:
    return HeldInRun()
