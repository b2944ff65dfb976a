"""JSON Schemas: each schema is self-contained and agrees with the code."""

import json
import os
import subprocess
import sys
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator

from generation_contracts import TASKS, CancelReply, UploadReply, UploadRequest, encode
from generation_contracts.examples import EVENTS, REQUESTS, Event
from generation_contracts.schema import json_schemas
from tests.contracts.rewrite_golden import task_of
from tests.contracts.senders import BASES, IMAGE_TO_TEXT, TEXT_TO_IMAGE, decode, refusal
from tests.contracts.test_image_sources import BAD_IMAGES, GOOD_IMAGES
from tests.contracts.test_request_fields import LIMITS, TYPES

SCHEMAS = json_schemas()
VALIDATORS = {name: Draft202012Validator(schema) for name, schema in SCHEMAS.items()}
REQUEST_SCHEMAS = {task: spec.request.__name__ for task, spec in TASKS.items()}

# Values that JSON Schema cannot exclude, or that this validator accepts: it accepts 512.0 as an
# integer, does not check formats, and its `$` allows a line break at the end.
BEYOND_THE_SCHEMA = [512.0, " \t\n", "a\n", "soon", "2026-01-02", "2030-01-02T03:04:05"]
BEYOND_THE_SCHEMA += ["2030-13-02T03:04:05Z", "1767323045", "", {"a\n": 1}]


def accepted_by_schema(task: Any, fields: dict[str, Any]) -> bool:
    return bool(VALIDATORS[REQUEST_SCHEMAS[task]].is_valid({**BASES[task], **fields}))


def references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [found for item in node for found in references(item)]
    if not isinstance(node, dict):
        return []
    here = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
    return here + [found for item in node.values() for found in references(item)]


def test_every_request_and_event_has_a_schema() -> None:
    assert set(SCHEMAS) == {
        model.__name__
        for model in (
            *(spec.request for spec in TASKS.values()),
            *get_args(Event),
            *(CancelReply, UploadReply, UploadRequest),
        )
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_valid_named_and_self_contained(name: str) -> None:
    schema = SCHEMAS[name]
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == f"urn:generation:v1:{name}"
    assert schema["title"] == name
    assert {ref.rpartition("/")[0] for ref in references(schema)} <= {"#/$defs"}
    assert {ref.rpartition("/")[2] for ref in references(schema)} <= set(schema.get("$defs", {}))


@pytest.mark.parametrize("name", {**REQUESTS, **EVENTS})
def test_schema_examples_match_the_schema(name: str) -> None:
    message = REQUESTS[name] if name in REQUESTS else EVENTS[name]
    schema, body = SCHEMAS[type(message).__name__], json.loads(encode(message))
    assert body in schema["examples"]
    VALIDATORS[type(message).__name__].validate(body)


@pytest.mark.parametrize("name", REQUESTS)
def test_request_schema_refuses_unknown_fields_at_every_depth(name: str) -> None:
    body = json.loads(encode(REQUESTS[name]))
    validator = VALIDATORS[type(REQUESTS[name]).__name__]
    assert validator.is_valid(body)
    assert not validator.is_valid({**body, "later": 1})
    for index, step in enumerate(body["then"]):
        then = [*body["then"]]
        then[index] = {**step, "later": 1}
        assert not validator.is_valid({**body, "then": then})


@pytest.mark.parametrize("name", EVENTS)
def test_event_schema_allows_unknown_fields_but_needs_the_type(name: str) -> None:
    body = json.loads(encode(EVENTS[name]))
    validator = VALIDATORS[type(EVENTS[name]).__name__]
    assert validator.is_valid({**body, "later": 1})
    del body["type"]
    assert not validator.is_valid(body)


def test_event_schema_of_one_kind_refuses_the_others() -> None:
    for event in EVENTS.values():
        body = json.loads(encode(event))
        fitting = {n for n in SCHEMAS if n.endswith("Event") and VALIDATORS[n].is_valid(body)}
        assert fitting == {type(event).__name__}


def test_output_without_its_kind_is_refused() -> None:
    body = json.loads(encode(EVENTS["succeeded_text"]))
    del body["outputs"][0]["kind"]
    assert not VALIDATORS["SucceededEvent"].is_valid(body)


def test_schema_accepts_steps() -> None:
    assert accepted_by_schema(TEXT_TO_IMAGE, {"steps": 200})
    assert not accepted_by_schema(TEXT_TO_IMAGE, {"steps": 201})
    assert not accepted_by_schema(TEXT_TO_IMAGE, {"steps": 5, "num_inference_steps": 5})
    assert not accepted_by_schema(IMAGE_TO_TEXT, {"steps": 5})
    step = {"task": "text_to_image", "prompt": "$text", "steps": 5}
    assert accepted_by_schema(IMAGE_TO_TEXT, {"then": [step]})
    assert not accepted_by_schema(IMAGE_TO_TEXT, {"then": [step | {"num_inference_steps": 5}]})


def test_schema_and_code_accept_equal_values() -> None:
    for task, field, good, _ in LIMITS:
        for value in good:
            decode(task, {field: value})
            assert accepted_by_schema(task, {field: value}), (task, field, value)


def test_schema_and_code_refuse_equal_values() -> None:
    rows = [(task, field, bad) for task, field, _, bad in LIMITS]
    rows += [(task, field, wrong) for task, field, (_, wrong) in TYPES]
    accepted = []
    for task, field, values in rows:
        for value in values:
            refusal(task, {field: value})
            if accepted_by_schema(task, {field: value}):
                accepted.append(repr(value))
    assert set(accepted) == set(map(repr, BEYOND_THE_SCHEMA))


def test_schema_and_code_agree_about_images() -> None:
    assert all(accepted_by_schema(IMAGE_TO_TEXT, {"images": [image]}) for image in GOOD_IMAGES)
    for image in BAD_IMAGES:
        text = next(iter(image.values())) if isinstance(image, dict) and image else image
        ends_in_break = str(text).endswith("\n")
        assert accepted_by_schema(IMAGE_TO_TEXT, {"images": [image]}) is ends_in_break, image


def test_schemas_and_document_are_deterministic() -> None:
    code = (
        "import json; from generation_contracts.schema import asyncapi, json_schemas;"
        "print(json.dumps([asyncapi(), json_schemas()]))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1


def test_returned_document_is_a_copy() -> None:
    json_schemas()["TextToImageRequest"].clear()
    assert json_schemas() == SCHEMAS
    assert {task_of(request) for request in REQUESTS.values()} == set(REQUEST_SCHEMAS)
