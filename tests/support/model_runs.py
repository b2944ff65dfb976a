"""Runs of a model without a daemon: `run_model(runner, request, images)`."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from PIL import Image

from consumer.ports.model import RunnerOutput, RunRequest
from generation_contracts import Request


class RunsModels(Protocol):
    """A runner, or a loaded model."""

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool
    ) -> Sequence[RunnerOutput | None]: ...


class RunCallbacks:
    """A `consumer.ports.model.RunProgress` that calls functions."""

    def __init__(
        self,
        on_step: Callable[[int, int], Any] = lambda *_: None,
        on_text: Callable[[str], Any] = lambda _: None,
        on_preview: Callable[[bytes], Any] = lambda _: None,
    ) -> None:
        self.step = on_step
        self.text = on_text
        self.preview = on_preview


def run_request(
    request: Request,
    images: Sequence[Image.Image] = (),
    *,
    on_step: Callable[[int, int], Any] = lambda *_: None,
    cancelled: Callable[[], bool] = lambda: False,
    on_text: Callable[[str], Any] = lambda _: None,
    on_preview: Callable[[bytes], Any] = lambda _: None,
) -> RunRequest:
    """Return the argument of a runner for one request."""
    return RunRequest(request, images, RunCallbacks(on_step, on_text, on_preview), cancelled)


def run_model(
    runner: RunsModels,
    request: Request,
    images: Sequence[Image.Image] = (),
    *,
    save_memory: bool = False,
    **options: Any,
) -> RunnerOutput:
    """Run one request. `options` are the keyword arguments of `run_request`."""
    (output,) = runner.run([run_request(request, images, **options)], save_memory=save_memory)
    assert output is not None
    return output
