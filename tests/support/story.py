"""One delivery in one worker, observed from outside and compared with the settlement table.

The table is written here a second time, without any code of the daemon: `outcomes` returns what can
have come of a job after everything that happened to it, and `ROWS` what the worker must do then.
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
from tests.support.stepped_world import SteppedRun, SteppedWorker, SteppedWorld
from tests.support.wishes import Ending, Sent

ATTEMPTS = 3  # that the model gets
STALL = 30.0  # seconds without a step
EXIT = 70  # of a worker whose device is lost


@dataclass(frozen=True)
class Row:
    """What the worker must do: its terminal event, the settlement, and what goes with them."""

    event: str | None  # succeeded, cancelled, or the code of a failure
    settlement: str | None
    letter: str = ""  # code of the dead letter
    exit_code: int | None = None
    retried: bool = False  # whether a copy is queued again after a delay


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
    "raised for the last time": _dead_lettered("model_error"),
    "broken": Row(None, "ack", retried=True),
    "broken for the last time": _dead_lettered("internal"),
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
# The calls that the worker needs to know the state of a request.
UNREAD = frozenset({"marked_uncounted", "was_cancelled", "find_result", "older", "owner"})
# The outcomes with a reply and without a stored event.
REPLIED_ONLY = frozenset({"conflict", *(outcome for outcome in ROWS if outcome.endswith(" copy"))})
REPLIED_ONLY -= {"earlier copy"}


@dataclass(eq=False)
class Ran:
    """One run of the model."""

    save_memory: bool
    last_step: float  # when, on the world's clock
    ending: Ending | Literal["interrupted"] | None = None
    asked_before: bool = False  # whether the job was asked to stop before the run ended


class Story:
    """Implements `stepped_world.Watcher`; collects broken promises in `broken`.

    Args:
        world: The world of the worker.
        worker: The worker.
        delivery: The delivery.
        sent: All requests, by the sequence at which they were published.
        requeued: Numbers of the deliveries that workers requeued without an attempt; shared.
        exhausted: Whether the delivery is max-deliver exhausted.
        others: Returns the stories of the other deliveries in progress.
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
        others: Callable[[], Sequence["Story"]],
    ) -> None:
        self.world = world
        self.worker = worker
        self.delivery = delivery
        self.sent = sent[delivery.origin]
        self.broken: list[str] = []
        self.runs: list[Ran] = []
        self.cut_off = False  # the worker's client has given up on the bus
        self._forced: float | None = None  # when it was cancelled from outside
        self._requeued = requeued
        self._releases = delivery.uncounted + (0 if exhausted else len(requeued))
        self._exhausted = exhausted
        self._others = others
        self._published_by_all = sent
        self._older: MemoryDelivery | None = None  # with the same id
        self._owner: str | None = None  # the digest that the id is marked with
        self._held = False  # whether another worker answers that it runs the request
        self._retried = False
        self._asked: list[tuple[float, StopReason]] = []
        self._admission: list[ResultEvent | None] = []  # the answers of `find_result`
        self._reached: set[str] = set()  # the calls so far, and the next one
        self._decided: set[str] | None = None  # the outcomes when it began to finalize
        self._unread = False  # the state of the request could not be read
        self._event: str | None = None
        self._fenced = False
        self._letter = ""
        self._too_large = False
        self._outputs: list[ImageArtifact] = []  # whose storing has returned
        self._discarded: set[str] = set()  # keys
        self._replies_sent = 0
        self._settlements: list[str] = []

    @property
    def attempt(self) -> int:
        """Number of the attempt; requeued deliveries do not count."""
        return self.delivery.attempt - self._releases

    # -- what is done to it -----------------------------------------------------------------------

    def force(self) -> None:
        """Record that the task is cancelled: it has time to requeue the delivery, no more."""
        self._forced = self.world.loop.time()

    def ask(self, reason: StopReason) -> None:
        """Record that the job is asked to stop."""
        self._asked.append((self.world.loop.time(), reason))

    @property
    def exhausted(self) -> bool:
        """Whether the delivery is max-deliver exhausted."""
        return self._exhausted

    @property
    def in_progress(self) -> bool:
        """Whether the id of an exhausted delivery is in progress elsewhere."""
        return self._exhausted and (self._older is not None or self._held)

    @property
    def finalizing(self) -> bool:
        """Whether the worker has begun to finalize the job."""
        return self._decided is not None

    @property
    def forced(self) -> bool:
        """Whether the job has been cancelled."""
        return self._forced is not None

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.sent.deadline is not None and self.sent.deadline <= self.world.now()

    @property
    def asked(self) -> StopReason | None:
        """Why the job is to stop; the first reason stands."""
        asked = list(self._asked)
        if self.sent.deadline is not None and self.late:
            ago = (self.world.now() - self.sent.deadline).total_seconds()
            asked.insert(0, (self.world.loop.time() - ago, StopReason.DEADLINE))
        return min(asked, key=lambda one: one[0])[1] if asked else None

    # -- the expected outcome ---------------------------------------------------------------------

    def outcomes(self) -> set[str]:  # noqa: C901, PLR0911, PLR0912 - one row of the table each
        """Return every outcome that the job can have; none while it goes on."""
        if self._decided is not None:
            return self._decided
        stopped = {STOPPED[self.asked]} if self.asked else set()
        if self._unread:
            return {"broken for the last time" if self.attempt >= ATTEMPTS else "broken"}
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
        if self.sent.kind == "missing":  # the store may have been away for a while
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
        return bool(self._older and self._asks_the_same(self._older))

    def _of_the_run(  # noqa: C901, PLR0911 - the same
        self, ran: Ran, stopped: set[str]
    ) -> set[str]:
        last = self.attempt >= ATTEMPTS
        raised = {"raised for the last time" if last else "raised"}
        broken = {"broken for the last time" if last else "broken"}
        match ran.ending:
            case None:
                return self._of_a_run_without_end(ran)
            case "interrupted":
                return stopped
            case "made" | "varied" | "nothing" | "odd" if ran.asked_before:
                return stopped
            case "made" | "varied":
                return {"succeeded"} | stopped  # asked in time, or while the store did not answer
            case "nothing":
                return raised | stopped
            case "odd":
                return broken | stopped
            case "raised":
                return raised
            case "broken":
                return broken
            case "memory":
                return {"out of memory"} if len(self.runs) > 1 else set()
            case "lost":
                return {"device lost"}
            case "refused":
                return {"unsupported"}

    def _of_a_run_without_end(self, ran: Ran) -> set[str]:
        now = self.world.loop.time()
        outcomes = {"stalled"} if now - ran.last_step > STALL else set()
        if self.asked is StopReason.DRAIN and now - self._asked[0][0] > DRAIN_STEP_TIMEOUT:
            outcomes.add("drained")
        return outcomes

    def rows(self) -> list[Row]:
        """Return every row that the worker may carry out."""
        rows = [ROWS[outcome] for outcome in self.outcomes()]
        if self._too_large:
            return [replace(row, event="internal", settlement="ack") for row in rows if row.event]
        return rows

    # -- what the worker does ---------------------------------------------------------------------

    def reaches(self, call: str, arguments: tuple[Any, ...]) -> None:
        self._reached.add(call)
        if call == "publish_progress" and isinstance(arguments[0], StartedEvent):
            self._claim(
                not self.outcomes(), f"a run is reported as started after {self.outcomes()}"
            )
        if call in FINALIZING and self._decided is None:
            self._decided = self.outcomes()

    def before(self, call: str, arguments: tuple[Any, ...]) -> None:
        match call, *arguments:
            case "publish_result", event:
                announced = "publish_progress" in self._reached
                self._claim(announced or not self.runs, "no started event of a run that has ended")
                self._publishes(event)
            case "dead_letter", _, _, letter:
                self._dead_letters(letter)
            case "reply", _, event:
                self._replies(event)
            case "discard", artifact:
                self._discarded.add(artifact.key)
                published = artifact.key in keys_of(self._stored_event())
                self._claim(not published, f"{artifact.key} is deleted, but an event mentions it")
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
                self._held = True
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
            self._releases = (
                self.delivery.uncounted
            )  # if the marks cannot be read, every delivery counts

    def run_begins(self, run: SteppedRun) -> None:
        self._claim(self.attempt <= ATTEMPTS, f"the model runs in attempt {self.attempt}")
        self._claim(not self._exhausted, "the model runs for an exhausted delivery")
        self._claim(self._admission[:1] == [None], "the model runs where a result exists")
        rivals = [one for one in self._others() if one.runs and self._is_rival(one)]
        same = all(one.sent.digest == self.sent.digest for one in rivals)
        self._claim(same, "the model runs for two contents under one id")
        endings = [ran.ending for ran in self.runs]
        self._claim(endings in ([], ["memory"]), f"the model runs after {endings}")
        self._claim(run.save_memory == bool(self.runs), "the second run saves memory, no other")
        self.runs.append(Ran(run.save_memory, self.world.loop.time()))

    def ended(self, exit_code: int | None) -> None:
        """Check that the job ended by itself as it must."""
        self._claim(len(self._settlements) <= 1, f"settled as {self._settlements}")
        if self.cut_off:
            return
        settlement = self._settlements[0] if self._settlements else None
        did = Row(self._event, settlement, self._letter, exit_code, self._retried)
        rows = self.rows()
        if self.exhausted:  # it stays in its stream: there is no delivery to return
            rows = [
                replace(row, settlement=None) if row.settlement in {"nak", "requeue"} else row
                for row in rows
            ]
        self._claim(did in rows, f"{did} after {self.outcomes()}")
        if self.in_progress:
            return
        reported = self.worker.observer.outcomes[-1]
        abandoned = (reported == "abandoned") == (settlement is None)
        self._claim(abandoned or self.exhausted, f"reported as {reported}")
        ends = settlement not in {None, "nak", "requeue"} and not self._retried
        self._claim(self._replies_sent == int(self.sent.reply and ends), "wrong number of replies")
        left = {one.key for one in self._outputs} - keys_of(self._stored_event()) if ends else set()
        self._claim(self._discarded == left, f"{self._discarded} removed instead of {left}")

    def was_cancelled(self) -> None:
        """Check that a cancelled task requeued its delivery."""
        if self._forced is None:
            self._claim(False, "cancelled by itself")  # noqa: FBT003
            return
        waited = self.world.loop.time() - self._forced
        requeued = bool(self._settlements) or waited >= RELEASE_TIMEOUT or self._exhausted
        self._claim(requeued, "not requeued")

    # -- the promises -----------------------------------------------------------------------------

    def _claim(self, true: bool, otherwise: str) -> None:
        if not true:
            self.broken.append(f"{self.worker.name}, {self.sent}: {otherwise}")

    def _may(self, what: str, allowed: Callable[[Row], bool]) -> None:
        if not self.forced and not self.cut_off:  # no call of a worker that is cut off takes effect
            rows = self.rows()
            self._claim(any(map(allowed, rows)), f"{what} after {self.outcomes()}")

    def _publishes(self, event: ResultEvent) -> None:
        kind = kind_of(event)
        self._event = kind
        self._may(f"{kind} is published", lambda row: row.event == kind)
        # Once a run has started, only that run or a cancellation may end the id.
        running = [one for one in self._others() if one.runs and self._is_rival(one)]
        may_end = (
            not running or isinstance(event, CancelledEvent) or self._stored_event() is not None
        )
        self._claim(may_end, f"{kind} ends an id whose model runs for {running}")
        self._claim(event.request_digest == self.sent.digest, f"{kind} for another request")
        if isinstance(event, SucceededEvent):
            for output in event.outputs:
                # If an event is stored, this one is refused, and its outputs may be deleted.
                there = self._stored(output) or self._stored_event() is not None
                self._claim(there, f"{output} is not in the store")
        needs = any(row.event == kind and row.letter for row in self.rows())
        if needs and not self.forced:
            self._claim(self._is_dead_lettered(), f"{kind} is published before the dead letter")

    def _dead_letters(self, letter: DeadLetter) -> None:
        self._letter = letter.code
        self._may(f"a dead letter {letter.code}", lambda row: row.letter == letter.code)
        late = self._event is not None and not self.cut_off
        self._claim(not late, "the dead letter comes after the event")
        self._claim(letter.request_id == self.sent.request_id, f"a letter of {letter.request_id}")

    def _replies(self, event: ResultEvent) -> None:
        self._replies_sent += 1
        stored = self._stored_event()
        if self.outcomes() & REPLIED_ONLY:
            own = isinstance(event, FailedEvent) and event.request_digest == self.sent.digest
            self._claim(own, f"the reply is the event of another request: {event}")
        elif stored is None:
            self._claim(False, "a reply before a terminal event is stored")  # noqa: FBT003
        elif stored.request_digest == self.sent.digest:
            self._claim(event == stored, f"a reply other than the stored event: {event}")
        else:
            self._claim(
                isinstance(event, FailedEvent) and event.request_digest == self.sent.digest,
                f"the reply is the event of another request: {event}",
            )

    def _settles(self, how: str) -> None:
        if how == "requeue" and not self.world.bus.unavailable and not self.cut_off:
            self._requeued.add(self.delivery.deliveries)
        self._claim(self.forced or not self._settlements, f"{how} after {self._settlements}")
        self._settlements.append(how)
        if self.forced:
            self._claim(how == "requeue", f"{how} of a cancelled task")
            return
        self._may(f"settled by {how}", lambda row: row.settlement == how)
        if how.startswith(("ack", "term")):
            stored = self._stored_event()
            known = stored is not None and (
                stored.request_digest == self.sent.digest or self._fenced
            )
            replied_only = bool(self.outcomes() & REPLIED_ONLY)
            self._claim(
                known or self._retried or replied_only, f"{how} before the terminal event is stored"
            )
        if how.startswith("term"):
            self._claim(self._is_dead_lettered(), f"{how} without a dead letter")

    def _is_rival(self, other: "Story") -> bool:
        """Whether another delivery has the same id and is of another message."""
        return (
            other.sent.request_id == self.sent.request_id
            and other.delivery.origin != self.delivery.origin
        )

    def _asks_the_same(self, other: MemoryDelivery) -> bool:
        return self._published_by_all[other.origin].digest == self.sent.digest

    def _stored_event(self) -> ResultEvent | None:
        return self.world.events.stored(self.world.task, self.sent.request_id)

    def _is_dead_lettered(self) -> bool:
        return self.delivery.stream_sequence in self.world.events.dead_lettered

    def _stored(self, output: object) -> bool:
        if not isinstance(output, ImageArtifact):
            return True
        data = self.world.artifacts.objects.get(output.key, b"")
        own = f"/{self.sent.request_id}/" in output.key
        return own and hashlib.sha256(data).hexdigest() == output.sha256


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
