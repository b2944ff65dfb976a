"""No fault: a worker that takes no time, however many steps a request asks for."""

from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner


class NoTime(QuickRunner):
    def step(self, request: Request, number: int) -> None:
        pass


def make_runner(_: Settings) -> NoTime:
    return NoTime()
