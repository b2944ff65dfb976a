"""The end of a job: the order of its steps, exactly one settlement, and lease renewals."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from unittest.mock import AsyncMock

import pytest

from consumer.inference.cancel_token import StopReason
from consumer.jobs import executor
from consumer.ports.bus import QueueFull
from consumer.ports.model import DeviceLost, ModelError
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    Failure,
    FailureCode,
    SucceededEvent,
    Task,
    decode_request,
    encode,
    request_digest,
)
from tests.support.behaviour import INBOX, failure, request_body, soon, while_running
from tests.support.memory_ports import Hold, Script, out_of_memory, raising
from tests.support.memory_world import MemoryWorld, Worlds

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BEAT_SOON = 0.01  # seconds of ack_wait

pytestmark = pytest.mark.usefixtures("short_pauses")


def beating() -> bool:
    """Return whether a task still renews a lease."""
    return any(task.get_name() == "heartbeat" for task in asyncio.all_tasks())


def digest_of(body: bytes) -> str:
    return request_digest(decode_request(Task.TEXT_TO_IMAGE, body))


def another_workers_event(digest: str) -> CancelledEvent:
    return CancelledEvent(
        request_id="a",
        task=Task.TEXT_TO_IMAGE,
        sequence=9,
        time=datetime.now(UTC),
        worker="worker-2",
        attempt=1,
        request_digest=digest,
    )


# -- the order ------------------------------------------------------------------------------------

ERROR = raising(lambda: ModelError("E"))
FAULT = raising(lambda: KeyError("E"))
ORDERS: list[tuple[str, list[Script], int, list[str]]] = [
    ("done", [], 1, ["store", "publish succeeded", "reply succeeded", "ack"]),
    ("expired", [], 1, ["publish failed", "reply failed", "ack"]),
    (
        "invalid",
        [],
        1,
        ["dead_letter", "publish failed", "reply failed", "term invalid_request"],
    ),
    (
        "model error",
        [ERROR] * 3,
        3,
        ["retry", "ack"] * 2
        + ["dead_letter", "publish failed", "reply failed", "term model_error"],
    ),
    (
        "internal error",
        [FAULT] * 3,
        3,
        ["retry", "ack"] * 2 + ["dead_letter", "publish failed", "reply failed", "term internal"],
    ),
    (
        "worker lost",
        [raising(DeviceLost)] * 3,
        4,
        ["nak"] * 3 + ["dead_letter", "publish failed", "reply failed", "term worker_lost"],
    ),
    ("out of memory", [raising(out_of_memory)] * 2, 1, ["publish failed", "reply failed", "ack"]),
]
BODIES = {
    "expired": request_body(reply_to=INBOX, deadline="2020-01-01T00:00:00Z"),
    "invalid": request_body(reply_to=INBOX, width=1),
}


@pytest.mark.parametrize(
    ("what", "scripts", "deliveries", "journal"), ORDERS, ids=[row[0] for row in ORDERS]
)
async def test_settlement_is_the_last_step_and_happens_once(
    world: MemoryWorld, what: str, scripts: list[Script], deliveries: int, journal: list[str]
) -> None:
    world.runner.script_runs(*scripts)
    await world.send(BODIES.get(what, request_body(reply_to=INBOX)))
    for _ in range(deliveries):
        await soon(world.work())
        assert len(world.settlements) == 1
    assert world.journal == journal
    assert len(world.queue) == 0


async def test_second_copy_gets_a_reply_and_is_settled(world: MemoryWorld) -> None:
    for _ in range(2):
        await world.send(request_body(reply_to=INBOX))
        await soon(world.work())
    assert world.journal[4:] == ["reply succeeded", "ack"]


async def test_conflict_gets_a_reply_and_is_settled(world: MemoryWorld) -> None:
    for width in (16, 32):
        await world.send(request_body(reply_to=INBOX, width=width))
        await soon(world.work())
    assert world.journal[4:] == ["reply failed", "ack"]


async def test_request_without_reply_subject_gets_no_reply(world: MemoryWorld) -> None:
    await world.send(request_body())
    await soon(world.work())
    assert world.journal == ["store", "publish succeeded", "ack"]


async def test_job_report_contains_whether_the_request_was_dead_lettered(
    world: MemoryWorld,
) -> None:
    for body in (b"no request", request_body("good")):
        await world.send(body)
        await soon(world.work())
    assert [one.dead_letter for one in world.observer.reports] == [True, False]


async def test_every_message_has_the_trace_parent(world: MemoryWorld) -> None:
    await world.send(request_body(reply_to=INBOX), headers={"traceparent": TRACE})
    await soon(world.work())
    assert world.events.trace_parents == [TRACE] * 4  # started, progress, stored, replied


async def test_message_id_of_the_sender_becomes_the_request_id(world: MemoryWorld) -> None:
    await world.send(request_body(None), headers={"Nats-Msg-Id": "a"})
    await soon(world.work())
    assert isinstance(await world.result("a"), SucceededEvent)


# -- seeds ----------------------------------------------------------------------------------------


async def test_seed_is_constant_over_attempts_and_differs_between_requests(
    world: MemoryWorld,
) -> None:
    world.runner.script_runs(ERROR, ERROR)
    for body in (request_body("a"), request_body("b"), request_body("c", seed=7)):
        await world.send(body)
    while await world.pending():
        await soon(world.work())
    seeds: dict[str, list[int | None]] = {}
    for run in world.runner.runs:
        seeds.setdefault(run.request.request_id or "", []).append(run.request.seed)
    assert len(world.runner.runs) == 5
    assert {request_id: len(set(used)) for request_id, used in seeds.items()} == {
        "a": 1,
        "b": 1,
        "c": 1,
    }
    assert seeds["a"][0] != seeds["b"][0]
    assert None not in {seeds["a"][0], seeds["b"][0]}
    assert seeds["c"] == [7]
    done = await world.result("a")
    assert done is not None
    assert done.request_digest == digest_of(request_body("a")), (
        "the random seed is not part of the digest"
    )


# -- results of other workers ---------------------------------------------------------------------


def store_and_release(world: MemoryWorld, hold: Hold, event: CancelledEvent) -> Callable[[], None]:
    def act() -> None:
        assert world.events.put(event)
        hold.release()

    return act


async def test_event_that_another_worker_stored_first_is_the_reply(
    world: MemoryWorld,
) -> None:
    hold = world.runner.hold_next_run()
    await world.send(body := request_body(reply_to=INBOX))
    other = another_workers_event(digest_of(body))
    await while_running(world, hold, store_and_release(world, hold, other))
    assert await world.result("a") == other
    assert world.events.replies == [(INBOX, other)]
    assert world.journal == ["store", "fenced", "reply cancelled", "ack", "discard"]
    assert await world.objects() == set(), "no event mentions the objects"


async def test_event_of_another_request_is_never_the_reply_to_a_succeeded_request(
    world: MemoryWorld,
) -> None:
    hold = world.runner.hold_next_run()
    await world.send(request_body(reply_to=INBOX))
    other = another_workers_event(digest_of(request_body(width=32)))
    await while_running(world, hold, store_and_release(world, hold, other))
    assert await world.result("a") == other
    ((_, reply),) = world.events.replies
    assert failure(reply) == "request_id_conflict"
    assert world.settlements == ["ack"]


async def test_event_of_another_request_is_never_the_reply_to_an_invalid_request(
    world: MemoryWorld,
) -> None:
    await world.send(request_body(reply_to="_INBOX.first"))
    await world.send(request_body(reply_to=INBOX, width=1))
    for _ in range(2):
        await soon(world.work())
    first = await world.result("a")
    assert isinstance(first, SucceededEvent)
    (_, (subject, reply)) = world.events.replies
    assert (subject, failure(reply)) == (INBOX, "invalid_request")
    assert [letter.code for letter, _ in world.events.letters] == ["invalid_request"]


async def test_redelivered_invalid_request_gets_the_stored_event(world: MemoryWorld) -> None:
    await world.send(request_body(reply_to=INBOX, width=1))
    replies = world.events.replies
    first = world.queue.take()
    await soon(world.executor.handle(first))
    world.queue.publish(first.subject, first.body, first.headers)
    await soon(world.work())
    assert [event for _, event in replies] == [await world.result("a")] * 2


# -- failures between two steps -------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [ConnectionError("closed"), RuntimeError("odd")],
    ids=lambda error: type(error).__name__,
)
async def test_request_whose_event_cannot_be_stored_is_left_unsettled(
    world: MemoryWorld, error: Exception
) -> None:
    world.events.publish_error = error
    await world.send(request_body())
    assert await soon(world.work()) is None
    assert world.settlements == []
    assert world.observer.outcomes == ["abandoned"]
    assert not beating()
    world.events.publish_error = None
    world.queue.expire_leases()
    await soon(world.work())
    assert isinstance(await world.result("a"), SucceededEvent)


async def test_request_whose_finalization_always_fails_is_dead_lettered(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the request would block later requests until `max_deliver`."""
    monkeypatch.setattr(world.events, "reply", AsyncMock(side_effect=RuntimeError("odd")))
    await world.send(request_body(reply_to=INBOX))
    for _ in range(4):
        await soon(world.work())
        world.queue.expire_leases()
    assert world.observer.outcomes == ["abandoned"] * 3 + ["internal"]
    assert world.settlements == ["term internal"]
    ((letter, _),) = await world.dead_letters()
    assert letter.code == "internal"
    assert isinstance(await world.result("a"), SucceededEvent), "the stored event stays"
    assert len(world.queue) == 0


