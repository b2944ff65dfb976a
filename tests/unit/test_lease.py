"""The lease: it is renewed while its block runs, and never afterwards."""

import asyncio
from datetime import UTC, datetime

import pytest

from consumer import background_tasks as tasks
from consumer.jobs.lease import Lease
from tests.support.memory_ports import MemoryDelivery, MemoryQueue, Outage

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
        deliveries=1,
        stored_at=datetime.now(UTC),
    )


def beating() -> bool:
    """Return whether a task still renews a lease."""
    return any(task.get_name() == "heartbeat" for task in asyncio.all_tasks())


async def use_lease(delivery: MemoryDelivery, *, error: Exception | None = None) -> None:
    """Keep a lease for three renewals, then raise an error or return."""
    async with asyncio.timeout(SOON), Lease(delivery, ack_wait=ACK_WAIT):
        await delivery.renewals.until(3)
        if error is not None:
            raise error


async def test_lease_is_renewed_only_while_the_block_runs() -> None:
    delivery = make_delivery()
    async with Lease(delivery, ack_wait=ACK_WAIT):
        assert beating()
        await asyncio.wait_for(delivery.renewals.until(3), SOON)
    assert not beating()
    assert delivery.settlements == []


async def test_lease_ends_if_the_block_raises() -> None:
    with pytest.raises(KeyError):
        await use_lease(make_delivery(), error=KeyError())
    assert not beating()


async def test_lease_ends_if_the_block_is_cancelled() -> None:
    delivery = make_delivery()
    task = asyncio.create_task(use_lease(delivery))
    await asyncio.wait_for(delivery.renewals.until(1), SOON)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not beating()


async def test_fourth_renewal_is_in_time_after_three_lost_renewals() -> None:
    assert Lease(make_delivery(), ack_wait=60.0).interval * 4 < 60.0


@pytest.mark.parametrize("error", [OSError("gone"), TypeError("lost"), RuntimeError("odd")])
async def test_renewal_that_raises_does_not_end_the_lease(error: Exception) -> None:
    delivery = make_delivery()
    delivery.renewal_error = error
    await use_lease(delivery)


class Swallowing:
    """A delivery whose renewal swallows cancellations, as nats-py's publish did."""

    def __init__(self, *, times: int) -> None:
        self.times = times
        self.renewals = 0
        self.renewal_stopped = False

    async def extend(self) -> None:
        self.renewals += 1
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.times -= 1
                if self.times < 0:
                    raise

    def stop_renewing(self) -> None:
        self.renewal_stopped = True


async def test_heartbeat_that_swallows_a_cancellation_ends_with_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "CANCEL_EVERY", 0.01)
    delivery = Swallowing(times=3)
    async with asyncio.timeout(SOON):
        async with Lease(delivery, ack_wait=60.0):  # type: ignore[arg-type] # what is used of it
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert delivery.renewals == 1
    assert delivery.renewal_stopped
    assert not beating()


async def test_renewal_that_hangs_does_not_delay_the_next_one() -> None:
    delivery = Swallowing(times=0)
    async with asyncio.timeout(SOON), Lease(delivery, ack_wait=ACK_WAIT):  # type: ignore[arg-type]
        while delivery.renewals < 3:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(ACK_WAIT)
