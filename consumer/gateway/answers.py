"""JSON responses and their description in the OpenAPI document."""

from typing import Any, Final

from fastapi import Response
from pydantic import BaseModel

from consumer.gateway.job_document import JobDocument
from generation_contracts.headers import AI_GENERATED

Responses = dict[int | str, dict[str, Any]]

# On every response that has an output: clients can pass it on.
GENERATED: Final = {AI_GENERATED.lower(): "true"}


GENERATED_DESCRIBED: Final = {
    AI_GENERATED: {
        "description": "`true`: a model generated the outputs",
        "schema": {"type": "string", "enum": ["true"]},
    }
}


def json_answer(document: BaseModel) -> Response:
    """Return a document with outputs as a JSON response, without the fields that are None."""
    # pydantic serializes images of several megabytes several times as fast as json.dumps.
    body = document.model_dump_json(exclude_none=True)
    return Response(body, media_type="application/json", headers=GENERATED)


def described(model: Any, *, streams: bool = False) -> Responses:
    """Return the OpenAPI description of the responses of an endpoint that waits for a result.

    Args:
        model: The model of the response body.
        streams: Whether the response can be a stream of events.
    """
    success: dict[str, Any] = {
        "model": model,
        "description": "The result.",
        "headers": GENERATED_DESCRIBED,
    }
    if streams:
        success["content"] = {"text/event-stream": {}}
    accepted = "The job, with `Prefer: respond-async`."
    return {200: success, 202: {"model": JobDocument, "description": accepted}}
