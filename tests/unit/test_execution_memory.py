"""Nothing of a job outlives it: a traceback that is kept can pin the device's memory."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from consumer.ports import (
    DeviceLost,
    GeneratedImage,
    Interrupted,
    ModelError,
    OutOfMemory,
    RunnerOutput,
)
from consumer.run import Reason
from tests.behaviour import asking, from_now, soon, while_running
from tests.daemon_logging import daemon_logging
from tests.memory_ports import POLL, Run, make
from tests.memory_world import MemoryWorld, Worlds

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(autouse=True, params=["json", "console"])
def _logging(request: pytest.FixtureRequest) -> Iterator[None]:
    # Some renderers of tracebacks keep what they have shown.
    with daemon_logging(request.param):
        yield


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    # With it, a reference cycle would be freed by luck before a test could see it.
    gc.collect()
    gc.disable()
    yield
    gc.enable()


LOOKS = 1_000  # at what a thread may still hold; a cycle is never freed


class Fault(Exception):  # noqa: N818 - one that a weak reference can be had of
    """Stands for a fault of the worker itself."""


class Tensor:
    """Stands for what a run has on the device."""


class Traced:
    """Runs that have tensors in their frames and raise, or give an output, watched by weakrefs."""

    def __init__(self) -> None:
        self._watched: list[weakref.ref[Any]] = []

    def watch(self, *things: object) -> None:
        self._watched += [weakref.ref(thing) for thing in things]

    @property
    def alive(self) -> list[str]:
        found = [reference() for reference in self._watched]
        return [type(one).__name__ for one in found if one is not None]

    async def are_gone(self) -> bool:
        """Whether nothing is kept, once the threads have let go of their last call."""
        for _ in range(LOOKS):
            if not self.alive:
                return True
            await asyncio.sleep(POLL)
        return False

    def raising(self, make_error: Callable[[], Exception]) -> Callable[[Run], RunnerOutput]:
        def run(_: Run) -> RunnerOutput:
            tensor = Tensor()
            error = make_error()
            self.watch(tensor, error)
            try:
                raise error
            finally:
                del error  # the test's own frame is not to be the one that keeps it

        return run

    def giving(self, run: Run) -> RunnerOutput:
        output = make(run)
        self.watch(output, output.images[0].image)
        return output


@pytest.mark.parametrize(
    "make_error",
    [
        lambda: ModelError("E"),
        DeviceLost,
        Fault,
    ],
    ids=["model", "device", "fault"],
)
async def test_error_and_tensors_of_a_failed_run_are_gone_with_the_job(
    world: MemoryWorld, make_error: Callable[[], Exception]
) -> None:
    traced = Traced()
    world.runner.will(traced.raising(make_error))
    await world.send(asking())
    await soon(world.work())
    assert await traced.are_gone(), traced.alive


async def test_tensors_of_a_run_out_of_memory_are_gone_before_the_second_try(
    world: MemoryWorld,
) -> None:
    traced = Traced()
    left: list[str] = []

    def look(run: Run) -> RunnerOutput:
        left.extend(traced.alive)
        return make(run)

    world.runner.will(traced.raising(OutOfMemory), look)
    await world.send(asking())
    await soon(world.work())
    assert len(world.runner.runs) == 2
    assert left == []


async def test_error_and_tensors_of_a_stopped_run_are_gone_with_the_job(
    world: MemoryWorld,
) -> None:
    traced = Traced()
    hold = world.runner.will_hold(heeds=False, then=traced.raising(Interrupted))
    await world.send(asking())

    def stop() -> None:
        world.execution.interrupt(Reason.CANCEL)
        hold.release()

    await while_running(world, hold, stop)
    assert world.observer.outcomes == ["cancelled"]
    assert await traced.are_gone(), traced.alive


async def test_output_of_a_done_run_is_gone_with_the_job(world: MemoryWorld) -> None:
    traced = Traced()
    world.runner.will(traced.giving)
    await world.send(asking())
    await soon(world.work())
    assert world.observer.outcomes == ["succeeded"]
    assert await traced.are_gone(), traced.alive


async def test_output_that_cannot_be_encoded_is_gone_with_the_job(world: MemoryWorld) -> None:
    traced = Traced()
    world.images.broken = Fault()
    world.runner.will(traced.giving)
    await world.send(asking())
    await soon(world.work())
    assert world.observer.outcomes == ["given_back"]
    world.images.broken = None  # it carries the traceback
    assert await traced.are_gone(), traced.alive


async def test_output_that_the_store_did_not_take_is_gone_with_the_job(world: MemoryWorld) -> None:
    traced = Traced()
    world.store.begin()
    world.runner.will(traced.giving)
    await world.send(asking())
    working = asyncio.create_task(world.work())
    await soon(world.store_is_missed())
    world.execution.interrupt(Reason.DRAIN)
    await soon(working)
    del working
    assert await traced.are_gone(), traced.alive


async def test_error_of_a_run_that_was_left_behind_is_heard_by_nobody_and_gone(
    make_world: Worlds,
) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    world = await make_world(stall_timeout=0.02)
    traced = Traced()
    hold = world.runner.will_hold(heeds=False, then=traced.raising(lambda: ModelError("late")))
    await world.send(asking())
    assert await soon(world.work()) == 70
    hold.release()
    await soon(world.inference.call(lambda: None))
    await asyncio.sleep(0)
    assert await traced.are_gone(), traced.alive
    assert complaints == []


async def test_timer_of_a_deadline_does_not_outlive_the_job(world: MemoryWorld) -> None:
    traced = Traced()

    def look(run: Run) -> RunnerOutput:
        traced.watch(run.cancelled.__self__)  # type: ignore[attr-defined] # a method
        return make(run)

    world.runner.will(look)
    await world.send(asking(deadline=from_now(hours=1)))
    await soon(world.work())
    world.runner.runs.clear()
    assert await traced.are_gone(), traced.alive


def test_trace_sees_what_is_kept() -> None:
    traced = Traced()
    kept = GeneratedImage(image=None, seed=0)  # type: ignore[arg-type] # only to be kept
    run = traced.raising(lambda: ModelError("E"))
    try:
        run(None)  # type: ignore[arg-type] # it looks at nothing
    except ModelError as error:
        kept = error  # type: ignore[assignment]
    assert traced.alive == ["Tensor", "ModelError"]
    del kept
    assert traced.alive == []
