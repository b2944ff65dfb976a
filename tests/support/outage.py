"""Outages of nats-server, and the checks after an outage."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from nats.js.errors import NotFoundError

from consumer.devstack import Daemon
from tests.support.holding import RESUME, RESUMED
from tests.support.observations import until_not_ready
from tests.support.quick_runner import STARTED
from tests.support.scene import Event, Scene

SLACK = 4.0  # seconds; the documented limit is 1 s, and the machine may be loaded
HOW = ("kill", "stop")  # methods of `NatsServer`: SIGKILL and SIGTERM


@dataclass
class Outage:
    """One outage of the server.

    Attributes:
        returned: `time.monotonic()` at which the server was ready again.
    """

    returned: float = 0.0


@asynccontextmanager
async def outage(scene: Scene, how: str, *workers: Daemon) -> AsyncIterator[Outage]:
    """Stop nats-server for the duration of the block, and wait until every worker is not ready."""
    server, current = scene.stack.nats, Outage()
    await asyncio.to_thread(getattr(server, how))
    try:
        for worker in workers:
            await until_not_ready(scene, worker, bus="not connected")
        await until_sender(scene, connected=False)
        yield current
    finally:
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(server.wait_ready)
        current.returned = time.monotonic()
        await until_sender(scene, connected=True)


async def until_sender(scene: Scene, *, connected: bool) -> None:
    """Return once the sender has noticed that its connection is lost, or restored."""

    async def noticed() -> bool:
        return bool(scene.sender.is_connected) is connected

    await scene.until(noticed, f"sender with connected={connected}")


async def two_workers(scene: Scene, cause: str, **settings: str) -> list[Daemon]:
    """Start two workers with the same fault, and return them when they are ready."""
    workers = [scene.launch(cause, **settings) for _ in range(2)]
    for worker in workers:
        await asyncio.to_thread(worker.wait_ready)
    return workers


async def resume(scene: Scene, moment: str) -> None:
    """Resume a process that waits at a moment, and return once it has resumed."""
    (scene.folder / f"{moment}{RESUME}").touch()
    await scene.until_noted(f"{moment}{RESUMED}")


def run_start(scene: Scene, request_id: str) -> float:
    """Return `time.monotonic()` at the start of the first run of a request."""
    times = dict(reversed([line.split() for line in scene.notes(STARTED)]))
    return float(times[request_id])


def check_duration(what: str, seconds: float) -> None:
    """Print a duration (`pytest -s`), and check that it is below `SLACK`."""
    print(f"{what}: {seconds:.3f} s")  # noqa: T201 - output for the reader of a test run
    assert seconds < SLACK


class Replies:
    """A stream on the reply subject, which stores every reply.

    A plain subscription loses replies until the sender has reconnected. The worker may reconnect
    before the sender.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._stream = f"{scene.subjects.root.upper()}_REPLIES"
        self.subject = f"{scene.subjects.root}.reply.sender"

    async def open(self) -> None:
        await self._scene.sender.jetstream().add_stream(
            name=self._stream, subjects=[self.subject], max_bytes=2**20
        )

    async def first(self, count: int) -> list[Event]:
        """Wait for the first replies, and return them. A repeated request may get more replies."""
        found: list[Event] = []

        async def arrived() -> bool:
            try:
                message = await self._scene.sender.jetstream().get_msg(self._stream, len(found) + 1)
            except NotFoundError:
                return False
            found.append(json.loads(message.data or b""))
            return len(found) == count

        await self._scene.until(arrived, f"{count} replies")
        return found
