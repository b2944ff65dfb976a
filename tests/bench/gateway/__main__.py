"""Cost and capacity of the HTTP gateway: `uv run --group bench python -m tests.bench.gateway`.

Uses real servers, real gateways and a stand-in for the model. Linux only.
"""

import click

from tests.bench.gateway import comparing, crowd, rates
from tests.bench.speed.commands import begin, run
from tests.bench.speed.measuring import Plan
from tests.bench.speed.options import Commas, write
from tests.bench.speed.report import Files, Section
from tests.bench.speed.rows import Row

PARTS = ("compare", "rates", "crowd")


@click.command(help=__doc__)
@click.option("--parts", type=Commas(str, PARTS), default=PARTS, help=", ".join(PARTS))
@click.option("--seconds", default=4.0, show_default=True, help="Of load, for each number.")
@click.option("--requests", default=2_000, show_default=True, help="Of each kind, for `rates`.")
@click.option("--small", is_flag=True, help="A tenth of the crowd and one row, as a check.")
@write
def main(
    parts: tuple[str, ...], seconds: float, requests: int, *, small: bool, files: Files | None
) -> None:
    """Measure, print, and write files with `--write`."""
    head = begin()
    for part in parts:
        if part == "compare":
            section = _compared(seconds, comparing.ROWS[1:2] if small else comparing.ROWS)
        elif part == "rates":
            section = rates.section(run(rates.measure(requests)))
        else:
            size = crowd.Size(50, 5, 10, 5, 500) if small else crowd.Size()
            section = crowd.section(run(crowd.measure(size)))
        _finish(section, files, head)


def _compared(seconds: float, rows: tuple[Row, ...]) -> Section:
    plan = Plan(seconds)
    found: dict[Row, dict[str, comparing.Figures]] = {}
    for row in rows:
        for name in comparing.installed():
            figures = run(comparing.measure(name, row, plan))
            click.echo(f"{row}: {name}: {figures}")
            found.setdefault(row, {})[name] = figures
    return comparing.section(found)


def _finish(section: Section, files: Files | None, head: str) -> None:
    click.echo(f"\n{section.text}")
    if files:
        files.write(section, head)


if __name__ == "__main__":
    main()
