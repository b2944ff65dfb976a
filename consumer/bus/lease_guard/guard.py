"""The worker's side of the lease guard, a child process that renews leases while the worker cannot.

A model that does not release the GIL blocks the event loop, and with it the renewal of leases.
After `ack_wait` another worker would receive the request as well. Therefore the worker reports two
facts about each lease to a small process with its own connection: the worker is alive, and it has
sent a renewal over a working connection. The guard renews a lease that the worker has not renewed
in time. If the worker reports nothing for longer than `stall_timeout`, its event loop hangs, and
the guard kills the worker.

The messages are lines of JSON on the guard's standard input: first a `GuardConfig`, then one line
per fact. The guard exits when that pipe closes, which happens when the worker exits.
"""

import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from consumer.background_tasks import cancel_and_wait
from consumer.settings import Settings

log = structlog.get_logger()

RESTART_PAUSE = 1.0  # seconds
LEASE_END_DELAY = 0.1  # seconds until the worker reports the end of a lease
MAX_UNREAD = 2**18  # bytes that the guard may leave unread; a line has about 100
_CONNECTION = (
    "nats_url",
    "nats_user",
    "nats_creds",
    "nats_nkey_seed",
    "nats_ca",
    "nats_cert",
    "nats_key",
    "nats_inbox_prefix",
)


@dataclass(frozen=True)
class GuardConfig:
    """The guard's first message.

    Attributes:
        nats: Settings of the connection; not command-line arguments, because of the password.
        parent: Process id of the worker.
        stall_timeout: Seconds without a report after which the guard kills the worker.
        log_format: Log format of the worker.
        log_level: Log level of the worker.
    """

    nats: dict[str, Any]
    parent: int
    stall_timeout: float
    log_format: str
    log_level: str


class LeaseGuard:
    """Starts the lease guard and reports leases to it. Before `start` nothing is sent.

    Args:
        settings: Settings of the worker.
    """

    def __init__(self, settings: Settings) -> None:
        self._config = GuardConfig(
            nats={
                **settings.model_dump(mode="json", include=set(_CONNECTION)),
                # `model_dump` masks the password.
                "nats_password": settings.nats_password.get_secret_value(),
            },
            parent=os.getpid(),
            stall_timeout=settings.consumer_stall_timeout,
            log_format=settings.log_format,
            log_level=settings.log_level,
        )
        self._leases: dict[str, float] = {}  # duration of each lease in seconds, by its subject
        self._unsent: list[object] = []  # facts
        self._is_sending = False  # whether `_send_facts` is scheduled for the next loop iteration
        self._process: asyncio.subprocess.Process | None = None
        self._supervising: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the guard; None while it does not run."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the guard, and restart it whenever it exits."""
        await self._spawn()
        self._supervising = asyncio.create_task(self._supervise(), name="lease_guard")

    async def close(self) -> None:
        """Kill the guard. Never raises."""
        supervising, self._supervising = self._supervising, None
        if supervising is not None:
            await cancel_and_wait(supervising)
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()  # the guard has no state that must be saved
            await process.wait()

    def alive(self, lease: str, ack_wait: float) -> None:
        """Report that this worker is alive and has a lease.

        Args:
            lease: Subject that renews the lease.
            ack_wait: Duration of the lease, in seconds.
        """
        self._leases[lease] = ack_wait
        self._report({"alive": lease, "ack_wait": ack_wait})

    def renewed(self, lease: str) -> None:
        """Report that the worker has sent a renewal over a working connection."""
        self._report({"renewed": lease})

    def stop_renewing(self, lease: str) -> None:
        """Report that a lease has ended."""
        if self._leases.pop(lease, None) is not None:
            self._report({"over": lease}, later=LEASE_END_DELAY)

    def _report(self, fact: object, *, later: float | None = None) -> None:
        # Each write wakes the guard, which takes as long as a NATS request. Therefore facts of one
        # loop iteration are sent together, and the end of a lease with the next facts.
        self._unsent.append(fact)
        loop = asyncio.get_running_loop()
        if later is not None:
            loop.call_later(later, self._send_facts)
        elif not self._is_sending:
            self._is_sending = True
            loop.call_soon(self._send_facts)

    def _send_facts(self) -> None:
        self._is_sending = False
        facts, self._unsent = self._unsent, []
        if facts:
            self._send(*facts)

    def _send(self, *messages: object) -> None:
        process = self._process
        if process is None or process.stdin is None or process.stdin.is_closing():
            return
        if process.stdin.transport.get_write_buffer_size() > MAX_UNREAD:
            # The guard is stopped or hangs. `_supervise` starts another one with all leases.
            log.error("lease_guard_not_reading")
            process.stdin.close()
            process.kill()
            return
        process.stdin.write("".join(f"{json.dumps(one)}\n" for one in messages).encode())

    async def _spawn(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                # -P: do not import a folder named consumer in the working directory.
                *(sys.executable, "-P", "-m", "consumer.bus.lease_guard.process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:  # out of memory, or out of processes
            self._process = None
            log.error("lease_guard_not_started", error=type(error).__name__)  # noqa: TRY400 - one line
            return
        self._unsent.clear()  # the new guard gets the current state of all leases
        leases = ({"alive": lease, "ack_wait": seconds} for lease, seconds in self._leases.items())
        self._send(asdict(self._config), *leases)

    async def _supervise(self) -> None:
        while True:
            if self._process is not None:
                code = await self._process.wait()
                log.warning("lease_guard_ended", code=code)
            await asyncio.sleep(RESTART_PAUSE)
            await self._spawn()
