"""A flag that asks a job to stop: the inference thread polls it, the event loop can wait for it."""

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


class Stopped(Exception):  # noqa: N818 - not an error: it was asked for
    """The job stopped for the reason of its `CancelToken`."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.name)
        self.reason = reason


class CancelToken:
    """Asks one job to stop.

    Attributes:
        reason: Why; None until `set` is called.
        acknowledged: Whether the inference thread has polled the reason. It does no more work for
            this job then.
    """

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self.acknowledged = False
        self._waiter: asyncio.Future[None] | None = None  # made for the first one that waits

    def set(self, reason: StopReason) -> None:
        """Ask to stop; the first reason stands. Only in the event loop's thread."""
        if self.reason is None:
            self.reason = reason
            if self._waiter is not None:
                self._waiter.set_result(None)

    def poll(self) -> bool:
        """Return whether to stop; called in the inference thread, which then stops."""
        if self.reason is None:
            return False
        self.acknowledged = True
        return True

    def check(self) -> None:
        """Raise when the token is set.

        Raises:
            Stopped: With the reason.
        """
        if self.reason is not None:
            raise Stopped(self.reason)

    async def race(self, work: Awaitable[T]) -> T:
        """Wait for work that may be cancelled, but no longer than until the token is set.

        Raises:
            Stopped: The token was set first; the work has been cancelled.
            Exception: What the work raised.
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
            # Cancelled work has ended before anything else is done with its parts.
            await asyncio.gather(doing, return_exceptions=True)
            del doing, either  # the traceback of what the work raised refers to this frame

    async def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until the token is set.

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
