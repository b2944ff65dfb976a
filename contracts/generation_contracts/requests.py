"""Requests: what a sender publishes, and how its bytes become one.

`decode_request` is the only way from bytes to a request. It is strict ("512" is no number), takes
no unknown field, and says in one sentence per field what is wrong without repeating the value, so
that what it says may be shown and logged.
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
from generation_contracts.base import RequestPart, Task, says
from generation_contracts.subjects import RequestId, SubjectName

MAX_PROMPT = 8_000  # characters; text encoders read far fewer, language models more
MAX_IMAGES = 16  # pictures in one image-to-text request
MAX_OUTPUTS = 8  # pictures from one text-to-image request
MAX_SIDE = 4_096  # pixels; a model's own maximum is checked by its worker
MAX_SEED = 2**32 - 1  # what every random generator in use accepts, and JSON holds exactly
MAX_STEPS = 200
MAX_NEW_TOKENS = 8_192
MAX_CHAIN = 8  # requests in a routing slip, so nine steps with the first
MAX_BRANCH = 24  # characters of a place in a chain that has split
MAX_METADATA = 16  # entries
MAX_ADAPTERS = 4  # in one request
MAX_PROBLEMS = 8  # told of one invalid request
MAX_LISTED = 1_000  # problems of a request that are looked at


def _says_something(value: str) -> str:
    if not value.strip():
        raise ValueError("must contain more than white space")
    return value


# pydantic would also take a number, and "1767323045", as seconds or milliseconds by its size.
_RFC_3339 = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]", re.ASCII)


def _rfc_3339(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if _RFC_3339.match(value):
            return datetime.fromisoformat(value)
    except ValueError:
        pass  # its text repeats the value
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
            "PNG, JPEG or WebP files: in the store, inside the request, which must fit the "
            "server's `max_payload`, or at `https://` where the worker's settings list the host"
        ),
    ),
]
Prompt = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_PROMPT), AfterValidator(_says_something)
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
    says("must be 1-64 characters of A-Z a-z 0-9 _ -, the first a letter or digit"),
]
AdapterWeight = Annotated[float, Field(ge=-4, le=4, description="1 is the adapter as it was made")]


class TextToImageParameters(RequestPart):
    """How a picture is made. None means the model's own default."""

    negative_prompt: Annotated[str, StringConstraints(max_length=MAX_PROMPT)] | None = Field(
        default=None,
        description="what must not be on the picture; refused where it would have no effect",
    )
    width: Side | None = None
    height: Side | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        default=None,
        validation_alias=AliasChoices("num_inference_steps", "steps"),
        description="denoising steps",
    )
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = Field(
        default=None, description="how closely the prompt is followed"
    )
    num_images: Annotated[int, Field(ge=1, le=MAX_OUTPUTS)] = 1
    seed: Seed | None = Field(
        default=None, description="picture n uses seed + n; absent: drawn, and told in the result"
    )
    output_format: Literal["png", "webp", "jpeg"] = "png"
    adapters: Annotated[dict[AdapterName, AdapterWeight], Field(max_length=MAX_ADAPTERS)] = Field(
        default_factory=dict,
        description="LoRA adapters by the names that the worker's settings give them",
    )
    preview: bool = Field(
        default=False, description="small JPEGs in the progress, where the model's family can"
    )


