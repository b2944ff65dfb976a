"""The gateway process: sockets, TLS, signals and graceful shutdown."""

import asyncio
import errno
import os
import socket
import ssl
import time
from contextlib import ExitStack
from types import FrameType
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from consumer.background_tasks import cancel_and_wait
from consumer.bus.connection import ConnectionClosed
from consumer.gateway.app import create_app
from consumer.gateway.context import Gateway
from consumer.gateway.file_state import file_state
from consumer.gateway.in_flight import END_WITHIN, InFlight
from consumer.gateway.open_access import is_loopback
from consumer.gateway.sse import SEND_WITHIN
from consumer.ports.unavailable import Unavailable
from consumer.settings import Settings, SettingsError

log = structlog.get_logger()

EXIT_UNAVAILABLE = 69  # a service cannot be reached or used, or the address is in use
HEADERS_WITHIN = 15.0  # seconds for the head of a request; then the connection is closed
KEEP_ALIVE = 75  # seconds that an idle connection stays open; proxies close after 60
BACKLOG = 512  # connections that wait to be accepted
CERTIFICATE_CHECK_INTERVAL = 10.0  # seconds between two checks for a renewed certificate

_ADDRESS_MISSING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def serve(settings: Settings) -> int:
    """Run a gateway until SIGTERM or SIGINT; return the exit code.

    The first signal drains the gateway; the second ends it at once.

    Raises:
        SettingsError: A setting is invalid, or its file cannot be used.
    """
    require_keys_if_reachable(settings)
    try:
        return asyncio.run(_serve(settings))
    except Unavailable as error:
        log.error("service_unavailable", reason=str(error))  # noqa: TRY400 - one line
    return EXIT_UNAVAILABLE


def require_keys_if_reachable(settings: Settings) -> None:
    """Refuse settings without keys with which other machines or all web pages reach the gateway.

    Raises:
        SettingsError: GATEWAY_KEYS is unset, and GATEWAY_HOST is not a loopback address or
            GATEWAY_CORS_ORIGINS is `*`.
    """
    if settings.gateway_keys is None and not is_loopback(settings.gateway_host):
        raise SettingsError(
            "GATEWAY_HOST: without GATEWAY_KEYS it must be a loopback address such as 127.0.0.1"
        )
    if settings.gateway_keys is None and "*" in settings.gateway_cors_origins:
        raise SettingsError("GATEWAY_CORS_ORIGINS: * needs GATEWAY_KEYS: name the pages instead")


async def _serve(settings: Settings) -> int:
    with ExitStack() as opened:
        # Before NATS, so that an unusable address or certificate ends the start at once.
        sockets = _listen(settings)
        for listener in sockets:
            opened.callback(listener.close)
        app = create_app(settings)
        certificate = _Certificate(settings)
        async with app.router.lifespan_context(app):
            gateway: Gateway = app.state.gateway
            server = _make_server(app, settings, certificate)
            _log_start(settings, gateway, sockets)
            watching = asyncio.create_task(_end_with_bus(server, gateway), name="watch-bus")
            try:
                await server.serve(sockets)
                if server.force_exit:
                    os._exit(server.exit_code)  # the remaining shutdown would wait for NATS
            finally:
                await cancel_and_wait(watching)
        log.info("gateway_stopped")
        return server.exit_code


def _make_server(app: FastAPI, settings: Settings, certificate: "_Certificate") -> "_Server":
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",  # uvicorn would log exceptions of the lifespan as tracebacks
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=round(END_WITHIN) + 1,
        ssl_context_factory=certificate.context if certificate.used else None,
    )
    return _Server(config, app.state.in_flight, settings.gateway_drain_grace, certificate)


class AddressUnusable(Unavailable):
    """The gateway cannot listen on its address."""


