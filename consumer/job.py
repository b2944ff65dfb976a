"""A job's states, and what each outcome means: pure, no input or output.

`decide` is the settlement table of the design as one function. It returns data and never acts;
`execution` carries the decision out, in one place.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto

from generation_contracts import Failure, FailureCode

EXIT_DEVICE_LOST = 70  # EX_SOFTWARE of sysexits.h: the supervisor starts a new process


class State(Enum):
    """How far a job has come. Order is the order of the stages."""

    RECEIVED = auto()
    ADMITTED = auto()
    RUNNING = auto()
    ENCODING = auto()
    STORING = auto()
    CONCLUDING = auto()  # publishing, replying, putting aside
    SETTLED = auto()
    ABANDONED = auto()  # not settled by this process: the lease runs out


_NEXT: dict[State, frozenset[State]] = {
    State.RECEIVED: frozenset({State.ADMITTED, State.CONCLUDING}),
    State.ADMITTED: frozenset({State.RUNNING, State.CONCLUDING}),
    State.RUNNING: frozenset({State.ENCODING, State.CONCLUDING}),
    State.ENCODING: frozenset({State.STORING, State.CONCLUDING}),
    State.STORING: frozenset({State.CONCLUDING}),
    State.CONCLUDING: frozenset({State.SETTLED, State.ABANDONED}),
    State.SETTLED: frozenset(),
    State.ABANDONED: frozenset(),
}


class IllegalTransition(RuntimeError):  # noqa: N818 - it names what was tried
    """A job was moved to a state that cannot follow its own: a fault in the daemon."""


def advance(state: State, to: State) -> State:
    """The next state.

    Raises:
        IllegalTransition: `to` cannot follow; above all, nothing follows a settlement.
    """
    if to not in _NEXT[state]:
        raise IllegalTransition(f"{state.name} -> {to.name}")
    return to


# -- what can come of a stage ---------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """Every output is stored (or, for text, in hand)."""


@dataclass(frozen=True)
class AlreadyDone:
    """A terminal event for this id and this content exists: a redelivery or a second copy."""


@dataclass(frozen=True)
class Conflict:
    """The id belongs to a request with another content, which has ended or came before."""


@dataclass(frozen=True)
class EarlierCopy:
    """An earlier copy of the same request is queued, or in progress in another worker."""


@dataclass(frozen=True)
class Malformed:
    """Not JSON, or not the contract."""

    message: str
    problems: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Unsupported:
    """The model lacks a parameter that the request sets."""

    parameter: str
    message: str


@dataclass(frozen=True)
class InputMissing:
    """An input picture cannot be had or read."""

    message: str


@dataclass(frozen=True)
class Expired:
    """The deadline passed, before the run or during it."""


@dataclass(frozen=True)
class Cancelled:
    """Withdrawn by the sender, and the device has stopped."""


@dataclass(frozen=True)
class ModelRaised:
    """The model raised; the name of the exception's class is safe to show."""

    exception: str


@dataclass(frozen=True)
class RanOutOfMemory:
    """The device's memory did not suffice."""

    saved_memory: bool  # whether the memory-saving options were on already
    tried: tuple[str, ...] = ()  # what was turned on to save memory, in words for the sender


@dataclass(frozen=True)
class LostDevice:
    """A sticky device error."""


@dataclass(frozen=True)
class Stalled:
    """No step for `stall_timeout`: the inference thread hangs and cannot be ended."""


@dataclass(frozen=True)
class HandedOver:
    """The store does not answer this worker, and another worker is free to do the request."""


@dataclass(frozen=True)
class WorkerLost:
    """Delivered more often than is allowed: it killed its workers."""


@dataclass(frozen=True)
class DeliveriesUsedUp:
    """The server delivers it no more, and not for its own attempts: most were requeued."""


@dataclass(frozen=True)
class Draining:
    """The process is to end, and the job cannot be finished within the grace."""


@dataclass(frozen=True)
class ResultTooLarge:
    """The event does not fit the server's `max_payload`."""


@dataclass(frozen=True)
class QueueIsFull:
    """The next request of a chain finds no place in the queue."""


@dataclass(frozen=True)
class Broken:
    """The daemon itself raised where nothing may raise."""

    exception: str


Outcome = (
    Done
    | AlreadyDone
    | Conflict
    | EarlierCopy
    | Malformed
    | Unsupported
    | InputMissing
    | Expired
    | Cancelled
    | ModelRaised
    | RanOutOfMemory
    | LostDevice
    | Stalled
    | HandedOver
    | WorkerLost
    | DeliveriesUsedUp
    | Draining
    | ResultTooLarge
    | QueueIsFull
    | Broken
)


# -- what is done about it ------------------------------------------------------------------------


class Settlement(Enum):
    """What becomes of the delivery."""

    ACK = auto()
    NAK = auto()  # requeue at once: an attempt that failed, it counts
    RETRY = auto()  # queue a copy after a delay, then acknowledge
    RELEASE = auto()  # requeue at once: no attempt, it does not count
    TERM = auto()
    KEEP = auto()  # not yet: the heartbeat goes on and the stage is tried again
    ABANDON = auto()  # never by this process: the heartbeat stops


