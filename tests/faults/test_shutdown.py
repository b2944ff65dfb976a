"""SIGTERM in every state: no request is lost, no process remains, and the exit code is right."""

import asyncio
import json
import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from consumer.devstack import Daemon
from tests.support.scene import Event, Scene

LONG = 200  # steps; two seconds of the quick model


@pytest.fixture
async def scene(scene: Scene) -> Scene:
    """An installation with leases that outlast every test."""
    jetstream = scene.sender.jetstream()
    stream, name = scene.subjects.requests_stream(scene.task), str(scene.task)
    config = (await jetstream.consumer_info(stream, name)).config
    config.ack_wait = 60.0
    await jetstream.add_consumer(stream, config)
    return scene


def connections(scene: Scene) -> list[str]:
    """Return the names of the NATS connections of workers and lease guards."""
    with urllib.request.urlopen(f"{scene.stack.nats.monitoring_url}/connz") as answer:  # noqa: S310 - loopback
        response: dict[str, Any] = json.load(answer)
    return [
        one.get("name", "")
        for one in response["connections"]
        if "generation" in one.get("name", "")
    ]


def group(pid: int) -> list[int]:
    """Return every process of a worker's process group, including the worker."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == pid:
                    members.append(int(entry.name))
            except ProcessLookupError:
                continue
    return members


async def processes_ended(scene: Scene, worker: Daemon) -> int:
    """Wait until a worker's processes and connections have ended, and return its exit code."""
    code = await scene.exit_code(worker)

    async def nothing_left() -> bool:
        return not group(worker.pid) and not await asyncio.to_thread(connections, scene)

    await scene.until(nothing_left, "end of the worker's processes and connections")
    assert "daemon_stopped" in worker.log_since_start()
    return code


async def finished_by_another_worker(scene: Scene, request_id: str) -> Event:
    """Start another worker, and return the result of a requeued request."""
    assert await scene.events(request_id) == []
    await scene.start()
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 2)
    await scene.until_empty()
    assert len(await scene.keys()) == 1
    return event


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_worker(scene: Scene, number: signal.Signals) -> None:
    worker = await scene.start()
    assert len(group(worker.pid)) == 2, "the worker and its lease_guard"
    worker.signal(number)
    assert await processes_ended(scene, worker) == 0
    assert scene.runs() == []


async def test_sigterm_finishes_the_run_and_starts_no_other(scene: Scene) -> None:
    worker = await scene.start()
    await scene.until_logged(worker, "lease_guard_connected")
    request_id = await scene.submit(steps=LONG)
    waiting = await scene.submit()
    await scene.until_noted("runs")
    os.killpg(worker.pid, signal.SIGTERM)  # as systemd does, and a terminal with Ctrl-C
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 1)
    assert await processes_ended(scene, worker) == 0
    assert "lease_guard_ended" not in worker.log_since_start(), "the lease needs the guard"
    assert scene.runs() == [request_id]
    assert (await scene.pending(), await scene.events(waiting)) == (1, [])


async def test_run_beyond_the_grace_period_is_requeued(scene: Scene) -> None:
    worker = await scene.start(CONSUMER_DRAIN_GRACE="0.1")
    request_id = await scene.submit(steps=LONG)
    await scene.until_noted("runs")
    worker.signal(signal.SIGTERM)
    assert await processes_ended(scene, worker) == 0
    await finished_by_another_worker(scene, request_id)
    assert scene.runs() == [request_id] * 2


async def test_second_signal_requeues_at_once(scene: Scene) -> None:
    worker = await scene.start(CONSUMER_DRAIN_GRACE="600")
    request_id = await scene.submit(steps=LONG)
    await scene.until_noted("runs")
    worker.signal(signal.SIGTERM)
    await scene.until_logged(worker, '"times": 1')
    worker.signal(signal.SIGTERM)
    assert await processes_ended(scene, worker) == 0
    await finished_by_another_worker(scene, request_id)


@pytest.mark.parametrize("signals", [1, 2])
async def test_run_that_ignores_its_cancel_token_is_abandoned(scene: Scene, signals: int) -> None:
    worker = await scene.start(
        "ignores_cancellation", CONSUMER_DRAIN_GRACE="0.1" if signals == 1 else "600"
    )
    request_id = await scene.submit()
    await scene.until_noted("runs")
    for number in range(1, signals + 1):
        worker.signal(signal.SIGTERM)
        await scene.until_logged(worker, f'"times": {number}')  # two at once are one to the kernel
    assert await processes_ended(scene, worker) == 0
    await finished_by_another_worker(scene, request_id)


async def test_upload_within_the_grace_period_finishes_the_job(scene: Scene) -> None:
    worker = await scene.start()
    await asyncio.to_thread(scene.stack.store.kill)
    request_id = await scene.submit()
    await scene.until_logged(worker, "store_unreachable")
    worker.signal(signal.SIGTERM)
    await scene.until_logged(worker, '"times": 1')
    await asyncio.to_thread(scene.stack.store.start)
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 1)
    assert await processes_ended(scene, worker) == 0
    assert scene.runs() == [request_id]
    await scene.until_empty()


async def test_upload_beyond_the_grace_period_is_requeued(scene: Scene) -> None:
    worker = await scene.start(CONSUMER_DRAIN_GRACE="0.1")
    await asyncio.to_thread(scene.stack.store.kill)
    request_id = await scene.submit()
    await scene.until_logged(worker, "store_unreachable")
    worker.signal(signal.SIGTERM)
    assert await processes_ended(scene, worker) == 0
    await asyncio.to_thread(scene.stack.store.start)
    await asyncio.to_thread(scene.stack.store.wait_ready)
    await finished_by_another_worker(scene, request_id)


async def test_draining_worker_exits_during_a_nats_outage(scene: Scene) -> None:
    worker = await scene.start(CONSUMER_DRAIN_GRACE="0.1")
    request_id = await scene.submit(steps=LONG)
    await scene.until_noted("runs")
    await asyncio.to_thread(scene.stack.nats.kill)
    worker.signal(signal.SIGTERM)
    assert await scene.exit_code(worker) == 0
    assert group(worker.pid) == []
    await asyncio.to_thread(scene.stack.nats.start)
    await asyncio.to_thread(scene.stack.nats.wait_ready)
    assert scene.runs() == [request_id]


async def test_sigterm_while_waiting_for_the_servers(scene: Scene) -> None:
    await asyncio.to_thread(scene.stack.nats.kill)
    worker = scene.launch()
    await scene.until_logged(worker, "daemon_starting")
    worker.signal(signal.SIGTERM)
    assert await scene.exit_code(worker) == 0
    assert group(worker.pid) == []
    await asyncio.to_thread(scene.stack.nats.start)
    await asyncio.to_thread(scene.stack.nats.wait_ready)
