"""The connection of a process to NATS, which survives restarts of the server."""

import asyncio
import os
import re
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import structlog
from nats.errors import Error
from nats.js import JetStreamContext

from consumer.background_tasks import cancel_and_wait
from consumer.bus.nats_internals import (
    RECONNECT_WAIT,
    CredentialsError,
    RobustClient,
    require_usable_credentials,
    require_usable_seed,
)
from consumer.bus.server_texts import is_credentials_error
from consumer.ports.unavailable import Unavailable
from consumer.settings import Settings

log = structlog.get_logger()

T = TypeVar("T")

START_PAUSE = 0.5  # seconds between two attempts while the bus is not available yet
# Strict mode, which refuses malformed API requests, is the default since this version. The streams
# are protected by it (docs/reference/security.md), and no older version is tested.
SERVER_VERSION = (2, 12)
PING_INTERVAL = 5  # seconds; two unanswered pings reveal a dead read loop
API_TIMEOUT = 5.0  # seconds for one call of the JetStream API
CLOSE_TIMEOUT = 2.0  # seconds for flushing buffered data, and for closing


class BusUnavailable(Unavailable):
    """NATS cannot be reached or refuses a call; the text is one line without credentials."""


class ConnectionClosed(BusUnavailable):
    """The client has closed the connection permanently; the process must end."""

    def __init__(self) -> None:
        super().__init__("NATS: the client has closed the connection permanently")


class FileUnusable(Exception):  # noqa: N818 - a state of the file
    """A file from a setting cannot be used; the text names the setting and contains no secret."""


class BusMisconfigured(BusUnavailable):
    """A setting is wrong or a permission is missing: a retry would not help."""


class ServerTooOld(BusMisconfigured):
    """The NATS server is older than `SERVER_VERSION`."""


