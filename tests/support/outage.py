"""The test's side of an outage of nats-server, and what must hold when it is over."""

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

SLACK = 4.0  # seconds; one is the promise, and the machine may be loaded
HOW = ("kill", "stop")  # methods of `NatsServer`: SIGKILL and SIGTERM


@dataclass
class Outage:
    """One time without the server.

    Attributes:
        returned: `time.monotonic()` when the server was ready again.
    """

    returned: float = 0.0


@asynccontextmanager
async def outage(scene: Scene, how: str, *workers: Daemon) -> AsyncIterator[Outage]:
    """nats-server is away while the block lasts, and every worker says so."""
    server, this = scene.stack.nats, Outage()
    await asyncio.to_thread(getattr(server, how))
    try:
        for worker in workers:
            await until_not_ready(scene, worker, bus="not connected")
        await until_sender(scene, connected=False)
        yield this
    finally:
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(server.wait_ready)
        this.returned = time.monotonic()
        await until_sender(scene, connected=True)


async def until_sender(scene: Scene, *, connected: bool) -> None:
    """Return once the sender knows of its connection: what it asked before would be lost."""

    async def knows() -> bool:
        return bool(scene.sender.is_connected) is connected

    await scene.until(knows, f"sender with connected={connected}")


async def two_workers(scene: Scene, cause: str, **settings: str) -> list[Daemon]:
    """Two workers with the same fault, ready."""
    workers = [scene.launch(cause, **settings) for _ in range(2)]
    for worker in workers:
        await asyncio.to_thread(worker.wait_ready)
    return workers


async def resume(scene: Scene, moment: str) -> None:
    """Let a held process go on, and return once it does."""
    (scene.folder / f"{moment}{RESUME}").touch()
    await scene.until_noted(f"{moment}{RESUMED}")


def run_start(scene: Scene, request_id: str) -> float:
    """`time.monotonic()` of the first run's beginning."""
    times = dict(reversed([line.split() for line in scene.notes(STARTED)]))
    return float(times[request_id])


def check_duration(what: str, seconds: float) -> None:
    """Show a measurement (`pytest -s`), and bound it."""
    print(f"{what}: {seconds:.3f} s")  # noqa: T201 - for people
    assert seconds < SLACK


class Replies:
    """Where a sender listens that misses nothing: a stream on the reply subjects.

    A plain subscription is deaf until its own connection is back, and the worker's may be quicker.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._stream = f"{scene.subjects.root.upper()}_REPLIES"
        self.subject = f"{scene.subjects.root}.reply.mine"

    async def open(self) -> None:
        await self._scene.sender.jetstream().add_stream(
            name=self._stream, subjects=[self.subject], max_bytes=2**20
        )

    async def these(self, count: int) -> list[Event]:
        """The first replies, waited for; there may be more, for a request that comes again."""
        found: list[Event] = []

        async def there() -> bool:
            try:
                message = await self._scene.sender.jetstream().get_msg(self._stream, len(found) + 1)
            except NotFoundError:
                return False
            found.append(json.loads(message.data or b""))
            return len(found) == count

        await self._scene.until(there, f"{count} replies")
        return found
