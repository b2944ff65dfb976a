"""Which deliveries count as attempts, and the handling of max-deliver-exhausted requests."""

import json
import signal
from typing import Any

import pytest

from generation_contracts import Task
from tests.support.scene import Scene


async def change_durable(scene: Scene, **values: Any) -> None:
    """Change the durable as an operator can, without the workers."""
    jetstream = scene.sender.jetstream()
    stream, name = scene.subjects.requests_stream(scene.task), str(scene.task)
    info = await scene.sender.request(f"$JS.API.CONSUMER.INFO.{stream}.{name}")
    config = {**json.loads(info.data)["config"], **values}
    response = await scene.sender.request(
        f"$JS.API.CONSUMER.CREATE.{stream}.{name}",
        json.dumps({"stream_name": stream, "config": config}).encode(),
    )
    assert "error" not in json.loads(response.data), response.data
    assert (await jetstream.consumer_info(stream, name)).config.max_deliver == values["max_deliver"]


async def test_requeue_of_a_draining_worker_is_not_an_attempt(scene: Scene) -> None:
    settings = {"CONSUMER_MAX_ATTEMPTS": "1", "CONSUMER_DRAIN_GRACE": "0.1"}
    await scene.apply(CONSUMER_MAX_ATTEMPTS="1")
    request_id = await scene.submit(steps=200)
    for run in (1, 2):
        draining = await scene.start(**settings)
        await scene.until_noted("runs", run)
        draining.signal(signal.SIGTERM)
        assert await scene.exit_code(draining) == 0
    await scene.start(**settings)
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 3)
    assert await scene.dead_letters() == []
    await scene.until_empty()


async def test_model_error_counts_as_an_attempt(scene: Scene) -> None:
    await scene.apply(CONSUMER_MAX_ATTEMPTS="2")  # the durable stores the limit for all workers
    await scene.start("raising", CONSUMER_MAX_ATTEMPTS="5")
    request_id = await scene.submit()
    event = await scene.event(request_id)
    assert (event["failure"]["code"], event["attempt"]) == ("model_error", 2)


async def test_max_deliver_exhausted_request_is_dead_lettered(scene: Scene) -> None:
    await change_durable(scene, max_deliver=1)
    dying = await scene.start("poison")
    inbox = scene.sender.new_inbox()
    answers = await scene.sender.subscribe(inbox)
    request_id = await scene.submit(prompt="poison", reply_to=inbox, metadata={"customer": "42"})
    next_id = await scene.submit()
    assert await scene.exit_code(dying) == -signal.SIGKILL
    await scene.start()

    event = await scene.event(request_id)
    assert (event["failure"]["code"], event["attempt"]) == ("worker_lost", 1)
    assert event["metadata"] == {"customer": "42"}
    assert json.loads((await answers.next_msg(timeout=5)).data) == event
    assert (await scene.event(next_id))["type"] == "generation.v1.succeeded"
    await scene.until_empty()
    (letter,) = await scene.dead_letters()
    assert letter["Dead-Letter-Code"] == "worker_lost"
    assert letter["Dead-Letter-Request-Id"] == request_id
    assert scene.runs() == [request_id, next_id]

    async def settled() -> bool:
        info = await scene.sender.jetstream().stream_info(scene.subjects.advisories_stream)
        return info.state.messages == 0

    await scene.until(settled, "settled advisory")


@pytest.mark.parametrize(
    "forged",
    [b"no json", b"{}", b'{"stream":"%s","stream_seq":1,"deliveries":9}'],
    ids=["not json", "empty", "another stream"],
)
async def test_forged_advisory_has_no_effect(scene: Scene, forged: bytes) -> None:
    await scene.start()
    request_id = await scene.submit()
    event = await scene.event(request_id)
    results = scene.subjects.results_stream
    durable = f"{scene.subjects.requests_stream(scene.task)}.{Task.TEXT_TO_IMAGE}"
    await scene.sender.publish(
        f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{durable}",
        forged % results.encode() if b"%s" in forged else forged,
    )

    async def read() -> bool:
        info = await scene.sender.jetstream().stream_info(scene.subjects.advisories_stream)
        return info.state.last_seq == 1 and info.state.messages == 0

    await scene.until(read, "advisory read")
    assert await scene.event(request_id) == event
    assert (await scene.event(await scene.submit()))["type"] == "generation.v1.succeeded"


async def test_requeues_never_end_a_request(scene: Scene) -> None:
    """A request whose deliveries are used up is published again."""
    await change_durable(scene, max_deliver=2)
    request_id = await scene.submit(steps=200)
    for run in (1, 2):
        draining = await scene.start(CONSUMER_DRAIN_GRACE="0.1")
        await scene.until_noted("runs", run)
        draining.signal(signal.SIGTERM)
        assert await scene.exit_code(draining) == 0
    await scene.start()
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 3)
    assert await scene.dead_letters() == []
    await scene.until_empty()
