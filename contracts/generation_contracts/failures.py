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

MAX_MESSAGE = 500  # characters


class Failure(EventPart):
    """Why a request failed. Safe to show: no stack, no path, no secret."""

    code: FailureCode
    message: Annotated[str, StringConstraints(max_length=MAX_MESSAGE)]
    retryable: bool
    details: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, code: FailureCode, message: str, **details: Any) -> "Failure":
        """A failure with the code's own answer to whether a retry makes sense."""
        return cls(
            code=code,
            message=message[:MAX_MESSAGE],
            retryable=code in RETRYABLE,
            details=details,
        )