class Publish(Enum):
    """Which terminal event is published."""

    NONE = auto()
    SUCCEEDED = auto()
    FAILED = auto()
    CANCELLED = auto()
    STORED_AGAIN = auto()  # the one that exists already, to the reply subject only
    FAILED_REPLY_ONLY = auto()  # the stored event belongs to another request


@dataclass(frozen=True)
class Decision:
    """What an outcome means.

    Attributes:
        settlement: What becomes of the delivery, after everything else is done.
        publish: Which event goes out first.
        failure: What a failed event says.
        dead_letter: Whether the original bytes are put aside.
        counts: With RETRY: whether this delivery was an attempt.
        save_memory: Run again at once, with the memory-saving options; only with KEEP.
        exit_code: Ends the process, readiness false, for the supervisor to start a new one.
    """

    settlement: Settlement
    publish: Publish = Publish.NONE
    failure: Failure | None = None
    dead_letter: bool = False
    counts: bool = True
    save_memory: bool = False
    exit_code: int | None = None


def decide(outcome: Outcome, *, attempt: int, max_attempts: int, is_copy: bool = False) -> Decision:
    """The settlement table.

    Args:
        outcome: What came of the job's last stage.
        attempt: How often the request has been attempted, this time included; from 1. What a
            worker requeued on purpose was no attempt.
        max_attempts: How often a model that raises is tried.
        is_copy: Whether the request id belongs to another delivery: this one may reply and leave
            a dead letter, but it must not end the id.
    """
    decision = _decide(outcome, attempt=attempt, max_attempts=max_attempts)
    if not is_copy:
        return decision
    match decision.publish:
        case Publish.FAILED:
            return replace(decision, publish=Publish.FAILED_REPLY_ONLY)
        case Publish.CANCELLED:
            # The delivery that the id belongs to is being stopped; its event answers this one.
            return Decision(Settlement.RETRY, counts=False)
        case _:
            return decision


def _decide(  # noqa: C901, PLR0911 - one row of the table each
    outcome: Outcome, *, attempt: int, max_attempts: int
) -> Decision:
    match outcome:
        case Done():
            return Decision(Settlement.ACK, Publish.SUCCEEDED)
        case AlreadyDone():
            return Decision(Settlement.ACK, Publish.STORED_AGAIN)
        case Cancelled():
            return Decision(Settlement.ACK, Publish.CANCELLED)
        case RanOutOfMemory(saved_memory=False):
            return Decision(Settlement.KEEP, save_memory=True)
        case LostDevice():
            return Decision(Settlement.NAK, exit_code=EXIT_DEVICE_LOST)
        case Stalled():
            return Decision(Settlement.ABANDON, exit_code=EXIT_DEVICE_LOST)
        case Draining() | HandedOver():
            return Decision(Settlement.RELEASE)
        case EarlierCopy():
            return Decision(Settlement.RETRY, counts=False)
        case DeliveriesUsedUp():
            return Decision(Settlement.RETRY)
        case ModelRaised() | Broken() if attempt < max_attempts:
            return Decision(Settlement.RETRY)
        case _:
            return _failed(outcome)


def _failed(outcome: Outcome) -> Decision:
    failure = _failure(outcome)
    match outcome:
        case Conflict():
            return Decision(Settlement.ACK, Publish.FAILED_REPLY_ONLY, failure)
        case Malformed() | ModelRaised() | Broken() | WorkerLost():
            return Decision(Settlement.TERM, Publish.FAILED, failure, dead_letter=True)
        case _:
            return Decision(Settlement.ACK, Publish.FAILED, failure)


def _failure(outcome: Outcome) -> Failure:  # noqa: C901, PLR0911 - the same
    match outcome:
        case Malformed(message, problems):
            return Failure.of(FailureCode.INVALID_REQUEST, message, problems=list(problems))
        case Unsupported(parameter, message):
            return Failure.of(FailureCode.UNSUPPORTED_PARAMETER, message, parameter=parameter)
        case InputMissing(message):
            return Failure.of(FailureCode.INPUT_UNAVAILABLE, message)
        case Conflict():
            return Failure.of(
                FailureCode.REQUEST_ID_CONFLICT,
                "the request id belongs to another request, with other content",
            )
        case Expired():
            return Failure.of(FailureCode.DEADLINE_EXCEEDED, "the deadline has passed")
        case RanOutOfMemory(tried=tried):
            return Failure.of(
                FailureCode.OUT_OF_MEMORY,
                "the device has too little memory for this request",
                tried=list(tried),
            )
        case ModelRaised(exception):
            return Failure.of(
                FailureCode.MODEL_ERROR, "the model failed on this request", exception=exception
            )
        case WorkerLost():
            return Failure.of(
                FailureCode.WORKER_LOST, "the workers that took this request were lost"
            )
        case ResultTooLarge():
            return Failure.of(FailureCode.INTERNAL, "the result is too large for the bus")
        case QueueIsFull():
            return Failure.of(FailureCode.QUEUE_FULL, "the queue is full: try again later")
        case Broken(exception):
            return Failure.of(
                FailureCode.INTERNAL, "the worker failed on this request", exception=exception
            )
        case _:
            raise AssertionError(f"{outcome} is no failure")  # decide() has handled every other one
