"""The settlement table, row by row, and the states that a job can go through."""

import typing
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.job import (
    AlreadyDone,
    Broken,
    Cancelled,
    Conflict,
    Decision,
    DeliveriesUsedUp,
    Done,
    Draining,
    EarlierCopy,
    Expired,
    HandedOver,
    IllegalTransition,
    InputMissing,
    LostDevice,
    Malformed,
    ModelRaised,
    Outcome,
    Publish,
    QueueIsFull,
    RanOutOfMemory,
    ResultTooLarge,
    Settlement,
    Stalled,
    State,
    Unsupported,
    WorkerLost,
    advance,
    decide,
)
from generation_contracts import FailureCode

ATTEMPTS = 3  # the default of CONSUMER_MAX_ATTEMPTS
ANY = range(1, ATTEMPTS + 3)
EARLY = range(1, ATTEMPTS)
LATE = range(ATTEMPTS, ATTEMPTS + 3)

# what happened | attempts | event | code | settlement | and besides
TABLE: list[tuple[Outcome, range, str, FailureCode | None, str, str]] = [
    (Done(), ANY, "succeeded", None, "ack", ""),
    (AlreadyDone(), ANY, "stored_again", None, "ack", ""),
    (Conflict(), ANY, "failed_reply_only", FailureCode.REQUEST_ID_CONFLICT, "ack", ""),
    (Malformed("no"), ANY, "failed", FailureCode.INVALID_REQUEST, "term", "dead letter"),
    (Unsupported("x", "no"), ANY, "failed", FailureCode.UNSUPPORTED_PARAMETER, "ack", ""),
    (InputMissing("no"), ANY, "failed", FailureCode.INPUT_UNAVAILABLE, "ack", ""),
    (Expired(), ANY, "failed", FailureCode.DEADLINE_EXCEEDED, "ack", ""),
    (Cancelled(), ANY, "cancelled", None, "ack", ""),
    (ModelRaised("E"), EARLY, "none", None, "retry", ""),
    (ModelRaised("E"), LATE, "failed", FailureCode.MODEL_ERROR, "term", "dead letter"),
    (RanOutOfMemory(saved_memory=False), ANY, "none", None, "keep", "save memory"),
    (RanOutOfMemory(saved_memory=True), ANY, "failed", FailureCode.OUT_OF_MEMORY, "ack", ""),
    (LostDevice(), ANY, "none", None, "nak", "exit 70"),
    (Stalled(), ANY, "none", None, "abandon", "exit 70"),
    (EarlierCopy(), ANY, "none", None, "retry", "no attempt"),
    (HandedOver(), ANY, "none", None, "release", ""),
    (DeliveriesUsedUp(), ANY, "none", None, "retry", ""),
    (WorkerLost(), ANY, "failed", FailureCode.WORKER_LOST, "term", "dead letter"),
    (Draining(), ANY, "none", None, "release", ""),
    (ResultTooLarge(), ANY, "failed", FailureCode.INTERNAL, "ack", ""),
    (QueueIsFull(), ANY, "failed", FailureCode.QUEUE_FULL, "ack", ""),
    (Broken("E"), EARLY, "none", None, "retry", ""),
    (Broken("E"), LATE, "failed", FailureCode.INTERNAL, "term", "dead letter"),
]
CASES = [
    pytest.param(outcome, attempt, *rest, id=f"{type(outcome).__name__}-{rest[2]}-{attempt}")
    for outcome, attempts, *rest in TABLE
    for attempt in attempts
]


def besides(decision: Decision) -> str:
    """Everything in a decision but the event, the failure and the settlement, in words."""
    words = {
        "dead letter": decision.dead_letter,
        "no attempt": not decision.counts,
        "save memory": decision.save_memory,
        f"exit {decision.exit_code}": decision.exit_code is not None,
    }
    return ", ".join(word for word, said in words.items() if said)


@pytest.mark.parametrize(("outcome", "attempt", "event", "code", "settlement", "extra"), CASES)
def test_outcome_means_what_the_settlement_table_says(
    *,
    outcome: Outcome,
    attempt: int,
    event: str,
    code: FailureCode | None,
    settlement: str,
    extra: str,
) -> None:
    decision = decide(outcome, attempt=attempt, max_attempts=ATTEMPTS)
    assert decision.publish is Publish[event.upper()]
    assert decision.settlement is Settlement[settlement.upper()]
    assert (decision.failure and decision.failure.code) == code
    assert besides(decision) == extra


