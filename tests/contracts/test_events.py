"""Events ignore unknown fields of newer daemons, and are immutable."""

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from generation_contracts import (
    Failure,
    FailureCode,
    TerminalEvent,
    decode_event,
    decode_result,
    encode,
)
from generation_contracts.examples import EVENTS
from generation_contracts.failures import MAX_MESSAGE, RETRYABLE
from generation_contracts.fields import MAX_METADATA, Metadata

by_name = pytest.mark.parametrize("name", EVENTS)


def with_unknown_fields(value: Any) -> Any:
    if isinstance(value, list):
        return [with_unknown_fields(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: with_unknown_fields(item) for key, item in value.items()} | {"later": {"x": [1]}}


@by_name
def test_fields_of_a_newer_daemon_are_ignored_at_every_depth(name: str) -> None:
    body = json.loads(encode(EVENTS[name]))
    maps = ("metadata", "defaults", "parameters")  # free: whatever is in one belongs to it
    free = {name: body[name] for name in maps if name in body}
    if "failure" in body:
        free["failure"] = {**body["failure"], "later": 1}
    newer = with_unknown_fields(body) | free
    if "libraries" in body.get("model", {}):
        newer["model"]["libraries"] = body["model"]["libraries"]
    assert decode_event(json.dumps(newer).encode()) == EVENTS[name]


@by_name
def test_terminal_events_are_results_and_the_others_are_not(name: str) -> None:
    body = encode(EVENTS[name])
    if isinstance(EVENTS[name], TerminalEvent):
        assert decode_result(body) == EVENTS[name]
    else:
        with pytest.raises(ValidationError):
            decode_result(body)


@by_name
def test_event_of_another_version_is_refused(name: str) -> None:
    body = json.loads(encode(EVENTS[name]))
    body["type"] = body["type"].replace(".v1.", ".v2.")
    with pytest.raises(ValidationError):
        decode_event(json.dumps(body).encode())


@by_name
def test_event_without_its_type_is_refused(name: str) -> None:
    body = json.loads(encode(EVENTS[name]))
    del body["type"]
    with pytest.raises(ValidationError):
        decode_event(json.dumps(body).encode())


@by_name
def test_event_is_frozen(name: str) -> None:
    event = EVENTS[name]
    for field in type(event).model_fields:
        with pytest.raises(ValidationError):
            setattr(event, field, getattr(event, field))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("started", {"request_id": "a.b"}),
        ("started", {"request_id": "a\n"}),
        ("started", {"attempt": 0}),
        ("started", {"sequence": -1}),
        ("started", {"time": "2026-01-02T03:04:05"}),
        ("started", {"task": "text_to_speech"}),
        ("started", {"queued": -0.1}),
        ("progress_image", {"of": 0}),
        ("succeeded_image", {"outputs": []}),
        ("succeeded_image", {"request_digest": "sha256:0"}),
        ("succeeded_image", {"outputs": [{"kind": "video"}]}),
        ("failed_internal", {"failure": {"code": "new", "message": "", "retryable": True}}),
    ],
    ids=str,
)
def test_event_outside_the_contract_is_refused(name: str, change: dict[str, Any]) -> None:
    body = {**json.loads(encode(EVENTS[name])), **change}
    with pytest.raises(ValidationError):
        decode_event(json.dumps(body).encode())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_number_that_is_not_finite_is_refused_in_events(number: float) -> None:
    body = {**json.loads(encode(EVENTS["started"])), "queued": number}
    with pytest.raises(ValidationError):
        decode_event(json.dumps(body).encode())


@pytest.mark.parametrize("code", FailureCode)
def test_failure_has_its_retryable_flag(code: FailureCode) -> None:
    assert Failure.of(code, "why").retryable is (code in RETRYABLE)


def test_errors_of_the_sender_are_not_retryable() -> None:
    for_the_sender = {
        FailureCode.INVALID_REQUEST,
        FailureCode.UNSUPPORTED_PARAMETER,
        FailureCode.REQUEST_ID_CONFLICT,
        FailureCode.INPUT_UNAVAILABLE,
    }
    assert set(FailureCode) - RETRYABLE == for_the_sender


def test_long_failure_message_is_truncated() -> None:
    assert len(Failure.of(FailureCode.INTERNAL, "x" * 10_000).message) == MAX_MESSAGE


def test_request_metadata_fits_every_event_that_echoes_it() -> None:
    largest = {f"{n:064}": "v" * 512 for n in range(MAX_METADATA)}
    TypeAdapter(Metadata).validate_python(largest)
    echoed = EVENTS["cancelled"].model_copy(update={"metadata": largest})
    assert decode_event(encode(echoed)) == echoed
