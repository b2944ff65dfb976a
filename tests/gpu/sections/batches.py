"""What previews cost, and what batches gain."""

# mypy: allow-untyped-calls

import statistics
import time

from consumer.ports.model import RunnerOutput
from generation_contracts import Task, TextToImageRequest
from tests.bench.batches import JOBS, SIZES, TINY, Bench
from tests.gpu import models
from tests.gpu.check import Check
from tests.support.model_runs import RunsModels, run_model


def run(check: Check) -> None:
    """Measure a request with and without previews, then batches of the demonstration models."""
    with check.part("previews"):
        _previews(check)
    for model in (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_TEXT) if check.full else (TINY,):
        with check.part(f"batches of {model}"):
            _batches(check, model)


def _previews(check: Check) -> None:
    placement = models.placement_of(check.device)
    pipe = models.flux(models.FLUX_SHORT if check.full else None, placement)
    model = models.diffusion_model(pipe, placement)
    seconds: list[tuple[float, float]] = []
    received: list[bytes] = []
    _image(check, model, received, preview=False)
    for _ in range(3 if check.full else 1):
        without = _timed(check, model, received, preview=False)
        seconds.append((without, _timed(check, model, received, preview=True)))
    cost = statistics.median(one / other for other, one in seconds) - 1
    plain = statistics.median(other for other, _ in seconds)
    check.row("one image without previews", plain * 1000, "ms")
    check.row(
        "more time with previews", max(0.0, cost) * 100, "%", note=f"{len(received)} previews"
    )
    check.row(
        "previews are JPEG files", len(received), ok=all(p[:2] == b"\xff\xd8" for p in received)
    )
    model.close()


def _timed(check: Check, model: RunsModels, received: list[bytes], *, preview: bool) -> float:
    began = time.perf_counter()
    _image(check, model, received, preview=preview)
    return time.perf_counter() - began


def _image(
    check: Check, model: RunsModels, received: list[bytes], *, preview: bool
) -> RunnerOutput:
    side, steps = (1024, 50) if check.full else (64, 10)
    request = TextToImageRequest(
        prompt="a red circle",
        width=side,
        height=side,
        num_inference_steps=steps,
        seed=1,
        preview=preview,
    )
    return run_model(model, request, on_preview=received.append)


def _batches(check: Check, model: str) -> None:
    bench = Bench.of(model)
    sizes = SIZES if check.full else SIZES[:2]
    rounds = [{size: bench.measure(size) for size in sizes} for _ in range(3 if check.full else 1)]
    for size in sizes:
        wall = statistics.median(one[size].wall for one in rounds) / JOBS * 1000
        gain = statistics.median(one[1].wall / one[size].wall for one in rounds)
        check.row(f"{model}, batches of {size}", wall, "ms a job", note=f"{gain:.2f} times as fast")
    bench.runner.close()
