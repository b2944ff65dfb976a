"""The process is killed in its first run when the test requests it, and its fork survives.

The fork has inherited every pipe and every connection, as the workers of a data loader do.
"""

import os
import signal
import time
from pathlib import Path

from consumer.settings import Settings
from generation_contracts import Request
from tests.support.holding import hold_once
from tests.support.quick_runner import FOLDER, STEP, QuickRunner, first_time, note

MOST = 60.0  # seconds; the test ends it much sooner


class SurvivedByAFork(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        if not first_time("forked"):
            return
        hold_once("run")
        if os.fork():
            os.kill(os.getpid(), signal.SIGKILL)
        note("forks", str(os.getpid()))
        ends = time.monotonic() + MOST
        while time.monotonic() < ends and not (Path(os.environ[FOLDER]) / "end").exists():
            time.sleep(STEP)
        os._exit(0)


def make_runner(_: Settings) -> SurvivedByAFork:
    return SurvivedByAFork()
