"""A finished job keeps no references: a stored traceback could hold device memory."""

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
from tests.support.memory_ports import POLL, MemoryImages, Run, Script, make, out_of_memory
from tests.support.memory_world import MemoryWorld, Worlds

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(autouse=True, params=["json", "console"])
def _logging(request: pytest.FixtureRequest) -> Iterator[None]:
    # Some renderers of tracebacks keep a reference to the last traceback.
    with daemon_logging(request.param):
        yield


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    # The garbage collector could free a reference cycle before a test checks it.
    gc.collect()
    gc.disable()
    yield
    gc.enable()


CHECKS = 1_000  # number of checks for a thread to drop its last references


class Fault(Exception):  # noqa: N818 - an exception that supports weak references
    """A fault of the worker."""


class Tensor:
    """Stands for a tensor on the device."""


class Traced:
    """Scripts of runs whose tensors, errors and outputs are traced with weak references."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[Any]] = []

    def watch(self, *things: object) -> None:
        self._references += [weakref.ref(thing) for thing in things]

    @property
    def alive(self) -> list[str]:
        """The type names of the traced objects that still exist."""
        alive = [reference() for reference in self._references]
        return [type(one).__name__ for one in alive if one is not None]

    async def are_freed(self) -> bool:
        """Return whether all traced objects are freed, once the threads have finished."""
        for _ in range(CHECKS):
            if not self.alive:
                return True
            await asyncio.sleep(POLL)
        return False

    def raising(self, make_error: Callable[[], Exception]) -> Script:
        def run(_: Run) -> RunnerOutput:
            tensor = Tensor()
            error = make_error()
            self.watch(tensor, error)
            try:
                raise error
            finally:
                del error  # otherwise the frame of this test would reference the error

        return run

    def success(self, run: Run) -> RunnerOutput:
        output = make(run)
        self.watch(output, output.images[0].image)
        return output

    def no_output(self, _: Run) -> RunnerOutput:
        output = RunnerOutput()
        self.watch(output)
        return output

    def watch_files(self, images: MemoryImages) -> None:
        """Trace the file of every image that is encoded from now on."""
        encode = images.encode

        def watched(
            image: Image.Image, output_format: OutputFormat, **options: Any
        ) -> EncodedImage:
            encoded = encode(image, output_format, **options)
            self.watch(encoded)
            return encoded

        images.encode = watched  # type: ignore[method-assign] # of this object only


# -- runs that end --------------------------------------------------------------------------------


def nothing(_: MemoryWorld) -> None:
    """Change nothing."""


def fail_encoding(world: MemoryWorld) -> None:
    world.images.encode_error = Fault()


def fail_publishing(world: MemoryWorld) -> None:
    world.events.publish_error = Fault()


def limit_payload(world: MemoryWorld) -> None:
    world.events.max_payload = 900  # bytes; enough for a failed event


def errors(*makers: Callable[[], Exception]) -> Callable[[Traced], list[Script]]:
    return lambda traced: [traced.raising(maker) for maker in makers]


# The scripts of the runs, a preparation of the world, and the outcome of the job.
ENDS: dict[str, tuple[Callable[[Traced], list[Script]], Callable[[MemoryWorld], None], str]] = {
    "model error": (errors(lambda: ModelError("E")), nothing, "requeued"),
    "unsupported parameter": (
        errors(lambda: UnsupportedParameter("width", "width: not this one")),
        nothing,
        "unsupported_parameter",
    ),
    "lost device": (errors(DeviceLost), nothing, "requeued"),
    "interrupted without a stop request": (errors(Interrupted), nothing, "requeued"),
    "internal error": (errors(Fault), nothing, "requeued"),
    "out of memory twice": (errors(out_of_memory, out_of_memory), nothing, "out_of_memory"),
    "success": (lambda traced: [traced.success], nothing, "succeeded"),
    "no output": (lambda traced: [traced.no_output], nothing, "requeued"),
    "failed encoding": (lambda traced: [traced.success], fail_encoding, "requeued"),
    "failed publishing": (lambda traced: [traced.success], fail_publishing, "abandoned"),
    "result too large": (lambda traced: [traced.success], limit_payload, "internal"),
}


@pytest.mark.parametrize("name", ENDS)
async def test_errors_tensors_and_outputs_are_freed_after_the_job(
    world: MemoryWorld, name: str
) -> None:
    make_scripts, prepare, outcome = ENDS[name]
    traced = Traced()
    prepare(world)
    world.runner.script_runs(*make_scripts(traced))
    await world.send(request_body(num_images=4))
    await soon(world.work())
    assert world.observer.outcomes == [outcome]
    # These exceptions refer to their tracebacks.
    world.images.encode_error = world.events.publish_error = None
    assert await traced.are_freed(), traced.alive


async def test_tensors_are_freed_before_the_memory_saving_run(world: MemoryWorld) -> None:
    traced = Traced()
    alive: list[str] = []

    def check(run: Run) -> RunnerOutput:
        alive.extend(traced.alive)
        return make(run)

    world.runner.script_runs(traced.raising(out_of_memory), check)
    await world.send(request_body())
    await soon(world.work())
    assert len(world.runner.runs) == 2
    assert alive == []


async def test_input_images_are_freed_after_the_job(make_world: Worlds) -> None:
    world = await make_world(task=Task.IMAGE_TO_TEXT)
    await world.put_object("one", world.image_file)
    traced = Traced()

    def fail(run: Run) -> RunnerOutput:
        traced.watch(*run.images)
        raise ModelError("E")

    world.runner.script_runs(fail)
    await world.send(request_body(images=[world.source("one")]))
    await soon(world.work())
    world.runner.runs.clear()
    assert await traced.are_freed(), traced.alive


async def test_deadline_timer_is_freed_after_the_job(world: MemoryWorld) -> None:
    traced = Traced()

    def watch_token(run: Run) -> RunnerOutput:
        traced.watch(run.cancelled.__self__)  # type: ignore[attr-defined] # a method
        return make(run)

    world.runner.script_runs(watch_token)
    await world.send(request_body(deadline=from_now(hours=1)))
    await soon(world.work())
    world.runner.runs.clear()
    assert await traced.are_freed(), traced.alive


# -- runs that are stopped ------------------------------------------------------------------------

REASONS = {
    StopReason.CANCEL: "cancelled",
    StopReason.DEADLINE: "deadline_exceeded",
    StopReason.DRAIN: "requeued",
}


@pytest.mark.parametrize("end", ["interrupted", "complete"])
@pytest.mark.parametrize("reason", REASONS)
async def test_stopped_run_is_freed_after_the_job(
    world: MemoryWorld, reason: StopReason, end: str
) -> None:
    traced = Traced()
    then = traced.success if end == "complete" else traced.raising(Interrupted)
    hold = world.runner.hold_next_run(polls_cancel=False, then=then)
    await world.send(request_body())

    def stop() -> None:
        world.executor.interrupt(reason)
        hold.release()

    await while_running(world, hold, stop)
    assert world.observer.outcomes == [REASONS[reason]]
    assert await traced.are_freed(), traced.alive


async def cancel(working: "asyncio.Task[int | None]") -> None:
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(working)


# How the job ends while its run continues, and the outcome of the job.
ABANDONED = {"stall": "abandoned", "drain": "requeued", "cancelled task": "requeued"}


@pytest.mark.parametrize("run_end", ["error", "output"])
@pytest.mark.parametrize("job_end", ABANDONED)
async def test_run_that_ends_after_its_job_is_freed_and_not_logged(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch, job_end: str, run_end: str
) -> None:
    monkeypatch.setattr("consumer.inference.monitor.DRAIN_STEP_TIMEOUT", 0.01)
    asyncio_errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: asyncio_errors.append(context)
    )
    world = await make_world(**({"stall_timeout": 0.02} if job_end == "stall" else {}))
    traced = Traced()
    late = traced.success if run_end == "output" else traced.raising(lambda: ModelError("late"))
    hold = world.runner.hold_next_run(polls_cancel=False, then=late)
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    match job_end:
        case "stall":
            assert await soon(working) == 70
        case "drain":
            world.executor.interrupt(StopReason.DRAIN)
            await soon(working)
        case _:
            await cancel(working)
    del working
    assert world.observer.outcomes == [ABANDONED[job_end]]
    hold.release()
    assert await traced.are_freed(), traced.alive
    assert asyncio_errors == []


# -- outputs that wait ----------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["store available", *REASONS, "task cancelled"], ids=str)
async def test_output_that_waited_for_the_store_is_freed_after_the_job(
    world: MemoryWorld, then: str | StopReason
) -> None:
    traced = Traced()
    traced.watch_files(world.images)
    world.store.begin()
    world.runner.script_runs(traced.success)
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    await soon(world.until_store_call_fails())
    match then:
        case StopReason():
            world.executor.interrupt(then)
            await soon(working)
        case "store available":
            world.store.end()
            await soon(working)
        case _:
            await cancel(working)
    del working
    assert await traced.are_freed(), traced.alive


async def test_output_is_freed_if_another_worker_stored_a_result(world: MemoryWorld) -> None:
    traced = Traced()
    hold = world.runner.hold_next_run(then=traced.success)
    await world.send(request_body())

    def store_and_release() -> None:
        assert world.events.put(other)
        hold.release()

    other = CancelledEvent(
        request_id="a",
        task=Task.TEXT_TO_IMAGE,
        sequence=1,
        time=datetime.now(UTC),
        worker="worker-2",
        attempt=1,
        request_digest=f"sha256:{'0' * 64}",
    )
    await while_running(world, hold, store_and_release)
    assert await world.result("a") == other
    assert await traced.are_freed(), traced.alive


def test_traced_detects_a_remaining_reference() -> None:
    traced = Traced()
    reference = GeneratedImage(image=None, seed=0)  # type: ignore[arg-type] # never used
    run = traced.raising(lambda: ModelError("E"))
    try:
        run(None)  # type: ignore[arg-type] # the script does not use its run
    except ModelError as error:
        reference = error  # type: ignore[assignment]
    assert traced.alive == ["Tensor", "ModelError"]
    del reference
    assert traced.alive == []
