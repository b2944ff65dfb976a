"""The settlement table: one exception class per outcome of a request.

The class attributes of an outcome are its row of the table. A stage of a job raises an outcome, or
raises an exception of a port, which `classify_exception` turns into an outcome. `decide` adds what
depends on the delivery: the attempt, and whether the delivery is a copy. Nothing here does input or
output. docs/operating.md has the table, printed from these classes.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

import structlog

from consumer.inference.cancel_token import Stopped, StopReason
from consumer.inference.monitor import ThreadStalled
from consumer.ports.media import InputUnavailable
from consumer.ports.model import DeviceLost, ModelError, OutOfMemory, UnsupportedParameter
from generation_contracts import Failure, FailureCode, InvalidRequest

log = structlog.get_logger()

EXIT_DEVICE_LOST = 70  # EX_SOFTWARE of sysexits.h: the supervisor starts a new process


class Settlement(Enum):
    """How the worker settles the delivery."""

    ACK = "ack"
    NAK = "nak"  # requeue at once; the delivery counts as an attempt
    RETRY = "retry"  # store a copy that is queued after a delay, then ack
    REQUEUE = "requeue"  # requeue at once; the delivery does not count as an attempt
    TERM = "term"
    ABANDON = "abandon"  # stop renewing the lease; the server delivers the message again


class Publish(Enum):
    """Which terminal event the worker stores, and what it replies."""

    NONE = "none"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REPLY_STORED = "reply: stored event"  # the stored event again, to the reply subject only
    REPLY_FAILED = "reply: failed"  # to the reply subject only; the id belongs to another request


@dataclass(frozen=True)
class Decision:
    """What the worker does about an outcome.

    Attributes:
        settle: How the delivery is settled, after everything else is done.
        publish: Which event is published first.
        failure: Content of a failed event.
        dead_letter: Whether the original bytes are dead-lettered.
        counts: Whether the delivery counts as an attempt; only with RETRY.
        exit_code: Exit code with which the process must end; the supervisor starts a new process.
    """

    settle: Settlement
    publish: Publish = Publish.NONE
    failure: Failure | None = None
    dead_letter: bool = False
    counts: bool = True
    exit_code: int | None = None


class Outcome(Exception):
    """The outcome of a request, with its row of the settlement table.

    Attributes:
        settle: How the delivery is settled.
        publish: Which terminal event is published.
        code: Failure code of the event.
        dead_letter: Whether the original bytes are dead-lettered.
        exit_code: Exit code with which the process must end; None: it continues.
        retryable: Whether `Settlement.RETRY` replaces the row while attempts are left. The field
            `retryable` of a failed event is another statement: it follows from the code.
        counts: Whether the delivery counts as an attempt; only with `Settlement.RETRY`.
    """

    settle: ClassVar[Settlement]
    publish: ClassVar[Publish] = Publish.NONE
    code: ClassVar[FailureCode | None] = None
    dead_letter: ClassVar[bool] = False
    exit_code: ClassVar[int | None] = None
    retryable: ClassVar[bool] = False
    counts: ClassVar[bool] = True

    @property
    def failure(self) -> Failure | None:
        """Content of the failed event."""
        return None

    @property
    def decision(self) -> Decision:
        """The row of the table."""
        return Decision(
            settle=self.settle,
            publish=self.publish,
            failure=self.failure,
            dead_letter=self.dead_letter,
            counts=self.counts,
            exit_code=self.exit_code,
        )


class FailedOutcome(Outcome):
    """An outcome with a failed event.

    Args:
        message: One sentence for the sender; the class has a default.
        details: Values for programs.
    """

    settle = Settlement.ACK
    publish = Publish.FAILED
    code: ClassVar[FailureCode]
    message: ClassVar[str]

    def __init__(self, message: str | None = None, **details: Any) -> None:
        super().__init__(self.message if message is None else message)
        self.details = details

    @property
    def failure(self) -> Failure:
        """Content of the failed event."""
        return Failure.of(self.code, str(self), **self.details)


# -- the request has ended ------------------------------------------------------------------------


class Succeeded(Outcome):
    """Every output is stored, or the text is complete."""

    settle = Settlement.ACK
    publish = Publish.SUCCEEDED


class ResultExists(Outcome):
    """A terminal event for this id and this content is stored: a redelivery or a copy."""

    settle = Settlement.ACK
    publish = Publish.REPLY_STORED


class Cancelled(Outcome):
    """The sender cancelled the request, and the device has stopped."""

    settle = Settlement.ACK
    publish = Publish.CANCELLED


# -- the request has failed -----------------------------------------------------------------------


class IdConflict(FailedOutcome):
    """The request id belongs to a request with another content."""

    publish = Publish.REPLY_FAILED
    code = FailureCode.REQUEST_ID_CONFLICT
    message = "the request id belongs to another request, with other content"


class MalformedRequest(FailedOutcome):
    """The message is not JSON, or breaks the contract."""

    settle = Settlement.TERM
    code = FailureCode.INVALID_REQUEST
    dead_letter = True

    def __init__(self, message: str, problems: tuple[dict[str, str], ...] = ()) -> None:
        super().__init__(message, problems=list(problems))


class ParameterRefused(FailedOutcome):
    """The model lacks a parameter that the request sets."""

    code = FailureCode.UNSUPPORTED_PARAMETER

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message, parameter=parameter)


class InputMissing(FailedOutcome):
    """An input image cannot be fetched or read."""

    code = FailureCode.INPUT_UNAVAILABLE

    def __init__(self, message: str) -> None:
        super().__init__(message)


class DeadlineExceeded(FailedOutcome):
    """The deadline passed, before the run or during the run."""

    code = FailureCode.DEADLINE_EXCEEDED
    message = "the deadline has passed"


class MemoryExhausted(FailedOutcome):
    """The device has too little memory, with the memory-saving options too."""

    code = FailureCode.OUT_OF_MEMORY
    message = "the device has too little memory for this request"

    def __init__(self, tried: tuple[str, ...]) -> None:
        super().__init__(tried=list(tried))


class ResultTooLarge(FailedOutcome):
    """The terminal event exceeds the server's `max_payload`."""

    code = FailureCode.INTERNAL
    message = "the result is too large for the bus"


