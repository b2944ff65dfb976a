"""ASGI middleware: access log, API keys, body limits, and the response to unhandled exceptions."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

import structlog
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from consumer.gateway.error_handlers import as_api_error, error_response
from consumer.gateway.in_flight import ALWAYS_ANSWERED
from consumer.gateway.keys import Keys

log = structlog.get_logger()

MAX_DIGITS = 18  # digits of a plausible content length
UNMATCHED = "unmatched"  # replaces a path without a route, which could contain any text
WITHOUT_KEY = ("/", "/docs", "/openapi.json", *ALWAYS_ANSWERED)
PAGE_FILES = "/page/"


@dataclass
class HandledRequest:
    """One HTTP request, for the access log and metrics.

    Attributes:
        route: Template of the path, never the path itself.
        status: HTTP status; 499 if the client disconnected before the response.
        seconds: Time from the first byte of the request to the last byte of the response.
        received: Bytes of the request body.
        sent: Bytes of the response body.
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
    """Write one line of the access log; requests of probes are logged at DEBUG."""
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
    """Reports each finished request, and adds `X-Request-Id` to its response.

    Args:
        app: The wrapped application.
        observers: Called with each finished request.
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


class KeyCheck:
    """Refuses requests without a valid API key before their bodies are read.

    Sets `request.state.caller` and, to the id of the key, `request.state.key_id`. `UnknownErrors`
    must wrap this middleware; it converts the raised errors to responses.

    Args:
        app: The wrapped application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request.

        Raises:
            ApiError: 401 or 503.
        """
        if scope["type"] == "http" and _needs_key(scope["path"]):
            keys: Keys = scope["app"].state.gateway.keys
            caller = keys.caller(Headers(scope=scope).get("authorization"))
            scope.setdefault("state", {}).update(caller=caller, key_id=caller.key_id)
        await self._app(scope, receive, send)


class UnknownErrors:
    """Converts unhandled exceptions of the application to error responses, mostly 500.

    Args:
        app: The wrapped application.
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
        except Exception as error:  # noqa: BLE001 - the outermost handler
            answer = error_response(as_api_error(error))
            if not started:  # a started response remains incomplete, which the client detects
                await answer(scope, receive, send)


class BodyLimit:
    """Answers 413 to a body that is too large, and 503 if all bodies together are too large.

    It responds before the body is read completely. A body counts until its request ends, because
    the application keeps the body in memory until then.

    Args:
        app: The wrapped application.
        most_bytes: Largest body, in bytes.
        most_in_all: Largest sum of the bodies of all requests in progress, in bytes.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, most_in_all: int) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._most_in_all = most_in_all
        self._in_all = 0

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
            # HTTPException, because FastAPI turns any other exception while reading into 400.
            if too_large:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self._in_all += size
            if received > self._most_bytes:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            if size and self._in_all > self._most_in_all:
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE)
            return message

        try:
            await self._app(scope, limited_receive, send)
        finally:
            self._in_all -= received


def _needs_key(path: str) -> bool:
    # The router redirects a path with a trailing slash to the path without it.
    return (path.rstrip("/") or "/") not in WITHOUT_KEY and not path.startswith(PAGE_FILES)


def _number(digits: bytes) -> float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _with_request_id(message: Message, job_id: str | None) -> Message:
    headers = list(message.get("headers", []))
    if job_id is None or any(name == b"x-request-id" for name, _ in headers):
        return message
    return {**message, "headers": [*headers, (b"x-request-id", job_id.encode())]}
