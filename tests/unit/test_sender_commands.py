"""The output of the sender commands."""

import asyncio
import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from consumer.app import sender_commands
from consumer.app.sender_commands import ProgressBar, summary
from consumer.bus.connection import BusUnavailable
from generation_contracts import ProgressEvent, StartedEvent, SucceededEvent, Task, TextOutput
from generation_contracts.examples import EVENTS


def added(step: int, text: str | None) -> ProgressEvent:
    return ProgressEvent(
        request_id="a",
        task=Task.IMAGE_TO_TEXT,
        sequence=step,
        time=datetime.now(UTC),
        worker="worker-1",
        attempt=1,
        step=step,
        of=9,
        text=text,
    )


def rendered(*events: ProgressEvent) -> str:
    """Return the terminal output of the progress bar after some events."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    with ProgressBar(console) as bar:
        for event in events:
            bar.show(event)
        bar._progress.refresh()
    return file.getvalue()


def test_a_streamed_text_is_printed_as_it_comes() -> None:
    output = rendered(added(1, "A"), added(2, None), added(3, " light\nhouse"))
    assert output.endswith("A light\nhouse\n")


def test_a_streamed_text_is_not_cut_or_wrapped() -> None:
    words = "one " * 100
    assert words in rendered(added(1, words))


def test_a_new_attempt_starts_the_text_on_a_new_line() -> None:
    output = rendered(added(3, "lost words"), added(0, None), added(1, "A lighthouse"))
    assert "lost words\nA lighthouse\n" in output


def test_a_streamed_text_is_not_interpreted_as_markup() -> None:
    assert "[bold]x[/bold]" in rendered(added(1, "[bold]x[/bold]"))


def test_bar_counts_the_tokens_of_a_text_without_a_total() -> None:
    output = rendered(added(13, None))
    assert "image to text" in output
    assert "13 tokens" in output
    assert "13/9" not in output
    assert "-:--" not in output


def test_bar_shows_the_steps_of_an_image() -> None:
    output = rendered(added(3, None).model_copy(update={"task": Task.TEXT_TO_IMAGE}))
    assert "3/9 steps" in output


def test_a_shown_text_is_not_repeated() -> None:
    event = EVENTS["succeeded_text"]
    assert isinstance(event, SucceededEvent)
    (text,) = (output.text for output in event.outputs if isinstance(output, TextOutput))
    assert text in summary(event, [])
    assert text not in summary(event, [], shown=text)


class Lines:
    """A display that records the notes."""

    def __init__(self) -> None:
        self.notes: asyncio.Queue[str] = asyncio.Queue()

    def note(self, line: str) -> None:
        self.notes.put_nowait(line)

    def show(self, event: StartedEvent | ProgressEvent) -> None:
        raise AssertionError("no event is expected")


class FakeQueue:
    """A queue of a known length; None: the user may not read it."""

    bus = None

    def __init__(self, length: int | None) -> None:
        self._length = length

    async def before(self) -> int:
        if self._length is None:
            raise BusUnavailable("no permission")
        return self._length


async def watch(queue: Any, lines: Lines) -> None:
    """Watch the queue of a request that is stored and does not start."""
    stored = asyncio.Event()
    stored.set()
    await sender_commands._watch_queue(queue, Task.TEXT_TO_IMAGE, stored, asyncio.Event(), lines)


@pytest.mark.parametrize(
    ("tasks", "line"),
    [
        ([], "no worker of text_to_image is running: the request waits until one starts"),
        (["image_to_text"], "no worker of text_to_image is running"),
        (["text_to_image"] * 2, "2 of text_to_image running"),
    ],
    ids=["no worker", "a worker of the other task", "busy workers"],
)
async def test_a_request_that_does_not_start_reports_its_workers(
    monkeypatch: pytest.MonkeyPatch, tasks: list[str], line: str
) -> None:
    async def metadata(_: object) -> list[dict[str, str]]:
        return [{"task": task} for task in tasks]

    monkeypatch.setattr(sender_commands, "WORKERS_ASKED_AFTER", 0.0)
    monkeypatch.setattr(sender_commands, "worker_metadata", metadata)
    lines = Lines()
    await watch(FakeQueue(None), lines)
    assert lines.notes.get_nowait().startswith(line)
    assert lines.notes.empty()


@pytest.mark.parametrize(
    ("before", "notes"), [(0, []), (3, ["requests before it: 3 at most"])], ids=["none", "three"]
)
async def test_the_requests_before_a_stored_request_are_shown(
    monkeypatch: pytest.MonkeyPatch, before: int, notes: list[str]
) -> None:
    async def no_workers(*_: object) -> None: ...

    monkeypatch.setattr(sender_commands, "WORKERS_ASKED_AFTER", 0.0)
    monkeypatch.setattr(sender_commands, "_show_workers", no_workers)
    lines = Lines()
    await watch(FakeQueue(before), lines)
    assert [lines.notes.get_nowait() for _ in range(lines.notes.qsize())] == notes
