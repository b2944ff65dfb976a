"""Nothing of a job outlives it: a traceback that is kept can pin the device's memory."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from PIL import Image

from consumer.inference.cancel_token import StopReason
from consumer.ports.media import EncodedImage, OutputFormat
from consumer.ports.model import (
    DeviceLost,
    GeneratedImage,
    Interrupted,
    ModelError,
    RunnerOutput,
    UnsupportedParameter,
)
from generation_contracts import CancelledEvent, Task
from tests.support.behaviour import from_now, request_body, soon, while_running
from tests.support.daemon_logging import daemon_logging
from tests.support.memory_ports import POLL, Hold, MemoryImages, Run, make, out_of_memory
from tests.support.memory_world import MemoryWorld, Worlds

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

    def files_of(self, images: MemoryImages) -> None:
        """Watch every picture's file from now on."""
        encode = images.encode

        def watched(image: Image.Image, output_format: OutputFormat, **said: Any) -> EncodedImage:
            made = encode(image, output_format, **said)
            self.watch(made)
            return made

        images.encode = watched  # type: ignore[method-assign] # of this object only


# -- the run raises -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_error",
    [
        lambda: ModelError("E"),
        lambda: UnsupportedParameter("width", "width: not this one"),
        DeviceLost,
        Interrupted,
        Fault,
    ],
    ids=["model", "parameter", "device", "stopped unasked", "fault"],
)
async def test_error_and_tensors_of_a_failed_run_are_gone_with_the_job(
    world: MemoryWorld, make_error: Callable[[], Exception]
) -> None:
    traced = Traced()
    world.runner.script_runs(traced.raising(make_error))
    await world.send(request_body())
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

    world.runner.script_runs(traced.raising(out_of_memory), look)
    await world.send(request_body())
    await soon(world.work())
    assert len(world.runner.runs) == 2
    assert left == []


async def test_both_errors_and_tensors_of_a_run_always_out_of_memory_are_gone_with_the_job(
    world: MemoryWorld,
) -> None:
    traced = Traced()
    world.runner.script_runs(traced.raising(out_of_memory), traced.raising(out_of_memory))
    await world.send(request_body())
    await soon(world.work())
    assert world.observer.outcomes == ["out_of_memory"]
    assert await traced.are_gone(), traced.alive


async def test_pictures_of_a_request_are_gone_with_the_job(make_world: Worlds) -> None:
    world = await make_world(task=Task.IMAGE_TO_TEXT)
    await world.put_object("one", world.image_file)
    traced = Traced()

    def look(run: Run) -> RunnerOutput:
        traced.watch(*run.images)
        raise ModelError("E")

    world.runner.script_runs(look)
    await world.send(request_body(images=[world.source("one")]))
    await soon(world.work())
    world.runner.runs.clear()
    assert await traced.are_gone(), traced.alive


# -- the run is stopped ---------------------------------------------------------------------------

REASONS = {
    StopReason.CANCEL: "cancelled",
    StopReason.DEADLINE: "deadline_exceeded",
    StopReason.DRAIN: "given_back",
}


@pytest.mark.parametrize("reason", REASONS)
async def test_error_and_tensors_of_a_stopped_run_are_gone_with_the_job(
    world: MemoryWorld, reason: StopReason
) -> None:
    traced = Traced()
    hold = world.runner.hold_next_run(polls_cancel=False, then=traced.raising(Interrupted))
    await world.send(request_body())

    def stop() -> None:
        world.executor.interrupt(reason)
        hold.release()

    await while_running(world, hold, stop)
    assert world.observer.outcomes == [REASONS[reason]]
    assert await traced.are_gone(), traced.alive


@pytest.mark.parametrize("reason", REASONS)
async def test_output_of_a_run_that_was_done_before_it_could_stop_is_gone_with_the_job(
    world: MemoryWorld, reason: StopReason
) -> None:
    traced = Traced()
    hold = world.runner.hold_next_run(polls_cancel=False, then=traced.giving)
    await world.send(request_body())

    def stop() -> None:
        world.executor.interrupt(reason)
        hold.release()

    await while_running(world, hold, stop)
    assert world.observer.outcomes == [REASONS[reason]]
    assert await traced.are_gone(), traced.alive


