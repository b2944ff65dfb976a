"""What the canceller does with a request, by where the request is and what the workers answer."""

import asyncio
import json
from typing import Any

import pytest

from consumer import cancellation
from consumer.admission import Admission
from consumer.cancellation import LOADS, LOOKUPS, Cancellation, Ending
from consumer.conclusion import Conclusion
from consumer.ports import Delivery, Found, Grip, StoredRequest
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
from generation_contracts.events import ChainPlace, Timings
from tests.support.behaviour import soon
from tests.support.memory_ports import URL_ENDS, Hold, MemoryDelivery, ScriptedRunner, Tally
from tests.support.memory_world import MemoryWorld, Worlds

T2I, I2T = Task.TEXT_TO_IMAGE, Task.IMAGE_TO_TEXT
Stored = dict[tuple[Task, str], list[tuple[MemoryDelivery, bool]]]


class Queue:
    """Both request streams: deliveries with whether they are untouched, oldest first."""

    def __init__(self, world: MemoryWorld) -> None:
        self.retries: dict[tuple[Task, str], str] = {}
        self.cancelled_retries: list[tuple[Task, str]] = []
        self.stored: Stored = {}
        self.loaded = 0
        self.most_loaded = 0
        self.looking = 0
        self.most_looking = 0
        self._world = world

    async def find(self, request_id: str) -> Found:
        self.looking += 1
        self.most_looking = max(self.most_looking, self.looking)
        await asyncio.sleep(0)
        self.looking -= 1
        requests = frozenset(task for task in Task if self.stored.get((task, request_id)))
        return Found(requests, await self.find_results(request_id))

    async def find_results(self, request_id: str) -> frozenset[Task]:
        return frozenset(t for t in Task if self._world.events.stored(t, request_id) is not None)

    async def oldest(self, task: Task, request_id: str) -> StoredRequest | None:
        self.loaded += 1
        self.most_loaded = max(self.most_loaded, self.loaded)
        await asyncio.sleep(0)
        stored = self.stored.get((task, request_id))
        self.loaded -= 1
        return StoredRequest(*stored[0]) if stored else None

    async def older(self, task: Task, request_id: str, than: Delivery) -> None:
        raise AssertionError("the canceller does not ask that")

    async def owner(self, task: Task, request_id: str) -> str | None:
        return self.retries.get((task, request_id))

    async def cancel_retry(self, task: Task, request_id: str) -> None:
        self.cancelled_retries.append((task, request_id))


class Workers:
    """All workers; what they answer, by request id."""

    def __init__(self) -> None:
        self.answers: dict[str, Grip] = {}
        self.asked: list[str] = []
        self.told: list[str] = []
        self.waiting = Tally()
        self.silent = asyncio.Event()  # not set: they keep a question waiting

    async def ask(self, request_id: str) -> "asyncio.Future[Grip | None]":
        self.asked.append(request_id)
        return asyncio.ensure_future(self._answer(request_id))

    async def _answer(self, request_id: str) -> Grip | None:
        if request_id not in self.answers:
            self.waiting.add()
            await self.silent.wait()
        return self.answers.get(request_id)

    async def tell(self, request_id: str) -> None:
        self.told.append(request_id)

    async def holds(self, request_id: str) -> bool:
        raise AssertionError("the canceller does not ask that")

    async def others_idle(self) -> bool:
        raise AssertionError("the canceller does not ask that")


class Setting:
    """A canceller with everything around it."""

    def __init__(self, world: MemoryWorld) -> None:
        self.world = world
        self.queue = Queue(world)
        self.workers = Workers()
        self.workers.silent.set()
        self.canceller = Cancellation(
            queue=self.queue,
            workers=self.workers,
            events=world.events,
            endings={task: self._ending(task) for task in Task},
        )

    def _ending(self, task: Task) -> Ending:
        conclusion = Conclusion(
            task=task,
            worker="canceller",
            model=self.world.runner.load(),
            events=self.world.events,
            artifacts=self.world.artifacts,
            max_attempts=3,
            retry_delay=0.0,
            observer=self.world.observer,
        )
        return Ending(Admission(task, self.world.subjects, ("_INBOX.",)), conclusion)

    def store(
        self, stored_as: str, *, task: Task = T2I, untouched: bool = True, **fields: Any
    ) -> MemoryDelivery:
        """Put a request into its stream."""
        body = {"prompt": "a", **({} if task is T2I else {"images": ["s3://b/k"]}), **fields}
        subject = self.world.subjects.request(task, stored_as)
        self.world.queue.publish(subject, json.dumps(body).encode(), {})
        delivery = self.world.queue.take()
        self.queue.stored.setdefault((task, stored_as), []).append((delivery, untouched))
        return delivery

    def succeeded(self, request_id: str, *, task: Task = T2I, **fields: Any) -> None:
        """Store a request's success."""
        self.world.events.put(succeeded(request_id, task, **fields))

    async def cancel(self, request_id: str) -> tuple[str, str | None]:
        """Cancel; status and result of the reply."""
        reply = await soon(self.canceller.cancel(request_id))
        assert reply.request_id == request_id
        result = reply.result
        return reply.status, None if result is None else result.rpartition(".")[2]

    async def kind(self, request_id: str, task: Task = T2I) -> type | None:
        """What stands as the terminal event."""
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
async def setting(make_world: Worlds, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(cancellation, "ENDS_WITHIN", 0.01)
    monkeypatch.setattr(cancellation, "LOOK_EVERY", 0.001)
    return Setting(await make_world())


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (None, ("stopping", None)),  # deaf or dead: the mark is for its successor
        (Grip.STOPPING, ("stopping", None)),
        (Grip.ENDING, ("stopping", None)),  # the attempt has failed, and the next one is marked
    ],
)
async def test_delivered_request_is_marked_and_never_ended_by_the_canceller(
    setting: Setting, answer: Grip | None, reply: tuple[str, str | None]
) -> None:
    setting.store("a", untouched=False)
    if answer is not None:
        setting.workers.answers["a"] = answer
    assert await setting.cancel("a") == reply
    assert setting.world.queue.withdrawn == {1}
    assert await setting.kind("a") is None
    assert len(setting.world.queue) == 1


