"""The life of a job: one delivery through its stages.

decode -> admit -> run -> encode -> store -> publish the result -> reply -> settle. A stage gives
its value or raises; `_outcome_of` turns what was raised into an outcome, `job.decide` says what the
outcome means, and `conclusion` carries that out.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog

from consumer import job as outcomes
from consumer.admission import Admission, Job
from consumer.conclusion import Conclusion
from consumer.heartbeat import Lease
from consumer.job import Decision, Outcome, Publish, Settlement, State, decide
from consumer.ports import (
    Artifacts,
    Delivery,
    DeviceLost,
    EncodedImage,
    Events,
    Grip,
    Images,
    Inference,
    InputUnavailable,
    ModelDescription,
    ModelError,
    Observer,
    OutOfMemory,
    Runner,
    RunnerOutput,
    StoreUnavailable,
    UnsupportedParameter,
)
from consumer.provenance import provenance_of
from consumer.run import Hanging, Reason, Steps, Stopped, watch
from consumer.telemetry import JobReport
from generation_contracts import (
    ImageArtifact,
    ImageToTextRequest,
    InvalidRequest,
    ProgressEvent,
    Request,
    StartedEvent,
    TextOutput,
    TextToImageRequest,
    request_digest,
)
from generation_contracts.artifacts import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

log = structlog.get_logger()

T = TypeVar("T")

_AT_THE_END = frozenset({State.CONCLUDING, State.SETTLED, State.ABANDONED})
LAST_WORD = 1.0  # seconds to give a delivery back when the process ends at once
MAX_PIXELS_IN_ALL = 64_000_000  # of one request's pictures; 192 MB as RGB
STORE_PAUSE_FIRST = 0.5  # seconds
STORE_PAUSE_MOST = 15.0  # seconds; how long an output waits at most once the store is back


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


class _SettledBefore(Exception):  # noqa: N818 - not an error
    """A terminal event for the request's id is stored already."""


class _OtherContent(Exception):  # noqa: N818 - the contract's word: request_id_conflict
    """The same, but for a request that asked for something else."""


