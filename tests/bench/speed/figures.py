"""The numbers of one system in one row, and how they come out of what was seen."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Self

from tests.bench.speed.stand_in import Run

MILLI = 1000


@dataclass(frozen=True)
class Figures:
    """What a row of the table says.

    Attributes:
        jobs: How many the load was.
        jobs_per_second: Under load.
        busy: The part of the time in which the device worked, under load.
        over: Milliseconds of each job in which it did not.
        p50: Milliseconds from a request to an idle system to its result.
        p99: The same, of the slow ones.
        samples: How many were asked for.
        cpu: Milliseconds of CPU for each job: the system's process with its descendants.
        servers: The same of nats-server and the store.
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
        """Each number's median: a machine that was busy for a moment does not count."""
        return cls(
            *(statistics.median(values) for values in zip(*map(astuple, rounds), strict=True))
        )

    def small(self) -> dict[str, float]:
        """What a regression would show in."""
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
    """How the device worked under load.

    From the beginning of the first run to that of the last one: each job then counts with all that
    it kept the device from, and neither a start nor an end comes in.

    Attributes:
        period: Seconds from one beginning to the next.
        device: Seconds that the device worked of these.
    """

    period: float
    device: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Self:
        """Of two or more runs of one device."""
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
        """Milliseconds."""
        return (self.period - self.device) * MILLI


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that so great a part of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]
