"""Automatic retries of openai-python, and the number of runs of the model."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpx2Client, InternalServerError

from consumer.gateway import app as app_module
from consumer.gateway import bounds as bounds_module
from consumer.gateway import errors
from consumer.gateway import jobs as jobs_module
from consumer.gateway.event_log import EventLog
from consumer.gateway.keys import KeyFile
from consumer.gateway.tenants import Bounds
from tests.gateway.open_jobs import settings_of
from tests.gateway.serving import serving
from tests.support.outage import outage, resume
from tests.support.scene import Scene

PROMPT = "a red circle"


class Responses:
    """Records all responses of the gateway, including retried ones."""

    def __init__(self) -> None:
        self.all: list[httpx2.Response] = []
        self._errors = asyncio.Semaphore(0)

    async def add(self, answer: httpx2.Response) -> None:
        self.all.append(answer)
        if answer.is_error:
            self._errors.release()

    async def error(self) -> None:
        """Wait for a further error response."""
        await self._errors.acquire()

    @property
    def statuses(self) -> list[int]:
        return [answer.status_code for answer in self.all]


@asynccontextmanager
async def openai_for(
    scene: Scene, responses: Responses, *, key: str = "none", **settings: Any
) -> AsyncIterator[AsyncOpenAI]:
    """Run a gateway; yield a client with the default settings of the library."""
    http = DefaultAsyncHttpx2Client(event_hooks={"response": [responses.add]})
    async with (
        serving(settings_of(scene, **settings)) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key=key, http_client=http) as client,
    ):
        yield client


@pytest.fixture
def responses() -> Responses:
    return Responses()


@pytest.fixture
def no_store(scene: Scene) -> dict[str, str]:
    """Settings of a gateway that cannot reach the object store."""
    endpoint = scene.stack.store.endpoint
    return {"S3_ENDPOINT": "http://127.0.0.1:9", "S3_PUBLIC_ENDPOINT": endpoint}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_queued_request_is_not_retried_in_an_outage(
    scene: Scene, responses: Responses, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(jobs_module, "MAX_OUTAGE", 0.2)
    monkeypatch.setattr("consumer.gateway.sse.START_WITHIN", 60.0)
    monkeypatch.setattr(app_module, "EventLog", partial(EventLog, quiet=0.1))
    worker = await scene.start("held_in_run")
    async with openai_for(scene, responses) as openai:
        request = asyncio.ensure_future(openai.images.generate(prompt=PROMPT, stream=stream))
        await scene.until_noted("run")
        async with outage(scene, "kill", worker):
            await responses.error()
        await resume(scene, "run")
        with pytest.raises(InternalServerError) as raised:
            await request
        headers = raised.value.response.headers
        assert (raised.value.code, headers["x-should-retry"]) == ("unavailable", "false")
        assert "retry-after" not in headers
        await scene.until_empty()
        assert scene.runs() == [headers["x-request-id"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unreadable_output_is_not_generated_again(
    scene: Scene, responses: Responses, no_store: dict[str, str], stream: bool
) -> None:
    await scene.start()
    async with openai_for(scene, responses, **no_store) as openai:
        with pytest.raises(InternalServerError) as raised:
            await openai.images.generate(prompt=PROMPT, stream=stream)
        assert raised.value.response.headers["x-should-retry"] == "false"
        (job,) = scene.runs()
        assert raised.value.response.headers["x-request-id"] == job
        # The client can fetch the job, and its files by their presigned URLs.
        found = await openai.get(f"/jobs/{job}", cast_to=httpx2.Response)
        assert found.json()["state"] == "succeeded"


async def test_infer_does_not_retry_an_unreadable_output(
    scene: Scene, no_store: dict[str, str]
) -> None:
    await scene.start()
    async with serving(settings_of(scene, **no_store)) as url, httpx2.AsyncClient() as http:
        answer = await http.post(f"{url}/infer", json={"prompt": PROMPT}, timeout=60)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
    assert scene.runs() == [answer.headers["x-request-id"]]


async def test_a_retried_idempotent_request_runs_once(
    scene: Scene, responses: Responses, no_store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "UNAVAILABLE_RETRY_AFTER", 1)
    await scene.start()
    async with openai_for(scene, responses, **no_store) as openai:
        with pytest.raises(InternalServerError) as raised:
            await openai.images.generate(prompt=PROMPT, extra_headers={"Idempotency-Key": "k"})
    assert raised.value.response.headers["x-should-retry"] == "true"
    assert responses.statuses == [503] * 3
    assert len(scene.runs()) == 1


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations"])
async def test_a_queued_job_with_a_failed_lookup_is_not_retried(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async def unavailable(*_: object) -> None:
        raise errors.of_error(jobs_module.ServiceUnavailable())

    monkeypatch.setattr(jobs_module.Jobs, "view", unavailable)
    fields = {"prompt": PROMPT} | ({"task": "text_to_image"} if path == "/v1/jobs" else {})
    async with serving(settings_of(scene)) as url, httpx2.AsyncClient() as http:
        for key, retry in (None, "false"), ("k", "true"):
            headers = {"prefer": "respond-async"} | ({"idempotency-key": key} if key else {})
            answer = await http.post(url + path, json=fields, headers=headers)
            assert (answer.status_code, answer.headers["x-should-retry"]) == (503, retry)
            assert answer.headers["x-request-id"].startswith("open0000-")
    assert await scene.pending() == 2


async def test_a_model_error_is_not_retried(scene: Scene, responses: Responses) -> None:
    await scene.start("raises_on_demand")
    async with openai_for(scene, responses) as openai:
        with pytest.raises(InternalServerError) as raised:
            await openai.images.generate(prompt="raises")
    assert raised.value.code == "model_error"
    assert responses.statuses == [500]
    # The worker runs the request CONSUMER_MAX_ATTEMPTS times.
    assert set(scene.runs()) == {responses.all[0].headers["x-request-id"]}


async def test_the_library_waits_for_the_bound_per_minute(
    scene: Scene, responses: Responses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds_module, "MINUTE", 2.0)
    file = KeyFile(tmp_path / "keys.json")
    key = file.add("alice", Bounds(per_minute=1)).text
    await scene.start()
    async with openai_for(scene, responses, key=key, GATEWAY_KEYS=file.path) as openai:
        for _ in range(2):
            assert (await openai.images.generate(prompt=PROMPT)).data
    assert responses.statuses == [200, 429, 200]
    refused = responses.all[1]
    assert await refused.aread()
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["retry-after"] in {"1", "2"}
    assert len(scene.runs()) == 2


async def test_a_full_queue_returns_a_retry_delay(scene: Scene) -> None:
    jetstream = scene.sender.jetstream()
    config = (await jetstream.stream_info(scene.subjects.requests_stream(scene.task))).config
    await jetstream.update_stream(config.evolve(max_msgs=1))
    await scene.submit()
    async with serving(settings_of(scene)) as url, httpx2.AsyncClient() as http:
        answer = await http.post(f"{url}/v1/images/generations", json={"prompt": PROMPT})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert answer.headers["retry-after"] == str(errors.QUEUE_FULL_RETRY_AFTER)
    assert answer.headers["x-should-retry"] == "true"
