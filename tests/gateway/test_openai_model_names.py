"""Model names with two workers of one task: the requested model and the model that runs."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from nats.aio.msg import Msg
from openai import AsyncOpenAI, InternalServerError, NotFoundError

from generation_contracts.base import DEFAULT_QUEUES
from tests.gateway.images import data_url, red_circle
from tests.gateway.open_jobs import settings_of
from tests.gateway.serving import serving
from tests.support.outage import outage
from tests.support.scene import Scene

REQUESTED, RUNS = "someone/other", "quick"  # models of the second and of the first worker
QUESTION: Any = {
    "role": "user",
    "content": [
        {"type": "text", "text": "Describe the image."},
        {"type": "image_url", "image_url": {"url": data_url(red_circle())}},
    ],
}


@pytest.fixture
async def openai(scene: Scene) -> AsyncIterator[AsyncOpenAI]:
    """A client of a gateway, with a second worker of each task that takes no requests."""

    async def answer(message: Msg) -> None:
        for task in DEFAULT_QUEUES:
            metadata = {"task": str(task), "id": REQUESTED, "worker": "second"}
            await message.respond(json.dumps({"metadata": metadata}).encode())

    subscription = await scene.sender.subscribe("$SRV.INFO.generation", cb=answer)
    await scene.sender.flush()
    async with (
        serving(settings_of(scene)) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        yield client
    await subscription.unsubscribe()


async def test_a_failed_lookup_of_a_model_is_not_an_unknown_model(
    scene: Scene, openai: AsyncOpenAI
) -> None:
    """The first query of the gateway fails in an outage."""
    once = openai.with_options(max_retries=0)
    async with outage(scene, "kill"):
        for request in (
            once.images.generate(prompt="a red circle", model=REQUESTED),
            once.models.retrieve(REQUESTED),
        ):
            with pytest.raises(InternalServerError) as raised:
                await request
            assert raised.value.code == "unavailable"
            assert raised.value.response.headers["x-should-retry"] == "true"
    assert (await openai.models.retrieve(REQUESTED)).id == REQUESTED
    with pytest.raises(NotFoundError):
        await openai.models.retrieve("another")


async def test_images_report_the_model_that_ran(scene: Scene, openai: AsyncOpenAI) -> None:
    await scene.start()
    names = {model.id async for model in openai.models.list()}
    assert names == {REQUESTED, RUNS}
    answer = await openai.images.generate(prompt="a red circle", model=REQUESTED)
    assert answer.model_extra is not None
    assert answer.model_extra["model"] == RUNS


async def test_chats_report_the_model_that_ran(scene: Scene, openai: AsyncOpenAI) -> None:
    await scene.start(MODEL_TYPE="image_to_text")
    answer = await openai.chat.completions.create(model=REQUESTED, messages=[QUESTION])
    assert answer.model == RUNS
    stream = await openai.chat.completions.create(
        model=REQUESTED, messages=[QUESTION], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len(chunks) > 2
    assert {chunk.model for chunk in chunks} == {RUNS}
