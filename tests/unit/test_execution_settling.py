"""How a job ends: in which order, exactly once, and with the lease held until then."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from unittest.mock import AsyncMock

import pytest

from consumer import execution
from consumer.ports import DeviceLost, ModelError, QueueFull
from consumer.run import Reason
from consumer.turns import Bounds
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
from tests.support.behaviour import INBOX, asking, failure, soon, while_running
from tests.support.memory_ports import Script, out_of_memory, raising
from tests.support.memory_world import MemoryWorld, Worlds

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BEAT_SOON = 0.01  # seconds of ack_wait

pytestmark = pytest.mark.usefixtures("short_pauses")


def beating() -> bool:
    """Whether something still renews a lease."""
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
        "model raised",
        [ERROR] * 3,
        3,
        ["retry", "ack"] * 2
        + ["dead_letter", "publish failed", "reply failed", "term model_error"],
    ),
    (
        "fault",
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
    "expired": asking(reply_to=INBOX, deadline="2020-01-01T00:00:00Z"),
    "invalid": asking(reply_to=INBOX, width=1),
}


@pytest.mark.parametrize(
    ("what", "scripts", "deliveries", "journal"), ORDERS, ids=[row[0] for row in ORDERS]
)
async def test_settlement_comes_after_everything_else_and_once(
    world: MemoryWorld, what: str, scripts: list[Script], deliveries: int, journal: list[str]
) -> None:
    world.runner.will(*scripts)
    await world.send(BODIES.get(what, asking(reply_to=INBOX)))
    for _ in range(deliveries):
        await soon(world.work())
        assert len(world.settlements) == 1
    assert world.journal == journal
    assert len(world.queue) == 0


async def test_second_copy_is_only_answered_and_settled(world: MemoryWorld) -> None:
    for _ in range(2):
        await world.send(asking(reply_to=INBOX))
        await soon(world.work())
    assert world.journal[4:] == ["reply succeeded", "ack"]


async def test_conflict_is_only_answered_and_settled(world: MemoryWorld) -> None:
    for width in (16, 32):
        await world.send(asking(reply_to=INBOX, width=width))
        await soon(world.work())
    assert world.journal[4:] == ["reply failed", "ack"]


async def test_no_reply_is_sent_where_none_is_asked_for(world: MemoryWorld) -> None:
    await world.send(asking())
    await soon(world.work())
    assert world.journal == ["store", "publish succeeded", "ack"]


async def test_report_says_whether_a_request_was_put_aside(world: MemoryWorld) -> None:
    for body in (b"no request", asking("good")):
        await world.send(body)
        await soon(world.work())
    assert [one.dead_letter for one in world.observer.reports] == [True, False]


async def test_trace_goes_into_every_message(world: MemoryWorld) -> None:
    await world.send(asking(reply_to=INBOX), headers={"traceparent": TRACE})
    await soon(world.work())
    assert world.events.trace_parents == [TRACE] * 4  # started, progress, stored, replied


async def test_message_id_of_the_sender_becomes_the_request_id(world: MemoryWorld) -> None:
    await world.send(asking(None), headers={"Nats-Msg-Id": "a"})
    await soon(world.work())
    assert isinstance(await world.result("a"), SucceededEvent)


# -- run twice ------------------------------------------------------------------------------------


async def test_every_run_of_a_request_has_the_same_seed_and_other_requests_another(
    world: MemoryWorld,
) -> None:
    world.runner.will(ERROR, ERROR)
    for body in (asking("a"), asking("b"), asking("c", seed=7)):
        await world.send(body)
    while await world.left():
        await soon(world.work())
    seeds: dict[str, list[int | None]] = {}
    for run in world.runner.runs:
        seeds.setdefault(run.request.request_id or "", []).append(run.request.seed)
    assert len(world.runner.runs) == 5
    assert {request_id: len(set(drawn)) for request_id, drawn in seeds.items()} == {
        "a": 1,
        "b": 1,
        "c": 1,
    }
    assert seeds["a"][0] != seeds["b"][0]
    assert None not in {seeds["a"][0], seeds["b"][0]}
    assert seeds["c"] == [7]
    done = await world.result("a")
    assert done is not None
    assert done.request_digest == digest_of(asking("a")), "the seed is not part of what was asked"


# -- another worker was quicker -------------------------------------------------------------------


async def test_event_of_a_quicker_worker_stands_and_is_what_the_sender_gets(
    world: MemoryWorld,
) -> None:
    hold = world.runner.will_hold()
    await world.send(body := asking(reply_to=INBOX))
    theirs = another_workers_event(digest_of(body))

    def store_and_go_on() -> None:
        assert world.events.put(theirs)
        hold.release()

    await while_running(world, hold, store_and_go_on)
    assert await world.result("a") == theirs
    assert world.events.replies == [(INBOX, theirs)]
    assert world.journal == ["store", "fenced", "reply cancelled", "ack", "discard"]
    assert await world.objects() == set(), "nobody is told of them"


async def test_event_of_another_request_is_never_the_answer_to_a_done_one(
    world: MemoryWorld,
) -> None:
    hold = world.runner.will_hold()
    await world.send(asking(reply_to=INBOX))
    theirs = another_workers_event(digest_of(asking(width=32)))

    def store_and_go_on() -> None:
        assert world.events.put(theirs)
        hold.release()

    await while_running(world, hold, store_and_go_on)
    assert await world.result("a") == theirs
    ((_, answer),) = world.events.replies
    assert failure(answer) == "request_id_conflict"
    assert world.settlements == ["ack"]


async def test_event_of_another_request_is_never_the_answer_to_an_invalid_one(
    world: MemoryWorld,
) -> None:
    await world.send(asking(reply_to="_INBOX.first"))
    await world.send(asking(reply_to=INBOX, width=1))
    for _ in range(2):
        await soon(world.work())
    first = await world.result("a")
    assert isinstance(first, SucceededEvent)
    (_, (subject, answer)) = world.events.replies
    assert (subject, failure(answer)) == (INBOX, "invalid_request")
    assert [letter.code for letter, _ in world.events.letters] == ["invalid_request"]


async def test_invalid_request_that_comes_again_is_answered_as_before(world: MemoryWorld) -> None:
    await world.send(asking(reply_to=INBOX, width=1))
    replies = world.events.replies
    first = world.queue.take()
    await soon(world.execution.handle(first))
    world.queue.publish(first.subject, first.body, first.headers)
    await soon(world.work())
    assert [event for _, event in replies] == [await world.result("a")] * 2


# -- worker and bus die between two steps ---------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [ConnectionError("closed"), RuntimeError("odd")],
    ids=lambda error: type(error).__name__,
)
async def test_request_whose_event_cannot_be_stored_is_left_unsettled(
    world: MemoryWorld, error: Exception
) -> None:
    world.events.broken = error
    await world.send(asking())
    assert await soon(world.work()) is None
    assert world.settlements == []
    assert world.observer.outcomes == ["abandoned"]
    assert not beating()
    world.events.broken = None
    world.queue.run_out_leases()
    await soon(world.work())
    assert isinstance(await world.result("a"), SucceededEvent)


async def test_request_whose_end_fails_each_time_is_put_aside(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else everything would wait behind it until the server gives it out no more."""
    monkeypatch.setattr(world.events, "reply", AsyncMock(side_effect=RuntimeError("odd")))
    await world.send(asking(reply_to=INBOX))
    for _ in range(4):
        await soon(world.work())
        world.queue.run_out_leases()
    assert world.observer.outcomes == ["abandoned"] * 3 + ["internal"]
    assert world.settlements == ["term internal"]
    ((letter, _),) = await world.dead_letters()
    assert letter.code == "internal"
    assert isinstance(await world.result("a"), SucceededEvent), "the event that stands, stands"
    assert len(world.queue) == 0


