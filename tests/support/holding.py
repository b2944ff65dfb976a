"""Where a worker waits for the test, and how it dies: for causes whose moment the test chooses."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.support.quick_runner import FOLDER, first_time, note

RELEASE_MARK = (
    "RELEASE_MARK"  # environment: the mark for which a worker waits, where there are several
)
SERVER = "SERVER_PID"  # environment: process id of nats-server
FIXED = "mended"  # the mark after which a model that raised does so no more
HELD = "worker_waits"  # noted when a worker begins to wait
RESUME = ".go"  # ends the name of the mark that lets a moment go on
RESUMED = ".on"  # ends the name under which it is noted that the process has gone on
POLL = 0.005  # seconds; a file announces nothing


def hold(mark: str) -> None:
    """Wait until the test makes a mark. Blocks: not in the event loop's thread."""
    note(HELD, mark)
    _until_marked(mark)


def hold_once(moment: str) -> None:
    """Note that a moment has come, and wait for the test. Blocks, as `hold`.

    Only the first process that comes to it is held, and only once.
    """
    if first_time(f"{moment}.held"):
        note(moment, "here")
        _until_marked(f"{moment}{RESUME}")
        note(f"{moment}{RESUMED}", "going on")


async def hold_once_without_blocking(moment: str) -> None:
    """The same in the event loop's thread: it ends where it is broken off."""
    if first_time(f"{moment}.held"):
        note(moment, "here")
        while not (Path(os.environ[FOLDER]) / f"{moment}{RESUME}").exists():  # noqa: ASYNC110
            await asyncio.sleep(POLL)


def _until_marked(mark: str) -> None:
    while not (Path(os.environ[FOLDER]) / mark).exists():
        time.sleep(POLL)


async def die_once_marked() -> None:
    """Wait until the test makes the mark `die`, with the heartbeat going on, and die."""
    await asyncio.to_thread(hold, "die")
    die()


def die() -> None:
    """kill -9 of this process; its moment goes to `died`."""
    note("died", repr(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: type, method: str, first: Callable[[], Awaitable[None]]) -> None:
    """Let something come before each call of an asynchronous method."""
    original = getattr(owner, method)

    async def preceded(*args: Any, **kwargs: Any) -> Any:
        await first()
        return await original(*args, **kwargs)

    setattr(owner, method, preceded)


def after(owner: type, method: str, then: Callable[[], Awaitable[None]]) -> None:
    """Let something follow each call of an asynchronous method, before its caller goes on."""
    original = getattr(owner, method)

    async def followed(*args: Any, **kwargs: Any) -> Any:
        value = await original(*args, **kwargs)
        await then()
        return value

    setattr(owner, method, followed)
