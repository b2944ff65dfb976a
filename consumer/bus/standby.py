"""The standby: a helper process that renews leases while this process cannot.

A model that holds the interpreter's lock stops the event loop, and its heartbeats with it: after
`ack_wait` another worker would get the request too. So each renewal is also told to a small process
with a connection of its own. It stays quiet as long as it hears from this one; when it does not, it
renews in its stead, and when that goes on for longer than `stall_timeout`, it takes the thread to
hang and kills this process, which nothing else can end any more.

Lines of JSON on the helper's standard input say everything: first a `Charge`, then one line for
each renewal and each lease that is over. The helper ends with that pipe, that is, with this
process.
"""

import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from consumer.settings import Settings

log = structlog.get_logger()

START_AGAIN_AFTER = 1.0  # seconds
_CONNECTION = (
    "nats_url",
    "nats_creds",
    "nats_nkey_seed",
    "nats_ca",
    "nats_cert",
    "nats_key",
    "nats_inbox_prefix",
)


@dataclass(frozen=True)
class Charge:
    """What the helper is told first.

    Attributes:
        nats: The settings of the connection; they may hold a password, so they are no arguments.
        parent: Process id of the worker.
        patience: Seconds without a word about a lease after which the worker is killed.
        log_format: The worker's.
        log_level: The same.
    """

    nats: dict[str, Any]
    parent: int
    patience: float
    log_format: str
    log_level: str


class Standby:
    """This process's side of the helper. Until it is started, it is told nothing.

    Args:
        settings: The worker's.
    """

    def __init__(self, settings: Settings) -> None:
        self._charge = Charge(
            nats=settings.model_dump(mode="json", include=set(_CONNECTION)),
            parent=os.getpid(),
            patience=settings.consumer_stall_timeout,
            log_format=settings.log_format,
            log_level=settings.log_level,
        )
        self._held: dict[str, float] = {}  # seconds that each lease lasts, by its subject
        self._process: asyncio.subprocess.Process | None = None
        self._supervising: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The helper's process id, None while there is none."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the helper, and from then on another one whenever it ends."""
        await self._spawn()
        self._supervising = asyncio.create_task(self._supervise(), name="standby")

    async def close(self) -> None:
        """End the helper; never raises."""
        supervising, self._supervising = self._supervising, None
        if supervising is not None:
            supervising.cancel()
            await asyncio.wait({supervising})
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()  # it has nothing to lose
            await process.wait()

    def renewed(self, lease: str, ack_wait: float) -> None:
        """A lease has just been renewed, or would have been if the bus were there.

        Args:
            lease: The subject that renews it.
            ack_wait: Seconds that it lasts.
        """
        self._held[lease] = ack_wait
        self._tell({"renewed": lease, "ack_wait": ack_wait})

    def let_lapse(self, lease: str) -> None:
        """A lease is over."""
        if self._held.pop(lease, None) is not None:
            self._tell({"over": lease})

    def _tell(self, word: object) -> None:
        if self._process is None or self._process.stdin is None:
            return
        if not self._process.stdin.is_closing():
            self._process.stdin.write(f"{json.dumps(word)}\n".encode())

    async def _spawn(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                # -P: a folder named consumer in the working directory is not this package.
                *(sys.executable, "-P", "-m", "consumer.bus.standby_process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:  # no memory, no process left
            self._process = None
            log.error("standby_not_started", error=type(error).__name__)  # noqa: TRY400 - one line
            return
        self._tell(asdict(self._charge))
        for lease, ack_wait in self._held.items():
            self._tell({"renewed": lease, "ack_wait": ack_wait})

    async def _supervise(self) -> None:
        while True:
            if self._process is not None:
                code = await self._process.wait()
                log.warning("standby_ended", code=code)
            await asyncio.sleep(START_AGAIN_AFTER)
            await self._spawn()
