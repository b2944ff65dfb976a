"""`consumer check`: every setting and service that a daemon needs, tried one after the other."""

import asyncio
import importlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from consumer.app.apply import API_WITHIN, CONNECT_WITHIN
from consumer.app.composition import make_artifacts, make_runner, make_topology
from consumer.app.probes import NullObserver
from consumer.bus.connection import Bus, connect, wait_until_available
from consumer.bus.endpoint_connection import connect_endpoints
from consumer.inference.run_queue import RunQueue
from consumer.inference.worker import InferenceWorker
from consumer.ports.model import (
    DeviceLost,
    ModelDescription,
    ModelError,
    ModelUnavailable,
    OutOfMemory,
    Runner,
    RunnerOutput,
    RunRequest,
    UnsupportedParameter,
)
from consumer.ports.unavailable import Unavailable
from consumer.settings import Settings
from generation_contracts import ImageToTextRequest, Request, Task, TextToImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

EXIT_UNAVAILABLE = 69
EXIT_MODEL_LOST = 70

_PROMPT = "a small red star on a white background at the top"
_QUESTION = "Describe this picture."
_SIDE = 224  # pixels of the picture that is described
_SHOWN = 200  # characters of the text


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        exit_code: 0 when it is well.
    """

    what: str
    said: str
    exit_code: int = 0


async def check(settings: Settings, report: Callable[[Finding], None], *, model: bool) -> int:
    """Try everything, telling each finding as it comes.

    Args:
        settings: All of them.
        report: Called with each finding.
        model: Also load the model, and make one output with its defaults.

    Returns:
        The first exit code that is not 0, else 0.
    """
    findings = [*await _bus(settings), await _store(settings)]
    for finding in findings:
        report(finding)
    if model:
        findings += await check_model(settings, report)
    return next((finding.exit_code for finding in findings if finding.exit_code), 0)


async def check_model(settings: Settings, report: Callable[[Finding], None]) -> list[Finding]:
    """Load the model, make one output with its defaults, tell what both took.

    Args:
        settings: Which model, and how.
        report: Called with each finding.

    Returns:
        What was reported: of the model and, if it could be loaded, of its output and the memory.
    """
    findings: list[Finding] = []
    queue = RunQueue()

    async def tell(what: str, look: Callable[[], Awaitable[str]]) -> bool:
        findings.append(await _tried(what, look))
        report(findings[-1])
        return not findings[-1].exit_code

    try:
        runner = make_runner(settings)
        inference = InferenceWorker(runner, queue)
        if await tell("model", lambda: _loaded(inference)):
            await tell("output", lambda: _made(runner, queue, settings.task))
            await tell("memory", _held)
            await inference.stop()
    finally:
        queue.close()
    return findings


async def _bus(settings: Settings) -> list[Finding]:
    try:
        bus = await connect(settings, name="generation check", within=CONNECT_WITHIN)
    except Unavailable as error:
        return [Finding("nats", str(error), EXIT_UNAVAILABLE)]
    try:
        version = bus.client.connected_server_version
        connected = Finding("nats", f"connected, server {version}")
        return [connected, await _endpoints(settings), await _streams(settings, bus)]
    finally:
        await bus.close()


async def _endpoints(settings: Settings) -> Finding:
    async def look() -> str:
        bus = await connect_endpoints(settings, NullObserver(), within=CONNECT_WITHIN)
        await bus.close()
        return "connected"

    return await _tried("endpoints", look)


async def _streams(settings: Settings, bus: Bus) -> Finding:
    async def look() -> str:
        looking = partial(make_topology(settings, bus).verify, settings.task)
        found = await wait_until_available(looking, deadline=time.monotonic() + API_WITHIN)
        return (
            f"durable {found.name}: max_ack_pending {found.max_ack_pending}, "
            f"ack_wait {found.ack_wait:g} s"
        )

    return await _tried("streams", look)


async def _store(settings: Settings) -> Finding:
    async def look() -> str:
        artifacts = make_artifacts(settings, NullObserver())
        try:
            await artifacts.probe()
        finally:
            await artifacts.close()
        found = f"bucket {settings.s3_bucket}: wrote, read and deleted an object"
        if code := artifacts.refused_checksum:
            found += f"; the store takes no SHA-256 ({code}): uploads are checked by MD5"
        return found

    return await _tried("s3", look)


async def _loaded(inference: InferenceWorker) -> str:
    start = time.perf_counter()
    model = await inference.start()
    return f"{_described(model)}; loaded in {time.perf_counter() - start:.1f} s"


def _described(model: ModelDescription) -> str:
    defaults = ", ".join(f"{k} {v}" for k, v in model.defaults.items() if v is not None)
    said = (
        f"{model.info.id}: {model.info.family}, {model.info.dtype} on {model.info.device}; "
        f"takes {', '.join(sorted(model.parameters))}; defaults {defaults}"
    )
    if model.size_multiple is not None:
        said += f"; sides are multiples of {model.size_multiple} pixels"
    if model.max_pixels is not None:
        said += f", at most {model.max_pixels} pixels in all"
    return said


async def _made(runner: Runner, queue: RunQueue, task: Task) -> str:
    request, images = _asked(task)
    start = time.perf_counter()
    runner.check(request)
    ticket = queue.put()
    queue.mark_ready(ticket, RunRequest(request, images, ticket.progress, lambda: False))
    await ticket.ended
    output = ticket.take()
    return f"{_summary(output)} in {time.perf_counter() - start:.1f} s"


def _asked(task: Task) -> tuple[Request, list["Image"]]:
    if task is Task.TEXT_TO_IMAGE:
        return TextToImageRequest(prompt=_PROMPT), []
    from PIL import Image, ImageDraw  # noqa: PLC0415 - the other checks need no pictures

    picture = Image.new("RGB", (_SIDE, _SIDE), "white")
    box = [_SIDE // 4, _SIDE // 4, 3 * _SIDE // 4, 3 * _SIDE // 4]
    ImageDraw.Draw(picture).ellipse(box, fill="red")
    # A request names its pictures; the runner is given this one.
    return ImageToTextRequest(prompt=_QUESTION, images=("s3://check/picture.png",)), [picture]


def _summary(output: RunnerOutput) -> str:
    if output.text is not None:
        text = " ".join(output.text.text.split())
        return f'"{text[:_SHOWN]}", {output.text.completion_tokens} tokens'
    sizes = [f"{made.image.width}x{made.image.height} pixels" for made in output.images]
    return f"a picture of {', '.join(sizes)}"


async def _held() -> str:
    # Imports torch: once the model has done so anyway.
    measure: Callable[[], str] = importlib.import_module("consumer.runners.footprint").footprint
    return await asyncio.to_thread(measure)


async def _tried(what: str, look: Callable[[], Awaitable[str]]) -> Finding:
    try:
        return Finding(what, await look())
    except Unavailable as error:
        return Finding(what, str(error), EXIT_UNAVAILABLE)
    except (ModelUnavailable, UnsupportedParameter, OutOfMemory, DeviceLost, ModelError) as error:
        return Finding(what, str(error), EXIT_MODEL_LOST)
