"""Latency of request-reply, progress and cancellation: `python -m tests.bench.callers`.

Uses real servers, one daemon process and a model that takes no time, or 10 ms a step for
cancellations. Alternatives are measured in turn, because the speed of a machine drifts.
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
from consumer.inference.cancel_token import CancelToken
from consumer.inference.monitor import follow_run
from consumer.inference.progress import Progress, Update
from consumer.inference.run_queue import Ticket
from consumer.ports.model import RunnerOutput
from tests.support.scene import Scene

WITHIN = 30.0  # seconds
STEP = 0.0005  # seconds of each step


async def call_seconds(scene: Scene, **fields: Any) -> float:
    """Return the seconds from a call of the request-reply endpoint to its reply."""
    began = time.perf_counter()
    body = json.dumps({"prompt": "a", **fields}).encode()
    reply = await scene.sender.request(scene.subjects.call(scene.task), body, timeout=WITHIN)
    seconds = time.perf_counter() - began
    assert json.loads(reply.data)["type"] == "generation.v1.succeeded"
    return seconds


async def publish_seconds(scene: Scene, **fields: Any) -> float:
    """Return the seconds from a publish to the reply with the result."""
    inbox = scene.sender.new_inbox()
    replies = await scene.sender.subscribe(inbox)
    began = time.perf_counter()
    body = json.dumps({"prompt": "a", "reply_to": inbox, **fields}).encode()
    subject = scene.subjects.request(scene.task, uuid4().hex)
    await scene.sender.jetstream().publish(subject, body)
    await replies.next_msg(timeout=WITHIN)
    seconds = time.perf_counter() - began
    await replies.unsubscribe()
    return seconds


async def cancelled(scene: Scene) -> tuple[float, float]:
    """Return the seconds from a cancellation to its reply and to the terminal event."""
    request_id = uuid4().hex
    results = await scene.sender.subscribe(scene.subjects.result(scene.task, request_id))
    progress_events = await scene.sender.subscribe(scene.subjects.progress(scene.task, request_id))
    body = json.dumps({"prompt": "a", "num_inference_steps": 200}).encode()
    await scene.sender.jetstream().publish(scene.subjects.request(scene.task, request_id), body)
    await progress_events.next_msg(timeout=WITHIN)  # started
    await progress_events.next_msg(timeout=WITHIN)  # a step
    began = time.perf_counter()
    reply = await scene.sender.request(scene.subjects.cancel(request_id), b"", timeout=WITHIN)
    replied = time.perf_counter() - began
    assert json.loads(reply.data)["status"] == "stopping"
    await results.next_msg(timeout=WITHIN)
    freed = time.perf_counter() - began
    await results.unsubscribe()
    await progress_events.unsubscribe()
    return replied, freed


async def cancelled_in_the_queue(scene: Scene, waiting: int) -> float:
    """Return the seconds from a cancellation to its reply with this number of queued requests."""
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
    reply = await scene.sender.request(
        scene.subjects.cancel(ids[waiting // 2]), b"", timeout=WITHIN
    )
    seconds = time.perf_counter() - began
    assert json.loads(reply.data)["status"] == "cancelled"
    return seconds


def stepping(steps: int, on_step: Any) -> float:
    """Return the seconds of a run whose steps hold the GIL."""
    began = time.perf_counter()
    for step in range(1, steps + 1):
        until = time.perf_counter() + STEP
        while time.perf_counter() < until:
            pass
        on_step(step, steps)
    return time.perf_counter() - began


async def monitored(steps: int) -> float:
    """Return the seconds of the same run with the daemon's monitor, which encodes an event."""
    ticket = Ticket()
    ticket.progress.begin()

    async def publish(update: Update) -> None:
        json.dumps({"step": update.step, "each": update.seconds_per_step})

    run = asyncio.ensure_future(asyncio.to_thread(stepping, steps, ticket.progress.step))
    run.add_done_callback(lambda _: ticket.finish(RunnerOutput()))
    await follow_run(ticket, CancelToken(), stall_timeout=60.0, publish=publish)
    return await run


def report(name: str, values: list[float]) -> None:
    """Print the median and the 95th percentile in milliseconds."""
    ordered = sorted(values)
    slow = ordered[int(len(ordered) * 0.95)]
    click.echo(
        f"{name:<58} p50 {statistics.median(values) * 1000:7.2f} ms   p95 {slow * 1000:7.2f} ms"
    )


async def measure(folder: Path, number: int, waiting: int) -> None:
    """Measure everything and print one line each."""
    with DevStack(folder / "stack", persist=False) as stack:
        async with AsyncExitStack() as parts:
            scene = Scene(stack, folder, parts)
            await scene.open()
            await scene.start()
            await call_seconds(scene)
            pairs = [
                (await call_seconds(scene, width=64), await publish_seconds(scene, width=64))
                for _ in range(number)
            ]
            report("request-reply call to its reply", [one for one, _ in pairs])
            report("publish to its reply", [other for _, other in pairs])
            added = statistics.median(one - other for one, other in pairs)
            click.echo(f"{'the request-reply endpoint adds':<58} p50 {added * 1000:7.2f} ms")
            cancellations = [await cancelled(scene) for _ in range(number // 4)]
            report(
                "cancel of a running request (steps of 10 ms) to the reply",
                [a for a, _ in cancellations],
            )
            report(
                "cancel of a running request to its terminal event", [b for _, b in cancellations]
            )
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
        ratios.append((await monitored(2_000)) / alone)
    click.echo(
        f"{'2,000 steps of 0.5 ms, with the monitor over without (5 pairs)':<58} "
        f"{min(ratios):.3f} to {max(ratios):.3f}"
    )
    progress = Progress()
    began = time.perf_counter()
    for step in range(1_000_000):
        progress.step(step, 1_000_000)
    click.echo(f"{'on_step itself':<58}     {(time.perf_counter() - began):7.3f} µs")


@click.command()
@click.option("--number", default=200, show_default=True, help="of calls")
@click.option("--waiting", default=20_000, show_default=True, help="requests in the queue")
def main(number: int, waiting: int) -> None:
    """Print the latencies of callers."""
    with tempfile.TemporaryDirectory(prefix="callers-") as folder:
        asyncio.run(measure(Path(folder), number, waiting))


if __name__ == "__main__":
    main()
