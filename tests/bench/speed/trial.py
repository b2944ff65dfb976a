"""The environment of one measurement: new servers, a folder, and the started processes."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from consumer.devstack import ChildProcess, Daemon, DevStack
from consumer.devstack.loopback import http_status
from generation_contracts import Subjects, Task
from tests.bench.speed.peers.job import READY
from tests.bench.speed.profiling import sampled
from tests.bench.speed.rows import Row
from tests.bench.speed.stand_in import NOTES, Run, read_runs
from tests.bench.speed.store import Store

ROOT = Path(__file__).parents[3]
TASK = Task.TEXT_TO_IMAGE
_PATHS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'contracts'}"}


class Peer(ChildProcess):
    """A process of a peer; ready when it creates a file or responds on its port."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        folder: Path,
        port: int | None,
    ) -> None:
        self._ready_file = folder / f"{name}.ready"
        self._port = port
        super().__init__(
            name,
            [sys.executable, "-P", "-m", *argv],
            log=folder / f"{name}.log",
            env={**os.environ, **env, **_PATHS, READY: str(self._ready_file)},
        )

    def _is_ready(self) -> bool:
        if self._port is not None:
            return http_status(self._port, "/ready") == HTTPStatus.OK
        return self._ready_file.exists()


@dataclass
class Trial:
    """The environment of one measurement.

    Attributes:
        row: The kind of job.
        folder: Deleted afterwards, with the artifacts.
        stack: New servers, without data of other measurements.
        store: The created bucket.
        parts: Stops everything that is started here.
        profile: File for the stacks of the daemon; None: no profile.
    """

    row: Row
    folder: Path
    stack: DevStack
    store: Store
    parts: ExitStack
    profile: Path | None = None
    subjects: Subjects = field(default_factory=lambda: Subjects("speed-daemon"))

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of every process with a device."""
        notes = {NOTES: str(self._notes(name))}
        return {**self.stack.environment(), **self.row.environment(), **notes}

    def runs(self, name: str) -> Sequence[Run]:
        """Return the runs of the device of a process."""
        return read_runs(self._notes(name))

    def start_peer(
        self, name: str, argv: Sequence[str], port: int | None = None, **environment: str
    ) -> Peer:
        """Start a process of a peer, without waiting for it."""
        peer = Peer(name, argv, {**self.environment(name), **environment}, self.folder, port)
        self.parts.callback(peer.kill)
        peer.start()
        return peer

    def start_daemon(self, name: str, max_ack_pending: int) -> Daemon:
        """Start a daemon with the stand-in as model; it creates its streams and durable."""
        environment = {
            **self.environment(name),
            "MODEL_TYPE": str(TASK),
            "CONSUMER_SUBJECT_ROOT": self.subjects.root,
            "CONSUMER_MAX_ACK_PENDING": str(max_ack_pending),
            **_PATHS,
        }
        daemon = Daemon(name, environment, log=self.folder / f"{name}.log")
        daemon.argv = (sys.executable, "-P", "-m", "tests.bench.speed.runner")
        if self.profile is not None:
            daemon.argv = sampled(daemon.argv, self.profile)
        self.parts.callback(daemon.kill)
        daemon.start()
        return daemon

    def _notes(self, name: str) -> Path:
        return self.folder / f"{name}.runs"


@contextmanager
def new_trial(row: Row, profile: Path | None = None) -> Iterator[Trial]:
    """Start new servers with an empty bucket; stop everything at the end of the block."""
    with (
        tempfile.TemporaryDirectory(prefix="speed-") as folder,
        DevStack(Path(folder) / "stack", persist=False) as stack,
        ExitStack() as parts,
    ):
        store = Store(stack.environment())
        store.make_bucket()
        yield Trial(row, Path(folder), stack, store, parts, profile)
