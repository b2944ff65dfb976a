"""Events: what the daemon publishes about a request.

`started` and `progress` are passing news on the progress subject; exactly one of `succeeded`,
`failed` and `cancelled` ends a request and is stored.
"""

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints, TypeAdapter

from generation_contracts.artifacts import Output
from generation_contracts.base import EventPart, Task
from generation_contracts.failures import Failure
from generation_contracts.subjects import RequestId

VERSION = "generation.v1"

Seconds = Annotated[float, Field(ge=0, description="seconds")]
ParameterValue = int | float | str | dict[str, float]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class ModelInfo(EventPart):
    """Which model made the outputs."""

    id: str = Field(description="hub id or name of the folder; `demonstration` by default")
    revision: str | None = Field(default=None, description="as it is set; absent where it is not")
    family: str = Field(description="of the pipeline or model, for example `Flux` or `qwen2_5_vl`")
    dtype: str = Field(description="of the weights, for example `bfloat16`")
    device: str = Field(description="`cuda`, `mps`, `cpu`, …")


class Timings(EventPart):
    """Where the time went."""

    queued: Annotated[float, Field(ge=0)] = Field(
        description="seconds from the stream's time stamp of the request to its start"
    )
    inference: Seconds
    encode: Seconds = 0.0
    upload: Seconds = 0.0


class ChainPlace(EventPart):
    """Where in a chain of requests an event belongs."""

    id: RequestId = Field(
        description="of the first request: what all events of a chain have in common"
    )
    step: int = Field(ge=1, description="the first request is 1")
    of: int = Field(ge=1, description="steps of the chain")


class EventBase(EventPart):
    """What every event carries."""

    request_id: RequestId
    task: Task
    sequence: int = Field(
        ge=0, description="counts the events of one attempt; a terminal event has the highest"
    )
    time: AwareDatetime
    worker: str = Field(description="name of the daemon's process")
    attempt: int = Field(
        ge=1, description="how often the request has been delivered to a worker, this time included"
    )
    metadata: dict[str, str] = Field(default_factory=dict, description="the request's")
    chain: ChainPlace | None = Field(default=None, description="absent where it is alone")


class StartedEvent(EventBase):
    """A worker has taken the request."""

    type: Literal["generation.v1.started"] = "generation.v1.started"
    queued: Seconds
    model: ModelInfo
    defaults: dict[str, ParameterValue] = Field(
        default_factory=dict, description="what the model uses where a request says nothing"
    )


class ProgressEvent(EventBase):
    """The run has come to a step. For text a step is a token.

    A step of 0, or another attempt, begins the run and its text anew. These are passing news and
    some may be lost; the text in the result is the truth.
    """

    type: Literal["generation.v1.progress"] = "generation.v1.progress"
    step: int = Field(ge=0, description="the last one that was done")
    of: int = Field(ge=1, description="steps of the run; for text, the most tokens")
    seconds_per_step: Seconds | None = Field(
        default=None, description="seconds, the mean so far; absent before the first step"
    )
    eta: Seconds | None = Field(default=None, description="seconds until the last step")
    text: str | None = Field(
        default=None, description="what was added since the last one, where the request streams"
    )
    preview: str | None = Field(
        default=None, description="a small JPEG, base64, where the request wants previews"
    )


class TerminalEvent(EventBase):
    """Base of the events that end a request.

    The digest is made by `generation_contracts.requests.request_digest`.
    """

    request_digest: Digest = Field(
        description="of what was asked for; another one under the same id is a conflict"
    )


class SucceededEvent(TerminalEvent):
    """The outputs are stored and can be fetched."""

    type: Literal["generation.v1.succeeded"] = "generation.v1.succeeded"
    outputs: Annotated[tuple[Output, ...], Field(min_length=1)]
    model: ModelInfo
    parameters: dict[str, ParameterValue] = Field(
        default_factory=dict, description="what the outputs were made with, defaults included"
    )
    timings: Timings
    warnings: tuple[str, ...] = Field(
        default=(), description="what was done otherwise than asked, for example a prompt cut short"
    )


class FailedEvent(TerminalEvent):
    """The request was not done and will not be."""

    type: Literal["generation.v1.failed"] = "generation.v1.failed"
    failure: Failure


class CancelledEvent(TerminalEvent):
    """The request was withdrawn, and the device is free of it."""

    type: Literal["generation.v1.cancelled"] = "generation.v1.cancelled"


ResultEvent = Annotated[SucceededEvent | FailedEvent | CancelledEvent, Field(discriminator="type")]
Event = Annotated[
    StartedEvent | ProgressEvent | SucceededEvent | FailedEvent | CancelledEvent,
    Field(discriminator="type"),
]

_EVENT: TypeAdapter[StartedEvent | ProgressEvent | SucceededEvent | FailedEvent | CancelledEvent]
_EVENT = TypeAdapter(Event)
_RESULT: TypeAdapter[SucceededEvent | FailedEvent | CancelledEvent] = TypeAdapter(ResultEvent)


def decode_event(
    body: bytes,
) -> StartedEvent | ProgressEvent | SucceededEvent | FailedEvent | CancelledEvent:
    """Bytes to an event of any kind.

    Raises:
        pydantic.ValidationError: The bytes are no event of this version.
    """
    return _EVENT.validate_json(body)


def decode_result(body: bytes) -> SucceededEvent | FailedEvent | CancelledEvent:
    """Bytes to a terminal event.

    Raises:
        pydantic.ValidationError: The bytes are no terminal event of this version.
    """
    return _RESULT.validate_json(body)
