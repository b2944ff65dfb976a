"""One delivery owns a request id: copies and other bytes under the id store no event."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from consumer.jobs.admission import Admission
from consumer.ports.bus import QueueFull
from consumer.ports.model import ModelError
from generation_contracts import CancelledEvent, FailedEvent, SucceededEvent
from tests.support.behaviour import (
    INBOX,
    OTHER_INBOX,
    failure,
    from_now,
    request_body,
    shorten_pauses,
    soon,
)
from tests.support.memory_ports import raising
from tests.support.memory_world import MemoryWorld, Worlds


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MemoryWorld]:
    shorten_pauses(monkeypatch)
    world = MemoryWorld(most_in_flight=3)
    yield world
    world.close()


def other_bytes(**fields: Any) -> bytes:
    return json.dumps({"request_id": "a", "reply_to": OTHER_INBOX, **fields}).encode()


# Messages under the id of a running request, and the failure code of the reply.
COPIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "invalid bytes": (lambda: other_bytes(bogus=1), "invalid_request"),
    "another content": (
        lambda: request_body(width=32, reply_to=OTHER_INBOX),
        "request_id_conflict",
    ),
    "an earlier deadline": (
        lambda: request_body(deadline=from_now(seconds=0.05), reply_to=OTHER_INBOX),
        "deadline_exceeded",
    ),
    "an unsupported parameter": (
        lambda: request_body(negative_prompt="b", reply_to=OTHER_INBOX),
        "request_id_conflict",
    ),
}


@pytest.mark.parametrize("subject_id", ["a", None], ids=["id in the subject", "id in the body"])
@pytest.mark.parametrize("name", COPIES)
async def test_copy_of_a_running_request_gets_only_a_reply(
    world: MemoryWorld, name: str, subject_id: str | None
) -> None:
    make_body, code = COPIES[name]
    hold = world.runner.hold_next_run()
    await world.send(request_body(reply_to=INBOX), request_id=subject_id)
    first = asyncio.create_task(world.work())
    await soon(hold.started())
    await world.send(make_body(), request_id=subject_id)
    await soon(world.work())
    assert await world.result("a") is None, "the copy must not store an event"
    hold.release()
    await soon(first)
    done = await world.result("a")
    assert isinstance(done, SucceededEvent)
    assert {output.key for output in done.outputs} == await world.objects()  # type: ignore[union-attr]
    replies = dict(await world.replies())
    assert replies[INBOX] == done
    assert failure(replies[OTHER_INBOX]) == code
    assert await world.pending() == 0


async def test_identical_request_waits_for_the_running_request_and_gets_its_result(
    world: MemoryWorld,
) -> None:
    hold = world.runner.hold_next_run()
    await world.send(request_body(reply_to=INBOX))
    await world.send(request_body(reply_to=OTHER_INBOX))
    both = [asyncio.create_task(world.work()) for _ in range(2)]
    await soon(hold.started())
    await world.send(request_body("next"))
    third = asyncio.create_task(world.work())
    hold.release()
    await soon(asyncio.gather(*both, third))
    done = await world.result("a")
    assert sorted(await world.replies(), key=lambda one: one[0]) == [
        (INBOX, done),
        (OTHER_INBOX, done),
    ]
    assert [run.request.request_id for run in world.runner.runs] == ["a", "next"]


async def test_conflicting_ids_do_not_end_the_id_of_the_body(world: MemoryWorld) -> None:
    await world.send(request_body("victim"), request_id="attacker")
    await soon(world.work())
    assert await world.result("victim") is None
    assert failure(await world.result("attacker")) == "invalid_request"


async def test_exhausted_copy_is_not_settled_while_the_request_runs(world: MemoryWorld) -> None:
    world.workers.executors.append(world.executor)
    hold = world.runner.hold_next_run()
    await world.send(request_body())
    await world.send(request_body(reply_to=INBOX))
    first = asyncio.create_task(world.executor.handle(world.queue.take()))
    exhausted = world.queue.take()
    await soon(hold.started())
    await world.executor.handle_exhausted(exhausted)
    assert (await world.result("a"), exhausted.settlements) == (None, [])
    hold.release()
    await soon(first)
    await world.executor.handle_exhausted(exhausted)
    assert exhausted.settlements == ["ack"]
    assert await world.replies() == [(INBOX, await world.result("a"))]


@pytest.mark.parametrize(
    ("requeued", "ends"),
    [(3, SucceededEvent), (1, FailedEvent)],
    ids=["drains alone", "attempts"],
)
async def test_requeues_do_not_end_a_max_deliver_exhausted_request(
    world: MemoryWorld, requeued: int, ends: type
) -> None:
    world.queue.max_deliver = 4
    await world.send(request_body())
    for number in range(4):
        delivery = world.queue.take()
        await (delivery.requeue() if number < requeued else delivery.nak())
    (exhausted,) = world.queue.exhausted
    await world.executor.handle_exhausted(exhausted)
    while await world.pending():
        await soon(world.work())
    assert isinstance(await world.result("a"), ends)


async def test_exhausted_request_stays_in_its_stream_if_the_retries_stream_is_full(
    world: MemoryWorld,
) -> None:
    world.queue.max_deliver = 1
    await world.send(request_body())
    await world.queue.take().requeue()
    (exhausted,) = world.queue.exhausted
    world.events.retries_full = QueueFull()
    await world.executor.handle_exhausted(exhausted)
    assert (exhausted.settlements, await world.result("a")) == (["requeue"], None)


# -- between workers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("copy", "code"),
    [
        (other_bytes(bogus=1), "invalid_request"),
        (request_body(width=32, reply_to=OTHER_INBOX), "request_id_conflict"),
    ],
)
async def test_copy_stores_no_event_while_the_older_message_is_in_the_stream(
    world: MemoryWorld, copy: bytes, code: str
) -> None:
    await world.send(request_body(), request_id="a")
    await world.send(copy, request_id="a")
    older = world.queue.take()  # by another worker
    await soon(world.work())
    assert await world.result("a") is None
    ((subject, reply),) = await world.replies()
    assert (subject, failure(reply)) == (OTHER_INBOX, code)
    await soon(world.executor.handle(older))
    assert isinstance(await world.result("a"), SucceededEvent)


async def test_copy_is_retried_while_another_worker_handles_the_older_message(
    world: MemoryWorld,
) -> None:
    await world.send(request_body(), request_id="a")
    await world.send(request_body(reply_to=OTHER_INBOX), request_id="a")
    older = world.queue.take()
    for _ in range(2):  # the copy neither runs nor waits in this worker
        await soon(world.work())
    assert world.runner.runs == []
    await soon(world.executor.handle(older))
    await soon(world.work())
    assert await world.replies() == [(OTHER_INBOX, await world.result("a"))]
    assert len(world.runner.runs) == 1
    assert await world.pending() == 0
    done = await world.result("a")
    assert done is not None
    assert done.attempt == 1


@pytest.mark.parametrize(
    ("copy", "code"),
    [
        (other_bytes(bogus=1), "invalid_request"),
        (request_body(width=32, reply_to=OTHER_INBOX), "request_id_conflict"),
        (request_body(deadline="2020-01-01T00:00:00Z", reply_to=OTHER_INBOX), "deadline_exceeded"),
    ],
    ids=["invalid bytes", "another content", "another deadline"],
)
async def test_request_that_waits_for_a_retry_keeps_its_id(
    world: MemoryWorld, copy: bytes, code: str
) -> None:
    """A copy that is queued before the retry does not take the id."""
    world.runner.script_runs(raising(lambda: ModelError("E")))
    await world.send(request_body(), request_id="a")
    await soon(world.work())
    retried = world.queue.take()
    await world.send(copy, request_id="a")
    copied = world.queue.take()
    world.queue.drop_other_deliveries(copied)
    await soon(world.executor.handle(copied))
    ((_, reply),) = await world.replies()
    assert failure(reply) == code
    assert await world.result("a") is None
    await soon(world.executor.handle(retried))
    assert isinstance(await world.result("a"), SucceededEvent)


async def test_retried_request_and_its_copy_end_if_both_fail_before_the_run(
    world: MemoryWorld,
) -> None:
    """Two copies must not wait for each other forever."""
    world.runner.script_runs(*[raising(lambda: ModelError("E"))] * 2)
    for _ in range(2):
        await world.send(request_body(deadline=from_now(seconds=0.3)), request_id="a")
    for _ in range(2):
        await soon(world.work())
    await asyncio.sleep(0.3)  # the deadline passes
    while await world.pending():
        await soon(world.work())
    assert failure(await world.result("a")) == "deadline_exceeded"


# -- requeued, retried, cancelled early -----------------------------------------------------------


async def test_requeued_request_is_not_isolated(world: MemoryWorld) -> None:
    """After a rollout requests run in parallel and in batches again."""
    await world.send(request_body())
    await world.queue.take().requeue()
    hold = world.runner.hold_next_run()
    requeued = asyncio.create_task(world.work())
    await soon(hold.started())
    await soon(world.executor.room())  # an isolated request admits no others
    hold.release()
    await soon(requeued)


async def test_cancellation_that_arrives_before_its_request_takes_effect(
    world: MemoryWorld,
) -> None:
    assert await world.executor.request_stop("a") is None
    await world.send(request_body(reply_to=INBOX))
    await soon(world.work())
    assert isinstance(await world.result("a"), CancelledEvent)
    assert world.runner.runs == []


async def test_request_that_waits_for_a_retry_can_be_cancelled(world: MemoryWorld) -> None:
    """The cancellation also works if all workers were restarted meanwhile."""
    world.runner.script_runs(raising(lambda: ModelError("E")))
    await world.send(request_body(), request_id="a")
    await soon(world.work())
    await world.queue.cancel_retry(world.task, "a")
    await soon(world.work())
    assert isinstance(await world.result("a"), CancelledEvent)
    assert len(world.runner.runs) == 1


async def test_chain_id_cancels_a_later_step(world: MemoryWorld) -> None:
    step = request_body("tour-2", chain={"id": "tour", "step": 2})
    hold = world.runner.hold_next_run()
    await world.send(step)
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    assert await world.executor.request_stop("tour") is not None
    await soon(working)
    assert isinstance(await world.result("tour-2"), CancelledEvent)


# -- the store ------------------------------------------------------------------------------------


async def test_unreadable_input_of_an_available_store_fails_at_once(
    make_world: Worlds,
) -> None:
    world = await make_world(task="image_to_text", most_in_flight=3)
    world.artifacts.unreadable.add("broken")
    await world.put_object("good", world.image_file)
    for name in ("broken", "good"):
        await world.send(request_body(name, images=[world.source(name)]))
    await soon(asyncio.gather(world.work(), world.work()))
    assert failure(await world.result("broken")) == "input_unavailable"
    assert isinstance(await world.result("good"), SucceededEvent)


@pytest.mark.parametrize("idle", [True, False])
async def test_output_that_cannot_be_stored_is_requeued_if_another_worker_is_idle(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch, *, idle: bool
) -> None:
    monkeypatch.setattr("consumer.jobs.image_stages.HANDOVER_DELAY", 0.0)
    world.workers.idle = idle
    world.store.begin()
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    await soon(world.artifacts.calls.until(3) if not idle else working)
    assert world.executor.waits_for_store is not idle
    world.store.end()
    await soon(working)
    assert world.settlements == (["requeue"] if idle else ["ack"])
    assert isinstance(await world.result("a"), type(None) if idle else SucceededEvent)


async def test_delivery_that_cannot_be_opened_occupies_no_slot(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError

    world = await make_world()
    await world.send(request_body())
    monkeypatch.setattr(Admission, "open", broken)
    with pytest.raises(KeyError):
        await world.executor.handle(world.queue.take())
    await soon(world.executor.room())
