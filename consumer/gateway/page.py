"""The live page at `/` and the API reference at `/docs`: static files of the package.

The pages need no build step and load nothing from other hosts, so they work offline. The module
reads the files once, when it is imported.
"""

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

from fastapi import APIRouter, Request, Response
from starlette.datastructures import Headers

from consumer.gateway.errors import not_found
from consumer.gateway.etags import matches

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",  # previews are data URLs, files fetched with a key are blobs
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # scripts cannot turn text into markup or code
    "trusted-types": "'none'",
}
CONTENT_SECURITY_POLICY = "; ".join(f"{name} {value}" for name, value in _POLICY.items())
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_REVALIDATE = "no-cache"  # browsers use a new version at once; the ETag avoids transfers

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class StaticFile:
    """One file of the page.

    Attributes:
        etag: Weak, because it covers the plain and the compressed form.
    """

    content: bytes
    compressed: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, name: str, content: bytes) -> "StaticFile":
        """Return a file with its compressed form, media type and entity tag.

        Args:
            name: File name; its suffix determines the media type.
            content: Content of the file.
        """
        return cls(
            content=content,
            compressed=gzip.compress(content, mtime=0),
            media_type=MEDIA_TYPES[name.rpartition(".")[2]],
            etag=f'W/"{hashlib.sha256(content).hexdigest()[:32]}"',
        )


def _load() -> Mapping[str, StaticFile]:
    folder = files("consumer.gateway").joinpath("page")
    return MappingProxyType(
        {file.name: StaticFile.of(file.name, file.read_bytes()) for file in folder.iterdir()}
    )


FILES = _load()


@router.api_route("/", methods=["GET", "HEAD"])
async def live_page(request: Request) -> Response:
    """Serve the live page."""
    return _respond("index.html", request.headers)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def api_reference(request: Request) -> Response:
    """Serve the API reference, which renders /openapi.json."""
    return _respond("docs.html", request.headers)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def page_file(name: str, request: Request) -> Response:
    """Serve a script, style or image of the pages."""
    return _respond(name, request.headers)


def _respond(name: str, request_headers: Headers) -> Response:
    file = FILES.get(name)
    if file is None:
        raise not_found("there is no such file")
    headers = {
        **SECURITY_HEADERS,
        "cache-control": _REVALIDATE,
        "etag": file.etag,
        "vary": "accept-encoding",
    }
    if matches(request_headers.get("if-none-match", ""), file.etag):
        return Response(status_code=304, headers=headers)
    content = file.content
    if "gzip" in request_headers.get("accept-encoding", ""):
        content = file.compressed
        headers["content-encoding"] = "gzip"
    return Response(content, media_type=file.media_type, headers=headers)
