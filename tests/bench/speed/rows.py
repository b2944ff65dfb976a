"""The rows of the table, and their transfer to other processes by environment variable."""

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Self, get_args

from consumer.ports.media import OutputFormat

Device = Literal["sleeps", "computes"]
DEVICES: tuple[Device, ...] = get_args(Device)
MILLISECONDS = (0, 20, 50, 200, 1000)
SIDES = (64, 1024)
FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)

_VARIABLE = "SPEED_ROW"  # environment


@dataclass(frozen=True)
class Row:
    """One kind of job for all systems.

    Attributes:
        device: What the stand-in does with its time: it sleeps as the host does while a GPU works,
            or it computes as a CPU model does, in parallel with the rest of the system.
        milliseconds: Duration of a run of the stand-in.
        side: Pixels of each side of the image.
        file_format: Format of the artifact.
    """

    device: Device
    milliseconds: int
    side: int
    file_format: OutputFormat

    def __str__(self) -> str:
        size = f"{self.side}x{self.side} {self.file_format.upper()}"
        return f"{self.milliseconds} ms, {size}, the device {self.device}"

    @property
    def slug(self) -> str:
        """Return a name for files."""
        return f"{self.device}-{self.milliseconds}-ms-{self.side}-{self.file_format}"

    @property
    def seconds(self) -> float:
        """Return the duration of a run of the stand-in in seconds."""
        return self.milliseconds / 1000

    def environment(self) -> dict[str, str]:
        """Return the environment that `from_environment` reads in another process."""
        return {_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Return the row of this process."""
        return cls(**json.loads(environment[_VARIABLE]))


def product(
    devices: Iterable[Device],
    milliseconds: Iterable[int],
    sides: Iterable[int],
    formats: Iterable[OutputFormat],
) -> tuple[Row, ...]:
    """Return every combination."""
    return tuple(
        Row(device, time, side, file_format)
        for device, side, file_format, time in itertools.product(
            devices, sides, formats, milliseconds
        )
    )


# About fifteen minutes with every system: all times and sizes as PNG, one row for other formats,
# and one row in which the device uses one core.
STANDARD = (
    *product(["sleeps"], MILLISECONDS, SIDES, ["png"]),
    *product(["sleeps"], [50], [1024], ["webp", "jpeg"]),
    *product(["computes"], [50], [1024], ["png"]),
)

# Everything; the computing device only in rows where it can affect the other processes.
ALL = (
    *product(["sleeps"], MILLISECONDS, SIDES, FORMATS),
    *product(["computes"], (20, 50, 200), (1024,), ("png",)),
)
