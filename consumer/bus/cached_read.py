"""A cached value that is read once for concurrent callers."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class CachedRead(Generic[T]):
    """A value that is read on demand and cached.

    Args:
        read: Reads the value.
        age: Seconds for which the value is cached.
        duty: Extends the time for slow reads: at most 1/`duty` of the time is spent on reading.
        most_age: Limit of that extension, in seconds.
    """

    def __init__(
        self,
        read: Callable[[], Coroutine[Any, Any, T]],
        *,
        age: float,
        duty: int = 0,
        most_age: float = 0.0,
    ) -> None:
        self._read = read
        self._age = age
        self._duty = duty
        self._most_age = most_age
        self._reading: asyncio.Task[T] | None = None
        self._is_expired = False
        self._until = 0.0

    async def get(self) -> T:
        """Return the value.

        Raises:
            Exception: The read failed; the next call reads again.
        """
        reading = self._reading
        stale = reading is not None and reading.done() and not self._is_fresh(reading)
        if reading is None or self._is_expired or stale:
            self._is_expired = False
            reading = self._reading = asyncio.create_task(self._timed(reading), name="cached read")
        # A cancelled caller must not cancel the read for the other callers.
        return await asyncio.shield(reading)

    def expire(self) -> None:
        """Make the next call read again, after a read that is in progress has ended."""
        self._is_expired = True

    def _is_fresh(self, reading: asyncio.Task[T]) -> bool:
        failed = reading.cancelled() or reading.exception() is not None
        return not failed and time.monotonic() < self._until

    async def _timed(self, before: asyncio.Task[T] | None) -> T:
        if before is not None:
            await asyncio.wait({before})  # an older read must not overwrite `_until` later
        started = time.monotonic()
        value = await self._read()
        took = time.monotonic() - started
        age = min(took * self._duty, self._most_age)
        self._until = started + max(self._age, age)
        return value
