"""The inference thread: one thread, the caller's context, and nothing kept of what was raised."""

import asyncio
import contextvars
import gc
import threading
import traceback
import weakref
from collections.abc import Iterator

import pytest

from consumer.runners import InferenceThread

REQUEST = contextvars.ContextVar("REQUEST", default="none")


class Tensor:
    """Stands for what is large."""


@pytest.fixture
def inference() -> Iterator[InferenceThread]:
    thread = InferenceThread()
    yield thread
    thread.close()


async def test_all_calls_are_made_in_one_thread_of_their_own(inference: InferenceThread) -> None:
    names = await asyncio.gather(
        *(inference.call(lambda: threading.current_thread().name) for _ in range(5))
    )
    assert len(set(names)) == 1
    assert names[0].startswith("inference")


async def test_calls_do_not_overlap_and_keep_their_order(inference: InferenceThread) -> None:
    begun = threading.Event()
    go_on = threading.Event()
    seen: list[str] = []

    def slow() -> None:
        begun.set()
        go_on.wait(30)
        seen.append("slow")

    first = asyncio.ensure_future(inference.call(slow))
    second = asyncio.ensure_future(inference.call(seen.append, "quick"))
    await asyncio.to_thread(begun.wait, 30)
    assert seen == []
    go_on.set()
    await asyncio.gather(first, second)
    assert seen == ["slow", "quick"]


async def test_arguments_and_the_result_come_through(inference: InferenceThread) -> None:
    assert await inference.call(divmod, 7, 2) == (3, 1)
    assert await inference.call(sorted, [1, 3, 2], reverse=True) == [3, 2, 1]


async def test_the_callers_context_variables_are_there(inference: InferenceThread) -> None:
    REQUEST.set("one")
    assert await inference.call(REQUEST.get) == "one"
    await inference.call(REQUEST.set, "other")
    assert REQUEST.get() == "one"


async def test_what_is_raised_comes_out_with_its_traceback_but_without_its_tensors(
    inference: InferenceThread,
) -> None:
    held: list[weakref.ref[Tensor]] = []

    def inner() -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise ValueError("inside")

    def outer() -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        try:
            inner()
        except ValueError as error:
            raise RuntimeError("outside") from error

    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="outside") as raised:
            await inference.call(outer)
        assert [tensor() for tensor in held] == [None, None]
    finally:
        gc.enable()
    assert "in inner" in "".join(traceback.format_exception(raised.value))


async def test_arguments_of_a_failed_call_are_not_kept(inference: InferenceThread) -> None:
    def fail(_: Tensor) -> None:
        raise ValueError("inside")

    tensor = Tensor()
    held = weakref.ref(tensor)
    gc.disable()
    try:
        call = asyncio.ensure_future(inference.call(fail, tensor))
        del tensor
        (error,) = await asyncio.gather(call, return_exceptions=True)
        assert isinstance(error, ValueError)
        assert held() is None
    finally:
        gc.enable()


async def test_the_result_is_not_kept(inference: InferenceThread) -> None:
    held = weakref.ref(await inference.call(Tensor))
    gc.disable()
    try:
        await inference.call(int)
        assert held() is None
    finally:
        gc.enable()


# -- the call that the thread goes on with by itself ----------------------------------------------


class Gate:
    """A call that says when it has begun, and goes on when it is let."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.go_on.wait(30)
        return "done"


async def under_way(inference: InferenceThread, gate: Gate) -> "asyncio.Future[str]":
    call = inference.call(gate)
    await asyncio.to_thread(gate.begun.wait, 30)
    return call


async def test_next_call_begins_while_the_event_loop_does_something_else(
    inference: InferenceThread,
) -> None:
    gate, following = Gate(), threading.Event()
    first = await under_way(inference, gate)
    second = inference.call_next(following.set)
    assert not following.is_set()
    gate.go_on.set()
    assert following.wait(30), "the event loop stands here"
    assert not first.done()
    assert not inference.take_back()
    assert (await first, await second) == ("done", None)


async def test_next_call_that_is_taken_back_is_not_made(inference: InferenceThread) -> None:
    gate, called = Gate(), threading.Event()
    first = await under_way(inference, gate)
    second = inference.call_next(called.set)
    assert inference.take_back()
    gate.go_on.set()
    await first
    with pytest.raises(asyncio.CancelledError):
        await second
    third = inference.call(int)
    await third
    assert not called.is_set()
    assert not inference.take_back()


async def test_next_call_is_not_made_where_the_one_before_raises(
    inference: InferenceThread,
) -> None:
    gate, called = Gate(), threading.Event()

    def fail() -> None:
        gate()
        raise ValueError("inside")

    first = inference.call(fail)
    await asyncio.to_thread(gate.begun.wait, 30)
    inference.call_next(called.set)
    gate.go_on.set()
    with pytest.raises(ValueError, match="inside"):
        await first
    assert inference.take_back()
    await inference.call(int)
    assert not called.is_set()


async def test_next_call_waits_where_none_is_under_way(inference: InferenceThread) -> None:
    called = threading.Event()
    following = inference.call_next(called.set)
    await asyncio.to_thread(called.wait, 0.05)
    assert not called.is_set()
    assert await inference.call(int) == 0
    await following
    assert called.is_set()


async def test_result_is_not_kept_while_the_next_call_is_made(inference: InferenceThread) -> None:
    before, gate = Gate(), Gate()

    def make() -> Tensor:
        before()
        return Tensor()

    first = inference.call(make)
    await asyncio.to_thread(before.begun.wait, 30)
    second = inference.call_next(gate)
    gc.disable()
    try:
        before.go_on.set()
        held = weakref.ref(await first)
        del first
        await asyncio.to_thread(gate.begun.wait, 30)
        assert held() is None
    finally:
        gc.enable()
    gate.go_on.set()
    await second


async def test_what_a_call_that_is_taken_back_was_given_is_not_kept(
    inference: InferenceThread,
) -> None:
    gate = Gate()
    first = await under_way(inference, gate)
    tensor = Tensor()
    held = weakref.ref(tensor)
    gc.disable()
    try:
        inference.call_next(repr, tensor)
        del tensor
        assert inference.take_back()
        await asyncio.sleep(0)  # its future is told
        assert held() is None
    finally:
        gc.enable()
    gate.go_on.set()
    await first


async def test_closing_drops_what_has_not_begun_and_does_not_wait() -> None:
    inference = InferenceThread()
    begun = threading.Event()
    go_on = threading.Event()

    def slow() -> str:
        begun.set()
        go_on.wait(30)
        return "done"

    running = asyncio.ensure_future(inference.call(slow))
    await asyncio.to_thread(begun.wait, 30)
    waiting = asyncio.ensure_future(inference.call(int))
    following = inference.call_next(int)
    assert inference.busy
    inference.close()
    for dropped in (waiting, following):
        with pytest.raises(asyncio.CancelledError):
            await dropped
    with pytest.raises(RuntimeError):
        inference.call(int)
    go_on.set()
    assert await running == "done"
    assert not inference.busy
