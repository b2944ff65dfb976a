"""The life of a job: one delivery through its stages.

decode -> admit -> run -> encode -> store -> publish the result -> reply -> settle. A stage gives
its value or raises; `_outcome_of` turns what was raised into an outcome, `job.decide` says what the
outcome means, and `conclusion` carries that out.
"""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from consumer import job as outcomes
from consumer.admission import NANOSECONDS, Admission, Job
from consumer.conclusion import Conclusion
from consumer.heartbeat import Lease
from consumer.job import Decision, Outcome, State, decide
from consumer.pictures import Pictures
from consumer.ports import (
    Artifacts,
    Delivery,
    Events,
    Grip,
    Images,
    Inference,
    JobTrace,
    ModelDescription,
    ModelError,
    NoTracer,
    Observer,
    OutOfMemory,
    Runner,
    RunnerOutput,
    Tracer,
)
from consumer.run import Reason, Steps, Stopped, watch
from consumer.telemetry import JobReport
from consumer.verdict import OtherContent, SettledBefore, TooManyDeliveries, name_of, outcome_of
from generation_contracts import (
    ImageToTextRequest,
    ProgressEvent,
    Request,
    StartedEvent,
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
    """

    ack_wait: float
    max_attempts: int
    stall_timeout: float


class Execution:
    """Takes deliveries through their lives, by ports only.

    Args:
        worker: Name of this process in its events.
        admission: How deliveries are read.
        limits: The worker's numbers.
        model: What the loaded runner says of itself.
        runner: The loaded model; used in the inference thread only, but for `check`.
        inference: That thread.
        events: The way to the bus.
        artifacts: The object store.
        images: The pictures' codec.
        observer: Told what happens.
        prompt_in_pictures: Whether the files of pictures say their prompts.
        tracer: Where traces go; None: nowhere.
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
        artifacts: Artifacts,
        images: Images,
        observer: Observer,
        prompt_in_pictures: bool = False,
        tracer: Tracer | None = None,
    ) -> None:
        self._admission = admission
        self._task = admission.task
        self._limits = limits
        self._model = model
        self._runner = runner
        self._inference = inference
        self._events = events
        self._pictures = Pictures(
            artifacts,
            images,
            task=self._task,
            model=model.info,
            prompt_in_files=prompt_in_pictures,
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
        )

    async def handle(self, delivery: Delivery) -> int | None:
        """Take one delivery through its life.

        Returns:
            An exit code when this process must end (device lost, thread hung), else None.
        """
        return await self._take(delivery, self._stages)

    async def put_aside(self, delivery: Delivery) -> None:
        """Conclude a request that no worker will be given any more, without running it."""
        await self._take(delivery, self._lost)

    @property
    def storing(self) -> bool:
        """Whether an output is on its way into the store, or waits for it to take it."""
        return any(job.state is State.STORING for job in self._jobs)

    def interrupt(self, reason: Reason, request_id: str | None = None) -> bool:
        """Ask a job, or all of them, to stop at the next step.

        Returns:
            Whether there was one to ask.
        """
        asked = [job for job in self._jobs if request_id in {None, job.request_id}]
        for job in asked:
            job.interrupt.set(reason)
        return bool(asked)

    async def withdraw(self, request_id: str) -> Grip | None:
        """Stop a job at its next step because its sender wants it no more.

        Returns:
            How it is held; None when this worker does not have it.
        """
        held = [job for job in self._jobs if job.request_id == request_id]
        in_time = [job for job in held if job.state not in _AT_THE_END]
        for job in in_time:
            job.interrupt.set(Reason.CANCEL)
            await job.delivery.withdraw()
        if not held:
            return None
        return Grip.STOPPING if in_time else Grip.ENDING

    async def _take(
        self, delivery: Delivery, stages: Callable[[Job], Awaitable[Outcome]]
    ) -> int | None:
        job = self._admission.open(delivery)
        trace = self._begin_trace(job)
        self._jobs.append(job)
        self._observer.job_started()
        decision: Decision | None = None
        exit_code: int | None = None
        with structlog.contextvars.bound_contextvars(
            request_id=job.request_id, task=str(self._task), attempt=delivery.attempt
        ):
            try:
                async with Lease(delivery, ack_wait=self._limits.ack_wait):
                    wanted = self._decide(job, await stages(job))
                    exit_code = wanted.exit_code  # stands even if the end goes wrong
                    decision = await self._conclusion.conclude(job, wanted)
            except asyncio.CancelledError:
                if await self._give_back(job):
                    decision = self._decide(job, outcomes.Draining())
                raise
            except Exception:
                # Nobody knows how far it came: the lease runs out and the request comes again.
                log.exception("job_abandoned")
            finally:
                self._jobs.remove(job)
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
            if job.delivery.attempt > 1:
                await self._read_notes(job)
            request = self._read(job)
            if request.deadline is not None:
                left = (request.deadline - datetime.now(UTC)).total_seconds()
                timer = asyncio.get_running_loop().call_later(
                    max(0.0, left), job.interrupt.set, Reason.DEADLINE
                )
            pictures = await self._admit(job, request)
            output = await self._run(job, pictures)
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
            await self._look_for_result(job)
        except Exception as error:  # noqa: BLE001 - each of them is an outcome
            return outcome_of(error)
        return outcomes.WorkerLost()

    async def _read_notes(self, job: Job) -> None:
        job.releases = await job.delivery.releases()
        job.withdrawn = await job.delivery.withdrawn()
        if job.withdrawn:
            job.interrupt.set(Reason.CANCEL)

    def _read(self, job: Job) -> Request:
        job.request = request = self._admission.request(job.delivery)
        job.digest = request_digest(request)
        return request

    async def _look_for_result(self, job: Job) -> None:
        job.existing = await self._events.find_result(self._task, job.request_id)
        if job.existing is not None:
            same = job.existing.request_digest == job.digest
            raise SettledBefore if same else OtherContent

    async def _admit(self, job: Job, request: Request) -> "list[Image]":
        await self._look_for_result(job)
        if job.attempt > self._limits.max_attempts and not job.withdrawn:
            raise TooManyDeliveries
        if request.deadline is not None and request.deadline <= datetime.now(UTC):
            raise Stopped(Reason.DEADLINE)
        self._runner.check(request)
        sources = request.images if isinstance(request, ImageToTextRequest) else ()
        pictures = await self._pictures.fetch(job, sources)
        job.interrupt.check()
        job.advance(State.ADMITTED)
        return pictures

    async def _run(self, job: Job, pictures: "list[Image]") -> RunnerOutput:
        await self._tell_start(job)
        steps = Steps()
        try:
            return await self._run_once(job, pictures, steps, save_memory=False)
        except OutOfMemory as error:
            tried = error.tried
        # Outside the except block: the traceback keeps the first run's tensors alive.
        log.warning("out_of_memory", tried=tried)
        again = self._decide(job, outcomes.RanOutOfMemory(saved_memory=False))
        told = steps.position != (0, 0)
        steps.begin_again()
        if told:
            await self._tell(job, steps)  # of step 0: what was told of the first run is over
        try:
            return await self._run_once(job, pictures, steps, save_memory=again.save_memory)
        except OutOfMemory as error:
            tried = tuple(dict.fromkeys((*tried, *error.tried)))
        raise OutOfMemory("twice", tried)

    async def _tell_start(self, job: Job) -> None:
        defaults = {
            name: value for name, value in self._model.defaults.items() if value is not None
        }
        started = StartedEvent(
            **self._conclusion.event_fields(job),
            queued=job.queued,
            model=self._model.info,
            defaults=defaults,
        )
        await self._events.publish_progress(started, trace_parent=job.envelope.trace_parent)
        log.info("job_started", queued=round(job.queued, 3))

    async def _run_once(
        self, job: Job, pictures: "list[Image]", steps: Steps, *, save_memory: bool
    ) -> RunnerOutput:
        job.advance(State.RUNNING)
        request = job.seeded_request
        streams = isinstance(request, ImageToTextRequest) and request.stream
        previews = isinstance(request, TextToImageRequest) and request.preview
        run = asyncio.ensure_future(
            self._inference.call(
                self._runner.run,
                request,
                pictures,
                on_step=steps,
                cancelled=job.interrupt.is_set,
                on_text=steps.add if streams else None,
                on_preview=steps.see if previews else None,
                save_memory=save_memory,
            )
        )
        # A run that is given up on still ends some day, and its exception has no other reader.
        run.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            return await watch(
                run,
                steps=steps,
                interrupt=job.interrupt,
                stall_timeout=self._limits.stall_timeout,
                publish=lambda: self._tell(job, steps),
            )
        finally:
            del run  # for the reason given in `watch`
            seconds = time.monotonic() - steps.started
            job.inference += seconds
            job.spent("inference", seconds)
            self._observer.device_busy(seconds)

    async def _tell(self, job: Job, steps: Steps) -> None:
        text = steps.take_text()  # before the step, which then is that of the text or a later one
        preview = steps.take_preview()
        step, of = steps.position
        of = max(of, step, 1)  # some schedulers take more steps than they were asked for
        each = steps.seconds_per_step()
        progress = ProgressEvent(
            **self._conclusion.event_fields(job),
            step=step,
            of=of,
            seconds_per_step=each,
            eta=None if each is None else each * (of - step),
            text=text or None,
            preview=None if preview is None else base64.b64encode(preview).decode(),
        )
        await self._events.publish_progress(progress, trace_parent=job.envelope.trace_parent)

    async def _keep(self, job: Job, request: Request, output: RunnerOutput) -> None:
        job.warnings, job.parameters = output.warnings, output.parameters
        if output.text is not None:
            job.outputs = (TextOutput(**asdict(output.text)),)
        elif isinstance(request, TextToImageRequest):
            job.outputs = await self._pictures.keep(job, request, output)
        if not job.outputs:
            raise ModelError("NoOutput")

    # -- the end ----------------------------------------------------------------------------------

    def _decide(self, job: Job, outcome: Outcome) -> Decision:
        return decide(outcome, attempt=job.attempt, max_attempts=self._limits.max_attempts)

    async def _give_back(self, job: Job) -> bool:
        if job.state in {State.SETTLED, State.ABANDONED}:
            return False
        try:
            await asyncio.wait_for(job.delivery.release(), LAST_WORD)
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
        )
        self._observer.job_finished(report)
        log.info(
            "job_finished",
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(report).items()},
        )
