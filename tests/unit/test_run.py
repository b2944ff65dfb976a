"""One watched run: what is told of it, what stops it, and what becomes of a thread that hangs."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from consumer import run
from consumer.ports.model import Interrupted, ModelError, OutOfMemory, RunnerOutput
from consumer.run import Hanging, Interrupt, Reason, Steps, Stopped, watch

OUTPUT = RunnerOutput(warnings=("done",))
SOON = 5.0  # seconds; only bounds a wait for something that must happen
REASONS = pytest.mark.parametrize("reason", Reason)


@dataclass
class Watched:
    """A run without a thread: the test itself takes its steps and ends it."""

    steps: Steps = field(default_factory=Steps)
    interrupt: Interrupt = field(default_factory=Interrupt)
    told: list[tuple[int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    company: tuple[Steps, ...] = ()
    while_telling: Callable[[], None] = lambda: None
    ending: asyncio.Future[RunnerOutput] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def watch(self, *, stall_timeout: float = 60.0) -> RunnerOutput:
        async with asyncio.timeout(SOON):
            return await watch(
                self.ending,
                steps=self.steps,
                interrupt=self.interrupt,
                stall_timeout=stall_timeout,
                publish=self._publish,
                company=self.company,
            )

    async def _publish(self) -> None:
        self.texts.append(self.steps.take_text())
        self.told.append(self.steps.position)
        self.while_telling()


Turn = Callable[[], None]


class Clockwork:
    """Stands in for the watcher's waits and its clock: each wait is one turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[float] = []  # seconds
        self.turns: list[Turn] = []
        self.now = time.monotonic()
        watchers = SimpleNamespace(wait=self._wait, Event=asyncio.Event)
        monkeypatch.setattr("consumer.run.asyncio", watchers)
        monkeypatch.setattr("consumer.run.time", SimpleNamespace(monotonic=lambda: self.now))

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
    watched = Watched()

    def steps_up_to(first: int, last: int) -> Turn:
        def take() -> None:
            for step in range(first, last + 1):
                watched.steps(step, 100)

        return take

    def end() -> None:
        watched.steps(100, 100)
        watched.ending.set_result(OUTPUT)

    nothing = clockwork.passing(run.PROGRESS_INTERVAL)
    clockwork.turns = [steps_up_to(1, 30), nothing, steps_up_to(31, 99), nothing, end]
    assert await watched.watch() is OUTPUT
    assert watched.told == [(30, 100), (99, 100), (100, 100)]
    assert set(clockwork.waits) == {run.PROGRESS_INTERVAL}
    assert run.PROGRESS_INTERVAL >= 1 / 5


async def test_run_that_tells_no_step_is_not_told_of(clockwork: Clockwork) -> None:
    watched = Watched()
    clockwork.turns = [clockwork.passing(1.0), lambda: watched.ending.set_result(OUTPUT)]
    assert await watched.watch() is OUTPUT
    assert watched.told == []


async def test_what_is_added_to_a_text_is_told_in_one_piece_for_each_look(
    clockwork: Clockwork,
) -> None:
    watched = Watched()

    def write(*texts: str) -> Turn:
        def turn() -> None:
            for number, text in enumerate(texts):
                watched.steps(len(watched.texts) * 10 + number, 100)
                watched.steps.add(text)

        return turn

    nothing = clockwork.passing(run.PROGRESS_INTERVAL)
    end = lambda: watched.ending.set_result(OUTPUT)  # noqa: E731 - a turn like the others
    clockwork.turns = [write("a", " b"), nothing, write("", " c"), end]
    assert await watched.watch() is OUTPUT
    assert watched.texts == ["a b", " c"]


async def test_text_without_a_new_step_is_told_at_the_next_look(clockwork: Clockwork) -> None:
    watched = Watched()

    def end() -> None:
        assert watched.texts == ["late"]
        watched.ending.set_result(OUTPUT)

    clockwork.turns = [lambda: watched.steps.add("late"), end]
    assert await watched.watch() is OUTPUT
    assert watched.texts == ["late"]


async def test_last_of_a_text_is_told_though_the_run_ends_while_the_text_before_is_told(
    clockwork: Clockwork,
) -> None:
    watched = Watched()

    def add_and_end() -> None:
        if not watched.ending.done():
            watched.steps.add("the end")
            watched.ending.set_result(OUTPUT)

    watched.while_telling = add_and_end
    clockwork.turns = [lambda: watched.steps(1, 9)]
    assert await watched.watch() is OUTPUT
    assert watched.texts == ["", "the end"]


