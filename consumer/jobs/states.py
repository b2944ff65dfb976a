"""The states of a job, and which state can follow which."""

from enum import Enum, auto


class State(Enum):
    """The stage that a job has reached, in the order of the stages."""

    RECEIVED = auto()
    ADMITTED = auto()
    RUNNING = auto()
    ENCODING = auto()
    STORING = auto()
    FINALIZING = auto()  # dead-letters, publishes, replies
    SETTLED = auto()
    ABANDONED = auto()  # this process does not settle the delivery: its lease expires


_NEXT: dict[State, frozenset[State]] = {
    State.RECEIVED: frozenset({State.ADMITTED, State.FINALIZING}),
    State.ADMITTED: frozenset({State.RUNNING, State.FINALIZING}),
    State.RUNNING: frozenset({State.ENCODING, State.FINALIZING}),
    State.ENCODING: frozenset({State.STORING, State.FINALIZING}),
    State.STORING: frozenset({State.FINALIZING}),
    State.FINALIZING: frozenset({State.SETTLED, State.ABANDONED}),
    State.SETTLED: frozenset(),
    State.ABANDONED: frozenset(),
}

FINAL = frozenset({State.SETTLED, State.ABANDONED})


class IllegalTransition(RuntimeError):  # noqa: N818 - named like the error in other state machines
    """A job was moved to a state that cannot follow its current state: a bug in the daemon."""


def advance(state: State, to: State) -> State:
    """Return the next state.

    Raises:
        IllegalTransition: `to` cannot follow `state`. No state follows a final state.
    """
    if to not in _NEXT[state]:
        raise IllegalTransition(f"{state.name} -> {to.name}")
    return to
