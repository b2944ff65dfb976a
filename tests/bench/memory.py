"""Memory growth of a worker with the number of its jobs: `python -m tests.bench.memory`.

One worker process gets jobs in groups of ten, half of which fail. After each group the worker is
idle and its memory is measured. The slope over all samples is the growth for each job.
"""

import asyncio
import json
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

import click

from consumer.devstack import Daemon, DevStack
from generation_contracts.fields import MAX_METADATA, MAX_PROMPT
from tests.bench.mishaps import OUT_OF_MEMORY, OUT_OF_MEMORY_ONCE, RAISES
from tests.support.scene import Scene

CAUSE = "memory"
WITHIN = 60.0  # seconds for one group of jobs
WIDE = "\N{LARGE RED CIRCLE}"  # four bytes, on the wire and in Python
LONGEST = 512  # characters of one entry of the metadata
LONG_AGO = "2020-01-01T00:00:00Z"


@dataclass(frozen=True)
class Sample:
    """A measurement of a worker and its child processes.

    Attributes:
        jobs: Number of jobs so far.
        resident: KB of anonymous memory. The kernel frees file pages at any time.
    """

    jobs: int
    resident: int
    open_files: int
    threads: int


async def measure(scene: Scene, jobs: int) -> list[Sample]:
    """Send jobs to a new worker; return a sample after each group."""
    worker = await scene.start(CAUSE)
    samples: list[Sample] = []
    done = uuid.uuid4().hex
    await scene.submit(request_id=done)
    sent = 1
    while sent < jobs:
        group = list(_group(done))
        for body in group:
            await scene.publish(body)
        sent += len(group)
        await scene.until_empty(WITHIN)
        samples.append(sample(worker, sent))
    return samples


def sample(worker: Daemon, jobs: int) -> Sample:
    """Measure a worker with /proc; Linux only."""
    processes = [Path(f"/proc/{pid}") for pid in (worker.pid, *_children(worker.pid))]
    status = [_status(process) for process in processes]
    return Sample(
        jobs=jobs,
        resident=sum(int(one["RssAnon"].removesuffix("kB")) for one in status),
        open_files=sum(len(list((process / "fd").iterdir())) for process in processes),
        threads=sum(int(one["Threads"]) for one in status),
    )


def slope(samples: list[Sample]) -> float:
    """Return the growth in KB for each job, by least squares."""
    return linear_regression([one.jobs for one in samples], [one.resident for one in samples]).slope


def _group(done: str) -> Iterator[bytes]:
    """Yield jobs that succeed and jobs that fail.

    All have the maximum size, so that a leaked request or event is visible.
    """

    def body(prompt: str, **fields: Any) -> bytes:
        content = {
            "prompt": prompt.ljust(MAX_PROMPT, WIDE),
            "request_id": uuid.uuid4().hex,
            "metadata": {str(number): WIDE * LONGEST for number in range(MAX_METADATA)},
            "num_inference_steps": 1,
        }
        return json.dumps(content | fields, ensure_ascii=False).encode()

    yield body("succeeds ")
    yield body("succeeds ", num_images=2)
    yield body("succeeds ", output_format="webp")
    yield body("succeeds ", output_format="jpeg")
    yield body(f"{RAISES} ")
    yield body(f"{OUT_OF_MEMORY_ONCE} ")
    yield body(f"{OUT_OF_MEMORY} ")
    yield body("invalid ", colour="red")
    yield body("late ", deadline=LONG_AGO)
    yield body("conflict ", request_id=done)


def _children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def _status(process: Path) -> dict[str, str]:
    lines = (line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {name: text.strip() for name, text in lines}


@click.command()
@click.option("--jobs", default=2000, show_default=True, help="The more, the surer the slope.")
@click.option("--warm-up", default=300, show_default=True, help="Jobs that do not count.")
def main(jobs: int, warm_up: int) -> None:
    """Measure and print the samples."""
    samples = asyncio.run(_measure(jobs))
    counted = [one for one in samples if one.jobs > warm_up]
    click.echo(f"{'jobs':>6} {'resident KB':>12} {'open files':>11} {'threads':>8}")
    for one in samples[:: max(1, len(samples) // 20)]:
        click.echo(f"{one.jobs:>6} {one.resident:>12} {one.open_files:>11} {one.threads:>8}")
    click.echo(f"{slope(counted):.3f} KB a job after the first {warm_up}")


async def _measure(jobs: int) -> list[Sample]:
    with (
        tempfile.TemporaryDirectory() as name,
        DevStack(Path(name) / "servers", persist=False) as stack,
    ):
        async with AsyncExitStack() as parts:
            scene = Scene(stack, Path(name), parts)
            await scene.open()
            return await measure(scene, jobs)


if __name__ == "__main__":
    main()
