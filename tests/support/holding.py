"""Helpers for causes of faults: a worker waits for the test, or dies at a chosen moment."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.support.quick_runner import FOLDER, first_time, note

RELEASE_MARK = "RELEASE_MARK"  # environment: the mark that a worker waits for
SERVER = "SERVER_PID"  # environment: process id of nats-server
FIXED = "fixed"  # the mark after which a failing model stops failing
HELD = "worker_waits"  # the note of a worker that starts to wait
RESUME = ".go"  # suffix of the mark that resumes a process
RESUMED = ".on"  # suffix of the note of a resumed process
POLL = 0.005  # seconds; files send no notification


def hold(mark: str) -> None:
    """Wait until the test creates a mark. Blocks, so not for the event loop's thread."""
    note(HELD, mark)
    _until_marked(mark)


def hold_once(moment: str) -> None:
    """Note that a moment is reached, and wait for the test. Blocks, as `hold`.

    Only the first process that reaches the moment waits, and only once.
    """
    if first_time(f"{moment}.held"):
        note(moment, "here")
        _until_marked(f"{moment}{RESUME}")
        note(f"{moment}{RESUMED}", "resumed")


async def hold_once_without_blocking(moment: str) -> None:
    """Wait as `hold_once`, for the event loop's thread. A cancellation ends the wait."""
    if first_time(f"{moment}.held"):
        note(moment, "here")
        while not (Path(os.environ[FOLDER]) / f"{moment}{RESUME}").exists():  # noqa: ASYNC110
            await asyncio.sleep(POLL)


def _until_marked(mark: str) -> None:
    while not (Path(os.environ[FOLDER]) / mark).exists():
        time.sleep(POLL)


async def die_once_marked() -> None:
    """Wait until the test creates the mark `die`, and die. The heartbeat continues meanwhile."""
    await asyncio.to_thread(hold, "die")
    die()


def die() -> None:
    """Kill this process with SIGKILL, and note the time under `died`."""
    note("died", repr(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: type, method: str, first: Callable[[], Awaitable[None]]) -> None:
    """Patch an asynchronous method: await `first` before each call."""
    original = getattr(owner, method)

    async def preceded(*args: Any, **kwargs: Any) -> Any:
        await first()
        return await original(*args, **kwargs)

    setattr(owner, method, preceded)


def after(owner: type, method: str, then: Callable[[], Awaitable[None]]) -> None:
    """Patch an asynchronous method: await `then` after each call, before the caller continues."""
    original = getattr(owner, method)

    async def followed(*args: Any, **kwargs: Any) -> Any:
        value = await original(*args, **kwargs)
        await then()
        return value

    setattr(owner, method, followed)
