"""The process is killed during a run."""

from consumer.settings import Settings
from generation_contracts import Request
from tests.support.holding import die, hold
from tests.support.quick_runner import QuickRunner


class KilledInRun(QuickRunner):
    def step(self, request: Request, number: int) -> None:
        super().step(request, number)
        hold("die")
        die()


def make_runner(_: Settings) -> KilledInRun:
    return KilledInRun()
