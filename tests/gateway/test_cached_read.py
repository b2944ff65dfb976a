"""A value that is read once for all callers."""

import asyncio

import pytest

from consumer.bus.cached_read import CachedRead


class Readings:
    """Readings that end when the test says so."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[asyncio.Future[int]] = asyncio.Queue()
        self.under_way = self.most = 0

    async def __call__(self) -> int:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.begun.put_nowait(answer)
        try:
            return await answer
        finally:
            self.under_way -= 1


async def test_callers_share_one_reading() -> None:
    readings = Readings()
    value = CachedRead(readings, age=60.0)
    callers = [asyncio.ensure_future(value.get()) for _ in range(3)]
    (await readings.begun.get()).set_result(7)
    assert await asyncio.gather(*callers) == [7, 7, 7]
    assert await value.get() == 7
    assert readings.begun.empty()


async def test_what_expires_while_it_is_read_is_read_again_afterwards() -> None:
    readings = Readings()
    value = CachedRead(readings, age=60.0)
    first = asyncio.ensure_future(value.get())
    old = await readings.begun.get()
    value.expire()
    second = asyncio.ensure_future(value.get())
    await asyncio.sleep(0)
    old.set_result(1)
    (await readings.begun.get()).set_result(2)
    assert (await first, await second) == (1, 2)
    assert readings.most == 1
    assert await value.get() == 2


async def test_a_reading_that_failed_is_repeated() -> None:
    readings = Readings()
    value = CachedRead(readings, age=60.0)
    first = asyncio.ensure_future(value.get())
    (await readings.begun.get()).set_exception(OSError("away"))
    with pytest.raises(OSError, match="away"):
        await first
    second = asyncio.ensure_future(value.get())
    (await readings.begun.get()).set_result(3)
    assert await second == 3
