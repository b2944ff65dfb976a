"""Error responses in the format of OpenAI's API.

The body is `{"error": {"message", "type", "code", "param"}}`. OpenAI's clients retry a request
after 408, 409, 429 and 5xx unless the header `x-should-retry` is `false`.
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
    """An error response.

    Attributes:
        status: HTTP status.
        message: One sentence for the caller.
        code: Error code for programs.
        param: The field of the HTTP request that is wrong.
        retry_after: Seconds until a retry may succeed; None: a retry will not succeed.
        request_id: Id of the request that failed, if it has one.
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
        """The JSON body of the response."""
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
        """The headers of the response, which control the retries of OpenAI's clients."""
        headers = {"x-should-retry": "false" if self.retry_after is None else "true"}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.request_id is not None:
            headers["x-request-id"] = self.request_id
        return headers


def invalid(message: str, *, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """Return a 400 error: the request is wrong."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, code, param)


def not_found(message: str = "there is no such job") -> ApiError:
    """Return a 404 error, also for an object of another tenant."""
    return ApiError(HTTPStatus.NOT_FOUND, message, "not_found")


def of_failure(failure: Failure, request_id: str | None = None) -> ApiError:
    """Return the error for a request that has failed; its id does not run again."""
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
    """Return the error for an exception of the client library."""
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
            message = "no worker is available to do it"
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
