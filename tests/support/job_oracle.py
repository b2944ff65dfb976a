"""A test oracle: it compares one job of one worker with the settlement table.

The oracle implements the table a second time, without code of the daemon. `outcomes` returns the
possible outcomes of a job after all events so far. `ROWS` lists what the worker must do for each.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from consumer.inference.cancel_token import StopReason
from consumer.inference.monitor import DRAIN_STEP_TIMEOUT
from consumer.jobs.executor import RELEASE_TIMEOUT
from consumer.ports.bus import DeadLetter, MessageTooLarge, ResultEvent
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    ImageArtifact,
    StartedEvent,
    SucceededEvent,
)
from tests.support.memory_ports import MemoryDelivery
from tests.support.simulated_requests import Ending, Sent
from tests.support.stepped_world import SteppedRun, SteppedWorker, SteppedWorld

ATTEMPTS = 3  # largest number of attempts
STALL = 30.0  # seconds without a step
EXIT = 70  # exit code after a lost device


@dataclass(frozen=True)
class Row:
    """What the worker must do: the terminal event, the settlement, and their side effects."""

    event: str | None  # succeeded, cancelled, or a failure code
    settlement: str | None
    letter: str = ""  # code of the dead letter
    exit_code: int | None = None
    retried: bool = False  # whether the worker stores a delayed retry


def _dead_lettered(code: str, *, event: bool = True) -> Row:
    return Row(code if event else None, f"term {code}", letter=code)


ROWS = {
    "succeeded": Row("succeeded", "ack"),
    "result exists": Row(None, "ack"),
    "conflict": Row(None, "ack"),
    "malformed": _dead_lettered("invalid_request"),
    "malformed copy": _dead_lettered("invalid_request", event=False),
    "unsupported copy": Row(None, "ack"),
    "input missing copy": Row(None, "ack"),
    "expired copy": Row(None, "ack"),
    "worker lost copy": _dead_lettered("worker_lost", event=False),
    "earlier copy": Row(None, "ack", retried=True),
    "unsupported": Row("unsupported_parameter", "ack"),
    "input missing": Row("input_unavailable", "ack"),
    "expired": Row("deadline_exceeded", "ack"),
    "cancelled": Row("cancelled", "ack"),
    "raised": Row(None, "ack", retried=True),
    "raised at the last attempt": _dead_lettered("model_error"),
    "internal error": Row(None, "ack", retried=True),
    "internal error at the last attempt": _dead_lettered("internal"),
    "out of memory": Row("out_of_memory", "ack"),
    "device lost": Row(None, "nak", exit_code=EXIT),
    "stalled": Row(None, None, exit_code=EXIT),
    "worker lost": _dead_lettered("worker_lost"),
    "deliveries exhausted": Row(None, "ack", retried=True),
    "in progress": Row(None, None),
    "drained": Row(None, "requeue"),
}
STOPPED = {
    StopReason.DEADLINE: "expired",
    StopReason.CANCEL: "cancelled",
    StopReason.DRAIN: "drained",
}
FINALIZING = frozenset(
    {"dead_letter", "publish_result", "reply", "retry_later", "ack", "nak", "term", "requeue"}
)
# The calls that read the state of a request.
UNREAD = frozenset({"marked_uncounted", "was_cancelled", "find_result", "older", "owner"})
# The outcomes with a reply and without a stored event.
REPLIED_ONLY = frozenset({"conflict", *(outcome for outcome in ROWS if outcome.endswith(" copy"))})
REPLIED_ONLY -= {"earlier copy"}


@dataclass(eq=False)
class RunRecord:
    """One run of the model."""

    save_memory: bool
    last_step: float  # seconds on the world's clock
    ending: Ending | Literal["interrupted"] | None = None
    stop_requested_before: bool = False  # whether a stop was requested before the run ended


class JobOracle:
    """Implements `stepped_world.Watcher`, and collects all violations in `violations`.

    Args:
        world: The world of the worker.
        worker: The worker.
        delivery: The delivery.
        sent: All requests, by the sequence at which they were published.
        requeued: Numbers of the deliveries that workers requeued without an attempt. Shared.
        exhausted: Whether the delivery is max-deliver exhausted.
        others: Returns the oracles of the other jobs in progress.
    """

    def __init__(
        self,
        world: SteppedWorld,
        worker: SteppedWorker,
        delivery: MemoryDelivery,
        sent: Mapping[int, Sent],
        requeued: set[int],
        *,
        exhausted: bool,
        others: Callable[[], Sequence["JobOracle"]],
    ) -> None:
        self.world = world
        self.worker = worker
        self.delivery = delivery
        self.sent = sent[delivery.origin]
        self.violations: list[str] = []
        self.runs: list[RunRecord] = []
        self.cut_off = False  # whether the worker's client has closed its connection to the bus
        self._forced: float | None = None  # when the task was cancelled, on the world's clock
        self._requeued = requeued
        self._releases = delivery.uncounted + (0 if exhausted else len(requeued))
        self._exhausted = exhausted
        self._others = others
        self._published_by_all = sent
        self._older: MemoryDelivery | None = None  # an older delivery with the same id
        self._owner: str | None = None  # the digest that the id is marked with
        self._in_progress_elsewhere = False  # whether another worker runs the request
        self._retried = False
        self._stop_requests: list[tuple[float, StopReason]] = []
        self._admission: list[ResultEvent | None] = []  # the return values of `find_result`
        self._reached: set[str] = set()  # the calls so far, and the next one
        self._decided: set[str] | None = None  # the outcomes at the start of the finalization
        self._unread = False  # whether a read of the request state failed
        self._event: str | None = None
        self._fenced = False
        self._letter = ""
        self._too_large = False
        self._outputs: list[ImageArtifact] = []  # the stored outputs
        self._discarded: set[str] = set()  # keys of deleted outputs
        self._replies_sent = 0
        self._settlements: list[str] = []

    @property
    def attempt(self) -> int:
        """Number of the attempt; requeued deliveries do not count."""
        return self.delivery.attempt - self._releases

    # -- actions of the test ----------------------------------------------------------------------

    def force(self) -> None:
        """Record that the task is cancelled. It may only requeue the delivery."""
        self._forced = self.world.loop.time()

    def request_stop(self, reason: StopReason) -> None:
        """Record a request to stop the job."""
        self._stop_requests.append((self.world.loop.time(), reason))

    @property
    def exhausted(self) -> bool:
        """Whether the delivery is max-deliver exhausted."""
        return self._exhausted

    @property
    def in_progress(self) -> bool:
        """Whether the id of an exhausted delivery is in progress elsewhere."""
        return self._exhausted and (self._older is not None or self._in_progress_elsewhere)

    @property
    def finalizing(self) -> bool:
        """Whether the worker has started to finalize the job."""
        return self._decided is not None

    @property
    def forced(self) -> bool:
        """Whether the task of the job has been cancelled."""
        return self._forced is not None

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.sent.deadline is not None and self.sent.deadline <= self.world.now()

    @property
    def stop_reason(self) -> StopReason | None:
        """The reason of the first request to stop the job, if any."""
        requests = list(self._stop_requests)
        if self.sent.deadline is not None and self.late:
            ago = (self.world.now() - self.sent.deadline).total_seconds()
            requests.insert(0, (self.world.loop.time() - ago, StopReason.DEADLINE))
        return min(requests, key=lambda one: one[0])[1] if requests else None

    # -- the expected outcome ---------------------------------------------------------------------

    def outcomes(self) -> set[str]:  # noqa: C901, PLR0911, PLR0912 - one branch for each row
        """Return every possible outcome of the job, or none while the job continues."""
        if self._decided is not None:
            return self._decided
        stopped = {STOPPED[self.stop_reason]} if self.stop_reason else set()
        if self._unread:
            last = self.attempt >= ATTEMPTS
            return {"internal error at the last attempt" if last else "internal error"}
        if self.in_progress:
            return {"in progress"}
        if self.sent.kind == "malformed":
            return self._before_the_run({"malformed"})
        if not self._admission:
            return set()
        if self._admission[0] is not None:
            same = self._admission[0].request_digest == self.sent.digest
            return {"result exists" if same else "conflict"}
        before = self._older and self._published_by_all[self._older.origin].digest
        if (self._owner or before or self.sent.digest) != self.sent.digest:
            return {"conflict"}
        if before == self.sent.digest:
            return {"earlier copy"}
        if self._exhausted and self.attempt < ATTEMPTS:
            return {"deliveries exhausted"}
        if self._exhausted or self.attempt > ATTEMPTS:
            return self._before_the_run({"worker lost"})
        if self.runs:
            return self._of_the_run(self.runs[-1], stopped)
        if self.late:
            stopped.add("expired")
        if self.sent.kind == "missing":  # a stop can end the wait for an unavailable store
            return self._before_the_run({"input missing"} | stopped)
        if self.sent.kind == "unsupported":
            return self._before_the_run({"expired"} if self.late else {"unsupported"})
        return self._before_the_run(stopped)

    def _before_the_run(self, outcomes: set[str]) -> set[str]:
        """Return the outcomes of a failure before the run, if another delivery may own the id."""
        if not self._is_before():
            return outcomes
        copies = {f"{outcome} copy" for outcome in outcomes - {"cancelled", "drained"}}
        return copies | (outcomes & {"cancelled", "drained"})

    def _is_before(self) -> bool:
        """Whether another delivery owns the id."""
        if self._owner is None:
            return self._older is not None
        if self._owner != self.sent.digest or not self.delivery.carried:
            return True
        return bool(self._older and self._has_same_digest(self._older))

    def _of_the_run(  # noqa: C901, PLR0911 - one branch for each row
        self, ran: RunRecord, stopped: set[str]
    ) -> set[str]:
        last = self.attempt >= ATTEMPTS
        raised = {"raised at the last attempt" if last else "raised"}
        broken = {"internal error at the last attempt" if last else "internal error"}
        match ran.ending:
            case None:
                return self._of_a_run_without_end(ran)
            case "interrupted":
                return stopped
            case "success" | "varied" | "no output" | "invalid output" if ran.stop_requested_before:
                return stopped
            case "success" | "varied":
                return {"succeeded"} | stopped  # a stop can end the wait for an unavailable store
            case "no output":
                return raised | stopped
            case "invalid output":
                return broken | stopped
            case "raised":
                return raised
            case "internal error":
                return broken
            case "out of memory":
                return {"out of memory"} if len(self.runs) > 1 else set()
            case "device lost":
                return {"device lost"}
            case "unsupported":
                return {"unsupported"}

    def _of_a_run_without_end(self, ran: RunRecord) -> set[str]:
        now = self.world.loop.time()
        outcomes = {"stalled"} if now - ran.last_step > STALL else set()
        waited = now - self._stop_requests[0][0] if self._stop_requests else 0.0
        if self.stop_reason is StopReason.DRAIN and waited > DRAIN_STEP_TIMEOUT:
            outcomes.add("drained")
        return outcomes

    def rows(self) -> list[Row]:
        """Return every row of the table that the worker may follow."""
        rows = [ROWS[outcome] for outcome in self.outcomes()]
        if self._too_large:
            return [replace(row, event="internal", settlement="ack") for row in rows if row.event]
        return rows

    # -- calls of the worker ----------------------------------------------------------------------

    def reaches(self, call: str, arguments: tuple[Any, ...]) -> None:
        self._reached.add(call)
        if call == "publish_progress" and isinstance(arguments[0], StartedEvent):
            self._check(
                not self.outcomes(), f"a run is reported as started after {self.outcomes()}"
            )
        if call in FINALIZING and self._decided is None:
            self._decided = self.outcomes()

    def before(self, call: str, arguments: tuple[Any, ...]) -> None:
        match call, *arguments:
            case "publish_result", event:
                reported = "publish_progress" in self._reached
                self._check(reported or not self.runs, "no started event of a run that has ended")
                self._publishes(event)
            case "dead_letter", _, _, letter:
                self._dead_letters(letter)
            case "reply", _, event:
                self._replies(event)
            case "discard", artifact:
                self._discarded.add(artifact.key)
                published = artifact.key in keys_of(self._stored_event())
                self._check(not published, f"{artifact.key} is deleted, but an event mentions it")
            case "retry_later", *_:
                self._retried = True
                self._may("a retry", lambda row: row.retried)
            case (("ack" | "nak" | "term" | "requeue"), *reason):
                self._settles(" ".join([call, *reason]))
            case _:
                pass

    def after(self, call: str, arguments: tuple[Any, ...], answer: object) -> None:
        if call == "find_result" and "publish_result" not in self._reached:
            self._admission.append(answer)  # type: ignore[arg-type] # an event or None
        match call, answer:
            case "older", MemoryDelivery():
                self._older = answer
            case "owner", str() | None:
                self._owner = answer
            case "is_in_progress", True:
                self._in_progress_elsewhere = True
            case "marked_uncounted", _:
                self._releases = self.delivery.uncounted + len(self._requeued)
            case "publish_result", _:
                self._fenced = answer != arguments[0]

    def returns(self, call: str, answer: object) -> None:
        if isinstance(answer, ImageArtifact):
            self._outputs.append(answer)

    def refused(self, call: str, error: Exception) -> None:
        if call == "publish_result" and isinstance(error, MessageTooLarge):
            self._too_large = True
            self._event = None
        if call in UNREAD and not self.finalizing:
            self._unread = True
        if call == "marked_uncounted":
            # If the marks cannot be read, every delivery counts.
            self._releases = self.delivery.uncounted

    def run_begins(self, run: SteppedRun) -> None:
        self._check(self.attempt <= ATTEMPTS, f"the model runs in attempt {self.attempt}")
        self._check(not self._exhausted, "the model runs for an exhausted delivery")
        self._check(self._admission[:1] == [None], "the model runs although a result exists")
        rivals = [one for one in self._others() if one.runs and self._is_rival(one)]
        same = all(one.sent.digest == self.sent.digest for one in rivals)
        self._check(same, "the model runs for two contents under one id")
        endings = [ran.ending for ran in self.runs]
        self._check(endings in ([], ["out of memory"]), f"the model runs after {endings}")
        self._check(run.save_memory == bool(self.runs), "only the second run must save memory")
        self.runs.append(RunRecord(run.save_memory, self.world.loop.time()))

    def ended(self, exit_code: int | None) -> None:
        """Check the end of a job that was not cancelled."""
        self._check(len(self._settlements) <= 1, f"settled as {self._settlements}")
        if self.cut_off:
            return
        settlement = self._settlements[0] if self._settlements else None
        did = Row(self._event, settlement, self._letter, exit_code, self._retried)
        rows = self.rows()
        if self.exhausted:  # the message stays in its stream: there is no delivery to requeue
            rows = [
                replace(row, settlement=None) if row.settlement in {"nak", "requeue"} else row
                for row in rows
            ]
        self._check(did in rows, f"{did} after {self.outcomes()}")
        if self.in_progress:
            return
        reported = self.worker.observer.outcomes[-1]
        abandoned = (reported == "abandoned") == (settlement is None)
        self._check(abandoned or self.exhausted, f"reported as {reported}")
        ends = settlement not in {None, "nak", "requeue"} and not self._retried
        self._check(self._replies_sent == int(self.sent.reply and ends), "wrong number of replies")
        left = {one.key for one in self._outputs} - keys_of(self._stored_event()) if ends else set()
        self._check(self._discarded == left, f"{self._discarded} removed instead of {left}")

    def was_cancelled(self) -> None:
        """Check that a cancelled task requeued its delivery."""
        if self._forced is None:
            self._check(False, "cancelled without a request")  # noqa: FBT003
            return
        waited = self.world.loop.time() - self._forced
        requeued = bool(self._settlements) or waited >= RELEASE_TIMEOUT or self._exhausted
        self._check(requeued, "not requeued")

    # -- checks -----------------------------------------------------------------------------------

    def _check(self, condition: bool, message: str) -> None:
        if not condition:
            self.violations.append(f"{self.worker.name}, {self.sent}: {message}")

    def _may(self, what: str, allowed: Callable[[Row], bool]) -> None:
        if not self.forced and not self.cut_off:  # calls of a cut-off worker have no effect
            rows = self.rows()
            self._check(any(map(allowed, rows)), f"{what} after {self.outcomes()}")

    def _publishes(self, event: ResultEvent) -> None:
        kind = kind_of(event)
        self._event = kind
        self._may(f"{kind} is published", lambda row: row.event == kind)
        # Once a run has started, only that run or a cancellation may publish the terminal event.
        running = [one for one in self._others() if one.runs and self._is_rival(one)]
        may_end = (
            not running or isinstance(event, CancelledEvent) or self._stored_event() is not None
        )
        self._check(may_end, f"{kind} is published while the model runs for {running}")
        self._check(event.request_digest == self.sent.digest, f"{kind} for another request")
        if isinstance(event, SucceededEvent):
            for output in event.outputs:
                # If an event is stored, the bus refuses this event. Its outputs may be deleted.
                stored = self._stored(output) or self._stored_event() is not None
                self._check(stored, f"{output} is not in the store")
        needs = any(row.event == kind and row.letter for row in self.rows())
        if needs and not self.forced:
            self._check(self._is_dead_lettered(), f"{kind} is published before the dead letter")

    def _dead_letters(self, letter: DeadLetter) -> None:
        self._letter = letter.code
        self._may(f"a dead letter {letter.code}", lambda row: row.letter == letter.code)
        late = self._event is not None and not self.cut_off
        self._check(not late, "the dead letter comes after the event")
        self._check(
            letter.request_id == self.sent.request_id, f"a dead letter of {letter.request_id}"
        )

    def _replies(self, event: ResultEvent) -> None:
        self._replies_sent += 1
        stored = self._stored_event()
        if self.outcomes() & REPLIED_ONLY:
            matches = isinstance(event, FailedEvent) and event.request_digest == self.sent.digest
            self._check(matches, f"the reply is the event of another request: {event}")
        elif stored is None:
            self._check(False, "a reply before a terminal event is stored")  # noqa: FBT003
        elif stored.request_digest == self.sent.digest:
            self._check(event == stored, f"a reply other than the stored event: {event}")
        else:
            self._check(
                isinstance(event, FailedEvent) and event.request_digest == self.sent.digest,
                f"the reply is the event of another request: {event}",
            )

    def _settles(self, how: str) -> None:
        if how == "requeue" and not self.world.bus.unavailable and not self.cut_off:
            self._requeued.add(self.delivery.deliveries)
        self._check(self.forced or not self._settlements, f"{how} after {self._settlements}")
        self._settlements.append(how)
        if self.forced:
            self._check(how == "requeue", f"{how} of a cancelled task")
            return
        self._may(f"settled by {how}", lambda row: row.settlement == how)
        if how.startswith(("ack", "term")):
            stored = self._stored_event()
            known = stored is not None and (
                stored.request_digest == self.sent.digest or self._fenced
            )
            replied_only = bool(self.outcomes() & REPLIED_ONLY)
            self._check(
                known or self._retried or replied_only, f"{how} before the terminal event is stored"
            )
        if how.startswith("term"):
            self._check(self._is_dead_lettered(), f"{how} without a dead letter")

    def _is_rival(self, other: "JobOracle") -> bool:
        """Whether another delivery has the same id and is of another message."""
        return (
            other.sent.request_id == self.sent.request_id
            and other.delivery.origin != self.delivery.origin
        )

    def _has_same_digest(self, other: MemoryDelivery) -> bool:
        return self._published_by_all[other.origin].digest == self.sent.digest

    def _stored_event(self) -> ResultEvent | None:
        return self.world.events.stored(self.world.task, self.sent.request_id)

    def _is_dead_lettered(self) -> bool:
        return self.delivery.stream_sequence in self.world.events.dead_lettered

    def _stored(self, output: object) -> bool:
        if not isinstance(output, ImageArtifact):
            return True
        data = self.world.artifacts.objects.get(output.key, b"")
        right_key = f"/{self.sent.request_id}/" in output.key
        return right_key and hashlib.sha256(data).hexdigest() == output.sha256


def keys_of(event: ResultEvent | None) -> set[str]:
    """Return the keys of the objects that an event mentions."""
    outputs = event.outputs if isinstance(event, SucceededEvent) else ()
    return {output.key for output in outputs if isinstance(output, ImageArtifact)}


def kind_of(event: ResultEvent) -> str:
    """Return the value of `Row.event` for an event."""
    match event:
        case SucceededEvent():
            return "succeeded"
        case CancelledEvent():
            return "cancelled"
        case FailedEvent():
            return str(event.failure.code)
