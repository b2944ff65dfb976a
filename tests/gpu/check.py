"""What a section of the GPU check gets, and what it reports: rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Device = Literal["cuda", "cpu"]

_LONGEST = 240  # characters of an exception's message in a row


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        section: Name of the section.
        name: What was measured or tried.
        value: What was found; numbers in `unit`.
        ok: Whether it is as it must be; None: only reported.
        note: One line, for example the message of an option that does not work here.
    """

    section: str
    name: str
    value: float | str = ""
    unit: str = ""
    ok: bool | None = None
    note: str = ""


class Check:
    """The device and the size of one section, and where its rows go.

    Args:
        section: Name of the section.
        device: Where the models run.
        send: Receives each row at once, so that a section that dies keeps its rows.

    Attributes:
        section: Name of the section.
        device: Where the models run.
        full: Whether to use models of full size; on a CPU everything is small.
    """

    def __init__(self, section: str, device: Device, send: Callable[[Row], None]) -> None:
        self.device = device
        self.full = device == "cuda"
        self.section = section
        self._send = send

    def row(
        self,
        name: str,
        value: float | str = "",
        unit: str = "",
        *,
        ok: bool | None = None,
        note: str = "",
    ) -> None:
        """Report one row."""
        self._send(Row(self.section, name, value, unit, ok, note))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Report an exception of the block as a failed row, and go on after the block."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the other parts of the section are still of use
            self.row(name, "failed", ok=False, note=one_line(error))


def one_line(error: BaseException) -> str:
    """Return the class and the message of an exception in one line."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
