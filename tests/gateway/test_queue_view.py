"""The numbers of the queues against a real server; a bare consumer takes the place of a worker."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from nats.js import JetStreamContext

from consumer.bus.connection import Bus, BusUnavailable, connect
from consumer.bus.queue_view import QueueState, QueueView
from generation_contracts import Task
from tests.gateway.open_jobs import settings_of
from tests.support.scene import WITHIN, Scene

TASK = Task.TEXT_TO_IMAGE


class EagerView(QueueView):
    """A view that keeps nothing, for tests that change what it sees."""

    async def state(self, task: Task) -> QueueState:
        return await self._read_state(task)


@pytest.fixture
async def bus(scene: Scene) -> AsyncIterator[Bus]:
    bus = await connect(settings_of(scene), name="test", within=WITHIN)
    yield bus
    await bus.close()


@pytest.fixture
def view(scene: Scene, bus: Bus) -> QueueView:
    return EagerView(bus, scene.subjects, {task: str(task) for task in Task})


async def worker(scene: Scene) -> JetStreamContext.PullSubscription:
    """The durable of the task, to pull from."""
    jetstream = scene.sender.jetstream()
    return await jetstream.pull_subscribe_bind(str(TASK), scene.subjects.requests_stream(TASK))


async def submit(scene: Scene, count: int) -> list[str]:
    """Queue requests under their own subjects, as the gateway does."""
    ids = [f"r{number}" for number in range(count)]
    for request_id in ids:
        subject = scene.subjects.request(TASK, request_id)
        await scene.sender.jetstream().publish(subject, b'{"prompt": "a"}')
    return ids


async def places(view: QueueView, ids: list[str]) -> list[Any]:
    found = [await view.position(TASK, request_id) for request_id in ids]
    return [None if place is None else (place.before, place.delivered) for place in found]


async def test_empty_queue(view: QueueView) -> None:
    assert await view.state(TASK) == QueueState()
    assert await view.position(TASK, "nothing") is None
    assert await view.body(TASK, "nothing") is None
    assert await view.unfinished() == {}
    assert await view.ended() == {}


async def test_positions_before_any_worker_has_come(scene: Scene, view: QueueView) -> None:
    ids = await submit(scene, 3)
    assert await places(view, ids) == [(0, False), (1, False), (2, False)]
    state = await view.state(TASK)
    assert (state.waiting, state.in_flight) == (3, 0)


async def test_positions_count_from_what_is_delivered(scene: Scene, view: QueueView) -> None:
    ids = await submit(scene, 4)
    pulling = await worker(scene)
    (first,) = await pulling.fetch(1)
    assert await places(view, ids) == [(0, True), (1, False), (2, False), (3, False)]
    await first.ack_sync()
    (second,) = await pulling.fetch(1)
    assert await places(view, ids) == [None, (0, True), (1, False), (2, False)]
    state = await view.state(TASK)
    assert (state.waiting, state.in_flight) == (2, 1)
    await second.ack_sync()


async def test_requests_that_a_worker_has_received_in_advance_are_counted(
    scene: Scene, view: QueueView
) -> None:
    await scene.apply(CONSUMER_MAX_ACK_PENDING="3")
    ids = await submit(scene, 5)
    pulling = await worker(scene)
    first, second, third = await pulling.fetch(3)
    delivered = [(0, True), (1, True), (2, True)]
    assert await places(view, ids) == [*delivered, (3, False), (4, False)]
    await second.ack_sync()
    assert await places(view, ids) == [(0, True), None, (1, True), (2, False), (3, False)]
    await first.ack_sync()
    await third.ack_sync()


async def test_what_was_cancelled_in_the_middle_is_not_counted(
    scene: Scene, view: QueueView
) -> None:
    ids = await submit(scene, 6)
    pulling = await worker(scene)
    (first,) = await pulling.fetch(1)
    jetstream = scene.sender.jetstream()
    for request_id in (ids[2], ids[4]):
        await jetstream.purge_stream(
            scene.subjects.requests_stream(TASK), subject=scene.subjects.request(TASK, request_id)
        )
    assert await places(view, ids) == [
        (0, True),
        (1, False),
        None,
        (2, False),
        None,
        (3, False),
    ]
    await first.ack_sync()


async def test_copies_stand_at_the_place_of_the_first(scene: Scene, view: QueueView) -> None:
    ids = await submit(scene, 3)
    await submit(scene, 1)
    assert await places(view, ids) == [(0, False), (1, False), (2, False)]


async def test_retries_are_counted_as_waiting(scene: Scene, view: QueueView) -> None:
    ids = await submit(scene, 2)
    subject = scene.subjects.retry(TASK, "later")
    await scene.sender.jetstream().publish(subject, b'{"prompt": "b"}')
    state = await view.state(TASK)
    assert (state.waiting, state.retries) == (3, 1)
    assert await places(view, ["later"]) == [(3, False)]
    assert await view.body(TASK, "later") == b'{"prompt": "b"}'
    assert await view.unfinished() == dict.fromkeys([*ids, "later"], TASK)


async def test_a_retry_that_is_queued_again_has_its_new_place(
    scene: Scene, view: QueueView
) -> None:
    ids = await submit(scene, 3)
    assert await places(view, ids[:1]) == [(0, False)]
    pulling = await worker(scene)
    (first,) = await pulling.fetch(1)
    assert await places(view, ids[:1]) == [(0, True)]
    jetstream = scene.sender.jetstream()
    await jetstream.publish(scene.subjects.retry(TASK, ids[0]), first.data)
    await first.ack_sync()
    assert await places(view, ids[:1]) == [(3, False)]
    await jetstream.publish(first.subject, first.data)
    assert await places(view, ids) == [(2, False), (0, False), (1, False)]


async def test_requests_without_an_id_in_their_subject_count(scene: Scene, view: QueueView) -> None:
    await scene.submit()
    ids = await submit(scene, 1)
    assert await places(view, ids) == [(1, False)]
    assert await view.unfinished() == {ids[0]: TASK}


async def test_ended(scene: Scene, view: QueueView) -> None:
    jetstream = scene.sender.jetstream()
    for task in Task:
        await jetstream.publish(scene.subjects.result(task, f"of-{task}"), b"{}")
    assert await view.ended() == {f"of-{task}": task for task in Task}


async def test_a_crowd_costs_one_reading(scene: Scene, bus: Bus) -> None:
    await submit(scene, 5)
    view = QueueView(bus, scene.subjects, {task: str(task) for task in Task})
    before = bus.client.stats["out_msgs"]
    states = await asyncio.gather(*(view.state(TASK) for _ in range(100)))
    assert {state.waiting for state in states} == {5}
    await asyncio.gather(*(view.position(TASK, "r4") for _ in range(100)))
    for _ in range(100):
        assert await view.position(TASK, "r4") is not None
    asked = bus.client.stats["out_msgs"] - before
    assert asked < 110, "a hundred lookups of the sequence at most; afterwards it is known"


async def test_a_lost_server_is_said_and_found_again(scene: Scene, bus: Bus) -> None:
    view = QueueView(bus, scene.subjects, {task: str(task) for task in Task})
    (request_id,) = await submit(scene, 1)
    await asyncio.to_thread(scene.stack.nats.kill)
    with pytest.raises(BusUnavailable):
        await view.state(TASK)
    await asyncio.to_thread(scene.stack.nats.start)
    await asyncio.to_thread(scene.stack.nats.wait_ready)
    await asyncio.wait_for(bus.wait_connected(), WITHIN)

    async def found() -> bool:
        try:
            return await view.position(TASK, request_id) is not None
        except BusUnavailable:
            return False

    await scene.until(found, "place")
