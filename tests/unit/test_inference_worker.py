"""The inference thread: one thread, the caller's context, and nothing kept of what was raised."""

import asyncio
import contextvars
import gc
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from consumer.inference.run_queue import RunQueue, Ticket
from consumer.inference.worker import InferenceWorker
from consumer.ports.model import DeviceLost, Interrupted, ModelUnavailable, RunnerOutput, RunRequest
from generation_contracts import TextToImageRequest
from tests.support.memory_ports import ScriptedRunner
from tests.support.model_runs import run_request

REQUEST = contextvars.ContextVar("REQUEST", default="none")
WITHIN = 30.0  # seconds; only bounds a wait for something that must happen

Work = Callable[[Sequence[RunRequest]], Sequence[RunnerOutput | None]]


class Tensor:
    """Stands for what is large."""


class Model(ScriptedRunner):
    """Does in each run what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.does: list[Work] = []
        self.threads: set[str] = set()
        self.closed = False
        self.fails_to_load: Exception | None = None

    def load(self) -> Any:
        self.threads.add(threading.current_thread().name)
        if self.fails_to_load is not None:
            raise self.fails_to_load
        return super().load()

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> list[RunnerOutput | None]:
        self.threads.add(threading.current_thread().name)
        return [*self.does.pop(0)(runs)]

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.closed = True


class Worker:
    """An inference thread with its queue."""

    def __init__(self, max_batch: int = 1) -> None:
        self.model = Model()
        self.queue = RunQueue(max_batch=max_batch)
        self.busy: list[float] = []
        self.inference = InferenceWorker(self.model, self.queue, on_busy=self.busy.append)

    def submit(self, work: Work | None = None) -> Ticket:
        if work is not None:
            self.model.does.append(work)
        ticket = self.queue.put()
        run = run_request(TextToImageRequest(prompt="a"))
        self.queue.mark_ready(ticket, run, "key" if self.queue.max_batch > 1 else None)
        return ticket

    async def output(self, work: Work) -> RunnerOutput:
        return await output(self.submit(work))


async def output(ticket: Ticket) -> RunnerOutput:
    await asyncio.wait_for(ticket.ended, WITHIN)
    return ticket.take()


def giving(*outputs: RunnerOutput | None) -> Work:
    return lambda _: outputs or (RunnerOutput(),)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    made = Worker()
    await made.inference.start()
    yield made
    made.queue.close()


class Gate:
    """Work that says when it has begun, and goes on when it is let."""

    def __init__(self, then: Work | None = None) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self._then = then or giving()

    def __call__(self, runs: Sequence[RunRequest]) -> Sequence[RunnerOutput | None]:
        self.begun.set()
        assert self.go_on.wait(WITHIN)
        return self._then(runs)

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, WITHIN)


async def test_everything_happens_in_one_thread(worker: Worker) -> None:
    for _ in range(3):
        await worker.output(giving())
    await worker.inference.stop()
    assert worker.model.threads == {"inference"}
    assert worker.model.closed


async def test_description_of_the_loaded_model_comes_first() -> None:
    worker = Worker()
    assert await worker.inference.start() == worker.model.description
    await worker.inference.stop()


async def test_model_that_cannot_be_loaded_ends_the_thread() -> None:
    worker = Worker()
    worker.model.fails_to_load = ModelUnavailable("no weights")
    loading = worker.inference.start()
    with pytest.raises(ModelUnavailable, match="no weights"):
        await loading
    await asyncio.wait_for(worker.inference.ended, WITHIN)
    assert not worker.inference.busy


async def test_runs_do_not_overlap_and_keep_their_order(worker: Worker) -> None:
    gate, seen = Gate(), []
    first = worker.submit(gate)
    second = worker.submit(lambda _: seen.append("second") or [RunnerOutput()])
    await gate.has_begun()
    assert seen == []
    gate.go_on.set()
    await asyncio.gather(output(first), output(second))
    assert seen == ["second"]
    assert len(worker.busy) == 2


async def test_callers_context_variables_are_there(worker: Worker) -> None:
    seen: list[str] = []
    for value in ("one", "two"):
        REQUEST.set(value)
        await worker.output(lambda _: seen.append(REQUEST.get()) or [RunnerOutput()])
    assert seen == ["one", "two"]


async def test_next_run_begins_while_the_event_loop_does_something_else(worker: Worker) -> None:
    gate, following = Gate(), threading.Event()
    first = worker.submit(gate)
    second = worker.submit(lambda _: following.set() or [RunnerOutput()])
    await gate.has_begun()
    gate.go_on.set()
    assert following.wait(WITHIN), "the event loop stands here"
    assert not first.ended.done()
    await asyncio.gather(output(first), output(second))


async def test_busy_is_whether_it_works(worker: Worker) -> None:
    gate = Gate()
    ticket = worker.submit(gate)
    await gate.has_begun()
    assert worker.inference.busy
    gate.go_on.set()
    await output(ticket)
    await worker.inference.stop()
    assert not worker.inference.busy


async def test_abandoned_worker_begins_nothing_more_and_leaves_the_model(worker: Worker) -> None:
    gate = Gate()
    running = worker.submit(gate)
    await gate.has_begun()
    waiting = worker.submit(giving())
    worker.queue.close()
    gate.go_on.set()
    await output(running)
    await asyncio.wait_for(worker.inference.ended, WITHIN)
    assert not waiting.began.done()
    assert not worker.model.closed


# -- what a run raises ----------------------------------------------------------------------------


async def test_error_comes_out_with_its_traceback_but_without_its_tensors(worker: Worker) -> None:
    held: list[weakref.ref[Tensor]] = []

    def inner() -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise ValueError("inside")

    def outer(_: object) -> Sequence[RunnerOutput]:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        try:
            inner()
        except ValueError as error:
            raise RuntimeError("outside") from error
        return []

    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="outside") as raised:
            await worker.output(outer)
        assert [tensor() for tensor in held] == [None, None]
    finally:
        gc.enable()
    assert "in inner" in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("ends", ["well", "badly"])
async def test_nothing_of_a_run_is_kept_while_the_next_one_goes_on(
    worker: Worker, ends: str
) -> None:
    held: list[weakref.ref[Tensor]] = []

    def work(runs: Sequence[RunRequest]) -> Sequence[RunnerOutput | None]:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        vars(runs[0].progress)["inputs"] = tensor  # stands for its decoded images
        if ends == "badly":
            raise ValueError("inside")
        made = RunnerOutput(parameters={"output": tensor})  # type: ignore[dict-item]
        return [made]

    gate = Gate()
    gc.disable()
    try:
        first = worker.submit(work)
        second = worker.submit(gate)
        await asyncio.wait_for(first.ended, WITHIN)
        first.abandon()
        del first
        await gate.has_begun()
        assert [tensor() for tensor in held] == [None]
    finally:
        gc.enable()
    gate.go_on.set()
    await output(second)


# -- batches --------------------------------------------------------------------------------------


async def batch(worker: Worker, members: int) -> list[Ticket]:
    """Submit the members of one batch behind a run that holds the thread."""
    gate = Gate()
    worker.model.does.insert(0, gate)
    blocking = worker.submit()
    await gate.has_begun()
    tickets = [worker.submit() for _ in range(members)]
    gate.go_on.set()
    await output(blocking)
    return tickets


@pytest.fixture
async def batching() -> AsyncIterator[Worker]:
    made = Worker(max_batch=3)
    await made.inference.start()
    yield made
    made.queue.close()


async def results(tickets: Sequence[Ticket]) -> list[Any]:
    return await asyncio.gather(*map(output, tickets), return_exceptions=True)


async def test_members_of_a_batch_get_their_own_outputs(batching: Worker) -> None:
    one, three = RunnerOutput(warnings=("1",)), RunnerOutput(warnings=("3",))
    batching.model.does = [giving(one, None, three)]
    found = await results(await batch(batching, 3))
    assert [found[0], type(found[1]), found[2]] == [one, Interrupted, three]


async def test_lost_device_is_the_end_of_every_member_and_of_the_queue(batching: Worker) -> None:
    def lose(_: object) -> Sequence[RunnerOutput]:
        raise DeviceLost("gone")

    batching.model.does = [lose]
    found = await results(await batch(batching, 2))
    assert [type(one) for one in found] == [DeviceLost] * 2
    assert batching.queue.closed


async def test_device_lost_in_the_run_of_one_member_ends_the_members_behind_it(
    batching: Worker,
) -> None:
    def fail(_: object) -> Sequence[RunnerOutput]:
        raise ValueError("one of them")

    def lose(_: object) -> Sequence[RunnerOutput]:
        raise DeviceLost("gone")

    batching.model.does = [fail, giving(), lose]
    found = await results(await batch(batching, 3))
    assert [type(one) for one in found] == [RunnerOutput, DeviceLost, DeviceLost]
    assert batching.model.does == []
