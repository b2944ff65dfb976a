"""Helpers of the request tests: decode a request, or get its refusal."""

import json
from typing import Any

import pytest

from generation_contracts import InvalidRequest, Request, Task, decode_request

IMAGE = "s3://generation/inputs/0.png"
BASES: dict[Task, dict[str, Any]] = {
    Task.TEXT_TO_IMAGE: {"prompt": "a red circle"},
    Task.IMAGE_TO_TEXT: {"prompt": "what is it?", "images": [IMAGE]},
    Task.CUSTOM: {"parameters": {}},
}
TEXT_TO_IMAGE, IMAGE_TO_TEXT, CUSTOM = Task


def decode(task: Task, fields: dict[str, Any]) -> Request:
    """A valid request of the task with some fields set."""
    return decode_request(task, json.dumps({**BASES[task], **fields}).encode())


def refusal(task: Task, body: bytes | dict[str, Any]) -> InvalidRequest:
    """How a body, or a valid request with some fields set, is refused."""
    if isinstance(body, dict):
        body = json.dumps({**BASES[task], **body}).encode()
    with pytest.raises(InvalidRequest) as caught:
        decode_request(task, body)
    assert "pattern" not in str(caught.value)  # the message is in words
    return caught.value
