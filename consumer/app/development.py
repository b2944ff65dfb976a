"""`consumer up` and `consumer demo`: run the whole system on one machine, without Docker."""

import asyncio
import importlib.util
import os
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from consumer.app.apply import CONNECT_WITHIN, apply
from consumer.app.composition import make_runner
from consumer.app.job_lines import JobLines
from consumer.app.sender_commands import ProgressBar, new_request, save_files, send_request
from consumer.app.supervision import supervised
from consumer.app.terminal_image import show_image
from consumer.app.viewer import open_file
from consumer.bus.connection import ConnectionClosed, connect
from consumer.bus.event_feed import EventFeed
from consumer.devstack import ChildEndedError, Daemon, DevStack, GatewayServer
from consumer.devstack.process import inherited_environment
from consumer.ports.bus import ResultEvent
from consumer.settings import Settings
from generation_client import GenerationClient
from generation_contracts import (
    ArtifactReference,
    FailedEvent,
    ImageArtifact,
    ImageToTextRequest,
    Request,
    SucceededEvent,
    Task,
    TextOutput,
    TextToImageRequest,
    encode,
)
from generation_contracts.base import DEFAULT_QUEUES

EXIT_CHILD_ENDED = 70  # EX_SOFTWARE of sysexits.h
GATEWAY_GRACE = "1"  # seconds; the gateway is stopped when the workers have ended
SHOWN_PROMPT_LENGTH = 200  # characters


def demo(
    request: TextToImageRequest,
    question: str,
    folder: Path,
    console: Console,
    *,
    as_json: bool,
    opens: bool,
) -> int:
    """Start everything, generate an image, describe it, and stop.

    Args:
        request: The request of the image.
        question: The prompt about the generated image.
        folder: The folder in which the image is saved.
        console: Writes to standard error.
        as_json: Whether to print the result events on standard output, instead of text for people.
        opens: Whether to open the image with the viewer of the system.

    Returns:
        0, 1 if a job failed or the image cannot be opened, or 70 if a server, a worker or the
        gateway exited unexpectedly.

    Raises:
        SettingsError: Settings of the workers are wrong; nothing has been started.
    """
    _require_settings()
    demonstration = _Demonstration(console, folder, as_json=as_json, opens=opens)
    with (
        tempfile.TemporaryDirectory(prefix="generation-demo-") as directory,
        DevStack(Path(directory), persist=False) as stack,
    ):
        try:
            console.print(_addresses(stack))
            _, gateway = _start_processes(stack, console)
            if gateway is not None:
                console.print(f"HTTP on {gateway.url}")
            with _environment(stack):
                settings = Settings.load()
            return asyncio.run(supervised(stack, demonstration.run(settings, request, question)))
        except ChildEndedError as error:
            console.print(str(error))
            return EXIT_CHILD_ENDED


def up(directory: Path, console: Console) -> int:
    """Run the development stack until Ctrl-C or SIGTERM, and print one line for each job.

    Ctrl-C and SIGTERM raise KeyboardInterrupt.

    Returns:
        70: a server, a worker or the gateway exited unexpectedly.

    Raises:
        SettingsError: Settings of the workers are wrong; nothing has been started.
    """

    def report_drain(workers: list[str]) -> None:
        names = ", ".join(workers)
        console.print(f"waiting for {names}: they finish their runs; press Ctrl-C to stop at once")

    _require_settings()
    with DevStack(directory, persist=True, on_drain=report_drain) as stack:
        try:
            console.print(_addresses(stack))
            daemons, gateway = _start_processes(stack, console)
            console.print(_instructions(stack, daemons, gateway))
            with _environment(stack):
                settings = Settings.load()
            asyncio.run(supervised(stack, _print_jobs(settings, console)))
        except ChildEndedError as error:
            console.print(str(error))
            return EXIT_CHILD_ENDED
        except KeyboardInterrupt:
            console.print("stopping …")
            raise


