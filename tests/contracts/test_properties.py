"""Properties of requests with arbitrary content."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from generation_contracts import (
    InvalidRequest,
    Request,
    Task,
    decode_request,
    encode,
    request_digest,
)
from generation_contracts.examples import REQUESTS
from generation_contracts.failures import MAX_MESSAGE
from generation_contracts.schema import json_schemas
from tests.contracts import strategies
from tests.contracts.rewrite_golden import task_of

# No deadline: a slow machine is no failure.
thorough = settings(deadline=None, max_examples=150)
tasks = st.sampled_from(Task)
VALIDATORS = {name: Draft202012Validator(schema) for name, schema in json_schemas().items()}


def refusal(task: Task, body: bytes) -> InvalidRequest | None:
    try:
        decode_request(task, body)
    except InvalidRequest as error:
        return error
    return None


def paths(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the path of every value in a JSON document."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [at, *(path for key, item in items for path in paths(item, (*at, key)))]


def replaced(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    if not path:
        return new
    copy: Any = value.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


FULL = {name: json.loads(encode(request)) for name, request in REQUESTS.items() if "full" in name}
PLACES = [(name, path) for name, body in FULL.items() for path in paths(body)]


@thorough
@given(tasks, st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(task: Task, body: bytes) -> None:
    refusal(task, body)


@thorough
@given(tasks, strategies.json_values)
def test_any_json_is_decoded_or_refused(task: Task, value: Any) -> None:
    refusal(task, json.dumps(value).encode())


@thorough
@given(st.sampled_from(PLACES), strategies.json_values)
def test_mutated_request_is_decoded_or_refused_briefly(
    place: tuple[str, tuple[str | int, ...]], value: Any
) -> None:
    name, path = place
    body = json.dumps(replaced(FULL[name], path, value)).encode()
    error = refusal(task_of(REQUESTS[name]), body)
    if error is not None:
        assert 1 <= len(error.problems) <= 8
        assert 0 < len(str(error)) <= MAX_MESSAGE
        assert str(error).isprintable()


@thorough
@given(strategies.requests)
def test_valid_request_survives_encoding(request: Request) -> None:
    again = decode_request(task_of(request), encode(request))
    assert again == request
    assert request_digest(again) == request_digest(request)


@thorough
@given(strategies.requests)
def test_valid_request_matches_its_schema(request: Request) -> None:
    VALIDATORS[type(request).__name__].validate(json.loads(encode(request)))


@thorough
@given(strategies.requests, strategies.requests)
def test_different_requests_have_different_digests(one: Request, other: Request) -> None:
    sender_fields = {"request_id": None, "reply_to": None, "deadline": None, "metadata": {}}
    sender_fields["chain"] = None  # the position in a chain is not part of the digest
    contents = [request.model_copy(update=sender_fields) for request in (one, other)]
    assert (contents[0] == contents[1]) == (request_digest(one) == request_digest(other))


SECRET = "hunter2-correct-horse"
SHAPES = {
    "text": SECRET,
    "long text": SECRET * 500,
    "list": [SECRET],
    "object": {"task": SECRET, "prompt": SECRET, "base64": SECRET, "bucket": SECRET, "key": SECRET},
    "uri": f"s3://{SECRET}",
    "data uri": f"data:{SECRET}",
    "control characters": f"\n{SECRET}\x1b",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_refusal_does_not_repeat_the_value(shape: str) -> None:
    leaks, refused = [], 0
    for name, path in PLACES:
        body = json.dumps(replaced(FULL[name], path, SHAPES[shape])).encode()
        error = refusal(task_of(REQUESTS[name]), body)
        refused += error is not None
        if error is not None and SECRET in f"{error} {error!r} {error.problems}":
            leaks.append((name, path))
    assert leaks == []
    assert refused > len(PLACES) / 2  # else it would show little
