"""Following one run: its progress, its cancellation, and a thread that stalls."""

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
    """A run without a thread: the test itself takes its steps and ends it."""

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


Turn = Callable[[], None]


class Clockwork:
    """Stands in for the watcher's waits and its clock: each wait is one turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[float] = []  # seconds
        self.turns: list[Turn] = []
        self.now = time.monotonic()
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(monitor, "asyncio", SimpleNamespace(wait=self._wait))
        monkeypatch.setattr(monitor, "time", clock)
        monkeypatch.setattr(progress, "time", clock)

    async def _wait(self, _: object, **limit: float) -> None:
        self.waits.append(limit["timeout"])
        self.turns.pop(0)()

    def passing(self, seconds: float) -> Turn:
        """A turn in which nothing happens but time."""

        def turn() -> None:
            self.now += seconds

        return turn


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Clockwork:
    return Clockwork(monkeypatch)


# -- progress -------------------------------------------------------------------------------------


async def test_many_steps_between_two_looks_are_told_once_and_the_latest_wins(
    clockwork: Clockwork,
) -> None:
    followed = Followed()

    def steps_up_to(first: int, last: int) -> Turn:
        def take() -> None:
            for step in range(first, last + 1):
                followed.progress.step(step, 100)

        return take

    def end() -> None:
        followed.progress.step(100, 100)
        followed.end()

    nothing = clockwork.passing(monitor.PROGRESS_INTERVAL)
    clockwork.turns = [steps_up_to(1, 30), nothing, steps_up_to(31, 99), nothing, end]
    assert await followed.follow() is OUTPUT
    assert followed.steps == [(30, 100), (99, 100), (100, 100)]
    assert set(clockwork.waits) == {monitor.PROGRESS_INTERVAL}
    assert monitor.PROGRESS_INTERVAL >= 1 / 5


async def test_run_that_tells_no_step_is_not_told_of(clockwork: Clockwork) -> None:
    followed = Followed()
    clockwork.turns = [clockwork.passing(1.0), followed.end]
    assert await followed.follow() is OUTPUT
    assert followed.steps == []


async def test_what_is_added_to_a_text_is_told_in_one_piece_for_each_look(
    clockwork: Clockwork,
) -> None:
    followed = Followed()

    def write(*texts: str) -> Turn:
        def turn() -> None:
            for number, text in enumerate(texts):
                followed.progress.step(len(followed.texts) * 10 + number, 100)
                followed.progress.text(text)

        return turn

    nothing = clockwork.passing(monitor.PROGRESS_INTERVAL)
    end = followed.end
    clockwork.turns = [write("a", " b"), nothing, write("", " c"), end]
    assert await followed.follow() is OUTPUT
    assert followed.texts == ["a b", " c"]


async def test_text_without_a_new_step_is_told_at_the_next_look(clockwork: Clockwork) -> None:
    followed = Followed()

    def end() -> None:
        assert followed.texts == ["late"]
        followed.end()

    clockwork.turns = [lambda: followed.progress.text("late"), end]
    assert await followed.follow() is OUTPUT
    assert followed.texts == ["late"]


async def test_last_of_a_text_is_told_though_the_run_ends_while_the_text_before_is_told(
    clockwork: Clockwork,
) -> None:
    followed = Followed()

    def add_and_end() -> None:
        if not followed.ticket.ended.done():
            followed.progress.text("the end")
            followed.end()

    followed.while_publishing = add_and_end
    clockwork.turns = [lambda: followed.progress.step(1, 9)]
    assert await followed.follow() is OUTPUT
    assert followed.texts == ["", "the end"]


async def test_text_of_a_run_that_stopped_is_not_waited_for(clockwork: Clockwork) -> None:
    followed = Followed()
    followed.token.set(StopReason.CANCEL)
    followed.progress.text("half a sen")
    followed.end(Interrupted())
    with pytest.raises(Stopped):
        await followed.follow()
    assert followed.texts == []


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ModelError("E"), OutOfMemory("E"), ValueError("v")])
async def test_what_the_run_raises_comes_out(error: Exception) -> None:
    followed = Followed()
    followed.end(error)
    with pytest.raises(type(error)):
        await followed.follow()


@REASONS
async def test_run_that_stops_when_asked_gives_the_reason(reason: StopReason) -> None:
    followed = Followed()
    followed.token.set(reason)
    followed.end(Interrupted())
    with pytest.raises(Stopped) as stopped:
        await followed.follow()
    assert stopped.value.reason is reason


@REASONS
async def test_run_that_was_done_before_it_heard_has_stopped_all_the_same(
    reason: StopReason,
) -> None:
    followed = Followed()
    followed.token.set(reason)
    followed.end()
    with pytest.raises(Stopped) as stopped:
        await followed.follow()
    assert stopped.value.reason is reason


async def test_run_that_stops_unasked_is_not_passed_off_as_stopped() -> None:
    followed = Followed()
    followed.end(Interrupted())
    with pytest.raises(Interrupted):
        await followed.follow()


@pytest.mark.parametrize("reason", [StopReason.CANCEL, StopReason.DEADLINE])
async def test_cancelled_or_late_run_is_waited_for_until_the_device_has_stopped(
    reason: StopReason, clockwork: Clockwork
) -> None:
    followed = Followed()
    followed.token.set(reason)
    looks = [clockwork.passing(monitor.DRAIN_STEP_TIMEOUT)] * 5
    clockwork.turns = [*looks, lambda: followed.end(Interrupted())]
    with pytest.raises(Stopped):
        await followed.follow()
    assert clockwork.turns == []


async def test_thread_that_does_not_stop_on_drain_is_left_behind(clockwork: Clockwork) -> None:
    followed = Followed()
    followed.token.set(StopReason.DRAIN)
    # The patience begins when the drain is noticed; until its end the thread may still stop.
    clockwork.turns = [clockwork.passing(s) for s in (3.0, monitor.DRAIN_STEP_TIMEOUT, 0.1)]
    with pytest.raises(Stopped) as stopped:
        await followed.follow()
    assert stopped.value.reason is StopReason.DRAIN
    assert clockwork.turns == []
    assert not followed.ticket.ended.done()


async def test_thread_without_a_step_hangs(clockwork: Clockwork) -> None:
    followed = Followed()
    clockwork.turns = [clockwork.passing(s) for s in (15.0, 15.0, 15.0, 15.0, 0.1)]
    with pytest.raises(ThreadStalled):
        await followed.follow(stall_timeout=60.0)
    assert clockwork.turns == []
    assert not followed.ticket.ended.done()


async def test_process_that_was_frozen_does_not_take_its_thread_to_hang(
    clockwork: Clockwork,
) -> None:
    followed = Followed()
    clockwork.turns = [clockwork.passing(s) for s in (3_600.0, 15.0, 15.0, 14.9)]
    clockwork.turns.append(followed.end)
    assert await followed.follow(stall_timeout=60.0) is OUTPUT


async def test_run_that_ends_at_the_last_moment_does_not_hang(clockwork: Clockwork) -> None:
    followed = Followed()

    def late() -> None:
        clockwork.now += 61.0
        followed.end()

    clockwork.turns = [late]
    assert await followed.follow(stall_timeout=60.0) is OUTPUT


async def test_member_whose_part_is_over_does_not_stall_while_another_makes_steps(
    clockwork: Clockwork,
) -> None:
    other = Progress()
    followed = Followed()
    followed.ticket.batch = (followed.progress, other)

    def step_of_the_other() -> None:
        clockwork.now += 9.0
        other.step(1, 100)

    clockwork.turns = [step_of_the_other] * 9 + [followed.end]
    assert await followed.follow(stall_timeout=10.0) is OUTPUT
    assert clockwork.turns == []


async def test_batch_of_which_no_member_makes_a_step_stalls(clockwork: Clockwork) -> None:
    followed = Followed()
    followed.ticket.batch = (followed.progress, Progress())
    clockwork.turns = [clockwork.passing(s) for s in (15.0, 15.0, 15.0, 15.0, 0.1)]
    with pytest.raises(ThreadStalled):
        await followed.follow(stall_timeout=60.0)


async def test_each_step_starts_the_stall_timeout_anew(clockwork: Clockwork) -> None:
    followed = Followed()

    def step() -> None:
        clockwork.now += 9.0
        followed.progress.step(len(followed.steps) + 1, 100)

    clockwork.turns = [step] * 5 + [clockwork.passing(s) for s in (2.5, 2.5, 2.5, 2.5, 0.1)]
    with pytest.raises(ThreadStalled):
        await followed.follow(stall_timeout=10.0)
    assert clockwork.turns == []
    assert len(followed.steps) == 5
