"""`/v1/images/generations` as OpenAI's clients use it, and what its edits share with it."""

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from consumer.gateway.answers import described, json_answer
from consumer.gateway.contract import in_callers_words
from consumer.gateway.errors import ApiError
from consumer.gateway.openai_parameters import AUTO, ImageParameters
from consumer.gateway.results import require_address
from consumer.gateway.sse import DONE, EventStream, sse_message
from consumer.gateway.waiting import Call, Sender, SenderPart
from generation_contracts import (
    ImageArtifact,
    ProgressEvent,
    SucceededEvent,
    Task,
    TextToImageRequest,
)

GENERATION = "image_generation"  # what the types of its events begin with

router = APIRouter(tags=["OpenAI"])


class TokenDetails(BaseModel):
    """Always 0; see `ImageUsage`."""

    image_tokens: int = 0
    text_tokens: int = 0


class ImageUsage(BaseModel):
    """Always 0: these models count no tokens. OpenAI's types require the fields."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class ImageData(BaseModel):
    """One image."""

    b64_json: str | None = Field(default=None, description="the file, base64")
    url: str | None = Field(default=None, description="with `response_format: url`")
    seed: int
    flagged: bool | None = Field(default=None, description="what a safety checker says")


class ImagesAnswer(BaseModel):
    """The images."""

    created: int = Field(description="Unix time in seconds")
    background: Literal["opaque"] = "opaque"
    data: list[ImageData]
    output_format: str
    size: str
    usage: ImageUsage = ImageUsage()
    model: str = Field(description="the one that has run")
    warnings: tuple[str, ...] = Field(description="what was done otherwise than asked")


IMAGES_ANSWERS = described(ImagesAnswer, streams=True)


@router.post(
    "/v1/images/generations", summary="Make images from a prompt", responses=IMAGES_ANSWERS
)
async def generate_images(sender: SenderPart, parameters: ImageParameters) -> Response:
    """Make images; the answer has them as base64, or as URLs with `response_format: url`.

    With `stream` the answer consists of server-sent events, with up to `partial_images` previews.
    """
    wanted = parameters.to_request()
    return await answer(sender, parameters, wanted, kind=GENERATION)


async def answer(
    sender: Sender, parameters: ImageParameters, wanted: TextToImageRequest, *, kind: str
) -> Response:
    """Queue a request and answer as the caller wishes.

    Args:
        sender: Who has sent it.
        parameters: What was asked for, in the words of OpenAI's API.
        wanted: The same in the words of the contract.
        kind: What the types of the stream's events begin with.

    Raises:
        ApiError: With the parameters' names in the words of OpenAI's API.
    """
    await sender.gateway.catalogue.name_of(parameters.model, Task.TEXT_TO_IMAGE)
    try:
        call = await sender.submit(wanted)
        if sender.preferences.respond_async:
            return await call.accepted()
        if parameters.stream:
            return EventStream(_stream(call, parameters, kind), on_disconnect=call.abandon)
        event = await call.result()
    except ApiError as error:
        raise in_callers_words(error, parameters.names) from None
    by_url = parameters.response_format == "url"
    outputs = _images(event)
    return json_answer(
        ImagesAnswer(
            created=int(event.time.timestamp()),
            data=[
                ImageData(
                    b64_json=None if by_url else await _base64(call, event, number),
                    url=require_address(output) if by_url else None,
                    seed=output.seed,
                    flagged=output.flagged,
                )
                for number, output in enumerate(outputs)
            ],
            output_format=_format(outputs[0]),
            size=_size(outputs[0]),
            model=event.model.id,
            warnings=event.warnings,
        )
    )


async def _stream(
    call: Call, parameters: ImageParameters, kind: str
) -> AsyncGenerator[bytes, None]:
    """Yield the events of OpenAI's stream of images."""
    previews = PreviewChoice(parameters.partial_images or 0)
    try:
        async with aclosing(call.events()) as events:
            async for event in events:
                if isinstance(event, ProgressEvent) and previews.takes(event):
                    yield _partial(event, previews.taken - 1, parameters, kind)
                elif isinstance(event, SucceededEvent):
                    for number in range(len(_images(event))):
                        yield await _completed(call, event, number, kind)
    except ApiError as error:
        raise in_callers_words(error, parameters.names) from None
    yield DONE


class PreviewChoice:
    """Chooses at most so many previews, evenly over the steps of a run.

    Attributes:
        taken: How many have been chosen.
    """

    def __init__(self, most: int) -> None:
        self.taken = 0
        self._most = most

    def takes(self, event: ProgressEvent) -> bool:
        """Whether to send the preview of an event."""
        if event.preview is None or self.taken >= self._most:
            return False
        if event.step * (self._most + 1) < event.of * (self.taken + 1):
            return False
        self.taken += 1
        return True


def _partial(event: ProgressEvent, index: int, parameters: ImageParameters, kind: str) -> bytes:
    name = f"{kind}.partial_image"
    data = {
        "type": name,
        "b64_json": event.preview,
        "partial_image_index": index,
        "created_at": int(event.time.timestamp()),
        "size": parameters.shown_size,
        "quality": AUTO,
        "background": "opaque",
        "output_format": parameters.output_format or "png",
    }
    return sse_message(data, event=name)


async def _completed(call: Call, event: SucceededEvent, number: int, kind: str) -> bytes:
    output = _images(event)[number]
    name = f"{kind}.completed"
    data = {
        "type": name,
        "b64_json": await _base64(call, event, number),
        "created_at": int(event.time.timestamp()),
        "size": _size(output),
        "quality": AUTO,
        "background": "opaque",
        "output_format": _format(output),
        "usage": ImageUsage().model_dump(),
        "seed": output.seed,
    }
    return sse_message(data, event=name)


async def _base64(call: Call, event: SucceededEvent, number: int) -> str:
    return base64.b64encode(await call.content(event, number)).decode()


def _images(event: SucceededEvent) -> list[ImageArtifact]:
    return [output for output in event.outputs if isinstance(output, ImageArtifact)]


def _format(output: ImageArtifact) -> str:
    return output.media_type.removeprefix("image/")


def _size(output: ImageArtifact) -> str:
    return f"{output.width}x{output.height}"
