"""A Hypothesis state machine checks the settlement table in many courses of events.

The machine publishes requests, advances workers to any position of their jobs and ends the runs of
their models. It kills workers, expires leases and stops services. `tests.support.job_oracle` checks
every call of one job. `tests.support.worker_pool` checks the invariants of all workers.
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
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.job_oracle import ATTEMPTS, STALL
from tests.support.simulated_requests import (
    CALLS,
    DRAFTS,
    ENDINGS,
    JOB_POSITIONS,
    WHICH,
    Ending,
    JobPosition,
    RequestDraft,
)
from tests.support.worker_pool import ENOUGH, MAX_DELIVER, WorkerPool

# By default every test run uses equal examples, so a failure is caused by a change.
# MACHINE_EXAMPLES sets a number of random examples instead. Hypothesis then stores a failing one.
SEARCH = int(os.environ.get("MACHINE_EXAMPLES", "0"))
EXAMPLES = 300
RULES = 30  # rules in one example

REASONS = st.sampled_from([StopReason.CANCEL, StopReason.DRAIN])


def to_the_run(which: int) -> JobPosition:
    return JobPosition(which, ENOUGH, None)


class Workers(RuleBasedStateMachine):
    """The events of a bus, a store and the workers that share them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool: WorkerPool
        self.failed = False

    @initialize(
        task=st.sampled_from(DEFAULT_QUEUES), drafts=st.lists(DRAFTS, min_size=2, max_size=8)
    )
    def start(self, task: Task, drafts: list[RequestDraft]) -> None:
        self.pool = WorkerPool(task)
        self.pool.world.open()
        for draft in drafts:
            self.pool.publish(draft)

    @rule(draft=DRAFTS)
    def publish(self, draft: RequestDraft) -> None:
        self.pool.publish(draft)

    # -- progress ---------------------------------------------------------------------------------

    @precondition(lambda self: self.pool.can_work)
    @rule(at=JOB_POSITIONS)
    def go_on(self, at: JobPosition) -> None:
        self.pool.advance(at)

    @precondition(lambda self: self.pool.can_work)
    @rule(which=WHICH, position=st.sampled_from([(1, 2), (3, 2), (1, 0)]))
    def step(self, which: int, position: tuple[int, int]) -> None:
        worker = self.pool.advance(to_the_run(which))
        if worker in self.pool.running:
            self.pool.step(worker, position)

    @precondition(lambda self: self.pool.can_take)
    @rule(ending=ENDINGS)
    def end_several_runs_alike(self, ending: Ending) -> None:
        """Handle several deliveries in turn, and end each run alike."""
        for _ in range(ATTEMPTS + 1):
            if self.pool.can_take:
                self.pool.go_on(self.pool.take(), ENOUGH, ending)

    @precondition(lambda self: self.pool.exhausted and self.pool.idle)
    @rule(calls=CALLS)
    def handle_exhausted(self, calls: int) -> None:
        self.pool.go_on(self.pool.take(self.pool.exhausted[0]), calls, None)

    # -- faults -----------------------------------------------------------------------------------

    @precondition(lambda self: self.pool.can_work)
    @rule(at=JOB_POSITIONS, reason=REASONS)
    def request_stop(self, at: JobPosition, reason: StopReason) -> None:
        if worker := self.pool.advance(at):
            self.pool.request_stop(worker, reason)

    @precondition(lambda self: self.pool.can_work)
    @rule(which=WHICH, reason=REASONS, then=st.sampled_from(["stops", "ends", "hangs"]))
    def stop_run(self, which: int, reason: StopReason, then: str) -> None:
        worker = self.pool.advance(to_the_run(which))
        if worker not in self.pool.running:
            return
        self.pool.request_stop(worker, reason)
        match then:
            case "stops":
                self.pool.step(worker, (1, 2))
            case "ends":
                self.pool.end_run(worker, "success")
            case "hangs":
                self.pool.hang(DRAIN_STEP_TIMEOUT + 2)

    @precondition(lambda self: self.pool.can_work)
    @rule(which=WHICH)
    def hang_run(self, which: int) -> None:
        if self.pool.advance(to_the_run(which)):
            self.pool.hang(STALL + 2)

    @precondition(lambda self: self.pool.can_work)
    @rule(at=JOB_POSITIONS)
    def force_to_end(self, at: JobPosition) -> None:
        if worker := self.pool.advance(at):
            self.pool.force(worker)

    @precondition(lambda self: self.pool.can_work)
    @rule(at=JOB_POSITIONS)
    def cut_off(self, at: JobPosition) -> None:
        if worker := self.pool.advance(at):
            self.pool.cut_off(worker)

    @precondition(lambda self: self.pool.can_work)
    @rule(at=JOB_POSITIONS)
    def kill(self, at: JobPosition) -> None:
        if worker := self.pool.advance(at):
            self.pool.kill(worker)

    @precondition(lambda self: self.pool.can_take)
    @rule(calls=CALLS)
    def kill_every_worker_of_a_request(self, calls: int) -> None:
        for _ in range(MAX_DELIVER):
            if self.pool.can_take:
                worker = self.pool.take()
                self.pool.go_on(worker, calls, None)
                if worker in self.pool.oracles:
                    self.pool.kill(worker)
                self.pool.world.queue.expire_leases()

    @precondition(lambda self: self.pool.can_work)
    @rule(at=JOB_POSITIONS)
    def expire_leases(self, at: JobPosition) -> None:
        self.pool.advance(at)
        self.pool.world.queue.expire_leases()

    @rule(active=st.booleans())
    def bus(self, *, active: bool) -> None:
        self.pool.set_outage(self.pool.world.bus, active=active)

    @rule(active=st.booleans())
    def store(self, *, active: bool) -> None:
        self.pool.set_outage(self.pool.world.artifacts.outage, active=active)

    @rule(seconds=st.sampled_from([1, 7, 25]))
    def pass_time(self, seconds: float) -> None:
        self.pool.pass_time(seconds)

    # -- checks -----------------------------------------------------------------------------------

    @invariant()
    def invariants_hold(self) -> None:
        self.failed = True  # `teardown` skips its checks after a failed check
        self.pool.check()
        self.failed = False

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        try:
            if not self.failed:
                self.pool.heal()
                self.pool.check_end()
        finally:
            self.pool.close()
            self.pool.world.close()


@pytest.fixture
def _no_logs() -> Iterator[None]:
    """Disable logs: the formatting of a traceback takes longer than a job."""
    before = structlog.get_config()
    quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=quiet, cache_logger_on_first_use=False)
    yield
    structlog.configure(**before)


@pytest.mark.timeout(900)  # Hypothesis shrinks a failing example for up to 5 minutes
@pytest.mark.usefixtures("_no_logs")
def test_settlement_table_holds_in_every_course_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "PROGRESS_INTERVAL", 1.0)  # seconds on the world's clock
    run_state_machine_as_test(
        Workers,
        settings=settings(
            max_examples=SEARCH or EXAMPLES,
            stateful_step_count=RULES,
            deadline=None,
            derandomize=not SEARCH,
            suppress_health_check=[HealthCheck.too_slow],  # the computer may be busy
        ),
    )
