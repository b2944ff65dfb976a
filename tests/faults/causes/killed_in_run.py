"""The process is killed in the middle of its first run."""

import os
import signal

from consumer.settings import Settings
from generation_contracts import Request
from tests.faults.quick_runner import QuickRunner, first_time


class KilledInRun(QuickRunner):
    def step(self, request: Request, number: int) -> None:
        super().step(request, number)
        if first_time("killed"):
            os.kill(os.getpid(), signal.SIGKILL)


def make_runner(_: Settings) -> KilledInRun:
    return KilledInRun()
