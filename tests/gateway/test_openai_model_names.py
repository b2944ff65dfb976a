"""The names of models where two of one task are served: those that are known, those that run."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from nats.aio.msg import Msg
from openai import AsyncOpenAI, InternalServerError, NotFoundError

from generation_contracts import Task
from tests.gateway.open_jobs import settings_of
from tests.gateway.pictures import data_url, red_circle
from tests.gateway.serving import serving
from tests.support.outage import outage
from tests.support.scene import Scene

ASKED, RUNS = "someone/other", "quick"  # the model of the second worker, and of the first one
QUESTION: Any = {
    "role": "user",
    "content": [
        {"type": "text", "text": "Describe the image."},
        {"type": "image_url", "image_url": {"url": data_url(red_circle())}},
    ],
}


@pytest.fixture
async def openai(scene: Scene) -> AsyncIterator[AsyncOpenAI]:
    """A gateway, and a second worker of each task, which takes no request."""

    async def answer(message: Msg) -> None:
        for task in Task:
            metadata = {"task": str(task), "id": ASKED, "worker": "second"}
            await message.respond(json.dumps({"metadata": metadata}).encode())

    subscription = await scene.sender.subscribe("$SRV.INFO.generation", cb=answer)
    await scene.sender.flush()
    async with (
        serving(settings_of(scene)) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        yield client
    await subscription.unsubscribe()


async def test_a_name_that_cannot_be_looked_up_is_no_unknown_model(
    scene: Scene, openai: AsyncOpenAI
) -> None:
    """The first question of a gateway comes in an outage."""
    once = openai.with_options(max_retries=0)
    async with outage(scene, "kill"):
        for asking in (
            once.images.generate(prompt="a red circle", model=ASKED),
            once.models.retrieve(ASKED),
        ):
            with pytest.raises(InternalServerError) as raised:
                await asking
            assert raised.value.code == "unavailable"
            assert raised.value.response.headers["x-should-retry"] == "true"
    assert (await openai.models.retrieve(ASKED)).id == ASKED
    with pytest.raises(NotFoundError):
        await openai.models.retrieve("another")


async def test_images(scene: Scene, openai: AsyncOpenAI) -> None:
    await scene.start()
    names = {model.id async for model in openai.models.list()}
    assert names == {ASKED, RUNS}
    answer = await openai.images.generate(prompt="a red circle", model=ASKED)
    assert answer.model_extra is not None
    assert answer.model_extra["model"] == RUNS


async def test_chat(scene: Scene, openai: AsyncOpenAI) -> None:
    await scene.start(MODEL_TYPE="image_to_text")
    answer = await openai.chat.completions.create(model=ASKED, messages=[QUESTION])
    assert answer.model == RUNS
    stream = await openai.chat.completions.create(
        model=ASKED, messages=[QUESTION], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len(chunks) > 2
    assert {chunk.model for chunk in chunks} == {RUNS}
