"""A request kills its process at its last step, while other requests wait."""

import os
import signal

from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner

LAST_STEP = 30  # 0.3 seconds


class PoisonedAtItsEnd(QuickRunner):
    def step(self, request: Request, number: int) -> None:
        super().step(request, number)
        if request.prompt == "poison" and number == LAST_STEP:
            os.kill(os.getpid(), signal.SIGKILL)


def make_runner(_: Settings) -> PoisonedAtItsEnd:
    return PoisonedAtItsEnd()
