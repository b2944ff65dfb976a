"""The pull loop on a real server: deliveries, lost servers and durables, and requeues."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest

from consumer.bus import connection, delivery, pull
from consumer.bus.connection import BusUnavailable
from consumer.ports.bus import Delivery
from tests.conftest import InstallationOf, StartNats
from tests.integration.bus_installation import (
    MUTE,
    REQUESTS,
    RESULTS,
    TASK,
    Installation,
    Worker,
    measured,
    soon,
    take,
    until,
    until_connected,
    until_lost,
)
from tests.support.relay import Relay

ROUNDS = 50
CLOSE_ROUNDS = 150  # without requeues at close, one in 18 rounds lost its request
MAX_ITERATIONS = 15  # of the event loop: a worker closes within this number
QUICK = 0.2  # seconds; an idle heartbeat for tests that wait for a heartbeat timeout


def shorten_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the heartbeat timeout to half a second, and disable the pings of nats-py."""
    monkeypatch.setattr(pull, "IDLE_HEARTBEAT", QUICK)
    monkeypatch.setattr(pull, "HEARTBEAT_TIMEOUT", 2.5 * QUICK)
    monkeypatch.setattr(connection, "PING_INTERVAL", 1_000)


def disable_heartbeat_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only a reconnect or a stop wake the loop."""
    monkeypatch.setattr(pull, "HEARTBEAT_TIMEOUT", 1_000.0)


async def waiting(installation: Installation, worker: Worker) -> "asyncio.Task[Delivery | None]":
    """Let a worker wait for a request; return when the server has its pull request."""
    task: asyncio.Task[Delivery | None] = asyncio.create_task(worker.loop.next())
    await installation.until_pulls_wait(1)
    return task


async def taken(task: "asyncio.Task[Delivery | None]") -> Delivery:
    delivery = await soon(task)
    assert delivery is not None
    return delivery


async def publish_after(installation: Installation, iterations: int) -> None:
    """Publish after a number of iterations of the event loop."""
    for _ in range(iterations):
        await asyncio.sleep(0)
    await installation.publish()


# -- delivering -----------------------------------------------------------------------------------


async def test_a_request_is_delivered_as_it_was_published(installation: Installation) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    sequence = await installation.publish(
        b'{"prompt":"x"}', request_id="r-1", headers={"Trace": "abc"}
    )

    delivered: Delivery = await take(await installation.worker())

    assert delivered.body == b'{"prompt":"x"}'
    assert delivered.subject == "generation.request.text_to_image.r-1"
    assert delivered.headers == {"Trace": "abc"}
    assert (delivered.stream, delivered.stream_sequence) == (REQUESTS, sequence)
    assert delivered.attempt == 1
    assert delivered.stored_at.tzinfo is UTC
    assert before < delivered.stored_at < datetime.now(UTC) + timedelta(seconds=1)


async def test_requests_are_delivered_in_order_and_deleted_after_the_ack(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    for n in range(20):
        await installation.publish(b"%d" % n)
    started = time.monotonic()
    for n in range(20):
        delivered = await take(worker)
        assert delivered.body == b"%d" % n
        await delivered.ack()
    measured("20 requests delivered and acked", time.monotonic() - started)
    assert await installation.count(REQUESTS) == 0


async def test_a_waiting_worker_gets_a_request_immediately(installation: Installation) -> None:
    worker = await installation.worker()
    latencies = []
    for _ in range(30):
        task = await waiting(installation, worker)
        started = time.monotonic()
        await installation.publish()
        delivered = await taken(task)
        latencies.append(time.monotonic() - started)
        await delivered.ack()
    latencies.sort()
    measured("publish to delivery, median", latencies[15])
    measured("publish to delivery, longest", latencies[-1])


@pytest.mark.parametrize("at_once", [1, 2])
async def test_max_ack_pending_limits_the_jobs_of_all_workers_together(
    start_nats: StartNats, installation_of: InstallationOf, at_once: int
) -> None:
    installation = await installation_of(start_nats(), max_ack_pending=at_once)
    jobs = 30
    in_flight: set[int] = set()
    most = done = 0
    limit_reached = asyncio.Event()  # set when the maximum of jobs is in flight

    async def work(worker: Worker) -> None:
        nonlocal most, done
        while (delivered := await worker.loop.next()) is not None:
            in_flight.add(delivered.stream_sequence)
            most = max(most, len(in_flight))
            if len(in_flight) == at_once:
                limit_reached.set()
            await limit_reached.wait()
            in_flight.remove(delivered.stream_sequence)
            await delivered.ack()
            done += 1
            if done == jobs:
                for each in workers:
                    each.loop.stop()

    workers = [await installation.worker() for _ in range(3)]
    working = [asyncio.create_task(work(worker)) for worker in workers]
    for _ in range(jobs):
        await installation.publish()
    await soon(asyncio.gather(*working))

    assert most == at_once
    assert await installation.count(REQUESTS) == 0


async def test_a_worker_waits_for_a_paused_durable(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_heartbeats(monkeypatch)
    until_tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    await installation.api(f"CONSUMER.PAUSE.{REQUESTS}.{TASK}", {"pause_until": until_tomorrow})
    worker = await installation.worker()
    await installation.publish()
    task = await waiting(installation, worker)
    pulls = worker.loop._pulls
    await asyncio.wait({task}, timeout=5 * QUICK)
    assert not task.done()
    assert worker.loop._pulls == pulls, "a paused durable sends heartbeats"
    assert worker.loop.attached

    await installation.api(f"CONSUMER.PAUSE.{REQUESTS}.{TASK}", {})
    assert (await taken(task)).attempt == 1


# -- pausing --------------------------------------------------------------------------------------


async def test_a_paused_loop_pulls_nothing_until_it_is_resumed(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_heartbeats(monkeypatch)
    monkeypatch.setattr(pull, "EXPIRES", 1.0)
    worker = await installation.worker()
    task = await waiting(installation, worker)
    worker.loop.pause()
    await installation.until_pulls_wait(0)  # the pull request expires
    await installation.publish()
    # Long enough for a heartbeat timeout.
    await asyncio.wait({task}, timeout=5 * pull.HEARTBEAT_TIMEOUT)
    assert not task.done()
    assert worker.bus.connection == 0, "a paused loop ignores missing heartbeats"
    assert (await installation.consumer_info()).num_pending == 1

    worker.loop.resume()
    assert (await taken(task)).attempt == 1


async def test_a_pull_request_from_before_the_pause_still_delivers(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    task = await waiting(installation, worker)
    worker.loop.pause()
    await installation.publish(b"first")
    assert (await taken(task)).body == b"first"
    task = asyncio.create_task(worker.loop.next())
    await installation.publish(b"second")
    await asyncio.wait({task}, timeout=QUICK)
    assert not task.done()
    worker.loop.stop()
    assert await soon(task) is None


async def test_a_foreign_message_on_the_inbox_of_the_pull_is_ignored(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    task = await waiting(installation, worker)
    inbox = worker.loop._current
    for reply in ("", "$JS.ACK.junk", "$JS.ACK.S.C.one.2.3.4.5", f"$JS.ACK.S.C.1.2.3.{'9' * 40}.5"):
        await installation.plain.publish(inbox, b"junk", reply=reply)
    await installation.plain.flush()
    await installation.publish()
    assert (await taken(task)).attempt == 1
    assert worker.loop._pulls == 1
    assert worker.loop.attached


# -- the server restarts --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
async def test_an_idle_worker_gets_requests_after_a_restart_of_the_server(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    disable_heartbeat_timeout(monkeypatch)
    worker = await installation.worker()
    task = await waiting(installation, worker)

    await (installation.kill_server() if how == "SIGKILL" else installation.stop_server())
    returned = await installation.start_server()
    await installation.publish_on_a_new_connection(b"after")

    delivered = await taken(task)
    measured(f"server's return to the next request, after {how}", time.monotonic() - returned)
    assert (delivered.body, delivered.attempt) == (b"after", 1)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
async def test_a_request_that_was_queued_before_the_restart_is_delivered(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    disable_heartbeat_timeout(monkeypatch)
    holder, worker = await installation.worker(), await installation.worker()
    await installation.publish(b"first")
    first = await take(holder)
    await installation.publish(b"second")
    task = await waiting(installation, worker)

    await (installation.kill_server() if how == "SIGKILL" else installation.stop_server())
    settling = asyncio.create_task(first.ack())
    returned = await installation.start_server()

    delivered = await taken(task)
    measured(f"server's return to a queued request, after {how}", time.monotonic() - returned)
    await soon(settling)
    if how == "SIGKILL" and delivered.body == b"first":  # a killed server may not know its delivery
        await delivered.ack()
        delivered = await take(worker)
    assert (delivered.body, delivered.attempt) == (b"second", 1)


async def test_a_restart_while_a_job_is_in_progress_causes_no_redelivery(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(b"first")
    first = await take(worker)
    await installation.stop_server()
    await installation.start_server()
    await until_connected(worker.bus)
    await soon(first.ack())

    await installation.publish_on_a_new_connection(b"second")
    second = await take(worker)
    assert (second.body, second.attempt) == (b"second", 1)


async def test_a_lost_pull_request_is_sent_again(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_heartbeats(monkeypatch)
    monkeypatch.setattr(pull, "MAX_HEARTBEAT_TIMEOUTS", 10**9)
    worker = await installation.worker()
    worker.loop._is_pull_pending = True  # the server has no pull request
    worker.loop._last_message_at = time.monotonic()
    task = await waiting(installation, worker)
    await installation.publish()
    await taken(task)


async def test_a_refused_pull_request_is_sent_again(installation: Installation) -> None:
    durable = (await installation.api(f"CONSUMER.INFO.{REQUESTS}.{TASK}"))["config"]
    shorter = {
        **durable,
        "max_expires": 1_000_000_000,
    }  # nanoseconds; the pull requests of the loop last longer
    update = f"CONSUMER.CREATE.{REQUESTS}.{TASK}"
    await installation.api(update, {"stream_name": REQUESTS, "config": shorter})
    worker = await installation.worker()
    task = asyncio.create_task(worker.loop.next())

    async def detached() -> bool:
        return not worker.loop.attached

    await until(detached)
    await installation.publish()
    await installation.api(update, {"stream_name": REQUESTS, "config": durable})
    await taken(task)
    assert worker.loop.attached


async def test_a_connection_that_loses_all_bytes_is_replaced(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_heartbeats(monkeypatch)
    async with Relay(installation.server.ports["client"]) as relay:
        worker = await installation.worker(f"nats://{relay.address}")
        task = await waiting(installation, worker)

        reconnected = asyncio.Event()
        worker.bus.on_reconnect(reconnected.set)

        relay.swallow()
        started = time.monotonic()
        await soon(reconnected.wait())
        await installation.publish()

        await taken(task)
        measured(
            f"a lost connection to the next request, with heartbeats of {QUICK} s",
            time.monotonic() - started,
        )
        worker.loop.stop()
        await worker.loop.close()
        await worker.bus.close()


async def test_a_worker_reconnects_to_a_server_that_was_frozen(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_heartbeats(monkeypatch)
    worker = await installation.worker()
    task = await waiting(installation, worker)

    reconnected = asyncio.Event()
    worker.bus.on_reconnect(reconnected.set)

    with installation.frozen():
        await until_lost(worker.bus)
    resumed = time.monotonic()
    await soon(reconnected.wait())
    await installation.publish()

    await taken(task)
    measured("a frozen server's return to the next request", time.monotonic() - resumed)


# -- the durable or the stream is deleted ---------------------------------------------------------


async def test_a_durable_deleted_while_the_worker_is_idle_is_recreated(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    disable_heartbeat_timeout(monkeypatch)
    worker = await installation.worker()
    task = await waiting(installation, worker)

    await installation.api(f"CONSUMER.DELETE.{REQUESTS}.{TASK}")
    deleted = time.monotonic()
    await installation.publish()

    assert (await taken(task)).attempt == 1
    measured("a deleted durable to the next request", time.monotonic() - deleted)
    assert worker.loop.attached


async def test_a_durable_deleted_while_a_job_is_in_progress_is_recreated(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    await installation.publish(b"first")
    await take(worker)
    await installation.publish(b"second")
    await installation.api(f"CONSUMER.DELETE.{REQUESTS}.{TASK}")

    again = await take(worker)
    assert again.body == b"first", "the new durable has no deliveries"
    await again.ack()
    assert (await take(worker)).body == b"second"


async def test_a_stream_deleted_while_the_worker_is_idle_is_recreated(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    task = await waiting(installation, worker)

    await installation.api(f"STREAM.DELETE.{REQUESTS}")
    deleted = time.monotonic()

    async def recreated() -> bool:
        answer = await installation.plain.request(f"$JS.API.STREAM.INFO.{REQUESTS}", timeout=5)
        return b'"error"' not in answer.data

    await until(recreated)
    await installation.publish(b"after")
    assert (await taken(task)).body == b"after"
    measured("a deleted stream to the next request", time.monotonic() - deleted)


async def test_the_worker_is_detached_while_the_durable_cannot_be_created(
    installation: Installation,
) -> None:
    worker = await installation.worker()
    task = await waiting(installation, worker)
    assert worker.loop.attached

    results = (await installation.api(f"STREAM.INFO.{RESULTS}"))["config"]
    await installation.api(f"STREAM.UPDATE.{RESULTS}", {**results, "allow_direct": False})
    await installation.api(f"CONSUMER.DELETE.{REQUESTS}.{TASK}")

    async def detached() -> bool:
        return not worker.loop.attached

    await until(detached)
    await installation.api(f"STREAM.UPDATE.{RESULTS}", results)
    await installation.publish()
    await taken(task)
    assert worker.loop.attached


# -- stopping -------------------------------------------------------------------------------------


async def test_stop_ends_an_idle_wait(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    disable_heartbeat_timeout(monkeypatch)
    worker = await installation.worker()
    task = await waiting(installation, worker)
    started = time.monotonic()
    worker.loop.stop()
    assert await soon(task) is None
    measured("stop", time.monotonic() - started)
    assert await soon(worker.loop.next()) is None


async def test_stop_ends_a_wait_while_the_server_is_down(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    disable_heartbeat_timeout(monkeypatch)
    worker = await installation.worker()
    task = await waiting(installation, worker)
    await installation.kill_server()
    worker.loop.stop()
    assert await soon(task) is None
    started = time.monotonic()
    await soon(worker.loop.close())
    measured("close without a server", time.monotonic() - started)


async def test_a_request_published_after_close_goes_to_another_worker(
    installation: Installation,
) -> None:
    other = await installation.worker()
    for _ in range(ROUNDS):
        worker = await installation.worker()
        task = await waiting(installation, worker)
        worker.loop.stop()
        assert await soon(task) is None
        await soon(worker.loop.close())

        await installation.publish()
        delivered = await take(other)
        assert delivered.attempt == 1
        await delivered.ack()
        await worker.bus.close()


async def test_a_request_published_during_close_goes_to_another_worker(
    installation: Installation,
) -> None:
    """With an ack_wait of 60 s, a request that the closing worker loses fails this test."""
    other = await installation.worker()
    requeued = 0
    for round_number in range(CLOSE_ROUNDS):
        worker = await installation.worker()
        task = await waiting(installation, worker)
        worker.loop.stop()
        assert await soon(task) is None
        await soon(
            asyncio.gather(
                worker.loop.close(), publish_after(installation, round_number % MAX_ITERATIONS)
            )
        )

        delivered = await take(other)
        assert delivered.attempt <= 2
        requeued += delivered.attempt == 2
        await delivered.ack()
        await worker.bus.close()
    print(f"{requeued} of {CLOSE_ROUNDS} requests were delivered to the closing worker")  # noqa: T201


async def test_close_requeues_a_delivery_that_no_job_has_taken(
    installation: Installation,
) -> None:
    worker, other = await installation.worker(), await installation.worker()
    await worker.loop._pull()
    await installation.publish()

    async def received() -> bool:
        return (await installation.consumer_info()).num_ack_pending == 1

    await until(received)
    await soon(worker.loop.close())
    assert not worker.loop._requeuing, "the connection may be closed after this"
    assert (await take(other)).attempt == 2


async def test_close_does_not_wait_for_a_frozen_server(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_heartbeats(monkeypatch)
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT", QUICK)
    worker = await installation.worker()
    task = await waiting(installation, worker)
    with installation.frozen():
        worker.loop.stop()
        assert await soon(task) is None
        started = time.monotonic()
        await worker.loop.close()
        measured("close with a frozen server", time.monotonic() - started)
        started = time.monotonic()
        await worker.bus.close()
        measured("the connection's close with a frozen server", time.monotonic() - started)


async def test_a_closed_client_ends_the_wait(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_heartbeats(monkeypatch)
    worker = await installation.worker()
    task = await waiting(installation, worker)
    await worker.bus.client.close()
    with pytest.raises(BusUnavailable):
        await soon(task)


# -- late answers to old pull requests ------------------------------------------------------------


async def test_an_unexpected_delivery_is_requeued(
    start_nats: StartNats, installation_of: InstallationOf
) -> None:
    installation = await installation_of(start_nats(), max_ack_pending=2)
    worker, other = await installation.worker(), await installation.worker()
    await installation.publish(b"first")
    first = await take(worker)

    await answer_an_old_pull(installation, worker, b"second")

    second = await take(other)
    assert (second.body, second.attempt) == (b"second", 2)
    await first.ack()


async def test_the_loop_takes_deliveries_while_it_requeues_another_one(
    start_nats: StartNats, installation_of: InstallationOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "SETTLE_TIMEOUT", 1_000.0)
    monkeypatch.setattr(pull, "IDLE_HEARTBEAT", QUICK)
    installation = await installation_of(start_nats(MUTE), max_ack_pending=3)
    worker = await installation.worker(installation.server.url.replace("//", "//mute:x@"))
    await installation.publish(b"first")
    await take(worker)
    await answer_an_old_pull(installation, worker, b"second")

    await installation.publish(b"third")
    assert (await take(worker)).body == b"third"
    assert worker.loop._requeuing, "the server has not confirmed the requeue of the second request"
    started = time.monotonic()
    await soon(worker.loop.close())
    measured("close with a delivery that cannot be requeued", time.monotonic() - started)


async def answer_an_old_pull(installation: Installation, worker: Worker, body: bytes) -> None:
    """Let the server answer a pull request that the worker regards as lost."""
    await worker.bus.client.publish(
        f"$JS.API.CONSUMER.MSG.NEXT.{REQUESTS}.{TASK}", b"1", reply=f"{worker.loop._inbox}.0"
    )
    await installation.until_pulls_wait(1)
    await installation.publish(body)
