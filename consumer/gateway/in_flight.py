"""HTTP requests in flight: count them, limit the time of their bodies, end them at shutdown."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from consumer.background_tasks import cancel_and_wait
from consumer.gateway.errors import ApiError

BODY_PART_WITHIN = 30.0  # seconds between two parts of a body; a slower client gets 408
BODY_WITHIN = 300.0  # seconds for a whole body: 2 MiB at 56 kbit/s
END_WITHIN = 2.0  # seconds for a request to end before its task is cancelled
RETRY_AFTER = 1  # seconds; another gateway can accept the request at once
ALWAYS_ANSWERED = ("/healthz", "/readyz", "/metrics")
RESUMABLE = "/events"  # suffix of the paths of streams that a client can resume at another gateway
STOPPING_COMMENT = b": the gateway stops, connect again\n\n"
CLIENT_GONE = 499  # nginx's status for a disconnected client; used in the log and the metrics only
MAX_ERROR = 4_096  # bytes of a response that are parsed for its error code


@dataclass(eq=False)
class _Exchange:
    """One request and its response.

    Attributes:
        started: Start of the request, in seconds of `time.monotonic`.
        limit: Timeout of the request; it is set when the request must end.
        ending: Set when the request must end; the application then sees a disconnected client.
        status: Status of the response; 0 before the response has started.
    """

    path: str
    started: float = field(default_factory=time.monotonic)
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    body_read: bool = False
    status: int = 0
    is_stream: bool = False
    complete: bool = False

    @property
    def is_refused(self) -> bool:
        """Whether the response is an error that the client receives."""
        return self.status >= HTTPStatus.BAD_REQUEST and self.status != CLIENT_GONE


class InFlight:
    """The requests in progress.

    Args:
        refused: Called with the code of each error response.
    """

    def __init__(self, refused: Callable[[str], None] = lambda _code: None) -> None:
        self.refused = refused
        self.draining = False
        self._exchanges: set[_Exchange] = set()

    @property
    def requests(self) -> int:
        """How many requests are in progress, streams included."""
        return len(self._exchanges)

    @property
    def streams(self) -> int:
        """How many responses are event streams."""
        return sum(exchange.is_stream for exchange in self._exchanges)

    def drain(self) -> None:
        """Refuse new requests, and end the streams that clients can resume at another gateway."""
        self.draining = True
        # Chosen by path and not by `is_stream`: a stream may not have sent anything yet.
        self._end(lambda exchange: exchange.path.endswith(RESUMABLE))

    def end(self) -> None:
        """End all requests; each response tells the client that the gateway is stopping."""
        self.draining = True
        self._end(lambda _exchange: True)

    def _end(self, chosen: Callable[[_Exchange], bool]) -> None:
        until = asyncio.get_running_loop().time() + END_WITHIN
        for exchange in filter(chosen, self._exchanges):
            exchange.ending.set()
            if not exchange.limit.expired():
                exchange.limit.reschedule(until)

    def enter(self, exchange: _Exchange) -> None:
        """Add a request."""
        self._exchanges.add(exchange)

    def leave(self, exchange: _Exchange) -> None:
        """Remove a request."""
        self._exchanges.discard(exchange)


class InFlightMiddleware:
    """Records each request in `InFlight` and ends it when the gateway stops.

    To end a request, the middleware reports a disconnected client to the application. The
    application then cancels a request without an idempotency key, so a client that sends it to
    another gateway does not run it twice.

    Args:
        app: The wrapped application.
        in_flight: The requests in progress.
    """

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope["path"])
        if self._in_flight.draining and exchange.path not in ALWAYS_ANSWERED:
            await _send_stopping(exchange, self._observed(exchange, send))
            return

        async def receive_or_end() -> Message:
            return await _received(exchange, receive)

        self._in_flight.enter(exchange)
        answer = self._observed(exchange, send)
        try:
            async with exchange.limit:
                await self._app(scope, receive_or_end, _unless_ending(exchange, answer))
        except TimeoutError:
            if not exchange.limit.expired():
                raise
        finally:
            self._in_flight.leave(exchange)
        if exchange.ending.is_set() and not exchange.complete:
            await _send_stopping(exchange, answer)

    def _observed(self, exchange: _Exchange, send: Send) -> Send:
        """Wrap `send` to record the status and the progress of the response."""

        async def observe(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                kind = dict(message.get("headers", [])).get(b"content-type", b"")
                exchange.is_stream = kind.startswith(b"text/event-stream")
            elif message["type"] == "http.response.body":
                if exchange.is_refused and not exchange.complete:
                    self._in_flight.refused(_error_code(message.get("body", b"")))
                exchange.complete = not message.get("more_body", False)
            await send(message)

        return observe


async def _received(exchange: _Exchange, receive: Receive) -> Message:
    """Return the next message of the client, or a disconnect if the request must end.

    Raises:
        HTTPException: 408: the next part of the body, or the whole body, timed out.
    """
    within = None
    if not exchange.body_read:
        within = min(BODY_PART_WITHIN, exchange.started + BODY_WITHIN - time.monotonic())
        if within <= 0:  # otherwise a part that has arrived already would be accepted
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT)
    receiving = asyncio.ensure_future(receive())
    ending = asyncio.ensure_future(exchange.ending.wait())
    try:
        await asyncio.wait({receiving, ending}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        if receiving.done():
            message = receiving.result()
            exchange.body_read = not message.get("more_body", False)
            return message
    finally:
        await cancel_and_wait(receiving, ending)
    if ending.done() and not ending.cancelled():
        return {"type": "http.disconnect"}
    raise HTTPException(HTTPStatus.REQUEST_TIMEOUT)


def _unless_ending(exchange: _Exchange, send: Send) -> Send:
    """Wrap `send` to drop messages of the application after its request was ended."""

    async def send_on(message: Message) -> None:
        if not exchange.ending.is_set():
            await send(message)

    return send_on


async def _send_stopping(exchange: _Exchange, send: Send) -> None:
    """Finish a response: with 503, or with a comment in an event stream."""
    if exchange.is_stream:
        await send({"type": "http.response.body", "body": STOPPING_COMMENT})
    elif not exchange.status:
        error = ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "this gateway stops: send the request again",
            "gateway_stopping",
            retry_after=RETRY_AFTER,
        )
        body = json.dumps(error.body).encode()
        headers = {
            **error.headers,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        await send(
            {
                "type": "http.response.start",
                "status": error.status,
                "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            }
        )
        await send({"type": "http.response.body", "body": body})


def _error_code(body: bytes) -> str:
    """Return the error code of a response body, or `other`."""
    try:
        return str(json.loads(body[:MAX_ERROR])["error"]["code"])
    except (ValueError, TypeError, KeyError):
        return "other"
