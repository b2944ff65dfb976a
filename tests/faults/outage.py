"""The test's side of an outage of nats-server, and what must hold when it is over."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp
from nats.js.api import ConsumerInfo
from nats.js.errors import NotFoundError

from consumer.devstack import Daemon
from tests.faults.moments import BEGUN, GO, ON
from tests.faults.scene import Event, Scene

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
            await until_readiness(scene, worker, bus="not connected")
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


async def two_workers(scene: Scene, cause: str) -> list[Daemon]:
    """Two workers with the same fault, ready."""
    workers = [scene.launch(cause) for _ in range(2)]
    for worker in workers:
        await asyncio.to_thread(worker.wait_ready)
    return workers


async def readiness(worker: Daemon) -> tuple[int, dict[str, str]]:
    """What /readyz says: its status and its conditions."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{worker.probes_url}/readyz") as response,
    ):
        conditions: dict[str, str] = await response.json()
        return response.status, conditions


async def until_readiness(scene: Scene, worker: Daemon, **conditions: str) -> None:
    """Return once a worker is not ready, for these reasons and no others."""

    async def says_so() -> bool:
        status, found = await readiness(worker)
        wrong = {name: said for name, said in found.items() if said != "ok"}
        return status == HTTPStatus.SERVICE_UNAVAILABLE and wrong == conditions

    await scene.until(says_so, f"readiness of {worker.name} without {conditions}")


async def all_well(scene: Scene, *workers: Daemon) -> None:
    """Every worker is the process that it was, and is ready again."""
    for worker in workers:

        async def ready(worker: Daemon = worker) -> bool:
            return (await readiness(worker))[0] == HTTPStatus.OK

        await scene.until(ready, f"readiness of {worker.name}")
        assert worker.alive


async def let_go(scene: Scene, moment: str) -> None:
    """Let a held process go on, and return once it does."""
    (scene.folder / f"{moment}{GO}").touch()
    await scene.noted(f"{moment}{ON}")


def begun(scene: Scene, request_id: str) -> float:
    """`time.monotonic()` of the first run's beginning."""
    times = dict(reversed([line.split() for line in scene.notes(BEGUN)]))
    return float(times[request_id])


def measured(what: str, seconds: float) -> None:
    """Show a measurement (`pytest -s`), and bound it."""
    print(f"{what}: {seconds:.3f} s")  # noqa: T201 - for people
    assert seconds < SLACK


async def done(scene: Scene, request_id: str) -> Event:
    """The one terminal event: succeeded, and the object is what it says."""
    event = await scene.event(request_id)
    assert event["type"] == "generation.v1.succeeded", event
    (output,) = event["outputs"]
    assert hashlib.sha256(await scene.object(output)).hexdigest() == output["sha256"]
    return event


async def nothing_left(scene: Scene, *request_ids: str) -> None:
    """The queue is empty; of each request there is one event and one object, and no dead letter."""
    await scene.emptied()
    for request_id in request_ids:
        assert len(await scene.events(request_id)) == 1
    assert len(await scene.keys()) == len(request_ids)
    letters = await scene.sender.jetstream().stream_info(scene.subjects.dead_letters_stream)
    assert letters.state.messages == 0


async def deliveries(scene: Scene) -> int:
    """How many deliveries the durable has made."""
    delivered = (await _durable(scene)).delivered
    assert delivered is not None
    return int(delivered.consumer_seq)


async def until_pulls_stand(scene: Scene, count: int) -> None:
    """Return once nothing is left to do and so many workers wait for more."""

    async def waiting() -> bool:
        durable = await _durable(scene)
        return durable.num_waiting == count and not durable.num_ack_pending

    await scene.until(waiting, f"{count} workers that wait")


async def _durable(scene: Scene) -> ConsumerInfo:
    info: ConsumerInfo = await scene.sender.jetstream().consumer_info(
        scene.subjects.requests_stream, str(scene.task)
    )
    return info


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
