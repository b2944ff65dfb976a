"""Server-sent events: messages, heartbeats, errors within a stream, and disconnected clients."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.sse import format_sse_event
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from consumer.background_tasks import cancel_and_wait
from consumer.gateway.error_handlers import as_api_error

HEARTBEAT_EVERY = 15.0  # seconds; proxies close streams that are idle for a minute
START_WITHIN = 2.0  # seconds until the headers are sent; before that an error is an HTTP status
SEND_WITHIN = 60.0  # seconds in which a client must read the sent bytes
HEARTBEAT = b": heartbeat\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nginx buffers without it


def sse_message(data: Any, *, event: str | None = None, event_id: str | None = None) -> bytes:
    """Encode one message.

    Args:
        data: JSON text, or a value to serialize as JSON.
        event: The type of the message.
        event_id: The id, which the client sends as `Last-Event-ID` when it reconnects.
    """
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return format_sse_event(data_str=text, event=event, id=event_id)


async def disconnected(receive: Receive) -> None:
    """Return when the client has disconnected. The body of the request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that consists of server-sent events.

    The headers are sent with the first message, or after `START_WITHIN` seconds. An exception
    before that becomes an error response. A later exception becomes an `error` event, which ends
    the stream.

    Args:
        messages: Encoded messages. One task iterates and closes the generator.
        headers: Further headers of the response.
        on_disconnect: Called if the client disconnects or stops reading before the last message
            was sent, and if the server ends the request.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        messages: AsyncGenerator[bytes, None],
        *,
        headers: Mapping[str, str] | None = None,
        on_disconnect: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(headers={**HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._messages = messages
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the messages until the last one, or until the client disconnects."""
        output = _Output(send, self.status_code, self.raw_headers)
        writing = asyncio.create_task(self._write(output), name="sse")
        others = (
            asyncio.create_task(_beat(output), name="sse-heartbeat"),
            asyncio.create_task(disconnected(receive), name="sse-disconnect"),
        )
        try:
            await asyncio.wait({writing, *others}, return_when=asyncio.FIRST_COMPLETED)
            gone = not writing.done()
        finally:
            await cancel_and_wait(writing, *others)
        if (gone or not writing.result()) and self._on_disconnect is not None:
            await self._on_disconnect()

    async def _write(self, output: "_Output") -> bool:
        """Send all messages; return whether the client has read them."""
        try:
            async with aclosing(self._messages) as messages:
                async for message in messages:
                    await output.send(message)
        except _SlowReader:
            return False
        except Exception as error:  # every error becomes an event of the stream
            if not output.started:
                raise
            await output.send(sse_message(as_api_error(error).body, event="error"))
        await output.end()
        return True


class _SlowReader(Exception):  # noqa: N818 - a state of the client
    """The client does not read the sent bytes."""


class _Output:
    """Sends the response to the client, one message at a time.

    Attributes:
        started: Whether the headers have been sent.
        last: Time of the last message, in seconds of `time.monotonic`.
    """

    def __init__(self, send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = False
        self.last = time.monotonic()
        self._send = send
        self._start = {"type": "http.response.start", "status": status, "headers": headers}
        self._lock = asyncio.Lock()

    async def send(self, chunk: bytes, *, more: bool = True) -> None:
        """Send bytes, and before the first bytes the headers.

        Raises:
            _SlowReader: The client has not read enough of the bytes that were sent before.
        """
        async with self._lock:
            if not self.started:
                self.started = True
                await self._send(self._start)
            body = {"type": "http.response.body", "body": chunk, "more_body": more}
            try:
                # The server buffers up to 64 KiB; beyond that it waits for the client.
                await asyncio.wait_for(self._send(body), SEND_WITHIN)
            except TimeoutError:
                raise _SlowReader from None
            self.last = time.monotonic()

    async def end(self) -> None:
        """Complete the response."""
        await self.send(b"", more=False)


async def _beat(output: _Output) -> None:
    """Send a heartbeat after each pause of `HEARTBEAT_EVERY`; return if the client is too slow."""
    while True:
        every = HEARTBEAT_EVERY if output.started else START_WITHIN
        left = output.last + every - time.monotonic()
        if left > 0:
            await asyncio.sleep(left)
            continue
        try:
            await output.send(HEARTBEAT)
        except _SlowReader:
            return
