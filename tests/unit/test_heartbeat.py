"""The lease: renewed while the block runs, and not once after it."""

import asyncio
from datetime import UTC, datetime

import pytest

from consumer.heartbeat import Lease
from tests.memory_ports import MemoryDelivery, MemoryQueue, Outage

ACK_WAIT = 0.01  # seconds
SOON = 5.0  # seconds; only bounds a wait for something that must happen


def make_delivery() -> MemoryDelivery:
    return MemoryDelivery(
        queue=MemoryQueue([], Outage()),
        subject="generation.request.text_to_image",
        headers={},
        body=b"",
        stream="GENERATION_REQUESTS_TEXT_TO_IMAGE",
        stream_sequence=1,
        attempt=1,
        stored_at=datetime.now(UTC),
    )


def beating() -> bool:
    """Whether something still renews a lease."""
    return any(task.get_name() == "heartbeat" for task in asyncio.all_tasks())


async def hold(delivery: MemoryDelivery, *, error: Exception | None = None) -> None:
    """Hold a lease for three beats, or for ever."""
    async with asyncio.timeout(SOON), Lease(delivery, ack_wait=ACK_WAIT):
        await delivery.beats.until(3)
        if error is not None:
            raise error


async def test_lease_is_renewed_while_the_block_runs_and_not_after_it() -> None:
    delivery = make_delivery()
    async with Lease(delivery, ack_wait=ACK_WAIT):
        assert beating()
        await asyncio.wait_for(delivery.beats.until(3), SOON)
    assert not beating()
    assert delivery.settlements == []


async def test_lease_ends_with_the_block_that_raises() -> None:
    with pytest.raises(KeyError):
        await hold(make_delivery(), error=KeyError())
    assert not beating()


async def test_lease_ends_with_the_block_that_is_cancelled() -> None:
    delivery = make_delivery()
    holding = asyncio.create_task(hold(delivery))
    await asyncio.wait_for(delivery.beats.until(1), SOON)
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert not beating()


async def test_three_lost_beats_leave_a_fourth_in_time() -> None:
    assert Lease(make_delivery(), ack_wait=60.0).interval * 4 < 60.0


@pytest.mark.parametrize("error", [OSError("gone"), TypeError("lost"), RuntimeError("odd")])
async def test_beat_that_raises_does_not_end_the_lease(error: Exception) -> None:
    delivery = make_delivery()
    delivery.beat_refusal = error
    await hold(delivery)
