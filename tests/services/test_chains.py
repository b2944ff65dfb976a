"""Chains of requests through daemon processes of both tasks, also after a kill."""

import asyncio
import json
from typing import Any

from generation_contracts import Task
from tests.services.conftest import Caller
from tests.support.observations import failure_counts
from tests.support.scene import Event, Scene

SUCCEEDED = "generation.v1.succeeded"
DRAW = {"task": "text_to_image", "prompt": "as a woodcut: $text"}
DESCRIBE = {"task": "image_to_text", "prompt": "Describe it."}


async def start_both(scene: Scene, cause: str = "none") -> None:
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start(cause)
    await scene.start(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))


async def stored(scene: Scene, task: Task, request_id: str) -> Event:
    """Wait for the terminal event of a step."""
    scene.task = task
    try:
        return await scene.event(request_id)
    finally:
        scene.task = Task.TEXT_TO_IMAGE


async def test_the_caller_gets_only_the_result_of_the_last_step(
    scene: Scene, caller: Caller
) -> None:
    await start_both(scene)
    inbox = caller.client.new_inbox()
    answers = await caller.client.subscribe(inbox)
    body: dict[str, Any] = {"prompt": "a", "request_id": "c", "metadata": {"order": "7"}}
    body |= {"num_images": 3, "then": [DESCRIBE, DRAW]}
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await caller.client.publish(
        scene.subjects.call(scene.task),
        json.dumps(body).encode(),
        reply=inbox,
        headers={"traceparent": trace},
    )
    answer = await answers.next_msg(timeout=30)
    event = json.loads(answer.data)
    assert (event["request_id"], event["type"]) == ("c-3", SUCCEEDED)
    assert event["chain"] == {"id": "c", "step": 3, "of": 3}
    assert event["metadata"] == {"order": "7"}
    assert (answer.headers or {})["traceparent"] == trace
    described = await stored(scene, Task.IMAGE_TO_TEXT, "c-2")
    assert described["outputs"][0]["text"] == "3 images"
    assert (await scene.event("c"))["chain"] == {"id": "c", "step": 1, "of": 3}
    await scene.until_empty()
    await caller.client.flush()
    assert answers.pending_msgs == 0


async def test_each_image_has_a_separate_request_and_reply(scene: Scene, caller: Caller) -> None:
    await start_both(scene)
    inbox = caller.client.new_inbox()
    answers = await caller.client.subscribe(inbox)
    body = {"prompt": "a", "request_id": "e", "num_images": 3, "then": [{**DESCRIBE, "each": True}]}
    await caller.client.publish(
        scene.subjects.call(scene.task), json.dumps(body).encode(), reply=inbox
    )
    events = [json.loads((await answers.next_msg(timeout=30)).data) for _ in range(3)]
    assert {event["request_id"] for event in events} == {"e-2-0", "e-2-1", "e-2-2"}
    assert {event["outputs"][0]["text"] for event in events} == {"1 images"}


async def test_a_worker_killed_between_two_steps_neither_loses_nor_repeats_a_step(
    scene: Scene, caller: Caller
) -> None:
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start("killed_after_result")
    await scene.start(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    answer = caller.start(caller.call(request_id="k", then=[DESCRIBE]))
    assert (await scene.event("k"))["type"] == SUCCEEDED
    (scene.folder / "die").touch()
    await scene.exit_code(scene.workers[0])
    await scene.start()
    event = await answer
    assert (event["request_id"], event["type"]) == ("k-2", SUCCEEDED)
    await scene.until_empty()
    assert sorted(scene.runs()) == ["k", "k-2"]


async def test_a_failed_step_ends_the_chain(scene: Scene, caller: Caller) -> None:
    await scene.apply(MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    await scene.start()
    await scene.start("raising", MODEL_TYPE=str(Task.IMAGE_TO_TEXT))
    event = await caller.call(request_id="f", then=[DESCRIBE, DRAW])
    assert (event["request_id"], event["failure"]["code"]) == ("f-2", "model_error")
    assert event["chain"] == {"id": "f", "step": 2, "of": 3}
    await scene.until_empty()
    assert await scene.events("f-3") == []


async def test_an_invalid_routing_slip_is_refused(scene: Scene, caller: Caller) -> None:
    await scene.start()
    event = await caller.call(then=[DRAW])
    assert event["failure"]["code"] == "invalid_request"
    assert event["failure"]["message"].startswith("then.0.prompt")
    request_id = await scene.submit(then=[DRAW])
    assert (await scene.event(request_id))["failure"]["code"] == "invalid_request"
    assert scene.runs() == []


async def test_a_full_queue_of_the_next_step_fails_the_chain(scene: Scene, caller: Caller) -> None:
    worker = await scene.start("held_in_run")
    answer = caller.start(caller.call(request_id="q", then=[DESCRIBE]))
    await scene.until_noted("run")
    jetstream = scene.sender.jetstream()
    next_queue = scene.subjects.requests_stream(Task.IMAGE_TO_TEXT)
    config = (await jetstream.stream_info(next_queue)).config
    await jetstream.update_stream(config.evolve(max_msgs=1))
    await jetstream.publish(scene.subjects.request(Task.IMAGE_TO_TEXT), b"{}")
    (scene.folder / "run.go").touch()
    event = await answer
    assert (event["request_id"], event["failure"]["code"]) == ("q-2", "queue_full")
    assert (await stored(scene, Task.IMAGE_TO_TEXT, "q-2")) == event
    assert (await scene.event("q"))["type"] == SUCCEEDED
    broken = await failure_counts(worker, "generation_broken_chains_total")
    none = dict.fromkeys(("invalid_request", "unsupported_parameter", "internal"), 0)
    assert broken == {"queue_full": 1, **none}


async def test_a_second_caller_of_a_chain_gets_the_result(scene: Scene, caller: Caller) -> None:
    await start_both(scene)
    first, second = await asyncio.gather(
        *(caller.call(request_id="twice", then=[DESCRIBE]) for _ in range(2))
    )
    assert first == second
    assert first["request_id"] == "twice-2"
    await scene.until_empty()
    assert sorted(scene.runs()) == ["twice", "twice-2"]
