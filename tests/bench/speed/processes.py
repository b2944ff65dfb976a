"""What a process and those that it has started cost, by the kernel's own account; Linux only."""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds
_USER_TIME = 11  # place in /proc/PID/stat behind the name: user, system, then those of the reaped
_TIMES = 4
REST = 0.05  # of a core
_LOOK = 0.4  # seconds
_RESTS_WITHIN = 60.0  # seconds


def cpu_seconds(*pids: int) -> float:
    """CPU time so far, with all descendants, also those that have ended."""
    ticks = 0
    for pid in _with_descendants(*pids):
        # The name of the program may have spaces, and ends with the last parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[_USER_TIME : _USER_TIME + _TIMES])
    return ticks * _TICK


async def at_rest(*pids: int) -> None:
    """Return once they do next to nothing: a process may go on starting after it is ready.

    The daemon's helper process, for one, takes a second of CPU to start, which nobody waits for.

    Raises:
        TimeoutError: They never do.
    """
    async with asyncio.timeout(_RESTS_WITHIN):
        before = cpu_seconds(*pids)
        while True:
            await asyncio.sleep(_LOOK)
            now = cpu_seconds(*pids)
            if now - before <= REST * _LOOK:
                return
            before = now


def resident(*pids: int) -> float:
    """Resident memory in MB, with all descendants; pages that they share count in each."""
    kilobytes = 0
    for pid in _with_descendants(*pids):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                kilobytes += int(line.split()[1])
    return kilobytes / 1024


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread may end while it is looked at
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _with_descendants(*pids: int) -> Iterator[int]:
    for pid in pids:
        yield pid
        yield from _with_descendants(*children(pid))
