"""`/v1/jobs` over HTTP, on real servers with two tenants."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from consumer.devstack import GatewayServer
from consumer.gateway.keys import KeyFile
from consumer.gateway.tenants import Bounds
from tests.gateway.images import PIXEL
from tests.gateway.open_jobs import settings_of
from tests.gateway.serving import serving
from tests.support.forked import ForkedGateway
from tests.support.outage import outage, resume
from tests.support.scene import WITHIN, Scene

Json = dict[str, Any]
IMAGE = {"task": "text_to_image", "prompt": "a red circle"}


@dataclass(frozen=True)
class Message:
    """One server-sent event."""

    event: str
    data: Json
    id: str | None = None


class Client:
    """The HTTP client of a tenant; `at` is the index of the gateway."""

    def __init__(self, urls: list[str], http: httpx2.AsyncClient) -> None:
        self._urls = urls
        self._http = http

    async def send(self, method: str, path: str, *, at: int = 0, **more: Any) -> httpx2.Response:
        """Send a request."""
        return await self._http.request(method, self._urls[at] + path, **more)

    async def submit(self, **fields: Any) -> Json:
        """Submit an image job; return its document."""
        headers = fields.pop("headers", None)
        body = {**IMAGE, **fields}
        answer = await self.send("POST", "/v1/jobs", json=body, headers=headers)
        assert answer.status_code == 202, answer.text
        document: Json = answer.json()
        return document

    async def document(self, job: Json, *, at: int = 0) -> Json:
        """Fetch the document of a job."""
        answer = await self.send("GET", job["status_url"], at=at)
        assert answer.status_code == 200, answer.text
        document: Json = answer.json()
        return document

    async def messages(
        self, job: Json, *, at: int = 0, after: str | None = None
    ) -> AsyncIterator[Message]:
        """Yield the events of a job."""
        headers = {} if after is None else {"last-event-id": after}
        url = self._urls[at] + job["events_url"]
        async with self._http.stream("GET", url, headers=headers) as answer:
            assert answer.status_code == 200, await answer.aread()
            assert answer.headers["content-type"].startswith("text/event-stream")
            fields: dict[str, str] = {}
            async for line in answer.aiter_lines():
                name, _, value = line.partition(":")
                if name:
                    fields[name] = value.strip()
                elif line == "" and "data" in fields:
                    data = json.loads(fields["data"])
                    yield Message(fields["event"], data, fields.get("id"))
                    fields = {}

    async def end(self, job: Json, *, at: int = 0) -> Message:
        """Return the last event of a job."""
        async with asyncio.timeout(WITHIN):
            messages = [message async for message in self.messages(job, at=at)]
        return messages[-1]


@dataclass(frozen=True)
class Api:
    """Two gateways and two tenants on one installation."""

    urls: list[str]
    alice: Client
    bob: Client
    anonymous: Client


@pytest.fixture
def key_file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


@pytest.fixture
async def api(scene: Scene, key_file: KeyFile) -> AsyncIterator[Api]:
    alice, bob = (key_file.add(name, Bounds()).text for name in ("alice", "bob"))
    settings = settings_of(scene, GATEWAY_KEYS=key_file.path)
    async with AsyncExitStack() as parts:
        urls = [await parts.enter_async_context(serving(settings)) for _ in range(2)]
        clients = []
        for key in (alice, bob, None):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            http = await parts.enter_async_context(
                httpx2.AsyncClient(headers=headers, timeout=WITHIN)
            )
            clients.append(Client(urls, http))
        yield Api(urls, *clients)


@pytest.fixture
async def killable(scene: Scene, key_file: KeyFile) -> AsyncIterator[GatewayServer]:
    """A gateway in a separate process that the test kills."""
    settings = {**scene.settings(), "GATEWAY_KEYS": str(key_file.path)}
    gateway = ForkedGateway("gateway", settings, log=scene.folder / "gateway.log")
    gateway.start()
    await asyncio.to_thread(gateway.wait_ready)
    yield gateway
    await asyncio.to_thread(gateway.kill)
    assert "Traceback" not in gateway.log_since_start(), gateway.log_since_start()


def error_of(answer: httpx2.Response) -> tuple[int, str, str | None]:
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "code", "param"}
    assert answer.headers["x-should-retry"] in {"true", "false"}
    return answer.status_code, body["error"]["code"], body["error"]["param"]


async def until(scene: Scene, condition: Callable[[Json], bool], client: Client, job: Json) -> Json:
    """Poll a job until its document fulfils a condition; return the document."""
    found: Json = {}

    async def there() -> bool:
        found.update(await client.document(job))
        return condition(found)

    await scene.until(there, "job in the expected state")
    return found


async def test_a_job_returns_its_result_and_its_output_file(scene: Scene, api: Api) -> None:
    answer = await api.alice.send("POST", "/v1/jobs", json={**IMAGE, "metadata": {"a": "b"}})
    assert answer.status_code == 202
    job = answer.json()
    address = f"/v1/jobs/{job['id']}"
    assert answer.headers["location"] == address
    assert answer.headers["x-request-id"] == job["id"]
    assert job == {
        "id": job["id"],
        "object": "job",
        "task": "text_to_image",
        "queue": "text_to_image",
        "state": "queued",
        "created": job["created"],
        "position": 0,
        "estimated_start": None,
        "progress": None,
        "metadata": {"a": "b"},
        "status_url": address,
        "events_url": f"{address}/events",
        "cancel_url": address,
        "result": None,
        "error": None,
    }
    await scene.start()
    end = await api.alice.end(job)
    done = await api.alice.document(job)
    assert end.event == done["state"] == "succeeded"
    assert end.data == done["result"]
    assert done["result"]["metadata"] == {"a": "b"}
    assert (done["position"], done["error"], done["created"]) == (None, None, job["created"])
    (output,) = done["result"]["outputs"]
    assert output["content_url"] == f"{address}/outputs/0"
    file = await api.alice.send("GET", output["content_url"], at=1)
    assert hashlib.sha256(file.content).hexdigest() == output["sha256"]
    assert file.headers["content-type"] == "image/png"
    assert file.headers["x-content-type-options"] == "nosniff"
    assert file.headers["generation-ai-generated"] == "true"
    again = await api.alice.send(
        "GET", output["content_url"], headers={"if-none-match": file.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    for path in (f"{address}/outputs/1", f"{address}/outputs/9999999999"):
        assert error_of(await api.alice.send("GET", path))[:2] == (404, "not_found")
    assert error_of(await api.alice.send("GET", f"{address}/outputs/x"))[0] == 400


async def test_a_running_job_shows_its_progress(scene: Scene, api: Api) -> None:
    await scene.start("slow_steps")
    job = await api.alice.submit(num_inference_steps=8)
    document = await until(scene, lambda found: bool(found["progress"]), api.alice, job)
    assert document["state"] == "running"
    assert document["progress"]["of"] == 8
    assert 1 <= document["progress"]["step"] <= 8
    assert document["progress"]["eta"] >= 0
    assert (await api.alice.end(job)).event == "succeeded"


async def test_a_failed_job_shows_its_error(scene: Scene, api: Api) -> None:
    await scene.start("raises_on_demand")
    job = await api.alice.submit(prompt="raises")
    assert (await api.alice.end(job)).event == "failed"
    document = await api.alice.document(job)
    assert document["state"] == "failed"
    assert document["error"]["code"] == "model_error"
    assert document["error"].keys() == {"message", "type", "code", "param"}
    assert document["result"]["type"] == "generation.v1.failed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "task"),
        ([], None),
        ("text", None),
        (None, None),
        ({**IMAGE, "task": "text_to_video"}, "task"),
        ({**IMAGE, "task": None}, "task"),
        ({"task": "text_to_image"}, "prompt"),
        ({**IMAGE, "prompt": "  "}, "prompt"),
        ({**IMAGE, "width": "512"}, "width"),
        ({**IMAGE, "width": 512.5}, "width"),
        ({**IMAGE, "width": 1e300}, "width"),
        ({**IMAGE, "preview": "yes"}, "preview"),
        ({**IMAGE, "height": 1}, "height"),
        ({**IMAGE, "images": [PIXEL]}, "images"),
        ({**IMAGE, "request_id": "mine"}, "request_id"),
        ({**IMAGE, "reply_to": "generation.reply.x"}, "reply_to"),
        ({**IMAGE, "chain": {"id": "a", "step": 1}}, "chain"),
        ({**IMAGE, "then": [{"task": "text_to_image", "prompt": "$text"}]}, "then.0.prompt"),
        ({**IMAGE, "deadline": "tomorrow"}, "deadline"),
        ({**IMAGE, "task": "image_to_text"}, "images"),
        ({**IMAGE, "task": "image_to_text", "images": ["ftp://x"]}, "images.0"),
    ],
)
async def test_an_invalid_job_is_refused(api: Api, body: object, param: str | None) -> None:
    answer = await api.alice.send("POST", "/v1/jobs", json=body)
    status, _, named = error_of(answer)
    assert status == 400, answer.text
    assert named == param, answer.text
    assert (await api.alice.send("GET", "/v1/jobs")).json()["data"] == []


async def test_a_whole_float_is_accepted_as_an_integer(scene: Scene, api: Api) -> None:
    """JSON Schema treats 512.0 as the integer 512."""
    job = await api.alice.submit(width=64.0, guidance_scale=3)
    body = await scene.sender.jetstream().get_last_msg(
        scene.subjects.requests_stream(scene.task), scene.subjects.request(scene.task, job["id"])
    )
    request = json.loads(body.data or b"")
    assert (request["width"], request["guidance_scale"]) == (64, 3)
    assert b"64.0" not in (body.data or b"")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"task": NaN}', b'{"a": "\\ud800"}'])
async def test_invalid_json_is_refused(api: Api, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = await api.alice.send("POST", "/v1/jobs", content=body, headers=headers)
    assert error_of(answer)[0] == 400


async def test_requests_with_one_idempotency_key_return_one_job(scene: Scene, api: Api) -> None:
    headers = {"idempotency-key": "order-1"}
    job = await api.alice.submit(headers=headers)
    again = await api.alice.send("POST", "/v1/jobs", at=1, json=IMAGE, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, job["id"])
    other = await api.alice.send(
        "POST", "/v1/jobs", json={**IMAGE, "prompt": "a blue circle"}, headers=headers
    )
    assert error_of(other)[:2] == (422, "idempotency_key_reused")
    assert (await api.bob.submit(headers=headers))["id"] != job["id"]
    await scene.start()
    await api.alice.end(job)
    after = await api.alice.submit(headers=headers)
    assert (after["id"], after["state"]) == (job["id"], "succeeded")
    assert scene.runs().count(job["id"]) == 1


async def test_the_queue_position_is_streamed(scene: Scene, api: Api) -> None:
    await scene.start("held_in_run", CONSUMER_JOBS_IN_FLIGHT="1")
    first = await api.alice.submit()
    await scene.until_noted("run")
    second, third = [await api.alice.submit() for _ in range(2)]
    messages = api.alice.messages(third)
    message = await anext(messages)
    assert (message.event, message.id) == ("queued", None)
    assert message.data == {
        "request_id": third["id"],
        "task": "text_to_image",
        "position": 1,
        "estimated_start": None,
    }
    answer = await api.alice.send("DELETE", second["cancel_url"])
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    message = await anext(messages)
    assert (message.event, message.data["position"]) == ("queued", 0)
    await resume(scene, "run")
    events = [message.event async for message in messages]
    assert events[0] in {"started", "queued"}
    assert events[-1] == "succeeded"
    assert (await api.alice.end(first)).event == "succeeded"


async def test_the_start_is_estimated_after_the_first_result(scene: Scene, api: Api) -> None:
    worker = await scene.start("slow_steps")
    await api.alice.end(await api.alice.submit(num_inference_steps=1))
    await scene.until_empty()
    await asyncio.to_thread(worker.kill)
    jobs = [await api.alice.submit() for _ in range(3)]
    now = datetime.now(UTC)
    starts = [datetime.fromisoformat(job["estimated_start"]) for job in jobs]
    assert now < starts[0] < starts[1] < starts[2]
    async for message in api.alice.messages(jobs[2]):
        assert message.event == "queued"
        assert now < datetime.fromisoformat(message.data["estimated_start"])
        if message.data["position"] == 2:  # the cached queue read may be a second old
            break
    queue = (await api.alice.send("GET", "/v1/queue")).json()
    assert queue["tasks"][0]["pace_seconds"] > 0


async def test_a_stream_resumes_at_another_gateway_after_a_kill(
    scene: Scene, api: Api, killable: GatewayServer
) -> None:
    await scene.start("slow_steps")
    api.urls.append(killable.url)
    job = await api.alice.submit(num_inference_steps=12)
    whole = asyncio.ensure_future(_all(api.alice.messages(job)))
    received: list[Message] = []

    async def watch() -> None:
        async for message in api.alice.messages(job, at=2):
            received.append(message)
            if sum(message.id is not None for message in received) == 3:
                await asyncio.to_thread(killable.kill)

    with pytest.raises(httpx2.RemoteProtocolError):
        await watch()
    ids = [message.id for message in received if message.id]
    rest = await _all(api.alice.messages(job, at=1, after=ids[-1]))
    expected = [message.id for message in await whole if message.id]
    assert [*ids, *(message.id for message in rest)] == expected
    assert rest[-1].event == "succeeded"
    assert scene.runs() == [job["id"]]


async def test_a_waiting_client_finds_its_job_by_key_after_its_gateway_is_killed(
    scene: Scene, api: Api, killable: GatewayServer
) -> None:
    await scene.start("held_in_run")
    api.urls.append(killable.url)
    options: Json = {"json": {"prompt": "a"}, "headers": {"idempotency-key": "k"}}
    path = "/v1/images/generations"
    waiting = asyncio.ensure_future(api.alice.send("POST", path, at=2, **options))
    await scene.until_noted("run")
    await asyncio.to_thread(killable.kill)
    with pytest.raises(httpx2.RemoteProtocolError):
        await waiting
    again = asyncio.ensure_future(api.alice.send("POST", path, at=1, **options))
    await resume(scene, "run")
    answer = await again
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 1
    assert scene.runs() == [answer.headers["x-request-id"]]


async def test_a_stream_resumed_after_the_terminal_event_is_empty(scene: Scene, api: Api) -> None:
    await scene.start()
    job = await api.alice.submit()
    end = await api.alice.end(job)
    for location in ("headers", "params"):
        name = "last-event-id" if location == "headers" else "last_event_id"
        more: Json = {location: {name: end.id}}
        answer = await api.alice.send("GET", job["events_url"], **more)
        assert (answer.status_code, answer.content) == (204, b"")
    for wrong in ("x", "1", "1-", "-1"):
        answer = await api.alice.send("GET", job["events_url"], headers={"last-event-id": wrong})
        assert error_of(answer) == (400, "invalid_request", "last-event-id")


async def test_a_stream_survives_a_restart_of_the_broker(scene: Scene, api: Api) -> None:
    worker = await scene.start("held_in_run")
    job = await api.alice.submit()
    await scene.until_noted("run")
    watching = asyncio.ensure_future(_all(api.alice.messages(job)))
    await asyncio.sleep(0.1)
    async with outage(scene, "kill", worker):
        await resume(scene, "run")
    messages = await asyncio.wait_for(watching, WITHIN)
    assert messages[-1].event == "succeeded"
    assert [m.event for m in messages].count("succeeded") == 1


async def test_jobs_can_be_cancelled(scene: Scene, api: Api) -> None:
    await scene.start("slow_steps")
    job = await api.alice.submit(num_inference_steps=50)
    await until(scene, lambda found: found["state"] == "running", api.alice, job)
    assert error_of(await api.bob.send("DELETE", job["cancel_url"]))[:2] == (404, "not_found")
    answer = await api.alice.send("DELETE", job["cancel_url"])
    assert answer.status_code in {200, 202}
    assert (await api.alice.end(job)).event == "cancelled"
    again = await api.alice.send("DELETE", job["cancel_url"])
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")
    done = await api.alice.submit(num_inference_steps=1)
    await api.alice.end(done)
    assert error_of(await api.alice.send("DELETE", done["cancel_url"]))[:2] == (
        409,
        "job_has_ended",
    )


async def test_jobs_are_listed_in_pages_with_filters(scene: Scene, api: Api) -> None:
    await scene.start("held_in_run")
    jobs = [await api.alice.submit() for _ in range(3)]
    await scene.until_noted("run")
    await api.bob.submit()
    listed = (await api.alice.send("GET", "/v1/jobs")).json()
    assert listed["object"] == "list"
    assert [job["id"] for job in listed["data"]] == [job["id"] for job in reversed(jobs)]
    first = (await api.alice.send("GET", "/v1/jobs?limit=2", at=1)).json()
    assert (len(first["data"]), first["has_more"]) == (2, True)
    second = (await api.alice.send("GET", f"/v1/jobs?limit=2&after={first['next']}")).json()
    assert [job["id"] for job in second["data"]] == [jobs[0]["id"]]
    assert (second["has_more"], second["next"]) == (False, None)
    await resume(scene, "run")
    for job in jobs:
        await api.alice.end(job)
    ended = (await api.alice.send("GET", "/v1/jobs?state=succeeded&state=failed")).json()
    assert len(ended["data"]) == 3
    assert all(job["result"]["outputs"] for job in ended["data"])
    assert (await api.alice.send("GET", "/v1/jobs?task=image_to_text")).json()["data"] == []
    for query in ("limit=0", "limit=101", "limit=x", "state=done", "task=x", "after=a.b"):
        status, _, param = error_of(await api.alice.send("GET", f"/v1/jobs?{query}"))
        assert status == 400
        assert param is not None
        assert param.split(".")[0] == query.partition("=")[0]
    assert error_of(await api.alice.send("GET", "/v1/jobs?after=x"))[0] == 404


async def test_the_queue_shows_the_requests_of_the_tenant(scene: Scene, api: Api) -> None:
    await scene.start("held_in_run", CONSUMER_JOBS_IN_FLIGHT="1")
    await api.alice.submit()
    await scene.until_noted("run")
    await api.alice.submit()
    queue = (await api.alice.send("GET", "/v1/queue")).json()
    names = {"text_to_image": "quick", "image_to_text": "image_to_text"}
    numbers = {"text_to_image": 1, "image_to_text": 0}
    queues = [
        {"task": task, "queue": task, "model": model, "waiting": count, "running": count}
        | {"pace_seconds": None}
        for (task, model), count in zip(names.items(), numbers.values(), strict=True)
    ]
    assert queue == {"object": "queue", "tasks": queues, "queues": queues}
    other = (await api.bob.send("GET", "/v1/queue")).json()
    assert [(task["waiting"], task["running"]) for task in other["tasks"]] == [(0, 0), (0, 0)]


async def test_a_job_of_another_tenant_is_not_found(api: Api) -> None:
    job = await api.alice.submit()
    for method, path in [
        ("GET", job["status_url"]),
        ("DELETE", job["cancel_url"]),
        ("GET", job["events_url"]),
        ("GET", f"{job['status_url']}/outputs/0"),
    ]:
        foreign, unknown = (
            await api.bob.send(method, path),
            await api.bob.send(method, path.replace(job["id"], "unknown")),
        )
        assert error_of(foreign) == error_of(unknown) == (404, "not_found", None)
        assert foreign.json() == unknown.json()
        assert error_of(await api.anonymous.send(method, path))[0] == 401
    for method, path in [("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/queue")]:
        assert error_of(await api.anonymous.send(method, path, json=IMAGE))[0] == 401


async def _all(messages: AsyncIterator[Message]) -> list[Message]:
    return [message async for message in messages]
