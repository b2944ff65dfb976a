"""The measurement of one system in one row: warm-up, load, then single jobs."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.bench.speed import profiling, systems
from tests.bench.speed.figures import MILLI, Figures, Pace, percentile
from tests.bench.speed.processes import at_rest, cpu_seconds, resident
from tests.bench.speed.rows import Row
from tests.bench.speed.sender import WentWrongError
from tests.bench.speed.systems import System, Which
from tests.bench.speed.trial import Trial, new_trial

WARM_UP = 5  # jobs: connections, the store's first volumes, the threads of pools
IDLE = 0.02  # seconds before each single job; a system acknowledges the last job after its result
_FEWEST, _MOST = 8, 5_000  # jobs under load
_SAMPLES = (5, 200)  # single jobs
_ALONE = 0.6  # of the load's time goes to single jobs


@dataclass(frozen=True)
class Plan:
    """The duration of a measurement.

    Attributes:
        seconds: Of load, about.
        jobs: Of load, exactly; None: as many as fit into the seconds.
        profile: Folder for profiles of the daemon; None: there are none.
    """

    seconds: float
    jobs: int | None = None
    profile: Path | None = None

    def load(self, each: float) -> int:
        """Return the number of jobs under load if each takes this number of seconds."""
        return self.jobs or within(round(self.seconds / each), _FEWEST, _MOST)

    def profile_of(self, which: Which, row: Row) -> Path | None:
        """Return the file for the stacks of one measurement."""
        if self.profile is None or which.kind != "consumer":
            return None
        return self.profile / f"{which.slug}-{row.slug}.txt"

    def samples(self, each: float) -> int:
        """Return the number of single jobs if each takes this number of seconds."""
        return within(round(self.seconds * _ALONE / (each + IDLE)), *_SAMPLES)


async def measure(which: Which, row: Row, plan: Plan) -> Figures:
    """Measure one system, with nothing else running.

    Raises:
        WentWrongError: A response or an artifact is wrong.
    """
    with new_trial(row, plan.profile_of(which, row)) as trial:
        async with AsyncExitStack() as parts:
            system = await systems.start(which, trial, parts)
            try:
                figures = await _measure(system, which, trial, plan)
            except Exception as error:
                error.add_note(system.process.log_since_start()[-3000:])
                raise
        if trial.profile is not None:
            await profiling.end(system.process)
    return figures


async def _measure(system: System, which: Which, trial: Trial, plan: Plan) -> Figures:
    await at_rest(system.process.pid)
    await system.do(WARM_UP)
    each = Pace.of(trial.runs(which.slug)).period
    jobs = plan.load(each)
    servers = trial.stack.nats.pid, trial.stack.store.pid
    process_before, servers_before = cpu_seconds(system.process.pid), cpu_seconds(*servers)
    await system.do(jobs)
    process_after, servers_after = cpu_seconds(system.process.pid), cpu_seconds(*servers)
    memory = resident(system.process.pid)
    pace = Pace.of(trial.runs(which.slug)[WARM_UP:])
    single = await one_at_a_time(system, plan)
    _check(trial, which, WARM_UP + jobs + 1 + len(single))
    return Figures(
        jobs=jobs,
        jobs_per_second=1 / pace.period,
        busy=pace.busy,
        over=pace.over,
        p50=percentile(single, 0.5) * MILLI,
        p99=percentile(single, 0.99) * MILLI,
        samples=len(single),
        cpu=(process_after - process_before) / jobs * MILLI,
        servers=(servers_after - servers_before) / jobs * MILLI,
        resident=memory,
    )


async def one_at_a_time(system: System, plan: Plan) -> list[float]:
    """Return the seconds of single jobs, with a pause before each."""
    await asyncio.sleep(IDLE)
    await system.one()  # the first job after the load is not measured
    seconds: list[float] = []
    while not seconds or len(seconds) < plan.samples(seconds[0]):
        await asyncio.sleep(IDLE)
        seconds.append(await system.one())
    return seconds


def _check(trial: Trial, which: Which, jobs: int) -> None:
    """Check that every job ran once and stored an artifact in the format and size of the row."""
    runs, row = len(trial.runs(which.slug)), trial.row
    if runs != jobs:
        raise WentWrongError(f"{runs} runs for {jobs} jobs")
    if which.kind == "device":
        return
    stored = trial.store.inspect()
    if stored.objects != jobs:
        raise WentWrongError(f"{stored.objects} objects of {jobs} jobs are in the store")
    if (stored.file_format, stored.size) != (row.file_format, (row.side, row.side)):
        raise WentWrongError(f"an artifact is {stored.file_format} of {stored.size}")


def within(value: int, least: int, most: int) -> int:
    """Return the nearest value within the limits."""
    return max(least, min(most, value))
