"""A run that lasts until the test lets it end, by the mark that the environment names.

Its picture is another one in each process, as it is on devices that do not round alike.
"""

import os
from collections.abc import Sequence

from PIL import Image

from consumer.ports.model import GeneratedImage, RunnerOutput
from consumer.settings import Settings
from generation_contracts import Request
from tests.support.holding import RELEASE_MARK, hold
from tests.support.quick_runner import QuickRunner


class HeldUntilLetGo(QuickRunner):
    def begin(self, request: Request, *, save_memory: bool) -> None:
        hold(os.environ[RELEASE_MARK])

    def output(self, request: Request, images: Sequence[Image.Image]) -> RunnerOutput:
        drawn = os.getpid()
        colour = tuple(drawn.to_bytes(3, "big"))
        return RunnerOutput(images=(GeneratedImage(Image.new("RGB", (16, 16), colour), drawn),))


def make_runner(_: Settings) -> HeldUntilLetGo:
    return HeldUntilLetGo()
