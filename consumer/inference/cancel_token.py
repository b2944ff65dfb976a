"""Cooperative cancellation: the inference thread polls a token, the event loop can await it."""

import asyncio
from collections.abc import Awaitable
from enum import Enum, auto
from typing import Any, TypeVar

T = TypeVar("T")


class StopReason(Enum):
    """Why a job is to stop."""

    DEADLINE = auto()
    CANCEL = auto()
    DRAIN = auto()


class Stopped(Exception):  # noqa: N818 - not an error: the caller requested it
    """The job stopped for the reason of its `CancelToken`."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.name)
        self.reason = reason


class CancelToken:
    """Requests that one job stops.

    Attributes:
        reason: Why the job is to stop; None until `set` is called.
        acknowledged: Whether the inference thread has polled the reason. It then stops working for
            this job.
    """

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self.acknowledged = False
        self._waiter: asyncio.Future[None] | None = None  # created by the first waiter

    def set(self, reason: StopReason) -> None:
        """Request the stop. Only the first reason counts. Not thread-safe: for the event loop."""
        if self.reason is None:
            self.reason = reason
            if self._waiter is not None:
                self._waiter.set_result(None)

    def poll(self) -> bool:
        """Return whether to stop. The inference thread calls it, and then stops."""
        if self.reason is None:
            return False
        self.acknowledged = True
        return True

    def check(self) -> None:
        """Raise if the token is set.

        Raises:
            Stopped: The token is set.
        """
        if self.reason is not None:
            raise Stopped(self.reason)

    async def race(self, work: Awaitable[T]) -> T:
        """Await work until it ends or the token is set. The work must tolerate cancellation.

        Raises:
            Stopped: The token was set first; the work has been cancelled.
            Exception: The exception of the work.
        """
        doing = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {doing, self._wait()}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                self.check()
            return await doing
        finally:
            doing.cancel()
            # The caller must not touch shared objects before the cancelled work has ended.
            await asyncio.gather(doing, return_exceptions=True)
            del doing, either  # the traceback of an exception of the work refers to this frame

    async def wait_for(self, future: asyncio.Future[Any]) -> None:
        """Wait until a future is done or the token is set. The future is not cancelled."""
        await asyncio.wait({future, self._wait()}, return_when=asyncio.FIRST_COMPLETED)

    async def sleep(self, seconds: float) -> None:
        """Sleep until the time is over or the token is set.

        Raises:
            Stopped: The token was set.
        """
        await asyncio.wait({self._wait()}, timeout=seconds)
        self.check()

    def _wait(self) -> asyncio.Future[None]:
        if self._waiter is None:
            self._waiter = asyncio.get_running_loop().create_future()
            if self.reason is not None:
                self._waiter.set_result(None)
        return self._waiter
