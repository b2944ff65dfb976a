"""JSON responses and their description in the OpenAPI document."""

from typing import Any

from fastapi import Response
from pydantic import BaseModel

from consumer.gateway.job_document import JobDocument

Responses = dict[int | str, dict[str, Any]]


def json_answer(document: BaseModel) -> Response:
    """Return a document as a JSON response, without the fields that are None."""
    # pydantic serializes images of several megabytes several times as fast as json.dumps.
    body = document.model_dump_json(exclude_none=True)
    return Response(body, media_type="application/json")


def described(model: Any, *, streams: bool = False) -> Responses:
    """Return the OpenAPI description of the responses of an endpoint that waits for a result.

    Args:
        model: The model of the response body.
        streams: Whether the response can be a stream of events.
    """
    success: dict[str, Any] = {"model": model, "description": "The result."}
    if streams:
        success["content"] = {"text/event-stream": {}}
    accepted = "The job, with `Prefer: respond-async`."
    return {200: success, 202: {"model": JobDocument, "description": accepted}}
