"""The required numbers of the daemon, compared with the measurements."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.bench.speed.figures import Figures
from tests.bench.speed.rows import Row
from tests.bench.speed.systems import SYSTEMS, Which

Found = Mapping[Which, Figures]

_ONE = SYSTEMS["consumer-1"]
_SEVERAL = (SYSTEMS["consumer-2"], SYSTEMS["consumer-3"])
_SERIAL = SYSTEMS["serial"]

_BUSY = {(1024, 50): 0.97, (1024, 200): 0.99}  # by side and milliseconds; at least
_OVER = {1024: 30.0, 64: 6.0}  # ms by side; at most
_SOON = 8.0  # ms from publish to result, at 64x64 with a device that takes no time
_CPU = 1.2  # times the serial loop's


@dataclass(frozen=True)
class Bar:
    """One required number.

    Attributes:
        what: Name of the measurement.
        row: The row of the measurement.
        found: The measured number.
        limit: The required number.
        at_least: Whether `limit` is a minimum.
    """

    what: str
    row: Row
    found: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the measured number is within the limit."""
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    def cells(self) -> tuple[object, ...]:
        """Return the cells of a table row."""
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "MISSED"
        return (f"{self.what}: {self.row}", self.found, f"{sign} {self.limit:.3g}", verdict)


def bars(results: Mapping[Row, Found]) -> list[Bar]:
    """Return every bar with a measurement."""
    return [bar for row, found in results.items() for bar in _of(row, found)]


def _of(row: Row, found: Found) -> Iterator[Bar]:
    if row.device == "sleeps" and row.file_format == "png":
        yield from _of_gaps(row, found)
    daemons = [figures for which, figures in found.items() if which.kind == "consumer"]
    others = [
        figures for which, figures in found.items() if which.kind not in {"consumer", "device"}
    ]
    if daemons and others:
        best = max(figures.jobs_per_second for figures in daemons)
        other = max(figures.jobs_per_second for figures in others)
        yield Bar("jobs/s, over the best of the others", row, best / other, 1.0, at_least=True)
    if daemons and _SERIAL in found:
        least = min(figures.cpu for figures in daemons)
        yield Bar("CPU, over the serial loop's", row, least / found[_SERIAL].cpu, _CPU)


def _of_gaps(row: Row, found: Found) -> Iterator[Bar]:
    several = [found[which].busy for which in _SEVERAL if which in found]
    busy = _BUSY.get((row.side, row.milliseconds))
    if several and busy is not None:
        what = "device busy, max_ack_pending 2 or 3"
        yield Bar(what, row, max(several), busy, at_least=True)
    if _ONE in found and row.side in _OVER:
        what = "ms over the device, max_ack_pending 1"
        yield Bar(what, row, found[_ONE].over, _OVER[row.side])
    if _ONE in found and (row.side, row.milliseconds) == (64, 0):
        yield Bar("ms from publish to result, p50", row, found[_ONE].p50, _SOON)
