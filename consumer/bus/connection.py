"""The one connection of a process to NATS, made to outlive the server's restarts."""

import asyncio
import ssl
import time
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
PING_INTERVAL = 5  # seconds; a dead read loop is noticed after two unanswered pings
API_TIMEOUT = 5.0  # seconds that one call of the JetStream API may take
CLOSE_TIMEOUT = 2.0  # seconds for what is still to be written, and for the closing


class BusUnavailable(Unavailable):
    """NATS cannot be reached or refuses; the text is one clear line without credentials."""


class ConnectionClosed(BusUnavailable):
    """The client has closed the connection for good; the process has to end."""

    def __init__(self) -> None:
        super().__init__("NATS: the client has given up on the connection")


class FileUnusable(Exception):  # noqa: N818 - a state of the file
    """A file that a setting names cannot be used; the text names the setting and no secret."""


class BusMisconfigured(BusUnavailable):
    """A setting is wrong or a permission is missing for certain: waiting would not help."""


class Bus:
    """A connection and what can be seen of it.

    Args:
        client: Another client than the usual one, not connected yet.

    Attributes:
        client: The nats-py client.
        jetstream: Its JetStream context.
        closed: Set when the client has given up for good, which it does after a payload violation,
            an over-long subject or an expired token in spite of endless reconnects: the process
            has to end.
    """

    def __init__(self, client: RobustClient | None = None) -> None:
        self.client = client or RobustClient()
        self.jetstream: JetStreamContext = self.client.jetstream(timeout=API_TIMEOUT)
        self.closed = asyncio.Event()
        self.last_error = ""
        self._refused = False  # whether the server has ever refused the credentials
        self._up = asyncio.Event()  # set while the server can be reached, and when it is all over
        self._limits: set[asyncio.Timeout] = set()  # of the questions that are under way
        self._listeners: list[Callable[[], None]] = []

    @property
    def connection(self) -> int:
        """The number of the connection; it counts on with each reconnect."""
        return int(self.client.stats["reconnects"])

    @property
    def connected(self) -> bool:
        """Whether the server can be reached now."""
        return self.client.is_connected

    @property
    def clustered(self) -> bool:
        """Whether the server is one of a cluster."""
        return self.client.is_clustered

    async def wait_connected(self) -> None:
        """Wait until the server can be reached.

        Raises:
            ConnectionClosed: The process has to end.
        """
        if not self.client.is_connected and not self.client.is_closed:
            self._up.clear()  # nats-py calls back a little later
        await self._up.wait()
        if self.client.is_closed:
            raise ConnectionClosed

    @asynccontextmanager
    async def api_call(self, within: float) -> AsyncIterator[None]:
        """Limit a question to the server, and end it when its answer is lost with the connection.

        Raises:
            TimeoutError: No answer within so many seconds, or the connection is lost.
        """
        async with asyncio.timeout(within) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.remove(limit)

    async def request(self, subject: str, body: bytes, *, within: float) -> bytes:
        """Ask the server a question, and return its answer.

        Raises:
            TimeoutError: No answer within so many seconds, or the connection is lost.
            nats.errors.Error: Nothing subscribes to the subject, or the connection is closed.
        """
        async with self.api_call(within):
            # `question` has the limit: another one of the client costs a timer for each job.
            answer = await self.client.request(subject, body, timeout=None)  # type: ignore[arg-type]
        return bytes(answer.data)

    def on_reconnect(self, listener: Callable[[], None]) -> None:
        """Call a function each time the connection is there again."""
        self._listeners.append(listener)

    async def close(self) -> None:
        """Write what is left and close; never raises, never hangs."""
        # Not drain(): on a frozen server it goes on for 10 s after it has been cancelled.
        for step in (self._flush, self.client.close):
            # A task of its own: until Python 3.12, StreamWriter.wait_closed raises CancelledError
            # after another task that waited for it was cancelled.
            closing = asyncio.ensure_future(step())
            _, late = await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT)
            if late:
                closing.cancel()
                await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT)
            if late or closing.cancelled() or closing.exception() is not None:
                log.warning("bus_close_failed", step=step.__name__)
        await self._on_closed()  # nats-py does not say so when it was cut short

    async def _flush(self) -> None:
        if self.client.is_connected:
            await self.client.flush()

    async def _on_error(self, error: Exception) -> None:
        self.last_error = str(error) or type(error).__name__
        # Of one try in a hundred nothing is left but that the connection was reset.
        self._refused = self._refused or is_credentials_error(self.last_error)
        log.warning("bus_error", error=type(error).__name__, reason=self.last_error[:200])

    async def _on_disconnect(self) -> None:
        if not self.client.is_draining and not self.client.is_closed:
            log.warning("bus_disconnected")
        self._up.clear()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(0.0)

    async def _on_reconnect(self) -> None:
        log.info("bus_reconnected")
        self._up.set()
        for listener in self._listeners:
            listener()

    async def _on_closed(self) -> None:
        self.closed.set()
        self._up.set()

    async def open(self, settings: Settings, *, name: str, within: float) -> None:
        """Connect.

        Raises:
            BusMisconfigured: A file or an address cannot be used; nothing was connected to.
            BusUnavailable: Not within so many seconds.
        """
        try:
            options = _options(settings)
        except FileUnusable as error:
            raise BusMisconfigured(f"NATS: the credentials cannot be read: {error}") from None
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
            # Without a limit nats-py tries a failing TLS handshake, or no server at all, for ever.
            async with asyncio.timeout(within):
                await asyncio.wait({connecting})
            connecting.result()
        except Exception as error:  # noqa: BLE001 - nats-py raises many kinds here
            await cancel_and_wait(connecting)
            await self.close()
            raise self._refusal(error) from None
        finally:
            await cancel_and_wait(connecting)
        self._up.set()

    def _refusal(self, error: Exception) -> BusUnavailable:
        reason = self.last_error or str(error) or type(error).__name__
        if self._refused:
            return BusUnavailable("NATS: the credentials are refused")
        # Its own errors nats-py handles with another attempt, once it has begun to connect.
        kind = BusMisconfigured if isinstance(error, Error) else BusUnavailable
        return kind(f"NATS: cannot connect: {reason}")


