"""Blocking calls to the store that can be broken off, and the connections that make it possible.

urllib3's timeouts count from one received piece to the next: a server that sends a byte now and
then would hold its thread, and with it the end of the process, for as long as it likes. Closing the
connection from outside is the only way to end such a call.

This is the only module that changes what urllib3 does. It uses no private name of urllib3; what it
overrides is checked by tests/unit/test_library_internals.py.
"""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import certifi
from urllib3 import PoolManager, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from consumer.ports.store import StoreUnavailable

T = TypeVar("T")

PINNED_TIMEOUT = 5.0  # seconds to connect, and between two received pieces
_THREADS = 8  # also the most connections; more than the outputs of one request would gain nothing


class Calls:
    """A few threads for blocking calls, apart from those of the event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="artifacts")
        self._under_way: list[_Call] = []
        self._closed = False

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread; it is broken off when the awaiting task is cancelled.

        Raises:
            StoreUnavailable: `close` has been called.
        """
        if self._closed:
            raise StoreUnavailable("S3: the client is closed")
        call = _Call()
        self._under_way.append(call)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call.run, work)
        except asyncio.CancelledError:
            call.break_off()
            raise
        finally:
            self._under_way.remove(call)

    def close(self) -> None:
        """Break off what is under way, also what waits for a thread; the threads then end."""
        self._closed = True
        # Those that wait for a thread first: they would take the threads that become free.
        for call in reversed(self._under_way):
            call.break_off()
        # Not cancel_futures: those who wait would take it for a cancellation of their own.
        self._threads.shutdown(wait=False)


class _Call:
    """One piece of work in a thread, and the connection that it uses at the moment."""

    in_thread = threading.local()  # its attribute `call`: the one that the thread works on

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._broken_off = False

    def run(self, work: Callable[[], T]) -> T:
        """Do the work, in its thread."""
        _Call.in_thread.call = self
        try:
            return work()
        finally:
            _Call.in_thread.call = None
            self.uses(None)  # from here on the connection may belong to another call

    def uses(self, connection: socket.socket | None) -> None:
        """Remember what to close."""
        with self._lock:
            self._socket = connection
            if self._broken_off:
                self._shut()

    def break_off(self) -> None:
        """Make what it reads or writes now, and all that follows, fail."""
        with self._lock:
            self._broken_off = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the other side has closed it already
                # Not SSLSocket's method, which takes the TLS state away under the reading thread.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _PlainConnection(HTTPConnection):
    """A connection that its call knows of."""

    def connect(self) -> None:
        super().connect()
        self._note()

    def request(self, *args: Any, **kwargs: Any) -> None:
        self._note()  # one that was kept alive is not connected again
        super().request(*args, **kwargs)

    def _note(self) -> None:
        call: _Call | None = getattr(_Call.in_thread, "call", None)
        if call is not None:
            call.uses(self.sock)


class _TlsConnection(_PlainConnection, HTTPSConnection):
    """The same over TLS."""


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def pinned_pool(
    address: str, port: int, *, host: str, ca_certs: str | None = None
) -> HTTPSConnectionPool:
    """Connections to one address, which has to prove that it is a host; `Calls` can break them off.

    Args:
        address: IPv4 or IPv6.
        port: TCP.
        host: Its name, for TLS.
        ca_certs: PEM file of whoever signs it; None: those that this system trusts.
    """
    return _TlsPool(
        address,
        port,
        timeout=Timeout(connect=PINNED_TIMEOUT, read=PINNED_TIMEOUT),
        retries=False,
        server_hostname=host,
        assert_hostname=host,
        ca_certs=ca_certs or os.environ.get("SSL_CERT_FILE") or certifi.where(),
    )


def connection_pools(*, connect_timeout: float, read_timeout: float) -> PoolManager:
    """Connections that `Calls` can break off; timeouts in seconds.

    It neither retries nor follows redirects. With urllib3's defaults a refused connection takes
    6 s, a silent server half an hour, and the store's error code is lost.
    """
    pools = PoolManager(
        timeout=Timeout(connect=connect_timeout, read=read_timeout),
        maxsize=_THREADS,
        block=True,
        retries=False,
        ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),  # as the SDK does by itself
    )
    pools.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
    return pools
