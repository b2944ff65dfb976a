"""The object store fails in every known way, for longer than a lease.

In each test the worker keeps the output and the lease, and /readyz reports the reason. The worker
uploads the output when the store is available again. The model runs once, and there is one
terminal event.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus

import pytest
from nats.errors import TimeoutError as BusTimeout

from consumer.devstack import Daemon
from tests.integration.fault_proxy import (
    Fault,
    FaultProxy,
    HoldsHalfway,
    cuts_halfway,
    drips,
    for_checksums,
    for_writing,
    is_silent,
    refuses,
    says,
)
from tests.support.observations import (
    assert_all_ready,
    assert_queue_empty,
    readiness,
    succeeded,
    until_not_ready,
)
from tests.support.scene import ACK_WAIT, WITHIN, Scene

LASTS = ACK_WAIT * 1.25  # seconds of a fault; a lease without renewals has expired by then
UNAVAILABLE = 69  # the exit code for a service that cannot be used

LARGE = {"width": 1_700, "height": 1_700}  # 8.7 MB: half of it is more than one piece in the store

# What servers say when nothing more fits: MinIO, and Ceph of a quota. They still answer readers.
FULL: dict[str, tuple[Fault, str]] = {
    "507 XMinioStorageFull": (
        for_writing(refuses("507 Insufficient Storage", "XMinioStorageFull")),
        "S3: the store cannot do it now (XMinioStorageFull)",
    ),
    "403 QuotaExceeded": (
        for_writing(refuses("403 Forbidden", "QuotaExceeded")),
        "S3: the store refuses (QuotaExceeded)",
    ),
}
FAILS: dict[str, tuple[Fault, str]] = {
    "silent": (is_silent, "S3: no answer in time"),
    "drip": (drips, "S3: no complete answer in time"),
    "503": (refuses("503 Slow Down", "SlowDown"), "S3: the store cannot do it now (SlowDown)"),
    "200 without ETag": (says("200 OK"), "S3: the answer has no ETag"),
    **FULL,
}
DENIES = refuses("403 Forbidden", "AccessDenied")


@pytest.fixture
async def proxy(scene: Scene) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(scene.stack.store.ports["s3.port"]) as running:
        yield running


async def start(scene: Scene, proxy: FaultProxy, cause: str) -> Daemon:
    """Start a worker with the proxy between the worker and the store."""
    return await scene.start(cause, S3_ENDPOINT=proxy.endpoint)


def denied(scene: Scene) -> str:
    place = f"{scene.stack.store.bucket}/{scene.subjects.root}/*"
    return f'S3: access is denied; reading and writing "{place}" is needed'


async def until_store_fails(scene: Scene, worker: Daemon, endpoint: str, reason: str) -> None:
    """Return once a worker is not ready for this reason, which is reported with the address."""
    reported = reason.replace("S3: ", f"S3 at {endpoint}: ")
    await until_not_ready(scene, worker, store=reported)


async def assert_lease_is_kept(scene: Scene, worker: Daemon, request_id: str) -> None:
    """Wait during the fault, and check that the worker keeps the lease and the output."""
    durable, stream = str(scene.task), scene.subjects.requests_stream(scene.task)
    other = await scene.sender.jetstream().pull_subscribe_bind(durable=durable, stream=stream)
    with pytest.raises(BusTimeout):  # another consumer pulls during the whole time
        await other.fetch(1, timeout=LASTS)
    await other.unsubscribe()
    status, conditions = await readiness(worker)
    assert status == HTTPStatus.SERVICE_UNAVAILABLE
    assert conditions["store"].startswith("S3 at http://127.0.0.1:")
    assert await scene.events(request_id) == []
    assert scene.runs() == [request_id]


async def assert_recovered(scene: Scene, worker: Daemon, request_id: str) -> None:
    """Check that the output is stored once, and that the next request succeeds."""
    first = await succeeded(scene, request_id)
    assert first["attempt"] == 1
    next_id = await scene.submit()
    second = await succeeded(scene, next_id)
    assert (second["worker"], second["attempt"]) == (first["worker"], 1)
    await assert_queue_empty(scene, request_id, next_id)
    assert scene.runs() == [request_id, next_id]
    await assert_all_ready(scene, worker)
    log = worker.log.read_text()
    for secret in (scene.stack.store.secret_key, scene.stack.store.access_key, "X-Amz"):
        assert secret not in log


async def assert_survives(
    scene: Scene,
    proxy: FaultProxy,
    fault: Fault,
    reason: str,
    cause: str = "short_store_timeouts",
    **fields: int,
) -> None:
    worker = await start(scene, proxy, cause)
    proxy.otherwise = fault
    request_id = await scene.submit(**fields)
    await until_store_fails(scene, worker, proxy.endpoint, reason)
    await assert_lease_is_kept(scene, worker, request_id)
    assert await scene.keys() == set()
    proxy.heal()
    await assert_recovered(scene, worker, request_id)


@pytest.mark.parametrize("name", FAILS)
async def test_failing_store_only_delays_the_result(
    scene: Scene, proxy: FaultProxy, name: str
) -> None:
    await assert_survives(scene, proxy, *FAILS[name])


async def test_temporary_access_denial_only_delays_the_result(
    scene: Scene, proxy: FaultProxy
) -> None:
    await assert_survives(scene, proxy, DENIES, denied(scene))


async def test_interrupted_uploads_only_delay_the_result(scene: Scene, proxy: FaultProxy) -> None:
    await assert_survives(scene, proxy, cuts_halfway, "S3: the connection broke", "noise", **LARGE)


async def test_refused_connections_only_delay_the_result(scene: Scene, proxy: FaultProxy) -> None:
    worker = await start(scene, proxy, "short_store_timeouts")
    proxy.refuse()
    request_id = await scene.submit()
    await until_store_fails(scene, worker, proxy.endpoint, "S3: no connection")
    await assert_lease_is_kept(scene, worker, request_id)
    await proxy.listen()
    await assert_recovered(scene, worker, request_id)


async def test_store_killed_during_an_upload_only_delays_the_result(
    scene: Scene, proxy: FaultProxy
) -> None:
    worker = await start(scene, proxy, "noise")
    upload = HoldsHalfway()
    proxy.faults.append(upload)
    request_id = await scene.submit(**LARGE)
    await asyncio.wait_for(upload.reached.wait(), timeout=WITHIN)
    store = scene.stack.store
    await asyncio.to_thread(store.kill)
    await until_store_fails(scene, worker, proxy.endpoint, "S3: the connection broke")
    await assert_lease_is_kept(scene, worker, request_id)
    await asyncio.to_thread(store.start)
    await asyncio.to_thread(store.wait_ready)
    await assert_recovered(scene, worker, request_id)


@pytest.mark.parametrize("fault", [FULL["507 XMinioStorageFull"][0], DENIES], ids=["full", "403"])
async def test_readable_store_does_not_hide_a_waiting_upload(
    scene: Scene, proxy: FaultProxy, fault: Fault
) -> None:
    """A full store still serves read requests."""
    worker = await start(scene, proxy, "frequent_store_checks")
    proxy.otherwise = fault
    request_id = await scene.submit()
    statuses: list[int] = []
    uploads = f"PUT /{scene.stack.store.bucket}/{scene.subjects.root}/{scene.task}/".encode()

    async def tried_several_times() -> bool:
        attempts = sum(head.startswith(uploads) for head in proxy.heads)
        if attempts > 1:  # no readiness check from before the first attempt is still in progress
            statuses.append((await readiness(worker))[0])
        return attempts > 8

    await scene.until(tried_several_times, "retries of the upload")
    assert set(statuses) == {HTTPStatus.SERVICE_UNAVAILABLE}
    proxy.heal()
    await succeeded(scene, request_id)
    await assert_all_ready(scene, worker)


# -- a store without checksums --------------------------------------------------------------------


async def test_store_without_checksums_gets_outputs(scene: Scene, proxy: FaultProxy) -> None:
    proxy.otherwise = for_checksums(refuses("501 Not Implemented", "NotImplemented"))
    worker = await start(scene, proxy, "short_store_timeouts")
    await succeeded(scene, await scene.submit())
    await assert_all_ready(scene, worker)
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    (line,) = (line for line in lines if line["event"] == "store_without_checksums")
    assert line["code"] == "NotImplemented"


# -- at the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"S3_SECRET_KEY": "not-the-secret-at-all"}, "S3: the secret key is wrong"),
        ({"S3_ACCESS_KEY": "unknown-key"}, "S3: the access key is not known"),
        (
            {"S3_BUCKET": "no-such-bucket"},
            'S3: the bucket "no-such-bucket" does not exist; create it with consumer apply',
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
async def test_unusable_store_ends_the_start_with_one_line(
    scene: Scene, settings: dict[str, str], reason: str
) -> None:
    await scene.submit()
    worker = scene.launch(**settings)
    assert await scene.exit_code(worker) == UNAVAILABLE
    log = worker.log.read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    (line,) = (line for line in lines if line["level"] == "error")
    reported = line["reason"].replace(f" at {scene.stack.store.endpoint}", "")
    assert (line["event"], reported) == ("service_unavailable", reason)
    for secret in (scene.stack.store.secret_key, scene.stack.store.access_key, *settings.values()):
        assert not secret or secret in reason or secret not in log
    durable = await scene.sender.jetstream().consumer_info(
        scene.subjects.requests_stream(scene.task), str(scene.task)
    )
    assert durable.delivered is not None
    assert (durable.delivered.consumer_seq, durable.num_pending) == (0, 1)


async def test_request_moves_to_another_worker_if_the_store_is_lost(
    scene: Scene, proxy: FaultProxy
) -> None:
    """The requeue is not an attempt, and the worker takes no request until the store answers."""
    lost = await start(scene, proxy, "short_handover_delay")
    proxy.otherwise = refuses("503 Service Unavailable", "SlowDown")
    request_id = await scene.submit()
    await scene.until_logged(lost, "store_unavailable")
    other = await scene.start(CONSUMER_WORKER="other")
    event = await scene.event(request_id)
    assert (event["type"], event["worker"]) == ("generation.v1.succeeded", "other")
    second = await scene.submit()
    assert (await scene.event(second))["worker"] == "other"
    assert await scene.dead_letters() == []
    await assert_all_ready(scene, other)
