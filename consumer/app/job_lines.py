"""The lines of `consumer up` about jobs."""

from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from consumer.ports.bus import ResultEvent
from generation_client import AnyEvent
from generation_contracts import (
    TASKS,
    CancelledEvent,
    FailedEvent,
    ProgressEvent,
    StartedEvent,
    SucceededEvent,
)

SHOWN = 8  # running jobs
REFRESHES = 4  # per second
REMEMBERED = 100  # ended jobs, whose late events are ignored


@dataclass
class _Run:
    """A running job.

    Attributes:
        started: Its started event.
        progress: Its last progress event.
    """

    started: StartedEvent
    progress: ProgressEvent | None = None


class JobLines:
    """Prints one line for each job that ends; a context manager.

    In a terminal, the running jobs have a line each below the printed lines, with their seconds.

    Args:
        console: Writes to standard error.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._runs: dict[str, _Run] = {}  # by request id, in the order of their starts
        self._ended: deque[str] = deque(maxlen=REMEMBERED)
        self._live = Live(
            get_renderable=self._running,
            console=console,
            refresh_per_second=REFRESHES,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()  # shows nothing without a terminal
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, event: AnyEvent) -> None:
        """Show one event of any job."""
        request_id = event.request_id
        if isinstance(event, SucceededEvent | FailedEvent | CancelledEvent):
            run = self._runs.pop(request_id, None)
            self._ended.append(request_id)
            self._console.print(job_line(event, None if run is None else run.started))
        elif isinstance(event, StartedEvent):
            # Results have their own subscription, so a start may follow the result.
            if request_id not in self._ended:
                self._runs.pop(request_id, None)
                self._runs[request_id] = _Run(event)
        elif request_id in self._runs:
            self._runs[request_id].progress = event

    def refresh(self) -> None:
        """Draw the lines of the running jobs now; a timer does so four times a second."""
        self._live.refresh()

    def _running(self) -> Text:
        now = datetime.now(UTC)
        runs = list(self._runs.values())
        lines = [running_line(run.started, run.progress, now) for run in islice(runs, SHOWN)]
        if len(runs) > SHOWN:
            lines.append(f"and {len(runs) - SHOWN} more running jobs")
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis", end="")


def job_line(event: ResultEvent, started: StartedEvent | None) -> str:
    """Return the line about a job that has ended: end, state, seconds, queue, worker and id.

    Args:
        event: The terminal event.
        started: The event of its start; None if it was lost, or if the job has not started.
    """
    state = event.type.rpartition(".")[2]
    seconds = None if started is None else (event.time - started.time).total_seconds()
    code = event.failure.code if isinstance(event, FailedEvent) else ""
    return _line(event, event.time, state, seconds, code)


def running_line(started: StartedEvent, progress: ProgressEvent | None, now: datetime) -> str:
    """Return the line about a running job: start, seconds, queue, worker, id and steps.

    Args:
        started: The event of its start.
        progress: Its last progress event; None before the first one.
        now: With a time zone.
    """
    steps = ""
    if progress is not None:
        is_text = TASKS[progress.task].output == "text"  # its length is not known in advance
        steps = f"{progress.step} tokens" if is_text else f"{progress.step}/{progress.of} steps"
    seconds = max(0.0, (now - started.time).total_seconds())
    return _line(started, started.time, "running", seconds, steps)


def _line(
    event: ResultEvent | StartedEvent, time: datetime, state: str, seconds: float | None, note: str
) -> str:
    """Return the columns of all lines."""
    shown = "" if seconds is None else f"{seconds:.1f} s"
    where = f"{event.queue_name:<13}  {event.worker}  {event.request_id}"
    return f"{time.astimezone():%H:%M:%S}  {state:<9}  {shown:>8}  {where}  {note}".rstrip()
