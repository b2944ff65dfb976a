"""The parameters of OpenAI's chat completions, and their translation to the contract."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from consumer.gateway.contract import contract_request, unsupported
from consumer.gateway.error_handlers import UNION_TAG
from consumer.gateway.errors import invalid
from consumer.gateway.openai_parameters import Fixed, Identifier, ModelName, OpenAIBody, Word
from generation_contracts import ImageToTextRequest, Task
from generation_contracts.fields import MAX_IMAGES, MAX_NEW_TOKENS, Metadata, Seed

MAX_MESSAGES = 100
MAX_PARTS = 4 * MAX_IMAGES
_TEXT = f"{UNION_TAG}text"
_PARTS = f"{UNION_TAG}parts"

NAMES = {
    "prompt": "messages",
    "images": "messages",
    "system": "messages",
    "max_new_tokens": "max_tokens",
}

_FIXED = {
    "n": Fixed((1,)),
    "stop": Fixed(([], "")),
    "tools": Fixed(([],)),
    "tool_choice": Fixed(("auto", "none")),
    "functions": Fixed(([],)),
    "function_call": Fixed(("auto", "none")),
    "response_format": Fixed(({"type": "text"},)),
    "frequency_penalty": Fixed((0,)),
    "presence_penalty": Fixed((0,)),
    "logit_bias": Fixed(({},)),
    "logprobs": Fixed((False,)),
    "top_logprobs": Fixed((0,)),
    "modalities": Fixed((["text"],)),
    "reasoning_effort": Fixed(("none",)),
    "audio": Fixed(),
    "prediction": Fixed(),
    "verbosity": Fixed(),
    "web_search_options": Fixed(),
}


class ImageUrl(OpenAIBody):
    """The address of an image."""

    url: str = Field(
        description="`data:image/…;base64,…`, or `https://` at a host that the worker may read"
    )
    detail: Word | None = Field(default=None, description="has no effect")


class TextPart(OpenAIBody):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class ImagePart(OpenAIBody):
    """A part of a message that is an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"{UNION_TAG}{kind}" if kind in ("text", "image_url") else None


def _kind_of_content(value: Any) -> str:
    return _PARTS if isinstance(value, list) else _TEXT


Part = Annotated[
    Annotated[TextPart, Tag(f"{UNION_TAG}text")]
    | Annotated[ImagePart, Tag(f"{UNION_TAG}image_url")],
    Discriminator(
        _kind_of_part,
        custom_error_type="part",
        custom_error_message="must be a part of type text or image_url",
    ),
]
Content = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[list[Part], Field(max_length=MAX_PARTS), Tag(_PARTS)],
    Discriminator(_kind_of_content),
]


class Message(OpenAIBody):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: Identifier | None = Field(default=None, description="has no effect")

    @property
    def text(self) -> str:
        """The text parts, one a line."""
        if not isinstance(self.content, list):
            return self.content or ""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """The URLs of the images."""
        if not isinstance(self.content, list):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(OpenAIBody):
    """Options of the event stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="has no effect")


class ChatParameters(OpenAIBody):
    """The body of a chat completion: a prompt about images."""

    fixed: ClassVar[Mapping[str, Fixed]] = _FIXED

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="one user message with at least one image, after at most one system message"
    )
    model: ModelName | None = Field(default=None, description="see `GET /v1/models`")
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1_000)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = Field(default=None, description="echoed in the answer")
    user: Identifier | None = Field(default=None, description="has no effect")
    safety_identifier: Identifier | None = Field(default=None, description="has no effect")
    store: bool | None = Field(default=None, description="has no effect")
    parallel_tool_calls: bool | None = Field(default=None, description="has no effect")
    service_tier: Word | None = Field(default=None, description="has no effect")
    prompt_cache_key: Identifier | None = Field(default=None, description="has no effect")
    prompt_cache_retention: Word | None = Field(default=None, description="has no effect")

    n: int | None = None
    stop: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: Any = None
    reasoning_effort: Word | None = None
    audio: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    def require_supported(self) -> None:
        """Check the parameters that this service cannot support with any model.

        Raises:
            ApiError: 400 that names the parameter.
        """
        super().require_supported()
        roles = [message.role for message in self.messages]
        if roles not in (["user"], ["system", "user"], ["developer", "user"]):
            reason = "must be one user message, after at most one system message"
            raise unsupported("messages", reason)
        if self.messages[0].role != "user" and self.messages[0].images:
            raise unsupported("messages", "a system message has no images")
        if not self.messages[-1].images:
            raise invalid(
                "messages: the user message needs an image_url part: the model answers questions"
                " about images",
                param="messages",
            )
        for url in self.messages[-1].images:
            if not url.startswith(("data:", "https://")):
                raise invalid("messages: images are at data: or https:// URLs", param="messages")

    def to_request(self, *, drawn_seed: int) -> ImageToTextRequest:
        """Return the request of the contract.

        Args:
            drawn_seed: The seed of a streamed text without a seed. A retry with the same seed
                generates the same text, so the stream can continue after a failed attempt.

        Raises:
            ApiError: 400 that names the parameter.
        """
        self.require_supported()
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise invalid("max_tokens: differs from max_completion_tokens", param="max_tokens")
        message = self.messages[-1]
        fields = {
            "prompt": message.text,
            "images": message.images,
            "system": self.messages[0].text if len(self.messages) > 1 else None,
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "seed": drawn_seed if self.stream and self.seed is None else self.seed,
            "stream": self.stream,
            "metadata": self.metadata,
        }
        request = contract_request(Task.IMAGE_TO_TEXT, fields, NAMES)
        if not isinstance(request, ImageToTextRequest):
            raise TypeError("the task decides the type of the request")
        return request
