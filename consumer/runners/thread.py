"""The inference thread: the one thread in which a model is loaded, run and closed.

A shared diffusers pipeline on two threads gives IndexErrors or silently wrong pictures, and
sampling in transformers has only the global random generator.
"""

import asyncio
import contextlib
import contextvars
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class InferenceThread:
    """A `consumer.ports.model.Inference`."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        # Not with the executor's own items: these keep what they call until the thread is idle.
        self._calls: deque[_Call[Any]] = deque()
        self._next: deque[_Call[Any]] = deque(maxlen=1)  # whoever takes it out of here decides
        self._running: set[Future[Any]] = set()

    @property
    def busy(self) -> bool:
        """Whether a call is under way, which nothing from outside can end."""
        return any(call.running() for call in tuple(self._running))

    def call(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Call a function in the thread, at once, with the caller's context variables.

        What it raises comes out here with its traceback, but without the local variables of the
        frames: they can be tensors, and whoever keeps the exception would keep them too.

        Cancelling the caller does not stop a call that has begun: nothing can.
        """
        call = self._made(partial(function, *args, **kwargs))
        self._calls.append(call)
        try:
            self._executor.submit(self._work)
        except RuntimeError:  # closed
            self._calls.remove(call)
            raise
        return asyncio.wrap_future(call.future)

    def call_next(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Have the thread itself call a function when the call that is under way returns.

        The device then waits for no other thread to wake up. There is one place for it. Where the
        call under way raises, or none is under way, it waits for one that returns: whoever hears of
        that end takes it back.
        """
        call = self._made(partial(function, *args, **kwargs))
        self._next.append(call)
        return asyncio.wrap_future(call.future)

    def take_back(self) -> bool:
        """Do not make the call of `call_next`; False: it has begun."""
        try:
            call = self._next.pop()
        except IndexError:
            return False
        call.future.cancel()
        return True

    def close(self) -> None:
        """Take no more calls and drop those that have not begun; does not wait for the running one.

        A thread that hangs keeps the interpreter from ending: leave by `os._exit` then.
        """
        self._executor.shutdown(wait=False, cancel_futures=True)
        self.take_back()
        for call in tuple(self._calls):
            call.future.cancel()

    def _made(self, work: Callable[[], T]) -> "_Call[T]":
        call = _Call(partial(contextvars.copy_context().run, work))
        self._running.add(call.future)
        call.future.add_done_callback(self._running.discard)
        return call

    # -- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        call: _Call[Any] | None = self._calls.popleft()
        while call is not None and call.future.set_running_or_notify_cancel():
            call = call.make(self._next)


class _Call(Generic[T]):
    """One call, and where whoever made it waits for its end."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self._work: Callable[[], T] | None = work

    def make(self, following: "deque[_Call[Any]]") -> "_Call[Any] | None":
        """Make it, and give the following one, taken before anybody is told that this has ended."""
        future, work, self._work = self.future, self._work, None
        if work is None:
            raise AssertionError("a call is made once")
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it is for whoever waits
            del work, self  # what it raised has this frame in its traceback
            _drop_locals(error)
            future.set_exception(error)
            del future
            return None
        del work
        then: _Call[Any] | None = None
        with contextlib.suppress(IndexError):  # there is none
            then = following.popleft()
        future.set_result(result)
        return then


def _drop_locals(error: BaseException) -> None:
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        chain += [link.__cause__, link.__context__]
