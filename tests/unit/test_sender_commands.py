"""The progress bar of the sender commands."""

import io
from datetime import UTC, datetime

from rich.console import Console

from consumer.app.sender_commands import ProgressBar
from generation_contracts import ProgressEvent, Task


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


def test_bar_shows_the_text_so_far() -> None:
    assert "A light" in rendered(added(1, "A"), added(2, None), added(3, " light"))


def test_bar_shows_the_end_of_a_long_text_in_one_line() -> None:
    last = rendered(added(1, "one\n" * 50), added(2, "the end"))
    assert "one one the end" in last
    assert "one " * 11 not in last


def test_bar_shows_only_the_text_after_a_restart() -> None:
    output = rendered(added(3, "lost words"), added(0, None), added(1, "A lighthouse"))
    assert "wordsA" not in output
    assert "A lighthouse" in output


def test_bar_does_not_interpret_text_as_markup() -> None:
    assert "[bold]x[/bold]" in rendered(added(1, "[bold]x[/bold]"))


def test_bar_shows_the_task_if_there_is_no_text() -> None:
    assert "image to text" in rendered(added(1, None))
