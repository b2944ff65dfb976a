"""Requests: their models, decoding, encoding and digests.

`decode_request` is the only way from bytes to a request. It is strict: "512" is not a number, and
an unknown field is an error. Its messages name the field and never contain the value, so they may
be shown and logged.
"""

import hashlib
import json
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)

from generation_contracts.artifacts import ImageSource
from generation_contracts.base import RequestPart, Task, pattern_message
from generation_contracts.subjects import RequestId, SubjectName

MAX_PROMPT = 8_000  # characters; text encoders read far fewer, language models more
MAX_IMAGES = 16  # images in one image-to-text request
MAX_OUTPUTS = 8  # images from one text-to-image request
MAX_SIDE = 4_096  # pixels; a model's own maximum is checked by its worker
MAX_SEED = 2**32 - 1  # every random generator in use accepts it, and JSON represents it exactly
MAX_STEPS = 200
MAX_NEW_TOKENS = 8_192
MAX_CHAIN = 8  # requests in a routing slip, so nine steps with the first
MAX_BRANCH = 24  # characters
MAX_METADATA = 16  # entries
MAX_ADAPTERS = 4  # in one request
MAX_PROBLEMS = 8  # reported for one invalid request
MAX_LISTED = 1_000  # problems; above it none is listed


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must contain more than white space")
    return value


# pydantic would also accept a number, and "1767323045", and guess seconds or milliseconds.
_RFC_3339 = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]", re.ASCII)


def _rfc_3339(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if _RFC_3339.match(value):
            return datetime.fromisoformat(value)
    except ValueError:
        pass  # the text of this error contains the value
    raise ValueError("must be a time like 2030-01-02T03:04:05Z")


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("is out of range") from None


def _outputs_or_list(value: Any) -> str:
    return "outputs" if isinstance(value, str) else "list"


Deadline = Annotated[AwareDatetime, BeforeValidator(_rfc_3339), AfterValidator(_in_utc)]
Images = Annotated[
    tuple[ImageSource, ...],
    Field(
        min_length=1,
        max_length=MAX_IMAGES,
        fail_fast=True,
        description=(
            "PNG, JPEG or WebP files in the object store, inside the request (which must fit "
            "the server's `max_payload`), or at an `https://` host that the worker's settings list"
        ),
    ),
]
Prompt = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_PROMPT), AfterValidator(_not_blank)
]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=MAX_METADATA),
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Side = Annotated[int, Field(ge=16, le=MAX_SIDE, description="pixels")]
AdapterName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"),
    pattern_message("must be 1-64 characters of A-Z a-z 0-9 _ -, the first a letter or digit"),
]
AdapterWeight = Annotated[float, Field(ge=-4, le=4, description="1 is the strength of training")]


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
    num_images: Annotated[int, Field(ge=1, le=MAX_OUTPUTS)] = 1
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


class TextToImageStep(TextToImageParameters):
    """A later step of a routing slip that generates images."""

    task: Literal["text_to_image"]
    prompt: Prompt = Field(description="`$text` stands for the text of the previous step")


class ImageToTextStep(ImageToTextParameters):
    """A later step of a routing slip that generates a text."""

    task: Literal["image_to_text"]
    prompt: Prompt
    images: Annotated[
        Annotated[Literal["$outputs"], Tag("outputs")] | Annotated[Images, Tag("list")],
        Discriminator(_outputs_or_list),
    ] = Field(
        default="$outputs", description="`$outputs` (the images of the previous step) or a list"
    )
    each: bool = Field(default=False, description="one request per image instead of one for all")


NextStep = Annotated[TextToImageStep | ImageToTextStep, Field(discriminator="task")]


Branch = Annotated[
    str,
    StringConstraints(pattern=r"^([0-9]+(-[0-9]+)*)?$", max_length=MAX_BRANCH),
    pattern_message("must be numbers with - between them"),
]


class ChainLink(RequestPart):
    """Position of a request in a chain. The worker that queues the next request writes it."""

    id: RequestId = Field(description="id of the chain: the id of its first request")
    step: int = Field(ge=1, le=MAX_CHAIN + 1, description="the first request is 1")
    branch: Branch = Field(
        default="", description="index at each split of the chain, such as `0-2`; empty before"
    )


class RequestEnvelope(RequestPart):
    """Fields of every request apart from its parameters."""

    request_id: RequestId | None = Field(
        default=None,
        description="absent: last token of the subject, else Nats-Msg-Id, else derived",
    )
    reply_to: SubjectName | None = Field(
        default=None,
        description="subject for the terminal event; or the header Reply-To",
    )
    deadline: Deadline | None = Field(
        default=None,
        description="with time zone; the request fails with `deadline_exceeded` when it passes",
    )
    metadata: Metadata = Field(
        default_factory=dict, description="free for the sender; every event repeats it"
    )
    then: Annotated[tuple[NextStep, ...], Field(max_length=MAX_CHAIN, fail_fast=True)] = Field(
        default=(), description="routing slip: the next steps, each made from the previous result"
    )
    chain: ChainLink | None = Field(default=None, description="set by workers only")


