"""Custom runners in real workers, each behind its own queue."""

import asyncio
import io
import wave
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import nats
import numpy as np
import pytest
from PIL import Image

from generation_client import GenerationClient, RequestCancelled, RequestFailed, new_request_id
from generation_contracts import (
    CustomRequest,
    FailedEvent,
    FileArtifact,
    ImageArtifact,
    JsonOutput,
    StartedEvent,
    Task,
)
from tests.gateway.open_jobs import settings_of
from tests.gateway.serving import serving
from tests.support import tiny_classifier
from tests.support.scene import Scene

RUNNER = "custom_runner"
BROKEN = """
from generation_runner import *
from pydantic import BaseModel

class Endless(Runner):
    name = "endless"

    def run(self, parameters, context):
        number = 0
        while True:
            number += 1
            context.step(min(number, 99), 100)
            import time; time.sleep(0.01)

class Deaf(Runner):
    name = "deaf"

    def run(self, parameters, context):
        import os, pathlib, time
        folder = pathlib.Path(os.environ["RUNNERS_FOLDER"])
        (folder / "running").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        return Text("too late")

class Wrong(Runner):
    def run(self, parameters, context):
        return {"secret": "value"}

class Raises(Runner):
    def run(self, parameters, context):
        raise ValueError("a secret of the request")
"""


@pytest.fixture
async def client(scene: Scene) -> AsyncIterator[GenerationClient]:
    connection = await nats.connect(scene.stack.nats.url)
    async with GenerationClient(connection, root=scene.subjects.root) as client:
        yield client
    await connection.close()


async def start(scene: Scene, runner: str, **settings: str) -> None:
    queue = runner.partition(":")[2].lower()
    declared = {"MODEL_TYPE": "custom", "MODEL_RUNNER": runner, "CONSUMER_QUEUE": queue}
    await scene.apply(**declared)
    await scene.start(RUNNER, **declared, **settings)


@pytest.fixture
def broken(tmp_path: Path) -> str:
    (tmp_path / "broken.py").write_text(BROKEN)
    return str(tmp_path)


async def test_an_upscaler_returns_an_image(
    scene: Scene, client: GenerationClient, tmp_path: Path
) -> None:
    await start(scene, "upscaler:Upscaler")
    file = tmp_path / "square.png"
    Image.new("RGB", (20, 10), "red").save(file)
    result = await client.generate(Task.CUSTOM, images=file, parameters={"factor": 3})
    (output,) = result.outputs
    assert isinstance(output, ImageArtifact)
    assert (output.width, output.height, output.marks) == (60, 30, ("iptc",))
    assert result.queue == "upscaler"
    assert (result.model.id, result.model.revision) == ("upscaler", "1.0")
    picture = Image.open(io.BytesIO(await client.download(output)))
    assert picture.getpixel((30, 15)) == (255, 0, 0)
    with pytest.raises(RequestFailed) as refused:
        await client.generate(Task.CUSTOM, images=file, parameters={"factor": 9})
    failure = refused.value.event.failure
    assert failure.code == "unsupported_parameter"
    assert failure.details["parameter"] == "parameters.factor"
    with pytest.raises(RequestFailed, match="takes 1"):
        await client.generate(Task.CUSTOM, parameters={})


async def test_a_tone_generator_returns_a_file_with_progress(
    scene: Scene, client: GenerationClient
) -> None:
    await start(scene, "tone:Tone")
    events: list[Any] = []
    result = await client.generate(
        Task.CUSTOM, parameters={"text": "cab 1"}, on_event=events.append
    )
    (output,) = result.outputs
    assert isinstance(output, FileArtifact)
    assert (output.media_type, output.key[-4:]) == ("audio/wav", ".wav")
    with wave.open(io.BytesIO(await client.download(output))) as sound:
        assert sound.getnframes() == 5 * int(sound.getframerate() * 0.1)
        samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").reshape(5, -1)
    assert [bool(letter.any()) for letter in samples] == [True, True, True, False, False]
    assert isinstance(events[0], StartedEvent)


async def test_a_classifier_returns_json_for_batches(
    scene: Scene, client: GenerationClient, tmp_path: Path
) -> None:
    tiny_classifier.save(tmp_path / "model")
    await start(
        scene,
        "classifier:Classifier",
        CLASSIFIER_MODEL=str(tmp_path / "model"),
        CONSUMER_MAX_BATCH="4",
        CONSUMER_MAX_ACK_PENDING="8",
        CONSUMER_BATCH_WINDOW_MS="200",
    )
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("black", "white", "black")]
    results = await asyncio.gather(
        *(
            client.generate(Task.CUSTOM, images=picture, parameters={"top": 1 + number})
            for number, picture in enumerate(pictures)
        )
    )
    for number, result in enumerate(results):
        (output,) = result.outputs
        assert isinstance(output, JsonOutput)
        assert isinstance(output.value, list)
        assert len(output.value) == 1 + number
        assert output.value[0]["label"] == ("NSFW" if number == 1 else "normal")