class NotSigned(FailedOutcome):
    """An output file cannot be signed, and `CONSUMER_C2PA` is `required`."""

    settle = Settlement.TERM
    code = FailureCode.INTERNAL
    dead_letter = True
    retryable = True
    message = "the output could not be signed"

    def __init__(self) -> None:
        super().__init__(cause="not_signed")


class StreamFull(FailedOutcome):
    """The request stream does not take the next request of a chain."""

    code = FailureCode.QUEUE_FULL
    message = "the queue is full: try again later"


class ModelFailed(FailedOutcome):
    """The model raised."""

    settle = Settlement.TERM
    code = FailureCode.MODEL_ERROR
    dead_letter = True
    retryable = True
    message = "the model failed on this request"

    def __init__(self, exception: str) -> None:
        super().__init__(exception=exception)


class OutputRefused(FailedOutcome):
    """The safety checker flagged an image, and `MODEL_SAFETY_POLICY` is `fail`."""

    code = FailureCode.MODEL_ERROR
    message = "the safety checker refused the output"

    def __init__(self) -> None:
        super().__init__(cause="safety_checker")


class InternalError(FailedOutcome):
    """The daemon raised an exception that no stage expects."""

    settle = Settlement.TERM
    code = FailureCode.INTERNAL
    dead_letter = True
    retryable = True
    message = "the worker failed on this request"

    def __init__(self, exception: str) -> None:
        super().__init__(exception=exception)