class _TooManyDeliveries(Exception):  # noqa: N818 - a state of the request
    """The request killed the workers that took it."""


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
    ) -> None:
        self._admission = admission
        self._task = admission.task
        self._limits = limits
        self._model = model
        self._runner = runner
        self._inference = inference
        self._events = events
        self._artifacts = artifacts
        self._images = images
        self._observer = observer
        self._prompt_in_pictures = prompt_in_pictures
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
        return exit_code

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
            return _outcome_of(error)
        finally:
            if timer is not None:
                timer.cancel()
        return outcomes.Done()

    async def _lost(self, job: Job) -> Outcome:
        try:
            self._read(job)
            await self._look_for_result(job)
        except Exception as error:  # noqa: BLE001 - each of them is an outcome
            return _outcome_of(error)
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
            raise _SettledBefore if same else _OtherContent

    async def _admit(self, job: Job, request: Request) -> "list[Image]":
        await self._look_for_result(job)
        if job.attempt > self._limits.max_attempts and not job.withdrawn:
            raise _TooManyDeliveries
        if request.deadline is not None and request.deadline <= datetime.now(UTC):
            raise Stopped(Reason.DEADLINE)
        self._runner.check(request)
        sources = request.images if isinstance(request, ImageToTextRequest) else ()
        pictures: list[Image] = []
        for index, source in enumerate(sources):
            pictures.append(await self._input(job, index, source))
            if sum(picture.width * picture.height for picture in pictures) > MAX_PIXELS_IN_ALL:
                raise InputUnavailable("images: too many pixels together")
        job.interrupt.check()
        job.advance(State.ADMITTED)
        return pictures

    async def _input(self, job: Job, index: int, source: ImageSource) -> "Image":
        try:
            data = await self._once_the_store_is_there(
                job, lambda: self._artifacts.fetch(source, max_bytes=self._images.max_bytes)
            )
            return await asyncio.to_thread(self._images.decode, data)
        except InputUnavailable as error:
            raise InputUnavailable(f"images.{index}: {error}") from None

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
        run = asyncio.ensure_future(
            self._inference.call(
                self._runner.run,
                request,
                pictures,
                on_step=steps,
                cancelled=job.interrupt.is_set,
                on_text=steps.add if streams else None,
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
            self._observer.device_busy(seconds)

    async def _tell(self, job: Job, steps: Steps) -> None:
        text = steps.take_text()  # before the step, which then is that of the text or a later one
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
        )
        await self._events.publish_progress(progress, trace_parent=job.envelope.trace_parent)

    async def _keep(self, job: Job, request: Request, output: RunnerOutput) -> None:
        job.warnings, job.parameters = output.warnings, output.parameters
        if output.text is not None:
            job.outputs = (TextOutput(**asdict(output.text)),)
        elif isinstance(request, TextToImageRequest):
            encoded = await self._encode(job, request, output)
            stored = await self._store(job, encoded)
            job.outputs = tuple(
                artifact.model_copy(update={"flagged": made.flagged})
                for artifact, made in zip(stored, output.images, strict=True)
            )
        if not job.outputs:
            raise ModelError("NoOutput")

    async def _encode(
        self, job: Job, request: TextToImageRequest, output: RunnerOutput
    ) -> list[EncodedImage]:
        job.advance(State.ENCODING)
        started = time.monotonic()
        encoded = []
        for made in output.images:
            said = provenance_of(
                made,
                request_id=job.request_id,
                request=request,
                model=self._model.info,
                parameters=output.parameters,
                with_prompt=self._prompt_in_pictures,
            )
            write = partial(self._images.encode, made.image, request.output_format)
            encoded.append(await asyncio.to_thread(write, seed=made.seed, provenance=said))
        job.encode = time.monotonic() - started
        return encoded

    async def _store(self, job: Job, encoded: list[EncodedImage]) -> tuple[ImageArtifact, ...]:
        job.advance(State.STORING)
        started = time.monotonic()
        for index, image in enumerate(encoded):
            put = partial(self._artifacts.store, self._task, job.request_id, index, image)
            job.stored.append(await self._once_the_store_is_there(job, put))
        job.upload = time.monotonic() - started
        return tuple(job.stored)

    async def _once_the_store_is_there(self, job: Job, action: Callable[[], Awaitable[T]]) -> T:
        # The finished output is kept and so is the lease, for as long as it takes.
        pause = STORE_PAUSE_FIRST
        while True:
            try:
                return await job.interrupt.during(action())
            except StoreUnavailable as error:
                log.warning("store_unavailable", reason=str(error), pause=round(pause, 1))
            decision = self._decide(job, outcomes.StoreUnreachable())
            if decision.settlement is not Settlement.KEEP:
                raise AssertionError("the table keeps a job while the store is away")
            await job.interrupt.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - jitter
            pause = min(pause * 2, STORE_PAUSE_MOST)

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
            outcome=_outcome_name(decision),
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


_STOPPED: dict[Reason, Outcome] = {
    Reason.DEADLINE: outcomes.Expired(),
    Reason.CANCEL: outcomes.Cancelled(),
    Reason.DRAIN: outcomes.Draining(),
}


def _outcome_of(error: Exception) -> Outcome:  # noqa: C901, PLR0911 - one row of the table each
    match error:
        case InvalidRequest():
            return outcomes.Malformed(str(error), error.problems)
        case _SettledBefore():
            return outcomes.AlreadyDone()
        case _OtherContent():
            return outcomes.Conflict()
        case _TooManyDeliveries():
            return outcomes.WorkerLost()
        case Stopped():
            return _STOPPED[error.reason]
        case UnsupportedParameter():
            return outcomes.Unsupported(error.parameter, str(error))
        case InputUnavailable():
            return outcomes.InputMissing(str(error))
        case OutOfMemory():  # the first time was seen to in `_run`
            return outcomes.RanOutOfMemory(saved_memory=True, tried=error.tried)
        case DeviceLost():
            return outcomes.LostDevice()
        case Hanging():
            return outcomes.Stalled()
        case ModelError():
            return outcomes.ModelRaised(str(error))
        case _:
            log.error("worker_failed", exc_info=error)
            return outcomes.Broken(type(error).__name__)


def _outcome_name(decision: Decision | None) -> str:
    if decision is None or decision.settlement is Settlement.ABANDON:
        return "abandoned"
    if decision.settlement in {Settlement.NAK, Settlement.RELEASE}:
        return "given_back"
    if decision.failure is not None:
        return str(decision.failure.code)
    return {
        Publish.SUCCEEDED: "succeeded",
        Publish.CANCELLED: "cancelled",
        Publish.STORED_AGAIN: "already_done",
    }[decision.publish]
