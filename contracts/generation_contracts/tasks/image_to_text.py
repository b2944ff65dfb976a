"""The task image_to_text."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from generation_contracts.base import RequestPart, Task
from generation_contracts.envelope import OUTPUTS, Request, Step
from generation_contracts.fields import (
    MAX_NEW_TOKENS,
    MAX_PROMPT,
    Images,
    Prompt,
    Seed,
    StepImages,
)
from generation_contracts.tasks.spec import TaskSpec


class ImageToTextParameters(RequestPart):
    """Parameters of text generation. None means the default of the model."""

    system: Annotated[str, StringConstraints(max_length=MAX_PROMPT)] | None = Field(
        default=None, description="system message before the prompt"
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = Field(
        default=None, description="the text ends there with the finish reason `length`"
    )
    temperature: Annotated[float, Field(ge=0, le=10)] | None = Field(
        default=None,
        description="0 always takes the most likely token; above 0, tokens are sampled",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="sample from the most likely tokens whose probabilities add up to this",
    )
    top_k: Annotated[int, Field(ge=1, le=1_000)] | None = Field(
        default=None, description="sample from this number of most likely tokens"
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = Field(
        default=None, description="above 1, tokens of the text so far become less likely"
    )
    seed: Seed | None = Field(
        default=None,
        description="seed of sampling; absent: chosen by the worker, reported in the result",
    )
    stream: bool = Field(default=False, description="progress events carry the text")


class ImageToTextStep(ImageToTextParameters, Step):
    """A later step of a routing slip that generates a text."""

    task: Literal["image_to_text"]
    prompt: Prompt
    images: StepImages = Field(
        default="$outputs", description="`$outputs` (the images of the previous step) or a list"
    )
    each: bool = Field(default=False, description="one request per image instead of one for all")

    @property
    def splits(self) -> bool:
        """See `Step`."""
        return self.each and self.images == OUTPUTS


class ImageToTextRequest(ImageToTextParameters, Request):
    """Describe images, or answer a question about them."""

    task: ClassVar[Task] = Task.IMAGE_TO_TEXT

    prompt: Prompt
    images: Images


SPEC = TaskSpec(
    title="image to text",
    request=ImageToTextRequest,
    parameters=ImageToTextParameters,
    step=ImageToTextStep,
    output="text",
    image_fields=("images",),
    stream_field="stream",
)
