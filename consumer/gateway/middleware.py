"""ASGI middleware: the access log, the limit of bodies, the answer to unknown errors."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from consumer.gateway.error_handlers import as_api_error, error_response
from consumer.gateway.in_flight import ALWAYS_ANSWERED

log = structlog.get_logger()

MAX_DIGITS = 18  # of a length that can be meant
UNMATCHED = "unmatched"  # a path in the log could hold anything


@dataclass
class HandledRequest:
    """One HTTP request, for the access log and metrics.

    Attributes:
        route: The template of the path, never the path itself.
        status: 499 where the client has disconnected before the answer.
        seconds: From the first byte of the request to the last byte of the answer.
        received: Bytes of the body.
        sent: Bytes of the answer's body.
    """

    method: str
    route: str = UNMATCHED
    status: int = 499
    seconds: float = 0.0
    key_id: str = ""
    job_id: str = ""
    received: int = 0
    sent: int = 0
    started: float = field(default_factory=time.monotonic, repr=False)


Observe = Callable[[HandledRequest], None]


def log_request(request: HandledRequest) -> None:
    """Write one line of the access log; those of probes are for debugging only."""
    write = log.debug if request.route in ALWAYS_ANSWERED else log.info
    write(
        "http_request",
        method=request.method,
        route=request.route,
        status=request.status,
        seconds=round(request.seconds, 4),
        key=request.key_id or None,
        job=request.job_id or None,
        received=request.received,
        sent=request.sent,
    )


class RequestLog:
    """Observes each request when it has ended, and adds `X-Request-Id` to its answer.

    Args:
        app: The application behind it.
        observers: Called with each request that has ended.
    """

    def __init__(self, app: ASGIApp, observers: Sequence[Observe]) -> None:
        self._app = app
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        handled = HandledRequest(scope["method"])
        state = scope.setdefault("state", {})

        async def counted_receive() -> Message:
            message = await receive()
            handled.received += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                handled.status = int(message["status"])
                message = _with_request_id(message, state.get("job_id"))
            handled.sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            handled.seconds = time.monotonic() - handled.started
            handled.route = getattr(scope.get("route"), "path", UNMATCHED)
            handled.key_id = state.get("key_id", "")
            handled.job_id = state.get("job_id", "")
            for observe in self._observers:
                observe(handled)


class UnknownErrors:
    """Answers 500 where the application has raised something that nothing else handles.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        started = False

        async def noted_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noted_send)
        except Exception as error:  # noqa: BLE001 - the last place that can answer
            answer = error_response(as_api_error(error))
            if not started:  # an answer that has begun stays incomplete, and the client sees that
                await answer(scope, receive, send)


class BodyLimit:
    """Answers 413 to bodies that are too large, before they are read completely.

    Args:
        app: The application behind it.
        most_bytes: The largest body.
    """

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app = app
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"")
        too_large = announced.isdigit() and _number(announced) > self._most_bytes
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            if too_large:
                raise HTTPException(413)
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most_bytes:
                raise HTTPException(413)
            return message

        await self._app(scope, limited_receive, send)


def _number(digits: bytes) -> float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _with_request_id(message: Message, job_id: str | None) -> Message:
    headers = list(message.get("headers", []))
    if job_id is None or any(name == b"x-request-id" for name, _ in headers):
        return message
    return {**message, "headers": [*headers, (b"x-request-id", job_id.encode())]}