async def test_text_of_a_run_that_stopped_is_not_waited_for(clockwork: Clockwork) -> None:
    watched = Watched()
    watched.interrupt.set(Reason.CANCEL)
    watched.steps.add("half a sen")
    watched.ending.set_exception(Interrupted())
    with pytest.raises(Stopped):
        await watched.watch()
    assert watched.texts == []


def test_nothing_that_a_thread_adds_is_lost_or_told_twice() -> None:
    steps = Steps()
    pieces = [f"{number} " for number in range(20_000)]
    writing = threading.Thread(target=lambda: [steps.add(piece) for piece in pieces])
    writing.start()
    taken = []
    while writing.is_alive() or steps.has_text:
        taken.append(steps.take_text())
    assert "".join(taken) == "".join(pieces)


async def test_run_that_begins_again_is_at_step_0_without_a_text(clockwork: Clockwork) -> None:
    steps = Steps()
    steps(7, 9)
    steps.add("the first try")
    clockwork.now += 5.0
    steps.begin_again()
    assert (steps.position, steps.take_text(), steps.has_text) == ((0, 9), "", False)
    assert steps.started == steps.last == clockwork.now
    assert steps.seconds_per_step() is None


async def test_mean_time_of_a_step_is_known_after_the_first() -> None:
    steps = Steps()
    assert steps.seconds_per_step() is None
    steps(4, 10)
    assert steps.seconds_per_step() == (steps.last - steps.started) / 4


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ModelError("E"), OutOfMemory("E"), ValueError("v")])
async def test_what_the_run_raises_comes_out(error: Exception) -> None:
    watched = Watched()
    watched.ending.set_exception(error)
    with pytest.raises(type(error)):
        await watched.watch()


@REASONS
async def test_run_that_stops_when_asked_gives_the_reason(reason: Reason) -> None:
    watched = Watched()
    watched.interrupt.set(reason)
    watched.ending.set_exception(Interrupted())
    with pytest.raises(Stopped) as stopped:
        await watched.watch()
    assert stopped.value.reason is reason


@REASONS
async def test_run_that_was_done_before_it_heard_has_stopped_all_the_same(reason: Reason) -> None:
    watched = Watched()
    watched.interrupt.set(reason)
    watched.ending.set_result(OUTPUT)
    with pytest.raises(Stopped) as stopped:
        await watched.watch()
    assert stopped.value.reason is reason


async def test_run_that_stops_unasked_is_not_passed_off_as_stopped() -> None:
    watched = Watched()
    watched.ending.set_exception(Interrupted())
    with pytest.raises(Interrupted):
        await watched.watch()


@pytest.mark.parametrize("reason", [Reason.CANCEL, Reason.DEADLINE])
async def test_cancelled_or_late_run_is_waited_for_until_the_device_has_stopped(
    reason: Reason, clockwork: Clockwork
) -> None:
    watched = Watched()
    watched.interrupt.set(reason)
    looks = [clockwork.passing(run.PATIENCE)] * 5
    clockwork.turns = [*looks, lambda: watched.ending.set_exception(Interrupted())]
    with pytest.raises(Stopped):
        await watched.watch()
    assert clockwork.turns == []


async def test_thread_that_does_not_stop_on_drain_is_left_behind(clockwork: Clockwork) -> None:
    watched = Watched()
    watched.interrupt.set(Reason.DRAIN)
    # The patience begins when the drain is noticed; until its end the thread may still stop.
    clockwork.turns = [clockwork.passing(s) for s in (3.0, run.PATIENCE, 0.1)]
    with pytest.raises(Stopped) as stopped:
        await watched.watch()
    assert stopped.value.reason is Reason.DRAIN
    assert clockwork.turns == []
    assert not watched.ending.done()


async def test_thread_without_a_step_hangs(clockwork: Clockwork) -> None:
    watched = Watched()
    clockwork.turns = [clockwork.passing(s) for s in (15.0, 15.0, 15.0, 15.0, 0.1)]
    with pytest.raises(Hanging):
        await watched.watch(stall_timeout=60.0)
    assert clockwork.turns == []
    assert not watched.ending.done()


async def test_process_that_was_frozen_does_not_take_its_thread_to_hang(
    clockwork: Clockwork,
) -> None:
    watched = Watched()
    clockwork.turns = [clockwork.passing(s) for s in (3_600.0, 15.0, 15.0, 14.9)]
    clockwork.turns.append(lambda: watched.ending.set_result(OUTPUT))
    assert await watched.watch(stall_timeout=60.0) is OUTPUT


