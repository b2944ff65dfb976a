"""The task text_to_image."""

from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field, StringConstraints

from generation_contracts.base import RequestPart, Task
from generation_contracts.envelope import Request, Step
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
from generation_contracts.tasks.spec import TaskSpec


class TextToImageParameters(RequestPart):
    """Parameters of image generation. None means the default of the model."""

    negative_prompt: Annotated[str, StringConstraints(max_length=MAX_PROMPT)] | None = Field(
        default=None,
        description="what the image must not show; refused if the model would ignore it",
    )
    width: Side | None = None
    height: Side | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        default=None,
        validation_alias=AliasChoices("num_inference_steps", "steps"),
        description="denoising steps",
    )
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = Field(
        default=None, description="how closely the image follows the prompt"
    )
    num_images: Annotated[int, Field(ge=1, le=MAX_OUTPUTS, description="number of images")] = 1
    seed: Seed | None = Field(
        default=None,
        description="image n uses seed + n; absent: chosen by the worker, reported in the result",
    )
    output_format: Literal["png", "webp", "jpeg"] = "png"
    adapters: Annotated[dict[AdapterName, AdapterWeight], Field(max_length=MAX_ADAPTERS)] = Field(
        default_factory=dict,
        description="LoRA adapters: name in the worker's settings to weight",
    )
    preview: bool = Field(
        default=False,
        description="small JPEGs in progress events, if the model family supports them",
    )


class TextToImageStep(TextToImageParameters, Step):
    """A later step of a routing slip that generates images."""

    task: Literal["text_to_image"]
    prompt: Prompt = Field(description="`$text` stands for the text of the previous step")


class TextToImageRequest(TextToImageParameters, Request):
    """Generate images from a prompt."""

    task: ClassVar[Task] = Task.TEXT_TO_IMAGE

    prompt: Prompt


SPEC = TaskSpec(
    title="text to image",
    request=TextToImageRequest,
    parameters=TextToImageParameters,
    step=TextToImageStep,
    output="image",
    count_field="num_images",
    preview_field="preview",
    options={"num_inference_steps": "steps", "num_images": "images", "output_format": "format"},
)