class ImageToTextParameters(RequestPart):
    """How a text is made. None means the model's own default."""

    system: Annotated[str, StringConstraints(max_length=MAX_PROMPT)] | None = Field(
        default=None, description="what the model is told before the prompt"
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = Field(
        default=None, description="the text ends there, with the finish reason `length`"
    )
    temperature: Annotated[float, Field(ge=0, le=10)] | None = Field(
        default=None,
        description="0 takes the likeliest token each time; above it tokens are drawn by chance",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="drawn from the likeliest tokens that are so probable together"
    )
    top_k: Annotated[int, Field(ge=1, le=1_000)] | None = Field(
        default=None, description="drawn from so many of the likeliest tokens"
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = Field(
        default=None, description="above 1, what was said before becomes less likely"
    )
    seed: Seed | None = Field(
        default=None, description="of what is drawn by chance; absent: told in the result"
    )
    stream: bool = Field(default=False, description="the progress has the text as it grows")


class TextToImageStep(TextToImageParameters):
    """A later step of a routing slip that makes pictures."""

    task: Literal["text_to_image"]
    prompt: Prompt = Field(description="`$text` in it is the text of the step before")


class ImageToTextStep(ImageToTextParameters):
    """A later step of a routing slip that makes a text."""

    task: Literal["image_to_text"]
    prompt: Prompt
    images: Annotated[
        Annotated[Literal["$outputs"], Tag("outputs")] | Annotated[Images, Tag("list")],
        Discriminator(_outputs_or_list),
    ] = Field(
        default="$outputs", description="`$outputs`, the pictures of the step before; or a list"
    )
    each: bool = Field(default=False, description="one request for each picture, not one for all")


NextStep = Annotated[TextToImageStep | ImageToTextStep, Field(discriminator="task")]


Branch = Annotated[
    str,
    StringConstraints(pattern=r"^([0-9]+(-[0-9]+)*)?$", max_length=MAX_BRANCH),
    says("must be numbers with - between them"),
]


class ChainLink(RequestPart):
    """Where in a chain a request stands; written by the worker that makes the next request."""

    id: RequestId = Field(description="of the chain's first request; all of its events carry it")
    step: int = Field(ge=1, le=MAX_CHAIN + 1, description="the first request is 1")
    branch: Branch = Field(
        default="", description="which of several requests of one step it came from"
    )


class RequestEnvelope(RequestPart):
    """What every request carries besides its parameters."""

    request_id: RequestId | None = Field(
        default=None,
        description="absent: the subject's last token, else Nats-Msg-Id, else derived",
    )
    reply_to: SubjectName | None = Field(
        default=None, description="subject for the result event; also as the header Reply-To"
    )
    deadline: Deadline | None = Field(
        default=None,
        description="with its time zone; what has not ended by then fails with `deadline_exceeded`",
    )
    metadata: Metadata = Field(
        default_factory=dict, description="the sender's own, echoed in every event"
    )
    then: Annotated[tuple[NextStep, ...], Field(max_length=MAX_CHAIN, fail_fast=True)] = Field(
        default=(), description="routing slip: the requests that follow, each made from a result"
    )
    chain: ChainLink | None = Field(default=None, description="set by workers, not by senders")


class TextToImageRequest(TextToImageParameters, RequestEnvelope):
    """Make pictures from a prompt."""

    prompt: Prompt


class ImageToTextRequest(ImageToTextParameters, RequestEnvelope):
    """Describe pictures, or answer a question about them."""

    prompt: Prompt
    images: Images


Request = TextToImageRequest | ImageToTextRequest

REQUEST_TYPES: dict[Task, type[TextToImageRequest] | type[ImageToTextRequest]] = {
    Task.TEXT_TO_IMAGE: TextToImageRequest,
    Task.IMAGE_TO_TEXT: ImageToTextRequest,
}

# Who asks and until when, not what for: a second copy may differ in these.
_NOT_CONTENT = frozenset({"request_id", "reply_to", "deadline", "metadata", "chain"})


class InvalidRequest(ValueError):  # noqa: N818 - the contract's word for it is invalid_request
    """The bytes are not a request of this task.

    Attributes:
        problems: One `{"field": …, "problem": …}` for each thing that is wrong, without the values.
    """

    def __init__(self, message: str, problems: tuple[dict[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


def decode_request(task: Task, body: bytes) -> Request:
    """Bytes to a request.

    Raises:
        InvalidRequest: Not JSON, or not the contract; its text may be shown to the sender.
    """
    try:
        return REQUEST_TYPES[task].model_validate_json(body, strict=True)
    except ValidationError as error:
        if error.error_count() > MAX_LISTED:
            # A megabyte of unknown fields would take half a second to list.
            problem = f"more than {MAX_LISTED} fields are wrong"
            raise InvalidRequest(problem, ({"field": "", "problem": problem},)) from None
        details = error.errors(include_input=False, include_url=False, include_context=False)
        problems = tuple(_problem(detail) for detail in _causes(details)[:MAX_PROBLEMS])
        raise InvalidRequest(_sentence(problems), problems) from None


def encode(message: BaseModel) -> bytes:
    """A request or an event as the JSON that goes on the wire, without its absent fields."""
    return message.model_dump_json(exclude_none=True).encode()


def request_digest(request: Request) -> str:
    """What a request asks for, as `sha256:<hex>`.

    Two requests with one id and one digest are copies; with different digests they conflict. Where
    the answer goes, the deadline and the metadata do not count: a sender that asks again with a
    later deadline means the same picture.
    """
    asked = request.model_dump(mode="json", exclude=set(_NOT_CONTENT), exclude_defaults=True)
    content = json.dumps(asked, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def digest_of_bytes(body: bytes) -> str:
    """The same for what cannot be read as a request."""
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _causes(details: list[Any]) -> list[Any]:
    # A list whose only item is wrong is also reported as too short: a consequence, not a cause.
    def within(place: Any) -> bool:
        return any(len(d["loc"]) > len(place) and d["loc"][: len(place)] == place for d in details)

    return [d for d in details if d["type"] != "too_short" or not within(d["loc"])]


def _problem(detail: Any) -> dict[str, str]:
    if detail["type"] == "json_invalid":
        return {"field": "", "problem": "the body is not JSON"}
    location = _without_union_members(detail["loc"])
    if detail["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        # pydantic's own message repeats the value, at any length.
        tags = f"must be one of {', '.join(Task)}"
        return {"field": _dotted([*location, "task"]), "problem": tags}
    if detail["type"] == "extra_forbidden":
        return {"field": _dotted(location), "problem": "there is no such field"}
    return {"field": _dotted(location), "problem": _plain(detail)}


def _without_union_members(location: tuple[int | str, ...]) -> list[int | str]:
    # A sender knows fields and indexes only. pydantic names the chosen member of a union after the
    # index of a picture or step, and after `images` in a step.
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
    # An unknown field's name is the sender's text: bounded and printable before it is shown.
    dotted = ".".join(str(part) for part in location)
    return "".join(c for c in dotted if c.isprintable())[:100]


def _sentence(problems: tuple[dict[str, str], ...]) -> str:
    first = problems[0]
    place = f"{first['field']}: " if first["field"] else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}{first['problem']}{more}"