class Bus:
    """A connection with its state.

    Args:
        client: A client that is not connected yet; None creates a `RobustClient`.

    Attributes:
        client: The nats-py client.
        jetstream: Its JetStream context.
        closed: Set when the client has closed the connection permanently; the process must end.
            nats-py does so after a payload violation, an over-long subject or an expired token,
            in spite of unlimited reconnects.
    """

    def __init__(self, client: RobustClient | None = None) -> None:
        self.client = client or RobustClient()
        self.jetstream: JetStreamContext = self.client.jetstream(timeout=API_TIMEOUT)
        self.closed = asyncio.Event()
        self.last_error = ""
        self.server = ""  # addresses of the configured servers, without credentials
        # Errors since the connection was lost, and how many of them are in the log.
        self._outage_reasons: Counter[str] = Counter()
        self._refused = False  # whether the server has ever refused the credentials
        self._up = asyncio.Event()  # set while connected, and after the permanent close
        self._limits: set[asyncio.Timeout] = set()  # timeouts of the API calls in progress
        self._listeners: list[Callable[[], None]] = []

    @property
    def connection(self) -> int:
        """Number of the connection, incremented by each reconnect."""
        return int(self.client.stats["reconnects"])

    @property
    def connected(self) -> bool:
        """Whether the client is connected to the server."""
        return self.client.is_connected

    @property
    def clustered(self) -> bool:
        """Whether the server belongs to a cluster."""
        return self.client.is_clustered

    @property
    def server_version(self) -> str:
        """The version of the connected server, such as `2.12.1`, or an empty text."""
        return self.client.server_version

    async def wait_connected(self) -> None:
        """Wait until the client is connected to the server.

        Raises:
            ConnectionClosed: The process must end.
        """
        if not self.client.is_connected and not self.client.is_closed:
            self._up.clear()  # nats-py calls `_on_disconnect` with a delay
        await self._up.wait()
        if self.client.is_closed:
            raise ConnectionClosed

    @asynccontextmanager
    async def api_call(self, within: float) -> AsyncIterator[None]:
        """Limit the time of an API call in the block; end the call when the connection is lost.

        Args:
            within: Seconds.

        Raises:
            TimeoutError: No reply in time, or the connection was lost, and the reply with it.
        """
        async with asyncio.timeout(within) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.remove(limit)

    async def request(self, subject: str, body: bytes, *, within: float) -> bytes:
        """Send a request and return the body of the reply.

        Raises:
            TimeoutError: No reply within so many seconds, or the connection was lost.
            nats.errors.Error: Nothing subscribes to the subject, or the connection is closed.
        """
        async with self.api_call(within):
            # `api_call` limits the time; a timeout of the client would cost one more timer per job.
            reply = await self.client.request(subject, body, timeout=None)  # type: ignore[arg-type]
        return bytes(reply.data)

    def on_reconnect(self, listener: Callable[[], None]) -> None:
        """Register a function that is called after each reconnect."""
        self._listeners.append(listener)

    async def close(self) -> None:
        """Flush and close the connection. Never raises, and takes a limited time."""
        # Not drain(): with a frozen server it continues for 10 s after its cancellation.
        for step in (self._flush, self.client.close):
            # In a separate task: until Python 3.12, StreamWriter.wait_closed raises CancelledError
            # after another task that waited for it was cancelled.
            closing = asyncio.ensure_future(step())
            _, late = await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT)
            if late:
                closing.cancel()
                await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT)
            if late or closing.cancelled() or closing.exception() is not None:
                log.warning("bus_close_failed", step=step.__name__)
        await self._on_closed()  # nats-py does not call it if `close` was cancelled

    async def _flush(self) -> None:
        if self.client.is_connected:
            await self.client.flush()

    async def _on_error(self, error: Exception) -> None:
        self.last_error = _reason(error)
        # In about one of a hundred attempts, the only later error is a connection reset.
        self._refused = self._refused or is_credentials_error(self.last_error)
        if not self.client.is_connected:
            # The client retries four times a second. Each reason is logged once per outage.
            self._outage_reasons[self.last_error] += 1
            if self._outage_reasons[self.last_error] > 1:
                return
        log.warning(
            "bus_error",
            error=type(error).__name__,
            reason=self.last_error[:200],
            servers=self.server,
        )

    async def _on_disconnect(self) -> None:
        if not self.client.is_draining and not self.client.is_closed:
            log.warning("bus_disconnected")
        self._up.clear()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(0.0)

    async def _on_reconnect(self) -> None:
        log.info("bus_reconnected", errors=self._outage_reasons.total())
        self._outage_reasons.clear()
        self._up.set()
        for listener in self._listeners:
            listener()

    async def _on_closed(self) -> None:
        self.closed.set()
        self._up.set()

    async def open(self, settings: Settings, *, name: str, within: float) -> None:
        """Connect.

        Raises:
            BusMisconfigured: A file or an address cannot be used; no connection was made.
            BusUnavailable: Not connected within so many seconds.
        """
        try:
            options = _options(settings)
        except FileUnusable as error:
            raise BusMisconfigured(f"NATS: the credentials cannot be read: {error}") from None
        self.server = ",".join(options["servers"])
        connecting = asyncio.ensure_future(
            self.client.connect(
                name=name,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_WAIT,  # type: ignore[arg-type] # takes fractions
                ping_interval=PING_INTERVAL,
                max_outstanding_pings=2,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnect,
                reconnected_cb=self._on_reconnect,
                closed_cb=self._on_closed,
                **options,
            )
        )
        try:
            # nats-py retries a failed TLS handshake or a missing server without a limit.
            async with asyncio.timeout(within):
                await asyncio.wait({connecting})
            connecting.result()
        except Exception as error:  # noqa: BLE001 - nats-py raises many kinds here
            await cancel_and_wait(connecting)
            await self.close()
            if self._outage_reasons.total() > 1:
                log.warning("bus_not_connected", attempts=self._outage_reasons.total())
            raise self._refusal(error) from None
        finally:
            await cancel_and_wait(connecting)
        self._outage_reasons.clear()
        self._up.set()

    def _refusal(self, error: Exception) -> BusUnavailable:
        reason = self.last_error or _reason(error)
        if self._refused:
            return BusUnavailable(f"NATS: the credentials are refused by {self.server}")
        # nats-py retries after its own errors once it has begun to connect, so an error of nats-py
        # that arrives here is about a setting.
        kind = BusMisconfigured if isinstance(error, Error) else BusUnavailable
        return kind(f"NATS: cannot connect to {self.server}: {reason}")


