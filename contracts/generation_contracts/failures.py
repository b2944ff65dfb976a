"""Failures: the codes of failed requests, which programs can act on."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from generation_contracts.base import EventPart


class FailureCode(StrEnum):
    """All failure codes. A new code is a new version of the contract."""

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


# The same request, sent unchanged under a new id, may succeed.
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

# For the documentation.
MEANINGS = {
    FailureCode.INVALID_REQUEST: "The message is not JSON, or not a valid request.",
    FailureCode.UNSUPPORTED_PARAMETER: "The model or the worker does not support a parameter.",
    FailureCode.REQUEST_ID_CONFLICT: "The id belongs to a request with other content.",
    FailureCode.INPUT_UNAVAILABLE: "An input image cannot be read, or access is denied.",
    FailureCode.DEADLINE_EXCEEDED: "The deadline passed before the request was done.",
    FailureCode.OUT_OF_MEMORY: "The device has too little memory, even with memory saving.",
    FailureCode.MODEL_ERROR: "The model raised an exception at every attempt.",
    FailureCode.WORKER_LOST: "The worker died or lost its device at every attempt.",
    FailureCode.QUEUE_FULL: "The queue is full; for request-reply and for steps of a chain.",
    FailureCode.INTERNAL: "The worker failed for another reason.",
}

MAX_MESSAGE = 500  # characters


class Failure(EventPart):
    """Why a request failed. Safe to show: no stack trace, no path, no secret."""

    code: FailureCode
    message: Annotated[str, StringConstraints(max_length=MAX_MESSAGE)] = Field(
        description="one sentence for people"
    )
    retryable: bool = Field(description="whether the same request under a new id may succeed")
    details: dict[str, Any] = Field(
        default_factory=dict, description="values for programs, for example the invalid fields"
    )

    @classmethod
    def of(cls, code: FailureCode, message: str, **details: Any) -> "Failure":
        """Make a failure; the code determines whether a retry makes sense."""
        return cls(
            code=code,
            message=message[:MAX_MESSAGE],
            retryable=code in RETRYABLE,
            details=details,
        )