class WorkerLost(FailedOutcome):
    """The request was attempted `CONSUMER_MAX_ATTEMPTS` times, and each worker died."""

    settle = Settlement.TERM
    code = FailureCode.WORKER_LOST
    dead_letter = True
    message = "the workers that took this request were lost"


# -- the request is delivered again ---------------------------------------------------------------


class EarlierCopyInProgress(Outcome):
    """An earlier copy of the request is queued, or in progress in another worker."""

    settle = Settlement.RETRY
    counts = False


class DeliveriesExhausted(Outcome):
    """`max_deliver` is reached, but most deliveries were requeued: attempts are left."""

    settle = Settlement.RETRY


class Draining(Outcome):
    """The process ends before the job can finish."""

    settle = Settlement.REQUEUE


class HandedOver(Outcome):
    """The store does not answer this worker, and another worker is idle."""

    settle = Settlement.REQUEUE


class DeviceUnusable(Outcome):
    """The device has an error that persists in this process."""

    settle = Settlement.NAK
    exit_code = EXIT_DEVICE_LOST


class RunStalled(Outcome):
    """The model takes no step for `CONSUMER_STALL_TIMEOUT`, and its thread cannot be ended."""

    settle = Settlement.ABANDON
    exit_code = EXIT_DEVICE_LOST


# -- from exceptions to decisions -----------------------------------------------------------------

_STOPPED: dict[StopReason, type[Outcome]] = {
    StopReason.DEADLINE: DeadlineExceeded,
    StopReason.CANCEL: Cancelled,
    StopReason.DRAIN: Draining,
}


def classify_exception(error: Exception) -> Outcome:  # noqa: PLR0911 - one line per exception
    """Return the outcome for an exception of a stage."""
    match error:
        case Outcome():
            return error.with_traceback(None)  # the frames refer to tensors of the run
        case Stopped():
            return _STOPPED[error.reason]()
        case InvalidRequest():
            return MalformedRequest(str(error), error.problems)
        case UnsupportedParameter():
            return ParameterRefused(str(error), error.parameter)
        case InputUnavailable():
            return InputMissing(str(error))
        case OutOfMemory():
            return MemoryExhausted(error.tried)
        case DeviceLost():
            return DeviceUnusable()
        case ThreadStalled():
            return RunStalled()
        case ModelError():
            return ModelFailed(str(error))
        case _:
            log.error("worker_failed", exc_info=error)
            return InternalError(type(error).__name__)


def decide(outcome: Outcome, *, attempt: int, max_attempts: int, is_copy: bool = False) -> Decision:
    """Return what the worker does about an outcome.

    Args:
        outcome: Outcome of the last stage.
        attempt: Number of this attempt, from 1. Requeued deliveries are no attempts.
        max_attempts: Number of attempts that a retryable outcome has.
        is_copy: Whether the request id belongs to another delivery. A copy may send a reply and
            leave a dead letter; it stores no terminal event.
    """
    if outcome.retryable and attempt < max_attempts:
        return Decision(Settlement.RETRY)
    decision = outcome.decision
    if is_copy and decision.publish is Publish.FAILED:
        return replace(decision, publish=Publish.REPLY_FAILED)
    if is_copy and decision.publish is Publish.CANCELLED:
        # The owner of the id is being stopped; the reply to the copy is the owner's event.
        return Decision(Settlement.RETRY, counts=False)
    return decision


def outcome_label(decision: Decision | None) -> str:
    """Return the value of the label `outcome` in metrics, logs and traces.

    Args:
        decision: The decision that was carried out; None if the job ended without one.
    """
    if decision is None or decision.settle is Settlement.ABANDON:
        return "abandoned"
    if decision.settle in {Settlement.NAK, Settlement.RETRY, Settlement.REQUEUE}:
        return "requeued"
    if decision.failure is not None:
        return str(decision.failure.code)
    if decision.publish is Publish.REPLY_STORED:
        return "already_done"
    return str(decision.publish.value)
