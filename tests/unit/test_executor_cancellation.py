"""Stop requests for a job of a worker: the acknowledgement matches the outcome."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from consumer.inference.cancel_token import StopReason
from consumer.ports.bus import StopAck
from generation_contracts import CancelledEvent, SucceededEvent
from tests.support.behaviour import request_body, soon
from tests.support.memory_ports import Hold
from tests.support.memory_world import MemoryWorld, Worlds

pytestmark = pytest.mark.usefixtures("short_pauses")


async def while_running_do(
    world: MemoryWorld, hold: Hold, act: Callable[[], Awaitable[None]]
) -> None:
    """Handle the next delivery, and await `act` during its run."""
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    await act()
    hold.release()
    await soon(working)


async def test_worker_without_the_request_returns_none(make_world: Worlds) -> None:
    assert await (await make_world()).executor.request_stop("a") is None


async def test_running_request_stops_and_is_marked_as_cancelled(make_world: Worlds) -> None:
    world = await make_world()
    hold = world.runner.hold_next_run()
    answers: list[StopAck | None] = []

    async def request_stop() -> None:
        answers.append(await world.executor.request_stop("a"))

    await world.send(request_body())
    await while_running_do(world, hold, request_stop)
    assert answers == [StopAck.STOPPING]
    assert world.queue.cancelled == {1}
    assert isinstance(await world.result("a"), CancelledEvent)


@pytest.mark.parametrize("when", ["during the last upload", "while the result is published"])
async def test_late_stop_request_gets_a_correct_acknowledgement(
    when: str, make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    owner: Any
    owner, method = (
        (world.artifacts, "store") if when.endswith("upload") else (world.events, "publish_result")
    )
    original, answers = getattr(owner, method), []

    async def and_then_stop(*args: Any, **kwargs: Any) -> Any:
        value = await original(*args, **kwargs)
        answers.append(await world.executor.request_stop("a"))
        return value

    monkeypatch.setattr(owner, method, and_then_stop)
    await world.send(request_body())
    await world.work()
    event = await world.result("a")
    if when.endswith("upload"):
        assert (answers, type(event)) == ([StopAck.STOPPING], CancelledEvent)
        assert world.artifacts.objects == {}
    else:
        assert (answers, type(event)) == ([StopAck.ENDING], SucceededEvent)


async def test_next_worker_reads_the_mark_even_after_the_last_attempt(
    make_world: Worlds,
) -> None:
    world = await make_world(max_attempts=1)
    await world.send(request_body())
    lost = world.queue.take()  # by a worker that got a stop request and died
    await lost.mark_cancelled()
    world.queue.expire_leases()
    await world.work()
    assert isinstance(await world.result("a"), CancelledEvent)
    assert world.runner.runs == []


async def test_deadline_or_drain_after_the_last_upload_changes_nothing(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    original = world.artifacts.store

    async def and_then_drain(*args: Any, **kwargs: Any) -> Any:
        value = await original(*args, **kwargs)
        world.executor.interrupt(StopReason.DRAIN)
        return value

    monkeypatch.setattr(world.artifacts, "store", and_then_drain)
    await world.send(request_body())
    await world.work()
    assert isinstance(await world.result("a"), SucceededEvent)
