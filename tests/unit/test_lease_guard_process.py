"""The loop of the lease guard, without a server."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from consumer.bus.lease_guard import process as lease_guard_process
from consumer.bus.lease_guard.guard import GuardConfig
from consumer.bus.lease_guard.process import LeaseGuardProcess

LOOP_CYCLES = 20  # cycles of the event loop
SOON = 5.0  # seconds; only bounds a wait for something that must happen
ACK_WAIT = 0.2  # seconds
STALL_TIMEOUT = 0.3  # seconds
LEASE = "lease.1"


class RecordingBus:
    """A connection whose publishes are recorded."""

    def __init__(self) -> None:
        self.connected = True
        self.client = self
        self.published: list[str] = []

    async def publish(self, subject: str, _: bytes) -> None:
        self.published.append(subject)


class Guard:
    """A guard whose worker is the test. It counts kills instead of killing."""

    def __init__(self, stall_timeout: float = 60.0, **nats: Any) -> None:
        self.messages = asyncio.StreamReader()
        self.config = GuardConfig(nats, os.getppid(), stall_timeout, "json", "ERROR")
        self.process = LeaseGuardProcess(self.config, self.messages)
        self.kills = 0
        self.process._end_worker = self._note_kill  # type: ignore[method-assign]

    async def _note_kill(self) -> None:
        self.kills += 1

    def send(self, **message: Any) -> None:
        """Send a message of the worker."""
        self.messages.feed_data(json.dumps(message).encode() + b"\n")


@asynccontextmanager
async def watching(guard: Guard) -> AsyncIterator[RecordingBus]:
    """Run the receive and watch loops of the guard on a connection."""
    bus = RecordingBus()
    guard.process._bus = bus  # type: ignore[assignment]
    tasks = [
        asyncio.create_task(guard.process._receive()),
        asyncio.create_task(guard.process._watch()),
    ]
    try:
        yield bus
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_lease_may_end_immediately() -> None:
    guard = Guard()
    async with watching(guard):
        for _ in range(LOOP_CYCLES):
            await asyncio.sleep(0)
        guard.send(alive="a", ack_wait=60.0)
        guard.send(over="a")
        for _ in range(LOOP_CYCLES):
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("reports", "renews", "kills"),
    [
        pytest.param(("alive", "renewed"), False, False, id="worker renews its lease"),
        pytest.param(("alive",), True, False, id="worker without its bus"),
        pytest.param((), True, True, id="worker without messages is killed"),
        pytest.param(("renewed",), False, True, id="worker that renews but is not alive"),
    ],
)
async def test_guard_handles_alive_and_renewed_messages_separately(
    reports: tuple[str, ...], renews: bool, kills: bool
) -> None:
    guard = Guard(STALL_TIMEOUT)
    async with watching(guard) as bus:
        guard.send(alive=LEASE, ack_wait=ACK_WAIT)
        beats = 30
        for _ in range(beats):  # twice the stall_timeout
            for report in reports:
                guard.send(
                    **{report: LEASE}, **({"ack_wait": ACK_WAIT} if report == "alive" else {})
                )
            await asyncio.sleep(2 * STALL_TIMEOUT / beats)
    assert bool(bus.published) == renews
    assert bool(guard.kills) == kills


async def test_late_renewal_is_sent_after_the_connection() -> None:
    guard = Guard()
    async with watching(guard) as bus:
        bus.connected = False
        guard.send(alive=LEASE, ack_wait=ACK_WAIT)
        await asyncio.sleep(2 * ACK_WAIT)
        assert not bus.published
        bus.connected = True
        async with asyncio.timeout(SOON):
            while not bus.published:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN NATS USER JWT-----\nabc\n"])
@pytest.mark.parametrize("setting", ["nats_creds", "nats_nkey_seed"])
async def test_unusable_credentials_do_not_block_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, content: bytes | None
) -> None:
    monkeypatch.setattr(lease_guard_process, "FIRST_RECONNECT_PAUSE", 0.01)
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    guard = Guard(**{"nats_url": "nats://127.0.0.1:1", setting: str(file)})
    running = asyncio.create_task(guard.process.run())
    # A connect loop without a pause would never let these cycles run.
    for _ in range(LOOP_CYCLES):
        await asyncio.sleep(0)
    guard.messages.feed_eof()  # the worker has exited
    async with asyncio.timeout(SOON):
        await running
