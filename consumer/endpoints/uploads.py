"""The request-reply endpoint that gives senders an address to upload an input image."""

import json
from collections.abc import Callable
from typing import Protocol

import structlog

from consumer.ports.store import UploadTooLarge
from generation_contracts import (
    InvalidRequest,
    UploadReply,
    UploadRequest,
    decode_upload_request,
    encode,
)

log = structlog.get_logger()

SignUpload = Callable[[UploadRequest], UploadReply]


class Refusable(Protocol):
    """A micro request that can be answered; see `nats.micro.request.Request`."""

    @property
    def data(self) -> bytes:
        """The body."""

    async def respond(self, data: bytes) -> None:
        """Publish a reply to the inbox of the caller."""

    async def respond_error(self, code: str, description: str, data: bytes) -> None:
        """Publish a service error to the inbox of the caller."""


async def handle_upload(call: Refusable, sign: SignUpload) -> None:
    """Answer an upload request whose inbox has been checked.

    Args:
        call: The request.
        sign: Signs the form for one upload; raises UploadTooLarge.
    """
    try:
        reply = sign(decode_upload_request(call.data))
    except InvalidRequest as error:
        await refuse(call, "400", str(error))
    except UploadTooLarge as error:
        await refuse(call, "413", str(error))
    except Exception:
        log.exception("upload_not_signed")
        await refuse(call, "500", "the worker failed on this upload request")
    else:
        await call.respond(encode(reply))


async def refuse(call: Refusable, code: str, description: str) -> None:
    """Answer with a service error: in the headers, and as JSON in the body."""
    body = json.dumps({"error": {"code": code, "description": description}}).encode()
    await call.respond_error(code, description, data=body)
