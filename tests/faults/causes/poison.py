"""A request kills each process that runs it, for example by a crash in native code."""

import os
import signal

from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner


class Poisoned(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        if request.prompt == "poison":
            os.kill(os.getpid(), signal.SIGKILL)


def make_runner(_: Settings) -> Poisoned:
    return Poisoned()
