"""Cancelling: queued, running, ending, ended, unknown; and what happens at the same time."""

import asyncio
import time
from uuid import uuid4

from generation_contracts import Task
from tests.services.conftest import Caller, NewCaller
from tests.support.scene import Event, Scene

SUCCEEDED = "generation.v1.succeeded"
CANCELLED = "generation.v1.cancelled"


def told(request_id: str, status: str, result: str | None = None) -> Event:
    reply = {"request_id": request_id, "status": status}
    return reply if result is None else {**reply, "result": result}


async def queue(scene: Scene, *ids: str, **fields: object) -> None:
    """Requests under subjects with their ids."""
    jetstream = scene.sender.jetstream()
    for one in ids:
        body = f'{{"prompt":"a","num_inference_steps":{fields.get("steps", 2)}}}'.encode()
        await jetstream.publish(scene.subjects.request(scene.task, one), body)


async def test_a_queued_request_is_gone_and_the_others_are_done(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("held_in_run")
    await queue(scene, "first", "unwanted", "last")
    await scene.until_noted("run")
    assert await caller.cancel("unwanted") == told("unwanted", "cancelled", CANCELLED)
    assert await scene.pending() == 2
    assert (await scene.event("unwanted"))["type"] == CANCELLED
    (scene.folder / "run.go").touch()
    await scene.until_empty()
    assert scene.runs() == ["", ""]  # ids in subjects only
    assert (await scene.event("last"))["type"] == SUCCEEDED


async def test_the_caller_of_a_queued_request_is_answered(
    scene: Scene, new_caller: NewCaller
) -> None:
    await scene.start("held_in_run")
    first, second, third = [await new_caller() for _ in range(3)]
    running = first.asking(first.call(request_id="running"))
    await scene.until_noted("run")
    waiting = [one.asking(one.call(request_id="unwanted")) for one in (second, third)]

    async def stored() -> bool:
        return await scene.pending() == 3

    await scene.until(stored, "three requests")
    assert (await first.cancel("unwanted"))["status"] == "cancelled"
    answered, waiting_on = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [(await one)["type"] for one in answered] == [CANCELLED]
    assert await scene.pending() == 2
    (scene.folder / "run.go").touch()
    # The copy finds the stored event when it is delivered.
    assert [(await one)["type"] for one in waiting_on] == [CANCELLED]
    assert (await running)["type"] == SUCCEEDED


async def test_a_running_request_stops_at_its_next_step_and_the_next_one_is_done(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("slow_steps")
    running = caller.asking(caller.call(request_id="long", num_inference_steps=200))
    await scene.until_noted("steps", 2)
    assert await caller.cancel("long") == told("long", "stopping")
    event = await running
    assert event["type"] == CANCELLED
    steps = len(scene.notes("steps"))
    assert steps < 20
    assert (await caller.call(num_inference_steps=1))["type"] == SUCCEEDED
    assert len(scene.notes("steps")) == steps + 1  # the device was free: no step of it came after
    await scene.until_empty()
    assert await scene.keys() != set()
    assert not any("/long/" in key for key in await scene.keys())


async def test_a_request_without_its_id_in_the_subject_is_cancelled_while_it_runs(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("slow_steps")
    request_id = await scene.submit(num_inference_steps=200)
    await scene.until_noted("steps", 1)
    assert (await caller.cancel(request_id))["status"] == "stopping"
    assert (await scene.event(request_id))["type"] == CANCELLED


async def test_what_has_ended_or_never_was_is_said(scene: Scene, caller: Caller) -> None:
    await scene.start()
    done = await caller.call(request_id="done")
    assert done["type"] == SUCCEEDED
    assert await caller.cancel("done") == told("done", "finished", SUCCEEDED)
    assert await caller.cancel("never-was") == told("never-was", "unknown")
    refused = await caller.cancel("*")
    assert refused["error"]["code"] == "400"
    assert await scene.events("never-was") == []


async def test_a_body_that_names_another_id_is_cancelled_by_that_of_its_subject_alone(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("held_in_run")
    await queue(scene, "first")
    await scene.until_noted("run")
    subject = scene.subjects.request(scene.task, "mine")
    await scene.sender.jetstream().publish(subject, b'{"prompt":"a","request_id":"yours"}')
    assert await caller.cancel("mine") == told("mine", "cancelled", "generation.v1.cancelled")
    assert await scene.events("yours") == []
    (scene.folder / "run.go").touch()
    await scene.until_empty()


async def test_twice_is_once(scene: Scene, caller: Caller) -> None:
    await scene.start("held_in_run")
    await queue(scene, "first", "unwanted")
    await scene.until_noted("run")
    replies = await asyncio.gather(*(caller.cancel("unwanted") for _ in range(5)))
    assert {reply["status"] for reply in replies} == {"cancelled"}
    assert len(await scene.events("unwanted")) == 1
    (scene.folder / "run.go").touch()
    await scene.until_empty()


async def test_a_cancelled_id_stays_cancelled(scene: Scene, caller: Caller) -> None:
    await scene.start("held_in_run")
    await queue(scene, "first", "unwanted")
    await scene.until_noted("run")
    cancelled = await caller.cancel("unwanted")
    (scene.folder / "run.go").touch()
    await scene.until_empty()
    again = await caller.call(b'{"prompt":"a","num_inference_steps":2,"request_id":"unwanted"}')
    assert (again["type"], cancelled["status"]) == (CANCELLED, "cancelled")
    other = await caller.call(request_id="unwanted", seed=3)
    assert other["failure"]["code"] == "request_id_conflict"
    assert scene.runs() == [""]


async def test_during_the_upload_it_stops_and_leaves_nothing(scene: Scene, caller: Caller) -> None:
    await scene.start("held_in_upload")
    running = caller.asking(caller.call(request_id="late"))
    await scene.until_noted("upload")
    assert (await caller.cancel("late"))["status"] == "stopping"
    assert (await running)["type"] == CANCELLED
    assert await scene.keys() == set()


async def test_at_its_end_it_is_too_late(scene: Scene, caller: Caller) -> None:
    await scene.start("held_before_result")
    running = caller.asking(caller.call(request_id="late"))
    await scene.until_noted("result")
    cancelling = caller.asking(caller.cancel("late"))
    (scene.folder / "result.go").touch()
    assert await cancelling == told("late", "finished", SUCCEEDED)
    assert (await running)["type"] == SUCCEEDED


async def test_what_is_fetched_in_the_same_moment_has_one_end(scene: Scene, caller: Caller) -> None:
    """Who cancels has seen it waiting, and a worker gets it before its end is stored."""
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start("held_before_result", MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await queue(scene, "unwanted", steps=200)
    cancelling = caller.asking(caller.cancel("unwanted"))
    await scene.until_noted("result")
    await scene.start("slow_steps")
    await scene.until_noted("steps", 1)
    (scene.folder / "result.go").touch()
    assert await cancelling == told("unwanted", "cancelled", CANCELLED)
    await scene.until_logged(scene.workers[1], "job_finished")
    assert (await scene.event("unwanted"))["worker"] != scene.workers[1].name
    assert len(scene.notes("steps")) < 20  # it did not go on for nothing
    assert await scene.pending() == 0


async def test_a_worker_that_dies_before_it_has_stopped_has_a_successor_that_knows(
    scene: Scene, caller: Caller
) -> None:
    deaf = await scene.start("held_in_run")  # it does not look whether it is to stop
    request_id = await scene.submit()
    await scene.until_noted("run")
    assert (await caller.cancel(request_id))["status"] == "stopping"
    deaf.kill()
    await scene.start()
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == (CANCELLED, 2)
    await scene.until_empty()
    assert scene.runs() == [request_id]


async def test_dead_workers_request_is_ended_by_the_worker_that_gets_it_next(
    scene: Scene, caller: Caller
) -> None:
    """A worker that does not answer may be deaf, not dead: its model may still run the request."""
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))  # answers cancellations of both tasks
    dead = await scene.start("held_in_run")
    await queue(scene, "orphan")
    await scene.until_noted("run")
    dead.kill()
    assert await caller.cancel("orphan") == told("orphan", "stopping")
    assert await scene.events("orphan") == []
    await scene.start()
    event = await scene.event("orphan")
    assert (event["type"], event["attempt"]) == (CANCELLED, 2)
    await scene.until_empty()
    assert len(scene.runs()) == 1


async def test_storm_of_cancels_of_large_requests_cancels_all_of_them(
    scene: Scene, caller: Caller
) -> None:
    """The bodies together are more than the server keeps for a connection that reads slowly."""
    worker = await scene.start("held_in_run")
    await queue(scene, "first")
    await scene.until_noted("run")
    ids = [f"large-{number}" for number in range(120)]
    body = b'{"prompt":"a"}' + b" " * 1_000_000
    jetstream = scene.sender.jetstream()
    for one in ids:
        await jetstream.publish(scene.subjects.request(scene.task, one), body)
    replies = await asyncio.gather(*(caller.cancel(one) for one in ids))
    assert replies == [told(one, "cancelled", CANCELLED) for one in ids]
    assert await scene.pending() == 1
    assert "bus_disconnected" not in worker.log_since_start()
    (scene.folder / "run.go").touch()
    await scene.until_empty()


async def test_cancel_behind_a_storm_of_unknown_ids_does_not_wait_for_it(
    scene: Scene, caller: Caller
) -> None:
    """Each unknown id is waited for, which holds no place that another cancellation needs."""
    await scene.start("held_in_run")
    await queue(scene, "first", "unwanted")
    await scene.until_noted("run")
    inbox = caller.client.new_inbox()
    for number in range(2_000):
        await caller.client.publish(scene.subjects.cancel(f"unknown-{number}"), reply=inbox)
    began = time.monotonic()
    assert (await caller.cancel("unwanted"))["status"] == "cancelled"
    assert time.monotonic() - began < 5.0  # one took 12 s when 64 were looked at in turn
    (scene.folder / "run.go").touch()
    await scene.until_empty()


async def test_chain_is_cancelled_by_its_own_id_after_its_first_step(
    scene: Scene, caller: Caller
) -> None:
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start()
    steps = [{"task": "image_to_text", "prompt": "b", "each": True}]
    answer = caller.asking(caller.call(request_id="tour", num_images=2, then=steps))

    async def queued() -> bool:
        return await scene.pending() == 2

    await scene.until(queued, "two branches in the queue")
    assert await caller.cancel("tour") == told("tour", "cancelled", CANCELLED)
    assert (await answer)["type"] == CANCELLED
    assert await scene.pending() == 0
    assert await caller.cancel("tour") == told("tour", "cancelled", CANCELLED)


async def test_running_step_of_a_chain_stops_by_the_chains_id(scene: Scene, caller: Caller) -> None:
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start()
    await scene.start("slow_steps", MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    step = {"task": "image_to_text", "prompt": "b", "max_new_tokens": 200}
    answer = caller.asking(
        caller.call(request_id="tour", then=[step, {"task": "text_to_image", "prompt": "c"}])
    )
    await scene.until_noted("steps", 1)
    assert await caller.cancel("tour") == told("tour", "stopping")
    event = await answer
    assert (event["request_id"], event["type"]) == ("tour-2", CANCELLED)
    assert await caller.cancel("tour") == told("tour", "cancelled", CANCELLED)
    await scene.until_empty()


async def test_chain_that_has_ended_is_finished(scene: Scene, caller: Caller) -> None:
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start()
    await scene.start(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    step = {"task": "image_to_text", "prompt": "b"}
    assert (await caller.call(request_id="tour", then=[step]))["request_id"] == "tour-2"
    assert await caller.cancel("tour") == told("tour", "finished", SUCCEEDED)


async def test_requests_of_a_task_without_workers_are_cancelled_by_the_others(
    scene: Scene, caller: Caller
) -> None:
    await scene.start()
    orphan = uuid4().hex
    subject = scene.subjects.request(Task.IMAGE_TO_TEXT, orphan)
    await scene.sender.jetstream().publish(subject, b'{"prompt":"a","images":["s3://bbb/k"]}')
    assert (await caller.cancel(orphan))["status"] == "cancelled"
    assert await scene.pending() == 0


async def test_cancel_that_comes_before_its_request_is_honoured(
    scene: Scene, caller: Caller
) -> None:
    await scene.start()
    for request_id in ("early", "early-chain"):
        assert await caller.cancel(request_id) == told(request_id, "unknown")
    await scene.submit(request_id="early")  # without its id in the subject
    await scene.submit(request_id="step", chain={"id": "early-chain", "step": 1})
    for request_id in ("early", "step"):
        assert (await scene.event(request_id))["type"] == CANCELLED
    assert scene.runs() == []
