"""One delivery in one worker's hands, watched from outside and compared with the settlement table.

The table stands here a second time, in the words of the design and without a line of the code that
it judges: `verdicts` says what can have come of a job after all that has happened to it, and `ROWS`
what the worker must do then.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from consumer.execution import LAST_WORD
from consumer.ports import DeadLetter, MessageTooLarge, ResultEvent
from consumer.run import PATIENCE, Reason
from generation_contracts import (
    CancelledEvent,
    FailedEvent,
    ImageArtifact,
    StartedEvent,
    SucceededEvent,
)
from tests.memory_ports import MemoryDelivery
from tests.stepped_world import SteppedRun, SteppedWorker, SteppedWorld
from tests.wishes import Ending, Sent

ATTEMPTS = 3  # that the model gets
STALL = 30.0  # seconds without a step
EXIT = 70  # of a worker whose device is lost


@dataclass(frozen=True)
class Row:
    """What the worker must do: its terminal event, the settlement, and what goes with them."""

    event: str | None  # succeeded, cancelled, or the code of a failure
    settlement: str | None
    letter: bool = False
    exit_code: int | None = None


def _put_aside(code: str) -> Row:
    return Row(code, f"term {code}", letter=True)


ROWS = {
    "done": Row("succeeded", "ack"),
    "done before": Row(None, "ack"),
    "conflict": Row(None, "ack"),
    "malformed": _put_aside("invalid_request"),
    "unsupported": Row("unsupported_parameter", "ack"),
    "input missing": Row("input_unavailable", "ack"),
    "expired": Row("deadline_exceeded", "ack"),
    "cancelled": Row("cancelled", "ack"),
    "raised": Row(None, "nak"),
    "raised for the last time": _put_aside("model_error"),
    "broken": Row(None, "nak"),
    "broken for the last time": _put_aside("internal"),
    "out of memory": Row("out_of_memory", "ack"),
    "device lost": Row(None, "nak", exit_code=EXIT),
    "stalled": Row(None, None, exit_code=EXIT),
    "worker lost": _put_aside("worker_lost"),
    "drained": Row(None, "release"),
}
STOPPED = {Reason.DEADLINE: "expired", Reason.CANCEL: "cancelled", Reason.DRAIN: "drained"}
CONCLUDING = frozenset({"dead_letter", "publish_result", "reply", "ack", "nak", "term", "release"})


@dataclass(eq=False)
class Ran:
    """One run of the model."""

    save_memory: bool
    last_step: float  # when, on the world's clock
    ending: Ending | Literal["interrupted"] | None = None
    asked_before: bool = False  # whether the job had been asked to stop when the run ended


class Story:
    """Implements `stepped_world.Watcher`; whatever breaks a promise goes into `broken`.

    Args:
        world: Where it happens.
        worker: Who has the delivery.
        delivery: What was handed over.
        sent: The request.
        given_back: The attempts at it that workers have given back on purpose; added to here.
        stranded: Whether the server delivers it no more, and the worker is to put it aside.
    """

    def __init__(
        self,
        world: SteppedWorld,
        worker: SteppedWorker,
        delivery: MemoryDelivery,
        sent: Sent,
        given_back: set[int],
        *,
        stranded: bool,
    ) -> None:
        self.world = world
        self.worker = worker
        self.delivery = delivery
        self.sent = sent
        self.broken: list[str] = []
        self.runs: list[Ran] = []
        self.cut_off = False  # the worker's client has given up on the bus
        self._forced: float | None = None  # when it was cancelled from outside
        self._given_back = given_back
        self._releases = 0 if stranded else len(given_back)
        self._stranded = stranded
        self._asked: list[tuple[float, Reason]] = []
        self._admission: list[ResultEvent | None] = []  # what was found, each time it was asked
        self._reached: set[str] = set()  # the calls that it has made or is about to make
        self._concluded: set[str] | None = None  # the verdicts when it began to carry one out
        self._unread = False  # it could not be asked what is known of the request
        self._event: str | None = None
        self._fenced = False
        self._letter = False
        self._too_large = False
        self._outputs: list[ImageArtifact] = []  # that it knows to be in the store
        self._discarded: set[str] = set()  # keys
        self._replies_sent = 0
        self._settlements: list[str] = []

    @property
    def attempt(self) -> int:
        """Which try at the request this is; what was given back on purpose was none."""
        return self.delivery.attempt - self._releases

    # -- what is done to it -----------------------------------------------------------------------

    def force(self) -> None:
        """The job is cancelled: wherever it is, it has time for a last word and no more."""
        self._forced = self.world.loop.time()

    def ask(self, reason: Reason) -> None:
        """The job is asked to stop."""
        self._asked.append((self.world.loop.time(), reason))

    @property
    def concluding(self) -> bool:
        """Whether the worker has begun to carry a decision out."""
        return self._concluded is not None

    @property
    def forced(self) -> bool:
        """Whether the job has been cancelled."""
        return self._forced is not None

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.sent.deadline is not None and self.sent.deadline <= self.world.now()

    @property
    def asked(self) -> Reason | None:
        """Why the job is to stop; the first reason stands."""
        asked = list(self._asked)
        if self.sent.deadline is not None and self.late:
            ago = (self.world.now() - self.sent.deadline).total_seconds()
            asked.insert(0, (self.world.loop.time() - ago, Reason.DEADLINE))
        return min(asked, key=lambda one: one[0])[1] if asked else None

    # -- what has come of it ----------------------------------------------------------------------

    def verdicts(self) -> set[str]:  # noqa: C901, PLR0911 - one row of the table each
        """Everything that can have come of the job so far; nothing while it goes on."""
        if self._concluded is not None:
            return self._concluded
        stopped = {STOPPED[self.asked]} if self.asked else set()
        if self._unread:
            return {"broken for the last time" if self.attempt >= ATTEMPTS else "broken"}
        if self.sent.kind == "malformed":
            return {"malformed"}
        if not self._admission:
            return set()
        if self._admission[0] is not None:
            same = self._admission[0].request_digest == self.sent.digest
            return {"done before" if same else "conflict"}
        if self.attempt > ATTEMPTS or self._stranded:
            return {"worker lost"}
        if self.runs:
            return self._of_the_run(self.runs[-1], stopped)
        if self.late:
            stopped.add("expired")
        if self.sent.kind == "missing":  # the store may have been away for a while
            return {"input missing"} | stopped
        if self.sent.kind == "unsupported":
            return {"expired"} if self.late else {"unsupported"}
        return stopped

    def _of_the_run(  # noqa: C901, PLR0911 - the same
        self, ran: Ran, stopped: set[str]
    ) -> set[str]:
        last = self.attempt >= ATTEMPTS
        raised = {"raised for the last time" if last else "raised"}
        broken = {"broken for the last time" if last else "broken"}
        match ran.ending:
            case None:
                return self._given_up_on(ran)
            case "interrupted":
                return stopped
            case "made" | "varied" | "nothing" | "odd" if ran.asked_before:
                return stopped
            case "made" | "varied":
                return {"done"} | stopped  # asked in time, or while the store was away
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

    def _given_up_on(self, ran: Ran) -> set[str]:
        now = self.world.loop.time()
        verdicts = {"stalled"} if now - ran.last_step > STALL else set()
        if self.asked is Reason.DRAIN and now - self._asked[0][0] > PATIENCE:
            verdicts.add("drained")
        return verdicts

    def rows(self) -> list[Row]:
        """Everything that the worker may do about it."""
        rows = [ROWS[verdict] for verdict in self.verdicts()]
        if self._too_large:
            return [replace(row, event="internal", settlement="ack") for row in rows if row.event]
        return rows

    # -- what the worker does ---------------------------------------------------------------------

    def reaches(self, call: str, arguments: tuple[Any, ...]) -> None:
        self._reached.add(call)
        if call == "publish_progress" and isinstance(arguments[0], StartedEvent):
            self._claim(not self.verdicts(), f"a run is announced after {self.verdicts()}")
        if call in CONCLUDING and self._concluded is None:
            self._concluded = self.verdicts()

    def before(self, call: str, arguments: tuple[Any, ...]) -> None:
        match call, *arguments:
            case "publish_result", event:
                self._publishes(event)
            case "dead_letter", _, _, letter:
                self._puts_aside(letter)
            case "reply", _, event:
                self._replies(event)
            case "discard", artifact:
                self._discarded.add(artifact.key)
                told = artifact.key in keys_of(self._stands())
                self._claim(not told, f"{artifact.key} is removed, of which an event tells")
            case (("ack" | "nak" | "term" | "release"), *reason):
                self._settles(" ".join([call, *reason]))
            case _:
                pass

    def after(self, call: str, arguments: tuple[Any, ...], answer: object) -> None:
        if call == "find_result" and "publish_result" not in self._reached:
            self._admission.append(answer)  # type: ignore[arg-type] # an event or None
        if call == "releases":
            self._releases = len(self._given_back)
        if call == "publish_result":
            self._fenced = answer is False

    def returns(self, call: str, answer: object) -> None:
        if isinstance(answer, ImageArtifact):
            self._outputs.append(answer)

    def refused(self, call: str, error: Exception) -> None:
        if call == "publish_result" and isinstance(error, MessageTooLarge):
            self._too_large = True
            self._event = None
        if call in {"releases", "withdrawn", "find_result"} and not self.concluding:
            self._unread = True
        if call == "releases":
            self._releases = 0  # every delivery counts where it cannot be asked

    def run_begins(self, run: SteppedRun) -> None:
        self._claim("publish_progress" in self._reached, "the model runs before anybody is told")
        self._claim(self.attempt <= ATTEMPTS, f"the model runs in attempt {self.attempt}")
        self._claim(not self._stranded, "the model runs on what is to be put aside")
        self._claim(self._admission[:1] == [None], "the model runs where a result exists")
        endings = [ran.ending for ran in self.runs]
        self._claim(endings in ([], ["memory"]), f"the model runs after {endings}")
        self._claim(run.save_memory == bool(self.runs), "the second run saves memory, no other")
        self.runs.append(Ran(run.save_memory, self.world.loop.time()))

    def ended(self, exit_code: int | None) -> None:
        """The worker has let go of the delivery by itself."""
        self._claim(len(self._settlements) <= 1, f"settled as {self._settlements}")
        if self.cut_off:
            return
        settlement = self._settlements[0] if self._settlements else None
        did = Row(self._event, settlement, letter=self._letter, exit_code=exit_code)
        self._claim(did in self.rows(), f"{did} after {self.verdicts()}")
        reported = self.worker.observer.outcomes[-1]
        self._claim((reported == "abandoned") == (settlement is None), f"reported as {reported}")
        ends = settlement not in {None, "nak", "release"}
        self._claim(self._replies_sent == int(self.sent.reply and ends), "wrong number of replies")
        left = {one.key for one in self._outputs} - keys_of(self._stands()) if ends else set()
        self._claim(self._discarded == left, f"{self._discarded} removed instead of {left}")

    def was_cancelled(self) -> None:
        """The job has come to its end because it was forced to, and its last word is said."""
        if self._forced is None:
            self._claim(False, "cancelled by itself")  # noqa: FBT003
            return
        waited = self.world.loop.time() - self._forced
        self._claim(bool(self._settlements) or waited >= LAST_WORD, "not given back")

    # -- the promises -----------------------------------------------------------------------------

    def _claim(self, true: bool, otherwise: str) -> None:
        if not true:
            self.broken.append(f"{self.worker.name}, {self.sent}: {otherwise}")

    def _may(self, what: str, allowed: Callable[[Row], bool]) -> None:
        if not self.forced:
            rows = self.rows()
            self._claim(any(map(allowed, rows)), f"{what} after {self.verdicts()}")

    def _publishes(self, event: ResultEvent) -> None:
        kind = kind_of(event)
        self._event = kind
        self._may(f"{kind} is published", lambda row: row.event == kind)
        self._claim(event.request_digest == self.sent.digest, f"{kind} for another request")
        if isinstance(event, SucceededEvent):
            for output in event.outputs:
                self._claim(self._stored(output), f"{output} is not in the store")
        needs = any(row.event == kind and row.letter for row in self.rows())
        if needs and not self.forced:
            self._claim(self._stands_aside(), f"{kind} is published before the dead letter")

    def _puts_aside(self, letter: DeadLetter) -> None:
        self._letter = True
        self._may(
            f"a dead letter {letter.code}", lambda row: row.letter and row.event == letter.code
        )
        self._claim(self._event is None, "the dead letter comes after the event")
        self._claim(letter.request_id == self.sent.request_id, f"a letter of {letter.request_id}")

    def _replies(self, event: ResultEvent) -> None:
        self._replies_sent += 1
        stands = self._stands()
        if stands is None:
            self._claim(False, "a reply before any terminal event stands")  # noqa: FBT003
        elif stands.request_digest == self.sent.digest:
            self._claim(event == stands, f"a reply other than the stored event: {event}")
        else:
            self._claim(
                isinstance(event, FailedEvent) and event.request_digest == self.sent.digest,
                f"the end of another request is the reply: {event}",
            )

    def _settles(self, how: str) -> None:
        if how == "release" and not self.world.bus.away and not self.cut_off:
            self._given_back.add(self.delivery.attempt)
        self._claim(self.forced or not self._settlements, f"{how} after {self._settlements}")
        self._settlements.append(how)
        if self.forced:
            self._claim(how == "release", f"{how} as the last word")
            return
        self._may(f"settled by {how}", lambda row: row.settlement == how)
        if how.startswith(("ack", "term")):
            stands = self._stands()
            known = stands is not None and (
                stands.request_digest == self.sent.digest
                or self._fenced
                or "conflict" in self.verdicts()
            )
            self._claim(known, f"{how} before the terminal event stands")
        if how.startswith("term"):
            self._claim(self._stands_aside(), f"{how} without a dead letter")

    def _stands(self) -> ResultEvent | None:
        return self.world.events.stored(self.world.task, self.sent.request_id)

    def _stands_aside(self) -> bool:
        return self.delivery.stream_sequence in self.world.events.put_aside

    def _stored(self, output: object) -> bool:
        if not isinstance(output, ImageArtifact):
            return True
        data = self.world.artifacts.objects.get(output.key, b"")
        own = f"/{self.sent.request_id}/" in output.key
        return own and hashlib.sha256(data).hexdigest() == output.sha256


def keys_of(event: ResultEvent | None) -> set[str]:
    """The keys of the objects that an event tells of."""
    outputs = event.outputs if isinstance(event, SucceededEvent) else ()
    return {output.key for output in outputs if isinstance(output, ImageArtifact)}


def kind_of(event: ResultEvent) -> str:
    """The word of the table for an event."""
    match event:
        case SucceededEvent():
            return "succeeded"
        case CancelledEvent():
            return "cancelled"
        case FailedEvent():
            return str(event.failure.code)