async def test_run_that_ends_at_the_last_moment_does_not_hang(clockwork: Clockwork) -> None:
    watched = Watched()

    def late() -> None:
        clockwork.now += 61.0
        watched.ending.set_result(OUTPUT)

    clockwork.turns = [late]
    assert await watched.watch(stall_timeout=60.0) is OUTPUT


async def test_one_whose_part_is_over_does_not_hang_while_its_company_takes_steps(
    clockwork: Clockwork,
) -> None:
    other = Steps()
    watched = Watched()
    watched.company = (watched.steps, other)

    def step_of_the_other() -> None:
        clockwork.now += 9.0
        other(other.position[0] + 1, 100)

    clockwork.turns = [step_of_the_other] * 9 + [lambda: watched.ending.set_result(OUTPUT)]
    assert await watched.watch(stall_timeout=10.0) is OUTPUT
    assert clockwork.turns == []


async def test_company_of_which_nobody_takes_a_step_hangs(clockwork: Clockwork) -> None:
    watched = Watched()
    watched.company = (watched.steps, Steps())
    clockwork.turns = [clockwork.passing(s) for s in (15.0, 15.0, 15.0, 15.0, 0.1)]
    with pytest.raises(Hanging):
        await watched.watch(stall_timeout=60.0)


async def test_each_step_starts_the_stall_timeout_anew(clockwork: Clockwork) -> None:
    watched = Watched()

    def step() -> None:
        clockwork.now += 9.0
        watched.steps(watched.steps.position[0] + 1, 100)

    clockwork.turns = [step] * 5 + [clockwork.passing(s) for s in (2.5, 2.5, 2.5, 2.5, 0.1)]
    with pytest.raises(Hanging):
        await watched.watch(stall_timeout=10.0)
    assert clockwork.turns == []
    assert len(watched.told) == 5


# -- the interrupt --------------------------------------------------------------------------------


async def test_first_reason_stands() -> None:
    interrupt = Interrupt()
    assert not interrupt.ask()
    interrupt.check()
    interrupt.set(Reason.CANCEL)
    interrupt.set(Reason.DRAIN)
    assert interrupt.ask()
    with pytest.raises(Stopped) as stopped:
        interrupt.check()
    assert stopped.value.reason is Reason.CANCEL


@REASONS
async def test_interrupt_ends_a_sleep(reason: Reason) -> None:
    interrupt = Interrupt()
    sleeping = asyncio.create_task(interrupt.sleep(3_600))
    await asyncio.sleep(0)
    interrupt.set(reason)
    with pytest.raises(Stopped) as stopped:
        await asyncio.wait_for(sleeping, SOON)
    assert stopped.value.reason is reason


async def test_sleep_after_an_interrupt_does_not_begin() -> None:
    interrupt = Interrupt()
    interrupt.set(Reason.DRAIN)
    with pytest.raises(Stopped):
        await asyncio.wait_for(interrupt.sleep(3_600), SOON)


async def test_sleep_without_an_interrupt_ends_by_itself() -> None:
    await asyncio.wait_for(Interrupt().sleep(0.001), SOON)


# -- work that may be broken off ------------------------------------------------------------------


async def test_work_gives_what_it_gives() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await asyncio.wait_for(Interrupt().during(work()), SOON) == 7


async def test_work_raises_what_it_raises() -> None:
    async def work() -> None:
        raise OutOfMemory("E")

    with pytest.raises(OutOfMemory):
        await asyncio.wait_for(Interrupt().during(work()), SOON)


@REASONS
@pytest.mark.parametrize("before", [True, False])
async def test_interrupt_breaks_work_off_and_waits_for_its_end(
    reason: Reason, *, before: bool
) -> None:
    interrupt, ended = Interrupt(), False

    async def work() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended = True

    if before:
        interrupt.set(reason)
    doing = asyncio.create_task(interrupt.during(work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    interrupt.set(reason)
    with pytest.raises(Stopped) as stopped:
        await asyncio.wait_for(doing, SOON)
    assert stopped.value.reason is reason
    assert ended or before  # what has not begun has nothing to end


async def test_work_that_is_done_when_the_interrupt_comes_is_kept() -> None:
    interrupt = Interrupt()

    async def work() -> int:
        interrupt.set(Reason.DRAIN)
        return 7

    assert await asyncio.wait_for(interrupt.during(work()), SOON) == 7


async def test_cancellation_of_the_waiter_ends_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    doing = asyncio.create_task(Interrupt().during(work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    doing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doing
    assert ended.is_set()
