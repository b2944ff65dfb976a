"""Start time of the commands and the daemons: `python -m tests.bench.start`.

Commands are measured in CPU seconds. Daemons with a demonstration model are measured in seconds
from the start of the process to a log event. Byte code goes to a new folder, so the first round is
the first start of an installation. The other rounds have compiled modules; their minimum is
printed. `import pydantic` shows the current speed of the machine.
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
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.scene import Scene

YARDSTICK = "import pydantic"
LINES = ("daemon_starting", "model_loaded", "daemon_ready")  # log events of a daemon
NO_SERVER = "nats://127.0.0.1:1"

Seconds = dict[str, float]  # by name of the measurement


async def commands(environment: Mapping[str, str], folder: Path) -> Seconds:
    """Return the CPU seconds of each command; images go to the folder."""
    consumer = ("-P", "-m", "consumer")
    request = (*consumer, "request", "text-to-image", "a star", "--output", str(folder))
    without_server = {**environment, "NATS_URL": NO_SERVER}
    return {
        YARDSTICK: await cpu(("-c", "from pydantic import BaseModel"), environment),
        "consumer --help": await cpu((*consumer, "--help"), environment),
        "consumer request, a wrong width": await cpu((*request, "--width", "1"), environment, 2),
        "consumer request, no server": await cpu(request, without_server, 69),
        "consumer request --json": await cpu((*request, "--json"), environment),
        "consumer request": await cpu(request, environment),
    }


async def cpu(arguments: tuple[str, ...], environment: Mapping[str, str], code: int = 0) -> float:
    """Return the CPU seconds of an interpreter that must exit with this code."""
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
    """Return the seconds from the start of a daemon to each of `LINES`."""
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
    """Return the measurements of each round."""
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    with DevStack(folder / "stack", persist=False) as stack:
        async with AsyncExitStack() as parts:
            scene = Scene(stack, folder, parts)
            await scene.open()
            await scene.start()
            environment = {**scene.settings(), **compiled}
            return [await measure_once(environment, folder) for _ in range(rounds)]


async def measure_once(environment: Mapping[str, str], folder: Path) -> Seconds:
    """Measure one round."""
    seconds = await commands(environment, folder)
    for task in DEFAULT_QUEUES:
        seconds |= await daemon(task, environment, folder)
    return seconds


@click.command()
@click.option("--rounds", default=4, show_default=True, type=click.IntRange(2))
def main(rounds: int) -> None:
    """Print a line for each command and each log event of a daemon."""
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        first, *later = asyncio.run(measure(Path(folder), rounds))
    yardstick = min(seconds[YARDSTICK] for seconds in later)
    click.echo(f"{'seconds':<34} first   later   in `{YARDSTICK}`s")
    for name, seconds in first.items():
        least = min(one[name] for one in later)
        click.echo(f"{name:<34} {seconds:5.2f}   {least:5.2f}   {least / yardstick:5.1f}")


if __name__ == "__main__":
    main()
