"""Several workers, the faults that a test can cause in them, and the checks that always hold.

The workers share one bus and one store of `tests.support.stepped_world`. A `Story` observes each
job. `check` raises when a promise was broken; `heal` ends every outage and finishes the remaining
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
from tests.support.memory_ports import MemoryDelivery, Outage, raising
from tests.support.stepped_world import SteppedWorker, SteppedWorld
from tests.support.story import ATTEMPTS, EXIT, STALL, Story, keys_of
from tests.support.wishes import MAX_PAYLOAD, Ending, Place, Sent, Wish, script, within

WORKERS = 2
ACK_WAIT = 10.0  # seconds, on the world's clock
MAX_DELIVER = ATTEMPTS + 1  # of the bus
ROUNDS = 6  # until every copy has found the end of the request before it
ENOUGH = 60  # calls, for any job to come to its end
AT_THE_STORE = {f"{when} {call}" for when in ("before", "after") for call in ("store", "fetch")}


class Crew:
    """Some workers of one task.

    Attributes:
        world: The shared bus, store and clock.
        workers: The processes; a worker that ends is replaced.
        stories: The stories of the workers with a delivery in progress.
        sent: All requests, by the sequence at which their senders published them.
    """

    def __init__(self, task: Task) -> None:
        limits = Limits(ack_wait=ACK_WAIT, max_attempts=ATTEMPTS, stall_timeout=STALL)
        self.world = SteppedWorld(task, limits, max_deliver=MAX_DELIVER, max_payload=MAX_PAYLOAD)
        self.world.artifacts.objects["one"] = b"picture 4 4\n" + bytes(3 * 4 * 4)
        self.workers = [self.world.new_worker() for _ in range(WORKERS)]
        self.stories: dict[SteppedWorker, Story] = {}
        self.sent: dict[int, Sent] = {}
        self._leaving: set[SteppedWorker] = set()
        self._requeued: defaultdict[int, set[int]] = defaultdict(set)  # attempts, by sequence
        self._ended: list[tuple[Story, int]] = []  # with the renewals of the lease until then
        self._first_events: dict[str, object] = {}  # the terminal events so far, by request id
        self._runs = 0  # of all models
        self._broken: list[str] = []
        self._allowed = {INBOX, self.world.subjects.dead_letter(task)}

    def publish(self, wish: Wish) -> None:
        """Send a request."""
        body, sent = wish.sent(self.world.task, self.world.now(), len(self.sent) + 1)
        subject = self.world.subjects.request(self.world.task, sent.request_id)
        self.sent[self.world.queue.publish(subject, body, {})] = sent
        for allowed in (self.world.subjects.result, self.world.subjects.progress):
            self._allowed.add(allowed(self.world.task, sent.request_id))

    # -- the workers ------------------------------------------------------------------------------

    @property
    def can_work(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.stories or self.world.queue.waiting)

    @property
    def can_take(self) -> bool:
        """Whether a delivery waits and a worker is idle."""
        return bool(self.world.queue.waiting and self.idle)

    @property
    def idle(self) -> list[SteppedWorker]:
        """The workers without a job."""
        return [worker for worker in self.workers if worker not in self.stories]

    @property
    def running(self) -> list[SteppedWorker]:
        """The workers that wait for a run of their model."""
        return [w for w, story in self.stories.items() if w.run and not story.finalizing]

    @property
    def exhausted(self) -> list[MemoryDelivery]:
        """The max-deliver-exhausted deliveries that no worker handles."""
        taken = [story.delivery.stream_sequence for story in self.stories.values()]
        return [one for one in self.world.queue.exhausted if one.stream_sequence not in taken]

    # -- progress ---------------------------------------------------------------------------------

    def take(self, exhausted: MemoryDelivery | None = None) -> SteppedWorker:
        """Make an idle worker take the next delivery, or an exhausted one."""
        worker = self.idle[0]
        delivery = (
            self.world.queue.take() if exhausted is None else exhausted.again(exhausted.deliveries)
        )
        story = self.stories[worker] = Story(
            self.world,
            worker,
            delivery,
            self.sent,
            self._requeued[delivery.stream_sequence],
            exhausted=exhausted is not None,
            others=lambda: [one for one in self.stories.values() if one is not story],
        )
        worker.take(delivery, story, exhausted=exhausted is not None)
        self._check_ended()
        return worker

    def bring(self, place: Place) -> SteppedWorker | None:
        """Bring a worker to a point in its job; None if the job ends before."""
        choice = place.which % (len(self.stories) + self.can_take)
        worker = list(self.stories)[choice] if choice < len(self.stories) else self.take()
        self.go_on(worker, place.calls, place.ending)
        return worker if worker in self.stories else None

    def go_on(self, worker: SteppedWorker, calls: int, ending: Ending | None) -> None:
        """Let a worker make calls of its ports; without an ending, stop at a run of its model."""
        for _ in range(calls):
            if worker in self.running:
                if ending is None:
                    return
                self.end_run(worker, ending)
            elif worker.place:
                worker.go()
                self._check_ended()
            else:
                return

    def step(self, worker: SteppedWorker, position: tuple[int, int]) -> None:
        """Let the model take a step, and stop there if the job was asked to stop."""
        story, held = self.stories[worker], worker.run
        assert held is not None
        held.on_step(*position)
        story.runs[-1].last_step = self.world.loop.time()
        if held.cancelled():
            story.runs[-1].ending = "interrupted"
            worker.end_run(raising(Interrupted))
        self._check_ended()

    def end_run(self, worker: SteppedWorker, ending: Ending) -> None:
        """End the run of the model."""
        story, held = self.stories[worker], worker.run
        assert held is not None
        self._runs += 1
        ran, ending = story.runs[-1], within(ending, self.world.task)
        ran.ending, ran.asked_before = ending, story.asked is not None
        self._claim(held.cancelled() == ran.asked_before, "the model is not asked to stop")
        worker.end_run(script(ending, self._runs))
        self._check_ended()

    # -- faults -----------------------------------------------------------------------------------

    def ask(self, worker: SteppedWorker, reason: StopReason) -> None:
        """Ask a job to stop; a job that uses the store, or waits for it, stops at once."""
        story = self.stories[worker]
        waits = not (worker.place or worker.run or self.world.bus.unavailable)
        at_the_store = waits or worker.place in AT_THE_STORE
        one = story.sent.request_id if reason is StopReason.CANCEL else None
        found = worker.executor.interrupt(reason, one)
        if story.exhausted and not found:
            return  # the worker checks the request and has no job yet
        self._claim(found, f"{reason} finds no job")
        story.ask(reason)
        if reason is StopReason.DRAIN:
            self._leaving.add(worker)
        self.world.loop.rest()
        self._claim(story.finalizing or not at_the_store, f"{reason} has no effect")
        self._check_ended()

    def force(self, worker: SteppedWorker) -> None:
        """Cancel a job once, as the daemon does when it must end at once."""
        if not self.stories[worker].forced:
            self.stories[worker].force()
            self._leaving.add(worker)
            worker.force()
            self._check_ended()

    def cut_off(self, worker: SteppedWorker) -> None:
        """A worker's client loses the bus for good: its process has to end."""
        self.stories[worker].cut_off = worker.cut_off = True
        self._leaving.add(worker)

    def kill(self, worker: SteppedWorker) -> None:
        """Kill a worker with a job."""
        self._is_over(worker, self.stories.pop(worker), killed=True)

    def pass_time(self, seconds: float) -> None:
        """Let time pass; every worker with a job renews its lease."""
        before = {story: story.delivery.renewals.count for story in self.stories.values()}
        self.world.loop.pass_time(seconds)
        self._check_ended()
        for story in self.stories.values():
            beats = story.delivery.renewals.count - before[story]
            # With fewer renewals the lease expires. An exhausted delivery has no lease.
            least = 0 if story.exhausted else int(seconds / ACK_WAIT * 3)
            self._claim(beats >= least, f"{beats} renewals of a lease in {seconds} s")

    def hang(self, seconds: float) -> None:
        """Let time pass without a step; a job whose run stalls ends."""
        hanging = {worker: self.stories[worker] for worker in self.running if not worker.place}
        self.pass_time(seconds)
        for worker, story in hanging.items():
            if seconds > STALL or story.asked is StopReason.DRAIN:
                waits = worker in self.running and not worker.place
                self._claim(not waits, f"a run is waited for after {seconds} s without a step")

    def away(self, service: Outage, *, away: bool) -> None:
        """Begin or end an outage."""
        if away:
            service.begin()
        else:
            service.end()
        self.world.loop.rest()
        self._check_ended()

    # -- the promises -----------------------------------------------------------------------------

    def check(self) -> None:
        """Check that no promise has been broken so far."""
        for story in self.stories.values():
            self._broken += story.broken
        for sent in self.sent.values():
            event = self.world.events.stored(self.world.task, sent.request_id)
            first = self._first_events.setdefault(sent.request_id, event) if event else None
            self._claim(event == first, f"another terminal event of {sent.request_id}")
            lost = keys_of(event) - self.world.artifacts.objects.keys()
            self._claim(not lost, f"an event mentions {lost}, which are not in the store")
        elsewhere = self.world.events.subjects - self._allowed
        self._claim(not elsewhere, f"published to {elsewhere}")
        assert not self._broken, "\n".join(self._broken)

    def heal(self) -> None:
        """End every outage and finish the remaining work."""
        for service in (self.world.bus, self.world.artifacts.outage):
            self.away(service, away=False)
        for _ in range(2):
            for worker in list(self.stories):
                self.go_on(worker, ENOUGH, "made")
            self.world.loop.pass_time(2 * STORE_PAUSE_MOST)  # some jobs wait for the store
        for _ in range(ROUNDS):
            self.world.queue.expire_leases()
            for _ in range(len(self.sent) * MAX_DELIVER):
                if self.world.queue.waiting:
                    self.go_on(self.take(), ENOUGH, "made")
            for delivery in self.exhausted:
                self.go_on(self.take(delivery), ENOUGH, None)
            self.world.loop.pass_time(
                RETRY_DELAY_MOST
            )  # requests that wait for a retry are queued again

    def check_the_end(self) -> None:
        """Check that every request has ended, and nothing goes on after that."""
        self.check()
        for sent in self.sent.values():
            assert sent.request_id in self._first_events, f"no terminal event of {sent}"
        assert len(self.world.queue) == 0
        self.world.loop.pass_time(2 * ACK_WAIT)
        for story, beats in self._ended:
            assert story.delivery.renewals.count == beats, "a lease is renewed after its job's end"
        self.close()
        assert not asyncio.all_tasks(self.world.loop)

    def close(self) -> None:
        """End every process."""
        for worker in self.workers:
            worker.die()

    # -- inside -----------------------------------------------------------------------------------

    def _check_ended(self) -> None:
        """Check the jobs that have ended."""
        for worker, story in list(self.stories.items()):
            job = worker.job
            if job is None or not job.done():
                continue
            del self.stories[worker]
            if job.cancelled():
                story.was_cancelled()
                self._leaving.add(worker)
            elif job.exception() is not None and story.exhausted and story.cut_off:
                self._leaving.add(worker)  # the daemon ends with it
            elif job.exception() is not None:
                self._broken.append(f"the worker raises {job.exception()!r}")
            else:
                story.ended(code := job.result())
                if code == EXIT:
                    self._leaving.add(worker)
            self._is_over(worker, story)

    def _is_over(self, worker: SteppedWorker, story: Story, *, killed: bool = False) -> None:
        self._broken += story.broken
        if not killed:
            reports = len(worker.observer.reports)
            self._claim(reports == worker.observer.started, f"{reports} reports")
            lapsed = story.delivery.renewal_stopped or story.exhausted  # it may have had no job
            self._claim(lapsed, "a lease may still be renewed after its job's end")
        if killed or worker in self._leaving:
            worker.die()
            self.workers[self.workers.index(worker)] = self.world.new_worker()
        self._ended.append((story, story.delivery.renewals.count))

    def _claim(self, true: bool, otherwise: str) -> None:
        if not true:
            self._broken.append(otherwise)
