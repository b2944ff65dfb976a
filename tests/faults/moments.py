"""Moments in a worker's life: noted with their time, and held until the test lets them go on."""

import os
import time
from pathlib import Path

from generation_contracts import Request
from tests.faults.quick_runner import FOLDER, QuickRunner, first_time, note

GO = ".go"  # ends the name of the file that the test writes
ON = ".on"  # ends the name under which it is noted that the process has gone on
BEGUN = "begun"  # request id and `time.monotonic()` of every run's beginning
POLL = 0.002  # seconds


def hold(moment: str) -> None:
    """Note that the moment has come, and wait for the test. Blocks: call it in a thread.

    Only the first process that comes to it is held, and only once.
    """
    if not first_time(f"{moment}.held"):
        return
    note(moment, "here")
    go = Path(os.environ[FOLDER]) / f"{moment}{GO}"
    while not go.exists():
        time.sleep(POLL)
    note(f"{moment}{ON}", "going on")


class TimedRunner(QuickRunner):
    """Notes when each run begins, by the clock that all processes of the machine share."""

    def begin(self, request: Request, *, save_memory: bool) -> None:
        note(BEGUN, f"{request.request_id} {time.monotonic()}")
