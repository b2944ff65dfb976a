"""Several workers on one in-memory bus and store, none of which goes on by itself.

Every worker stops before and after each call of a port, its model ends when it is told to, and the
clock stands until it is moved. So whoever drives this world can let workers die, leases run out and
services go away between any two calls, and the same choices always give the same course.
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

from consumer import admission, conclusion, device, execution, run, turns
from consumer.admission import Admission
from consumer.execution import Execution, Limits
from consumer.ports import Delivery, IsCancelled, OnStep
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

START = datetime(2030, 1, 1, tzinfo=UTC)  # when every clock here shows 0


class StillLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands until it is moved, and which is its own thread pool."""

    def __init__(self) -> None:
        self._now = 0.0
        self._alarms: list[float] = []
        self._called = False
        super().__init__()

    def time(self) -> float:
        """Seconds since `START`."""
        return self._now

    def rest(self) -> None:
        """Run until nothing is left to do at this time."""
        self._called = True
        while self._called:
            self._called = False
            super().call_soon(self.stop)
            self.run_forever()

    def pass_time(self, seconds: float) -> None:
        """Move the clock, from alarm to alarm."""
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
        except Exception as error:  # noqa: BLE001 - it belongs to whoever waits
            future.set_exception(error)
        return future


class Watcher(Protocol):
    """Told of every call of one worker, in the moment in which it happens."""

    def reaches(self, call: str, arguments: tuple[Any, ...]) -> None:
        """The worker is about to make the call."""

    def before(self, call: str, arguments: tuple[Any, ...]) -> None:
        """The call is made."""

    def after(self, call: str, arguments: tuple[Any, ...], answer: object) -> None:
        """It has been answered."""

    def returns(self, call: str, answer: object) -> None:
        """The worker has the answer."""

    def refused(self, call: str, error: Exception) -> None:
        """It has raised."""

    def run_begins(self, run: "SteppedRun") -> None:
        """The model is started."""


class SteppedRun:
    """One run of a model that ends when it is told to."""

    def __init__(self, on_step: OnStep, cancelled: IsCancelled, *, save_memory: bool) -> None:
        self.on_step = on_step
        self.cancelled = cancelled
        self.save_memory = save_memory
        self.ends: asyncio.Future[Script] = asyncio.get_running_loop().create_future()