async def test_chain_ends_if_its_next_step_cannot_be_queued(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.events, "publish_request", AsyncMock(side_effect=KeyError("odd")))
    slip = [{"task": "text_to_image", "prompt": "as a woodcut"}]
    await world.send(request_body(reply_to=INBOX, then=slip))
    for _ in range(4):
        await soon(world.work())
        world.queue.expire_leases()
    ((_, reply),) = world.events.replies
    assert (reply.request_id, failure(reply)) == ("a-2", "internal")
    assert await world.result("a-2") == reply
    assert len(world.queue) == 0


async def test_failed_finalization_next_to_other_jobs_counts_as_an_attempt(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world(most_in_flight=3)
    world.store.begin()
    await world.send(request_body("other"))
    other = asyncio.create_task(world.work())
    await soon(world.artifacts.calls.until(1))
    await world.send(request_body(reply_to=INBOX, prompt=""))  # fails before the job is isolated
    monkeypatch.setattr(world.events, "reply", AsyncMock(side_effect=RuntimeError("odd")))
    for _ in range(4):
        delivery = world.queue.take()
        await soon(world.executor.handle(delivery))
        if delivery in world.queue.in_flight:
            world.queue.expire_lease(delivery)
    assert world.observer.outcomes == ["abandoned"] * 3 + ["internal"]
    world.store.end()
    await soon(other)


async def test_request_that_cannot_be_dead_lettered_is_not_settled(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = AsyncMock(side_effect=RuntimeError("odd"))
    monkeypatch.setattr(world.events, "reply", broken)
    monkeypatch.setattr(world.events, "dead_letter", broken)
    await world.send(request_body(reply_to=INBOX))
    for _ in range(5):
        await soon(world.work())
        world.queue.expire_leases()
    assert world.observer.outcomes == ["abandoned"] * 5
    assert len(world.queue) == 1


async def test_redelivery_after_a_failed_settlement_gets_the_stored_event(
    world: MemoryWorld,
) -> None:
    await world.send(request_body(reply_to=INBOX))
    delivery = world.queue.take()
    delivery.settle_error = ConnectionError("closed")
    assert await soon(world.executor.handle(delivery)) is None
    assert world.observer.outcomes == ["abandoned"]
    world.queue.expire_leases()
    await soon(world.work())
    assert len(world.runner.runs) == 1
    assert [event for _, event in world.events.replies] == [await world.result("a")] * 2
    assert len(world.queue) == 0


async def test_lost_device_ends_the_worker_even_if_the_request_cannot_be_requeued(
    world: MemoryWorld,
) -> None:
    world.runner.script_runs(raising(DeviceLost))
    await world.send(request_body())
    delivery = world.queue.take()
    delivery.settle_error = ConnectionError("closed")
    assert await soon(world.executor.handle(delivery)) == 70
    assert world.observer.outcomes == ["abandoned"]


async def test_lease_is_renewed_during_a_bus_outage(make_world: Worlds) -> None:
    world = await make_world(ack_wait=BEAT_SOON)
    hold = world.runner.hold_next_run()
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    world.bus.begin()
    hold.release()
    await soon(world.artifacts.calls.until(1))
    assert world.delivery is not None
    await soon(world.delivery.renewals.more(3))
    assert world.settlements == []
    world.bus.end()
    await soon(working)
    assert isinstance(await world.result("a"), SucceededEvent)
    assert len(world.runner.runs) == 1
    assert world.settlements == ["ack"]


# -- the lease ------------------------------------------------------------------------------------


async def test_lease_is_renewed_during_a_run_and_a_store_outage(
    make_world: Worlds,
) -> None:
    world = await make_world(ack_wait=BEAT_SOON)
    hold = world.runner.hold_next_run()
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    assert world.delivery is not None
    await soon(world.delivery.renewals.more(3))
    world.store.begin()
    hold.release()
    await soon(world.until_store_call_fails())
    await soon(world.delivery.renewals.more(3))
    world.store.end()
    await soon(working)
    assert not beating()
    assert len(world.runner.runs) == 1


async def test_lease_of_a_stalled_run_expires(make_world: Worlds) -> None:
    world = await make_world(stall_timeout=0.02, ack_wait=BEAT_SOON)
    world.runner.hold_next_run(polls_cancel=False)
    await world.send(request_body())
    assert await soon(world.work()) == 70
    assert world.settlements == []
    assert not beating()


# -- cancelled tasks ------------------------------------------------------------------------------


async def cancel(working: "asyncio.Task[int | None]") -> None:
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(working)


async def test_cancelled_task_requeues_the_request(world: MemoryWorld) -> None:
    hold = world.runner.hold_next_run(polls_cancel=False)
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    await cancel(working)
    assert world.settlements == ["requeue"]
    assert not beating()
    assert not world.executor.interrupt(StopReason.CANCEL)
    assert world.observer.outcomes == ["requeued"]


@pytest.mark.parametrize(
    "error", [None, ConnectionError("closed")], ids=["bus outage", "bus closed"]
)
async def test_cancelled_task_ends_if_the_request_cannot_be_requeued(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    monkeypatch.setattr(executor, "RELEASE_TIMEOUT", 0.001)
    hold = world.runner.hold_next_run(polls_cancel=False)
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    await soon(hold.started())
    assert world.delivery is not None
    world.delivery.settle_error = error
    if error is None:
        world.bus.begin()
    await cancel(working)
    assert world.settlements == []
    assert world.observer.outcomes == ["abandoned"]


@pytest.mark.parametrize("script", [None, "hangs"])
async def test_cancellation_after_the_end_of_a_job_does_not_settle_again(
    make_world: Worlds, script: str | None
) -> None:
    world = await make_world(stall_timeout=0.02 if script else 60.0)
    if script:
        world.runner.hold_next_run(polls_cancel=False)
    await world.send(request_body())
    working = asyncio.create_task(world.work())
    at_end: Callable[[], None] = working.cancel  # type: ignore[assignment]
    world.executor._finalizer = CancelAfterFinalize(world, at_end)  # type: ignore[assignment]
    with pytest.raises(asyncio.CancelledError):
        await soon(working)
    assert world.settlements == ([] if script else ["ack"])
    assert world.observer.outcomes == ["abandoned" if script else "succeeded"]


class CancelAfterFinalize:
    """Cancels the task after the settlement of the job and before the end of the lease."""

    def __init__(self, world: MemoryWorld, cancel_task: Callable[[], None]) -> None:
        self._real = world.executor._finalizer
        self._cancel = cancel_task
        self.event_fields = self._real.event_fields

    async def finalize(self, *args: object) -> object:
        decision = await self._real.finalize(*args)  # type: ignore[arg-type]
        self._cancel()
        return decision


# -- large events and full queues -----------------------------------------------------------------


async def test_failure_that_is_too_large_is_stored_without_the_senders_metadata(
    world: MemoryWorld,
) -> None:
    world.events.max_payload = 4_096
    await world.send(request_body(metadata={str(n): "x" * 512 for n in range(16)}))
    await soon(world.work())
    event = await world.result("a")
    assert isinstance(event, FailedEvent)
    assert (event.failure.code, event.metadata) == (FailureCode.INTERNAL, {})
    assert world.settlements == ["ack"]


async def test_request_whose_failure_cannot_be_stored_is_acknowledged(
    world: MemoryWorld,
) -> None:
    world.events.max_payload = 10
    await world.send(request_body())
    await soon(world.work())
    assert world.settlements == ["ack"]
    assert world.journal == ["store", "ack"]


async def test_second_attempt_at_a_failed_request_gets_the_failure(world: MemoryWorld) -> None:
    await world.send(body := request_body(reply_to=INBOX))
    event = FailedEvent(
        **another_workers_event(digest_of(body)).model_dump(exclude={"type"}),
        failure=Failure.of(FailureCode.MODEL_ERROR, "the model failed on this request"),
    )
    assert world.events.put(event)
    await soon(world.work())
    assert world.events.replies == [(INBOX, event)]
    assert world.runner.runs == []


async def test_failed_step_of_a_full_queue_keeps_its_result_when_it_is_queued_later(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    slip = [{"task": "text_to_image", "prompt": "as a woodcut"}]
    with monkeypatch.context() as full:
        full.setattr(world.events, "publish_request", AsyncMock(side_effect=QueueFull))
        await world.send(request_body(reply_to=INBOX, then=slip))
        await soon(world.work())
    await world.send(
        request_body(reply_to=INBOX, then=slip)
    )  # an identical request; the queue has room now
    await soon(world.work())
    ((_, following, _),) = world.events.requests
    await world.send(encode(following), headers={"Reply-To": INBOX})
    await soon(world.work())
    replies = [event for _, event in world.events.replies]
    assert [failure(event) for event in replies] == ["queue_full", "queue_full"]
    assert world.observer.outcomes == ["succeeded", "already_done", "already_done"]
    assert world.observer.broken_chains == ["queue_full"]


async def test_step_that_cannot_be_queued_twice_gets_its_stored_event_twice(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.events, "publish_request", AsyncMock(side_effect=QueueFull))
    slip = [{"task": "text_to_image", "prompt": "as a woodcut"}]
    for _ in range(2):
        await world.send(request_body(reply_to=INBOX, then=slip))
        await soon(world.work())
    assert [event for _, event in world.events.replies] == [await world.result("a-2")] * 2
    assert world.observer.broken_chains == ["queue_full"]
