"""Throughput and fairness of several daemons on one queue."""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from tests.bench.speed.processes import at_rest
from tests.bench.speed.report import Section, table
from tests.bench.speed.rows import Row
from tests.bench.speed.sender import Sender
from tests.bench.speed.systems import wire_of_daemon
from tests.bench.speed.trial import Trial, new_trial

_WARM_UP = 5  # jobs for each daemon


@dataclass(frozen=True)
class Shares:
    """The jobs of several daemons.

    Attributes:
        jobs_per_second: Throughput of all daemons together.
        jobs: Number of jobs of each daemon.
    """

    jobs_per_second: float
    jobs: tuple[int, ...]

    @property
    def fairness(self) -> float:
        """The smallest share of one daemon, divided by an equal share."""
        return min(self.jobs) * len(self.jobs) / sum(self.jobs)


async def measure(daemons: int, row: Row, *, each: int, seconds: float) -> Shares:
    """Measure this number of daemons on one queue.

    Args:
        daemons: Number of daemons.
        row: The kind of job.
        each: Deliveries in flight for each daemon; the durable's limit is for all together.
        seconds: Duration of the load if the daemons have no overhead.
    """
    names = [f"daemon-{number}" for number in range(daemons)]
    with new_trial(row) as trial:
        async with AsyncExitStack() as parts:
            started = [trial.start_daemon(name, daemons * each) for name in names]
            for daemon in started:
                daemon.wait_ready()
            sender = Sender(wire_of_daemon(trial))
            await sender.open(trial.stack.nats.url, parts)
            await at_rest(*(daemon.pid for daemon in started))
            await sender.do(_WARM_UP * daemons)
            before = [len(trial.runs(name)) for name in names]
            await sender.do(round(seconds / max(row.seconds, 0.01)) * daemons)
            return _shares(trial, names, before)


def section(row: Row, each: int, found: Mapping[int, Shares]) -> Section:
    """Return the table by number of daemons."""
    fewest = min(found)
    one = found[fewest].jobs_per_second / fewest
    lines = [
        (
            str(daemons),
            shares.jobs_per_second,
            shares.jobs_per_second / one,
            shares.fairness,
            ", ".join(map(str, shares.jobs)),
        )
        for daemons, shares in found.items()
    ]
    columns = ("daemons", "jobs/s", "times one daemon", "fairness", "jobs of each")
    text = (
        f"Daemons on one queue: {row}; max_ack_pending is {each} times their number. *Fairness* "
        "is the smallest share of one daemon, divided by an equal share.\n\n"
        f"{table(columns, lines)}"
    )
    numbers = {
        str(daemons): {"jobs_per_second": shares.jobs_per_second, "fairness": shares.fairness}
        for daemons, shares in found.items()
    }
    return Section("scaling", text, numbers)


def _shares(trial: Trial, names: Sequence[str], before: Sequence[int]) -> Shares:
    runs = [trial.runs(name)[warm:] for name, warm in zip(names, before, strict=True)]
    began = sorted(run.began for of_one in runs for run in of_one)
    return Shares(
        jobs_per_second=(len(began) - 1) / (began[-1] - began[0]),
        jobs=tuple(map(len, runs)),
    )