def _reason(error: Exception) -> str:
    """Return the text of an error, without its number and address if it is one of the system."""
    if isinstance(error, OSError) and error.errno is not None:
        # asyncio replaces the text by "Connect call failed" and the resolved address.
        known = error.errno > 0 and "Connect call failed" in str(error)
        return os.strerror(error.errno) if known else error.strerror or str(error)
    return str(error) or type(error).__name__


def require_server_version(bus: Bus) -> None:
    """Refuse a server that is older than `SERVER_VERSION`.

    Previews and release candidates of that version are accepted. So is a version of another form:
    someone has built the server.

    Raises:
        ServerTooOld: Names the version.
    """
    found = re.match(r"v?([0-9]+)\.([0-9]+)", bus.server_version)
    if found and (int(found[1]), int(found[2])) < SERVER_VERSION:
        needed = ".".join(map(str, SERVER_VERSION))
        raise ServerTooOld(
            f"NATS: {bus.server} has version {bus.server_version}; {needed} or newer is needed"
        )


async def connect(settings: Settings, *, name: str, within: float) -> Bus:
    """Connect to NATS with the settings' servers, credentials and certificates.

    Args:
        settings: NATS_* settings.
        name: Name of the connection in the server's monitoring.
        within: Seconds for all attempts.

    Raises:
        BusMisconfigured: A setting is wrong; raised without further attempts.
        BusUnavailable: Not connected within so many seconds.
    """
    deadline = time.monotonic() + within

    async def attempt() -> Bus:
        bus = Bus()
        await bus.open(settings, name=name, within=deadline - time.monotonic())
        return bus

    return await wait_until_available(attempt, deadline=deadline)


async def wait_until_available(attempt: Callable[[], Awaitable[T]], *, deadline: float) -> T:
    """Repeat an attempt while the bus is not available, until a deadline.

    While NATS starts, it may accept connections before JetStream replies, and a loaded machine
    replies late.

    Args:
        attempt: Called at least once.
        deadline: Time on the clock of `time.monotonic`; no attempt begins after it.

    Raises:
        BusMisconfigured: An attempt raised it; no further attempt is made.
        BusUnavailable: The last attempt raised it. Each reason is logged once in succession.
    """
    reason = ""  # of the last logged line
    while True:
        try:
            return await attempt()
        except BusMisconfigured:
            raise
        except BusUnavailable as error:
            if time.monotonic() + START_PAUSE >= deadline:
                raise
            if str(error) != reason:
                reason = str(error)
                log.warning("bus_not_available_yet", reason=reason)
        await asyncio.sleep(START_PAUSE)


def _options(settings: Settings) -> dict[str, Any]:
    servers = settings.nats_servers
    options: dict[str, Any] = {
        "servers": list(servers.urls),
        "inbox_prefix": settings.nats_inbox_prefix,
        **servers.credentials,
    }
    if settings.nats_creds is not None:
        with _reading("NATS_CREDS"):
            require_usable_credentials(settings.nats_creds)
        # Pass the path: nats-py reads the file at each reconnect, and the JWT may be renewed.
        options["user_credentials"] = str(settings.nats_creds)
    if settings.nats_nkey_seed is not None:
        # Pass the seed: nats-py refuses a seed file that ends with a line break, as most do.
        with _reading("NATS_NKEY_SEED"):
            options["nkeys_seed_str"] = require_usable_seed(settings.nats_nkey_seed)
    if settings.nats_ca is not None or settings.nats_cert is not None:
        with _reading("NATS_CA"):
            context = ssl.create_default_context(cafile=settings.nats_ca)
        if settings.nats_cert is not None and settings.nats_key is not None:
            with _reading("NATS_CERT, NATS_KEY"):
                context.load_cert_chain(settings.nats_cert, settings.nats_key)
        options["tls"] = context
    return options


@contextmanager
def _reading(setting: str) -> Iterator[None]:
    """Convert errors of the block to `FileUnusable` with the name of the setting.

    Raises:
        FileUnusable: The block has raised.
    """
    try:
        yield
    except ssl.SSLError as error:
        reason = (error.reason or "damaged").lower().replace("_", " ")
        raise FileUnusable(f"{setting}: not a PEM file that can be used ({reason})") from None
    except (OSError, CredentialsError) as error:
        raise FileUnusable(f"{setting}: {error}") from None
