"""The inference thread: one thread, the caller's context, and no references to finished runs."""

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
    """Stands for a large tensor on the device."""


class Model(ScriptedRunner):
    """A model that executes a given function in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []
        self.threads: set[str] = set()
        self.closed = False
        self.load_error: Exception | None = None

    def load(self) -> Any:
        self.threads.add(threading.current_thread().name)
        if self.load_error is not None:
            raise self.load_error
        return super().load()

    def run(
        self, runs: Sequence[RunRequest], *, save_memory: bool = False
    ) -> list[RunnerOutput | None]:
        self.threads.add(threading.current_thread().name)
        return [*self.work.pop(0)(runs)]

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.closed = True


class Worker:
    """An inference thread with its run queue."""

    def __init__(self, max_batch: int = 1) -> None:
        self.model = Model()
        self.queue = RunQueue(max_batch=max_batch)
        self.busy: list[float] = []
        self.inference = InferenceWorker(self.model, self.queue, on_busy=self.busy.append)

    def submit(self, work: Work | None = None) -> Ticket:
        if work is not None:
            self.model.work.append(work)
        ticket = self.queue.put()
        run = run_request(TextToImageRequest(prompt="a"))
        self.queue.mark_ready(ticket, run, "key" if self.queue.max_batch > 1 else None)
        return ticket

    async def output(self, work: Work) -> RunnerOutput:
        return await output(self.submit(work))


async def output(ticket: Ticket) -> RunnerOutput:
    await asyncio.wait_for(ticket.ended, WITHIN)
    return ticket.take()


def returning(*outputs: RunnerOutput | None) -> Work:
    return lambda _: outputs or (RunnerOutput(),)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker()
    await worker.inference.start()
    yield worker
    worker.queue.close()


class Gate:
    """Work that signals its start, and blocks until it is resumed."""

    def __init__(self, then: Work | None = None) -> None:
        self.begun = threading.Event()
        self.resume = threading.Event()
        self._then = then or returning()

    def __call__(self, runs: Sequence[RunRequest]) -> Sequence[RunnerOutput | None]:
        self.begun.set()
        assert self.resume.wait(WITHIN)
        return self._then(runs)

    async def until_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, WITHIN)


async def test_load_run_and_close_use_one_thread(worker: Worker) -> None:
    for _ in range(3):
        await worker.output(returning())
    await worker.inference.stop()
    assert worker.model.threads == {"inference"}
    assert worker.model.closed


async def test_start_returns_the_description_of_the_loaded_model() -> None:
    worker = Worker()
    assert await worker.inference.start() == worker.model.description
    await worker.inference.stop()


async def test_model_that_cannot_be_loaded_ends_the_thread() -> None:
    worker = Worker()
    worker.model.load_error = ModelUnavailable("no weights")
    loading = worker.inference.start()
    with pytest.raises(ModelUnavailable, match="no weights"):
        await loading
    await asyncio.wait_for(worker.inference.ended, WITHIN)
    assert not worker.inference.busy


async def test_runs_do_not_overlap_and_keep_their_order(worker: Worker) -> None:
    gate, calls = Gate(), []
    first = worker.submit(gate)
    second = worker.submit(lambda _: calls.append("second") or [RunnerOutput()])
    await gate.until_begun()
    assert calls == []
    gate.resume.set()
    await asyncio.gather(output(first), output(second))
    assert calls == ["second"]
    assert len(worker.busy) == 2


async def test_run_has_the_context_variables_of_the_caller(worker: Worker) -> None:
    calls: list[str] = []
    for value in ("one", "two"):
        REQUEST.set(value)
        await worker.output(lambda _: calls.append(REQUEST.get()) or [RunnerOutput()])
    assert calls == ["one", "two"]


async def test_next_run_starts_while_the_event_loop_is_blocked(worker: Worker) -> None:
    gate, following = Gate(), threading.Event()
    first = worker.submit(gate)
    second = worker.submit(lambda _: following.set() or [RunnerOutput()])
    await gate.until_begun()
    gate.resume.set()
    assert following.wait(WITHIN), "this call blocks the event loop"
    assert not first.ended.done()
    await asyncio.gather(output(first), output(second))


async def test_worker_is_busy_during_a_run(worker: Worker) -> None:
    gate = Gate()
    ticket = worker.submit(gate)
    await gate.until_begun()
    assert worker.inference.busy
    gate.resume.set()
    await output(ticket)
    await worker.inference.stop()
    assert not worker.inference.busy


async def test_abandoned_worker_starts_no_run_and_does_not_close_the_model(worker: Worker) -> None:
    gate = Gate()
    running = worker.submit(gate)
    await gate.until_begun()
    waiting = worker.submit(returning())
    worker.queue.close()
    gate.resume.set()
    await output(running)
    await asyncio.wait_for(worker.inference.ended, WITHIN)
    assert not waiting.began.done()
    assert not worker.model.closed


# -- errors ---------------------------------------------------------------------------------------


async def test_error_keeps_its_traceback_but_no_tensors(worker: Worker) -> None:
    tensors: list[weakref.ref[Tensor]] = []

    def inner() -> None:
        tensor = Tensor()
        tensors.append(weakref.ref(tensor))
        raise ValueError("inside")

    def outer(_: object) -> Sequence[RunnerOutput]:
        tensor = Tensor()
        tensors.append(weakref.ref(tensor))
        try:
            inner()
        except ValueError as error:
            raise RuntimeError("outside") from error
        return []

    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="outside") as raised:
            await worker.output(outer)
        assert [tensor() for tensor in tensors] == [None, None]
    finally:
        gc.enable()
    assert "in inner" in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("ends", ["with output", "with an error"])
async def test_objects_of_a_run_are_freed_before_the_next_run(worker: Worker, ends: str) -> None:
    tensors: list[weakref.ref[Tensor]] = []

    def work(runs: Sequence[RunRequest]) -> Sequence[RunnerOutput | None]:
        tensor = Tensor()
        tensors.append(weakref.ref(tensor))
        vars(runs[0].progress)["inputs"] = tensor  # stands for the decoded images
        if ends == "with an error":
            raise ValueError("inside")
        return [RunnerOutput(parameters={"output": tensor})]  # type: ignore[dict-item]

    gate = Gate()
    gc.disable()
    try:
        first = worker.submit(work)
        second = worker.submit(gate)
        await asyncio.wait_for(first.ended, WITHIN)
        first.abandon()
        del first
        await gate.until_begun()
        assert [tensor() for tensor in tensors] == [None]
    finally:
        gc.enable()
    gate.resume.set()
    await output(second)


# -- batches --------------------------------------------------------------------------------------


async def batch(worker: Worker, members: int) -> list[Ticket]:
    """Submit the members of one batch while another run blocks the thread."""
    gate = Gate()
    worker.model.work.insert(0, gate)
    blocking = worker.submit()
    await gate.until_begun()
    tickets = [worker.submit() for _ in range(members)]
    gate.resume.set()
    await output(blocking)
    return tickets


@pytest.fixture
async def batching() -> AsyncIterator[Worker]:
    worker = Worker(max_batch=3)
    await worker.inference.start()
    yield worker
    worker.queue.close()


async def results(tickets: Sequence[Ticket]) -> list[Any]:
    return await asyncio.gather(*map(output, tickets), return_exceptions=True)


async def test_each_member_of_a_batch_gets_its_output(batching: Worker) -> None:
    one, three = RunnerOutput(warnings=("1",)), RunnerOutput(warnings=("3",))
    batching.model.work = [returning(one, None, three)]
    actual = await results(await batch(batching, 3))
    assert [actual[0], type(actual[1]), actual[2]] == [one, Interrupted, three]


async def test_lost_device_ends_every_member_and_closes_the_queue(batching: Worker) -> None:
    def lose(_: object) -> Sequence[RunnerOutput]:
        raise DeviceLost("gone")

    batching.model.work = [lose]
    actual = await results(await batch(batching, 2))
    assert [type(one) for one in actual] == [DeviceLost] * 2
    assert batching.queue.closed


async def test_device_lost_in_a_single_run_ends_the_later_members(
    batching: Worker,
) -> None:
    def fail(_: object) -> Sequence[RunnerOutput]:
        raise ValueError("one of them")

    def lose(_: object) -> Sequence[RunnerOutput]:
        raise DeviceLost("gone")

    batching.model.work = [fail, returning(), lose]
    actual = await results(await batch(batching, 3))
    assert [type(one) for one in actual] == [RunnerOutput, DeviceLost, DeviceLost]
    assert batching.model.work == []
