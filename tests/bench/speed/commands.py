"""The commands of the speed bench: the daemon compared with other systems.

Uses real servers and a stand-in for the model, and measures one system at a time. `compare`, the
default, is the table of systems; `scaling`, `depth` and `progress` measure only the daemon. Linux
only.
"""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from tests.bench.speed import comparing, depth, plot, progress, scaling
from tests.bench.speed.measuring import Plan
from tests.bench.speed.options import Commas, WithDefault, write
from tests.bench.speed.report import Files, Section, header
from tests.bench.speed.rows import (
    ALL,
    DEVICES,
    FORMATS,
    MILLISECONDS,
    SIDES,
    STANDARD,
    Row,
    product,
)
from tests.bench.speed.systems import SYSTEMS

T = TypeVar("T")
INTERRUPTED = 130  # exit code


@click.group(cls=WithDefault, help=__doc__)
def main() -> None:
    """Run a command; the commands have no common options."""


@main.command()
@click.option("--milliseconds", type=Commas(), help=f"Of the device, as in {MILLISECONDS}.")
@click.option("--sizes", type=Commas(), help=f"Pixels of a side, as in {SIDES}.")
@click.option("--formats", type=Commas(str, FORMATS), help=", ".join(FORMATS))
@click.option("--devices", type=Commas(str, DEVICES), help=", ".join(DEVICES))
@click.option("--systems", type=Commas(str, SYSTEMS), help=", ".join(SYSTEMS))
@click.option("--all", "everything", is_flag=True, help="Every row: most of an hour.")
@click.option("--fair", is_flag=True, help="The peers with this daemon's encoder too.")
@click.option("--seconds", default=4.0, show_default=True, help="Of load, for each number.")
@click.option("--jobs", type=click.IntRange(2), help="Of load, instead of seconds.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="The median of so many counts.",
)
@click.option(
    "--profile",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for stacks of the daemon under load.",
)
@write
def compare(
    milliseconds: tuple[int, ...] | None,
    sizes: tuple[int, ...] | None,
    formats: tuple[Any, ...] | None,
    devices: tuple[Any, ...] | None,
    systems: tuple[str, ...] | None,
    *,
    everything: bool,
    fair: bool,
    seconds: float,
    jobs: int | None,
    rounds: int,
    profile: Path | None,
    files: Files | None,
) -> None:
    """Print the table of systems."""
    if profile and files:
        raise click.UsageError("--profile slows the daemon down: its numbers are not for --write")
    rows = ALL if everything else STANDARD
    if milliseconds or sizes or formats or devices:
        rows = product(
            devices or ("sleeps",), milliseconds or (50,), sizes or (1024,), formats or ("png",)
        )
    usual = [slug for slug, which in SYSTEMS.items() if fair or not which.fair]
    comparison = comparing.Comparison(Plan(seconds, jobs, profile), rounds)
    if profile:
        profile.mkdir(parents=True, exist_ok=True)
    head = begin()
    run(comparison.run(rows, [SYSTEMS[slug] for slug in systems or usual]))
    if files:
        drawn = plot.draw(comparison.results, files.plot)
        plot_name = files.plot.name if drawn else None
        files.write(comparing.section(comparison, plot_name=plot_name), head)
    sys.exit(1 if comparison.failed else 0)


@main.command("scaling")
@click.option("--daemons", type=Commas(), default=(1, 2, 4), help="Default: 1,2,4.")
@click.option("--milliseconds", default=50, show_default=True, help="Of the device.")
@click.option("--size", default=64, show_default=True, help="Pixels of a side.")
@click.option("--each", default=1, show_default=True, help="Deliveries in flight of a daemon.")
@click.option("--seconds", default=5.0, show_default=True, help="Of load, about.")
@write
def scale(
    daemons: tuple[int, ...],
    milliseconds: int,
    size: int,
    each: int,
    seconds: float,
    *,
    files: Files | None,
) -> None:
    """Measure several daemons on one queue."""
    row, head = Row("sleeps", milliseconds, size, "png"), begin()
    found = {
        number: run(scaling.measure(number, row, each=each, seconds=seconds)) for number in daemons
    }
    finish(scaling.section(row, each, found), files, head)


@main.command("depth")
@click.option(
    "--depths",
    type=Commas(),
    default=(10, 100, 1_000, 10_000, 100_000),
    help="Default: 10,100,1000,10000,100000.",
)
@click.option("--jobs", default=300, show_default=True, help="Looked at, for each depth.")
@click.option("--at-once", default=1, show_default=True, help="CONSUMER_MAX_ACK_PENDING.")
@write
def deepen(depths: tuple[int, ...], jobs: int, at_once: int, files: Files | None) -> None:
    """Measure queues of several lengths."""
    head = begin()
    found = {number: run(depth.measure(number, jobs, at_once)) for number in depths}
    finish(depth.section(jobs, at_once, found), files, head)


@main.command("progress")
@click.option("--steps", type=Commas(), default=(2, 5, 10, 50, 100), help="A second; up to 100.")
@click.option("--milliseconds", default=2_000, show_default=True, help="Of a run.")
@write
def listen(steps: tuple[int, ...], milliseconds: int, files: Files | None) -> None:
    """Measure the rate of progress events."""
    head = begin()
    found = run(progress.measure(steps, milliseconds))
    finish(progress.section(milliseconds, found), files, head)


def begin() -> str:
    """Print the machine, the date and the versions."""
    head = header()
    click.echo(head)
    return head


def finish(section: Section, files: Files | None, head: str) -> None:
    """Print the results, and write them with `--write`."""
    click.echo(f"\n{section.text}")
    if files:
        files.write(section, head)


def run(measuring: Coroutine[Any, Any, T]) -> T:
    """Run until the end or a signal; both stop all started processes."""

    async def until_signal() -> T:
        task = asyncio.ensure_future(measuring)
        # asyncio handles SIGINT.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        return asyncio.run(until_signal())
    except asyncio.CancelledError:
        sys.exit(INTERRUPTED)
