"""Jobs against real servers and workers: from their submission to their result."""

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
from tests.gateway.open_jobs import ALICE, BOB, OpenJobs, open_jobs, opened
from tests.gateway.test_pace import succeeded as measured
from tests.support.outage import outage, resume
from tests.support.scene import WITHIN, Scene

__all__ = ["opened"]

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)


async def events_of(gateway: OpenJobs, job: Job, after: EventId | None = None) -> list[Entry]:
    """All events of a job."""
    async with asyncio.timeout(WITHIN), aclosing(gateway.jobs.events(job, after=after)) as entries:
        return [entry async for entry in entries]


async def view_of(gateway: OpenJobs, job: Job, caller: Caller = ALICE) -> JobView:
    return await gateway.jobs.find(caller, job.id)


def count_refusals(
    gateway: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Callable[[], Awaitable[bool]]]:
    """Count the cancellations that find no worker; the result waits for so many more."""
    refused = 0
    cancel = gateway.jobs._client.cancel

    async def counted(request_id: str) -> CancelReply:
        nonlocal refused
        try:
            return await cancel(request_id)
        except NoWorker:
            refused += 1
            raise

    def more(count: int) -> Callable[[], Awaitable[bool]]:
        wanted = refused + count

        async def enough() -> bool:
            return refused >= wanted

        return enough

    monkeypatch.setattr(gateway.jobs._client, "cancel", counted)
    return more


async def no_attempts(gateway: OpenJobs) -> bool:
    return not gateway.jobs._abandoning


async def until_state(scene: Scene, gateway: OpenJobs, job: Job, state: str) -> JobView:
    """Look until a job has come to a state."""
    found: list[JobView] = []

    async def there() -> bool:
        found[:] = [await view_of(gateway, job)]
        return found[0].state == state

    await scene.until(there, f"{job.id} {state}")
    return found[0]


def refused(error: pytest.ExceptionInfo[ApiError]) -> tuple[int, str]:
    return int(error.value.status), error.value.code


# -- the ordinary way -----------------------------------------------------------------------------


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


async def test_ids_sort_by_their_time(opened: OpenJobs) -> None:
    first = await opened.submit()
    await asyncio.sleep(0.002)
    second = await opened.submit()
    assert first.id < second.id
    assert ALICE.tenant.owns(first.id)


async def test_a_failed_job(scene: Scene, opened: OpenJobs) -> None:
    await scene.start("raises_on_demand")
    job = await opened.submit(prompt="raises")
    with pytest.raises(ApiError) as error:
        await opened.jobs.result(job)
    assert refused(error) == (500, "model_error")
    assert error.value.request_id == job.id
    assert (await view_of(opened, job)).state == "failed"


async def test_a_retry_waits_and_goes_on(scene: Scene, opened: OpenJobs) -> None:
    """While it waits for its next attempt it is in no request stream."""
    await scene.start("raises_on_demand", CONSUMER_RETRY_DELAY="1.5")
    job = await opened.submit(prompt="raises once", num_inference_steps=2)

    async def waits_again() -> bool:
        state = await opened.view._read_state(job.task)
        return (state.retries, state.messages) == (1, 0)

    await scene.until(waits_again, "retry")
    view = await view_of(opened, job)
    assert view.state == "queued"
    assert job.id in await opened.ids.unfinished(ALICE.tenant)
    entries = await events_of(opened, job)
    assert {entry.id.attempt for entry in entries[:-1]} == {1, 2}
    assert entries[-1].event.type == "generation.v1.succeeded"