def _task_settings(task: Task) -> dict[str, str]:
    """Return the settings of a worker that are not inherited from the environment."""
    # The other variables of a model may be meant for only one of the two workers.
    model = ("MODEL_ID", "MODEL_DEFAULTS", "MODEL_ADAPTERS", "MODEL_SAFETY_CHECKER")
    own = (*model, "CONSUMER_NAME", "CONSUMER_QUEUE")
    return {**dict.fromkeys(own, ""), "MODEL_TYPE": str(task)}


def _require_settings() -> None:
    """Find wrong settings of the workers before anything starts.

    Raises:
        SettingsError: One line for each.
    """
    for task in DEFAULT_QUEUES:
        with _replaced_environment({**inherited_environment(), **_task_settings(task)}):
            make_runner(Settings.load())


def _start_processes(
    stack: DevStack, console: Console
) -> tuple[list[Daemon], GatewayServer | None]:
    """Start a worker of each task and a gateway, and wait until all of them are ready.

    The libraries of the gateway are an extra. Without them no gateway is started.
    """
    with _environment(stack):
        asyncio.run(apply(Settings.load()))
    settings = {
        # torch creates this folder on import, by default in the temporary folder of the system.
        "TORCHINDUCTOR_CACHE_DIR": str(stack.directory / "torchinductor"),
    }
    daemons = [
        stack.start_daemon(str(task), {**settings, **_task_settings(task)})
        for task in DEFAULT_QUEUES
    ]
    gateway = None
    if all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
        gateway = stack.start_gateway("gateway", {"GATEWAY_DRAIN_GRACE": GATEWAY_GRACE})
    with _elapsed_time(console, "loading the models"):
        stack.wait_ready()
    return daemons, gateway


@contextmanager
def _elapsed_time(console: Console, text: str) -> Iterator[None]:
    """Print a text; in a terminal, show it with the elapsed time until the block ends."""
    if not console.is_interactive:
        console.print(f"{text} …")
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


