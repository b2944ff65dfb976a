"""What the front door, progress and cancellation cost: `python -m tests.bench.callers`.

Real servers, one real daemon process, a model that takes no time (or 10 ms a step for what is
cancelled). Ways are compared in turn within one run, because a machine's speed drifts.
"""

import asyncio
import json
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import click

from consumer.devstack import DevStack
from consumer.run import Interrupt, Steps, watch
from tests.support.scene import Scene

WITHIN = 30.0  # seconds
STEP = 0.0005  # seconds of a step that computes


async def called(scene: Scene, **fields: Any) -> float:
    """Seconds from a call of the front door to its answer."""
    began = time.perf_counter()
    body = json.dumps({"prompt": "a", **fields}).encode()
    answer = await scene.sender.request(scene.subjects.call(scene.task), body, timeout=WITHIN)
    seconds = time.perf_counter() - began
    assert json.loads(answer.data)["type"] == "generation.v1.succeeded"
    return seconds


async def published(scene: Scene, **fields: Any) -> float:
    """Seconds from a publish by hand to the same answer."""
    inbox = scene.sender.new_inbox()
    answers = await scene.sender.subscribe(inbox)
    began = time.perf_counter()
    body = json.dumps({"prompt": "a", "reply_to": inbox, **fields}).encode()
    subject = scene.subjects.request(scene.task, uuid4().hex)
    await scene.sender.jetstream().publish(subject, body)
    await answers.next_msg(timeout=WITHIN)
    seconds = time.perf_counter() - began
    await answers.unsubscribe()
    return seconds


async def cancelled(scene: Scene) -> tuple[float, float]:
    """Seconds from a cancellation to its reply, and to the event that says the device is free."""
    request_id = uuid4().hex
    results = await scene.sender.subscribe(scene.subjects.result(scene.task, request_id))
    news = await scene.sender.subscribe(scene.subjects.progress(scene.task, request_id))
    body = json.dumps({"prompt": "a", "num_inference_steps": 200}).encode()
    await scene.sender.jetstream().publish(scene.subjects.request(scene.task, request_id), body)
    await news.next_msg(timeout=WITHIN)  # started
    await news.next_msg(timeout=WITHIN)  # a step
    began = time.perf_counter()
    answer = await scene.sender.request(scene.subjects.cancel(request_id), b"", timeout=WITHIN)
    replied = time.perf_counter() - began
    assert json.loads(answer.data)["status"] == "stopping"
    await results.next_msg(timeout=WITHIN)
    freed = time.perf_counter() - began
    await results.unsubscribe()
    await news.unsubscribe()
    return replied, freed


async def cancelled_in_the_queue(scene: Scene, waiting: int) -> float:
    """Seconds from a cancellation to its reply, with so many other requests in the queue."""
    jetstream = scene.sender.jetstream()
    body = b'{"prompt":"a"}'
    ids = [uuid4().hex for _ in range(waiting)]
    for first in range(0, waiting, 500):
        await asyncio.gather(
            *(
                jetstream.publish(scene.subjects.request(scene.task, one), body)
                for one in ids[first : first + 500]
            )
        )
    began = time.perf_counter()
    answer = await scene.sender.request(
        scene.subjects.cancel(ids[waiting // 2]), b"", timeout=WITHIN
    )
    seconds = time.perf_counter() - began
    assert json.loads(answer.data)["status"] == "cancelled"
    return seconds


def stepping(steps: int, on_step: Any) -> float:
    """Seconds of a run in a thread whose steps compute and hold the interpreter's lock."""
    began = time.perf_counter()
    for step in range(1, steps + 1):
        until = time.perf_counter() + STEP
        while time.perf_counter() < until:
            pass
        on_step(step, steps)
    return time.perf_counter() - began


async def watched(steps: int) -> float:
    """The same, watched as the daemon does, with an event made and encoded each time."""
    steps_seen = Steps()

    async def publish() -> None:
        json.dumps({"step": steps_seen.position[0], "each": steps_seen.seconds_per_step()})

    run = asyncio.ensure_future(asyncio.to_thread(stepping, steps, steps_seen))
    seconds: Any = await watch(
        run,  # type: ignore[arg-type] # it gives a time instead of pictures
        steps=steps_seen,
        interrupt=Interrupt(),
        stall_timeout=60.0,
        publish=publish,
    )
    return float(seconds)


def told(name: str, values: list[float]) -> None:
    """One line: median and the slowest of twenty, in milliseconds."""
    ordered = sorted(values)
    slow = ordered[int(len(ordered) * 0.95)]
    click.echo(
        f"{name:<58} p50 {statistics.median(values) * 1000:7.2f} ms   p95 {slow * 1000:7.2f} ms"
    )


async def measure(folder: Path, number: int, waiting: int) -> None:
    """Everything, one line each."""
    with DevStack(folder / "stack", persist=False) as stack:
        async with AsyncExitStack() as parts:
            scene = Scene(stack, folder, parts)
            await scene.open()
            await scene.start()
            await called(scene)
            pairs = [
                (await called(scene, width=64), await published(scene, width=64))
                for _ in range(number)
            ]
            told("call of the front door to its answer", [one for one, _ in pairs])
            told("publish by hand to the same answer", [other for _, other in pairs])
            added = statistics.median(one - other for one, other in pairs)
            click.echo(f"{'the front door adds':<58} p50 {added * 1000:7.2f} ms")
            stopped = [await cancelled(scene) for _ in range(number // 4)]
            told(
                "cancel of a running request (steps of 10 ms) to the reply", [a for a, _ in stopped]
            )
            told("the same to the event: the device is free", [b for _, b in stopped])
        async with AsyncExitStack() as parts:
            scene = Scene(stack, folder / "queue", parts)
            scene.folder.mkdir()
            await scene.open()
            await scene.start("held_in_run")
            seconds = await cancelled_in_the_queue(scene, waiting)
            click.echo(
                f"{f'cancel with {waiting} requests waiting':<58}     {seconds * 1000:7.2f} ms"
            )
    ratios = []
    for _ in range(5):
        alone = await asyncio.to_thread(stepping, 2_000, lambda *_: None)
        ratios.append((await watched(2_000)) / alone)
    click.echo(
        f"{'2,000 steps of 0.5 ms, watched over alone (5 pairs)':<58} "
        f"{min(ratios):.3f} to {max(ratios):.3f}"
    )
    steps = Steps()
    began = time.perf_counter()
    for step in range(1_000_000):
        steps(step, 1_000_000)
    click.echo(f"{'on_step itself':<58}     {(time.perf_counter() - began):7.3f} µs")


@click.command()
@click.option("--number", default=200, show_default=True, help="of calls")
@click.option("--waiting", default=20_000, show_default=True, help="requests in the queue")
def main(number: int, waiting: int) -> None:
    """Print what callers wait for."""
    with tempfile.TemporaryDirectory(prefix="callers-") as folder:
        asyncio.run(measure(Path(folder), number, waiting))


if __name__ == "__main__":
    main()
