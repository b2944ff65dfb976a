"""Several workers, the faults that a test can cause, and the invariants of all workers.

The workers share one bus and one store of `tests.support.stepped_world`. A `JobOracle` observes
each job. `check` raises after a violation. `heal` ends every outage and finishes the remaining
work.
"""

import asyncio
from collections import defaultdict

from consumer.inference.cancel_token import StopReason
from consumer.jobs.executor import Limits
from consumer.jobs.finalizer import RETRY_DELAY_MOST
from consumer.jobs.image_stages import STORE_PAUSE_MOST
from consumer.ports.model import Interrupted
from generation_contracts import Task
from tests.support.behaviour import INBOX
from tests.support.job_oracle import ATTEMPTS, EXIT, STALL, JobOracle, keys_of
from tests.support.memory_ports import MemoryDelivery, Outage, raising
from tests.support.simulated_requests import (
    MAX_PAYLOAD,
    Ending,
    JobPosition,
    RequestDraft,
    Sent,
    possible_ending,
    script,
)
from tests.support.stepped_world import SteppedWorker, SteppedWorld

WORKERS = 2
ACK_WAIT = 10.0  # seconds, on the world's clock
MAX_DELIVER = ATTEMPTS + 1  # of the bus
ROUNDS = 6  # enough for every copy to find the result of the request before it
ENOUGH = 60  # calls; more than any job makes
AT_STORE = {f"{when} {call}" for when in ("before", "after") for call in ("store", "fetch")}


