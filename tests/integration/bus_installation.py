"""What the tests of the bus work on: one installation on a real server, and its workers."""

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
ACK_WAIT = 60.0  # seconds; longer than any test: what comes again has been given back
SANE = 10.0  # seconds; far above everything that is measured
POLL = 0.005  # seconds


# Server configuration with a user `mute` (password x) that may not settle; others need no name.
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
    """Settings for the bus alone, whatever the environment says."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("nats_creds", "nats_nkey_seed", "nats_ca", "nats_cert", "nats_key")
    )
    return Settings(nats_url=url, **nothing)


def measured(what: str, seconds: float) -> None:
    """Show a measurement (`pytest -s`); a test passes or fails for other reasons."""
    print(f"{what}: {seconds * 1e3:.1f} ms")  # noqa: T201 - for people
    assert seconds < SANE


async def soon(value: Awaitable[T]) -> T:
    """Wait for what must come."""
    async with asyncio.timeout(SOON):
        return await value


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    """Ask until the answer is yes, where nothing announces it."""
    async with asyncio.timeout(SOON):
        while not await true():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(POLL)


async def until_connected(*buses: Bus) -> None:
    """Return once all of them are connected."""

    async def connected() -> bool:
        return all(bus.connected for bus in buses)

    await until(connected)


async def until_lost(*buses: Bus) -> None:
    """Return once none of them is connected."""

    async def lost() -> bool:
        return not any(bus.connected for bus in buses)

    await until(lost)


async def open_bus(url: str, parts: AsyncExitStack) -> Bus:
    """A connection that is closed with the test."""
    bus = await connect(bus_settings(url), name="test", within=SOON)
    parts.push_async_callback(bus.close)
    return bus


async def api(bus: Bus, subject: str, body: object = None) -> dict[str, Any]:
    """Call the JetStream API as it is; it must not refuse."""
    payload = b"" if body is None else json.dumps(body).encode()
    answer = await bus.client.request(f"$JS.API.{subject}", payload, timeout=5)
    value: dict[str, Any] = json.loads(answer.data)
    assert "error" not in value, value
    return value


async def take(worker: "Worker") -> JetStreamDelivery:
    """The next delivery, which must come."""
    delivery = await soon(worker.loop.next())
    assert delivery is not None
    return delivery


async def _quiet(_: Exception) -> None:
    """The plain client's errors are those of the server that a test takes away."""


class Worker:
    """A pull loop on a connection of its own."""

    def __init__(self, bus: Bus, loop: PullLoop) -> None:
        self.bus = bus
        self.loop = loop


class Installation:
    """The streams of one root and the durable of one task.

    Attributes:
        server: Where it all lies.
        bus: A connection for what is not a worker's.
        plain: A nats-py client, without any code of the project.
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
        """Connect and apply."""
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
        """Start a worker, by default on the server itself."""
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
        """The publishing side of a worker, on its own connection."""
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
        """Publish a request with plain nats-py; returns its sequence in the stream."""
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
        """Subscribe with plain nats-py; returns when the server knows of it."""
        subscription = await self.plain.subscribe(subject, cb=respond)
        await self.plain.flush()  # its PING is ahead of the SUB
        await self.plain.flush()
        return subscription

    async def consumer_info(self) -> ConsumerInfo:
        """What the server says of the durable."""
        info: ConsumerInfo = await self.plain.jetstream().consumer_info(REQUESTS, str(TASK))
        return info

    async def until_pulls_stand(self, count: int) -> None:
        """Return once the server knows of so many pulls."""

        async def known() -> bool:
            return (await self.consumer_info()).num_waiting == count

        await until(known)

    async def count(self, stream: str) -> int:
        """How many messages a stream holds."""
        return (await self.plain.jetstream().stream_info(stream)).state.messages

    async def api(self, subject: str, body: object = None) -> dict[str, Any]:
        """Call the JetStream API as it is; it must not refuse."""
        return await api(self.bus, subject, body)

    async def kill_server(self) -> None:
        """SIGKILL; returns when the clients have noticed."""
        await asyncio.to_thread(self.server.kill)
        await until_lost(*self._buses)

    async def stop_server(self) -> None:
        """SIGTERM; returns when the clients have noticed."""
        await asyncio.to_thread(self.server.stop)
        await until_lost(*self._buses)

    async def start_server(self) -> float:
        """Start it again on the same port and files; returns the time when it was ready."""
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
    """For the block, the server does nothing and hears nothing; its connections stay."""
    server.signal(signal.SIGSTOP)
    os.waitpid(server.pid, os.WUNTRACED)  # returns when all its threads have stopped
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)
