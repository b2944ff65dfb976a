"""Takes one delivery through the stages of a job.

decode -> admit -> run -> encode -> store -> publish the result -> reply -> settle. A stage returns
its value or raises. `outcomes.classify_exception` turns an exception into an outcome,
`outcomes.decide` turns the outcome into a decision, and `Finalizer` carries the decision out.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from consumer.inference.cancel_token import StopReason
from consumer.inference.run_queue import RunQueue
from consumer.jobs import outcomes
from consumer.jobs.admission import NANOSECONDS, Admission, Job
from consumer.jobs.early_cancellations import EarlyCancellations
from consumer.jobs.finalizer import Finalizer
from consumer.jobs.image_stages import ImageStages
from consumer.jobs.in_flight import InFlight, Slot, unqueued_slot
from consumer.jobs.inference_stage import InferenceStage
from consumer.jobs.lease import Lease
from consumer.jobs.outcomes import (
    Decision,
    Outcome,
    Publish,
    classify_exception,
    decide,
    outcome_label,
)
from consumer.jobs.request_ids import RequestIds
from consumer.jobs.served_model import ServedModel
from consumer.jobs.states import FINAL, State
from consumer.ports.bus import Delivery, Events, Queue, QueuedRequest, StopAck, Workers
from consumer.ports.media import Credentials, Images
from consumer.ports.model import (
    GeneratedJson,
    GeneratedOutput,
    GeneratedText,
    ModelDescription,
    ModelError,
    Runner,
    RunnerOutput,
)
from consumer.ports.store import Artifacts
from consumer.ports.telemetry import JobTrace, NoTracer, Observer, Tracer
from consumer.telemetry import JobReport
from generation_contracts import (
    TASKS,
    FileArtifact,
    ImageArtifact,
    JsonOutput,
    Request,
    TextOutput,
    request_digest,
)
from generation_contracts.artifacts import Output

if TYPE_CHECKING:
    from PIL.Image import Image

log = structlog.get_logger()

_ENDING = FINAL | {State.FINALIZING}
RELEASE_TIMEOUT = 1.0  # seconds to requeue a delivery when the process ends at once


@dataclass(frozen=True)
class Limits:
    """Limits of one worker.

    Attributes:
        ack_wait: Seconds that a lease lasts without a renewal.
        max_attempts: Number of attempts at a request whose model raises, or whose workers die.
        stall_timeout: Seconds without a step after which a run counts as stalled.
        retry_delay: Seconds before the second attempt at a request whose model raised. The delay
            doubles with each further attempt.
    """

    ack_wait: float
    max_attempts: int
    stall_timeout: float
    retry_delay: float = 2.0


class Executor:
    """Processes the deliveries of one worker.

    Args:
        worker: Name of this process in events.
        admission: Reads deliveries.
        limits: Limits of this worker.
        model: Description of the loaded model.
        runner: The loaded model.
        served: Refuses requests for other models; None: no request is refused.
        run_queue: The queue of the inference thread.
        events: Publishes events and finds results.
        queue: The stored requests.
        workers: All workers of the installation.
        artifacts: The object store.
        images: The image codec.
        observer: Notified of what happens.
        prompt_in_images: Whether the output files contain their prompts.
        credentials: Signs the output files; None: they are not signed.
        credentials_required: Whether a file that cannot be signed fails its request.
        tracer: Records traces; None: no traces.
        most_in_flight: Requests in flight at most.
        before_exit: Called when this process must end, before any delivery is requeued.
    """

    def __init__(
        self,
        *,
        worker: str,
        admission: Admission,
        limits: Limits,
        model: ModelDescription,
        runner: Runner,
        served: ServedModel | None = None,
        run_queue: RunQueue,
        events: Events,
        queue: Queue,
        workers: Workers,
        artifacts: Artifacts,
        images: Images,
        observer: Observer,
        prompt_in_images: bool = False,
        credentials: Credentials | None = None,
        credentials_required: bool = False,
        tracer: Tracer | None = None,
        most_in_flight: int = 1,
        before_exit: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._admission = admission
        self._task = admission.task
        self._queue_name = admission.queue_name
        self._limits = limits
        self._model = model
        self._runner = runner
        self._served = served
        self._ids = RequestIds(admission=admission, events=events, queue=queue, workers=workers)
        self._early_cancellations = EarlyCancellations()
        self._in_flight = InFlight(run_queue, most=most_in_flight)
        self._before_exit = before_exit
        self._image_stages = ImageStages(
            artifacts,
            images,
            queue=admission.queue_name,
            model=model.info,
            prompt_in_files=prompt_in_images,
            others_idle=workers.others_idle,
            credentials=credentials,
            credentials_required=credentials_required,
        )
        self._observer = observer
        self._tracer = tracer or NoTracer()
        self._jobs: list[Job] = []
        self._finalizer = Finalizer(
            task=self._task,
            queue=admission.queue_name,
            worker=worker,
            model=model,
            events=events,
            queues=queue,
            artifacts=artifacts,
            retry_delay=limits.retry_delay,
            observer=observer,
        )
        self._inference = InferenceStage(
            queue=run_queue,
            runner=runner,
            model=model,
            events=events,
            event_fields=self._finalizer.event_fields,
            stall_timeout=limits.stall_timeout,
            observer=observer,
        )

    async def room(self) -> None:
        """Wait until there is room for one more delivery."""
        await self._in_flight.room()

    async def handle(self, delivery: Delivery) -> int | None:
        """Process one delivery. Several deliveries may be in progress at the same time.

        Returns:
            An exit code when this process must end (device lost, run stalled), else None.
        """
        slot = self._in_flight.join(redelivered=delivery.deliveries > 1)
        try:
            return await self._process(delivery, self._run_stages, slot, leased=delivery)
        finally:
            slot.leave()

    async def handle_exhausted(self, delivery: QueuedRequest) -> None:
        """Finalize a max-deliver-exhausted request, without running it.

        Does nothing while the request id is in progress: the last worker may be slow, not dead.
        """
        request_id = self._admission.open(delivery).request_id
        if await self._ids.in_progress(delivery, request_id):
            log.info("max_deliver_exhausted_in_progress", request_id=request_id)
            return
        await self._process(delivery, self._classify_exhausted, unqueued_slot())

    @property
    def storing(self) -> bool:
        """Whether a job is storing its outputs, or waits for the store to take them."""
        return any(job.state is State.STORING for job in self._jobs)

    @property
    def waits_for_store(self) -> bool:
        """Whether a job waits until the store answers."""
        return bool(self._image_stages.waiting)

    def interrupt(self, reason: StopReason, request_id: str | None = None) -> bool:
        """Ask the job of one request, or all jobs, to stop at the next step.

        Returns:
            Whether there is such a job.
        """
        jobs = [job for job in self._jobs if request_id in {None, job.request_id}]
        for job in jobs:
            job.cancel_token.set(reason)
        return bool(jobs)

    def requeue_waiting(self) -> None:
        """Requeue the requests that wait for the device behind another request."""
        for job in self._jobs:
            if job.slot.waits_behind_another:
                job.cancel_token.set(StopReason.DRAIN)

    async def request_stop(self, request_id: str) -> StopAck | None:
        """Stop a job at its next step because its sender has cancelled the request.

        A request that arrives within the next minutes is cancelled too.

        Args:
            request_id: Id of the request, or of its chain.

        Returns:
            How far the job has come; None when this worker does not have the request.
        """
        self._early_cancellations.add(request_id)
        jobs = [job for job in self._jobs if request_id in job.cancellation_ids and not job.is_copy]
        stopping = [job for job in jobs if job.state not in _ENDING]
        for job in stopping:
            # Before the first await: the job may end meanwhile.
            job.cancel_token.set(StopReason.CANCEL)
            await job.delivery.mark_cancelled()
        if not jobs:
            return None
        return StopAck.STOPPING if stopping else StopAck.ENDING

    def has_started(self, request_id: str) -> bool:
        """Return whether this worker has a job with this id whose run has begun."""
        return any(job.began for job in self._jobs if job.request_id == request_id)

    async def _process(
        self,
        delivery: QueuedRequest,
        stages: Callable[[Job], Awaitable[Outcome]],
        slot: Slot,
        *,
        leased: Delivery | None = None,
    ) -> int | None:
        job = self._admission.open(delivery, slot, leased=leased)
        ack_wait = self._limits.ack_wait
        lease = nullcontext() if leased is None else Lease(leased, ack_wait=ack_wait)
        trace = self._begin_trace(job)
        self._jobs.append(job)
        self._observer.job_started()
        decision: Decision | None = None
        exit_code: int | None = None
        with structlog.contextvars.bound_contextvars(
            request_id=job.request_id,
            task=str(self._task),
            queue=self._queue_name,
            attempt=delivery.attempt,
        ):
            try:
                async with lease:
                    outcome = await stages(job)
                    intended = await self._decide(job, outcome)
                    exit_code = intended.exit_code  # stays set if the finalization fails
                    if exit_code is not None and self._before_exit is not None:
                        await self._before_exit()
                    decision = await self._finalizer.finalize(job, intended)
            except asyncio.CancelledError:
                if await self._requeue(job):
                    decision = outcomes.Draining().decision
                raise
            except Exception as error:
                # The state of the job is unknown: the lease expires and the server redelivers.
                log.exception("job_abandoned")
                if leased is not None and await self._attempts_exhausted(job):
                    decision = await self._finalize_failed(job, error)
            finally:
                self._jobs.remove(job)
                self._ids.release(job)
                job.ended.set()
                job.slot.leave()
                self._report(job, decision)
                trace.end(outcome=outcome_label(decision), queued=job.queued, stages=job.stages)
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
        # The messages that the job publishes belong to the span of the job.
        job.envelope = replace(job.envelope, trace_parent=trace.trace_parent)
        return trace

    # -- stages -----------------------------------------------------------------------------------

    async def _run_stages(self, job: Job) -> Outcome:
        timer: asyncio.TimerHandle | None = None
        try:
            request = self._decode(job)
            if job.delivery.attempt > 1:
                await self._read_marks(job)
            if any(one in self._early_cancellations for one in job.cancellation_ids):
                job.cancel_token.set(StopReason.CANCEL)
            if request.deadline is not None:
                left = (request.deadline - datetime.now(UTC)).total_seconds()
                timer = asyncio.get_running_loop().call_later(
                    max(0.0, left), job.cancel_token.set, StopReason.DEADLINE
                )
            await self._ids.acquire(job)
            inputs = await self._admit(job, request)
            output = await self._inference.run(job, inputs)
            del inputs  # frees their memory while the output is stored
            await self._store_output(job, request, output)
            if job.cancel_token.reason is StopReason.CANCEL:
                # The sender has received the reply `stopping`. A deadline or a drain at this point
                # does not change the result.
                job.cancel_token.check()
        except Exception as error:  # noqa: BLE001 - every exception is an outcome
            return classify_exception(error)
        finally:
            if timer is not None:
                timer.cancel()
        return outcomes.Succeeded()

    async def _classify_exhausted(self, job: Job) -> Outcome:
        try:
            self._decode(job)
            await self._ids.acquire(job)
            job.uncounted = job.delivery.uncounted + await job.delivery.marked_uncounted()
            if await job.delivery.was_cancelled():
                return outcomes.Cancelled()
        except Exception as error:  # noqa: BLE001 - every exception is an outcome
            return classify_exception(error)
        if job.attempts_so_far < self._limits.max_attempts:
            return outcomes.DeliveriesExhausted()
        return outcomes.WorkerLost()

    async def _read_marks(self, job: Job) -> None:
        job.cancelled_before = await job.delivery.was_cancelled()
        if job.cancelled_before:
            job.cancel_token.set(StopReason.CANCEL)
        if not job.slot.redelivered:
            return  # queued again after a failed attempt, by a worker that lives
        requeued = await job.delivery.marked_uncounted()
        job.uncounted = job.delivery.uncounted + requeued
        if job.delivery.deliveries - requeued == 1:
            job.slot.clear()  # every earlier delivery was requeued, for example in a rollout
        elif job.leased is not None and job.slot.co_resident:
            # If the worker dies now, another request may be the cause. A request that was only in
            # flight with one that kills three workers must not be dead-lettered. `_isolate` removes
            # the mark.
            await job.leased.mark_uncounted()
            job.uncounted = job.delivery.uncounted + await job.delivery.marked_uncounted()

    async def _isolate(self, job: Job) -> None:
        """Wait until a redelivered job is alone in the worker, then count the attempt."""
        if job.slot.redelivered and job.slot.co_resident:
            await job.cancel_token.race(self._in_flight.isolate(job.slot))
            await self._count_attempt(job)

    async def _count_attempt(self, job: Job) -> None:
        if job.leased is not None and job.slot.redelivered and job.slot.co_resident:
            await job.leased.mark_counted()
            job.uncounted = job.delivery.uncounted + await job.delivery.marked_uncounted()
            job.slot.co_resident = False

    async def _attempts_exhausted(self, job: Job) -> bool:
        try:
            await self._count_attempt(job)
        except Exception:
            log.exception("attempt_not_counted")
            return False
        return job.attempt > self._limits.max_attempts

    def _decode(self, job: Job) -> Request:
        job.request = request = self._admission.request(job.delivery)
        job.digest = request_digest(request)
        return request

    async def _admit(self, job: Job, request: Request) -> "list[Image]":
        await self._isolate(job)
        if job.attempt > self._limits.max_attempts and not job.cancelled_before:
            raise outcomes.WorkerLost
        if request.deadline is not None and request.deadline <= datetime.now(UTC):
            raise outcomes.DeadlineExceeded
        if self._served is not None:
            self._served.check(request)
        self._runner.check(request)
        sources = tuple(TASKS[request.task].sources(request))
        inputs = await self._image_stages.fetch_inputs(job, sources)
        job.cancel_token.check()
        job.advance(State.ADMITTED)
        return inputs

    async def _store_output(self, job: Job, request: Request, output: RunnerOutput) -> None:
        job.warnings, job.parameters = output.warnings, output.parameters
        if output.refused:
            raise outcomes.OutputRefused
        if not output.outputs:
            raise ModelError("NoOutput")
        stored: Iterator[ImageArtifact | FileArtifact] = iter(())
        if output.files:
            stored = iter(await self._image_stages.encode_and_store(job, request, output))
        job.outputs = tuple(_output(each, stored) for each in output.outputs)

    # -- decision and settlement ------------------------------------------------------------------

    async def _decide(self, job: Job, outcome: Outcome) -> Decision:
        if outcome.retryable:  # the request itself failed, not another request of this worker
            await self._count_attempt(job)
        decision = self._decision(job, outcome)
        if decision.publish is Publish.FAILED and not job.began:
            job.is_copy = await self._ids.belongs_to_another(job)
            decision = self._decision(job, outcome)
        return decision

    def _decision(self, job: Job, outcome: Outcome) -> Decision:
        return decide(
            outcome,
            attempt=job.attempt,
            max_attempts=self._limits.max_attempts,
            is_copy=job.is_copy,
        )

    async def _finalize_failed(self, job: Job, error: Exception) -> Decision | None:
        outcome = outcomes.InternalError(type(error).__name__)
        return await self._finalizer.finalize_failed(job, outcome, self._decision(job, outcome))

    async def _requeue(self, job: Job) -> bool:
        if job.state in FINAL:
            return False
        try:
            await asyncio.wait_for(job.requeue(), RELEASE_TIMEOUT)
        except Exception as error:  # noqa: BLE001 - the cancellation goes on, the lease expires
            log.warning("delivery_not_requeued", error=type(error).__name__)
            return False
        return True

    def _report(self, job: Job, decision: Decision | None) -> None:
        report = JobReport(
            outcome=outcome_label(decision),
            attempt=job.delivery.attempt,
            queued=job.queued,
            inference=job.inference,
            encode=job.encode,
            upload=job.upload,
            dead_letter=decision is not None and decision.dead_letter,
            unsigned=job.unsigned,
        )
        self._observer.job_finished(report)
        log.info(
            "job_finished",
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(report).items()},
        )


def _output(generated: GeneratedOutput, stored: Iterator[ImageArtifact | FileArtifact]) -> Output:
    """Return an output for the event; `stored` has the files in the order of the outputs."""
    match generated:
        case GeneratedText():
            return TextOutput(**asdict(generated))
        case GeneratedJson():
            return JsonOutput(value=generated.value)
        case _:
            return next(stored)
