"""The device fails in the first run that is not harmless, after the test creates the mark `lose`.

The exception is the one that torch raises for a sticky error.
"""

from collections.abc import Sequence
from functools import partial

import torch

from consumer.ports.model import RunnerOutput, RunRequest
from consumer.runners.faults import translate_failures
from consumer.settings import Settings
from generation_contracts import Request
from tests.support.holding import hold
from tests.support.quick_runner import QuickRunner, first_time, note


class DeviceLostOnce(QuickRunner):
    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> list[RunnerOutput | None]:
        return translate_failures(
            partial(super().run, runs, save_memory=save_memory),
            free=partial(note, "freed", "memory"),
        )

    def step(self, request: Request, number: int) -> None:
        super().step(request, number)
        if request.prompt != "harmless" and first_time("lost"):
            hold("lose")
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def make_runner(_: Settings) -> DeviceLostOnce:
    return DeviceLostOnce()
