"""Jobs: the requests of tenants, from submission to result."""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus

import structlog

from consumer.background_tasks import cancel_and_wait
from consumer.bus.connection import Bus
from consumer.bus.event_feed import EventFeed
from consumer.bus.queue_view import QueuePosition, QueueView
from consumer.gateway.errors import ApiError, not_found, of_error, of_failure
from consumer.gateway.event_log import Entry, EventId, EventLog
from consumer.gateway.job_list import JobList
from consumer.gateway.job_pages import JobPages, Page
from consumer.gateway.job_view import Job, JobView, Numbers, State
from consumer.gateway.pace import Pace
from consumer.gateway.results import Results, as_api_errors, require_address
from consumer.gateway.runs import Runs
from consumer.gateway.submission import Limits, Submission
from consumer.gateway.tenants import Caller, submitted_at, tag_of
from consumer.settings import Settings
from generation_client import (
    AnyEvent,
    GenerationClient,
    RequestCancelled,
    RequestIdTaken,
    ServiceUnavailable,
)
from generation_client.lookup import ResultEvent
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    Request,
    StoredArtifact,
    SucceededEvent,
    Task,
    TerminalEvent,
)

__all__ = ["Job", "JobView", "Jobs", "Limits", "Page", "State"]

log = structlog.get_logger()

MAX_OUTAGE = 120.0  # seconds of failed reads without an event until a waiting call fails
ABANDON_PAUSE = 1.0  # seconds between two attempts to cancel an abandoned job
ABANDON_ATTEMPTS = 500  # per second, for all abandoned jobs together
MOST_ABANDONED = 10_000  # abandoned jobs whose cancellation is pending
CANCELLATIONS = 32  # concurrent cancellations of abandoned jobs
CLOSE_WITHIN = 5.0  # seconds for pending cancellations at shutdown
DOWNLOADS = 16  # concurrent downloads, each with its file in memory
RECENT = 10_000  # jobs whose queues are cached


