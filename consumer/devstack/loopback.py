"""Ports and plain HTTP probes on 127.0.0.1, for the children of the development stack."""

import contextlib
import errno
import http.client
import os
import secrets
import socket
import sys
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from consumer.devstack.errors import DevStackError, PortTakenError

HOST = "127.0.0.1"

_LOWEST_PORT = 10_000
_SMALLEST_RANGE = 2_000  # ports
_DEFAULT_FIRST_EPHEMERAL_PORT = 32_768  # Linux; macOS and IANA begin higher, at 49152
_ATTEMPTS = 1_000  # random ports to test
_RELEASE_WAIT = 2.0  # seconds; a killed server of 150 MB releases its ports after some 10 ms
_POLL = 0.02  # seconds


class FreePorts:
    """Chooses free TCP ports, which stay bound until all ports are chosen.

    Use as a context manager; all ports chosen within it differ. The ports are below the ephemeral
    range, for two reasons. An outgoing connection may use an ephemeral port while its server
    restarts. A client that reconnects to an ephemeral port on loopback can get the same port as its
    source, connect to itself, and block the server.
    """

    def __init__(self) -> None:
        self._bound = contextlib.ExitStack()
        self._end = _first_ephemeral_port()
        if self._end - _LOWEST_PORT < _SMALLEST_RANGE:  # nearly all ports are ephemeral here
            self._end = 65_536

    def __enter__(self) -> Self:
        """Start to choose."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release all ports."""
        self._bound.close()

    def take(self) -> int:
        """Choose one port.

        Raises:
            DevStackError: no free port was found.
        """
        return self.take_pair(0)[0]

    def take_pair(self, distance: int) -> tuple[int, int]:
        """Choose two ports of which the second is `distance` above the first.

        Raises:
            DevStackError: no such pair was found.
        """
        for _ in range(_ATTEMPTS):
            first = _LOWEST_PORT + secrets.randbelow(self._end - distance - _LOWEST_PORT)
            pair = (first, first + distance)
            with contextlib.ExitStack() as bound:
                if all(_bind(port, bound) for port in sorted(set(pair))):
                    self._bound.push(bound.pop_all())
                    return pair
        raise DevStackError(f"no free port was found between {_LOWEST_PORT} and {self._end}")


def free_ports(count: int) -> list[int]:
    """Return `count` different free ports; see `FreePorts`.

    Raises:
        DevStackError: there are not so many.
    """
    with FreePorts() as free:
        return [free.take() for _ in range(count)]


def reserve(ports: Iterable[int], owner: object) -> None:
    """Prevent other processes from choosing `ports` while `owner` exists; Linux only.

    A child does not always listen on its ports: a daemon first imports its libraries for seconds,
    and a server may be down for a time. Parallel test runs, which choose ports all the time, could
    choose such a port. A socket that is bound and does not listen prevents this. Servers that set
    SO_REUSEADDR, as all servers of the stack do, can still listen on the port; on other systems
    they could not. A port in use is skipped: the start of the child reports it.
    """
    if sys.platform != "linux":
        return
    for port in ports:
        with socket.socket() as keeper:
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                keeper.bind((HOST, port))
            except OSError as error:
                if error.errno not in {errno.EADDRINUSE, errno.EACCES}:
                    raise
                continue
            weakref.finalize(owner, os.close, keeper.detach())


def require_free(port: int, purpose: str) -> None:
    """Wait until `port` is free; a server that was killed needs a moment to release it.

    Raises:
        PortTakenError: another program uses the port; the message has the port and its `purpose`.
    """
    deadline = time.monotonic() + _RELEASE_WAIT
    while not _can_listen(port):
        if time.monotonic() > deadline:
            raise PortTakenError(
                f"port {port} ({purpose}) is taken by another program: "
                "stop that program or use another directory"
            )
        time.sleep(_POLL)


def http_status(port: int, path: str, timeout: float = 1.0) -> int | None:
    """Return the status of `GET path` on 127.0.0.1, or None after `timeout` seconds or an error.

    Uses `http.client`, which ignores the proxy settings of the environment.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _bind(port: int, bound: contextlib.ExitStack) -> bool:
    # Without SO_REUSEADDR, with which Linux lets two sockets bind one port until one listens.
    candidate = bound.enter_context(socket.socket())
    try:
        candidate.bind((HOST, port))
    except OSError as error:
        if error.errno not in {errno.EADDRINUSE, errno.EACCES}:
            raise
        return False
    return True


def _can_listen(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do, so that connections of the last run in TIME_WAIT do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        return True


def _first_ephemeral_port() -> int:
    setting = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not setting.exists():
        return _DEFAULT_FIRST_EPHEMERAL_PORT
    return int(setting.read_text().split()[0])
