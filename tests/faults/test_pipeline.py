"""Several deliveries in flight in one worker."""

import asyncio
import json
import signal

import pytest

from consumer.devstack import Daemon
from consumer.jobs.outcomes import EXIT_DEVICE_LOST
from tests.support.holding import RESUME, RESUMED
from tests.support.observations import until_in_flight
from tests.support.scene import Scene

ATTEMPTS = 3  # CONSUMER_MAX_ATTEMPTS
POISON_STEPS = 30  # the worker dies at the last step
LONG = 200  # steps; two seconds of the quick model


@pytest.fixture
async def scene(scene: Scene) -> Scene:
    """An installation with three deliveries in flight and long leases."""
    await scene.apply(CONSUMER_MAX_ACK_PENDING="3", CONSUMER_ACK_WAIT="60")
    return scene


def go_on(scene: Scene, moment: str) -> None:
    (scene.folder / f"{moment}{RESUME}").touch()


async def test_next_request_runs_during_an_upload(scene: Scene) -> None:
    await scene.start("held_in_upload")
    first = await scene.submit()
    await scene.until_noted("upload")
    others = [await scene.submit() for _ in range(3)]
    await scene.until_noted("runs", 3)
    results = [await scene.event(one) for one in others[:1]]
    assert [one["type"] for one in results] == ["generation.v1.succeeded"]
    assert await scene.events(first) == []
    go_on(scene, "upload")
    for one in (first, *others):
        event = await scene.event(one)
        assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 1)
    await scene.until_empty()
    assert scene.runs() == [first, *others], "the order of start is the order of the queue"


async def test_max_ack_pending_1_runs_one_request_at_a_time(scene: Scene) -> None:
    await scene.apply(CONSUMER_MAX_ACK_PENDING="1")
    worker = await scene.start("held_in_upload")
    first = await scene.submit()
    second = await scene.submit()
    await scene.until_noted("upload")
    await until_in_flight(scene, worker, 1)
    assert scene.runs() == [first]
    go_on(scene, "upload")
    await scene.event(second)
    assert scene.runs() == [first, second]


async def test_worker_limits_its_requests_in_flight(scene: Scene) -> None:
    await scene.start("held_in_run", CONSUMER_JOBS_IN_FLIGHT="1")
    sent = [await scene.submit() for _ in range(3)]
    await scene.until_noted("run")
    other = await scene.start()
    for one in sent[1:]:  # the second worker does all that the first has not
        await scene.event(one)
    assert other.alive
    go_on(scene, "run")
    await scene.event(sent[0])


async def test_each_delivery_in_flight_is_renewed(scene: Scene) -> None:
    await scene.apply(CONSUMER_MAX_ACK_PENDING="3", CONSUMER_ACK_WAIT="1")
    worker = await scene.start("held_in_run")
    sent = [await scene.submit() for _ in range(2)]
    await scene.until_noted("run")
    await until_in_flight(scene, worker, 2)
    other = await scene.start()  # would get what is not renewed
    third = await scene.submit(steps=LONG)  # longer than a lease
    assert (await scene.event(third))["type"] == "generation.v1.succeeded"
    go_on(scene, "run")
    for one in sent:
        assert (await scene.event(one))["attempt"] == 1
    assert other.alive
    assert sorted(scene.runs()) == sorted([*sent, third])


async def test_requests_of_a_killed_worker_run_in_another_worker(scene: Scene) -> None:
    await scene.apply(CONSUMER_MAX_ACK_PENDING="3", CONSUMER_ACK_WAIT="2")
    worker = await scene.start("held_in_run")
    sent = [await scene.submit() for _ in range(2)]
    await scene.until_noted("run")
    await until_in_flight(scene, worker, 2)
    worker.kill()
    await scene.start()
    for one in sent:
        assert (await scene.event(one))["type"] == "generation.v1.succeeded"
    await scene.until_empty()
    assert sorted(scene.runs()) == sorted([sent[0], *sent]), "only the started run is repeated"


async def test_draining_worker_requeues_waiting_requests(scene: Scene) -> None:
    worker = await scene.start("held_in_run")
    running = await scene.submit()
    waiting = await scene.submit()
    await scene.until_noted("run")
    await until_in_flight(scene, worker, 2)
    worker.signal(signal.SIGTERM)
    await scene.until_logged(worker, "requeued")
    await scene.start()
    event = await scene.event(waiting)
    assert event["type"] == "generation.v1.succeeded"
    assert worker.alive
    go_on(scene, "run")
    assert (await scene.event(running))["attempt"] == 1
    assert await scene.exit_code(worker) == 0
    assert scene.runs() == [running, waiting]


async def test_draining_worker_finishes_its_upload(scene: Scene) -> None:
    worker = await scene.start("held_in_upload")
    storing = await scene.submit()
    await scene.until_noted("upload")
    running = await scene.submit(steps=LONG)
    await scene.until_noted("runs", 2)
    worker.signal(signal.SIGTERM)
    await scene.until_logged(worker, '"times": 1')
    go_on(scene, "upload")
    for one in (storing, running):
        assert (await scene.event(one))["attempt"] == 1
    assert await scene.exit_code(worker) == 0


