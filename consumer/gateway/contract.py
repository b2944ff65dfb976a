"""From the fields of an HTTP request to a request of the contract, and errors back."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from consumer.gateway.errors import ApiError, invalid
from generation_contracts import FailureCode, InvalidRequest, Request, Task, decode_request

UNSUPPORTED = "unsupported_parameter"  # the code of what is understood and cannot be done

Names = Mapping[str, str]  # a field of the contract -> the caller's own name of it


def contract_request(task: Task, fields: Mapping[str, Any], names: Names) -> Request:
    """Make a request of the contract.

    Args:
        task: What is asked for.
        fields: By the names of the contract; a field that is None is left out.
        names: What the caller calls these fields.

    Raises:
        ApiError: 400 that names the caller's field.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        # The way of every request: what a worker would refuse is refused with the same words.
        return decode_request(task, json.dumps(given).encode())
    except InvalidRequest as error:
        problem = error.problems[0]
        param = _renamed(problem["field"], names)
        place = f"{param}: " if param else ""
        raise invalid(f"{place}{problem['problem']}", param=param or None) from None


def in_callers_words(error: ApiError, names: Names) -> ApiError:
    """Return an error that names the caller's field where it is about one of the contract."""
    param = error.param
    if param is None and error.code == FailureCode.INPUT_UNAVAILABLE:
        param = "images"
    return error if param is None else replace(error, param=_renamed(param, names))


def unsupported(param: str, reason: str) -> ApiError:
    """Make the answer to a parameter that would change the output and that nothing here can do."""
    return invalid(f"{param}: {reason}", param=param, code=UNSUPPORTED)


def _renamed(field: str, names: Names) -> str:
    first, dot, rest = field.partition(".")
    return names[field] if field in names else names.get(first, first) + dot + rest
