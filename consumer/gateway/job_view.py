"""Jobs and their state, as the gateway knows it."""

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
    """A submitted request.

    Attributes:
        digest: Digest of the request; "" if this gateway does not know it.
        body_digest: Digest of the bytes, which a worker reports for a request it cannot decode.
        is_new: Whether this gateway has just queued the request, so that it has no result yet.
        queue: The queue of the request.
    """

    id: str
    task: Task
    queue: str
    digest: str = ""
    body_digest: str = ""
    is_new: bool = False


@dataclass(frozen=True)
class JobView:
    """The state of a job at one time.

    Attributes:
        state: `running` from the first event that this gateway has received until the attempt
            ends. A job that a worker has prefetched is `queued` until its first run; a prefetched
            retry is `running`.
        created: Time of submission; an estimate for an idempotent job that has ended.
        position: Most requests before it in the queue that are not running; None after its end.
        estimated_start: None before the first measurement, or if the job is not queued.
        last_event: The latest event that this gateway has received and keeps.
        result: The terminal event.
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
        job = Job(event.request_id, event.task, event.queue_name, event.request_digest)
        state: State = "cancelled"
        if isinstance(event, SucceededEvent):
            state = "succeeded"
        elif isinstance(event, FailedEvent):
            state = "failed"
        return cls(job, state, _created(event), last_event=event, result=event)


@dataclass(frozen=True)
class Numbers:
    """The numbers of queued and running jobs of a queue.

    Attributes:
        pace: Seconds from one result to the next; None before the first measurement.
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
