"""`follow_run`: progress, cancellation, and stalled threads."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from consumer.inference import monitor, progress
from consumer.inference.cancel_token import CancelToken, Stopped, StopReason
from consumer.inference.monitor import ThreadStalled, follow_run
from consumer.inference.progress import Progress, Update
from consumer.inference.run_queue import Ticket
from consumer.ports.model import Interrupted, ModelError, OutOfMemory, RunnerOutput

OUTPUT = RunnerOutput(warnings=("done",))
SOON = 5.0  # seconds; only bounds a wait for something that must happen
REASONS = pytest.mark.parametrize("reason", StopReason)


class Followed:
    """A run without a thread: the test takes the steps and ends the run."""

    def __init__(self) -> None:
        self.ticket = Ticket()
        self.progress = self.ticket.progress
        self.token = CancelToken()
        self.updates: list[Update] = []
        self.while_publishing: Callable[[], None] = lambda: None
        self.progress.begin()

    async def follow(self, *, stall_timeout: float = 60.0) -> RunnerOutput:
        async with asyncio.timeout(SOON):
            return await follow_run(
                self.ticket, self.token, stall_timeout=stall_timeout, publish=self._publish
            )

    async def _publish(self, update: Update) -> None:
        self.updates.append(update)
        self.while_publishing()

    @property
    def steps(self) -> list[tuple[int, int]]:
        return [(update.step, update.of) for update in self.updates]

    @property
    def texts(self) -> list[str]:
        return [update.text for update in self.updates]

    def end(self, result: RunnerOutput | Exception = OUTPUT) -> None:
        self.progress.end()
        self.ticket.finish(result)


Action = Callable[[], None]


class FakeClock:
    """Replaces the waits and the clock of the monitor: each wait executes one action."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[float] = []  # seconds
        self.actions: list[Action] = []
        self.now = time.monotonic()
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(monitor, "asyncio", SimpleNamespace(wait=self._wait))
        monkeypatch.setattr(monitor, "time", clock)
        monkeypatch.setattr(progress, "time", clock)

    async def _wait(self, _: object, **limit: float) -> None:
        self.waits.append(limit["timeout"])
        self.actions.pop(0)()

    def advance(self, seconds: float) -> Action:
        """Return an action that only advances the time."""

        def action() -> None:
            self.now += seconds

        return action


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)


# -- progress -------------------------------------------------------------------------------------


async def test_only_the_latest_step_between_two_polls_is_published(
    fake_clock: FakeClock,
) -> None:
    followed = Followed()

    def steps_up_to(first: int, last: int) -> Action:
        def take() -> None:
            for step in range(first, last + 1):
                followed.progress.step(step, 100)

        return take

    def end() -> None:
        followed.progress.step(100, 100)
        followed.end()

    nothing = fake_clock.advance(monitor.PROGRESS_INTERVAL)
    fake_clock.actions = [steps_up_to(1, 30), nothing, steps_up_to(31, 99), nothing, end]
    assert await followed.follow() is OUTPUT
    assert followed.steps == [(30, 100), (99, 100), (100, 100)]
    assert set(fake_clock.waits) == {monitor.PROGRESS_INTERVAL}
    assert monitor.PROGRESS_INTERVAL >= 1 / 5


async def test_run_without_a_step_publishes_no_progress(fake_clock: FakeClock) -> None:
    followed = Followed()
    fake_clock.actions = [fake_clock.advance(1.0), followed.end]
    assert await followed.follow() is OUTPUT
    assert followed.steps == []


async def test_text_between_two_polls_is_published_in_one_piece(
    fake_clock: FakeClock,
) -> None:
    followed = Followed()

    def write(*texts: str) -> Action:
        def action() -> None:
            for number, text in enumerate(texts):
                followed.progress.step(len(followed.texts) * 10 + number, 100)
                followed.progress.text(text)

        return action

    nothing = fake_clock.advance(monitor.PROGRESS_INTERVAL)
    end = followed.end
    fake_clock.actions = [write("a", " b"), nothing, write("", " c"), end]
    assert await followed.follow() is OUTPUT
    assert followed.texts == ["a b", " c"]


async def test_text_without_a_new_step_is_published_at_the_next_poll(fake_clock: FakeClock) -> None:
    followed = Followed()

    def end() -> None:
        assert followed.texts == ["late"]
        followed.end()

    fake_clock.actions = [lambda: followed.progress.text("late"), end]
    assert await followed.follow() is OUTPUT
    assert followed.texts == ["late"]


async def test_last_text_is_published_if_the_run_ends_during_a_publish(
    fake_clock: FakeClock,
) -> None:
    followed = Followed()

    def add_and_end() -> None:
        if not followed.ticket.ended.done():
            followed.progress.text("the end")
            followed.end()

    followed.while_publishing = add_and_end
    fake_clock.actions = [lambda: followed.progress.step(1, 9)]
    assert await followed.follow() is OUTPUT
    assert followed.texts == ["", "the end"]


