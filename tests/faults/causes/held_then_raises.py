"""The first run lasts until the test lets it go on, and every run raises in the end."""

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
