"""Liveness, readiness and metrics over HTTP: /livez, /readyz and /metrics.

`/livez` returns 200 while the event loop runs and the device is not lost. `/readyz` returns each
readiness condition in JSON. `/metrics` is Prometheus text. `Telemetry` receives the reports of all
components and updates the health and the metrics.
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

LOG_INTERVAL = 10.0  # seconds between two log lines about the same failure of the store
MAX_LOGGED_REASONS = 32  # reasons that the rate limit remembers; a failing store has a few
SHUTDOWN_TIMEOUT = 1.0  # seconds for a scrape in progress when the daemon ends


@dataclass
class Health:
    """The state of the daemon on which its readiness depends.

    Attributes:
        bus_connected: Called at each probe; returns whether NATS is connected.
        durable_present: Called at each probe; returns whether the durable exists.
        model_loaded: Whether a job could run.
        store_reachable: Whether the store replied when it was last used.
        store_reason: Why the store is unreachable, for people.
        streams_writable: Whether JetStream stores published messages.
        streams_reason: Why JetStream refuses messages, for people.
        draining: Whether the daemon has stopped fetching requests.
        device_lost: Whether the device has failed; the process is about to exit.
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
        """Return each condition with None, or the reason why it is not met, without secrets."""
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
    """Limits the log lines about failures to one per reason in `LOG_INTERVAL`.

    A success does not reset the limit: a store can accept every GET and refuse every PUT.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, tuple[float, int]] = {}  # time of the next line, suppressed lines

    def suppressed(self, reason: str) -> int | None:
        """Return the number of lines suppressed since the last one; None: suppress this line."""
        now = time.monotonic()
        log_from, unlogged = self._reasons.get(reason, (now, 0))
        if now < log_from:
            self._reasons[reason] = (log_from, unlogged + 1)
            return None
        self._reasons.pop(reason, None)
        if len(self._reasons) >= MAX_LOGGED_REASONS:
            del self._reasons[next(iter(self._reasons))]  # the least recently logged reason
        self._reasons[reason] = (now + LOG_INTERVAL, 0)
        return unlogged


@dataclass
class Telemetry(Observer):
    """Updates the metrics and the health with the reports of the daemon's components."""

    metrics: Metrics
    health: Health = field(default_factory=Health)
    _store_changed: asyncio.Event = field(default_factory=asyncio.Event)
    _store_limit: _ReasonLimit = field(default_factory=_ReasonLimit)
    _recovery_logged: bool = False  # since the last log line about a failure

    async def store_changes(self, within: float) -> bool:
        """Wait until the store's reachability changes; return False after `within` seconds."""
        self._store_changed.clear()
        try:
            async with asyncio.timeout(within):
                await self._store_changed.wait()
        except TimeoutError:
            return False
        return True

    def job_started(self) -> None:
        """Report that a delivery is in flight."""
        self.metrics.job_started()

    def job_finished(self, report: JobReport) -> None:
        """Report that a delivery is settled, requeued or abandoned."""
        self.metrics.job_finished(report)

    def chain_broken(self, code: FailureCode) -> None:
        """Report that the next step of a chain could not be queued."""
        self.metrics.chain_broken(code)

    def call_refused(self, code: FailureCode) -> None:
        """Report that a request-reply call was refused."""
        self.metrics.call_refused(code)

    def device_stepped(self) -> None:
        """Report that the current run has made a step or generated text."""
        self.metrics.device_stepped()

    def device_busy(self, seconds: float) -> None:
        """Report that a run has ended, and the seconds in which the device was busy."""
        self.metrics.device_busy(seconds)

    def store_reachable(self, reachable: bool, reason: str = "") -> None:
        """Report whether the store is reachable."""
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
        unlogged = self._store_limit.suppressed(reason)
        if unlogged is not None:
            log.warning("store_unreachable", reason=reason, unlogged=unlogged)
            self._recovery_logged = False

    def bus_writable(self, writable: bool, reason: str = "") -> None:
        """Report that JetStream has stored a message, or refuses messages."""
        health, was_writable = self.health, self.health.streams_writable
        logged, reason = health.streams_reason, "" if writable else reason or "not writable"
        health.streams_writable, health.streams_reason = writable, reason
        if writable and not was_writable:
            log.info("streams_writable")
        elif not writable and reason != logged:
            log.warning("streams_not_writable", reason=reason)


class NullObserver(Observer):
    """Ignores all reports, for commands that use a component outside the daemon."""

    def job_started(self) -> None:
        """Ignore the report."""

    def job_finished(self, report: JobReport) -> None:
        """Ignore the report."""

    def chain_broken(self, code: FailureCode) -> None:
        """Ignore the report."""

    def call_refused(self, code: FailureCode) -> None:
        """Ignore the report."""

    def device_stepped(self) -> None:
        """Ignore the report."""

    def device_busy(self, seconds: float) -> None:
        """Ignore the report."""

    def store_reachable(self, reachable: bool, reason: str = "") -> None:
        """Ignore the report."""

    def bus_writable(self, writable: bool, reason: str = "") -> None:
        """Ignore the report."""


class Probes:
    """The HTTP server of one daemon.

    Args:
        telemetry: The metrics and the health that are served.
        host: Address to listen on.
        port: Port to listen on; 0 chooses a free one.
    """

    def __init__(self, telemetry: Telemetry, *, host: str, port: int) -> None:
        self._telemetry = telemetry
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
        """The port on which the server listens."""
        return int(self._runner.addresses[0][1])

    async def start(self) -> None:
        """Start to listen.

        Raises:
            OSError: The port is in use.
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
        # A header, because aiohttp accepts no charset in its argument `content_type`.
        return web.Response(
            body=generate_latest(self._telemetry.metrics.registry),
            headers={"Content-Type": CONTENT_TYPE_LATEST},
        )
