"""Queue positions and counts on a real server, with a plain consumer instead of a worker."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from nats.js import JetStreamContext

from consumer.bus.connection import Bus, BusUnavailable, connect
from consumer.bus.queue_view import QueueState, QueueView
from generation_contracts import Task
from generation_contracts.base import DEFAULT_QUEUES
from tests.gateway.open_jobs import settings_of
from tests.support.scene import WITHIN, Scene

TASK = Task.TEXT_TO_IMAGE


class EagerView(QueueView):
    """A view without a cache, for tests that change the streams."""

    async def state(self, task: Task) -> QueueState:
        return await self._read_state(task)


@pytest.fixture
async def bus(scene: Scene) -> AsyncIterator[Bus]:
    bus = await connect(settings_of(scene), name="test", within=WITHIN)
    yield bus
    await bus.close()


@pytest.fixture
def view(scene: Scene, bus: Bus) -> QueueView:
    return EagerView(bus, scene.subjects, {task: str(task) for task in DEFAULT_QUEUES})


async def worker(scene: Scene) -> JetStreamContext.PullSubscription:
    """Return a pull subscription to the durable consumer of the task."""
    jetstream = scene.sender.jetstream()
    return await jetstream.pull_subscribe_bind(str(TASK), scene.subjects.requests_stream(TASK))


async def submit(scene: Scene, count: int) -> list[str]:
    """Publish requests under separate subjects, as the gateway does."""
    ids = [f"r{number}" for number in range(count)]
    for request_id in ids:
        subject = scene.subjects.request(TASK, request_id)
        await scene.sender.jetstream().publish(subject, b'{"prompt": "a"}')
    return ids


async def positions(view: QueueView, ids: list[str]) -> list[Any]:
    found = [await view.position(TASK, request_id) for request_id in ids]
    return [
        None if position is None else (position.before, position.delivered) for position in found
    ]


async def test_an_empty_queue_has_no_positions(view: QueueView) -> None:
    assert await view.state(TASK) == QueueState()
    assert await view.position(TASK, "nothing") is None
    assert await view.body(TASK, "nothing") is None
    assert await view.unfinished() == {}
    assert await view.ended() == {}


async def test_requests_have_positions_before_the_first_delivery(
    scene: Scene, view: QueueView
) -> None:
    ids = await submit(scene, 3)
    assert await positions(view, ids) == [(0, False), (1, False), (2, False)]
    state = await view.state(TASK)
    assert (state.waiting, state.in_flight) == (3, 0)


async def test_positions_start_at_the_delivered_requests(scene: Scene, view: QueueView) -> None:
    ids = await submit(scene, 4)
    pulling = await worker(scene)
    (first,) = await pulling.fetch(1)
    assert await positions(view, ids) == [(0, True), (1, False), (2, False), (3, False)]
    await first.ack_sync()
    (second,) = await pulling.fetch(1)
    assert await positions(view, ids) == [None, (0, True), (1, False), (2, False)]
    state = await view.state(TASK)
    assert (state.waiting, state.in_flight) == (2, 1)
    await second.ack_sync()


async def test_positions_include_prefetched_requests(scene: Scene, view: QueueView) -> None:
    await scene.apply(CONSUMER_MAX_ACK_PENDING="3")
    ids = await submit(scene, 5)
    pulling = await worker(scene)
    first, second, third = await pulling.fetch(3)
    delivered = [(0, True), (1, True), (2, True)]
    assert await positions(view, ids) == [*delivered, (3, False), (4, False)]
    await second.ack_sync()
    assert await positions(view, ids) == [(0, True), None, (1, True), (2, False), (3, False)]
    await first.ack_sync()
    await third.ack_sync()


async def test_positions_exclude_cancelled_requests(scene: Scene, view: QueueView) -> None:
    ids = await submit(scene, 6)
    pulling = await worker(scene)
    (first,) = await pulling.fetch(1)
    jetstream = scene.sender.jetstream()
    for request_id in (ids[2], ids[4]):
        await jetstream.purge_stream(
            scene.subjects.requests_stream(TASK), subject=scene.subjects.request(TASK, request_id)
        )
    assert await positions(view, ids) == [
        (0, True),
        (1, False),
        None,
        (2, False),
        None,
        (3, False),
    ]
    await first.ack_sync()


async def test_a_copy_has_the_position_of_the_first_message(scene: Scene, view: QueueView) -> None:
    ids = await submit(scene, 3)
    await submit(scene, 1)
    assert await positions(view, ids) == [(0, False), (1, False), (2, False)]


async def test_retries_are_counted_as_waiting(scene: Scene, view: QueueView) -> None:
    ids = await submit(scene, 2)
    subject = scene.subjects.retry(TASK, "later")
    await scene.sender.jetstream().publish(subject, b'{"prompt": "b"}')
    state = await view.state(TASK)
    assert (state.waiting, state.retries) == (3, 1)
    assert await positions(view, ["later"]) == [(3, False)]
    assert await view.body(TASK, "later") == b'{"prompt": "b"}'
    assert await view.unfinished() == dict.fromkeys([*ids, "later"], TASK)


async def test_a_requeued_retry_has_a_new_position(scene: Scene, view: QueueView) -> None:
    ids = await submit(scene, 3)
    assert await positions(view, ids[:1]) == [(0, False)]
    pulling = await worker(scene)
    (first,) = await pulling.fetch(1)
    assert await positions(view, ids[:1]) == [(0, True)]
    jetstream = scene.sender.jetstream()
    await jetstream.publish(scene.subjects.retry(TASK, ids[0]), first.data)
    await first.ack_sync()
    assert await positions(view, ids[:1]) == [(3, False)]
    await jetstream.publish(first.subject, first.data)
    assert await positions(view, ids) == [(2, False), (0, False), (1, False)]


async def test_positions_include_requests_without_an_id_in_their_subject(
    scene: Scene, view: QueueView
) -> None:
    await scene.submit()
    ids = await submit(scene, 1)
    assert await positions(view, ids) == [(1, False)]
    assert await view.unfinished() == {ids[0]: TASK}


async def test_ended_requests_are_listed_with_their_tasks(scene: Scene, view: QueueView) -> None:
    jetstream = scene.sender.jetstream()
    for task in DEFAULT_QUEUES:
        await jetstream.publish(scene.subjects.result(task, f"of-{task}"), b"{}")
    assert await view.ended() == {f"of-{task}": task for task in DEFAULT_QUEUES}


async def test_concurrent_callers_share_one_read(scene: Scene, bus: Bus) -> None:
    await submit(scene, 5)
    view = QueueView(bus, scene.subjects, {task: str(task) for task in DEFAULT_QUEUES})
    before = bus.client.stats["out_msgs"]
    states = await asyncio.gather(*(view.state(TASK) for _ in range(100)))
    assert {state.waiting for state in states} == {5}
    await asyncio.gather(*(view.position(TASK, "r4") for _ in range(100)))
    for _ in range(100):
        assert await view.position(TASK, "r4") is not None
    sent = bus.client.stats["out_msgs"] - before
    assert sent < 110, "at most 100 sequence lookups, which the view caches"


async def test_the_view_recovers_after_a_server_outage(scene: Scene, bus: Bus) -> None:
    view = QueueView(bus, scene.subjects, {task: str(task) for task in DEFAULT_QUEUES})
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

    await scene.until(found, "the position")
