"""nats-server and the S3 server together, with the daemons and the gateway that use them.

A directory belongs to one running stack. A persistent stack stores its data, ports and credentials
there, so the next `consumer up` has the same addresses.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from consumer.devstack.daemon import Daemon
from consumer.devstack.errors import (
    DevStackError,
    DirectoryInUseError,
    NoSpaceError,
    PortTakenError,
)
from consumer.devstack.gateway import GatewayServer
from consumer.devstack.loopback import FreePorts, free_ports
from consumer.devstack.nats_server import NatsServer
from consumer.devstack.object_store import Credentials, ObjectStore
from consumer.devstack.process import ChildProcess

_STATE = "devstack.json"
_LOCK = "devstack.lock"
_ATTEMPTS = 3  # starts of a temporary stack, each with new ports
_IDLE_STOP = 3.0  # seconds; daemons without a run end sooner
_STOP_POLL = 0.05  # seconds
# Seconds for gateways to refuse the remaining requests. They would also retry to cancel the jobs of
# these requests, but no worker is left that could.
_GATEWAY_GRACE = 4.0
_HIGHEST_PORT = 65_535
_MEGABYTE = 10**6
_NEEDED_SPACE = 20 * _MEGABYTE  # bytes; a demonstration writes 0.6 MB


@dataclass(frozen=True)
class Addresses:
    """The ports and credentials that a persistent stack stores between its runs."""

    nats: Mapping[str, int]
    store: Mapping[str, int]
    credentials: Credentials = field(default_factory=Credentials)
    children: Mapping[str, int] = field(default_factory=dict)  # daemons and gateways, by name

    @classmethod
    def choose(cls) -> Self:
        """Choose free ports, all different, and random credentials."""
        with FreePorts() as free:
            return cls(nats=NatsServer.choose_ports(free), store=ObjectStore.choose_ports(free))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            DevStackError: the file is not of this form.
        """
        try:
            saved: dict[str, Any] = json.loads(path.read_text())
            nats, store, children = saved["nats"], saved["store"], saved.get("children", {})
            return cls(
                nats={name: _port(nats[name]) for name in NatsServer.port_names},
                store={name: _port(store[name]) for name in ObjectStore.port_names},
                credentials=Credentials(
                    **{name: _text(value) for name, value in saved["credentials"].items()}
                ),
                children={str(name): _port(port) for name, port in children.items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DevStackError(f"{path} is damaged: use another directory") from error

    def write(self, path: Path) -> None:
        """Write the file with mode 0600, whole or not at all."""
        handle, draft = tempfile.mkstemp(dir=path.parent)  # mode 0600
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(self), file, indent=2)
        Path(draft).replace(path)


def _port(value: Any) -> int:
    """Return a stored port.

    Raises:
        ValueError, TypeError: It is no port.
    """
    port = int(value)
    if not 0 < port <= _HIGHEST_PORT:
        raise ValueError(f"{port} is no port")
    return port


def _text(value: Any) -> str:
    """Return a stored text.

    Raises:
        TypeError: It is no text, or empty.
    """
    if not isinstance(value, str) or not value:
        raise TypeError("no text")
    return value


class DevStack:
    """nats-server, the S3 server, daemons and a gateway, started and stopped together.

    Args:
        directory: contains all files; created with mode 0700.
        persist: whether to keep data, ports and credentials for the next run. Otherwise every start
            creates a new, empty stack in a separate folder, and the S3 server is killed at the end
            instead of stopped, which saves 1.3 s.
        bucket: the value of `S3_BUCKET`; `consumer apply` creates the bucket.
        nats_config: more configuration for nats-server.
        on_drain: called with the names of the daemons for whose runs `stop` of a persistent stack
            waits.

    Measured: both ready after 0.8 s; both stopped in 1.3 s, or 0.01 s where not persisted.
    """

    def __init__(
        self,
        directory: Path,
        persist: bool,
        *,
        bucket: str = "generation",
        nats_config: str = "",
        on_drain: Callable[[list[str]], None] = lambda _: None,
    ) -> None:
        self.directory = directory.absolute()
        self.persist = persist
        self.daemons: list[Daemon] = []
        self._gateways: list[GatewayServer] = []
        self._bucket = bucket
        self._nats_config = nats_config
        self._on_drain = on_drain
        self._addresses: Addresses | None = None  # stored ones, of a persistent stack
        self._servers: tuple[NatsServer, ObjectStore] | None = None
        self._started = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start, and return when both servers are ready."""
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop everything."""
        self.stop()

    @property
    def nats(self) -> NatsServer:
        """The NATS server of the running stack."""
        return self._running()[0]

    @property
    def store(self) -> ObjectStore:
        """The S3 server of the running stack."""
        return self._running()[1]

    def start(self) -> None:
        """Start both servers at the same time; return when both are ready.

        If the start fails or is interrupted, the started servers are stopped.

        Raises:
            DirectoryInUseError: another stack runs on this directory.
            PortTakenError: a stored port is in use by another program.
            StartFailedError: a server did not start.
            ServerMissingError: a server is not installed.
            NoSpaceError: the disk has less than 20 MB of free space.
        """
        if self._servers is not None:
            raise RuntimeError("the stack runs already")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        _require_space(self.directory)
        with contextlib.ExitStack() as started:
            started.enter_context(_only_stack_on(self.directory))
            servers = self._start_servers(started)
            self._started = started.pop_all()
        self._servers = servers

    def environment(self) -> dict[str, str]:
        """Return the environment settings with which all commands use this stack."""
        return {
            "NATS_URL": self.nats.url,
            "S3_ENDPOINT": self.store.endpoint,
            "S3_ACCESS_KEY": self.store.access_key,
            "S3_SECRET_KEY": self.store.secret_key,
            "S3_BUCKET": self.store.bucket,
        }

    @property
    def logs(self) -> Path:
        """The folder of all logs."""
        return self.directory / "logs"

    @property
    def children(self) -> list[ChildProcess]:
        """The servers, daemons and gateways of the running stack."""
        return [*self._running(), *self.daemons, *self._gateways]

    def require_alive(self) -> None:
        """Require that no child has ended.

        Raises:
            StartFailedError: a child ended before it was ready.
            ChildEndedError: a child ended after it was ready.
        """
        for child in self.children:
            if not child.alive:
                raise child.ended_error()

    def wait_ready(self) -> None:
        """Wait until all daemons and gateways are ready.

        Raises:
            StartFailedError: one ended, or was not ready in time.
            ChildEndedError: a server ended.
        """
        for child in (*self.daemons, *self._gateways):
            child.wait_ready(check=self.require_alive)

    def start_daemon(self, name: str, settings: Mapping[str, str]) -> Daemon:
        """Start `consumer run` on this stack and return at once; `stop` stops it too.

        `settings` come on top of `environment()`. The log is `logs/<name>.log`.
        """
        daemon = Daemon(
            name,
            {**self.environment(), **settings},
            log=self.logs / f"{name}.log",
            probes_port=self._port_of(name),
        )
        self._started.callback(daemon.stop)  # before the start, so that an interrupt stops it too
        self.daemons.append(daemon)
        daemon.start()
        return daemon

    def start_gateway(self, name: str, settings: Mapping[str, str]) -> GatewayServer:
        """Start `consumer gateway` on this stack and return at once; `stop` stops it too.

        `settings` come on top of `environment()`. The log is `logs/<name>.log`.
        """
        gateway = GatewayServer(
            name,
            {**self.environment(), **settings},
            log=self.logs / f"{name}.log",
            port=self._port_of(name),
        )
        self._started.callback(gateway.stop)
        self._gateways.append(gateway)
        gateway.start()
        return gateway

    def stop(self) -> None:
        """Stop gateways and daemons, then the servers, even if one of them cannot be stopped.

        The daemons of a persistent stack finish their runs first, for up to their grace, unless a
        child has ended. Its gateways answer during that time, and end afterwards, because no other
        request can finish. An interrupt ends the wait. Safe to call twice, and on a stack that
        never started.
        """
        healthy = self._servers is not None and all(child.alive for child in self.children)
        daemons, gateways = self.daemons, self._gateways
        self.daemons, self._gateways = [], []
        self._servers = None
        with self._started:  # last in, first out: gateways and daemons, store, NATS, the lock
            waits = self.persist and daemons and healthy
            # A child takes the second SIGTERM, of its `stop`, as a request to end at once.
            for child in daemons if waits else (*gateways, *daemons):
                child.signal(signal.SIGTERM)  # all drain at the same time
            if waits:
                self._wait_for_runs(daemons)
                for gateway in gateways:
                    gateway.stop(_GATEWAY_GRACE)

    def _wait_for_runs(self, daemons: list[Daemon]) -> None:
        deadline = time.monotonic() + max(daemon.grace for daemon in daemons)
        report_at = time.monotonic() + _IDLE_STOP
        while (alive := [d.name for d in daemons if d.alive]) and time.monotonic() < deadline:
            if time.monotonic() > report_at:
                self._on_drain(alive)
                report_at = deadline
            time.sleep(_STOP_POLL)

    def _port_of(self, name: str) -> int | None:
        """Return the stored port of a daemon or gateway; a new port is stored.

        None means a free port, of a temporary stack.
        """
        if self._addresses is None:
            return None
        if name not in self._addresses.children:
            (port,) = free_ports(1)
            children = {**self._addresses.children, name: port}
            self._addresses = replace(self._addresses, children=children)
            self._addresses.write(self.directory / _STATE)
        return self._addresses.children[name]

    def _running(self) -> tuple[NatsServer, ObjectStore]:
        if self._servers is None:
            raise DevStackError("the development stack is not running")
        return self._servers

    def _start_servers(self, started: contextlib.ExitStack) -> tuple[NatsServer, ObjectStore]:
        if self.persist:
            return self._start_once(started)
        for _ in range(_ATTEMPTS - 1):
            # Another program can take a port between the choice and the start.
            with contextlib.suppress(PortTakenError):
                return self._start_once(started)
        return self._start_once(started)

    def _start_once(self, started: contextlib.ExitStack) -> tuple[NatsServer, ObjectStore]:
        nats, store = self._make_servers()
        with contextlib.ExitStack() as attempt:
            attempt.callback(nats.stop)
            attempt.callback(store.stop if self.persist else store.kill)
            nats.start()
            store.start()
            nats.wait_ready()
            store.wait_ready()
            started.push(attempt.pop_all())
        return nats, store

    def _make_servers(self) -> tuple[NatsServer, ObjectStore]:
        state, logs = self.directory / _STATE, self.logs
        if not self.persist:
            # A new folder for every attempt: the store's data belong to the ports of its first
            # start.
            home, addresses = (
                Path(tempfile.mkdtemp(dir=self.directory, prefix="run-")),
                Addresses.choose(),
            )
        elif state.exists():
            home, addresses = self.directory, Addresses.read(state)
        else:
            home, addresses = self.directory, Addresses.choose()
            addresses.write(state)  # before the store writes data that belong to these ports
        self._addresses = addresses if self.persist else None
        nats = NatsServer(
            home / "nats", ports=addresses.nats, config=self._nats_config, log=logs / "nats.log"
        )
        store = ObjectStore(
            home / "store",
            ports=addresses.store,
            credentials=addresses.credentials,
            bucket=self._bucket,
            log=logs / "store.log",
        )
        return nats, store


def _require_space(directory: Path) -> None:
    """Require free space for the data of the servers.

    Raises:
        NoSpaceError: the disk has less.
    """
    free = shutil.disk_usage(directory).free
    if free < _NEEDED_SPACE:
        raise NoSpaceError(
            f"{directory} has {free // _MEGABYTE} MB of free space; the servers need "
            f"{_NEEDED_SPACE // _MEGABYTE} MB: free some space, or use another directory"
        )


@contextlib.contextmanager
def _only_stack_on(directory: Path) -> Iterator[None]:
    """Lock the directory; the kernel releases the lock when this process ends.

    Raises:
        DirectoryInUseError: another stack has the lock.
    """
    with open(  # Path.open takes no opener, which sets the mode from the start
        directory / _LOCK, "r+", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o600)
    ) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DirectoryInUseError(
                f"{directory} is in use by another development stack (process {lock.read()}): "
                "stop it or use another directory"
            ) from error
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield
