"""The next step of a chain: its requests, or the failed event that ends the chain at this step.

A crash between the stored event of a step and the next requests is harmless. The step is delivered
again, the worker finds its stored event, and makes the same next requests.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import structlog

from consumer.jobs.admission import Job
from consumer.jobs.outcomes import FailedOutcome, MalformedRequest, ParameterRefused, StreamFull
from consumer.ports.bus import (
    Events,
    MessageTooLarge,
    Queue,
    QueueFull,
    ResultEvent,
    ResultUnreadable,
)
from consumer.ports.telemetry import Observer
from generation_contracts import (
    ChainLink,
    ChainPlace,
    FailedEvent,
    InvalidRequest,
    Request,
    SucceededEvent,
    Task,
    next_requests,
    request_digest,
)
from generation_contracts.chains import id_of, next_link
from generation_contracts.queues import why_no_queue

log = structlog.get_logger()


def next_step_of(job: Job, event: ResultEvent | None) -> Request | None:
    """Return the job's request if its chain has a next step after this event, else None."""
    if isinstance(event, SucceededEvent) and job.request is not None and job.request.then:
        return job.request
    return None


class ChainContinuation:
    """Queues the next requests of a chain.

    Args:
        worker: Name of this process in events.
        events: Publishes requests and results.
        queues: Finds the queue of a step that names a model.
        reply: Sends an event to the reply subject of a job.
        observer: Notified of chains that end at a step that cannot be queued.
    """

    def __init__(
        self,
        *,
        worker: str,
        events: Events,
        queues: Queue,
        reply: Callable[[Job, ResultEvent], Awaitable[None]],
        observer: Observer,
    ) -> None:
        self._worker = worker
        self._events = events
        self._queues = queues
        self._reply = reply
        self._observer = observer

    async def queue_next(self, job: Job, request: Request, event: SucceededEvent) -> None:
        """Queue the requests that follow from a step's event, or end the chain.

        Args:
            job: The step.
            request: Its request, which has a next step.
            event: Its terminal event.
        """
        try:
            following = next_requests(request, job.request_id, event)
        except InvalidRequest as error:
            await self.end_at_next(job, request, MalformedRequest(str(error), error.problems))
            return
        for task, next_request in following:
            await self._queue(job, task, next_request)

    async def end_at_next(self, job: Job, request: Request, outcome: FailedOutcome) -> None:
        """Store a failed event under the id of the next step, and reply with it."""
        link, task = next_link(request, job.request_id), Task(request.then[0].task)
        await self._end_at(job, task, link, outcome, job.digest)

    async def _queue(self, job: Job, task: Task, request: Request) -> None:
        if request.chain is None:
            raise AssertionError("a next request without its position in the chain")
        refused: FailedOutcome
        queue = await self._queues.queue_for(task, request.model)
        digest = request_digest(request)
        if queue is None:
            refused = ParameterRefused(f"model: {why_no_queue(request.model, task)}", "model")
            await self._end_at(job, task, request.chain, refused, digest)
            return
        try:
            await self._events.publish_request(
                queue,
                request,
                reply_to=job.envelope.reply_to,
                trace_parent=job.envelope.trace_parent,
            )
        except MessageTooLarge:
            refused = MalformedRequest("the next request is too large for the bus")
        except QueueFull:
            refused = StreamFull()
        else:
            return
        await self._end_at(job, task, request.chain, refused, digest, queue=queue)

    async def _end_at(
        self,
        job: Job,
        task: Task,
        link: ChainLink,
        outcome: FailedOutcome,
        digest: str,
        *,
        queue: str | None = None,
    ) -> None:
        # The digest is that of the step's own request. If the previous step is delivered again and
        # the step is queued after all, the step finds this event as its result.
        if job.request is None:
            raise AssertionError("a chain without a request")
        event = FailedEvent(
            request_id=id_of(link),
            task=task,
            queue=None if queue == task else queue,
            sequence=0,
            time=datetime.now(UTC),
            worker=self._worker,
            attempt=1,
            metadata=job.request.metadata,
            chain=ChainPlace(id=link.id, step=link.step, of=link.step + len(job.request.then) - 1),
            request_digest=digest,
            failure=outcome.failure,
        )
        log.warning("chain_broken", chain=link.id, step=link.step, code=str(outcome.code))
        try:
            stored = await self._events.publish_result(
                event, trace_parent=job.envelope.trace_parent
            )
        except ResultUnreadable:
            return
        if stored == event:
            self._observer.chain_broken(outcome.code)
        await self._reply(job, stored if stored.request_digest == digest else event)
