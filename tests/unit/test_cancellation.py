"""Cancellation of a request, depending on its state and on the replies of the workers."""

import asyncio
import json
from typing import Any

import pytest

from consumer.endpoints import cancellation
from consumer.endpoints.cancellation import LOADS, LOOKUPS, Cancellation, QueueFinalizer
from consumer.jobs.admission import Admission
from consumer.jobs.finalizer import Finalizer
from consumer.ports.bus import Delivery, IdLookup, StopAck, StoredRequest
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    Failure,
    FailureCode,
    ImageArtifact,
    SucceededEvent,
    Task,
    TextOutput,
)
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.events import ChainPlace, Timings
from tests.support.behaviour import soon
from tests.support.memory_ports import URL_ENDS, Hold, MemoryDelivery, ScriptedRunner, Tally
from tests.support.memory_world import MemoryWorld, Worlds

T2I, I2T = Task.TEXT_TO_IMAGE, Task.IMAGE_TO_TEXT
Stored = dict[tuple[Task, str], list[tuple[MemoryDelivery, bool]]]


class Queue:
    """Both request streams: deliveries and whether they were never delivered, oldest first."""

    def __init__(self, world: MemoryWorld) -> None:
        self.retries: dict[tuple[Task, str], str] = {}
        self.cancelled_retries: list[tuple[Task, str]] = []
        self.stored: Stored = {}
        self.loaded = 0
        self.most_loaded = 0
        self.lookups = 0
        self.most_lookups = 0
        self._world = world

    async def names(self) -> list[Task]:
        return list(DEFAULT_QUEUES)

    async def find(self, request_id: str) -> IdLookup:
        self.lookups += 1
        self.most_lookups = max(self.most_lookups, self.lookups)
        await asyncio.sleep(0)
        self.lookups -= 1
        requests = frozenset(task for task in DEFAULT_QUEUES if self.stored.get((task, request_id)))
        return IdLookup(requests, await self.find_results(request_id))

    async def find_results(self, request_id: str) -> frozenset[Task]:
        return frozenset(
            t for t in DEFAULT_QUEUES if self._world.events.stored(t, request_id) is not None
        )

    async def oldest(self, task: Task, request_id: str) -> StoredRequest | None:
        self.loaded += 1
        self.most_loaded = max(self.most_loaded, self.loaded)
        await asyncio.sleep(0)
        stored = self.stored.get((task, request_id))
        self.loaded -= 1
        return StoredRequest(*stored[0]) if stored else None

    async def older(self, task: Task, request_id: str, than: Delivery) -> None:
        raise AssertionError("the canceller does not call this")

    async def owner(self, task: Task, request_id: str) -> str | None:
        return self.retries.get((task, request_id))

    async def cancel_retry(self, task: Task, request_id: str) -> None:
        self.cancelled_retries.append((task, request_id))


class Workers:
    """All workers, with their replies by request id."""

    def __init__(self) -> None:
        self.answers: dict[str, StopAck] = {}
        self.stop_requests: list[str] = []
        self.stop_notices: list[str] = []
        self.waiting = Tally()
        self.answering = asyncio.Event()  # cleared: no reply without an answer

    async def request_stop(self, request_id: str) -> "asyncio.Future[StopAck | None]":
        self.stop_requests.append(request_id)
        return asyncio.ensure_future(self._answer(request_id))

    async def _answer(self, request_id: str) -> StopAck | None:
        if request_id not in self.answers:
            self.waiting.add()
            await self.answering.wait()
        return self.answers.get(request_id)

    async def notify_stop(self, request_id: str) -> None:
        self.stop_notices.append(request_id)

    async def is_in_progress(self, request_id: str) -> bool:
        raise AssertionError("the canceller does not call this")

    async def others_idle(self) -> bool:
        raise AssertionError("the canceller does not call this")


