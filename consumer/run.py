"""One run of the model, watched from the event loop: progress, interruption, a hanging thread."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum, auto
from typing import Any, TypeVar

from consumer.ports.model import Interrupted

T = TypeVar("T")

PROGRESS_INTERVAL = 0.2  # seconds; at most 5 events a second, the latest wins
MOST_OF_ONE_TURN = 0.25  # of the stall timeout
PATIENCE = 5.0  # seconds that a thread gets to come to its next step when the process is to end


class Reason(Enum):
    """Why a job is to stop."""

    DEADLINE = auto()
    CANCEL = auto()
    DRAIN = auto()


class Stopped(Exception):  # noqa: N818 - not an error: it was asked for
    """The job stopped for the reason of its `Interrupt`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


class Hanging(Exception):  # noqa: N818 - a state of the thread
    """No step for `stall_timeout`: the thread cannot be ended from outside."""


class Interrupt:
    """Asks a job to stop: the inference thread reads the flag, the event loop can await it."""

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self.heard = False  # by the inference thread, which then does no more for this job
        self._told: asyncio.Future[None] | None = None  # made for the first one that waits

    def set(self, reason: Reason) -> None:
        """Ask to stop; the first reason stands. Only in the event loop's thread."""
        if self.reason is None:
            self.reason = reason
            if self._told is not None:
                self._told.set_result(None)

    def ask(self) -> bool:
        """Whether to stop; the inference thread asks, and heeds the answer."""
        if self.reason is None:
            return False
        self.heard = True
        return True

    def check(self) -> None:
        """Raise when it is set.

        Raises:
            Stopped: With the reason.
        """
        if self.reason is not None:
            raise Stopped(self.reason)

    async def during(self, work: Awaitable[T]) -> T:
        """Wait for something that may be broken off, but no longer than until it is set.

        Raises:
            Stopped: It was set first; the work has been cancelled.
            Exception: What the work raised.
        """
        doing = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {doing, self._telling()}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                self.check()
            return await doing
        finally:
            doing.cancel()
            # What is broken off has ended before anything else is done with its parts.
            await asyncio.gather(doing, return_exceptions=True)
            del doing, either  # what the work raised has this frame in its traceback

    async def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until it is set.

        Raises:
            Stopped: It was set.
        """
        await asyncio.wait({self._telling()}, timeout=seconds)
        self.check()

    def _telling(self) -> asyncio.Future[None]:
        if self._told is None:
            self._told = asyncio.get_running_loop().create_future()
            if self.reason is not None:
                self._told.set_result(None)
        return self._told


class Steps:
    """Where a run stands: written by the inference thread at each step, read by the event loop."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.ended: float | None = None
        self.position = (0, 0)  # one assignment, so that a reader never sees half of it
        self._preview: bytes | None = None
        self._added: deque[str] = deque()  # either end of it may be used in a thread of its own

    def __call__(self, step: int, of: int) -> None:
        """Note a step. Takes well under a microsecond: it runs between two steps of the model."""
        self.position = (step, of)
        self.last = time.monotonic()

    def add(self, text: str) -> None:
        """Note what has been added to a text; as quick as a step."""
        self._added.append(text)

    def see(self, preview: bytes) -> None:
        """Note how the picture looks; the latest one counts."""
        self._preview = preview

    def take_preview(self) -> bytes | None:
        """How it looks, if that is new since the last time; only in the event loop's thread."""
        preview, self._preview = self._preview, None
        return preview

    @property
    def has_text(self) -> bool:
        """Whether something has been added since `take_text`."""
        return bool(self._added)

    def take_text(self) -> str:
        """What has been added since the last time; only in the event loop's thread."""
        return "".join(self._added.popleft() for _ in range(len(self._added)))

    def begin(self) -> None:
        """Note that the run begins now; the inference thread does."""
        self.ended = None
        self.started = self.last = time.monotonic()

    def end(self) -> None:
        """Note that the run has ended; the inference thread does."""
        self.ended = time.monotonic()

    def begin_again(self) -> None:
        """Go back to step 0 for another run, once the thread has ended the one before."""
        self._added.clear()
        self.position = (0, self.position[1])
        self.begin()

    def seconds_per_step(self) -> float | None:
        """Mean time of a step so far, in seconds."""
        step = self.position[0]
        return (self.last - self.started) / step if step else None


class Silence:
    """How long a run has taken no step, as far as this process was there to see it.

    Args:
        company: The steps of all whose run it is: one may have come to its end before the others.
        most: Seconds that count of one turn of the watcher: a process that was frozen (a paused
            container, a suspended machine) finds the time gone, and its thread has not had it.
    """

    def __init__(self, company: Sequence[Steps], *, most: float) -> None:
        self._company = company
        self._most = most
        self._step = self._looked = self._last
        self._seconds = 0.0

    def at(self, now: float) -> float:
        """Seconds; called at each turn."""
        passed, self._looked = now - self._looked, now
        if self._last != self._step:
            self._step = self._last
            self._seconds = 0.0
        else:
            self._seconds += min(passed, self._most)
        return self._seconds

    @property
    def _last(self) -> float:
        return max(steps.last for steps in self._company)


async def watch(
    run: asyncio.Future[T],
    *,
    steps: Steps,
    interrupt: Interrupt,
    stall_timeout: float,
    publish: Callable[[], Awaitable[None]],
    company: Sequence[Steps] = (),
) -> T:
    """Wait for a run and tell how it goes on.

    Args:
        run: The run, in its thread. It is never cancelled: a thread cannot be.
        steps: What the thread writes.
        interrupt: Asks it to stop at its next step.
        stall_timeout: Seconds without a step after which the thread is taken to hang.
        publish: Called when there is a new step or text, at most every `PROGRESS_INTERVAL`, and
            once more for the last of a text, before the event that ends the request.
        company: The steps of all jobs whose run it is, where it is not this one's alone: it then
            goes on when this one is to stop.

    Raises:
        Stopped: The run has ended because it was asked to, or goes on without this job, or the
            process must not wait longer.
        Hanging: The thread does not come to its next step.
        Exception: What the run raised.
    """
    told = 0  # the run may be ahead of its watcher already
    silence = Silence(company or (steps,), most=stall_timeout * MOST_OF_ONE_TURN)
    asked_to_end: float | None = None
    while not run.done():
        await asyncio.wait({run}, timeout=PROGRESS_INTERVAL)
        if steps.position[0] != told or steps.has_text:
            told = steps.position[0]
            await publish()
        now = time.monotonic()
        if run.done():
            break
        if company and interrupt.heard:
            interrupt.check()
        if silence.at(now) > stall_timeout:
            raise Hanging
        if interrupt.reason is Reason.DRAIN:
            asked_to_end = asked_to_end or now
            if now - asked_to_end > PATIENCE:
                raise Stopped(Reason.DRAIN)
    try:
        output = run.result()
    except Interrupted:
        interrupt.check()
        raise
    finally:
        # What it raised has this frame in its traceback: the cycle would keep the run's tensors.
        del run
    # The last step may have been done by then; the request has ended all the same.
    interrupt.check()
    if steps.has_text:  # it was added while the text before it was told
        await publish()
    return output
