"""The cost of a job for several queue lengths."""

import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

from consumer.app.apply import apply
from consumer.settings import Settings
from tests.bench.speed.figures import MILLI
from tests.bench.speed.processes import REST, children, cpu_seconds, resident
from tests.bench.speed.report import Section, table
from tests.bench.speed.rows import Row
from tests.bench.speed.sender import Sender
from tests.bench.speed.systems import wire_of_daemon
from tests.bench.speed.trial import TASK, Trial, new_trial

ROW = Row("sleeps", 0, 64, "png")  # no device time that hides the cost of the queue
_WARM_UP = 20  # jobs, or more
_SHALLOW = 20  # a queue shorter than this multiple of the jobs is refilled


@dataclass(frozen=True)
class Cost:
    """The cost of a job at one depth.

    Attributes:
        ready: Seconds from the daemon's start until it is ready.
        period: Milliseconds from one result to the next.
        cpu: Milliseconds of CPU for each job, of the daemon.
        nats: Milliseconds of CPU for each job, of nats-server.
        resident: MB of nats-server.
    """

    ready: float
    period: float
    cpu: float
    nats: float
    resident: float


async def measure(depth: int, jobs: int, max_ack_pending: int) -> Cost:
    """Fill a queue, start a daemon on it, and measure this number of jobs."""
    with new_trial(ROW) as trial:
        async with AsyncExitStack() as parts:
            await _make_streams(trial)
            sender = Sender(wire_of_daemon(trial))
            await sender.open(trial.stack.nats.url, parts)
            await sender.publish(depth)
            began = time.perf_counter()
            daemon = trial.start_daemon("daemon", max_ack_pending)
            daemon.wait_ready()
            ready = time.perf_counter() - began
            refill = depth < _SHALLOW * (_WARM_UP + jobs)
            await _warm_up(sender, daemon.pid, refill=refill)
            pids = daemon.pid, trial.stack.nats.pid
            before = time.perf_counter(), *map(cpu_seconds, pids)
            await _await_results(sender, jobs, refill=refill)
            after = time.perf_counter(), *map(cpu_seconds, pids)
            period, cpu, nats = (
                (late - early) / jobs * MILLI for early, late in zip(before, after, strict=True)
            )
            return Cost(ready, period, cpu, nats, resident(pids[1]))


def section(jobs: int, max_ack_pending: int, found: Mapping[int, Cost]) -> Section:
    """Return the table by depth."""
    lines = [
        (f"{depth:,}", cost.period, cost.cpu, cost.nats, cost.resident, cost.ready)
        for depth, cost in found.items()
    ]
    columns = (
        "requests in the queue",
        "ms/job",
        "CPU of the daemon, ms/job",
        "of nats-server",
        "RSS of nats-server, MB",
        "daemon ready after, s",
    )
    text = (
        f"A longer queue: {ROW}; max_ack_pending {max_ack_pending}; {jobs} jobs at each depth.\n\n"
        f"{table(columns, lines)}"
    )
    numbers = {
        str(depth): {"ms": cost.period, "cpu_ms": cost.cpu, "nats_cpu_ms": cost.nats}
        for depth, cost in found.items()
    }
    return Section("depth", text, numbers)


async def _make_streams(trial: Trial) -> None:
    settings = {name.lower(): value for name, value in trial.stack.environment().items()}
    await apply(
        Settings(**settings, consumer_subject_root=trial.subjects.root, model_type=TASK)  # type: ignore[arg-type] # read from text, as everywhere
    )


async def _warm_up(sender: Sender, daemon: int, *, refill: bool) -> None:
    """Run jobs until the helper process has started and is idle."""
    while True:
        before = time.monotonic(), cpu_seconds(*children(daemon))
        await _await_results(sender, _WARM_UP, refill=refill)
        after = time.monotonic(), cpu_seconds(*children(daemon))
        if after[1] - before[1] <= REST * (after[0] - before[0]):
            return


async def _await_results(sender: Sender, jobs: int, *, refill: bool) -> None:
    for _ in range(jobs):
        await sender.result()
        if refill:
            await sender.publish(1)
