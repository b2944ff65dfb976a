"""Several requests in one run: each has separate events, failures, cancellations and deadlines."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from typing import Any

import pytest

from consumer.inference import monitor
from consumer.inference.cancel_token import StopReason
from consumer.inference.run_queue import Ticket
from consumer.jobs.outcomes import EXIT_DEVICE_LOST
from consumer.jobs.states import State
from consumer.ports.model import (
    DeviceLost,
    Interrupted,
    ModelError,
    OutOfMemory,
    RunnerOutput,
    RunRequest,
)
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    ImageArtifact,
    ProgressEvent,
    Request,
    SucceededEvent,
    Task,
)
from tests.support.behaviour import failure, request_body, soon
from tests.support.memory_ports import POLL, Hold, Run, ScriptedRunner, make, raising
from tests.support.memory_world import MemoryWorld, Worlds

TOGETHER = 3
BLOCKED = 0.3  # seconds
LONG = 30.0  # seconds; only bounds a wait for something that must happen


class BatchingRunner(ScriptedRunner):
    """A model that batches all requests of one width.

    Attributes:
        batches: The request ids of every batch.
        batch_error: Makes the exception of a batch, if any.
        poisoned: The prompt of a request whose single run raises.
        begun: Set when a batch starts.
        release: A batch waits while this event is cleared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str | None]] = []
        self.batch_error: Callable[[], Exception] | None = None
        self.poisoned = "poison"
        self.begun = threading.Event()
        self.release = threading.Event()
        self.release.set()

    def batch_key(self, request: Request) -> Hashable | None:
        return None if request.metadata.get("alone") else getattr(request, "width", None)

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> list[RunnerOutput | None]:
        if len(runs) == 1:
            if runs[0].request.prompt == self.poisoned:
                raise ModelError("PoisonError")
            return super().run(runs, save_memory=save_memory)
        return self._run_batch(runs)

    def _run_batch(self, members: Sequence[RunRequest]) -> list[RunnerOutput | None]:
        self.batches.append([member.request.request_id for member in members])
        active = dict.fromkeys(range(len(members)), True)
        self.begun.set()
        step = 0
        while active and (step == 0 or not self.release.wait(POLL)):
            step += 1
            for number in [*active]:
                members[number].progress.step(min(step, 9), 9)
                if members[number].cancelled():
                    del active[number]
        if not active:
            raise Interrupted
        if self.batch_error is not None:
            raise self.batch_error()
        return [
            make(Run.of(member)) if number in active else None
            for number, member in enumerate(members)
        ]

    def close(self) -> None:
        self.release.set()
        super().close()


@pytest.fixture
async def world() -> AsyncIterator[MemoryWorld]:
    world = MemoryWorld(runner=BatchingRunner(), most_in_flight=10, max_batch=TOGETHER, window=2.0)
    yield world
    world.close()


def model(world: MemoryWorld) -> BatchingRunner:
    assert isinstance(world.runner, BatchingRunner)
    return world.runner


async def begin(world: MemoryWorld, *ids: str, **fields: Any) -> list["asyncio.Task[int | None]"]:
    """Send requests of one size, and start to handle them."""
    for request_id in ids:
        await world.send(request_body(request_id, width=64, **fields), request_id=request_id)
    return [asyncio.create_task(world.work()) for _ in ids]


async def until_begun(world: MemoryWorld) -> None:
    await soon(asyncio.to_thread(model(world).begun.wait))


async def test_each_member_has_separate_events_and_outputs(world: MemoryWorld) -> None:
    await soon(asyncio.gather(*await begin(world, "a", "b", "c")))
    assert model(world).batches == [["a", "b", "c"]]
    assert model(world).runs == []
    outputs = set()
    for request_id in ("a", "b", "c"):
        event = await world.result(request_id)
        assert isinstance(event, SucceededEvent)
        sequences = [one.sequence for one in await world.transient_events(request_id)]
        assert [*sequences, event.sequence] == [*range(len(sequences) + 1)]
        outputs.add(event.outputs[0].sha256)  # type: ignore[union-attr]
        assert event.timings.inference > 0
    assert len(outputs) == 3, "each request has a different seed"
    assert await world.pending() == 0


async def test_busy_time_of_a_batch_is_reported_once(world: MemoryWorld) -> None:
    await soon(asyncio.gather(*await begin(world, "a", "b", "c")))
    assert len(world.observer.busy) == 1


