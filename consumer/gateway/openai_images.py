"""`/v1/images/generations` of OpenAI's API, and the responses that image edits share with it."""

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from consumer.gateway.answers import GENERATED, described, json_answer
from consumer.gateway.contract import with_request_names
from consumer.gateway.errors import ApiError
from consumer.gateway.openai_parameters import AUTO, ImageParameters
from consumer.gateway.results import require_address
from consumer.gateway.sse import DONE, EventStream, sse_message
from consumer.gateway.waiting import Call, Sender, SenderPart
from generation_contracts import (
    ImageArtifact,
    ProgressEvent,
    SucceededEvent,
    TextToImageRequest,
)

GENERATION = "image_generation"  # prefix of the event types of a stream

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
    flagged: bool | None = Field(default=None, description="result of the safety checker")
    marks: tuple[str, ...] | None = Field(
        default=None, description="marks in the file that say that a model made it"
    )


class ImagesAnswer(BaseModel):
    """The images."""

    created: int = Field(description="Unix time in seconds")
    background: Literal["opaque"] = "opaque"
    data: list[ImageData]
    output_format: str
    size: str
    usage: ImageUsage = ImageUsage()
    model: str = Field(description="the model that has run")
    warnings: tuple[str, ...] = Field(description="where the output differs from the request")


IMAGES_ANSWERS = described(ImagesAnswer, streams=True)


@router.post(
    "/v1/images/generations", summary="Generate images from a prompt", responses=IMAGES_ANSWERS
)
async def generate_images(sender: SenderPart, parameters: ImageParameters) -> Response:
    """Generate images; the response has base64, or URLs with `response_format: url`.

    With `stream` the response consists of server-sent events, with at most `partial_images`
    previews.
    """
    request = parameters.to_request()
    return await answer(sender, parameters, request, kind=GENERATION)


async def answer(
    sender: Sender, parameters: ImageParameters, request: TextToImageRequest, *, kind: str
) -> Response:
    """Queue a request and return its images, its event stream, or its job.

    Args:
        sender: The client of the HTTP request.
        parameters: The body of the HTTP request.
        request: The request of the contract.
        kind: Prefix of the event types of a stream.

    Raises:
        ApiError: `param` is the name of OpenAI's parameter.
    """
    request = await sender.with_model(request, parameters.model)
    try:
        call = await sender.submit(request)
        if sender.preferences.respond_async:
            return await call.accepted()
        if parameters.stream:
            return EventStream(
                _stream(call, parameters, kind),
                headers=GENERATED,
                on_disconnect=call.abandon,
            )
        event = await call.result()
    except ApiError as error:
        raise with_request_names(error, parameters.names) from None
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
                    marks=output.marks,
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
                if isinstance(event, ProgressEvent) and previews.select(event):
                    yield _partial(event, previews.selected - 1, parameters, kind)
                elif isinstance(event, SucceededEvent):
                    for number in range(len(_images(event))):
                        yield await _completed(call, event, number, kind)
    except ApiError as error:
        raise with_request_names(error, parameters.names) from None
    yield DONE


class PreviewChoice:
    """Selects previews evenly over the steps of a run.

    Args:
        most: Largest number of previews.

    Attributes:
        selected: Number of previews that have been selected.
    """

    def __init__(self, most: int) -> None:
        self.selected = 0
        self._most = most

    def select(self, event: ProgressEvent) -> bool:
        """Return whether to send the preview of an event, and count it."""
        if event.preview is None or self.selected >= self._most:
            return False
        if event.step * (self._most + 1) < event.of * (self.selected + 1):
            return False
        self.selected += 1
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
        "marks": output.marks,
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
