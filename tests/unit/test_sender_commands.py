"""What the commands show while a request is being done."""

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


def shown(*events: ProgressEvent) -> str:
    """The description of the bar after some events, as the terminal has it."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    with ProgressBar(console) as bar:
        for event in events:
            bar.show(event)
        bar._progress.refresh()
    return file.getvalue()


def test_a_text_is_shown_as_it_grows() -> None:
    assert "A light" in shown(added(1, "A"), added(2, None), added(3, " light"))


def test_the_end_of_a_long_text_is_shown_in_one_line() -> None:
    last = shown(added(1, "one\n" * 50), added(2, "the end"))
    assert "one one the end" in last
    assert "one " * 11 not in last


def test_a_text_that_is_begun_anew_is_shown_anew() -> None:
    begun = shown(added(3, "lost words"), added(0, None), added(1, "A lighthouse"))
    assert "wordsA" not in begun
    assert "A lighthouse" in begun


def test_what_a_model_writes_is_no_markup() -> None:
    assert "[bold]x[/bold]" in shown(added(1, "[bold]x[/bold]"))


def test_a_picture_is_shown_by_its_task() -> None:
    assert "image to text" in shown(added(1, None))
