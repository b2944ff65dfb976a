"""The report of the GPU check: report.json and report.md, written again after each section."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.gpu.check import Device, Row
from tests.gpu.running import Ended, Section

_OK = {True: "yes", False: "**no**", None: ""}


@dataclass
class Report:
    """What the sections have found so far.

    Attributes:
        device: Where the models run.
        date: In ISO form.
        rows: In the order of their arrival.
        ended: The sections that have ended, by name.
    """

    device: Device
    date: str
    sections: Sequence[Section]
    rows: list[Row] = field(default_factory=list)
    ended: dict[str, Ended] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """One line for each failed row, and for each section that did not end by itself."""
        return [
            *(f"{row.section}: {row.name}: {row.value} {row.note}" for row in self.rows_failed()),
            *(f"{name}: {ended.problem}" for name, ended in self.ended.items() if ended.problem),
        ]

    def rows_failed(self) -> list[Row]:
        """Return the rows that are not as they must be."""
        return [row for row in self.rows if row.ok is False]

    def write(self, folder: Path) -> None:
        """Write report.json and report.md."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "device": self.device,
            "date": self.date,
            "python": platform.python_version(),
            "sections": {name: asdict(ended) for name, ended in self.ended.items()},
            "rows": [asdict(row) for row in self.rows],
        }
        (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "report.md").write_text(self.markdown())

    def markdown(self) -> str:
        """Return the report as a page."""
        about = (
            f"{self.date}, device {self.device}, by `python -m tests.gpu`. "
            "A row without *as it must be* is only reported."
        )
        lines = ["# GPU check", "", about]
        for section in self.sections:
            if section.name in self.ended:
                lines += ["", *self._table(section)]
        return "\n".join(lines) + "\n"

    def _table(self, section: Section) -> list[str]:
        ended = self.ended[section.name]
        rows = [row for row in self.rows if row.section == section.name]
        return [
            f"## {section.title}",
            "",
            f"{ended.seconds:.0f} s{f'; **{ended.problem}**' if ended.problem else ''}",
            *(("", "|  | found | as it must be | note |", "|---|---:|---|---|") if rows else ()),
            *(
                f"| {_cell(row.name)} | {_cell(found(row))} | {_OK[row.ok]} | {_cell(row.note)} |"
                for row in rows
            ),
        ]


def found(row: Row) -> str:
    """Return the value of a row with its unit; numbers with three digits."""
    if isinstance(row.value, str):
        return row.value
    return (
        f"{row.value:.3g} {row.unit}".rstrip()
        if row.value < 1000
        else (f"{row.value:.0f} {row.unit}".rstrip())
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
