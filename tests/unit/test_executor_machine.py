"""Hypothesis drives workers through many courses of events; the settlement table must hold.

The machine publishes requests, brings workers to any point of their jobs, ends the runs of their
models, kills workers, expires leases and stops services. `tests.support.story` checks every call of
one
job; `tests.support.crew` checks what must hold for all workers together.
"""

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from consumer.inference import monitor
from consumer.inference.cancel_token import StopReason
from consumer.inference.monitor import DRAIN_STEP_TIMEOUT
from generation_contracts import Task
from tests.support.crew import ENOUGH, MAX_DELIVER, Crew
from tests.support.story import ATTEMPTS, STALL
from tests.support.wishes import CALLS, ENDINGS, PLACES, WHICH, WISHES, Ending, Place, Wish

# The examples are the same at every run: a failure is caused by a change. To search for others,
# give a number of examples; they then differ at every run, and Hypothesis keeps a failing one.
SEARCH = int(os.environ.get("MACHINE_EXAMPLES", "0"))
EXAMPLES = 600
RULES = 30  # in one example

REASONS = st.sampled_from([StopReason.CANCEL, StopReason.DRAIN])


def to_the_run(which: int) -> Place:
    return Place(which, ENOUGH, None)


class Workers(RuleBasedStateMachine):
    """The events of a bus, a store and the workers that share them."""

    def __init__(self) -> None:
        super().__init__()
        self.crew: Crew
        self.failed = False

    @initialize(task=st.sampled_from(Task), wishes=st.lists(WISHES, min_size=2, max_size=8))
    def start(self, task: Task, wishes: list[Wish]) -> None:
        self.crew = Crew(task)
        self.crew.world.open()
        for wish in wishes:
            self.crew.publish(wish)

    @rule(wish=WISHES)
    def publish(self, wish: Wish) -> None:
        self.crew.publish(wish)

    # -- progress ---------------------------------------------------------------------------------

    @precondition(lambda self: self.crew.can_work)
    @rule(place=PLACES)
    def go_on(self, place: Place) -> None:
        self.crew.bring(place)

    @precondition(lambda self: self.crew.can_work)
    @rule(which=WHICH, position=st.sampled_from([(1, 2), (3, 2), (1, 0)]))
    def step(self, which: int, position: tuple[int, int]) -> None:
        worker = self.crew.bring(to_the_run(which))
        if worker in self.crew.running:
            self.crew.step(worker, position)

    @precondition(lambda self: self.crew.can_take)
    @rule(ending=ENDINGS)
    def end_every_run_alike(self, ending: Ending) -> None:
        """Several deliveries in turn, whose runs have the same end."""
        for _ in range(ATTEMPTS + 1):
            if self.crew.can_take:
                self.crew.go_on(self.crew.take(), ENOUGH, ending)

    @precondition(lambda self: self.crew.exhausted and self.crew.idle)
    @rule(calls=CALLS)
    def handle_exhausted(self, calls: int) -> None:
        self.crew.go_on(self.crew.take(self.crew.exhausted[0]), calls, None)

    # -- faults -----------------------------------------------------------------------------------

    @precondition(lambda self: self.crew.can_work)
    @rule(place=PLACES, reason=REASONS)
    def ask_to_stop(self, place: Place, reason: StopReason) -> None:
        if worker := self.crew.bring(place):
            self.crew.ask(worker, reason)

    @precondition(lambda self: self.crew.can_work)
    @rule(which=WHICH, reason=REASONS, then=st.sampled_from(["stops", "ends", "hangs"]))
    def stop_run(self, which: int, reason: StopReason, then: str) -> None:
        worker = self.crew.bring(to_the_run(which))
        if worker not in self.crew.running:
            return
        self.crew.ask(worker, reason)
        match then:
            case "stops":
                self.crew.step(worker, (1, 2))
            case "ends":
                self.crew.end_run(worker, "made")
            case "hangs":
                self.crew.hang(DRAIN_STEP_TIMEOUT + 2)

    @precondition(lambda self: self.crew.can_work)
    @rule(which=WHICH)
    def run_hangs(self, which: int) -> None:
        if self.crew.bring(to_the_run(which)):
            self.crew.hang(STALL + 2)

    @precondition(lambda self: self.crew.can_work)
    @rule(place=PLACES)
    def force_to_end(self, place: Place) -> None:
        if worker := self.crew.bring(place):
            self.crew.force(worker)

    @precondition(lambda self: self.crew.can_work)
    @rule(place=PLACES)
    def cut_off(self, place: Place) -> None:
        if worker := self.crew.bring(place):
            self.crew.cut_off(worker)

    @precondition(lambda self: self.crew.can_work)
    @rule(place=PLACES)
    def kill(self, place: Place) -> None:
        if worker := self.crew.bring(place):
            self.crew.kill(worker)

    @precondition(lambda self: self.crew.can_take)
    @rule(calls=CALLS)
    def kill_every_worker_that_takes_it(self, calls: int) -> None:
        for _ in range(MAX_DELIVER):
            if self.crew.can_take:
                worker = self.crew.take()
                self.crew.go_on(worker, calls, None)
                if worker in self.crew.stories:
                    self.crew.kill(worker)
                self.crew.world.queue.expire_leases()

    @precondition(lambda self: self.crew.can_work)
    @rule(place=PLACES)
    def lease_runs_out(self, place: Place) -> None:
        self.crew.bring(place)
        self.crew.world.queue.expire_leases()

    @rule(away=st.booleans())
    def bus(self, *, away: bool) -> None:
        self.crew.away(self.crew.world.bus, away=away)

    @rule(away=st.booleans())
    def store(self, *, away: bool) -> None:
        self.crew.away(self.crew.world.artifacts.outage, away=away)

    @rule(seconds=st.sampled_from([1, 7, 25]))
    def time_passes(self, seconds: float) -> None:
        self.crew.pass_time(seconds)

    # -- the promises -----------------------------------------------------------------------------

    @invariant()
    def promises_are_kept(self) -> None:
        self.failed = True  # until the check has passed
        self.crew.check()
        self.failed = False

    def teardown(self) -> None:
        if not hasattr(self, "crew"):
            return
        try:
            if not self.failed:
                self.crew.heal()
                self.crew.check_the_end()
        finally:
            self.crew.close()
            self.crew.world.close()


@pytest.fixture
def _silence() -> Iterator[None]:
    """Tracebacks take longer to draw than jobs to do."""
    before = structlog.get_config()
    quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=quiet, cache_logger_on_first_use=False)
    yield
    structlog.configure(**before)


@pytest.mark.timeout(900)  # Hypothesis shrinks a failing example for up to 5 minutes
@pytest.mark.usefixtures("_silence")
def test_settlement_table_holds_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "PROGRESS_INTERVAL", 1.0)  # of the world's seconds
    run_state_machine_as_test(
        Workers,
        settings=settings(
            max_examples=SEARCH or EXAMPLES,
            stateful_step_count=RULES,
            deadline=None,
            derandomize=not SEARCH,
            suppress_health_check=[HealthCheck.too_slow],  # the machine may be busy
        ),
    )
