"""The model ignores the cancel token and takes minutes, without holding the interpreter lock."""

import time
from collections.abc import Sequence

from consumer.ports.model import RunnerOutput, RunRequest
from consumer.settings import Settings
from tests.support.quick_runner import QuickRunner, note

MINUTES = 600.0  # seconds


class IgnoresCancellation(QuickRunner):
    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> list[RunnerOutput | None]:
        note("runs", runs[0].request.request_id or "")
        time.sleep(MINUTES)
        return super().run(runs, save_memory=save_memory)


def make_runner(_: Settings) -> IgnoresCancellation:
    return IgnoresCancellation()
