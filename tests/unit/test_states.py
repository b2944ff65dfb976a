"""The states of a job, and their transitions."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.jobs.states import FINAL, IllegalTransition, State, advance

LEGAL = {
    ("RECEIVED", "ADMITTED"),
    ("RECEIVED", "FINALIZING"),
    ("ADMITTED", "RUNNING"),
    ("ADMITTED", "FINALIZING"),
    ("RUNNING", "ENCODING"),
    ("RUNNING", "FINALIZING"),
    ("ENCODING", "STORING"),
    ("ENCODING", "FINALIZING"),
    ("STORING", "FINALIZING"),
    ("FINALIZING", "SETTLED"),
    ("FINALIZING", "ABANDONED"),
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
def test_no_state_follows_a_final_state(targets: list[State]) -> None:
    state, path = State.RECEIVED, [State.RECEIVED]
    for to in targets:
        try:
            state = advance(state, to)
        except IllegalTransition:
            continue
        path.append(state)
    ends = [n for n, state in enumerate(path) if state in FINAL]
    assert ends in ([], [len(path) - 1])
    order = [state.value for state in path[: len(path) - len(ends)]]
    assert order == sorted(order)
