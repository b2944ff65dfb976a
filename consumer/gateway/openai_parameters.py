"""The parameters of OpenAI's image endpoints, and what of them can be done."""

import re
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from consumer.gateway.contract import contract_request, unsupported
from consumer.gateway.errors import invalid
from generation_contracts import Task, TextToImageRequest
from generation_contracts.requests import (
    MAX_ADAPTERS,
    MAX_OUTPUTS,
    MAX_PROMPT,
    MAX_STEPS,
    AdapterName,
    AdapterWeight,
    Prompt,
    Seed,
    Side,
)

AUTO = "auto"
FULL_COMPRESSION_QUALITY = 100  # OpenAI's default; encoders here use their own quality
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})\Z", re.ASCII)

Word = Annotated[str, StringConstraints(max_length=64)]
Identifier = Annotated[str, StringConstraints(max_length=512)]


class OpenAIBody(BaseModel):
    """A body as OpenAI's clients send it: null stands for a field that is absent."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: inner for name, inner in value.items() if inner is not None}


class ImageParameters(OpenAIBody):
    """What images are to be made, in the words of OpenAI's API.

    The fields after `partial_images` are of this service; OpenAI's clients send them by
    `extra_body`.
    """

    prompt: Prompt
    model: Word | None = Field(default=None, description="see `GET /v1/models`")
    n: Annotated[int, Field(ge=1, le=MAX_OUTPUTS)] | None = Field(
        default=None, description="number of images"
    )
    size: Word | None = Field(
        default=None, description="`WIDTHxHEIGHT` in pixels; `auto` is the model's own"
    )
    quality: Word | None = Field(default=None, description="`auto` or `standard`")
    style: Word | None = Field(default=None, description="not supported")
    background: Word | None = Field(default=None, description="`auto` or `opaque`")
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="not supported but for 100, its default"
    )
    response_format: Literal["b64_json", "url"] | None = None
    user: Identifier | None = Field(default=None, description="has no effect")
    safety_identifier: Identifier | None = Field(default=None, description="has no effect")
    moderation: Word | None = Field(default=None, description="has no effect")
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        default=None, description="previews in the stream, at most"
    )

    negative_prompt: Annotated[str, StringConstraints(max_length=MAX_PROMPT)] | None = None
    width: Side | None = None
    height: Side | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        default=None, validation_alias=AliasChoices("num_inference_steps", "steps")
    )
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Seed | None = Field(default=None, description="image n uses seed + n")
    adapters: Annotated[dict[AdapterName, AdapterWeight], Field(max_length=MAX_ADAPTERS)] | None = (
        None
    )

    def require_supported(self) -> None:
        """Check what this service cannot do whatever the model.

        Raises:
            ApiError: 400 that names the parameter.
        """
        if self.quality not in {None, AUTO, "standard"}:
            raise unsupported("quality", "must be `auto`: set num_inference_steps instead")
        if self.style is not None:
            raise unsupported("style", "is not supported: describe the style in the prompt")
        if self.background not in {None, AUTO, "opaque"}:
            raise unsupported("background", "must be `auto` or `opaque`")
        if self.output_compression not in {None, FULL_COMPRESSION_QUALITY}:
            raise unsupported("output_compression", "is not supported")

    def to_request(self) -> TextToImageRequest:
        """Make the request of the contract.

        Raises:
            ApiError: 400 that names the parameter.
        """
        self.require_supported()
        width, height = self._sides()
        fields = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": width,
            "height": height,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "num_images": self.n,
            "seed": self.seed,
            "output_format": self.output_format,
            "adapters": self.adapters,
            "preview": bool(self.stream and self.partial_images) or None,
        }
        request = contract_request(Task.TEXT_TO_IMAGE, fields, self.names)
        if not isinstance(request, TextToImageRequest):
            raise TypeError("the task decides the type of the request")
        return request

    @property
    def names(self) -> dict[str, str]:
        """What the caller calls the fields of the contract."""
        by_size = {} if self._size is None else {"width": "size", "height": "size"}
        return {"num_images": "n", **by_size}

    @property
    def shown_size(self) -> str:
        """The size as far as the request says it."""
        width, height = self._sides()
        return AUTO if width is None or height is None else f"{width}x{height}"

    @property
    def _size(self) -> tuple[int, int] | None:
        if self.size in {None, "", AUTO}:
            return None
        match = _SIZE.match(self.size or "")
        if match is None:
            raise invalid("size: must be `auto` or WIDTHxHEIGHT, for example 512x512", param="size")
        return int(match[1]), int(match[2])

    def _sides(self) -> tuple[int | None, int | None]:
        size = self._size
        if size is None:
            return self.width, self.height
        for name, side, wanted in zip(
            ("width", "height"), size, (self.width, self.height), strict=True
        ):
            if wanted not in {None, side}:
                raise invalid(f"{name}: is not that of size", param=name)
        return size
