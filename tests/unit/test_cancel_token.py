"""The flag that asks a job to stop: the first reason, and work that it cancels."""

import asyncio

import pytest

from consumer.inference.cancel_token import CancelToken, Stopped, StopReason
from consumer.ports.model import OutOfMemory

SOON = 5.0  # seconds; only bounds a wait for something that must happen
REASONS = pytest.mark.parametrize("reason", StopReason)


async def test_first_reason_stands() -> None:
    token = CancelToken()
    assert not token.poll()
    token.check()
    token.set(StopReason.CANCEL)
    token.set(StopReason.DRAIN)
    assert token.poll()
    with pytest.raises(Stopped) as stopped:
        token.check()
    assert stopped.value.reason is StopReason.CANCEL


@REASONS
async def test_token_ends_a_sleep(reason: StopReason) -> None:
    token = CancelToken()
    sleeping = asyncio.create_task(token.sleep(3_600))
    await asyncio.sleep(0)
    token.set(reason)
    with pytest.raises(Stopped) as stopped:
        await asyncio.wait_for(sleeping, SOON)
    assert stopped.value.reason is reason


async def test_sleep_after_a_token_does_not_begin() -> None:
    token = CancelToken()
    token.set(StopReason.DRAIN)
    with pytest.raises(Stopped):
        await asyncio.wait_for(token.sleep(3_600), SOON)


async def test_sleep_without_a_token_ends_by_itself() -> None:
    await asyncio.wait_for(CancelToken().sleep(0.001), SOON)


# -- work that may be cancelled ------------------------------------------------------------------


async def test_work_gives_what_it_gives() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await asyncio.wait_for(CancelToken().race(work()), SOON) == 7


async def test_work_raises_what_it_raises() -> None:
    async def work() -> None:
        raise OutOfMemory("E")

    with pytest.raises(OutOfMemory):
        await asyncio.wait_for(CancelToken().race(work()), SOON)


@REASONS
@pytest.mark.parametrize("before", [True, False])
async def test_token_cancels_work_and_waits_for_its_end(
    reason: StopReason, *, before: bool
) -> None:
    token, ended = CancelToken(), False

    async def work() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended = True

    if before:
        token.set(reason)
    doing = asyncio.create_task(token.race(work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    token.set(reason)
    with pytest.raises(Stopped) as stopped:
        await asyncio.wait_for(doing, SOON)
    assert stopped.value.reason is reason
    assert ended or before  # what has not begun has nothing to end


async def test_work_that_is_done_when_the_token_comes_is_kept() -> None:
    token = CancelToken()

    async def work() -> int:
        token.set(StopReason.DRAIN)
        return 7

    assert await asyncio.wait_for(token.race(work()), SOON) == 7


async def test_cancellation_of_the_waiter_ends_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    doing = asyncio.create_task(CancelToken().race(work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    doing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doing
    assert ended.is_set()
