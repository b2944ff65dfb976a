"""The lease guard: a helper process that renews leases while this process cannot.

A model that holds the interpreter's lock stops the event loop, and its heartbeats with it: after
`ack_wait` another worker would get the request too. So the worker reports two facts about each
lease to a small process with a connection of its own: that the worker is alive, and that it has
renewed the lease over a connection that is there. The guard renews a lease that the worker has not
renewed in time. When the worker is silent for longer than `stall_timeout`, the guard takes its
event loop to hang and kills the worker, which nothing else can end any more.

The messages are lines of JSON on the guard's standard input: first a `GuardConfig`, then one line
for each fact. The guard ends with that pipe, that is, with this process.
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
LEASE_END_DELAY = 0.1  # seconds until the guard learns that a lease is over
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
        nats: The settings of the connection; they may hold a password, so they are no arguments.
        parent: Process id of the worker.
        stall_timeout: Seconds without a sign of life after which the worker is killed.
        log_format: The worker's.
        log_level: The worker's.
    """

    nats: dict[str, Any]
    parent: int
    stall_timeout: float
    log_format: str
    log_level: str


class LeaseGuard:
    """The worker's side of the lease guard. Before `start` nothing is sent.

    Args:
        settings: The worker's.
    """

    def __init__(self, settings: Settings) -> None:
        self._config = GuardConfig(
            nats={
                **settings.model_dump(mode="json", include=set(_CONNECTION)),
                # The dump hides it.
                "nats_password": settings.nats_password.get_secret_value(),
            },
            parent=os.getpid(),
            stall_timeout=settings.consumer_stall_timeout,
            log_format=settings.log_format,
            log_level=settings.log_level,
        )
        self._leases: dict[str, float] = {}  # seconds that each lease lasts, by its subject
        self._unsent: list[object] = []  # facts
        self._is_sending = False  # whether they are sent in the next turn of the event loop
        self._process: asyncio.subprocess.Process | None = None
        self._supervising: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The guard's process id, None while there is none."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the guard, and from then on another one whenever it ends."""
        await self._spawn()
        self._supervising = asyncio.create_task(self._supervise(), name="lease_guard")

    async def close(self) -> None:
        """End the guard; never raises."""
        supervising, self._supervising = self._supervising, None
        if supervising is not None:
            await cancel_and_wait(supervising)
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()  # it has nothing to lose
            await process.wait()

    def alive(self, lease: str, ack_wait: float) -> None:
        """Report that this process works on the request of a lease.

        Args:
            lease: The subject that renews it.
            ack_wait: Seconds that it lasts.
        """
        self._leases[lease] = ack_wait
        self._report({"alive": lease, "ack_wait": ack_wait})

    def renewed(self, lease: str) -> None:
        """Report that a renewal has been published over a connection that is there."""
        self._report({"renewed": lease})

    def stop_renewing(self, lease: str) -> None:
        """Report that a lease is over."""
        if self._leases.pop(lease, None) is not None:
            self._report({"over": lease}, later=LEASE_END_DELAY)

    def _report(self, fact: object, *, later: float | None = None) -> None:
        # Each write wakes the guard, which takes as long as a question to NATS. So facts go
        # together: those of one turn of the event loop, and the end of a lease with what is next.
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
            # It is stopped or hangs. Another one gets all leases.
            log.error("lease_guard_not_reading")
            process.stdin.close()
            process.kill()
            return
        process.stdin.write("".join(f"{json.dumps(one)}\n" for one in messages).encode())

    async def _spawn(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                # -P: a folder named consumer in the working directory is not this package.
                *(sys.executable, "-P", "-m", "consumer.bus.lease_guard.process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:  # no memory, no process left
            self._process = None
            log.error("lease_guard_not_started", error=type(error).__name__)  # noqa: TRY400 - one line
            return
        self._unsent.clear()  # it gets all leases, as they are now
        leases = ({"alive": lease, "ack_wait": seconds} for lease, seconds in self._leases.items())
        self._send(asdict(self._config), *leases)

    async def _supervise(self) -> None:
        while True:
            if self._process is not None:
                code = await self._process.wait()
                log.warning("lease_guard_ended", code=code)
            await asyncio.sleep(RESTART_PAUSE)
            await self._spawn()
