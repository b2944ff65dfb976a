"""nats-server and the S3 server together, with the daemons and the gateway that use them.

A directory belongs to one running stack. A persistent stack stores its data, ports and credentials
there, so the next `consumer up` has the same addresses.
"""

import contextlib
import fcntl
import json
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from consumer.devstack.daemon import Daemon
from consumer.devstack.errors import DevStackError, DirectoryInUseError, PortTakenError
from consumer.devstack.gateway import GatewayServer
from consumer.devstack.loopback import FreePorts
from consumer.devstack.nats_server import NatsServer
from consumer.devstack.object_store import Credentials, ObjectStore

_STATE = "devstack.json"
_LOCK = "devstack.lock"
_ATTEMPTS = 3  # starts of a temporary stack, each with new ports


@dataclass(frozen=True)
class Addresses:
    """The ports and credentials that a persistent stack stores between its runs."""

    nats: Mapping[str, int]
    store: Mapping[str, int]
    credentials: Credentials = field(default_factory=Credentials)

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
            return cls(
                nats={name: int(saved["nats"][name]) for name in NatsServer.port_names},
                store={name: int(saved["store"][name]) for name in ObjectStore.port_names},
                credentials=Credentials(**saved["credentials"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DevStackError(f"{path} is damaged: use another directory") from error

    def write(self, path: Path) -> None:
        """Write the file with mode 0600, whole or not at all."""
        handle, draft = tempfile.mkstemp(dir=path.parent)  # mode 0600
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(self), file, indent=2)
        Path(draft).replace(path)


class DevStack:
    """nats-server, the S3 server, daemons and a gateway, started and stopped together.

    Args:
        directory: contains all files; created with mode 0700.
        persist: whether to keep data, ports and credentials for the next run. Otherwise every start
            creates a new, empty stack in a separate folder, and the S3 server is killed at the end
            instead of stopped, which saves 1.3 s.
        bucket: the value of `S3_BUCKET`; `consumer apply` creates the bucket.
        nats_config: more configuration for nats-server.

    Measured: both ready after 0.8 s; both stopped in 1.3 s, or 0.01 s where not persisted.
    """

    def __init__(
        self,
        directory: Path,
        persist: bool,
        *,
        bucket: str = "generation",
        nats_config: str = "",
    ) -> None:
        self.directory = directory.absolute()
        self.persist = persist
        self.daemons: list[Daemon] = []
        self._gateways: list[GatewayServer] = []
        self._bucket = bucket
        self._nats_config = nats_config
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
        """
        if self._servers is not None:
            raise RuntimeError("the stack runs already")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
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

    def start_daemon(self, name: str, settings: Mapping[str, str]) -> Daemon:
        """Start `consumer run` on this stack and return at once; `stop` stops it too.

        `settings` come on top of `environment()`. The log is `logs/<name>.log`.
        """
        daemon = Daemon(
            name,
            {**self.environment(), **settings},
            log=self.directory / "logs" / f"{name}.log",
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
            log=self.directory / "logs" / f"{name}.log",
        )
        self._started.callback(gateway.stop)
        self._gateways.append(gateway)
        gateway.start()
        return gateway

    def stop(self) -> None:
        """Stop gateways and daemons, then the servers, even if one of them cannot be stopped.

        Safe to call twice, and on a stack that never started.
        """
        children = [*self._gateways, *self.daemons]
        self._gateways, self.daemons = [], []
        self._servers = None
        with self._started:  # last in, first out: gateways and daemons, store, NATS, the lock
            for child in children:
                child.signal(signal.SIGTERM)  # all drain at the same time

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
        state, logs = self.directory / _STATE, self.directory / "logs"
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
