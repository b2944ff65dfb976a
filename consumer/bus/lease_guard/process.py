"""The lease guard process, which `guard.LeaseGuard` starts for each worker.

The process reads the worker's reports about its leases, renews leases that the worker has not
renewed in time, and kills a worker that has reported nothing for too long. It exits when its input
closes, or when the worker's process exits.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import structlog
from nats.errors import Error
from pydantic_core import from_json

from consumer.background_tasks import cancel_and_wait
from consumer.bus.connection import Bus, BusUnavailable, connect
from consumer.bus.lease_guard.guard import GuardConfig
from consumer.settings import Settings
from consumer.telemetry import configure_logging

log = structlog.get_logger()

TICKS_PER_ACK_WAIT = 20
RENEWALS_PER_ACK_WAIT = 5  # equal to the worker's
LATE_INTERVALS = 1.5  # intervals without a renewal after which the guard renews
MAX_TICK = 1.0  # seconds
POLL_INTERVAL = 1.0  # seconds between two checks of the worker's process
CONNECT_TIMEOUT = 30.0  # seconds for one attempt
FIRST_RECONNECT_PAUSE = 1.0  # seconds; doubled with each failure, up to the next
MAX_RECONNECT_PAUSE = 15.0  # seconds
RENEW_TIMEOUT = 1.0  # seconds for one renewal on a connection that accepts no data
DUMP_TIMEOUT = 1.0  # seconds for the worker to dump the stacks of its threads


@dataclass
class Lease:
    """One lease of the worker.

    Attributes:
        ack_wait: Duration of the lease, in seconds.
        unreported: Seconds since the worker's last report, counted while this process ran.
        unrenewed: Seconds since the last renewal, by the worker or by this process.
    """

    ack_wait: float
    unreported: float = 0.0
    unrenewed: float = 0.0

    @property
    def interval(self) -> float:
        """Seconds between two renewals."""
        return self.ack_wait / RENEWALS_PER_ACK_WAIT


class LeaseGuardProcess:
    """Guards the leases of one worker.

    Args:
        config: The first message of the worker.
        messages: The lines that follow.
    """

    def __init__(self, config: GuardConfig, messages: asyncio.StreamReader) -> None:
        self._config = config
        self._messages = messages
        self._leases: dict[str, Lease] = {}
        self._has_leases = asyncio.Event()  # set while there is a lease
        self._bus: Bus | None = None

    async def run(self) -> None:
        """Run until the input closes.

        Raises:
            Exception: An unexpected error; the worker starts another guard.
        """
        tasks = {
            asyncio.create_task(work, name=name)
            for name, work in (
                ("receive", self._receive()),
                ("connect", self._connect()),
                ("watch", self._watch()),
            )
        }
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            await cancel_and_wait(*tasks)

    async def _receive(self) -> None:
        while line := await self._messages.readline():
            message = from_json(line)
            if "over" in message:
                self._leases.pop(message["over"], None)
            elif "renewed" in message:
                if (lease := self._leases.get(message["renewed"])) is not None:
                    lease.unrenewed = 0.0
            else:
                lease = self._leases.setdefault(message["alive"], Lease(message["ack_wait"]))
                lease.unreported = 0.0
            if self._leases:
                self._has_leases.set()
            else:
                self._has_leases.clear()

    async def _connect(self) -> None:
        settings = Settings(**self._config.nats)
        pause = FIRST_RECONNECT_PAUSE
        while True:
            try:
                self._bus = await connect(
                    settings,
                    name=f"generation lease guard {self._config.parent}",
                    within=CONNECT_TIMEOUT,
                )
            except BusUnavailable as error:
                # An unreadable file fails at once; without the pause this would be a busy loop.
                log.warning("lease_guard_not_connected", reason=str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_RECONNECT_PAUSE)
                continue
            log.info("lease_guard_connected")
            pause = FIRST_RECONNECT_PAUSE
            await self._bus.closed.wait()
            self._bus = None

    async def _watch(self) -> None:
        while True:
            await self._has_leases.wait()
            shortest = min((lease.ack_wait for lease in self._leases.values()), default=MAX_TICK)
            tick = min(MAX_TICK, shortest / TICKS_PER_ACK_WAIT)
            before = time.monotonic()
            await asyncio.sleep(tick)
            # If this process was suspended, the worker was suspended as well: limit the time.
            passed = min(time.monotonic() - before, 2 * tick)
            for subject, lease in list(self._leases.items()):
                lease.unreported += passed
                lease.unrenewed += passed
                await self._check(subject, lease)

    async def _check(self, subject: str, lease: Lease) -> None:
        """Renew a lease that is late; kill a worker that is stalled."""
        if lease.unreported > self._config.stall_timeout + lease.interval:
            await self._end_worker()
        elif lease.unrenewed > LATE_INTERVALS * lease.interval:
            if self._bus is None or not self._bus.connected:
                return  # the renewal follows when the connection is back
            # The next renewal is due after one interval.
            lease.unrenewed = (LATE_INTERVALS - 1) * lease.interval
            try:
                async with asyncio.timeout(RENEW_TIMEOUT):
                    await self._bus.client.publish(subject, b"+WPI")
            except (Error, OSError) as error:  # TimeoutError is an OSError
                log.warning("lease_renewal_failed", error=type(error).__name__)

    async def _end_worker(self) -> None:
        log.error("worker_stalled", stall_timeout=self._config.stall_timeout)
        for number in (signal.SIGUSR1, signal.SIGKILL):
            if os.getppid() == self._config.parent:
                os.kill(self._config.parent, number)
                await asyncio.sleep(DUMP_TIMEOUT)


def end_with_worker(parent: int) -> None:
    """End this process when the worker's process has ended.

    A thread checks it, independently of the event loop. The input is not a reliable sign, because a
    process that the worker has forked may keep the pipe open.
    """

    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_INTERVAL)
        os._exit(0)

    threading.Thread(target=poll, name="end-with-worker", daemon=True).start()


async def main() -> None:
    """Read the configuration, then guard the leases until the input closes."""
    messages = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(messages), sys.stdin
    )
    line = await messages.readline()
    if not line:
        return
    config = GuardConfig(**from_json(line))
    configure_logging(config.log_format, config.log_level)  # type: ignore[arg-type] # the worker's
    end_with_worker(config.parent)
    await LeaseGuardProcess(config, messages).run()
    # Exit at once: closing the nats-py connection could outlast the worker.
    os._exit(0)


if __name__ == "__main__":
    # A signal to the process group is for the worker, which needs its leases while it drains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asyncio.run(main())