async def test_other_sizes_and_single_requests_are_not_in_the_batch(world: MemoryWorld) -> None:
    handling = await begin(world, "a", "b")
    await world.send(request_body("other", width=128))
    await world.send(request_body("alone", width=64, metadata={"alone": "yes"}))
    handling += [asyncio.create_task(world.work()) for _ in range(2)]
    await soon(asyncio.gather(*handling))
    assert model(world).batches == [["a", "b"]]
    assert [run.request.request_id for run in model(world).runs] == ["other", "alone"]


async def test_members_of_a_failed_batch_run_one_by_one(
    world: MemoryWorld,
) -> None:
    model(world).batch_error = lambda: ModelError("PoisonError")
    await world.send(request_body("a", width=64))
    await world.send(request_body("bad", width=64).replace(b"a red circle", b"poison"))
    await world.send(request_body("c", width=64))
    await soon(asyncio.gather(*(asyncio.create_task(world.work()) for _ in range(3))))
    assert model(world).batches == [["a", "bad", "c"]]
    assert isinstance(await world.result("a"), SucceededEvent)
    assert isinstance(await world.result("c"), SucceededEvent)
    assert await world.result("bad") is None, "the request is retried"
    assert await world.pending() == 1
    for _ in range(2):
        await soon(world.work())
    assert failure(await world.result("bad")) == "model_error"


async def test_cancelled_member_of_a_failed_batch_ends_during_another_members_run(
    world: MemoryWorld,
) -> None:
    model(world).batch_error = lambda: ModelError("BatchError")
    holds = [model(world).hold_next_run() for _ in range(3)]
    working = dict(zip("abc", await begin(world, "a", "b", "c"), strict=True))
    await soon(holds[0].started())  # the batch has failed, and one member runs alone
    running = model(world).runs[0].request.request_id
    waiting = next(one for one in working if one != running)
    await world.executor.request_stop(waiting)
    await soon(working[waiting])
    assert isinstance(await world.result(waiting), CancelledEvent)
    assert not working[str(running)].done()
    for hold in holds:
        hold.release()
    await soon(asyncio.gather(*working.values()))


@pytest.mark.parametrize("error", [OutOfMemory("the batch"), KeyError("key")])
async def test_members_of_a_failed_batch_can_succeed(world: MemoryWorld, error: Exception) -> None:
    model(world).batch_error = lambda: error
    await soon(asyncio.gather(*await begin(world, "a", "b", "c")))
    for request_id in ("a", "b", "c"):
        assert isinstance(await world.result(request_id), SucceededEvent)
    assert [run.save_memory for run in model(world).runs] == [False] * 3


async def test_each_member_of_a_batch_gets_progress_events(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "PROGRESS_INTERVAL", POLL)
    model(world).release.clear()
    handling = await begin(world, "a", "b", "c")
    for request_id in ("a", "b", "c"):
        while len(await world.transient_events(request_id)) < 2:
            await asyncio.wait(handling, timeout=POLL)
    model(world).release.set()
    await soon(asyncio.gather(*handling))
    for request_id in ("a", "b", "c"):
        progress = (await world.transient_events(request_id))[1]
        assert isinstance(progress, ProgressEvent)


async def test_cancelled_member_ends_at_its_next_step_and_the_others_continue(
    world: MemoryWorld,
) -> None:
    model(world).release.clear()
    handling = await begin(world, "a", "b", "c")
    await until_begun(world)
    assert await world.executor.request_stop("b")
    await soon(handling[1])
    assert (await world.result("b")).type == "generation.v1.cancelled"  # type: ignore[union-attr]
    assert (await world.result("a"), await world.result("c")) == (None, None)
    model(world).release.set()
    await soon(asyncio.gather(*handling))
    assert isinstance(await world.result("a"), SucceededEvent)
    assert isinstance(await world.result("c"), SucceededEvent)


async def test_batch_with_only_cancelled_members_frees_the_device(world: MemoryWorld) -> None:
    model(world).release.clear()
    handling = await begin(world, "a", "b", "c")
    await until_begun(world)
    for request_id in ("a", "b", "c"):
        await world.executor.request_stop(request_id)
    await soon(asyncio.gather(*handling))
    await world.send(request_body("after"))
    await soon(world.work())
    assert isinstance(await world.result("after"), SucceededEvent)