@contextmanager
def _environment(stack: DevStack) -> Iterator[None]:
    """Put the stack's settings into this process's environment, where `Settings` reads them.

    Variables that name other servers, their credentials or one worker are removed in the block.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("NATS_", "S3_", "MODEL_", "GATEWAY_"))
        and name.upper() != "CONSUMER_NAME"
    }
    with _replaced_environment({**kept, **stack.environment()}):
        yield


@contextmanager
def _replaced_environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Demonstration:
    """The two jobs of `consumer demo` and what is printed about them.

    Args:
        console: Writes to standard error.
        folder: The folder in which the image is saved.
        as_json: See `demo`.
        opens: See `demo`.
    """

    def __init__(self, console: Console, folder: Path, *, as_json: bool, opens: bool) -> None:
        self._console = console
        self._folder = folder
        self._as_json = as_json
        self._opens = opens
        self._started = time.monotonic()

    async def run(self, settings: Settings, request: TextToImageRequest, question: str) -> int:
        """Send both requests; return the exit code."""
        bus = await connect(settings, name="generation demo", within=CONNECT_WITHIN)
        client = GenerationClient(bus.client, root=settings.subjects.root)
        try:
            drawn = await self._send(client, request, f"text to image: {request.prompt}")
            if not isinstance(drawn, SucceededEvent):
                return 1
            image = next(o for o in drawn.outputs if isinstance(o, ImageArtifact))
            name = f"demo-{drawn.request_id[:8]}"
            (file,) = await save_files(client, drawn, self._folder, name)
            self._show_image(drawn, image, file)
            opened = not self._opens or await self._open(file)
            reference = ArtifactReference(bucket=image.bucket, key=image.key)
            about = new_request(ImageToTextRequest, prompt=question, images=(reference,))
            described = await self._send(client, about, f"image to text: {question}")
            if not isinstance(described, SucceededEvent):
                return 1
            self._show_text(described)
            return 0 if opened else 1
        finally:
            await bus.close()

    async def _send(self, client: GenerationClient, request: Request, title: str) -> ResultEvent:
        self._console.print(textwrap.shorten(title, SHOWN_PROMPT_LENGTH, placeholder=" …"))
        with ProgressBar(self._console) as bar:
            event = await send_request(client, request, bar)
        if self._as_json:
            click.echo(encode(event))
        if isinstance(event, FailedEvent):
            self._console.print(f"failed: {event.failure.code}: {event.failure.message}")
        return event

    def _show_image(self, event: SucceededEvent, image: ImageArtifact, file: Path) -> None:
        total = time.monotonic() - self._started
        self._console.print(
            f"saved {file} ({image.width}x{image.height}, {_duration(event):.1f} s, "
            f"{total:.1f} s after the start)"
        )
        self._show_warnings(event)
        if not self._as_json:
            show_image(file)

    async def _open(self, file: Path) -> bool:
        """Open the image with the viewer of the system; return whether it is open."""
        fault = await asyncio.to_thread(open_file, file)
        if fault is not None:
            self._console.print(f"{file} cannot be opened: {fault}")
        return fault is None

    def _show_text(self, event: SucceededEvent) -> None:
        for output in event.outputs:
            if isinstance(output, TextOutput):
                self._console.print(f"{output.text} ({_duration(event):.1f} s)")
        self._show_warnings(event)

    def _show_warnings(self, event: SucceededEvent) -> None:
        for warning in event.warnings:
            self._console.print(f"note: {warning}")


def _duration(event: SucceededEvent) -> float:
    """Return the seconds between the start of a run and its stored result."""
    timings = event.timings
    return timings.inference + timings.encode + timings.upload


async def _print_jobs(settings: Settings, console: Console) -> NoReturn:
    """Print one line for each job, until the task is cancelled.

    Raises:
        BusUnavailable: NATS cannot be reached.
    """
    bus = await connect(settings, name="generation up", within=CONNECT_WITHIN)
    try:
        with JobLines(console) as lines:
            feed = EventFeed(
                bus,
                settings.subjects,
                is_watched=lambda _: True,
                on_progress=lambda *_: None,
                on_event=lambda event, _size: lines.show(event),
            )
            await feed.open()
            await bus.closed.wait()
        raise ConnectionClosed
    finally:
        await bus.close()


def _addresses(stack: DevStack) -> str:
    return f"nats-server on {stack.nats.url}, S3 on {stack.store.endpoint}"


def _instructions(stack: DevStack, daemons: list[Daemon], gateway: GatewayServer | None) -> str:
    nats = f"nats --server {stack.nats.url}"
    probes = "\n".join(
        f"  {daemon.name:<14} {daemon.probes_url}/readyz, {daemon.probes_url}/metrics"
        for daemon in daemons
    )
    return f"""
Running until Ctrl-C. Data, ports and credentials are stored in {stack.directory}.

  NATS           {stack.nats.url}, monitoring: {stack.nats.monitoring_url}
  S3             {stack.store.endpoint} (bucket {stack.store.bucket})
{probes}
  HTTP           {_gateway_line(gateway)}
  logs           {stack.logs}
{"" if gateway is None else _http_example(gateway)}
Generate an image:

  NATS_URL={stack.nats.url} uv run consumer request text-to-image "a red circle"

With the nats command line tool, results in one terminal and requests in another:

  {nats} subscribe 'generation.result.>'
  {nats} publish --jetstream generation.request.text_to_image '{{"prompt":"a red circle"}}'

Jobs:
"""


def _gateway_line(gateway: GatewayServer | None) -> str:
    if gateway is None:
        return "none: install the extra 'gateway'"
    return f"{gateway.url} (web page), {gateway.url}/v1 (OpenAI's API), {gateway.url}/docs"


def _http_example(gateway: GatewayServer) -> str:
    return f"""
Over HTTP, with OpenAI's API:

  curl {gateway.url}/v1/images/generations --json '{{"prompt":"a red circle"}}'
"""
