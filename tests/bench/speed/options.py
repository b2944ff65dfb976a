"""Command line options of the speed bench."""

import functools
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import click

from tests.bench.speed.report import Files

DEFAULT = "compare"
_BASELINE = Path(__file__).with_name("baseline.json")
_FILE = click.Path(path_type=Path, dir_okay=False)


class WithDefault(click.Group):
    """A group that runs the default command for a command line without a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


class Commas(click.ParamType):
    """Several values separated by commas.

    Args:
        kind: Converts the text of one value.
        allowed: The allowed values; None: all values.
    """

    name = "a,b,…"

    def __init__(
        self, kind: Callable[[str], Any] = int, allowed: Container[Any] | None = None
    ) -> None:
        self._kind = kind
        self._allowed = allowed

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if not isinstance(value, str):  # a default
            return tuple(value)
        try:
            found = tuple(self._kind(part.strip()) for part in value.split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        for one in found:
            if self._allowed is not None and one not in self._allowed:
                self.fail(f"there is no {one!r}", param, ctx)
        return found


def write(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the files of results; the command receives `files`, or None."""

    @functools.wraps(command)
    def with_files(*, stem: Path | None, baseline: Path, **others: Any) -> None:
        command(files=None if stem is None else Files(stem, baseline), **others)

    baseline_help = f"With --write; default: {_BASELINE.name} next to this bench."
    decorated = click.option("--baseline", type=_FILE, default=_BASELINE, help=baseline_help)(
        with_files
    )
    stem = "docs/reference/speed: writes the page, its plot and the baseline."
    return click.option("--write", "stem", type=_FILE, help=stem)(decorated)
