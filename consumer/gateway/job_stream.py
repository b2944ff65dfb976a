"""The events of a job as server-sent events, after its positions in the queue."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from datetime import timedelta
from typing import Any

from consumer.background_tasks import cancel_and_wait
from consumer.gateway.errors import ApiError
from consumer.gateway.event_log import Entry, EventId
from consumer.gateway.job_document import event_json
from consumer.gateway.jobs import Jobs, JobView
from consumer.gateway.sse import sse_message

POSITION_INTERVAL = 1.0  # seconds between two reads of the queue for one stream
LEAST_CHANGE = timedelta(seconds=5)  # a smaller change of the estimate alone is not reported


async def job_messages(
    jobs: Jobs, view: JobView, after: EventId | None
) -> AsyncGenerator[bytes, None]:
    """Yield the messages of a stream, up to and including the terminal event.

    Args:
        jobs: Reads the events and the queue.
        view: The job.
        after: Only events after this one.

    Raises:
        ApiError: See `Jobs.events`.
    """
    async with aclosing(jobs.events(view.job, after=after)) as entries:
        following = asyncio.ensure_future(anext(entries, None))
        try:
            if after is None and view.state == "queued":
                async with aclosing(_positions(jobs, view, following)) as positions:
                    async for position in positions:
                        yield _queued(position)
            while (entry := await following) is not None:
                yield _message(entry)
                following = asyncio.ensure_future(anext(entries, None))
        finally:
            await cancel_and_wait(following)


async def _positions(
    jobs: Jobs, view: JobView, first_event: "asyncio.Future[Entry | None]"
) -> AsyncGenerator[JobView, None]:
    """Yield the view of a queued job when its position changes, until the first event."""
    current: JobView | None = view
    while current is not None:
        yield current
        sent, current = current, None
        while current is None or not _has_changed(sent, current):
            await asyncio.wait({first_event}, timeout=POSITION_INTERVAL)
            if first_event.done():
                return
            with suppress(ApiError):
                current = await jobs.waiting(sent.job)
                if current is None:
                    return


def _has_changed(old: JobView, new: JobView) -> bool:
    if old.position != new.position:
        return True
    if old.estimated_start is None or new.estimated_start is None:
        return old.estimated_start != new.estimated_start
    return abs(new.estimated_start - old.estimated_start) >= LEAST_CHANGE


def _queued(view: JobView) -> bytes:
    start = view.estimated_start
    data: dict[str, Any] = {
        "request_id": view.job.id,
        "task": view.job.task,
        "position": view.position,
        "estimated_start": None if start is None else start.isoformat(),
    }
    return sse_message(data, event="queued")


def _message(entry: Entry) -> bytes:
    kind = entry.event.type.rpartition(".")[2]
    return sse_message(event_json(entry.event), event=kind, event_id=str(entry.id))
