"""How answers are written, and how the OpenAPI document describes them."""

from typing import Any

from fastapi import Response
from pydantic import BaseModel

from consumer.gateway.job_document import JobDocument

Responses = dict[int | str, dict[str, Any]]


def json_answer(document: BaseModel) -> Response:
    """Write a document; fields that are None are left out."""
    # By pydantic: json.dumps takes several times as long for images of megabytes.
    body = document.model_dump_json(exclude_none=True)
    return Response(body, media_type="application/json")


def described(model: Any, *, streams: bool = False) -> Responses:
    """Describe the answers of a call that waits, for the OpenAPI document.

    Args:
        model: Of the body.
        streams: Whether the answer can be a stream of events.
    """
    success: dict[str, Any] = {"model": model, "description": "The result."}
    if streams:
        success["content"] = {"text/event-stream": {}}
    accepted = "The job, with `Prefer: respond-async`."
    return {200: success, 202: {"model": JobDocument, "description": accepted}}
