"""The limit of requests in flight, and the isolation of redelivered requests."""

import asyncio

import pytest

from consumer.inference.run_queue import RunQueue
from consumer.jobs.in_flight import InFlight, Slot


def in_flight(most: int, max_batch: int = 1) -> InFlight:
    return InFlight(RunQueue(max_batch=max_batch), most=most)


async def is_done(waiting: "asyncio.Future[None]") -> bool:
    """Return whether a future is done after all ready tasks have run."""
    for _ in range(10):
        await asyncio.sleep(0)
    return waiting.done()


async def test_room_waits_at_the_limit_of_requests_in_flight() -> None:
    requests = in_flight(2)
    first = requests.join()
    first.occupy_device()
    first.release_device()  # the upload is in progress
    second = requests.join()
    second.occupy_device()
    room = asyncio.ensure_future(requests.room())
    assert not await is_done(room)
    first.leave()
    assert await is_done(room)


@pytest.mark.parametrize("max_batch", [1, 3])
async def test_only_one_batch_waits_for_the_device(max_batch: int) -> None:
    requests = in_flight(10, max_batch)
    requests.join().occupy_device()
    waiting = [requests.join() for _ in range(max_batch)]
    room = asyncio.ensure_future(requests.room())
    assert not await is_done(room)
    waiting[0].occupy_device()
    assert await is_done(room)


@pytest.mark.parametrize("most", [1, 2, 3])
async def test_requests_in_flight_never_exceed_the_limit(most: int) -> None:
    requests = in_flight(most)
    highest = now = 0

    async def handle(slot: Slot) -> None:
        nonlocal now
        slot.occupy_device()
        await asyncio.sleep(0)
        slot.release_device()
        await asyncio.sleep(0)
        now -= 1
        slot.leave()

    handling = []
    for _ in range(20):
        await requests.room()
        now += 1
        highest = max(highest, now)
        handling.append(asyncio.ensure_future(handle(requests.join())))
    await asyncio.gather(*handling)
    assert highest == most


async def test_request_waits_behind_another_until_the_device_is_free() -> None:
    requests = in_flight(3)
    first, second = requests.join(), requests.join()
    assert not requests.waits_behind_another(first)
    assert requests.waits_behind_another(second)
    first.occupy_device()
    assert not requests.waits_behind_another(first)
    assert requests.waits_behind_another(second)
    first.release_device()
    assert not requests.waits_behind_another(second)


async def test_all_requests_wait_behind_a_lost_device() -> None:
    queue = RunQueue()
    slot = InFlight(queue).join()
    queue.close()
    assert InFlight(queue).waits_behind_another(slot) is False, "the slot is of another set"
    requests = InFlight(queue)
    assert requests.waits_behind_another(requests.join())


async def test_no_room_next_to_a_redelivered_request() -> None:
    requests = in_flight(3)
    redelivered = requests.join(redelivered=True)
    redelivered.occupy_device()
    room = asyncio.ensure_future(requests.room())
    assert not await is_done(room)
    redelivered.leave()
    assert await is_done(room)
    assert (redelivered.co_resident, requests.join().co_resident) == (False, False)
    assert requests.join(redelivered=True).co_resident


async def test_room_next_to_a_redelivered_request_that_did_not_kill_its_worker() -> None:
    requests = in_flight(3)
    redelivered = requests.join(redelivered=True)
    redelivered.occupy_device()
    room = asyncio.ensure_future(requests.room())
    redelivered.clear()
    assert await is_done(room)


async def test_redelivered_request_is_isolated_from_earlier_requests() -> None:
    requests = in_flight(3)
    first, second = requests.join(), requests.join()
    redelivered = requests.join(redelivered=True)
    alone = asyncio.ensure_future(requests.isolate(redelivered))
    room = asyncio.ensure_future(requests.room())
    second.leave()
    assert not await is_done(alone)
    assert requests.waits_behind_another(redelivered)
    first.leave()
    assert await is_done(alone)
    assert not requests.waits_behind_another(redelivered)
    assert not await is_done(room)
    redelivered.leave()
    assert await is_done(room)


async def test_duplicate_that_steps_aside_does_not_block_other_requests() -> None:
    requests = in_flight(3)
    duplicate = requests.join()
    duplicate.step_aside()
    redelivered = requests.join(redelivered=True)
    assert not redelivered.co_resident
    assert await is_done(asyncio.ensure_future(requests.isolate(redelivered)))
    assert not requests.waits_behind_another(redelivered)
    redelivered.leave()
    other = requests.join()
    duplicate.rejoin()
    assert requests.waits_behind_another(duplicate)
    other.leave()
    assert not requests.waits_behind_another(duplicate)


async def test_request_that_released_the_device_has_no_ticket() -> None:
    slot = in_flight(1).join()
    slot.release_device()
    slot.release_device()
    with pytest.raises(AssertionError):
        _ = slot.ticket
