"""The access log, the body limit and unknown errors, with a small ASGI application."""

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request
from starlette.types import Message, Receive, Scope, Send

from consumer.gateway.error_handlers import install_error_handlers
from consumer.gateway.middleware import BodyLimit, HandledRequest, RequestLog, UnknownErrors

LIMIT = 1_000  # bytes


@pytest.fixture
def handled() -> list[HandledRequest]:
    return []


@pytest.fixture
async def http(handled: list[HandledRequest]) -> AsyncIterator[httpx2.AsyncClient]:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/things/{name}")
    async def thing(name: str, http: Request, body: dict[str, Any]) -> dict[str, Any]:
        http.state.key_id = "alice-1"
        http.state.job_id = "job-1"
        return body

    @app.get("/raises")
    async def raises() -> None:
        raise RuntimeError("secret")

    app.add_middleware(UnknownErrors)
    app.add_middleware(BodyLimit, most_bytes=LIMIT, most_in_all=LIMIT)
    app.add_middleware(RequestLog, observers=[handled.append])
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_the_access_log_contains_no_content_of_the_request(
    http: httpx2.AsyncClient, handled: list[HandledRequest]
) -> None:
    answer = await http.post("/things/private?key=private", json={"prompt": "private"})
    assert answer.headers["x-request-id"] == "job-1"
    (request,) = handled
    assert (request.method, request.route, request.status) == ("POST", "/things/{name}", 200)
    assert (request.key_id, request.job_id) == ("alice-1", "job-1")
    assert (request.received, request.sent) == (20, len(answer.content))
    assert request.seconds > 0
    assert "private" not in str(request)


async def test_the_access_log_contains_no_unknown_path(
    http: httpx2.AsyncClient, handled: list[HandledRequest]
) -> None:
    await http.get("/private")
    assert (handled[0].route, handled[0].status) == ("unmatched", 404)


async def test_an_unknown_error_is_a_500_without_details(
    http: httpx2.AsyncClient, handled: list[HandledRequest]
) -> None:
    answer = await http.get("/raises")
    assert answer.status_code == handled[0].status == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


async def test_an_error_after_the_response_start_leaves_the_response_incomplete() -> None:
    start = {"type": "http.response.start", "status": 200, "headers": []}
    sent: list[Message] = []

    async def breaks(_: Scope, __: Receive, send: Send) -> None:
        await send(start)
        raise RuntimeError("secret")

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await UnknownErrors(breaks)({"type": "http"}, receive, send)
    assert sent == [start]


async def chunks() -> AsyncIterator[bytes]:
    for _ in range(20):
        yield b" " * 100


@pytest.mark.parametrize("announced", [True, False])
async def test_a_large_body_is_refused(http: httpx2.AsyncClient, *, announced: bool) -> None:
    answer = await http.post(
        "/things/a",
        content=b" " * 2_000 if announced else chunks(),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


async def test_a_body_at_the_limit_is_accepted(http: httpx2.AsyncClient) -> None:
    body = b'{"a": "' + b"a" * (LIMIT - 9) + b'"}'
    answer = await http.post(
        "/things/a", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize("number", [b"1_0", b"-5", b"+5", b"9" * 5_000, b"\xb2"])
async def test_an_invalid_content_length_causes_no_server_error(
    http: httpx2.AsyncClient, number: bytes
) -> None:
    answer = await http.post(
        "/things/a",
        content=b"{}",
        headers={b"content-type": b"application/json", b"content-length": number},
    )
    assert answer.status_code in {200, 413}
