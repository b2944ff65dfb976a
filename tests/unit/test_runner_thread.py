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
    await asyncio.sleep(0)  # lets the task hand its call over
    assert inference.busy
    inference.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(RuntimeError):
        await inference.call(int)
    go_on.set()
    assert await running == "done"
    assert not inference.busy
