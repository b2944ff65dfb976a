"""Lists of jobs from the streams: order, filters and pages."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from consumer.gateway import job_list as job_list_module
from consumer.gateway import job_pages as job_pages_module
from consumer.gateway.errors import ApiError
from consumer.gateway.job_view import State
from consumer.gateway.jobs import Job
from consumer.gateway.tenants import submitted_at, tag_of
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    Failure,
    FailureCode,
    ModelInfo,
    SucceededEvent,
    Task,
    TextOutput,
    Timings,
    encode,
)
from tests.gateway.open_jobs import ALICE, BOB, OpenJobs, open_jobs, opened
from tests.support.scene import Scene

__all__ = ["opened"]

DIGEST = "sha256:" + "0" * 64


async def end(scene: Scene, job_id: str, task: Task, state: State) -> None:
    """Store the terminal event of a job as a worker does."""
    common = {
        "request_id": job_id,
        "task": task,
        "sequence": 1,
        "time": datetime.now(UTC),
        "worker": "w",
        "attempt": 1,
        "request_digest": DIGEST,
    }
    event: SucceededEvent | FailedEvent | CancelledEvent
    if state == "succeeded":
        event = SucceededEvent(
            **common,
            outputs=(
                TextOutput(text="a", finish_reason="stop", prompt_tokens=1, completion_tokens=1),
            ),
            model=ModelInfo(id="m", family="f", dtype="float32", device="cpu"),
            timings=Timings(queued=0, inference=0),
        )
    elif state == "failed":
        event = FailedEvent(**common, failure=Failure.of(FailureCode.INTERNAL, "no"))
    else:
        event = CancelledEvent(**common)
    subject = scene.subjects.result(task, job_id)
    await scene.sender.jetstream().publish(subject, encode(event))


def name(number: int, tag: str = "alice000") -> str:
    """Return the id of a job with a given submission second."""
    return f"{tag}-t{(1_700_000_000 + number) * 1000:012x}{number:016x}"


async def ids(gateway: OpenJobs, **filters: object) -> list[str]:
    page = await gateway.jobs.page(ALICE, **filters)  # type: ignore[arg-type] # the keywords of `page`
    return [view.job.id for view in page.jobs]


async def all_pages(gateway: OpenJobs, limit: int, **filters: object) -> list[list[str]]:
    pages: list[list[str]] = []
    after: str | None = None
    while True:
        page = await gateway.jobs.page(ALICE, limit=limit, after=after, **filters)  # type: ignore[arg-type] # the keywords of `page`
        pages.append([view.job.id for view in page.jobs])
        after = page.next
        if after is None:
            return pages


def test_an_id_contains_the_submission_time() -> None:
    job_id = ALICE.tenant.new_id(1_700_000_000_123)
    assert submitted_at(job_id) == datetime.fromtimestamp(1_700_000_000.123, UTC)
    assert submitted_at(f"{job_id}-2-1") == submitted_at(job_id)
    for other in ("", "alice000-t", "alice000-tzz", "alice000-tffffffffffff", "alice000-k00"):
        assert submitted_at(other) is None
    assert [tag_of(job_id), tag_of("4f0c"), tag_of("alice000_t0")] == ["alice000", None, None]


async def test_the_list_has_jobs_in_all_states_newest_first(scene: Scene, opened: OpenJobs) -> None:
    task = Task.TEXT_TO_IMAGE
    for number, state in enumerate(("succeeded", "failed", "cancelled")):
        await end(scene, name(number), task, state)  # type: ignore[arg-type] # they are states
    await end(scene, name(9, "bob00000"), task, "succeeded")
    await end(scene, "of-another-sender", task, "succeeded")
    waiting = [await opened.submit() for _ in range(2)]
    views = (await opened.jobs.page(ALICE)).jobs
    assert [view.job.id for view in views] == [
        *sorted((job.id for job in waiting), reverse=True),
        name(2),
        name(1),
        name(0),
    ]
    assert [view.state for view in views] == [
        "queued",
        "queued",
        "cancelled",
        "failed",
        "succeeded",
    ]
    assert [view.created for view in views[2:]] == [submitted_at(name(n)) for n in (2, 1, 0)]
    assert {view.position for view in views[:2]} == {0, 1}


async def test_the_pages_contain_every_job_once(scene: Scene, opened: OpenJobs) -> None:
    for number in range(7):
        await end(scene, name(number), Task.TEXT_TO_IMAGE, "succeeded")
    expected = [name(number) for number in reversed(range(7))]
    for limit in (1, 2, 3, 7, 100):
        pages = await all_pages(opened, limit)
        assert [job_id for page in pages for job_id in page] == expected
        assert all(len(page) == limit for page in pages[:-1])
        assert pages[-1]


async def test_new_jobs_do_not_shift_the_pages(scene: Scene, opened: OpenJobs) -> None:
    for number in range(4):
        await end(scene, name(number), Task.TEXT_TO_IMAGE, "succeeded")
    first = await opened.jobs.page(ALICE, limit=2)
    await opened.submit()
    second = await opened.jobs.page(ALICE, limit=2, after=first.next)
    assert [view.job.id for view in (*first.jobs, *second.jobs)] == [name(n) for n in (3, 2, 1, 0)]


async def test_the_list_is_filtered_by_state_and_task(scene: Scene, opened: OpenJobs) -> None:
    for number in range(12):
        state: State = "failed" if number % 4 == 0 else "succeeded"
        task = Task.IMAGE_TO_TEXT if number % 3 == 0 else Task.TEXT_TO_IMAGE
        await end(scene, name(number), task, state)
    waiting = await opened.submit()
    assert await ids(opened, states=["failed"]) == [name(8), name(4), name(0)]
    assert await ids(opened, states=["failed", "queued"]) == [
        waiting.id,
        name(8),
        name(4),
        name(0),
    ]
    assert await ids(opened, states=["queued", "running"]) == [waiting.id]
    assert await ids(opened, task=Task.IMAGE_TO_TEXT) == [name(n) for n in (9, 6, 3, 0)]
    assert await ids(opened, task=Task.IMAGE_TO_TEXT, states=["failed"]) == [name(0)]
    assert await all_pages(opened, 2, states=["failed"]) == [[name(8), name(4)], [name(0)]]


async def test_a_filter_with_few_matches_returns_short_pages(
    scene: Scene, opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_pages_module, "MOST_READ", 4)
    for number in range(10):
        await end(scene, name(number), Task.TEXT_TO_IMAGE, "failed" if number == 0 else "succeeded")
    pages = await all_pages(opened, 2, states=["failed"])
    assert [job_id for page in pages for job_id in page] == [name(0)]
    assert len(pages) > 1


async def test_idempotent_jobs_are_sorted_by_their_times(scene: Scene, opened: OpenJobs) -> None:
    """The ids of idempotent jobs do not contain a time."""
    order = []
    for number in range(6):
        job_id = ALICE.tenant.id_of(str(number)) if number % 2 else None
        if job_id is None:
            order.append((await opened.submit()).id)
            continue
        await end(scene, job_id, Task.TEXT_TO_IMAGE, "succeeded")
        order.append(job_id)
        await asyncio.sleep(0.02)
    order.append((await opened.submit(key="waiting")).id)
    assert await ids(opened) == order[::-1]
    assert await all_pages(opened, 2) == [
        order[:-3:-1],
        order[-3:-5:-1],
        order[-5:-7:-1],
        order[:1],
    ]
    async with open_jobs(scene) as second:
        assert await ids(second) == order[::-1]
        page = await second.jobs.page(ALICE, after=order[3])
        assert [view.job.id for view in page.jobs] == order[2::-1]


@pytest.mark.parametrize("after", ["", "x", "alice000-k00", name(1, "bob00000")])
async def test_an_invalid_cursor_is_not_found(opened: OpenJobs, after: str) -> None:
    with pytest.raises(ApiError) as error:
        await opened.jobs.page(ALICE, after=after)
    assert error.value.status == 404


async def test_a_cursor_of_an_expired_job_still_works(scene: Scene, opened: OpenJobs) -> None:
    await end(scene, name(1), Task.TEXT_TO_IMAGE, "succeeded")
    assert await ids(opened, after=name(2)) == [name(1)]


async def test_the_list_follows_events_between_stream_reads(scene: Scene, opened: OpenJobs) -> None:
    """The cached reads of the streams are still valid, so the changes come from events."""
    assert await ids(opened) == []
    job = await opened.submit()
    assert await ids(opened, states=["queued"]) == [job.id]
    assert list(await opened.ids.unfinished(ALICE.tenant)) == [job.id]
    await scene.start()
    await opened.jobs.result(job)
    assert await ids(opened, states=["succeeded"]) == [job.id]
    assert await ids(opened, states=["queued", "running"]) == []
    assert await opened.ids.unfinished(ALICE.tenant) == {}


async def test_a_job_with_a_missed_terminal_event_is_listed_after_a_reconnect(
    scene: Scene, opened: OpenJobs
) -> None:
    assert await ids(opened) == []
    opened.jobs._feed._on_event = lambda _event, _size: None
    await end(scene, name(0), Task.TEXT_TO_IMAGE, "succeeded")
    assert await ids(opened) == []
    opened.ids.interrupt()
    assert await ids(opened) == [name(0)]


async def test_a_job_that_ends_during_a_stream_read_is_listed(
    scene: Scene, opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = opened.view.ended
    reading = asyncio.Event()

    async def ended() -> object:
        found = await read()
        reading.set()
        await asyncio.sleep(0.1)
        return found

    monkeypatch.setattr(opened.view, "ended", ended)
    listing = asyncio.ensure_future(ids(opened))
    await reading.wait()
    await end(scene, name(0), Task.TEXT_TO_IMAGE, "succeeded")
    assert await listing == [name(0)]


async def test_expired_results_are_removed_from_the_list(scene: Scene, opened: OpenJobs) -> None:
    await end(scene, name(0), Task.TEXT_TO_IMAGE, "succeeded")
    await end(scene, name(1), Task.TEXT_TO_IMAGE, "succeeded")
    assert await ids(opened) == [name(1), name(0)]
    await scene.sender.jetstream().purge_stream(scene.subjects.results_stream)
    opened.log._order.clear()
    opened.log._requests.clear()
    assert await ids(opened) == []
    assert await opened.ids.ended(ALICE.tenant) == {}


async def test_the_list_contains_only_the_newest_jobs_above_the_limit(
    scene: Scene, opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_list_module, "MOST_ENDED", 3)
    for number in range(6):
        await end(scene, name(number), Task.TEXT_TO_IMAGE, "succeeded")
    await end(scene, name(0, "bob00000"), Task.TEXT_TO_IMAGE, "succeeded")
    assert await ids(opened) == [name(5), name(4), name(3)]
    await end(scene, name(6), Task.TEXT_TO_IMAGE, "succeeded")

    async def listed() -> bool:
        return await ids(opened) == [name(6), name(5), name(4)]

    await scene.until(listed, "new job in the list")
    idempotent = ALICE.tenant.id_of("k")
    await end(scene, idempotent, Task.TEXT_TO_IMAGE, "succeeded")
    async with open_jobs(scene) as restarted:
        assert set(await ids(restarted)) == {idempotent, name(6), name(5), name(4)}
    assert [view.job.id for view in (await opened.jobs.page(BOB)).jobs] == [name(0, "bob00000")]


async def test_jobs_without_a_known_time_are_last(
    scene: Scene, opened: OpenJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_pages_module, "MOST_DATED", 0)
    idempotent = ALICE.tenant.id_of("k")
    await end(scene, idempotent, Task.TEXT_TO_IMAGE, "succeeded")
    await end(scene, name(0), Task.TEXT_TO_IMAGE, "succeeded")
    assert (await ids(opened))[-1] == idempotent


async def test_an_idempotent_job_has_a_creation_time(scene: Scene, opened: OpenJobs) -> None:
    job = await opened.submit(key="k")
    waiting = await opened.jobs.find(ALICE, job.id)
    await scene.start()
    await opened.jobs.result(job)
    ended = await opened.jobs.find(ALICE, Job(job.id, job.task, job.queue).id)
    assert abs(ended.created - waiting.created) < timedelta(seconds=1)