class SteppedInference:
    """An inference "thread" that waits for its run's end to be told."""

    def __init__(self, runner: ScriptedRunner, worker: "SteppedWorker") -> None:
        self._runner = runner
        self._worker = worker

    async def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        given: Any = kwargs
        held = SteppedRun(given["on_step"], given["cancelled"], save_memory=given["save_memory"])
        self._worker.run = held
        self._worker.watcher.run_begins(held)
        try:
            self._runner.will(await held.ends)
        finally:
            self._worker.run = None
        return function(*args, **kwargs)

    def call_next(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("one at a time")

    def take_back(self) -> bool:
        raise AssertionError("one at a time")


# What keeps its word never to raise, whatever becomes of the connection.
NEVER_RAISE = frozenset({"publish_progress", "reply", "nak", "release", "holds", "others_idle"})
WITHOUT_THE_BUS = frozenset({"store", "fetch", "discard", "reachable"})


class CutOff(ConnectionError):  # noqa: N818 - a state of the connection
    """What the calls of a worker raise whose client has given up on the bus."""


class WorkerIsDead(ConnectionError):  # noqa: N818 - a state of the worker
    """What a dead worker's calls raise: nothing of it reaches the outside any more."""


class SteppedWorker:
    """One worker process.

    Attributes:
        place: Where it has stopped, for example `before ack`; "" where it has not. Of several
            calls at the same time the first one goes on first.
        run: The run of its model that has not ended.
        job: The delivery in its hands, if any.
        cut_off: Whether its client has given up on the bus.
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
        self.execution = Execution(
            worker=name,
            admission=Admission(world.task, world.subjects, ("_INBOX.",)),
            limits=world.limits,
            model=runner.load(),
            runner=runner,
            inference=SteppedInference(runner, self),
            events=self._stepped(world.events),
            queue=self._stepped(world.queue),
            workers=self._stepped(world.colleagues),
            artifacts=self._stepped(world.artifacts),
            images=world.images,
            observer=self.observer,
        )

    @property
    def place(self) -> str:
        return self._stops[0][0] if self._stops else ""

    def take(self, delivery: MemoryDelivery, watcher: Watcher, *, stranded: bool = False) -> None:
        """Begin with a delivery, or with one that the server delivers no more, up to a call."""
        self.watcher = watcher
        handed = cast("Delivery", self._stepped(delivery))
        does = self.execution.put_aside if stranded else self.execution.handle
        self.job = self._loop.create_task(does(handed))
        self._loop.rest()

    def go(self) -> None:
        """Go on to the next stop."""
        if self._stops:
            _, stop = self._stops.pop(0)
            if not stop.done():
                stop.set_result(None)
            self._loop.rest()

    def end_run(self, script: Script) -> None:
        """Let the model do what it does."""
        if self.run is not None:
            self.run.ends.set_result(script)
            self._loop.rest()

    def force(self) -> None:
        """Cancel the job, as the daemon does when it must end at once."""
        if self.job is not None:
            self.job.cancel()
            self._loop.rest()

    def die(self) -> None:
        """Do nothing any more, as after a SIGKILL."""
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

    async def _stop(self, place: str) -> None:
        if self._dead:
            raise WorkerIsDead
        stop: tuple[str, asyncio.Future[None]] = (place, self._loop.create_future())
        self._stops.append(stop)
        try:
            await stop[1]
        finally:
            if stop in self._stops:
                self._stops.remove(stop)


class _Stepped:
    """A port, whose calls its worker stops at; the renewal of a lease is fire and forget."""

    def __init__(self, port: object, worker: SteppedWorker) -> None:
        self.port = port
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.port, name)
        if name == "extend" or not inspect.iscoroutinefunction(member):
            return member
        return partial(self._worker.call, name, member)


class SteppedWorld:
    """What the workers share, and the clock of it all.

    Args:
        task: Of all workers.
        limits: Of each of them.
        max_deliver: How often the bus delivers a request.
        max_payload: Bytes of an event.
    """

    def __init__(self, task: Task, limits: Limits, *, max_deliver: int, max_payload: int) -> None:
        self.task = task
        self.limits = limits
        self.loop = StillLoop()
        self.subjects = Subjects()
        self.bus = Outage()
        self.queue = MemoryQueue([], self.bus, max_deliver=max_deliver, task=task)
        self.colleagues = MemoryWorkers()
        self.events = MemoryEvents([], self.bus)
        self.events.max_payload = max_payload
        self.artifacts = MemoryArtifacts([])
        self.images = MemoryImages()
        self._workers = 0
        self._patches = pytest.MonkeyPatch()

    def open(self) -> None:
        """Make every clock show this world's time."""
        clock = SimpleNamespace(monotonic=self.loop.time)
        for module in (run, device, turns):
            self._patches.setattr(module, "time", clock)
        for module in (admission, conclusion, execution, memory_ports):
            self._patches.setattr(module, "datetime", _clock_of(self.loop))

    def close(self) -> None:
        """Put the real clocks back."""
        self._patches.undo()
        self.loop.close()

    def now(self) -> datetime:
        """The time in this world."""
        return START + timedelta(seconds=self.loop.time())

    def new_worker(self) -> SteppedWorker:
        """Start a process."""
        self._workers += 1
        worker = SteppedWorker(self, f"worker-{self._workers}")
        self.colleagues.asked.append(worker.execution)
        return worker


def _clock_of(loop: StillLoop) -> type[datetime]:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            assert tz is UTC
            return cast("Self", START + timedelta(seconds=loop.time()))

    return Clock
