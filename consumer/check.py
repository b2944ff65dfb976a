"""`consumer check`: every setting and service that a daemon needs, tried one after the other."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from consumer.apply import CONNECT_WITHIN
from consumer.bus import Bus, connect
from consumer.composition import make_artifacts, make_runner, make_topology
from consumer.ports import ModelUnavailable, Unavailable
from consumer.probes import Unwatched
from consumer.runners.thread import InferenceThread
from consumer.settings import Settings

EXIT_UNAVAILABLE = 69
EXIT_MODEL_LOST = 70


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
        model: Also load the model.

    Returns:
        The first exit code that is not 0, else 0.
    """
    findings = [*await _bus(settings), await _store(settings)]
    for finding in findings:
        report(finding)
    if model:
        findings.append(await _model(settings))
        report(findings[-1])
    return next((finding.exit_code for finding in findings if finding.exit_code), 0)


async def _bus(settings: Settings) -> list[Finding]:
    try:
        bus = await connect(settings, name="generation check", within=CONNECT_WITHIN)
    except Unavailable as error:
        return [Finding("nats", str(error), EXIT_UNAVAILABLE)]
    try:
        version = bus.client.connected_server_version
        return [Finding("nats", f"connected, server {version}"), await _streams(settings, bus)]
    finally:
        await bus.close()


async def _streams(settings: Settings, bus: Bus) -> Finding:
    async def look() -> str:
        found = await make_topology(settings, bus).look(settings.task)
        return (
            f"durable {found.name}: max_ack_pending {found.max_ack_pending}, "
            f"ack_wait {found.ack_wait:g} s"
        )

    return await _tried("streams", look)


async def _store(settings: Settings) -> Finding:
    async def look() -> str:
        artifacts = make_artifacts(settings, Unwatched())
        try:
            await artifacts.probe()
        finally:
            await artifacts.close()
        return f"bucket {settings.s3_bucket}: wrote, read and deleted an object"

    return await _tried("s3", look)


async def _model(settings: Settings) -> Finding:
    async def look() -> str:
        inference = InferenceThread()
        try:
            runner = make_runner(settings)
            model = await inference.call(runner.load)
            await inference.call(runner.close)
        finally:
            inference.close()
        defaults = ", ".join(f"{k} {v}" for k, v in model.defaults.items() if v is not None)
        return (
            f"{model.info.id}: {model.info.family}, {model.info.dtype} on {model.info.device}; "
            f"takes {', '.join(sorted(model.parameters))}; defaults {defaults}"
        )

    return await _tried("model", look)


async def _tried(what: str, look: Callable[[], Awaitable[str]]) -> Finding:
    try:
        return Finding(what, await look())
    except Unavailable as error:
        return Finding(what, str(error), EXIT_UNAVAILABLE)
    except ModelUnavailable as error:
        return Finding(what, str(error), EXIT_MODEL_LOST)
