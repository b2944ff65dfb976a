"""The sender's side of the commands: ask, show what happens, save what comes back."""

import asyncio
import base64
import hashlib
import uuid
from pathlib import Path
from typing import Any, Protocol, Self

import aiohttp
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from consumer.bus import Bus, Requester
from consumer.ports import ResultEvent, Unavailable
from generation_contracts import (
    FailedEvent,
    ImageArtifact,
    ImageToTextRequest,
    InlineImage,
    ProgressEvent,
    Request,
    StartedEvent,
    Subjects,
    SucceededEvent,
    Task,
    TextOutput,
    TextToImageRequest,
    encode,
    request_digest,
)
from generation_contracts.artifacts import ImageSource
from generation_contracts.events import CancelledEvent
from generation_contracts.requests import digest_of_bytes

DOWNLOAD_WITHIN = 60.0  # seconds for one output
SHOWN_OF_A_TEXT = 40  # characters, the last ones, beside the bar while it is being written


class DownloadFailed(Unavailable):
    """An output cannot be fetched, or is not what its event says."""


class RequestIdTaken(Exception):  # noqa: N818 - what has happened
    """The result under the id is that of another request."""


class Display(Protocol):
    """Told each event of a request as it comes."""

    def show(self, event: StartedEvent | ProgressEvent) -> None:
        """Something has happened."""


def new_request_id() -> str:
    """An id of its own for each request."""
    return uuid.uuid4().hex


def task_of(request: Request) -> Task:
    """The task that a request belongs to."""
    return Task.TEXT_TO_IMAGE if isinstance(request, TextToImageRequest) else Task.IMAGE_TO_TEXT


def image_source(argument: str) -> ImageSource:
    """A command's IMAGE: a local file goes into the request, anything with a scheme as it is.

    Raises:
        OSError: The file cannot be read.
    """
    if "://" in argument or argument.startswith("data:"):
        return argument
    return InlineImage(base64=base64.b64encode(Path(argument).read_bytes()).decode())


async def ask(bus: Bus, subjects: Subjects, request: Request, display: Display) -> ResultEvent:
    """Publish a request and wait for its terminal event.

    Raises:
        QueueFull, MessageTooLarge, BusUnavailable: See `Requester.submit`.
        RequestIdTaken: The id was used before, for something else.
    """
    if request.request_id is None:
        raise ValueError("a request that is submitted has an id")
    requester, task = Requester(bus, subjects), task_of(request)
    async with requester.listening(task, request.request_id) as events:
        await requester.submit(task, request)
        async for event in events:
            if isinstance(event, SucceededEvent | FailedEvent | CancelledEvent):
                if event.request_digest not in _digests(request):
                    raise RequestIdTaken
                return event
            if isinstance(event, StartedEvent | ProgressEvent):
                display.show(event)
    raise AssertionError("events end with a terminal one")


def _digests(request: Request) -> set[str]:
    # What a worker could not read as a request has the digest of its bytes.
    return {request_digest(request), digest_of_bytes(encode(request))}


async def save_pictures(event: SucceededEvent, folder: Path, name: str) -> list[Path]:
    """Fetch every picture of a result and check it against the event.

    Returns:
        The files, `<name>.png` or `<name>-<n>.png` where there are several.

    Raises:
        DownloadFailed: A picture cannot be fetched, or its bytes are not the ones that were stored.
    """
    pictures = [output for output in event.outputs if isinstance(output, ImageArtifact)]
    timeout = aiohttp.ClientTimeout(total=DOWNLOAD_WITHIN)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        contents = [await _fetch(session, picture) for picture in pictures]
    saved = []
    for number, (picture, content) in enumerate(zip(pictures, contents, strict=True)):
        suffix = Path(picture.key).suffix
        file = folder / (f"{name}{suffix}" if len(pictures) == 1 else f"{name}-{number}{suffix}")
        await asyncio.to_thread(file.write_bytes, content)
        saved.append(file)
    return saved


async def _fetch(session: aiohttp.ClientSession, picture: ImageArtifact) -> bytes:
    try:
        async with session.get(picture.url) as response:
            response.raise_for_status()
            content = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        # The error's own text has the presigned URL in it.
        raise DownloadFailed(f"{picture.key}: {type(error).__name__}") from None
    if hashlib.sha256(content).hexdigest() != picture.sha256:
        raise DownloadFailed(f"{picture.key}: the bytes are not the ones that were stored")
    return content


class ProgressBar:
    """Shows a request's progress and how a text grows, on a terminal; a context manager.

    Args:
        console: Where; standard error, so that results can be piped.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_interactive,  # where nothing can be redrawn, it is an empty line
        )
        self._bar = self._progress.add_task("waiting", total=1, visible=False)
        self._console = console
        self._text = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: StartedEvent | ProgressEvent) -> None:
        """Draw one event."""
        if isinstance(event, StartedEvent):
            self._console.print(
                f"started by {event.worker} after {event.queued:.2f} s in the queue, "
                f"model {event.model.id} ({event.model.family})",
                soft_wrap=True,
            )
            return
        # Step 0 begins a second try, and its text anew.
        self._text = ("" if event.step == 0 else self._text) + (event.text or "")
        end = " ".join(self._text.split())[-SHOWN_OF_A_TEXT:]
        self._progress.update(
            self._bar,
            description=escape(end) or str(event.task).replace("_", " "),
            completed=event.step,
            total=event.of,
            visible=True,
        )


class Quiet:
    """Shows nothing: for output that programs read."""

    def show(self, event: StartedEvent | ProgressEvent) -> None:
        """Not shown."""


def summary(event: ResultEvent, saved: list[Path]) -> str:
    """A result for people."""
    if isinstance(event, FailedEvent):
        return f"failed: {event.failure.code}: {event.failure.message}"
    if not isinstance(event, SucceededEvent):
        return "cancelled"
    lines = [output.text for output in event.outputs if isinstance(output, TextOutput)]
    lines += [f"saved {file}" for file in saved]
    lines += [f"note: {warning}" for warning in event.warnings]
    return "\n".join(lines)


def text_to_image(prompt: str, **parameters: Any) -> TextToImageRequest:
    """A text-to-image request, with a new id where none is given; None is the model's own.

    Raises:
        pydantic.ValidationError: Not within the contract.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    return TextToImageRequest(prompt=prompt, **{"request_id": new_request_id(), **given})


def image_to_text(
    prompt: str, images: tuple[ImageSource, ...], **parameters: Any
) -> ImageToTextRequest:
    """An image-to-text request, with a new id where none is given; None is the model's own.

    Raises:
        pydantic.ValidationError: Not within the contract.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    return ImageToTextRequest(
        prompt=prompt, images=images, **{"request_id": new_request_id(), **given}
    )
