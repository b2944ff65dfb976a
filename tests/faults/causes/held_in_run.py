"""The first run waits until the test resumes it."""

from consumer.settings import Settings
from generation_contracts import Request
from tests.support.holding import hold_once
from tests.support.quick_runner import QuickRunner


class HeldInRun(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        super().begin(request, save_memory=save_memory)
        hold_once("run")


def make_runner(_: Settings) -> HeldInRun:
    return HeldInRun()