async def connect(settings: Settings, *, name: str, within: float) -> Bus:
    """Connect to NATS with the settings' servers, credentials and certificates.

    Args:
        settings: NATS_* settings.
        name: Shown by the server's monitoring.
        within: Seconds to try.

    Raises:
        BusMisconfigured: A setting is wrong for certain; at once.
        BusUnavailable: Not within so many seconds.
    """
    deadline = time.monotonic() + within

    async def attempt() -> Bus:
        bus = Bus()
        await bus.open(settings, name=name, within=deadline - time.monotonic())
        return bus

    return await wait_until_available(attempt, deadline=deadline)


async def wait_until_available(attempt: Callable[[], Awaitable[T]], *, deadline: float) -> T:
    """Repeat an attempt while the bus is not available, until a deadline has passed.

    At a start NATS may accept connections before JetStream answers, and a machine under load
    answers late.

    Args:
        attempt: Called at least once.
        deadline: On the clock of `time.monotonic`; no attempt begins after it.

    Raises:
        BusMisconfigured: From the first attempt that raised it.
        BusUnavailable: From the last attempt.
    """
    while True:
        try:
            return await attempt()
        except BusMisconfigured:
            raise
        except BusUnavailable as error:
            if time.monotonic() + START_PAUSE >= deadline:
                raise
            log.warning("bus_not_available_yet", reason=str(error))
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
        # As a file: nats-py reads it again at each reconnect, and a JWT may have been renewed.
        options["user_credentials"] = str(settings.nats_creds)
    if settings.nats_nkey_seed is not None:
        # Not as a file: nats-py refuses one that ends with its line, as most do.
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
    """Name the setting whose file cannot be used.

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
