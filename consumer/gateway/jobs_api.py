"""`/v1/jobs`: asynchronous jobs, their events and their outputs; `/v1/queue`: the queues."""

import json
from dataclasses import dataclass
from functools import reduce
from http import HTTPStatus
from operator import or_
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from pydantic import BaseModel, Field, StringConstraints, create_model

from consumer.gateway.answers import GENERATED, GENERATED_DESCRIBED
from consumer.gateway.context import GatewayPart, note_job
from consumer.gateway.contract import contract_request
from consumer.gateway.errors import not_found
from consumer.gateway.etags import matches
from consumer.gateway.event_log import EventId
from consumer.gateway.job_document import (
    JobDocument,
    JobListDocument,
    QueueDocument,
    job_address,
    job_document,
    one_queue,
)
from consumer.gateway.job_stream import job_messages
from consumer.gateway.job_view import JobView, State
from consumer.gateway.jobs import Jobs
from consumer.gateway.keys import Authenticated
from consumer.gateway.sse import EventStream
from consumer.gateway.tenants import Caller
from consumer.gateway.waiting import SenderPart
from generation_contracts import FileArtifact, JsonOutput, StoredArtifact, SucceededEvent, Task
from generation_contracts import Request as GenerationRequest
from generation_contracts.base import RequestPart, pattern_message
from generation_contracts.fields import MAX_CHAIN, Deadline, Metadata, ModelName
from generation_contracts.subjects import QueueName, RequestId
from generation_contracts.tasks import NEXT_STEP, TASKS, TaskSpec

MAX_PAGE = 100  # jobs

OUTPUT_TYPES = ("image/png", "image/webp", "image/jpeg", "text/plain", "application/json")
OUTPUT_HEADERS = {
    **GENERATED,
    "cache-control": "private, max-age=31536000, immutable",
    "x-content-type-options": "nosniff",
}

# A custom runner may return HTML with text of the sender: it must not run as a page of the gateway.
FILE_HEADERS = {"content-disposition": "attachment", "content-security-policy": "sandbox"}

EventIdText = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]{1,10}-[0-9]{1,10}$"),
    pattern_message("must be the id of an event: two numbers with - between them"),
]

router = APIRouter(tags=["jobs"])


class _JobFields(RequestPart):
    """The fields of every job in addition to its parameters."""

    deadline: Deadline | None = Field(
        default=None,
        description="a job that has not ended by then fails with `deadline_exceeded`",
    )
    model: ModelName | None = Field(
        default=None, description="id of a model or name of a queue; absent: the default queue"
    )
    metadata: Metadata = Field(
        default_factory=dict, description="values of the sender, echoed in every event"
    )
    then: Annotated[tuple[NEXT_STEP, ...], Field(max_length=MAX_CHAIN)] = Field(
        default=(),
        description="routing slip: the following requests, each built from the previous result",
    )


def _job_body(spec: TaskSpec) -> type[BaseModel]:
    """Return the body of a job: the request of a task, without the envelope of the bus."""
    base = (spec.parameters, _JobFields)
    inherited = spec.parameters.model_fields.keys() | GenerationRequest.model_fields.keys()
    fields: dict[str, Any] = {"task": (Literal[str(spec.task)], ...)}
    for name, info in spec.request.model_fields.items():
        if name not in inherited:
            fields[name] = (info.annotation, info)
    name = spec.request.__name__.replace("Request", "Job")
    return create_model(name, __base__=base, __doc__=spec.request.__doc__, **fields)


_BODIES: Any = reduce(or_, (_job_body(spec) for spec in TASKS.values()))
JobBody = Annotated[_BODIES, Body(discriminator="task")]


@dataclass(frozen=True)
class OneJob:
    """The job of a request path, for its caller."""

    http: Request
    jobs: Jobs
    caller: Caller
    id: str

    async def find(self) -> JobView:
        """Return the view of the job.

        Raises:
            ApiError: 404 or 503.
        """
        view = await self.jobs.find(self.caller, self.id)
        note_job(self.http, view.job)
        return view


# A coroutine, because FastAPI calls plain functions in a thread.
async def _one_job(
    http: Request, gateway: GatewayPart, caller: Authenticated, job_id: str
) -> OneJob:
    return OneJob(http, gateway.jobs, caller, job_id)


class JobFilter(BaseModel):
    """The filter and the paging of the list of jobs."""

    state: list[State] = Field(default_factory=list, description="repeatable")
    task: Task | None = None
    queue: QueueName | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 20
    after: RequestId | None = Field(default=None, description="`next` of the page before")


@router.post("/v1/jobs", status_code=HTTPStatus.ACCEPTED, summary="Queue a job")
async def submit_job(sender: SenderPart, response: Response, body: JobBody) -> JobDocument:
    """Queue a job and return its URLs for status, events and cancellation at once.

    The same `Idempotency-Key` returns the same job, at any gateway.
    """
    # The raw body, because FastAPI converts values that the contract refuses, such as "512".
    fields: dict[str, Any] = json.loads(await sender.http.body(), parse_float=_number)
    del fields["task"]
    request = contract_request(Task(body.task), fields, {})
    call = await sender.submit(request, waits=False)
    response.headers["location"] = job_address(call.job.id)
    document = job_document(await call.view())
    return document.model_copy(update={"metadata": request.metadata})


