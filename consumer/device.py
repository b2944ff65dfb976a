"""The stage on the device: a job waits for its turn, the model runs, and whoever asks is told.

The device is free for the next job as soon as the run has ended: encoding, storing and publishing
happen beside the next run.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from consumer.admission import Job
from consumer.job import RanOutOfMemory, State, decide
from consumer.ports.bus import Events
from consumer.ports.model import (
    BatchMember,
    DeviceLost,
    Inference,
    ModelDescription,
    OutOfMemory,
    Runner,
    RunnerOutput,
)
from consumer.ports.telemetry import Observer
from consumer.run import Hanging, Interrupt, Steps, Stopped, watch
from consumer.turns import Place, Turn, Turns
from generation_contracts import (
    ImageToTextRequest,
    ProgressEvent,
    StartedEvent,
    TextToImageRequest,
)

if TYPE_CHECKING:
    from PIL.Image import Image

log = structlog.get_logger()

T = TypeVar("T")


class Device:
    """The loaded model, given to one job after another, or to several that go together.

    Args:
        turns: Who is next.
        runner: The loaded model; used in the inference thread only, but for `check` and
            `batch_key`.
        inference: That thread.
        model: What the runner says of itself.
        events: The way to the bus.
        event_fields: What every event of a job carries.
        stall_timeout: Seconds without a step after which the inference thread is taken to hang.
        observer: Told of steps, and how long the device works.
    """

    def __init__(
        self,
        *,
        turns: Turns,
        runner: Runner,
        inference: Inference,
        model: ModelDescription,
        events: Events,
        event_fields: Callable[[Job], dict[str, Any]],
        stall_timeout: float,
        observer: Observer,
    ) -> None:
        self._turns = turns
        self._runner = runner
        self._inference = inference
        self._model = model
        self._events = events
        self._event_fields = event_fields
        self._stall_timeout = stall_timeout
        self._observer = observer
        turns.attend(self)

    async def run(self, job: Job, pictures: "Sequence[Image]") -> RunnerOutput:
        """Wait for the job's turn, and for what the model makes of it.

        Raises:
            Stopped: The job was asked to stop, while it waited or ran.
            Hanging: The thread does not come to its next step.
            Exception: What `Runner.run` raises.
        """
        steps = Steps()
        member = BatchMember(job.seeded_request, pictures, steps, job.interrupt.ask)
        try:
            turn = await self._turn(job, member, steps)
            if len(turn.members) > 1:
                output = await self._run_together(job, turn, member, steps)
                if output is not None:
                    return output
            async with _taken(turn.alone, job.interrupt):
                return await self._run_alone(job, turn, member, steps)
        except (DeviceLost, Hanging):
            self._turns.close()
            raise
        finally:
            job.place.off_the_device()

    async def _turn(self, job: Job, member: BatchMember, steps: Steps) -> Turn:
        several = self._turns.bounds.together > 1 and not job.place.suspect
        key = self._runner.batch_key(member.request) if several else None
        began = time.monotonic()
        granted = job.place.its_turn(member, key)
        if granted.done():
            return granted.result()
        try:
            turn = await job.interrupt.during(granted)
        except Stopped:
            late = job.place.give_up()
            if late is None:
                raise
            turn = late  # the run has begun, and ends at its first step
        # The thread notes the beginning, which may be a moment before or after this one.
        now = time.monotonic()
        begun_at = steps.started if steps.started > began else now
        job.queued += begun_at - began
        job.spent("waiting", begun_at - began, ago=now - begun_at)
        return turn

    # -- beginning runs, as `turns.Operator` ------------------------------------------------------

    def begin(self, turn: Turn) -> asyncio.Future[Any]:
        """Begin the run of a turn in the inference thread."""
        return self._on_the_device(self._inference.call, turn.places[0], turn.members)

    def begin_next(self, turn: Turn) -> asyncio.Future[Any]:
        """Have the inference thread begin it as soon as the run under way has ended well."""
        return self._on_the_device(self._inference.call_next, turn.places[0], turn.members)

    def take_back(self) -> bool:
        """Do not begin what was to begin next; False: it has begun."""
        return self._inference.take_back()

    def _on_the_device(
        self,
        call: Callable[..., Awaitable[Any]],
        place: Place,
        members: Sequence[BatchMember],
        *,
        save_memory: bool = False,
    ) -> asyncio.Future[Any]:
        """Hand a run over to the inference thread, in one of its two ways."""
        if len(members) > 1:
            stretch = _Stretch(self._runner.run_batch, members, place.context)
            run = asyncio.ensure_future(call(stretch, members))
        else:
            (member,) = members
            stretch = _Stretch(self._runner.run, members, place.context)
            run = asyncio.ensure_future(
                call(
                    stretch,
                    member.request,
                    member.images,
                    **_told_by(member),
                    save_memory=save_memory,
                )
            )

        def look(ended: asyncio.Future[Any]) -> None:
            if not ended.cancelled():
                self._observer.device_busy(stretch.seconds)
                # A run that is given up on still ends some day, and its exception has no other
                # reader.
                ended.exception()

        run.add_done_callback(look)
        return run

    # -- waiting for runs -------------------------------------------------------------------------

    async def _run_together(
        self, job: Job, turn: Turn, member: BatchMember, steps: Steps
    ) -> RunnerOutput | None:
        """One run for all; None: it has failed, and each of them has to run alone.

        Nobody can tell whose fault it was, and one bad request must not end the others.
        """
        company = [one.on_step for one in turn.members if isinstance(one.on_step, Steps)]
        try:
            await self._tell_start(job)
            outputs = await self._watch(job, turn.first_run(), steps, company)
        except (Stopped, Hanging, DeviceLost):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it shows again in its own run
            if not turn.failed:
                turn.failed = True
                log.warning("batch_failed", of=len(turn.members), error=type(error).__name__)
            return None
        finally:
            turn.had_its_part()
        output: RunnerOutput | None = outputs[turn.members.index(member)]
        if output is None:
            raise AssertionError("a member of a batch without an output was not asked to stop")
        return output

    async def _run_alone(
        self, job: Job, turn: Turn, member: BatchMember, steps: Steps
    ) -> RunnerOutput:
        try:
            if len(turn.members) > 1:
                return await self._run_again(job, turn, member, steps, save_memory=False)
            try:
                await self._tell_start(job)
                return await self._watch(job, turn.first_run(), steps)
            finally:
                turn.had_its_part()
        except OutOfMemory as error:
            tried = error.tried
        # Outside the except block: the traceback keeps the first run's tensors alive.
        log.warning("out_of_memory", tried=tried)
        again = decide(
            RanOutOfMemory(saved_memory=False), attempt=job.attempt, max_attempts=job.attempt
        )
        try:
            return await self._run_again(job, turn, member, steps, save_memory=again.save_memory)
        except OutOfMemory as error:
            tried = tuple(dict.fromkeys((*tried, *error.tried)))
        raise OutOfMemory("twice", tried)

    async def _run_again(
        self, job: Job, turn: Turn, member: BatchMember, steps: Steps, *, save_memory: bool
    ) -> RunnerOutput:
        self._turns.hold(turn)
        told = steps.position != (0, 0)
        steps.begin_again()
        run = self._on_the_device(
            self._inference.call, job.place, (member,), save_memory=save_memory
        )
        self._turns.begun(turn, run, job.place)
        if told:
            await self._tell(job, steps)  # of step 0: what was told of the run before is over
        try:
            return await self._watch(job, run, steps)
        finally:
            del run  # for the reason given in `watch`

    async def _watch(
        self, job: Job, run: asyncio.Future[T], steps: Steps, company: Sequence[Steps] = ()
    ) -> T:
        job.advance(State.RUNNING)
        try:
            return await watch(
                run,
                steps=steps,
                interrupt=job.interrupt,
                stall_timeout=self._stall_timeout,
                publish=lambda: self._go_on(job, steps),
                company=company,
            )
        finally:
            del run
            # By the thread's clock: this one may be late, and the next run has begun by then.
            now = time.monotonic()
            ended = now if steps.ended is None else steps.ended
            job.inference += ended - steps.started
            job.spent("inference", ended - steps.started, ago=now - ended)

    async def _tell_start(self, job: Job) -> None:
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

    async def _go_on(self, job: Job, steps: Steps) -> None:
        self._observer.device_stepped()
        await self._tell(job, steps)

    async def _tell(self, job: Job, steps: Steps) -> None:
        text = steps.take_text()  # before the step, which then is that of the text or a later one
        preview = steps.take_preview()
        step, of = steps.position
        of = max(of, step, 1)  # some schedulers take more steps than they were asked for
        each = steps.seconds_per_step()
        progress = ProgressEvent(
            **self._event_fields(job),
            step=step,
            of=of,
            seconds_per_step=each,
            eta=None if each is None else each * (of - step),
            text=text or None,
            preview=None if preview is None else base64.b64encode(preview).decode(),
        )
        await self._events.publish_progress(progress, trace_parent=job.envelope.trace_parent)


class _Stretch:
    """The device's time for one run, noted by the inference thread, which calls this.

    Args:
        function: Of the runner.
        members: Those for whom it is.
        context: The context variables of the first of them.
    """

    def __init__(
        self, function: Callable[..., T], members: Sequence[BatchMember], context: Context
    ) -> None:
        self.seconds = 0.0
        self._work: Callable[..., T] = partial(context.run, function)
        self._members = members

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        told = [one.on_step for one in self._members if isinstance(one.on_step, Steps)]
        self._members = ()  # their pictures are kept by nobody
        began = time.monotonic()
        for steps in told:
            steps.begin()
        try:
            return self._work(*args, **kwargs)
        finally:
            self.seconds = time.monotonic() - began
            for steps in told:
                steps.end()


@asynccontextmanager
async def _taken(lock: asyncio.Lock, interrupt: Interrupt) -> AsyncIterator[None]:
    """Hold a lock, and wait for it no longer than until the job is asked to stop.

    Raises:
        Stopped: It was asked to stop first.
    """
    if not lock.locked():  # at once: a run must not end before it is watched
        async with lock:
            yield
        return
    taking = asyncio.ensure_future(lock.acquire())
    try:
        await interrupt.during(taking)
        yield
    finally:
        if not taking.cancelled():
            lock.release()


def _told_by(member: BatchMember) -> dict[str, Any]:
    """How a run of one tells its watcher where it is, by the arguments of `Runner.run`."""
    request, steps = member.request, member.on_step
    streams = isinstance(request, ImageToTextRequest) and request.stream
    previews = isinstance(request, TextToImageRequest) and request.preview
    return {
        "on_step": steps,
        "cancelled": member.cancelled,
        "on_text": steps.add if streams and isinstance(steps, Steps) else None,
        "on_preview": steps.see if previews and isinstance(steps, Steps) else None,
    }
