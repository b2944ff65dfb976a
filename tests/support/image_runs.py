"""Small text-to-image requests, run on a loaded model in the thread of the test."""

from typing import Any

from consumer.ports.model import RunnerOutput
from consumer.runners import ModelRunner
from generation_contracts import TextToImageRequest
from tests.support.model_runs import run_model


def small_request(**fields: Any) -> TextToImageRequest:
    """Return a request for one image of 64x64 pixels in three steps, with changed fields."""
    defaults = {"prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 3, "seed": 7}
    return TextToImageRequest(**{**defaults, **fields})


def run_small(runner: ModelRunner, *, save_memory: bool = False, **fields: Any) -> RunnerOutput:
    """Check and run a small request."""
    return run_checked(runner, small_request(**fields), save_memory=save_memory)


def run_checked(
    runner: ModelRunner, request: TextToImageRequest, *, save_memory: bool = False
) -> RunnerOutput:
    """Check and run a request."""
    runner.check(request)
    return run_model(runner, request, [], save_memory=save_memory)


def pixels(output: RunnerOutput) -> list[bytes]:
    """Return the pixels of each image."""
    return [image.image.tobytes() for image in output.images]


def model(runner: ModelRunner) -> Any:
    """Return the loaded model of a runner."""
    return runner._model


def pipeline(runner: ModelRunner) -> Any:
    """Return the pipeline that all runs of a runner share."""
    return model(runner)._pipe


class StopAt:
    """A cancel token that is set after `step` calls. The first call is before the run."""

    def __init__(self, step: int) -> None:
        self._remaining = step

    def is_reached(self) -> bool:
        self._remaining -= 1
        return self._remaining < 0
