"""Jobs on real servers and workers, from submission to result."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NoReturn

import pytest

from consumer.bus.connection import BusUnavailable
from consumer.gateway import jobs as jobs_module
from consumer.gateway.errors import ApiError
from consumer.gateway.event_log import Entry, EventId
from consumer.gateway.jobs import Job, JobView
from consumer.gateway.results import Results, require_address
from consumer.gateway.tenants import Caller
from generation_client import NoWorker, ServiceUnavailable
from generation_contracts import (
    CancelledEvent,
    CancelReply,
    ImageToTextRequest,
    InvalidRequest,
    SucceededEvent,
    Task,
    TextToImageRequest,
)
from tests.gateway.images import PIXEL
from tests.gateway.open_jobs import ALICE, BOB, OpenJobs, open_jobs, opened
from tests.gateway.test_pace import succeeded as measured
from tests.support.outage import outage, resume
from tests.support.scene import WITHIN, Scene

__all__ = ["opened"]


async def events_of(gateway: OpenJobs, job: Job, after: EventId | None = None) -> list[Entry]:
    """Return all events of a job."""
    async with asyncio.timeout(WITHIN), aclosing(gateway.jobs.events(job, after=after)) as entries:
        return [entry async for entry in entries]


async def view_of(gateway: OpenJobs, job: Job, caller: Caller = ALICE) -> JobView:
    return await gateway.jobs.find(caller, job.id)


def count_refusals(
    gateway: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Callable[[], Awaitable[bool]]]:
    """Count cancellations without a worker; return a factory of conditions for further ones."""
    refused = 0
    cancel = gateway.jobs._client.cancel

    async def counting(request_id: str) -> CancelReply:
        nonlocal refused
        try:
            return await cancel(request_id)
        except NoWorker:
            refused += 1
            raise

    def more(count: int) -> Callable[[], Awaitable[bool]]:
        expected = refused + count

        async def enough() -> bool:
            return refused >= expected

        return enough

    monkeypatch.setattr(gateway.jobs._client, "cancel", counting)
    return more


async def no_attempts(gateway: OpenJobs) -> bool:
    return not gateway.jobs._abandoning


async def until_state(scene: Scene, gateway: OpenJobs, job: Job, state: str) -> JobView:
    """Wait until a job is in a state; return its view."""
    found: list[JobView] = []

    async def there() -> bool:
        found[:] = [await view_of(gateway, job)]
        return found[0].state == state

    await scene.until(there, f"{job.id} {state}")
    return found[0]


def refused(error: pytest.ExceptionInfo[ApiError]) -> tuple[int, str]:
    return int(error.value.status), error.value.code


# -- submission and result -----------------------------------------------------------------------


async def test_a_job_succeeds(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    job = await opened.submit(num_inference_steps=100)
    entries = await events_of(opened, job)
    kinds = [entry.event.type.rpartition(".")[2] for entry in entries]
    assert kinds == ["started", *["progress"] * (len(kinds) - 2), "succeeded"]
    assert kinds.count("progress") > 2
    assert [entry.id for entry in entries] == sorted({entry.id for entry in entries})
    assert entries[-1].id.is_terminal
    view = await view_of(opened, job)
    assert (view.state, view.position, view.result) == ("succeeded", None, entries[-1].event)
    assert abs(datetime.now(UTC) - view.created) < timedelta(seconds=WITHIN)
    assert await opened.jobs.result(job) == entries[-1].event
    assert scene.runs() == [job.id]
    assert opened.limits.admitted == [job.id]
    assert opened.limits.over == [job.id]


async def test_ids_sort_by_submission_time(opened: OpenJobs) -> None:
    first = await opened.submit()
    await asyncio.sleep(0.002)
    second = await opened.submit()
    assert first.id < second.id
    assert ALICE.tenant.owns(first.id)


async def test_a_failed_job_raises_the_error_of_its_failure(scene: Scene, opened: OpenJobs) -> None:
    await scene.start("raises_on_demand")
    job = await opened.submit(prompt="raises")
    with pytest.raises(ApiError) as error:
        await opened.jobs.result(job)
    assert refused(error) == (500, "model_error")
    assert error.value.request_id == job.id
    assert (await view_of(opened, job)).state == "failed"


async def test_a_retried_job_is_queued_between_its_attempts(scene: Scene, opened: OpenJobs) -> None:
    """Between attempts the request is in no request stream."""
    await scene.start("raises_on_demand", CONSUMER_RETRY_DELAY="1.5")
    job = await opened.submit(prompt="raises once", num_inference_steps=2)

    async def has_retry() -> bool:
        state = await opened.view._read_state(job.task)
        return (state.retries, state.messages) == (1, 0)

    await scene.until(has_retry, "retry")
    view = await view_of(opened, job)
    assert view.state == "queued"
    assert job.id in await opened.ids.unfinished(ALICE.tenant)
    entries = await events_of(opened, job)
    assert {entry.id.attempt for entry in entries[:-1]} == {1, 2}
    assert entries[-1].event.type == "generation.v1.succeeded"


async def test_each_step_of_a_chain_is_a_job(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    job = await opened.submit(then=[{"task": "text_to_image", "prompt": "b"}])
    await opened.jobs.result(job)

    async def both() -> bool:
        page = await opened.jobs.page(ALICE, states=["succeeded"])
        return [view.job.id for view in page.jobs] == [f"{job.id}-2", job.id]

    await scene.until(both, "second step")
    assert (await opened.jobs.page(BOB)).jobs == []


async def test_an_invalid_routing_slip_is_refused(opened: OpenJobs) -> None:
    with pytest.raises(InvalidRequest):
        await opened.submit(then=[{"task": "text_to_image", "prompt": "$text"}])
    assert opened.limits.admitted == []


async def test_a_waiting_request_has_a_deadline(opened: OpenJobs) -> None:
    early = datetime.now(UTC) + timedelta(seconds=5)
    for wait, requested, expected in [
        (False, None, None),
        (False, early, early),
        (True, early, early),
        (True, None, datetime.now(UTC) + timedelta(seconds=600)),
        (True, early + timedelta(days=1), datetime.now(UTC) + timedelta(seconds=600)),
    ]:
        job = await opened.submit(wait=wait, deadline=requested)
        body = json.loads(await opened.view.body(job.task, job.id) or b"")
        deadline = body.get("deadline")
        if expected is None:
            assert deadline is None
        else:
            assert abs(datetime.fromisoformat(deadline) - expected) < timedelta(seconds=WITHIN)


# -- bounds ---------------------------------------------------------------------------------------


async def test_a_refused_request_is_not_queued(opened: OpenJobs) -> None:
    opened.limits.refusal = ApiError(429, "too many", "too_many_waiting", retry_after=5)
    with pytest.raises(ApiError) as error:
        await opened.submit()
    assert refused(error) == (429, "too_many_waiting")
    assert (await opened.view._read_state(Task.TEXT_TO_IMAGE)).messages == 0


async def test_a_full_queue_refuses_requests(scene: Scene, opened: OpenJobs) -> None:
    jetstream = scene.sender.jetstream()
    config = (await jetstream.stream_info(scene.subjects.requests_stream(scene.task))).config
    await jetstream.update_stream(config.evolve(max_msgs=1))
    await opened.submit()
    with pytest.raises(ApiError) as error:
        await opened.submit()
    assert refused(error) == (429, "queue_full")
    assert error.value.headers["x-should-retry"] == "true"
    assert opened.limits.over == opened.limits.admitted[1:]
    assert len(await opened.ids.unfinished(ALICE.tenant)) == 1


async def test_a_request_above_the_message_limit_is_refused(opened: OpenJobs) -> None:
    request = ImageToTextRequest(prompt="a", images=(f"data:image/png;base64,{'A' * 2**20}",))
    with pytest.raises(ApiError) as error:
        await opened.jobs.submit(ALICE, request)
    assert refused(error) == (413, "request_too_large")


# -- idempotency ----------------------------------------------------------------------------------


async def test_requests_with_one_key_run_once(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    jobs = [await opened.submit(key="k", wait=True) for _ in range(3)]
    results = [await opened.jobs.result(job) for job in jobs]
    jobs.append(await opened.submit(key="k", metadata={"second": "time"}))
    results.append(await opened.jobs.result(jobs[-1]))
    assert len({job.id for job in jobs}) == 1
    assert all(result == results[0] for result in results)
    assert scene.runs() == [jobs[0].id]
    assert len(opened.limits.admitted) == 1


async def test_concurrent_requests_with_one_key_at_two_gateways_run_once(
    scene: Scene, opened: OpenJobs
) -> None:
    async with open_jobs(scene) as second:
        submits = [gateway.submit(key="k", wait=True) for gateway in (opened, second) * 5]
        jobs = await asyncio.gather(*submits)
        assert (await opened.view._read_state(scene.task)).messages == 1
        await scene.start()
        results = await asyncio.gather(
            *(g.jobs.result(j) for g, j in zip((opened, second) * 5, jobs, strict=True))
        )
    assert all(result == results[0] for result in results)
    assert scene.runs() == [jobs[0].id]


async def test_a_copy_with_another_message_id_does_not_run(scene: Scene, opened: OpenJobs) -> None:
    """Metadata changes the message id, but is not part of the content."""
    async with open_jobs(scene) as second:
        one, other = await asyncio.gather(
            opened.submit(key="k", metadata={"a": "1"}), second.submit(key="k", metadata={"a": "2"})
        )
        await scene.start()
        results = await asyncio.gather(opened.jobs.result(one), second.jobs.result(other))
    assert results[0] == results[1]
    await scene.until_empty()
    assert scene.runs() == [one.id]


@pytest.mark.parametrize("moment", ["waiting", "ended"])
async def test_a_reused_key_for_another_request_is_refused(
    scene: Scene, opened: OpenJobs, moment: str
) -> None:
    job = await opened.submit(key="k")
    if moment == "ended":
        await scene.start()
        await opened.jobs.result(job)
    image = ImageToTextRequest(prompt="a", images=(PIXEL,))
    for other in (TextToImageRequest(prompt="b"), image):
        with pytest.raises(ApiError) as error:
            await opened.jobs.submit(ALICE, other, idempotency_key="k")
        assert refused(error) == (422, "idempotency_key_reused")
    assert len(opened.limits.admitted) == 1


async def test_concurrent_requests_with_one_key_and_different_content_run_one(
    scene: Scene, opened: OpenJobs
) -> None:
    """One request runs. The other fails with a reused key, when the run ends at the latest."""
    await scene.start("held_in_run")
    async with open_jobs(scene) as second:
        jobs = await asyncio.gather(
            opened.submit(key="k", prompt="a"),
            second.submit(key="k", prompt="b"),
            return_exceptions=True,
        )
        await scene.until_noted("run")
        await resume(scene, "run")
        outcomes = [
            job
            if isinstance(job, BaseException)
            else (await asyncio.gather(opened.jobs.result(job), return_exceptions=True))[0]
            for job in jobs
        ]
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ApiError", "SucceededEvent"]
    (error,) = (outcome for outcome in outcomes if isinstance(outcome, ApiError))
    assert error.code == "idempotency_key_reused"
    await scene.until_empty()
    assert len(scene.runs()) == 1


async def test_idempotency_keys_are_separate_for_each_tenant(opened: OpenJobs) -> None:
    ids = {(await opened.submit(caller, key="k")).id for caller in (ALICE, BOB)}
    assert len(ids) == 2


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_an_invalid_idempotency_key_is_refused(opened: OpenJobs, key: str) -> None:
    with pytest.raises(ApiError) as error:
        await opened.submit(key=key)
    assert refused(error) == (400, "invalid_request")


async def test_a_job_continues_after_its_gateway_stops(scene: Scene) -> None:
    await scene.start("held_in_run")
    async with open_jobs(scene) as first:
        job = await first.submit(key="k", wait=True)
        await scene.until_noted("run")
    async with open_jobs(scene) as second:
        again = await second.submit(key="k", wait=True)
        waiting = asyncio.ensure_future(second.jobs.result(again))
        await resume(scene, "run")
        result = await waiting
    assert result.request_id == job.id == again.id
    assert scene.runs() == [job.id]


# -- events ---------------------------------------------------------------------------------------


async def test_a_stream_resumes_at_another_gateway(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    async with open_jobs(scene) as second:
        job = await opened.submit(num_inference_steps=150)
        received: list[Entry] = []
        gateway = opened
        while not received or not received[-1].id.is_terminal:
            view = await view_of(gateway, job)
            after = received[-1].id if received else None
            async with aclosing(gateway.jobs.events(view.job, after=after)) as entries:
                async for entry in entries:
                    received.append(entry)
                    if len(received) % 2 == 0:
                        break  # the connection is lost
            gateway = second if gateway is opened else opened
        whole = await events_of(opened, job)
    assert [entry.id for entry in received] == [entry.id for entry in whole]
    assert len(whole) > 5


async def test_after_the_events_expire_a_reader_gets_the_terminal_event_only(scene: Scene) -> None:
    await scene.start()
    async with open_jobs(scene, seconds=0.1) as gateway:
        job = await gateway.submit(num_inference_steps=30)
        entries = await events_of(gateway, job)
        await asyncio.sleep(0.2)
        assert gateway.log.size == 0
        for after in (None, entries[0].id):
            late = await events_of(gateway, Job(job.id, job.task, job.queue), after)
            assert [entry.event for entry in late] == [entries[-1].event]
        assert await events_of(gateway, job, entries[-1].id) == []


async def test_a_reader_looks_up_a_lost_terminal_event(scene: Scene) -> None:
    await scene.start()
    async with open_jobs(scene, quiet=0.2) as gateway:
        gateway.jobs._feed._on_event = lambda _event, _size: None
        job = await gateway.submit()
        (entry,) = await events_of(gateway, job)
        assert entry.event.type == "generation.v1.succeeded"


async def test_two_hundred_readers_of_one_job_get_one_terminal_event(
    scene: Scene, opened: OpenJobs
) -> None:
    await scene.start("held_in_run")
    job = await opened.submit()
    await scene.until_noted("run")
    waiting = [asyncio.ensure_future(events_of(opened, job)) for _ in range(200)]
    await resume(scene, "run")
    found = await asyncio.gather(*waiting)
    ends = [[entry.id for entry in entries] for entries in found]
    assert all(sum(i.is_terminal for i in one) == 1 and one[-1].is_terminal for one in ends)


async def test_a_result_with_another_digest_is_an_id_conflict(
    scene: Scene, opened: OpenJobs
) -> None:
    await scene.start()
    job = await opened.submit()
    await opened.jobs.result(job)
    other = Job(job.id, job.task, job.queue, digest="sha256:" + "0" * 64)
    with pytest.raises(ApiError) as error:
        await opened.jobs.result(other)
    assert refused(error) == (422, "idempotency_key_reused")


async def test_a_result_of_an_unknown_version_is_an_error(scene: Scene, opened: OpenJobs) -> None:
    job = await opened.submit()
    later = {"type": "generation.v2.succeeded", "request_id": job.id, "task": job.task}
    await scene.sender.jetstream().publish(
        scene.subjects.result(job.task, job.id), json.dumps(later).encode()
    )
    with pytest.raises(ApiError) as error:
        await opened.jobs.result(Job(job.id, job.task, job.queue))
    assert refused(error) == (502, "bad_result")


# -- outages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_waiting_requests_survive_a_restart_of_the_broker(
    scene: Scene, opened: OpenJobs, how: str
) -> None:
    """The worker may publish the result before the gateway has reconnected."""
    worker = await scene.start("held_in_run")
    jobs = [await opened.submit() for _ in range(20)]
    waiting = [asyncio.ensure_future(opened.jobs.result(job)) for job in jobs]
    await scene.until_noted("run")
    async with outage(scene, how, worker):
        await resume(scene, "run")
    results = await asyncio.wait_for(asyncio.gather(*waiting), WITHIN)
    assert [result.request_id for result in results] == [job.id for job in jobs]


async def test_a_submission_survives_a_restart_of_the_broker(
    scene: Scene, opened: OpenJobs
) -> None:
    await scene.start()
    async with outage(scene, "kill"):
        submitting = [asyncio.ensure_future(opened.submit()) for _ in range(5)]
        submitting.append(asyncio.ensure_future(opened.submit(key="k")))
        await asyncio.sleep(0.5)
    jobs = await asyncio.wait_for(asyncio.gather(*submitting), WITHIN)
    for job in jobs:
        await opened.jobs.result(job)
    assert sorted(scene.runs()) == sorted(job.id for job in jobs)


async def test_a_long_outage_raises_an_error(
    scene: Scene, opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "MAX_OUTAGE", 0.5)
    monkeypatch.setattr("consumer.gateway.submission.SUBMIT_WITHIN", 0.5)
    async with open_jobs(scene, quiet=0.1) as gateway:
        job = await gateway.submit()
        async with outage(scene, "kill"):
            with pytest.raises(ApiError) as error:
                await gateway.jobs.result(job)
            assert refused(error) == (503, "unavailable")
            for operation in (gateway.submit(), view_of(gateway, job), gateway.jobs.numbers(ALICE)):
                with pytest.raises(ApiError) as error:
                    await operation
                assert refused(error) == (503, "unavailable")
                assert error.value.headers["x-should-retry"] == "true"
        assert gateway.limits.over == gateway.limits.admitted[1:]
        gateway.limits.refusal = BusUnavailable("NATS: the queue cannot be read")
        with pytest.raises(ApiError) as error:
            await gateway.submit()
        assert refused(error) == (503, "unavailable")


async def test_an_outage_counts_from_its_first_failed_lookup(
    scene: Scene, opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader makes no lookups while it receives progress events."""
    monkeypatch.setattr(jobs_module, "MAX_OUTAGE", 0.0)
    failed = asyncio.Event()

    async def fail(*_: object) -> NoReturn:
        failed.set()
        raise ServiceUnavailable

    async def is_waiting() -> bool:
        return job.id in opened.log._requests

    job = await opened.submit()
    waiting = asyncio.ensure_future(opened.jobs.result(job))
    await scene.until(is_waiting, "a reader of the log")
    with monkeypatch.context() as patched:
        patched.setattr(Results, "read", fail)
        opened.log.interrupt()
        await failed.wait()
    end = CancelledEvent(
        request_id=job.id,
        task=job.task,
        sequence=1,
        time=datetime.now(UTC),
        worker="w",
        attempt=1,
        request_digest=job.digest,
    )
    opened.log.add(end, 100)
    with pytest.raises(ApiError) as error:
        await waiting
    assert refused(error) == (409, "cancelled")