class Jobs:
    """The jobs of all tenants; a method with a caller only uses jobs of the caller's tenant.

    Args:
        bus: The gateway's connection.
        client: A client on the same connection.
        settings: The subject root, and the longest time that a caller may wait.
        events: Keeps recent events.
        view: Reads the queues.
        ids: The ids of all jobs, read by the same view.
        limits: Admits requests.
    """

    def __init__(
        self,
        bus: Bus,
        client: GenerationClient,
        settings: Settings,
        *,
        events: EventLog,
        view: QueueView,
        limits: Limits,
        ids: JobList | None = None,
    ) -> None:
        self._bus = bus
        self._client = client
        self._events = events
        self._view = view
        self._ids = ids = ids or JobList(view)
        self._limits = limits
        self._results = Results(bus, client)
        self._submission = Submission(
            bus,
            settings.subjects,
            view=view,
            ids=ids,
            results=self._results,
            limits=limits,
            wait=timedelta(seconds=settings.gateway_wait),
        )
        self._wait = settings.gateway_wait
        self._pages = JobPages(ids, self._read_view, view.queues)
        self._pace = Pace()
        self._runs = Runs()
        self._queues: OrderedDict[str, str] = OrderedDict()
        self._downloads = asyncio.Semaphore(DOWNLOADS)
        self._cancellations = asyncio.Semaphore(CANCELLATIONS)
        self._abandoning: set[asyncio.Task[None]] = set()
        self._feed = EventFeed(
            bus,
            settings.subjects,
            is_watched=lambda request_id: tag_of(request_id) is not None,
            on_progress=self._runs.add,
            on_event=self._receive,
        )

    async def open(self) -> None:
        """Subscribe to all events.

        Raises:
            BusUnavailable: The connection is closed.
        """
        for listener in (self._events.interrupt, self._ids.interrupt):
            self._bus.on_reconnect(listener)
        await self._feed.open()

    async def close(self) -> None:
        """Finish the pending cancellations within `CLOSE_WITHIN` seconds."""
        if self._abandoning:
            await asyncio.wait(self._abandoning, timeout=CLOSE_WITHIN)
        await cancel_and_wait(*self._abandoning)

    async def submit(
        self,
        caller: Caller,
        request: Request,
        *,
        queue: str | None = None,
        idempotency_key: str | None = None,
        wait: bool = True,
    ) -> Job:
        """Queue a request within the caller's bounds.

        A second submit with the same idempotency key queues nothing and returns the same job.

        Args:
            caller: The sender of the request.
            request: The request, without an id.
            queue: The queue for the request; None: the default queue of its task.
            idempotency_key: The caller's key, if any.
            wait: Whether the caller waits for the result: the request then gets a deadline.

        Raises:
            InvalidRequest: A step of the chain cannot follow the step before it.
            ApiError: 400, 413, 422 (the key was used for another request), 429 or 503.
        """
        queue = queue or str(request.task)
        job = await self._submission.submit(
            caller, request, queue=queue, key=idempotency_key, wait=wait
        )
        self._remember(job.id, job.queue)
        return job

    async def events(
        self, job: Job, *, after: EventId | None = None
    ) -> AsyncGenerator[Entry, None]:
        """Yield the events of a job, up to and including its terminal event.

        Args:
            job: From `submit` or `find`.
            after: Only events after this one.

        Raises:
            ApiError: 422 if the result belongs to another request; 503 after a long outage.
        """
        unavailable_since: float | None = None

        async def read_result() -> AnyEvent | None:
            nonlocal unavailable_since
            try:
                found = await self._results.read(job.queue, job.id)
            except ServiceUnavailable:
                now = time.monotonic()
                unavailable_since = unavailable_since or now
                if self._bus.closed.is_set() or now - unavailable_since > MAX_OUTAGE:
                    raise
                return None
            unavailable_since = None
            return found

        following = self._events.follow(
            job.id, after=after, read_result=read_result, read_first=not job.is_new
        )
        with as_api_errors():
            async with aclosing(following) as entries:
                async for entry in entries:
                    unavailable_since = None
                    _require_same(job, entry.event)
                    yield entry

    async def result(self, job: Job) -> SucceededEvent:
        """Wait until a job has succeeded.

        Raises:
            ApiError: The job has failed or was cancelled.
        """
        async with aclosing(self.events(job)) as entries:
            async for entry in entries:
                match entry.event:
                    case SucceededEvent():
                        return entry.event
                    case FailedEvent():
                        raise of_failure(entry.event.failure, job.id)
                    case CancelledEvent():
                        raise of_error(RequestCancelled(entry.event))
        raise AssertionError("the events end with a terminal event")

    async def find(self, caller: Caller, job_id: str) -> JobView:
        """Return the view of one job.

        Raises:
            ApiError: 404 or 503.
        """
        if not caller.tenant.owns(job_id):
            raise not_found()
        known = self._queues.get(job_id)
        with as_api_errors():
            queues = await self._view.queues() if known is None else (known,)
            view = await self._read_view(job_id, *queues)
        if view is None:
            raise not_found()
        self._remember(job_id, view.job.queue)
        return view

    async def view(self, job: Job) -> JobView:
        """Return the view of a job that was just submitted.

        Raises:
            ApiError: 404 or 503.
        """
        with as_api_errors():
            # A job that has just been queued rarely has a result, so the queue is read first.
            view = await self._unfinished(job.id, job.queue) if job.is_new else None
            view = view or await self._read_view(job.id, job.queue)
        if view is None:
            raise not_found()
        return view

    async def page(
        self,
        caller: Caller,
        *,
        states: Collection[State] = (),
        task: Task | None = None,
        queue: str | None = None,
        limit: int = 20,
        after: str | None = None,
    ) -> Page:
        """List jobs, newest first.

        Args:
            caller: The owner of the jobs.
            states: Only jobs in one of these states; empty: all jobs.
            task: Only jobs of this task.
            queue: Only jobs of this queue.
            limit: Largest number of jobs.
            after: Id of the last job of the previous page; None starts with the newest job.

        Raises:
            ApiError: 404: the job `after` does not exist; 503.
        """
        with as_api_errors():
            return await self._pages.page(
                caller.tenant, states=states, task=task, queue=queue, limit=limit, after=after
            )

    async def waiting(self, job: Job) -> JobView | None:
        """Return the view of a queued job; None if it is running or has ended.

        Raises:
            ApiError: 503.
        """
        with as_api_errors():
            view = await self._unfinished(job.id, job.queue)
        return view if view is not None and view.state == "queued" else None

    async def numbers(self, caller: Caller) -> dict[str, Numbers]:
        """Count queued and running jobs by queue: of the caller's tenant, or without keys all jobs.

        Raises:
            ApiError: 503.
        """
        with as_api_errors():
            queues = await self._view.queues()
            if caller.key_id:
                own = await self._ids.unfinished(caller.tenant)
                all_of = Counter(own.values())
                running = Counter(queue for id_, queue in own.items() if self._runs.has(queue, id_))
            else:
                states = {queue: await self._view.state(queue) for queue in queues}
                all_of = Counter({q: s.waiting + s.in_flight for q, s in states.items()})
                running = Counter(
                    {q: min(s.in_flight, self._runs.count(q)) for q, s in states.items()}
                )
        return {
            name: Numbers(all_of[name] - running[name], running[name], self._pace.seconds(name))
            for name in queues
        }

    async def cancel(self, caller: Caller, job_id: str) -> JobView:
        """Cancel a queued or running job, or the chain that starts with it.

        Returns:
            The job: cancelled, or running until the device is free.

        Raises:
            ApiError: 404, 409 if the job has succeeded or failed, or 503.
        """
        view = await self.find(caller, job_id)
        if view.state == "cancelled":
            return view
        if view.result is not None and not _continues(view.result):
            raise _has_ended(job_id)
        with as_api_errors():
            reply = await self._client.cancel(job_id)
        if reply.status == "finished":
            raise _has_ended(job_id)
        return await self.find(caller, job_id)

    async def abandon(self, job: Job) -> None:
        """Cancel a job whose client has disconnected, in the background. Never raises.

        A cancellation needs a running worker, so it is retried until the deadline of the job. A
        worker that starts after the deadline does not run the job.
        """
        if len(self._abandoning) >= MOST_ABANDONED:
            log.warning("job_not_cancelled", job=job.id, reason="too many pending cancellations")
            return
        # In another task, because the task of the HTTP request may already be cancelled.
        abandoning = asyncio.create_task(self._abandon(job.id), name="abandon")
        self._abandoning.add(abandoning)
        abandoning.add_done_callback(self._abandoning.discard)

    async def content(self, event: SucceededEvent, number: int) -> bytes:
        """Read the file of one output.

        Raises:
            ApiError: 404: the file does not exist, or its URL has expired; 503: the store is
                unreachable.
        """
        outputs = event.outputs
        output = outputs[number] if 0 <= number < len(outputs) else None
        if not isinstance(output, StoredArtifact):
            raise not_found("this job has no such output")
        require_address(output)
        with as_api_errors():
            async with self._downloads:
                return await self._client.download(output)

    # -- internal ---------------------------------------------------------------------------------

    def _receive(self, event: AnyEvent, size: int) -> None:
        self._pace.add(event)
        if isinstance(event, TerminalEvent):
            self._runs.remove(event.queue_name, event.request_id)
        if tag_of(event.request_id) is None:
            return
        self._events.add(event, size)
        if isinstance(event, TerminalEvent):
            self._limits.ended(event.request_id)
            self._ids.add_ended(event.request_id, event.queue_name)

    async def _read_view(self, job_id: str, *queues: str) -> JobView | None:
        """Return the view of a job of one of these queues; None if the job does not exist."""
        view = await self._ended(job_id, *queues)
        view = view or await self._unfinished(job_id, *queues)
        # The job may have ended between the two reads.
        return view or await self._ended(job_id, *queues)

    async def _ended(self, job_id: str, *queues: str) -> JobView | None:
        event = self._events.latest(job_id)
        if not isinstance(event, ResultEvent):
            event = await self._results.find(job_id, *queues)
        return None if event is None else JobView.of_result(event)

    async def _unfinished(self, job_id: str, *queues: str) -> JobView | None:
        known = await self._view.queues()
        for queue in filter(known.__contains__, queues):
            place = await self._view.position(queue, job_id)
            if place is not None:
                return self._view_of(Job(job_id, known[queue].task, queue), place)
        return None

    def _view_of(self, job: Job, place: QueuePosition) -> JobView:
        view = JobView(
            job,
            "running",
            submitted_at(job.id) or place.stored_at,
            position=0,
            last_event=self._events.latest(job.id),
        )
        # A worker may have prefetched the job. A retry is not delivered before its attempt.
        if place.delivered and self._runs.has(job.queue, job.id):
            return view
        position = max(0, place.before - self._runs.count(job.queue))
        seconds = self._pace.until_start(job.queue, position)
        start = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
        return replace(view, state="queued", position=position, estimated_start=start)

    async def _abandon(self, job_id: str) -> None:
        until = time.monotonic() + self._wait
        logged = ""
        while True:
            try:
                async with self._cancellations:
                    reply = await self._client.cancel(job_id)
            except Exception as error:  # noqa: BLE001 - the client has disconnected
                reason = str(error)[:200]
                if reason != logged:
                    log.warning("job_not_cancelled", job=job_id, reason=reason)
                    logged = reason
                if time.monotonic() > until or self._bus.closed.is_set():
                    return
                await asyncio.sleep(max(ABANDON_PAUSE, len(self._abandoning) / ABANDON_ATTEMPTS))
            else:
                log.info("job_abandoned", job=job_id, status=reply.status)
                return

    def _remember(self, job_id: str, queue: str) -> None:
        self._queues[job_id] = queue
        self._queues.move_to_end(job_id)
        if len(self._queues) > RECENT:
            self._queues.popitem(last=False)


def _continues(event: ResultEvent) -> bool:
    """Return whether a job has ended as the first step of a chain that continues."""
    chain = event.chain
    if chain is None or not isinstance(event, SucceededEvent):
        return False
    return chain.id == event.request_id and chain.step < chain.of


def _require_same(job: Job, event: AnyEvent) -> None:
    if not isinstance(event, TerminalEvent) or not job.digest:
        return
    if event.request_digest not in {job.digest, job.body_digest}:
        raise RequestIdTaken


def _has_ended(job_id: str) -> ApiError:
    return ApiError(
        HTTPStatus.CONFLICT, "the job has ended already", "job_has_ended", request_id=job_id
    )
