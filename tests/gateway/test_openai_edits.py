"""`/v1/images/edits` with a patched gateway that accepts input images."""

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI
from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent

from consumer.devstack import DevStack
from consumer.gateway import openai_edits
from consumer.gateway.openai_edits import EditParameters, ImageInputs
from consumer.settings import Settings
from generation_contracts import TextToImageRequest
from tests.gateway.images import data_url, decoded, red_circle
from tests.gateway.serving import serving

PROMPT = "a green circle"


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[ImageInputs]:
    """The input images of the requests. The model does not receive them."""
    accepted: list[ImageInputs] = []

    def accept(parameters: EditParameters, images: ImageInputs) -> TextToImageRequest:
        accepted.append(images)
        return parameters.to_request()

    monkeypatch.setattr(openai_edits, "request_with_images", accept)
    return accepted


@pytest.fixture
async def openai(system: DevStack, inputs: list[ImageInputs]) -> AsyncIterator[AsyncOpenAI]:
    """A client of a gateway that accepts input images."""
    environment: dict[str, Any] = system.environment()
    settings = Settings(**{name.lower(): value for name, value in environment.items()})
    async with (
        serving(settings) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        yield client


async def test_an_edit_returns_images(openai: AsyncOpenAI, inputs: list[ImageInputs]) -> None:
    answer = await openai.images.edit(
        image=[("a.png", red_circle()), ("b.png", red_circle())],
        mask=("mask.png", red_circle()),
        prompt=PROMPT,
        n=2,
        size="64x32",
        extra_body={"seed": 5},
    )
    assert answer.data is not None
    assert [image.model_extra for image in answer.data] == [
        {"seed": 5, "marks": ["iptc"]},
        {"seed": 6, "marks": ["iptc"]},
    ]
    assert [decoded(image.b64_json).size for image in answer.data] == [(64, 32)] * 2
    assert answer.size == "64x32"
    assert answer.usage is not None
    assert answer.model_extra is not None
    assert answer.model_extra["model"] == "demonstration"
    assert inputs == [ImageInputs((red_circle(), red_circle()), red_circle())]


async def test_an_edit_is_streamed(openai: AsyncOpenAI) -> None:
    stream = await openai.images.edit(
        image=red_circle(),
        prompt=PROMPT,
        stream=True,
        partial_images=2,
        extra_body={"num_inference_steps": 100},
    )
    *previews, completed = [event async for event in stream]
    assert 1 <= len(previews) <= 2
    for index, preview in enumerate(previews):
        assert isinstance(preview, ImageEditPartialImageEvent)
        assert preview.type == "image_edit.partial_image"
        assert preview.partial_image_index == index
        assert decoded(preview.b64_json).format == "JPEG"
    assert isinstance(completed, ImageEditCompletedEvent)
    assert completed.type == "image_edit.completed"
    assert decoded(completed.b64_json).format == "PNG"
    assert completed.usage.total_tokens == 0


async def test_an_edit_can_be_sent_as_json(openai: AsyncOpenAI, inputs: list[ImageInputs]) -> None:
    image = data_url(red_circle())
    body = {"prompt": PROMPT, "size": "64x64", "images": [{"image_url": image}]}
    async with httpx2.AsyncClient(timeout=60) as http:
        answer = await http.post(f"{openai.base_url}images/edits", json=body)
    assert answer.status_code == 200, answer.text
    assert decoded(answer.json()["data"][0]["b64_json"]).size == (64, 64)
    assert inputs == [ImageInputs((image,))]
