"""`/infer`: the endpoint of the HTTP service that this project replaces."""

import base64
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from consumer.gateway.answers import described, json_answer
from consumer.gateway.contract import contract_request, unsupported, with_request_names
from consumer.gateway.error_handlers import UNION_TAG
from consumer.gateway.errors import ApiError
from consumer.gateway.waiting import Call, SenderPart
from generation_contracts import ImageArtifact, SucceededEvent, Task, TextOutput
from generation_contracts import Request as GenerationRequest
from generation_contracts.fields import Metadata, ModelName, Prompt
from generation_contracts.tasks.image_to_text import ImageToTextParameters
from generation_contracts.tasks.text_to_image import TextToImageParameters

TEXT_TO_IMAGE = f"{UNION_TAG}text2image"
IMAGE_TO_TEXT = f"{UNION_TAG}image2text"
MODEL = "id of a model or name of a queue; absent: the default queue"
_URL = re.compile(r"(data|https?):", re.ASCII)

router = APIRouter(tags=["infer"])


class TextToImageBody(TextToImageParameters):
    """Make images from a prompt."""

    model_config = ConfigDict(strict=True)

    model_type: Literal["text2image", "text_to_image"] = "text2image"
    prompt: Prompt
    model: ModelName | None = Field(default=None, description=MODEL)
    metadata: Metadata = Field(default_factory=dict)


class ImageToTextBody(ImageToTextParameters):
    """Generate a text from a prompt and images."""

    model_config = ConfigDict(strict=True)

    model_type: Literal["image2text", "image_to_text"] = "image2text"
    prompt: Prompt
    image: str | None = Field(default=None, description="the same as `images` with one entry")
    images: list[str] | None = Field(
        default=None, description="base64, `data:` URLs, or `https://` URLs as the worker allows"
    )
    model: ModelName | None = Field(default=None, description=MODEL)
    metadata: Metadata = Field(default_factory=dict)

    @property
    def all_images(self) -> list[str]:
        """The images of both fields."""
        return [*([] if self.image is None else [self.image]), *(self.images or [])]


def _kind(body: Any) -> str:
    """Return the union tag of a body: by `model_type` or, without it, by the image fields."""
    if not isinstance(body, dict):
        return IMAGE_TO_TEXT if isinstance(body, ImageToTextBody) else TEXT_TO_IMAGE
    kind = UNION_TAG + str(body.get("model_type", "")).replace("_to_", "2")
    if kind in {TEXT_TO_IMAGE, IMAGE_TO_TEXT}:
        return kind
    return IMAGE_TO_TEXT if body.keys() & {"image", "images"} else TEXT_TO_IMAGE


Body = Annotated[
    Annotated[TextToImageBody, Tag(TEXT_TO_IMAGE)] | Annotated[ImageToTextBody, Tag(IMAGE_TO_TEXT)],
    Discriminator(_kind),
]


class _Answer(BaseModel):
    request_id: str
    model: str
    seconds: float = Field(description="of inference")
    warnings: tuple[str, ...] = Field(description="where the output differs from the request")


class ImageAnswer(_Answer):
    """Images."""

    model_type: Literal["text2image"] = "text2image"
    image: str = Field(description="the first file, base64")
    images: list[str] = Field(description="all files, base64")
    media_type: str
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    seeds: list[int] = Field(description="of each image")
    marks: list[tuple[str, ...]] = Field(
        description="of each image: marks in the file that say that a model made it"
    )


class TextAnswer(_Answer):
    """A text."""

    model_type: Literal["image2text"] = "image2text"
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@router.post(
    "/infer",
    summary="Generate images, or a text about images",
    responses=described(ImageAnswer | TextAnswer),
)
async def infer(sender: SenderPart, body: Body) -> Response:
    """Run a model once and wait for its output.

    A body with `images` (or `image`) is an image-to-text request; the response has `text`. Any
    other body is a text-to-image request; the response has the first image as `image` and all
    images as `images`, in base64. `model_type` selects the task explicitly.
    """
    if isinstance(body, ImageToTextBody):
        sender.require_room(sum(len(image) for image in body.all_images))
    try:
        call = await sender.submit(_request(body))
        if sender.preferences.respond_async:
            return await call.accepted()
        event = await call.result()
    except ApiError as error:
        raise with_request_names(error, {}) from None
    return json_answer(await _document(call, event))


def _request(body: TextToImageBody | ImageToTextBody) -> GenerationRequest:
    fields = body.model_dump(exclude={"model_type", "image", "images"}, exclude_defaults=True)
    if isinstance(body, TextToImageBody):
        if body.preview:
            raise unsupported("preview", "is for /v1/jobs and /v1/images/generations")
        return contract_request(Task.TEXT_TO_IMAGE, fields, {})
    if body.stream:
        raise unsupported("stream", "is for /v1/jobs and /v1/chat/completions")
    fields["images"] = [
        image if _URL.match(image) else {"base64": image} for image in body.all_images
    ]
    return contract_request(Task.IMAGE_TO_TEXT, fields, {})


async def _document(call: Call, event: SucceededEvent) -> ImageAnswer | TextAnswer:
    """Return the body of the response."""
    shared: dict[str, Any] = {
        "request_id": event.request_id,
        "model": event.model.id,
        "seconds": event.timings.inference,
        "warnings": event.warnings,
    }
    first = event.outputs[0]
    if isinstance(first, TextOutput):
        return TextAnswer(
            text=first.text,
            finish_reason=first.finish_reason,
            prompt_tokens=first.prompt_tokens,
            completion_tokens=first.completion_tokens,
            **shared,
        )
    artifacts = [output for output in event.outputs if isinstance(output, ImageArtifact)]
    picture = artifacts[0]
    images = [
        base64.b64encode(await call.content(event, number)).decode()
        for number in range(len(event.outputs))
    ]
    return ImageAnswer(
        image=images[0],
        images=images,
        media_type=picture.media_type,
        width=picture.width,
        height=picture.height,
        seeds=[artifact.seed for artifact in artifacts],
        marks=[artifact.marks or () for artifact in artifacts],
        **shared,
    )
