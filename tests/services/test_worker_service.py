"""Request-reply: a caller with a plain NATS client gets only the result event."""

import asyncio
import json
import os
import signal
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from nats.aio.msg import Msg

from generation_contracts import Task
from tests.services.conftest import Caller, NewCaller
from tests.support.observations import failure_counts
from tests.support.scene import WITHIN, Scene

SUCCEEDED = "generation.v1.succeeded"


async def test_the_only_reply_to_a_call_is_the_stored_event(scene: Scene, caller: Caller) -> None:
    await scene.start()
    inbox = caller.client.new_inbox()
    answers = await caller.client.subscribe(inbox)
    subject = scene.subjects.call(scene.task)
    await caller.client.publish(subject, b'{"prompt":"a red circle","width":16}', reply=inbox)
    event = json.loads((await answers.next_msg(timeout=30)).data)
    assert event["type"] == SUCCEEDED
    assert event == await scene.event(event["request_id"])
    await scene.until_empty()
    await caller.client.flush()
    assert answers.pending_msgs == 0
    assert await scene.object(event["outputs"][0])


async def test_an_invalid_call_fails_at_once_and_is_not_queued(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("held_until_released", RELEASE_MARK="go")
    await scene.submit()
    await scene.until_noted("worker_waits")  # the only worker is busy until the test continues
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    refused = {
        "invalid_request": [
            b"{",
            b'{"prompt":""}',
            b'{"prompt":"a","colour":"red"}',
            b'{"prompt":"a","reply_to":"_INBOX.other"}',
        ],
        "deadline_exceeded": [json.dumps({"prompt": "a", "deadline": past}).encode()],
    }
    for code, bodies in refused.items():
        for body in bodies:
            event = await caller.call(body, within=10)
            assert (event["type"], event["failure"]["code"]) == ("generation.v1.failed", code)
            assert await scene.events(event["request_id"]) == []
    assert (await caller.call(b'{"prompt":"","request_id":"mine"}'))["request_id"] == "mine"
    assert await scene.pending() == 1
    (scene.folder / "go").touch()
    await scene.until_empty()


async def test_refused_calls_are_counted_by_code(scene: Scene, caller: Caller) -> None:
    worker = await scene.start()
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    for body in (b"{", b'{"prompt":""}', json.dumps({"prompt": "a", "deadline": past}).encode()):
        assert (await caller.call(body, within=10))["type"] == "generation.v1.failed"
    assert (await caller.call(b'{"prompt":"a","width":16}'))["type"] == SUCCEEDED
    assert await failure_counts(worker, "generation_refused_calls_total") == {
        "invalid_request": 2,
        "deadline_exceeded": 1,
        "unsupported_parameter": 0,
        "queue_full": 0,
        "internal": 0,
    }


async def test_a_message_with_a_forbidden_reply_subject_has_no_effect(
    scene: Scene, caller: Caller
) -> None:
    """Calls, cancellations, interrupts and $SRV, on a server without users."""
    worker = await scene.start("held_in_run")
    await scene.submit(request_id="running")
    await scene.until_noted("run")
    root = scene.subjects.root
    waiting = scene.subjects.request(scene.task, "waiting")
    await scene.sender.jetstream().publish(waiting, b'{"prompt":"a"}')
    forbidden = [
        *(
            f"{root}.{rest}"
            for rest in (
                "result.text_to_image.other",
                "dead.text_to_image",
                "released.text_to_image.1-1.1.released",
                "withdrawn.text_to_image.1-1",
                "retry.text_to_image.other",
                "interrupt.other",
                "request.text_to_image.other",
                "progress.text_to_image.other",
                "call.image_to_text",
            )
        ),
        "$JS.API.STREAM.PURGE.OTHER",
        "$SYS.REQ.SERVER.PING",
        "$SRV.PING.generation.other",
        "elsewhere.me",
    ]
    call = scene.subjects.call(scene.task)
    messages = [
        (call, b'{"prompt":"a","request_id":"other"}'),
        (call, b"{"),
        (f"{root}.cancel.waiting", b""),
        (f"{root}.cancel.not~an~id", b""),
        (f"{root}.upload", b'{"size":9,"media_type":"image/png"}'),
        (f"{root}.upload", b"{"),
        (f"{root}.interrupt.running", b""),
        ("$SRV.PING", b""),
        ("$SRV.INFO.generation", b""),
        ("$SRV.STATS.generation", b""),
    ]
    arrived: list[str] = []

    async def note(message: Msg) -> None:
        arrived.append(f"{message.subject}: {message.data.decode()}")

    for subject in forbidden:
        await caller.client.subscribe(subject, cb=note)
    for reply in forbidden:
        for subject, body in messages:
            await caller.client.publish(subject, body, reply=reply)
    # The worker replies to valid messages after all of these.
    assert (await caller.call(b"{"))["failure"]["code"] == "invalid_request"
    assert (await caller.cancel("unknown"))["status"] == "unknown"
    for verb in ("PING", "INFO", "STATS"):
        await caller.client.request(f"$SRV.{verb}.generation", timeout=WITHIN)
    await caller.client.flush()
    assert arrived == []
    assert await scene.pending() == 2
    refused = await failure_counts(worker, "generation_refused_calls_total")
    assert refused["invalid_request"] == len(forbidden) * len(messages) + 1
    assert 0 < worker.log_since_start().count("reply_subject_refused") < len(forbidden)
    (scene.folder / "run.go").touch()
    await scene.until_empty()
    for request_id in ("running", "waiting"):
        assert (await scene.event(request_id))["type"] == SUCCEEDED


async def test_concurrent_callers_get_their_results(scene: Scene, new_caller: NewCaller) -> None:
    await scene.start()
    callers = [await new_caller() for _ in range(3)]
    ids = [uuid4().hex for _ in range(12)]
    events = await asyncio.gather(
        *(callers[n % 3].call(request_id=one, width=16 + n) for n, one in enumerate(ids))
    )
    assert [event["request_id"] for event in events] == ids
    assert [event["outputs"][0]["width"] for event in events] == [16 + n for n in range(12)]


async def test_two_callers_with_one_request_get_one_result(
    scene: Scene, new_caller: NewCaller
) -> None:
    await scene.start("held_until_released", RELEASE_MARK="go")
    first, second = await new_caller(), await new_caller()
    replies = [one.start(one.call(request_id="same", seed=7)) for one in (first, second)]

    async def both_are_stored() -> bool:
        return await scene.pending() == 2

    await scene.until(both_are_stored, "two requests")
    (scene.folder / "go").touch()
    one, other = await asyncio.gather(*replies)
    assert one == other
    assert one["type"] == SUCCEEDED
    assert len(await scene.events("same")) == 1
    conflicting = await first.call(request_id="same", seed=8)
    assert conflicting["failure"]["code"] == "request_id_conflict"


async def test_a_caller_gets_the_result_after_its_worker_is_killed(
    scene: Scene, caller: Caller
) -> None:
    first = await scene.start("held_in_run")
    reply = caller.start(caller.call(request_id="survivor"))
    await scene.until_noted("run")
    first.kill()
    await scene.start()
    event = await reply
    assert (event["type"], event["attempt"]) == (SUCCEEDED, 2)
    assert event["worker"] != first.name


async def test_a_caller_gets_the_result_after_the_server_is_killed(
    scene: Scene, caller: Caller
) -> None:
    await scene.start("held_in_run")
    reply = caller.start(caller.call(request_id="survivor"))
    await scene.until_noted("run")
    scene.stack.nats.kill()
    scene.stack.nats.start()
    await asyncio.to_thread(scene.stack.nats.wait_ready)
    (scene.folder / "run.go").touch()
    assert (await reply)["type"] == SUCCEEDED


async def test_the_result_for_a_disconnected_caller_is_stored(scene: Scene, caller: Caller) -> None:
    await scene.start("held_in_run")
    reply = caller.start(caller.call(request_id="left"))
    await scene.until_noted("run")
    reply.cancel()
    await caller.client.close()
    (scene.folder / "run.go").touch()
    assert (await scene.event("left"))["type"] == SUCCEEDED


async def test_unprocessed_calls_of_a_stopping_worker_are_stored(
    scene: Scene, caller: Caller
) -> None:
    worker = await scene.start()
    os.kill(worker.pid, signal.SIGSTOP)
    inbox = caller.client.new_inbox()
    answers = await caller.client.subscribe(f"{inbox}.*")
    calls = {f"call-{number}" for number in range(100)}
    for one in sorted(calls):
        body = json.dumps({"prompt": "a", "request_id": one, "steps": 1}).encode()
        await caller.client.publish(scene.subjects.call(scene.task), body, reply=f"{inbox}.{one}")
    await caller.client.flush()
    worker.signal(signal.SIGTERM)
    os.kill(worker.pid, signal.SIGCONT)
    assert await scene.exit_code(worker) == 0
    await scene.start()
    answered = [json.loads((await answers.next_msg(WITHIN)).data) for _ in calls]
    assert {event["request_id"] for event in answered} == calls
    assert {event["type"] for event in answered} == {SUCCEEDED}


async def test_a_full_queue_fails_a_call_at_once(scene: Scene, caller: Caller) -> None:
    await scene.start("held_in_run")
    jetstream = scene.sender.jetstream()
    config = (await jetstream.stream_info(scene.subjects.requests_stream(scene.task))).config
    await jetstream.update_stream(config.evolve(max_msgs=1))
    waiting = caller.start(caller.call(request_id="the-one"))
    await scene.until_noted("run")
    refused = await caller.call(within=10)
    assert (refused["failure"]["code"], refused["failure"]["retryable"]) == ("queue_full", True)
    (scene.folder / "run.go").touch()
    assert (await waiting)["type"] == SUCCEEDED


async def test_the_service_info_contains_model_and_schema(scene: Scene, caller: Caller) -> None:
    await scene.start()
    answer = await caller.client.request("$SRV.INFO.generation", b"", timeout=10)
    info = json.loads(answer.data)
    assert (info["metadata"]["id"], info["metadata"]["family"]) == ("quick", "faults")
    endpoints = {one["name"]: one for one in info["endpoints"]}
    call = endpoints[str(Task.TEXT_TO_IMAGE)]
    assert call["subject"] == scene.subjects.call(scene.task)
    schema = json.loads(call["metadata"]["request"])
    assert schema["properties"]["prompt"]["type"] == "string"
    await caller.call()
    # A reply that repeats these headers would exceed the server's limit and close the connection.
    headers = {"Filler": "x" * 1_048_000}
    await caller.client.request("$SRV.INFO.generation", timeout=10, headers=headers)
    stats = json.loads((await caller.client.request("$SRV.STATS.generation", timeout=10)).data)
    calls = {one["name"]: one["num_requests"] for one in stats["endpoints"]}
    assert calls == {str(Task.TEXT_TO_IMAGE): 1, "cancel": 0, "upload": 0}


async def test_several_workers_share_the_calls(scene: Scene, caller: Caller) -> None:
    await scene.start()
    await scene.start()
    events = [await caller.call() for _ in range(6)]
    assert {event["type"] for event in events} == {SUCCEEDED}
    assert len(scene.runs()) == 6  # each call ran once
