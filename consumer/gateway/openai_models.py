"""`/v1/models` of OpenAI's API."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from consumer.gateway.catalogue import Model
from consumer.gateway.context import GatewayPart
from consumer.gateway.keys import Authenticated
from generation_contracts import Task

OWNER = "generation-consumer"

router = APIRouter(tags=["OpenAI"])


class ModelDocument(BaseModel):
    """A model."""

    id: str = Field(description="value of `model` in requests")
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time in seconds")
    owned_by: str = OWNER
    tasks: list[Task] = Field(description="the tasks of the model")


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelDocument]


@router.get("/v1/models", summary="List the models")
async def list_models(gateway: GatewayPart, caller: Authenticated) -> ModelList:  # noqa: ARG001
    """List the models that workers serve; a task without any worker is listed by its name."""
    return ModelList(data=_documents(await gateway.catalogue.models()))


@router.get("/v1/models/{model:path}", summary="Get a model")
async def get_model(
    gateway: GatewayPart,
    caller: Authenticated,  # noqa: ARG001 - a key is needed
    model: str,
) -> ModelDocument:
    """Return one model."""
    for document in _documents(await gateway.catalogue.models()):
        if document.id == model:
            return document
    raise gateway.catalogue.unknown("there is no such model")


def _documents(models: list[Model]) -> list[ModelDocument]:
    """Return one document for each name; models of two tasks may have the same name."""
    documents: dict[str, ModelDocument] = {}
    for model in models:
        new = ModelDocument(id=model.name, created=model.created, tasks=[])
        documents.setdefault(model.name, new).tasks.append(model.task)
    return list(documents.values())