class WorkerPool:
    """Some workers of one task.

    Attributes:
        world: The shared bus, store and clock.
        workers: The workers. A new worker replaces a worker that has exited.
        oracles: The oracle of each worker with a delivery in progress.
        sent: All requests, by the sequence at which their senders published them.
    """

    def __init__(self, task: Task) -> None:
        limits = Limits(ack_wait=ACK_WAIT, max_attempts=ATTEMPTS, stall_timeout=STALL)
        self.world = SteppedWorld(task, limits, max_deliver=MAX_DELIVER, max_payload=MAX_PAYLOAD)
        self.world.artifacts.objects["one"] = b"image 4 4\n" + bytes(3 * 4 * 4)
        self.workers = [self.world.new_worker() for _ in range(WORKERS)]
        self.oracles: dict[SteppedWorker, JobOracle] = {}
        self.sent: dict[int, Sent] = {}
        self._leaving: set[SteppedWorker] = set()
        self._requeued: defaultdict[int, set[int]] = defaultdict(set)  # attempts, by sequence
        self._ended: list[tuple[JobOracle, int]] = []  # with the number of lease renewals so far
        self._first_events: dict[str, object] = {}  # the terminal events so far, by request id
        self._runs = 0  # of all models
        self._violations: list[str] = []
        self._allowed = {INBOX, self.world.subjects.dead_letter(task)}

    def publish(self, draft: RequestDraft) -> None:
        """Send a request."""
        body, sent = draft.sent(self.world.task, self.world.now(), len(self.sent) + 1)
        subject = self.world.subjects.request(self.world.task, sent.request_id)
        self.sent[self.world.queue.publish(subject, body, {})] = sent
        for allowed in (self.world.subjects.result, self.world.subjects.progress):
            self._allowed.add(allowed(self.world.task, sent.request_id))

    # -- the workers ------------------------------------------------------------------------------

    @property
    def can_work(self) -> bool:
        """Whether a job is in progress or a delivery waits."""
        return bool(self.oracles or self.world.queue.waiting)

    @property
    def can_take(self) -> bool:
        """Whether a delivery waits and a worker is idle."""
        return bool(self.world.queue.waiting and self.idle)

    @property
    def idle(self) -> list[SteppedWorker]:
        """The workers without a job."""
        return [worker for worker in self.workers if worker not in self.oracles]

    @property
    def running(self) -> list[SteppedWorker]:
        """The workers that wait for a run of their model."""
        return [w for w, oracle in self.oracles.items() if w.run and not oracle.finalizing]

    @property
    def exhausted(self) -> list[MemoryDelivery]:
        """The max-deliver-exhausted deliveries that no worker handles."""
        in_progress = [oracle.delivery.stream_sequence for oracle in self.oracles.values()]
        waiting = self.world.queue.exhausted
        return [one for one in waiting if one.stream_sequence not in in_progress]

    # -- progress ---------------------------------------------------------------------------------

    def take(self, exhausted: MemoryDelivery | None = None) -> SteppedWorker:
        """Make an idle worker take the next delivery, or an exhausted delivery."""
        worker = self.idle[0]
        delivery = (
            self.world.queue.take()
            if exhausted is None
            else exhausted.redelivery(exhausted.deliveries)
        )
        oracle = self.oracles[worker] = JobOracle(
            self.world,
            worker,
            delivery,
            self.sent,
            self._requeued[delivery.stream_sequence],
            exhausted=exhausted is not None,
            others=lambda: [one for one in self.oracles.values() if one is not oracle],
        )
        worker.take(delivery, oracle, exhausted=exhausted is not None)
        self._check_ended()
        return worker

    def advance(self, at: JobPosition) -> SteppedWorker | None:
        """Advance a worker to a position in its job. Return None if the job ends before."""
        choice = at.which % (len(self.oracles) + self.can_take)
        worker = list(self.oracles)[choice] if choice < len(self.oracles) else self.take()
        self.go_on(worker, at.calls, at.ending)
        return worker if worker in self.oracles else None

    def go_on(self, worker: SteppedWorker, calls: int, ending: Ending | None) -> None:
        """Let a worker make port calls. Without an ending, stop at a run of its model."""
        for _ in range(calls):
            if worker in self.running:
                if ending is None:
                    return
                self.end_run(worker, ending)
            elif worker.position:
                worker.go()
                self._check_ended()
            else:
                return

    def step(self, worker: SteppedWorker, position: tuple[int, int]) -> None:
        """Let the model take a step, and end the run if the job must stop."""
        oracle, run = self.oracles[worker], worker.run
        assert run is not None
        run.on_step(*position)
        oracle.runs[-1].last_step = self.world.loop.time()
        if run.cancelled():
            oracle.runs[-1].ending = "interrupted"
            worker.end_run(raising(Interrupted))
        self._check_ended()

    def end_run(self, worker: SteppedWorker, ending: Ending) -> None:
        """End the run of the model."""
        oracle, run = self.oracles[worker], worker.run
        assert run is not None
        self._runs += 1
        ran, ending = oracle.runs[-1], possible_ending(ending, self.world.task)
        ran.ending, ran.stop_requested_before = ending, oracle.stop_reason is not None
        self._check(run.cancelled() == ran.stop_requested_before, "the cancel token is not set")
        worker.end_run(script(ending, self._runs))
        self._check_ended()

    # -- faults -----------------------------------------------------------------------------------

    def request_stop(self, worker: SteppedWorker, reason: StopReason) -> None:
        """Request a job to stop. A job that uses the store or waits for the store stops at once."""
        oracle = self.oracles[worker]
        waits = not (worker.position or worker.run or self.world.bus.unavailable)
        at_store = waits or worker.position in AT_STORE
        one = oracle.sent.request_id if reason is StopReason.CANCEL else None
        found = worker.executor.interrupt(reason, one)
        if oracle.exhausted and not found:
            return  # the worker still checks the request and has no job
        self._check(found, f"{reason} finds no job")
        oracle.request_stop(reason)
        if reason is StopReason.DRAIN:
            self._leaving.add(worker)
        self.world.loop.rest()
        self._check(oracle.finalizing or not at_store, f"{reason} has no effect")
        self._check_ended()

    def force(self, worker: SteppedWorker) -> None:
        """Cancel the task of a job once, as the daemon does when it must exit at once."""
        if not self.oracles[worker].forced:
            self.oracles[worker].force()
            self._leaving.add(worker)
            worker.force()
            self._check_ended()

    def cut_off(self, worker: SteppedWorker) -> None:
        """Close a worker's connection to the bus permanently: the worker must exit."""
        self.oracles[worker].cut_off = worker.cut_off = True
        self._leaving.add(worker)

    def kill(self, worker: SteppedWorker) -> None:
        """Kill a worker with a job."""
        self._is_over(worker, self.oracles.pop(worker), killed=True)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and check that every worker with a job renews its lease."""
        before = {one: one.delivery.renewals.count for one in self.oracles.values()}
        self.world.loop.pass_time(seconds)
        self._check_ended()
        for oracle in self.oracles.values():
            renewals = oracle.delivery.renewals.count - before[oracle]
            # With fewer renewals the lease expires. An exhausted delivery has no lease.
            least = 0 if oracle.exhausted else int(seconds / ACK_WAIT * 3)
            self._check(renewals >= least, f"{renewals} renewals of a lease in {seconds} s")

    def hang(self, seconds: float) -> None:
        """Let time pass without a step, and check that a job with a stalled run ends."""
        hanging = {worker: self.oracles[worker] for worker in self.running if not worker.position}
        self.pass_time(seconds)
        for worker, oracle in hanging.items():
            if seconds > STALL or oracle.stop_reason is StopReason.DRAIN:
                waits = worker in self.running and not worker.position
                self._check(not waits, f"the job waits after {seconds} s without a step")

    def set_outage(self, service: Outage, *, active: bool) -> None:
        """Begin or end an outage."""
        if active:
            service.begin()
        else:
            service.end()
        self.world.loop.rest()
        self._check_ended()

    # -- checks -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Check that no invariant has been violated so far."""
        for oracle in self.oracles.values():
            self._violations += oracle.violations
        for sent in self.sent.values():
            event = self.world.events.stored(self.world.task, sent.request_id)
            first = self._first_events.setdefault(sent.request_id, event) if event else None
            self._check(event == first, f"another terminal event of {sent.request_id}")
            lost = keys_of(event) - self.world.artifacts.objects.keys()
            self._check(not lost, f"an event mentions {lost}, which are not in the store")
        elsewhere = self.world.events.subjects - self._allowed
        self._check(not elsewhere, f"published to {elsewhere}")
        assert not self._violations, "\n".join(self._violations)

    def heal(self) -> None:
        """End every outage and finish the remaining work."""
        for service in (self.world.bus, self.world.artifacts.outage):
            self.set_outage(service, active=False)
        for _ in range(2):
            for worker in list(self.oracles):
                self.go_on(worker, ENOUGH, "success")
            self.world.loop.pass_time(2 * STORE_PAUSE_MOST)  # some jobs wait for the store
        for _ in range(ROUNDS):
            self.world.queue.expire_leases()
            for _ in range(len(self.sent) * MAX_DELIVER):
                if self.world.queue.waiting:
                    self.go_on(self.take(), ENOUGH, "success")
            for delivery in self.exhausted:
                self.go_on(self.take(delivery), ENOUGH, None)
            self.world.loop.pass_time(RETRY_DELAY_MOST)  # until delayed retries are queued

    def check_end(self) -> None:
        """Check that every request has ended, and no work continues."""
        self.check()
        for sent in self.sent.values():
            assert sent.request_id in self._first_events, f"no terminal event of {sent}"
        assert len(self.world.queue) == 0
        self.world.loop.pass_time(2 * ACK_WAIT)
        for oracle, renewals in self._ended:
            count = oracle.delivery.renewals.count
            assert count == renewals, "a lease is renewed after the end of its job"
        self.close()
        assert not asyncio.all_tasks(self.world.loop)

    def close(self) -> None:
        """Kill every worker."""
        for worker in self.workers:
            worker.die()

    # -- inside -----------------------------------------------------------------------------------

    def _check_ended(self) -> None:
        """Check the jobs that have ended."""
        for worker, oracle in list(self.oracles.items()):
            job = worker.job
            if job is None or not job.done():
                continue
            del self.oracles[worker]
            if job.cancelled():
                oracle.was_cancelled()
                self._leaving.add(worker)
            elif job.exception() is not None and oracle.exhausted and oracle.cut_off:
                self._leaving.add(worker)  # the daemon exits with the error
            elif job.exception() is not None:
                self._violations.append(f"the worker raises {job.exception()!r}")
            else:
                oracle.ended(code := job.result())
                if code == EXIT:
                    self._leaving.add(worker)
            self._is_over(worker, oracle)

    def _is_over(self, worker: SteppedWorker, oracle: JobOracle, *, killed: bool = False) -> None:
        self._violations += oracle.violations
        if not killed:
            reports = len(worker.observer.reports)
            self._check(reports == worker.observer.started, f"{reports} reports")
            # An exhausted delivery may have had no job.
            stopped = oracle.delivery.renewal_stopped or oracle.exhausted
            self._check(stopped, "a lease may still be renewed after the end of its job")
        if killed or worker in self._leaving:
            worker.die()
            self.workers[self.workers.index(worker)] = self.world.new_worker()
        self._ended.append((oracle, oracle.delivery.renewals.count))

    def _check(self, condition: bool, message: str) -> None:
        if not condition:
            self._violations.append(message)
