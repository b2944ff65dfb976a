"""Cancellation of queued, running, ended and unknown requests, and its races."""

import asyncio
import time
from uuid import uuid4

from generation_contracts import Task
from tests.services.conftest import Caller, NewCaller
from tests.support.scene import Event, Scene

SUCCEEDED = "generation.v1.succeeded"
CANCELLED = "generation.v1.cancelled"


def reply_of(request_id: str, status: str, result: str | None = None) -> Event:
    reply = {"request_id": request_id, "status": status}
    return reply if result is None else {**reply, "result": result}


async def queue(scene: Scene, *ids: str, **fields: object) -> None:
    """Publish requests under subjects with their ids."""
    jetstream = scene.sender.jetstream()
    for one in ids:
        body = f'{{"prompt":"a","num_inference_steps":{fields.get("steps", 2)}}}'.encode()
        await jetstream.publish(scene.subjects.request(scene.task, one), body)


async def test_a_cancelled_queued_request_is_removed_and_the_others_run(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("held_in_run")
    await queue(scene, "first", "second", "last")
    await scene.until_noted("run")
    assert await caller.cancel("second") == reply_of("second", "cancelled", CANCELLED)
    assert await scene.pending() == 2
    assert (await scene.event("second"))["type"] == CANCELLED
    (scene.folder / "run.go").touch()
    await scene.until_empty()
    assert scene.runs() == ["", ""]  # the ids are in the subjects only
    assert (await scene.event("last"))["type"] == SUCCEEDED


async def test_the_caller_of_a_cancelled_queued_request_gets_its_event(
    scene: Scene, new_caller: NewCaller
) -> None:
    await scene.start("held_in_run")
    first, second, third = [await new_caller() for _ in range(3)]
    running = first.start(first.call(request_id="running"))
    await scene.until_noted("run")
    waiting = [one.start(one.call(request_id="second")) for one in (second, third)]

    async def stored() -> bool:
        return await scene.pending() == 3

    await scene.until(stored, "three requests")
    assert (await first.cancel("second"))["status"] == "cancelled"
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [(await one)["type"] for one in done] == [CANCELLED]
    assert await scene.pending() == 2
    (scene.folder / "run.go").touch()
    # The copy finds the stored event when it is delivered.
    assert [(await one)["type"] for one in pending] == [CANCELLED]
    assert (await running)["type"] == SUCCEEDED


async def test_a_cancelled_running_request_stops_at_its_next_step(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("slow_steps")
    running = caller.start(caller.call(request_id="long", num_inference_steps=200))
    await scene.until_noted("steps", 2)
    assert await caller.cancel("long") == reply_of("long", "stopping")
    event = await running
    assert event["type"] == CANCELLED
    steps = len(scene.notes("steps"))
    assert steps < 20
    assert (await caller.call(num_inference_steps=1))["type"] == SUCCEEDED
    assert len(scene.notes("steps")) == steps + 1  # the cancelled run made no further step
    await scene.until_empty()
    assert await scene.keys() != set()
    assert not any("/long/" in key for key in await scene.keys())


async def test_a_running_request_without_its_id_in_the_subject_can_be_cancelled(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("slow_steps")
    request_id = await scene.submit(num_inference_steps=200)
    await scene.until_noted("steps", 1)
    assert (await caller.cancel(request_id))["status"] == "stopping"
    assert (await scene.event(request_id))["type"] == CANCELLED


async def test_ended_and_unknown_requests_have_a_status(scene: Scene, caller: Caller) -> None:
    await scene.start()
    done = await caller.call(request_id="done")
    assert done["type"] == SUCCEEDED
    assert await caller.cancel("done") == reply_of("done", "finished", SUCCEEDED)
    assert await caller.cancel("unknown") == reply_of("unknown", "unknown")
    refused = await caller.cancel("*")
    assert refused["error"]["code"] == "400"
    assert await scene.events("unknown") == []


async def test_a_request_with_two_ids_is_cancelled_by_the_id_in_its_subject(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("held_in_run")
    await queue(scene, "first")
    await scene.until_noted("run")
    subject = scene.subjects.request(scene.task, "mine")
    await scene.sender.jetstream().publish(subject, b'{"prompt":"a","request_id":"yours"}')
    assert await caller.cancel("mine") == reply_of("mine", "cancelled", "generation.v1.cancelled")
    assert await scene.events("yours") == []
    (scene.folder / "run.go").touch()
    await scene.until_empty()


async def test_concurrent_cancellations_store_one_event(scene: Scene, caller: Caller) -> None:
    await scene.start("held_in_run")
    await queue(scene, "first", "second")
    await scene.until_noted("run")
    replies = await asyncio.gather(*(caller.cancel("second") for _ in range(5)))
    assert {reply["status"] for reply in replies} == {"cancelled"}
    assert len(await scene.events("second")) == 1
    (scene.folder / "run.go").touch()
    await scene.until_empty()


async def test_a_cancelled_id_remains_cancelled(scene: Scene, caller: Caller) -> None:
    await scene.start("held_in_run")
    await queue(scene, "first", "second")
    await scene.until_noted("run")
    cancelled = await caller.cancel("second")
    (scene.folder / "run.go").touch()
    await scene.until_empty()
    again = await caller.call(b'{"prompt":"a","num_inference_steps":2,"request_id":"second"}')
    assert (again["type"], cancelled["status"]) == (CANCELLED, "cancelled")
    other = await caller.call(request_id="second", seed=3)
    assert other["failure"]["code"] == "request_id_conflict"
    assert scene.runs() == [""]


async def test_a_cancellation_during_the_upload_leaves_no_objects(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("held_in_upload")
    running = caller.start(caller.call(request_id="late"))
    await scene.until_noted("upload")
    assert (await caller.cancel("late"))["status"] == "stopping"
    assert (await running)["type"] == CANCELLED
    assert await scene.keys() == set()


async def test_a_cancellation_during_publication_is_too_late(scene: Scene, caller: Caller) -> None:
    await scene.start("held_before_result")
    running = caller.start(caller.call(request_id="late"))
    await scene.until_noted("result")
    cancelling = caller.start(caller.cancel("late"))
    (scene.folder / "result.go").touch()
    assert await cancelling == reply_of("late", "finished", SUCCEEDED)
    assert (await running)["type"] == SUCCEEDED


async def test_a_request_fetched_during_its_cancellation_has_one_terminal_event(
    scene: Scene, caller: Caller
) -> None:
    """A worker fetches the request after the cancelling worker has found it in the queue."""
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start("held_before_result", MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await queue(scene, "second", steps=200)
    cancelling = caller.start(caller.cancel("second"))
    await scene.until_noted("result")
    await scene.start("slow_steps")
    await scene.until_noted("steps", 1)
    (scene.folder / "result.go").touch()
    assert await cancelling == reply_of("second", "cancelled", CANCELLED)
    await scene.until_logged(scene.workers[1], "job_finished")
    assert (await scene.event("second"))["worker"] != scene.workers[1].name
    assert len(scene.notes("steps")) < 20  # the run stopped early
    assert await scene.pending() == 0


async def test_the_cancellation_of_a_killed_worker_applies_to_the_next_attempt(
    scene: Scene, caller: Caller
) -> None:
    unresponsive = await scene.start("held_in_run")  # it does not poll the cancel token
    request_id = await scene.submit()
    await scene.until_noted("run")
    assert (await caller.cancel(request_id))["status"] == "stopping"
    unresponsive.kill()
    await scene.start()
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == (CANCELLED, 2)
    await scene.until_empty()
    assert scene.runs() == [request_id]


async def test_the_request_of_a_dead_worker_is_cancelled_by_the_next_worker(
    scene: Scene, caller: Caller
) -> None:
    """A worker without a reply may still run the request, so no other worker ends it early."""
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))  # handles cancellations of both tasks
    dead = await scene.start("held_in_run")
    await queue(scene, "orphan")
    await scene.until_noted("run")
    dead.kill()
    assert await caller.cancel("orphan") == reply_of("orphan", "stopping")
    assert await scene.events("orphan") == []
    await scene.start()
    event = await scene.event("orphan")
    assert (event["type"], event["attempt"]) == (CANCELLED, 2)
    await scene.until_empty()
    assert len(scene.runs()) == 1


async def test_many_cancellations_of_large_requests_succeed(scene: Scene, caller: Caller) -> None:
    """The total size of the bodies exceeds the server's buffer for a slow connection."""
    worker = await scene.start("held_in_run")
    await queue(scene, "first")
    await scene.until_noted("run")
    ids = [f"large-{number}" for number in range(120)]
    body = b'{"prompt":"a"}' + b" " * 1_000_000
    jetstream = scene.sender.jetstream()
    for one in ids:
        await jetstream.publish(scene.subjects.request(scene.task, one), body)
    replies = await asyncio.gather(*(caller.cancel(one) for one in ids))
    assert replies == [reply_of(one, "cancelled", CANCELLED) for one in ids]
    assert await scene.pending() == 1
    assert "bus_disconnected" not in worker.log_since_start()
    (scene.folder / "run.go").touch()
    await scene.until_empty()


async def test_a_cancellation_does_not_wait_behind_many_unknown_ids(
    scene: Scene, caller: Caller
) -> None:
    """The worker waits for each unknown id, without blocking other cancellations."""
    await scene.start("held_in_run")
    await queue(scene, "first", "second")
    await scene.until_noted("run")
    inbox = caller.client.new_inbox()
    for number in range(2_000):
        await caller.client.publish(scene.subjects.cancel(f"unknown-{number}"), reply=inbox)
    began = time.monotonic()
    assert (await caller.cancel("second"))["status"] == "cancelled"
    assert time.monotonic() - began < 5.0  # sequential handling would take 12 s
    (scene.folder / "run.go").touch()
    await scene.until_empty()


async def test_a_chain_is_cancelled_by_its_id_after_its_first_step(
    scene: Scene, caller: Caller
) -> None:
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start()
    steps = [{"task": "image_to_text", "prompt": "b", "each": True}]
    answer = caller.start(caller.call(request_id="tour", num_images=2, then=steps))

    async def queued() -> bool:
        return await scene.pending() == 2

    await scene.until(queued, "two branches in the queue")
    assert await caller.cancel("tour") == reply_of("tour", "cancelled", CANCELLED)
    assert (await answer)["type"] == CANCELLED
    assert await scene.pending() == 0
    assert await caller.cancel("tour") == reply_of("tour", "cancelled", CANCELLED)


async def test_a_running_step_of_a_chain_is_cancelled_by_the_chain_id(
    scene: Scene, caller: Caller
) -> None:
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start()
    await scene.start("slow_steps", MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    step = {"task": "image_to_text", "prompt": "b", "max_new_tokens": 200}
    answer = caller.start(
        caller.call(request_id="tour", then=[step, {"task": "text_to_image", "prompt": "c"}])
    )
    await scene.until_noted("steps", 1)
    assert await caller.cancel("tour") == reply_of("tour", "stopping")
    event = await answer
    assert (event["request_id"], event["type"]) == ("tour-2", CANCELLED)
    assert await caller.cancel("tour") == reply_of("tour", "cancelled", CANCELLED)
    await scene.until_empty()


async def test_the_cancellation_of_an_ended_chain_returns_finished(
    scene: Scene, caller: Caller
) -> None:
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start()
    await scene.start(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    step = {"task": "image_to_text", "prompt": "b"}
    assert (await caller.call(request_id="tour", then=[step]))["request_id"] == "tour-2"
    assert await caller.cancel("tour") == reply_of("tour", "finished", SUCCEEDED)


async def test_workers_cancel_requests_of_a_task_without_workers(
    scene: Scene, caller: Caller
) -> None:
    await scene.start()
    orphan = uuid4().hex
    subject = scene.subjects.request(Task.IMAGE_TO_TEXT, orphan)
    await scene.sender.jetstream().publish(subject, b'{"prompt":"a","images":["s3://bbb/k"]}')
    assert (await caller.cancel(orphan))["status"] == "cancelled"
    assert await scene.pending() == 0


async def test_a_cancellation_before_the_submission_is_applied(
    scene: Scene, caller: Caller
) -> None:
    await scene.start()
    for request_id in ("early", "early-chain"):
        assert await caller.cancel(request_id) == reply_of(request_id, "unknown")
    await scene.submit(request_id="early")  # without its id in the subject
    await scene.submit(request_id="step", chain={"id": "early-chain", "step": 1})
    for request_id in ("early", "step"):
        assert (await scene.event(request_id))["type"] == CANCELLED
    assert scene.runs() == []