async def test_deadline_of_one_member_ends_only_that_member(world: MemoryWorld) -> None:
    model(world).release.clear()
    handling = await begin(world, "a", "b", "c")
    await until_begun(world)
    world.executor.interrupt(StopReason.DEADLINE, "a")
    await soon(handling[0])
    event = await world.result("a")
    assert isinstance(event, FailedEvent)
    assert failure(event) == "deadline_exceeded"
    model(world).release.set()
    await soon(asyncio.gather(*handling))
    assert isinstance(await world.result("b"), SucceededEvent)


async def test_request_cancelled_while_it_waits_is_in_no_batch(world: MemoryWorld) -> None:
    hold = world.runner.hold_next_run()
    await world.send(request_body("first"))
    first = asyncio.create_task(world.work())
    await soon(hold.started())
    handling = await begin(world, "a", "b", "c")
    while [job.state for job in world.executor._jobs[1:]] != [State.ADMITTED] * 3:
        await asyncio.wait(handling, timeout=POLL)
    await world.executor.request_stop("b")
    await soon(handling[1])
    hold.release()
    await soon(asyncio.gather(first, *handling))
    assert model(world).batches == [["a", "c"]]


async def test_lost_device_requeues_all_members(world: MemoryWorld) -> None:
    model(world).batch_error = lambda: DeviceLost("gone")
    codes = await soon(asyncio.gather(*await begin(world, "a", "b", "c")))
    assert codes == [EXIT_DEVICE_LOST] * 3
    assert await world.pending() == 3
    assert model(world).runs == []


async def test_drain_requeues_all_members(world: MemoryWorld) -> None:
    model(world).release.clear()
    handling = await begin(world, "a", "b", "c")
    await until_begun(world)
    world.executor.interrupt(StopReason.DRAIN)
    await soon(asyncio.gather(*handling))
    assert await world.pending() == 3
    assert world.observer.outcomes == ["requeued"] * 3


async def test_image_to_text_requests_run_in_batches() -> None:
    world = MemoryWorld(
        task=Task.IMAGE_TO_TEXT,
        runner=BatchingRunner(),
        most_in_flight=4,
        max_batch=2,
        window=2.0,
    )
    model(world).batch_key = lambda _: "text"  # type: ignore[method-assign]
    await world.put_object("in", world.image_file)
    for request_id in ("a", "b"):
        await world.send(request_body(request_id, images=[world.source("in")]))
    await soon(asyncio.gather(*(asyncio.create_task(world.work()) for _ in range(2))))
    world.close()
    assert model(world).batches == [["a", "b"]]
    assert isinstance(await world.result("b"), SucceededEvent)


async def test_second_copy_in_one_worker_waits_for_the_first_and_is_not_run() -> None:
    world = MemoryWorld(most_in_flight=3)
    hold = world.runner.hold_next_run()
    handling = []
    for _ in range(2):
        await world.send(request_body("a"))
        handling.append(asyncio.create_task(world.work()))
    await soon(hold.started())
    hold.release()
    await soon(asyncio.gather(*handling))
    world.close()
    assert len(world.runner.runs) == 1
    assert world.observer.outcomes == ["succeeded", "already_done"]
    assert await world.pending() == 0