class Complaints:
    """What asyncio would log of an exception that was never retrieved."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: self.heard.append(what))


async def late_run_is_gone(hold: Hold, traced: Traced) -> bool:
    """Whether nothing is kept of a run that ends when its job is over."""
    hold.release()
    return await traced.are_gone()


async def test_error_of_a_stalled_run_is_not_logged_and_gone(make_world: Worlds) -> None:
    complaints = Complaints()
    world = await make_world(stall_timeout=0.02)
    traced = Traced()
    hold = world.runner.hold_next_run(
        polls_cancel=False, then=traced.raising(lambda: ModelError("late"))
    )
    await world.send(request_body())
    assert await soon(world.work()) == 70
    assert await late_run_is_gone(hold, traced), traced.alive
    assert complaints.heard == []


async def test_error_of_a_run_that_a_draining_process_left_is_not_logged_and_gone(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.inference.monitor.DRAIN_STEP_TIMEOUT", 0.01)
    complaints = Complaints()
    traced = Traced()
    hold = world.runner.hold_next_run(
        polls_cancel=False, then=traced.raising(lambda: ModelError("late"))
    )
    await world.send(request_body())
    await while_running(world, hold, lambda: world.executor.interrupt(StopReason.DRAIN))
    assert world.observer.outcomes == ["given_back"]
    assert await late_run_is_gone(hold, traced), traced.alive
    assert complaints.heard == []


@pytest.mark.parametrize("late", ["raises", "gives"])
async def test_run_of_a_cancelled_task_is_not_logged_and_gone(
    world: MemoryWorld, late: str
) -> None:
    complaints = Complaints()
    traced = Traced()
    then = traced.giving if late == "gives" else traced.raising(lambda: ModelError("late"))
    hold = world.runner.hold_next_run(polls_cancel=False, then=then)
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    await cancel(working)
    del working
    assert world.observer.outcomes == ["given_back"]
    assert await late_run_is_gone(hold, traced), traced.alive
    assert complaints.heard == []


async def cancel(working: "asyncio.Task[int | None]") -> None:
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(working)


# -- the run is done ------------------------------------------------------------------------------


async def test_output_of_a_done_run_is_gone_with_the_job(world: MemoryWorld) -> None:
    traced = Traced()
    world.runner.script_runs(traced.giving)
    await world.send(request_body())
    await soon(world.work())
    assert world.observer.outcomes == ["succeeded"]
    assert await traced.are_gone(), traced.alive


async def test_output_that_cannot_be_encoded_is_gone_with_the_job(world: MemoryWorld) -> None:
    traced = Traced()
    world.images.encode_error = Fault()
    world.runner.script_runs(traced.giving)
    await world.send(request_body())
    await soon(world.work())
    assert world.observer.outcomes == ["given_back"]
    world.images.encode_error = None  # it carries the traceback
    assert await traced.are_gone(), traced.alive


@pytest.mark.parametrize("then", ["comes back", *REASONS, "task cancelled"], ids=str)
async def test_output_that_waited_for_the_store_is_gone_with_the_job(
    world: MemoryWorld, then: str | StopReason
) -> None:
    traced = Traced()
    traced.files_of(world.images)
    world.store.begin()
    world.runner.script_runs(traced.giving)
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    await soon(world.until_store_call_fails())
    match then:
        case StopReason():
            world.executor.interrupt(then)
            await soon(working)
        case "comes back":
            world.store.end()
            await soon(working)
        case _:
            await cancel(working)
    del working
    assert await traced.are_gone(), traced.alive


async def test_output_without_a_picture_is_gone_with_the_job(world: MemoryWorld) -> None:
    traced = Traced()

    def nothing(_: Run) -> RunnerOutput:
        output = RunnerOutput()
        traced.watch(output)
        return output

    world.runner.script_runs(nothing)
    await world.send(request_body())
    await soon(world.work())
    assert world.observer.outcomes == ["given_back"]
    assert await traced.are_gone(), traced.alive


async def test_output_whose_result_cannot_be_published_is_gone_with_the_job(
    world: MemoryWorld,
) -> None:
    traced = Traced()
    world.events.publish_error = Fault()
    world.runner.script_runs(traced.giving)
    await world.send(request_body())
    await soon(world.work())
    assert world.observer.outcomes == ["abandoned"]
    world.events.publish_error = None  # it carries the traceback
    assert await traced.are_gone(), traced.alive


async def test_output_whose_result_is_too_large_is_gone_with_the_job(world: MemoryWorld) -> None:
    traced = Traced()
    world.events.max_payload = 900  # bytes; a failure fits
    world.runner.script_runs(traced.giving)
    await world.send(request_body(num_images=4))
    await soon(world.work())
    assert world.observer.outcomes == ["internal"]
    assert await traced.are_gone(), traced.alive


async def test_output_that_another_worker_was_quicker_with_is_gone_with_the_job(
    world: MemoryWorld,
) -> None:
    traced = Traced()
    hold = world.runner.hold_next_run(then=traced.giving)
    await world.send(request_body())

    def store_and_go_on() -> None:
        assert world.events.put(quicker)
        hold.release()

    quicker = CancelledEvent(
        request_id="a",
        task=Task.TEXT_TO_IMAGE,
        sequence=1,
        time=datetime.now(UTC),
        worker="worker-2",
        attempt=1,
        request_digest=f"sha256:{'0' * 64}",
    )
    await while_running(world, hold, store_and_go_on)
    assert await world.result("a") == quicker
    assert await traced.are_gone(), traced.alive


async def test_timer_of_a_deadline_does_not_outlive_the_job(world: MemoryWorld) -> None:
    traced = Traced()

    def look(run: Run) -> RunnerOutput:
        traced.watch(run.cancelled.__self__)  # type: ignore[attr-defined] # a method
        return make(run)

    world.runner.script_runs(look)
    await world.send(request_body(deadline=from_now(hours=1)))
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
