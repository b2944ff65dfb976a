"""The model holds the interpreter lock in C in its first run, for `FAULTS_SECONDS`.

With `FAULTS_WAIT` it waits until the test creates the mark `hold`.
"""

import ctypes
import os
import time
from pathlib import Path

from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import FOLDER, STEP, QuickRunner, first_time, note

MICROSECONDS = 1_000_000


class HoldingTheLock(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        if not first_time("held"):
            return
        while "FAULTS_WAIT" in os.environ and not (Path(os.environ[FOLDER]) / "hold").exists():
            time.sleep(STEP)
        note("holding", str(os.getpid()))
        # PyDLL keeps the interpreter lock during a call, as a faulty extension does.
        ctypes.PyDLL(None).usleep(int(float(os.environ["FAULTS_SECONDS"]) * MICROSECONDS))


def make_runner(_: Settings) -> HoldingTheLock:
    return HoldingTheLock()