async def test_text_of_a_stopped_run_is_not_published(fake_clock: FakeClock) -> None:
    followed = Followed()
    followed.token.set(StopReason.CANCEL)
    followed.progress.text("half a sen")
    followed.end(Interrupted())
    with pytest.raises(Stopped):
        await followed.follow()
    assert followed.texts == []


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ModelError("E"), OutOfMemory("E"), ValueError("v")])
async def test_error_of_the_run_is_raised(error: Exception) -> None:
    followed = Followed()
    followed.end(error)
    with pytest.raises(type(error)):
        await followed.follow()


@REASONS
async def test_stopped_run_raises_the_stop_reason(reason: StopReason) -> None:
    followed = Followed()
    followed.token.set(reason)
    followed.end(Interrupted())
    with pytest.raises(Stopped) as stopped:
        await followed.follow()
    assert stopped.value.reason is reason


@REASONS
async def test_run_that_completes_after_a_stop_request_counts_as_stopped(
    reason: StopReason,
) -> None:
    followed = Followed()
    followed.token.set(reason)
    followed.end()
    with pytest.raises(Stopped) as stopped:
        await followed.follow()
    assert stopped.value.reason is reason


async def test_interruption_without_a_stop_request_is_raised() -> None:
    followed = Followed()
    followed.end(Interrupted())
    with pytest.raises(Interrupted):
        await followed.follow()


@pytest.mark.parametrize("reason", [StopReason.CANCEL, StopReason.DEADLINE])
async def test_monitor_waits_for_the_end_of_a_cancelled_or_late_run(
    reason: StopReason, fake_clock: FakeClock
) -> None:
    followed = Followed()
    followed.token.set(reason)
    polls = [fake_clock.advance(monitor.DRAIN_STEP_TIMEOUT)] * 5
    fake_clock.actions = [*polls, lambda: followed.end(Interrupted())]
    with pytest.raises(Stopped):
        await followed.follow()
    assert fake_clock.actions == []


async def test_run_that_does_not_stop_on_drain_is_abandoned(fake_clock: FakeClock) -> None:
    followed = Followed()
    followed.token.set(StopReason.DRAIN)
    # The timeout starts when the monitor notices the drain.
    fake_clock.actions = [fake_clock.advance(s) for s in (3.0, monitor.DRAIN_STEP_TIMEOUT, 0.1)]
    with pytest.raises(Stopped) as stopped:
        await followed.follow()
    assert stopped.value.reason is StopReason.DRAIN
    assert fake_clock.actions == []
    assert not followed.ticket.ended.done()


async def test_run_without_a_step_stalls(fake_clock: FakeClock) -> None:
    followed = Followed()
    fake_clock.actions = [fake_clock.advance(s) for s in (15.0, 15.0, 15.0, 15.0, 0.1)]
    with pytest.raises(ThreadStalled):
        await followed.follow(stall_timeout=60.0)
    assert fake_clock.actions == []
    assert not followed.ticket.ended.done()


async def test_frozen_process_does_not_count_as_a_stalled_run(
    fake_clock: FakeClock,
) -> None:
    followed = Followed()
    fake_clock.actions = [fake_clock.advance(s) for s in (3_600.0, 15.0, 15.0, 14.9)]
    fake_clock.actions.append(followed.end)
    assert await followed.follow(stall_timeout=60.0) is OUTPUT


async def test_run_that_ends_at_the_timeout_does_not_stall(fake_clock: FakeClock) -> None:
    followed = Followed()

    def late() -> None:
        fake_clock.now += 61.0
        followed.end()

    fake_clock.actions = [late]
    assert await followed.follow(stall_timeout=60.0) is OUTPUT


async def test_finished_member_does_not_stall_while_another_takes_steps(
    fake_clock: FakeClock,
) -> None:
    other = Progress()
    followed = Followed()
    followed.ticket.batch = (followed.progress, other)

    def step_of_the_other() -> None:
        fake_clock.now += 9.0
        other.step(1, 100)

    fake_clock.actions = [step_of_the_other] * 9 + [followed.end]
    assert await followed.follow(stall_timeout=10.0) is OUTPUT
    assert fake_clock.actions == []


async def test_batch_without_a_step_stalls(fake_clock: FakeClock) -> None:
    followed = Followed()
    followed.ticket.batch = (followed.progress, Progress())
    fake_clock.actions = [fake_clock.advance(s) for s in (15.0, 15.0, 15.0, 15.0, 0.1)]
    with pytest.raises(ThreadStalled):
        await followed.follow(stall_timeout=60.0)


async def test_each_step_restarts_the_stall_timeout(fake_clock: FakeClock) -> None:
    followed = Followed()

    def step() -> None:
        fake_clock.now += 9.0
        followed.progress.step(len(followed.steps) + 1, 100)

    fake_clock.actions = [step] * 5 + [fake_clock.advance(s) for s in (2.5, 2.5, 2.5, 2.5, 0.1)]
    with pytest.raises(ThreadStalled):
        await followed.follow(stall_timeout=10.0)
    assert fake_clock.actions == []
    assert len(followed.steps) == 5
