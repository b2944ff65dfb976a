"""A gateway whose workers are scaled to zero: requests wait in the queue."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import httpx2
import pytest

from consumer.app.apply import apply
from consumer.devstack import DevStack, GatewayServer
from consumer.settings import Settings
from tests.gateway.conftest import start_gateway
from tests.gateway.pictures import data_url, red_circle

WITHIN = 30.0  # seconds
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


@pytest.fixture
async def http(gateway: GatewayServer) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=gateway.url, timeout=WITHIN) as client:
        yield client


async def test_the_tasks_stand_for_their_models(http: httpx2.AsyncClient) -> None:
    answer = await http.get("/v1/models")
    assert [model["id"] for model in answer.json()["data"]] == ["text_to_image", "image_to_text"]


@pytest.mark.parametrize("model", ["text_to_image", "black-forest-labs/FLUX.1-schnell"])
async def test_who_does_not_wait_is_queued(http: httpx2.AsyncClient, model: str) -> None:
    """Clients name the model of the workers that their request starts."""
    answer = await http.post(
        "/v1/images/generations",
        json={"prompt": "a red circle", "model": model},
        headers={"Prefer": "respond-async"},
    )
    assert answer.status_code == 202
    assert answer.json()["state"] == "queued"


async def test_who_waits_is_answered_after_the_wait(http: httpx2.AsyncClient) -> None:
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
    # Its headers were sent after two seconds, so that no proxy closes the connection.
    assert chat.status_code == 200
    *beats, error = chat.text.strip().split("\n\n")
    assert set(beats) == {": heartbeat"}
    name, data = error.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
