"""The inference stage of a job: queues the run, waits for it, and publishes its progress."""

import base64
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import structlog

from consumer.inference.monitor import ThreadStalled, follow_run
from consumer.inference.progress import Update
from consumer.inference.run_queue import RunQueue, Ticket
from consumer.jobs.admission import Job
from consumer.jobs.states import State
from consumer.ports.bus import Events
from consumer.ports.model import DeviceLost, ModelDescription, Runner, RunnerOutput, RunRequest
from consumer.ports.telemetry import Observer
from generation_contracts import TASKS, ProgressEvent, Request, StartedEvent

if TYPE_CHECKING:
    from PIL.Image import Image

log = structlog.get_logger()


class InferenceStage:
    """Runs the requests of jobs on the inference thread.

    Args:
        queue: The queue of the inference thread.
        runner: The loaded model; only `batch_key` is called here.
        model: Description of the loaded model.
        events: Publishes progress.
        event_fields: Returns the fields that every event of a job has.
        stall_timeout: Seconds without a step after which a run counts as stalled.
        observer: Notified of each update.
    """

    def __init__(
        self,
        *,
        queue: RunQueue,
        runner: Runner,
        model: ModelDescription,
        events: Events,
        event_fields: Callable[[Job], dict[str, Any]],
        stall_timeout: float,
        observer: Observer,
    ) -> None:
        self._queue = queue
        self._runner = runner
        self._model = model
        self._events = events
        self._event_fields = event_fields
        self._stall_timeout = stall_timeout
        self._observer = observer

    async def run(self, job: Job, images: "Sequence[Image]") -> RunnerOutput:
        """Run the request of a job and return its output.

        Raises:
            Stopped: The job was asked to stop, before or during its run.
            ThreadStalled: The run makes no step for `stall_timeout`.
            Exception: The exception of `Runner.run`.
        """
        ticket = job.slot.ticket
        request = job.seeded_request
        try:
            ready, key = time.monotonic(), self._batch_key(job, request)
            waits = job.slot.waits_behind_another or key is not None  # for others of its batch
            run = RunRequest(request, images, ticket.progress, job.cancel_token.poll)
            self._queue.mark_ready(ticket, run, key)
            del run
            await self._wait_until_begun(job, ticket)
            if waits:
                self._record_waiting(job, ticket, ready)
            await self._publish_started(job)
            job.advance(State.RUNNING)
            return await self._follow(job, ticket)
        except (DeviceLost, ThreadStalled):
            self._queue.close()
            raise
        finally:
            job.slot.release_device()

    def _batch_key(self, job: Job, request: Request) -> Hashable | None:
        several = self._queue.max_batch > 1 and not job.slot.redelivered
        return self._runner.batch_key(request) if several else None

    async def _wait_until_begun(self, job: Job, ticket: Ticket) -> None:
        await job.cancel_token.wait_for(ticket.began)
        if not ticket.began.done():
            if self._queue.remove(ticket):
                job.cancel_token.check()
            await ticket.began  # the inference thread has taken it, and stops at its first step
        job.slot.occupy_device()

    def _record_waiting(self, job: Job, ticket: Ticket, ready: float) -> None:
        # The inference thread recorded the time, because the event loop may be late.
        began = ticket.progress.first_began or ready
        job.queued += began - ready
        job.spent("waiting", began - ready, ago=time.monotonic() - began)

    async def _follow(self, job: Job, ticket: Ticket) -> RunnerOutput:
        async def publish(update: Update) -> None:
            self._observer.device_stepped()
            await self._publish_progress(job, update)

        try:
            return await follow_run(
                ticket, job.cancel_token, stall_timeout=self._stall_timeout, publish=publish
            )
        finally:
            now, progress = time.monotonic(), ticket.progress
            ended = now if progress.running else progress.ended
            job.inference = progress.seconds
            job.spent("inference", ended - (progress.first_began or now), ago=now - ended)

    async def _publish_started(self, job: Job) -> None:
        defaults = {
            name: value for name, value in self._model.defaults.items() if value is not None
        }
        started = StartedEvent(
            **self._event_fields(job),
            queued=job.queued,
            model=self._model.info,
            defaults=defaults,
        )
        await self._events.publish_progress(started, trace_parent=job.envelope.trace_parent)
        log.info("job_started", queued=round(job.queued, 3))

    async def _publish_progress(self, job: Job, update: Update) -> None:
        request = job.seeded_request
        spec = TASKS[request.task]
        streams, previews = spec.streams(request), spec.previews(request)
        preview = update.preview if previews else None
        each, left = update.seconds_per_step, update.of - update.step
        progress = ProgressEvent(
            **self._event_fields(job),
            step=update.step,
            of=update.of,
            seconds_per_step=each,
            eta=None if each is None else each * left,
            text=update.text or None if streams else None,
            preview=None if preview is None else base64.b64encode(preview).decode(),
        )
        await self._events.publish_progress(progress, trace_parent=job.envelope.trace_parent)