@router.get("/v1/jobs", summary="List jobs")
async def list_jobs(
    gateway: GatewayPart, caller: Authenticated, query: Annotated[JobFilter, Query()]
) -> JobListDocument:
    """List the tenant's jobs, newest first. With a filter a page may be shorter than `limit`."""
    page = await gateway.jobs.page(
        caller,
        states=query.state,
        task=query.task,
        queue=query.queue,
        limit=query.limit,
        after=query.after,
    )
    return JobListDocument(
        data=[job_document(view) for view in page.jobs],
        has_more=page.next is not None,
        next=page.next,
    )


@router.get("/v1/jobs/{job_id}", summary="Get a job")
async def get_job(job: Annotated[OneJob, Depends(_one_job)]) -> JobDocument:
    """Return a job: its state, position in the queue, progress and result."""
    return job_document(await job.find())


@router.delete(
    "/v1/jobs/{job_id}",
    responses={HTTPStatus.ACCEPTED: {"model": JobDocument, "description": "The job is stopping."}},
    summary="Cancel a job",
)
async def cancel_job(job: Annotated[OneJob, Depends(_one_job)], response: Response) -> JobDocument:
    """Cancel a queued or running job.

    After 202 the job stops at the next step of the model and its `cancelled` event follows. A job
    that has succeeded or failed returns 409.
    """
    view = await job.jobs.cancel(job.caller, job.id)
    note_job(job.http, view.job)
    if view.state != "cancelled":
        response.status_code = HTTPStatus.ACCEPTED
    return job_document(view)


@router.get(
    "/v1/jobs/{job_id}/events",
    response_class=Response,
    responses={
        HTTPStatus.OK: {"content": {"text/event-stream": {}}},
        HTTPStatus.NO_CONTENT: {"description": "The client has read the last event before."},
    },
    summary="Watch a job",
)
async def watch_job(
    job: Annotated[OneJob, Depends(_one_job)],
    last_event_id: Annotated[
        EventIdText | None, Header(description="resume after this event")
    ] = None,
    last_event_id_in_query: Annotated[
        EventIdText | None, Query(alias="last_event_id", description="the same")
    ] = None,
) -> Response:
    """Stream the events of a job as server-sent events, up to its terminal event.

    While the job is queued, `queued` events have its position. The other events are those of the
    contract. A client can resume a broken stream with `Last-Event-ID` at any gateway. For some
    minutes no event is lost; later, only the terminal event is sent. A gateway that has started or
    lost its connection in between lacks the events of that time, except the terminal event.
    """
    last_read = last_event_id or last_event_id_in_query
    after = None if last_read is None else EventId.parse(last_read)
    view = await job.find()
    if after is not None and after.is_terminal:
        # An EventSource does not reconnect after 204.
        return Response(status_code=HTTPStatus.NO_CONTENT)
    return EventStream(job_messages(job.jobs, view, after))


@router.get(
    "/v1/jobs/{job_id}/outputs/{number}",
    response_class=Response,
    responses={
        HTTPStatus.OK: {
            "content": {media: {} for media in OUTPUT_TYPES},
            "headers": GENERATED_DESCRIBED,
        }
    },
    summary="Read an output",
)
async def read_output(
    job: Annotated[OneJob, Depends(_one_job)],
    number: int,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Return the file of an output, for clients that cannot reach the object store."""
    event = (await job.find()).result
    if not isinstance(event, SucceededEvent) or not 0 <= number < len(event.outputs):
        raise not_found("this job has no such output")
    output = event.outputs[number]
    if not isinstance(output, StoredArtifact):
        if isinstance(output, JsonOutput):
            text = json.dumps(output.value, ensure_ascii=False)
            return Response(text, media_type="application/json", headers=OUTPUT_HEADERS)
        return Response(output.text, media_type="text/plain", headers=OUTPUT_HEADERS)
    headers = {**OUTPUT_HEADERS, "etag": f'"{output.sha256}"'}
    if isinstance(output, FileArtifact):
        headers |= FILE_HEADERS
    if matches(if_none_match or "", headers["etag"]):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    content = await job.jobs.content(event, number)
    return Response(content, media_type=output.media_type, headers=headers)


@router.get("/v1/queue", summary="Get the queues")
async def get_queues(gateway: GatewayPart, caller: Authenticated) -> QueueDocument:
    """Return the numbers of queued and running jobs; with API keys, only of the tenant."""
    numbers = await gateway.jobs.numbers(caller)
    models = {queue.name: (queue, model) for queue, model in await gateway.catalogue.queues()}
    queues = [
        one_queue(queue, model.name, numbers[name])
        for name, (queue, model) in models.items()
        if name in numbers
    ]
    default = [queue for queue in queues if queue.queue == queue.task]
    return QueueDocument(tasks=default, queues=queues)


def _number(text: str) -> int | float:
    """Parse a JSON number with a fraction; 512.0 becomes the integer 512."""
    number = float(text)
    return int(number) if number.is_integer() else number
