"""The life of a job: one delivery through its stages.

decode -> admit -> run -> encode -> store -> publish the result -> reply -> settle. A stage gives
its value or raises; `_outcome_of` turns what was raised into an outcome, `job.decide` says what the
outcome means, and `conclusion` carries that out.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from consumer import job as outcomes
from consumer.admission import NANOSECONDS, Admission, Job
from consumer.conclusion import Conclusion
from consumer.device import Device
from consumer.early_cancellations import EarlyCancellations
from consumer.heartbeat import Lease
from consumer.job import Decision, Outcome, Publish, State, decide
from consumer.pictures import Pictures
from consumer.ports.bus import Delivery, Events, Queue, QueuedRequest, StopAck, Workers
from consumer.ports.media import Images
from consumer.ports.model import Inference, ModelDescription, ModelError, Runner, RunnerOutput
from consumer.ports.store import Artifacts
from consumer.ports.telemetry import JobTrace, NoTracer, Observer, Tracer
from consumer.request_ids import RequestIds
from consumer.run import Reason, Stopped
from consumer.telemetry import JobReport
from consumer.turns import Place, Turns
from consumer.verdict import TooManyDeliveries, name_of, outcome_of
from generation_contracts import (
    ImageToTextRequest,
    Request,
    TextOutput,
    TextToImageRequest,
    request_digest,
)

if TYPE_CHECKING:
    from PIL.Image import Image

log = structlog.get_logger()

_AT_THE_END = frozenset({State.CONCLUDING, State.SETTLED, State.ABANDONED})
LAST_WORD = 1.0  # seconds to give a delivery back when the process ends at once


@dataclass(frozen=True)
class Limits:
    """The worker's own numbers.

    Attributes:
        ack_wait: Seconds that a lease lasts without a renewal.
        max_attempts: How often a request is tried whose model raises, or whose workers die.
        stall_timeout: Seconds without a step after which the inference thread is taken to hang.
        retry_delay: Seconds before the second attempt at a request whose model raised; each
            further one waits twice as long as the one before.
    """

    ack_wait: float
    max_attempts: int
    stall_timeout: float
    retry_delay: float = 2.0


class Execution:
    """Takes deliveries through their lives, by ports only.

    Args:
        worker: Name of this process in its events.
        admission: How deliveries are read.
        limits: The worker's numbers.
        model: What the loaded runner says of itself.
        runner: The loaded model.
        inference: The one thread in which it runs.
        events: The way to the bus.
        queue: The requests in their streams.
        workers: All workers of the installation.
        artifacts: The object store.
        images: The pictures' codec.
        observer: Told what happens.
        prompt_in_pictures: Whether the files of pictures say their prompts.
        tracer: Where traces go; None: nowhere.
        turns: How much may be in hand; None: one at a time.
        ending: Called when this process must end, before anything is given back.
    """

    def __init__(
        self,
        *,
        worker: str,
        admission: Admission,
        limits: Limits,
        model: ModelDescription,
        runner: Runner,
        inference: Inference,
        events: Events,
        queue: Queue,
        workers: Workers,
        artifacts: Artifacts,
        images: Images,
        observer: Observer,
        prompt_in_pictures: bool = False,
        tracer: Tracer | None = None,
        turns: Turns | None = None,
        ending: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._admission = admission
        self._task = admission.task
        self._limits = limits
        self._model = model
        self._runner = runner
        self._ids = RequestIds(admission=admission, events=events, queue=queue, workers=workers)
        self._early_cancellations = EarlyCancellations()
        self._turns = turns or Turns()
        self._ending = ending
        self._pictures = Pictures(
            artifacts,
            images,
            task=self._task,
            model=model.info,
            prompt_in_files=prompt_in_pictures,
            others_idle=workers.others_idle,
        )
        self._observer = observer
        self._tracer = tracer or NoTracer()
        self._jobs: list[Job] = []
        self._conclusion = Conclusion(
            task=self._task,
            worker=worker,
            model=model,
            events=events,
            artifacts=artifacts,
            max_attempts=limits.max_attempts,
            retry_delay=limits.retry_delay,
            observer=observer,
        )
        self._device = Device(
            turns=self._turns,
            runner=runner,
            inference=inference,
            model=model,
            events=events,
            event_fields=self._conclusion.event_fields,
            stall_timeout=limits.stall_timeout,
            observer=observer,
        )

    async def room(self) -> None:
        """Wait until there is room for one more delivery."""
        await self._turns.room()

    async def handle(self, delivery: Delivery) -> int | None:
        """Take one delivery through its life; several may be under way.

        Returns:
            An exit code when this process must end (device lost, thread hung), else None.
        """
        place = self._turns.join(suspect=delivery.deliveries > 1)
        try:
            return await self._take(delivery, self._stages, place, leased=delivery)
        finally:
            place.leave()

    async def dead_letter(self, delivery: QueuedRequest) -> None:
        """Conclude a request that the server delivers no more, without running it.

        It is left alone while its id is in progress: its last worker may have been slow, not dead.
        """
        request_id = self._admission.open(delivery).request_id
        if await self._ids.in_progress(delivery, request_id):
            log.info("max_deliver_exhausted_in_progress", request_id=request_id)
            return
        await self._take(delivery, self._lost)

    @property
    def storing(self) -> bool:
        """Whether an output is on its way into the store, or waits for it to take it."""
        return any(job.state is State.STORING for job in self._jobs)

    @property
    def waits_for_store(self) -> bool:
        """Whether a job waits until the store answers."""
        return bool(self._pictures.waiting)

    def interrupt(self, reason: Reason, request_id: str | None = None) -> bool:
        """Ask a job, or all of them, to stop at the next step.

        Returns:
            Whether there was one to ask.
        """
        asked = [job for job in self._jobs if request_id in {None, job.request_id}]
        for job in asked:
            job.interrupt.set(reason)
        return bool(asked)

    def give_back_what_waits(self) -> None:
        """Give back what waits for the device behind another request, and has not begun."""
        for job in self._jobs:
            if self._turns.waits_behind_another(job.place):
                job.interrupt.set(Reason.DRAIN)

    async def request_stop(self, request_id: str) -> StopAck | None:
        """Stop a job at its next step because its sender wants it no more.

        A request that this worker does not have yet is stopped when it comes, within the next
        minutes.

        Args:
            request_id: Of the request, or of the chain that it belongs to.

        Returns:
            How it is held; None when this worker does not have it.
        """
        self._early_cancellations.add(request_id)
        held = [
            job for job in self._jobs if request_id in job.may_be_cancelled_as and not job.is_copy
        ]
        in_time = [job for job in held if job.state not in _AT_THE_END]
        for job in in_time:
            job.interrupt.set(Reason.CANCEL)  # before anything is waited for: it is in time now
            await job.delivery.mark_cancelled()
        if not held:
            return None
        return StopAck.STOPPING if in_time else StopAck.ENDING

    def is_running(self, request_id: str) -> bool:
        """Whether the model has been started for a request that this worker has."""
        return any(job.began for job in self._jobs if job.request_id == request_id)

    async def _take(
        self,
        delivery: QueuedRequest,
        stages: Callable[[Job], Awaitable[Outcome]],
        place: Place | None = None,
        *,
        leased: Delivery | None = None,
    ) -> int | None:
        job = self._admission.open(delivery, place, leased=leased)
        ack_wait = self._limits.ack_wait
        lease = nullcontext() if leased is None else Lease(leased, ack_wait=ack_wait)
        trace = self._begin_trace(job)
        self._jobs.append(job)
        self._observer.job_started()
        decision: Decision | None = None
        exit_code: int | None = None
        with structlog.contextvars.bound_contextvars(
            request_id=job.request_id, task=str(self._task), attempt=delivery.attempt
        ):
            try:
                async with lease:
                    outcome = await stages(job)
                    wanted = await self._decide(job, outcome)
                    exit_code = wanted.exit_code  # stands even if the end goes wrong
                    if exit_code is not None and self._ending is not None:
                        await self._ending()
                    decision = await self._conclusion.conclude(job, wanted)
            except asyncio.CancelledError:
                if await self._give_back(job):
                    decision = decide(outcomes.Draining(), attempt=1, max_attempts=1)
                raise
            except Exception as error:
                # Nobody knows how far it came: the lease runs out and the request comes again.
                log.exception("job_abandoned")
                if place is not None and await self._failed_too_often(job):
                    decision = await self._conclusion.give_up(job, type(error).__name__)
            finally:
                self._jobs.remove(job)
                self._ids.release(job)
                job.over.set()
                job.place.leave()
                self._report(job, decision)
                trace.end(outcome=name_of(decision), queued=job.queued, stages=job.stages)
        return exit_code

    def _begin_trace(self, job: Job) -> JobTrace:
        trace = self._tracer.begin(
            trace_parent=job.envelope.trace_parent,
            began=round(job.delivery.stored_at.timestamp() * NANOSECONDS),
            attributes={
                "generation.request_id": job.request_id,
                "generation.task": str(self._task),
                "generation.attempt": job.delivery.attempt,
                "generation.model": self._model.info.id,
            },
        )
        # What this job publishes belongs to its own span.
        job.envelope = replace(job.envelope, trace_parent=trace.trace_parent)
        return trace

    # -- the stages -------------------------------------------------------------------------------

    async def _stages(self, job: Job) -> Outcome:
        timer: asyncio.TimerHandle | None = None
        try:
            request = self._read(job)
            if job.delivery.attempt > 1:
                await self._read_marks(job)
            if any(one in self._early_cancellations for one in job.may_be_cancelled_as):
                job.interrupt.set(Reason.CANCEL)
            if request.deadline is not None:
                left = (request.deadline - datetime.now(UTC)).total_seconds()
                timer = asyncio.get_running_loop().call_later(
                    max(0.0, left), job.interrupt.set, Reason.DEADLINE
                )
            await self._ids.acquire(job)
            pictures = await self._admit(job, request)
            output = await self._device.run(job, pictures)
            del pictures  # nothing of them is needed while the output is stored
            await self._keep(job, request, output)
            if job.interrupt.reason is Reason.CANCEL:
                # Whoever cancelled has been told that it stops. A deadline or a drain that comes as
                # late as this is too late.
                job.interrupt.check()
        except Exception as error:  # noqa: BLE001 - each of them is an outcome
            return outcome_of(error)
        finally:
            if timer is not None:
                timer.cancel()
        return outcomes.Done()

    async def _lost(self, job: Job) -> Outcome:
        try:
            self._read(job)
            await self._ids.acquire(job)
            job.uncounted = job.delivery.uncounted + await job.delivery.marked_uncounted()
            if await job.delivery.was_cancelled():
                return outcomes.Cancelled()
        except Exception as error:  # noqa: BLE001 - each of them is an outcome
            return outcome_of(error)
        if job.attempts_so_far < self._limits.max_attempts:
            return outcomes.DeliveriesUsedUp()
        return outcomes.WorkerLost()

    async def _read_marks(self, job: Job) -> None:
        job.was_cancelled = await job.delivery.was_cancelled()
        if job.was_cancelled:
            job.interrupt.set(Reason.CANCEL)
        if not job.place.suspect:
            return  # it was queued again after a failed attempt, and its worker lives
        requeued = await job.delivery.marked_uncounted()
        job.uncounted = job.delivery.uncounted + requeued
        if job.delivery.deliveries - requeued == 1:
            job.place.clear()  # a rollout of the workers, for example
        elif job.leased is not None and job.place.in_company:
            # If the worker dies now, it may be of another one: what waits behind a request that
            # kills three workers must not become a dead letter with it. `_be_alone` ends that.
            await job.leased.mark_uncounted()
            job.uncounted = job.delivery.uncounted + await job.delivery.marked_uncounted()

    async def _be_alone(self, job: Job) -> None:
        """Let those leave who were in hand before a suspect: what happens then is its own doing."""
        if job.place.suspect and job.place.in_company:
            await job.interrupt.during(self._turns.alone(job.place))
            await self._count(job)

    async def _count(self, job: Job) -> None:
        """Make this delivery a try: what has become of it is its own doing."""
        if job.leased is not None and job.place.suspect and job.place.in_company:
            await job.leased.mark_counted()
            job.uncounted = job.delivery.uncounted + await job.delivery.marked_uncounted()
            job.place.in_company = False

    async def _failed_too_often(self, job: Job) -> bool:
        try:
            await self._count(job)
        except Exception:
            log.exception("tries_not_counted")
            return False
        return job.attempt > self._limits.max_attempts

    def _read(self, job: Job) -> Request:
        job.request = request = self._admission.request(job.delivery)
        job.digest = request_digest(request)
        return request

    async def _admit(self, job: Job, request: Request) -> "list[Image]":
        await self._be_alone(job)
        if job.attempt > self._limits.max_attempts and not job.was_cancelled:
            raise TooManyDeliveries
        if request.deadline is not None and request.deadline <= datetime.now(UTC):
            raise Stopped(Reason.DEADLINE)
        self._runner.check(request)
        sources = request.images if isinstance(request, ImageToTextRequest) else ()
        pictures = await self._pictures.fetch(job, sources)
        job.interrupt.check()
        job.advance(State.ADMITTED)
        return pictures

    async def _keep(self, job: Job, request: Request, output: RunnerOutput) -> None:
        job.warnings, job.parameters = output.warnings, output.parameters
        if output.text is not None:
            job.outputs = (TextOutput(**asdict(output.text)),)
        elif isinstance(request, TextToImageRequest) and output.images:
            job.outputs = await self._pictures.keep(job, request, output)
        if not job.outputs:
            raise ModelError("NoOutput")

    # -- the end ----------------------------------------------------------------------------------

    async def _decide(self, job: Job, outcome: Outcome) -> Decision:
        if isinstance(outcome, outcomes.ModelRaised | outcomes.Broken):
            await self._count(job)
        attempt, most = job.attempt, self._limits.max_attempts
        decision = decide(outcome, attempt=attempt, max_attempts=most, is_copy=job.is_copy)
        if decision.publish is Publish.FAILED and not job.began:
            job.is_copy = await self._ids.belongs_to_another(job)
            decision = decide(outcome, attempt=attempt, max_attempts=most, is_copy=job.is_copy)
        return decision

    async def _give_back(self, job: Job) -> bool:
        if job.state in {State.SETTLED, State.ABANDONED}:
            return False
        try:
            await asyncio.wait_for(job.requeue(), LAST_WORD)
        except Exception as error:  # noqa: BLE001 - the cancellation goes on, and the lease runs out
            log.warning("not_given_back", error=type(error).__name__)
            return False
        return True

    def _report(self, job: Job, decision: Decision | None) -> None:
        report = JobReport(
            outcome=name_of(decision),
            attempt=job.delivery.attempt,
            queued=job.queued,
            inference=job.inference,
            encode=job.encode,
            upload=job.upload,
            dead_letter=decision is not None and decision.dead_letter,
        )
        self._observer.job_finished(report)
        log.info(
            "job_finished",
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(report).items()},
        )
