"""Events: what the daemon publishes about a request.

`started` and `progress` are transient events on the progress subject. Exactly one terminal event
(`succeeded`, `failed` or `cancelled`) ends a request and is stored.
"""

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints, TypeAdapter

from generation_contracts.artifacts import Output
from generation_contracts.base import EventPart, Task
from generation_contracts.failures import Failure
from generation_contracts.subjects import QueueName, RequestId

VERSION = "generation.v1"

Seconds = Annotated[float, Field(ge=0, description="seconds")]
ParameterValue = int | float | str | dict[str, float]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class ModelInfo(EventPart):
    """The model that generated the outputs."""

    id: str = Field(description="hub id or folder name; by default `demonstration`")
    revision: str | None = Field(
        default=None, description="as set for the worker; absent if not set"
    )
    family: str = Field(description="pipeline or model family, for example `Flux` or `qwen2_5_vl`")
    dtype: str = Field(description="dtype of the weights, for example `bfloat16`")
    device: str = Field(description="`cuda`, `mps`, `cpu`, …")
    libraries: dict[str, str] | None = Field(
        default=None,
        description=(
            "versions of the libraries that run the model, by name: the same weights draw other "
            "images with other versions; absent in events of older workers"
        ),
    )

    def labels(self) -> dict[str, str]:
        """Return the values that are set, with the version of each library under its name."""
        return {
            **self.model_dump(exclude_none=True, exclude={"libraries"}),
            **(self.libraries or {}),
        }


class Timings(EventPart):
    """Durations of the stages, in seconds."""

    queued: Annotated[float, Field(ge=0)] = Field(
        description="seconds from storage in the request stream to the start"
    )
    inference: Seconds
    encode: Seconds = 0.0
    upload: Seconds = 0.0


class ChainPlace(EventPart):
    """Position of a request in a chain."""

    id: RequestId = Field(description="id of the chain: the id of its first request")
    step: int = Field(ge=1, description="the first request is 1")
    of: int = Field(ge=1, description="number of steps of the chain")


class EventBase(EventPart):
    """Fields of every event."""

    request_id: RequestId
    task: Task
    sequence: int = Field(
        ge=0, description="number of the event in its attempt; the terminal event has the highest"
    )
    time: AwareDatetime
    worker: str = Field(description="name of the worker process")
    attempt: int = Field(
        ge=1, description="number of deliveries of the request to a worker, including this one"
    )
    metadata: dict[str, str] = Field(default_factory=dict, description="copied from the request")
    chain: ChainPlace | None = Field(default=None, description="absent outside a chain")
    queue: QueueName | None = Field(
        default=None, description="queue of the request; absent for the default queue of the task"
    )

    @property
    def queue_name(self) -> str:
        """Name of the queue, which is in the subjects of the event and of its request."""
        return self.queue or str(self.task)


class StartedEvent(EventBase):
    """The run has started on a worker."""

    type: Literal["generation.v1.started"] = "generation.v1.started"
    queued: Seconds
    model: ModelInfo
    defaults: dict[str, ParameterValue] = Field(
        default_factory=dict, description="defaults of the model for absent parameters"
    )


class ProgressEvent(EventBase):
    """Progress of a run. For text, a step is a token.

    Step 0 or another attempt restarts the run: discard earlier text. Progress events are transient
    and some may be lost. The text in the result is complete.
    """

    type: Literal["generation.v1.progress"] = "generation.v1.progress"
    step: int = Field(ge=0, description="number of completed steps")
    of: int = Field(ge=1, description="steps of the run; for text, the maximum number of tokens")
    seconds_per_step: Seconds | None = Field(
        default=None, description="mean so far, in seconds; absent before the first step"
    )
    eta: Seconds | None = Field(default=None, description="seconds until the last step")
    text: str | None = Field(
        default=None, description="text since the previous event, if the request sets `stream`"
    )
    preview: str | None = Field(
        default=None, description="a small JPEG in base64, if the request sets `preview`"
    )


class TerminalEvent(EventBase):
    """Base of the events that end a request.

    `generation_contracts.requests.request_digest` computes the digest.
    """

    request_digest: Digest = Field(
        description="digest of the request's content; identifies the request under its id"
    )


class SucceededEvent(TerminalEvent):
    """The request has succeeded. Its outputs are stored and can be fetched."""

    type: Literal["generation.v1.succeeded"] = "generation.v1.succeeded"
    outputs: Annotated[tuple[Output, ...], Field(min_length=1)]
    model: ModelInfo
    parameters: dict[str, ParameterValue] = Field(
        default_factory=dict, description="parameters of the run, including defaults"
    )
    timings: Timings
    warnings: tuple[str, ...] = Field(
        default=(), description="deviations from the request, for example a truncated prompt"
    )
    ai_generated: bool | None = Field(
        default=None,
        description=(
            "a model generated the outputs: pass it on with them, texts have no other mark; absent "
            "in events of older workers"
        ),
    )


class FailedEvent(TerminalEvent):
    """The request has failed. It is not attempted again."""

    type: Literal["generation.v1.failed"] = "generation.v1.failed"
    failure: Failure


class CancelledEvent(TerminalEvent):
    """The request was cancelled, and no longer uses the device."""

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
    """Decode an event of any kind.

    Raises:
        pydantic.ValidationError: The bytes are not an event of this version.
    """
    return _EVENT.validate_json(body)


def decode_result(body: bytes) -> SucceededEvent | FailedEvent | CancelledEvent:
    """Decode a terminal event.

    Raises:
        pydantic.ValidationError: The bytes are not a terminal event of this version.
    """
    return _RESULT.validate_json(body)