async def serve(world: MemoryWorld, done: Callable[[], Awaitable[bool]]) -> None:
    """Take deliveries as the daemon does, until a condition holds."""
    handling: set[asyncio.Task[int | None]] = set()
    while not await done():
        room = asyncio.ensure_future(world.executor.room())
        await asyncio.wait({room, *handling}, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
        if room.done() and world.queue.waiting:
            handling.add(asyncio.create_task(world.work()))
            await asyncio.sleep(0)  # the task adds its job to the executor
        room.cancel()
    await soon(asyncio.gather(*handling))


async def test_copies_of_a_retried_request_do_not_wait_for_each_other(
    make_world: Worlds,
) -> None:
    world = await make_world(runner=BatchingRunner(), most_in_flight=10, max_batch=2)
    hold = world.runner.hold_next_run(then=raising(lambda: ModelError("Once")))
    for _ in range(3):
        await world.send(request_body("a", width=64))
    first = asyncio.create_task(world.work())
    await soon(hold.started())
    others = [asyncio.create_task(world.work()) for _ in range(2)]
    await asyncio.sleep(0)  # the tasks add their jobs to the executor
    hold.release()

    async def all_done() -> bool:
        return await world.pending() == 0

    await soon(serve(world, all_done))
    await soon(asyncio.gather(first, *others))
    assert isinstance(await world.result("a"), SucceededEvent)
    assert sorted(world.observer.outcomes) == ["already_done"] * 2 + ["requeued", "succeeded"]


# -- redelivered requests: their first worker may have died because of them -----------------------


async def test_failing_request_next_to_a_waiting_upload_has_three_attempts(
    make_world: Worlds,
) -> None:
    world = await make_world(most_in_flight=3)
    world.runner.script_runs(make, *[raising(lambda: ModelError("Always"))] * 30)
    world.store.begin()
    for request_id in ("good", "bad"):
        await world.send(request_body(request_id))
    waiting = world.artifacts.calls

    async def ended() -> bool:
        return await world.pending() == 0

    good, bad = (asyncio.create_task(world.work()) for _ in range(2))
    await soon(waiting.until(1))
    await soon(bad)
    await soon(world.work())
    world.store.end()
    await soon(good)
    await soon(serve(world, ended))
    assert [run.request.request_id for run in world.runner.runs] == ["good", "bad", "bad", "bad"]
    assert failure(await world.result("bad")) == "model_error"


async def test_redelivered_request_counts_an_attempt_only_while_it_is_isolated(
    make_world: Worlds,
) -> None:
    world = await make_world(most_in_flight=3)
    hold = world.runner.hold_next_run()
    for request_id in ("other", "redelivered"):
        await world.send(request_body(request_id))
    other = asyncio.create_task(world.work())
    await soon(hold.started())
    world.queue.expire_lease(world.queue.take())  # the first worker has died
    redelivered = world.queue.take()
    handling = asyncio.create_task(world.executor.handle(redelivered))
    await soon(world.events.lookups.until(2))
    assert await redelivered.marked_uncounted() == 1, (
        "the other request could be the cause if this worker died now"
    )
    second = world.runner.hold_next_run()
    hold.release()
    await soon(other)
    await soon(second.started())
    assert await redelivered.marked_uncounted() == 0
    second.release()
    await soon(handling)
    assert world.observer.outcomes == ["succeeded", "succeeded"]


async def test_redelivered_request_that_waits_can_be_cancelled_and_requeued(
    make_world: Worlds,
) -> None:
    for stop, outcome in ((StopReason.CANCEL, "cancelled"), (StopReason.DRAIN, "requeued")):
        world = await make_world(most_in_flight=3)
        world.store.begin()
        for request_id in ("other", "redelivered"):
            await world.send(request_body(request_id))
        other = asyncio.create_task(world.work())
        await soon(world.artifacts.calls.until(1))  # the run has ended
        world.queue.expire_lease(world.queue.take())
        handling = asyncio.create_task(world.work())
        await soon(world.events.lookups.until(2))
        if stop is StopReason.DRAIN:
            world.executor.requeue_waiting()
        else:
            await world.executor.request_stop("redelivered")
        await soon(handling)
        world.store.end()
        await soon(other)
        assert world.observer.outcomes == [outcome, "succeeded"]


async def run_and_queue(world: MemoryWorld, first: Hold) -> list["asyncio.Task[int | None]"]:
    """Start to run request `a`, and put `b` into the run queue."""
    for request_id in ("a", "b"):
        await world.send(request_body(request_id))
    handling = [asyncio.create_task(world.work()) for _ in range(2)]
    await soon(first.started())
    while [ticket.run is not None for ticket in world.run_queue._tickets] != [True]:
        await asyncio.wait(handling, timeout=POLL)
    return handling


async def test_next_run_starts_while_the_event_loop_is_blocked() -> None:
    world = MemoryWorld(most_in_flight=3)
    first, begun = world.runner.hold_next_run(), threading.Event()
    second = world.runner.hold_next_run(before=lambda _: begun.set())
    handling = await run_and_queue(world, first)
    first.release()
    assert begun.wait(LONG), "this call blocks the event loop"
    second.release()
    await soon(asyncio.gather(*handling))
    world.close()
    assert world.observer.outcomes == ["succeeded"] * 2
    assert [run.request.request_id for run in world.runner.runs] == ["a", "b"]
    assert len(world.observer.busy) == 2
    event = await world.result("b")
    assert isinstance(event, SucceededEvent)
    assert event.timings.queued > 0


@pytest.mark.parametrize("cancelled", ["at the first step", "before the run"])
async def test_cancellation_of_the_next_request(cancelled: str) -> None:
    world = MemoryWorld(most_in_flight=3)
    first, begun = world.runner.hold_next_run(), threading.Event()
    world.runner.hold_next_run(before=lambda _: begun.set())
    handling = await run_and_queue(world, first)
    if cancelled == "at the first step":
        first.release()
        assert begun.wait(LONG)
    await world.executor.request_stop("b")
    await soon(handling[1])
    first.release()
    await soon(handling[0])
    world.close()
    assert begun.is_set() == (cancelled == "at the first step")
    assert world.observer.outcomes[-2:].count("cancelled") == 1
    assert isinstance(await world.result("a"), SucceededEvent)


async def test_cancelled_request_does_not_start_while_its_event_is_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device becomes free and other requests become ready while the bus is slow."""
    world = MemoryWorld(most_in_flight=3)
    first, publishing, stored = world.runner.hold_next_run(), asyncio.Event(), asyncio.Event()
    publish = world.events.publish_result

    async def publish_slowly(*arguments: Any, **named: Any) -> bool:
        if arguments[0].request_id == "b":
            publishing.set()
            await soon(stored.wait())
        return await publish(*arguments, **named)

    monkeypatch.setattr(world.events, "publish_result", publish_slowly)
    handling = await run_and_queue(world, first)
    await world.executor.request_stop("b")
    await soon(publishing.wait())
    await world.send(request_body("c"))
    handling.append(asyncio.create_task(world.work()))
    first.release()
    await soon(asyncio.wait({handling[0], handling[2]}))
    assert [run.request.request_id for run in world.runner.runs] == ["a", "c"]
    stored.set()
    await soon(asyncio.gather(*handling))
    world.close()
    assert [run.request.request_id for run in world.runner.runs] == ["a", "c"]


async def test_job_with_a_cancelled_task_does_not_start_its_run() -> None:
    world = MemoryWorld(most_in_flight=3)
    first, requeueing, may_requeue = world.runner.hold_next_run(), asyncio.Event(), asyncio.Event()
    handling = await run_and_queue(world, first)
    requeue = world.executor._jobs[1].delivery.requeue

    async def slowly() -> None:
        requeueing.set()
        await may_requeue.wait()
        await requeue()

    world.executor._jobs[1].delivery.requeue = slowly  # type: ignore[method-assign]
    handling[1].cancel()
    await soon(requeueing.wait())
    first.release()
    await soon(handling[0])
    may_requeue.set()
    await asyncio.wait({handling[1]})
    world.close()
    assert [run.request.request_id for run in world.runner.runs] == ["a"]


async def test_inference_time_is_measured_in_the_inference_thread() -> None:
    """The event loop is blocked while the second run starts and ends."""
    world = MemoryWorld(most_in_flight=3)
    first, ended = world.runner.hold_next_run(), threading.Event()

    def make_and_signal(run: Run) -> RunnerOutput:
        ended.set()
        return make(run)

    world.runner.script_runs(make_and_signal)
    handling = await run_and_queue(world, first)
    first.release()
    assert ended.wait(LONG)
    time.sleep(BLOCKED)  # noqa: ASYNC251 - the test blocks the event loop on purpose
    await soon(asyncio.gather(*handling))
    world.close()
    event = await world.result("b")
    assert isinstance(event, SucceededEvent)
    assert event.timings.inference < BLOCKED


async def test_images_of_a_request_are_stored_concurrently() -> None:
    world = MemoryWorld()
    store, all_running = world.artifacts.store, asyncio.Event()
    running = 0

    async def store_together(*arguments: Any) -> ImageArtifact:
        nonlocal running
        running += 1
        if running == TOGETHER:
            all_running.set()
        await soon(all_running.wait())
        return await store(*arguments)

    world.artifacts.store = store_together  # type: ignore[method-assign]
    await world.send(request_body("a", num_images=TOGETHER))
    await soon(world.work())
    world.close()
    event = await world.result("a")
    assert isinstance(event, SucceededEvent)
    assert [one.seed for one in event.outputs] == sorted(one.seed for one in event.outputs)  # type: ignore[union-attr,type-var]


async def test_cancellation_before_the_event_loop_is_notified_of_the_run(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets: list[Ticket] = []
    begin = Ticket.begin
    monkeypatch.setattr(Ticket, "begin", lambda ticket: tickets.append(ticket))  # noqa: PLW0108
    world = await make_world()
    hold = world.runner.hold_next_run()
    await world.send(request_body("a"))
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    await world.executor.request_stop("a")
    await asyncio.wait({working}, timeout=POLL)
    assert not working.done()
    begin(tickets[0])
    await soon(working)
    assert isinstance(await world.result("a"), CancelledEvent)
