"""`consumer request`: send a request, show its progress, save its outputs."""

import asyncio
import base64
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from consumer.ports.bus import ResultEvent
from generation_client import GenerationClient, new_request_id
from generation_contracts import (
    FailedEvent,
    ImageArtifact,
    ImageToTextRequest,
    InlineImage,
    ProgressEvent,
    Request,
    StartedEvent,
    SucceededEvent,
    TextOutput,
    TextToImageRequest,
)
from generation_contracts.artifacts import ImageSource

SHOWN_TEXT_LENGTH = 40  # characters: the end of a streamed text, next to the progress bar


class Display(Protocol):
    """Shows the events of a request as they arrive."""

    def show(self, event: StartedEvent | ProgressEvent) -> None:
        """Show one event."""


def image_source(argument: str) -> ImageSource:
    """Return the image source of a command's IMAGE argument.

    A local file is embedded in the request. An argument with a URL scheme is passed on unchanged.

    Raises:
        OSError: The file cannot be read.
    """
    if "://" in argument or argument.startswith("data:"):
        return argument
    return InlineImage(base64=base64.b64encode(Path(argument).read_bytes()).decode())


async def send_request(client: GenerationClient, request: Request, display: Display) -> ResultEvent:
    """Send a request and wait for its terminal event.

    Raises:
        GenerationError: See `GenerationClient.events`.
    """
    async with aclosing(client.events(request)) as events:
        async for event in events:
            if not isinstance(event, StartedEvent | ProgressEvent):
                return event
            display.show(event)
    raise AssertionError("the events end with a terminal event")


async def save_images(
    client: GenerationClient, event: SucceededEvent, folder: Path, name: str
) -> list[Path]:
    """Download and save every image of a result.

    Returns:
        The files: `<name>.png`, or `<name>-<n>.png` for several images.

    Raises:
        DownloadFailed: An image cannot be downloaded, or its bytes differ from the stored digest.
    """
    images = [output for output in event.outputs if isinstance(output, ImageArtifact)]
    contents = [await client.download(image) for image in images]
    saved = []
    for number, (image, content) in enumerate(zip(images, contents, strict=True)):
        suffix = Path(image.key).suffix
        file = folder / (f"{name}{suffix}" if len(images) == 1 else f"{name}-{number}{suffix}")
        await asyncio.to_thread(file.write_bytes, content)
        saved.append(file)
    return saved


class ProgressBar:
    """Shows the progress of a request and the end of its text on a terminal; a context manager.

    Args:
        console: Writes to standard error, so that results can be piped.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_interactive,  # without redrawing, rich prints an empty line
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
        # Step 0 means a new attempt, which generates the text again from the start.
        self._text = ("" if event.step == 0 else self._text) + (event.text or "")
        end = " ".join(self._text.split())[-SHOWN_TEXT_LENGTH:]
        self._progress.update(
            self._bar,
            description=escape(end) or str(event.task).replace("_", " "),
            completed=event.step,
            total=event.of,
            visible=True,
        )


class NoDisplay:
    """Shows nothing, for output that programs read."""

    def show(self, event: StartedEvent | ProgressEvent) -> None:
        """Ignore the event."""


def summary(event: ResultEvent, saved: list[Path]) -> str:
    """Return a result as text for people."""
    if isinstance(event, FailedEvent):
        return f"failed: {event.failure.code}: {event.failure.message}"
    if not isinstance(event, SucceededEvent):
        return "cancelled"
    lines = [output.text for output in event.outputs if isinstance(output, TextOutput)]
    lines += [f"saved {file}" for file in saved]
    lines += [f"note: {warning}" for warning in event.warnings]
    return "\n".join(lines)


def text_to_image(prompt: str, **parameters: Any) -> TextToImageRequest:
    """Build a text-to-image request; a parameter that is None is left to the model's default.

    The request has a new id unless `request_id` is given.

    Raises:
        pydantic.ValidationError: A parameter violates the contract.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    return TextToImageRequest(prompt=prompt, **{"request_id": new_request_id(), **given})


def image_to_text(
    prompt: str, images: tuple[ImageSource, ...], **parameters: Any
) -> ImageToTextRequest:
    """Build an image-to-text request; a parameter that is None is left to the model's default.

    The request has a new id unless `request_id` is given.

    Raises:
        pydantic.ValidationError: A parameter violates the contract.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    return ImageToTextRequest(
        prompt=prompt, images=images, **{"request_id": new_request_id(), **given}
    )
