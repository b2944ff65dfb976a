"""A model that loads at once, for faults in real daemon processes."""

import os
import time
from collections.abc import Hashable, Sequence
from pathlib import Path

from PIL import Image

from consumer.ports.model import (
    GeneratedImage,
    GeneratedText,
    Interrupted,
    ModelDescription,
    ModelUnavailable,
    RunnerOutput,
    RunRequest,
)
from generation_contracts import ModelInfo, Request, TextToImageRequest

FOLDER = "FAULTS_FOLDER"  # environment: the folder for the notes and marks of one test
STARTED = "started"  # note: request id and `time.monotonic()` of every run, of all processes
STEP = 0.01  # seconds
STEPS = 2  # default number of steps


def first_time(mark: str) -> bool:
    """Return whether this is the first call with a mark in all processes of the test."""
    try:
        os.close(os.open(Path(os.environ[FOLDER]) / mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def note(name: str, line: str) -> None:
    """Append a line to a file that the test reads. The write is atomic."""
    handle = os.open(Path(os.environ[FOLDER]) / name, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)


class QuickRunner:
    """A `consumer.ports.model.Runner` for both tasks, which notes the start of every run.

    A run takes `num_inference_steps` (or `max_new_tokens`) times `STEP`. A cause of a fault
    overrides `step`, `begin` or `output`.
    """

    _closed = False

    def load(self) -> ModelDescription:
        return ModelDescription(
            info=ModelInfo(id="quick", family="faults", dtype="float32", device="cpu"),
            parameters=frozenset(
                {"width", "height", "num_inference_steps", "num_images", "seed", "max_new_tokens"}
            ),
            defaults={"num_inference_steps": STEPS},
            size_multiple=1,
            max_pixels=2048 * 2048,
        )

    def check(self, request: Request) -> None:
        """Accept every request while the model is loaded."""
        if self._closed:
            raise ModelUnavailable("no model is loaded")

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> list[RunnerOutput | None]:
        (run,) = runs
        request = run.request
        note("runs", request.request_id or "")
        note(STARTED, f"{request.request_id} {time.monotonic()}")
        self.begin(request, save_memory=save_memory)
        steps = _steps(request)
        for step in range(1, steps + 1):
            self.step(request, step)
            run.progress.step(step, steps)
            if run.cancelled():
                raise Interrupted
        return [self.output(request, run.images)]

    def batch_key(self, _: Request) -> Hashable | None:
        """Return None: each request runs alone."""

    def begin(self, request: Request, *, save_memory: bool) -> None:
        """Run before the first step."""

    def step(self, request: Request, number: int) -> None:
        time.sleep(STEP)

    def output(self, request: Request, images: Sequence[Image.Image]) -> RunnerOutput:
        if not isinstance(request, TextToImageRequest):
            written = f"{len(images)} images"
            text = GeneratedText(written, "stop", prompt_tokens=3, completion_tokens=2)
            return RunnerOutput(outputs=(text,))
        seed = request.seed or 0
        size = request.width or 16, request.height or 16
        return RunnerOutput(
            outputs=tuple(
                GeneratedImage(Image.new("RGB", size, (seed % 256, number, 0)), seed + number)
                for number in range(request.num_images)
            )
        )

    def close(self) -> None:
        """Unload the model: `check` refuses all requests from now on."""
        self._closed = True


def _steps(request: Request) -> int:
    requested = (
        request.num_inference_steps
        if isinstance(request, TextToImageRequest)
        else request.max_new_tokens
    )
    return requested or STEPS
