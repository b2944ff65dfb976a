"""Several models of one task: a queue for each, on one server, at the same time."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import nats
import pytest
from nats.js.api import StreamConfig

from consumer.bus.connection import Bus, connect
from consumer.bus.queue_directory import QueueDirectory
from consumer.bus.queue_removal import QueueInUse, remove_queue
from generation_client import GenerationClient, RequestFailed, RequestInvalid, new_request_id
from generation_contracts import SucceededEvent, Task, TextToImageRequest
from generation_contracts.base import DEFAULT_QUEUES
from tests.gateway.open_jobs import settings_of
from tests.gateway.serving import serving
from tests.services.conftest import NewCaller
from tests.support.scene import WITHIN, Scene

FAST = "fast"
FAST_MODEL = "org/fast-model"  # the model that the queue declares; its workers report `quick`
DECLARED = {"CONSUMER_QUEUE": FAST, "MODEL_ID": FAST_MODEL}
LIST = ("queues", "list", "--json")
SUCCEEDED, FAILED = "generation.v1.succeeded", "generation.v1.failed"


@pytest.fixture
async def client(scene: Scene) -> AsyncIterator[GenerationClient]:
    """A client of an installation whose queue `fast` exists."""
    await scene.apply(**DECLARED)
    connection = await nats.connect(scene.stack.nats.url)
    async with GenerationClient(connection, root=scene.subjects.root) as client:
        yield client
    await connection.close()


@pytest.fixture
async def bus(scene: Scene) -> AsyncIterator[Bus]:
    bus = await connect(settings_of(scene), name="test", within=WITHIN)
    yield bus
    await bus.close()


async def run_cli(scene: Scene, *arguments: str) -> tuple[int, str]:
    """Run a `consumer` command in a process; return its exit code and its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "consumer",
        *arguments,
        env={**os.environ, **scene.settings(), "MODEL_TYPE": ""},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_two_models_of_a_task_serve_at_the_same_time(
    scene: Scene, client: GenerationClient
) -> None:
    await scene.start()
    await scene.start(CONSUMER_QUEUE=FAST)
    declared = {queue.name: queue for queue in await client.queues()}[FAST]
    assert (declared.task, declared.model) == (Task.TEXT_TO_IMAGE, FAST_MODEL)
    request_id = new_request_id()  # the same in both queues
    results = await asyncio.gather(
        client.text_to_image("a", request_id=request_id),
        client.text_to_image("a", request_id=request_id, model=FAST_MODEL),
        client.text_to_image("a", model=FAST),
        client.text_to_image("a", queue=FAST),
    )
    assert [event.queue for event in results] == [None, FAST, FAST, FAST]
    stored = await client.result(FAST, request_id, within=0)
    assert stored == results[1]
    assert isinstance(stored, SucceededEvent)
    prefix = f"{scene.subjects.root}/{FAST}/{request_id}/"
    assert [output.key.startswith(prefix) for output in stored.outputs] == [True]
    assert await client.result("text_to_image", request_id, within=0) == results[0]
    with pytest.raises(RequestFailed) as raised:
        await client.text_to_image("a", model="other")
    failure = raised.value.event.failure
    assert (failure.code, failure.details["parameter"]) == ("unsupported_parameter", "model")
    assert "quick" in failure.message
    assert "consumer queues list" in failure.message


