"""Jobs as JSON documents."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from consumer.gateway.errors import of_failure
from consumer.gateway.job_view import JobView, Numbers, State
from generation_client import AnyEvent
from generation_contracts import FailedEvent, ProgressEvent, Task, encode
from generation_contracts.queues import QueueInfo


class Progress(BaseModel):
    """The progress of a run."""

    step: int
    of: int
    eta: float | None = Field(description="seconds until the last step")


class ErrorDetails(BaseModel):
    """The error of a request or of a failed job."""

    message: str
    type: str
    code: str
    param: str | None


class JobDocument(BaseModel):
    """A job: a submitted request, its state and its result."""

    id: str
    object: Literal["job"] = "job"
    task: Task
    queue: str = Field(description="the name of the task, or of another queue of the task")
    state: State
    created: datetime | None
    position: int | None = Field(description="most requests before it in the queue")
    estimated_start: datetime | None = Field(description="null before the first measurement")
    progress: Progress | None
    metadata: dict[str, str] = Field(
        description="metadata of the request; empty until a worker has started the job"
    )
    status_url: str
    events_url: str
    cancel_url: str = Field(description="for DELETE")
    result: dict[str, Any] | None = Field(
        description="the terminal event; each file has a `content_url` at this gateway"
    )
    error: ErrorDetails | None


class JobListDocument(BaseModel):
    """A page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: Sequence[JobDocument]
    has_more: bool
    next: str | None = Field(description="`after` of the next page")


class OneQueue(BaseModel):
    """One queue."""

    task: Task
    queue: str
    model: str = Field(description="the id in `/v1/models`")
    waiting: int
    running: int
    pace_seconds: float | None = Field(
        description="seconds from one result to the next; null before the first measurement"
    )


class QueueDocument(BaseModel):
    """The queues; with API keys, only the jobs of the caller's tenant."""

    object: Literal["queue"] = "queue"
    tasks: Sequence[OneQueue] = Field(description="the default queue of each task")
    queues: Sequence[OneQueue] = Field(description="all queues")


def job_document(view: JobView) -> JobDocument:
    """Return the document of a job."""
    address = job_address(view.job.id)
    failed = view.result if isinstance(view.result, FailedEvent) else None
    return JobDocument(
        id=view.job.id,
        task=view.job.task,
        queue=view.job.queue,
        state=view.state,
        created=view.created,
        position=view.position,
        estimated_start=view.estimated_start,
        progress=_progress(view),
        metadata={} if view.last_event is None else view.last_event.metadata,
        status_url=address,
        events_url=f"{address}/events",
        cancel_url=address,
        result=None if view.result is None else event_json(view.result),
        error=failed and ErrorDetails(**of_failure(failed.failure).body["error"]),
    )


def one_queue(queue: QueueInfo, model: str, numbers: Numbers) -> OneQueue:
    """Return the document of a queue."""
    return OneQueue(
        task=queue.task,
        queue=queue.name,
        model=model,
        waiting=numbers.waiting,
        running=numbers.running,
        pace_seconds=numbers.pace,
    )


def job_address(job_id: str) -> str:
    """Return the path of a job."""
    return f"/v1/jobs/{job_id}"


def event_json(event: AnyEvent) -> dict[str, Any]:
    """Return the JSON of an event, with a `content_url` at this gateway for each file."""
    value: dict[str, Any] = json.loads(encode(event))
    for number, output in enumerate(value.get("outputs", ())):
        if "key" in output:
            output["content_url"] = f"{job_address(event.request_id)}/outputs/{number}"
    return value


def _progress(view: JobView) -> Progress | None:
    event = view.last_event
    if view.state != "running" or not isinstance(event, ProgressEvent):
        return None
    return Progress(step=event.step, of=event.of, eta=event.eta)
