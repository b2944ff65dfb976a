"""Recorded HTTP requests of Open WebUI, sent to the real gateway.

Settings of Open WebUI (Admin > Settings > Images, or the environment):
`IMAGE_GENERATION_ENGINE=openai`, `IMAGES_OPENAI_API_BASE_URL=http://gateway:8080/v1`,
`IMAGES_OPENAI_API_KEY`, `IMAGE_GENERATION_MODEL`, `IMAGE_SIZE`, `IMAGES_OPENAI_API_PARAMS`. Chats
and the model list use an OpenAI connection to the same address.
"""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from tests.gateway.conftest import KeyedGateway
from tests.gateway.images import data_url, decoded, red_circle

WITHIN = 60.0  # seconds
IMAGE_REQUEST = {
    "model": "demonstration",
    "prompt": "a red circle on a blue background",
    "n": 1,
    "size": "64x64",
    "response_format": "b64_json",
}
CHAT_REQUEST = {
    "stream": True,
    "model": "demonstration",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Describe the image."},
                {"type": "image_url", "image_url": {"url": data_url(red_circle())}},
            ],
        }
    ],
    "stream_options": {"include_usage": True},
}


@pytest.fixture
async def open_webui(keyed_gateway: KeyedGateway) -> AsyncIterator[httpx2.AsyncClient]:
    """A client with the headers of Open WebUI, including the headers about its user."""
    headers = {
        "Authorization": f"Bearer {keyed_gateway.alice}",
        "X-OpenWebUI-User-Name": "Somebody",
        "X-OpenWebUI-User-Id": "7c1a",
        "X-OpenWebUI-User-Email": "somebody@example.com",
        "X-OpenWebUI-User-Role": "user",
        "X-OpenWebUI-Chat-Id": "d0f2",
    }
    async with httpx2.AsyncClient(
        base_url=f"{keyed_gateway.url}/v1", headers=headers, timeout=WITHIN
    ) as client:
        yield client


async def test_the_model_list_verifies_the_connection(
    open_webui: httpx2.AsyncClient,
) -> None:
    answer = await open_webui.get("/models")
    assert answer.status_code == 200
    assert [model["id"] for model in answer.json()["data"]] == ["demonstration"]
    refused = await open_webui.get("/models", headers={"Authorization": "Bearer wrong"})
    assert refused.status_code == 401
    assert refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("params", "query"),
    [
        ({}, {}),
        ({"steps": 4, "seed": 1, "quality": "auto"}, {}),
        ({"output_format": "webp"}, {"api-version": "2025-04-01-preview"}),
    ],
)
async def test_images_are_generated(
    open_webui: httpx2.AsyncClient, params: dict[str, Any], query: dict[str, str]
) -> None:
    answer = await open_webui.post(
        "/images/generations", json={**IMAGE_REQUEST, **params}, params=query
    )
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["data"]
    assert image.get("url") is None
    assert decoded(image["b64_json"]).size == (64, 64)


async def test_an_image_url_needs_no_key(open_webui: httpx2.AsyncClient) -> None:
    answer = await open_webui.post(
        "/images/generations", json={**IMAGE_REQUEST, "response_format": "url"}
    )
    async with httpx2.AsyncClient() as fetching:
        file = await fetching.get(answer.json()["data"][0]["url"])
    assert file.headers["content-type"].startswith("image/")


async def test_the_error_for_an_invalid_size_names_the_reason(
    open_webui: httpx2.AsyncClient,
) -> None:
    answer = await open_webui.post("/images/generations", json={**IMAGE_REQUEST, "size": "auto2"})
    assert answer.status_code == 400
    assert "size" in answer.json()["error"]["message"]


async def test_edits_are_refused_without_a_model_for_images(open_webui: httpx2.AsyncClient) -> None:
    answer = await open_webui.post(
        "/images/edits",
        data={"model": "demonstration", "prompt": "make it green", "n": "1", "size": "64x64"},
        files={"image": ("image.png", red_circle(), "image/png")},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_parameter"


async def test_chats_are_streamed(open_webui: httpx2.AsyncClient) -> None:
    text, done = "", False
    async with open_webui.stream("POST", "/chat/completions", json=CHAT_REQUEST) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text += choice["delta"].get("content", "")
    assert text == "A red circle on a blue background in the center."
    assert done


async def test_a_chat_about_a_generated_image_gets_an_answer(
    open_webui: httpx2.AsyncClient,
) -> None:
    generated = await open_webui.post("/images/generations", json=IMAGE_REQUEST)
    content = base64.b64decode(generated.json()["data"][0]["b64_json"])
    question = json.loads(json.dumps({**CHAT_REQUEST, "stream": False}))
    question.pop("stream_options")
    question["messages"][0]["content"][1]["image_url"]["url"] = data_url(content)
    answer = await open_webui.post("/chat/completions", json=question)
    assert "circle" in answer.json()["choices"][0]["message"]["content"]