class TextToImageRequest(TextToImageParameters, RequestEnvelope):
    """Generate images from a prompt."""

    prompt: Prompt


class ImageToTextRequest(ImageToTextParameters, RequestEnvelope):
    """Describe images, or answer a question about them."""

    prompt: Prompt
    images: Images


Request = TextToImageRequest | ImageToTextRequest

REQUEST_TYPES: dict[Task, type[TextToImageRequest] | type[ImageToTextRequest]] = {
    Task.TEXT_TO_IMAGE: TextToImageRequest,
    Task.IMAGE_TO_TEXT: ImageToTextRequest,
}

# These do not change the outputs, so a second copy of a request may differ in them.
_NOT_CONTENT = frozenset({"request_id", "reply_to", "deadline", "metadata", "chain"})


class InvalidRequest(ValueError):  # noqa: N818 - named like the failure code
    """The bytes are not a request of this task.

    Attributes:
        problems: One `{"field": …, "problem": …}` for each error, without the values.
    """

    def __init__(self, message: str, problems: tuple[dict[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


def decode_request(task: Task, body: bytes) -> Request:
    """Decode and validate a request.

    Raises:
        InvalidRequest: Not JSON, or against the contract. The text may be shown to the sender.
    """
    try:
        return REQUEST_TYPES[task].model_validate_json(body, strict=True)
    except ValidationError as error:
        raise invalid_request(error) from None


def invalid_request(error: ValidationError) -> InvalidRequest:
    """Return the exception for a message of a sender that is against the contract.

    An unknown field is listed first, because a misspelt name is the cause of a missing field.
    """
    if error.error_count() > MAX_LISTED:
        # A megabyte of unknown fields would take half a second to list.
        problem = f"more than {MAX_LISTED} fields are wrong"
        return InvalidRequest(problem, ({"field": "", "problem": problem},))
    details = error.errors(include_input=False, include_url=False, include_context=False)
    causes = sorted(_causes(details), key=lambda detail: detail["type"] != "extra_forbidden")
    problems = tuple(_problem(detail) for detail in causes[:MAX_PROBLEMS])
    return InvalidRequest(_sentence(problems), problems)


def encode(message: BaseModel) -> bytes:
    """Encode a request or an event as JSON, without fields that are None."""
    return message.model_dump_json(exclude_none=True).encode()


def request_digest(request: Request) -> str:
    """Return the digest of a request's content, as `sha256:<hex>`.

    Two requests with the same id are copies if their digests are equal, and a conflict otherwise.
    The reply subject, the deadline and the metadata are not part of the content: a sender may
    repeat a request with a later deadline.
    """
    content_fields = request.model_dump(
        mode="json", exclude=set(_NOT_CONTENT), exclude_defaults=True
    )
    content = json.dumps(content_fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def digest_of_bytes(body: bytes) -> str:
    """Return the digest of bytes that are not a valid request, as `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _causes(details: list[Any]) -> list[Any]:
    # pydantic also reports a list as too short when its only item is invalid.
    def within(place: Any) -> bool:
        return any(len(d["loc"]) > len(place) and d["loc"][: len(place)] == place for d in details)

    return [d for d in details if d["type"] != "too_short" or not within(d["loc"])]


def _problem(detail: Any) -> dict[str, str]:
    if detail["type"] == "json_invalid":
        return {"field": "", "problem": "the body is not JSON"}
    location = _without_union_members(detail["loc"])
    if detail["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        # The message of pydantic contains the value, of any length.
        tags = f"must be one of {', '.join(Task)}"
        return {"field": _dotted([*location, "task"]), "problem": tags}
    if detail["type"] == "extra_forbidden":
        return {"field": _dotted(location), "problem": "there is no such field"}
    return {"field": _dotted(location), "problem": _plain(detail)}


def _without_union_members(location: tuple[int | str, ...]) -> list[int | str]:
    # pydantic adds the name of the chosen union member after the index of an image or step, and
    # after `images` in a step. Senders do not know these names.
    before: list[int | str] = ["", *location]
    return [
        part
        for part, previous in zip(location, before, strict=False)
        if isinstance(part, int) or not (isinstance(previous, int) or previous == "images")
    ]


def _plain(detail: Any) -> str:
    message: str = detail["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _dotted(location: list[int | str]) -> str:
    # The name of an unknown field is text of the sender: make it short and printable.
    dotted = ".".join(str(part) for part in location)
    return "".join(c for c in dotted if c.isprintable())[:100]


def _sentence(problems: tuple[dict[str, str], ...]) -> str:
    first = problems[0]
    place = f"{first['field']}: " if first["field"] else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}{first['problem']}{more}"
