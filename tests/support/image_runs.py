"""Small requests for images, run on a loaded model in the thread of the test."""

from typing import Any

from consumer.ports.model import RunnerOutput
from consumer.runners import ModelRunner
from generation_contracts import TextToImageRequest
from tests.support.model_runs import run_model


def small_request(**fields: Any) -> TextToImageRequest:
    """A request for one image of 64x64 pixels in three steps, but for these fields."""
    small = {"prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 3, "seed": 7}
    return TextToImageRequest(**{**small, **fields})


def run_small(runner: ModelRunner, *, save_memory: bool = False, **fields: Any) -> RunnerOutput:
    """What the model makes of such a request, once it has passed the check."""
    return run_checked(runner, small_request(**fields), save_memory=save_memory)


def run_checked(
    runner: ModelRunner, request: TextToImageRequest, *, save_memory: bool = False
) -> RunnerOutput:
    """What the model makes of a request, once it has passed the check."""
    runner.check(request)
    return run_model(runner, request, [], save_memory=save_memory)


def pixels(output: RunnerOutput) -> list[bytes]:
    """The images' pixels."""
    return [image.image.tobytes() for image in output.images]


def model(runner: ModelRunner) -> Any:
    """The loaded model of a runner."""
    return runner._model


def pipeline(runner: ModelRunner) -> Any:
    """The pipeline that all runs of a runner share."""
    return model(runner)._pipe


class StopAt:
    """Says yes at a step, counted by how often it was asked; the first time is before the run."""

    def __init__(self, step: int) -> None:
        self.left = step

    def is_reached(self) -> bool:
        self.left -= 1
        return self.left < 0
