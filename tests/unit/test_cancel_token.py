"""The cancel token of a job: the stop reason, and the cancellation of asynchronous work."""

import asyncio

import pytest

from consumer.inference.cancel_token import CancelToken, Stopped, StopReason
from consumer.ports.model import OutOfMemory

SOON = 5.0  # seconds; only bounds a wait for something that must happen
REASONS = pytest.mark.parametrize("reason", StopReason)


async def test_first_reason_is_kept() -> None:
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


async def test_sleep_with_a_set_token_ends_at_once() -> None:
    token = CancelToken()
    token.set(StopReason.DRAIN)
    with pytest.raises(Stopped):
        await asyncio.wait_for(token.sleep(3_600), SOON)


async def test_sleep_ends_after_its_time() -> None:
    await asyncio.wait_for(CancelToken().sleep(0.001), SOON)


# -- work that may be cancelled ------------------------------------------------------------------


async def test_race_returns_the_value_of_the_work() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await asyncio.wait_for(CancelToken().race(work()), SOON) == 7


async def test_race_raises_the_error_of_the_work() -> None:
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
    assert ended or before  # with a set token the work does not start


async def test_result_of_finished_work_is_returned_despite_a_set_token() -> None:
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
