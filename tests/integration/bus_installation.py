"""An installation on a real nats-server, and its workers, for the tests of the bus."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import ConsumerInfo

from consumer.bus.attempt_marks import AttemptMarks
from consumer.bus.connection import Bus, connect
from consumer.bus.delivery import DeliveryContext, JetStreamDelivery
from consumer.bus.lease_guard.guard import LeaseGuard
from consumer.bus.publishing import JetStreamEvents
from consumer.bus.pull import PullLoop
from consumer.bus.topology import Durable, Topology
from consumer.devstack import NatsServer
from consumer.settings import Settings
from generation_contracts import Subjects, Task

T = TypeVar("T")

TASK = Task.TEXT_TO_IMAGE
REQUESTS, OTHER_REQUESTS, RESULTS, DEAD_LETTERS = (
    f"GENERATION_{name}"
    for name in ("REQUESTS_TEXT_TO_IMAGE", "REQUESTS_IMAGE_TO_TEXT", "RESULTS", "DEAD_LETTERS")
)
SOON = 15.0  # seconds; only bounds a wait for something that must happen
ACK_WAIT = 60.0  # seconds; longer than any test: only a NAK can cause a redelivery
SANE = 10.0  # seconds; far above every measured time
POLL = 0.005  # seconds


# Server configuration with a user `mute` (password x) that may not publish acknowledgements.
# Connections without a user name become the user `any`.
MUTE = """
authorization {
  users: [
    { user: "any", password: "x" }
    { user: "mute", password: "x", permissions: { publish: { deny: ["$JS.ACK.>"] } } }
  ]
}
no_auth_user: "any"
"""


def bus_settings(url: str) -> Settings:
    """Return settings for the bus, without the credentials of the environment."""
    unset: dict[str, Any] = dict.fromkeys(
        ("nats_creds", "nats_nkey_seed", "nats_ca", "nats_cert", "nats_key")
    )
    return Settings(nats_url=url, **unset)


def measured(what: str, seconds: float) -> None:
    """Print a measured time (`pytest -s`), and check only that it is below `SANE`."""
    print(f"{what}: {seconds * 1e3:.1f} ms")  # noqa: T201 - shown by `pytest -s`
    assert seconds < SANE


async def soon(value: Awaitable[T]) -> T:
    """Await a value for at most `SOON` seconds."""
    async with asyncio.timeout(SOON):
        return await value


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Poll a condition until it is true."""
    async with asyncio.timeout(SOON):
        while not await condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(POLL)


async def until_connected(*buses: Bus) -> None:
    """Return when all connections are up."""

    async def connected() -> bool:
        return all(bus.connected for bus in buses)

    await until(connected)


async def until_lost(*buses: Bus) -> None:
    """Return when all connections are lost."""

    async def lost() -> bool:
        return not any(bus.connected for bus in buses)

    await until(lost)


async def open_bus(url: str, parts: AsyncExitStack) -> Bus:
    """Open a connection that `parts` closes."""
    bus = await connect(bus_settings(url), name="test", within=SOON)
    parts.push_async_callback(bus.close)
    return bus


async def api(bus: Bus, subject: str, body: object = None) -> dict[str, Any]:
    """Call the JetStream API, and require an answer without an error."""
    payload = b"" if body is None else json.dumps(body).encode()
    answer = await bus.client.request(f"$JS.API.{subject}", payload, timeout=5)
    value: dict[str, Any] = json.loads(answer.data)
    assert "error" not in value, value
    return value


async def take(worker: "Worker") -> JetStreamDelivery:
    """Return the next delivery of a worker."""
    delivery = await soon(worker.loop.next())
    assert delivery is not None
    return delivery


async def _quiet(_: Exception) -> None:
    """Ignore the errors of the plain client: tests stop its server."""


class Worker:
    """A pull loop and its connection."""

    def __init__(self, bus: Bus, loop: PullLoop) -> None:
        self.bus = bus
        self.loop = loop