async def test_cancelled_is_not_stored_while_a_deaf_worker_runs_the_request(
    setting: Setting,
) -> None:
    world = setting.world
    hold: Hold = world.runner.will_hold(heeds=False)
    await world.send(b'{"prompt":"a"}', request_id="a")
    working = asyncio.create_task(world.work())
    await soon(hold.begun())
    assert world.delivery is not None
    setting.queue.stored[T2I, "a"] = [(world.delivery, False)]
    assert await setting.cancel("a") == ("stopping", None)
    assert await world.result("a") is None
    hold.release()
    await soon(working)
    assert await world.result("a") is not None


async def test_untouched_request_is_ended_after_all_workers_have_been_asked(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = setting.store("a")
    oldest, asked_before = setting.queue.oldest, []

    async def look(task: Task, request_id: str) -> StoredRequest | None:
        asked_before.extend(setting.workers.asked)
        return await oldest(task, request_id)

    monkeypatch.setattr(setting.queue, "oldest", look)
    setting.workers.silent.clear()  # nothing is waited for
    assert await setting.cancel("a") == ("cancelled", "cancelled")
    assert asked_before == ["a"]
    assert delivery.settlements == ["ack"]
    assert setting.workers.told == ["a"]  # a worker may have started meanwhile


async def test_only_the_oldest_of_many_copies_is_loaded_and_ended(setting: Setting) -> None:
    deliveries = [setting.store("a") for _ in range(20)]
    assert await setting.cancel("a") == ("cancelled", "cancelled")
    assert [len(one.settlements) for one in deliveries] == [1] + [0] * 19


async def test_untouched_request_that_is_invalid_is_cancelled_too(setting: Setting) -> None:
    setting.store("a", width="wide")
    assert await setting.cancel("a") == ("cancelled", "cancelled")


async def test_request_whose_body_names_another_id_ends_only_that_of_its_subject(
    setting: Setting,
) -> None:
    setting.store("mine", request_id="yours")
    assert await setting.cancel("mine") == ("cancelled", "cancelled")
    assert (await setting.kind("mine"), await setting.kind("yours")) == (CancelledEvent, None)


async def test_request_that_waits_for_its_next_attempt_is_marked(setting: Setting) -> None:
    setting.queue.retries[T2I, "a"] = "sha256:0"
    assert await setting.cancel("a") == ("stopping", None)
    assert setting.queue.cancelled_retries == [(T2I, "a")]


async def test_ended_requests_are_finished_or_cancelled_without_a_wait(setting: Setting) -> None:
    setting.succeeded("done")
    setting.world.events.put(CancelledEvent(**common("gone", T2I)))
    setting.workers.silent.clear()
    assert await setting.cancel("done") == ("finished", "succeeded")
    assert await setting.cancel("gone") == ("cancelled", "cancelled")
    assert setting.world.queue.withdrawn == set()


async def test_running_request_that_ends_at_once_is_said_to_stop(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply does not depend on whether the worker or the lookup is quicker."""
    find = setting.queue.find

    async def found_after_the_end(request_id: str) -> Found:
        setting.world.events.put(CancelledEvent(**common("a", T2I)))
        return await find(request_id)

    monkeypatch.setattr(setting.queue, "find", found_after_the_end)
    setting.workers.answers["a"] = Grip.STOPPING
    assert await setting.cancel("a") == ("stopping", None)


async def test_ended_request_that_is_still_in_its_stream_is_finished(setting: Setting) -> None:
    setting.succeeded("a")
    setting.store("a", untouched=False)  # its worker died before the ack
    assert await setting.cancel("a") == ("finished", "succeeded")
    setting.succeeded("b")
    setting.store("b")  # a copy that was sent later
    assert await setting.cancel("b") == ("finished", "succeeded")


async def test_branch_that_has_ended_and_is_still_in_its_stream_is_followed(
    setting: Setting,
) -> None:
    setting.succeeded("tour", step=1, of=3)
    setting.succeeded("tour-2", task=I2T, step=2, of=3)
    setting.store("tour-2", task=I2T, untouched=False)  # its worker died before the ack
    setting.store("tour-3")
    assert await setting.cancel("tour") == ("cancelled", "cancelled")
    assert await setting.kind("tour-3") is CancelledEvent


async def test_request_that_ends_while_a_worker_is_asked_is_finished(setting: Setting) -> None:
    setting.workers.silent.clear()
    cancelling = asyncio.create_task(setting.cancel("a"))
    await soon(setting.workers.waiting.until(1))
    setting.succeeded("a")
    setting.workers.silent.set()
    assert await soon(cancelling) == ("finished", "succeeded")


async def test_unknown_ids_that_are_waited_for_hold_no_place(setting: Setting) -> None:
    setting.workers.silent.clear()
    unknown = [asyncio.create_task(setting.cancel(f"u{number}")) for number in range(500)]
    await soon(setting.workers.waiting.until(500))
    setting.store("a")
    assert await setting.cancel("a") == ("cancelled", "cancelled")
    assert not any(one.done() for one in unknown)
    assert setting.queue.most_looking <= LOOKUPS
    setting.workers.silent.set()
    assert {await soon(one) for one in unknown} == {("unknown", None)}


async def test_new_cancellation_is_looked_up_before_those_that_wait_for_a_place(
    setting: Setting,
) -> None:
    """And the oldest one next: none waits for ever."""
    setting.workers.silent.set()
    ids = [f"u{number}" for number in range(1000)]
    tasks = [asyncio.create_task(setting.cancel(one)) for one in ids]
    await asyncio.gather(*tasks)
    order = setting.workers.asked
    assert sorted(order) == sorted(ids)
    assert order[:LOOKUPS] == ids[:LOOKUPS]
    assert order.index(ids[-1]) <= LOOKUPS + 1
    assert order.index(ids[LOOKUPS]) <= LOOKUPS + 2


async def test_few_bodies_are_in_memory_at_the_same_time(setting: Setting) -> None:
    for number in range(50):
        setting.store(f"a{number}")
    replies = await asyncio.gather(*(setting.cancel(f"a{number}") for number in range(50)))
    assert set(replies) == {("cancelled", "cancelled")}
    assert setting.queue.most_loaded <= LOADS


async def test_cancellations_of_one_id_at_the_same_time_share_their_work(setting: Setting) -> None:
    setting.store("a")
    replies = await asyncio.gather(*(setting.cancel("a") for _ in range(10)))
    assert set(replies) == {("cancelled", "cancelled")}
    assert setting.workers.asked == ["a"]


# -- chains ---------------------------------------------------------------------------------------


async def test_step_that_waits_is_ended_by_the_chains_id(setting: Setting) -> None:
    setting.succeeded("tour", step=1, of=3)
    setting.succeeded("tour-2", task=I2T, step=2, of=3)
    setting.store("tour-3")
    assert await setting.cancel("tour") == ("cancelled", "cancelled")
    assert await setting.kind("tour-3") is CancelledEvent
    assert await setting.cancel("tour") == ("cancelled", "cancelled")


async def test_every_branch_of_a_chain_is_cancelled(setting: Setting) -> None:
    setting.succeeded("tour", step=1, of=2, images=4)
    setting.succeeded("tour-2-0", task=I2T, step=2, of=2)
    setting.store("tour-2-1", task=I2T, untouched=False)
    setting.store("tour-2-2", task=I2T)
    setting.store("tour-2-3", task=I2T)
    assert await setting.cancel("tour") == ("stopping", None)
    ended = [await setting.kind(f"tour-2-{n}", I2T) for n in range(4)]
    assert ended == [SucceededEvent, None, CancelledEvent, CancelledEvent]
    assert setting.world.queue.withdrawn == {1}
    assert "tour-2-1" in setting.workers.told


async def test_chain_whose_next_step_is_not_queued_yet_is_stopping(setting: Setting) -> None:
    setting.succeeded("tour", step=1, of=2)
    assert await setting.cancel("tour") == ("stopping", None)


async def test_chain_that_has_ended_is_finished(setting: Setting) -> None:
    setting.succeeded("tour", step=1, of=2)
    failure = Failure.of(FailureCode.MODEL_ERROR, "it failed")
    place = ChainPlace(id="tour", step=2, of=2)
    setting.world.events.put(FailedEvent(**common("tour-2", I2T, place), failure=failure))
    assert await setting.cancel("tour") == ("finished", "failed")


async def test_id_of_a_later_step_stands_for_that_step_alone(setting: Setting) -> None:
    setting.succeeded("tour-2", task=I2T, step=2, of=3)
    setting.store("tour-3")
    assert await setting.cancel("tour-2") == ("finished", "succeeded")
