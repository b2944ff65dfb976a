"""The model makes noise, which cannot be compressed, so uploads are large enough to interrupt."""

import random
from collections.abc import Sequence

from PIL import Image

from consumer.ports.model import GeneratedImage, RunnerOutput
from consumer.settings import Settings
from generation_contracts import TextToImageRequest
from tests.faults.store_times import shorten
from tests.support.quick_runner import QuickRunner

SEED = 7
SMALL = 16  # pixels, where a request does not say


class Noise(QuickRunner):
    def output(self, request: object, images: Sequence[Image.Image]) -> RunnerOutput:
        assert isinstance(request, TextToImageRequest)
        size = request.width or SMALL, request.height or SMALL
        noise = random.Random(SEED).randbytes(3 * size[0] * size[1])
        image = Image.frombytes("RGB", size, noise)
        return RunnerOutput(outputs=(GeneratedImage(image, SEED),))


shorten()


def make_runner(_: Settings) -> Noise:
    return Noise()