class Setup:
    """A canceller with its ports."""

    def __init__(self, world: MemoryWorld) -> None:
        self.world = world
        self.queue = Queue(world)
        self.workers = Workers()
        self.workers.answering.set()
        self.canceller = Cancellation(
            queue=self.queue,
            workers=self.workers,
            events=world.events,
            finalizer_of=lambda queue: self._finalizer(Task(queue)),
        )

    def _finalizer(self, task: Task) -> QueueFinalizer:
        finalizer = Finalizer(
            queues=self.queue,
            task=task,
            worker="canceller",
            model=self.world.runner.load(),
            events=self.world.events,
            artifacts=self.world.artifacts,
            retry_delay=0.0,
            observer=self.world.observer,
        )
        return QueueFinalizer(Admission(task, self.world.subjects, ("_INBOX.",)), finalizer)

    def store(
        self, stored_as: str, *, task: Task = T2I, never_delivered: bool = True, **fields: Any
    ) -> MemoryDelivery:
        """Store a request in its stream."""
        body = {"prompt": "a", **({} if task is T2I else {"images": ["s3://b/k"]}), **fields}
        subject = self.world.subjects.request(task, stored_as)
        self.world.queue.publish(subject, json.dumps(body).encode(), {})
        delivery = self.world.queue.take()
        self.queue.stored.setdefault((task, stored_as), []).append((delivery, never_delivered))
        return delivery

    def succeeded(self, request_id: str, *, task: Task = T2I, **fields: Any) -> None:
        """Store a succeeded event."""
        self.world.events.put(succeeded(request_id, task, **fields))

    async def cancel(self, request_id: str) -> tuple[str, str | None]:
        """Cancel a request, and return the status and the result of the reply."""
        reply = await soon(self.canceller.cancel(request_id))
        assert reply.request_id == request_id
        result = reply.result
        return reply.status, None if result is None else result.rpartition(".")[2]

    async def kind(self, request_id: str, task: Task = T2I) -> type | None:
        """Return the type of the stored terminal event."""
        event = self.world.events.stored(task, request_id)
        return None if event is None else type(event)


def common(request_id: str, task: Task, chain: ChainPlace | None = None) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "task": task,
        "sequence": 0,
        "time": URL_ENDS,
        "worker": "w",
        "attempt": 1,
        "request_digest": f"sha256:{'0' * 64}",
        "chain": chain,
    }


def succeeded(
    request_id: str, task: Task, *, images: int = 1, step: int = 0, of: int = 0, chain: str = "tour"
) -> SucceededEvent:
    place = ChainPlace(id=chain, step=step, of=of) if step else None
    image = ImageArtifact(
        bucket="b",
        key="k",
        url="memory://b/k",
        url_expires_at=URL_ENDS,
        etag="0" * 32,
        sha256="0" * 64,
        size=1,
        media_type="image/png",
        width=1,
        height=1,
        seed=0,
    )
    text = TextOutput(text="a", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
    return SucceededEvent(
        **common(request_id, task, place),
        outputs=(image,) * images if task is T2I else (text,),
        model=ScriptedRunner.description.info,
        parameters={},
        timings=Timings(queued=0.0, inference=0.0, encode=0.0, upload=0.0),
    )


@pytest.fixture
async def setup(make_world: Worlds, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(cancellation, "RESULT_TIMEOUT", 0.01)
    monkeypatch.setattr(cancellation, "POLL_INTERVAL", 0.001)
    return Setup(await make_world())


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (None, ("stopping", None)),  # the worker hangs or is dead: the next worker reads the mark
        (StopAck.STOPPING, ("stopping", None)),
        (StopAck.ENDING, ("stopping", None)),  # the attempt has failed, and the request is marked
    ],
)
async def test_delivered_request_is_marked_and_gets_no_event_from_the_canceller(
    setup: Setup, answer: StopAck | None, reply: tuple[str, str | None]
) -> None:
    setup.store("a", never_delivered=False)
    if answer is not None:
        setup.workers.answers["a"] = answer
    assert await setup.cancel("a") == reply
    assert setup.world.queue.cancelled == {1}
    assert await setup.kind("a") is None
    assert len(setup.world.queue) == 1


async def test_no_event_is_stored_while_a_hanging_worker_runs_the_request(
    setup: Setup,
) -> None:
    world = setup.world
    hold: Hold = world.runner.hold_next_run(polls_cancel=False)
    await world.send(b'{"prompt":"a"}', request_id="a")
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    assert world.delivery is not None
    setup.queue.stored[T2I, "a"] = [(world.delivery, False)]
    assert await setup.cancel("a") == ("stopping", None)
    assert await world.result("a") is None
    hold.release()
    await soon(working)
    assert await world.result("a") is not None


