"""What a start costs: `python -m tests.bench.start`.

A command is told in seconds of CPU, a daemon with a demonstration model in seconds from its process
to a line of its log. Byte code goes to a folder of its own. So the first round is that of an
installation whose modules have never been compiled, and the others, of which the least is told,
those of one that has been used. How fast the machine is just now, `import pydantic` tells.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path

import click

from consumer.devstack import Daemon, DevStack
from generation_contracts import Task
from tests.support.scene import Scene

YARDSTICK = "import pydantic"
LINES = ("daemon_starting", "model_loaded", "daemon_ready")  # of a daemon's log
NOBODY = "nats://127.0.0.1:1"

Seconds = dict[str, float]  # by what is told


async def commands(environment: Mapping[str, str], folder: Path) -> Seconds:
    """CPU seconds of each command; pictures go to the folder."""
    consumer = ("-P", "-m", "consumer")
    asking = (*consumer, "request", "text-to-image", "a star", "--output", str(folder))
    unheard = {**environment, "NATS_URL": NOBODY}
    return {
        YARDSTICK: await cpu(("-c", "from pydantic import BaseModel"), environment),
        "consumer --help": await cpu((*consumer, "--help"), environment),
        "consumer request, a wrong width": await cpu((*asking, "--width", "1"), environment, 2),
        "consumer request, no server": await cpu(asking, unheard, 69),
        "consumer request --json": await cpu((*asking, "--json"), environment),
        "consumer request": await cpu(asking, environment),
    }


async def cpu(arguments: tuple[str, ...], environment: Mapping[str, str], code: int = 0) -> float:
    """CPU seconds of an interpreter that must end with a code."""
    return await asyncio.to_thread(_cpu, arguments, environment, code)


def _cpu(arguments: tuple[str, ...], environment: Mapping[str, str], code: int) -> float:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise click.ClickException(f"{arguments} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


async def daemon(task: Task, environment: Mapping[str, str], folder: Path) -> Seconds:
    """Seconds from the process of a daemon to each of `LINES`."""
    started = Daemon(
        str(task),
        {**environment, "MODEL_TYPE": str(task), "LOG_FORMAT": "json"},
        log=folder / f"{task}.log",
    )
    began = time.time()
    started.start()
    try:
        await asyncio.to_thread(started.wait_ready)
    finally:
        await asyncio.to_thread(started.stop)
    times = dict(_times(started.log_since_start()))
    return {f"{task}: {line}": times[line] - began for line in LINES}


def _times(log: str) -> list[tuple[str, float]]:
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [(x["event"], datetime.fromisoformat(x["timestamp"]).timestamp()) for x in lines]


async def measure(folder: Path, rounds: int) -> list[Seconds]:
    """What there is to tell, for each round."""
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    with DevStack(folder / "stack", persist=False) as stack:
        async with AsyncExitStack() as parts:
            scene = Scene(stack, folder, parts)
            await scene.open()
            await scene.start()
            environment = {**scene.settings(), **compiled}
            return [await measure_once(environment, folder) for _ in range(rounds)]


async def measure_once(environment: Mapping[str, str], folder: Path) -> Seconds:
    """One round."""
    seconds = await commands(environment, folder)
    for task in Task:
        seconds |= await daemon(task, environment, folder)
    return seconds


@click.command()
@click.option("--rounds", default=4, show_default=True, type=click.IntRange(2))
def main(rounds: int) -> None:
    """Print a line for each command and each line of a daemon's log."""
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        first, *later = asyncio.run(measure(Path(folder), rounds))
    yardstick = min(seconds[YARDSTICK] for seconds in later)
    click.echo(f"{'seconds':<34} first   later   in `{YARDSTICK}`s")
    for name, seconds in first.items():
        least = min(one[name] for one in later)
        click.echo(f"{name:<34} {seconds:5.2f}   {least:5.2f}   {least / yardstick:5.1f}")


if __name__ == "__main__":
    main()
