"""Convert every exception to an error response with the same JSON body."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from consumer.gateway.errors import UNAVAILABLE_RETRY_AFTER, ApiError, invalid, of_error
from consumer.gateway.in_flight import CLIENT_GONE
from generation_client import GenerationError
from generation_contracts import InvalidRequest, Task

log = structlog.get_logger()

MAX_PARAM = 100  # characters; the name of an unknown field is text of the caller
MAX_MESSAGE = 300  # characters of one validation problem
UNION_TAG = ":"  # first character of union tags, which are not field names of the caller
_SOURCES = {"body", "query", "path", "header"}
_TASKS = frozenset(Task)  # tags of unions, too
_NOT_JSON = ApiError(
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "send JSON, with content-type: application/json",
    "unsupported_media_type",
)
_CODES = {
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_TIMEOUT: "request_timeout",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type",
    HTTPStatus.SERVICE_UNAVAILABLE: "gateway_busy",
}
_MESSAGES = {
    HTTPStatus.NOT_FOUND: "there is no such address",
    HTTPStatus.METHOD_NOT_ALLOWED: "this address does not take this method",
    HTTPStatus.REQUEST_TIMEOUT: "the body did not arrive in time",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "the body is too large: name images by URL",
    HTTPStatus.SERVICE_UNAVAILABLE: "this gateway has too many large requests: try again later",
}
_RETRY_AFTER = {  # seconds
    HTTPStatus.REQUEST_TIMEOUT: 1,
    HTTPStatus.SERVICE_UNAVAILABLE: UNAVAILABLE_RETRY_AFTER,
}


class ClientGone(Exception):  # noqa: N818 - a state of the client
    """The client has disconnected, so no response is sent."""


def as_api_error(error: Exception) -> ApiError:
    """Convert an exception to the error that the caller gets; log an unknown exception."""
    match error:
        case ApiError():
            return error
        case GenerationError():
            return of_error(error)
        case InvalidRequest():
            field = error.problems[0]["field"] if error.problems else None
            return invalid(str(error), param=field or None)
        case RequestValidationError() | ValidationError():
            return _of_problem(error.errors()[0])
        case HTTPException():
            return _of_http(error)
        case _:
            log.error("http_request_failed", exc_info=error)
            return ApiError(
                HTTPStatus.INTERNAL_SERVER_ERROR, "the gateway failed on this", "internal_error"
            )


def error_response(error: ApiError) -> JSONResponse:
    """Return the HTTP response of an error."""
    return JSONResponse(error.body, error.status, error.headers)


def install_error_handlers(app: FastAPI, routers: Sequence[APIRouter] = ()) -> None:
    """Make an application answer every exception with the body of `ApiError`.

    Args:
        app: The application.
        routers: Its routes, for the header `Allow` of a 405 response.
    """

    async def handle_gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def handle(http: Request, error: Exception) -> JSONResponse:
        answer = error_response(as_api_error(error))
        if answer.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # FastAPI lists the methods of one route only.
            answer.headers["allow"] = ", ".join(sorted(_methods(http.url.path, routers)))
        return answer

    app.add_exception_handler(ClientGone, handle_gone)
    for kind in (
        ApiError,
        GenerationError,
        InvalidRequest,
        RequestValidationError,
        ValidationError,
        HTTPException,
    ):
        app.add_exception_handler(kind, handle)


def _methods(path: str, routers: Sequence[APIRouter]) -> set[str]:
    routes = [route for router in routers for route in router.routes]
    return {
        method
        for route in routes
        if isinstance(route, APIRoute) and route.path_regex.match(path)
        for method in route.methods or ()
    }


def _of_problem(problem: Any) -> ApiError:
    """Return the error for the first problem that pydantic reports, with its field."""
    if problem["type"] == "json_invalid":
        return invalid("the body is not JSON")
    if isinstance(problem.get("input"), bytes):
        return _NOT_JSON
    places = [str(part) for part in problem["loc"] if part not in _SOURCES]
    discriminator = problem.get("ctx", {}).get("discriminator", "")
    if discriminator.startswith("'"):  # the name of a field, not of a function
        places.append(discriminator.strip("'"))
    fields = (one for one in places if not one.startswith(UNION_TAG) and one not in _TASKS)
    param = ".".join(fields)[:MAX_PARAM]
    if problem["type"] == "extra_forbidden":
        return invalid(f"{param}: there is no such field", param=param, code="unknown_parameter")
    message = str(problem["msg"]).removeprefix("Value error, ")[:MAX_MESSAGE]
    message = message[:1].lower() + message[1:]
    return invalid(f"{param}: {message}" if param else message, param=param or None)


def _of_http(error: HTTPException) -> ApiError:
    status = HTTPStatus(error.status_code)
    message = _MESSAGES.get(status) or str(error.detail)
    code = _CODES.get(status, "invalid_request")
    return ApiError(status, message, code, retry_after=_RETRY_AFTER.get(status))