async def test_undelivered_request_is_cancelled_after_a_stop_request_to_all_workers(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = setup.store("a")
    oldest, requested_before = setup.queue.oldest, []

    async def load(task: Task, request_id: str) -> StoredRequest | None:
        requested_before.extend(setup.workers.stop_requests)
        return await oldest(task, request_id)

    monkeypatch.setattr(setup.queue, "oldest", load)
    setup.workers.answering.clear()  # the canceller does not wait for a reply
    assert await setup.cancel("a") == ("cancelled", "cancelled")
    assert requested_before == ["a"]
    assert delivery.settlements == ["ack"]
    assert setup.workers.stop_notices == ["a"]  # a worker may have started meanwhile


async def test_only_the_oldest_of_many_copies_is_loaded_and_settled(setup: Setup) -> None:
    deliveries = [setup.store("a") for _ in range(20)]
    assert await setup.cancel("a") == ("cancelled", "cancelled")
    assert [len(one.settlements) for one in deliveries] == [1] + [0] * 19


async def test_undelivered_invalid_request_is_cancelled(setup: Setup) -> None:
    setup.store("a", width="wide")
    assert await setup.cancel("a") == ("cancelled", "cancelled")


async def test_cancellation_of_conflicting_ids_ends_only_the_id_of_the_subject(
    setup: Setup,
) -> None:
    setup.store("mine", request_id="yours")
    assert await setup.cancel("mine") == ("cancelled", "cancelled")
    assert (await setup.kind("mine"), await setup.kind("yours")) == (CancelledEvent, None)


async def test_request_that_waits_for_a_retry_is_marked(setup: Setup) -> None:
    setup.queue.retries[T2I, "a"] = "sha256:0"
    assert await setup.cancel("a") == ("stopping", None)
    assert setup.queue.cancelled_retries == [(T2I, "a")]


async def test_ended_requests_get_an_immediate_reply(setup: Setup) -> None:
    setup.succeeded("done")
    setup.world.events.put(CancelledEvent(**common("gone", T2I)))
    setup.workers.answering.clear()
    assert await setup.cancel("done") == ("finished", "succeeded")
    assert await setup.cancel("gone") == ("cancelled", "cancelled")
    assert setup.world.queue.cancelled == set()


async def test_running_request_that_ends_at_once_is_reported_as_stopping(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply does not depend on whether the worker or the lookup is faster."""
    find = setup.queue.find

    async def found_after_the_end(request_id: str) -> IdLookup:
        setup.world.events.put(CancelledEvent(**common("a", T2I)))
        return await find(request_id)

    monkeypatch.setattr(setup.queue, "find", found_after_the_end)
    setup.workers.answers["a"] = StopAck.STOPPING
    assert await setup.cancel("a") == ("stopping", None)


async def test_ended_request_that_is_still_in_its_stream_is_finished(setup: Setup) -> None:
    setup.succeeded("a")
    setup.store("a", never_delivered=False)  # the worker died before the ack
    assert await setup.cancel("a") == ("finished", "succeeded")
    setup.succeeded("b")
    setup.store("b")  # a copy that was sent later
    assert await setup.cancel("b") == ("finished", "succeeded")


async def test_next_step_of_an_ended_branch_in_its_stream_is_cancelled(
    setup: Setup,
) -> None:
    setup.succeeded("tour", step=1, of=3)
    setup.succeeded("tour-2", task=I2T, step=2, of=3)
    setup.store("tour-2", task=I2T, never_delivered=False)  # the worker died before the ack
    setup.store("tour-3")
    assert await setup.cancel("tour") == ("cancelled", "cancelled")
    assert await setup.kind("tour-3") is CancelledEvent


async def test_request_that_ends_during_the_stop_request_is_finished(setup: Setup) -> None:
    setup.workers.answering.clear()
    cancelling = asyncio.create_task(setup.cancel("a"))
    await soon(setup.workers.waiting.until(1))
    setup.succeeded("a")
    setup.workers.answering.set()
    assert await soon(cancelling) == ("finished", "succeeded")


async def test_waiting_for_a_reply_does_not_count_against_the_limit(setup: Setup) -> None:
    setup.workers.answering.clear()
    unknown = [asyncio.create_task(setup.cancel(f"u{number}")) for number in range(500)]
    await soon(setup.workers.waiting.until(500))
    setup.store("a")
    assert await setup.cancel("a") == ("cancelled", "cancelled")
    assert not any(one.done() for one in unknown)
    assert setup.queue.most_lookups <= LOOKUPS
    setup.workers.answering.set()
    assert {await soon(one) for one in unknown} == {("unknown", None)}


async def test_new_cancellation_is_looked_up_before_older_ones(
    setup: Setup,
) -> None:
    """The oldest waiting cancellation is next, so no cancellation waits forever."""
    setup.workers.answering.set()
    ids = [f"u{number}" for number in range(1000)]
    tasks = [asyncio.create_task(setup.cancel(one)) for one in ids]
    await asyncio.gather(*tasks)
    order = setup.workers.stop_requests
    assert sorted(order) == sorted(ids)
    assert order[:LOOKUPS] == ids[:LOOKUPS]
    assert order.index(ids[-1]) <= LOOKUPS + 1
    assert order.index(ids[LOOKUPS]) <= LOOKUPS + 2


async def test_number_of_loaded_requests_is_limited(setup: Setup) -> None:
    for number in range(50):
        setup.store(f"a{number}")
    replies = await asyncio.gather(*(setup.cancel(f"a{number}") for number in range(50)))
    assert set(replies) == {("cancelled", "cancelled")}
    assert setup.queue.most_loaded <= LOADS


async def test_concurrent_cancellations_of_one_id_send_one_stop_request(setup: Setup) -> None:
    setup.store("a")
    replies = await asyncio.gather(*(setup.cancel("a") for _ in range(10)))
    assert set(replies) == {("cancelled", "cancelled")}
    assert setup.workers.stop_requests == ["a"]


# -- chains ---------------------------------------------------------------------------------------


async def test_queued_step_is_cancelled_by_the_id_of_its_chain(setup: Setup) -> None:
    setup.succeeded("tour", step=1, of=3)
    setup.succeeded("tour-2", task=I2T, step=2, of=3)
    setup.store("tour-3")
    assert await setup.cancel("tour") == ("cancelled", "cancelled")
    assert await setup.kind("tour-3") is CancelledEvent
    assert await setup.cancel("tour") == ("cancelled", "cancelled")


async def test_every_branch_of_a_chain_is_cancelled(setup: Setup) -> None:
    setup.succeeded("tour", step=1, of=2, images=4)
    setup.succeeded("tour-2-0", task=I2T, step=2, of=2)
    setup.store("tour-2-1", task=I2T, never_delivered=False)
    setup.store("tour-2-2", task=I2T)
    setup.store("tour-2-3", task=I2T)
    assert await setup.cancel("tour") == ("stopping", None)
    ended = [await setup.kind(f"tour-2-{n}", I2T) for n in range(4)]
    assert ended == [SucceededEvent, None, CancelledEvent, CancelledEvent]
    assert setup.world.queue.cancelled == {1}
    assert "tour-2-1" in setup.workers.stop_notices


async def test_chain_whose_next_step_is_not_queued_yet_is_stopping(setup: Setup) -> None:
    setup.succeeded("tour", step=1, of=2)
    assert await setup.cancel("tour") == ("stopping", None)


async def test_chain_that_has_ended_is_finished(setup: Setup) -> None:
    setup.succeeded("tour", step=1, of=2)
    failure = Failure.of(FailureCode.MODEL_ERROR, "it failed")
    place = ChainPlace(id="tour", step=2, of=2)
    setup.world.events.put(FailedEvent(**common("tour-2", I2T, place), failure=failure))
    assert await setup.cancel("tour") == ("finished", "failed")


async def test_id_of_a_later_step_cancels_only_that_step(setup: Setup) -> None:
    setup.succeeded("tour-2", task=I2T, step=2, of=3)
    setup.store("tour-3")
    assert await setup.cancel("tour-2") == ("finished", "succeeded")
