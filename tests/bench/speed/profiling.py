"""Profile of the daemon under load with py-spy.

py-spy is the parent process of the daemon, so it needs no privilege. It samples every thread, but
stops the process for each sample. So the figures of a profiled run are not for the table.
"""

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from consumer.devstack import ChildProcess
from tests.bench.speed.processes import children

_RATE = 100  # samples a second
_START = "importlib._bootstrap"  # in the stacks of imports, which are ignored
_OWN = " (consumer/"  # path of the daemon's functions
# Functions at the top of the stack of a waiting thread; py-spy does not detect all of them.
_WAITING = (
    "select (selectors.py)",
    "_worker (concurrent/futures/thread.py)",
    "_do_waitpid (asyncio/unix_events.py)",
    "readinto (socket.py)",
    "sleep (stand_in.py)",
)
_ENDS_WITHIN = 40.0  # seconds; the daemon drains
_POLL = 0.02  # seconds
_MOST = 15  # lines


def sampled(argv: Sequence[str], file: Path) -> tuple[str, ...]:
    """Return the command line of py-spy, which writes the file when the command ends."""
    program = str(Path(sys.executable).with_name("py-spy"))
    options = ("--rate", str(_RATE), "--threads", "--format", "raw", "--output", str(file))
    return (program, "record", *options, "--", *argv)


async def end(process: ChildProcess) -> None:
    """Stop the profiled process and wait until py-spy has written its file."""
    for child in children(process.pid):
        os.kill(child, signal.SIGTERM)
    async with asyncio.timeout(_ENDS_WITHIN):
        while process.alive:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(_POLL)


def summary(file: Path) -> str:
    """Return the most frequent functions: at the top of the stack, and anywhere in the stack."""
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    threads: Counter[str] = Counter()
    for line in file.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        if _START in stack:
            continue
        thread, *frames = stack.split(";")
        # Remove the line number: samples are counted for each function.
        names = [f"{name} {where.rpartition(':')[0]})" for name, where in map(_split, frames)]
        if not names or names[-1].endswith(_WAITING):
            continue
        threads[thread.partition(": ")[2] or "main"] += int(count)
        own[names[-1]] += int(count)
        ours = (name for name in names if _OWN in name)
        within.update(dict.fromkeys(ours, int(count)))
    parts = {
        "threads": threads,
        "functions themselves": own,
        "the daemon's, with what they call": within,
    }
    return "\n\n".join(f"{title}:\n{_lines(counter)}" for title, counter in parts.items())


def _split(frame: str) -> tuple[str, str]:
    name, _, where = frame.rpartition(" (")
    return name, f"({where}"


def _lines(counter: Counter[str]) -> str:
    return "\n".join(
        f"{count / _RATE:8.2f} s  {name}" for name, count in counter.most_common(_MOST)
    )
