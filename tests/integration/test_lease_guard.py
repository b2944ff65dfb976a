"""The lease guard as a process: it renews reported leases, and ends with its worker."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from consumer.bus.lease_guard import guard as worker_side
from consumer.bus.lease_guard.guard import LeaseGuard
from tests.integration.bus_installation import Installation, bus_settings, soon, until

LEASE = "lease.1"
ACK_WAIT = 1.0  # seconds


async def test_leases_reported_before_the_start_are_renewed_after_a_restart(
    installation: Installation,
) -> None:
    lease_guard = LeaseGuard(bus_settings(installation.server.url))
    beats = await installation.listen(LEASE)
    lease_guard.alive("lease.ended", ACK_WAIT)
    lease_guard.alive(LEASE, ACK_WAIT)
    lease_guard.stop_renewing("lease.ended")
    ended = await installation.listen("lease.ended")
    await lease_guard.start()
    try:
        for _ in range(2):
            for _ in range(3):
                message = await soon(beats.next_msg(timeout=None))
                assert message.data == b"+WPI"
            first = lease_guard.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            while beats.pending_msgs:
                await beats.next_msg()
        await soon(beats.next_msg(timeout=None))
        assert lease_guard.pid != first
        assert ended.pending_msgs == 0
    finally:
        await lease_guard.close()
    assert lease_guard.pid is None


async def test_a_guard_that_was_not_started_can_be_closed() -> None:
    lease_guard = LeaseGuard(bus_settings("nats://127.0.0.1:1"))
    lease_guard.alive(LEASE, ACK_WAIT)
    lease_guard.renewed(LEASE)
    lease_guard.stop_renewing(LEASE)
    lease_guard.stop_renewing(LEASE)
    await lease_guard.close()
    assert lease_guard.pid is None


async def test_a_guard_that_does_not_read_is_replaced(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_side, "MAX_UNREAD", 10_000)
    lease_guard = LeaseGuard(bus_settings(installation.server.url))
    await lease_guard.start()
    try:
        unresponsive = lease_guard.pid
        assert unresponsive is not None
        os.kill(unresponsive, signal.SIGSTOP)
        beats = await installation.listen(LEASE)
        lease_guard.alive(LEASE, ACK_WAIT)

        async def replaced() -> bool:
            lease_guard.alive(f"lease.{'x' * 10_000}", 60.0)
            return lease_guard.pid != unresponsive

        await until(replaced)
        await soon(beats.next_msg(timeout=None))  # the new process renews the lease
    finally:
        await lease_guard.close()


# A worker that starts a guard and forks a process that inherits every file descriptor.
WORKER = """
import asyncio, os, subprocess, sys
from consumer.bus.lease_guard.guard import LeaseGuard
from consumer.settings import Settings

async def main():
    guard = LeaseGuard(Settings())
    await guard.start()
    child = os.fork()
    if child == 0:
        os.execv("/bin/sleep", ["sleep", "60"])
    print(guard.pid, child, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("missing", ["credentials file", "server and log reader"])
async def test_the_guard_ends_with_its_worker(tmp_path: Path, missing: str) -> None:
    environment = {**os.environ, "NATS_URL": "nats://127.0.0.1:1", "LOG_LEVEL": "INFO"}
    if missing == "credentials file":
        environment["NATS_CREDS"] = str(tmp_path / "none")
    read, write = os.pipe()
    if missing == "server and log reader":
        os.set_blocking(write, False)
        while _filled(write):
            pass
        os.set_blocking(write, True)
    worker = subprocess.Popen(  # noqa: ASYNC220 - returns immediately
        [sys.executable, "-c", WORKER], env=environment, stdout=subprocess.PIPE, stderr=write
    )
    os.close(write)
    try:
        assert worker.stdout is not None
        guard, child = map(int, (await asyncio.to_thread(worker.stdout.readline)).split())
        # After this time the guard has read its configuration, and may retry its connection.
        await asyncio.sleep(0.5)
        worker.kill()
        worker.wait()

        async def ended() -> bool:
            return not os.path.exists(f"/proc/{guard}")  # noqa: ASYNC240, PTH110 - no file system

        await until(ended)
        os.kill(child, signal.SIGKILL)
    finally:
        os.close(read)
        worker.kill()
        worker.communicate()


def _filled(pipe: int) -> int:
    try:
        return os.write(pipe, bytes(4096))
    except BlockingIOError:
        return 0