async def test_a_custom_runner_and_two_models_serve_at_the_same_time(
    scene: Scene, client: GenerationClient
) -> None:
    fast = {"CONSUMER_QUEUE": "fast", "MODEL_ID": "org/fast"}
    await scene.apply(**fast)
    await scene.start()
    await scene.start(CONSUMER_QUEUE="fast")
    await start(scene, "upscaler:Upscaler")
    drawn, fast_drawn = await asyncio.gather(
        client.text_to_image("a"), client.text_to_image("a", model="org/fast")
    )
    assert (drawn.queue, fast_drawn.queue) == (None, "fast")
    request = CustomRequest(
        request_id=new_request_id(),
        images=({"bucket": drawn.outputs[0].bucket, "key": drawn.outputs[0].key},),
        then=({"task": "custom", "model": "upscaler", "images": "$outputs"},),
    )
    first = await client.run(request)
    last = await client.result("upscaler", f"{request.request_id}-2", within=30)
    assert [output.width for output in (*first.outputs, *last.outputs)] == [32, 64]
    queues = {queue.name: queue.task for queue in await client.queues()}
    assert queues["upscaler"] == Task.CUSTOM


async def test_a_runner_that_breaks_the_rules_is_treated_as_a_model(
    scene: Scene, client: GenerationClient, broken: str
) -> None:
    await start(scene, "broken:Wrong", RUNNERS_FOLDER=broken, CONSUMER_MAX_ATTEMPTS="1")
    await start(scene, "broken:Raises", RUNNERS_FOLDER=broken, CONSUMER_MAX_ATTEMPTS="1")
    for queue in ("wrong", "raises"):
        with pytest.raises(RequestFailed) as failed:
            await client.generate(Task.CUSTOM, queue=queue)
        event = failed.value.event
        assert isinstance(event, FailedEvent)
        assert event.failure.code == "model_error"
        assert "secret" not in event.model_dump_json()


async def test_a_custom_run_is_cancelled_at_its_next_step(
    scene: Scene, client: GenerationClient, broken: str
) -> None:
    await start(scene, "broken:Endless", RUNNERS_FOLDER=broken)
    started = asyncio.Event()
    request_id = new_request_id()
    running = asyncio.ensure_future(
        client.generate(Task.CUSTOM, request_id=request_id, on_event=lambda _: started.set())
    )
    await started.wait()
    assert (await client.cancel(request_id)).status == "stopping"
    with pytest.raises(RequestCancelled):
        await running


async def test_a_run_without_steps_is_cancelled_when_it_ends(
    scene: Scene, client: GenerationClient, broken: str
) -> None:
    await start(scene, "broken:Deaf", RUNNERS_FOLDER=broken)
    request_id = new_request_id()
    running = asyncio.ensure_future(client.generate(Task.CUSTOM, request_id=request_id))

    async def runs() -> bool:
        return (Path(broken) / "running").exists()

    await scene.until(runs, "run")
    assert (await client.cancel(request_id)).status == "stopping"
    (Path(broken) / "go").touch()
    with pytest.raises(RequestCancelled):
        await running


async def test_a_custom_runner_is_a_job_of_the_gateway(scene: Scene, tmp_path: Path) -> None:
    await start(scene, "tone:Tone")
    async with serving(settings_of(scene)) as url, httpx2.AsyncClient(base_url=url) as http:
        body = {"task": "custom", "model": "tone", "parameters": {"text": "a"}}
        job = (await http.post("/v1/jobs", json=body)).json()

        async def ended() -> bool:
            return (await http.get(f"/v1/jobs/{job['id']}")).json()["state"] == "succeeded"

        await scene.until(ended, "job")
        document = (await http.get(f"/v1/jobs/{job['id']}")).json()
        output = await http.get(document["result"]["outputs"][0]["content_url"])
        assert output.headers["content-type"] == "audio/wav"
        assert output.content.startswith(b"RIFF")
        assert output.headers["content-disposition"] == "attachment"
        assert output.headers["content-security-policy"] == "sandbox"
        models = (await http.get("/v1/models")).json()["data"]
        assert "tone" in {model["id"] for model in models}
        refused = await http.post("/v1/jobs", json={**body, "model": "other"})
        assert refused.status_code == 404
