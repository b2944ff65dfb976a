"""Three workers on a NATS cluster of three servers, of which one is killed under load."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from consumer.app.probes import NullObserver
from consumer.bus.connection import connect
from consumer.bus.publishing import JetStreamEvents
from consumer.devstack import NatsServer
from consumer.ports.unavailable import Unavailable
from generation_contracts import CancelledEvent
from generation_contracts.examples import EVENTS
from tests.faults.cluster import Cluster, ClusterScene, cluster
from tests.integration.bus_installation import bus_settings
from tests.support.observations import assert_all_ready, succeeded
from tests.support.quick_runner import STARTED
from tests.support.scene import Scene

REQUESTS = 90
BEFORE = 20  # started runs before the server is killed
AFTER = 20  # runs that start before the server returns
WORKERS = 3
WITHIN = 60.0  # seconds; an election takes up to ten


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[ClusterScene]:
    with cluster(tmp_path / "servers") as servers:
        async with AsyncExitStack() as parts:
            folder = tmp_path / "marks"
            folder.mkdir()
            cluster_scene = ClusterScene(servers, folder, parts)  # type: ignore[arg-type] # as a stack
            await scene_is_open(cluster_scene, servers)
            yield cluster_scene


async def scene_is_open(scene: ClusterScene, servers: Cluster) -> None:
    """Create the streams when the cluster is ready."""

    async def has_leader() -> bool:
        return bool(await asyncio.to_thread(servers.meta_leader))

    async def applied() -> bool:
        try:
            await scene.apply()
        except Unavailable:  # the cluster has no leader yet
            return False
        return True

    await scene.until(has_leader, "a leader of the cluster", WITHIN)
    await scene.until(applied, "a cluster that makes streams", WITHIN)
    await scene.open()


def runs(scene: Scene) -> int:
    return len(scene.notes("runs"))


async def submit_with_retries(scene: Scene, request_id: str) -> None:
    """Publish until the request is stored: the server may be killed meanwhile."""

    async def stored() -> bool:
        try:
            await scene.submit(request_id=request_id, steps=10)
        except Exception:  # noqa: BLE001 - nats-py raises many kinds here
            return False
        return True

    await scene.until(stored, f"acknowledgement of {request_id}", WITHIN)


def longest_gap(scene: Scene) -> float:
    """Return the longest time between two starts of runs, in seconds."""
    times = sorted(float(line.split()[1]) for line in scene.notes(STARTED))
    return max(later - sooner for sooner, later in pairwise(times))


@pytest.mark.parametrize("victim", ["leader of the queue", "leader of the cluster"])
async def test_killed_server_under_load_loses_no_request(scene: ClusterScene, victim: str) -> None:
    servers: Cluster = scene.stack  # type: ignore[assignment]
    queue = scene.subjects.requests_stream(scene.task)
    await scene.apply(consumer_max_ack_pending=str(WORKERS))
    workers = [scene.launch(CONSUMER_JOBS_IN_FLIGHT="1") for _ in range(WORKERS)]
    for worker in workers:
        await asyncio.to_thread(worker.wait_ready)
    ids = [f"r{number}" for number in range(REQUESTS)]
    submitting = asyncio.create_task(submit_all(scene, ids))

    await scene.until(lambda: has_runs(scene, BEFORE), "the first runs", WITHIN)
    name = await scene.leader(queue) if "queue" in victim else servers.meta_leader()
    killed: NatsServer = servers.nodes[name]
    at = time.monotonic()
    await asyncio.to_thread(killed.kill)
    then = runs(scene)
    await scene.until(lambda: has_runs(scene, then + AFTER), "runs without it", WITHIN)
    print(f"{victim}: {AFTER} runs began within {time.monotonic() - at:.1f} s of its death")  # noqa: T201
    await asyncio.to_thread(killed.start)
    await asyncio.to_thread(killed.wait_ready)

    await submitting
    for request_id in ids:
        assert (await succeeded(scene, request_id))["type"] == "generation.v1.succeeded"
    await scene.until(lambda: all_acknowledged(scene), "acknowledgement of everything", WITHIN)
    await assert_all_ready(scene, *workers)
    again = sum(times - 1 for times in Counter(scene.runs()).values())
    print(f"longest gap {longest_gap(scene):.1f} s, run twice {again}")  # noqa: T201
    assert set(scene.runs()) == set(ids)
    assert again <= WORKERS, "only requests in flight may run again"


async def test_concurrent_workers_store_one_result(scene: ClusterScene) -> None:
    """A replicated stream may refuse an event while it stores another event."""
    bus = await connect(bus_settings(scene.stack.nats.url), name="test", within=WITHIN)
    writable_states: list[bool] = []

    class Watching(NullObserver):
        def bus_writable(self, writable: bool, reason: str = "") -> None:
            writable_states.append(writable)

    async def ensure() -> None:
        """Everything is there."""

    events = JetStreamEvents(bus, scene.subjects, ensure=ensure, observer=Watching())
    event_template = EVENTS["cancelled"]
    assert isinstance(event_template, CancelledEvent)
    try:
        for request_id in ("r-1", "r-2"):
            copies = [
                event_template.model_copy(update={"worker": f"w-{n}", "request_id": request_id})
                for n in range(30)
            ]
            stored = await asyncio.gather(
                *(events.publish_result(event, trace_parent=None) for event in copies)
            )
            assert all(event == stored[0] for event in stored)
            assert await events.find_result(event_template.task, request_id) == stored[0]
            assert len(await scene.events(request_id)) == 1 or event_template.task != scene.task
    finally:
        await bus.close()
    assert writable_states == [], "this error does not mean that the stream is full"


async def all_acknowledged(scene: Scene) -> bool:
    """Return whether the durable has no pending and no unacknowledged messages.

    The stream's count is not used. After its leader was killed, a server can keep a message below
    the durable's acknowledgement floor. The server removes it later without a redelivery.
    """
    stream = scene.subjects.requests_stream(scene.task)
    info = await scene.sender.jetstream().consumer_info(stream, str(scene.task))
    assert info.ack_floor is not None
    nothing = not info.num_pending and not info.num_ack_pending
    return nothing and info.ack_floor.stream_seq >= REQUESTS


async def submit_all(scene: Scene, ids: list[str]) -> None:
    for request_id in ids:
        await submit_with_retries(scene, request_id)


async def has_runs(scene: Scene, number: int) -> bool:
    return runs(scene) >= number