def test_table_has_every_outcome_and_reaches_every_failure_code_and_settlement() -> None:
    assert {type(row[0]) for row in TABLE} == set(typing.get_args(Outcome))
    assert {row[3] for row in TABLE} == {None, *FailureCode}
    assert {row[4].upper() for row in TABLE} == set(Settlement.__members__)
    assert {row[2].upper() for row in TABLE} == set(Publish.__members__)


@pytest.mark.parametrize("most", [1, 2, 7])
@pytest.mark.parametrize("outcome", [ModelRaised("E"), Broken("E")])
def test_last_allowed_attempt_is_the_first_to_be_told(outcome: Outcome, most: int) -> None:
    settlements = [
        decide(outcome, attempt=attempt, max_attempts=most).settlement
        for attempt in range(1, most + 2)
    ]
    assert settlements == [*[Settlement.RETRY] * (most - 1), Settlement.TERM, Settlement.TERM]


@pytest.mark.parametrize(("outcome", "attempt", "event", "code", "settlement", "extra"), CASES)
def test_copy_never_ends_the_id_and_keeps_everything_else_of_its_row(
    *,
    outcome: Outcome,
    attempt: int,
    event: str,
    code: FailureCode | None,
    settlement: str,
    extra: str,
) -> None:
    decision = decide(outcome, attempt=attempt, max_attempts=ATTEMPTS, is_copy=True)
    if event == "cancelled":  # the delivery that the id belongs to stores that event
        assert decision == Decision(Settlement.RETRY, counts=False)
        return
    replied = "failed_reply_only" if event == "failed" else event
    assert decision.publish is Publish[replied.upper()]
    assert decision.settlement is Settlement[settlement.upper()]
    assert (decision.failure and decision.failure.code) == code
    assert besides(decision) == extra


def test_failures_carry_what_the_sender_can_act_on() -> None:
    def failure(outcome: Outcome) -> tuple[str, dict[str, object], bool]:
        found = decide(outcome, attempt=ATTEMPTS, max_attempts=ATTEMPTS).failure
        assert found is not None
        return found.message, found.details, found.retryable

    problem = {"field": "width", "problem": "too wide"}
    assert failure(Malformed("width: too wide", (problem,))) == (
        "width: too wide",
        {"problems": [problem]},
        False,
    )
    assert failure(Unsupported("seed", "seed: no")) == ("seed: no", {"parameter": "seed"}, False)
    assert failure(InputMissing("images.0: gone")) == ("images.0: gone", {}, False)
    assert failure(ModelRaised("ValueError"))[1:] == ({"exception": "ValueError"}, True)
    assert failure(Broken("KeyError"))[1:] == ({"exception": "KeyError"}, True)
    assert failure(WorkerLost())[1:] == ({}, True)
    tried = ("decoding in tiles", "offload")
    assert failure(RanOutOfMemory(saved_memory=True, tried=tried))[1:] == (
        {"tried": ["decoding in tiles", "offload"]},
        True,
    )
    assert failure(Conflict())[1:] == ({}, False)


# -- states ---------------------------------------------------------------------------------------

LEGAL = {
    ("RECEIVED", "ADMITTED"),
    ("RECEIVED", "CONCLUDING"),
    ("ADMITTED", "RUNNING"),
    ("ADMITTED", "CONCLUDING"),
    ("RUNNING", "RUNNING"),
    ("RUNNING", "ENCODING"),
    ("RUNNING", "CONCLUDING"),
    ("ENCODING", "STORING"),
    ("ENCODING", "CONCLUDING"),
    ("STORING", "CONCLUDING"),
    ("CONCLUDING", "SETTLED"),
    ("CONCLUDING", "ABANDONED"),
}
PAIRS = list(product(State, State))


@pytest.mark.parametrize(("state", "to"), PAIRS, ids=[f"{a.name}-{b.name}" for a, b in PAIRS])
def test_only_the_listed_transitions_are_legal(state: State, to: State) -> None:
    if (state.name, to.name) in LEGAL:
        assert advance(state, to) is to
    else:
        with pytest.raises(IllegalTransition, match=f"^{state.name} -> {to.name}$"):
            advance(state, to)


@given(st.lists(st.sampled_from(State), max_size=30))
def test_no_walk_settles_twice_or_goes_on_after_its_end(wanted: list[State]) -> None:
    state, taken = State.RECEIVED, [State.RECEIVED]
    for to in wanted:
        try:
            state = advance(state, to)
        except IllegalTransition:
            continue
        taken.append(state)
    ends = [n for n, state in enumerate(taken) if state in {State.SETTLED, State.ABANDONED}]
    assert ends in ([], [len(taken) - 1])
    order = [state.value for state in taken[: len(taken) - len(ends)]]
    assert order == sorted(order)
