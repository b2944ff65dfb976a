"""Throughput of batched requests: `python -m tests.bench.batches`.

The shipped demonstration models and a tiny Stable Diffusion 3 with two layers run equal requests
one by one and in batches of several sizes. The sizes take turns, so that other load of the machine
affects all of them. Each row is the median of the rounds; ratios are computed within a round.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from consumer.ports.model import RunRequest
from consumer.runners import ModelConfig, ModelRunner, create_runner
from consumer.runners.demonstration.training.prompts import prompt
from consumer.runners.demonstration.training.scenes import draw, some_held_out_scene
from generation_contracts import ImageToTextRequest, Task, TextToImageRequest
from tests.support.model_runs import run_request
from tests.support.tiny_families import stable_diffusion_3

SEED = 2_026  # of the scenes
SIZES = (1, 2, 4, 8)  # requests in one run; 1 is a run without batching
JOBS = 8  # of each size in a round; a multiple of all sizes
TINY = "tiny_sd3"
MODELS = (Task.TEXT_TO_IMAGE, TINY, Task.IMAGE_TO_TEXT)


@dataclass(frozen=True)
class Duration:
    """Duration of the jobs of a round."""

    wall: float  # seconds
    cpu: float  # seconds, of all threads


@dataclass(frozen=True)
class Bench:
    """One model and its requests."""

    runner: ModelRunner
    members: Sequence[RunRequest]

    @classmethod
    def of(cls, model: str) -> "Bench":
        """Load a model and run it once."""
        choice = random.Random(SEED)
        if model == Task.IMAGE_TO_TEXT:
            members = [_image_to_text(choice) for _ in range(JOBS)]
        else:
            members = [_text_to_image(choice, number) for number in range(JOBS)]
        runner = _loaded(model)
        if len({runner.batch_key(member.request) for member in members}) != 1:
            raise click.ClickException(f"{model}: the requests do not have one batch key")
        bench = cls(runner, members)
        bench.measure(max(SIZES))
        return bench

    def measure(self, size: int) -> Duration:
        """Run all requests in batches of this size."""
        wall, cpu = time.perf_counter(), time.process_time()
        for first in range(0, JOBS, size):
            self.runner.run(self.members[first : first + size])
        return Duration(time.perf_counter() - wall, time.process_time() - cpu)


def _loaded(model: str) -> ModelRunner:
    if model != TINY:
        runner = create_runner(Task(model), ModelConfig())
        runner.load()
        return runner
    with tempfile.TemporaryDirectory() as folder:
        stable_diffusion_3().save_pretrained(Path(folder) / model)
        config = ModelConfig(model_id=str(Path(folder) / model))
        runner = create_runner(Task.TEXT_TO_IMAGE, config)
        runner.load()
    return runner


def _text_to_image(choice: random.Random, number: int) -> RunRequest:
    scene = some_held_out_scene(choice, two=False)
    request = TextToImageRequest(prompt=prompt(scene, choice), seed=number)
    return run_request(request)


def _image_to_text(choice: random.Random) -> RunRequest:
    drawn = draw(some_held_out_scene(choice, two=False), choice)
    request = ImageToTextRequest(prompt="Describe this picture.", images=("s3://bucket/key",))
    return run_request(request, [drawn])


def table(model: str, threads: int, rounds: Sequence[dict[int, Duration]]) -> list[str]:
    """Return the lines of one model with this number of threads."""
    lines = []
    for size in SIZES:
        wall = [durations[size].wall / JOBS for durations in rounds]
        faster = [durations[1].wall / durations[size].wall for durations in rounds]
        cheaper = [durations[1].cpu / durations[size].cpu for durations in rounds]
        lines.append(
            f"{model:<14} {threads:>7} {size:>6} {statistics.median(wall) * 1000:>11.1f}"
            f" {1 / statistics.median(wall):>10.2f} {statistics.median(faster):>8.2f}x"
            f"  {min(faster):>4.2f}-{max(faster):<4.2f} {statistics.median(cheaper):>8.2f}x"
        )
    return lines


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=(1, 2), multiple=True, show_default=True)
def main(rounds: int, threads: tuple[int, ...]) -> None:
    """Print the throughput of the models at each batch size."""
    benches = {model: Bench.of(model) for model in MODELS}
    click.echo("model          threads  batch  ms of a job  jobs in s   faster  range     CPU less")
    for number in threads:
        torch.set_num_threads(number)
        for model, bench in benches.items():
            durations = [{size: bench.measure(size) for size in SIZES} for _ in range(rounds)]
            click.echo("\n".join(table(model, number, durations)))


if __name__ == "__main__":
    main()
