"""A run waits until the test creates the mark in the environment variable RELEASE_MARK.

Each process makes a different image, as devices with different rounding do.
"""

import os
from collections.abc import Sequence

from PIL import Image

from consumer.ports.model import GeneratedImage, RunnerOutput
from consumer.settings import Settings
from generation_contracts import Request
from tests.support.holding import RELEASE_MARK, hold
from tests.support.quick_runner import QuickRunner


class HeldUntilReleased(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        hold(os.environ[RELEASE_MARK])

    def output(self, request: Request, images: Sequence[Image.Image]) -> RunnerOutput:
        drawn = os.getpid()
        colour = tuple(drawn.to_bytes(3, "big"))
        return RunnerOutput(outputs=(GeneratedImage(Image.new("RGB", (16, 16), colour), drawn),))


def make_runner(_: Settings) -> HeldUntilReleased:
    return HeldUntilReleased()
