"""Server-sent events: messages, heartbeats, errors in the middle, and clients that disconnect."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.sse import format_sse_event
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from consumer.gateway.error_handlers import as_api_error
from consumer.tasks import cancel_and_wait

HEARTBEAT_EVERY = 15.0  # seconds; proxies close streams that are silent for a minute
START_WITHIN = 2.0  # seconds; until then an error still is an HTTP status
SEND_WITHIN = 60.0  # seconds in which a client has to read what was sent
HEARTBEAT = b": heartbeat\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nginx buffers without it


def sse_message(data: Any, *, event: str | None = None, event_id: str | None = None) -> bytes:
    """Encode one message.

    Args:
        data: JSON text, or a value that is written as JSON.
        event: The type of the message.
        event_id: The client sends it as `Last-Event-ID` when it connects again.
    """
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return format_sse_event(data_str=text, event=event, id=event_id)


async def disconnected(receive: Receive) -> None:
    """Return when the client has disconnected. The body of the request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer that consists of server-sent events.

    The headers are sent with the first message, or after `START_WITHIN` seconds. An exception
    before that becomes a usual error answer. A later exception becomes an `error` event, which ends
    the stream.

    Args:
        messages: Encoded messages; the generator is closed in every case.
        on_disconnect: Called when the client disconnects, or does not read, before the last
            message was sent. It is not called when the server stops.
        headers: More headers.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        messages: AsyncGenerator[bytes, None],
        *,
        on_disconnect: Callable[[], Awaitable[None]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={**HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._messages = messages
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the messages until the last one, or until the client disconnects."""
        writing = asyncio.create_task(self._write(send), name="sse")
        leaving = asyncio.create_task(disconnected(receive), name="sse-disconnect")
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            gone = not writing.done()
        finally:
            await cancel_and_wait(writing, leaving)
            await self._messages.aclose()
        if (gone or not writing.result()) and self._on_disconnect is not None:
            await self._on_disconnect()

    async def _write(self, send: Send) -> bool:
        """Send everything; return whether the client has read it."""
        started = False
        try:
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    if not started:
                        await self._start(send)
                        started = True
                    await _send(send, chunk)
        except _SlowReader:
            return False
        except Exception as error:  # the client gets every error in the stream
            if not started:
                raise
            await send(_body(sse_message(as_api_error(error).body, event="error")))
        if not started:
            await self._start(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the messages, and a heartbeat whenever no message comes for long."""
        wait = START_WITHIN
        following: asyncio.Future[bytes | None] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(self._messages, None))
                await asyncio.wait({following}, timeout=wait)
                wait = HEARTBEAT_EVERY
                if not following.done():
                    yield HEARTBEAT
                    continue
                chunk, following = following.result(), None
                if chunk is None:
                    return
                yield chunk
        finally:
            if following is not None:
                await cancel_and_wait(following)

    async def _start(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )


class _SlowReader(Exception):  # noqa: N818 - a state of the client
    """The client does not read what was sent."""


async def _send(send: Send, chunk: bytes) -> None:
    # The server buffers up to 64 KiB; beyond that `send` waits for the client.
    try:
        await asyncio.wait_for(send(_body(chunk)), SEND_WITHIN)
    except TimeoutError:
        raise _SlowReader from None


def _body(chunk: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk, "more_body": True}
