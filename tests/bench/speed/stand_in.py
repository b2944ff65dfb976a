"""The stand-in for the device of every system: it takes a fixed time and returns an image.

Each run writes its start and end to a file. The utilization of the device is computed from this
file, in whichever process it ran. All processes of a machine share the clock.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.bench.speed.rows import Row

NOTES = "SPEED_NOTES"  # environment variable: the file for the runs of a process
_GRAIN = 4.0  # standard deviation, of 255: a PNG then compresses like a photograph's
_NUMBERS = 2**20  # 0.3 ms for each pass, all but some microseconds without the interpreter's lock


class Run(NamedTuple):
    """Start and end of one run; seconds of `time.monotonic()`."""

    began: float
    ended: float


class StandIn:
    """One device.

    Args:
        row: Duration and image size.
        notes: File for the runs.
    """

    def __init__(self, row: Row, notes: Path) -> None:
        self._seconds = row.seconds
        self._image = grainy(row.side)
        self._work = compute if row.device == "computes" else sleep
        self._notes = os.open(notes, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def run(
        self, on_step: Callable[[int, int], None] = lambda *_: None, steps: int = 1
    ) -> Image.Image:
        """Work for the time of the row, in this number of equal steps, and return the image."""
        began = time.monotonic()
        for step in range(1, steps + 1):
            # Relative to the start of the run, so that the delays of steps do not add up.
            self._work(began + self._seconds * step / steps)
            on_step(step, steps)
        os.write(self._notes, f"{began!r} {time.monotonic()!r}\n".encode())
        return self._image


def sleep(until: float) -> None:
    """Wait as the host does for a GPU: the interpreter's lock and the cores are free."""
    left = until - time.monotonic()
    if left > 0:
        time.sleep(left)


def compute(until: float) -> None:
    """Keep one core busy with the interpreter's lock free, as a model on the CPU does."""
    numbers = np.ones(_NUMBERS, np.float32)
    while time.monotonic() < until:
        np.sqrt(numbers, out=numbers)


def grainy(side: int) -> Image.Image:
    """Return an image with smooth colours and noise like a photograph; deterministic."""
    across = np.linspace(0, 255, side, dtype=np.float32)
    channels = np.broadcast_arrays(across[None, :], across[:, None], 255 - across[None, :])
    grain = np.random.default_rng(0).normal(0, _GRAIN, (side, side, 3))
    pixels = np.clip(np.stack(channels, axis=-1) + grain, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def read_runs(notes: Path) -> Sequence[Run]:
    """Return all runs so far, in the order of their ends."""
    if not notes.exists():
        return []
    lines = notes.read_text().splitlines()
    return [Run(*(float(number) for number in line.split())) for line in lines]
