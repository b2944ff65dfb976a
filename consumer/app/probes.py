"""Health for whoever supervises the daemon: /livez, /readyz and /metrics over HTTP.

`/livez` answers as long as the event loop turns and the device is not lost; `/readyz` says in JSON
which of its conditions does not hold; `/metrics` is Prometheus text.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from consumer.app.metrics import Metrics
from consumer.ports.telemetry import Observer
from consumer.telemetry import JobReport
from generation_contracts import FailureCode

log = structlog.get_logger()

LOG_EVERY = 10.0  # seconds between two log lines about a store that fails for the same reason
LOGGED_REASONS = 32  # reasons that the rate limit remembers; a failing store has a handful
SHUTDOWN_TIMEOUT = 1.0  # seconds that a scrape under way may take when the daemon ends


@dataclass
class Health:
    """What readiness depends on.

    Attributes:
        bus_connected: Asked at each probe.
        durable_present: The same.
        model_loaded: Set when the first job could run.
        store_reachable: Whether the store answered when it was last used.
        store_reason: Why it did not, for people.
        streams_writable: Whether JetStream stores what is published.
        streams_reason: Why it does not, for people.
        draining: No new job will be taken.
        device_lost: The process is about to end, for a new one to take over.
    """

    bus_connected: Callable[[], bool] = lambda: False
    durable_present: Callable[[], bool] = lambda: False
    model_loaded: bool = False
    store_reachable: bool = False
    store_reason: str = "not reached yet"
    streams_writable: bool = True
    streams_reason: str = ""
    draining: bool = False
    device_lost: bool = False

    def conditions(self) -> dict[str, str | None]:
        """Return each condition with why it does not hold; None: it holds. Safe to show."""
        return {
            "bus": None if self.bus_connected() else "not connected",
            "durable": None if self.durable_present() else "not present",
            "streams": None if self.streams_writable else self.streams_reason,
            "store": None if self.store_reachable else self.store_reason,
            "model": None if self.model_loaded else "not loaded",
            "device": "lost" if self.device_lost else None,
            "daemon": "draining" if self.draining else None,
        }


class _ReasonLimit:
    """Limits the log lines about failures to one per reason in `LOG_EVERY`.

    A success does not reset the limit: a store can answer every GET and refuse every PUT.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, tuple[float, int]] = {}  # time of the next line, lines left out

    def left_out(self, reason: str) -> int | None:
        """Return how many lines were left out since the last one; None: leave out this one, too."""
        now = time.monotonic()
        log_from, unlogged = self._reasons.get(reason, (now, 0))
        if now < log_from:
            self._reasons[reason] = (log_from, unlogged + 1)
            return None
        self._reasons.pop(reason, None)
        if len(self._reasons) >= LOGGED_REASONS:
            del self._reasons[next(iter(self._reasons))]  # the reason logged longest ago
        self._reasons[reason] = (now + LOG_EVERY, 0)
        return unlogged


@dataclass
class Telemetry(Observer):
    """Tells the metrics and the health what the daemon does."""

    metrics: Metrics
    health: Health = field(default_factory=Health)
    _store_changed: asyncio.Event = field(default_factory=asyncio.Event)
    _store_limit: _ReasonLimit = field(default_factory=_ReasonLimit)
    _recovery_logged: bool = False  # since the last line about a failure

    async def store_changes(self, within: float) -> bool:
        """Wait until the store goes away or comes back; False: not within so many seconds."""
        self._store_changed.clear()
        try:
            async with asyncio.timeout(within):
                await self._store_changed.wait()
        except TimeoutError:
            return False
        return True

    def job_started(self) -> None:
        """A delivery is in hand."""
        self.metrics.job_started()

    def job_finished(self, report: JobReport) -> None:
        """A delivery is settled, given back or abandoned."""
        self.metrics.job_finished(report)

    def chain_broken(self, code: FailureCode) -> None:
        """A chain has ended at a step that could not be queued."""
        self.metrics.chain_broken(code)

    def call_refused(self, code: FailureCode) -> None:
        """The front door has refused a call."""
        self.metrics.call_refused(code)

    def device_stepped(self) -> None:
        """The run under way has come to a new step, or to more text."""
        self.metrics.device_stepped()

    def device_busy(self, seconds: float) -> None:
        """A run has ended, in which the device worked for so long."""
        self.metrics.device_busy(seconds)

    def store_reachable(self, reachable: bool, reason: str = "") -> None:
        """The store has answered, or not."""
        self.metrics.store_reachable(reachable, reason)
        if not reachable:
            self.health.store_reason = reason or "not reachable"
            self._log_store_failure(self.health.store_reason)
        elif not self.health.store_reachable and not self._recovery_logged:
            log.info("store_reachable")
            self._recovery_logged = True
        if reachable != self.health.store_reachable:
            self._store_changed.set()
        self.health.store_reachable = reachable

    def _log_store_failure(self, reason: str) -> None:
        unlogged = self._store_limit.left_out(reason)
        if unlogged is not None:
            log.warning("store_unreachable", reason=reason, unlogged=unlogged)
            self._recovery_logged = False

    def bus_writable(self, writable: bool, reason: str = "") -> None:
        """JetStream has taken what was published, or refuses it."""
        health, was_writable = self.health, self.health.streams_writable
        logged, reason = health.streams_reason, "" if writable else reason or "not writable"
        health.streams_writable, health.streams_reason = writable, reason
        if writable and not was_writable:
            log.info("streams_take")
        elif not writable and reason != logged:
            log.warning("streams_refuse", reason=reason)


class NullObserver(Observer):
    """Tells nobody: for commands that use a part outside the daemon."""

    def job_started(self) -> None:
        """Not told."""

    def job_finished(self, report: JobReport) -> None:
        """Not told."""

    def chain_broken(self, code: FailureCode) -> None:
        """Not told."""

    def call_refused(self, code: FailureCode) -> None:
        """Not told."""

    def device_stepped(self) -> None:
        """Not told."""

    def device_busy(self, seconds: float) -> None:
        """Not told."""

    def store_reachable(self, reachable: bool, reason: str = "") -> None:
        """Not told."""

    def bus_writable(self, writable: bool, reason: str = "") -> None:
        """Not told."""


class Probes:
    """The HTTP server of one daemon.

    Args:
        watch: What is shown.
        host: Address to listen on.
        port: 0 for a free one.
    """

    def __init__(self, watch: Telemetry, *, host: str, port: int) -> None:
        self._telemetry = watch
        self._host = host
        self._port = port
        application = web.Application()
        application.router.add_get("/livez", self._live)
        application.router.add_get("/readyz", self._ready)
        application.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(
            application, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT
        )

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._runner.addresses[0][1])

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The port is taken.
        """
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()

    async def close(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _live(self, _: web.Request) -> web.Response:
        lost = self._telemetry.health.device_lost
        return web.Response(text="device lost\n" if lost else "ok\n", status=503 if lost else 200)

    async def _ready(self, _: web.Request) -> web.Response:
        conditions = self._telemetry.health.conditions()
        ready = all(reason is None for reason in conditions.values())
        shown = {name: reason or "ok" for name, reason in conditions.items()}
        return web.json_response(shown, status=200 if ready else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        self._telemetry.metrics.readiness(self._telemetry.health.conditions())
        # The content type as prometheus-client has it: aiohttp takes no charset in `content_type`.
        return web.Response(
            body=generate_latest(self._telemetry.metrics.registry),
            headers={"Content-Type": CONTENT_TYPE_LATEST},
        )