async def test_the_gateway_routes_by_model(scene: Scene, client: GenerationClient) -> None:
    await scene.start()
    await scene.start(CONSUMER_QUEUE=FAST)
    async with (
        serving(settings_of(scene)) as url,
        httpx2.AsyncClient(base_url=url, timeout=WITHIN) as http,
    ):
        models = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["quick", "image_to_text", FAST_MODEL]
        for name, queue in (("quick", "text_to_image"), ("fast-model", FAST), (FAST, FAST)):
            body = {"prompt": "a", "model": name}
            answer = await http.post("/v1/images/generations", json=body)
            assert answer.status_code == 200, answer.text
            job = (await http.get(f"/v1/jobs/{answer.headers['x-request-id']}")).json()
            assert (job["queue"], job["state"]) == (queue, "succeeded")
        refused = await http.post("/v1/images/generations", json={"prompt": "a", "model": "other"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        step = {"task": "text_to_image", "prompt": "a", "model": "other"}
        chain = {"task": "text_to_image", "prompt": "a", "then": [step]}
        refused = await http.post("/v1/jobs", json=chain)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "then.0.model")
        job = {"task": "text_to_image", "prompt": "a", "model": FAST_MODEL}
        submitted = (await http.post("/v1/jobs", json=job)).json()
        assert submitted["queue"] == FAST
        await client.result(FAST, submitted["id"], within=WITHIN)
        listed = (await http.get("/v1/jobs", params={"queue": FAST})).json()["data"]
        assert len(listed) == 3
        queues = (await http.get("/v1/queue")).json()
        assert [one["queue"] for one in queues["tasks"]] == ["text_to_image", "image_to_text"]
        last = queues["queues"][2]
        assert (last["task"], last["queue"], last["model"]) == ("text_to_image", FAST, FAST_MODEL)


async def test_the_gateway_knows_a_model_without_any_worker(
    scene: Scene, client: GenerationClient
) -> None:
    async with (
        serving(settings_of(scene)) as url,
        httpx2.AsyncClient(base_url=url, timeout=WITHIN) as http,
    ):
        job = {"task": "text_to_image", "prompt": "a", "model": "fast-model"}
        submitted = (await http.post("/v1/jobs", json=job)).json()
        assert (submitted["queue"], submitted["state"]) == (FAST, "queued")
        await scene.start(CONSUMER_QUEUE=FAST)
        event = await client.result(FAST, submitted["id"], within=WITHIN)
        assert event.type == SUCCEEDED


async def test_calls_of_the_task_are_routed_by_model(
    scene: Scene, client: GenerationClient, new_caller: NewCaller
) -> None:
    caller = await new_caller()
    await scene.start(CONSUMER_QUEUE=FAST)  # it receives the calls of the task too
    routed = await caller.call(model="fast-model")
    assert (routed["type"], routed["queue"]) == (SUCCEEDED, FAST)
    await scene.start()
    default = await caller.call()
    assert (default["type"], "queue" in default) == (SUCCEEDED, False)
    own = await caller.client.request(scene.subjects.call(FAST), b'{"prompt": "a"}', timeout=WITHIN)
    assert json.loads(own.data)["queue"] == FAST
    requests = scene.subjects.requests_stream(FAST)
    before = (await scene.sender.jetstream().stream_info(requests)).state.last_seq
    wrong = await caller.client.request(
        scene.subjects.call(FAST), b'{"prompt": "a", "model": "other"}', timeout=WITHIN
    )
    refused = json.loads(wrong.data)
    assert (refused["type"], refused["queue"]) == (FAILED, FAST)
    assert refused["failure"]["code"] == "unsupported_parameter"
    assert FAST_MODEL in refused["failure"]["message"]
    after = (await scene.sender.jetstream().stream_info(requests)).state.last_seq
    assert after == before  # the endpoint has refused it, and stored nothing


async def test_a_model_that_no_queue_serves_is_refused_at_once(
    scene: Scene, client: GenerationClient, new_caller: NewCaller
) -> None:
    await scene.apply(MODEL_ID="org/quick")  # now the default queue declares its model too
    await scene.start()
    with pytest.raises(RequestInvalid, match="model: no queue of text_to_image serves this model"):
        await client.text_to_image("a", model="other")
    refused = await (await new_caller()).call(model="other")
    assert (refused["type"], refused["failure"]["code"]) == (FAILED, "unsupported_parameter")
    step = {"task": "text_to_image", "prompt": "b", "model": "other"}
    request_id = await scene.submit(then=[step])
    assert (await scene.event(request_id))["type"] == SUCCEEDED
    ended = await scene.event(f"{request_id}-2")
    assert ended["failure"]["code"] == "unsupported_parameter"


async def test_a_chain_continues_in_the_queue_of_the_steps_model(
    scene: Scene, client: GenerationClient
) -> None:
    await scene.start()
    await scene.start(CONSUMER_QUEUE=FAST)
    step: Any = {"task": "text_to_image", "prompt": "b", "model": FAST_MODEL}
    request = TextToImageRequest(prompt="a", then=[step])
    request_id = await client.submit(request)
    event = await client.result(FAST, f"{request_id}-2", within=WITHIN)
    assert (event.type, event.queue) == (SUCCEEDED, FAST)
    assert event.chain is not None
    assert (event.chain.id, event.chain.step) == (request_id, 2)


async def test_a_worker_of_one_queue_cancels_requests_of_another(
    scene: Scene, client: GenerationClient
) -> None:
    await scene.start()
    waiting = await client.submit(TextToImageRequest(prompt="a"), queue=FAST)
    assert (await client.cancel(waiting)).status == "cancelled"
    assert (await client.result(FAST, waiting, within=0)).type == "generation.v1.cancelled"
    await scene.start("held_in_run", CONSUMER_QUEUE=FAST)
    running = await client.submit(TextToImageRequest(prompt="a"), queue=FAST)
    await scene.until_noted("run")
    assert (await client.cancel(running)).status == "stopping"
    (scene.folder / "run.go").touch()
    assert await client.ended(running, within=WITHIN) == "generation.v1.cancelled"


async def test_a_dead_letter_of_a_queue_is_replayed_into_it(
    scene: Scene, client: GenerationClient
) -> None:
    failing = await scene.start("raising", CONSUMER_QUEUE=FAST, CONSUMER_MAX_ATTEMPTS="1")
    request_id = await client.submit(TextToImageRequest(prompt="a"), queue=FAST)
    assert (await client.result(FAST, request_id, within=WITHIN)).type == FAILED
    failing.stop()
    _, listed = await run_cli(scene, "dead-letters", "list", "--json")
    assert [json.loads(line)["queue"] for line in listed.splitlines()] == [FAST]
    code, output = await run_cli(scene, "dead-letters", "replay", request_id)
    assert code == 0, output
    await scene.start(CONSUMER_QUEUE=FAST)
    assert (await client.result(FAST, request_id, within=WITHIN)).type == SUCCEEDED


async def test_queues_are_created_listed_and_removed(scene: Scene) -> None:
    create = ("queues", "create", FAST, "--task")
    code, output = await run_cli(scene, *create, "text_to_image", "--model", "m")
    assert code == 0, output
    _, again = await run_cli(scene, *create, "text-to-image", "--model", "m")
    assert {line.rpartition(" ")[2] for line in again.splitlines()} == {"unchanged"}
    code, output = await run_cli(scene, *create, "image_to_text")
    assert (code, "is a queue of text_to_image" in output) == (69, True)
    listed = [json.loads(line) for line in (await run_cli(scene, *LIST))[1].splitlines()]
    assert [one["queue"] for one in listed] == ["text_to_image", "image_to_text", FAST]
    assert listed[2] == {
        "queue": FAST,
        "task": "text_to_image",
        "model": "m",
        "created_by": "consumer queues create",
        "requests": 0,
    }


async def test_a_queue_in_use_is_not_removed_without_force(
    scene: Scene, client: GenerationClient, bus: Bus
) -> None:
    async def remove(*, force: bool = False) -> None:
        await remove_queue(bus, scene.subjects, FAST, force=force)

    worker = await scene.start(CONSUMER_QUEUE=FAST)
    with pytest.raises(QueueInUse, match="its workers are running"):
        await remove()
    worker.stop()
    await client.submit(TextToImageRequest(prompt="a"), queue=FAST)
    with pytest.raises(QueueInUse, match="it has 1 requests"):
        await remove()
    await remove(force=True)
    names = {info.config.name for info in await scene.sender.jetstream().streams_info()}
    assert scene.subjects.requests_stream(FAST) not in names
    assert scene.subjects.advisories_stream_of(FAST) not in names
    await remove(force=True)  # completes an interrupted removal
    assert [queue.name for queue in await client.queues()] == list(DEFAULT_QUEUES)


async def test_a_new_queue_changes_no_stream_that_workers_of_earlier_versions_compare(
    scene: Scene,
) -> None:
    async def configs() -> dict[str, StreamConfig]:
        found = await scene.sender.jetstream().streams_info()
        root = f"{scene.subjects.root.upper()}_"
        return {str(i.config.name): i.config for i in found if str(i.config.name).startswith(root)}

    before = await configs()
    await scene.apply(**DECLARED)
    after = await configs()
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        scene.subjects.requests_stream(FAST),
        scene.subjects.advisories_stream_of(FAST),
    }


async def test_a_stream_of_someone_else_is_no_queue(scene: Scene, bus: Bus) -> None:
    jetstream = scene.sender.jetstream()
    root = scene.subjects.root
    config = StreamConfig(
        name=f"{root.upper()}_OTHER",
        subjects=[f"{root}.request.other"],
        metadata={"generation.queue": "other", "generation.task": "text_to_image"},
    )
    await jetstream.add_stream(config)
    assert list(await QueueDirectory(bus, scene.subjects).queues()) == list(DEFAULT_QUEUES)


async def test_a_worker_refuses_the_queue_of_another_task(
    scene: Scene, client: GenerationClient
) -> None:
    worker = scene.launch(CONSUMER_QUEUE=FAST, MODEL_TYPE="image_to_text")
    assert await scene.exit_code(worker) == 69
    assert "it is a queue of text_to_image, not of image_to_text" in worker.log_since_start()
