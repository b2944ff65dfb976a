"""`consumer request`: send a request, show its progress, save its outputs."""

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.text import Text

from consumer.background_tasks import cancel_and_wait
from consumer.bus.connection import BusUnavailable
from consumer.bus.queue_length import QueueLength
from consumer.bus.services import queue_of_worker, worker_metadata
from consumer.ports.bus import ResultEvent
from generation_client import GenerationClient, new_request_id
from generation_contracts import (
    TASKS,
    FailedEvent,
    JsonOutput,
    ProgressEvent,
    Request,
    StartedEvent,
    StoredArtifact,
    SucceededEvent,
    TextOutput,
)
from generation_contracts.artifacts import ImageSource

R = TypeVar("R", bound=Request)

PLACEHOLDER = "s3://not-yet/known"  # an image, while the other fields of a request are checked
WORKERS_ASKED_AFTER = 5.0  # seconds in which an idle worker would have started the request


class Display(Protocol):
    """Shows the events of a request as they arrive."""

    def note(self, line: str) -> None:
        """Show a line about the request."""

    def show(self, event: StartedEvent | ProgressEvent) -> None:
        """Show one event."""


def image_source(argument: str) -> ImageSource | bytes:
    """Return the image of a command's IMAGE argument: the bytes of a local file, or a URI.

    Raises:
        OSError: The file cannot be read.
    """
    if "://" in argument or argument.startswith("data:"):
        return argument
    return Path(argument).read_bytes()


async def send_request(
    client: GenerationClient,
    request: Request,
    display: Display,
    *,
    name: str | None = None,
    queue: QueueLength | None = None,
) -> ResultEvent:
    """Send a request and wait for its terminal event.

    Args:
        client: Connected.
        request: A request with an id.
        display: Shows that the request is stored, and its events.
        name: Name of the queue; None: the default queue of the task.
        queue: The queue; its length is shown, and the workers are counted if the
            request does not start soon. None: neither.

    Raises:
        GenerationError: See `GenerationClient.events`.
    """
    stored, started = asyncio.Event(), asyncio.Event()
    name = name or str(request.task)

    def on_stored() -> None:
        display.note(f"request {request.request_id}: stored in the queue, waiting for a worker")
        stored.set()

    asking = asyncio.ensure_future(_watch_queue(queue, name, stored, started, display))
    try:
        async with aclosing(client.events(request, queue=name, on_stored=on_stored)) as events:
            async for event in events:
                started.set()
                if not isinstance(event, StartedEvent | ProgressEvent):
                    return event
                display.show(event)
    finally:
        await cancel_and_wait(asking)
    raise AssertionError("the events end with a terminal event")


async def _watch_queue(
    queue: QueueLength | None,
    name: str,
    stored: asyncio.Event,
    started: asyncio.Event,
    display: Display,
) -> None:
    """Report the position of a stored request; after some seconds without a start, the workers."""
    if queue is None:
        return
    await stored.wait()
    await _show_position(queue, started, display)
    try:
        await asyncio.wait_for(started.wait(), WORKERS_ASKED_AFTER)
    except TimeoutError:
        await _show_workers(queue, name, display)


async def _show_position(queue: QueueLength, started: asyncio.Event, display: Display) -> None:
    try:
        before = await queue.before()
    except BusUnavailable:
        return  # no permission, or no connection: the request waits in any case
    if before and not started.is_set():
        display.note(f"requests before it: {before} at most")


async def _show_workers(queue: QueueLength, name: str, display: Display) -> None:
    try:
        workers = [w for w in await worker_metadata(queue.bus) if queue_of_worker(w) == name]
    except BusUnavailable:
        return
    if workers:
        display.note(f"{len(workers)} of {name} running: the queue is not empty, or they start")
    else:
        display.note(f"no worker of {name} is running: the request waits until one starts")


async def save_files(
    client: GenerationClient, event: SucceededEvent, folder: Path, name: str
) -> list[Path]:
    """Download and save every file of a result.

    Returns:
        The files: `<name>.png`, or `<name>-<n>.png` for several.

    Raises:
        DownloadFailed: A file cannot be downloaded, or its bytes differ from the stored digest.
    """
    files = [output for output in event.outputs if isinstance(output, StoredArtifact)]
    contents = [await client.download(file) for file in files]
    saved = []
    for number, (artifact, content) in enumerate(zip(files, contents, strict=True)):
        suffix = Path(artifact.key).suffix
        file = folder / (f"{name}{suffix}" if len(files) == 1 else f"{name}-{number}{suffix}")
        await asyncio.to_thread(file.write_bytes, content)
        saved.append(file)
    return saved