# -- cancelling -----------------------------------------------------------------------------------


async def test_a_waiting_job_can_be_cancelled(scene: Scene, opened: OpenJobs) -> None:
    await scene.start("held_in_run")
    first = await opened.submit()
    await scene.until_noted("run")
    second = await opened.submit()
    waiting = asyncio.ensure_future(opened.jobs.result(second))
    view = await opened.jobs.cancel(ALICE, second.id)
    assert view.state == "cancelled"
    with pytest.raises(ApiError) as error:
        await waiting
    assert refused(error) == (409, "cancelled")
    assert (await opened.jobs.cancel(ALICE, second.id)).state == "cancelled"
    await resume(scene, "run")
    await opened.jobs.result(first)
    with pytest.raises(ApiError) as error:
        await opened.jobs.cancel(ALICE, first.id)
    assert refused(error) == (409, "job_has_ended")
    assert scene.runs() == [first.id]


async def test_a_running_job_can_be_cancelled(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    job = await opened.submit(num_inference_steps=200)
    await scene.until_noted("runs")
    view = await opened.jobs.cancel(ALICE, job.id)
    assert view.state in {"running", "cancelled"}
    assert (await events_of(opened, job))[-1].event.type == "generation.v1.cancelled"


async def test_a_cancellation_without_a_worker_is_unavailable(opened: OpenJobs) -> None:
    job = await opened.submit()
    with pytest.raises(ApiError) as error:
        await opened.jobs.cancel(ALICE, job.id)
    assert refused(error) == (503, "unavailable")


async def test_an_abandoned_job_is_cancelled(scene: Scene, opened: OpenJobs) -> None:
    """The calling task is cancelled, as a server cancels the task of a disconnected client."""
    await scene.start("slow_steps")
    job = await opened.submit(num_inference_steps=200)
    begun = asyncio.Event()

    async def request() -> None:
        try:
            begun.set()
            await opened.jobs.result(job)
        finally:
            asyncio.current_task().cancel()  # type: ignore[union-attr] # the test runs in a task
            await opened.jobs.abandon(job)

    serving = asyncio.ensure_future(request())
    await begun.wait()  # a task that is cancelled before it begins does not run at all
    await scene.until_noted("runs")
    serving.cancel()
    await asyncio.wait({serving})
    await until_state(scene, opened, job, "cancelled")


async def test_abandon_raises_no_error_without_worker_or_connection(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "ABANDON_PAUSE", 0.05)
    async with open_jobs(scene) as gateway:
        # The run is long enough for the cancellation, which is repeated every 0.05 s.
        job = await gateway.submit(num_inference_steps=100)
        await gateway.jobs.abandon(job)  # there is no worker
        await asyncio.sleep(0.2)
        await scene.start()
        await until_state(scene, gateway, job, "cancelled")
    await gateway.jobs.abandon(job)  # the connection is closed
    await gateway.jobs.close()


class Clock:
    """Replaces the module `time` with a clock that the test moves forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


async def test_abandon_repeats_the_cancellation_until_the_deadline(
    scene: Scene, opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may take minutes to load after a scale-up from zero workers."""
    clock = Clock()
    monkeypatch.setattr(jobs_module, "time", clock)
    monkeypatch.setattr(jobs_module, "ABANDON_PAUSE", 0.01)
    refusals = count_refusals(opened, monkeypatch)
    job = await opened.submit(wait=True, num_inference_steps=200)
    await opened.jobs.abandon(job)
    await scene.until(refusals(1), "an attempt without a worker")
    clock.ahead = 300.0
    await scene.until(refusals(3), "attempts five minutes later")
    await scene.start()
    await until_state(scene, opened, job, "cancelled")
    await scene.until(partial(no_attempts, opened), "end of the attempts")


async def test_abandon_stops_at_the_deadline(
    scene: Scene, opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(jobs_module, "time", clock)
    monkeypatch.setattr(jobs_module, "ABANDON_PAUSE", 0.01)
    refusals = count_refusals(opened, monkeypatch)
    await opened.jobs.abandon(await opened.submit(wait=True))
    await scene.until(refusals(1), "an attempt without a worker")
    clock.ahead = 601.0
    await scene.until(partial(no_attempts, opened), "end of the attempts")


async def test_the_number_of_abandoned_jobs_is_bounded(
    opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "MOST_ABANDONED", 2)
    monkeypatch.setattr(jobs_module, "CLOSE_WITHIN", 0.1)
    for _ in range(3):
        await opened.jobs.abandon(await opened.submit(wait=True))
    assert len(opened.jobs._abandoning) == 2
    await opened.jobs.close()  # there is no worker, and `close` does not wait for the deadline
    assert not opened.jobs._abandoning


# -- tenants --------------------------------------------------------------------------------------


async def test_a_tenant_cannot_access_jobs_of_another_tenant(
    scene: Scene, opened: OpenJobs
) -> None:
    await scene.start("held_in_run")
    running = await opened.submit(ALICE)
    await scene.until_noted("run")
    waiting = await opened.submit(ALICE)
    for job in (running, waiting):
        for operation in (opened.jobs.find(BOB, job.id), opened.jobs.cancel(BOB, job.id)):
            with pytest.raises(ApiError) as error:
                await operation
            assert refused(error) == (404, "not_found")
    assert (await opened.jobs.page(BOB)).jobs == []
    assert await opened.ids.unfinished(BOB.tenant) == {}
    numbers = await opened.jobs.numbers(BOB)
    assert all((n.waiting, n.running) == (0, 0) for n in numbers.values())
    of_alice = (await opened.jobs.numbers(ALICE))[scene.task]
    assert (of_alice.waiting, of_alice.running) == (1, 1)
    await resume(scene, "run")
    await opened.jobs.result(waiting)
    assert (await opened.jobs.page(BOB)).jobs == []
    with pytest.raises(ApiError):
        await opened.jobs.find(BOB, running.id)
    with pytest.raises(ApiError) as error:
        await opened.jobs.page(BOB, after=running.id)
    assert refused(error) == (404, "not_found")


@pytest.mark.parametrize(
    "job_id",
    [
        "",
        "x",
        "alice000",
        "alice000-t",
        "alice000-t0",
        "alice000-x00",
        "alice000-t*",
        "alice000-t.>",
        "alice000-k\n",
        "alice000-" + "t" * 80,
        "ALICE000-t1",
        "bob00000-t1",
        "../alice000-t1",
    ],
)
async def test_an_invalid_job_id_is_not_found(opened: OpenJobs, job_id: str) -> None:
    for operation in (opened.jobs.find(ALICE, job_id), opened.jobs.cancel(ALICE, job_id)):
        with pytest.raises(ApiError) as error:
            await operation
        assert refused(error) == (404, "not_found")


async def test_a_gateway_without_keys_counts_all_requests(scene: Scene, opened: OpenJobs) -> None:
    await scene.submit()
    await opened.submit(ALICE)
    numbers = (await opened.jobs.numbers(Caller(ALICE.tenant)))[scene.task]
    assert (numbers.waiting, numbers.running, numbers.pace) == (2, 0, None)


# -- positions and outputs ------------------------------------------------------------------------


async def test_waiting_jobs_have_positions_and_estimated_starts(
    scene: Scene, opened: OpenJobs
) -> None:
    await scene.start("held_in_run", CONSUMER_JOBS_IN_FLIGHT="1")
    first, *others = [await opened.submit() for _ in range(4)]
    await scene.until_noted("run")
    views = [await view_of(opened, job) for job in others]
    assert [view.state for view in views] == ["queued"] * 3
    assert [view.position for view in views] == [0, 1, 2]
    assert [view.estimated_start for view in views] == [None] * 3, "there is no measured run yet"
    assert (await view_of(opened, first)).state == "running"
    await resume(scene, "run")
    await opened.jobs.result(others[-1])
    pace = opened.jobs._pace.seconds(scene.task)
    assert pace is not None
    assert 0.01 < pace < 2
    numbers = (await opened.jobs.numbers(ALICE))[scene.task]
    assert numbers.pace == pace


async def test_positions_include_prefetched_requests(scene: Scene, opened: OpenJobs) -> None:
    await scene.apply(CONSUMER_MAX_ACK_PENDING="3")
    await scene.start("held_in_run", CONSUMER_JOBS_IN_FLIGHT="3")
    opened.jobs._pace.add(measured(10.0))
    running = await opened.submit()
    await scene.until_noted("run")
    await until_state(scene, opened, running, "running")
    others = [await opened.submit() for _ in range(4)]

    async def received() -> bool:
        return (await opened.view._read_state(scene.task)).in_flight == 2

    await scene.until(received, "two requests in flight")
    # The worker prefetches one request, and so does a second worker.
    stream = scene.subjects.requests_stream(scene.task)
    pulling = await scene.sender.jetstream().pull_subscribe_bind(str(scene.task), stream)
    (prefetched,) = await pulling.fetch(1)
    opened.view._states[scene.task].expire()
    now = datetime.now(UTC)
    views = [await view_of(opened, job) for job in others]
    assert [(view.state, view.position) for view in views] == [
        ("queued", position) for position in range(4)
    ]
    starts = [(view.estimated_start or now) - now for view in views]
    assert [round(start / timedelta(seconds=10)) for start in starts] == [1, 2, 3, 4]
    numbers = (await opened.jobs.numbers(Caller(ALICE.tenant)))[scene.task]
    assert (numbers.waiting, numbers.running) == (4, 1)
    of_alice = (await opened.jobs.numbers(ALICE))[scene.task]
    assert (of_alice.waiting, of_alice.running) == (4, 1)
    await prefetched.nak()
    await resume(scene, "run")
    await asyncio.gather(*(opened.jobs.result(job) for job in others))


async def test_positions_include_runs_of_senders_without_a_gateway(
    scene: Scene, opened: OpenJobs
) -> None:
    await scene.start("held_in_run", CONSUMER_JOBS_IN_FLIGHT="1")
    await scene.submit()
    await scene.until_noted("run")

    async def runs() -> bool:
        return opened.jobs._runs.count(scene.task) == 1

    await scene.until(runs, "a run")
    job = await opened.submit()
    assert (await view_of(opened, job)).position == 0
    await resume(scene, "run")
    await opened.jobs.result(job)


async def test_the_content_of_an_output_can_be_read(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    result = await opened.jobs.result(await opened.submit(num_images=2))
    files = [await opened.jobs.content(result, number) for number in range(2)]
    assert [len(file) for file in files] == [output.size for output in result.outputs]  # type: ignore[union-attr] # images
    for number in (-1, 2):
        with pytest.raises(ApiError) as error:
            await opened.jobs.content(result, number)
        assert refused(error) == (404, "not_found")
    expired = {"url_expires_at": datetime.now(UTC) - timedelta(seconds=1)}
    late = result.model_copy(update={"outputs": (result.outputs[0].model_copy(update=expired),)})
    with pytest.raises(ApiError) as error:
        await opened.jobs.content(late, 0)
    assert refused(error) == (404, "output_expired")
    with pytest.raises(ApiError) as error:
        require_address(late.outputs[0])
    assert refused(error) == (404, "output_expired")
    lost = {"url": "http://127.0.0.1:9/x"}
    unreachable = result.model_copy(
        update={"outputs": (result.outputs[0].model_copy(update=lost),)}
    )
    with pytest.raises(ApiError) as error:
        await opened.jobs.content(unreachable, 0)
    assert refused(error) == (503, "unavailable")
    assert isinstance(result, SucceededEvent)
