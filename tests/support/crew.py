"""Workers whose every job has its story: what can be done to them, and what they have promised.

The workers share one bus and one store of `tests.support.stepped_world`. Whatever breaks a promise
is noted in `broken`; `whole` says so, and `heal` ends every outage and has everything done that is
left.
"""

import asyncio
from collections import defaultdict

from consumer.conclusion import RETRY_DELAY_MOST
from consumer.execution import Limits
from consumer.pictures import STORE_PAUSE_MOST
from consumer.ports import Interrupted
from consumer.run import Reason
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
        world: What they share.
        workers: Their processes; whoever ends is replaced.
        stories: Of those with a delivery in hand.
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
        self._given_back: defaultdict[int, set[int]] = defaultdict(set)  # attempts, by sequence
        self._ended: list[tuple[Story, int]] = []  # with the renewals of the lease until then
        self._stands: dict[str, object] = {}  # the terminal events so far
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

    # -- who there is -----------------------------------------------------------------------------

    @property
    def can_work(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.stories or self.world.queue.waiting)

    @property
    def can_take(self) -> bool:
        """Whether a delivery waits and somebody can take it."""
        return bool(self.world.queue.waiting and self.idle)

    @property
    def idle(self) -> list[SteppedWorker]:
        """Those without a job."""
        return [worker for worker in self.workers if worker not in self.stories]

    @property
    def running(self) -> list[SteppedWorker]:
        """Those whose model runs and is waited for."""
        return [w for w, story in self.stories.items() if w.run and not story.concluding]

    @property
    def strays(self) -> list[MemoryDelivery]:
        """What the bus delivers no more, and nobody has in hand."""
        taken = [story.delivery.stream_sequence for story in self.stories.values()]
        return [one for one in self.world.queue.stranded if one.stream_sequence not in taken]

    # -- they go on -------------------------------------------------------------------------------

    def take(self, stray: MemoryDelivery | None = None) -> SteppedWorker:
        """Have an idle worker take the next delivery, or put one aside that comes no more."""
        worker = self.idle[0]
        delivery = self.world.queue.take() if stray is None else stray.again(stray.deliveries)
        story = self.stories[worker] = Story(
            self.world,
            worker,
            delivery,
            self.sent,
            self._given_back[delivery.stream_sequence],
            stranded=stray is not None,
            others=lambda: [one for one in self.stories.values() if one is not story],
        )
        worker.take(delivery, story, stranded=stray is not None)
        self._look()
        return worker

    def bring(self, place: Place) -> SteppedWorker | None:
        """Bring a worker to a point in its job; None where the job ends before."""
        choice = place.which % (len(self.stories) + self.can_take)
        worker = list(self.stories)[choice] if choice < len(self.stories) else self.take()
        self.go_on(worker, place.calls, place.ending)
        return worker if worker in self.stories else None

    def go_on(self, worker: SteppedWorker, calls: int, ending: Ending | None) -> None:
        """Let a worker make so many calls; None ends no run of its model."""
        for _ in range(calls):
            if worker in self.running:
                if ending is None:
                    return
                self.end_run(worker, ending)
            elif worker.place:
                worker.go()
                self._look()
            else:
                return

    def step(self, worker: SteppedWorker, position: tuple[int, int]) -> None:
        """Have the model take a step, and stop there if it is asked to."""
        story, held = self.stories[worker], worker.run
        assert held is not None
        held.on_step(*position)
        story.runs[-1].last_step = self.world.loop.time()
        if held.cancelled():
            story.runs[-1].ending = "interrupted"
            worker.end_run(raising(Interrupted))
        self._look()

    def end_run(self, worker: SteppedWorker, ending: Ending) -> None:
        """Have the model come to an end."""
        story, held = self.stories[worker], worker.run
        assert held is not None
        self._runs += 1
        ran, ending = story.runs[-1], within(ending, self.world.task)
        ran.ending, ran.asked_before = ending, story.asked is not None
        self._claim(held.cancelled() == ran.asked_before, "the model is not told to stop")
        worker.end_run(script(ending, self._runs))
        self._look()

    # -- what happens to them ---------------------------------------------------------------------

    def ask(self, worker: SteppedWorker, reason: Reason) -> None:
        """Ask a job to stop; one that is at the store, or waits for it, does so at once."""
        story = self.stories[worker]
        waits = not (worker.place or worker.run or self.world.bus.away)
        at_the_store = waits or worker.place in AT_THE_STORE
        one = story.sent.request_id if reason is Reason.CANCEL else None
        found = worker.execution.interrupt(reason, one)
        if story.stranded and not found:
            return  # it is being looked at, and has no job yet
        self._claim(found, f"{reason} finds no job")
        story.ask(reason)
        if reason is Reason.DRAIN:
            self._leaving.add(worker)
        self.world.loop.rest()
        self._claim(story.concluding or not at_the_store, f"{reason} is not heard")
        self._look()

    def force(self, worker: SteppedWorker) -> None:
        """Cancel a job, as the daemon does when it must end at once; it does so only once."""
        if not self.stories[worker].forced:
            self.stories[worker].force()
            self._leaving.add(worker)
            worker.force()
            self._look()

    def cut_off(self, worker: SteppedWorker) -> None:
        """A worker's client loses the bus for good: its process has to end."""
        self.stories[worker].cut_off = worker.cut_off = True
        self._leaving.add(worker)

    def kill(self, worker: SteppedWorker) -> None:
        """Kill a worker with a job."""
        self._is_over(worker, self.stories.pop(worker), killed=True)

    def pass_time(self, seconds: float) -> None:
        """Let time pass; whoever has a job all the while renews its lease."""
        before = {story: story.delivery.beats.count for story in self.stories.values()}
        self.world.loop.pass_time(seconds)
        self._look()
        for story in self.stories.values():
            beats = story.delivery.beats.count - before[story]
            # Fewer, and the lease runs out; there is none on what is delivered no more.
            least = 0 if story.stranded else int(seconds / ACK_WAIT * 3)
            self._claim(beats >= least, f"{beats} renewals of a lease in {seconds} s")

    def hang(self, seconds: float) -> None:
        """Let time pass without a step; whoever waits for one gives up."""
        hanging = {worker: self.stories[worker] for worker in self.running if not worker.place}
        self.pass_time(seconds)
        for worker, story in hanging.items():
            if seconds > STALL or story.asked is Reason.DRAIN:
                waits = worker in self.running and not worker.place
                self._claim(not waits, f"a run is waited for after {seconds} s without a step")

    def away(self, service: Outage, *, away: bool) -> None:
        """Begin or end an outage."""
        if away:
            service.begin()
        else:
            service.end()
        self.world.loop.rest()
        self._look()

    # -- what they have promised ------------------------------------------------------------------

    def check(self) -> None:
        """See whether everything has been as it must be so far."""
        for story in self.stories.values():
            self._broken += story.broken
        for sent in self.sent.values():
            event = self.world.events.stored(self.world.task, sent.request_id)
            first = self._stands.setdefault(sent.request_id, event) if event else None
            self._claim(event == first, f"another terminal event of {sent.request_id}")
            lost = keys_of(event) - self.world.artifacts.objects.keys()
            self._claim(not lost, f"an event tells of {lost}, which are not in the store")
        elsewhere = self.world.events.subjects - self._allowed
        self._claim(not elsewhere, f"published to {elsewhere}")
        assert not self._broken, "\n".join(self._broken)

    def heal(self) -> None:
        """Bring everything back, and do what there is to do."""
        for service in (self.world.bus, self.world.artifacts.outage):
            self.away(service, away=False)
        for _ in range(2):
            for worker in list(self.stories):
                self.go_on(worker, ENOUGH, "made")
            self.world.loop.pass_time(2 * STORE_PAUSE_MOST)  # some wait to try the store again
        for _ in range(ROUNDS):
            self.world.queue.run_out_leases()
            for _ in range(len(self.sent) * MAX_DELIVER):
                if self.world.queue.waiting:
                    self.go_on(self.take(), ENOUGH, "made")
            for stray in self.strays:
                self.go_on(self.take(stray), ENOUGH, None)
            self.world.loop.pass_time(RETRY_DELAY_MOST)  # what waits for its retry is queued again

    def check_the_end(self) -> None:
        """See whether every request has come to its end, and nothing goes on behind it."""
        self.check()
        for sent in self.sent.values():
            assert sent.request_id in self._stands, f"nothing came of {sent}"
        assert len(self.world.queue) == 0
        self.world.loop.pass_time(2 * ACK_WAIT)
        for story, beats in self._ended:
            assert story.delivery.beats.count == beats, "a lease is renewed after its job's end"
        self.close()
        assert not asyncio.all_tasks(self.world.loop)

    def close(self) -> None:
        """End every process."""
        for worker in self.workers:
            worker.die()

    # -- inside -----------------------------------------------------------------------------------

    def _look(self) -> None:
        """See whose job has ended."""
        for worker, story in list(self.stories.items()):
            job = worker.job
            if job is None or not job.done():
                continue
            del self.stories[worker]
            if job.cancelled():
                story.was_cancelled()
                self._leaving.add(worker)
            elif job.exception() is not None and story.stranded and story.cut_off:
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
            lapsed = story.delivery.lapsed or story.stranded  # there may have been no job
            self._claim(lapsed, "a lease may still be renewed after its job's end")
        if killed or worker in self._leaving:
            worker.die()
            self.workers[self.workers.index(worker)] = self.world.new_worker()
        self._ended.append((story, story.delivery.beats.count))

    def _claim(self, true: bool, otherwise: str) -> None:
        if not true:
            self._broken.append(otherwise)
