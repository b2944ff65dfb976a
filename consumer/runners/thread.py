"""The inference thread: the one thread in which a model is loaded, run and closed.

A shared diffusers pipeline on two threads gives IndexErrors or silently wrong pictures, and
sampling in transformers has only the global random generator.
"""

import asyncio
import contextvars
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class InferenceThread:
    """A `consumer.ports.Inference`."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
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
        context = contextvars.copy_context()
        running = self._executor.submit(
            _call, partial(context.run, partial(function, *args, **kwargs))
        )
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return asyncio.wrap_future(running)

    def close(self) -> None:
        """Take no more calls and drop those that have not begun; does not wait for the running one.

        A thread that hangs keeps the interpreter from ending: leave by `os._exit` then.
        """
        self._executor.shutdown(wait=False, cancel_futures=True)


def _call(work: Callable[[], T]) -> T:
    try:
        return work()
    except BaseException as error:
        del work
        _drop_locals(error)
        raise


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
