"""Requests in flight when the gateway stops, with a small ASGI application."""

import asyncio
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from consumer.gateway.in_flight import CLIENT_GONE, InFlight, InFlightMiddleware


class Client:
    """A client that sends a request without a body and stays connected."""

    def __init__(self, path: str) -> None:
        self.scope: Any = {"type": "http", "method": "GET", "path": path, "headers": []}
        self.received: list[Message] = []
        self._sent = False

    async def receive(self) -> Message:
        if self._sent:
            await asyncio.Event().wait()
        self._sent = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Message) -> None:
        self.received.append(message)


async def test_a_drain_ends_an_event_stream_that_has_no_response_yet() -> None:
    waiting = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        waiting.set()
        assert (await receive())["type"] == "http.disconnect"

    in_flight = InFlight()
    client, other = Client("/v1/jobs/one/events"), Client("/v1/images/generations")
    middleware = InFlightMiddleware(app, in_flight)
    exchanges = []
    for each in (other, client):
        waiting.clear()
        call = middleware(each.scope, each.receive, each.send)
        exchanges.append(asyncio.ensure_future(call))
        await waiting.wait()
    in_flight.drain()
    await asyncio.wait_for(exchanges[1], 5)
    assert client.received[0]["status"] == 503
    assert not exchanges[0].done()
    in_flight.end()
    await asyncio.wait_for(exchanges[0], 5)


async def test_a_disconnected_client_does_not_count_as_refused() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        status = 404 if scope["path"] == "/none" else CLIENT_GONE
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    refused: list[str] = []
    middleware = InFlightMiddleware(app, InFlight(refused.append))
    for path in ("/gone", "/none"):
        client = Client(path)
        await middleware(client.scope, client.receive, client.send)
    assert refused == ["other"]
