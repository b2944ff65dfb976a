"""What goes wrong, as HTTP answers that OpenAI's clients understand.

The body is `{"error": {"message", "type", "code", "param"}}`. OpenAI's clients send a request again
on 408, 409, 429 and 5xx unless `x-should-retry` says `false`.
"""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from generation_client import (
    DownloadFailed,
    GenerationError,
    NoWorker,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    RequestIdTaken,
    RequestTooLarge,
    ServiceUnavailable,
)
from generation_contracts import Failure, FailureCode

QUEUE_FULL_RETRY_AFTER = 10  # seconds
UNAVAILABLE_RETRY_AFTER = 5  # seconds

_STATUS = {
    FailureCode.INVALID_REQUEST: HTTPStatus.BAD_REQUEST,
    FailureCode.UNSUPPORTED_PARAMETER: HTTPStatus.BAD_REQUEST,
    FailureCode.REQUEST_ID_CONFLICT: HTTPStatus.UNPROCESSABLE_ENTITY,
    FailureCode.INPUT_UNAVAILABLE: HTTPStatus.BAD_REQUEST,
    FailureCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    FailureCode.OUT_OF_MEMORY: HTTPStatus.INTERNAL_SERVER_ERROR,
    FailureCode.MODEL_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
    FailureCode.WORKER_LOST: HTTPStatus.INTERNAL_SERVER_ERROR,
    FailureCode.QUEUE_FULL: HTTPStatus.TOO_MANY_REQUESTS,
    FailureCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}
_TYPES = {
    HTTPStatus.BAD_REQUEST: "invalid_request_error",
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.CONFLICT: "conflict_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "invalid_request_error",
    HTTPStatus.UNPROCESSABLE_ENTITY: "invalid_request_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}

_LOWEST_SERVER_ERROR = 500


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: Of HTTP.
        message: One sentence; the caller sees it.
        code: For programs.
        param: The field of the caller's request that is wrong.
        retry_after: Seconds after which the same request may succeed; None: it will not.
        request_id: Of the request that failed, where it has an id.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None
    request_id: str | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        status = HTTPStatus(self.status)
        kind = _TYPES.get(status) or (
            "server_error" if status >= _LOWEST_SERVER_ERROR else "invalid_request_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "code": self.code,
                "param": self.param,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Whether OpenAI's clients are to send the request again, and when."""
        headers = {"x-should-retry": "false" if self.retry_after is None else "true"}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.request_id is not None:
            headers["x-request-id"] = self.request_id
        return headers


def invalid(message: str, *, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """The caller's request is wrong."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, code, param)


def not_found(message: str = "there is no such job") -> ApiError:
    """There is no such thing, or it belongs to another tenant: the answer is the same."""
    return ApiError(HTTPStatus.NOT_FOUND, message, "not_found")


def of_failure(failure: Failure, request_id: str | None = None) -> ApiError:
    """The answer to a request that has failed. It has ended: its id will not run again."""
    parameter = failure.details.get("parameter")
    problems = failure.details.get("problems") or []
    field = parameter or (problems[0].get("field") if problems else None)
    full = failure.code is FailureCode.QUEUE_FULL
    return ApiError(
        _STATUS[failure.code],
        failure.message,
        str(failure.code),
        field or None,
        QUEUE_FULL_RETRY_AFTER if full else None,
        request_id,
    )


def of_error(error: GenerationError) -> ApiError:  # noqa: PLR0911 - one for each
    """The answer to what the client library raises."""
    match error:
        case RequestFailed():
            return of_failure(error.event.failure, error.event.request_id)
        case RequestCancelled():
            return ApiError(
                HTTPStatus.CONFLICT,
                "the request was cancelled",
                "cancelled",
                request_id=error.event.request_id,
            )
        case RequestIdTaken():
            return ApiError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "the idempotency key was used for another request",
                "idempotency_key_reused",
            )
        case RequestTooLarge():
            return ApiError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "the request is too large for the queue: name its images by URL",
                "request_too_large",
            )
        case QueueFull():
            return ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "the queue is full: try again later",
                "queue_full",
                retry_after=QUEUE_FULL_RETRY_AFTER,
            )
        case NoWorker():
            message = "no worker is there to do it"
        case DownloadFailed():
            message = "the output cannot be read from the object store"
        case ServiceUnavailable():
            message = "the queue cannot be reached: try again later"
        case _:
            return ApiError(HTTPStatus.BAD_GATEWAY, "the result cannot be read", "bad_result")
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        message,
        "unavailable",
        retry_after=UNAVAILABLE_RETRY_AFTER,
    )