async def test_a_chain_is_several_jobs(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    job = await opened.submit(then=[{"task": "text_to_image", "prompt": "b"}])
    await opened.jobs.result(job)

    async def both() -> bool:
        page = await opened.jobs.page(ALICE, states=["succeeded"])
        return [view.job.id for view in page.jobs] == [f"{job.id}-2", job.id]

    await scene.until(both, "second step")
    assert (await opened.jobs.page(BOB)).jobs == []


async def test_a_slip_that_makes_no_sense(opened: OpenJobs) -> None:
    with pytest.raises(InvalidRequest):
        await opened.submit(then=[{"task": "text_to_image", "prompt": "$text"}])
    assert opened.limits.admitted == []


async def test_who_waits_has_a_deadline(opened: OpenJobs) -> None:
    early = datetime.now(UTC) + timedelta(seconds=5)
    for wait, given, wanted in [
        (False, None, None),
        (False, early, early),
        (True, early, early),
        (True, None, datetime.now(UTC) + timedelta(seconds=600)),
        (True, early + timedelta(days=1), datetime.now(UTC) + timedelta(seconds=600)),
    ]:
        job = await opened.submit(wait=wait, deadline=given)
        body = json.loads(await opened.view.body(job.task, job.id) or b"")
        deadline = body.get("deadline")
        if wanted is None:
            assert deadline is None
        else:
            assert abs(datetime.fromisoformat(deadline) - wanted) < timedelta(seconds=WITHIN)


# -- bounds ---------------------------------------------------------------------------------------


async def test_a_refused_request_is_not_queued(opened: OpenJobs) -> None:
    opened.limits.refusal = ApiError(429, "too many", "too_many_waiting", retry_after=5)
    with pytest.raises(ApiError) as error:
        await opened.submit()
    assert refused(error) == (429, "too_many_waiting")
    assert (await opened.view._read_state(Task.TEXT_TO_IMAGE)).messages == 0


async def test_a_full_queue(scene: Scene, opened: OpenJobs) -> None:
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


async def test_a_request_that_is_too_large(opened: OpenJobs) -> None:
    request = ImageToTextRequest(prompt="a", images=(f"data:image/png;base64,{'A' * 2**20}",))
    with pytest.raises(ApiError) as error:
        await opened.jobs.submit(ALICE, request)
    assert refused(error) == (413, "request_too_large")


# -- idempotency ----------------------------------------------------------------------------------


async def test_one_key_is_one_run(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    jobs = [await opened.submit(key="k", wait=True) for _ in range(3)]
    results = [await opened.jobs.result(job) for job in jobs]
    jobs.append(await opened.submit(key="k", metadata={"second": "time"}))
    results.append(await opened.jobs.result(jobs[-1]))
    assert len({job.id for job in jobs}) == 1
    assert all(result == results[0] for result in results)
    assert scene.runs() == [jobs[0].id]
    assert len(opened.limits.admitted) == 1


async def test_one_key_at_two_gateways_at_once_is_one_run(scene: Scene, opened: OpenJobs) -> None:
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


async def test_a_copy_of_another_message_id_is_not_run(scene: Scene, opened: OpenJobs) -> None:
    """Metadata is no content, and makes another message of it."""
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
async def test_a_key_for_two_requests(scene: Scene, opened: OpenJobs, moment: str) -> None:
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


async def test_a_key_for_two_requests_at_once(scene: Scene, opened: OpenJobs) -> None:
    """One of them is run; the other one learns that the key is taken, at its end at the latest."""
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


async def test_keys_of_tenants_do_not_meet(opened: OpenJobs) -> None:
    ids = {(await opened.submit(caller, key="k")).id for caller in (ALICE, BOB)}
    assert len(ids) == 2


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_no_key(opened: OpenJobs, key: str) -> None:
    with pytest.raises(ApiError) as error:
        await opened.submit(key=key)
    assert refused(error) == (400, "invalid_request")


async def test_the_job_outlives_its_gateway(scene: Scene) -> None:
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
        seen: list[Entry] = []
        gateway = opened
        while not seen or not seen[-1].id.is_terminal:
            view = await view_of(gateway, job)
            after = seen[-1].id if seen else None
            async with aclosing(gateway.jobs.events(view.job, after=after)) as entries:
                async for entry in entries:
                    seen.append(entry)
                    if len(seen) % 2 == 0:
                        break  # the connection is lost
            gateway = second if gateway is opened else opened
        whole = await events_of(opened, job)
    assert [entry.id for entry in seen] == [entry.id for entry in whole]
    assert len(whole) > 5


async def test_an_hour_later_only_the_end_comes(scene: Scene) -> None:
    await scene.start()
    async with open_jobs(scene, seconds=0.1) as gateway:
        job = await gateway.submit(num_inference_steps=30)
        entries = await events_of(gateway, job)
        await asyncio.sleep(0.2)
        assert gateway.log.size == 0
        for after in (None, entries[0].id):
            late = await events_of(gateway, Job(job.id, job.task), after)
            assert [entry.event for entry in late] == [entries[-1].event]
        assert await events_of(gateway, job, entries[-1].id) == []


async def test_an_announcement_that_was_lost(scene: Scene) -> None:
    await scene.start()
    async with open_jobs(scene, quiet=0.2) as gateway:
        gateway.jobs._feed._on_event = lambda _event, _size: None
        job = await gateway.submit()
        (entry,) = await events_of(gateway, job)
        assert entry.event.type == "generation.v1.succeeded"


async def test_many_who_wait_for_one_job(scene: Scene, opened: OpenJobs) -> None:
    await scene.start("held_in_run")
    job = await opened.submit()
    await scene.until_noted("run")
    waiting = [asyncio.ensure_future(events_of(opened, job)) for _ in range(200)]
    await resume(scene, "run")
    found = await asyncio.gather(*waiting)
    ends = [[entry.id for entry in entries] for entries in found]
    assert all(sum(i.is_terminal for i in one) == 1 and one[-1].is_terminal for one in ends)


async def test_the_result_of_another_request_under_the_id(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    job = await opened.submit()
    await opened.jobs.result(job)
    other = Job(job.id, job.task, digest="sha256:" + "0" * 64)
    with pytest.raises(ApiError) as error:
        await opened.jobs.result(other)
    assert refused(error) == (422, "idempotency_key_reused")


async def test_a_result_of_a_later_version(scene: Scene, opened: OpenJobs) -> None:
    job = await opened.submit()
    later = {"type": "generation.v2.succeeded", "request_id": job.id, "task": job.task}
    await scene.sender.jetstream().publish(
        scene.subjects.result(job.task, job.id), json.dumps(later).encode()
    )
    with pytest.raises(ApiError) as error:
        await opened.jobs.result(Job(job.id, job.task))
    assert refused(error) == (502, "bad_result")


# -- outages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_who_waits_survives_a_restart_of_the_broker(
    scene: Scene, opened: OpenJobs, how: str
) -> None:
    """The result is announced while the gateway may not be connected yet."""
    worker = await scene.start("held_in_run")
    jobs = [await opened.submit() for _ in range(20)]
    waiting = [asyncio.ensure_future(opened.jobs.result(job)) for job in jobs]
    await scene.until_noted("run")
    async with outage(scene, how, worker):
        await resume(scene, "run")
    results = await asyncio.wait_for(asyncio.gather(*waiting), WITHIN)
    assert [result.request_id for result in results] == [job.id for job in jobs]


async def test_a_submit_survives_a_restart_of_the_broker(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    async with outage(scene, "kill"):
        submitting = [asyncio.ensure_future(opened.submit()) for _ in range(5)]
        submitting.append(asyncio.ensure_future(opened.submit(key="k")))
        await asyncio.sleep(0.5)
    jobs = await asyncio.wait_for(asyncio.gather(*submitting), WITHIN)
    for job in jobs:
        await opened.jobs.result(job)
    assert sorted(scene.runs()) == sorted(job.id for job in jobs)


async def test_a_long_outage_is_said(
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
            for asking in (gateway.submit(), view_of(gateway, job), gateway.jobs.numbers(ALICE)):
                with pytest.raises(ApiError) as error:
                    await asking
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
    """A run that reports its progress needs no lookup for a long time."""
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


async def test_cancelling_a_job_that_waits(scene: Scene, opened: OpenJobs) -> None:
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


async def test_cancelling_a_job_that_runs(scene: Scene, opened: OpenJobs) -> None:
    await scene.start()
    job = await opened.submit(num_inference_steps=200)
    await scene.until_noted("runs")
    view = await opened.jobs.cancel(ALICE, job.id)
    assert view.state in {"running", "cancelled"}
    assert (await events_of(opened, job))[-1].event.type == "generation.v1.cancelled"


async def test_cancelling_without_a_worker(opened: OpenJobs) -> None:
    job = await opened.submit()
    with pytest.raises(ApiError) as error:
        await opened.jobs.cancel(ALICE, job.id)
    assert refused(error) == (503, "unavailable")


async def test_abandoning_a_job(scene: Scene, opened: OpenJobs) -> None:
    """From a task that is being cancelled itself, as a server cancels that of a lost client."""
    await scene.start()
    job = await opened.submit(num_inference_steps=200)

    async def request() -> None:
        try:
            await opened.jobs.result(job)
        finally:
            asyncio.current_task().cancel()  # type: ignore[union-attr] # this is one
            await opened.jobs.abandon(job)

    serving = asyncio.ensure_future(request())
    await scene.until_noted("runs")
    serving.cancel()
    await asyncio.wait({serving})
    await until_state(scene, opened, job, "cancelled")


async def test_abandoning_never_raises(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "ABANDON_PAUSE", 0.05)
    async with open_jobs(scene) as gateway:
        # Long enough for the cancellation, which is sent again every 0.05 s, to find it running.
        job = await gateway.submit(num_inference_steps=100)
        await gateway.jobs.abandon(job)  # no worker is there
        await asyncio.sleep(0.2)
        await scene.start()
        await until_state(scene, gateway, job, "cancelled")
    await gateway.jobs.abandon(job)  # the connection is closed
    await gateway.jobs.close()


class Clock:
    """The module `time` with a clock that the test puts forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


async def test_abandoning_lasts_until_the_deadline(
    scene: Scene, opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may take minutes to load after the workers were scaled to zero."""
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


async def test_abandoning_ends_with_the_deadline(
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


async def test_only_so_many_jobs_are_abandoned_at_a_time(
    opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "MOST_ABANDONED", 2)
    monkeypatch.setattr(jobs_module, "CLOSE_WITHIN", 0.1)
    for _ in range(3):
        await opened.jobs.abandon(await opened.submit(wait=True))
    assert len(opened.jobs._abandoning) == 2
    await opened.jobs.close()  # there is no worker: it does not wait for the deadline
    assert not opened.jobs._abandoning


# -- tenants --------------------------------------------------------------------------------------


async def test_tenants_see_nothing_of_each_other(scene: Scene, opened: OpenJobs) -> None:
    await scene.start("held_in_run")
    running = await opened.submit(ALICE)
    await scene.until_noted("run")
    waiting = await opened.submit(ALICE)
    for job in (running, waiting):
        for looking in (opened.jobs.find(BOB, job.id), opened.jobs.cancel(BOB, job.id)):
            with pytest.raises(ApiError) as error:
                await looking
            assert refused(error) == (404, "not_found")
    assert (await opened.jobs.page(BOB)).jobs == []
    assert await opened.ids.unfinished(BOB.tenant) == {}
    counted = await opened.jobs.numbers(BOB)
    assert all((n.waiting, n.running) == (0, 0) for n in counted.values())
    own = (await opened.jobs.numbers(ALICE))[scene.task]
    assert (own.waiting, own.running) == (1, 1)
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
async def test_ids_that_are_none(opened: OpenJobs, job_id: str) -> None:
    for looking in (opened.jobs.find(ALICE, job_id), opened.jobs.cancel(ALICE, job_id)):
        with pytest.raises(ApiError) as error:
            await looking
        assert refused(error) == (404, "not_found")


async def test_without_keys_all_is_counted(scene: Scene, opened: OpenJobs) -> None:
    await scene.submit()
    await opened.submit(ALICE)
    numbers = (await opened.jobs.numbers(Caller(ALICE.tenant)))[scene.task]
    assert (numbers.waiting, numbers.running, numbers.pace) == (2, 0, None)


# -- positions, outputs ---------------------------------------------------------------------------


async def test_positions_and_estimates(scene: Scene, opened: OpenJobs) -> None:
    await scene.start("held_in_run", CONSUMER_JOBS_IN_FLIGHT="1")
    first, *others = [await opened.submit() for _ in range(4)]
    await scene.until_noted("run")
    views = [await view_of(opened, job) for job in others]
    assert [view.state for view in views] == ["queued"] * 3
    assert [view.position for view in views] == [0, 1, 2]
    assert [view.estimated_start for view in views] == [None] * 3, "nothing was measured yet"
    assert (await view_of(opened, first)).state == "running"
    await resume(scene, "run")
    await opened.jobs.result(others[-1])
    pace = opened.jobs._pace.seconds(scene.task)
    assert pace is not None
    assert 0.01 < pace < 2
    numbers = (await opened.jobs.numbers(ALICE))[scene.task]
    assert numbers.pace == pace


async def test_positions_count_what_a_worker_has_received_in_advance(
    scene: Scene, opened: OpenJobs
) -> None:
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
    # The worker takes one request in advance. A second worker does the same.
    stream = scene.subjects.requests_stream(scene.task)
    pulling = await scene.sender.jetstream().pull_subscribe_bind(str(scene.task), stream)
    (in_advance,) = await pulling.fetch(1)
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
    own = (await opened.jobs.numbers(ALICE))[scene.task]
    assert (own.waiting, own.running) == (4, 1)
    await in_advance.nak()
    await resume(scene, "run")
    await asyncio.gather(*(opened.jobs.result(job) for job in others))


async def test_runs_of_senders_without_a_gateway_are_counted(
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


async def test_the_file_of_an_output(scene: Scene, opened: OpenJobs) -> None:
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
    gone = result.model_copy(update={"outputs": (result.outputs[0].model_copy(update=lost),)})
    with pytest.raises(ApiError) as error:
        await opened.jobs.content(gone, 0)
    assert refused(error) == (503, "unavailable")
    assert isinstance(result, SucceededEvent)
