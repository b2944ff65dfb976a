"""Several workers on one in-memory bus and store, which a test drives step by step.

Every worker stops before and after each port call. The test ends the runs of the model and moves
the clock. So a test can kill workers, expire leases and stop services between any two calls.
Equal choices always give an equal course of events.
"""

import asyncio
import heapq
import inspect
from collections.abc import Awaitable, Callable
from contextvars import Context
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from types import SimpleNamespace
from typing import Any, ParamSpec, Protocol, Self, TypeVar, TypeVarTuple, cast

import pytest

from consumer.inference import monitor, progress, run_queue
from consumer.inference.run_queue import RunQueue, Ticket
from consumer.jobs import admission, chain_continuation, executor, finalizer, inference_stage
from consumer.jobs.admission import Admission
from consumer.jobs.executor import Executor, Limits
from consumer.ports.bus import Delivery
from consumer.ports.model import OutOfMemory, RunnerOutput, RunRequest
from generation_contracts import Subjects, Task
from tests.support import memory_ports
from tests.support.memory_ports import (
    MemoryArtifacts,
    MemoryDelivery,
    MemoryEvents,
    MemoryImages,
    MemoryObserver,
    MemoryQueue,
    MemoryWorkers,
    Outage,
    Script,
    ScriptedRunner,
)

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

START = datetime(2030, 1, 1, tzinfo=UTC)  # the time at which every clock shows 0


class StillLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock that a test moves. It runs executor calls in its own thread."""

    def __init__(self) -> None:
        self._now = 0.0
        self._alarms: list[float] = []
        self._called = False
        super().__init__()

    def time(self) -> float:
        """Seconds since `START`."""
        return self._now

    def rest(self) -> None:
        """Run until no callback is due at the current time."""
        self._called = True
        while self._called:
            self._called = False
            super().call_soon(self.stop)
            self.run_forever()

    def pass_time(self, seconds: float) -> None:
        """Move the clock from alarm to alarm."""
        end = self._now + seconds
        while self._alarms and self._alarms[0] <= end:
            self._now = max(self._now, heapq.heappop(self._alarms))
            self.rest()
        self._now = end
        self.rest()

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self._called = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        heapq.heappush(self._alarms, when)
        return super().call_at(when, callback, *args, context=context)

    def run_in_executor(  # type: ignore[override] # a future of this loop, done already
        self, _: object, function: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(function(*args))
        except Exception as error:  # noqa: BLE001 - the awaiting task gets it
            future.set_exception(error)
        return future


class Watcher(Protocol):
    """Receives every port call of one worker."""

    def reaches(self, call: str, arguments: tuple[Any, ...]) -> None:
        """The worker reaches the call, before its first stop."""

    def before(self, call: str, arguments: tuple[Any, ...]) -> None:
        """The worker makes the call."""

    def after(self, call: str, arguments: tuple[Any, ...], answer: object) -> None:
        """The port has returned from the call."""

    def returns(self, call: str, answer: object) -> None:
        """The worker has received the return value, after its second stop."""

    def refused(self, call: str, error: Exception) -> None:
        """The call has raised."""

    def run_begins(self, run: "SteppedRun") -> None:
        """A run of the model starts."""


class SteppedRun:
    """One run of a model that ends when the test ends it."""

    def __init__(self, run: RunRequest, *, save_memory: bool) -> None:
        self.on_step = run.progress.step
        self.cancelled = run.cancelled
        self.save_memory = save_memory
        self.ends: asyncio.Future[Script] = asyncio.get_running_loop().create_future()


class SteppedInference(RunQueue):
    """A run queue whose inference thread is a task. The task waits until the test ends the run."""

    def __init__(self, runner: ScriptedRunner, worker: "SteppedWorker") -> None:
        super().__init__()
        self._runner = runner
        self._worker = worker
        self._runs: set[asyncio.Task[None]] = set()

    def mark_ready(self, ticket: Ticket, run: RunRequest, key: Any = None) -> None:
        super().mark_ready(ticket, run, key)
        for taken in self.next_batch(wait=False):
            task = asyncio.create_task(self._attempt(taken))
            self._runs.add(task)
            task.add_done_callback(self._runs.discard)

    async def _attempt(self, ticket: Ticket) -> None:
        result = await self._run(ticket, save_memory=False)
        if isinstance(result, OutOfMemory):
            result = await self._run(ticket, save_memory=True)
        ticket.finish(result)

    async def _run(self, ticket: Ticket, *, save_memory: bool) -> RunnerOutput | Exception:
        assert ticket.run is not None
        ticket.progress.begin()
        ticket.begin()
        run = SteppedRun(ticket.run, save_memory=save_memory)
        self._worker.run = run
        self._worker.watcher.run_begins(run)
        try:
            self._runner.script_runs(await run.ends)
            (output,) = self._runner.run([ticket.run], save_memory=save_memory)
        except Exception as error:  # noqa: BLE001 - the job handles it
            return error
        finally:
            self._worker.run = None
            ticket.progress.end()
        assert output is not None
        return output


# The methods that never raise, in any state of the connection.
NEVER_RAISE = frozenset(
    {"publish_progress", "reply", "nak", "requeue", "is_in_progress", "others_idle"}
)
WITHOUT_THE_BUS = frozenset({"store", "fetch", "discard", "reachable"})


class CutOff(ConnectionError):  # noqa: N818 - a state of the connection
    """Raised by the calls of a worker whose client has closed its connection to the bus."""


class WorkerIsDead(ConnectionError):  # noqa: N818 - a state of the worker
    """Raised by the calls of a dead worker. Its calls have no effect."""


class SteppedWorker:
    """One worker process.

    Attributes:
        position: The call at which the worker has stopped, for example `before ack`, or "". Of
            several simultaneous calls the first call continues first.
        run: The unfinished run of the model, if any.
        job: The task that handles the delivery, if any.
        cut_off: Whether the client has closed its connection to the bus.
    """

    def __init__(self, world: "SteppedWorld", name: str) -> None:
        self.name = name
        self.run: SteppedRun | None = None
        self.job: asyncio.Task[int | None] | None = None
        self.cut_off = False
        self.watcher: Watcher
        self.observer = MemoryObserver()
        self._loop = world.loop
        self._dead = False
        self._stops: list[tuple[str, asyncio.Future[None]]] = []
        runner = ScriptedRunner()
        self.executor = Executor(
            worker=name,
            admission=Admission(world.task, world.subjects, ("_INBOX.",)),
            limits=world.limits,
            model=runner.load(),
            runner=runner,
            run_queue=SteppedInference(runner, self),
            events=self._stepped(world.events),
            queue=self._stepped(world.queue),
            workers=self._stepped(world.workers),
            artifacts=self._stepped(world.artifacts),
            images=world.images,
            observer=self.observer,
        )

    @property
    def position(self) -> str:
        return self._stops[0][0] if self._stops else ""

    def take(self, delivery: MemoryDelivery, watcher: Watcher, *, exhausted: bool = False) -> None:
        """Handle a delivery, or an exhausted delivery, up to the first call."""
        self.watcher = watcher
        stepped = cast("Delivery", self._stepped(delivery))
        handle = self.executor.handle_exhausted if exhausted else self.executor.handle
        self.job = self._loop.create_task(handle(stepped))
        self._loop.rest()

    def go(self) -> None:
        """Continue to the next stop."""
        if self._stops:
            _, stop = self._stops.pop(0)
            if not stop.done():
                stop.set_result(None)
            self._loop.rest()

    def end_run(self, script: Script) -> None:
        """End the run of the model with a script."""
        if self.run is not None:
            self.run.ends.set_result(script)
            self._loop.rest()

    def force(self) -> None:
        """Cancel the job, as the daemon does when it must exit at once."""
        if self.job is not None:
            self.job.cancel()
            self._loop.rest()

    def die(self) -> None:
        """Stop the worker permanently, as after a SIGKILL."""
        self._dead = True
        self.force()
        if self.run is not None:
            self.run.ends.cancel()
            self._loop.rest()

    def _stepped(self, port: T) -> T:
        return cast("T", _Stepped(port, self))

    async def call(
        self, name: str, method: Callable[..., Awaitable[object]], *args: Any, **kwargs: Any
    ) -> object:
        """Call a method of a port, with a stop before and after it."""
        self.watcher.reaches(name, args)
        await self._stop(f"before {name}")
        self.watcher.before(name, args)
        try:
            answer = await self._reach_out(name, method, *args, **kwargs)
        except Exception as error:
            self.watcher.refused(name, error)
            raise
        self.watcher.after(name, args, answer)
        await self._stop(f"after {name}")
        self.watcher.returns(name, answer)
        return answer

    async def _reach_out(
        self, name: str, method: Callable[..., Awaitable[object]], *args: Any, **kwargs: Any
    ) -> object:
        if not self.cut_off or name in WITHOUT_THE_BUS:
            return await method(*args, **kwargs)
        if name in NEVER_RAISE:
            return None
        raise CutOff

    async def _stop(self, position: str) -> None:
        if self._dead:
            raise WorkerIsDead
        stop: tuple[str, asyncio.Future[None]] = (position, self._loop.create_future())
        self._stops.append(stop)
        try:
            await stop[1]
        finally:
            if stop in self._stops:
                self._stops.remove(stop)


class _Stepped:
    """A port that stops the worker at every call, except at the renewal of a lease."""

    def __init__(self, port: object, worker: SteppedWorker) -> None:
        self.port = port
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.port, name)
        if name == "extend" or not inspect.iscoroutinefunction(member):
            return member
        return partial(self._worker.call, name, member)


class SteppedWorld:
    """The bus, the store and the clock that the workers share.

    Args:
        task: The task of all workers.
        limits: The limits of each worker.
        max_deliver: Largest number of deliveries of a request.
        max_payload: Largest size of an event, in bytes.
    """

    def __init__(self, task: Task, limits: Limits, *, max_deliver: int, max_payload: int) -> None:
        self.task = task
        self.limits = limits
        self.loop = StillLoop()
        self.subjects = Subjects()
        self.bus = Outage()
        self.queue = MemoryQueue([], self.bus, max_deliver=max_deliver, task=task)
        self.workers = MemoryWorkers()
        self.events = MemoryEvents([], self.bus)
        self.events.max_payload = max_payload
        self.artifacts = MemoryArtifacts([])
        self.images = MemoryImages()
        self._workers = 0
        self._patches = pytest.MonkeyPatch()

    def open(self) -> None:
        """Make every clock show the time of this world."""
        clock = SimpleNamespace(monotonic=self.loop.time)
        for module in (inference_stage, monitor, progress, run_queue):
            self._patches.setattr(module, "time", clock)
        for module in (admission, chain_continuation, executor, finalizer, memory_ports):
            self._patches.setattr(module, "datetime", _clock_of(self.loop))

    def close(self) -> None:
        """Restore the real clocks."""
        self._patches.undo()
        self.loop.close()

    def now(self) -> datetime:
        """Return the time in this world."""
        return START + timedelta(seconds=self.loop.time())

    def new_worker(self) -> SteppedWorker:
        """Start a worker."""
        self._workers += 1
        worker = SteppedWorker(self, f"worker-{self._workers}")
        self.workers.executors.append(worker.executor)
        return worker


def _clock_of(loop: StillLoop) -> type[datetime]:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            assert tz is UTC
            return cast("Self", START + timedelta(seconds=loop.time()))

    return Clock
