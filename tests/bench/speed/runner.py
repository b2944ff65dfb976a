"""The daemon of the bench: `python -m tests.bench.speed.runner`.

Runs `consumer run` with the stand-in as the model.
"""

import os
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path

from consumer.app.daemon import run
from consumer.ports.model import (
    GeneratedImage,
    Interrupted,
    ModelDescription,
    RunnerOutput,
    RunRequest,
)
from consumer.settings import Settings
from consumer.telemetry import configure_logging
from generation_contracts import ModelInfo, Request, TextToImageRequest
from tests.bench.speed.rows import Row
from tests.bench.speed.stand_in import NOTES, StandIn


class StandInRunner:
    """The stand-in as a `consumer.ports.model.Runner`, with the steps of the request."""

    def __init__(self) -> None:
        self._device: StandIn

    def load(self) -> ModelDescription:
        self._device = StandIn(Row.from_environment(os.environ), Path(os.environ[NOTES]))
        return ModelDescription(
            info=ModelInfo(id="stand-in", family="speed", dtype="uint8", device="cpu"),
            parameters=frozenset({"width", "height", "num_inference_steps", "num_images", "seed"}),
            defaults={"num_inference_steps": 1},
            size_multiple=1,
            max_pixels=2048 * 2048,
        )

    def check(self, request: Request) -> None:
        """Accept every request."""

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> list[RunnerOutput | None]:
        (run,) = runs
        request = run.request
        assert isinstance(request, TextToImageRequest)

        def on_step(step: int, of: int) -> None:
            run.progress.step(step, of)
            if run.cancelled():
                raise Interrupted

        image = self._device.run(on_step, request.num_inference_steps or 1)
        return [RunnerOutput(outputs=(GeneratedImage(image, request.seed or 0),))]

    def batch_key(self, request: Request) -> Hashable | None:
        """Return None: a speed-up by batches would be an invention of the stand-in."""

    def close(self) -> None:
        """Do nothing: the stand-in has no resources."""


def main() -> None:
    settings = Settings.load()
    configure_logging(settings.log_format, settings.log_level)
    sys.exit(run(settings, make_runner=lambda _: StandInRunner()))


if __name__ == "__main__":
    main()
