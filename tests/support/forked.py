"""Child processes that are forked from a template process with imported libraries.

A worker or a gateway needs two seconds of CPU time for imports, a worker with a real model ten, and
the tests start hundreds of them. A forked process is ready in 0.2 s. It runs the same code with a
separate environment, output, session and process id. A forked worker also forks its lease guard,
which saves another second of CPU time. `DevStack` does not fork its processes.

The tests use `ForkedStack`, `ForkedWorker` and `ForkedGateway`. The template process is
`python -m tests.support.forked IMPORT…`. It exits with the test process, and the forked processes
exit with the template process.
"""

import asyncio
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from consumer.devstack import Daemon, DevStack, GatewayServer
from consumer.devstack.process import ChildProcess

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join(
    [str(ROOT), str(ROOT / "contracts"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
GUARD = "consumer.bus.lease_guard.process"
_create_subprocess_exec = asyncio.create_subprocess_exec
_LARGEST = 2**20  # bytes; largest size of an order
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class _Forked(ChildProcess):
    """A forked `python -P -m MODULE` or `python -P -c CODE`."""

    _imports: ClassVar[tuple[str, ...]]  # what the template imports

    def _spawn(self) -> Any:
        if sys.platform != "linux":  # only Linux kills the forked processes after a killed test run
            return super()._spawn()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._log_start = output.seek(0, os.SEEK_END)
            template = _template(os.getpid(), self._imports)
            return template.fork(self.argv, self.env or {}, output.fileno())


class ForkedWorker(_Forked, Daemon):
    """A `Daemon` with a fault from `tests/faults/causes/CAUSE.py`.

    Args:
        name: As of a `Daemon`.
        settings: As of a `Daemon`.
        log: As of a `Daemon`.
        cause: The name of the fault.
    """

    _imports = ("consumer.app.daemon", "tests.support.quick_runner")

    def __init__(self, name: str, settings: Mapping[str, str], *, log: Path, cause: str) -> None:
        super().__init__(name, {**settings, "PYTHONPATH": PYTHONPATH}, log=log)
        self.argv = (sys.executable, "-P", "-m", "tests.faults.worker", cause)


class ForkedDaemon(_Forked, Daemon):
    """A `Daemon` with a real model."""

    _imports = (
        "consumer.app.cli",
        "consumer.app.daemon",
        "consumer.runners.image_to_text.vision_language",
        "consumer.runners.text_to_image.diffusion",
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    )


class ForkedGateway(_Forked, GatewayServer):
    """A `GatewayServer` with changed constants.

    Args:
        name: As of a `GatewayServer`.
        settings: As of a `GatewayServer`.
        log: As of a `GatewayServer`.
        patch: Statements that use the modules `app`, `in_flight` and `serve` of `consumer.gateway`.
    """

    _imports = ("consumer.app.cli", "consumer.gateway.serve")

    def __init__(
        self, name: str, settings: Mapping[str, str], *, log: Path, patch: str = ""
    ) -> None:
        super().__init__(name, settings, log=log)
        run = "import sys; from consumer.app.cli import main; sys.argv = ['consumer', 'gateway']"
        imports = "from consumer.gateway import app, in_flight, serve"
        self.argv = (sys.executable, "-P", "-c", f"{imports}\n{patch}\n{run}\nmain()")


class ForkedStack(DevStack):
    """A `DevStack` whose daemons and gateways are forked."""

    def start_daemon(self, name: str, settings: Mapping[str, str]) -> Daemon:
        daemon = ForkedDaemon(name, {**self.environment(), **settings}, log=self._log_of(name))
        self._started.callback(daemon.stop)
        self.daemons.append(daemon)
        daemon.start()
        return daemon

    def start_gateway(self, name: str, settings: Mapping[str, str]) -> GatewayServer:
        gateway = ForkedGateway(name, {**self.environment(), **settings}, log=self._log_of(name))
        self._started.callback(gateway.stop)
        self._gateways.append(gateway)
        gateway.start()
        return gateway

    def _log_of(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"


class _Process:
    """The subset of `subprocess.Popen` that `ChildProcess` uses, for a child of the template.

    Args:
        reports: A socket on which the template reports the process id, and then the exit code.
    """

    def __init__(self, argv: tuple[str, ...], reports: socket.socket) -> None:
        self._argv = argv
        self._reports = reports
        self.pid = int(self._next_report())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: The process still runs after `timeout` seconds.
        """
        if self.returncode is None:
            readable, _, _ = select.select([self._reports], [], [], timeout)
            if not readable:
                raise subprocess.TimeoutExpired(self._argv, timeout or 0)
            self.returncode = int(self._next_report())
            self._reports.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to a process that has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def _next_report(self) -> bytes:
        report = self._reports.recv(32)
        if not report:
            raise RuntimeError("the template has ended")
        return report


class _Template:
    """The template process.

    Args:
        imports: The modules that the template imports.
    """

    def __init__(self, imports: tuple[str, ...]) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, *imports],
                stdin=theirs,
                env={**os.environ, "PYTHONPATH": PYTHONPATH},
                start_new_session=True,
            )

    def fork(self, argv: tuple[str, ...], env: dict[str, str], output: int) -> _Process:
        """Fork a process.

        Args:
            argv: The interpreter and its arguments.
            env: The complete environment.
            output: A file descriptor for the output.
        """
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            order = json.dumps({"argv": argv, "env": env}).encode()
            socket.send_fds(self._orders, [order], [output, theirs.fileno()])
        return _Process(argv, mine)


@functools.cache
def _template(_pid: int, imports: tuple[str, ...]) -> _Template:
    """Return the template of this process. A forked process needs a separate template."""
    return _Template(imports)


# -- in the template ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """One process to fork."""

    argv: list[str]
    env: dict[str, str]
    output: int
    reports: socket.socket


def _become(order: _Order) -> None:
    """Give a forked process the state of a newly started process."""
    template = os.getppid()
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != template:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate((nothing, order.output, order.output)):
        os.dup2(source, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(order.env)
    asyncio.create_subprocess_exec = _fork_guard  # type: ignore[assignment]


async def _fork_guard(*argv: str, **options: Any) -> asyncio.subprocess.Process:
    """Replace `asyncio.create_subprocess_exec` for the lease guard, without a new interpreter."""
    assert argv[-1] == GUARD, argv
    return await _create_subprocess_exec(*argv, preexec_fn=_become_guard, **options)


def _become_guard() -> None:
    """Run the lease guard in a process that `subprocess` has forked, instead of a program."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # this also closes the error pipe of `subprocess`
    signal.set_wakeup_fd(-1)
    asyncio._set_running_loop(None)
    code = 1
    try:
        runpy.run_module(GUARD, run_name="__main__")
        code = 0
    except Exception:  # noqa: BLE001 - the interpreter also prints every exception
        traceback.print_exc()
    finally:
        os._exit(code)


def _receive(orders: socket.socket) -> _Order | None:
    """Receive an order, or None after the socket is closed."""
    data, descriptors, _, _ = socket.recv_fds(orders, _LARGEST, 2)
    if not data:
        return None
    output, reports = descriptors
    return _Order(**json.loads(data), output=output, reports=socket.socket(fileno=reports))


def _report_ended(running: dict[int, socket.socket]) -> None:
    """Report the exit codes of the processes that have ended."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            # The reader may have closed the socket.
            with running.pop(pid) as reports, contextlib.suppress(OSError):
                reports.send(str(os.waitstatus_to_exitcode(status)).encode())


def _serve() -> list[str]:
    """Fork a process for each order.

    Returns:
        The interpreter arguments in each forked process. In the template: an empty list.
    """
    orders = socket.socket(fileno=os.dup(0))
    running: dict[int, socket.socket] = {}
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([orders, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _report_ended(running)
        if orders in ready:
            if (order := _receive(orders)) is None:
                return []
            if (pid := os.fork()) == 0:
                _become(order)
                return order.argv[1:]
            os.close(order.output)
            order.reports.send(str(pid).encode())
            running[pid] = order.reports


def _run(argv: list[str]) -> None:
    """Run a module or code, as an interpreter with these arguments does."""
    match argv:
        case ["-P", "-m", module, *arguments]:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-P", "-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            exec(code, {"__name__": "__main__"})  # noqa: S102 - the code comes from a test
        case _:
            raise ValueError(argv)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so garbage collection does not copy memory pages of the template
    if arguments := _serve():
        _run(arguments)
