"""The one connection of a process to NATS, made to outlive the server's restarts."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from nats.aio.client import DEFAULT_FLUSH_TIMEOUT, Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from consumer.ports import Unavailable
from consumer.settings import Settings

log = structlog.get_logger()

RECONNECT_WAIT = 0.25  # seconds between two tries
PING_INTERVAL = 5  # seconds; a dead read loop is noticed after two unanswered pings
API_TIMEOUT = 5.0  # seconds that one call of the JetStream API may take
GIVEN_UP = "NATS: the client has given up on the connection"
CLOSE_TIMEOUT = 2.0  # seconds for what is still to be written, and for the closing


class BusUnavailable(Unavailable):
    """NATS cannot be reached or refuses; the text is one clear line without credentials."""


class _Client(Client):
    """nats-py with three faults mended.

    What it cannot decode ends its read loop, while it still takes itself for connected: one such
    request would come again for ever and stop the queue. So does the answer to a `flush` that was
    cancelled. And its `flush` does not wait for all.
    """

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (IndexError, ValueError):  # a UnicodeDecodeError is a ValueError
            log.warning("unreadable_headers")
            return None

    def _build_message(
        self,
        sid: int,
        subject: bytes,
        reply: bytes,
        data: bytes,
        headers: dict[str, str] | None,
    ) -> Msg:
        # A subject that is no UTF-8 names no request id; the request is refused for it.
        readable = subject.decode(errors="replace").encode()
        message: Msg = super()._build_message(sid, readable, reply, data, headers)
        return message

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()  # nobody waits for it
        await super()._process_pong()

    async def flush(self, timeout: int = DEFAULT_FLUSH_TIMEOUT) -> None:  # noqa: ASYNC109 - nats-py
        """Two round trips: nats-py writes the first PING ahead of what is still to be written.

        An UNSUB, for one: what the server sends between that PING and the UNSUB would be dropped
        here as not subscribed to, and a delivery would come again after `ack_wait`.
        """
        await super().flush(timeout)
        await super().flush(timeout)


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

    def __init__(self, client: Client | None = None) -> None:
        self.client = client or _Client()
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

    async def reachable(self) -> None:
        """Wait until the server can be reached.

        Raises:
            BusUnavailable: The client has given up; the process has to end.
        """
        if not self.client.is_connected and not self.client.is_closed:
            self._up.clear()  # nats-py calls back a little later
        await self._up.wait()
        if self.client.is_closed:
            raise BusUnavailable(GIVEN_UP)

    @asynccontextmanager
    async def question(self, within: float) -> AsyncIterator[None]:
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

    def on_reconnect(self, listener: Callable[[], None]) -> None:
        """Call a function each time the connection is there again."""
        self._listeners.append(listener)

    async def close(self) -> None:
        """Write what is left and close; never raises, never hangs."""
        # Not drain(): on a frozen server it goes on for 10 s after it has been cancelled.
        for step in (self._flush, self.client.close):
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await step()
            except Exception as error:  # noqa: BLE001 - the process ends either way
                log.warning("bus_close_failed", error=type(error).__name__)
        await self._on_closed()  # nats-py does not say so when it was cut short

    async def _flush(self) -> None:
        if self.client.is_connected:
            await self.client.flush()

    async def _on_error(self, error: Exception) -> None:
        self.last_error = str(error) or type(error).__name__
        # Of one try in a hundred nothing is left but that the connection was reset.
        self._refused = self._refused or "authorization" in self.last_error.lower()
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
            BusUnavailable: Not within so many seconds.
        """
        try:
            options = _options(settings)
        except OSError as error:  # ssl.SSLError is one
            raise BusUnavailable(f"NATS: the credentials cannot be read: {error}") from None
        try:
            # Without the limit a failing TLS handshake, or no server at all, is tried for ever.
            async with asyncio.timeout(within):
                await self.client.connect(
                    servers=settings.nats_url.split(","),
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
        except Exception as error:  # noqa: BLE001 - nats-py raises many kinds here
            await self.close()
            reason = self.last_error or str(error) or type(error).__name__
            if self._refused:
                raise BusUnavailable("NATS: the credentials are refused") from None
            raise BusUnavailable(f"NATS: cannot connect: {reason}") from None
        self._up.set()


async def connect(settings: Settings, *, name: str, within: float) -> Bus:
    """Connect to NATS with the settings' servers, credentials and certificates.

    Args:
        settings: NATS_* settings.
        name: Shown by the server's monitoring.
        within: Seconds to try.

    Raises:
        BusUnavailable: Not within so many seconds.
    """
    bus = Bus()
    await bus.open(settings, name=name, within=within)
    return bus


def _options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {"inbox_prefix": settings.nats_inbox_prefix}
    for path in (settings.nats_creds, settings.nats_nkey_seed):
        if path is not None:
            path.open("rb").close()  # nats-py opens it when the server asks, and tries for ever
    if settings.nats_creds is not None:
        options["user_credentials"] = str(settings.nats_creds)
    if settings.nats_nkey_seed is not None:
        # Not as a file: nats-py refuses one that ends with its line, as most do.
        options["nkeys_seed_str"] = settings.nats_nkey_seed.read_text().strip()
    if settings.nats_ca is not None or settings.nats_cert is not None:
        context = ssl.create_default_context(cafile=settings.nats_ca)
        if settings.nats_cert is not None and settings.nats_key is not None:
            context.load_cert_chain(settings.nats_cert, settings.nats_key)
        options["tls"] = context
    return options
