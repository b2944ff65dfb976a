"""The first run waits until the test resumes it, and every run raises at its end."""

from collections.abc import Sequence

from PIL import Image

from consumer.ports.model import ModelError, RunnerOutput
from consumer.settings import Settings
from generation_contracts import Request
from tests.faults.causes.held_in_run import HeldInRun


class HeldThenRaises(HeldInRun):
    def output(self, request: Request, images: Sequence[Image.Image]) -> RunnerOutput:
        raise ModelError("RuntimeError")


def make_runner(_: Settings) -> HeldThenRaises:
    return HeldThenRaises()
