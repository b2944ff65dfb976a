"""`/v1/models` as OpenAI's clients use it."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter

from consumer.gateway.catalogue import Model
from consumer.gateway.context import GatewayPart
from consumer.gateway.errors import ApiError
from consumer.gateway.keys import Authenticated

OWNER = "generation-consumer"

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", summary="List the models")
async def list_models(gateway: GatewayPart, caller: Authenticated) -> dict[str, Any]:  # noqa: ARG001
    """List the models that workers serve; a task without any worker is listed by its name."""
    return {"object": "list", "data": _documents(await gateway.catalogue.models())}


@router.get("/v1/models/{model:path}", summary="Look at one model")
async def get_model(
    gateway: GatewayPart,
    caller: Authenticated,  # noqa: ARG001 - a key is needed
    model: str,
) -> dict[str, Any]:
    """Look at one model."""
    for document in _documents(await gateway.catalogue.models()):
        if document["id"] == model:
            return document
    raise ApiError(HTTPStatus.NOT_FOUND, "there is no such model", "model_not_found", "model")


def _documents(models: list[Model]) -> list[dict[str, Any]]:
    """Describe each name once: models of two tasks may have the same name."""
    documents: dict[str, dict[str, Any]] = {}
    for model in models:
        document = documents.setdefault(
            model.name,
            {
                "id": model.name,
                "object": "model",
                "created": model.created,
                "owned_by": OWNER,
                "tasks": [],
            },
        )
        document["tasks"].append(str(model.task))
    return list(documents.values())
