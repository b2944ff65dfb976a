"""Requests: decoding, encoding and digests.

`decode_request` is the only way from bytes to a request. It is strict: "512" is not a number, and
an unknown field is an error. Its messages name the field and never contain the value, so they may
be shown and logged.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ValidationError

from generation_contracts.base import Task
from generation_contracts.envelope import Request
from generation_contracts.tasks import TASKS

MAX_PROBLEMS = 8  # reported for one invalid request
MAX_LISTED = 1_000  # problems; above it none is listed

# These do not change the outputs, so a second copy of a request may differ in them.
_NOT_CONTENT = frozenset({"request_id", "reply_to", "deadline", "metadata", "chain"})


class InvalidRequest(ValueError):  # noqa: N818 - named like the failure code
    """The bytes are not a request of this task.

    Attributes:
        problems: One `{"field": …, "problem": …}` for each error, without the values.
    """

    def __init__(self, message: str, problems: tuple[dict[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


def decode_request(task: Task, body: bytes) -> Request:
    """Decode and validate a request.

    Raises:
        InvalidRequest: Not JSON, or against the contract. The text may be shown to the sender.
    """
    try:
        return TASKS[task].request.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise invalid_request(error) from None


def invalid_request(error: ValidationError) -> InvalidRequest:
    """Return the exception for a message of a sender that is against the contract.

    An unknown field is listed first, because a misspelt name is the cause of a missing field.
    """
    if error.error_count() > MAX_LISTED:
        # A megabyte of unknown fields would take half a second to list.
        problem = f"more than {MAX_LISTED} fields are wrong"
        return InvalidRequest(problem, ({"field": "", "problem": problem},))
    details = error.errors(include_input=False, include_url=False, include_context=False)
    causes = sorted(_causes(details), key=lambda detail: detail["type"] != "extra_forbidden")
    problems = tuple(_problem(detail) for detail in causes[:MAX_PROBLEMS])
    return InvalidRequest(_sentence(problems), problems)


def encode(message: BaseModel) -> bytes:
    """Encode a request or an event as JSON, without fields that are None."""
    return message.model_dump_json(exclude_none=True).encode()


def request_digest(request: Request) -> str:
    """Return the digest of a request's content, as `sha256:<hex>`.

    Two requests with the same id are copies if their digests are equal, and a conflict otherwise.
    The reply subject, the deadline and the metadata are not part of the content: a sender may
    repeat a request with a later deadline.
    """
    content_fields = request.model_dump(
        mode="json", exclude=set(_NOT_CONTENT), exclude_defaults=True
    )
    content = json.dumps(content_fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def digest_of_bytes(body: bytes) -> str:
    """Return the digest of bytes that are not a valid request, as `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _causes(details: list[Any]) -> list[Any]:
    # pydantic also reports a list as too short when its only item is invalid.
    def within(place: Any) -> bool:
        return any(len(d["loc"]) > len(place) and d["loc"][: len(place)] == place for d in details)

    return [d for d in details if d["type"] != "too_short" or not within(d["loc"])]


def _problem(detail: Any) -> dict[str, str]:
    if detail["type"] == "json_invalid":
        return {"field": "", "problem": "the body is not JSON"}
    location = _without_union_members(detail["loc"])
    if detail["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        # The message of pydantic contains the value, of any length.
        tags = f"must be one of {', '.join(Task)}"
        return {"field": _dotted([*location, "task"]), "problem": tags}
    if detail["type"] == "extra_forbidden":
        return {"field": _dotted(location), "problem": "there is no such field"}
    return {"field": _dotted(location), "problem": _plain(detail)}


def _without_union_members(location: tuple[int | str, ...]) -> list[int | str]:
    # pydantic adds the name of the chosen union member after the index of an image or step, and
    # after `images` in a step. Senders do not know these names.
    before: list[int | str] = ["", *location]
    return [
        part
        for part, previous in zip(location, before, strict=False)
        if isinstance(part, int) or not (isinstance(previous, int) or previous == "images")
    ]


def _plain(detail: Any) -> str:
    message: str = detail["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _dotted(location: list[int | str]) -> str:
    # The name of an unknown field is text of the sender: make it short and printable.
    dotted = ".".join(str(part) for part in location)
    return "".join(c for c in dotted if c.isprintable())[:100]


def _sentence(problems: tuple[dict[str, str], ...]) -> str:
    first = problems[0]
    place = f"{first['field']}: " if first["field"] else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}{first['problem']}{more}"
