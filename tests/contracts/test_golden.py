"""The golden files fix the wire format of each message, byte for byte."""

import json
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator

from generation_contracts import (
    TASKS,
    CancelReply,
    FailedEvent,
    FailureCode,
    UploadReply,
    UploadRequest,
    decode_cancel_reply,
    decode_event,
    decode_request,
    decode_upload_reply,
    decode_upload_request,
    encode,
)
from generation_contracts.events import EventBase
from generation_contracts.examples import Event
from generation_contracts.schema import json_schemas
from tests.contracts.rewrite_golden import GOLDEN, MESSAGES, golden, render, task_of

FILES = sorted(path.stem for path in GOLDEN.glob("*.json"))
by_name = pytest.mark.parametrize("name", sorted(MESSAGES))


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return document


def as_bytes(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def models_in(value: Any) -> list[Any]:
    """A message and every message part in it."""
    if isinstance(value, tuple):
        return [model for item in value for model in models_in(item)]
    if not hasattr(value, "model_fields_set"):
        return []
    return [
        value,
        *(m for name in type(value).model_fields for m in models_in(getattr(value, name))),
    ]


@by_name
def test_encoded_message_equals_the_golden_file(name: str) -> None:
    assert encode(MESSAGES[name]) == as_bytes(read(name)["body"])


@by_name
def test_subject_and_headers_equal_the_golden_file(name: str) -> None:
    assert (GOLDEN / f"{name}.json").read_text(encoding="utf-8") == render(golden(MESSAGES[name]))


@by_name
def test_golden_message_decodes_to_the_same_object(name: str) -> None:
    message, body = MESSAGES[name], as_bytes(read(name)["body"])
    decoded: Any
    if isinstance(message, CancelReply):
        decoded = decode_cancel_reply(body)
    elif isinstance(message, UploadReply):
        decoded = decode_upload_reply(body)
    elif isinstance(message, UploadRequest):
        decoded = decode_upload_request(body)
    elif isinstance(message, EventBase):
        decoded = decode_event(body)
    else:
        decoded = decode_request(task_of(message), body)
    assert decoded == message
    assert type(decoded) is type(message)


@by_name
def test_golden_message_fits_its_schema(name: str) -> None:
    schema = json_schemas()[type(MESSAGES[name]).__name__]
    Draft202012Validator(schema).validate(read(name)["body"])


def test_every_golden_file_has_a_message() -> None:
    assert sorted(MESSAGES) == FILES


def test_every_kind_of_message_has_a_golden_file() -> None:
    kinds = {*(spec.request for spec in TASKS.values()), *get_args(Event)}
    kinds |= {CancelReply, UploadReply, UploadRequest}
    assert {type(message) for message in MESSAGES.values()} == kinds


def test_every_failure_code_has_a_golden_file() -> None:
    codes = {m.failure.code for m in MESSAGES.values() if isinstance(m, FailedEvent)}
    assert codes == set(FailureCode)


def test_golden_files_contain_every_field() -> None:
    written: dict[type[Any], set[str]] = {}
    for message in MESSAGES.values():
        for model in models_in(message):
            names = {n for n in type(model).model_fields if getattr(model, n) not in (None, (), {})}
            written.setdefault(type(model), set()).update(names)
    assert written == {model: set(model.model_fields) for model in written}
