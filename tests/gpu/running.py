"""Runs each section in a separate process, with a time limit.

A section can crash, hang or lose the device without an effect on the others, and its rows up to
then are kept. On a CPU the processes are forked from one that has imported the libraries. A process
that uses CUDA cannot be forked from one whose libraries may have initialised it, so there each
process imports them, while the previous section still runs.
"""

import importlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tests.gpu.check import Check, Device, Row, one_line

_LIBRARIES = "tests.gpu.preloaded"
_GRACE = 10.0  # seconds for a process to end its servers after SIGTERM


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: In the report and on the command line.
        title: Heading in the report.
        limit: Seconds on a GPU; twice as long on a CPU, which may have other work.
        module: The module with its function `run(check)`.
    """

    name: str
    title: str
    limit: float
    module: str


@dataclass(frozen=True)
class Ended:
    """How a section has ended.

    Attributes:
        problem: What is wrong; empty if the section ended by itself.
    """

    seconds: float
    problem: str = ""


def run_sections(
    sections: Sequence[Section],
    device: Device,
    *,
    seconds: float,
    on_start: Callable[[Section], None],
    on_row: Callable[[Row], None],
) -> Iterator[tuple[Section, Ended]]:
    """Run the sections one after the other; yield how each has ended.

    Args:
        sections: The most valuable first.
        device: Where the models run.
        seconds: Limit of all sections together; a section that cannot start any more is skipped.
        on_start: Called when a section begins.
        on_row: Called with each row.
    """
    deadline = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    if device == "cpu":
        context.set_forkserver_preload([_LIBRARIES])
    waiting = [_SectionProcess(section, device, context) for section in sections[:1]]
    try:
        for number, section in enumerate(sections):
            process = waiting.pop()
            if number + 1 < len(sections):
                waiting.append(_SectionProcess(sections[number + 1], device, context))
            left = deadline - time.monotonic()
            if left <= 0:
                process.end()
                yield section, Ended(0.0, "not started: the time of the whole check is over")
                continue
            on_start(section)
            limit = section.limit if device == "cuda" else 2 * section.limit
            yield section, process.run(min(limit, left), on_row)
    finally:
        for process in waiting:
            process.end()


class _SectionProcess:
    """The process of one section. It imports the libraries and waits for `run`."""

    def __init__(self, section: Section, device: Device, context: Any) -> None:
        self._rows, rows = context.Pipe(duplex=True)
        self._process: BaseProcess = context.Process(
            target=_main, args=(section.name, section.module, device, rows), name=section.name
        )
        self._process.start()
        rows.close()  # the pipe ends with the child

    def run(self, seconds: float, on_row: Callable[[Row], None]) -> Ended:
        """Let the section begin, and pass on its rows until it ends or its time is over."""
        began = time.monotonic()
        problem = ""
        with suppress(OSError):  # the process has ended; its rows say why
            self._rows.send("begin")
        try:
            while self._rows.poll(max(0.0, began + seconds - time.monotonic())):
                on_row(self._rows.recv())
            problem = f"stopped after {seconds:.0f} s, its limit"
        except (EOFError, OSError):  # the process has ended
            self._process.join(_GRACE)
        self.end()
        code = self._process.exitcode
        if not problem and code:
            problem = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Ended(time.monotonic() - began, problem)

    def end(self) -> None:
        """End the process; its servers end with it."""
        for stop in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                stop()
                self._process.join(_GRACE)
        self._rows.close()


def _main(name: str, module: str, device: Device, rows: Connection) -> None:
    # An exception, so that the blocks of the section end its servers and workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    check = Check(name, device, rows.send)
    try:
        importlib.import_module(_LIBRARIES)
        if device == "cpu":
            # Small tensors are slower in several threads.
            importlib.import_module("torch").set_num_threads(1)
        section = importlib.import_module(module)
        rows.recv()
        section.run(check)
    except EOFError:
        return  # the check has ended before the section began
    except Exception as error:  # noqa: BLE001 - the report says what failed
        check.row("the section", "failed", ok=False, note=one_line(error))