class _Server(uvicorn.Server):
    """A uvicorn server that drains before it closes its sockets.

    A draining server still responds. Probes report that it is not ready, and new requests get 503
    instead of a refused connection, so clients send them to another gateway.

    Attributes:
        exit_code: The exit code of the process.
    """

    def __init__(
        self, config: uvicorn.Config, in_flight: InFlight, grace: float, certificate: "_Certificate"
    ) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._in_flight = in_flight
        self._grace = grace
        self._certificate = certificate
        self._signals = 0
        self._drain_until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
        """Count a signal; `on_tick` handles it."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Handle signals and reload the certificate, ten times a second; return whether to stop."""
        if self._signals and not self._drain_until:
            log.info("gateway_draining", requests=self._in_flight.requests)
            self._drain_until = time.monotonic() + self._grace
            self._in_flight.drain()
        if self._signals > 1:
            log.warning("gateway_stopped_before_drained", requests=self._in_flight.requests)
            self._abort()
            return True
        if self._drain_until and self._is_drained():
            self._in_flight.end()
            return True
        if counter % round(CERTIFICATE_CHECK_INTERVAL * 10) == 0:
            self._certificate.reload()
        return await super().on_tick(counter)

    def stop(self, exit_code: int) -> None:
        """End all requests and stop, with an exit code."""
        self.exit_code = exit_code
        self._in_flight.end()
        self.should_exit = True

    def _is_drained(self) -> bool:
        return not self._in_flight.requests or time.monotonic() > self._drain_until

    def _abort(self) -> None:
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _Protocol(H11Protocol):
    """uvicorn's HTTP protocol, with timeouts for clients that send no request or read no response.

    uvicorn closes an idle connection, but the close waits until the client has read the unsent
    bytes.
    """

    _head: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None
    _unsent = 0  # unsent bytes at the last check; 0 if the client was reading

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timers of a new connection."""
        super().connection_made(transport)
        self._await_head()
        self._reader = self.loop.call_later(SEND_WITHIN, self._check_reader)

    def data_received(self, data: bytes) -> None:
        """Process received bytes; stop the timer if the head of a request is complete."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        else:
            self._stop_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers of the connection."""
        self._stop_head_timer()
        if self._reader is not None:
            self._reader.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        """Record that the client has read most of the unsent bytes."""
        self._unsent = 0
        super().resume_writing()

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(HEADERS_WITHIN, self._close)

    def _stop_head_timer(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _check_reader(self) -> None:
        """Abort the connection if its client has read nothing since the last check."""
        unsent = 0
        # In these states nothing is added to the buffer, so it shrinks when the client reads.
        if self.flow.write_paused or self.transport.is_closing():
            unsent = self.transport.get_write_buffer_size()
        if 0 < self._unsent <= unsent:
            log.info("http_slow_reader", unsent=unsent)
            self.transport.abort()
            return
        self._unsent = unsent
        self._reader = self.loop.call_later(SEND_WITHIN, self._check_reader)


class _Certificate:
    """The TLS certificate, which is read again when its files change.

    Args:
        settings: GATEWAY_TLS_CERT and GATEWAY_TLS_KEY.

    Raises:
        SettingsError: The files cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._cert = settings.gateway_tls_cert
        self._key = settings.gateway_tls_key
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._loaded: tuple[tuple[int, ...] | None, ...] = ()
        self._logged = ""  # the last logged reason; a repeated reason is not logged again
        self._load()

    @property
    def used(self) -> bool:
        """Whether the gateway uses TLS."""
        return self._cert is not None

    def context(self, *_: Any) -> ssl.SSLContext:
        """Return the TLS context of all connections."""
        return self._context

    def reload(self) -> None:
        """Read the files again if they have changed; new connections get the new certificate.

        If the new files cannot be used, the old certificate remains and the next call retries.
        """
        try:
            self._load()
        except SettingsError as error:
            if str(error) != self._logged:
                log.error("certificate_unusable", reason=str(error))  # noqa: TRY400 - one line
            self._logged = str(error)
        else:
            self._logged = ""

    def _load(self) -> None:
        """Read the files if they have changed.

        Raises:
            SettingsError: The files cannot be used.
        """
        if self._cert is None or self._key is None:
            return
        found = (file_state(self._cert), file_state(self._key))
        if found == self._loaded:
            return
        try:
            # First into another context, because OpenSSL sets the certificate before it checks
            # the key.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key)
            self._context.load_cert_chain(self._cert, self._key)
        except ssl.SSLError as error:
            reason = f"the certificate and its key cannot be used: {error.reason or 'damaged'}"
            raise SettingsError(f"GATEWAY_TLS_CERT: {reason}") from None
        except OSError as error:
            reason = f"{error.filename or self._cert}: {error.strerror}"
            raise SettingsError(f"GATEWAY_TLS_CERT: {reason}") from None
        self._loaded = found


def _listen(settings: Settings) -> list[socket.socket]:
    """Open a socket for each address of GATEWAY_HOST.

    Raises:
        AddressUnusable: An address is in use, or does not belong to this machine.
    """
    host, port = settings.gateway_host, settings.gateway_port
    with ExitStack() as opened:
        sockets = []
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in dict.fromkeys(found):
                try:
                    listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
                except OSError as error:
                    # `localhost` resolves to an IPv6 address even if the machine has no IPv6.
                    if error.errno not in _ADDRESS_MISSING or address == found[-1][4]:
                        raise
                    continue
                opened.callback(listener.close)
                # Connections inherit TCP_NODELAY. asyncio sets it only if the socket has its
                # protocol number. Without it, a response body waits 40 ms for the delayed ACK.
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sockets.append(listener)
        except OSError as error:
            # create_server repeats the address in the text of its error.
            reason = (error.strerror or str(error)).partition(" (while")[0]
            raise AddressUnusable(f"{host}:{port}: {reason}") from None
        opened.pop_all()
    return sockets


def _log_start(settings: Settings, gateway: Gateway, sockets: list[socket.socket]) -> None:
    scheme = "http" if settings.gateway_tls_cert is None else "https"
    host = f"[{settings.gateway_host}]" if ":" in settings.gateway_host else settings.gateway_host
    port = sockets[0].getsockname()[1]
    log.info("gateway_ready", url=f"{scheme}://{host}:{port}")
    if gateway.keys.open:
        log.warning(
            "gateway_without_keys",
            reason="GATEWAY_KEYS is not set: callers need no key; loopback only",
        )


async def _end_with_bus(server: _Server, gateway: Gateway) -> None:
    """End the gateway when its connection to NATS is closed."""
    await gateway.bus.closed.wait()
    log.error("service_unavailable", reason=str(ConnectionClosed()))
    server.stop(EXIT_UNAVAILABLE)
