"""`python -m tests.bench.memory`: whether a worker grows with the jobs that it has done.

One real worker process gets jobs of which half go wrong, ten at a time. After each ten it is idle,
and looked at from outside; the slope over all looks is what a job leaves behind.
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
from generation_contracts.requests import MAX_METADATA, MAX_PROMPT
from tests.bench.mishaps import OUT_OF_MEMORY, OUT_OF_MEMORY_ONCE, RAISES
from tests.support.scene import Scene

CAUSE = "memory"
WITHIN = 60.0  # seconds for one group of jobs
WIDE = "\N{LARGE RED CIRCLE}"  # four bytes, on the wire and in Python
LONGEST = 512  # characters of one entry of the metadata
LONG_AGO = "2020-01-01T00:00:00Z"


@dataclass(frozen=True)
class Look:
    """A worker from outside, with the processes that it has started.

    Attributes:
        jobs: How many it has had so far.
        resident: KB that are not of files: the kernel takes and gives those as it likes.
    """

    jobs: int
    resident: int
    open_files: int
    threads: int


async def measure(scene: Scene, jobs: int) -> list[Look]:
    """Give a new worker so many jobs, or a few more; a look after each group of them."""
    worker = await scene.start(CAUSE)
    looks: list[Look] = []
    done = uuid.uuid4().hex
    await scene.submit(request_id=done)
    sent = 1
    while sent < jobs:
        group = list(_group(done))
        for body in group:
            await scene.publish(body)
        sent += len(group)
        await scene.until_empty(WITHIN)
        looks.append(look(worker, sent))
    return looks


def look(worker: Daemon, jobs: int) -> Look:
    """What the kernel says of a worker now; Linux only."""
    processes = [Path(f"/proc/{pid}") for pid in (worker.pid, *_children(worker.pid))]
    status = [_status(process) for process in processes]
    return Look(
        jobs=jobs,
        resident=sum(int(one["RssAnon"].removesuffix("kB")) for one in status),
        open_files=sum(len(list((process / "fd").iterdir())) for process in processes),
        threads=sum(int(one["Threads"]) for one in status),
    )


def slope(looks: list[Look]) -> float:
    """KB that a job leaves behind, by least squares."""
    return linear_regression([look.jobs for look in looks], [look.resident for look in looks]).slope


def _group(done: str) -> Iterator[bytes]:
    """Jobs that go well and jobs that go wrong.

    All are as large as they may be, so that a request or an event that is kept shows too.
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
    """Measure and print."""
    looks = asyncio.run(_measure(jobs))
    counted = [look for look in looks if look.jobs > warm_up]
    click.echo(f"{'jobs':>6} {'resident KB':>12} {'open files':>11} {'threads':>8}")
    for one in looks[:: max(1, len(looks) // 20)]:
        click.echo(f"{one.jobs:>6} {one.resident:>12} {one.open_files:>11} {one.threads:>8}")
    click.echo(f"{slope(counted):.3f} KB a job after the first {warm_up}")


async def _measure(jobs: int) -> list[Look]:
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
