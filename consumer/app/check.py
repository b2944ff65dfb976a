"""`consumer check`: test each setting and service that a daemon needs, one after the other."""

import asyncio
import importlib
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from consumer.app.apply import API_WITHIN, CONNECT_WITHIN
from consumer.app.composition import make_artifacts, make_runner, make_topology
from consumer.app.probes import NullObserver
from consumer.app.signing import make_credentials, try_signature
from consumer.artifacts import store_config, with_address
from consumer.bus.connection import (
    Bus,
    connect,
    require_server_version,
    wait_until_available,
)
from consumer.bus.endpoint_connection import connect_endpoints
from consumer.inference.run_queue import RunQueue
from consumer.inference.worker import InferenceWorker
from consumer.ports.media import SigningFailed
from consumer.ports.model import (
    DeviceLost,
    ModelDescription,
    ModelError,
    ModelMisconfigured,
    ModelUnavailable,
    OutOfMemory,
    Runner,
    RunnerOutput,
    RunRequest,
    UnsupportedParameter,
)
from consumer.ports.store import StoreUnavailable
from consumer.ports.unavailable import Unavailable
from consumer.runners.task_settings import runner_spec
from consumer.settings import Settings
from generation_contracts import Task

EXIT_USAGE = 2
EXIT_UNAVAILABLE = 69
EXIT_MODEL_LOST = 70