class _TimeLeft(TimeRemainingColumn):
    """The estimated time; nothing for a text, whose length is not known in advance."""

    def render(self, task: ProgressTask) -> Text:
        """Return the time as text."""
        return Text() if task.total is None else super().render(task)


class ProgressBar:
    """Shows the progress of a request on a terminal; a context manager.

    A streamed text is printed as it comes. Without streaming, a text has a count of its tokens.

    Args:
        console: Writes to standard error, so that results can be piped.

    Attributes:
        text: The streamed text that is on the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            _TimeLeft(),
            console=console,
            disable=not console.is_interactive,  # without redrawing, rich prints an empty line
        )
        self._bar = self._progress.add_task("waiting", total=None, visible=False, count="")
        self._console = console
        self.text = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_text()
        self._progress.stop()

    def note(self, line: str) -> None:
        """Print a line about the request."""
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def show(self, event: StartedEvent | ProgressEvent) -> None:
        """Draw one event."""
        if isinstance(event, StartedEvent):
            self.note(
                f"started by {event.worker} after {event.queued:.2f} s in the queue, "
                f"model {event.model.id} ({event.model.family})"
            )
            return
        if event.step == 0:  # a new attempt, which generates the text again from the start
            self._end_text()
            self.text = ""
        if event.text is not None and self._console.is_interactive:
            self._progress.update(self._bar, visible=False)
            self._progress.stop()  # the text would be redrawn with the bar
            self._console.out(event.text, end="", highlight=False)
            self.text += event.text
            return
        is_text = TASKS[event.task].output == "text"
        self._progress.update(
            self._bar,
            description=str(event.task).replace("_", " "),
            completed=event.step,
            total=None if is_text else event.of,
            count=f"{event.step} tokens" if is_text else f"{event.step}/{event.of} steps",
            visible=not self.text,
        )

    def _end_text(self) -> None:
        if self.text and not self.text.endswith("\n"):
            self._console.out("")


class NoDisplay:
    """Shows nothing, for output that programs read."""

    text = ""

    def note(self, line: str) -> None:
        """Ignore the line."""

    def show(self, event: StartedEvent | ProgressEvent) -> None:
        """Ignore the event."""


def summary(event: ResultEvent, saved: list[Path], *, shown: str = "") -> str:
    """Return a result as text for people.

    Args:
        event: The terminal event.
        saved: Files of its images.
        shown: A text that the reader has seen already, and that is not repeated.
    """
    if isinstance(event, FailedEvent):
        return f"failed: {event.failure.code}: {event.failure.message}"
    if not isinstance(event, SucceededEvent):
        return "cancelled"
    texts = [output.text for output in event.outputs if isinstance(output, TextOutput)]
    lines = [text for text in texts if text != shown]
    values = [output.value for output in event.outputs if isinstance(output, JsonOutput)]
    lines += [json.dumps(value, indent=2, ensure_ascii=False) for value in values]
    lines += [f"saved {file}" for file in saved]
    lines += [f"note: {warning}" for warning in event.warnings]
    return "\n".join(lines)


def cancelled_line(request_id: str, ended: str | None) -> str:
    """Return a sentence about a cancellation.

    Args:
        request_id: The cancelled id.
        ended: Type of the terminal event; None: there is no such request.
    """
    match ended and ended.rpartition(".")[2]:
        case None:
            return f"{request_id}: no request with this id is queued, running or finished"
        case "cancelled":
            return "cancelled"
        case kind:
            return f"{request_id}: too late to cancel, the request has ended: {kind}"


def new_request(kind: type[R], **parameters: Any) -> R:
    """Build a request; a parameter that is None is left to the model's default.

    The request has a new id unless `request_id` is given.

    Raises:
        pydantic.ValidationError: A parameter violates the contract.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    return kind(**{"request_id": new_request_id(), **given})
