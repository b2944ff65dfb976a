"""A gateway without workers: requests wait in the queue."""

import asyncio
import json
from collections.abc import Iterator

import httpx2
import pytest

from consumer.app.apply import apply
from consumer.devstack import DevStack, GatewayServer
from consumer.settings import Settings
from tests.gateway.conftest import start_gateway
from tests.gateway.images import data_url, red_circle

CHAT = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Describe the image."},
                {"type": "image_url", "image_url": {"url": data_url(red_circle())}},
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayServer]:
    with DevStack(tmp_path_factory.mktemp("no-workers"), persist=False) as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in stack.environment().items():
                patch.setenv(name, value)
            asyncio.run(apply(Settings.load()))
        yield start_gateway(stack, "gateway", GATEWAY_WAIT="0.5")


async def test_the_model_list_contains_the_tasks(http: httpx2.AsyncClient) -> None:
    answer = await http.get("/v1/models")
    assert [model["id"] for model in answer.json()["data"]] == ["text_to_image", "image_to_text"]


@pytest.mark.parametrize("model", ["text_to_image", "black-forest-labs/FLUX.1-schnell"])
async def test_an_asynchronous_request_is_queued(http: httpx2.AsyncClient, model: str) -> None:
    """A request may name the model of workers that start later."""
    answer = await http.post(
        "/v1/images/generations",
        json={"prompt": "a red circle", "model": model},
        headers={"Prefer": "respond-async"},
    )
    assert answer.status_code == 202
    assert answer.json()["state"] == "queued"


async def test_a_waiting_request_fails_after_gateway_wait(http: httpx2.AsyncClient) -> None:
    images, chat, infer = await asyncio.gather(
        http.post("/v1/images/generations", json={"prompt": "a red circle"}),
        http.post("/v1/chat/completions", json={**CHAT, "stream": True}),
        http.post("/infer", json={"prompt": "a red circle"}),
    )
    for answer in (images, infer):
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-request-id"].startswith("open0000-")
    # The gateway sends the headers after two seconds, so that no proxy closes the connection.
    assert chat.status_code == 200
    *beats, error = chat.text.strip().split("\n\n")
    assert set(beats) == {": heartbeat"}
    name, data = error.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
