"""The figures of one system in one row, computed from its runs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Self

from tests.bench.speed.stand_in import Run

MILLI = 1000


@dataclass(frozen=True)
class Figures:
    """The values of one row of the table.

    Attributes:
        jobs: Number of jobs under load.
        jobs_per_second: Under load.
        busy: Share of the time in which the device worked, under load.
        over: Milliseconds of each job in which the device was idle.
        p50: Milliseconds from a request to an idle system to its result.
        p99: The 99th percentile of the same time.
        samples: Number of single jobs.
        cpu: Milliseconds of CPU for each job: the system's process with its descendants.
        servers: Milliseconds of CPU for each job: nats-server and the store.
        resident: MB, under load.
    """

    jobs: float
    jobs_per_second: float
    busy: float
    over: float
    p50: float
    p99: float
    samples: float
    cpu: float
    servers: float
    resident: float

    @classmethod
    def median(cls, rounds: Sequence[Self]) -> Self:
        """Return the median of each number, to ignore short load of the machine."""
        return cls(
            *(statistics.median(values) for values in zip(*map(astuple, rounds), strict=True))
        )

    def small(self) -> dict[str, float]:
        """Return the numbers of the baseline."""
        return {
            "jobs_per_second": self.jobs_per_second,
            "busy": self.busy,
            "over_ms": self.over,
            "p50_ms": self.p50,
            "cpu_ms": self.cpu,
            "rss_mb": self.resident,
        }


@dataclass(frozen=True)
class Pace:
    """The pace of the device under load.

    Covers the time from the start of the first run to the start of the last run. So each job counts
    with its idle time of the device, and neither start-up nor shutdown is included.

    Attributes:
        period: Seconds from the start of a run to the start of the next run.
        device: Seconds of this period in which the device worked.
    """

    period: float
    device: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Self:
        """Compute the pace of two or more runs of one device."""
        gaps = len(runs) - 1
        return cls(
            period=(runs[-1].began - runs[0].began) / gaps,
            device=sum(run.ended - run.began for run in runs[:-1]) / gaps,
        )

    @property
    def busy(self) -> float:
        return self.device / self.period

    @property
    def over(self) -> float:
        """Milliseconds of each job in which the device was idle."""
        return (self.period - self.device) * MILLI


def percentile(values: Sequence[float], part: float) -> float:
    """Return the smallest value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]
