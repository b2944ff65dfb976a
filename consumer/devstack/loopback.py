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
_TRIES = 1_000  # random ports looked at before giving up
_RELEASE_WAIT = 2.0  # seconds; a killed server of 150 MB takes some 10 ms to give its ports back
_POLL = 0.02  # seconds


class FreePorts:
    """A choice of TCP ports that nobody listens on, held until the choice is complete.

    Use as a context manager; within it all ports taken differ. They come from below the ephemeral
    range, for two reasons. Any outgoing connection may take an ephemeral port while its server
    restarts; and a client that keeps reconnecting to one on loopback can be given the same port as
    its own source, connect to itself, and lock the server out.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._end = _first_ephemeral_port()
        if self._end - _LOWEST_PORT < _SMALLEST_RANGE:  # nearly all ports are ephemeral here
            self._end = 65_536

    def __enter__(self) -> Self:
        """Begin to choose."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go of all ports."""
        self._held.close()

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
        for _ in range(_TRIES):
            first = _LOWEST_PORT + secrets.randbelow(self._end - distance - _LOWEST_PORT)
            pair = (first, first + distance)
            with contextlib.ExitStack() as held:
                if all(_hold(port, held) for port in sorted(set(pair))):
                    self._held.push(held.pop_all())
                    return pair
        raise DevStackError(f"no free port was found between {_LOWEST_PORT} and {self._end}")


def free_ports(count: int) -> list[int]:
    """Return `count` different free ports; see `FreePorts`.

    Raises:
        DevStackError: there are not so many.
    """
    with FreePorts() as free:
        return [free.take() for _ in range(count)]


def keep_from_others(ports: Iterable[int], owner: object) -> None:
    """Keep `ports` out of every process's choices for as long as `owner` exists; Linux only.

    A port is not listened on all the time: a daemon imports its libraries for seconds before it
    does, and a server may be down for a while. Parallel test runs, which choose ports all the
    time, took one in between. A socket that is bound and does not listen prevents that, and lets
    a server that sets SO_REUSEADDR listen there, as all of the stack do. On other systems it would
    stand in the server's own way. A port that somebody has is left alone: the start will tell.
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
    """Return once `port` can be listened on, waiting a moment for a dying server to leave it.

    Raises:
        PortTakenError: another program keeps it; the message names the port and its `purpose`.
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
    """Return the status of `GET path` on 127.0.0.1, or None where no HTTP answer came in `timeout`.

    `http.client` and not `urllib.request`: it ignores the proxy settings of the environment.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _hold(port: int, held: contextlib.ExitStack) -> bool:
    # Without SO_REUSEADDR, with which Linux lets two sockets bind one port until one listens.
    candidate = held.enter_context(socket.socket())
    try:
        candidate.bind((HOST, port))
    except OSError as error:
        if error.errno not in {errno.EADDRINUSE, errno.EACCES}:
            raise
        return False
    return True


def _can_listen(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: connections of the last run that are in TIME_WAIT are no obstacle.
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
