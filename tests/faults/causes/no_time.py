"""No fault: a worker whose steps take no time."""

from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner


class NoTime(QuickRunner):
    def step(self, request: Request, number: int) -> None:
        pass


def make_runner(_: Settings) -> NoTime:
    return NoTime()