async def test_end_of_the_grace_period_requeues_all_requests(scene: Scene) -> None:
    worker = await scene.start("held_in_upload", CONSUMER_DRAIN_GRACE="0.1")
    storing = await scene.submit()
    await scene.until_noted("upload")
    running = await scene.submit(steps=LONG)
    await scene.until_noted("runs", 2)
    worker.signal(signal.SIGTERM)
    assert await scene.exit_code(worker) == 0
    assert await scene.pending() == 2
    await scene.start()
    for one in (storing, running):
        assert (await scene.event(one))["type"] == "generation.v1.succeeded"


async def test_no_request_runs_on_a_lost_device(scene: Scene) -> None:
    worker = await scene.start("device_lost")
    lost = await scene.submit()
    await scene.until_noted("worker_waits")
    waiting = await scene.submit()
    await until_in_flight(scene, worker, 2)
    (scene.folder / "lose").touch()
    assert await scene.exit_code(worker) == EXIT_DEVICE_LOST
    assert worker.log_since_start().count("requeued") == 2
    assert "daemon_failed" not in worker.log_since_start()
    assert scene.runs() == [lost], "no run starts on a lost device"
    await scene.start()
    for one in (lost, waiting):
        assert (await scene.event(one))["type"] == "generation.v1.succeeded"


async def test_lost_device_sets_the_exit_code_of_any_shutdown(scene: Scene) -> None:
    worker = await scene.start("device_lost", CONSUMER_DRAIN_GRACE="0.1")
    (scene.folder / "lose").touch()
    await scene.submit(prompt="harmless", steps=LONG)
    await scene.until_noted("runs")
    await scene.submit()
    await until_in_flight(scene, worker, 2)
    await asyncio.to_thread(scene.stack.nats.kill)
    try:
        # The event of the first waits for NATS until it is cut off; the second loses the device.
        assert await scene.exit_code(worker) == EXIT_DEVICE_LOST
        assert '"stopped_before_drained"' in worker.log_since_start()
    finally:
        await asyncio.to_thread(scene.stack.nats.start)
        await asyncio.to_thread(scene.stack.nats.wait_ready)


async def test_waiting_request_is_cancelled_without_a_run(scene: Scene) -> None:
    worker = await scene.start("held_in_run")
    running = await scene.submit()
    waiting = await scene.submit()
    await scene.until_noted("run")
    await until_in_flight(scene, worker, 2)
    answer = await scene.sender.request(scene.subjects.cancel(waiting), b"", timeout=10)
    # The reply is `cancelled` if the request has ended when the worker replies.
    assert json.loads(answer.data)["status"] in {"stopping", "cancelled"}
    assert (await scene.event(waiting))["type"] == "generation.v1.cancelled"
    go_on(scene, "run")
    await scene.until_noted(f"run{RESUMED}")
    await scene.event(running)
    assert scene.runs() == [running]


@pytest.mark.timeout(300)  # seconds; a dozen workers are started
async def test_requests_behind_a_poison_request_are_not_dead_lettered(scene: Scene) -> None:
    await scene.apply(CONSUMER_MAX_ACK_PENDING="3", CONSUMER_ACK_WAIT="1")
    poisons = [await scene.submit(prompt="poison", steps=POISON_STEPS) for _ in range(3)]
    harmless = [await scene.submit() for _ in range(2)]
    deaths = 0
    while await scene.pending():
        worker = await scene.start("poison_at_its_end")

        async def over(worker: Daemon = worker) -> bool:
            return not worker.alive or await scene.pending() == 0

        await scene.until(over, "a death, or an empty queue")
        deaths += not worker.alive
    for one in harmless:
        assert (await scene.event(one))["type"] == "generation.v1.succeeded"
    for one in poisons:
        assert (await scene.event(one))["failure"]["code"] == "worker_lost"
    runs = [scene.runs().count(one) for one in poisons]
    assert deaths == sum(runs)
    assert max(runs) <= ATTEMPTS


@pytest.mark.timeout(300)  # seconds; as above
async def test_poison_request_among_many_has_no_additional_attempts(scene: Scene) -> None:
    """The next worker has other requests in flight; the attempts must still count."""
    await scene.apply(CONSUMER_MAX_ACK_PENDING="3", CONSUMER_ACK_WAIT="1")
    poison = await scene.submit(prompt="poison", steps=POISON_STEPS)
    for _ in range(60):
        await scene.submit(steps=20)
    while not await scene.events(poison):
        worker = await scene.start("poison_at_its_end")

        async def over(worker: Daemon = worker) -> bool:
            return not worker.alive or bool(await scene.events(poison))

        await scene.until(over, "a death, or its end")
    assert (await scene.event(poison))["failure"]["code"] == "worker_lost"
    assert 0 < scene.runs().count(poison) <= ATTEMPTS
