"""The client as a program uses it, on real servers and a real daemon process with a quick model."""

import asyncio
import base64
import hashlib
import io
import subprocess
import sys

import pytest
from PIL import Image
from pydantic import ValidationError

from generation_client import (
    DownloadFailed,
    GenerationClient,
    NoWorker,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    RequestIdTaken,
    RequestTooLarge,
    ServiceUnavailable,
)
from generation_contracts import (
    CancelledEvent,
    ImageArtifact,
    InlineImage,
    ProgressEvent,
    StartedEvent,
    SucceededEvent,
    Task,
    TextOutput,
    TextToImageRequest,
)
from tests.faults.scene import Scene


def picture() -> str:
    """A small PNG, as base64."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def client_of(scene: Scene) -> GenerationClient:
    return GenerationClient(scene.stack.nats.url, root=scene.subjects.root)


async def test_a_picture_is_asked_for_watched_and_downloaded(scene: Scene) -> None:
    await scene.start("slow_steps")
    events = []
    async with client_of(scene) as client:
        result = await client.text_to_image(
            "a red circle", num_inference_steps=3, on_event=events.append
        )
        (picture,) = result.outputs
        assert isinstance(picture, ImageArtifact)
        data = await client.download(picture)
    assert hashlib.sha256(data).hexdigest() == picture.sha256
    assert isinstance(events[0], StartedEvent)
    steps = [event.step for event in events if isinstance(event, ProgressEvent)]
    assert steps
    assert steps == sorted(steps)
    assert events[-1] == result


async def test_a_text_is_asked_for(scene: Scene) -> None:
    scene.task = Task.IMAGE_TO_TEXT
    await scene.apply()
    await scene.start("none")
    async with client_of(scene) as client:
        result = await client.image_to_text("What is it?", [InlineImage(base64=picture())])
    (output,) = result.outputs
    assert isinstance(output, TextOutput)
    assert output.text == "1 pictures"


async def test_another_client_collects_what_was_submitted(scene: Scene) -> None:
    async with client_of(scene) as client:
        request_id = await client.submit(TextToImageRequest(prompt="a"))
        assert await client.submit(TextToImageRequest(prompt="a", request_id=request_id))
    async with client_of(scene) as client:
        with pytest.raises(TimeoutError):
            await client.result(Task.TEXT_TO_IMAGE, request_id, within=0)
        waiting = asyncio.ensure_future(client.result("text_to_image", request_id))
        await scene.start()
        event = await waiting
        assert isinstance(event, SucceededEvent)
        await scene.event(request_id)  # the server tells of it a moment before it has stored it
        assert await client.result(Task.TEXT_TO_IMAGE, request_id, within=0) == event
    assert scene.runs() == [request_id]


async def test_what_is_cancelled_raises_where_it_is_waited_for(scene: Scene) -> None:
    await scene.start("slow_steps")
    async with client_of(scene) as client:
        request = TextToImageRequest(prompt="a", num_inference_steps=200, request_id="long")
        running = asyncio.ensure_future(client.run(request))
        await scene.noted("steps", 1)
        assert (await client.cancel("long")).status == "stopping"
        with pytest.raises(RequestCancelled) as cancelled:
            await running
        assert isinstance(cancelled.value.event, CancelledEvent)
        assert await client.ended("long") == "generation.v1.cancelled"


async def test_a_failure_raises_with_its_event(scene: Scene) -> None:
    await scene.start("raising")
    async with client_of(scene) as client:
        with pytest.raises(RequestFailed) as failed:
            await client.text_to_image("a")
    assert failed.value.event.failure.code == "model_error"
    assert "model_error" in str(failed.value)


async def test_what_cannot_be_sent_is_said(scene: Scene) -> None:
    async with client_of(scene) as client:
        with pytest.raises(ValidationError):
            await client.text_to_image("")
        with pytest.raises(RequestTooLarge):
            await client.image_to_text("a", [InlineImage(base64="A" * 2**20)])
        with pytest.raises(NoWorker):
            await client.cancel("nobody")
        jetstream = scene.sender.jetstream()
        config = (await jetstream.stream_info(scene.subjects.requests_stream(scene.task))).config
        await jetstream.update_stream(config.evolve(max_msgs=1))
        await client.submit(TextToImageRequest(prompt="a"))
        with pytest.raises(QueueFull):
            await client.submit(TextToImageRequest(prompt="a"))
    with pytest.raises(ServiceUnavailable):
        await client_of(scene).submit(TextToImageRequest(prompt="a"))
    with pytest.raises(ServiceUnavailable):
        async with GenerationClient(scene.stack.nats.url, root="nowhere") as client:
            await client.submit(TextToImageRequest(prompt="a"))


async def test_an_id_of_another_request_is_told(scene: Scene) -> None:
    await scene.start()
    async with client_of(scene) as client:
        first = await client.text_to_image("a", request_id="taken")
        assert await client.text_to_image("a", request_id="taken") == first
        with pytest.raises(RequestIdTaken):
            await client.text_to_image("b", request_id="taken")


async def test_a_picture_that_is_not_what_the_event_says_is_refused(scene: Scene) -> None:
    await scene.start()
    async with client_of(scene) as client:
        (picture,) = (await client.text_to_image("a")).outputs
        assert isinstance(picture, ImageArtifact)
        with pytest.raises(DownloadFailed, match="not the ones"):
            await client.download(picture.model_copy(update={"sha256": "0" * 64}))
        gone = picture.model_copy(update={"url": picture.url.replace(picture.key, "gone.png")})
        with pytest.raises(DownloadFailed) as failed:
            await client.download(gone)
    assert "Signature" not in str(failed.value)


async def test_a_result_comes_although_the_server_is_killed_meanwhile(scene: Scene) -> None:
    await scene.start("held_in_run")
    async with client_of(scene) as client:
        running = asyncio.ensure_future(client.text_to_image("a"))
        await scene.noted("run")
        scene.stack.nats.kill()
        scene.stack.nats.start()
        await asyncio.to_thread(scene.stack.nats.wait_ready)
        (scene.folder / "run.go").touch()
        assert (await running).outputs


def test_it_imports_none_of_the_daemons_libraries() -> None:
    look = (
        "import sys, generation_client; print(sorted({'torch', 'consumer'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
