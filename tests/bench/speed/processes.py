"""CPU time and memory of a process and its descendants, from /proc; Linux only."""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds
_USER_TIME = (
    11  # field of /proc/PID/stat after the name: user, system, then both of reaped children
)
_TIMES = 4
REST = 0.05  # of a core
_INTERVAL = 0.4  # seconds
_RESTS_WITHIN = 60.0  # seconds


def cpu_seconds(*pids: int) -> float:
    """Return the CPU time with all descendants, including exited ones."""
    ticks = 0
    for pid in _with_descendants(*pids):
        # The name of the program may have spaces, and ends with the last parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[_USER_TIME : _USER_TIME + _TIMES])
    return ticks * _TICK


async def at_rest(*pids: int) -> None:
    """Wait until the processes are idle: a process may continue to start after it is ready.

    For example, the daemon does not wait for the start of its helper process.

    Raises:
        TimeoutError: The processes do not become idle.
    """
    async with asyncio.timeout(_RESTS_WITHIN):
        before = cpu_seconds(*pids)
        while True:
            await asyncio.sleep(_INTERVAL)
            now = cpu_seconds(*pids)
            if now - before <= REST * _INTERVAL:
                return
            before = now


def resident(*pids: int) -> float:
    """Return the resident memory in MB with all descendants; shared pages count for each."""
    kilobytes = 0
    for pid in _with_descendants(*pids):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                kilobytes += int(line.split()[1])
    return kilobytes / 1024


def children(pid: int) -> list[int]:
    """Return the ids of the child processes."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread may end during the read
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _with_descendants(*pids: int) -> Iterator[int]:
    for pid in pids:
        yield pid
        yield from _with_descendants(*children(pid))
