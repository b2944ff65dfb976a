"""A request withdrawn in this worker's hands: what it says of it is what happens."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from consumer.ports import Grip
from consumer.run import Reason
from generation_contracts import CancelledEvent, SucceededEvent
from tests.support.behaviour import asking, soon
from tests.support.memory_ports import Hold
from tests.support.memory_world import MemoryWorld, Worlds

pytestmark = pytest.mark.usefixtures("short_pauses")


async def while_held(world: MemoryWorld, hold: Hold, act: Callable[[], Awaitable[None]]) -> None:
    """Handle the next delivery, and do something while its run goes on."""
    working = asyncio.create_task(world.work())
    await soon(hold.begun())
    await act()
    hold.release()
    await soon(working)


async def test_a_request_that_is_not_here_is_nobodys(make_world: Worlds) -> None:
    assert await (await make_world()).execution.withdraw("a") is None


async def test_in_the_run_it_stops_and_leaves_a_note(make_world: Worlds) -> None:
    world = await make_world()
    hold = world.runner.will_hold()
    grips: list[Grip | None] = []

    async def withdraw() -> None:
        grips.append(await world.execution.withdraw("a"))

    await world.send(asking())
    await while_held(world, hold, withdraw)
    assert grips == [Grip.STOPPING]
    assert world.queue.withdrawn == {1}
    assert isinstance(await world.result("a"), CancelledEvent)


@pytest.mark.parametrize("when", ["during the last upload", "while the end is published"])
async def test_at_the_last_moment_the_answer_is_true(
    when: str, make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    owner: Any
    owner, method = (
        (world.artifacts, "store") if when.endswith("upload") else (world.events, "publish_result")
    )
    original, grips = getattr(owner, method), []

    async def and_then_withdrawn(*args: Any, **kwargs: Any) -> Any:
        value = await original(*args, **kwargs)
        grips.append(await world.execution.withdraw("a"))
        return value

    monkeypatch.setattr(owner, method, and_then_withdrawn)
    await world.send(asking())
    await world.work()
    event = await world.result("a")
    if when.endswith("upload"):
        assert (grips, type(event)) == ([Grip.STOPPING], CancelledEvent)
        assert world.artifacts.objects == {}
    else:
        assert (grips, type(event)) == ([Grip.ENDING], SucceededEvent)


async def test_the_next_worker_reads_the_note_even_after_the_last_attempt(
    make_world: Worlds,
) -> None:
    world = await make_world(max_attempts=1)
    await world.send(asking())
    lost = world.queue.take()  # by a worker that was told to stop it, and died
    await lost.withdraw()
    world.queue.run_out_leases()
    await world.work()
    assert isinstance(await world.result("a"), CancelledEvent)
    assert world.runner.runs == []


async def test_a_deadline_or_a_drain_that_comes_as_late_changes_nothing(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    original = world.artifacts.store

    async def and_then_drained(*args: Any, **kwargs: Any) -> Any:
        value = await original(*args, **kwargs)
        world.execution.interrupt(Reason.DRAIN)
        return value

    monkeypatch.setattr(world.artifacts, "store", and_then_drained)
    await world.send(asking())
    await world.work()
    assert isinstance(await world.result("a"), SucceededEvent)
