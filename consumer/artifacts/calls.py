"""Runs blocking HTTP calls in threads and aborts them, by shutting down their connections.

The read timeout of urllib3 restarts with each received piece. A server that sends a byte now and
then would block its thread, and thus the exit of the process, without a limit. Only shutting down
the connection from another thread ends such a call.

Only this module changes the behaviour of urllib3. It uses no private name of urllib3;
tests/unit/test_library_internals.py checks what it overrides.
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
_THREADS = 8  # and limit of connections; more than the outputs of one request have no benefit


class Calls:
    """A thread pool for blocking calls, separate from the default pool of the event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="artifacts")
        self._in_progress: list[_Call] = []
        self._closed = False

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread; abort it when the awaiting task is cancelled.

        Raises:
            StoreUnavailable: `close` has been called.
        """
        if self._closed:
            raise StoreUnavailable("S3: the client is closed")
        call = _Call()
        self._in_progress.append(call)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call.run, work)
        except asyncio.CancelledError:
            call.abort()
            raise
        finally:
            self._in_progress.remove(call)

    def close(self) -> None:
        """Abort all calls, including those that wait for a thread; then the threads end."""
        self._closed = True
        # The calls that wait for a thread first, because they would start in the freed threads.
        for call in reversed(self._in_progress):
            call.abort()
        # Not cancel_futures, which would look like a cancellation of the awaiting task.
        self._threads.shutdown(wait=False)


class _Call:
    """One call in a thread, with its current connection."""

    in_thread = threading.local()  # attribute `call`: the current call of the thread

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._aborted = False

    def run(self, work: Callable[[], T]) -> T:
        """Do the work; called in the thread."""
        _Call.in_thread.call = self
        try:
            return work()
        finally:
            _Call.in_thread.call = None
            self.set_connection(None)  # from now on another call may use the connection

    def set_connection(self, connection: socket.socket | None) -> None:
        """Set the connection that `abort` shuts down."""
        with self._lock:
            self._socket = connection
            if self._aborted:
                self._shut_down()

    def abort(self) -> None:
        """Make the current and all later reads and writes of the call fail."""
        with self._lock:
            self._aborted = True
            self._shut_down()

    def _shut_down(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the peer has closed it already
                # Not the method of SSLSocket, which removes the TLS state during the read.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _PlainConnection(HTTPConnection):
    """A connection that registers itself with the current call."""

    def connect(self) -> None:
        super().connect()
        self._register()

    def request(self, *args: Any, **kwargs: Any) -> None:
        self._register()  # a reused connection does not call `connect`
        super().request(*args, **kwargs)

    def _register(self) -> None:
        call: _Call | None = getattr(_Call.in_thread, "call", None)
        if call is not None:
            call.set_connection(self.sock)


class _TlsConnection(_PlainConnection, HTTPSConnection):
    """A TLS connection that registers itself with the current call."""


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def pinned_pool(
    address: str, port: int, *, host: str, ca_certs: str | None = None
) -> HTTPSConnectionPool:
    """Create a pool of abortable TLS connections to one address.

    Args:
        address: IPv4 or IPv6 address.
        port: TCP port.
        host: Name that the certificate of the server must have.
        ca_certs: PEM file of the certificate authority; None uses the system's authorities.
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
    """Create a pool manager with abortable connections; timeouts in seconds.

    The pools neither retry nor follow redirects. With the defaults of urllib3, a refused connection
    takes 6 s, an unresponsive server half an hour, and the error code of the store is lost.
    """
    pools = PoolManager(
        timeout=Timeout(connect=connect_timeout, read=read_timeout),
        maxsize=_THREADS,
        block=True,
        retries=False,
        ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),  # as in the SDK
    )
    pools.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
    return pools
