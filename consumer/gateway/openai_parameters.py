"""The parameters of OpenAI's image endpoints, and their translation to the contract."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from consumer.gateway.catalogue import MAX_NAME
from consumer.gateway.contract import contract_request, unsupported
from consumer.gateway.errors import invalid
from generation_contracts import Task, TextToImageRequest
from generation_contracts.fields import (
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
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})\Z", re.ASCII)

ModelName = Annotated[str, StringConstraints(max_length=MAX_NAME)]
Word = Annotated[str, StringConstraints(max_length=64)]
Identifier = Annotated[str, StringConstraints(max_length=512)]


@dataclass(frozen=True)
class Fixed:
    """A parameter that may have only values that do not change the output.

    Attributes:
        values: The accepted values, OpenAI's default first; empty: the parameter is not supported.
        advice: Text after the error message.
    """

    values: tuple[Any, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        if not self.values:
            return f"is not supported{self.advice}"
        values = " or ".join(json.dumps(value) for value in self.values)
        return f"must be {values}{self.advice}"


class OpenAIBody(BaseModel):
    """A body of OpenAI's API, in which a null field counts as absent.

    Attributes:
        fixed: The parameters that accept only fixed values.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )
    fixed: ClassVar[Mapping[str, Fixed]] = {}

    def require_supported(self) -> None:
        """Check the parameters that this service cannot support with any model.

        Raises:
            ApiError: 400 that names the parameter.
        """
        for name, fixed in self.fixed.items():
            given = getattr(self, name)
            if given is not None and given not in fixed.values:
                raise unsupported(name, str(fixed))

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the JSON Schema, with the accepted values of the fixed parameters."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, fixed in cls.fixed.items():
            properties[name] = {"enum": [None, *fixed.values], "description": str(fixed)}
        return schema

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: inner for name, inner in value.items() if inner is not None}


class ImageParameters(OpenAIBody):
    """The body of an image generation.

    The fields after `partial_images` are extensions of this service. OpenAI's clients send them in
    `extra_body`.
    """

    fixed: ClassVar[Mapping[str, Fixed]] = {
        "quality": Fixed((AUTO, "standard"), ": set num_inference_steps instead"),
        "style": Fixed((), ": describe the style in the prompt"),
        "background": Fixed((AUTO, "opaque")),
        "output_compression": Fixed((100,)),
    }

    prompt: Prompt
    model: ModelName | None = Field(default=None, description="see `GET /v1/models`")
    n: Annotated[int, Field(ge=1, le=MAX_OUTPUTS)] | None = Field(
        default=None, description="number of images"
    )
    size: Word | None = Field(
        default=None,
        description="`WIDTHxHEIGHT` in pixels; `auto` is the model's default",
        json_schema_extra={"pattern": "^(|auto|[0-9]{1,5}x[0-9]{1,5})$"},
    )
    quality: Word | None = None
    style: Word | None = None
    background: Word | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = None
    response_format: Literal["b64_json", "url"] | None = None
    user: Identifier | None = Field(default=None, description="has no effect")
    safety_identifier: Identifier | None = Field(default=None, description="has no effect")
    moderation: Word | None = Field(default=None, description="has no effect")
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        default=None, description="most previews in the stream"
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

    def to_request(self) -> TextToImageRequest:
        """Return the request of the contract.

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
        """The names of the contract's fields in this body."""
        by_size = {} if self._size is None else {"width": "size", "height": "size"}
        return {"num_images": "n", **by_size}

    @property
    def shown_size(self) -> str:
        """The requested size; `auto` if a side is left to the model."""
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
        for name, side, given in zip(
            ("width", "height"), size, (self.width, self.height), strict=True
        ):
            if given not in {None, side}:
                raise invalid(f"{name}: differs from size", param=name)
        return size
