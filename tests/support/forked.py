"""Child processes forked from one that has imported their libraries.

A worker takes two seconds of a core to import what it needs, ten with the libraries of the models,
and a gateway two. The tests start hundreds of them. A forked process runs the same code, with a
separate environment, output, session and process id, and is ready in 0.2 s. A forked worker forks
its lease guard too, which takes another second of a core where it is started. `DevStack` starts
its children the ordinary way, `ForkedStack` forks them.

`ForkedStack`, `ForkedWorker` and `ForkedGateway` are the side of the tests. The template is
`python -m tests.support.forked IMPORT…`. It ends with the process of the tests, and what it has
forked ends with it.
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
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'contracts'}"
GUARD = "consumer.bus.lease_guard.process"
_create_subprocess_exec = asyncio.create_subprocess_exec
_LARGEST = 2**20  # bytes of one order
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class _Forked(ChildProcess):
    """A `python -P -m MODULE` or `python -P -c CODE` that is forked and not started."""

    _imports: ClassVar[tuple[str, ...]]  # what the template imports

    def _spawn(self) -> Any:
        if sys.platform != "linux":  # elsewhere nothing would end the forks of a killed test run
            return super()._spawn()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._log_start = output.seek(0, os.SEEK_END)
            template = _template(os.getpid(), self._imports)
            return template.fork(self.argv, self.env or {}, output.fileno())


class ForkedWorker(_Forked, Daemon):
    """A `Daemon` with a fault: `tests/faults/causes/CAUSE.py`.

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
    """A `GatewayServer`, with some constants changed.

    Args:
        name: As of a `GatewayServer`.
        settings: As of a `GatewayServer`.
        log: As of a `GatewayServer`.
        patch: Statements on the modules `app`, `in_flight` and `serve` of `consumer.gateway`.
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
    """What `ChildProcess` uses of a `subprocess.Popen`, for a process whose parent is the template.

    Args:
        reports: Where the template reports the process id, and then the exit code.
    """

    def __init__(self, argv: tuple[str, ...], reports: socket.socket) -> None:
        self._argv = argv
        self._reports = reports
        self.pid = int(self._next_report())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: It still runs after `timeout` seconds.
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
    """The process that forks; started by its first use.

    Args:
        imports: The modules that it imports.
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
            env: Its whole environment.
            output: A file descriptor for its output.
        """
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            order = json.dumps({"argv": argv, "env": env}).encode()
            socket.send_fds(self._orders, [order], [output, theirs.fileno()])
        return _Process(argv, mine)


@functools.cache
def _template(_pid: int, imports: tuple[str, ...]) -> _Template:
    """Return a template of this process; a forked process would need another one."""
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
    """Make a forked process what a started one would be."""
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
    """Start the lease guard, as `asyncio.create_subprocess_exec` does, but without a new Python."""
    assert argv[-1] == GUARD, argv
    return await _create_subprocess_exec(*argv, preexec_fn=_become_guard, **options)


def _become_guard() -> None:
    """Run the lease guard in a process that `subprocess` has forked, in place of its program."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # with the pipe that `subprocess` waits for
    signal.set_wakeup_fd(-1)
    asyncio._set_running_loop(None)
    code = 1
    try:
        runpy.run_module(GUARD, run_name="__main__")
        code = 0
    except Exception:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    finally:
        os._exit(code)


def _receive(orders: socket.socket) -> _Order | None:
    """Receive an order; None at the end."""
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
            with (
                running.pop(pid) as reports,
                contextlib.suppress(OSError),
            ):  # the reader may have closed the pipe
                reports.send(str(os.waitstatus_to_exitcode(status)).encode())


def _serve() -> list[str]:
    """Fork a process for each order.

    Returns:
        The arguments of the interpreter, in each of these processes; nothing at the end.
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
    """Do what an interpreter with these arguments does."""
    match argv:
        case ["-P", "-m", module, *arguments]:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-P", "-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            exec(code, {"__name__": "__main__"})  # noqa: S102 - a test's own code
        case _:
            raise ValueError(argv)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collector does not copy the template's pages
    if arguments := _serve():
        _run(arguments)
