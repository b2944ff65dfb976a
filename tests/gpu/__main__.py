"""The GPU check: `python -m tests.gpu`, less than eight minutes on one card, without a network.

Each section runs in its own process with its own limit, the most valuable one first. The report is
written after each section. On a machine without CUDA every section runs on the CPU, with small
models.
"""

import datetime as dt
import importlib
import sys
from pathlib import Path

import click

from tests.gpu.check import Device, Row
from tests.gpu.report import Report, found
from tests.gpu.running import Ended, Section, run_sections
from tests.gpu.sections import SECTIONS

SECONDS = 470.0  # of the whole check


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([section.name for section in SECTIONS]))
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto")
@click.option("--seconds", default=SECONDS, show_default=True, help="Limit of the whole check.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("gpu-report"),
    show_default=True,
    help="Folder for report.json and report.md.",
)
def main(names: tuple[str, ...], device: str, seconds: float, out: Path) -> None:
    """Check the daemon on a GPU: all sections, or those that are named.

    Exits with 1 if something is not as it must be.
    """
    chosen = [section for section in SECTIONS if not names or section.name in names]
    where = _device(device)
    date = dt.datetime.now(dt.UTC).date().isoformat()
    report = Report(where, date, chosen)

    def on_start(section: Section) -> None:
        click.secho(f"\n{section.title} ({where}, at most {section.limit:.0f} s)", bold=True)

    def on_row(row: Row) -> None:
        report.rows.append(row)
        _print(row)

    for section, ended in run_sections(
        chosen, where, seconds=seconds, on_start=on_start, on_row=on_row
    ):
        report.ended[section.name] = ended
        report.write(out)
        _print_end(section, ended)
    click.echo(f"\n{out / 'report.md'}, {out / 'report.json'}")
    for line in report.failures:
        click.secho(f"not as it must be: {line}", fg="red")
    sys.exit(1 if report.failures else 0)


def _device(name: str) -> Device:
    if name == "cpu":
        return "cpu"
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise click.UsageError("torch finds no CUDA device")
    return "cpu"


def _print(row: Row) -> None:
    mark = {True: "ok  ", False: "FAIL", None: "    "}[row.ok]
    note = f"  ({row.note})" if row.note else ""
    click.echo(f"  {mark} {row.name:<58} {found(row)}{note}")


def _print_end(section: Section, ended: Ended) -> None:
    problem = f": {ended.problem}" if ended.problem else ""
    click.echo(f"  {section.name} took {ended.seconds:.0f} s{problem}")


if __name__ == "__main__":
    main()
