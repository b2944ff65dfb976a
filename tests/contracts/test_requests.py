"""Requests are strict: unknown content is refused with a useful error message."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from generation_contracts import InvalidRequest, Task, decode_request, encode
from generation_contracts.examples import REQUESTS
from tests.contracts.senders import BASES, CUSTOM, IMAGE_TO_TEXT, TEXT_TO_IMAGE, decode, refusal


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b'{"prompt": "x"',
        b'{"prompt": "x"} {}',
        b"{'prompt': 'x'}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"\xef\xbb\xbf" + b'{"prompt": "x"}',
        b"[" * 100_000,
        b'{"metadata":' + b'{"a":' * 100_000,
        b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: ascii(body[:24]),
)
@pytest.mark.parametrize("task", Task)
def test_body_that_is_not_json_is_refused(task: Task, body: bytes) -> None:
    error = refusal(task, body)
    assert error.problems == ({"field": "", "problem": "the body is not JSON"},)
    assert str(error) == "the body is not JSON"


@pytest.mark.parametrize("body", [b"null", b"[]", b'"prompt"', b"5", b"true"])
def test_json_that_is_not_an_object_is_refused(body: bytes) -> None:
    assert str(refusal(TEXT_TO_IMAGE, body)) == "input should be an object"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("task", "field"),
    [
        (TEXT_TO_IMAGE, "guidance_scale"),
        (IMAGE_TO_TEXT, "temperature"),
        (IMAGE_TO_TEXT, "top_p"),
        (IMAGE_TO_TEXT, "repetition_penalty"),
    ],
)
def test_number_that_is_not_finite_is_refused(task: Task, field: str, number: str) -> None:
    fields = json.dumps(BASES[task])[1:-1]
    body = f'{{{fields}, "{field}": {number}}}'.encode()
    assert refusal(task, body).problems == (
        {"field": field, "problem": "input should be a finite number"},
    )


def test_last_of_two_equal_keys_is_used() -> None:
    # As json.loads, jq and JavaScript have it.
    request = decode_request(TEXT_TO_IMAGE, b'{"prompt": "first", "prompt": "last"}')
    assert request.prompt == "last"


@pytest.mark.parametrize("task", [TEXT_TO_IMAGE, IMAGE_TO_TEXT])
def test_error_names_all_missing_fields(task: Task) -> None:
    fields = {p["field"] for p in refusal(task, b"{}").problems}
    assert fields == {"prompt"} | ({"images"} if task is IMAGE_TO_TEXT else set())


def test_a_custom_request_has_no_required_field() -> None:
    assert decode_request(CUSTOM, b"{}") == decode_request(CUSTOM, b'{"parameters": {}}')


def test_an_unknown_field_is_named_before_the_missing_field() -> None:
    error = refusal(TEXT_TO_IMAGE, b'{"promt": "a red circle"}')
    assert str(error) == "promt: there is no such field (and 1 more)"
    assert [problem["field"] for problem in error.problems] == ["promt", "prompt"]


def test_empty_list_is_reported_with_other_problems() -> None:
    problems = refusal(IMAGE_TO_TEXT, b'{"images": []}').problems
    assert {p["field"] for p in problems} == {"prompt", "images"}


def test_list_with_invalid_items_is_reported_once() -> None:
    problems = refusal(IMAGE_TO_TEXT, {"images": [5]}).problems
    assert [p["field"] for p in problems] == ["images.0"]


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize(
    "field", ["promt", "Prompt", "task", "type", "S3Uri", "text_to_image", "x"]
)
def test_unknown_field_is_refused_by_its_name(task: Task, field: str) -> None:
    assert refusal(task, {field: 1}).problems == (
        {"field": field, "problem": "there is no such field"},
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"metadata": {"text_to_image": 5}}, "metadata.text_to_image"),
        ({"metadata": {"InlineUri": 5}}, "metadata.InlineUri"),
        ({"then": [{"task": "text_to_image", "prompt": "x", "widht": 5}]}, "then.0.widht"),
        ({"then": [{"task": "text_to_image", "prompt": "x", "width": 5}]}, "then.0.width"),
        ({"then": [{"task": "image_to_text"}]}, "then.0.prompt"),
        ({"then": [{"task": "image_to_text", "prompt": "x", "images": 5}]}, "then.0.images"),
        ({"then": [{"task": "image_to_text", "prompt": "x", "images": ["x"]}]}, "then.0.images.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_problem_has_the_path_of_the_field(fields: dict[str, Any], field: str) -> None:
    assert [p["field"] for p in refusal(TEXT_TO_IMAGE, fields).problems] == [field]


@pytest.mark.parametrize("task", Task)
def test_only_some_of_many_problems_are_reported(task: Task) -> None:
    error = refusal(task, {f"unknown_{n}": n for n in range(1000)})
    assert len(error.problems) == 8
    assert str(error).endswith("(and 7 more)")


def test_name_of_an_unknown_field_is_truncated_and_printable() -> None:
    problem = refusal(TEXT_TO_IMAGE, {"\x1b[31m\u202e\n" + "x" * 1000: 1}).problems[0]
    assert problem["field"].isprintable()
    assert len(problem["field"]) == 100


def test_unknown_task_of_a_step_is_reported_briefly() -> None:
    error = refusal(TEXT_TO_IMAGE, {"then": [{"task": "A" * 100_000, "prompt": "x"}]})
    assert len(str(error)) < 500
    assert len(str(error.problems)) < 500


def test_steps_is_an_alias_of_num_inference_steps() -> None:
    request = decode(TEXT_TO_IMAGE, {"steps": 30})
    assert request == decode(TEXT_TO_IMAGE, {"num_inference_steps": 30})
    assert json.loads(encode(request))["num_inference_steps"] == 30
    assert "steps" not in json.loads(encode(request))


def test_steps_under_both_names_is_refused() -> None:
    error = refusal(TEXT_TO_IMAGE, {"steps": 30, "num_inference_steps": 30})
    assert [p["field"] for p in error.problems] == ["steps"]


def test_steps_is_accepted_in_a_routing_slip() -> None:
    step = {"task": "text_to_image", "prompt": "$text", "steps": 5}
    request = decode(IMAGE_TO_TEXT, {"then": [step]})
    assert json.loads(encode(request))["then"][0]["num_inference_steps"] == 5


@pytest.mark.parametrize("task", Task)
def test_null_equals_absent_without_a_default(task: Task) -> None:
    names = ["request_id", "reply_to", "deadline", "seed"]
    assert decode(task, dict.fromkeys(names)) == decode(task, {})


def test_deadline_keeps_its_instant() -> None:
    request = decode(TEXT_TO_IMAGE, {"deadline": "2030-01-02T03:04:05+02:00"})
    assert request.deadline == datetime(2030, 1, 2, 1, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize("name", REQUESTS)
def test_request_is_frozen(name: str) -> None:
    request = REQUESTS[name]
    for field in type(request).model_fields:
        with pytest.raises(ValidationError):
            setattr(request, field, getattr(request, field))


def test_request_of_another_task_is_refused() -> None:
    refusal(TEXT_TO_IMAGE, encode(REQUESTS["image_to_text_full"]))
    refusal(IMAGE_TO_TEXT, encode(REQUESTS["text_to_image_full"]))


def test_many_unknown_fields_are_refused_briefly() -> None:
    body = json.dumps({"prompt": "a", **{f"k{n}": 1 for n in range(2_000)}}).encode()
    with pytest.raises(InvalidRequest, match="more than 1000 fields are wrong") as refused:
        decode_request(Task.TEXT_TO_IMAGE, body)
    assert len(refused.value.problems) == 1
