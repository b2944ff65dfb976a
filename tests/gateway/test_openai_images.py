"""Images with openai-python, on the real gateway and model."""

import asyncio
import urllib.request
from typing import Any

import httpx2
import pytest
from openai import (
    APIError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnprocessableEntityError,
)
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent

from consumer.devstack import GatewayServer
from generation_client import GenerationClient
from generation_contracts import CancelledEvent, SucceededEvent, Task
from tests.gateway.conftest import KeyedGateway
from tests.gateway.images import decoded, red_circle

PROMPT = "a red circle on a blue background"
WITHIN = 60.0  # seconds
LONG = {"num_inference_steps": 200}  # a run of several seconds on the demonstration model


async def test_an_image_is_returned_as_base64(openai: AsyncOpenAI) -> None:
    answer = await openai.images.generate(prompt=PROMPT, model="demonstration")
    assert answer.data is not None
    (image,) = answer.data
    pixels = decoded(image.b64_json)
    assert pixels.format == "PNG"
    assert answer.size == f"{pixels.width}x{pixels.height}"
    assert answer.output_format == "png"
    assert answer.background == "opaque"
    assert answer.created > 1_700_000_000
    assert answer.usage is not None
    assert answer.usage.total_tokens == 0
    red, _, blue = pixels.convert("RGB").getpixel((pixels.width // 2, pixels.height // 2))  # type: ignore[misc] # three bands
    assert red > blue
    red, _, blue = pixels.convert("RGB").getpixel((2, 2))  # type: ignore[misc] # three bands
    assert blue > red


async def test_parameters_of_openai_and_of_the_contract_reach_the_model(
    openai: AsyncOpenAI,
) -> None:
    answer = await openai.images.generate(
        prompt=PROMPT,
        n=2,
        size="64x32",
        output_format="webp",
        quality="auto",
        background="opaque",
        moderation="low",
        user="somebody",
        extra_body={"seed": 7, "steps": 5, "guidance_scale": 1.5},
    )
    assert answer.data is not None
    marks = ["iptc"]
    assert [image.model_extra for image in answer.data] == [
        {"seed": 7, "marks": marks},
        {"seed": 8, "marks": marks},
    ]
    for image in answer.data:
        pixels = decoded(image.b64_json)
        assert (pixels.format, pixels.size) == ("WEBP", (64, 32))
    assert answer.size == "64x32"
    assert answer.output_format == "webp"


async def test_one_seed_reproduces_an_image(openai: AsyncOpenAI) -> None:
    first, second = [
        await openai.images.generate(prompt=PROMPT, extra_body={"seed": 3, "steps": 4})
        for _ in range(2)
    ]
    assert first.data is not None
    assert second.data is not None
    pixels = [decoded(answer[0].b64_json).tobytes() for answer in (first.data, second.data)]
    assert pixels[0] == pixels[1]


async def test_an_image_is_returned_as_a_url(openai: AsyncOpenAI) -> None:
    answer = await openai.images.generate(prompt=PROMPT, response_format="url")
    assert answer.data is not None
    (image,) = answer.data
    assert image.b64_json is None
    assert image.url is not None
    assert (await asyncio.to_thread(_fetched, image.url)).startswith(b"\x89PNG")


async def test_a_stream_has_previews_before_the_image(openai: AsyncOpenAI) -> None:
    stream = await openai.images.generate(
        prompt=PROMPT, stream=True, partial_images=2, extra_body={"num_inference_steps": 100}
    )
    events = [event async for event in stream]
    previews = [event for event in events if isinstance(event, ImageGenPartialImageEvent)]
    assert [event.partial_image_index for event in previews] == list(range(len(previews)))
    assert 1 <= len(previews) <= 2
    for preview in previews:
        assert preview.type == "image_generation.partial_image"
        assert decoded(preview.b64_json).format == "JPEG"
        assert (preview.size, preview.output_format) == ("auto", "png")
        assert preview.created_at > 1_700_000_000
    completed = events[-1]
    assert isinstance(completed, ImageGenCompletedEvent)
    assert completed.type == "image_generation.completed"
    pixels = decoded(completed.b64_json)
    assert completed.size == f"{pixels.width}x{pixels.height}"
    assert completed.usage.total_tokens == 0
    assert len(events) == len(previews) + 1


async def test_a_stream_of_two_images_has_two_completed_events(openai: AsyncOpenAI) -> None:
    stream = await openai.images.generate(prompt=PROMPT, n=2, stream=True)
    events = [event async for event in stream]
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert events[0].b64_json != events[1].b64_json


@pytest.mark.parametrize(
    ("parameters", "param", "code"),
    [
        ({"n": 9}, "n", "invalid_request"),
        ({"size": "big"}, "size", "invalid_request"),
        ({"size": "8000x8000"}, "size", "invalid_request"),
        ({"size": "100x100"}, "size", "unsupported_parameter"),
        ({"quality": "high"}, "quality", "unsupported_parameter"),
        ({"style": "vivid"}, "style", "unsupported_parameter"),
        ({"background": "transparent"}, "background", "unsupported_parameter"),
        ({"output_compression": 50}, "output_compression", "unsupported_parameter"),
        ({"output_format": "gif"}, "output_format", "invalid_request"),
        ({"partial_images": 4}, "partial_images", "invalid_request"),
        ({"extra_body": {"complexity": "high"}}, "complexity", "unknown_parameter"),
        ({"extra_body": {"seed": -1}}, "seed", "invalid_request"),
        ({"extra_body": {"adapters": {"none": 1}}}, "adapters", "unsupported_parameter"),
        ({"size": "64x64", "extra_body": {"width": 32}}, "width", "invalid_request"),
        ({"prompt": " "}, "prompt", "invalid_request"),
    ],
)
async def test_an_error_names_the_unsupported_parameter(
    openai: AsyncOpenAI, parameters: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(BadRequestError) as raised:
        await openai.images.generate(**{"prompt": PROMPT, **parameters})
    assert (raised.value.param, raised.value.code) == (param, code)
    assert raised.value.type == "invalid_request_error"
    assert raised.value.response.headers["x-should-retry"] == "false"


async def test_an_invalid_stream_request_returns_a_normal_error(openai: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError) as raised:
        await openai.images.generate(prompt=PROMPT, size="100x100", stream=True)
    assert raised.value.param == "size"


async def test_an_unknown_model_is_not_found(openai: AsyncOpenAI) -> None:
    with pytest.raises(NotFoundError) as raised:
        await openai.images.generate(prompt=PROMPT, model="gpt-image-2")
    assert (raised.value.param, raised.value.code) == ("model", "model_not_found")


async def test_a_task_is_a_name_of_its_model(openai: AsyncOpenAI) -> None:
    answer = await openai.images.generate(
        prompt=PROMPT, model="text_to_image", extra_body={"steps": 1}
    )
    assert answer.model_extra is not None
    assert answer.model_extra["model"] == "demonstration"


async def test_closing_a_stream_cancels_the_request(
    openai: AsyncOpenAI, behind: GenerationClient
) -> None:
    stream = await openai.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body=LONG
    )
    await anext(aiter(stream))
    await stream.close()
    result = await behind.result(Task.TEXT_TO_IMAGE, _job(stream), within=WITHIN)
    assert isinstance(result, CancelledEvent)


async def test_disconnecting_a_waiting_client_cancels_the_request(
    gateway: GatewayServer, openai: AsyncOpenAI, behind: GenerationClient
) -> None:
    waiting = asyncio.create_task(openai.images.generate(prompt=PROMPT, extra_body=LONG))
    job = await _running_job(gateway)
    waiting.cancel()
    result = await behind.result(Task.TEXT_TO_IMAGE, job, within=WITHIN)
    assert isinstance(result, CancelledEvent)


async def test_a_cancelled_request_ends_its_stream_with_an_error(
    openai: AsyncOpenAI, behind: GenerationClient
) -> None:
    stream = await openai.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body=LONG
    )
    await anext(aiter(stream))
    await behind.cancel(_job(stream))
    with pytest.raises(APIError) as raised:
        async for _ in stream:
            pass
    assert (raised.value.code, raised.value.message) == ("cancelled", "the request was cancelled")


async def test_an_idempotent_request_continues_after_its_client_disconnects(
    openai: AsyncOpenAI, behind: GenerationClient
) -> None:
    key = {"Idempotency-Key": "outlives"}
    stream = await openai.images.generate(
        prompt=PROMPT,
        stream=True,
        partial_images=1,
        extra_body={"num_inference_steps": 60},
        extra_headers=key,
    )
    await anext(aiter(stream))
    await stream.close()
    stream = await openai.images.generate(
        prompt=PROMPT,
        stream=True,
        partial_images=1,
        extra_body={"num_inference_steps": 60},
        extra_headers=key,
    )
    events = [event async for event in stream]
    assert isinstance(events[-1], ImageGenCompletedEvent)
    result = await behind.result(Task.TEXT_TO_IMAGE, _job(stream), within=0)
    assert isinstance(result, SucceededEvent)
    assert result.attempt == 1
    with pytest.raises(UnprocessableEntityError) as raised:
        await openai.images.generate(prompt="another", extra_headers=key)
    assert raised.value.code == "idempotency_key_reused"


async def test_edits_are_refused_without_a_model_for_images(openai: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError) as raised:
        await openai.images.edit(
            image=[("a.png", red_circle()), ("b.png", red_circle())],
            mask=("mask.png", red_circle()),
            prompt="make it green",
            n=2,
            size="64x64",
            stream=True,
            partial_images=1,
            extra_body={"seed": 5},
        )
    assert (raised.value.param, raised.value.code) == ("image", "unsupported_parameter")


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"image": b"no image"}, "image"),
        ({"n": 12}, "n"),
        ({"size": "x"}, "size"),
        ({"input_fidelity": "high"}, "input_fidelity"),
        ({"extra_body": {"other": "1"}}, "other"),
        ({"prompt": ""}, "prompt"),
    ],
)
async def test_an_invalid_edit_is_refused(
    openai: AsyncOpenAI, parameters: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequestError) as raised:
        await openai.images.edit(**{"image": red_circle(), "prompt": "a", **parameters})
    assert raised.value.param == param


