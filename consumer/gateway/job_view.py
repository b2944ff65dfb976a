"""What a job is, and what is known of it."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from consumer.gateway.tenants import submitted_at
from generation_client import AnyEvent
from generation_client.lookup import ResultEvent
from generation_contracts import FailedEvent, SucceededEvent, Task

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True)
class Job:
    """A request that was submitted.

    Attributes:
        digest: Of what it asks for; "" where this gateway does not know it.
        body_digest: Of its bytes, by which a worker names a request that it cannot read.
        is_new: Whether this gateway has queued it just now, so that it has no result yet.
    """

    id: str
    task: Task
    digest: str = ""
    body_digest: str = ""
    is_new: bool = False


@dataclass(frozen=True)
class JobView:
    """What is known of a job now.

    Attributes:
        state: `running` from the first event that this gateway has received, until that attempt
            ends. A worker may receive a job in advance: it is `queued` until its first run, and
            `running` where it is a retry.
        created: When it was submitted; an estimate for an idempotent job that has ended.
        position: How many requests that do not run are before it in its queue, at most; None where
            it has ended.
        estimated_start: None where nothing has been measured yet, or it does not wait.
        last_event: The latest one that this gateway has received and keeps.
        result: Its terminal event.
    """

    job: Job
    state: State
    created: datetime
    position: int | None = None
    estimated_start: datetime | None = None
    last_event: AnyEvent | None = None
    result: ResultEvent | None = None

    @classmethod
    def of_result(cls, event: ResultEvent) -> "JobView":
        """Return the view of a job that has ended."""
        job = Job(event.request_id, event.task, event.request_digest)
        state: State = "cancelled"
        if isinstance(event, SucceededEvent):
            state = "succeeded"
        elif isinstance(event, FailedEvent):
            state = "failed"
        return cls(job, state, _created(event), last_event=event, result=event)


@dataclass(frozen=True)
class Numbers:
    """How many jobs of a task wait and run.

    Attributes:
        pace: Seconds from one result to the next; None where nothing was measured yet.
    """

    waiting: int
    running: int
    pace: float | None


def _created(event: ResultEvent) -> datetime:
    known = submitted_at(event.request_id)
    if known is not None:
        return known
    took = 0.0
    if isinstance(event, SucceededEvent):
        timings = event.timings
        took = timings.queued + timings.inference + timings.encode + timings.upload
    return event.time - timedelta(seconds=took)
