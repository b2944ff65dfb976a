"""The whole daemon with its servers: round trip, cancellation, busy device, a killed worker."""

import asyncio
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from consumer.app.apply import apply
from consumer.devstack import Daemon, DevStack
from consumer.settings import Settings
from generation_client import GenerationClient
from generation_client.client import new_request_id
from generation_contracts import (
    CancelledEvent,
    ProgressEvent,
    SucceededEvent,
    Task,
    TextToImageRequest,
)
from tests.gpu.check import Check
from tests.support.forked import ForkedStack

ACK_WAIT = 3.0  # seconds; a killed worker's request is delivered again after it
WITHIN = 60.0  # seconds; only bounds a wait for something that must happen
_BUSY = re.compile(r"^generation_device_busy_seconds_total(?:{[^}]*})? (\S+)$", re.MULTILINE)


def run(check: Check) -> None:
    """Start servers and a worker, and send requests as a client does."""
    # A process that uses CUDA cannot be forked; elsewhere that saves the import of the libraries.
    kind = DevStack if check.device == "cuda" else ForkedStack
    with tempfile.TemporaryDirectory() as folder, kind(Path(folder), persist=False) as stack:
        asyncio.run(_run(check, stack))


async def _run(check: Check, stack: DevStack) -> None:
    settings = {
        **stack.environment(),
        "MODEL_TYPE": str(Task.TEXT_TO_IMAGE),
        "MODEL_DEVICE": check.device,
        "CONSUMER_ACK_WAIT": str(ACK_WAIT),
        "CONSUMER_MAX_ACK_PENDING": "2",
    }
    await apply(Settings(**{name.lower(): value for name, value in settings.items()}))  # type: ignore[arg-type]
    began = time.monotonic()
    worker = stack.start_daemon("first", settings)
    await asyncio.to_thread(worker.wait_ready)
    check.row("start of a worker", time.monotonic() - began, "s")
    async with GenerationClient(stack.nats.url) as client:
        with check.part("round trip"):
            await _measure_round_trip(check, client)
        with check.part("device busy"):
            await _measure_busy(check, client, worker)
        with check.part("cancellation"):
            await _measure_cancellation(check, client)
        with check.part("killed worker"):
            await _kill(check, client, worker, stack, settings)


async def _measure_round_trip(check: Check, client: GenerationClient) -> None:
    seconds = []
    for seed in range(20 if check.full else 2):
        began = time.monotonic()
        await client.text_to_image("a red circle", seed=seed)
        seconds.append(time.monotonic() - began)
    check.row("round trip of one image, median", statistics.median(seconds) * 1000, "ms")


async def _measure_busy(check: Check, client: GenerationClient, worker: Daemon) -> None:
    """Keep two requests in flight for a while."""
    steps, number = (200, 10) if check.full else (16, 4)
    before, began = await _busy_seconds(worker), time.monotonic()
    requests = [
        client.text_to_image("a red circle", seed=seed, num_inference_steps=steps)
        for seed in range(number)
    ]
    await asyncio.gather(*requests)
    wall = time.monotonic() - began
    share = (await _busy_seconds(worker) - before) / wall
    # The first upload and the last one are outside of the runs.
    check.row(
        f"device busy with two in flight, {number} jobs",
        share,
        ok=share > 0.9 if check.full else share > 0.3,
        note=f"{wall / number * 1000:.0f} ms a job",
    )


async def _busy_seconds(worker: Daemon) -> float:
    def read() -> str:
        url = f"{worker.probes_url}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - the worker's own
            return str(response.read().decode())

    found = _BUSY.search(await asyncio.to_thread(read))
    if found is None:
        raise AssertionError("the metric of the busy device is missing")
    return float(found[1])


async def _measure_cancellation(check: Check, client: GenerationClient) -> None:
    seconds = []
    for _ in range(5 if check.full else 1):
        async with _running(check, client) as (request_id, result):
            began = time.monotonic()
            await client.cancel(request_id)
            event = await asyncio.wait_for(result, WITHIN)
            seconds.append(time.monotonic() - began)
            cancelled = isinstance(event, CancelledEvent)
            check.row("cancelled while it runs", event.type, ok=cancelled)
    check.row("from the cancellation to the event, median", statistics.median(seconds) * 1000, "ms")


async def _kill(
    check: Check,
    client: GenerationClient,
    worker: Daemon,
    stack: DevStack,
    settings: dict[str, str],
) -> None:
    second = stack.start_daemon("second", settings)
    async with _running(check, client) as (_, result):
        worker.kill()
        began = time.monotonic()
        await asyncio.to_thread(second.wait_ready)
        event = await asyncio.wait_for(result, 2 * WITHIN)
        check.row(
            "request of a killed worker: its result",
            event.type,
            ok=isinstance(event, SucceededEvent) and event.attempt == 2,
            note=f"attempt {event.attempt}, {time.monotonic() - began:.1f} s after the kill",
        )


@asynccontextmanager
async def _running(
    check: Check, client: GenerationClient
) -> AsyncIterator["tuple[str, asyncio.Task[Any]]"]:
    """Submit a long request, and enter the block after its first step.

    Yields:
        The request id, and a task that returns the terminal event.
    """
    request_id, steps = new_request_id(), 200 if check.full else 40
    request = TextToImageRequest(
        prompt="a red circle", request_id=request_id, num_inference_steps=steps
    )
    runs = asyncio.Event()

    async def follow() -> Any:
        async with aclosing(client.events(request)) as events:
            async for event in events:
                if isinstance(event, ProgressEvent):
                    runs.set()
        return event

    result = asyncio.create_task(follow())
    try:
        await asyncio.wait_for(runs.wait(), WITHIN)
        yield request_id, result
    finally:
        result.cancel()
