"""One delivery in one worker's hands, watched from outside and compared with the settlement table.

The table stands here a second time, in the words of the design and without a line of the code that
it judges: `verdicts` says what can have come of a job after all that has happened to it, and `ROWS`
what the worker must do then.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
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
    letter: str = ""  # the code that a dead letter says
    exit_code: int | None = None
    retried: bool = False  # whether a copy is queued again after a delay


def _put_aside(code: str, *, event: bool = True) -> Row:
    return Row(code if event else None, f"term {code}", letter=code)


ROWS = {
    "done": Row("succeeded", "ack"),
    "done before": Row(None, "ack"),
    "conflict": Row(None, "ack"),
    "malformed": _put_aside("invalid_request"),
    "malformed copy": _put_aside("invalid_request", event=False),
    "unsupported copy": Row(None, "ack"),
    "input missing copy": Row(None, "ack"),
    "expired copy": Row(None, "ack"),
    "worker lost copy": _put_aside("worker_lost", event=False),
    "earlier copy": Row(None, "ack", retried=True),
    "unsupported": Row("unsupported_parameter", "ack"),
    "input missing": Row("input_unavailable", "ack"),
    "expired": Row("deadline_exceeded", "ack"),
    "cancelled": Row("cancelled", "ack"),
    "raised": Row(None, "ack", retried=True),
    "raised for the last time": _put_aside("model_error"),
    "broken": Row(None, "ack", retried=True),
    "broken for the last time": _put_aside("internal"),
    "out of memory": Row("out_of_memory", "ack"),
    "device lost": Row(None, "nak", exit_code=EXIT),
    "stalled": Row(None, None, exit_code=EXIT),
    "worker lost": _put_aside("worker_lost"),
    "deliveries used up": Row(None, "ack", retried=True),
    "left alone": Row(None, None),
    "drained": Row(None, "release"),
}
STOPPED = {Reason.DEADLINE: "expired", Reason.CANCEL: "cancelled", Reason.DRAIN: "drained"}
CONCLUDING = frozenset(
    {"dead_letter", "publish_result", "reply", "retry_later", "ack", "nak", "term", "release"}
)
# The calls without whose answers nothing is known of a request.
UNREAD = frozenset({"releases", "withdrawn", "find_result", "older", "owner"})
# What its sender is told without an event that is stored.
REPLIED_ONLY = frozenset({"conflict", *(verdict for verdict in ROWS if verdict.endswith(" copy"))})
REPLIED_ONLY -= {"earlier copy"}


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
        sent: All requests, by the sequence at which they were published.
        given_back: The deliveries of it that workers have requeued on purpose; added to here.
        stranded: Whether the server delivers it no more, and the worker is to put it aside.
        others: The stories of the other deliveries that are in progress.
    """

    def __init__(
        self,
        world: SteppedWorld,
        worker: SteppedWorker,
        delivery: MemoryDelivery,
        sent: Mapping[int, Sent],
        given_back: set[int],
        *,
        stranded: bool,
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
        self._given_back = given_back
        self._releases = delivery.uncounted + (0 if stranded else len(given_back))
        self._stranded = stranded
        self._others = others
        self._published_by_all = sent
        self._older: MemoryDelivery | None = None  # with the same id
        self._owner: str | None = None  # the digest that the id is marked with
        self._held = False  # whether another worker says that it runs the request
        self._retried = False
        self._asked: list[tuple[float, Reason]] = []
        self._admission: list[ResultEvent | None] = []  # what was found, each time it was asked
        self._reached: set[str] = set()  # the calls that it has made or is about to make
        self._concluded: set[str] | None = None  # the verdicts when it began to carry one out
        self._unread = False  # it could not be asked what is known of the request
        self._event: str | None = None
        self._fenced = False
        self._letter = ""
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
    def stranded(self) -> bool:
        """Whether the server delivers it no more."""
        return self._stranded

    @property
    def left_alone(self) -> bool:
        """Whether an exhausted delivery is left alone, because its id is in progress."""
        return self._stranded and (self._older is not None or self._held)

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

    def verdicts(self) -> set[str]:  # noqa: C901, PLR0911, PLR0912 - one row of the table each
        """Everything that can have come of the job so far; nothing while it goes on."""
        if self._concluded is not None:
            return self._concluded
        stopped = {STOPPED[self.asked]} if self.asked else set()
        if self._unread:
            return {"broken for the last time" if self.attempt >= ATTEMPTS else "broken"}
        if self.left_alone:
            return {"left alone"}
        if self.sent.kind == "malformed":
            return self._before_the_run({"malformed"})
        if not self._admission:
            return set()
        if self._admission[0] is not None:
            same = self._admission[0].request_digest == self.sent.digest
            return {"done before" if same else "conflict"}
        before = self._older and self._published_by_all[self._older.origin].digest
        if (self._owner or before or self.sent.digest) != self.sent.digest:
            return {"conflict"}
        if before == self.sent.digest:
            return {"earlier copy"}
        if self._stranded and self.attempt < ATTEMPTS:
            return {"deliveries used up"}
        if self._stranded or self.attempt > ATTEMPTS:
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

    def _before_the_run(self, verdicts: set[str]) -> set[str]:
        """What comes of a failure before the run, where the id may be another delivery's."""
        if not self._is_before():
            return verdicts
        copies = {f"{verdict} copy" for verdict in verdicts - {"cancelled", "drained"}}
        return copies | (verdicts & {"cancelled", "drained"})

    def _is_before(self) -> bool:
        """Whether the id belongs to another delivery."""
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
            case "retry_later", *_:
                self._retried = True
                self._may("a retry", lambda row: row.retried)
            case (("ack" | "nak" | "term" | "release"), *reason):
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
            case "holds", True:
                self._held = True
            case "releases", _:
                self._releases = self.delivery.uncounted + len(self._given_back)
            case "publish_result", _:
                self._fenced = answer != arguments[0]

    def returns(self, call: str, answer: object) -> None:
        if isinstance(answer, ImageArtifact):
            self._outputs.append(answer)

    def refused(self, call: str, error: Exception) -> None:
        if call == "publish_result" and isinstance(error, MessageTooLarge):
            self._too_large = True
            self._event = None
        if call in UNREAD and not self.concluding:
            self._unread = True
        if call == "releases":
            self._releases = self.delivery.uncounted  # each one counts where it cannot be asked

    def run_begins(self, run: SteppedRun) -> None:
        self._claim("publish_progress" in self._reached, "the model runs before anybody is told")
        self._claim(self.attempt <= ATTEMPTS, f"the model runs in attempt {self.attempt}")
        self._claim(not self._stranded, "the model runs on what is to be put aside")
        self._claim(self._admission[:1] == [None], "the model runs where a result exists")
        rivals = [one for one in self._others() if one.runs and self._is_rival(one)]
        same = all(one.sent.digest == self.sent.digest for one in rivals)
        self._claim(same, "the model runs for two contents under one id")
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
        did = Row(self._event, settlement, self._letter, exit_code, self._retried)
        self._claim(did in self.rows(), f"{did} after {self.verdicts()}")
        if self.left_alone:
            return
        reported = self.worker.observer.outcomes[-1]
        self._claim((reported == "abandoned") == (settlement is None), f"reported as {reported}")
        ends = settlement not in {None, "nak", "release"} and not self._retried
        self._claim(self._replies_sent == int(self.sent.reply and ends), "wrong number of replies")
        left = {one.key for one in self._outputs} - keys_of(self._stands()) if ends else set()
        self._claim(self._discarded == left, f"{self._discarded} removed instead of {left}")

    def was_cancelled(self) -> None:
        """The job has come to its end because it was forced to, and its last word is said."""
        if self._forced is None:
            self._claim(False, "cancelled by itself")  # noqa: FBT003
            return
        waited = self.world.loop.time() - self._forced
        given_back = bool(self._settlements) or waited >= LAST_WORD or self._stranded
        self._claim(given_back, "not given back")

    # -- the promises -----------------------------------------------------------------------------

    def _claim(self, true: bool, otherwise: str) -> None:
        if not true:
            self.broken.append(f"{self.worker.name}, {self.sent}: {otherwise}")

    def _may(self, what: str, allowed: Callable[[Row], bool]) -> None:
        if not self.forced and not self.cut_off:  # nothing of a worker that is cut off gets out
            rows = self.rows()
            self._claim(any(map(allowed, rows)), f"{what} after {self.verdicts()}")

    def _publishes(self, event: ResultEvent) -> None:
        kind = kind_of(event)
        self._event = kind
        self._may(f"{kind} is published", lambda row: row.event == kind)
        # Once a run has begun, only that run, a cancellation or a drain may end the id.
        running = [one for one in self._others() if one.runs and self._is_rival(one)]
        may_end = not running or isinstance(event, CancelledEvent) or self._stands() is not None
        self._claim(may_end, f"{kind} ends an id whose model runs for {running}")
        self._claim(event.request_digest == self.sent.digest, f"{kind} for another request")
        if isinstance(event, SucceededEvent):
            for output in event.outputs:
                # Where an event stands, this one is refused, and its outputs may be gone already.
                there = self._stored(output) or self._stands() is not None
                self._claim(there, f"{output} is not in the store")
        needs = any(row.event == kind and row.letter for row in self.rows())
        if needs and not self.forced:
            self._claim(self._stands_aside(), f"{kind} is published before the dead letter")

    def _puts_aside(self, letter: DeadLetter) -> None:
        self._letter = letter.code
        self._may(f"a dead letter {letter.code}", lambda row: row.letter == letter.code)
        late = self._event is not None and not self.cut_off
        self._claim(not late, "the dead letter comes after the event")
        self._claim(letter.request_id == self.sent.request_id, f"a letter of {letter.request_id}")

    def _replies(self, event: ResultEvent) -> None:
        self._replies_sent += 1
        stands = self._stands()
        if self.verdicts() & REPLIED_ONLY:
            own = isinstance(event, FailedEvent) and event.request_digest == self.sent.digest
            self._claim(own, f"the end of another request is the reply: {event}")
        elif stands is None:
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
            self._given_back.add(self.delivery.deliveries)
        self._claim(self.forced or not self._settlements, f"{how} after {self._settlements}")
        self._settlements.append(how)
        if self.forced:
            self._claim(how == "release", f"{how} as the last word")
            return
        self._may(f"settled by {how}", lambda row: row.settlement == how)
        if how.startswith(("ack", "term")):
            stands = self._stands()
            known = stands is not None and (
                stands.request_digest == self.sent.digest or self._fenced
            )
            replied_only = bool(self.verdicts() & REPLIED_ONLY)
            self._claim(
                known or self._retried or replied_only, f"{how} before the terminal event stands"
            )
        if how.startswith("term"):
            self._claim(self._stands_aside(), f"{how} without a dead letter")

    def _is_rival(self, other: "Story") -> bool:
        """Whether another delivery has the same id, and is not of the same message."""
        return (
            other.sent.request_id == self.sent.request_id
            and other.delivery.origin != self.delivery.origin
        )

    def _asks_the_same(self, other: MemoryDelivery) -> bool:
        return self._published_by_all[other.origin].digest == self.sent.digest

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
