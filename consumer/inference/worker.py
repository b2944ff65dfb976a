"""The inference thread: the one thread in which a model is loaded, run and closed.

A diffusers pipeline that two threads share raises IndexErrors or returns wrong images. Sampling in
transformers uses the global random generator.
"""

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import structlog

from consumer.inference.run_queue import RunQueue, Ticket
from consumer.ports.model import (
    DeviceLost,
    Interrupted,
    ModelDescription,
    OutOfMemory,
    Runner,
    RunnerOutput,
)

log = structlog.get_logger()

# The return value of `Runner.run`, or its exception.
_Result: TypeAlias = Sequence[RunnerOutput | None] | BaseException


class InferenceWorker:
    """Loads a model, runs the batches of a queue, and closes the model.

    Args:
        runner: The model, not loaded yet.
        queue: The queue to take batches from.
        on_busy: Called in the event loop when a run has ended, with its duration in seconds.
    """

    def __init__(
        self, runner: Runner, queue: RunQueue, *, on_busy: Callable[[float], None] = lambda _: None
    ) -> None:
        self._runner = runner
        self._queue = queue
        self._on_busy = on_busy
        self._busy = False
        self._unreported = 0.0  # seconds of runs not yet passed to `on_busy`
        self._closes_model = False
        self._callbacks: list[Callable[[], None]] = []  # for the event loop, not sent yet
        self._loop: asyncio.AbstractEventLoop
        self.ended: asyncio.Future[None]

    @property
    def busy(self) -> bool:
        """Whether the thread is loading, running or closing the model, without a way to stop it."""
        return self._busy

    def start(self) -> "asyncio.Future[ModelDescription]":
        """Start the thread, which loads the model first.

        Returns:
            A future with the description of the model, or with the exception of `Runner.load`.
        """
        self._loop = asyncio.get_running_loop()
        self.ended = self._loop.create_future()
        loaded: asyncio.Future[ModelDescription] = self._loop.create_future()
        self._busy = True
        # A daemon thread, so that a stalled run does not keep the interpreter alive.
        threading.Thread(target=self._main, args=(loaded,), name="inference", daemon=True).start()
        return loaded

    async def stop(self) -> None:
        """Start no more runs, and wait until the model is closed."""
        self._closes_model = True
        self._queue.close()
        await self.ended

    # -- in the thread ----------------------------------------------------------------------------

    def _main(self, loaded: "asyncio.Future[ModelDescription]") -> None:
        error: BaseException | None = None
        try:
            if self._load(loaded):
                while self._run_next():
                    pass
            if self._closes_model:
                self._runner.close()
        except BaseException as raised:  # noqa: BLE001 - reported through `ended`
            error = _without_frames(raised)
        self._busy = False
        self._notify(_settle, self.ended, error)

    def _load(self, loaded: "asyncio.Future[ModelDescription]") -> bool:
        try:
            description = self._runner.load()
        except BaseException as error:  # noqa: BLE001 - reported to the caller of `start`
            self._notify(_settle, loaded, _without_frames(error))
            return False
        self._notify(_settle, loaded, description)
        return True

    def _run_next(self) -> bool:
        """Wait for a batch and run it. Return False once the queue is closed."""
        batch = self._queue.next_batch(wait=False)
        if not batch:
            self._flush()
            self._busy = False
            batch = self._queue.next_batch()
            self._busy = True
        if batch:
            for ticket in batch:
                ticket.batch = [member.progress for member in batch]
            batch[0].context.copy().run(self._run_batch, batch)
        return bool(batch)

    def _run_batch(self, batch: Sequence[Ticket]) -> None:
        result = self._run(batch)
        if isinstance(result, OutOfMemory) and len(batch) == 1:
            tried = result.tried
            del result  # frees the tensors of the first run before the second run
            log.warning("out_of_memory", tried=tried)
            result = self._run(batch, save_memory=True)
            if isinstance(result, OutOfMemory):
                result = OutOfMemory("twice", tuple(dict.fromkeys((*tried, *result.tried))))
        elif len(batch) > 1 and _may_concern_one_member(result):
            log.warning("batch_failed", of=len(batch), error=type(result).__name__)
            del result
            self._run_one_by_one(batch)
            return
        self._finish(batch, result)

    def _run_one_by_one(self, batch: Sequence[Ticket]) -> None:
        """Run the members of a failed batch alone: one bad request must not fail the others."""
        for ticket in batch:
            if self._queue.closed:
                self._finish([ticket], DeviceLost("the device was lost before this run"))
            else:
                ticket.context.copy().run(self._run_batch, [ticket])

    def _run(self, batch: Sequence[Ticket], *, save_memory: bool = False) -> _Result:
        """Call the runner; return its return value or its exception."""
        progresses = [ticket.progress for ticket in batch]
        began = time.monotonic()
        for progress in progresses:
            progress.begin()
        self._defer(_begin, batch)
        self._flush()
        try:
            runs = [ticket.run for ticket in batch if ticket.run is not None]
            return self._runner.run(runs, save_memory=save_memory)
        except BaseException as error:  # noqa: BLE001 - reported to the job
            if isinstance(error, DeviceLost):
                self._queue.close()
            return _without_frames(error)
        finally:
            for progress in progresses:
                progress.end()
            self._unreported += time.monotonic() - began

    def _finish(self, batch: Sequence[Ticket], result: _Result) -> None:
        for ticket in batch:
            ticket.run = None  # frees the inputs while the output is stored
        seconds, self._unreported = self._unreported, 0.0
        self._defer(_finish, batch, result, self._on_busy, seconds)

    def _notify(self, callback: Callable[..., None], *args: Any) -> None:
        """Call a function in the event loop."""
        self._defer(callback, *args)
        self._flush()

    def _defer(self, callback: Callable[..., None], *args: Any) -> None:
        """Call a function in the event loop with the next `_flush`.

        The event loop wakes up once for the end of a run and the begin of the next one. Each time
        it does, it competes with this thread for the interpreter.
        """
        self._callbacks.append(partial(callback, *args))

    def _flush(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        if callbacks:
            with suppress(RuntimeError):  # the loop is closed: the process is ending
                self._loop.call_soon_threadsafe(_call_all, callbacks)


# -- in the event loop ----------------------------------------------------------------------------


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
        future.exception()  # marks it as retrieved: the process may be ending for another reason
    else:
        future.set_result(result)


def _call_all(callbacks: Sequence[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()


def _begin(batch: Sequence[Ticket]) -> None:
    for ticket in batch:
        ticket.begin()


def _finish(
    batch: Sequence[Ticket], result: _Result, on_busy: Callable[[float], None], seconds: float
) -> None:
    on_busy(seconds)
    for number, ticket in enumerate(batch):
        output = result if isinstance(result, BaseException) else result[number]
        ticket.finish(Interrupted() if output is None else output)


# -- exceptions of a run --------------------------------------------------------------------------


def _may_concern_one_member(result: _Result) -> bool:
    """Return whether a single member may have caused the failure of a batch."""
    return isinstance(result, Exception) and not isinstance(result, DeviceLost | Interrupted)


def _without_frames(error: BaseException) -> BaseException:
    """Replace the traceback by text, because its frames refer to tensors on the device."""
    error.add_note("".join(traceback.format_exception(error)))
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
