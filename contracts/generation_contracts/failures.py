"""Failures: why a request did not succeed, in a closed list of codes that programs can act on."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from generation_contracts.base import EventPart


class FailureCode(StrEnum):
    """The closed list; a new code is a new version of the contract."""

    INVALID_REQUEST = "invalid_request"
    UNSUPPORTED_PARAMETER = "unsupported_parameter"
    REQUEST_ID_CONFLICT = "request_id_conflict"
    INPUT_UNAVAILABLE = "input_unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    OUT_OF_MEMORY = "out_of_memory"
    MODEL_ERROR = "model_error"
    WORKER_LOST = "worker_lost"
    QUEUE_FULL = "queue_full"
    INTERNAL = "internal"


# Whether the same request, sent again unchanged under a new id, may well succeed.
RETRYABLE = frozenset(
    {
        FailureCode.DEADLINE_EXCEEDED,
        FailureCode.OUT_OF_MEMORY,
        FailureCode.MODEL_ERROR,
        FailureCode.WORKER_LOST,
        FailureCode.QUEUE_FULL,
        FailureCode.INTERNAL,
    }
)

# What each code says; for the documents.
MEANINGS = {
    FailureCode.INVALID_REQUEST: "It is no request, or breaks the contract.",
    FailureCode.UNSUPPORTED_PARAMETER: "The model, or this installation, does not have it.",
    FailureCode.REQUEST_ID_CONFLICT: "The id was used for a request with other content.",
    FailureCode.INPUT_UNAVAILABLE: "An input picture cannot be read, or may not be.",
    FailureCode.DEADLINE_EXCEEDED: "The deadline passed before the end.",
    FailureCode.OUT_OF_MEMORY: "It does not fit the device, nor with what saves memory.",
    FailureCode.MODEL_ERROR: "The model raised, at every try.",
    FailureCode.WORKER_LOST: "Its workers died with it, or their devices were lost.",
    FailureCode.QUEUE_FULL: "The queue takes no more: a call, or a step of a chain.",
    FailureCode.INTERNAL: "The worker failed on it otherwise.",
}

MAX_MESSAGE = 500  # characters


class Failure(EventPart):
    """Why a request failed. Safe to show: no stack, no path, no secret."""

    code: FailureCode
    message: Annotated[str, StringConstraints(max_length=MAX_MESSAGE)] = Field(
        description="one sentence for people"
    )
    retryable: bool = Field(description="whether the same under a new id may well succeed")
    details: dict[str, Any] = Field(
        default_factory=dict, description="for programs: the field, what was tried, …"
    )

    @classmethod
    def of(cls, code: FailureCode, message: str, **details: Any) -> "Failure":
        """A failure with the code's own answer to whether a retry makes sense."""
        return cls(
            code=code,
            message=message[:MAX_MESSAGE],
            retryable=code in RETRYABLE,
            details=details,
        )