_SHOWN = 200  # characters of the generated text


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: The checked service or part.
        text: The result, in one line for people.
        exit_code: 0 if the check passed.
    """

    name: str
    text: str
    exit_code: int = 0


async def check(settings: Settings, report: Callable[[Finding], None], *, model: bool) -> int:
    """Run all checks and report each finding.

    Args:
        settings: All settings.
        report: Called with each finding.
        model: Also load the model and generate one output with its defaults.

    Returns:
        The first exit code that is not 0, else 0.

    Raises:
        SettingsError: Settings of the store, the model or Content Credentials are wrong; nothing
            has been checked.
    """
    store_config(settings)
    runner = make_runner(settings) if model else None
    credentials = make_credentials(settings)
    findings: list[Finding] = []
    for service in (_bus, _store):
        for finding in await service(settings):
            findings.append(finding)
            report(finding)
    if credentials is not None:
        findings.append(await _finding("c2pa", partial(try_signature, credentials)))
        report(findings[-1])
    if runner is not None:
        findings += await check_model(runner, settings.task, report)
    return next((finding.exit_code for finding in findings if finding.exit_code), 0)


async def check_model(
    runner: Runner, task: Task, report: Callable[[Finding], None]
) -> list[Finding]:
    """Load the model, generate one output with its defaults, and report the time of both.

    Args:
        runner: The runner, whose model is not loaded yet.
        task: The task of the model.
        report: Called with each finding.

    Returns:
        The reported findings: `model` and, if the model was loaded, `output` and `memory`.
    """
    findings: list[Finding] = []
    queue = RunQueue()

    async def run_check(name: str, work: Callable[[], Awaitable[str]]) -> bool:
        findings.append(await _finding(name, work))
        report(findings[-1])
        return not findings[-1].exit_code

    try:
        inference = InferenceWorker(runner, queue)
        if await run_check("model", lambda: _load(inference)):
            await run_check("output", lambda: _generate(runner, queue, task))
            await run_check("memory", _memory)
            await inference.stop()
    finally:
        queue.close()
    return findings


async def _bus(settings: Settings) -> list[Finding]:
    try:
        bus = await connect(settings, name="generation check", within=CONNECT_WITHIN)
    except Unavailable as error:
        return [Finding("nats", _without_service(str(error)), EXIT_UNAVAILABLE)]
    try:
        connected = await _finding("nats", partial(_server, bus))
        return [connected, await _endpoints(settings), await _streams(settings, bus)]
    finally:
        await bus.close()


async def _server(bus: Bus) -> str:
    require_server_version(bus)
    return f"connected to {bus.server}, version {bus.server_version}"


def _without_service(text: str) -> str:
    """Return a text without the name of the service, which is the name of the finding."""
    return re.sub(r"^NATS: |^S3 at ", "", text)


async def _endpoints(settings: Settings) -> Finding:
    async def connect_once() -> str:
        bus = await connect_endpoints(settings, NullObserver(), within=CONNECT_WITHIN)
        await bus.close()
        return "connected"

    return await _finding("endpoints", connect_once)


async def _streams(settings: Settings, bus: Bus) -> Finding:
    async def read_durable() -> str:
        read = partial(make_topology(settings, bus).verify, settings.queue.name)
        found = await wait_until_available(read, deadline=time.monotonic() + API_WITHIN)
        return (
            f"durable {found.name}: max_ack_pending {found.max_ack_pending}, "
            f"ack_wait {found.ack_wait:g} s"
        )

    return await _finding("streams", read_durable)


async def _store(settings: Settings) -> list[Finding]:
    async def probe() -> str:
        artifacts = make_artifacts(settings, NullObserver())
        try:
            await artifacts.probe()
        except StoreUnavailable as error:
            raise StoreUnavailable(with_address(error, settings.s3_endpoint)) from None
        finally:
            await artifacts.close()
        place = f"{settings.s3_endpoint}, bucket {settings.s3_bucket}"
        text = f"{place}: wrote, read and deleted an object"
        if code := artifacts.refused_checksum:
            text += f"; the store refuses SHA-256 checksums ({code}): uploads are checked by MD5"
        return text

    return [await _finding("s3", probe)]


async def _load(inference: InferenceWorker) -> str:
    start = time.perf_counter()
    model = await inference.start()
    return f"{_description(model)}; loaded in {time.perf_counter() - start:.1f} s"


def _description(model: ModelDescription) -> str:
    defaults = ", ".join(f"{k} {v}" for k, v in model.defaults.items() if v is not None)
    text = (
        f"{model.info.id}: {model.info.family}, {model.info.dtype} on {model.info.device}; "
        f"{_libraries(model)}"
        f"parameters {', '.join(sorted(model.parameters))}; defaults {defaults}"
    )
    if model.size_multiple is not None:
        text += f"; width and height are multiples of {model.size_multiple} pixels"
    if model.max_pixels is not None:
        text += f", at most {model.max_pixels} pixels per image"
    return text


def _libraries(model: ModelDescription) -> str:
    versions = (model.info.libraries or {}).items()
    return ", ".join(f"{name} {version}" for name, version in versions) + "; " if versions else ""


async def _generate(runner: Runner, queue: RunQueue, task: Task) -> str:
    sample = runner_spec(task).sample()
    if sample is None:
        return "loaded and not run: only its author knows a request"
    request, images = sample
    start = time.perf_counter()
    runner.check(request)
    ticket = queue.put()
    queue.mark_ready(ticket, RunRequest(request, images, ticket.progress, lambda: False))
    await ticket.ended
    output = ticket.take()
    made = f"{_summary(output)} in {time.perf_counter() - start:.1f} s"
    return "; ".join((made, *output.warnings))


def _summary(output: RunnerOutput) -> str:
    if output.text is not None:
        text = " ".join(output.text.text.split())
        return f'"{text[:_SHOWN]}", {output.text.completion_tokens} tokens'
    if output.refused:
        return "an output that the safety checker refused"
    sizes = [
        f"{generated.image.width}x{generated.image.height} pixels" for generated in output.images
    ]
    return f"an image of {', '.join(sizes)}"


async def _memory() -> str:
    # Imported here because the module imports torch, which the loaded model has imported already.
    measure: Callable[[], str] = importlib.import_module("consumer.runners.footprint").footprint
    return await asyncio.to_thread(measure)


async def _finding(name: str, work: Callable[[], Awaitable[str]]) -> Finding:
    try:
        return Finding(name, await work())
    except Unavailable as error:
        return Finding(name, _without_service(str(error)), EXIT_UNAVAILABLE)
    except SigningFailed as error:
        return Finding(name, str(error), EXIT_UNAVAILABLE)
    except ModelMisconfigured as error:
        return Finding(name, str(error), EXIT_USAGE)
    except (ModelUnavailable, UnsupportedParameter, OutOfMemory, DeviceLost, ModelError) as error:
        return Finding(name, str(error), EXIT_MODEL_LOST)
