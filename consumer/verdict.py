"""What a stage raises, as an outcome, and what a decision is called in logs and metrics."""

import structlog

from consumer import job as outcomes
from consumer.job import Decision, Outcome, Publish, Settlement
from consumer.ports.media import InputUnavailable
from consumer.ports.model import DeviceLost, ModelError, OutOfMemory, UnsupportedParameter
from consumer.run import Hanging, Reason, Stopped
from generation_contracts import InvalidRequest

log = structlog.get_logger()


class ResultExists(Exception):  # noqa: N818 - not an error
    """A terminal event for the request's id is stored already."""


class IdConflict(Exception):  # noqa: N818 - the contract's word: request_id_conflict
    """The request id belongs to a request that asks for something else."""


class EarlierCopyInProgress(Exception):  # noqa: N818 - a state of the request
    """An earlier copy of the request is queued, or in progress in another worker."""


class StoreIsAway(Exception):  # noqa: N818 - a state of the store
    """The store does not answer this worker, and another worker is free to do the request."""


class TooManyDeliveries(Exception):  # noqa: N818 - a state of the request
    """The request killed the workers that took it."""


_STOPPED: dict[Reason, Outcome] = {
    Reason.DEADLINE: outcomes.Expired(),
    Reason.CANCEL: outcomes.Cancelled(),
    Reason.DRAIN: outcomes.Draining(),
}


def outcome_of(error: Exception) -> Outcome:  # noqa: C901, PLR0911, PLR0912 - one row of the table each
    """The outcome that an exception of a stage stands for."""
    match error:
        case InvalidRequest():
            return outcomes.Malformed(str(error), error.problems)
        case ResultExists():
            return outcomes.AlreadyDone()
        case IdConflict():
            return outcomes.Conflict()
        case EarlierCopyInProgress():
            return outcomes.EarlierCopy()
        case StoreIsAway():
            return outcomes.HandedOver()
        case TooManyDeliveries():
            return outcomes.WorkerLost()
        case Stopped():
            return _STOPPED[error.reason]
        case UnsupportedParameter():
            return outcomes.Unsupported(error.parameter, str(error))
        case InputUnavailable():
            return outcomes.InputMissing(str(error))
        case OutOfMemory():  # the first time was seen to in `device`
            return outcomes.RanOutOfMemory(saved_memory=True, tried=error.tried)
        case DeviceLost():
            return outcomes.LostDevice()
        case Hanging():
            return outcomes.Stalled()
        case ModelError():
            return outcomes.ModelRaised(str(error))
        case _:
            log.error("worker_failed", exc_info=error)
            return outcomes.Broken(type(error).__name__)


def name_of(decision: Decision | None) -> str:
    """One word for logs and metrics; None is a job that was given up."""
    if decision is None or decision.settlement is Settlement.ABANDON:
        return "abandoned"
    if decision.settlement in {Settlement.NAK, Settlement.RETRY, Settlement.RELEASE}:
        return "given_back"
    if decision.failure is not None:
        return str(decision.failure.code)
    return {
        Publish.SUCCEEDED: "succeeded",
        Publish.CANCELLED: "cancelled",
        Publish.STORED_AGAIN: "already_done",
    }[decision.publish]
