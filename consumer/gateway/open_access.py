"""Access without keys, for programs and web pages of this machine only.

A gateway without keys listens on loopback. This does not stop web pages in a browser on this
machine: a page can post a form to the gateway, or let its domain resolve to 127.0.0.1. So the
middleware checks that the headers `Host` and `Origin` name this machine.
"""

import ipaddress
import json
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from consumer.gateway.errors import ApiError

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class LoopbackOnly:
    """Answers 403 to requests for other hosts, and to posts from pages of other hosts.

    Args:
        app: The wrapped application.
        origins: Origins of other hosts that may post.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        message = self._refusal(scope) if scope["type"] == "http" else ""
        if not message:
            await self._app(scope, receive, send)
            return
        error = ApiError(HTTPStatus.FORBIDDEN, message, "loopback_only")
        headers = {**error.headers, "content-type": "application/json"}
        await send(
            {
                "type": "http.response.start",
                "status": error.status,
                "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            }
        )
        await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})

    def _refusal(self, scope: Scope) -> str:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_loopback(_host_of(f"//{host}")):
            return "without API keys this gateway answers on loopback only: set GATEWAY_KEYS"
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or scope["method"] in _SAFE_METHODS or origin in self._origins:
            return ""
        if is_loopback(_host_of(origin)):
            return ""
        return "without API keys this gateway takes no requests from pages of other hosts"


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is of this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