class Installation:
    """The streams of one root and the durable of one task.

    Attributes:
        server: The nats-server with the streams.
        bus: A connection that no worker uses.
        plain: A nats-py client, without the project's code.
    """

    def __init__(
        self, server: NatsServer, parts: AsyncExitStack, bus: Bus, plain: Client, topology: Topology
    ) -> None:
        self.server = server
        self.bus = bus
        self.plain = plain
        self.topology = topology
        self.subjects = Subjects()
        self.events = JetStreamEvents(bus, self.subjects, ensure=partial(topology.ensure, TASK))
        self._parts = parts
        self._buses = [bus]

    @classmethod
    async def make(
        cls,
        server: NatsServer,
        parts: AsyncExitStack,
        *,
        ack_wait: float = ACK_WAIT,
        max_ack_pending: int = 1,
    ) -> "Installation":
        """Connect, and create the streams and the durable."""
        bus = await open_bus(server.url, parts)
        plain = await nats.connect(
            server.url,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.05,
            error_cb=_quiet,
        )
        parts.push_async_callback(plain.close)
        topology = Topology(bus, Subjects(), ack_wait=ack_wait, max_ack_pending=max_ack_pending)
        await topology.apply((TASK,))
        return cls(server, parts, bus, plain, topology)

    async def worker(self, url: str | None = None) -> Worker:
        """Start a worker, by default with a direct connection to the server."""
        bus = await open_bus(url or self.server.url, self._parts)
        self._buses.append(bus)
        topology = Topology(bus, self.subjects, ack_wait=ACK_WAIT, max_ack_pending=1)
        ensure = partial(topology.ensure, TASK)
        durable = await ensure()
        loop = PullLoop(bus, durable, ensure=ensure, context=self.context(bus, durable))
        await loop.start()
        return Worker(bus, loop)

    def context(self, bus: Bus, durable: Durable) -> DeliveryContext:
        """Services for deliveries, with a lease guard that is not started."""
        marks = AttemptMarks(bus, self.subjects, TASK)
        return DeliveryContext(
            bus, durable.ack_wait, marks, LeaseGuard(bus_settings(self.server.url))
        )

    def events_of(self, worker: Worker) -> JetStreamEvents:
        """Return the event publisher of a worker, on the worker's connection."""
        topology = Topology(worker.bus, self.subjects, ack_wait=ACK_WAIT, max_ack_pending=1)
        return JetStreamEvents(worker.bus, self.subjects, ensure=partial(topology.ensure, TASK))

    async def publish(
        self,
        body: bytes = b"{}",
        *,
        request_id: str | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 5.0,  # noqa: ASYNC109 - nats-py's own
    ) -> int:
        """Publish a request with plain nats-py; return its stream sequence."""
        subject = self.subjects.request(TASK, request_id)
        jetstream = self.plain.jetstream()
        return (await jetstream.publish(subject, body, headers=headers, timeout=timeout)).seq

    async def publish_on_a_new_connection(self, body: bytes) -> None:
        """Publish a request without waiting for a reconnect."""
        client = await nats.connect(self.server.url)
        await client.jetstream().publish(self.subjects.request(TASK), body)
        await client.close()

    async def listen(
        self, subject: str, respond: Callable[[Msg], Awaitable[None]] | None = None
    ) -> Subscription:
        """Subscribe with plain nats-py; return when the server has the subscription."""
        subscription = await self.plain.subscribe(subject, cb=respond)
        await self.plain.flush()  # nats-py may send the first PING before the SUB
        await self.plain.flush()
        return subscription

    async def consumer_info(self) -> ConsumerInfo:
        """Return the server's state of the durable."""
        info: ConsumerInfo = await self.plain.jetstream().consumer_info(REQUESTS, str(TASK))
        return info

    async def until_pulls_wait(self, count: int) -> None:
        """Return when the server has `count` waiting pull requests."""

        async def waiting() -> bool:
            return (await self.consumer_info()).num_waiting == count

        await until(waiting)

    async def count(self, stream: str) -> int:
        """Return the number of messages in a stream."""
        return (await self.plain.jetstream().stream_info(stream)).state.messages

    async def api(self, subject: str, body: object = None) -> dict[str, Any]:
        """Call the JetStream API, and require an answer without an error."""
        return await api(self.bus, subject, body)

    async def kill_server(self) -> None:
        """Send SIGKILL; return when all clients are disconnected."""
        await asyncio.to_thread(self.server.kill)
        await until_lost(*self._buses)

    async def stop_server(self) -> None:
        """Send SIGTERM; return when all clients are disconnected."""
        await asyncio.to_thread(self.server.stop)
        await until_lost(*self._buses)

    async def start_server(self) -> float:
        """Restart the server with the same port and files; return the time when it is ready."""
        await asyncio.to_thread(self.server.start)
        await asyncio.to_thread(self.server.wait_ready)
        return time.monotonic()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """See `frozen`."""
        with frozen(self.server):
            yield


@contextmanager
def frozen(server: NatsServer) -> Iterator[None]:
    """Stop the server's process with SIGSTOP for the block; its connections stay open."""
    server.signal(signal.SIGSTOP)
    os.waitpid(server.pid, os.WUNTRACED)  # returns when all its threads have stopped
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)
