"""The probes over real HTTP: readiness, liveness and metrics."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from structlog.testing import capture_logs

from consumer.app.metrics import Metrics
from consumer.app.probes import LOG_INTERVAL, MAX_LOGGED_REASONS, Probes, Telemetry
from consumer.telemetry import JobReport


@pytest.fixture
def telemetry() -> Telemetry:
    """Return the telemetry of a daemon that is ready."""
    ready = Telemetry(Metrics("text_to_image"))
    ready.health.bus_connected = lambda: True
    ready.health.durable_present = lambda: True
    ready.health.model_loaded = True
    ready.store_reachable(reachable=True)
    return ready


@pytest.fixture
async def http(telemetry: Telemetry) -> AsyncIterator[aiohttp.ClientSession]:
    probes = Probes(telemetry, host="127.0.0.1", port=0)
    await probes.start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{probes.port}") as session:
        yield session
    await probes.close()


async def readiness(http: aiohttp.ClientSession) -> tuple[int, dict[str, str]]:
    async with http.get("/readyz") as answer:
        return answer.status, {k: v for k, v in (await answer.json()).items() if v != "ok"}


async def test_the_daemon_is_ready_if_every_condition_is_true(http: aiohttp.ClientSession) -> None:
    assert await readiness(http) == (200, {})
    async with http.get("/livez") as answer:
        assert (answer.status, await answer.text()) == (200, "ok\n")


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("bus_connected", lambda: False, {"bus": "not connected"}),
        ("durable_present", lambda: False, {"durable": "not present"}),
        ("model_loaded", False, {"model": "not loaded"}),
        ("draining", True, {"daemon": "draining"}),
    ],
    ids=["bus", "durable", "model", "draining"],
)
async def test_a_false_condition_is_reported_and_the_daemon_is_alive(
    http: aiohttp.ClientSession,
    telemetry: Telemetry,
    attribute: str,
    value: object,
    reason: dict[str, str],
) -> None:
    setattr(telemetry.health, attribute, value)
    assert await readiness(http) == (503, reason)
    async with http.get("/livez") as answer:
        assert answer.status == 200


async def test_the_daemon_is_not_ready_while_the_store_is_unreachable(
    http: aiohttp.ClientSession, telemetry: Telemetry
) -> None:
    telemetry.store_reachable(reachable=False, reason="S3: no connection")
    assert await readiness(http) == (503, {"store": "S3: no connection"})
    telemetry.store_reachable(reachable=True)
    assert await readiness(http) == (200, {})


async def test_a_lost_device_is_neither_ready_nor_alive(
    http: aiohttp.ClientSession, telemetry: Telemetry
) -> None:
    telemetry.health.device_lost = True
    assert await readiness(http) == (503, {"device": "lost"})
    async with http.get("/livez") as answer:
        assert answer.status == 503


async def test_the_metrics_have_jobs_stages_and_the_device(
    http: aiohttp.ClientSession, telemetry: Telemetry
) -> None:
    telemetry.job_started()
    telemetry.device_busy(1.5)
    telemetry.job_finished(
        JobReport("succeeded", 2, queued=0.1, inference=1.5, encode=0.2, upload=0.3)
    )
    telemetry.job_started()
    async with http.get("/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        lines = set((await answer.text()).splitlines())
    task = 'queue="text_to_image",task="text_to_image"'
    assert {
        f'generation_jobs_total{{outcome="succeeded",{task}}} 1.0',
        f"generation_redelivered_jobs_total{{{task}}} 1.0",
        f"generation_jobs_in_flight{{{task}}} 1.0",
        f"generation_device_busy_seconds_total{{{task}}} 1.5",
        f"generation_queue_wait_seconds_sum{{{task}}} 0.1",
        f"generation_inference_seconds_sum{{{task}}} 1.5",
        f"generation_encode_seconds_sum{{{task}}} 0.2",
        f"generation_upload_seconds_sum{{{task}}} 0.3",
        f"generation_store_reachable{{{task}}} 1.0",
    } <= lines


async def test_the_metrics_have_each_condition_of_readiness(
    http: aiohttp.ClientSession, telemetry: Telemetry
) -> None:
    telemetry.store_reachable(reachable=False, reason="S3: no connection")
    telemetry.bus_writable(writable=False, reason="GENERATION_RESULTS: maximum bytes exceeded")
    telemetry.health.draining = True
    async with http.get("/readyz") as answer:
        assert (await answer.json())["streams"] == "GENERATION_RESULTS: maximum bytes exceeded"
    async with http.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    prefix = "generation_ready_condition{"
    assert {line.removeprefix(prefix) for line in lines if line.startswith(prefix)} == {
        f'condition="{condition}",queue="text_to_image",task="text_to_image"}} {holds}'
        for condition, holds in {
            "bus": 1.0,
            "durable": 1.0,
            "streams": 0.0,
            "store": 0.0,
            "model": 1.0,
            "device": 1.0,
            "daemon": 0.0,
        }.items()
    }


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc here")
async def test_the_metrics_have_the_resources_of_the_process(http: aiohttp.ClientSession) -> None:
    async with http.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    metrics = {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines[1:] if "#" not in line)
    }
    assert metrics["process_resident_memory_bytes"] > 10_000_000
    assert abs(metrics["process_start_time_seconds"] - time.time()) < 24 * 3600


OK = ""  # the reason of a reachable store


@pytest.mark.parametrize(
    ("sequence", "logged"),
    [
        (["full"] * 3 + ["away"], [("full", 0), ("away", 0)]),
        (["full", "away"] * 5, [("full", 0), ("away", 0)]),
        (["full", OK] * 5, [("full", 0), OK]),  # reads succeed and writes fail
    ],
    ids=["repeated", "alternating", "with successes"],
)
def test_each_reason_of_the_store_is_logged_once_per_interval(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch, sequence: list[str], logged: list[object]
) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def lines() -> list[object]:
        with capture_logs() as logs:
            for reason in sequence:
                telemetry.store_reachable(reachable=not reason, reason=reason)
        return [OK if "reason" not in line else (line["reason"], line["unlogged"]) for line in logs]

    assert lines() == logged
    now += LOG_INTERVAL
    unlogged = {reason: sequence.count(reason) - 1 for reason in set(sequence)}
    assert lines() == [OK if line == OK else (line[0], unlogged[line[0]]) for line in logged]
    for number in range(MAX_LOGGED_REASONS):  # the number of stored reasons is bounded
        telemetry.store_reachable(reachable=False, reason=str(number))
    assert lines() == logged


def test_recovery_is_logged_after_each_logged_failure(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with capture_logs() as logs:
        for _ in range(2):
            telemetry.store_reachable(reachable=False, reason="full")
            telemetry.store_reachable(reachable=True)
            now += LOG_INTERVAL
    assert [line["event"] for line in logs] == ["store_unreachable", "store_reachable"] * 2
