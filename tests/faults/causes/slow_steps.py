"""A model with steps of 0.25 s, which notes the start of each step."""

import time

from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner, note

STEP = 0.25  # seconds; far longer than a process of a busy machine waits for its turn


class SlowSteps(QuickRunner):
    def step(self, request: Request, number: int) -> None:
        note("steps", repr(time.time()))
        time.sleep(STEP)


def make_runner(_: Settings) -> SlowSteps:
    return SlowSteps()
