"""SIGKILL and SIGTERM of nats-server at every stage of a job: no request is lost or duplicated.

No worker restarts in these tests.
"""

import asyncio
import json

import pytest
from nats.aio.msg import Msg

from tests.support.holding import SERVER
from tests.support.observations import (
    assert_all_ready,
    assert_queue_empty,
    deliveries,
    succeeded,
    until_pulls_wait,
)
from tests.support.outage import (
    HOW,
    SLACK,
    Replies,
    check_duration,
    outage,
    resume,
    run_start,
    two_workers,
)
from tests.support.scene import ACK_WAIT, Event, Scene

LONG = ACK_WAIT * 1.25  # seconds; a lease without renewals has expired by then

ends = pytest.mark.parametrize("how", HOW)


@ends
async def test_idle_worker(scene: Scene, how: str) -> None:
    worker = await scene.start()
    first = await scene.submit()
    await succeeded(scene, first)
    await until_pulls_wait(scene, 1)
    async with outage(scene, how, worker) as this:
        pass
    second = await scene.submit()
    event = await succeeded(scene, second)
    assert event["attempt"] == 1
    await assert_queue_empty(scene, first, second)
    await assert_all_ready(scene, worker)
    assert scene.runs() == [first, second]
    check_duration(f"{how}, idle: return to next run", run_start(scene, second) - this.returned)


@ends
@pytest.mark.parametrize("lasting", [0.0, LONG], ids=["short", "longer than ack_wait"])
async def test_run_continues_during_an_outage(scene: Scene, how: str, lasting: float) -> None:
    """There is one worker, so an expired lease causes no second run."""
    worker = await scene.start("held_in_run")
    events: asyncio.Queue[Event] = asyncio.Queue()
    inbox = scene.sender.new_inbox()

    async def on_message(message: Msg) -> None:
        events.put_nowait(json.loads(message.data))

    await scene.sender.subscribe(inbox, cb=on_message)
    request_id = await scene.submit(reply_to=inbox)
    waiting = await scene.submit()
    await scene.until_noted("run")
    async with outage(scene, how, worker):
        await asyncio.sleep(lasting)
    await assert_all_ready(scene, worker)
    await resume(scene, "run")
    event = await succeeded(scene, request_id)
    assert event["attempt"] == 1
    assert await asyncio.wait_for(events.get(), SLACK) == event
    await succeeded(scene, waiting)
    await assert_queue_empty(scene, request_id, waiting)
    await assert_all_ready(scene, worker)
    assert scene.runs() == [request_id, waiting]


async def test_lease_survives_a_short_outage(scene: Scene) -> None:
    """The other worker would get the request after the end of the lease."""
    workers = await two_workers(scene, "held_in_run")
    request_id = await scene.submit()
    await scene.until_noted("run")
    # The server writes down within 0.25 s who has what. What one that is killed does not know of
    # any more is another test.
    await asyncio.sleep(0.5)
    async with outage(scene, "kill"):
        pass
    await asyncio.sleep(LONG)
    assert scene.runs() == [request_id]
    await resume(scene, "run")
    assert (await succeeded(scene, request_id))["attempt"] == 1
    await assert_queue_empty(scene, request_id)
    await assert_all_ready(scene, *workers)
    assert scene.runs() == [request_id]


async def test_second_run_after_a_long_outage_does_not_replace_the_result(scene: Scene) -> None:
    """The lease expires before the server returns, so a second run is correct.

    The server may not know whether the first worker is still connected. The first worker requests
    no delivery during its run, because a redelivery to this worker would wait for the run.
    """
    workers = await two_workers(scene, "held_in_run", CONSUMER_JOBS_IN_FLIGHT="1")
    replies = Replies(scene)
    await replies.open()
    request_id = await scene.submit(reply_to=replies.subject)
    await scene.until_noted("run")
    async with outage(scene, "kill"):
        await asyncio.sleep(LONG)
    await scene.until_noted("runs", 2)
    event = await succeeded(scene, request_id)
    await resume(scene, "run")
    await assert_queue_empty(scene, request_id)
    assert await scene.event(request_id) == event, "the second result must not replace the first"
    assert await replies.first(2) == [event, event]
    await assert_all_ready(scene, *workers)
    assert scene.runs() == [request_id] * 2


@pytest.mark.parametrize(
    ("moment", "cause", "how"),
    [
        ("result", "held_before_result", "kill"),
        ("result", "held_before_result", "stop"),
        ("result", "result_lost", "stop"),
        ("result", "answer_to_result_lost", "kill"),
        ("ack", "held_before_ack", "kill"),
        ("ack", "held_before_ack", "stop"),
        ("ack", "ack_lost", "stop"),
        ("ack", "answer_to_ack_lost", "kill"),
    ],
)
async def test_job_ends_after_an_outage_at_its_end(
    scene: Scene, moment: str, cause: str, how: str
) -> None:
    worker = await scene.start(cause)
    replies = Replies(scene)
    await replies.open()
    request_id = await scene.submit(reply_to=replies.subject)
    waiting = await scene.submit()
    await scene.until_noted(moment)
    if moment == "ack":
        await replies.first(1)  # it is on its way by then; the worker may not have written it yet
    async with outage(scene, how, worker) as this:
        await resume(scene, moment)
    event = await succeeded(scene, request_id)
    assert event["attempt"] == 1
    assert await replies.first(1) == [event]
    await succeeded(scene, waiting)
    await assert_queue_empty(scene, request_id, waiting)
    await assert_all_ready(scene, worker)
    assert scene.runs() == [request_id, waiting]
    # A killed server may have lost the last acknowledgement, and then delivers the message again.
    assert await deliveries(scene) in ({2} if how == "stop" else {2, 3})
    check_duration(f"{how}, {cause}: return to next run", run_start(scene, waiting) - this.returned)


async def test_delivery_that_a_killed_server_repeats_is_not_run_again(scene: Scene) -> None:
    """A killed server repeats a delivery that it has not stored, as a new delivery."""
    pid = scene.stack.nats.pid
    worker = await scene.start("server_killed_at_delivery", **{SERVER: str(pid)})
    ids = [await scene.submit() for _ in range(3)]
    await scene.until_noted("killed")
    async with outage(scene, "kill", worker) as this:
        pass
    for request_id in ids:
        assert (await succeeded(scene, request_id))["attempt"] == 1
    await assert_queue_empty(scene, *ids)
    await assert_all_ready(scene, worker)
    assert scene.runs() == ids
    again = worker.log_since_start().count('"outcome": "already_done"')
    print(f"the killed server delivered {again} request again")  # noqa: T201 - nearly always one
    check_duration("kill, delivery: return to the run", run_start(scene, ids[1]) - this.returned)
    check_duration("kill, delivery: return to next run", run_start(scene, ids[2]) - this.returned)