async def test_a_gateway_with_keys_requires_a_key(keyed_gateway: KeyedGateway) -> None:
    base = f"{keyed_gateway.url}/v1"
    async with AsyncOpenAI(base_url=base, api_key=keyed_gateway.alice) as alice:
        answer = await alice.images.generate(prompt=PROMPT, extra_body={"steps": 1})
        assert answer.data
    async with AsyncOpenAI(base_url=base, api_key="sk-wrong") as unauthorized:
        with pytest.raises(AuthenticationError) as raised:
            await unauthorized.images.generate(prompt=PROMPT)
        assert raised.value.code == "invalid_api_key"
        with pytest.raises(AuthenticationError):
            await unauthorized.models.list()


async def test_a_gateway_without_keys_refuses_other_hosts(gateway: GatewayServer) -> None:
    async with AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key="none", default_headers={"host": "gateway.example"}
    ) as client:
        with pytest.raises(PermissionDeniedError):
            await client.images.generate(prompt=PROMPT)


async def _running_job(gateway: GatewayServer) -> str:
    async with httpx2.AsyncClient(base_url=gateway.url) as http, asyncio.timeout(WITHIN):
        while True:
            jobs = (await http.get("/v1/jobs", params={"state": "running"})).json()["data"]
            if jobs:
                job: str = jobs[0]["id"]
                return job
            await asyncio.sleep(0.1)


def _fetched(url: str) -> bytes:
    with urllib.request.urlopen(url) as response:  # noqa: S310 - the store of the test
        content: bytes = response.read()
    return content


def _job(stream: Any) -> str:
    job: str = stream.response.headers["x-request-id"]
    return job