async def test_chain_whose_next_step_cannot_be_made_is_ended_in_its_name(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.events, "publish_request", AsyncMock(side_effect=KeyError("odd")))
    slip = [{"task": "text_to_image", "prompt": "as a woodcut"}]
    await world.send(asking(reply_to=INBOX, then=slip))
    for _ in range(4):
        await soon(world.work())
        world.queue.run_out_leases()
    ((_, told),) = world.events.replies
    assert (told.request_id, failure(told)) == ("a-2", "internal")
    assert await world.result("a-2") == told
    assert len(world.queue) == 0


async def test_end_that_fails_beside_others_is_counted_too(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world(bounds=Bounds(in_flight=3))
    world.store.begin()
    await world.send(asking("other"))
    other = asyncio.create_task(world.work())
    await soon(world.artifacts.tries.until(1))
    await world.send(asking(reply_to=INBOX, prompt=""))  # it ends before it would be alone
    monkeypatch.setattr(world.events, "reply", AsyncMock(side_effect=RuntimeError("odd")))
    for _ in range(4):
        delivery = world.queue.take()
        await soon(world.execution.handle(delivery))
        if delivery in world.queue.in_hand:
            world.queue.run_out(delivery)
    assert world.observer.outcomes == ["abandoned"] * 3 + ["internal"]
    world.store.end()
    await soon(other)


async def test_what_cannot_even_be_put_aside_is_left_to_its_lease(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = AsyncMock(side_effect=RuntimeError("odd"))
    monkeypatch.setattr(world.events, "reply", broken)
    monkeypatch.setattr(world.events, "dead_letter", broken)
    await world.send(asking(reply_to=INBOX))
    for _ in range(5):
        await soon(world.work())
        world.queue.run_out_leases()
    assert world.observer.outcomes == ["abandoned"] * 5
    assert len(world.queue) == 1


async def test_settlement_that_fails_leaves_the_stored_event_to_answer_for_it(
    world: MemoryWorld,
) -> None:
    await world.send(asking(reply_to=INBOX))
    delivery = world.queue.take()
    delivery.refusal = ConnectionError("closed")
    assert await soon(world.execution.handle(delivery)) is None
    assert world.observer.outcomes == ["abandoned"]
    world.queue.run_out_leases()
    await soon(world.work())
    assert len(world.runner.runs) == 1
    assert [event for _, event in world.events.replies] == [await world.result("a")] * 2
    assert len(world.queue) == 0


async def test_lost_device_ends_the_worker_even_if_the_request_cannot_be_given_back(
    world: MemoryWorld,
) -> None:
    world.runner.will(raising(DeviceLost))
    await world.send(asking())
    delivery = world.queue.take()
    delivery.refusal = ConnectionError("closed")
    assert await soon(world.execution.handle(delivery)) == 70
    assert world.observer.outcomes == ["abandoned"]


async def test_output_waits_for_the_bus_with_its_lease_renewed(make_world: Worlds) -> None:
    world = await make_world(ack_wait=BEAT_SOON)
    hold = world.runner.will_hold()
    await world.send(asking())
    working = asyncio.create_task(world.work())
    await soon(hold.begun())
    world.bus.begin()
    hold.release()
    await soon(world.artifacts.tries.until(1))
    assert world.delivery is not None
    await soon(world.delivery.beats.more(3))
    assert world.settlements == []
    world.bus.end()
    await soon(working)
    assert isinstance(await world.result("a"), SucceededEvent)
    assert len(world.runner.runs) == 1
    assert world.settlements == ["ack"]


# -- the lease ------------------------------------------------------------------------------------


async def test_lease_is_renewed_in_the_run_and_while_the_store_is_away_and_not_after(
    make_world: Worlds,
) -> None:
    world = await make_world(ack_wait=BEAT_SOON)
    hold = world.runner.will_hold()
    await world.send(asking())
    working = asyncio.create_task(world.work())
    await soon(hold.begun())
    assert world.delivery is not None
    await soon(world.delivery.beats.more(3))
    world.store.begin()
    hold.release()
    await soon(world.store_is_missed())
    await soon(world.delivery.beats.more(3))
    world.store.end()
    await soon(working)
    assert not beating()
    assert len(world.runner.runs) == 1


async def test_lease_of_a_hanging_run_runs_out(make_world: Worlds) -> None:
    world = await make_world(stall_timeout=0.02, ack_wait=BEAT_SOON)
    world.runner.will_hold(heeds=False)
    await world.send(asking())
    assert await soon(world.work()) == 70
    assert world.settlements == []
    assert not beating()


# -- the process ends -----------------------------------------------------------------------------


async def cancel(working: "asyncio.Task[int | None]") -> None:
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(working)


async def test_cancelled_task_gives_the_request_back(world: MemoryWorld) -> None:
    hold = world.runner.will_hold(heeds=False)
    await world.send(asking())
    working = asyncio.create_task(world.work())
    await soon(hold.begun())
    await cancel(working)
    assert world.settlements == ["release"]
    assert not beating()
    assert not world.execution.interrupt(Reason.CANCEL)
    assert world.observer.outcomes == ["given_back"]


@pytest.mark.parametrize(
    "refusal", [None, ConnectionError("closed")], ids=["bus away", "bus closed"]
)
async def test_cancellation_goes_on_though_the_request_cannot_be_given_back(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch, refusal: Exception | None
) -> None:
    monkeypatch.setattr(execution, "LAST_WORD", 0.001)
    hold = world.runner.will_hold(heeds=False)
    await world.send(asking())
    working = asyncio.create_task(world.work())
    await soon(hold.begun())
    assert world.delivery is not None
    world.delivery.refusal = refusal
    if refusal is None:
        world.bus.begin()
    await cancel(working)
    assert world.settlements == []
    assert world.observer.outcomes == ["abandoned"]


@pytest.mark.parametrize("script", [None, "hangs"])
async def test_cancellation_after_the_end_of_a_job_settles_nothing_again(
    make_world: Worlds, script: str | None
) -> None:
    world = await make_world(stall_timeout=0.02 if script else 60.0)
    if script:
        world.runner.will_hold(heeds=False)
    await world.send(asking())
    working = asyncio.create_task(world.work())
    at_end: Callable[[], None] = working.cancel  # type: ignore[assignment]
    world.execution._conclusion = CancelsAtItsEnd(world, at_end)  # type: ignore[assignment]
    with pytest.raises(asyncio.CancelledError):
        await soon(working)
    assert world.settlements == ([] if script else ["ack"])
    assert world.observer.outcomes == ["abandoned" if script else "succeeded"]


class CancelsAtItsEnd:
    """Has the task cancelled when the job is settled and the lease is about to end."""

    def __init__(self, world: MemoryWorld, cancel_task: Callable[[], None]) -> None:
        self._real = world.execution._conclusion
        self._cancel = cancel_task
        self.event_fields = self._real.event_fields

    async def conclude(self, *args: object) -> object:
        decision = await self._real.conclude(*args)  # type: ignore[arg-type]
        self._cancel()
        return decision


# -- too large ------------------------------------------------------------------------------------


async def test_failure_that_is_too_large_goes_without_the_senders_metadata(
    world: MemoryWorld,
) -> None:
    world.events.max_payload = 4_096
    await world.send(asking(metadata={str(n): "x" * 512 for n in range(16)}))
    await soon(world.work())
    event = await world.result("a")
    assert isinstance(event, FailedEvent)
    assert (event.failure.code, event.metadata) == (FailureCode.INTERNAL, {})
    assert world.settlements == ["ack"]


async def test_failure_that_nobody_can_be_told_does_not_come_back_for_ever(
    world: MemoryWorld,
) -> None:
    world.events.max_payload = 10
    await world.send(asking())
    await soon(world.work())
    assert world.settlements == ["ack"]
    assert world.journal == ["store", "ack"]


async def test_second_attempt_at_a_failed_request_gets_the_failure(world: MemoryWorld) -> None:
    await world.send(body := asking(reply_to=INBOX))
    event = FailedEvent(
        **another_workers_event(digest_of(body)).model_dump(exclude={"type"}),
        failure=Failure.of(FailureCode.MODEL_ERROR, "the model failed on this request"),
    )
    assert world.events.put(event)
    await soon(world.work())
    assert world.events.replies == [(INBOX, event)]
    assert world.runner.runs == []


async def test_step_that_found_no_place_in_the_queue_is_the_same_request_later(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    slip = [{"task": "text_to_image", "prompt": "as a woodcut"}]
    with monkeypatch.context() as full:
        full.setattr(world.events, "publish_request", AsyncMock(side_effect=QueueFull))
        await world.send(asking(reply_to=INBOX, then=slip))
        await soon(world.work())
    await world.send(asking(reply_to=INBOX, then=slip))  # the same again: now there is room
    await soon(world.work())
    ((_, following, _),) = world.events.requests
    await world.send(encode(following), headers={"Reply-To": INBOX})
    await soon(world.work())
    told = [event for _, event in world.events.replies]
    assert [failure(event) for event in told] == ["queue_full", "queue_full"]
    assert world.observer.outcomes == ["succeeded", "already_done", "already_done"]
    assert world.observer.broken_chains == ["queue_full"]
