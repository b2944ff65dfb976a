"""CachedRead: one read of a value for all callers."""

import asyncio

import pytest

from consumer.bus.cached_read import CachedRead


class Reads:
    """Reads that the test completes."""

    def __init__(self) -> None:
        self.started: asyncio.Queue[asyncio.Future[int]] = asyncio.Queue()
        self.active = self.most = 0

    async def __call__(self) -> int:
        self.active += 1
        self.most = max(self.most, self.active)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.started.put_nowait(answer)
        try:
            return await answer
        finally:
            self.active -= 1


async def test_concurrent_callers_share_one_read() -> None:
    reads = Reads()
    value = CachedRead(reads, age=60.0)
    callers = [asyncio.ensure_future(value.get()) for _ in range(3)]
    (await reads.started.get()).set_result(7)
    assert await asyncio.gather(*callers) == [7, 7, 7]
    assert await value.get() == 7
    assert reads.started.empty()


async def test_a_value_that_expires_during_its_read_is_read_again() -> None:
    reads = Reads()
    value = CachedRead(reads, age=60.0)
    first = asyncio.ensure_future(value.get())
    old = await reads.started.get()
    value.expire()
    second = asyncio.ensure_future(value.get())
    await asyncio.sleep(0)
    old.set_result(1)
    (await reads.started.get()).set_result(2)
    assert (await first, await second) == (1, 2)
    assert reads.most == 1
    assert await value.get() == 2


async def test_a_failed_read_is_repeated() -> None:
    reads = Reads()
    value = CachedRead(reads, age=60.0)
    first = asyncio.ensure_future(value.get())
    (await reads.started.get()).set_exception(OSError("away"))
    with pytest.raises(OSError, match="away"):
        await first
    second = asyncio.ensure_future(value.get())
    (await reads.started.get()).set_result(3)
    assert await second == 3
