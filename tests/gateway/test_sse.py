"""Server-sent event streams: heartbeats, errors, disconnected and slow clients."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Message

from consumer.gateway import sse
from consumer.gateway.errors import ApiError
from consumer.gateway.sse import DONE, HEARTBEAT, EventStream, sse_message


class Client:
    """A client that reads until the test disconnects or pauses it."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.disconnected = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.got_bytes = asyncio.Event()
        self.third_heartbeat = asyncio.Event()
        self.abandoned = 0

    async def receive(self) -> Message:
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            await self.reads.wait()
        self.messages.append(message)
        if message.get("body"):
            self.got_bytes.set()
        if self.body.count(HEARTBEAT) == 3:
            self.third_heartbeat.set()

    async def on_disconnect(self) -> None:
        self.abandoned += 1

    async def read(self, messages: AsyncGenerator[bytes, None]) -> None:
        stream = EventStream(messages, on_disconnect=self.on_disconnect)
        await stream({"type": "http"}, self.receive, self.send)

    @property
    def status(self) -> int:
        status: int = self.messages[0]["status"]
        return status

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def complete(self) -> bool:
        return not self.messages[-1].get("more_body", False)


@pytest.fixture
def client() -> Client:
    return Client()


async def messages_of(*values: Any, then: Exception | None = None) -> AsyncGenerator[bytes, None]:
    for value in values:
        yield sse_message(value)
    if then is not None:
        raise then


async def endless(closed: asyncio.Event) -> AsyncGenerator[bytes, None]:
    try:
        yield sse_message("first")
        await asyncio.Event().wait()
    finally:
        closed.set()


def test_a_message_has_a_type_and_an_id() -> None:
    message = sse_message({"a": "b\nc"}, event="progress", event_id="1-2")
    assert message.decode().splitlines() == [
        "event: progress",
        'data: {"a":"b\\nc"}',
        "id: 1-2",
        "",
    ]


async def test_messages_are_sent_in_order(client: Client) -> None:
    await client.read(messages_of(1, 2))
    assert client.status == 200
    headers = dict(client.messages[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-store"
    assert b"content-length" not in headers
    assert client.body == b"data: 1\n\ndata: 2\n\n"
    assert client.complete
    assert client.abandoned == 0


async def test_an_empty_stream_is_complete(client: Client) -> None:
    await client.read(messages_of())
    assert (client.status, client.body, client.complete) == (200, b"", True)


async def test_an_error_before_the_first_message_is_raised(client: Client) -> None:
    with pytest.raises(ApiError):
        await client.read(messages_of(then=ApiError(400, "no", "invalid_request")))
    assert client.messages == []


async def test_an_error_after_the_first_message_ends_the_stream(client: Client) -> None:
    await client.read(messages_of(1, then=ApiError(500, "no", "model_error")))
    _, error, rest = client.body.split(b"\n\n")
    name, data = error.split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["error"]["code"] == "model_error"
    assert rest == b""
    assert client.complete


async def test_an_unknown_error_is_sent_without_details(client: Client) -> None:
    await client.read(messages_of(1, then=RuntimeError("secret")))
    assert b"internal_error" in client.body
    assert b"secret" not in client.body


async def test_an_idle_stream_sends_heartbeats(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "START_WITHIN", 0.05)
    monkeypatch.setattr(sse, "HEARTBEAT_EVERY", 0.05)
    resume = asyncio.Event()

    async def late() -> AsyncGenerator[bytes, None]:
        await resume.wait()
        yield DONE

    reading = asyncio.create_task(client.read(late()))
    async with asyncio.timeout(10):
        await client.third_heartbeat.wait()
    resume.set()
    await reading
    assert client.status == 200
    assert client.body.endswith(DONE)


async def test_a_disconnect_closes_the_stream(client: Client) -> None:
    closed = asyncio.Event()
    reading = asyncio.create_task(client.read(endless(closed)))
    await client.got_bytes.wait()
    client.disconnected.set()
    await reading
    assert closed.is_set()
    assert client.abandoned == 1


async def test_a_disconnect_before_the_headers_closes_the_stream(client: Client) -> None:
    client.disconnected.set()

    async def idle() -> AsyncGenerator[bytes, None]:
        await asyncio.Event().wait()
        yield DONE

    await client.read(idle())
    assert client.abandoned == 1
    assert client.messages == []


async def test_a_client_that_does_not_read_is_disconnected(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "SEND_WITHIN", 0.05)
    client.reads.clear()
    closed = asyncio.Event()
    await client.read(endless(closed))
    assert closed.is_set()
    assert client.abandoned == 1


async def test_a_server_stop_abandons_no_jobs(client: Client) -> None:
    closed = asyncio.Event()
    reading = asyncio.create_task(client.read(endless(closed)))
    await client.got_bytes.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert closed.is_set()
    assert client.abandoned == 0


async def test_a_generator_can_use_timeouts(client: Client) -> None:
    async def limited() -> AsyncGenerator[bytes, None]:
        async with asyncio.timeout(30):
            yield sse_message(1)
            await asyncio.sleep(0)
            yield sse_message(2)

    await client.read(limited())
    assert client.complete
