"""The table of systems: every row, every system, in turn."""

import traceback
from collections.abc import Mapping, Sequence

import click

from tests.bench.speed import profiling
from tests.bench.speed.bars import bars
from tests.bench.speed.figures import Figures
from tests.bench.speed.measuring import Plan, measure
from tests.bench.speed.report import Section, table
from tests.bench.speed.rows import Row
from tests.bench.speed.systems import Which

_COLUMNS = (
    "",
    "jobs/s",
    "device busy",
    "over the device, ms/job",
    "one job p50, ms",
    "p99, ms",
    "CPU, ms/job",
    "of the servers",
    "RSS, MB",
    "jobs",
)
_BARS = ("the daemon's", "found", "bar", "")
_EXPLAINED = """\
Each system is one process on separate servers, measured alone: first with a constant supply of
jobs, then with one job at a time. *Device busy* is the share of the time in which the device works,
from the start of the first job to the start of the last job. *Over the device* is the rest of that
time per job. *One job* is the time from a request to an idle system to its result; p99 is the
maximum if there are fewer than 100 jobs. *CPU* is that of the system's processes, and that of
nats-server and the store together; in the row of the device alone, the servers are idle."""


class Comparison:
    """Rows times systems.

    Args:
        plan: Duration of each measurement.
        rounds: Number of measurements of each system; the median counts. All systems are measured
            in each round, because the speed of a machine drifts.

    Attributes:
        results: The measured figures.
        failed: The failed measurements.
    """

    def __init__(self, plan: Plan, rounds: int) -> None:
        self.results: dict[Row, dict[Which, Figures]] = {}
        self.failed: list[tuple[Row, Which]] = []
        self._plan = plan
        self._rounds = rounds

    async def run(self, rows: Sequence[Row], systems: Sequence[Which]) -> None:
        """Measure everything, and print the table of each row when it is complete."""
        for row in rows:
            rounds_of: dict[Which, list[Figures]] = {which: [] for which in systems}
            for which in list(systems) * self._rounds:
                figures = await self._measure_once(which, row)
                if figures is not None:
                    rounds_of[which].append(figures)
            self.results[row] = {
                which: Figures.median(several) for which, several in rounds_of.items() if several
            }
            click.echo(f"\n{text(row, self.results[row])}\n")
        if bars(self.results):
            click.echo(text_of_bars(self.results))

    async def _measure_once(self, which: Which, row: Row) -> Figures | None:
        try:
            figures = await measure(which, row, self._plan)
        except Exception:  # noqa: BLE001 - the other systems are still measured
            click.echo(f"{which}, {row}:\n{traceback.format_exc()}", err=True)
            self.failed.append((row, which))
            return None
        click.echo(f"{row}: {which}: {figures.jobs_per_second:.1f} jobs/s", err=True)
        stacks = self._plan.profile_of(which, row)
        if stacks is not None:
            click.echo(f"{profiling.summary(stacks)}\n")
        return figures


def section(comparison: Comparison, *, plot_name: str | None) -> Section:
    """Return all rows for a file; `plot_name` is the file name of the plot, if there is one."""
    results = comparison.results
    parts = [_EXPLAINED]
    if plot_name is not None:
        parts.append(f"![How busy each system keeps the device]({plot_name})")
    parts += [text(row, found) for row, found in results.items()]
    parts += [f"Went wrong, so not measured: {which}, {row}." for row, which in comparison.failed]
    parts.append(f"### Bars\n\n{text_of_bars(results)}")
    numbers = {
        str(row): {which.slug: figures.small() for which, figures in found.items()}
        for row, found in results.items()
    }
    return Section("compare", "\n\n".join(parts), numbers)


def text_of_bars(results: Mapping[Row, Mapping[Which, Figures]]) -> str:
    """Return the table of bars."""
    return table(_BARS, [bar.cells() for bar in bars(results)])


def text(row: Row, found: Mapping[Which, Figures]) -> str:
    """Return the table of one row."""
    lines = [_line(row, which, figures) for which, figures in found.items()]
    return f"### {row}\n\n{table(_COLUMNS, lines)}"


def _line(row: Row, which: Which, figures: Figures) -> tuple[object, ...]:
    return (
        str(which),
        figures.jobs_per_second,
        figures.busy if row.milliseconds else None,  # undefined for a device that takes no time
        figures.over,
        figures.p50,
        figures.p99,
        figures.cpu,
        figures.servers,
        figures.resident,
        int(figures.jobs),
    )
