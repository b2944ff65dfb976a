"""Where the daemon's time goes under load: the stacks that py-spy sees from outside.

py-spy is the parent of what it looks at, so it needs no privilege. It sees every thread, but stops
the process for each look: the numbers of a profiled run are not for the table.
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

_RATE = 100  # looks a second
_START = "importlib._bootstrap"  # in the stacks of imports, which are not the load
_OWN = " (consumer/"  # where the daemon's own functions are
# Functions at the top of a stack in which a thread only waits: py-spy cannot always tell.
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
    """A command under py-spy, which writes the file when the command ends."""
    program = str(Path(sys.executable).with_name("py-spy"))
    options = ("--rate", str(_RATE), "--threads", "--format", "raw", "--output", str(file))
    return (program, "record", *options, "--", *argv)


async def end(process: ChildProcess) -> None:
    """End what py-spy looks at, and return when it has written its file."""
    for child in children(process.pid):
        os.kill(child, signal.SIGTERM)
    async with asyncio.timeout(_ENDS_WITHIN):
        while process.alive:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(_POLL)


def summary(file: Path) -> str:
    """The functions that were met most often: at the top of the stack, and anywhere in it."""
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    threads: Counter[str] = Counter()
    for line in file.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        if _START in stack:
            continue
        thread, *frames = stack.split(";")
        # Without the line in parentheses: the function is what counts.
        names = [f"{name} {where.rpartition(':')[0]})" for name, where in map(_parted, frames)]
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


def _parted(frame: str) -> tuple[str, str]:
    name, _, where = frame.rpartition(" (")
    return name, f"({where}"


def _lines(counter: Counter[str]) -> str:
    return "\n".join(
        f"{count / _RATE:8.2f} s  {name}" for name, count in counter.most_common(_MOST)
    )
