"""Conversion of HTTP fields to a request of the contract, and of field names in errors."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from consumer.gateway.errors import ApiError, invalid
from generation_contracts import FailureCode, InvalidRequest, Request, Task, decode_request

UNSUPPORTED = "unsupported_parameter"  # error code of a valid parameter that is not supported

Names = Mapping[str, str]  # a field of the contract -> the field of the HTTP request


def contract_request(task: Task, fields: Mapping[str, Any], names: Names) -> Request:
    """Build a request of the contract.

    Args:
        task: The task of the request.
        fields: Values by the field names of the contract; None means absent.
        names: The field names of the HTTP request.

    Raises:
        ApiError: 400 that names the field of the HTTP request.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        # The worker's decoder: both refuse the same requests with the same messages.
        return decode_request(task, json.dumps(given).encode())
    except InvalidRequest as error:
        problem = error.problems[0]
        param = _renamed(problem["field"], names)
        prefix = f"{param}: " if param else ""
        raise invalid(f"{prefix}{problem['problem']}", param=param or None) from None


def with_request_names(error: ApiError, names: Names) -> ApiError:
    """Return an error whose `param` is the field of the HTTP request."""
    param = error.param
    if param is None and error.code == FailureCode.INPUT_UNAVAILABLE:
        param = "images"
    return error if param is None else replace(error, param=_renamed(param, names))


def unsupported(param: str, reason: str) -> ApiError:
    """Return the error for a parameter that would change the output and is not supported."""
    return invalid(f"{param}: {reason}", param=param, code=UNSUPPORTED)


def _renamed(field: str, names: Names) -> str:
    first, dot, rest = field.partition(".")
    return names[field] if field in names else names.get(first, first) + dot + rest
