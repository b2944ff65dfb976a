"""The settlement table, row by row, and its dependence on the attempt and on copies."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.inference.cancel_token import Stopped, StopReason
from consumer.inference.monitor import ThreadStalled
from consumer.jobs import outcomes
from consumer.jobs.outcomes import (
    Decision,
    FailedOutcome,
    IdConflict,
    InternalError,
    MemoryExhausted,
    ModelFailed,
    Outcome,
    Publish,
    Settlement,
    WorkerLost,
    classify_exception,
    decide,
    outcome_label,
)
from consumer.ports.media import InputUnavailable
from consumer.ports.model import DeviceLost, ModelError, OutOfMemory, UnsupportedParameter
from generation_contracts import FailureCode, InvalidRequest
from tests.support.settlement_table import every_outcome, example, markdown

ATTEMPTS = 3  # the default of CONSUMER_MAX_ATTEMPTS
ANY = range(1, ATTEMPTS + 3)
EARLY = range(1, ATTEMPTS)
LATE = range(ATTEMPTS, ATTEMPTS + 3)
KINDS = pytest.mark.parametrize("kind", every_outcome(), ids=lambda kind: kind.__name__)

# The expected table, written without the classes:
# outcome | attempts | event | code | settlement | dead letter, exit code, attempts | label
TABLE: list[tuple[str, range, str, str | None, str, str, str]] = [
    ("Succeeded", ANY, "succeeded", None, "ack", "", "succeeded"),
    ("ResultExists", ANY, "reply_stored", None, "ack", "", "already_done"),
    ("Cancelled", ANY, "cancelled", None, "ack", "", "cancelled"),
    ("IdConflict", ANY, "reply_failed", "request_id_conflict", "ack", "", "request_id_conflict"),
    ("MalformedRequest", ANY, "failed", "invalid_request", "term", "letter", "invalid_request"),
    (
        "ParameterRefused",
        ANY,
        "failed",
        "unsupported_parameter",
        "ack",
        "",
        "unsupported_parameter",
    ),
    ("InputMissing", ANY, "failed", "input_unavailable", "ack", "", "input_unavailable"),
    ("DeadlineExceeded", ANY, "failed", "deadline_exceeded", "ack", "", "deadline_exceeded"),
    ("MemoryExhausted", ANY, "failed", "out_of_memory", "ack", "", "out_of_memory"),
    ("ResultTooLarge", ANY, "failed", "internal", "ack", "", "internal"),
    ("NotSigned", EARLY, "none", None, "retry", "", "requeued"),
    ("NotSigned", LATE, "failed", "internal", "term", "letter", "internal"),
    ("StreamFull", ANY, "failed", "queue_full", "ack", "", "queue_full"),
    ("ModelFailed", EARLY, "none", None, "retry", "", "requeued"),
    ("ModelFailed", LATE, "failed", "model_error", "term", "letter", "model_error"),
    ("OutputRefused", ANY, "failed", "model_error", "ack", "", "model_error"),
    ("InternalError", EARLY, "none", None, "retry", "", "requeued"),
    ("InternalError", LATE, "failed", "internal", "term", "letter", "internal"),
    ("WorkerLost", ANY, "failed", "worker_lost", "term", "letter", "worker_lost"),
    ("EarlierCopyInProgress", ANY, "none", None, "retry", "no attempt", "requeued"),
    ("DeliveriesExhausted", ANY, "none", None, "retry", "", "requeued"),
    ("Draining", ANY, "none", None, "requeue", "", "requeued"),
    ("HandedOver", ANY, "none", None, "requeue", "", "requeued"),
    ("DeviceUnusable", ANY, "none", None, "nak", "exit 70", "requeued"),
    ("RunStalled", ANY, "none", None, "abandon", "exit 70", "abandoned"),
]
CASES = pytest.mark.parametrize(
    ("name", "attempt", "event", "code", "settlement", "extra", "label"),
    [
        pytest.param(name, attempt, *rest, id=f"{name}-{attempt}")
        for name, attempts, *rest in TABLE
        for attempt in attempts
    ],
)


def outcome_example(name: str) -> Outcome:
    return example(getattr(outcomes, name))


def extra_of(decision: Decision) -> str:
    """Return every other field of a decision than event, failure and settlement."""
    fields = {
        "letter": decision.dead_letter,
        "no attempt": not decision.counts,
        f"exit {decision.exit_code}": decision.exit_code is not None,
    }
    return ", ".join(field for field, present in fields.items() if present)


@CASES
def test_decision_is_the_row_of_the_outcome(
    *,
    name: str,
    attempt: int,
    event: str,
    code: str | None,
    settlement: str,
    extra: str,
    label: str,
) -> None:
    decision = decide(outcome_example(name), attempt=attempt, max_attempts=ATTEMPTS)
    assert decision.publish is Publish[event.upper()]
    assert decision.settle is Settlement[settlement.upper()]
    assert (decision.failure and decision.failure.code) == code
    assert extra_of(decision) == extra
    assert outcome_label(decision) == label


@CASES
def test_copy_stores_no_event_and_keeps_the_rest_of_the_row(
    *,
    name: str,
    attempt: int,
    event: str,
    code: str | None,
    settlement: str,
    extra: str,
    label: str,
) -> None:
    decision = decide(outcome_example(name), attempt=attempt, max_attempts=ATTEMPTS, is_copy=True)
    if event == "cancelled":  # the owner of the id stores that event
        assert decision == Decision(Settlement.RETRY, counts=False)
        return
    replied = "reply_failed" if event == "failed" else event
    assert decision.publish is Publish[replied.upper()]
    assert decision.settle is Settlement[settlement.upper()]
    assert (decision.failure and decision.failure.code) == code
    assert extra_of(decision) == extra


def test_table_has_every_outcome_and_reaches_every_failure_code_and_settlement() -> None:
    assert {row[0] for row in TABLE} == {kind.__name__ for kind in every_outcome()}
    assert {row[2].upper() for row in TABLE} == set(Publish.__members__)
    assert {row[3] for row in TABLE} == {None, *FailureCode}
    assert {row[4].upper() for row in TABLE} == set(Settlement.__members__)


@KINDS
def test_row_is_complete_and_consistent(kind: type[Outcome]) -> None:
    assert kind.settle in Settlement
    assert inspect.getdoc(kind) != inspect.getdoc(Outcome), "the docs print the docstring"
    fails = kind.publish in {Publish.FAILED, Publish.REPLY_FAILED}
    assert fails == (kind.code is not None) == issubclass(kind, FailedOutcome)
    assert fails or not (kind.dead_letter or kind.retryable)
    assert kind.counts or kind.settle is Settlement.RETRY
    ends = kind.settle in {Settlement.ACK, Settlement.TERM}
    assert ends == (kind.publish is not Publish.NONE), "a settled request needs an event"
    assert (kind.settle is Settlement.TERM) == kind.dead_letter
    if kind.exit_code is not None:
        assert kind.settle in {Settlement.NAK, Settlement.ABANDON}
    if issubclass(kind, FailedOutcome):
        failure = example(kind).failure
        assert failure is not None
        assert failure.message


@given(st.sampled_from(every_outcome()), st.integers(1, 9), st.integers(1, 9))
def test_only_retryable_outcomes_depend_on_the_attempt(
    kind: type[Outcome], attempt: int, most: int
) -> None:
    outcome = example(kind)
    decision = decide(outcome, attempt=attempt, max_attempts=most)
    retried = kind.retryable and attempt < most
    assert decision == (Decision(Settlement.RETRY) if retried else outcome.decision)


@KINDS
def test_copy_never_ends_the_id(kind: type[Outcome]) -> None:
    ends = {Publish.FAILED, Publish.CANCELLED}
    decision = decide(example(kind), attempt=ATTEMPTS, max_attempts=ATTEMPTS, is_copy=True)
    assert decision.publish not in ends


def test_docs_have_the_table_that_the_classes_print() -> None:
    """Print it with `uv run python -m tests.support.settlement_table`."""
    page = Path(__file__).parents[2] / "docs" / "operating.md"
    assert f"\n{markdown()}\n" in page.read_text("utf-8")


def test_failures_have_a_message_details_and_a_retryable_flag() -> None:
    def failure(kind: type[Outcome], **values: Any) -> tuple[str, dict[str, object], bool]:
        found = example(kind, **values).failure
        assert found is not None
        return found.message, found.details, found.retryable

    problem = {"field": "width", "problem": "too wide"}
    malformed = outcomes.MalformedRequest
    assert failure(malformed, message="no") == ("no", {"problems": []}, False)
    assert failure(malformed, message="width: too wide", problems=(problem,)) == (
        "width: too wide",
        {"problems": [problem]},
        False,
    )
    assert failure(outcomes.ParameterRefused, message="seed: no", parameter="seed") == (
        "seed: no",
        {"parameter": "seed"},
        False,
    )
    assert failure(outcomes.InputMissing, message="images.0: gone") == ("images.0: gone", {}, False)
    assert failure(ModelFailed, exception="ValueError")[1:] == ({"exception": "ValueError"}, True)
    assert failure(InternalError, exception="KeyError")[1:] == ({"exception": "KeyError"}, True)
    assert failure(WorkerLost)[1:] == ({}, True)
    assert failure(MemoryExhausted, tried=("decoding in tiles", "offload"))[1:] == (
        {"tried": ["decoding in tiles", "offload"]},
        True,
    )
    assert failure(outcomes.OutputRefused)[1:] == ({"cause": "safety_checker"}, True)
    assert failure(outcomes.NotSigned)[1:] == ({"cause": "not_signed"}, True)
    assert failure(IdConflict)[1:] == ({}, False)


@pytest.mark.parametrize(
    ("error", "name", "details"),
    [
        (
            InvalidRequest("no", ({"field": "f"},)),
            "MalformedRequest",
            {"problems": [{"field": "f"}]},
        ),
        (UnsupportedParameter("seed", "no"), "ParameterRefused", {"parameter": "seed"}),
        (InputUnavailable("no"), "InputMissing", {}),
        (OutOfMemory("no", ("tiles",)), "MemoryExhausted", {"tried": ["tiles"]}),
        (ModelError("ValueError"), "ModelFailed", {"exception": "ValueError"}),
        (KeyError("secret"), "InternalError", {"exception": "KeyError"}),
        (Stopped(StopReason.DEADLINE), "DeadlineExceeded", {}),
        (Stopped(StopReason.CANCEL), "Cancelled", None),
        (Stopped(StopReason.DRAIN), "Draining", None),
        (DeviceLost("gone"), "DeviceUnusable", None),
        (ThreadStalled(), "RunStalled", None),
        (outcomes.HandedOver(), "HandedOver", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_exception_of_a_stage_becomes_an_outcome(
    error: Exception, name: str, details: dict[str, object] | None
) -> None:
    outcome = classify_exception(error)
    assert type(outcome).__name__ == name
    assert (outcome.failure and outcome.failure.details) == details
    if type(error) in {UnsupportedParameter, InputUnavailable, InvalidRequest}:
        assert str(outcome) == "no", "the sender gets this text"


def test_classified_outcome_has_no_traceback() -> None:
    with pytest.raises(WorkerLost) as raised:
        raise WorkerLost
    assert classify_exception(raised.value).__traceback__ is None


def test_job_without_a_decision_is_abandoned() -> None:
    assert outcome_label(None) == "abandoned"
