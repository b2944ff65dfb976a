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

    id: str
    revision: str | None = None
    family: str
    dtype: str
    device: str


class Timings(EventPart):
    """Where the time went; `queued` is from the stream's time stamp of the request to its start."""

    queued: Seconds
    inference: Seconds
    encode: Seconds = 0.0
    upload: Seconds = 0.0


class ChainPlace(EventPart):
    """Where in a chain of requests an event belongs.

    Attributes:
        id: Id of the first request: what all events of a chain have in common.
        step: From 1.
        of: How many steps the chain has.
    """

    id: RequestId
    step: Annotated[int, Field(ge=1)]
    of: Annotated[int, Field(ge=1)]


class EventBase(EventPart):
    """What every event carries.

    Attributes:
        sequence: Counts the events of one attempt from 0; a terminal event has the highest.
        attempt: How often the request has been delivered to a worker, from 1.
        worker: Name of the daemon process.
    """

    request_id: RequestId
    task: Task
    sequence: Annotated[int, Field(ge=0)]
    time: AwareDatetime
    worker: str
    attempt: Annotated[int, Field(ge=1)]
    metadata: dict[str, str] = Field(default_factory=dict)
    chain: ChainPlace | None = None


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

    Attributes:
        text: What has been added since the last event with a text, where the request streams.
    """

    type: Literal["generation.v1.progress"] = "generation.v1.progress"
    step: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(ge=1)]
    seconds_per_step: Seconds | None = None
    eta: Seconds | None = Field(default=None, description="seconds until the last step")
    text: str | None = Field(default=None, description="what has been added to the text")
    preview: str | None = Field(default=None, description="a small JPEG, base64")


class TerminalEvent(EventBase):
    """Base of the events that end a request.

    Attributes:
        request_digest: What the request asked for; a later request with the same id and another
            digest is a conflict. See `generation_contracts.requests.request_digest`.
    """

    request_digest: Digest


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
