"""Deadlines that pass before the delivery, in the queue, and during the run."""

import asyncio
from datetime import UTC, datetime, timedelta

from tests.support.observations import published_digests, stored_digests
from tests.support.scene import Event, Scene


def _in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def _pass(deadline: datetime) -> None:
    await asyncio.sleep((deadline - datetime.now(UTC)).total_seconds())
    assert datetime.now(UTC) >= deadline


def _expired(event: Event) -> bool:
    return (event["type"], event.get("failure", {}).get("code")) == (
        "generation.v1.failed",
        "deadline_exceeded",
    )


async def test_expired_request_is_not_run(scene: Scene) -> None:
    late = await scene.submit(deadline=_in(-1).isoformat())
    later = await scene.submit()
    await scene.start()
    assert _expired(await scene.event(late))
    assert (await scene.event(later))["type"] == "generation.v1.succeeded"
    await scene.until_empty()
    assert scene.runs() == [later]
    assert len(await scene.dead_letters()) == 0


async def test_request_that_expires_in_the_queue_is_not_run(scene: Scene) -> None:
    await scene.start("held_until_released", RELEASE_MARK="go")
    long = await scene.submit()
    await scene.until_noted("runs")
    deadline = _in(1)
    waiting = await scene.submit(deadline=deadline.isoformat())
    later = await scene.submit(deadline=_in(60).isoformat())
    assert datetime.now(UTC) < deadline
    await _pass(deadline)
    (scene.folder / "go").touch()
    assert _expired(await scene.event(waiting))
    for request_id in (long, later):
        assert (await scene.event(request_id))["type"] == "generation.v1.succeeded"
    await scene.until_empty()
    assert scene.runs() == [long, later]


async def test_deadline_stops_a_run_within_one_step(scene: Scene) -> None:
    await scene.start("slow_steps")
    deadline = _in(1.5)
    long = await scene.submit(deadline=deadline.isoformat(), steps=100)
    event = await scene.event(long)
    assert _expired(event)
    assert datetime.fromisoformat(event["time"]) >= deadline
    begun = [float(moment) for moment in scene.notes("steps")]
    # The current step started before the deadline. At most one more step can start between the
    # deadline and the cancellation.
    assert sum(moment > deadline.timestamp() for moment in begun) <= 1
    assert begun[0] < deadline.timestamp()
    later = await scene.submit()
    done = await scene.event(later)
    await scene.until_empty()
    assert scene.runs() == [long, later]
    assert await stored_digests(scene) == published_digests(done)
