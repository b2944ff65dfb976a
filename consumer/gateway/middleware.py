"""ASGI middleware: access log, API keys, limits of bodies, the answer to unknown errors."""

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

MAX_DIGITS = 18  # of a length that can be meant
UNMATCHED = "unmatched"  # a path in the log could hold anything
WITHOUT_KEY = ("/", "/docs", "/openapi.json", *ALWAYS_ANSWERED)
PAGE_FILES = "/page/"


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


class KeyCheck:
    """Refuses requests without a valid API key before anything reads their bodies.

    The caller is left in `request.state.caller`, the key's id in `request.state.key_id`.
    `UnknownErrors` must be around it and answers what it raises.

    Args:
        app: The application behind it.
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
    """Answers what the application has raised and nothing else handles; mostly with 500.

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
    """Answers 413 to a body that is too large, and 503 where all bodies together are.

    It does so before a body is read completely. A body counts until its request ends, because the
    application keeps it for so long.

    Args:
        app: The application behind it.
        most_bytes: The largest body.
        most_in_all: The largest sum of the bodies of all requests in progress.
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
            # FastAPI answers 400 to every other exception while it reads a body.
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
    # A path with one more slash is redirected to the one without.
    return (path.rstrip("/") or "/") not in WITHOUT_KEY and not path.startswith(PAGE_FILES)


def _number(digits: bytes) -> float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _with_request_id(message: Message, job_id: str | None) -> Message:
    headers = list(message.get("headers", []))
    if job_id is None or any(name == b"x-request-id" for name, _ in headers):
        return message
    return {**message, "headers": [*headers, (b"x-request-id", job_id.encode())]}
