"""The sender's side of the commands: ask, show what happens, save what comes back."""

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

SHOWN_OF_A_TEXT = 40  # characters, the last ones, beside the bar while it is being written


class Display(Protocol):
    """Told each event of a request as it comes."""

    def show(self, event: StartedEvent | ProgressEvent) -> None:
        """Something has happened."""


def image_source(argument: str) -> ImageSource:
    """A command's IMAGE: a local file goes into the request, anything with a scheme as it is.

    Raises:
        OSError: The file cannot be read.
    """
    if "://" in argument or argument.startswith("data:"):
        return argument
    return InlineImage(base64=base64.b64encode(Path(argument).read_bytes()).decode())


async def ask(client: GenerationClient, request: Request, display: Display) -> ResultEvent:
    """Send a request and wait for its terminal event.

    Raises:
        GenerationError: See `GenerationClient.events`.
    """
    async with aclosing(client.events(request)) as events:
        async for event in events:
            if not isinstance(event, StartedEvent | ProgressEvent):
                return event
            display.show(event)
    raise AssertionError("events end with a terminal one")


async def save_pictures(
    client: GenerationClient, event: SucceededEvent, folder: Path, name: str
) -> list[Path]:
    """Fetch every picture of a result.

    Returns:
        The files, `<name>.png` or `<name>-<n>.png` where there are several.

    Raises:
        DownloadFailed: A picture cannot be fetched, or its bytes are not the ones that were stored.
    """
    pictures = [output for output in event.outputs if isinstance(output, ImageArtifact)]
    contents = [await client.download(picture) for picture in pictures]
    saved = []
    for number, (picture, content) in enumerate(zip(pictures, contents, strict=True)):
        suffix = Path(picture.key).suffix
        file = folder / (f"{name}{suffix}" if len(pictures) == 1 else f"{name}-{number}{suffix}")
        await asyncio.to_thread(file.write_bytes, content)
        saved.append(file)
    return saved


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
